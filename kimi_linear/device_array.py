"""Arrays in a device's memory, of this package's own or of another's, by DLPack or the CUDA array interface."""

import math

import ml_dtypes
import numpy as np

from . import _core
from ._masks import unmasked
from .context import current

__all__ = ["DeviceArray", "from_device"]

# dtype -> the code of DLPack, the character of the buffer protocol (16-bit floats go to the core as uint16)
_TYPES = {np.dtype(np.float32): (2, "f"), np.dtype(np.float16): (2, "e"), np.dtype(ml_dtypes.bfloat16): (4, "E"),
          np.dtype(np.int32): (0, "i"), np.dtype(np.int64): (0, "q"), np.dtype(np.uint8): (1, "B"),
          np.dtype(np.uint16): (1, "H")}
_BY_CODE = {(code, 8 * dtype.itemsize): dtype for dtype, (code, _) in _TYPES.items()}
# DLPack's types of device -> its name of the default stream: CUDA, CUDA managed, ROCm, an extension (the host build)
_DEVICES = {2: 1, 13: 1, 10: 0, 12: None}


class DeviceArray:
    """A contiguous array in the memory of a device; ops take it and give it without a copy.

    Made by `from_numpy`, and by every op whose first array argument lies on a device. Its memory is freed with the last
    of it and of the arrays that others made of it. Ops do not look at its values: a positive gate is not found.

    Streams. An op with arrays of its own context is launched in order and nothing is waited for. With any other array
    (another library's, another context's) the call waits, first for the array's producer: DLPack's default stream, or
    the ``stream`` of the CUDA array interface (None: nothing; not given: the default stream), then for its own end, so
    that what it has written may be used on any stream. `numpy`, ``__dlpack__`` and ``__cuda_array_interface__`` wait
    for what the context launched; ``stream`` in the latter is None, as nothing is left to wait for.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
        float32, float16, bfloat16, int32, int64, uint8 or uint16.
    """

    __slots__ = ("__weakref__", "_memory", "dtype", "shape")
    __array_ufunc__ = None  # NumPy computes nothing with it

    def __init__(self, memory, shape, dtype):
        """For this package; `memory` None is taken by the op that writes the array."""
        self._memory, self.shape, self.dtype = memory, tuple(shape), np.dtype(dtype)

    @classmethod
    def from_numpy(cls, x, ctx):
        """A copy of a NumPy array in the memory of a context's device.

        Parameters
        ----------
        x : array
            float32, float16, bfloat16, int32, int64, uint8 or uint16.
        ctx : Context
            Of a device.

        Raises
        ------
        TypeError
            If x is of another type.
        ValueError
            If `ctx` computes on the CPU.
        MemoryError
            If the device has no room.
        """
        x = unmasked(x if isinstance(x, np.ndarray) else np.asarray(x), "x")
        if x.dtype not in _TYPES:
            raise TypeError(f"x is {x.dtype}; it must be one of {', '.join(map(str, _TYPES))}")
        memory = _core.DeviceMemory.allocate(current(ctx)._core, x.nbytes)
        memory.upload(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return cls(memory, x.shape, x.dtype)

    @property
    def ndim(self):
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self):
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self):
        """Bytes of the values."""
        return self.size * self.dtype.itemsize

    def __len__(self):
        if not self.shape:
            raise TypeError("a DeviceArray without axes has no length")
        return self.shape[0]

    def numpy(self):
        """A copy in the host's memory; it waits for what the context launched."""
        x = np.empty(self.shape, self.dtype)
        if self._memory is None:
            raise ValueError("the array has no memory: no op has written it")
        self._memory.download(x.reshape(-1).view(np.uint8))
        return x

    def reshape(self, *shape):
        """The same memory with other axes; -1 is what is left."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if -1 in shape:
            known = math.prod(n for n in shape if n != -1)
            shape = tuple(self.size // max(known, 1) if n == -1 else n for n in shape)
        if math.prod(shape) != self.size:
            raise ValueError(f"shape is {list(shape)}; the array has {self.size} values, {list(self.shape)}")
        return DeviceArray(self._memory, shape, self.dtype)

    def view(self, dtype):
        """The same memory as another type of the same size."""
        if np.dtype(dtype).itemsize != self.dtype.itemsize:
            raise TypeError(f"dtype is {np.dtype(dtype)}; it must have the {self.dtype.itemsize} bytes of {self.dtype}")
        return DeviceArray(self._memory, self.shape, dtype)

    # ---- the protocols ----

    def __dlpack_device__(self):
        return self._memory.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if copy:
            raise BufferError("a DeviceArray is given as it lies; copy must be None or False")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"dl_device is {tuple(dl_device)}; the array lies on {self.__dlpack_device__()}")
        self._memory.wait()
        return self._memory.to_dlpack(_TYPES[self.dtype][0], 8 * self.dtype.itemsize, self.shape)

    @property
    def __cuda_array_interface__(self):
        if self.dtype.kind == "V" or self.dtype == ml_dtypes.bfloat16:
            raise AttributeError("the CUDA array interface has no bfloat16; DLPack has")
        self._memory.wait()
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self._memory.address, self._memory.read_only),
                "strides": None, "stream": None, "version": 3}

    def __array__(self, dtype=None, copy=None):
        raise TypeError("a DeviceArray lies on a device; its numpy() is a copy in the host's memory")

    def __repr__(self):
        return f"DeviceArray({self.dtype}, shape={list(self.shape)}, device={self._memory and self._memory.device})"

    # ---- for the binding ----

    @property
    def _format(self):
        return _TYPES[self.dtype][1]

    @property
    def _range(self):
        """First byte and the one behind the last; (0, 0) before it has memory."""
        begin = self._memory.address if self._memory is not None else 0
        return begin, begin + (self._memory.nbytes if self._memory is not None else 0)


def from_device(x, name):
    """`x` as a DeviceArray over the same memory, or None where it does not lie on a device.

    Parameters
    ----------
    x : anything
    name : str
        The argument, for messages.

    Raises
    ------
    TypeError
        If its type is none that ops have, or a protocol is broken.
    ValueError
        If it is strided.
    """
    if isinstance(x, DeviceArray):
        return x
    if isinstance(x, np.ndarray):
        return None
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, name)
    return _from_interface(x, name) if hasattr(x, "__cuda_array_interface__") else None


def _from_dlpack(x, name):
    try:
        device = x.__dlpack_device__()[0]
        if device not in _DEVICES:
            return None
        capsule = _capsule_of(x.detach() if hasattr(x, "detach") else x, _DEVICES[device])
    except (BufferError, RuntimeError, ValueError) as error:
        if type(x).__module__.split(".")[0] == "torch" and x.device.type == "meta":
            return None
        raise TypeError(f"{name}: a {type(x).__name__} whose memory cannot be taken ({error})") from None
    memory, code, bits, shape = _core.DeviceMemory.from_dlpack(capsule, name)
    if (code, bits) not in _BY_CODE:
        raise TypeError(f"{name} has DLPack's type {code} of {bits} bits; it must be one of "
                        f"{', '.join(map(str, _TYPES))}")
    return DeviceArray(memory, shape, _BY_CODE[code, bits])


def _capsule_of(x, stream):
    """Of a producer that has the default stream wait for its own: torch does so only where it is told the stream."""
    if stream is None:
        return x.__dlpack__()
    try:
        return x.__dlpack__(stream=stream)
    except TypeError:  # an older producer's has no such argument
        return x.__dlpack__()


def _from_interface(x, name):
    told = x.__cuda_array_interface__
    shape, dtype = tuple(told["shape"]), np.dtype(told["typestr"])
    if dtype not in _TYPES:
        raise TypeError(f"{name} is {dtype}; it must be one of {', '.join(map(str, _TYPES))}")
    if told.get("strides") is not None and tuple(told["strides"]) != _strides(shape, dtype):
        raise ValueError(f"{name} is strided; on a device it must be contiguous")
    stream = told.get("stream", 1 if told.get("version", 0) < 3 else None)
    if stream is not None and (not isinstance(stream, int) or stream < 1):
        raise TypeError(f"{name}: its stream is {stream!r}; it must be None, 1, 2 or a stream's address")
    address, read_only = told["data"]
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = _core.DeviceMemory.borrow(address, n_bytes, read_only, 0 if stream == 1 else stream, x)
    return DeviceArray(memory, shape, dtype)


def _strides(shape, dtype):
    """In bytes, of a contiguous array."""
    return tuple(math.prod(shape[i + 1:]) * dtype.itemsize for i in range(len(shape)))
