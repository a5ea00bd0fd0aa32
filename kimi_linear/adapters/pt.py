"""A Trace from ``.pt`` files: tensors in dicts and lists, saved by torch. Read with weights alone, never as pickles.

The mapping is that of `kimi_linear.adapters.arrays`; a ``key`` is a tensor's path in the file, its parts joined by
dots: ``{"layers": [{"q": ...}]}`` has ``layers.0.q``. torch does the reading, and is needed for nothing else.
"""

from __future__ import annotations

from pathlib import Path

from .._arrays import as_array
from ..errors import FormatError, first_line
from . import _mapped

__all__ = ["read"]


def read(path, mapping=None, *, model):
    """A Trace of tensors in one ``.pt`` file, or in a folder of them.

    Parameters
    ----------
    path : str or path
    mapping : str, path or mapping, optional
        As for `kimi_linear.adapters.arrays.read`; by default ``mapping.json`` of the folder. Without, the tensors'
        names must be our taps.
    model : Model or Config

    Returns
    -------
    Trace

    Raises
    ------
    ModuleNotFoundError
        If torch is not installed.
    FormatError
        If a file is damaged, or holds anything but tensors and plain values.
    FileNotFoundError, KeyError, ValueError, TypeError
        As for arrays.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it must be a .pt file, or a folder of them")
    if mapping is None and path.is_dir() and (path / "mapping.json").exists():
        mapping = path / "mapping.json"
    mapping = None if mapping is None else _mapped.load_mapping(mapping)
    files = {p.name: p for p in (sorted(path.glob("*.pt")) if path.is_dir() else [path])}
    opened = {}

    def tensors(name):
        if name not in opened:
            opened[name] = _tensors(files[name])
        return opened[name]

    def get(file, key):
        if file is None:
            file = next((f for f in files if key in tensors(f)), None)
            if file is None:
                raise KeyError(f"{path} has no tensor {key!r}")
        if file not in files:
            raise KeyError(f"{path / file if path.is_dir() else file} is not there; "
                           f"there are {', '.join(files) or 'none'}")
        found = tensors(file)
        if key is None and len(found) == 1:
            return next(iter(found.values()))
        if key not in found:
            raise KeyError(f"{files[file]} has no tensor {key!r}; it has {', '.join(list(found)[:4]) or 'none'}")
        return found[key]

    trace = _mapped.read(get, [k for f in files for k in tensors(f)], mapping, model)
    trace.meta.setdefault("source", str(path))
    return trace


def _tensors(path):
    """Path of each tensor in a file -> array."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} is a file of torch, which is not installed here: pip install torch, or save "
                                  "the tensors as safetensors or npz where it is", name="torch") from None
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError("it holds more than tensors and plain values, and is not read: "
                          f"{first_line(error)}", str(path)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise FormatError(f"it is no file of torch, or it is cut short: {first_line(error)}", str(path)) from None
    found = dict(_flat("", loaded))
    return {k.removeprefix("."): as_array(v, k) for k, v in found.items()}


def _flat(name, value):
    if hasattr(value, "detach"):
        yield name or ".", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _flat(f"{name}.{i}", item)
