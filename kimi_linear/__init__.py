"""Kimi-Linear on arrays: every op beside its float64 reference, and the whole model as an engine."""

import platform as _platform

try:
    from . import _core as _core
except ImportError as _error:
    raise ImportError(
        f"kimi_linear is for Linux and macOS, x86-64 and aarch64; here is {_platform.system()} on "
        f"{_platform.machine()} and its extension module cannot be loaded ({_error}). In a source tree: make build"
    ) from None

from . import adapters, diff, faults, ops, reference, testing
from ._arrays import pack, unpack
from ._version import __version__
from .compare_models import ModelComparison, compare_models
from .config import Config, ConfigError, LayerSpec
from .context import Context, Device, devices, isa_list, set_num_threads, threads
from .conventions import conventions
from .convert import Conversion, convert
from .device_array import DeviceArray
from .errors import DeviceError, FormatError
from .generate import Generation
from .model import Model
from .plan import Plan, plan
from .quantized import Quantized, StorageType, storage_type, storage_types
from .reference_model import ReferenceModel
from .state import Snapshot, State
from .tokenizer import Tokenizer
from .trace import Trace

__all__ = [
    "Config", "ConfigError", "Context", "Conversion", "Device", "DeviceArray", "DeviceError", "FormatError",
    "Generation", "LayerSpec", "Model", "ModelComparison", "Plan", "Quantized", "ReferenceModel", "Snapshot", "State",
    "StorageType", "Tokenizer", "Trace", "__version__", "adapters", "compare_models", "conventions", "convert",
    "devices", "diff", "faults", "isa_list", "ops", "pack", "plan", "reference", "set_num_threads", "storage_type",
    "storage_types", "testing", "threads", "unpack",
]


def __dir__():
    return sorted(__all__)  # not the modules that a name here comes from
