"""A trace from named arrays of any layout, by a mapping: what `arrays` and `pt` share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import as_array
from .._names import near
from ..config import Config
from ..dataflow import in_order
from ..diff._calls import of_lone_tokens
from ..diff._views import Step
from ..load import strict_json
from ..trace import Trace
from ._layout import Batch, Layout, bring, places

__all__ = ["config_of", "load_mapping", "read", "steps_of"]

FIELDS = ("taps", "tokens", "lengths", "padding", "layer_base", "dtype", "source", "model")
ENTRY = {"file": "a name, or a list of names", "key": "a name", "axes": "letters", "steps": "a list",
         "bits": "'bfloat16'", "scale": "a number"}


def config_of(model) -> Config:
    """The Config of a Model or a Config itself."""
    config = getattr(model, "config", model)
    if not isinstance(config, Config):
        raise TypeError(f"model is a {type(model).__name__}; it must be a Model or a Config")
    return config


def load_mapping(given) -> dict[str, Any]:
    """A mapping, from a JSON file or as it is.

    Raises
    ------
    FormatError, ValueError
        If it is no JSON object, or has a field that there is not.
    """
    if isinstance(given, str | Path):
        given, where = strict_json.load_object(Path(given)), str(given)
    else:
        where = "mapping"
    for field in given:
        if field not in FIELDS:
            raise ValueError(f"{where} has {field!r}; it may have {', '.join(FIELDS)}")
    if given.get("layer_base", 0) not in (0, 1):
        raise ValueError(f"{where}: layer_base is {given['layer_base']!r}; it must be 0 or 1")
    if not isinstance(given.get("taps", {}), Mapping):
        raise ValueError(f"{where}: taps is {strict_json.show(given['taps'])}; it must be an object, tap -> file")
    return dict(given)


def steps_of(alignment) -> list[dict[str, Any]]:
    """The steps of an Alignment, as a mapping's ``steps``."""
    for step in alignment.steps:
        if step.kind == "parts":
            raise ValueError("the alignment takes an array apart; name its taps in one entry, joined by '|', instead")
    return [{"kind": s.kind, "value": np.asarray(s.value).tolist(), "axis": s.axis} for s in alignment.steps]


def read(get: Callable[[str | None, str | None], np.ndarray], there: list[str], mapping, model) -> Trace:
    """A Trace.

    Parameters
    ----------
    get : callable(file, key) -> array
        Raises KeyError, with a sentence, where there is none.
    there : list of str
        Names of the arrays that can be taken without a mapping: those that are our taps are.
    mapping : mapping or None
    model : Model or Config

    Warns
    -----
    UserWarning
        If an array [n, 1, ..] is read as n tokens of one sequence, and nothing says that it is.
    """
    known = places(config_of(model))
    if mapping is None:
        ours = [n for n in there if n in known]
        if not ours:
            shown = ", ".join(there[:3]) or "none"
            raise ValueError(f"no array has the name of a tap: there are {shown}; taps are "
                             f"{', '.join(list(known)[:3])}, ...; a mapping says which is which")
        mapping = {"taps": {n: {"key": n} for n in ours}}
        if "tokens" in there:
            mapping["tokens"] = {"key": "tokens"}
    batch = _batch(mapping)
    arrays, wheres, lengths, left_out, lone = {}, {}, {}, [], []
    for name, entry in mapping.get("taps", {}).items():
        for taps, where, x, layout in _entries(name, entry, mapping, known, get, left_out):
            found, n = bring(x, {t: known[t] for t in taps}, layout, where, batch)
            for tap in arrays.keys() & found.keys():
                if not np.array_equal(arrays[tap], found[tap], equal_nan=True):
                    raise ValueError(f"{tap} is given by {wheres[tap]} and by {where}, and their values differ; one "
                                     "entry must be left in taps")
            arrays |= found
            wheres |= dict.fromkeys(found, where)
            own = known[taps[0]].sizes if len(taps) == 1 else None
            if not layout.axes and not batch.lengths and n == x.shape[:1] and of_lone_tokens(x, own):
                lone.append(f"{where} has shape {list(x.shape)}")
            lengths |= {t: n for t in taps if n}
    if not arrays:
        raise ValueError("the mapping names no tap; it must have one or more in taps")
    n = _one(lengths)
    if lone:
        warnings.warn(f"{lone[0]} and is read as {n[0]} tokens of one sequence; of {n[0]} sequences of one token, the "
                      f"mapping must have lengths, so many times 1, or axes that begin with BT", stacklevel=3)
    meta = {k: mapping[k] for k in ("source", "model", "dtype") if k in mapping}
    meta |= {"offsets": np.cumsum([0, *n]).tolist()} if n else {}
    meta |= _tokens(mapping, get, batch, n)
    if left_out:
        meta["left_out"] = left_out
    return Trace({t: arrays[t] for t in in_order(arrays)}, meta)


def _batch(mapping):
    lengths = mapping.get("lengths") or ()
    if not isinstance(lengths, list | tuple) or not all(isinstance(n, int) for n in lengths):
        raise ValueError(f"lengths is {strict_json.show(lengths)}; it must be a list of integers")
    return Batch(tuple(lengths), mapping.get("padding", "right"))


def _entries(name, entry, mapping, known, get, left_out):
    """(taps, where, array, layout) of an entry; of a pattern with {i}, of each layer that has the taps and a file."""
    entry = {"file": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is {strict_json.show(entry)}; it must be a file, "
                         f"or an object with {', '.join(ENTRY)}")
    for field in entry:
        if field not in ENTRY:
            raise ValueError(f"{name} has {field!r}; it may have {', '.join(ENTRY)}")
        if not _fits(field, entry[field]):
            raise ValueError(f"{name}: {field} is {strict_json.show(entry[field])}; it must be {ENTRY[field]}")
    taps, layout = [t.strip() for t in name.split("|")], _layout(name, entry)
    if not any("{i}" in t for t in taps):
        _check(taps, known)
        yield taps, *_array(entry, get, None), layout
        return
    base = mapping.get("layer_base", 0)
    layers = range(1 + max(int(m[1]) for t in known if (m := re.match(r"layers\.(\d+)\.", t))))
    fitting = [i for i in layers if all(t.replace("{i}", str(i)) in known for t in taps)]
    if not fitting:
        _check([t.replace("{i}", "0") for t in taps], known)
    missing = []
    for i in fitting:
        try:
            where, x = _array(entry, get, i + base)
        except KeyError as error:
            missing.append(error)
            left_out += [t.replace("{i}", str(i)) for t in taps]
            continue
        yield [t.replace("{i}", str(i)) for t in taps], where, x, layout
    if len(missing) == len(fitting):
        raise missing[0]


def _fits(field, value):
    """Whether a field of an entry is of the right kind; `_layout` looks into steps."""
    if field == "scale":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if field == "file" and isinstance(value, list):
        return bool(value) and all(isinstance(name, str) for name in value)
    return field == "steps" or isinstance(value, str) or field in ("file", "key") and isinstance(value, Path | None)


def _layout(name, entry):
    try:
        steps = tuple(Step(s["kind"], _value(s), s.get("axis")) for s in entry.get("steps", ()))
    except (KeyError, TypeError):
        raise ValueError(f"{name}: steps is {strict_json.show(entry['steps'])}; it must be a list of objects with "
                         "kind, value and axis") from None
    for s in steps:
        if s.kind not in ("reshape", "transpose", "slice", "take", "scale"):
            raise ValueError(f"{name}: a step is {s.kind!r}; it must be reshape, transpose, slice, take or scale")
    return Layout(entry.get("axes", ""), steps, entry.get("bits", ""), float(entry.get("scale", 1.0)))


def _value(step):
    value = step["value"]
    return np.asarray(value) if step["kind"] == "take" else tuple(value) if isinstance(value, list) else value


def _check(taps, known):
    for tap in taps:
        if tap not in known:
            raise ValueError(f"{tap!r} is no tap of this model; near it are {', '.join(near(tap, known))}")


def _array(entry, get, number):
    """(where, array) of an entry's file or files, these joined along the last axis."""
    def named(text):
        return text if text is None or number is None else text.replace("{i}", str(number))

    key, files = named(entry.get("key")), entry.get("file")
    files = [named(f) for f in files] if isinstance(files, list) else [named(files)]
    arrays = [get(f, key) for f in files]
    where = " + ".join(f"{f or ''}{':' if f and key else ''}{key or ''}" for f in files)
    if len({a.shape[:-1] for a in arrays}) > 1:
        raise ValueError(f"{where} have shapes {', '.join(str(list(a.shape)) for a in arrays)}; to be joined they must "
                         "differ in the last axis alone")
    return where, arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)


def _one(lengths):
    """The lengths of the sequences, which all taps must have."""
    found = dict.fromkeys(lengths.values())
    if len(found) > 1:
        a, b = list(found)[:2]
        of = {n: next(t for t, m in lengths.items() if m == n) for n in (a, b)}
        raise ValueError(f"{of[a]} has {list(a)} tokens and {of[b]} {list(b)}; all must be of one call")
    return next(iter(found), ())


def _tokens(mapping, get, batch, lengths):
    """The token ids of the packed sequences, as metadata."""
    given = mapping.get("tokens")
    if given is None:
        return {}
    where = "tokens"
    if isinstance(given, str | Mapping):
        where, x = _array({"file": given} if isinstance(given, str) else given, get, None)
    else:
        x = as_array(given, where)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{where} is {x.dtype}; tokens must be integers")
    x = x if x.ndim == 2 else x.reshape(1, -1)
    if len(x) > 1 and lengths:
        x = np.concatenate([r[len(r) - n:] if batch.padding == "left" else r[:n]
                            for r, n in zip(x, lengths, strict=True)])
    x = x.reshape(-1)[:sum(lengths) or None]
    if lengths and len(x) != sum(lengths):
        raise ValueError(f"{where} has {len(x)} ids; the taps have {sum(lengths)} rows")
    return {"tokens": x.tolist()}
