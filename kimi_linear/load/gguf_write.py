"""GGUF files: a writer that leaves whole files or none, and holds a part of one tensor at a time.

The layout: gguf.py, which reads what is written here. Source: docs/gguf.md of ggml.
"""

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic import atomic_file
from .gguf import _ARRAY, _BOOL, _IDS, _NUMBERS, _STRING, DEFAULT_ALIGNMENT, FILE_TYPES, MAX_NAME, MetaArray, bytes_of

_CHUNK = 1 << 24  # bytes handed to one write, so that Ctrl-C is soon heard


class Values(MetaArray):
    """An array of the metadata that is to be written; it reads as one of a file does."""

    def __init__(self, key: str, kind: str, items: Iterable):
        items = list(items)
        super().__init__(key, kind, len(items), None, 0, 0)
        object.__setattr__(self, "items", items)

    def values(self) -> list | np.ndarray:
        """The elements."""
        if self.kind == "string":
            return self.items
        return np.asarray(self.items, np.bool_ if self.kind == "bool" else _NUMBERS[_IDS[self.kind]])


@dataclass(frozen=True)
class Outgoing:
    """A tensor that is to be written.

    Attributes
    ----------
    name : str
    dtype : str
        Its storage type, as "Q4_K".
    shape : tuple of int
        Row-major; the last axis is whole blocks.
    parts : callable
        Gives buffers whose bytes, one after the other, are the tensor's. Called once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without what aligns the next."""
        return bytes_of(self.dtype, self.shape)


def write_gguf(path: str | os.PathLike, metadata: Mapping, tensors: list[Outgoing],
               progress: Callable[[int, str], None] | None = None, check: Callable[[], None] | None = None,
               overwrite: bool = True) -> int:
    """Write a file, through `atomic_file`.

    Parameters
    ----------
    path : str or path
    metadata : mapping of str to value
        bool, int (uint32, or uint64 or int64 where that is too narrow), float (float32), str, `Values`, or bytes:
        the pair as another file has it.
    tensors : list of Outgoing
    progress : callable, optional
        Called with bytes as they are written, and the tensor's name.
    check : callable, optional
        Called last, before the file takes its name; what it raises removes the file.
    overwrite : bool
        Whether a file that is there, or comes meanwhile, is replaced.

    Returns
    -------
    n_bytes : int
        Of the whole file.

    Raises
    ------
    FileExistsError
        If there is a file and `overwrite` is False.
    OSError
        If it would not fit on its disk, or cannot be written. What was under `path` is then there still, and no
        other file.
    ValueError
        If a name is too long, or parts give more or fewer bytes than the type and the shape say.
    """
    path = Path(path)
    header = _header(metadata, tensors)
    n_bytes = len(header) + sum(_aligned(t.nbytes) for t in tensors)
    free = shutil.disk_usage(path.absolute().parent).free
    if n_bytes > free:
        raise OSError(errno.ENOSPC, f"the file would be {n_bytes:,} bytes and {free:,} are free on its disk", str(path))
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(header)
        for tensor in tensors:
            _write_tensor(file, tensor, progress or (lambda n, name: None))
        if check is not None:
            check()
    return n_bytes


def _write_tensor(file, tensor: Outgoing, progress: Callable[[int, str], None]) -> None:
    n = 0
    for part in tensor.parts():
        raw = memoryview(part).cast("B")
        for i in range(0, len(raw), _CHUNK):
            file.write(raw[i : i + _CHUNK])
        n += len(raw)
        progress(len(raw), tensor.name)
    if n != tensor.nbytes:
        raise ValueError(f"{tensor.name}: its parts have {n} bytes; {tensor.dtype} {list(tensor.shape)} has "
                         f"{tensor.nbytes}")
    file.write(b"\0" * (_aligned(n) - n))


def _aligned(n: int) -> int:
    return -(-n // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _header(metadata: Mapping, tensors: list[Outgoing]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [value if isinstance(value, bytes) else _text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for t in tensors:
        if len(t.name.encode()) >= MAX_NAME:
            raise ValueError(f"the tensor name {t.name!r} has {len(t.name.encode())} bytes; it must have fewer than "
                             f"{MAX_NAME}")
        ne = t.shape[::-1]
        parts.append(_text(t.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, FILE_TYPES[t.dtype], offset))
        offset += _aligned(t.nbytes)
    raw = b"".join(parts)
    return raw + b"\0" * (_aligned(len(raw)) - len(raw))


def _text(s: str) -> bytes:
    raw = s.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    """A value behind its type."""
    if isinstance(value, MetaArray):
        return struct.pack("<IIQ", _ARRAY, _IDS[value.kind], value.count) + _elements(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _IDS["float32"], value)
    kind = "int64" if value < 0 else "uint32" if value < 2**32 else "uint64"
    return struct.pack("<I", _IDS[kind]) + np.array(value, _NUMBERS[_IDS[kind]]).tobytes()


def _elements(array: MetaArray) -> bytes:
    values = array.values()
    return b"".join(map(_text, values)) if array.kind == "string" else values.tobytes()
