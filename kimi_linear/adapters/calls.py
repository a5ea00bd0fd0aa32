"""Calls of one op, each with its inputs and results in a file: recorded anywhere, judged by `kimi_linear.diff.replay`.

    with record_calls("fla.ops.kda.chunk_kda", "calls", op="delta_rule", conventions="fla"):
        model.generate(...)

A call is ``call-000017.safetensors``: ``in/NAME`` for each argument that is an array, as it was before the call, and
``out/0``, ``out/1``, ... for the results. The metadata have ``op``, ``conventions``, ``function``, ``options``
(arguments that are no arrays) and ``layout`` (what each array was in memory before it was copied). An npz of the same
names serves as well, with options as arrays of no axes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .._arrays import as_array
from ..errors import FormatError
from ..load.safetensors import SafetensorsFile, write_safetensors

__all__ = ["Call", "FORMAT", "files_of", "load_call", "memory_of", "record_calls"]

FORMAT = "kimi_linear call 1"

_counts, _counting = {}, threading.Lock()  # next number of each folder: several functions may record into one


@dataclass
class Call:
    """One recorded call.

    Attributes
    ----------
    path : Path
    op, conventions : str or None
        As the file says.
    inputs : dict
        Argument, by their name, to array or value.
    results : list of array
    layout : dict
        Array to what it was in memory: shape, strides in elements, offset, dtype, device.
    """

    path: Path
    op: str | None
    conventions: str | None
    inputs: dict
    results: list
    layout: dict = field(default_factory=dict)


# ---- writing -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record_calls(fn, folder, *, op, conventions="ours", limit=None):
    """Record the calls of a function while the block lasts.

    Parameters
    ----------
    fn : callable or str
        A function; the block gets one that records. Or the dotted name of one, such as ``"fla.ops.kda.chunk_kda"``, or
        of a method of a class, whose `self` is not kept: it is replaced where it is, and put back. A module that has
        imported it by name already has its own: name that one.
    folder : str or path
        Made where it is not; calls are added behind those that are there.
    op : str
        Its name in `kimi_linear.reference`.
    conventions : str
        Whose names and layouts its arguments have, a key of `kimi_linear.conventions`.
    limit : int, optional
        Record so many calls at most; the rest run unrecorded.

    Yields
    ------
    callable
        The recording function. What it raises is not recorded; a call that cannot be kept is told by a warning.
    """
    owner, name = _owner(fn) if isinstance(fn, str) else (None, None)
    function, kind = _function_of(owner, name) if owner is not None else (fn, None)
    if not callable(function):
        raise TypeError(f"fn is a {type(fn).__name__}; it must be a function, or the dotted name of one")
    recorder = _Recorder(function, Path(folder), op, conventions, limit, kind in (_METHOD, classmethod))

    @functools.wraps(function)
    def recording(*args, **kwargs):  # a function, which a class binds to its objects
        return recorder(*args, **kwargs)

    if owner is None:
        yield recording
        return
    own = getattr(owner, "__dict__", {})
    inherited, before = name not in own, own.get(name)
    setattr(owner, name, kind(recording) if kind in (staticmethod, classmethod) else recording)
    try:
        yield recording
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)


_METHOD = "method"


def _function_of(owner, name):
    """The function of a name and, in a class, how it is bound: `_METHOD`, classmethod, staticmethod; else None."""
    if not isinstance(owner, type):
        return getattr(owner, name), None
    held = inspect.getattr_static(owner, name)
    if isinstance(held, staticmethod | classmethod):
        return held.__func__, type(held)
    return held, _METHOD if hasattr(held, "__get__") else staticmethod


def _owner(dotted):
    """(module or class, name) of a dotted name."""
    parts = dotted.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:n]).startswith(error.name or "\0"):
                raise
            continue
        for part in parts[n:-1]:
            owner = getattr(owner, part, None)
        if owner is None or not hasattr(owner, parts[-1]):
            break
        return owner, parts[-1]
    raise ValueError(f"there is no {dotted!r} to record")


class _Recorder:
    """A function that keeps a copy of what it was given, runs the real one, and writes both."""

    def __init__(self, function, folder, op, conventions, limit, bound):
        folder.mkdir(parents=True, exist_ok=True)
        self.function, self.folder, self.limit, self.bound = function, folder, limit, bound
        called = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
        self.about = {"format": FORMAT, "op": op, "conventions": conventions, "function": called}
        self.recorded = 0
        with _counting:
            _counts[folder.resolve()] = max(_counts.get(folder.resolve(), 0), _next_number(folder))
        try:
            self.signature = inspect.signature(function)
        except (TypeError, ValueError):
            self.signature = None

    def __call__(self, *args, **kwargs):
        with _counting:
            number, wanted = _counts[self.folder.resolve()], self.limit is None or self.recorded < self.limit
            self.recorded += wanted
            _counts[self.folder.resolve()] += wanted
        if not wanted:
            return self.function(*args, **kwargs)
        kept = arrays, options, layout = {}, {}, {}
        try:
            for name, value in self._named(args, kwargs).items():
                _keep(f"in/{name}", value, *kept)
        except Exception as error:  # whatever an argument's own methods raise: the run goes on
            self._tell(number, error)
            return self.function(*args, **kwargs)
        result = self.function(*args, **kwargs)
        try:
            for i, value in enumerate(result if isinstance(result, tuple | list) else (result,)):
                number_of = isinstance(value, int | float | np.generic) and not isinstance(value, bool)
                _keep(f"out/{i}", np.asarray(value).reshape(1) if number_of else value, *kept)
            options = {k.removeprefix("in/"): v for k, v in options.items() if k.startswith("in/")}
            about = self.about | {"call": str(number), "options": json.dumps(options), "layout": json.dumps(layout)}
            write_safetensors(self.folder / f"call-{number:06d}.safetensors", arrays, about)
        except Exception as error:
            self._tell(number, error)
        return result

    def _tell(self, number, error):
        """A warning at the caller of the recording function."""
        about = f"call {number} of {self.about['function']} is not recorded"
        warnings.warn(f"{about}: {error or type(error).__name__}", RuntimeWarning, stacklevel=4)

    def _named(self, args, kwargs):
        """Arguments by name, defaults too; those that a signature does not tell are called 0, 1, ..."""
        named = self._by_signature(args, kwargs)
        return dict([*named.items()][1:]) if self.bound else named

    def _by_signature(self, args, kwargs):
        if self.signature is None:
            return {**{str(i): x for i, x in enumerate(args)}, **kwargs}
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                named |= {f"{name}.{i}": x for i, x in enumerate(value)}
            else:
                named[name] = value
        return named


def _keep(name, value, arrays, options, layout):
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        layout[name] = memory_of(value)
        arrays[name] = np.array(as_array(value.detach().cpu() if hasattr(value, "detach") else value, name))
    elif isinstance(value, tuple | list) and any(hasattr(v, "shape") for v in value):
        for i, item in enumerate(value):
            _keep(f"{name}.{i}", item, arrays, options, layout)
    elif value is None or isinstance(value, bool | int | float | str):
        options[name] = value
    elif hasattr(value, "item") and isinstance(value.item(), bool | int | float | str):
        options[name] = value.item()
    elif isinstance(value, tuple | list) and _makes_numbers(value):
        arrays[name] = np.asarray(value)
    else:
        options[name] = f"<{name.removeprefix('in/')}, a {type(value).__name__}>"


def _makes_numbers(value):
    """Whether a list, of lists perhaps, is an array of numbers."""
    try:
        return as_array(value, "").dtype.kind in "fiub"
    except (TypeError, ValueError):
        return False


def memory_of(x):
    """What an array is in memory: a bug can vanish in a copy."""
    if hasattr(x, "storage_offset"):
        return {"shape": list(x.shape), "strides": list(x.stride()), "offset": x.storage_offset(),
                "dtype": str(x.dtype).removeprefix("torch."), "device": str(x.device)}
    a = np.asarray(x)
    base = a.base if isinstance(a.base, np.ndarray) else a
    offset = (a.ctypes.data - base.ctypes.data) // max(a.itemsize, 1)
    return {"shape": list(a.shape), "strides": [s // max(a.itemsize, 1) for s in a.strides], "offset": offset,
            "dtype": a.dtype.name, "device": "cpu"}


def _next_number(folder):
    numbers = [int(p.stem.split("-")[1]) for p in folder.glob("call-*.safetensors") if p.stem[5:].isdigit()]
    return max(numbers, default=-1) + 1


# ---- reading -------------------------------------------------------------------------------------------


def files_of(path) -> list[Path]:
    """The call files of a folder, in order; or the one file.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such path, or no file of a call in it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; it must be a folder of recorded calls")
    if path.is_file():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz") and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{path} holds no recorded call: it must have files *.safetensors or *.npz")
    return files


def load_call(path) -> Call:
    """A recorded call.

    Raises
    ------
    FormatError
        If the file is damaged, or has no ``in/`` or no ``out/``.
    """
    path = Path(path)
    arrays, meta = _npz(path) if path.suffix == ".npz" else _safetensors(path)
    inputs = {n.removeprefix("in/"): x for n, x in arrays.items() if n.startswith("in/")}
    results = {n.removeprefix("out/"): x for n, x in arrays.items() if n.startswith("out/")}
    if not inputs or not results:
        lacking = " and ".join(side for side, have in (("in/NAME", inputs), ("out/NAME", results)) if not have)
        raise FormatError(f"it has no {lacking}: it must hold a call's inputs and results, and has "
                          f"{', '.join(list(arrays)[:4]) or 'nothing'}", str(path))
    try:
        options, layout = (json.loads(meta.get(k, "{}")) for k in ("options", "layout"))
    except ValueError:
        raise FormatError("its options or layout are no JSON", str(path)) from None
    inputs |= {n: v for n, v in options.items() if v is not None and n not in inputs}
    return Call(path, meta.get("op"), meta.get("conventions"), _gathered(inputs), list(results.values()), layout)


def _safetensors(path):
    file = SafetensorsFile(path)
    return {n: file[n].array() for n in sorted(file, key=_numbered)}, file.metadata


def _npz(path):
    from .arrays import read_npz

    found = read_npz(path)
    arrays = {n: found[n] for n in sorted(found, key=_numbered)}
    options = {n: x for n, x in arrays.items() if x.shape == () and not n.startswith("out/")}
    inputs = {n.removeprefix("in/"): x.item() for n, x in options.items() if n.startswith("in/")}
    meta = {n: str(x.item()) for n, x in options.items() if n in ("op", "conventions")}
    return {n: x for n, x in arrays.items() if n not in options}, meta | {"options": json.dumps(inputs)}


def _numbered(name):
    head, _, tail = name.rpartition("/")
    return head, int(tail) if tail.isdigit() else -1, tail


def _gathered(inputs):
    """``shared.0``, ``shared.1``, ... as one tuple."""
    out = {}
    for name, value in inputs.items():
        head, _, tail = name.rpartition(".")
        if head and tail.isdigit():
            out.setdefault(head, []).append((int(tail), value))
        else:
            out[name] = value
    return {n: tuple(v for _, v in sorted(x)) if isinstance(x, list) and x and isinstance(x[0], tuple) else x
            for n, x in out.items()}
