"""One array opened: its worst elements, where its error concentrates, how it is distributed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..dataflow import layer_of
from . import metrics

__all__ = ["Axis", "Opened", "axes_of", "open_array", "open_ids"]

WORST = 8
MOST = 0.9  # of the squared error: how few indices of an axis hold it
DECADES = range(-4, 13)  # of the histogram, in u; what is outside goes to its ends

_AXES = {"kda.state": ("head", "key", "value"), "gdn.state": ("head", "key", "value"), "logits": ("token", "id"),
         "moe.logits": ("token", "expert"), "moe.scores": ("token", "expert"), "moe.ids": ("token", "choice"),
         "moe.weights": ("token", "choice"), "mla.select": ("token", "choice"), "mla.index_weights": ("token", "head"),
         **dict.fromkeys(["streams", "mid", "out"], ("token", "stream", "channel")),
         **dict.fromkeys(["attn_hc_post", "ffn_hc_post"], ("token", "stream")),
         **dict.fromkeys(["attn_hc_comb", "ffn_hc_comb"], ("token", "stream", "to stream"))}


class Axis(NamedTuple):
    """The part of the squared error that each index of an axis has; `text` says where most of it is."""

    name: str
    shares: np.ndarray
    text: str


@dataclass(frozen=True)
class Opened:
    """What there is to see in one array.

    Attributes
    ----------
    name : str
    shape : tuple of int
    facts : list of (label, value)
    head, worst : tuple of str, list of tuples of str
        A table of the worst elements, with their coordinates.
    axes : list of Axis
        Of those longer than 1.
    counts : int array
        Elements by error in u of the rms: half decades from 10**DECADES[0].
    exact : int
        Elements without error, which `counts` does not have.
    """

    name: str
    shape: tuple[int, ...]
    facts: list[tuple[str, str]]
    head: tuple[str, ...] = ()
    worst: list[tuple[str, ...]] = ()
    axes: list[Axis] = ()
    counts: np.ndarray | None = None
    exact: int = 0


def axes_of(tap: str, shape) -> tuple[str, ...]:
    """Names of the axes of a tap or state array."""
    names = _AXES.get(tap if layer_of(tap) is None else tap.split(".", 2)[2], ())
    return names if len(names) == len(shape) else metrics.axis_names(shape)


def open_array(name: str, actual, desired, axes=None, bound=None) -> Opened:
    """`actual` beside `desired`, of one shape; with `bound`, the budget of each element, the worst are those that use
    most of it."""
    a, d = metrics.as_float64(actual, "actual"), metrics.as_float64(desired, "desired")
    axes = axes_of(name, a.shape) if axes is None else metrics.axis_names(a.shape, axes)
    e, (error, _) = metrics.measure(a, d), metrics.distance(a, d)
    by = error if bound is None else metrics.shares_of(error, bound)
    worst = []
    for at in _largest(by, WORST):
        if error[at] == 0:
            break
        row = metrics.coordinates([int(j) for j in at], axes), f"{a[at]:.9g}", f"{d[at]:.9g}", _of(error[at], e.size)
        worst.append(row if bound is None else (*row, f"{by[at]:.3g}"))
    head = ("at", "got", "expected", "error over the rms", *(() if bound is None else ("of its budget",)))
    facts = [("rms error", f"{e.rms_relative:.3g} of the rms, {e.rms_u:.3g} u"),
             ("largest error", f"{e.largest_relative:.3g} of the rms, {e.largest_u:.3g} u"),
             ("cosine", f"{e.cosine:.9g}"), ("rms expected", f"{e.size:.4g}")]
    if e.actual_nonfinite or e.desired_nonfinite:
        facts.append(("not finite", f"{e.actual_nonfinite:,} elements; expected {e.desired_nonfinite:,}"))
    u = error[np.isfinite(error) & (error > 0)] / (e.size or 1.0) / metrics.U
    return Opened(name, a.shape, facts, head, worst, _concentration(error, axes), _histogram(u),
                  int((error == 0).sum()))


def _largest(x, n):
    """Indices of the n largest elements, the first among equals: they lie in the n rows of the largest maxima."""
    if not x.size:
        return []
    rows = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    some = np.sort(np.argsort(-rows.max(axis=1), kind="stable")[:n])
    width = rows.shape[1]
    order = np.argsort(-rows[some], axis=None, kind="stable")[:n]
    return [np.unravel_index(some[i // width] * width + i % width, x.shape) for i in order]


def _of(error, size):
    return f"{error / size:.3g}" if size and np.isfinite(error) else f"{error:.3g}"


def _histogram(u):
    """Counts of half decades; what is not finite counts nowhere."""
    cells = np.floor(2 * (np.log10(u) - DECADES[0])).astype(int) if u.size else np.zeros(0, int)
    n = 2 * (len(DECADES) - 1)
    return np.bincount(np.clip(cells, 0, n - 1), minlength=n)


def _concentration(error, axes):
    top = error.max(initial=0.0)
    if top == 0:
        return []
    weight = (error / top) ** 2 if np.isfinite(top) else (error == top).astype(float)
    out = []
    for i, name in enumerate(axes):
        if error.shape[i] > 1:
            shares = weight.sum(axis=tuple(j for j in range(error.ndim) if j != i)) / weight.sum()
            out.append(Axis(name, shares, _text(name, shares)))
    return out


def _text(name, shares):
    """``90 % of it is in 2 of 4 heads: 1, 3``."""
    order = np.argsort(shares)[::-1]
    n = int(np.searchsorted(np.cumsum(shares[order]), MOST)) + 1
    which = f": {', '.join(str(i) for i in np.sort(order[:n]))}" if n <= 6 and n < len(shares) else ""
    spread = "" if n < 0.85 * len(shares) else ", spread over all"
    return f"{100 * MOST:.0f} % of it is in {n:,} of {len(shares):,} {_plural(name)}{which}{spread}"


def _plural(name):
    return "axes" if name == "axis" else f"indices of {name}" if name.startswith("axis") else name + "s"


def open_ids(name: str, actual, desired, gaps=None) -> Opened:
    """Expert ids [T, k]: the rows with another set; `gaps`, where known, of the scores in question. Integers of fewer
    axes: the elements that differ."""
    a, d = (metrics.in_rows(x, x.shape[-1] if x.ndim > 1 else 1) for x in map(np.asarray, (actual, desired)))
    other = np.flatnonzero((np.sort(a, -1) != np.sort(d, -1)).any(-1))
    order = other if gaps is None else other[np.argsort(-gaps[other], kind="stable")]
    worst = []
    for t in order[:WORST]:
        taken, lost = metrics.exchanged(a[t], d[t])
        row = f"token {t}", ", ".join(map(str, taken)), ", ".join(map(str, lost))
        worst.append(row if gaps is None else (*row, f"{gaps[t]:.3g}"))
    head = ("at", "chosen", "in place of", *(() if gaps is None else ("gap of the scores",)))
    shares = np.bincount(other, minlength=len(a)) / max(len(other), 1)
    axes = [Axis("token", shares, f"{len(other):,} of {len(a):,} tokens differ")] if len(other) else []
    return Opened(name, np.shape(actual), [("rows with another set", f"{len(other):,} of {len(a):,}")], head, worst,
                  axes)
