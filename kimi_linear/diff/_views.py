"""What `align` lays beside each other: ours, joined of its parts, and every view of theirs in that shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ._prints import Prints, norm

__all__ = ["Join", "Step", "View", "joins", "views"]


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
        return math.sqrt(sum(norm(a - a.mean() if a.size > 1 else a) ** 2 for a in pieces)) / norm(self.ours)


@dataclass(frozen=True)
class View:
    """Theirs in the shape of ours: by which steps, what they had to choose in bits, and what that says."""

    x: np.ndarray
    steps: tuple[Step, ...]
    cost: float
    says: str


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
    prints = [(Prints(y)(axis), np.sqrt((y * y).sum(rest))[:, None]) for y in (x, ours)]
    return [_offset(a, b) for a, b in zip(*prints)]


def _offset(a, b):
    """Where the rows b lie best in the longer a, whatever their factor."""
    n, energy = len(b), np.concatenate([[0], np.cumsum((a * a).sum(1))])
    starts = range(len(a) - n + 1)
    gain = [abs(np.vdot(a[i:i + n], b)) / max(np.sqrt(energy[i + n] - energy[i]), 1e-300) for i in starts]
    return int(np.argmax(gain))
