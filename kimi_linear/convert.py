"""From a Hugging Face folder to a GGUF, back, and from types to other types; see `convert`."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .config import Config
from .config_glm import TEXT as GLM
from .load import gguf_heads, gguf_kept, gguf_metadata, gguf_types
from .load.checkpoint import at_home, missing_tokenizer_file, open_folder, readable, resolve
from .load.gguf import BlockView, is_gguf
from .load.gguf_checkpoint import open_gguf
from .load.gguf_tensors import Incoming, cast, encoded, of_file, of_folder, rows_of
from .load.gguf_write import Outgoing, write_gguf
from .load.names import name_in_folder
from .load.packed import COLUMNS, PARTS, half_of
from .load.safetensors import DTYPES, WEIGHT_DTYPES, TensorView
from .quantized import storage_types

__all__ = ["Conversion", "Fallback", "convert"]

_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # all set: infinity or NaN
_PIECE = 1 << 22  # values that are looked at at once
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Fallback:
    """Tensors whose rows a type does not divide: `wanted`, what they got instead, how many they are."""

    wanted: str
    used: str
    tensors: int

    def __str__(self):
        some = "1 tensor has" if self.tensors == 1 else f"{self.tensors:,} tensors have"
        return f"{self.wanted} -> {self.used}: {some} rows that {self.wanted} does not divide"


@dataclass
class Conversion:
    """What `convert` wrote. Prints as a few lines.

    Attributes
    ----------
    target : Path
    tensors : int
    nbytes : int
        Of the GGUF, or of all tensors of the folder.
    types : dict of str to (int, int)
        Storage type -> tensors, and bytes of them.
    fallbacks : list of Fallback
    requantised : int
        Tensors that went from one block type to another: their errors add up.
    not_finite : dict of str to int
        Tensors of a float type that were written with values that are NaN or infinite, and how many.
    """

    target: Path
    tensors: int = 0
    nbytes: int = 0
    types: dict[str, tuple[int, int]] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    requantised: int = 0
    not_finite: dict[str, int] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """A line on `not_finite`; empty where there is none."""
        some = [f"{name} has {n:,}" for name, n in [*self.not_finite.items()][:3]]
        more = f" and {len(self.not_finite) - 3:,} more tensors have some" if len(self.not_finite) > 3 else ""
        return f"values that are NaN or infinite are copied as they are: {', '.join(some)}{more}" if some else ""

    def look_at(self, name: str, dtype: str, values) -> None:
        """Count what is not finite of a tensor, or of a part of it, as it is written."""
        if dtype not in _EXPONENTS:
            return
        bits = np.frombuffer(values, f"<u{DTYPES[dtype].itemsize}")
        pieces = (bits[i : i + _PIECE] & _EXPONENTS[dtype] for i in range(0, len(bits), _PIECE))
        if n := sum(int(np.count_nonzero(piece == _EXPONENTS[dtype])) for piece in pieces):
            self.not_finite[name] = self.not_finite.get(name, 0) + n

    def add(self, dtype: str, nbytes: int) -> None:
        """Count a tensor."""
        n, total = self.types.get(dtype, (0, 0))
        self.types[dtype] = n + 1, total + nbytes
        self.tensors += 1

    def __str__(self):
        rows = sorted(self.types.items(), key=lambda item: -item[1][1])
        kinds = ", ".join(f"{name} {n:,} ({size:,} bytes)" for name, (n, size) in rows)
        lines = [f"{readable(self.target)}: {self.tensors:,} tensors, {self.nbytes:,} bytes", f"types: {kinds}"]
        lines += [f"fallback {fallback}" for fallback in self.fallbacks]
        if self.requantised:
            lines.append(f"note: {self.requantised:,} tensors were in blocks of another type before: errors add up")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        types = {name: {"tensors": n, "bytes": size} for name, (n, size) in self.types.items()}
        return asdict(self) | {"target": readable(self.target), "types": types}


def convert(source: str | os.PathLike, target: str | os.PathLike, *, type: str | None = None,
            types: Mapping | Iterable = (), dtype: str = "auto", tokenizer: bool = True, overwrite: bool = False,
            progress: Callable[[int, int, str], None] | None = None) -> Conversion:
    """Write a model in the other format, or in other types.

    A GGUF has llama.cpp's names, metadata and tokenizer, so that llama.cpp runs it; what config.json and
    generation_config.json say beyond these is kept in keys of our own, so that a folder made from it has an equal
    config, every key, and the same bytes, where nothing was quantised (docs/gguf.md#convert). One part of one tensor
    is in memory at a time.

    Parameters
    ----------
    source : str or path
        A Hugging Face folder, a hub id in the local cache, or a GGUF (any part of a split one).
    target : str or path
        A file that ends in ".gguf", or, of a GGUF, a folder.
    type : str, optional
        Storage type of all matrices of a GGUF, as "Q4_K"; by default each keeps its own. Vectors, norms, routers and
        convolutions stay float32. Rows that a type does not divide get another, as llama.cpp chooses it.
    types : mapping or list, optional
        Types by fnmatch patterns on GGUF names, before `type`: ``{"blk.*.ffn_down*": "Q6_K"}``, or texts
        ``"pattern=type"``; the first that matches holds.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Of a folder's tensors. "auto" is what each was in the folder that the GGUF was made from; where the file does
        not say that, a float type stays and blocks become bfloat16.
    tokenizer : bool
        Whether the target gets the tokenizer. False makes a model of token ids, also of a folder that lacks some of its
        tokenizer's files.
    overwrite : bool
        Whether a file or a checkpoint that is there may be replaced.
    progress : callable, optional
        Called with bytes done, bytes in all and the tensor's name.

    Returns
    -------
    Conversion

    Raises
    ------
    FileExistsError
        If the target is there and `overwrite` is False, also when it came meanwhile; if it is a file of the source, or
        no regular file.
    FileNotFoundError
        If there is no source, or it lacks some of its tokenizer's files, which the sentence names.
    ValueError
        An unknown type, a pattern that decides nothing, an option of the other direction, a key of config.json that
        would be lost, a tensor with values that the type cannot hold, a decay that is not finite.
    FormatError
        With all that is wrong with the source.
    OSError
        If the target would not fit on its disk, or cannot be written; nothing is left under its name then, nor when
        the process is killed.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is a {source.__class__.__name__}; it must be a path, such as a folder that "
                        "model.save_pretrained wrote")
    source, target = Path(os.fspath(source)), at_home(target)
    from_gguf, to_gguf = is_gguf(at_home(source)), target.name.lower().endswith(".gguf")
    if to_gguf:
        if dtype != "auto":
            raise ValueError(f"dtype is {dtype!r}, and the target a GGUF; its types are `type` and `types` (--type, "
                             "--map)")
        choice = gguf_types.Choice(None if type is None else gguf_types.checked_type(type),
                                   gguf_types.checked_rules(types))
        _check_target(source, target, overwrite)
        plan = _plan_of_file if from_gguf else _plan_of_folder
        return _write_gguf(target, *plan(source, tokenizer), choice, overwrite, progress or (lambda *_: None))
    if not from_gguf:
        resolve(source)  # a source that is not there, or no model, is told first
        raise ValueError(f"target is {str(target)!r}; of a Hugging Face folder it must be a file that ends in .gguf")
    if type is not None or types:
        raise ValueError(f"`type` or `types` (--type, --map) are given, and the target {str(target)!r} is a folder; a "
                         "GGUF must end in .gguf, and a folder has `dtype` (--dtype)")
    return _write_folder(at_home(source), target, dtype, tokenizer, overwrite, progress or (lambda *_: None))


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and at_home(source).exists() and target.samefile(at_home(source)):
        raise FileExistsError(f"target is {target}, the source itself; it must be another file")
    if target.is_dir():
        raise FileExistsError(f"target {target} is a folder; it must be a file")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"target {target} is a device, a pipe or a socket; it must be a file")
    if target.exists() and not overwrite:
        raise FileExistsError(f"target {target} is there; overwrite=True (--force) replaces it")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.absolute().parent}, in which {target.name} is to be")


# ---- to a GGUF -------------------------------------------------------------------------------------


def _plan_of_folder(source: Path, tokenizer: bool) -> tuple[dict, list[Incoming], object]:
    """Metadata, tensors, and what must not change meanwhile."""
    checkpoint = open_folder(source)
    tensors = of_folder(checkpoint.config, checkpoint.tensors)
    found = _tokenizer_of(checkpoint.path) if tokenizer else None
    metadata = gguf_metadata.metadata_of(checkpoint, found, {t.name: t for t in tensors}, checkpoint.name)
    return metadata, tensors, checkpoint


def _tokenizer_of(folder: Path):
    """The folder's Tokenizer, or None where it has no file of any."""
    from .tokenizer import Tokenizer

    try:
        return Tokenizer.from_folder(folder)
    except FileNotFoundError:
        if (missing := missing_tokenizer_file(folder)) is None:
            return None
        raise FileNotFoundError(f"{folder} has files of a tokenizer, and {missing} is missing; get it, or convert with "
                                "tokenizer=False (--no-tokenizer) for token ids alone") from None


def _plan_of_file(source: Path, tokenizer: bool) -> tuple[dict, list[Incoming], object]:
    """The same of a GGUF: its metadata as they lie."""
    checkpoint = open_gguf(source)
    head = checkpoint.files[0]
    metadata = {key: head.mapping[begin:end] for key, (begin, end) in head.pairs.items()
                if not key.startswith("split.") and key != "general.alignment"
                and (tokenizer or not key.startswith("tokenizer.") or key.endswith("_token_id"))}
    if not tokenizer:
        metadata["tokenizer.ggml.model"] = "none"
    return metadata, of_file({name: view for file in checkpoint.files for name, view in file.items()}), checkpoint


def _write_gguf(target: Path, metadata: dict, tensors: list[Incoming], checkpoint, choice, overwrite: bool,
                progress) -> Conversion:
    for file in checkpoint.files:
        if target.exists() and target.samefile(file.path):
            raise FileExistsError(f"target is {target}, a file of the source; it must be another file")
    result = Conversion(target)
    outgoing = _typed(tensors, choice, result)
    kind = choice.default or _most_bytes(tensors, outgoing)
    metadata = metadata | {"general.file_type": gguf_metadata.FILE_TYPES.get(kind, gguf_metadata.GUESSED),
                           "general.quantization_version": gguf_metadata.QUANTIZATION_VERSION}
    total, done = sum(t.nbytes for t in outgoing), 0

    def written(n, name):
        nonlocal done
        done += n
        progress(done, total, name)

    result.nbytes = write_gguf(target, metadata, outgoing, written, check=checkpoint.check_unchanged,
                               overwrite=overwrite)
    return result


def _typed(tensors: list[Incoming], choice, result: Conversion) -> list[Outgoing]:
    """The tensors in the types of their choice; counted in `result`."""
    outgoing, fallbacks = [], Counter()
    for tensor in tensors:
        wanted = used = tensor.fixed or choice.wanted(tensor.name, tensor.dtype)
        if used != tensor.dtype and not tensor.fixed:
            used = gguf_types.fitting(wanted, tensor.shape[-1])
        fallbacks[wanted, used] += used != wanted
        result.requantised += used != tensor.dtype and _in_blocks(used) and _in_blocks(tensor.dtype)
        outgoing.append(Outgoing(tensor.name, used, tensor.shape, _parts(tensor, used, result)))
        result.add(used, outgoing[-1].nbytes)
    choice.check_met()
    result.fallbacks = [Fallback(*key, n) for key, n in fallbacks.items() if n]
    return outgoing


def _most_bytes(tensors: list[Incoming], outgoing: list[Outgoing]) -> str:
    """The type in which most bytes of matrices are."""
    sizes = Counter()
    for before, after in zip(tensors, outgoing, strict=True):
        if not before.fixed:
            sizes[after.dtype] += after.nbytes
    return sizes.most_common(1)[0][0]


def _in_blocks(dtype: str) -> bool:
    return storage_types[dtype].values > 1


def _parts(tensor: Incoming, dtype: str, result: Conversion) -> Callable:
    def parts():
        for part in tensor.parts():
            try:
                raw = encoded(part, dtype, tensor.shape[-1])
            except ValueError as error:
                raise ValueError(f"{tensor.name} as {dtype}: {error}") from None
            result.look_at(tensor.name, dtype, raw)
            yield raw

    return parts


# ---- to a folder -----------------------------------------------------------------------------------


class _Published:
    """A tensor of a GGUF as the published checkpoint has it: its shape, a float type."""

    def __init__(self, name: str, tensor, dtype: str, done: Callable, model_type: str):
        self.name, self.dtype, self._tensor, self._done = name, dtype, tensor, done
        self.shape = tuple(tensor.shape)
        if name.endswith("self_attn.A_log") and model_type != GLM:
            self.shape = (1, 1, *self.shape, 1)
        elif name.endswith("conv1d.weight"):
            self.shape = (self.shape[0], 1, self.shape[1])
        self.nbytes = math.prod(self.shape) * DTYPES[dtype].itemsize

    def array(self) -> np.ndarray:
        """The values, read now."""
        try:
            whole = not isinstance(self._tensor, TensorView) or self._tensor.dtype == self.dtype
            values = cast(self._tensor.array(), self.dtype) if whole else self._rows()
        except ValueError as error:
            raise ValueError(f"{self.name} as {self.dtype}: {error}") from None
        self._done(self, values)
        return values.reshape(self.shape)

    def _rows(self) -> np.ndarray:
        """Some rows of float32 at a time, so that a tensor is whole in its own type only."""
        cols = self._tensor.shape[-1]
        values, first = np.empty((math.prod(self.shape) // cols, cols), DTYPES[self.dtype]), 0
        for part in rows_of(self._tensor):
            values[first : first + part.shape[0]] = cast(part.array(), self.dtype)
            first += part.shape[0]
        return values


class _Half:
    """One of the two tensors that a folder has of a matrix in MXFP4: its codes or its scales."""

    dtype = "U8"

    def __init__(self, name: str, view: TensorView, part: int, done: Callable):
        self.name, self._view, self._part, self._done = name + PARTS[part], view, part, done
        rows, cols = view.shape
        self.shape = (rows, cols // (COLUMNS if part else 2))
        self.nbytes = math.prod(self.shape)

    def array(self) -> np.ndarray:
        """The bytes, made now of the blocks, some rows at a time."""
        values, first = np.empty(self.shape, np.uint8), 0
        for part in rows_of(self._view):
            n = part.shape[0]
            blocks = np.frombuffer(encoded(part, part.dtype, part.shape[1]), np.uint8).reshape(n, -1)
            values[first : first + n] = half_of(blocks, self._part)
            first += n
        self._done(self, values)
        return values


def _write_folder(source: Path, target: Path, dtype: str, tokenizer: bool, overwrite: bool, progress) -> Conversion:
    from .saving import write_folder

    if dtype != "auto" and dtype not in _NAMES:
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(_NAMES)}")
    checkpoint = open_gguf(source)
    result = Conversion(target)
    total = done = 0

    def moved(tensor, values):
        nonlocal done
        result.look_at(tensor.name, tensor.dtype, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        done += tensor.nbytes
        progress(done, total, tensor.name)

    tensors, published = {}, Config.from_dict(checkpoint.content)
    for name, tensor in checkpoint.tensors.items():
        tensor = gguf_heads.as_published(checkpoint.config, published, name, tensor, checkpoint.norms.get(name))
        kind, name = _folder_dtype(checkpoint, name, tensor, dtype), name_in_folder(name, checkpoint.content)
        made = [_Half(name, tensor, part, moved) for part in range(2)] if kind == gguf_kept.PACKED else [
            _Published(name, tensor, kind, moved, published.model_type)]
        tensors |= {t.name: t for t in made}
        result.add(kind, sum(t.nbytes for t in made))
    total = result.nbytes = sum(t.nbytes for t in tensors.values())
    found = checkpoint.tokenizer() if tokenizer and checkpoint.tokenizer is not None else None
    write_folder(target, tensors, _content(checkpoint, tensors, dtype), checkpoint.generation_config,
                 found.save if found is not None else None, overwrite, checkpoint.check_unchanged,
                 files=checkpoint.files)
    return result


def _folder_dtype(checkpoint, name: str, tensor, dtype: str) -> str:
    """Storage type of a tensor in the folder."""
    if dtype != "auto":
        return _NAMES[dtype]
    kept = checkpoint.dtypes.get(name) or checkpoint.dtypes.get(gguf_kept.pattern(name))
    if kept == gguf_kept.PACKED and not (isinstance(tensor, BlockView) and tensor.dtype == kept):
        kept = None  # of another type now, which has no codes and scales
    return kept or (tensor.dtype if tensor.dtype in WEIGHT_DTYPES else "BF16")


def _content(checkpoint, tensors: Mapping, dtype: str) -> dict:
    """config.json, its dtype that of the matrices; it does not say that they are packed where none is any more."""
    from .saving import dtype_of

    content = dict(checkpoint.content)
    levels = [content]
    if "text_config" in content:
        content["text_config"] = dict(content["text_config"])
        levels.append(content["text_config"])
    if gguf_kept.PACKED in checkpoint.dtypes.values() and not any(isinstance(t, _Half) for t in tensors.values()):
        for level in levels:
            level.pop("quantization_config", None)
    named = [(level, key) for level in levels for key in ("dtype", "torch_dtype") if key in level]
    if dtype == "auto" and named:
        return content
    if told := dtype_of(tensors) if dtype == "auto" else dtype:
        for level, key in named or [(content, "torch_dtype")]:
            level[key] = told
    return content
