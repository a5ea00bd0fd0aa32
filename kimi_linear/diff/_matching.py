"""The search of `align`: slices paired by fingerprints, and which fit is taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ._prints import Prints, norm
from ._views import Join, Step, View, views

__all__ = ["Found", "HOPELESS", "ambiguities", "choose", "factor_words", "permutation_words", "runs", "search"]

MOST = 1 << 15  # slices along an axis up to which each is laid beside each
FAR = 0.05      # residual above which a factor for each slice is looked for
HOPELESS = 0.5  # residual from which no factor is looked for
FACTOR_BITS = 24  # of a factor of which nothing is known
LOOSE = 0.1     # difference of norms, over the norm, above which no permutation can fit within a residual of half of it


@dataclass(frozen=True, eq=False)
class Found:
    """A candidate: a view, permutations after it or factors along an axis, and a factor."""

    join: Join
    view: View
    permutations: tuple[Step, ...]
    scale: float
    called: tuple[str, ...]
    residual: float
    cost: float

    @property
    def ours(self):
        """The array that it is compared with."""
        return self.join.ours

    @property
    def chance(self):
        """The residual that values of the same mean would leave: 1 where that is 0, little where ours hardly vary."""
        return self.join.varies

    def bits(self, floor):
        """What the residual tells, less what the steps had to choose. No digits are counted below the rounding."""
        return self.ours.size * -math.log2(min(max(self.residual / self.chance, floor), 1.0)) - self.cost

    def all_steps(self):
        """From theirs to ours."""
        scale = () if self.scale == 1 else (Step("scale", self.scale),)
        split = () if self.join.split is None else (self.join.split,)
        return self.view.steps + self.permutations + scale + split


# ---- fits ----------------------------------------------------------------------------------------------


def search(theirs, join, floor) -> list[Found]:
    """The candidates of one joined ours: views alone; where none is exact, with one permutation, then with two; where
    none of these is near, with a factor for each slice along an axis."""
    all_views = views(theirs, join.ours, join.names, reshaped=not join.parts)
    found = [_fit(join, v, (), floor) for v in all_views]
    if not found or min(f.residual for f in found) <= floor:
        return found
    likely = [v for v in all_views if v.x.any() and _norms_agree(v, join.ours)]
    found += _permuted(join, likely, floor, _one_axis)
    if min(f.residual for f in found) <= floor:
        return found
    found += _permuted(join, likely, floor, _two_axes)
    if min(f.residual for f in found) <= FAR:
        return found
    return found + [_fit(join, v, (step,), floor) for v in all_views for step in _factors(v.x, join.ours)]


def _factors(x, ours):
    """The step that brings each slice along an axis nearest to ours, of each axis."""
    for axis, n in enumerate(ours.shape):
        rest = tuple(i for i in range(ours.ndim) if i != axis)
        xx, xy = (x * x).sum(rest), (x * ours).sum(rest)
        if 1 < n < ours.size and (xy != 0).all():
            yield Step("factors", xy / xx, axis)


def _permuted(join, some, floor, find):
    found, ours = [], Prints(join.ours)
    for view in some:
        for sign in 1, -1:
            x = view.x * (sign * norm(join.ours) / norm(view.x))
            found += [_fit(join, view, steps, floor) for steps in find(x, ours) if steps]
    return found


def _norms_agree(view, ours):
    """Norms of the slices along every axis, sorted: no permutation changes them."""
    x, scale = view.x, norm(ours) / norm(view.x)
    for axis in range(ours.ndim):
        rest = tuple(i for i in range(ours.ndim) if i != axis)
        a, b = (np.sort(np.sqrt((y * y).sum(rest))) for y in (x, ours))
        if np.linalg.norm(a * scale - b) > LOOSE * np.linalg.norm(b):
            return False
    return True


def _fit(join, view, permutations, floor) -> Found:
    """The candidate with its factor: 1, -1, one that has a name or one of few digits, where that fits as well as the
    best."""
    ours, x = join.ours, view.x
    for step in permutations:
        x = step.apply(x)
    size, xx, xy = norm(ours), float(np.vdot(x, x)), float(np.vdot(x, ours))
    cost = view.cost + sum(_cost(step) for step in permutations)
    best = xy / xx if xx else 0.0

    def residual(scale):
        return norm(scale * x - ours) / size

    least = residual(best)
    if least > HOPELESS:
        return Found(join, view, permutations, 1.0, (), least, cost)
    enough = max(2 * least, floor)
    named = [(1.0, ""), (-1.0, "")] + _constants(ours.shape, join.names)
    fits = [(abs(value - best), value, name) for value, name in named
            if abs(value - best) <= enough * max(abs(best), 1e-300) and residual(value) <= enough]
    plain = [value for _, value, name in fits if not name]
    if plain:
        return Found(join, view, permutations, plain[0], (), residual(plain[0]), cost + (plain[0] < 0))
    if fits:
        value = min(fits)[1]
        called = tuple(dict.fromkeys(name for _, v, name in fits if math.isclose(v, value)))
        return Found(join, view, permutations, value, called[:3], residual(value), cost + 6)
    short = 1 / float(f"{1 / best:.3g}")  # 3 digits, where the rest is noise
    if residual(short) <= enough:
        return Found(join, view, permutations, short, (), residual(short), cost + 12)
    return Found(join, view, permutations, best, (), least, cost + 24)


def _constants(shape, names):
    """(factor that makes ours, name of its inverse, which made theirs)."""
    found = [(math.log2(math.e), "log2(e)"), (math.log(2), "ln 2"), (2.0, "2"), (0.5, "1/2")]
    for n, name in zip(shape, names):
        if n > 1:
            called = f"{n}" if name.isdigit() or "*" in name else name
            found += [(n**0.5, f"{called}**0.5"), (n**-0.5, f"{called}**-0.5")]
    return [(sign / value, ("-" if sign < 0 else "") + name) for value, name in found for sign in (1, -1)]


def _cost(step):
    """Bits to say factors; or a permutation: as any, as runs of neighbours, or as a stride."""
    order, n = step.value, len(step.value)
    if step.kind == "factors":
        return FACTOR_BITS * n
    if _stride(order) or _stride(np.argsort(order)):
        return 8 + math.log2(n)
    return min(math.lgamma(n + 1) / math.log(2), 2 * len(runs(order)) * math.log2(n) + 8)


# ---- permutations --------------------------------------------------------------------------------------


def _one_axis(x, ours):
    """(step,) for each axis along which the slices of theirs are paired with ours'; `ours` are Prints."""
    prints = Prints(x)
    for axis in range(x.ndim):
        yield _taking(axis, prints(axis), ours(axis))


def _two_axes(x, ours):
    """(step, step) for each two axes: the one with fewer slices by what the order along the other cannot change."""
    prints, shape = Prints(x), ours.x.shape
    for a, b in itertools.permutations(range(x.ndim), 2):
        if (shape[a], a) > (shape[b], b) or shape[a] == 1:
            continue
        first = _taking(a, prints(a, b), ours(a, b))
        if first:
            second = _taking(b, Prints(first[0].apply(x))(b), ours(b))
            yield second and first + second


def _taking(axis, a, b):
    """The step that pairs two sets of fingerprints; nothing where the order is as it was or they do not fit."""
    order = _pairs(a, b)
    if (order == np.arange(len(order))).all() or norm(a[order] - b) > HOPELESS * norm(b):
        return ()
    return (Step("take", order, axis),)


def _pairs(a, b):
    """For each row of b the row of a that is nearest, each once."""
    n = len(b)
    if a.shape[1] == 1 or n > MOST:
        order = np.empty(n, np.int64)
        order[np.argsort(b[:, 0], kind="stable")] = np.argsort(a[:, 0], kind="stable")
        return order
    near = np.concatenate([((a * a).sum(1) - 2 * (b[i:i + 512] @ a.T)).argmin(1) for i in range(0, n, 512)])
    _, firsts = np.unique(near, return_index=True)
    if len(firsts) < n:  # rows that are alike: the rest in the order of a projection
        again = np.setdiff1d(np.arange(n), firsts)
        free = np.setdiff1d(np.arange(n), near)
        near[again[np.argsort(b[again, 0], kind="stable")]] = free[np.argsort(a[free, 0], kind="stable")]
    return near


def runs(order) -> list[tuple[int, int]]:
    """(first, last) of each run of neighbours that rise by 1."""
    order = np.asarray(order)
    cuts = np.flatnonzero(np.diff(order) != 1) + 1
    return [(int(r[0]), int(r[-1])) for r in np.split(order, cuts)]


def _stride(order):
    """s where the order is 0, s, 2 s, ..., 1, 1 + s, ..; 0 where it is not so."""
    n = len(order)
    s = int(order[1] - order[0]) if n > 1 else 0
    return s if 1 < s < n and n % s == 0 and (np.arange(n).reshape(-1, s).T.ravel() == order).all() else 0


def factor_words(factors) -> str:
    """What slices of ours are multiplied by, to be theirs."""
    shown = ", ".join(f"{f:.4g}" for f in factors[:8])
    if len(factors) <= 8:
        return f"theirs is ours times {shown}"
    return f"theirs is ours times a factor for each, {shown} and so on, {len(factors)} in all"


def permutation_words(order) -> str:
    """Slices of theirs, as slices of ours: ``order[j]`` is the slice of ours that theirs has at j."""
    n, s = len(order), _stride(order)
    inverse = _stride(np.argsort(order))
    if inverse == 2:
        return "theirs is interleaved: its even slices are our first half, its odd ones our second"
    if s == 2:
        return "theirs is in halves: our even slices, then our odd ones"
    if s:
        return f"theirs takes every {s}th of ours in turn ({s} by {n // s}: tiled against grouped)"
    if (order == np.arange(n)[::-1]).all():
        return "theirs is reversed"
    pieces = runs(order)
    if len(pieces) == 2 and n > 2:
        return f"theirs is ours rolled: it begins with our slice {int(order[0])}"
    if n <= 16:
        return f"theirs 0..{n - 1} are ours {', '.join(str(int(i)) for i in order)}"
    if len(pieces) <= 8:
        return "theirs is our slices " + " | ".join(f"{a}..{b}" for a, b in pieces)
    return f"theirs is permuted: 0..7 are ours {', '.join(str(int(i)) for i in order[:8])} and so on, {n} in all"


# ---- choice --------------------------------------------------------------------------------------------


def choose(found, floor):
    """(best, next best): a candidate that costs more must halve the residual, and be worth its cost."""
    found = sorted(found, key=lambda f: f.cost)
    best = found[0]
    for f in found[1:]:
        much = best.residual > 2 * max(f.residual, floor)
        if much and f.bits(floor) > best.bits(floor):
            best = f
    others = [f for f in found if f is not best and _differs(f, best)]
    return best, min(others, key=lambda f: f.residual, default=None)


def _differs(f, best):
    """False where both bring the same values to the same places."""
    def result(c):
        x = c.view.x
        for step in c.permutations:
            x = step.apply(x)
        return x

    if f.ours.shape != best.ours.shape:
        return f.residual > 2 * best.residual
    return not np.array_equal(result(f), result(best))


def ambiguities(best, floor) -> Iterator[str]:
    """Why something else fits as well: ours is the same when transposed, or along an axis."""
    ours, near = best.ours, max(2 * best.residual, floor)
    size = norm(ours)
    for a, b in itertools.combinations(range(ours.ndim), 2):
        if ours.shape[a] == ours.shape[b] > 1:
            other = ours.swapaxes(a, b)
            for sign, word in ((1, "symmetric"), (-1, "antisymmetric")):
                if norm(sign * other - ours) <= near * size:
                    yield f"ours is {word} in axes {best.join.names[a]} and {best.join.names[b]}"
    moved = {step.axis for step in best.permutations if step.kind == "take"}
    for axis in range(ours.ndim):
        n = ours.shape[axis]
        if n > 1 and norm(np.roll(ours, 1, axis) - ours) <= near * size:
            yield f"ours does not change along axis {best.join.names[axis]}"
        elif axis in moved and (pair := _alike(ours, axis, near)):
            yield f"slices {pair[0]} and {pair[1]} of ours along axis {best.join.names[axis]} are the same"


def _alike(ours, axis, near):
    """Two neighbours, in the order of a projection, that are the same; None where there are none."""
    rows = np.moveaxis(ours, axis, 0).reshape(ours.shape[axis], -1)
    order = np.argsort(Prints(ours)(axis)[:, 0], kind="stable")
    apart = np.linalg.norm(rows[order[1:]] - rows[order[:-1]], axis=1)
    at = int(apart.argmin())
    if apart[at] <= near * np.linalg.norm(rows[order[at]]):
        return sorted((int(order[at]), int(order[at + 1])))
    return None
