"""The one step that makes a foreign tensor ours: how theirs lies, as data, and the steps that bring it to our axes.

Every adapter says by a `Layout` how its engine keeps a tensor, and none turns axes by itself. A layout's axes are
letters: B sequences of a padded batch (or one), T tokens, H heads, K and V a head's channels, C channels, W columns of
a history, N sequences of a state, 1 an axis of one; letters in brackets are one axis, the last letter fastest:
``"BT(HK)"``, ``"BHTK"``, ``"NHVK"``. Where none are given the tokens come first, and what lies behind them has as many
values as ours. The steps of `kimi_linear.diff.align` serve as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import dataflow
from .._arrays import BFLOAT16
from ..config import Config
from ..diff._views import Step
from ..trace import BEFORE

__all__ = ["BEFORE", "STATE", "Batch", "Layout", "Place", "bring", "places"]

_HEADS = ("kda.b", "kda.beta", "gdn.a", "gdn.g", "gdn.b", "gdn.beta")
STATE = ".state"  # the end of a recurrent state's name


class Place(NamedTuple):
    """A tap or a state array of a model: letters of its axes, and their sizes; T has none."""

    axes: str
    sizes: tuple[int, ...]
    integer: bool = False

    @property
    def width(self):
        """Values a token, or of the whole state."""
        return int(np.prod(self.sizes))


class Batch(NamedTuple):
    """How the rows of a padded batch lie: tokens of each sequence, and on which side the padding is."""

    lengths: tuple[int, ...] = ()
    padding: str = "right"


ALONE = Batch()


@dataclass(frozen=True)
class Layout:
    """How a foreign tensor lies.

    Attributes
    ----------
    axes : str
        Letters; empty where tokens come first and the rest has the size of ours.
    steps : tuple of Step
        In place of letters: what `kimi_linear.diff.align` found.
    bits : str
        "bfloat16" where an array of 16-bit integers holds its bits.
    scale : float
        What theirs is multiplied by to be ours.
    order : array of integers, optional
        Of taps that are joined along the channels: which of theirs is each of ours, those of the first tap first.
    """

    axes: str = ""
    steps: tuple[Step, ...] = ()
    bits: str = ""
    scale: float = 1.0
    order: np.ndarray | None = None


def places(config: Config) -> dict[str, Place]:
    """Every tap and state array of a model; a state array also with `BEFORE` in front."""
    found: dict[str, Place] = {}
    for node in dataflow.nodes(config):
        kind = node.tap.split(".", 2)[-1]
        letters = "H" if kind in _HEADS else ("", "C", "HK")[len(node.shape)]
        found[node.tap] = Place("T" + letters, node.shape, kind == "moe.ids")
        if node.op == "cache_append":
            found[BEFORE + node.tap] = found[node.tap]
        if node.state:
            if node.state.endswith(STATE):
                H, V = node.shape
                of_state = Place("HKV", (H, found[node.inputs["k"]].sizes[-1], V))
            else:
                of_state = Place("WC", (config.conv_width - 1, int(np.prod(node.shape))))
            found |= {node.state: of_state, BEFORE + node.state: of_state}
    return found


def bring(x, taps: Mapping[str, Place], layout: Layout, where: str, batch: Batch = ALONE):
    """Arrays in our axes, of one tap or of several that lie joined along the channels, in their order.

    Parameters
    ----------
    x : array
    taps : mapping from tap to Place
    layout : Layout
    where : str
        File and key, for messages.
    batch : Batch
        Of B sequences; without lengths they are all as long as the array.

    Returns
    -------
    arrays : dict of tap to array
    lengths : tuple of int
        Tokens of each sequence; empty for states.

    Raises
    ------
    ValueError, TypeError
        If type or shape do not fit; the message names `where`, the tap, and what it must be.
    """
    names = " | ".join(taps)
    x = _typed(x, taps, layout, where, names)
    for step in layout.steps:
        try:
            x = step.apply(x)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{where} has shape {list(x.shape)}, to which the step {step.kind} {step.words()} does "
                             f"not apply: {error}") from None
    one = next(iter(taps.values()))
    widths = [p.sizes[-1] if "W" in p.axes else p.width for p in taps.values()]
    width = sum(widths)
    joined = one if len(taps) == 1 else Place("WC", (one.sizes[0], width)) if "W" in one.axes else Place("TC", (width,))
    x, lengths = _in_order(x, joined, layout.axes, where, names, batch)
    if layout.scale != 1:
        x = (x * np.float64(layout.scale)).astype(x.dtype)
    if len(taps) == 1:
        return {names: x}, lengths
    x = x if layout.order is None else x[..., layout.order]
    parts = np.split(x, np.cumsum(widths)[:-1], axis=-1)
    return {tap: part.reshape(-1, *p.sizes) if "T" in p.axes else part
            for (tap, p), part in zip(taps.items(), parts, strict=True)}, lengths


def _typed(x, taps, layout, where, names):
    """The array in its own type; what cannot be the tap's is refused."""
    if layout.bits:
        if layout.bits != "bfloat16":
            raise ValueError(f"{where}: bits is {layout.bits!r}; it must be 'bfloat16'")
        if x.dtype.itemsize != 2 or x.dtype.kind not in "uiV":
            raise TypeError(f"{where} is {x.dtype}; with bits 'bfloat16' it must be uint16")
        x = np.ascontiguousarray(x).view(np.uint16).view(BFLOAT16)
    integer = all(p.integer for p in taps.values())
    if integer and x.dtype.kind in "iu":
        return x.astype(np.int32)
    if integer:
        raise TypeError(f"{where} is {x.dtype}; {names} must be integers")
    if x.dtype.kind != "f" and x.dtype != BFLOAT16:
        hint = "; if these are the bits of bfloat16, say bits: 'bfloat16'" if x.dtype.itemsize == 2 else ""
        raise TypeError(f"{where} is {x.dtype}; {names} must be floats{hint}")
    return x


# ---- axes ----------------------------------------------------------------------------------------------


def _in_order(x, place, axes, where, names, batch):
    if not axes:
        return _plain(x, place, where, names, batch)
    groups = _groups(axes, place, where)
    sizes = _sizes(x, groups, place, where, names, axes)
    letters = [c for group in groups for c in group]
    x = x.reshape([sizes[c] for c in letters])
    lead = "B" if "T" in place.axes else "N"
    order = [c for c in (lead, *place.axes) if c in letters]
    x = x.transpose([letters.index(c) for c in order] + [i for i, c in enumerate(letters) if c == "1"])
    x = x.reshape([sizes[c] for c in order])
    if "T" not in place.axes:
        return (x[0] if "N" in order and len(x) == 1 else x), ()
    return _packed(x if lead in order else x[None], batch, where)


def _plain(x, place, where, names, batch):
    """An array without letters: sequences and tokens in front, then our axes, or all of them as one."""
    ours, has_tokens = [n for n in place.sizes if n != 1], "T" in place.axes
    fits = [tail for tail in range(has_tokens, min(x.ndim, 3) + 1)
            if [n for n in x.shape[tail:] if n != 1] in (ours, [n for n in (place.width,) if n != 1])]
    several = len(batch.lengths) > 1 and x.ndim > 1 and x.shape[0] == len(batch.lengths) and 2 in fits
    front = None if not fits else x.shape[:2] if several else x.shape[:fits[0]]
    lead = None if front is None else front if several else [n for n in front if n != 1]
    if lead is None or len(lead) > 1 + has_tokens:
        raise ValueError(f"{where} has shape {list(x.shape)}; {names} must be {_wanted(place)}, or say its axes")
    if not has_tokens:
        return x.reshape(*lead, *place.sizes), ()
    B, T = (*(1,) * (2 - len(lead)), *lead) if lead else (1, int(np.prod(front)))
    return _packed(x.reshape(B, T, *place.sizes), batch, where)


def _wanted(place):
    return "[" + ", ".join(("T", *map(str, place.sizes)) if "T" in place.axes else map(str, place.sizes)) + "]"


def _groups(axes, place, where):
    """Letters as groups, one an axis; those that ours does not have become the one that it does."""
    parts = re.findall(r"\(([A-Z1]+)\)|([A-Z1])", axes)
    if "".join(f"({a})" if a else b for a, b in parts) != axes:
        raise ValueError(f"{where}: axes is {axes!r}; it must be letters of B T H K V C W N 1, some in brackets")
    own = set(place.axes)
    groups = [[_letter(c, own) for c in a or b] for a, b in parts]
    flat = [c for g in groups for c in g if c != "1"]
    allowed = own | ({"B"} if "T" in own else {"N"})
    missing = [c for c in place.axes if c not in flat]
    if set(flat) - allowed or missing or len(flat) != len(set(flat)):
        lead = "B" if "T" in own else "N"
        raise ValueError(f"{where}: axes is {axes!r}; it must have each of {', '.join(place.axes)} once, and may have "
                         f"{lead} and 1")
    return groups


def _letter(c, own):
    if c in own or c in "BTN1":
        return "N" if c == "B" and "T" not in own else c
    return "K" if c == "V" and "K" in own else "C" if "C" in own and c not in "HW" else c


def _sizes(x, groups, place, where, names, axes):
    """Size of each letter: those of ours are known, T, B and N are what is left of their axis."""
    known = dict(zip(place.axes.replace("T", ""), place.sizes, strict=True)) | {"1": 1}
    problem = (f"{where} has shape {list(x.shape)}; {names} as {axes} must be "
               f"[{', '.join('*'.join(str(known.get(c, c)) for c in g) for g in groups)}]")
    if x.ndim != len(groups):
        raise ValueError(problem)
    for n, group in zip(x.shape, groups, strict=True):
        open_ones = [c for c in group if c not in known]
        width = int(np.prod([known[c] for c in group if c in known]))
        if len(open_ones) > 1 or n % max(width, 1) or (not open_ones and n != width):
            raise ValueError(problem)
        for c in open_ones:
            known[c] = n // width if width else 0
    return known


def _packed(x, batch, where):
    """[B, T, ...] -> rows of all sequences one after another, without padding."""
    B, T = x.shape[:2]
    if batch.padding not in ("left", "right"):
        raise ValueError(f"padding is {batch.padding!r}; it must be 'left' or 'right'")
    lengths = batch.lengths or (T,) * B
    if B == 1 and len(lengths) > 1 and sum(lengths) <= T:
        return x[0, :sum(lengths)], tuple(lengths)  # packed already
    if len(lengths) != B or max(lengths, default=0) > T or min(lengths, default=0) < 0:
        raise ValueError(f"{where} has {B} sequences of {T} tokens; lengths is {list(lengths)}: it must be {B} numbers "
                         f"of 0 to {T}")
    rows = [x[b, T - n:] if batch.padding == "left" else x[b, :n] for b, n in enumerate(lengths)]
    return (rows[0] if B == 1 else np.concatenate(rows)), tuple(lengths)
