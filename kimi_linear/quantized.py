"""Storage types of weights, and arrays in blocks.

The table of types comes from the C core, whose list (csrc/quant/types.def) is the only one. Names and numbers
are ggml's. What a block holds: docs/block-types.md.
"""

from typing import NamedTuple

import numpy as np

from . import _core
from ._masks import unmasked
from ._names import Named, meant
from .device_array import DeviceArray

__all__ = ["Quantized", "StorageType", "storage_type", "storage_types"]


class StorageType(NamedTuple):
    """One storage type: `values` values in `bytes` bytes, a block; a float type has blocks of one value."""

    name: str
    id: int
    values: int
    bytes: int
    writable: bool

    @property
    def bits(self):
        """Bits a value."""
        return 8 * self.bytes / self.values

    def row_bytes(self, cols, name="x"):
        """Bytes of a row of `cols` values; ValueError where they are no whole blocks."""
        if cols % self.values:
            raise ValueError(f"{name} has rows of {cols} values; {self.name} needs a multiple of {self.values}")
        return cols // self.values * self.bytes


#: Name -> :class:`StorageType`, in the order of their ids.
storage_types = Named("a storage type", {row[0]: StorageType(*row) for row in _core.types()})
_BY_ID = {t.id: t for t in storage_types.values()}


def storage_type(type):
    """The :class:`StorageType` of a name or an id; ValueError lists the names."""
    found = storage_types.get(type) if isinstance(type, str) else _BY_ID.get(type)
    if found is None:
        raise ValueError(f"type is {type!r}; it must be one of {', '.join(storage_types)}{meant(type, storage_types)}")
    return found


class Quantized:
    """An array whose rows, along its last axis, lie in blocks.

    It is used as it lies: `linear`, `moe` and `embedding` take it for a weight, and NumPy sees its values in
    float32. Slices of the leading axes (rows, experts) are views.

    Parameters
    ----------
    data : uint8 array, DeviceArray or buffer
        The rows' blocks; kept, not copied.
    type : str or int
        Name or id of a block type: "Q4_K".
    shape : tuple of int
        Of the values; the last axis is whole blocks.

    Attributes
    ----------
    data : (..., bytes a row) uint8
    type : str
    shape : tuple of int

    Raises
    ------
    TypeError
        If `data` is not bytes.
    ValueError
        If the type is unknown or has no blocks, or data and shape disagree.

    Examples
    --------
    >>> w = kl.ops.quantize(np.ones((4, 256), np.float32), "Q4_K")
    >>> w[1:3].shape, w.n_bytes
    ((2, 256), 576)
    """

    __slots__ = ("data", "shape", "type")

    def __init__(self, data, type, shape):
        kind = storage_type(type)
        if kind.values == 1:
            raise ValueError(f"type is {kind.name}, which has no blocks; give an array of its dtype")
        data = data if isinstance(data, (np.ndarray, DeviceArray)) else np.frombuffer(data, np.uint8)
        unmasked(data, "data")
        if data.dtype != np.uint8:
            raise TypeError(f"data is {data.dtype}; it must be uint8: data.view('uint8')")
        shape = tuple(int(n) for n in shape)
        if not shape or min(shape) < 0:
            raise ValueError(f"shape is {list(shape)}; it must have one axis or more, none negative")
        wanted = (*shape[:-1], kind.row_bytes(shape[-1], "shape"))
        if data.shape != wanted:
            n_bytes = int(np.prod(wanted))
            if data.size != n_bytes:
                raise ValueError(f"data has {data.size} bytes; {kind.name} of shape {list(shape)} has {n_bytes}")
            data = data.reshape(wanted)
        self.data, self.type, self.shape = data, kind.name, shape

    @property
    def storage(self):
        """The :class:`StorageType`."""
        return storage_types[self.type]

    @property
    def ndim(self):
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self):
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def n_bytes(self):
        """Bytes of the blocks."""
        return self.data.nbytes

    nbytes = n_bytes

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        axes = index if isinstance(index, tuple) else (index,)
        if any(i is None or i is Ellipsis for i in axes) or len(axes) >= self.ndim:
            raise IndexError(f"index {index!r} reaches the last axis of {list(self.shape)}, which lies in blocks; "
                             f"index the axes before it, or np.asarray(w)")
        data = self.data[index]
        return Quantized(data, self.type, (*data.shape[:-1], self.shape[-1]))

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError(f"{self!r} has no array of its values to share; copy=False cannot be")
        from .ops import dequantize

        values = dequantize(self)
        return values if dtype is None else values.astype(dtype, copy=False)

    def __eq__(self, other):
        if not isinstance(other, Quantized):
            return NotImplemented
        same = self.type == other.type and self.shape == other.shape
        return same and np.array_equal(self.data, other.data)

    def __repr__(self):
        return f"Quantized({self.type}, shape={list(self.shape)}, {self.n_bytes:,} bytes)"
