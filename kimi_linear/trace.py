"""A trace: the intermediates of a forward pass by name, kept in one file and read back lazily."""

import difflib
import fnmatch
import json
from collections.abc import Mapping

import numpy as np

from .load.safetensors import SafetensorsFile, write_safetensors

__all__ = ["Trace", "matches", "tap_table"]

FORMAT = "kimi_linear trace 1"


def tap_table(core):
    """Tap name -> (layer, id, shape without T, dtype), in the order of the dataflow, of a ``_core.Model``."""
    table = {}
    last = []
    for layer, tap, name, shape, is_int32 in core.taps():
        entry = (layer, tap, shape, np.dtype(np.int32 if is_int32 else np.float32))
        if layer < 0 and name != "embed":
            last.append((name, entry))
        else:
            table[name if layer < 0 else f"layers.{layer}.{name}"] = entry
    return table | dict(last)


def matches(names, patterns):
    """Those of `names` that one of the globs matches; a plain prefix such as ``layers.3`` means all below it.

    Raises
    ------
    ValueError
        If a glob matches nothing; the message shows names that are there.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = list(names)
    wanted = set()
    for pattern in patterns:
        hit = [n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(pattern + ".")]
        if not hit:
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3) or names[:4]
            raise ValueError(f"taps: {pattern!r} matches no tap; near it are {', '.join(near)}")
        wanted.update(hit)
    return [n for n in names if n in wanted]


class Trace(Mapping):
    """Intermediates of a forward pass: a mapping from tap to array [T, ...], in the order of the dataflow.

    Parameters
    ----------
    arrays : mapping from tap to array
        May be lazy.
    meta : mapping, optional
        What it is a trace of: ``model``, ``tokens``, ``source``, ``dtype``, ...
    """

    def __init__(self, arrays, meta=None):
        self._arrays = arrays
        self.meta = dict(meta or {})

    def __getitem__(self, tap):
        try:
            value = self._arrays[tap]
        except KeyError:
            near = difflib.get_close_matches(str(tap), list(self._arrays), n=3, cutoff=0.3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise KeyError(f"{tap!r} is not in this trace{hint}") from None
        return value.array() if hasattr(value, "file") else value

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)

    @property
    def tokens(self):
        """Token ids of the traced text, or None."""
        return np.asarray(self.meta["tokens"]) if "tokens" in self.meta else None

    @property
    def nbytes(self):
        """Bytes of all arrays."""
        return sum(v.nbytes for v in self._arrays.values())

    def filter(self, patterns):
        """The part of the trace that the globs match."""
        return Trace({n: self._arrays[n] for n in matches(self, patterns)}, self.meta)

    def save(self, path):
        """Write one safetensors file, whole or not at all; `load` reads it back."""
        meta = {k: v if isinstance(v, str) else json.dumps(_plain(v)) for k, v in self.meta.items()}
        order = json.dumps(list(self._arrays))
        write_safetensors(path, dict(self._arrays), {**meta, "format": FORMAT, "order": order})

    @classmethod
    def load(cls, path, *, names=None, config=None, prefix=""):
        """Read a trace; arrays are mapped, and read when they are asked for.

        Parameters
        ----------
        path : str or path
            A safetensors file.
        names : {None, "hf"}
            ``"hf"``: the arrays are named by transformers' module paths and come in its shapes; they become ours.
        config : Config, needed with ``names="hf"``
        prefix : str
            Of the names to take, removed.
        """
        file = SafetensorsFile(path)
        meta = {}
        for key, text in file.metadata.items():
            try:
                meta[key] = json.loads(text)
            except ValueError:
                meta[key] = text
        if names is None:
            order = meta.pop("order", None)
            arrays = {n.removeprefix(prefix): file[n] for n in (order or file) if n.startswith(prefix)}
            return cls(arrays, meta)
        if names != "hf":
            raise ValueError(f"names is {names!r}; it must be None or 'hf'")
        if config is None:
            raise ValueError("names='hf' needs config=: shapes of heads are not in the file")
        from .golden import to_taps

        lazy = {name: file[name].array() for name in file}
        if f"{prefix}tokens" in lazy:
            meta["tokens"] = lazy[f"{prefix}tokens"].tolist()
        return cls(to_taps(lazy, config, prefix), meta)

    def __repr__(self):
        T = next((len(self[n]) for n in self), 0)
        return f"Trace({len(self)} taps of {T} tokens, {self.nbytes / 2**20:.1f} MiB)"


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value
