"""The search of `align`: views of a tensor in our shape, slices paired by fingerprints, and which fit is taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["Found", "HOPELESS", "Join", "Step", "View", "ambiguities", "choose", "factor_words", "joins",
           "permutation_words", "runs", "search"]

WIDTH = 32      # values of a slice's fingerprint
MOST = 1 << 15  # slices along an axis up to which each is laid beside each
FAR = 0.05      # residual above which a factor for each slice is looked for
HOPELESS = 0.5  # residual from which no factor is looked for
FACTOR_BITS = 24  # of a factor of which nothing is known
LOOSE = 0.1     # difference of norms, over the norm, above which no permutation can fit within a residual of half of it


@dataclass(frozen=True)
class Step:
    """One step from theirs to ours.

    Attributes
    ----------
    kind : {"reshape", "transpose", "slice", "take", "factors", "scale", "parts"}
    value : object
        The shape; the axes, as for np.transpose; (start, stop); the indices; a factor for each slice; the factor;
        name -> (start, stop, shape), or (index,) of a stacked part.
    axis : int or None
        Of slice, take, factors and parts.
    """

    kind: str
    value: Any
    axis: int | None = None

    def apply(self, x):
        """The step, done."""
        if self.kind == "reshape":
            return x.reshape(self.value)
        if self.kind == "transpose":
            return x.transpose(self.value)
        if self.kind == "slice":
            return x[(slice(None),) * self.axis + (slice(*self.value),)]
        if self.kind == "take":
            return np.take(x, self.value, axis=self.axis)
        if self.kind == "factors":
            return (x * self.value.reshape(-1, *[1] * (x.ndim - 1 - self.axis))).astype(x.dtype)
        if self.kind == "scale":
            return (x * np.float64(self.value)).astype(x.dtype)
        return {name: np.take(x, range(a, b), axis=self.axis).reshape(shape)
                for name, (a, b, shape) in self.value.items()}

    def words(self):
        """The step as a few words."""
        along = "" if self.axis is None else f", axis {self.axis}"
        if self.kind in ("take", "factors"):
            shown = ", ".join(f"{i:.6g}" for i in self.value[:8])
            return f"[{shown}{', ...' if len(self.value) > 8 else ''}]{along}"
        if self.kind == "slice":
            return f"{self.value[0]}:{self.value[1]}{along}"
        if self.kind == "parts":
            return ", ".join(self.value) + along
        return f"{self.value:.9g}" if self.kind == "scale" else str(list(self.value))


@dataclass(frozen=True)
class Join:
    """Ours as one array: itself, or its parts joined along an axis.

    `parts` are (name, slices along the axis), `split` the step that takes them apart; empty and None of one array.
    """

    ours: np.ndarray
    names: tuple[str, ...]
    axis: int = 0
    parts: tuple = ()
    split: Step | None = None

    @cached_property
    def varies(self):
        """rms of ours less its mean, each part less its own, over the rms of ours; of one value all of it."""
        edges = np.cumsum([n for _, n in self.parts[:-1]]).astype(int)
        pieces = np.split(self.ours, edges, self.axis) if self.parts else [self.ours]
        return math.sqrt(sum(_norm(a - a.mean() if a.size > 1 else a) ** 2 for a in pieces)) / _norm(self.ours)


@dataclass(frozen=True)
class View:
    """Theirs in the shape of ours: by which steps, what they had to choose in bits, and what that says."""

    x: np.ndarray
    steps: tuple[Step, ...]
    cost: float
    says: str


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


# ---- ours, of parts ------------------------------------------------------------------------------------


def joins(theirs, parts, names, named) -> list[Join]:
    """The arrays that theirs may be: ours, or its parts joined along each axis, flattened or stacked; those with as
    many axes as theirs first."""
    if not named:
        return [Join(parts[""], names)]
    return sorted(_all_joins(parts, names), key=lambda j: abs(theirs.squeeze().ndim - j.ours.squeeze().ndim))


def _all_joins(parts, names) -> Iterator[Join]:
    arrays = list(parts.values())
    seen = set()
    ndim = arrays[0].ndim
    for flat in range(ndim, min(ndim, 2) - 1, -1):  # the last axes merged, from axis flat - 1 on
        merged = [a.reshape(*a.shape[:flat - 1], -1) for a in arrays if a.ndim == ndim]
        labels = (*names[:flat - 1], "*".join(names[flat - 1:]))
        for axis in reversed(range(flat)):
            rest = {a.shape[:axis] + a.shape[axis + 1:] for a in merged}
            if len(merged) == len(arrays) and len(rest) == 1 and (flat == ndim or axis == flat - 1):
                key = tuple(a.shape for a in merged), axis
                if key not in seen:
                    seen.add(key)
                    yield _joined(merged, parts, labels, axis)
    if len(arrays) > 1 and len({a.shape for a in arrays}) == 1:
        stacked = [a[None] for a in arrays]
        yield _joined(stacked, parts, ("part", *names), 0)


def _joined(arrays, parts, names, axis):
    edges = np.cumsum([0, *(a.shape[axis] for a in arrays)])
    split = {n: (int(a), int(b), parts[n].shape) for n, a, b in zip(parts, edges, edges[1:])}
    sizes = tuple((n, b - a) for n, (a, b, _) in split.items())
    return Join(np.concatenate(arrays, axis), names, axis, sizes, Step("parts", split, axis))


# ---- views ---------------------------------------------------------------------------------------------


def views(theirs, ours, names, reshaped=True) -> list[View]:
    """Every order of the axes that brings theirs to the shape of ours; where none does, a plain reshape, or every one
    with padding."""
    short, target = _longer_than_1(theirs.shape), _longer_than_1(ours.shape)
    named = [n for n, size in zip(names, ours.shape) if size != 1]
    orders = list(_orders(short, target))
    cost = math.log2(len(orders)) + 1 if orders else 0
    found = []
    for fine, order in orders:
        natural = list(order) == sorted(order)
        x = theirs.reshape(fine).transpose(order).reshape(ours.shape)
        steps = _without_idle(theirs.shape, [("reshape", fine), ("transpose", order), ("reshape", ours.shape)])
        found.append(View(x, steps, 0 if natural else cost, _layout(theirs.shape, ours.shape, fine, order, named)))
    if not found and reshaped and theirs.size == ours.size:
        found.append(View(theirs.reshape(ours.shape), (Step("reshape", ours.shape),), 4.0,
                          f"theirs is ours reshaped to {list(theirs.shape)}"))
    if not found and len(short) != len(target) and theirs.ndim == ours.ndim:  # an axis of 1 that is padded
        short, target, named = theirs.shape, ours.shape, names
    return found or list(_padded(theirs, ours, short, target, named))


def _longer_than_1(shape):
    return tuple(n for n in shape if n != 1)


def _orders(short, target):
    """(shape, axes): theirs.reshape(shape).transpose(axes) has the values of `target` in order."""
    fine, coarse = (target, short) if len(target) >= len(short) else (short, target)
    for order in itertools.permutations(range(len(fine))):
        if _merges([fine[i] for i in order], coarse):
            if fine is target:  # theirs lies as ours in this order
                yield tuple(fine[i] for i in order), tuple(int(i) for i in np.argsort(order))
            else:
                yield short, order


def _merges(fine, coarse):
    """True where neighbours of `fine` can be multiplied to give `coarse`."""
    if math.prod(fine) != math.prod(coarse):
        return False
    edges = {math.prod(coarse[:i]) for i in range(len(coarse) + 1)}
    return edges <= {math.prod(fine[:i]) for i in range(len(fine) + 1)}


def _without_idle(shape, steps):
    """Steps, but for those that change nothing."""
    kept = []
    for kind, value in steps:
        idle = tuple(value) == (tuple(shape) if kind == "reshape" else tuple(range(len(shape))))
        if not idle:
            kept.append(Step(kind, tuple(value)))
        shape = tuple(value) if kind == "reshape" else tuple(shape[i] for i in value)
    return tuple(kept)


def _layout(theirs, ours, fine, order, named):
    """What the order of the axes says: theirs as a list of our axes."""
    target = _longer_than_1(ours)
    whose = _labels([fine[i] for i in order], target, named)
    label = {axis: name for axis, name in zip(order, whose)}
    text, at = [], 0
    for n in theirs:
        group, size = [], 1
        while n != 1 and size < n:
            size *= fine[at]
            group.append(label[at])
            at += 1
        text.append("*".join(group) if group else "1")
    layout = "[" + ", ".join(text) + "]"
    natural = list(order) == sorted(order)
    ones = len(theirs) - len(_longer_than_1(theirs)) > len(ours) - len(target)
    with_one = ", with an axis of 1" if ones else ""
    if not natural:
        return f"theirs is ours transposed{with_one}: {layout}"
    if len(_longer_than_1(theirs)) != len(target):
        verb = "merged" if len(_longer_than_1(theirs)) < len(target) else "split"
        return f"theirs has axes of ours {verb}{with_one}: {layout}"
    if ones:
        return f"theirs has {'a batch axis' if theirs[0] == 1 else 'an axis'} of 1: {layout}"
    return "" if tuple(theirs) == tuple(ours) else f"theirs lacks axes of 1: {layout}"


def _labels(sizes, target, named):
    """Names of `sizes`, which multiply to `target`: an axis of ours that theirs splits is K.0, K.1."""
    labels, i = [], 0
    for n, name in zip(target, named):
        group, size = 0, 1
        while size < n:
            size *= sizes[i + group]
            group += 1
        labels += [name] if group == 1 else [f"{name}.{j}" for j in range(group)]
        i += group
    return labels


def _padded(theirs, ours, short, target, named):
    """Views of theirs where one axis is longer than ours."""
    if len(short) != len(target):
        return
    for order in itertools.permutations(range(len(short))):
        sizes = [short[i] for i in order]
        longer = [i for i, (a, b) in enumerate(zip(sizes, target)) if a != b]
        if len(longer) != 1 or sizes[longer[0]] < target[longer[0]]:
            continue
        axis, = longer
        x = theirs.reshape(short).transpose(order)
        extra = sizes[axis] - target[axis]
        layout = _layout(theirs.shape, sizes, short, order, named)
        for start in sorted({0, extra, *_offsets(x, ours.reshape(target), axis)}):
            cut = Step("slice", (start, start + target[axis]), axis)
            steps = _without_idle(theirs.shape, [("reshape", short), ("transpose", order)]) + (cut,)
            if target != ours.shape:
                steps += (Step("reshape", ours.shape),)
            before, after = start, extra - start
            pads = " and ".join(f"{n} {where}" for n, where in ((before, "before"), (after, "after")) if n)
            says = f"theirs is padded along axis {named[axis]}, {pads}"
            cost = 1 + math.log2(extra + 1)
            cost += 0 if list(order) == sorted(order) else math.log2(math.factorial(len(order)))
            yield View(cut.apply(x).reshape(ours.shape), steps, cost, "; ".join(filter(None, [layout, says])))


def _offsets(x, ours, axis):
    """Where along the axis the slices of ours fit best, in their order: by projections, and by norms, which no
    permutation along another axis changes."""
    rest = tuple(i for i in range(x.ndim) if i != axis)
    prints = [(_Prints(y)(axis), np.sqrt((y * y).sum(rest))[:, None]) for y in (x, ours)]
    return [_offset(a, b) for a, b in zip(*prints)]


def _offset(a, b):
    """Where the rows b lie best in the longer a, whatever their factor."""
    n, energy = len(b), np.concatenate([[0], np.cumsum((a * a).sum(1))])
    starts = range(len(a) - n + 1)
    gain = [abs(np.vdot(a[i:i + n], b)) / max(np.sqrt(energy[i + n] - energy[i]), 1e-300) for i in starts]
    return int(np.argmax(gain))


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
    found, ours = [], _Prints(join.ours)
    for view in some:
        for sign in 1, -1:
            x = view.x * (sign * _norm(join.ours) / _norm(view.x))
            found += [_fit(join, view, steps, floor) for steps in find(x, ours) if steps]
    return found


def _norm(x):
    return float(np.linalg.norm(x.ravel()))


def _norms_agree(view, ours):
    """Norms of the slices along every axis, sorted: no permutation changes them."""
    x, scale = view.x, _norm(ours) / _norm(view.x)
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
    size, xx, xy = _norm(ours), float(np.vdot(x, x)), float(np.vdot(x, ours))
    cost = view.cost + sum(_cost(step) for step in permutations)
    best = xy / xx if xx else 0.0

    def residual(scale):
        return _norm(scale * x - ours) / size

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
    """(step,) for each axis along which the slices of theirs are paired with ours'; `ours` are _Prints."""
    prints = _Prints(x)
    for axis in range(x.ndim):
        yield _taking(axis, prints(axis), ours(axis))


def _two_axes(x, ours):
    """(step, step) for each two axes: the one with fewer slices by what the order along the other cannot change."""
    prints, shape = _Prints(x), ours.x.shape
    for a, b in itertools.permutations(range(x.ndim), 2):
        if (shape[a], a) > (shape[b], b) or shape[a] == 1:
            continue
        first = _taking(a, prints(a, b), ours(a, b))
        if first:
            second = _taking(b, _Prints(first[0].apply(x))(b), ours(b))
            yield second and first + second


def _taking(axis, a, b):
    """The step that pairs two sets of fingerprints; nothing where the order is as it was or they do not fit."""
    order = _pairs(a, b)
    if (order == np.arange(len(order))).all() or _norm(a[order] - b) > HOPELESS * _norm(b):
        return ()
    return (Step("take", order, axis),)


class _Prints:
    """Fingerprints of one array, each made once.

    ``prints(axis)`` is [slices along the axis, WIDTH or fewer], random projections of the slices;
    ``prints(axis, free)`` projections of what lies along the axis `free`, sorted, so that its order does not matter.
    """

    def __init__(self, x):
        self.x, self.kept = x, {}

    def __call__(self, axis, free=None):
        if (axis, free) not in self.kept:
            self.kept[axis, free] = self._made(axis, free)
        return self.kept[axis, free]

    def _made(self, axis, free):
        rng = np.random.default_rng(0)  # the same projections for every array
        if free is None:
            flat = np.moveaxis(self.x, axis, 0).reshape(self.x.shape[axis], -1)
        else:
            cube = np.moveaxis(self.x, (axis, free), (0, 1))
            flat = _projected(cube.reshape(*cube.shape[:2], -1), 4, rng)
            flat = np.sort(flat, 1).reshape(len(flat), -1)
        return _projected(flat, WIDTH, rng)


def _projected(a, width, rng):
    m = a.shape[-1]
    width = min(width, max(4, (1 << 20) // m))  # of few long slices a few projections tell enough
    return a if m <= width else a @ (rng.standard_normal((m, width)) / np.sqrt(width))


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
    size = _norm(ours)
    for a, b in itertools.combinations(range(ours.ndim), 2):
        if ours.shape[a] == ours.shape[b] > 1:
            other = ours.swapaxes(a, b)
            for sign, word in ((1, "symmetric"), (-1, "antisymmetric")):
                if _norm(sign * other - ours) <= near * size:
                    yield f"ours is {word} in axes {best.join.names[a]} and {best.join.names[b]}"
    moved = {step.axis for step in best.permutations if step.kind == "take"}
    for axis in range(ours.ndim):
        n = ours.shape[axis]
        if n > 1 and _norm(np.roll(ours, 1, axis) - ours) <= near * size:
            yield f"ours does not change along axis {best.join.names[axis]}"
        elif axis in moved and (pair := _alike(ours, axis, near)):
            yield f"slices {pair[0]} and {pair[1]} of ours along axis {best.join.names[axis]} are the same"


def _alike(ours, axis, near):
    """Two neighbours, in the order of a projection, that are the same; None where there are none."""
    rows = np.moveaxis(ours, axis, 0).reshape(ours.shape[axis], -1)
    order = np.argsort(_Prints(ours)(axis)[:, 0], kind="stable")
    apart = np.linalg.norm(rows[order[1:]] - rows[order[:-1]], axis=1)
    at = int(apart.argmin())
    if apart[at] <= near * np.linalg.norm(rows[order[at]]):
        return sorted((int(order[at]), int(order[at + 1])))
    return None
