"""A trace: the intermediates of a forward pass by name, kept in one file and read back lazily."""

import fnmatch
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ._arrays import as_array
from ._names import near
from .errors import FormatError
from .load.safetensors import SafetensorsFile, sparse_safetensors, write_safetensors
from .load.strict_json import show

__all__ = ["BEFORE", "Trace", "matches", "tap_table"]

FORMAT = "kimi_linear trace 1"
ON_REQUEST = ("moe.scores", "mla.probs", "attn.probs")  # in no glob but one that names them
BEFORE = "before."  # in front of a state array that holds what the kept tokens found, not what they left
PASS = 512  # tokens of a forward call of a streamed trace; a multiple of 64, so that no byte depends on it


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


def on_request(name):
    """Whether a tap is made only when it is asked for by its name, or by a glob that ends as it does."""
    return name.endswith(ON_REQUEST)


def matches(names, patterns, what="taps", *, made=False):
    """Those of `names` that one of the globs matches; a plain prefix such as ``layers.3`` means all below it.

    Taps on request (``moe.scores``, ``mla.probs``, ``attn.probs``) are matched only by their whole name, or by a glob
    that ends as they do, such as ``*.probs``.

    Parameters
    ----------
    names : iterable of str
    patterns : str or iterable of str
    what : str
        The argument, for the message.
    made : bool
        Whether all are there already: then those on request are as the others.

    Raises
    ------
    ValueError
        If a glob matches nothing; the message shows names that are there.
    """
    patterns = [patterns] if isinstance(patterns, str) or not np.iterable(patterns) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what}: {pattern!r:.40} is no glob; it must be text, or a list of it")
    names = list(names)
    plain = set(names if made else (n for n in names if not on_request(n)))
    wanted = set()
    for pattern in patterns:
        end = "." + pattern.rpartition(".")[2]
        hit = [
            n for n in names
            if (fnmatch.fnmatchcase(n, pattern) and (n in plain or n.endswith(end)))
            or (n.startswith(pattern + ".") and n in plain)
        ]
        if not hit:
            raise ValueError(f"{what}: {pattern!r} matches no tap; near it are {', '.join(near(pattern, names, 4))}")
        wanted.update(hit)
    return [n for n in names if n in wanted]


def _same_bytes(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


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
        if not isinstance(arrays, Mapping):
            raise TypeError(f"arrays is a {type(arrays).__name__}; it must be a mapping from tap to array")
        if isinstance(arrays, dict):  # lists of numbers among them
            arrays = {tap: x if hasattr(x, "nbytes") else as_array(x, tap) for tap, x in arrays.items()}
        self._arrays = arrays
        self.meta = dict(meta or {})

    def __getitem__(self, tap):
        try:
            value = self._arrays[tap]
        except KeyError:
            held = f"near it are {', '.join(near(tap, self._arrays))}" if len(self) else "it is empty"
            raise KeyError(f"{tap!r} is not in this trace; {held}") from None
        return value.array() if hasattr(value, "file") else value

    def __contains__(self, tap):
        return tap in self._arrays

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)

    def __eq__(self, other):
        """Whether both hold the same taps, each of the same type, shape and bytes; `meta` does not count."""
        if not isinstance(other, Trace):
            return NotImplemented
        return self.keys() == other.keys() and all(_same_bytes(self[tap], other[tap]) for tap in self)

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
        return Trace({n: self._arrays[n] for n in matches(self, patterns, made=True)}, self.meta)

    def save(self, path):
        """Write one safetensors file, whole or not at all; `load` reads it back."""
        write_safetensors(path, dict(self._arrays), _metadata(self.meta, self._arrays))

    @classmethod
    def load(cls, path, *, names=None, config=None, prefix=""):
        """Read a trace; arrays are mapped, and read when they are asked for.

        Parameters
        ----------
        path : str or path
            A safetensors file.
        names : {None, "hf"}
            ``"hf"``: the arrays are named by transformers' module paths and come in its shapes; they become ours. A
            batch, which must be without padding, becomes so many sequences.
        config : Config, needed with ``names="hf"``
        prefix : str
            Of the names to take, removed.

        Raises
        ------
        ValueError
            If no name begins with the prefix, or none is a module of transformers; the message shows some.
        FormatError
            If it is not a safetensors file, or its metadata have an order, tokens, offsets or positions that are none.
        """
        file = SafetensorsFile(path)
        meta = {}
        for key, text in file.metadata.items():
            meta[key] = json.loads(text) if _is_json(text) else text
        _check_integers(meta, path)
        if names is None:
            order = meta.pop("order", None)
            _check_order(order, file, path)
            arrays = {n.removeprefix(prefix): file[n] for n in (order or file) if n.startswith(prefix)}
            if prefix and not arrays:
                raise ValueError(f"{path}: none of its {len(file)} names begins with prefix={prefix!r}; it holds "
                                 f"{', '.join([*file][:3])}, ...")
            return cls(arrays, meta)
        if names != "hf":
            raise ValueError(f"names is {names!r:.40}; it must be None or 'hf': kimi_linear.adapters.load reads others")
        if config is None:
            raise ValueError("names='hf' needs config=: shapes of heads are not in the file")
        from .dataflow import nodes
        from .golden import offsets_of, to_taps

        lazy = {name: file[name].array() for name in file}
        if f"{prefix}tokens" in lazy:
            meta["tokens"] = lazy[f"{prefix}tokens"].tolist()
        taps = to_taps(lazy, config, prefix)
        offsets = offsets_of(lazy, config, prefix)
        if offsets is not None:
            meta.setdefault("offsets", offsets)
        own = {node.tap for node in nodes(config)}.intersection(name.removeprefix(prefix) for name in lazy)
        if len(own) > len(taps):
            raise ValueError(f"{path}: {len(own)} of its {len(lazy)} names are our taps, {len(taps)} are modules of "
                             "transformers; read it without names='hf' (--names hf)")
        if not taps:
            raise ValueError(f"{path}: with prefix={prefix!r} none of its {len(lazy)} names is a module of this model; "
                             f"it holds {', '.join(sorted(lazy)[:3])}, ...")
        return cls(taps, meta)

    def _ipython_key_completions_(self):
        return list(self)

    def __repr__(self):
        ends = np.ravel(self.meta.get("offsets", ()))
        T = ends[-1] if ends.size else next((len(self[n]) for n in self), 0)
        return f"Trace({len(self)} taps of {T} tokens, {self.nbytes / 2**20:.1f} MiB)"


def stream(model, tokens, taps, to=None, tokens_slice=None, progress=None, *, states=None, state=None, edit=None,
           expert_ids=None, check=None):
    """A trace made in calls of PASS tokens through one state; see `Model.trace`.

    Same bytes as in one call: calls end at multiples of 64 of the tokens. With `states` one ends before the first token
    that is kept and one behind the last, wherever that is.
    """
    call = model._call(tokens)
    if call.form != "single":
        raise ValueError("to, tokens_slice and states need one sequence of tokens [T]")
    names = matches(call.names(), taps)
    probs = [name for name in names if name.endswith(".probs")]
    if probs:
        raise ValueError(f"taps: {probs[0]} needs all positions at once; trace it without to and tokens_slice")
    steps = _Steps(model, call.ids, names, edit, expert_ids, check)
    a, b = _kept(tokens_slice, call.T)
    specs = {n: _Spec((b - a, *call.table[n][2]), call.table[n][3]) for n in names if n != "logits"}
    if "logits" in names:
        specs["logits"] = _Spec((b - a, call.vocab), np.dtype(np.float32))
    end = min(-(-b // 64) * 64, call.T) if state is None else call.T
    given, state = state, model.new_state() if state is None else state
    meta = {**call.meta(), "tokens": call.ids[a:b].tolist(), "offsets": [0, b - a], "position": [state.position + a]}
    if states is not None:
        end = b if given is None else end
        steps.states = matches(state, "*" if states is True else states, "states")
        specs |= _state_specs(state, steps.states, a, b)
    if to is None:
        arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}

        def keep(name, row, values):
            arrays[name][row : row + len(values)] = values

        steps.run(state, a, b, end, keep, progress)
        return Trace(arrays, meta)
    with sparse_safetensors(to, specs, _metadata(meta, specs)) as keep:
        steps.run(state, a, b, end, keep, progress)
    return Trace.load(to)


def _state_specs(state, names, a, b):
    """Shapes of state arrays before and behind the tokens a..b; those of attention have a row a token."""
    specs = {}
    for name in names:
        x = state[name]
        grows = name.endswith("_cache")
        for prefix, n in ((BEFORE, a), ("", b)):
            rows = (state.position + n) // state.positions_of_row(name)
            specs[prefix + name] = _Spec((rows, *x.shape[1:]) if grows else x.shape, x.dtype)
    return specs


class _Spec(NamedTuple):
    """Shape and dtype of an array that is still to come."""

    shape: tuple
    dtype: np.dtype


def _kept(tokens_slice, T):
    if tokens_slice is None:
        return 0, T
    if not isinstance(tokens_slice, slice):
        raise TypeError(f"tokens_slice is a {type(tokens_slice).__name__}; it must be a slice")
    a, b, step = tokens_slice.indices(T)
    if step != 1 or b < a:
        raise ValueError(f"tokens_slice is {tokens_slice}; it must rise by 1")
    return a, b


class _Steps:
    """The calls of a streamed trace."""

    def __init__(self, model, ids, names, edit, expert_ids, check):
        self.model, self.ids, self.names, self.check = model, ids, names, check
        self.edit, self.expert_ids, self.states = edit, expert_ids or {}, []
        call = model._call(ids)
        if edit is not None:
            call.edits(edit, len(ids) if "logits" in names else 0)
            self.of_logits = [glob for glob in edit if not _matches_any(call.table, str(glob))]
        call.experts(expert_ids)

    def run(self, state, a, b, end, keep, progress):
        """Read tokens up to `end`; rows a..b-1 go to keep(name, row, values), and the states before and behind them."""
        cuts = sorted({*range(0, end, PASS), *((a, b) if self.states else ()), end})
        self._keep_states(state, 0, a, b, keep)
        for first, last in zip(cuts, cuts[1:]):
            low, high = max(a, first), min(b, last)
            names = self.names if low < high else []
            out = self.model.forward(
                self.ids[first:last], state=state, logits="all" if "logits" in names else "none", taps=names or None,
                edit=self._edit(first, last, names), check=self.check,
                expert_ids={i: as_array(ids, f"expert_ids[{i}]")[first:last] for i, ids in self.expert_ids.items()},
            )
            for name in names:
                keep(name, low - a, out[1][name][low - first : high - first])
            if progress is not None:
                progress(last, end)
            self._keep_states(state, last, a, b, keep)

    def _keep_states(self, state, at, a, b, keep):
        """The states after `at` tokens, where that is before the first that is kept or behind the last."""
        for name in self.states:
            if at == a:
                keep(BEFORE + name, 0, state[name])
            if at == b:
                keep(name, 0, state[name])

    def _edit(self, first, last, names):
        """The edits of these tokens; those of logits where logits are made."""
        if self.edit is None:
            return None
        edit = {k: v if callable(v) else as_array(v, f"edit[{k!r}]")[first:last] for k, v in self.edit.items()}
        return edit if "logits" in names else {k: v for k, v in edit.items() if k not in self.of_logits}


def _matches_any(names, glob):
    try:
        return bool(matches(names, glob))
    except ValueError:
        return False


def _metadata(meta, names):
    """Metadata of a trace's file: values as JSON, but text as it is where no reader takes it for JSON."""
    meta = {k: v if isinstance(v, str) and not _is_json(v) else json.dumps(_plain(v)) for k, v in meta.items()}
    return {**meta, "format": FORMAT, "order": json.dumps(list(names))}


def _is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_order(order, names, path):
    """FormatError unless it is None or a list of some of the names, each once."""
    if order is None:
        return
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise FormatError(f"its metadata's order is {show(order)}; it must be a list of the file's names", str(path))
    seen = set()
    for name in order:
        if name not in names or name in seen:
            what = "twice" if name in seen else "and no array"
            raise FormatError(f"its metadata's order has the name {show(name)} {what}; it must list the file's names, "
                              "each once", str(path))
        seen.add(name)


def _check_integers(meta, path):
    """FormatError where tokens, offsets or positions are not whole numbers, or are not those of as many sequences."""
    for key in ("tokens", "offsets", "position"):
        if key in meta and not _are_integers(meta[key]):
            raise FormatError(f"its metadata's {key} is {show(meta[key])}; it must be a list of integers", str(path))
    offsets = np.ravel(meta.get("offsets", [0, 0])).tolist()
    if not offsets or offsets[0] != 0 or sorted(offsets) != offsets:
        raise FormatError(f"its metadata's offsets is {show(offsets)}; it must begin with 0 and not fall", str(path))
    n, positions = len(offsets) - 1, np.size(meta.get("position", [0] * (len(offsets) - 1)))
    if positions != n:
        raise FormatError(f"its metadata's position has {positions} numbers; it must have {n}, one for each sequence",
                          str(path))


def _are_integers(value):
    """Whether it is an integer of 64 bits, or a list of them or of such lists, all as long."""
    try:
        found = np.array(value)
    except ValueError:
        return False
    return found.dtype == np.int64 or isinstance(value, list) and found.size == 0


def _plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value
