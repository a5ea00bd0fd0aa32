"""Safetensors files: a checked reader that maps, and a writer that leaves whole files or none.

A file is a little-endian uint64 n, then n bytes of JSON (name -> dtype, shape, [begin, end) in bytes of the
data), then the data, which the tensors fill without overlap or hole. Source: README of safetensors.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ..errors import FormatError
from . import strict_json
from .atomic import atomic_file
from .mapped import MappedFile, cut_short
from .strict_json import quote, show

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_AXES = 8
MAX_BYTES = 2**63 - 1
_ALIGN = 64  # bytes; where our writer lets the data begin
_CHUNK = 1 << 24  # bytes handed to one write, so that Ctrl-C is soon heard

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
#: Those that weights are read in as they lie.
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorView:
    """A tensor as a checked byte range of a mapped file.

    Attributes
    ----------
    name : str
    dtype : str
        A key of `DTYPES`, as "F32" or "BF16".
    shape : tuple of int
    file : MappedFile
    offset : int
        First byte, counted from the start of the file.
    nbytes : int
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    nbytes: int

    def rows(self, first: int, n: int) -> "TensorView":
        """n rows from `first` on, [n, columns]; axes before the last are taken as one."""
        row_bytes = self.nbytes // math.prod(self.shape[:-1])
        return replace(self, shape=(n, self.shape[-1]), offset=self.offset + first * row_bytes, nbytes=n * row_bytes)

    def array(self) -> np.ndarray:
        """Read-only array on the file's own pages, which stay mapped as long as the array lives.

        Where the file puts the tensor at an address that its type does not divide, it is a copy instead.
        """
        dtype = DTYPES[self.dtype]
        if self.nbytes == 0:
            values = np.empty(self.shape, dtype)
        else:
            values = np.frombuffer(self.file.mapping, dtype, self.nbytes // dtype.itemsize, self.offset)
            values = np.require(values.reshape(self.shape), requirements="A")
        values.flags.writeable = False
        return values


def dtype_name(dtype: np.dtype) -> str | None:
    """The format's name of a NumPy dtype, as "F32"; None where it has none."""
    return _TYPE_NAMES.get(dtype.newbyteorder("<"))


def stored_as(tensor) -> str:
    """In what a tensor of a file, or an array, lies: "F32", "BF16", "Q4_K"."""
    return str(tensor.dtype).upper().replace("FLOAT", "F")


def array_of(tensor) -> np.ndarray:
    """The values of a TensorView, or of anything that already is an array."""
    return tensor.array() if hasattr(tensor, "file") else np.asarray(tensor)


class SafetensorsFile(MappedFile, Mapping):
    """A mapped safetensors file: name -> `TensorView`, in the order of the header.

    Parameters
    ----------
    path : str or path

    Attributes
    ----------
    path : Path
    metadata : dict of str to str
    mapping : mmap
        The whole file, read-only. It is unmapped when the last array on it is gone.

    Raises
    ------
    OSError
        If the file cannot be opened.
    FormatError
        With every problem of the file, by tensor name.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, 8, "a safetensors file")
        problems: list[str] = []
        header, start = self._header(problems)
        self.metadata = _metadata(header, problems)
        self._tensors = self._read_entries(header, start, problems)
        if problems:
            raise FormatError(problems, str(self.path))

    def __getitem__(self, name: str) -> TensorView:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self)} tensors)"

    def _header(self, problems: list[str]) -> tuple[strict_json.Object, int]:
        """The header's object, and the file offset where the data begins."""
        size = len(self.mapping)
        n = int.from_bytes(self.mapping[:8], "little")
        if n > size - 8:
            raise FormatError(
                f"it is cut short, or no safetensors file: its first 8 bytes promise a header of {n} bytes, but only "
                f"{size - 8} follow", str(self.path)
            )
        if n > MAX_HEADER:
            raise FormatError(f"its header has {n} bytes; at most {MAX_HEADER} are allowed", str(self.path))
        try:
            header = strict_json.parse(self.mapping[8 : 8 + n])
        except ValueError as error:
            raise FormatError(f"its header cannot be read: {error}", str(self.path)) from None
        if not isinstance(header, strict_json.Object):
            raise FormatError(
                f"its header is a JSON {type(header).__name__}; it must be an object", str(self.path)
            )
        problems += [f"{quote(name)} is listed twice in the header" for name in header.repeated]
        return header, 8 + n

    def _read_entries(self, header: dict, start: int, problems: list[str]) -> dict[str, TensorView]:
        n_data = len(self.mapping) - start
        tensors: dict[str, TensorView] = {}
        n_before, beyond = len(problems), {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            found = _entry_problems(name, entry)
            problems += found
            if not found:
                begin, end = entry["data_offsets"]
                if end > n_data:
                    beyond[quote(name)] = start + end
                    continue
                tensors[name] = TensorView(
                    name, entry["dtype"], tuple(entry["shape"]), self, start + begin, end - begin
                )
        problems += cut_short(beyond, len(header) - ("__metadata__" in header), len(self.mapping))
        problems += _cover_problems(tensors.values(), start, len(self.mapping), len(problems) == n_before)
        return tensors


def _metadata(header: dict, problems: list[str]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        problems.append(f"'__metadata__' is {show(metadata)}; it must be an object of strings")
        return {}
    for key, value in metadata.items():
        if not isinstance(value, str):
            problems.append(f"'__metadata__': {quote(key)} is {show(value)}; it must be a string")
    return dict(metadata)


def _entry_problems(name: str, entry: object) -> list[str]:
    """What is wrong with one tensor's entry, taken alone."""
    who = quote(name)
    if not isinstance(entry, strict_json.Object):
        return [f"{who} is described by {show(entry)}; it must be an object"]
    problems = [f"{who} has the key {show(key)} twice" for key in entry.repeated]
    problems += [
        f"{who} has the key {show(key)}, which the format does not have"
        for key in entry
        if key not in ("dtype", "shape", "data_offsets")
    ]
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    checks = _dtype_problem(dtype), _shape_problem(shape), _range_problem(offsets)
    problems += [f"{who} {problem}" for problem in checks if problem]
    if any(checks):
        return problems

    n_bytes, n_held = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if n_bytes > MAX_BYTES:
        problems.append(f"{who} of {dtype} {shape} would have {n_bytes} bytes, which overflows 64 bits")
    elif n_bytes != n_held:
        problems.append(f"{who} of {dtype} {shape} has {n_bytes} bytes, but its range {offsets} has {n_held}")
    return problems


def _dtype_problem(dtype: object) -> str | None:
    if isinstance(dtype, str) and dtype in DTYPES:
        return None
    return f"has the dtype {show(dtype)}; it must be one of {', '.join(DTYPES)}"


def _shape_problem(shape: object) -> str | None:
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        return f"has the shape {show(shape)}; it must be a list of integers >= 0"
    if len(shape) > MAX_AXES:
        return f"has {len(shape)} axes; at most {MAX_AXES} are allowed"
    if math.prod(n for n in shape if n) > MAX_BYTES:  # an axis of 0 must not hide the others from NumPy
        return f"has the shape {show(shape, 200)}, whose product overflows 64 bits"
    return None


def _range_problem(offsets: object) -> str | None:
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        return f"has the data_offsets {show(offsets)}; they must be two integers >= 0"
    begin, end = offsets
    if begin > end:
        return f"has the range {offsets}, which ends before it begins"
    return None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_BYTES


def _cover_problems(tensors: list[TensorView], start: int, end: int, all_known: bool) -> list[str]:
    """Overlaps of tensors; when every range is known, also bytes of [start, end) that belong to no tensor."""
    problems = []
    reached, last = start, ""
    for t in sorted((t for t in tensors if t.nbytes), key=lambda t: (t.offset, t.nbytes)):
        if t.offset < reached:
            n_shared = min(reached, t.offset + t.nbytes) - t.offset
            problems.append(f"{quote(last)} and {quote(t.name)} overlap by {n_shared} bytes")
        elif t.offset > reached and all_known:
            problems.append(f"{t.offset - reached} bytes before {quote(t.name)} belong to no tensor")
        if t.offset + t.nbytes > reached:
            reached, last = t.offset + t.nbytes, t.name
    if reached < end and all_known:
        problems.append(f"the last {end - reached} bytes of the file belong to no tensor")
    return problems


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays to a file, one at a time, through `atomic_file`.

    Parameters
    ----------
    path : str or path
    tensors : mapping of str to array
        NumPy arrays, `TensorView`, or anything with `shape`, `dtype` and `array()`; `array()` is called once,
        when the tensor's turn comes, so that a mapping larger than memory can be written.
    metadata : mapping of str to str, optional

    Raises
    ------
    TypeError
        If a name or a metadata value is not text, or a dtype has no safetensors name.
    ValueError
        If a tensor is called "__metadata__", or `array()` gives another shape or dtype than was declared.
    OSError
        If the file cannot be written. Nothing is then left under `path` that was not there before.
    """
    plan = _plan(tensors)
    header = _encode_header(plan, metadata)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, dtype, shape in plan:
            _write_array(file, name, dtype, shape, tensors[name])


@contextlib.contextmanager
def sparse_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, object], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, int, np.ndarray], None]]:
    """A file whose tensors are written in parts: gives ``keep(name, row, values)``, for the rows from `row` on.

    `tensors` have `shape` and `dtype`. The file has its full size from the start, and its name when the block ends.

    Raises
    ------
    OSError
        If the file is larger than what is free on its disk; nothing is written then.
    """
    plan = _plan(tensors)
    header = _encode_header(plan, metadata)
    begin, places = 8 + len(header), {}
    for name, dtype, shape in plan:
        places[name] = begin, math.prod(shape[1:]) * DTYPES[dtype].itemsize, DTYPES[dtype]
        begin += math.prod(shape) * DTYPES[dtype].itemsize
    free = shutil.disk_usage(Path(path).absolute().parent).free
    if begin > free:
        raise OSError(errno.ENOSPC, f"{path} would be {begin:,} bytes and {free:,} are free on its disk")
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.truncate(begin)

        def keep(name: str, row: int, values: np.ndarray) -> None:
            first, row_bytes, dtype = places[name]
            file.seek(first + row * row_bytes)
            file.write(np.ascontiguousarray(values, dtype).tobytes())

        yield keep


def _plan(tensors: Mapping[str, object]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) in the order of the file: wide types first, so that every tensor stays aligned."""
    plan = []
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: the name {name!r} is a {type(name).__name__}; it must be a str")
        if name == "__metadata__":
            raise ValueError("tensors: '__metadata__' is the format's own key; no tensor can have this name")
        plan.append((name, _type_name(name, tensor), tuple(int(n) for n in tensor.shape)))
    return sorted(plan, key=lambda row: -DTYPES[row[1]].itemsize)


def _type_name(name: str, tensor: object) -> str:
    dtype = getattr(tensor, "dtype", None)
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    found = dtype_name(dtype) if isinstance(dtype, np.dtype) else None
    if found is None:
        what = f"has dtype {dtype}" if dtype is not None else f"is a {type(tensor).__name__}"
        raise TypeError(f"tensors: {name!r} {what}; safetensors can hold arrays of {', '.join(DTYPES)}")
    return found


def _encode_header(plan: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata: {key!r} is {show(value)}; keys and values must be str")
        header["__metadata__"] = dict(metadata)
    begin = 0
    for name, dtype, shape in plan:
        end = begin + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-(8 + len(text)) % _ALIGN)


def _write_array(file: BinaryIO, name: str, dtype: str, shape: tuple[int, ...], tensor: object) -> None:
    values = tensor if isinstance(tensor, np.ndarray) else np.asarray(tensor.array())
    if values.shape != shape or values.dtype.newbyteorder("<") != DTYPES[dtype]:
        raise ValueError(
            f"tensors: {name!r} was declared as {dtype} {list(shape)} but array() gave "
            f"{values.dtype} {list(values.shape)}"
        )
    raw = np.ascontiguousarray(values, DTYPES[dtype]).reshape(-1).view(np.uint8)
    for i in range(0, raw.size, _CHUNK):
        file.write(raw[i : i + _CHUNK].data)
