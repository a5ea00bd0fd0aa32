"""`traces`: two runs beside each other, tap by tap in the order of the dataflow, to the first divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from typing import Any

import numpy as np

from .. import dataflow
from .._arrays import as_array
from ..dataflow import in_order
from . import metrics
from ._grid import Grid, Line, by_layer, by_tap, layer_of
from ._opened import Opened, axes_of, open_array, open_ids
from .compare import aligned
from .page import Plotted, of_traces

__all__ = ["Divergence", "Report", "Row", "THRESHOLD", "threshold_for", "traces"]

#: rms error of a token's row, over the rms of the whole tap, from which two float32 runs have parted: 1024 u,
#: six times what float32 implementations that are both right differ by after a long prompt (1e-5).
THRESHOLD = 1024 * metrics.U

#: In units of a narrower type's own u: two runs that store bfloat16 differ by a few of them at every tap.
NARROW_UNITS = 16


@dataclass(frozen=True)
class Row:
    """One tap.

    Attributes
    ----------
    rms, largest : float
        Errors over the rms of the tap in the second trace. Of expert ids, rms is the share of rows that
        differ.
    worst : tuple of int
        Where the largest is.
    first : int or None
        First token over the threshold.
    tokens : int
        How many are.
    nonfinite : int
        Elements of the first trace that are NaN or infinite.
    added, inherited : float or None
        The rms error in two: what the op of `a` added, on its own inputs, and what these brought with them.
    of_token, added_of_token : (T,) array or None
        The error, and the added part of it, of each token's row, over the rms of the tap. Of expert ids 1 where the
        sets differ.
    """

    tap: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    rms: float
    largest: float
    cosine: float
    worst: tuple[int, ...]
    first: int | None
    tokens: int
    threshold: float
    kind: str = "float"
    nonfinite: int = 0
    added: float | None = None
    inherited: float | None = None
    of_token: np.ndarray | None = field(default=None, repr=False, compare=False)
    added_of_token: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """True where no token is over the threshold."""
        return self.first is None

    @property
    def limit(self) -> float:
        """What `of_token` is held against: the threshold; of expert ids 1."""
        return 1.0 if self.kind == "ids" else self.threshold

    @property
    def verdict(self) -> str:
        """"ok", "DIVERGES"; where the parts are known, whether the op "ADDS" what is over, or it is "inherited"."""
        if self.ok or self.added_of_token is None:
            return "ok" if self.ok else "DIVERGES"
        return "ADDS" if self.added_of_token.max(initial=0) > self.threshold else "inherited"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those of each token."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("of_token")}


@dataclass(frozen=True)
class Divergence:
    """Where two runs part: the first tap of the dataflow with a token over the threshold, and that token."""

    tap: str
    layer: int | None
    token: int
    error: float
    threshold: float
    sentence: str


@dataclass
class Report(Plotted):
    """What `traces` found. Prints as a table; true when no tap diverges; `html` and `plot` show it.

    Attributes
    ----------
    rows : list of Row
        In the order of the dataflow.
    first : Divergence or None
    only_a, only_b : list of str
        Taps that one trace lacks; nothing is said about them.
    notes : list of str
        What was left out, or compared in another shape.
    columns : list of str
        The tokens: ``token 5``; of several sequences, also which.
    cuts : tuple of int
        At which tokens sequences begin, behind the first.
    opened : list of Opened
        The first tap that diverges, the one that adds most, and the last: their worst elements, where their error is.
    about : tuple of str
        What `a` and `b` say of themselves.
    """

    _parts = of_traces

    rows: list[Row]
    first: Divergence | None
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list, repr=False)
    cuts: tuple[int, ...] = ()
    opened: list[Opened] = field(default_factory=list, repr=False)
    about: tuple[str, str] = ("", "")

    @property
    def ok(self) -> bool:
        """True where no tap diverges."""
        return self.first is None

    def __bool__(self):
        return self.ok

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.first is not None:
            return self.first.sentence + self._not_finite()
        if not any(math.prod(r.shape) for r in self.rows):
            return f"ok: no divergence in {len(self.rows)} taps, in which there are no values"
        floats = [r for r in self.rows if r.kind == "float"]
        worst = max(floats, key=lambda r: r.rms, default=None)
        how = f"; the largest rms error is {worst.rms:.2e}, at {worst.tap}" if worst else ""
        return f"ok: no divergence in {len(self.rows)} taps{how}{self._not_finite()}"

    def _not_finite(self):
        """What no error tells: NaN and infinities that are the same in both."""
        taps = [r.tap for r in self.rows if r.ok and r.nonfinite]
        if not taps:
            return ""
        return f"; {taps[0]} is not finite in both" if len(taps) == 1 else \
            f"; {len(taps)} taps are not finite in both, the first {taps[0]}"

    def __str__(self):
        lines = aligned([head(self.has_parts), *(row_cells(r, self.has_parts) for r in self.rows)])
        return "\n".join([*lines, "", *self.left_out(), self.verdict])

    __repr__ = __str__

    @property
    def has_parts(self) -> bool:
        """Whether errors are told into added and inherited ones."""
        return any(r.added is not None for r in self.rows)

    def left_out(self) -> list[str]:
        """Notes, and the taps of one trace alone."""
        lines = list(self.notes)
        for name, taps in (("a", self.only_a), ("b", self.only_b)):
            if taps:
                more = f", and {len(taps) - 6} more" if len(taps) > 6 else ""
                lines.append(f"only in {name}: {', '.join(taps[:6])}{more}")
        return lines

    def grid(self, layer: str | None = None) -> Grid:
        """The error of layers and tokens, the added one where it is known; or of the taps of one ``layer 3``."""
        parts = self.has_parts
        lines = [Line(r.tap, r.added_of_token if parts else r.of_token, r.limit) for r in self.rows if self._is_row(r)]
        if layer is None:
            return by_layer(lines, self.columns, cuts=self.cuts)
        return by_tap([x for x in lines if layer_of(x.tap) == layer], self.columns, cuts=self.cuts)

    def by_depth(self) -> tuple[list[str], dict[str, list[float]], float]:
        """(layers, errors of each, the limit): what has gathered at a layer's last tap, and the most that one of its
        taps adds, where that is known."""
        layers: dict[str, list[Row]] = {}
        for r in self.rows:
            if r.kind == "float" and not r.tap.endswith(_STATES):
                layers.setdefault(layer_of(r.tap), []).append(r)
        series = {"gathered by its end": [rows[-1].rms for rows in layers.values()]}
        if self.has_parts:
            series = {"added, worst tap": [max((r.added or 0.0) for r in rows) for rows in layers.values()], **series}
        limits = [r.threshold for rows in layers.values() for r in rows]
        return list(layers), series, min(limits, default=THRESHOLD)

    def _is_row(self, r):
        values = r.added_of_token if self.has_parts else r.of_token
        return values is not None and len(values) == len(self.columns) and not r.tap.endswith(_STATES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "first": asdict(self.first) if self.first else None,
            "rows": [r.to_dict() | {"ok": r.ok} for r in self.rows],
            "only_a": self.only_a,
            "only_b": self.only_b,
            "notes": self.notes,
        }


_STATES = (".state", "_history", "_cache")  # arrays without a row a token
_HEAD = ("tap", "shape", "rms error", "largest", "at", "first token over", "tokens over")


def head(parts: bool) -> tuple[str, ...]:
    """Names of the columns of a table; `parts`: with added and inherited errors."""
    return (*_HEAD[:3], "added", "inherited", *_HEAD[3:]) if parts else _HEAD


def row_cells(r: Row, parts: bool = False) -> tuple[str, ...]:
    """A row of the table."""
    cells = _plain_cells(r)
    if not parts:
        return cells
    return (*cells[:3], *("" if x is None else f"{x:.2e}" for x in (r.added, r.inherited)), *cells[3:])


def _plain_cells(r: Row) -> tuple[str, ...]:
    shape = "x".join(map(str, r.shape))
    over = ("", "") if r.ok else (str(r.first), f"{r.tokens:,} of {r.shape[0] if r.shape else 1:,}")
    if r.kind == "ids":
        return (r.tap, shape, "same" if r.ok else "other ids", "", "", *over)
    if r.rms == 0:
        return (r.tap, shape, f"same, {r.nonfinite:,} not finite" if r.nonfinite else "same", "", "", *over)
    at = metrics.coordinates(r.worst, axes_of(r.tap, r.shape)) if r.worst else ""
    return (r.tap, shape, f"{r.rms:.2e}", f"{r.largest:.2e}", at, *over)


def threshold_for(*dtypes) -> float:
    """The error over a tap's rms from which runs that store these types have parted."""
    narrow = [metrics.unit_of(d) for d in map(np.dtype, dtypes) if d.kind not in "iu" and d.itemsize < 4]
    return max([THRESHOLD, *(NARROW_UNITS * u for u in narrow)])


def traces(a, b, *, threshold: float | None = None, model=None) -> Report:
    """Compare two traces of the same tokens, tap by tap in the order of the dataflow.

    Parameters
    ----------
    a, b : Trace, or a mapping from tap to array [T, ...], or a result of the reference model
        `b` is the measure: errors are over the rms of its taps.
    threshold : float, optional
        rms error of a token's row over the rms of the tap, from which the runs have parted there. By default
        1024 u, six times what two right float32 implementations differ by after a long prompt, or 16 units in
        the last place of a narrower type that a tap is stored in, or that one of the runs was computed in: the
        ``dtype`` of its metadata, else that of most of its arrays.
    model : Model or ReferenceModel, optional
        Of the same checkpoint. With it the error of each tap is told in two: what its op added, beside float64 on
        the inputs that `a` has, and what came with these.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If the tokens or their number differ, no tap is in both, or a tap has another shape; with names.
    """
    a, b = _taps_of(a, "a"), _taps_of(b, "b")
    routed = {tap.removesuffix("ids") for tap in a if tap in b and tap.endswith("moe.ids")}
    routed = {x for x in routed if x + "weights" in a and x + "weights" in b}
    a, b = _Side(a, "a", routed), _Side(b, "b", routed)
    _same_tokens(a, b)
    ours, theirs = (_names(x) for x in (a, b))
    both = in_order(n for n in ours if n in set(theirs))
    if not both:
        raise ValueError(f"no tap is in both traces: a has {_some(ours)}; b has {_some(theirs)}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must be >= 0")
    rows, notes, of_runs = [], [], [_dtype_of(x, both) for x in (a, b)]
    for tap in both:
        x, y = a[tap], b[tap]
        if (x.dtype.kind in "iub") != (y.dtype.kind in "iub") or "b" in x.dtype.kind + y.dtype.kind:
            notes.append(f"{tap}: {x.dtype} in a and {y.dtype} in b; left out")
            continue
        x, y = _same_shape(tap, x, y, notes)
        rows.append(_row(tap, x, y, threshold, of_runs))
    if not rows:
        raise ValueError(f"no tap can be compared: {notes[0]}")
    if model is not None:
        rows = _in_parts(rows, a, b, model, notes)
    columns, cuts = _columns(a, b, rows)
    first = _first(rows, a, b, columns)
    return Report(
        rows,
        first,
        in_order(n for n in ours if n not in theirs),
        in_order(n for n in theirs if n not in ours),
        notes,
        columns,
        cuts,
        [_open(r, a, b) for r in _of_interest(rows, first)],
        (_about(a), _about(b)),
    )


def _taps_of(x, name):
    """A mapping from tap to array; a result of the reference model gives its taps and states."""
    if hasattr(x, "taps") and not isinstance(x, Mapping):
        return {**x.taps, **getattr(x, "state", {})}
    if not isinstance(x, Mapping):
        hint = ", as kl.Trace.load(path) reads from a file" if isinstance(x, str | PathLike) else ""
        hint = ", such as one of the list: a trace is of one call" if isinstance(x, list | tuple) else hint
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a Trace or a mapping from tap to array{hint}")
    return x


class _Side(Mapping):
    """One of the two: arrays of NumPy; of the mixtures `routed`, ``layers.3.moe.``, ids and weights by rising ids."""

    def __init__(self, x, name, routed):
        self.x, self.name, self.routed = x, name, routed
        self.meta, self.tokens = getattr(x, "meta", {}), getattr(x, "tokens", None)

    def __getitem__(self, tap):
        x, (mixture, dot, last) = self._array(tap), tap.rpartition(".")
        if last not in ("ids", "weights") or mixture + dot not in self.routed:
            return x
        ids = self._array(f"{mixture}.ids")
        together = ids.dtype.kind in "iu" and ids.ndim > 1 and ids.shape == x.shape
        return metrics.in_order_of(ids, x) if together else x

    def _array(self, tap):
        return as_array(self.x[tap], f"{self.name}[{tap!r}]")

    def __contains__(self, tap):
        return tap in self.x

    def __iter__(self):
        return iter(self.x)

    def __len__(self):
        return len(self.x)


def _names(x):
    return [n for n in x if n != "tokens"]


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _same_tokens(a, b):
    if a.tokens is None or b.tokens is None:
        return
    s, t = np.ravel(a.tokens), np.ravel(b.tokens)
    cuts = [np.ravel(x.meta.get("offsets", [0, len(s)])).tolist() for x in (a, b)]
    if len(s) != len(t):
        raise ValueError(
            f"a is a trace of {len(s)} tokens and b of {len(t)}; they must be runs of the same tokens"
        )
    other = np.flatnonzero(s != t)
    if len(other):
        i = other[0]
        raise ValueError(f"the traces are of other tokens: token {i} is {s[i]} in a and {t[i]} in b")
    if cuts[0] != cuts[1]:
        raise ValueError(f"the traces are of other sequences: offsets are {cuts[0]} in a and {cuts[1]} in b")


def _same_shape(tap, x, y, notes):
    if x.shape == y.shape:
        return x, y
    if x.shape[:1] == y.shape[:1] and x.size == y.size:
        notes.append(f"{tap}: {list(x.shape)} in a and {list(y.shape)} in b, compared as rows of one length")
        return _by_row(x), _by_row(y)
    what = "other tokens" if x.shape[1:] == y.shape[1:] else "another shape"
    hint = "; kimi_linear.diff.align tells how one lies in the other" if x.size == y.size else ""
    raise ValueError(f"{tap} has {what}: {list(x.shape)} in a and {list(y.shape)} in b{hint}")


def _dtype_of(x, taps):
    """The float type that a run was computed in: as its metadata say, else that of most of its arrays."""
    said = str(x.meta.get("dtype", "")).removeprefix("torch.")
    try:
        if said and metrics.is_float(said):
            return said
    except TypeError:
        pass
    dtypes = [x[tap].dtype for tap in taps]
    return max((d for d in dtypes if metrics.is_float(d)), key=dtypes.count, default=np.dtype(np.float64))


def _row(tap, x, y, threshold, of_runs):
    dtypes = (x.dtype.name, y.dtype.name)
    if x.dtype.kind in "iu" and y.dtype.kind in "iu":
        x, y = (np.sort(z, axis=-1) if z.ndim > 1 else z for z in (x, y))  # of more axes they are sets
        over = _by_row(x != y).any(axis=1)
        first = int(over.argmax()) if over.any() else None
        return Row(
            tap,
            x.shape,
            dtypes,
            float(over.mean()) if len(over) else 0.0,
            float(over.any()),
            1.0,
            (),
            first,
            int(over.sum()),
            0.0,
            "ids",
            of_token=over.astype(np.float64),
        )
    e = metrics.measure(x, y)
    limit = threshold_for(x.dtype, y.dtype, *of_runs) if threshold is None else threshold
    of_row = _rms_of_rows(x, y)
    over = of_row > limit * e.size
    first = int(over.argmax()) if over.any() else None
    return Row(
        tap,
        x.shape,
        dtypes,
        e.rms_relative,
        e.largest_relative,
        e.cosine,
        e.worst,
        first,
        int(over.sum()),
        limit,
        nonfinite=e.actual_nonfinite,
        of_token=metrics.over(of_row, e.size),
    )


def _rms_of_rows(x, y):
    """rms error of each row [T, ...]; infinite where one of the two is not finite."""
    error = _by_row(metrics.distance(metrics.as_float64(x, "a"), metrics.as_float64(y, "b"))[0])
    return np.sqrt((error ** 2).mean(axis=1)) if error.size else np.zeros(len(error))


def _by_row(x):
    """[T, ...] as [T, values], also where there are none."""
    return x.reshape((len(x), math.prod(x.shape[1:])) if x.ndim else (1, 1))


def _in_parts(rows, a, b, model, notes):
    """The rows with added and inherited errors, where the inputs of a tap are in `a`."""
    from ._blame_run import Run

    begins = np.ravel(a.meta.get("position", 0))
    if begins.any():
        notes.append(f"a begins at position {begins.max()}: what its ops add hangs on the rows before, and is not told")
        return rows
    own, by_tap = dict(Run(model, a, None, None).own_results()), {r.tap: r for r in rows}
    for tap in own.keys() & by_tap.keys():
        y = own[tap].reshape(b[tap].shape)
        size = metrics.measure(b[tap], b[tap]).size or 1.0
        x = a[tap].reshape(y.shape)
        added, inherited = metrics.measure(x, y), metrics.measure(y, b[tap])
        by_tap[tap] = replace(by_tap[tap], added=added.rms / size, inherited=inherited.rms / size,
                              added_of_token=_rms_of_rows(x, y) / size)
    return list(by_tap.values())


def _columns(a, b, rows):
    """(names of the tokens, where further sequences begin)."""
    known = next((np.size(x.tokens) for x in (a, b) if x.tokens is not None), None)
    T = known if known is not None else next((r.shape[0] for r in rows if r.shape and not r.tap.endswith(_STATES)), 0)
    cuts = next((np.ravel(x.meta["offsets"]).astype(int).tolist() for x in (a, b) if "offsets" in x.meta), [0, T])
    if len(cuts) < 3 or cuts[-1] != T:
        return [f"token {t}" for t in range(T)], ()
    names = [f"sequence {n}, token {t}" for n, (i, j) in enumerate(zip(cuts, cuts[1:])) for t in range(j - i)]
    return names, tuple(cuts[1:-1])


def _about(x):
    """``their engine, bfloat16``: what a trace's metadata say."""
    return ", ".join(str(x.meta[k]) for k in ("model", "source", "dtype") if x.meta.get(k))


def _of_interest(rows, first):
    """The first that diverges, the float tap that adds most where this is known, and the last one."""
    by_tap = {r.tap: r for r in rows}
    most = max((r for r in rows if r.added), key=lambda r: r.added, default=None)
    chosen = [by_tap[first.tap] if first else None, most, rows[-1]]
    return list({r.tap: r for r in chosen if r is not None}.values())


def _open(r, a, b):
    x, y = (t[r.tap].reshape(r.shape) for t in (a, b))
    return open_ids(r.tap, x, y) if r.kind == "ids" else open_array(r.tap, x, y)


def _first(rows, a, b, columns):
    row = next((r for r in rows if not r.ok), None)
    if row is None:
        return None
    of_tokens = len(row.shape) > 0 and row.shape[0] == len(columns) and not row.tap.endswith(_STATES)
    where = columns[row.first] if of_tokens else f"token {row.first}"
    x, y = (t[row.tap].reshape(row.shape or (1,))[row.first] for t in (a, b))
    clean = f"; the {rows.index(row)} taps before it agree" if rows.index(row) else ""
    if row.kind == "ids":
        taken, lost = metrics.exchanged(x, y)
        what = f"{'experts' if row.tap.endswith('.ids') else 'integers'} {taken} in place of {lost}"
        error = 1.0
    elif not np.isfinite(metrics.as_float64(x, "a")).all():
        what, error = "a is not finite there", float("inf")
    else:
        e = metrics.measure(x, y)
        error = e.rms / (metrics.measure(b[row.tap], b[row.tap]).size or 1.0)
        what = f"rms error {error:.2e} of the tap's rms, over {row.threshold:.2e}"
        if row.added is not None:
            what += f" ({row.added:.2e} added by this op, {row.inherited:.2e} inherited, over all tokens)"
    sentence = f"DIVERGES at {row.tap}, {where}: {what}{clean}"
    return Divergence(row.tap, dataflow.layer_of(row.tap), row.first, error, row.threshold, sentence)
