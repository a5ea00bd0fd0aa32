"""`bisect`: two engines that differ, neither assumed right, swapped by halves until one op is left.

Where the second run gets the first one's residual stream behind layer i, its difference at the end comes from the
layers after i alone. Halving finds the layer at which most of it goes, and then, with all taps up to one of that layer
replaced, the op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._arrays import as_array
from ..dataflow import in_order
from . import metrics
from .compare import aligned
from .page import Page, of_bisect

__all__ = ["Bisection", "bisect"]

SPREAD = 0.5  # an op that makes less of the difference than this is not its cause alone


@dataclass
class Bisection(Page):
    """What `bisect` found. True where the runs do not differ; `html` shows it.

    Attributes
    ----------
    tap : str or None
        The op that makes the difference, by the tap that it makes; None where there is none.
    end : str
        The tap at which runs are compared.
    total : float
        Their difference there: rms over the rms of the first run's.
    before, after : float
        That difference with everything before `tap` taken from the first run, and with `tap`, too.
    own : float
        How far the op's results lie apart on the first run's inputs, over their rms.
    steps : list of (str, float)
        Last tap that was replaced, and the difference that was left.
    nonfinite : (int, int) or None
        Where values are not finite in one run and others in the other at `end`: how many each has at `tap`, the first
        where that is so. Nothing is swapped then.
    """

    _parts = of_bisect

    tap: str | None
    end: str
    total: float
    before: float = 0.0
    after: float = 0.0
    own: float = 0.0
    steps: list[tuple[str, float]] = field(default_factory=list)
    nonfinite: tuple[int, int] | None = None

    @property
    def ok(self) -> bool:
        """True where the runs do not differ."""
        return self.tap is None

    def __bool__(self):
        return self.ok

    @property
    def share(self) -> float:
        """The part of the whole difference that goes where this op is swapped."""
        share = (self.before - self.after) / self.total if self.total else 0.0
        return share if np.isfinite(share) else 0.0

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            return f"ok: the runs differ by {self.total:.2e} of the rms at {self.end}, within the threshold"
        if self.nonfinite:
            first, second = self.nonfinite
            return (f"NOT FINITE from {self.tap} on: the first run has {first:,} values there that are not finite, the "
                    f"second {second:,}")
        part = f"{100 * self.share:.0f} % of the difference of {self.total:.2e} at {self.end}"
        own = f"on the same inputs the two lie {self.own:.2e} of their rms apart"
        if not self.share >= SPREAD:
            return f"SPREAD: no op makes most of the difference; {self.tap} makes {part}; {own}"
        return f"DIFFERENT: {self.tap} makes {part}; {own}"

    def __str__(self):
        rows = [("replaced up to", "difference left"), *((tap, f"{d:.2e}") for tap, d in self.steps)]
        return "\n".join([*aligned(rows), "", self.verdict])

    __repr__ = __str__


def bisect(run_a, run_b, tokens, *, threshold: float = 1e-5) -> Bisection:
    """Find the op that makes two engines differ.

    Parameters
    ----------
    run_a, run_b : callable, Model or ReferenceModel
        ``run(tokens, replace)`` runs one sequence from an empty state and gives a mapping from tap to array; taps that
        `replace`, a mapping from tap to array, has are replaced as soon as they are made.
    tokens : (T,) integers
    threshold : float
        The difference at the last tap, over its rms, from which the runs differ.

    Returns
    -------
    Bisection

    Raises
    ------
    ValueError
        If the runs have no tap in common.
    """
    return _Search(_runner(run_a, "run_a"), _runner(run_b, "run_b"), tokens).find(threshold)


def _runner(x, name) -> Callable[[Any, Mapping], Mapping]:
    if callable(getattr(x, "trace", None)):
        return lambda tokens, replace: x.trace(tokens, edit={k: _narrow(v) for k, v in replace.items()} or None)
    if hasattr(x, "weights") and hasattr(x, "forward"):
        return lambda tokens, replace: x.forward(tokens, taps="*", edit=replace).taps
    if not callable(x):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a Model or a function run(tokens, replace)")
    return x


def _narrow(x):
    x = np.asarray(x)
    return x if x.dtype.kind in "iu" else x.astype(np.float32)


class _Search:
    """Both runs as they are, and the second one with ever other halves of the first."""

    def __init__(self, run_a, run_b, tokens):
        self.run_b, self.tokens = run_b, tokens
        self.a, b = run_a(tokens, {}), run_b(tokens, {})
        self.taps = in_order(tap for tap in self.a if tap in b)
        if not self.taps:
            raise ValueError("the runs have no tap in common")
        self.end, self.steps = self.taps[-1], []
        self.total = self.apart(b[self.end], self.end)
        self.nonfinite = self.parted(b)

    def first(self, tap):
        """The first run's tap."""
        return as_array(self.a[tap], f"run_a: {tap}")

    def apart(self, x, tap):
        """rms distance from the first run's tap, over its rms."""
        return self.errors(x, tap).rms_relative

    def errors(self, x, tap):
        first = self.first(tap)
        return metrics.measure(as_array(x, f"run_b: {tap}").reshape(first.shape), first)

    def parted(self, b):
        """(first tap whose values are not finite in one run and others in the other, how many each has there); None
        where the last one is not such a tap."""
        if not self.errors(b[self.end], self.end).nonfinite_apart:
            return None
        found = ((tap, self.errors(b[tap], tap)) for tap in self.taps)
        tap, e = next((tap, e) for tap, e in found if e.nonfinite_apart)
        return tap, e.desired_nonfinite, e.actual_nonfinite

    def find(self, threshold):
        if self.total <= threshold:
            return Bisection(None, self.end, self.total)
        if self.nonfinite:
            tap, *counts = self.nonfinite
            return Bisection(tap, self.end, self.total, nonfinite=tuple(counts))
        streams = [tap for tap in self.taps if tap == "embed" or _is_stream(tap)]
        low, high, above, below = self.halve([[tap] for tap in streams if tap != self.end], self.total)
        inside = self.taps[self.place(low) + 1 : self.place(high) + 1]
        start = [low] if low else []
        parts = [start + inside[: i + 1] for i in range(len(inside))]
        if len(parts) > 1:
            low, high, above, below = self.halve(parts[:-1], above, below, last=inside[-1])
        high = high or self.end
        return Bisection(high, self.end, self.total, above, below, self.own(high, start + inside), self.steps)

    def place(self, tap):
        return self.taps.index(tap) if tap else (-1 if tap is None else len(self.taps) - 1)

    def halve(self, cuts, above, below=0.0, last=""):
        """(last tap of the cut before, of the cut behind, the difference left by each): each cut is a list of taps to
        replace, and the cut sought the first that leaves less than half of the difference."""
        low, high, limit = -1, len(cuts), (above + below) / 2
        while high - low > 1:
            middle = (low + high) // 2
            left = self.left(cuts[middle])
            if left < limit:
                high, below = middle, left
            else:
                low, above = middle, left
        return cuts[low][-1] if low >= 0 else None, cuts[high][-1] if high < len(cuts) else last, above, below

    def left(self, taps):
        """The difference at the end where the second run has these taps of the first."""
        left = self.apart(self.run_b(self.tokens, {tap: self.first(tap) for tap in taps})[self.end], self.end)
        self.steps.append((taps[-1], left))
        return left

    def own(self, tap, before):
        """The distance of the two results of an op on the first run's inputs."""
        given = {t: self.first(t) for t in before if self.place(t) < self.place(tap)}
        return self.apart(self.run_b(self.tokens, given)[tap], tap)


def _is_stream(tap):
    return tap.startswith("layers.") and tap.count(".") == 2 and tap.endswith(".out")
