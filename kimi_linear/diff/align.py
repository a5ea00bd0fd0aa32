"""`align`: the transpose, permutation, padding, joining or scale that makes a foreign tensor ours, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .._arrays import BFLOAT16, as_array
from . import metrics
from ._html import fragment, table, verdict
from ._matching import HOPELESS, Found, ambiguities, choose, factor_words, permutation_words, runs, search
from ._views import Step, joins
from .compare import aligned

__all__ = ["Alignment", "align"]

#: Residual, over the rms of ours, up to which a fit is one. Two unrelated arrays have about 1.
ACCEPT = 0.05
#: And over what chance leaves: arrays of one mean that hardly vary, as the weights of norms, are near each other.
OF_CHANCE = 0.25
#: By how many bits a fit must be better than chance: what the residual tells, less what the steps had to choose.
BITS = 16


@dataclass(frozen=True)
class Alignment:
    """What `align` found. Prints as a small table; true where something fits.

    Attributes
    ----------
    found : bool
        What `bool` gives.
    steps : tuple of Step
        What makes ours of theirs, in order, as data: each has `kind`, `axis` and `value`. Empty where theirs is ours.
    residual : float
        rms of ``apply(theirs) - ours`` over the rms of ours; where nothing fits, that of the nearest that was tried.
    verdict : str
        One sentence, theirs in terms of ours.
    says : tuple of str
        The parts of that sentence, one a difference.
    ambiguous : tuple of str
        Why something else would fit as well; empty where nothing would.
    other : float
        Residual of the next best, of those that were tried; NaN where there was none.
    shape : tuple of int
        Of theirs.
    """

    found: bool
    steps: tuple[Step, ...]
    residual: float
    verdict: str
    says: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    other: float = float("nan")
    shape: tuple[int, ...] = field(default=(), repr=False)

    def __bool__(self):
        return self.found

    def apply(self, theirs):
        """Ours, made of a tensor that lies as theirs did: float32 or float64, or a dict where ours was a mapping.

        Raises
        ------
        ValueError
            If nothing was found, or the tensor has another shape.
        """
        if not self.found:
            raise ValueError(f"nothing to apply: {self.verdict}")
        x = _floats(theirs, "theirs")
        if x.shape != self.shape:
            raise ValueError(f"theirs has shape {list(x.shape)}; it must be {list(self.shape)}, as it was aligned")
        x = x if x.dtype.itemsize >= 4 and x.dtype.kind == "f" else x.astype(np.float32)
        for step in self.steps:
            x = step.apply(x)
        return x

    def _rows(self):
        rows = [(step.kind, step.words()) for step in self.steps]
        rows.append(("residual", f"{self.residual:.2g} of the rms of ours"))
        if np.isfinite(self.other):
            rows.append(("next best", f"{self.other:.2g}"))
        return rows

    def __str__(self):
        return "\n".join([*aligned(self._rows()), self.verdict])

    __repr__ = __str__

    def _repr_html_(self):
        return fragment(table(self._rows()), verdict(self.verdict, self.found))


def align(theirs, ours, *, axes: Sequence[str] | str | None = None) -> Alignment:
    """Find what makes a foreign tensor equal ours, and say it.

    Tried are every order of the axes, axes merged or split or of length 1, padding along one axis, a permutation
    along one or two axes (heads in another order, even and odd against halves) and a factor, together; else a factor
    for each slice along an axis (a norm's weights multiplied in, a scale a head). Slices are paired by fingerprints
    that the rest of the search cannot change (norms, sorted projections), not by trying permutations. A step must earn
    what it had to choose: it is taken where the residual falls by more than chance.

    Parameters
    ----------
    theirs : array
        float64, float32, float16 or bfloat16, NumPy or torch on the CPU.
    ours : array, or mapping of str to array
        Of a mapping, theirs may hold the parts joined or stacked along any axis, in any order, in turn too.
    axes : str or sequence of str, optional
        Names of the axes of ours for the sentence, as "HKV"; by default their numbers.

    Returns
    -------
    Alignment

    Raises
    ------
    TypeError
        If an array is not of floats.
    ValueError
        If one is empty or not finite, or no order of the axes and no padding brings theirs to the shape of ours.
    """
    their = _checked(theirs, "theirs")
    named = isinstance(ours, Mapping)
    if named and not ours:
        raise ValueError("ours is an empty mapping; it must hold one array or more")
    parts = {str(n): _checked(a, f"ours[{n!r}]") for n, a in ours.items()} if named else {"": _checked(ours, "ours")}
    floor = 2 * max(_unit(x) for x in [theirs, *(ours.values() if named else [ours])])
    for name, a in parts.items():
        if not a.any() or np.ptp(a) == 0 and a.size > 1:
            what = f"ours[{name!r}]" if named else "ours"
            level = "zero" if not a.any() else f"{a.flat[0]:g}"
            return Alignment(False, (), float("nan"), f"AMBIGUOUS: {what} is {level} everywhere, so that any order "
                             "of it is the same; align needs values that differ", shape=their.shape)
    if not their.any():
        return Alignment(False, (), 1.0, "none found: theirs is zero everywhere, ours is not", shape=their.shape)
    found = []
    for join in joins(their, parts, _axis_names(axes, parts), named):
        found += search(their, join, floor)
        if found and min(f.residual for f in found) <= floor:
            break
    if not found:
        raise ValueError(_no_shape(their, parts, named))
    best, other = choose(found, floor)
    if best.residual > min(ACCEPT, OF_CHANCE * best.chance) or best.bits(floor) < BITS:
        return _none(best, floor, their.shape)
    return _alignment(best, other, floor, their.shape)


# ---- what comes in -------------------------------------------------------------------------------------


def _floats(x, name):
    a = as_array(x, name)
    if a.dtype.kind in "iub":
        raise TypeError(f"{name} is {a.dtype}; it must be floats: integers have no scale and few values")
    if a.dtype.kind != "f" and a.dtype != BFLOAT16:
        raise TypeError(f"{name} is {a.dtype}; it must be float64, float32, float16 or bfloat16")
    return a


def _checked(x, name):
    """`x` in float64, not empty and finite."""
    a = _floats(x, name).astype(np.float64)
    if not a.size:
        raise ValueError(f"{name} has shape {list(a.shape)}; it must not be empty")
    bad = ~np.isfinite(a)
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(f"{name} has {int(bad.sum()):,} values that are not finite, the first at {at}; "
                         "it must have none")
    if a.squeeze().ndim > 6:
        raise ValueError(f"{name} has shape {list(a.shape)}; it must have 6 axes or fewer that are longer than 1")
    return a


def _unit(x):
    return metrics.unit_of(as_array(x, "array").dtype)


def _axis_names(axes, parts):
    shape = next(iter(parts.values())).shape
    return metrics.axis_names(shape, tuple(map(str, range(len(shape)))) if axes is None else tuple(axes))


def _no_shape(their, parts, named):
    shapes = ", ".join(f"{n} {list(a.shape)}" if named else str(list(a.shape)) for n, a in parts.items())
    total = sum(a.size for a in parts.values())
    return (f"theirs has shape {list(their.shape)}, {their.size:,} values, and ours {shapes}, {total:,}: no order of "
            "the axes, merging, or padding along one axis makes them the same")


# ---- what goes out -------------------------------------------------------------------------------------


def _none(best, floor, shape):
    if OF_CHANCE * best.chance < best.residual <= ACCEPT:
        why = (f"the nearest ({' and '.join(_says(best)[0]) or 'as it is'}) leaves a residual of {best.residual:.2g}, "
               f"and ours varies by only {best.chance:.2g}: other values of its mean are as near")
    elif best.residual <= ACCEPT:
        why = f"a fit with residual {best.residual:.2g} is no better than chance on so few values"
    elif best.residual > HOPELESS:
        why = f"nothing that was tried comes near; the least residual is {best.residual:.2g}"
    else:
        why = f"the nearest ({' and '.join(_says(best)[0]) or 'as it is'}) leaves a residual of {best.residual:.2g}"
    return Alignment(False, (), best.residual, f"none found: {why}", shape=shape)


def _alignment(best: Found, other, floor, shape):
    says, names = _says(best)
    doubts = tuple(ambiguities(best, floor))
    noise = "exactly" if best.residual == 0 else f"to {best.residual:.1g}"
    verdict = "theirs is ours" if not says else "; ".join(says)
    verdict += f", {noise}" if not doubts else f", {noise}; AMBIGUOUS: {'; '.join(doubts)}"
    residual = other.residual if other is not None else float("nan")
    return Alignment(True, best.all_steps(), best.residual, verdict, tuple(says), doubts, residual, shape)


def _says(best: Found) -> tuple[list[str], tuple[str, ...]]:
    """The sentence's parts, and the names of the axes."""
    join, says = best.join, []
    if best.view.says:
        says.append(best.view.says)
    joined = False
    for step in best.permutations:
        if step.kind == "factors":
            says.append(f"along axis {join.names[step.axis]} {factor_words(1 / step.value)}")
            continue
        order = np.argsort(step.value)
        if join.parts and step.axis == join.axis:
            says.append(_held(order, join))
            joined = True
        else:
            says.append(f"along axis {join.names[step.axis]} {permutation_words(order)}")
    if join.parts and not joined:
        says.append(_held(np.arange(best.ours.shape[join.axis]), join))
    if best.scale != 1:
        says.append(_scaled(best))
    return says, join.names


def _held(order, join):
    """How theirs holds the parts: `order` has, for each slice of theirs, that of the joined ours."""
    edges = np.cumsum([0, *(n for _, n in join.parts)])
    names = [n for n, _ in join.parts]
    pieces = []  # (part, first, last) of runs that end at the border of a part
    for first, last in runs(order):
        while first <= last:
            part = int(np.searchsorted(edges, first, side="right")) - 1
            end = min(last, int(edges[part + 1]) - 1)
            pieces.append((part, first - int(edges[part]), end - int(edges[part])))
            first = end + 1
    along = f"along axis {join.names[join.axis]}"
    if len(pieces) == len(names):
        ours = "" if [p for p, _, _ in pieces] == list(range(len(names))) else f" (ours: {' | '.join(names)})"
        return f"theirs holds {' | '.join(names[p] for p, _, _ in pieces)} {along}{ours}"
    turn = [p for p, _, _ in pieces[:len(names)]]
    each = {p: b - a + 1 for p, a, b in pieces[:len(names)]}
    regular = len(set(turn)) == len(names) and all(
        p == turn[i % len(turn)] and a == i // len(turn) * each[p] and b - a + 1 == each[p]
        for i, (p, a, b) in enumerate(pieces))
    if regular:
        return f"theirs holds {', '.join(f'{each[p]} of {names[p]}' for p in turn)} in turn {along}"
    shown = " | ".join(f"{names[p]}[{a}:{b + 1}]" for p, a, b in pieces[:6])
    return f"theirs holds {shown}{' and more' if len(pieces) > 6 else ''} {along}"


def _scaled(best):
    """Theirs is ours times the inverse of what the step multiplies by."""
    factor = 1 / best.scale
    if factor == -1:
        return "theirs is ours with its sign changed"
    called = ", or ".join(best.called)
    return f"theirs is ours times {factor:.6g}" + (f" = {called}" if called else "")
