"""From files to named weights: formats are known here and nowhere else."""

from .checkpoint import Checkpoint, open_folder, resolve
from .safetensors import SafetensorsFile, TensorView, atomic_file, write_safetensors

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "TensorView",
    "atomic_file",
    "open_folder",
    "resolve",
    "write_safetensors",
]
