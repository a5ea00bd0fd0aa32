"""From files to named weights: formats are known here and nowhere else."""

import os

from .atomic import atomic_file
from .checkpoint import Checkpoint, open_folder, resolve
from .gguf import GGUFFile, MetaArray, is_gguf
from .safetensors import SafetensorsFile, TensorView, write_safetensors


def open_checkpoint(path):
    """A Checkpoint of a Hugging Face folder, a hub id or a GGUF, which is known by its first bytes.

    Raises as `open_folder`, FormatError with all that is wrong with a GGUF, and TypeError where it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; it must be text or a path")
    if is_gguf(os.path.expanduser(path)):
        from .gguf_checkpoint import open_gguf

        return open_gguf(path)
    return open_folder(path)


__all__ = [
    "Checkpoint",
    "GGUFFile",
    "MetaArray",
    "SafetensorsFile",
    "TensorView",
    "atomic_file",
    "is_gguf",
    "open_checkpoint",
    "open_folder",
    "resolve",
    "write_safetensors",
]
