"""`compare`: one array beside its reference, in figures, judged by the op's own budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from .._arrays import as_array, as_tuple
from .._names import near
from ..dataflow import RESULTS
from . import metrics
from ._grid import Grid, grid_of
from ._opened import Opened, open_array
from .budgets import budget
from .budgets import names as budget_names
from .page import Plotted, of_compare

__all__ = ["Comparison", "compare", "judge"]

AXES_OF_STATE = {3: ("head", "key", "value"), 4: ("sequence", "head", "key", "value")}


@dataclass
class Comparison(Plotted):
    """What `compare` found. Prints as a small table; true when `ok`; `html` shows it.

    Attributes
    ----------
    ok : bool
        With a budget: every element within it. Without: finite where the reference is, and past the three
        usual gates. Integers: the same.
    rows : list of (label, value, remark)
        The table, as text.
    verdict : str
        One sentence.
    errors : metrics.Errors or None
        The figures; None for integers.
    share : float or None
        Largest ratio of error to budget; None without a budget.
    at : tuple of int
        Where that is, or else where the largest error is.
    parts : tuple of Comparison
        Of the single results, where an op has several.
    arrays : tuple or None
        (actual, desired, names of the axes, bound of each element or None), for `html`.
    """

    _parts = of_compare

    ok: bool
    rows: list[tuple[str, str, str]]
    verdict: str
    errors: metrics.Errors | None = None
    share: float | None = None
    at: tuple[int, ...] = ()
    op: str | None = None
    parts: tuple[Comparison, ...] = field(default=(), repr=False)
    arrays: tuple | None = field(default=None, repr=False, compare=False)

    def __bool__(self):
        return self.ok

    def __str__(self):
        return "\n".join([*aligned(self.rows), self.verdict])

    __repr__ = __str__

    def opened(self, name: str) -> Opened | None:
        """What there is to see in the two arrays; None for integers, and where there are parts."""
        if self.arrays is None:
            return None
        return open_array(name, *self.arrays)

    def grid(self) -> tuple[Grid, str]:
        """(heat map of tokens and heads, or channels; what is allowed): the share of the budget, or without one the
        error over the rms."""
        return grid_of(*self.arrays)


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [(indent + "  ".join(f"{x:<{w}}" for x, w in zip(row, widths))).rstrip() for row in rows]


def compare(
    actual,
    desired,
    *,
    op: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    axes: Sequence[str] | None = None,
    dtype: Any = None,
) -> Comparison:
    """Lay a result beside its reference.

    Parameters
    ----------
    actual, desired : array, or tuples of arrays for an op with several results
        NumPy, torch or ml_dtypes. Expert ids, integers [..., k], are compared as sets, row by row, and weights that
        come with them in the order of the ids; other integers element by element.
    op : str, optional
        The op that made `actual`; with `inputs` it is judged by that op's budget.
    inputs : mapping, optional
        The op's arguments by name, those that `actual` was computed from.
    axes : sequence of str, optional
        Names of the axes for coordinates; by default token, head, channel.
    dtype : optional
        The type that `actual` was stored in, where that is narrower than float32; by default its own. What
        its rounding costs is told apart, and added to the budget.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If the shapes differ, there is no such op, or it has no budget; the message says what was expected. If an
        array alone may be one of several results.
    """
    _check_op(op)
    if isinstance(actual, tuple) or isinstance(desired, tuple):
        return _compare_all(actual, desired, op, inputs, axes, dtype)
    actual, desired = as_array(actual, "actual"), as_array(desired, "desired")
    metrics.check_same_shape(actual, desired)
    if actual.dtype.kind in "iu" and desired.dtype.kind in "iu":
        return compare_integers(actual, desired, op=op)
    bound = None
    if op is not None and inputs is not None:
        bound, result = _bound_of(op, inputs, desired)
        axes = _axes_of_result(op, result, desired) if axes is None else axes
    return judge(actual, desired, bound, op=op, axes=axes, dtype=dtype)


def _check_op(op):
    """ValueError for a name that is of no op: a typing error would leave the budget out."""
    from .. import ops

    known = [*ops.__all__, "cache_append", "route_weights", *RESULTS, *budget_names()]  # of the dataflow alone
    if op is not None and op not in known:
        raise ValueError(f"op is {op!r}; there is no such op, near it are {', '.join(near(op, known))}")


def _axes_of_result(op, result, x):
    """Names of the axes of a result that is no row a token; None where they are the usual ones."""
    return AXES_OF_STATE.get(x.ndim) if op == "delta_rule" and result == 1 else None


def _compare_all(actual, desired, op, inputs, axes, dtype):
    actual, desired = as_tuple(actual), as_tuple(desired)
    if len(actual) != len(desired):
        raise ValueError(f"actual has {len(actual)} results and desired {len(desired)}; they must be as many")
    actual, desired = (tuple(as_array(x, name) for x in arrays)
                       for arrays, name in ((actual, "actual"), (desired, "desired")))
    for a, d in zip(actual, desired):
        metrics.check_same_shape(a, d)
    actual, desired = metrics.by_expert(actual), metrics.by_expert(desired)
    bounds = (None,) * len(actual)
    if op is not None and inputs is not None:
        bounds = _bounds_of(op, inputs, desired)
    parts = []
    for a, d, bound in zip(actual, desired, bounds, strict=True):
        integers = a.dtype.kind in "iu" and d.dtype.kind in "iu"
        names = axes if axes is not None and len(axes) == a.ndim else _axes_of_result(op, len(parts), a)
        parts.append(compare_integers(a, d, op=op) if integers
                     else judge(a, d, bound, op=op, axes=names, dtype=dtype))
    worst = max(parts, key=lambda p: (not p.ok, p.share or 0.0))
    rows = []
    for i, p in enumerate(parts):
        rows += [(f"result {i}", "", ""), *((f"  {label}", value, note) for label, value, note in p.rows)]
    verdict = f"result {parts.index(worst)}: {worst.verdict}" if len(parts) > 1 else worst.verdict
    return Comparison(
        all(p.ok for p in parts), rows, verdict, worst.errors, worst.share, worst.at, op, tuple(parts)
    )


def _budget(op, desired, inputs):
    if op not in budget_names():
        raise ValueError(f"op is {op!r}; it must be one with a budget: {', '.join(budget_names())}")
    return as_tuple(budget(op, desired if len(desired) > 1 else desired[0], **inputs))


def _bounds_of(op, inputs, desired):
    """The bound of each of an op's results."""
    if len(desired) == 1:
        return (_bound_of(op, inputs, desired[0])[0],)
    bounds = _budget(op, desired, inputs)
    if len(bounds) != len(desired):
        raise ValueError(f"desired has {len(desired)} results; {op} on these inputs has {len(bounds)}")
    return bounds


def _bound_of(op, inputs, desired):
    """(the bound of one array, which result it is): of an op with several, the nearest of its kind and shape."""
    from .. import reference

    if op not in budget_names():
        _budget(op, (desired,), inputs)
    results = as_tuple(getattr(reference, op)(**inputs))
    if len(results) == 1:
        return _budget(op, (desired,), inputs)[0], 0
    fits = [i for i, r in enumerate(results)
            if np.shape(r) == desired.shape and (r.dtype.kind in "iu") == (desired.dtype.kind in "iu")]
    if not fits:
        shapes = " and ".join(f"{list(np.shape(r))}{' of integers' * (r.dtype.kind in 'iu')}" for r in results)
        raise ValueError(f"desired has shape {list(desired.shape)}; {op} on these inputs gives {shapes}")
    off = {i: metrics.measure(desired, results[i]).rms for i in fits}
    nearest, *others = sorted(fits, key=off.get)
    if others and desired.size and not off[nearest] < off[others[0]] / 2:
        raise ValueError(f"desired may be result {nearest} or {others[0]} of {op}, which have one shape; give all of "
                         "its results, as a tuple")
    return _budget(op, results, inputs)[nearest], nearest


# ---- floats ----------------------------------------------------------------------------------------


def judge(actual, desired, bound=None, *, op=None, axes=None, dtype=None) -> Comparison:
    """`compare` with the bound of each element already at hand (None: no budget)."""
    e = metrics.measure(actual, desired)
    axes = metrics.axis_names(np.shape(desired), axes)
    dtype = np.dtype(as_array(actual, "actual").dtype if dtype is None else dtype)
    d = metrics.as_float64(desired, "desired")
    rows = _figures(e, axes)
    narrow = dtype.itemsize < 4 and dtype.kind not in "iu"
    if narrow:
        stored = metrics.measure(_round_to(d, dtype), d)
        rows.append(
            (
                f"{dtype.name} alone",
                f"{stored.rms_relative:.2e} rms, {stored.largest_relative:.2e} largest",
                "what storing the reference in it would cost",
            )
        )
    passed = metrics.gates(actual, desired, e)
    rows += _tolerances(actual, desired, passed)
    if bound is None:
        return Comparison(*_verdict_of_gates(passed, e, rows, op), errors=e, at=e.worst, op=op,
                          arrays=(actual, desired, axes, None))
    bound = np.broadcast_to(np.asarray(bound, np.float64), d.shape)
    if narrow:
        bound = bounded(d, bound, dtype)
    share, at = metrics.share_of(actual, desired, bound)
    if e.count:
        rows.append(("budget", f"{share:.3g} of it used at worst", metrics.coordinates(at, axes)))
    return Comparison(share <= 1, rows, _verdict(share, at, actual, d, bound, axes, op), e, share, at, op,
                      arrays=(actual, desired, axes, bound))


def bounded(d, bound, dtype):
    """A bound of the error of values near `d`, and what rounding them to a narrow type adds."""
    return bound * (1 + metrics.unit_of(dtype)) + _half_spacing(d, dtype)


def _round_to(x, dtype):
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


def _half_spacing(d, dtype):
    """Half the distance between neighbours of `dtype` around each element, subnormals included."""
    info = ml_dtypes.finfo(dtype)
    size = np.where(np.isfinite(d), np.abs(d), 0)
    return metrics.unit_of(dtype) * np.maximum(size, float(info.smallest_normal))


def _figures(e, axes):
    if not e.count:
        return [("elements", "0", "nothing to compare")]
    where = metrics.coordinates(e.worst, axes)
    rows = [
        ("rms error", f"{e.rms_relative:.3g}", f"of the rms {e.size:.4g}; {_units(e.rms_u)}"),
        ("largest error", f"{e.largest_relative:.3g}", f"of the rms; {_units(e.largest_u)}; at {where}"),
        ("NMSE", f"{e.nmse:.3g}", ""),
        ("cosine", f"{e.cosine:.12g}", ""),
    ]
    if e.actual_nonfinite or e.desired_nonfinite:
        rows.append(
            (
                "not finite",
                f"{e.actual_nonfinite:,} of {e.count:,}",
                f"reference {e.desired_nonfinite:,}; apart {e.nonfinite_apart:,}",
            )
        )
    return rows


def _units(x):
    return "exact" if x == 0 else f"{x:.3g} u"


def _tolerances(actual, desired, passed):
    seen = ", ".join(
        f"{name} {'passes' if good else 'fails'}"
        for name, good in (
            ("ggml's NMSE 1e-7", passed.ggml),
            ("fla's 0.005", passed.fla),
            ("transformers' 1e-4", passed.transformers),
        )
    )
    return [
        ("allclose", f"{metrics.smallest_tolerance(actual, desired):.3g}", "least atol = rtol that passes"),
        ("usual gates", "", seen),
    ]


def _verdict_of_gates(passed, e, rows, op):
    """(ok, rows, verdict) where there is no budget."""
    why = f"; inputs= would judge it by the budget of {op}" if op else ""
    if e.exact:
        return True, rows, "ok: every element is the same"
    if e.nonfinite_apart:
        return False, rows, f"NOT FINITE: {e.nonfinite_apart:,} elements are finite in one array only"
    if passed.all:
        return True, rows, f"ok by the usual gates; no budget was asked{why}"
    which = [n for n in ("ggml", "fla", "transformers") if not getattr(passed, n)]
    return False, rows, f"DIFFERENT: the gates of {', '.join(which)} would fail{why}"


def _verdict(share, at, actual, d, bound, axes, op):
    what = op or "result"
    if share == 0:
        return f"ok: {what} is exact"
    if share <= 1:
        return f"ok: {what} uses {share:.3g} of its budget at worst"
    got = metrics.as_float64(actual, "actual")[at]
    times = f"{share:.3g} times" if np.isfinite(share) else "beyond"
    return (
        f"OVER BUDGET: {what} at {metrics.coordinates(at, axes)} is {got:.9g}, reference {d[at]:.9g}: "
        f"the error is {times} its budget of {bound[at]:.3g}"
    )


# ---- integers --------------------------------------------------------------------------------------


def compare_integers(actual, desired, *, op=None) -> Comparison:
    """Expert ids [..., k]: the same set in every row, whatever its order. Other integers: the same elements."""
    if actual.ndim >= (1 if op == "route" else 2) and op in (None, "route"):
        return _compare_sets(actual, desired, op)
    different = np.argwhere(actual != desired)
    rows = [("elements", f"{actual.size:,}", "integers"), ("elements that differ", f"{len(different):,}", "")]
    if not len(different):
        return Comparison(True, rows, "ok: every element is the same", op=op)
    for at in map(tuple, different[:4].tolist()):
        rows.append((f"at {list(at)}" if at else "it is", f"{actual[at]}", f"in place of {desired[at]}"))
    at = tuple(different[0].tolist())
    where = f", the first at {list(at)}" if at else ""
    return Comparison(False, rows, f"DIFFERENT: {len(different):,} of {actual.size:,} integers are others{where}: "
                                   f"{actual[at]} in place of {desired[at]}", at=at, op=op)


def _compare_sets(actual, desired, op):
    a, d = (np.sort(metrics.in_rows(x, x.shape[-1]), axis=-1) for x in (actual, desired))
    different = np.flatnonzero((a != d).any(axis=-1))
    rows = [("rows", f"{len(a):,}", "compared as sets"), ("rows that differ", f"{len(different):,}", "")]
    if not len(different):
        return Comparison(True, rows, "ok: the same set in every row", op=op)
    for t in different[:4]:
        taken, lost = metrics.exchanged(a[t], d[t])
        rows.append((f"row {t}", f"{taken}", f"in place of {lost}"))
    return Comparison(
        False,
        rows,
        f"DIFFERENT: {len(different):,} of {len(a):,} rows hold another set, the first is row {different[0]}",
        at=(int(different[0]),),
        op=op,
    )
