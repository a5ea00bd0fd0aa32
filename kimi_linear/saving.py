"""A model as a Hugging Face folder."""

import contextlib
import errno
import json
import math
import os
import shutil

from .errors import FormatError
from .load.atomic import atomic_files, write_text
from .load.checkpoint import INDEX, SINGLE, TOKENIZER_FILES, at_home, is_shard_name
from .load.gguf_heads import as_published
from .load.safetensors import DTYPES, write_safetensors
from .load.strict_json import load_object, show

__all__ = ["save_pretrained"]

SHARD = 5 * 10**9  # bytes of tensors a file
CONFIG, GENERATION = "config.json", "generation_config.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_pretrained(model, folder, overwrite=False):
    """Write `model` to `folder`; see `Model.save_pretrained`."""
    checkpoint = model._checkpoint
    own, norms, check = None, {}, None
    if checkpoint is not None:
        own, norms, check = checkpoint.path, checkpoint.norms, checkpoint.check_unchanged
        check()
    published = model.config.published()  # a GGUF's has other norms and another order of heads
    tensors = {}
    for name, tensor in model._tensors.items():
        found = as_published(model.config, published, name, tensor, norms.get(name))
        tensors[name] = _Plain(found) if found is not tensor or hasattr(tensor, "digest_parts") else tensor
    dtype = dtype_of(tensors)
    config = published.to_dict() | ({"torch_dtype": dtype} if dtype else {})
    write_folder(folder, tensors, config, model.generation_config, _tokenizer_writer(model, own), overwrite, check, own,
                 model.files)


def write_folder(folder, tensors, config, generation_config, tokenizer=None, overwrite=False, check=None, own=None,
                 files=()):
    """Write a Hugging Face folder.

    All files are written into a folder beside their places first, and moved when they are whole, config.json last:
    what fails leaves what was there (`atomic_files`).

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
    files : iterable of MappedFile
        The files that the tensors are in; none of them is replaced.
    """
    folder = at_home(folder)
    if own is not None and folder.exists() and folder.resolve() == own.resolve():
        raise FileExistsError(f"folder is {folder}, the model's own, whose files are in use; it must be another")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder is {folder}, which is a file; it must be a folder")
    shards = _shards(tensors)
    texts = {CONFIG: _json(config, "config")}
    if generation_config:
        texts[GENERATION] = _json(generation_config, "generation_config")

    def replaced():
        old = _checkpoint_files(folder, shards)
        if old and not overwrite:
            raise FileExistsError(f"folder {folder} holds a checkpoint ({old[0].name}); overwrite=True (--force) "
                                  "replaces it")
        for path in old:
            if any(file.path.exists() and path.samefile(file.path) for file in files):
                raise FileExistsError(f"folder {folder} holds {path.name}, in which the tensors are; it must be "
                                      "another folder")
        return old

    replaced()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _check_room(folder, sum(t.nbytes for t in tensors.values()))
        with atomic_files(folder, CONFIG, replaced) as draft:
            if tokenizer is not None:
                tokenizer(draft)
            _write_tensors(draft, tensors, shards)
            for name, text in texts.items():
                write_text(draft / name, text)
            if check is not None:
                check()
    except BaseException:
        for path in made:  # what was made for it is empty again
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _tokenizer_writer(model, own):
    """Copies the folder's files while the tokenizer is theirs, else writes its own; None where there is none."""
    if own is None or not own.is_dir() or not model._tokenizer_is_as_opened():
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


def _checkpoint_files(folder, shards):
    """Files of a checkpoint that are there, config.json first: all that a model in this folder would be read with.

    Raises
    ------
    FileExistsError
        If a folder, or what else is no file, has such a name or one that is to be written.
    """
    names = dict.fromkeys([CONFIG, GENERATION, *TOKENIZER_FILES, SINGLE, INDEX, *_shard_names(shards)])
    names |= dict.fromkeys(sorted(path.name for path in folder.glob("model-?????-of-?????.safetensors")))
    names |= dict.fromkeys(sorted(_names_of_index(folder)))
    there = [folder / name for name in names if os.path.lexists(folder / name)]
    for path in there:
        if not path.is_file():
            raise FileExistsError(f"folder {folder} holds {path.name}, which is no regular file, and would have to be "
                                  "replaced by one; remove it, or give another folder")
    return there


def _names_of_index(folder):
    """The shards that the index of a checkpoint names; none where it cannot be read."""
    if not (folder / INDEX).is_file():
        return set()
    with contextlib.suppress(OSError, FormatError):
        shards = load_object(folder / INDEX).get("weight_map")
        if isinstance(shards, dict):
            return {name for name in shards.values() if isinstance(name, str) and is_shard_name(name)}
    return set()


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


def _shard_names(shards):
    """The file of each shard."""
    if len(shards) == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]


def _write_tensors(folder, weights, shards):
    meta, files = {"format": "pt"}, _shard_names(shards)
    for file, names in zip(files, shards, strict=True):
        write_safetensors(folder / file, {name: weights[name] for name in names}, meta)
    if len(files) > 1:
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(t.nbytes for t in weights.values())
        write_text(folder / INDEX, _json({"metadata": {"total_size": size}, "weight_map": index}, INDEX))


def _json(content, what):
    """An object as JSON; ValueError names the key whose value has no JSON."""
    for key, value in content.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{what}[{key!r}] is {show(value)}; it cannot be written as JSON: {error}") from None
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
