"""A Hugging Face folder as a config and mapped, checked weights: every problem of the folder in one error.

A GGUF becomes the same by `gguf_checkpoint.open_gguf`.
"""

import importlib.resources
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .._names import meant
from ..config import Config
from ..config_glm import TEXT as GLM
from ..config_kimi import K3
from ..errors import FormatError
from .mapped import MappedFile
from .names import canonical_name, canonical_shape, fused_name, fused_parts, is_inert, layer_of
from .packed import PARTS, PackedMatrix, matrix_of, problems_of
from .safetensors import WEIGHT_DTYPES, SafetensorsFile, TensorView
from .strict_json import is_there, load_object, show

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json")
_OF_OTHERS = ("vocab.json", "merges.txt", "added_tokens.json")  # of tokenizers that are read from tokenizer.json alone
PACKAGED = "tiny"  # the name of the model in the package
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are those of its config, neither more nor fewer, of the right shapes.

    Attributes
    ----------
    path : Path
        The folder, or the GGUF file.
    config : Config
    tensors : dict of str to TensorView
        By canonical name (names.py), in the order of `config.weight_shapes()`, with canonical shapes; no
        value is read before it is used. Of a GGUF also the views of gguf_names.py.
    files : tuple of MappedFile
    generation_config : dict
        generation_config.json as it stands; empty if the folder has none.
    skipped : tuple of str
        Tensors of the files that the model does not read: rotary buffers, the head of a tied model, a vision tower,
        layers that predict a second token.
    tokenizer : callable or None
        Makes the Tokenizer of a GGUF; None for a folder, whose files say it (`Tokenizer.from_folder`).
    content : dict
        config.json as it stands; of a GGUF what stands for it.
    dtypes : dict of str to str
        Of a GGUF: the storage types of the folder that it was made from, where it says so (gguf_kept.py).
    norms : dict of str to array
        Of a GGUF: norms w of that folder, where the file holds 1 + w, which rounds, and keeps w beside it.
    """

    path: Path
    config: Config
    tensors: Mapping[str, TensorView]
    files: tuple[MappedFile, ...]
    generation_config: dict
    skipped: tuple[str, ...] = ()
    tokenizer: Callable | None = None
    content: Mapping = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the model is called: as its file or folder is, or as its repository of the hub, in whose cache it is."""
        path = self.path.resolve() if self.path.is_dir() else self.path
        name = path.name
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            name = path.parent.parent.name.rpartition("--")[2]
        return readable(name)

    @property
    def in_blocks(self) -> bool:
        """Whether a weight is of a block type."""
        return any(dtype not in WEIGHT_DTYPES for t in self.tensors.values() for dtype in t.dtype.split("/"))

    @property
    def fast_activations(self) -> str:
        """What "auto" is: "int8" where weights are in blocks, "bfloat16" where matrices are in that, else "float32"."""
        if self.in_blocks:
            return "int8"
        matrices = [t for t in self.tensors.values() if len(t.shape) > 1]
        return "bfloat16" if any("BF16" in t.dtype.split("/") for t in matrices) else "float32"

    def check_unchanged(self) -> None:
        """Raise FormatError if a weight file has another size, time of change or inode than when opened."""
        problems = [change for file in self.files if (change := file.changes())]
        if problems:
            raise FormatError(problems)


def readable(name: str | os.PathLike) -> str:
    """A name of a file as text that can be written: bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def open_folder(path: str | os.PathLike) -> Checkpoint:
    """Open a folder of config.json and safetensors, one file or shards.

    Parameters
    ----------
    path : str or path
        A folder, or a hub id "organisation/name" found in the local Hugging Face cache. No network is used.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it lacks config.json or any weight file.
    FormatError
        With every problem by tensor name: damaged files, missing shards, tensors that are missing, unknown,
        there twice, in another shard than the index says, or of the wrong shape or type.
    ValueError
        If config.json describes no model that can be run; its message is the config's.
    """
    folder = resolve(path).absolute()
    config_path = folder / "config.json"
    if not is_there(config_path):
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f" It holds {', '.join(ggufs[:3])}: give the file." if ggufs else ""
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a Hugging Face model folder.{hint}")
    content = load_object(config_path)
    config = Config.from_dict(content)

    problems: list[str] = []
    files, excused = _open_files(folder, problems)
    tensors, skipped = _match(config, files, excused, problems, _layers_behind(content))
    if problems:
        raise FormatError(problems, str(folder))
    generation = folder / "generation_config.json"
    generation_config = load_object(generation) if is_there(generation) else {}
    return Checkpoint(folder, config, tensors, tuple(files), generation_config, skipped, content=content)


def at_home(path: str | os.PathLike) -> Path:
    """`path` with ``~`` as the folder that it stands for; FileNotFoundError where there is no user of that name."""
    text = os.fspath(path)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text[1:].partition("/")[0]
        raise FileNotFoundError(f"There is no user {user}, in whose home {text} would be.") from None


def resolve(path: str | os.PathLike) -> Path:
    """The folder that a path or a hub id stands for, or "tiny"; a folder of that name comes before these.

    Raises
    ------
    FileNotFoundError
        If there is neither, or no user of whom ``~name`` would be the home.
    NotADirectoryError
        If the path is a file.
    """
    text, folder = os.fspath(path), at_home(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file{_beginning(folder)}; the model is the folder that holds "
                                 f"config.json, or a GGUF file, which begins with 'GGUF'.")
    if text == PACKAGED:
        return Path(str(importlib.resources.files("kimi_linear") / "data" / PACKAGED))
    if not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"There is no folder or GGUF file {folder}. A model is one of these, an id in the "
                                f"local Hugging Face cache, or {PACKAGED!r}, the one in the package.")
    return _cached_snapshot(text)


def missing_tokenizer_file(folder: Path) -> str | None:
    """What a folder lacks to have a tokenizer, as words; None where it has one, or no file of any."""
    there = [name for name in (*TOKENIZER_FILES, *_OF_OTHERS) if os.path.lexists(folder / name)]
    if not there:
        return None
    if "tiktoken.model" in there:
        return None if "tokenizer_config.json" in there else "tokenizer_config.json"
    if "tokenizer.json" in there:
        return None
    return "tokenizer.json" if set(there) & set(_OF_OTHERS) else "tiktoken.model or tokenizer.json"


def _beginning(path: Path) -> str:
    """Words for a file that is no GGUF: what it begins with."""
    if not path.is_file():
        return " that is no regular one"
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return ""
    return f" that begins with {head!r}" if head else " of 0 bytes"


def _cached_snapshot(hub_id: str) -> Path:
    repository = _hub_cache() / ("models--" + hub_id.replace("/", "--"))
    reference = repository / "refs" / "main"
    if reference.is_file():
        revision = reference.read_text(encoding="utf-8", errors="replace").strip()
        snapshot = repository / "snapshots" / revision
        if re.fullmatch(r"\w+", revision) and snapshot.is_dir():
            return snapshot
    raise FileNotFoundError(
        f"There is no folder {hub_id}, and the local Hugging Face cache does not hold that model "
        f"(looked for {repository}). Nothing is downloaded: fetch it first, or give a folder"
        f"{meant(hub_id, _cached_ids() - {hub_id}) or '.'}"
    )


def _cached_ids() -> set[str]:
    """The models that the cache has."""
    return {folder.name.removeprefix("models--").replace("--", "/") for folder in _hub_cache().glob("models--*")}


def _hub_cache() -> Path:
    """The folder of cached repositories, by the rules of the huggingface_hub package."""
    env = os.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(env[name]).expanduser()
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _open_files(folder: Path, problems: list[str]) -> tuple[list[SafetensorsFile], set[str] | None]:
    """The files that could be opened, and the tensors not to be reported as missing: those that the index
    lists, as `_compare_index` reports them; None, for all of them, when a file without index is unreadable.
    """
    if is_there(folder / SINGLE):
        paths = [folder / SINGLE]
    elif is_there(folder / INDEX):
        return _open_shards(folder, problems)
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no weights: no {SINGLE}, {INDEX} or other *.safetensors.")
    files = [file for path in paths if (file := _open(path, problems))]
    return files, set() if len(files) == len(paths) else None


def _open(path: Path, problems: list[str]) -> SafetensorsFile | None:
    try:
        return SafetensorsFile(path)
    except FormatError as error:
        problems += [f"{path.name}: {problem}" for problem in error.problems]
    except OSError as error:
        problems.append(f"{path.name}: it cannot be read: {error.strerror}")
    return None


def _open_shards(folder: Path, problems: list[str]) -> tuple[list[SafetensorsFile], set[str]]:
    """The shards that the index names, compared with what it says of them, and the index's tensors."""
    index = load_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise FormatError(f"{INDEX}: weight_map is {show(index)}; it must map names to files", str(folder))

    listed: dict[str, set[str]] = {}
    for name, shard in index.items():
        if not isinstance(shard, str) or not is_shard_name(shard):
            problems.append(f"{INDEX}: {name!r} is in {show(shard)}; it must be a *.safetensors beside it")
        else:
            listed.setdefault(shard, set()).add(name)

    files = []
    for shard, names in sorted(listed.items()):
        if not os.path.isfile(folder / shard):
            problems.append(f"{shard}: the file is not there, and {len(names)} tensors of the index with it")
        elif file := _open(folder / shard, problems):
            files.append(file)
    _compare_index(index, listed, files, problems)
    return files, {canonical_name(name) for name in index}


def is_shard_name(shard: str) -> bool:
    """Whether an index may name a file so: one that lies beside it."""
    return shard.endswith(".safetensors") and "\0" not in shard and Path(shard).name == shard


def _compare_index(
    index: Mapping[str, object],
    listed: Mapping[str, set[str]],
    files: list[SafetensorsFile],
    problems: list[str],
) -> None:
    holder = {name: file.path.name for file in files for name in file}
    for file in files:
        shard = file.path.name
        for name in sorted(listed[shard] - file.keys()):
            where = f"it is in {holder[name]}" if name in holder else "no shard that could be read has it"
            problems.append(f"{name} is listed in {shard} by {INDEX}, but {where}")
        for name in sorted(file.keys() - index.keys()):
            problems.append(f"{name} is in {shard}, but not in {INDEX}")


def _layers_behind(content: Mapping) -> int:
    """Layers that predict a second token and lie behind the model's, numbered on (GLM-5.3-Flash)."""
    text = content.get("text_config")
    n = (text if isinstance(text, Mapping) else content).get("num_nextn_predict_layers")
    return n if type(n) is int and n > 0 else 0


def _match(
    config: Config, files: list[SafetensorsFile], excused: set[str] | None, problems: list[str], behind: int = 0
) -> tuple[dict[str, TensorView], tuple[str, ...]]:
    """Tensors by canonical name in the config's order, and the names of those that are not read.

    `behind` layers follow those of the config and are not read.
    """
    expected = config.weight_shapes()
    found: dict[str, TensorView | PackedMatrix] = {}
    fused: dict[str, TensorView] = {}
    halves: dict[str, TensorView] = {}
    skipped = []
    for file in files:
        for name, view in file.items():
            canonical = canonical_name(name)
            held = halves if _half_of(canonical, expected) else fused if _holds_experts(canonical, expected) else found
            if is_inert(name) or (canonical == "lm_head.weight" and config.tie_embeddings) \
                    or 0 <= layer_of(canonical) - config.n_layers < behind:
                skipped.append(name)
            elif held is found and canonical not in expected:
                problems.append(f"{name} is in {file.path.name}, but by config.json there is no such tensor")
            elif canonical in held:
                problems.append(_twice(canonical, held[canonical], view))
            else:
                held[canonical] = _counted(canonical, view, expected, config)
    refused = {name for whole, view in fused.items() for name in _split(config, whole, view, expected, found, problems)}
    refused |= _join(halves, expected, found, problems, excused)

    tensors = {}
    for name, shape in expected.items():
        if name in found:
            problems += _tensor_problems(name, found[name], canonical_shape(name, shape))
            tensors[name] = replace(found[name], name=name, shape=canonical_shape(name, shape))
        elif name not in refused and excused is not None and not _spellings(name) & excused:
            problems.append(f"{name} {list(shape)} is missing")
    return tensors, tuple(skipped)


def _spellings(name: str) -> set[str | None]:
    """Canonical names under which a tensor, or a part of it, may lie."""
    return {name, fused_name(name), *(name + part for part in PARTS)}


def _half_of(canonical: str, expected: Mapping) -> str | None:
    """The matrix of the config of which a tensor is one of two halves."""
    matrix, _ = matrix_of(canonical) or (None, None)
    return matrix if matrix in expected else None


def _counted(canonical: str, view: TensorView, expected: Mapping, config: Config) -> TensorView:
    """A_log of Kimi K3 and GLM without what pads it: the first values are those of the heads."""
    if not canonical.endswith(".A_log") or config.model_type not in (K3, GLM) or len(view.shape) != 1:
        return view
    n = min(view.shape[0], expected[canonical][0])
    return replace(view, shape=(n,), nbytes=view.nbytes // max(view.shape[0], 1) * n)


def _join(halves: Mapping[str, TensorView], expected: Mapping, found: dict, problems: list[str],
          excused: set[str] | None) -> set[str]:
    """Put matrices of two halves into `found`; names that are not, after a problem."""
    parts: dict[str, dict[str, TensorView]] = {}
    for name, view in halves.items():
        matrix, part = matrix_of(name)
        parts.setdefault(matrix, {})[part] = view
    refused = set()
    for matrix, views in parts.items():
        lost = {matrix + part for part in PARTS if part not in views}
        wrong = problems_of(matrix, views, expected[matrix])
        if matrix in found:
            problems.append(_twice(matrix, found[matrix], next(iter(views.values()))))
        elif lost and (excused is None or lost & excused):  # reported with the file that has it
            refused.add(matrix)
        elif wrong:
            problems += wrong
            refused.add(matrix)
        else:
            found[matrix] = PackedMatrix(matrix, expected[matrix], *(views[part] for part in PARTS))
    return refused


def _holds_experts(canonical: str, expected: Mapping) -> bool:
    """Whether a tensor holds all experts of a layer, of which the config has some."""
    fused = fused_parts(canonical)
    return fused is not None and f"{fused[0]}.0.{fused[1][0]}.weight" in expected


def _split(config: Config, whole: str, view: TensorView, expected: Mapping, found: dict[str, TensorView],
           problems: list[str]) -> set[str]:
    """Put the experts of a fused tensor into `found`, as views of its bytes; names that are not, after a problem."""
    prefix, parts = fused_parts(whole)
    E = config.n_experts
    names = [f"{prefix}.{e}.{part}.weight" for e in range(E) for part in parts]
    rows, cols = expected[names[0]]
    wanted = (E, len(parts) * rows, cols)
    both = [name for name in names if name in found]
    if both:
        problems.append(f"{whole} is there twice: {view.name} in {view.file.path.name} holds the experts together, and "
                        f"{both[0]} in {found[both[0]].file.path.name} holds one of {len(both)} by themselves")
    elif view.shape != wanted:
        problems.append(f"{view.name} has shape {list(view.shape)}; by config.json it must be {list(wanted)}")
    elif view.dtype not in WEIGHT_DTYPES:
        problems += _tensor_problems(whole, view, wanted)
    else:
        size = view.nbytes // len(names)
        for i, name in enumerate(names):
            found[name] = replace(view, name=name, shape=(rows, cols), offset=view.offset + i * size, nbytes=size)
        return set()
    return set(names)


def _twice(canonical: str, first: TensorView, second: TensorView) -> str:
    a, b = (f"{view.name} in {view.file.path.name}" for view in (first, second))
    return f"{canonical} is there twice: as {a} and as {b}"


def _tensor_problems(name: str, view: TensorView, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if canonical_shape(name, view.shape) != shape:
        problems.append(f"{view.name} has shape {list(view.shape)}; by config.json it must be {list(shape)}")
    if view.dtype not in WEIGHT_DTYPES and not isinstance(view, PackedMatrix):
        problems.append(f"{view.name} is stored as {view.dtype}; it must be {' or '.join(WEIGHT_DTYPES)}")
    return problems
