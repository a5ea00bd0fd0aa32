"""A model as a Hugging Face folder."""

import errno
import json
import math
import shutil
import tempfile
from pathlib import Path

from .load.safetensors import DTYPES, atomic_file, write_safetensors

__all__ = ["save_pretrained"]

SHARD = 5 * 10**9  # bytes of tensors a file
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_pretrained(model, folder, overwrite=False):
    """Write `model` to `folder`; see `Model.save_pretrained`.

    All files are written into a folder beside their places first, and moved when they are whole, config.json last:
    what fails leaves what was there."""
    folder = Path(folder)
    own = model._checkpoint.path if model._checkpoint is not None else None
    old = _checkpoint_files(folder)
    if own is not None and folder.exists() and folder.resolve() == own.resolve():
        raise FileExistsError(f"folder is {folder}, the model's own, whose files are in use; it must be another")
    if old and not overwrite:
        raise FileExistsError(f"folder {folder} holds a checkpoint ({old[0].name}); overwrite=True replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    weights = _Tensors(model)
    _check_room(folder, sum(weights.nbytes(name) for name in weights))
    draft = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))
    try:
        _write(model, weights, draft, own)
        for path in old:
            path.unlink()
        for path in sorted(draft.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(model, weights, folder, own):
    if own is not None and own.is_dir():
        for name in TOKENIZER_FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, folder / name)
    elif model.tokenizer is not None:
        model.tokenizer.save(folder)
    _write_tensors(folder, weights, _shards(weights))
    if model.generation_config:
        _write_json(folder / "generation_config.json", model.generation_config)
    types = {_DTYPES.get(str(t.dtype), str(t.dtype)) for name, t in weights.items() if name.endswith("proj.weight")}
    dtype = {"torch_dtype": types.pop()} if len(types) == 1 else {}
    _write_json(folder / CONFIG, model.config.to_dict() | dtype)


class _Tensors(dict):
    """Name -> what `write_safetensors` takes: a tensor of a file stays there until its turn comes."""

    def __init__(self, model):
        super().__init__({name: _Plain(t) if hasattr(t, "digest_parts") else t for name, t in model._tensors.items()})

    def nbytes(self, name):
        return self[name].nbytes


class _Plain:
    """What a GGUF stores in another way, as a Hugging Face folder has it: blocks become float32."""

    def __init__(self, tensor):
        self.dtype = tensor.dtype if tensor.dtype in _DTYPES else "F32"
        self.shape, self._tensor = tensor.shape, tensor
        self.nbytes = math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def array(self):
        return self._tensor.array().astype(DTYPES[self.dtype], copy=False)


def _checkpoint_files(folder):
    """Files of a checkpoint that is there, config.json first."""
    config = [path for path in [folder / CONFIG] if path.is_file()]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")] if folder.is_dir() else []
    return config + sorted(weights)


def _shards(weights):
    """Names by file: as many tensors, in their order, as stay within SHARD bytes; at least one."""
    shards, size = [[]], 0
    for name in weights:
        if shards[-1] and size + weights.nbytes(name) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights.nbytes(name)
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
    size = sum(weights.nbytes(name) for name in weights)
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _write_json(path, value):
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
