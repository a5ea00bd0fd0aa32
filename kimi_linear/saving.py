"""A model as a Hugging Face folder."""

import contextlib
import errno
import json
import math
import shutil
import tempfile
from pathlib import Path

from .load.gguf_heads import as_published
from .load.safetensors import DTYPES, atomic_file, write_safetensors

__all__ = ["save_pretrained"]

SHARD = 5 * 10**9  # bytes of tensors a file
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_pretrained(model, folder, overwrite=False):
    """Write `model` to `folder`; see `Model.save_pretrained`."""
    own = model._checkpoint.path if model._checkpoint is not None else None
    published = model.config.published()  # a GGUF's has other norms and another order of heads
    tensors = {}
    for name, tensor in model._tensors.items():
        found = as_published(model.config, published, name, tensor)
        tensors[name] = _Plain(found) if found is not tensor or hasattr(tensor, "digest_parts") else tensor
    dtype = dtype_of(tensors)
    config = published.to_dict() | ({"torch_dtype": dtype} if dtype else {})
    write_folder(folder, tensors, config, model.generation_config, _tokenizer_writer(model, own), overwrite, own=own)


def write_folder(folder, tensors, config, generation_config, tokenizer=None, overwrite=False, check=None, own=None):
    """Write a Hugging Face folder.

    All files are written into a folder beside their places first, and moved when they are whole, config.json last:
    what fails leaves what was there.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    tensors : mapping of str to tensor
        As for `write_safetensors`, with `nbytes`.
    config, generation_config : dict
        The content of the files; an empty generation_config gives none.
    tokenizer : callable, optional
        Called with a folder, to write the tokenizer's files.
    overwrite : bool
        Whether every file of a checkpoint that is there may be replaced, or removed where the new one has none.
    check : callable, optional
        Called when all is written and nothing has its name yet.
    own : path, optional
        The folder whose files the tensors are in; it is refused.
    """
    folder = Path(folder)
    old = _checkpoint_files(folder)
    if own is not None and folder.exists() and folder.resolve() == own.resolve():
        raise FileExistsError(f"folder is {folder}, the model's own, whose files are in use; it must be another")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder is {folder}, which is a file; it must be a folder")
    if old and not overwrite:
        raise FileExistsError(f"folder {folder} holds a checkpoint ({old[0].name}); overwrite=True (--force) replaces "
                              "it")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fill(folder, tensors, config, generation_config, tokenizer, check, old)
    except BaseException:
        for path in made:  # what was made for it is empty again
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _fill(folder, tensors, config, generation_config, tokenizer, check, old):
    _check_room(folder, sum(t.nbytes for t in tensors.values()))
    draft = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
    try:
        if tokenizer is not None:
            tokenizer(draft)
        _write_tensors(draft, tensors, _shards(tensors))
        if generation_config:
            _write_json(draft / GENERATION, generation_config)
        _write_json(draft / CONFIG, config)
        if check is not None:
            check()
        for path in old:
            path.unlink()
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _tokenizer_writer(model, own):
    """Copies the folder's files, else writes the tokenizer's; None where there is none."""
    if own is None or not own.is_dir():
        return None if model.tokenizer is None else model.tokenizer.save

    def copy(folder):
        for name in TOKENIZER_FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)

    return copy


def dtype_of(tensors):
    """"bfloat16" and the like where all projections are of one type; None where they differ."""
    types = {_DTYPES.get(str(t.dtype), str(t.dtype)) for name, t in tensors.items() if name.endswith("proj.weight")}
    return types.pop() if len(types) == 1 else None


class _Plain:
    """What a GGUF stores in another way, as a Hugging Face folder has it: blocks become float32."""

    def __init__(self, tensor):
        self.dtype = tensor.dtype if tensor.dtype in _DTYPES else "F32"
        self.shape, self._tensor = tensor.shape, tensor
        self.nbytes = math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def array(self):
        return self._tensor.array().astype(DTYPES[self.dtype], copy=False)


def _checkpoint_files(folder):
    """Files of a checkpoint that are there, config.json first: all that a model in this folder would be read with."""
    if not folder.is_dir():
        return []
    named = [folder / name for name in (CONFIG, GENERATION, *TOKENIZER_FILES) if (folder / name).is_file()]
    return named + sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])


def _shards(weights):
    """Names by file: as many tensors, in their order, as stay within SHARD bytes; at least one."""
    shards, size = [[]], 0
    for name in weights:
        if shards[-1] and size + weights[name].nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights[name].nbytes
    return shards


def _check_room(folder, n_bytes):
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(errno.ENOSPC, f"the weights are {n_bytes:,} bytes and {free:,} are free on the disk of {folder}")


def _write_tensors(folder, weights, shards):
    meta = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, dict(weights), meta)
        return
    index = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: weights[name] for name in names}, meta)
        index |= dict.fromkeys(names, file)
    size = sum(t.nbytes for t in weights.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _write_json(path, value):
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
