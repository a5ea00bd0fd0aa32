"""`blame`: every op of a foreign run again in float64, on *its* inputs: which are wrong in themselves, and how.

An op that is right but was given wrong inputs is right. What an op may differ by is its noise: what rounding its
inputs and its result once, to the type of the trace, would change. An op that is further off is wrong, and is laid
beside every fault of `kimi_linear.faults` that it can have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from .. import dataflow
from .._names import listed
from ..dataflow import CHOICES, in_order
from ..faults import Fault
from ._grid import NOISE, Grid, Line, by_layer, by_tap, layer_of
from ._opened import Opened
from ._weights import WeightDifference
from .compare import aligned
from .page import Plotted, of_blame

__all__ = ["Blame", "Judged", "WRONG", "blame"]

#: In units of its noise: from here an op is wrong.
WRONG = 7.0
#: The median op of an engine is at most that many times its noise.
USUAL = 8.0
#: Why nothing is judged of an empty call.
NO_TOKENS = "the trace has no tokens"


@dataclass(frozen=True)
class Judged:
    """One op, or the smallest group of ops between taps that the trace has.

    Attributes
    ----------
    tap : str
    op : str
    group : tuple of str
        Taps that were run to make it: itself, and what the trace lacks on the way to it.
    noise : float
        Error over noise; the worse of the whole, and half that of the worst row.
    error : float
        rms error over the rms of the reference on their inputs. Of expert ids, the share of rows with another set
        that rounding does not explain.
    at : str
        The worst row: call, sequence, token.
    kind : str
        "right"; "tie" for expert ids that differ between scores as near as rounding, or for what was made with such ids
        within its group; the name of a fault;
        "stored_transposed" for a state array; "weight_differs" where a weight of its is another on their side;
        "unknown" where nothing explains the result.
    fault : Fault or None
    choice : tuple
        Of the fault's further arguments; empty where several values of them explain it.
    alike : tuple of tuples
        These values.
    left : float
        Error that remains beside the fault's result, over noise.
    also : tuple of str
        Faults that explain it as well.
    where : str
        The tap of the group that has the fault.
    weight : str
        What is known of its weights: which differs, that they are the same, or which to compare.
    of_token : (rows,) array or None
        Error over noise of each token of all calls, sequence by sequence.
    explained : tuple of (Fault, choice, tap)
        All that explain it, and where, what is named first.
    """

    tap: str
    op: str
    group: tuple[str, ...]
    noise: float
    error: float
    at: str = ""
    kind: str = "right"
    fault: Fault | None = field(default=None, repr=False)
    choice: tuple = ()
    left: float = float("nan")
    also: tuple[str, ...] = ()
    where: str = ""
    weight: str = ""
    alike: tuple = ()
    of_token: np.ndarray | None = field(default=None, repr=False, compare=False)
    explained: tuple = field(default=(), repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """True where the op is right, or differs by ties alone."""
        return self.kind in ("right", "tie")

    @property
    def layer(self) -> int | None:
        """The layer, where it is in one."""
        return dataflow.layer_of(self.tap)

    @property
    def label(self) -> str:
        """The kind, its choice, where in the group it is, and what explains the result as well."""
        choice = f" ({', '.join(map(str, self.choice))})" if self.choice else ""
        also = f", or {', '.join(self.also)}" if self.also else ""
        where = f" at {self.where}" if self.fault and self.where != self.tap else ""
        return f"{self.kind}{choice}{where}{also}"

    @property
    def text(self) -> str:
        """What is wrong, in words."""
        if self.kind == "unknown":
            return f"no known fault explains it{self.weight and '; '}{self.weight}"
        if self.kind == "weight_differs":
            return self.weight
        if self.kind == "stored_transposed":
            return "stored_transposed: the array is [H, V, K], and must be [H, K, V]"
        values = ", ".join(f"{x:g}" for value in self.alike for x in value)
        alike = f" ({values} are the same here)" if values else ""
        return f"{self.label}: {self.fault.text}{alike}" if self.fault else ""


@dataclass
class Blame(Plotted):
    """What `blame` found. Prints as a table; true when no op is wrong in itself; `html` and `plot` show it.

    Attributes
    ----------
    rows : list of Judged
        The wrong ones first, the worst of them first; then the others by noise.
    skipped : list of (tap, reason)
        Not judged.
    unit : float
        The rounding that noise is made of: 2**-24 for float32.
    notes : list of str
    structure : str
        A sentence where layers are of another kind than they should be; else empty.
    columns : list of str
        The tokens of all calls: ``call 1, token 5``.
    cuts : tuple of int
        At which of them a sequence or a call begins, behind the first.
    opened : list of Opened
        The worst ops that are wrong, beside float64 on their inputs.
    weights : list of WeightDifference
        Weights that are others on their side, furthest apart first, where `weights` was given.
    """

    _parts = of_blame

    rows: list[Judged]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unit: float = 0.0
    notes: list[str] = field(default_factory=list)
    structure: str = ""
    columns: list[str] = field(default_factory=list, repr=False)
    cuts: tuple[int, ...] = ()
    opened: list[Opened] = field(default_factory=list, repr=False)
    weights: list[WeightDifference] = field(default_factory=list)

    @property
    def wrong(self) -> list[Judged]:
        """The ops that are wrong in themselves."""
        return [r for r in self.rows if not r.ok]

    @property
    def ok(self) -> bool:
        """True where no op is wrong, no weight differs, and the layers are of the kinds that they should be."""
        return bool(self.rows) and not self.wrong and not self.structure and not self.weights

    def __bool__(self):
        return self.ok

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.structure:
            return self.structure
        if self.weights:
            return self._of_weights()
        n = len(self.rows)
        if not n:
            reasons = {reason for _, reason in self.skipped}
            return f"NOT JUDGED: {NO_TOKENS if reasons == {NO_TOKENS} else 'no op is between taps that the trace has'}"
        if not self.wrong:
            worst = f"; the furthest, {self.rows[0].tap}, is at {self.rows[0].noise:.2g} times its noise" if n else ""
            return (f"ok: none of {n} ops is wrong in itself{worst}. What moves an op by less than "
                    f"{WRONG:.0f} times its noise is not visible here")
        first = self.wrong[0]
        same = [r for r in self.wrong if r.kind == first.kind and r.op == first.op]
        others = len(self.wrong) - len(same)
        more = f", and {len(same) - 1} more like it" if len(same) > 1 else ""
        rest = f"; {others} other{'s are' if others > 1 else ' is'} wrong, too" if others else ""
        return (f"WRONG: {first.tap} ({first.op}){more}, {_times(first.noise)} its noise on their own inputs: "
                f"{first.text}{rest}; {n - len(self.wrong)} ops are right")

    def _of_weights(self):
        """The verdict where a weight is another on their side."""
        more = f", and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
        explained = [r for r in self.wrong if r.kind == "weight_differs"]
        others = [r for r in self.wrong if r.kind != "weight_differs"]
        shows = f"it shows in {listed([r.tap for r in explained])}" if explained else "no op shows it"
        rest = f"; wrong besides: {listed([r.tap for r in others])}" if others else ""
        return f"WRONG: {self.weights[0].text}{more}; {shows}{rest}"

    def __str__(self):
        shown = self.wrong[:12] or self.rows[:5]
        lines = aligned([HEAD, *(cells(r) for r in shown)])
        if len(self.wrong) > len(shown):
            lines.append(f"... and {len(self.wrong) - len(shown)} more")
        return "\n".join([*lines, "", *self.left_out(), self.verdict])

    __repr__ = __str__

    def left_out(self) -> list[str]:
        """Notes, sources, ties, and what was not judged."""
        lines = [*self.notes, *(d.text for d in self.weights[:6])]
        if len(self.weights) > 6:
            lines.append(f"and {len(self.weights) - 6} more weights differ")
        known = {r.kind: r.fault for r in self.wrong if r.fault}
        lines += [f"{name}: {f.text} ({f.source or f.scenario})" for name, f in known.items()]
        ties = [r.tap for r in self.rows if r.kind == "tie"]
        if ties:
            lines.append(f"other experts, but between scores as near as rounding: {listed(ties)}")
        for reason, n in Counter(reason for _, reason in self.skipped).items():
            taps = [tap for tap, r in self.skipped if r == reason]
            lines.append(f"not judged ({n}): {listed(taps)}: {reason}")
        return lines

    def grid(self, layer: str | None = None) -> Grid:
        """Error over noise of layers and tokens; or of the taps of one ``layer 3``."""
        lines = [Line(r.tap, r.of_token, _limit(r)) for r in self.in_order() if r.of_token is not None]
        if layer is None:
            return by_layer(lines, self.columns, NOISE, self.cuts)
        return by_tap([x for x in lines if layer_of(x.tap) == layer], self.columns, NOISE, self.cuts)

    def by_depth(self) -> tuple[list[str], dict[str, list[float]], float]:
        """(layers, the worst op of each in times its noise, from where an op is wrong)."""
        layers: dict[str, list[float]] = {}
        for r in self.in_order():
            layers.setdefault(layer_of(r.tap), []).append(r.noise)
        return list(layers), {"worst op, times its noise": [max(x) for x in layers.values()]}, WRONG

    def in_order(self) -> list[Judged]:
        """The rows in the order of the dataflow."""
        rows = {r.tap: r for r in self.rows}
        return [rows[tap] for tap in in_order(rows)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not finite is null."""
        def finite(x):
            return float(x) if np.isfinite(x) else None

        rows = [{"tap": r.tap, "layer": r.layer, "op": r.op, "ok": r.ok, "kind": r.kind, "noise": finite(r.noise),
                 "error": finite(r.error), "at": r.at, "text": r.text, "choice": list(r.choice),
                 "alike": [list(value) for value in r.alike], "also": list(r.also),
                 "where": r.where, "weight": r.weight, "left": finite(r.left), "group": list(r.group)}
                for r in self.rows]
        weights = [{"name": d.name, "largest": finite(d.largest), "relative": finite(d.relative), "text": d.text}
                   for d in self.weights]
        return {"ok": self.ok, "verdict": self.verdict, "unit": self.unit, "wrong_from": WRONG, "rows": rows,
                "skipped": [list(s) for s in self.skipped], "notes": self.notes, "weights": weights}


HEAD = ("tap", "op", "error", "times its noise", "worst at", "what it is")


def _times(x):
    return f"{x:.2g} times" if np.isfinite(x) else "beyond"


def _limit(r):
    """What a token may be at: half of it counts (`Judged.noise`), unless the op is wrong as a whole."""
    return WRONG if not r.ok or r.op in CHOICES else 2 * WRONG


def cells(r: Judged) -> tuple[str, ...]:
    """A row of the table."""
    group = f" (+{len(r.group) - 1})" if len(r.group) > 1 else ""
    return r.tap, r.op + group, f"{r.error:.2e}", f"{r.noise:.3g}", r.at if r.noise else "", r.label


# ---- the judgement ---------------------------------------------------------------------------------


def blame(model, theirs, *, dtype=None, tokens=None, weights=None, activations=None) -> Blame:
    """Which ops of a foreign run are wrong in themselves, and by which known fault.

    Parameters
    ----------
    model : Model or ReferenceModel
        Of the same checkpoint.
    theirs : Trace, mapping from tap to array [T, ...], or a list of them
        One for each of consecutive calls of the same sequences, from their beginning. Of a Trace's ``meta`` count
        ``tokens`` [T], ``offsets`` [N+1], ``dtype`` (that they computed in), and ``position``: the number of tokens
        that each sequence has before the call, less than it has read where it was put back.
    dtype : optional
        The type that they computed in; by default that of the metadata or of the arrays, or a wider one's noise is
        taken where most ops have it.
    tokens : (T,) integers, optional
        Of one call, where the trace does not say.
    weights : Model, ReferenceModel or mapping from name to array, optional
        What they had: compared with the model's by name, before anything else. What differs by rounding to the type of
        one of the two alone is the same.
    activations : {"float32", "int8", "bfloat16"}, optional
        What their products made of their inputs, where the metadata do not say (docs/find-the-bug.md).

    Returns
    -------
    Blame

    Raises
    ------
    ValueError
        If there is no tap of this model, or calls and shapes do not agree; with names. If a call begins behind what the
        calls before it have read, or an engine's call is of other requests than the first. If an expert id is of no
        expert. If `weights` has no name of it.
    """
    from ._blame_run import Run

    if not hasattr(model, "config"):
        raise TypeError(f"model is a {type(model).__name__}; it must be a Model or a ReferenceModel")
    return Run(model, theirs, dtype, tokens, weights, activations).report()


def level_of(times):
    """(what all noise is multiplied by, a note or "") where most ops, or calls, are off by more than rounding once.

    `times` are errors over noise; `USUAL` times is still how well float32 or bfloat16 is done, more is taken for a
    mistake.
    """
    middle = float(np.median(times)) if len(times) else 0.0
    if middle > USUAL:
        return 1.0, f"more than half are beyond {USUAL:.0f} times their noise"
    if middle > 2:
        return middle, f"most are at {middle:.2g} times their noise: it is taken as so much larger"
    return max(1.0, middle), ""


def ranked(rows: Sequence[Judged]) -> list[Judged]:
    """Wrong ones first, each part by noise, in the order of the pass among equals."""
    place = {tap: i for i, tap in enumerate(in_order(r.tap for r in rows))}
    return sorted(rows, key=lambda r: (r.ok, -r.noise, place[r.tap]))


def as_calls(theirs) -> list[Mapping]:
    """A list of traces; results of the reference model give their taps."""
    calls = list(theirs) if isinstance(theirs, list | tuple) else [theirs]
    calls = [{**x.taps, **x.state} if hasattr(x, "taps") and hasattr(x, "state") else x for x in calls]
    for x in calls:
        if not isinstance(x, Mapping):
            hint = "; kl.Trace.load(path) reads a file" if isinstance(x, str | PathLike) else ""
            raise TypeError(f"theirs has a {type(x).__name__}; it must be a Trace or a mapping from tap to array, "
                            f"or a list of such{hint}")
    if not calls:
        raise ValueError("theirs is an empty list; it must have a trace for each call")
    return calls
