"""GGUF files: a checked reader that maps.

A file is "GGUF", a version, two counts, metadata (key, type, value), tensor infos (name, sizes with the fastest
first, type, offset) and, aligned, the tensors' data; little-endian. Source: docs/gguf.md of ggml.

Opening reads the header once, in order. Arrays of the metadata are only walked; their values are made when asked
for, so that a vocabulary costs nothing before it is used.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError
from ..ops._quant import dequantize
from ..quantized import storage_types
from .mapped import MappedFile, cut_short, overlaps
from .safetensors import TensorView
from .strict_json import quote, show

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes up to the data; a vocabulary of 163,840 with its merges takes about 8 MiB
MAX_AXES = 4
MAX_BYTES = 2**63 - 1
MAX_KEY = 2**16 - 1  # bytes, the format's own limits
MAX_NAME = 64
MAX_DEPTH = 4  # of arrays in arrays
MAX_NESTED = 2**16  # arrays in arrays, of a file
MAX_COUNT = 2**16  # metadata keys, and tensors; experts are stacked
MAX_ALIGNMENT = 2**30
DEFAULT_ALIGNMENT = 32

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_KINDS = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", _BOOL: "bool",
          _STRING: "string", _ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64"}
_IDS = {name: kind for kind, name in _KINDS.items()}
_LEAST = {**{kind: np.dtype(name).itemsize for kind, name in _NUMBERS.items()}, _BOOL: 1, _STRING: 8, _ARRAY: 12}
_U64 = struct.Struct("<Q")

# Types that a file may hold beside the core's: id -> name, values a block, bytes a block. Q8_1 and Q8_K are for
# activations.
_OTHERS = {9: ("Q8_1", 32, 40), 15: ("Q8_K", 256, 292), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
           27: ("I64", 1, 8), 28: ("F64", 1, 8)}
TYPES = {t.id: (t.name, t.values, t.bytes) for t in storage_types.values()} | _OTHERS
#: Name -> id.
FILE_TYPES = {name: i for i, (name, _, _) in TYPES.items()}
#: Name -> id of the block types that weights are read in.
BLOCK_TYPES = {t.name: t.id for t in storage_types.values() if t.values > 1}


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a storage type whose blocks make up its rows."""
    _, values, n_bytes = TYPES[FILE_TYPES[dtype]]
    return math.prod(shape) // values * n_bytes


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a file begins as GGUF files do, whatever its name; False where there is no such file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


@dataclass(frozen=True)
class MetaArray:
    """An array of the metadata, walked but not read.

    Attributes
    ----------
    key : str
    kind : str
        Type of its elements, as "string" or "int32".
    count : int
    file : GGUFFile
    offset, end : int
        Its elements' bytes in the file.
    """

    key: str
    kind: str
    count: int
    file: "GGUFFile"
    offset: int
    end: int

    def __len__(self) -> int:
        return self.count

    def values(self) -> list | np.ndarray:
        """The elements: a list of str or of lists, or an array of numbers.

        Raises
        ------
        FormatError
            If a string is not UTF-8, or a bool neither 0 nor 1.
        """
        return _Cursor(self.file, self.offset, self.end).elements(self.key, _IDS[self.kind], self.count)


def described(value: object) -> str:
    """A value of the metadata, for an error message."""
    return f"an array of {value.kind}" if isinstance(value, MetaArray) else show(value)


@dataclass(frozen=True)
class BlockView(TensorView):
    """A tensor of a block type: `shape` in values; `array` gives them as float32, a copy."""

    def digest_parts(self, n: int) -> list[bytes]:
        """What tells it from another tensor: name, type, sizes, and the n bytes in its middle as stored."""
        return stored_parts(self, n)

    def array(self) -> np.ndarray:
        """The values, dequantised."""
        stored = np.frombuffer(self.file.mapping, np.uint8, self.nbytes, self.offset)
        values = dequantize(stored, self.dtype, self.shape)
        values.flags.writeable = False
        return values


def stored_parts(view: TensorView, n: int) -> list[bytes]:
    """For a fingerprint: a tensor's name, type and sizes, and the n bytes in its middle as stored."""
    begin = view.offset + max(0, view.nbytes // 2 - n // 2)
    stored = view.file.mapping[begin : min(begin + n, view.offset + view.nbytes)]
    return [f"{view.name} {view.dtype} {view.shape}".encode(), stored]


class GGUFFile(MappedFile, Mapping):
    """A mapped GGUF file: name -> `TensorView` or, of block types, `BlockView`, in the order of the file.

    A view's shape is row-major: the file's sizes, reversed. Its dtype is the type's name, as "F32" or "Q4_K".

    Parameters
    ----------
    path : str or path

    Attributes
    ----------
    path : Path
    version : int
    metadata : dict of str to (int, float, bool, str or MetaArray)
    pairs : dict of str to (int, int)
        The bytes of the file that hold a key, its type and its value.
    alignment : int
    data_offset : int
        Byte where the tensors' data begin.
    mapping : mmap

    Raises
    ------
    OSError
        If the file cannot be opened.
    FormatError
        With the first thing by which its header cannot be read, or all that is wrong with its tensors: key or
        tensor, and byte.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, 24, "a GGUF file")
        cursor = _Cursor(self, 0, min(len(self.mapping), MAX_HEADER))
        n_tensors, n_keys = self._start(cursor)
        problems: list[str] = []
        self.metadata = self._metadata(cursor, n_keys, problems)
        self.alignment = self._alignment(problems)
        infos = [_info(cursor) for _ in range(n_tensors)]
        self.data_offset = -(-cursor.at // self.alignment) * self.alignment
        self._tensors = self._views(infos, problems)
        if problems:
            raise FormatError(problems, str(self.path))

    def __getitem__(self, name: str) -> TensorView:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self)} tensors)"

    def _start(self, cursor: "_Cursor") -> tuple[int, int]:
        """Magic, version and the two counts, which must not promise more than the file could hold."""
        magic, version = self.mapping[:4], int.from_bytes(self.mapping[4:8], "little")
        if magic != MAGIC:
            cursor.fail(f"it begins with {magic!r}; a GGUF file begins with {MAGIC!r}")
        if version not in VERSIONS:
            swapped = int.from_bytes(self.mapping[4:8], "big")
            if version & 0xFFFF == 0 and 0 < swapped < 0xFFFF:
                cursor.fail(f"it is big-endian (version {swapped}); only little-endian files are read")
            cursor.fail(f"its version is {version}; versions {' and '.join(map(str, VERSIONS))} are read")
        self.version = version
        cursor.at = 8
        counts = []
        for what, least in (("tensors", 32), ("metadata keys", 13)):
            n = cursor.u64(f"the number of {what}")
            if n > (cursor.end - cursor.at) // least:
                cursor.fail(f"it promises {n} {what} at byte {cursor.at - 8}; no more than "
                            f"{(cursor.end - cursor.at) // least} fit its {cursor.whole}")
            if n > MAX_COUNT:
                cursor.fail(f"it has {n} {what}, by its byte {cursor.at - 8}; at most {MAX_COUNT} are read")
            counts.append(n)
        return counts[0], counts[1]

    def _metadata(self, cursor: "_Cursor", n: int, problems: list[str]) -> dict:
        metadata: dict = {}
        self.pairs = {}
        for i in range(n):
            begin = cursor.at
            key = cursor.string(f"metadata key {i}", MAX_KEY)
            if not key:
                cursor.fail(f"metadata key {i} at byte {begin} is empty")
            kind = cursor.u32(f"the type of {quote(key)}")
            value = cursor.value(key, kind)
            if key in metadata:
                problems.append(f"the key {quote(key)} is there twice, the second time at byte {begin}")
            metadata.setdefault(key, value)
            self.pairs.setdefault(key, (begin, cursor.at))
        return metadata

    def _alignment(self, problems: list[str]) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is int and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0:
            return value
        problems.append(f"'general.alignment' is {show(value)}; it must be a power of two from 8 to {MAX_ALIGNMENT}")
        return DEFAULT_ALIGNMENT

    def _views(self, infos: list["_Info"], problems: list[str]) -> dict[str, TensorView]:
        views: dict[str, TensorView] = {}
        size, beyond = len(self.mapping), {}
        for info in infos:
            if found := _info_problem(info, self.alignment):
                problems.append(f"{quote(info.name)} (its info is at byte {info.at}) {found}")
            elif (end := self.data_offset + info.offset + info.n_bytes) > size:
                beyond[f"{quote(info.name)} (its info is at byte {info.at})"] = end
            elif info.name in views:
                problems.append(f"{quote(info.name)} is there twice, the second time at byte {info.at}")
            else:
                name, n_values, _ = TYPES[info.type]
                kind = TensorView if n_values == 1 else BlockView
                views[info.name] = kind(info.name, name, info.ne[::-1], self, self.data_offset + info.offset,
                                        info.n_bytes)
        misplaced = cut_short(beyond, len(infos), size) + overlaps(views.values())
        if misplaced and not problems:
            misplaced = _as_the_fork_packs(infos, size - self.data_offset) or misplaced
        problems += misplaced
        return views


@dataclass(frozen=True)
class _Info:
    """A tensor as the header describes it; `at` is the byte of the description."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int
    at: int

    @property
    def n_bytes(self) -> int:
        """Of the values, in a type that is known."""
        return bytes_of(TYPES[self.type][0], self.ne)


def _info(cursor: "_Cursor") -> _Info:
    at = cursor.at
    name = cursor.string(f"the tensor name at byte {at}", MAX_NAME)
    if not name:
        cursor.fail(f"the tensor name at byte {at} is empty")
    who = quote(name)
    n_dims = cursor.u32(f"the number of axes of {who}")
    if not 1 <= n_dims <= MAX_AXES:
        cursor.fail(f"{who} (its info is at byte {at}) has {n_dims} axes; it must have 1 to {MAX_AXES}")
    ne = tuple(cursor.u64(f"axis {i} of {who}") for i in range(n_dims))
    kind = cursor.u32(f"the type of {who}")
    return _Info(name, ne, kind, cursor.u64(f"the offset of {who}"), at)


def _info_problem(info: _Info, alignment: int) -> str | None:
    if 0 in info.ne:
        return f"has sizes {list(info.ne)}; none may be 0"
    if math.prod(info.ne) > MAX_BYTES:
        return f"has sizes {list(info.ne)}, whose product overflows 64 bits"
    if info.type not in TYPES:
        return f"has the storage type {info.type}, which is not known"
    name, n_values, _ = TYPES[info.type]
    if info.ne[0] % n_values:
        return f"is {name} with rows of {info.ne[0]} values; {name} has blocks of {n_values}, which must fill a row"
    if info.n_bytes > MAX_BYTES:
        return f"of {name} {list(info.ne)} would have {info.n_bytes} bytes, which overflows 64 bits"
    if info.offset % alignment:
        return f"has the offset {info.offset}; it must be a multiple of the alignment, {alignment}"
    return None


def _as_the_fork_packs(infos: list[_Info], n_bytes: int) -> list[str]:
    """What to say of tensors that would fit their n bytes, were Q2_0 what PrismML's fork of llama.cpp means by it.

    The fork used ggml's number of it for blocks of 128 values in 34 bytes, and nothing but the places of the tensors
    tells: github.com/PrismML-Eng/llama.cpp/issues/167.
    """
    reached, theirs = 0, []
    for info in sorted(infos, key=lambda info: info.offset):
        taken = info.n_bytes
        if TYPES[info.type][0] == "Q2_0" and info.ne[0] % 128 == 0:
            theirs.append(info.name)
            taken = math.prod(info.ne) // 128 * 34
        if info.offset < reached:
            return []
        reached = info.offset + taken
    if not theirs or reached > n_bytes:
        return []
    return [f"the tensors of Q2_0, {len(theirs)} with {quote(theirs[0])}, lie as PrismML's fork of llama.cpp packs "
            "them, 34 bytes for 128 values; read is ggml's Q2_0, 18 bytes for 64"]


class _Cursor:
    """Values of a file in their order; the first that is wrong, or passes the end, raises FormatError."""

    def __init__(self, file: MappedFile, at: int, end: int):
        self.file, self.data, self.path = file, file.mapping, file.path
        self.at, self.end, self.nested = at, end, 0

    @property
    def whole(self) -> str:
        """What the end is the end of."""
        return f"{self.end} bytes" if self.end < MAX_HEADER else f"header, of at most {MAX_HEADER} bytes"

    def fail(self, problem: str):
        """Raise FormatError."""
        raise FormatError(problem, str(self.path))

    def take(self, n: int, what: str) -> int:
        """The byte where the next n bytes begin, which are then behind."""
        at = self.at
        if n > self.end - at:
            self.fail(f"{what} at byte {at} needs {n} bytes, but {self.end - at} are left of its {self.whole}")
        self.at = at + n
        return at

    def u32(self, what: str) -> int:
        """An unsigned integer of 4 bytes."""
        at = self.take(4, what)
        return int.from_bytes(self.data[at : at + 4], "little")

    def u64(self, what: str) -> int:
        """An unsigned integer of 8 bytes."""
        at = self.take(8, what)
        return int.from_bytes(self.data[at : at + 8], "little")

    def string(self, what: str, most: int = MAX_HEADER) -> str:
        """A length of 8 bytes and so many bytes of UTF-8."""
        n = self.u64(f"the length of {what}")
        if n > most:
            self.fail(f"{what} at byte {self.at - 8} has {n} bytes; at most {most} are allowed")
        at = self.take(n, what)
        try:
            return self.data[at : at + n].decode("utf-8")
        except UnicodeDecodeError as error:
            return self.fail(f"{what} is not UTF-8 at byte {at + error.start}")

    def value(self, key: str, kind: int):
        """A value of the metadata; an array is walked only."""
        who = f"the value of {quote(key)}"
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            at = self.take(dtype.itemsize, who)
            return np.frombuffer(self.data[at : at + dtype.itemsize], dtype)[0].item()
        if kind == _BOOL:
            return bool(self.elements(key, _BOOL, 1)[0])
        if kind == _STRING:
            return self.string(who)
        if kind == _ARRAY:
            return self.array(key)
        return self.fail(f"{quote(key)} has the type {kind} at byte {self.at - 4}, which is not known")

    def array(self, key: str, depth: int = 1) -> MetaArray:
        """An array's type and count, and where its elements are; `at` is behind them then."""
        who = quote(key)
        kind = self.u32(f"the type of the elements of {who}")
        count = self.u64(f"the number of elements of {who}")
        if kind not in _KINDS:
            self.fail(f"{who} is an array of type {kind} at byte {self.at - 12}, which is not known")
        if count > (self.end - self.at) // _LEAST[kind]:
            self.fail(f"{who} promises {count} elements of {_KINDS[kind]} at byte {self.at - 8}, more than fit its "
                      f"{self.whole}")
        begin = self.at
        if kind == _ARRAY:
            if depth == MAX_DEPTH:
                self.fail(f"{who} nests arrays deeper than {MAX_DEPTH} at byte {self.at}")
            self.nested += count
            if self.nested > MAX_NESTED:
                self.fail(f"{who} has {count} arrays in an array at byte {self.at}; at most {MAX_NESTED} are read of a "
                          "file")
            for _ in range(count):
                self.array(key, depth + 1)
        elif kind == _STRING:
            self.skip_strings(who, count)
        else:
            self.take(count * _LEAST[kind], who)
        return MetaArray(key, _KINDS[kind], count, self.file, begin, self.at)

    def skip_strings(self, who: str, count: int) -> None:
        """Walk strings by their lengths: the one loop of an opening that is long."""
        data, at, end, unpack = self.data, self.at, self.end, _U64.unpack_from
        for i in range(count):
            if at + 8 > end:
                self.fail(f"string {i} of {who} at byte {at} passes the end of its {self.whole}")
            at += 8 + unpack(data, at)[0]
        if at > end:
            self.fail(f"the strings of {who} pass the end of its {self.whole}")
        self.at = at

    def elements(self, key: str, kind: int, count: int) -> list | np.ndarray:
        """The elements of an array that was walked."""
        who = quote(key)
        if kind == _STRING:
            return [self.string(f"string {i} of {who}") for i in range(count)]
        if kind == _ARRAY:
            arrays = (self.array(key) for _ in range(count))
            return [a.values() for a in arrays]
        dtype = np.dtype(np.uint8 if kind == _BOOL else _NUMBERS[kind])
        at = self.take(count * dtype.itemsize, who)
        values = np.frombuffer(self.data[at : at + count * dtype.itemsize], dtype)
        if kind != _BOOL:
            return values
        if (bad := np.flatnonzero(values > 1)).size:
            self.fail(f"{who} has a bool of {values[bad[0]]} at byte {at + bad[0]}; it must be 0 or 1")
        return values.astype(bool)


def place(view: TensorView) -> str:
    """Where a tensor is, for messages: its byte and, of a model in parts, the file."""
    part = f" of {view.file.path.name}" if view.file.metadata.get("split.count", 1) != 1 else ""
    return f"at byte {view.offset}{part}"


def split_files(path: str | os.PathLike) -> list[GGUFFile]:
    """The file, or all parts of the model that it is a part of, in order.

    A part says so by its keys split.no and split.count; the others lie beside it, under the same name but for
    the number: NAME-00001-of-00003.gguf.

    Raises
    ------
    FormatError
        With every part that is missing, damaged or of another number, and a number of tensors other than
        split.tensors.count.
    """
    first = GGUFFile(path)
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return [first]
    problems: list[str] = []
    files = [_part(first, place, i, count, problems) for i, place in enumerate(_places(first, count))]
    if not problems:
        _check_whole(files, problems)
    if problems:
        raise FormatError(problems, str(path))
    return files


def _places(file: GGUFFile, count: object) -> list[Path]:
    """Where the parts should be, by the name of one of them."""
    number, path = file.metadata.get("split.no"), file.path
    if type(count) is not int or not 1 < count <= 99999 or type(number) is not int or not 0 <= number < count:
        raise FormatError(f"'split.no' is {show(number)} and 'split.count' {show(count)}; they must be a part's "
                          f"number, from 0, and the number of parts", str(path))
    mark = f"-{number + 1:05d}-of-{count:05d}"
    head, found, tail = path.name.rpartition(mark)
    if not found:
        raise FormatError(f"it is part {number + 1} of {count}, and its name lacks {mark!r}, by which the other parts "
                          f"are found", str(path))
    return [path.with_name(f"{head}-{i + 1:05d}-of-{count:05d}{tail}") for i in range(count)]


def _part(first: GGUFFile, path: Path, i: int, count: int, problems: list[str]) -> GGUFFile | None:
    if path == first.path:
        return first
    try:
        file = GGUFFile(path)
    except FileNotFoundError:
        problems.append(f"part {i + 1} of {count} is missing: {path.name} is not beside it")
        return None
    except FormatError as error:
        problems += [f"{path.name}: {problem}" for problem in error.problems]
        return None
    found = file.metadata.get("split.no"), file.metadata.get("split.count")
    if found != (i, count):
        problems.append(f"{path.name} says split.no {show(found[0])} of split.count {show(found[1])}; it must be "
                        f"{i} of {count}")
    return file


def _check_whole(files: list[GGUFFile], problems: list[str]) -> None:
    holder: dict[str, GGUFFile] = {}
    for file in files:
        for name in file:
            if name in holder:
                problems.append(f"{quote(name)} is in {holder[name].path.name} and in {file.path.name}")
            holder[name] = file
    promised, found = files[0].metadata.get("split.tensors.count"), sum(map(len, files))
    if promised is not None and promised != found:
        problems.append(f"'split.tensors.count' is {show(promised)}, but the {len(files)} parts hold {found} tensors")
