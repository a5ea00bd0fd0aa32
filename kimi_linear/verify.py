"""`verify`: every tap of a model beside float64, and every op on its own inputs beside its budget.

Two questions, asked of each tap of a run:

- *total*: how far is the engine's tap from the float64 model's, with all that came before it?
- *own*: how far is it from the same op in float64 **on the engine's own inputs**? Only this can be held
  against the op's budget, and only this says which op is wrong.

Both runs go through the layers once, and hold the taps of few of them at a time, within `MEMORY` bytes; between these
they hand on the residual stream.
Expert ids come from the reference, so that a choice between two nearly equal experts hides no arithmetic; a
free run then lists the choices that came out otherwise, with the gap between the scores in question.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from . import reference
from ._arrays import as_integers, as_tuple
from ._call import Call, joined_stream
from .config import layer_pattern
from .context import current
from .dataflow import RESULTS, TOKENS, Node, arguments, evaluate, nodes, stream_of
from .diff import metrics
from .diff.budgets import budget
from .diff.budgets import names as budget_names
from .reference_model import Recorder

__all__ = ["Flip", "Op", "Tap", "VerifyReport", "verify"]

MEMORY = 64 << 20  # bytes of taps held at a time, both runs together; at least one layer's
LARGEST_GAP = 1e-5  # a flip between scores further apart is a failure
EXACT = ("cache_append", "mhc_expand")  # copies: no error at all
OUTSIDE = ("embed", "streams"), ("output_res", "collapsed", "norm", "logits")  # of the layers: before, behind


@dataclass(frozen=True)
class Tap:
    """One tap (or state array) of the run. Errors are over the rms of the array.

    Attributes
    ----------
    total_rms, total_largest : float
        Against the float64 model.
    rms_u, largest_u : float or None
        Of the op on its own inputs, in u = 2**-24; None for expert ids that were given.
    share : float or None
        Largest ratio of that error to the op's budget, over all elements; None where the op has no budget.
    at : str
        Where: token, head, channel.
    apart : int
        Elements that are finite in one run only; of given expert ids, the rows that did not use them.
    """

    name: str
    op: str
    total_rms: float
    total_largest: float
    rms_u: float | None = None
    largest_u: float | None = None
    share: float | None = None
    at: str = ""
    apart: int = 0

    @property
    def ok(self) -> bool:
        """True where the op is inside its budget and nothing is `apart`."""
        return (self.share is None or self.share <= 1) and not self.apart


@dataclass(frozen=True)
class Op:
    """All taps of one op: the worst of them."""

    name: str
    taps: int
    rms_u: float
    largest_u: float
    share: float | None
    where: str
    at: str

    @property
    def ok(self) -> bool:
        """True where every tap is inside the budget."""
        return self.share is None or self.share <= 1


@dataclass(frozen=True)
class Flip:
    """A token whose experts, in a free run, are not the reference's.

    Attributes
    ----------
    taken, lost : tuple of int
        Experts of the engine that are not the reference's, and the other way round.
    gap : float
        By how much the reference's score of a lost one (of its group, where that decided) exceeds a taken
        one's.
    follows : bool
        True where an earlier layer had a flip at this token or before it: then other experts have computed
        its input, and the gap says nothing about rounding.
    """

    layer: int
    token: int
    taken: tuple[int, ...]
    lost: tuple[int, ...]
    gap: float
    follows: bool = False

    @property
    def ok(self) -> bool:
        """True where rounding explains it."""
        return self.follows or self.gap <= LARGEST_GAP


@dataclass
class VerifyReport:
    """What `verify` found. Prints as a table of ops; true when `ok`.

    Attributes
    ----------
    taps : list of Tap
        Every tap and state array, in the order of the pass.
    flips : list of Flip or None
        Of the free run; None without one.
    choices : int
        Tokens times layers with experts: what could flip.
    misrouted : list of Flip
        Rows of the engine's own choice where float64 chooses otherwise from the engine's own logits, beyond rounding:
        the op `route` is wrong.
    memory : int
        Bytes of taps that were held at a time.
    """

    model: str
    layers: str
    tokens: int
    forced: bool
    taps: list[Tap]
    flips: list[Flip] | None = None
    choices: int = 0
    misrouted: list[Flip] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @cached_property
    def ops(self) -> list[Op]:
        """One line an op, the one nearest its budget first."""
        by_op: dict[str, list[Tap]] = {}
        for tap in self.taps:
            if tap.rms_u is not None:
                by_op.setdefault(tap.op, []).append(tap)
        lines = [_worst_of(name, taps) for name, taps in by_op.items()]
        return sorted(lines, key=lambda line: -1.0 if line.share is None else line.share, reverse=True)

    @property
    def worst_rms(self) -> Tap:
        """The tap with the largest rms error against the float64 model."""
        return max((t for t in self.taps if t.op != "route"), key=lambda t: t.total_rms)

    @property
    def worst_largest(self) -> Tap:
        """The tap with the largest single error over its rms against the float64 model."""
        return max((t for t in self.taps if t.op != "route"), key=lambda t: t.total_largest)

    @property
    def ok(self) -> bool:
        """Every op inside its budget, all finite that should be, and no flip that rounding cannot explain."""
        return all(t.ok for t in self.taps) and all(f.ok for f in self.flips or ()) and not self.misrouted

    def __bool__(self):
        return self.ok

    @property
    def verdict(self) -> str:
        """One sentence."""
        from ._verify_text import verdict

        return verdict(self)

    def render(self, *, all_taps: bool = False, colour: bool = False, ascii_only: bool = False) -> str:
        """The report as text: ops, or with `all_taps` every tap."""
        from ._verify_text import render

        return render(self, all_taps=all_taps, colour=colour, ascii_only=ascii_only)

    def __str__(self):
        return self.render()

    __repr__ = __str__

    def _repr_html_(self):
        from ._verify_text import html_table

        return html_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "model": self.model,
            "layers": self.layers,
            "tokens": self.tokens,
            "expert_ids": "reference" if self.forced else "own",
            "u": metrics.U,
            "worst_rms": {"tap": self.worst_rms.name, "error": self.worst_rms.total_rms},
            "worst_largest": {"tap": self.worst_largest.name, "error": self.worst_largest.total_largest},
            "ops": [asdict(o) | {"ok": o.ok} for o in self.ops],
            "taps": [asdict(t) | {"ok": t.ok} for t in self.taps],
            "choices": self.choices,
            "flips": None if self.flips is None else [asdict(f) | {"ok": f.ok} for f in self.flips],
            "misrouted": [asdict(f) for f in self.misrouted],
            "memory": self.memory,
            "seconds": self.seconds,
            "notes": self.notes,
        }


def _worst_of(name: str, taps: list[Tap]) -> Op:
    judged = [t for t in taps if t.share is not None]
    worst = max(judged or taps, key=lambda t: t.share if t.share is not None else t.largest_u)
    rms, largest = max(t.rms_u for t in taps), max(t.largest_u for t in taps)
    return Op(name, len(taps), rms, largest, worst.share, worst.name, worst.at)


# ---- the run ---------------------------------------------------------------------------------------


def verify(model, tokens, *, forced: bool = True, free_run: bool = True,
           progress: Callable[[int, int, str], None] | None = None) -> VerifyReport:
    """Run tokens through the engine and through the float64 model, and judge every tap and state array.

    Parameters
    ----------
    model : Model
    tokens : (T,) integers
        One sequence, from an empty state.
    forced : bool
        Expert ids from the reference, in the run that is judged.
    free_run : bool
        Also run with the engine's own choices, and list the flips. With `forced` this run alone shows what `route`
        chooses: without it `route` is not judged, and the verdict says so.
    progress : callable, optional
        Called with (taps done, taps in all, tap).

    Returns
    -------
    VerifyReport

    Raises
    ------
    ValueError
        If there is no token, or one is outside the vocabulary.
    """
    tokens = as_integers(tokens, "tokens", ("T",), low=0, high=model.config.vocab_size)
    if not len(tokens):
        raise ValueError("tokens is empty; there must be at least one")
    begin = time.perf_counter()
    run = _Run(model, tokens, forced, progress)
    for layers in run.groups():
        run.judge_group(layers)
    flips = run.free_run() if free_run else None
    seconds = time.perf_counter() - begin
    return VerifyReport(model.name, layer_pattern(model.config), len(tokens), forced, run.taps, flips, run.choices,
                        run.misrouted, run.memory, seconds, run.notes)


class _Run:
    """The two runs side by side; between groups of layers stay both streams and the reference's expert ids."""

    def __init__(self, model, tokens, forced, progress):
        self.model, self.config, self.tokens, self.forced = model, model.config, tokens, forced
        self.reference = model.reference()
        self.weights = self.reference.weights
        self.nodes = nodes(self.config)
        self.total = len(self.nodes) + sum(node.state is not None for node in self.nodes)
        self.progress = progress or (lambda done, total, tap: None)
        self.taps: list[Tap] = []
        self.notes: list[str] = []
        self.misrouted: list[Flip] = []
        self.ids: dict[int, np.ndarray] = {}  # the reference's choice, by layer
        self.scores: dict[int, np.ndarray] = {}  # its router's logits
        self.chosen: dict[str, np.ndarray] = {}  # and the positions that its indexers choose, by tap
        self.h, self.snapshots = None, []  # what the last layer judged has left, in float64
        self.stream = {}  # the engine's, by taps
        self.memory = 0

    @property
    def choices(self):
        """Rows of expert ids."""
        return len(self.tokens) * len(self.ids)

    def groups(self):
        """Ranges of layers whose taps fit MEMORY; -1, the embedding, goes with the first layer, and n_layers, the final
        norm and logits, with the last."""
        n, first, held = self.config.n_layers, -1, 0
        for i in range(n):
            size = self._bytes(i) + (self._bytes(-1) if i == 0 else 0) + (self._bytes(n) if i == n - 1 else 0)
            if held and held + size > MEMORY:
                yield range(first, i)
                first, held = i, 0
            held += size
            self.memory = max(self.memory, held)
        yield range(first, n + 1)

    def _of(self, i):
        """Nodes of one layer, of the embedding (-1), or of what follows the layers (n_layers)."""
        if 0 <= i < self.config.n_layers:
            return [x for x in self.nodes if x.tap.startswith(f"layers.{i}.")]
        return [x for x in self.nodes if x.tap in OUTSIDE[i >= 0]]

    def _bytes(self, i):
        values = sum(int(np.prod(x.shape)) for x in self._of(i) if x.tap != "logits")
        return values * len(self.tokens) * (4 + 8) + self._logit_rows(i) * self.config.vocab_size * 12

    def _logit_rows(self, i):
        """Rows of logits that are judged: all, where they fit; else the last ones."""
        if i < self.config.n_layers:
            return 0
        return max(1, min(len(self.tokens), MEMORY // (12 * self.config.vocab_size)))

    def judge_group(self, layers):
        """Both runs of some layers, then each node of them."""
        desired = self._reference(layers)
        actual = self._engine(layers)
        for i in layers:
            for node in self._of(i):
                self.progress(len(self.taps), self.total, node.tap)
                self.taps += self._judge(node, actual, desired)

    def _reference(self, layers):
        """Taps and states of these layers in float64."""
        tap, state, n = Recorder(), {}, self.config.n_layers
        for i in layers:
            if i < 0:
                self.h = self.reference.embed(self.tokens, tap)
            elif i < n:
                self.h = self.reference.layer(i, self.h, state, tap, snapshots=self.snapshots)
            else:
                self._reference_logits(tap)
            if f"layers.{i}.moe.ids" in tap.kept:
                self.ids[i] = np.sort(tap.kept[f"layers.{i}.moe.ids"], axis=-1)
                self.scores[i] = tap.kept[f"layers.{i}.moe.logits"]
        self.chosen |= {name: ids for name, ids in tap.kept.items() if name.endswith("mla.select")}
        return tap.kept | state

    def _reference_logits(self, tap):
        rows = self._logit_rows(self.config.n_layers)
        if rows < len(self.tokens):
            which = f"the last {rows:,} of {len(self.tokens):,} tokens"
            self.notes.append(f"logits: {which}, as all would take more memory")
        self.reference.logits(self.reference.last_norm(self.h, tap, self.snapshots)[-rows:], tap)

    def _engine(self, layers):
        """Taps and states of these layers from the engine, and the layer below's output, their input."""
        n, T = self.config.n_layers, len(self.tokens)
        first, last = max(0, layers[0]), min(n - 1, layers[-1])
        rows = np.arange(T - self._logit_rows(n), T) if n in layers else "none"
        entered = {tap: self.stream[tap] for tap in stream_of(self.config, first)} if first else {}
        call = Call(self.model, self.tokens, logits=rows, embeds=joined_stream([*entered.values()]) if first else None,
                    start=first, stop=last + 1)
        state = self.model.new_state(cache="float32")
        call.states = [state]  # empty, and of these layers alone
        wanted = [f"layers.{i}.*" for i in range(first, last + 1)]
        wanted += [node.tap for node in self._of(-1)] if first == 0 else []
        wanted += [node.tap for node in self._of(n) if node.tap != "logits"] if n in layers else []
        given = {i: ids for i, ids in self.ids.items() if i in layers} if self.forced else None
        chosen = {name: ids for name, ids in self.chosen.items() if int(name.split(".")[1]) in layers}
        logits, trace = call.trace(wanted, chosen if self.forced else None, given, None)
        values = dict(trace) | entered | {TOKENS: self.tokens}
        values |= {name: state[name] for name in state if int(name.split(".")[1]) in layers}
        self.stream = {tap: values[tap] for tap in stream_of(self.config, last + 1)}
        return values if logits is None else values | {"logits": logits}

    def _judge(self, node: Node, actual, desired):
        """The tap of a node, and the state array that the op leaves."""
        if node.op == "route":
            tap = _of_ids(node, actual[node.tap], desired[node.tap], self.forced)
            return [tap if self.forced else self._judge_route(node, tap, actual)]
        values = actual
        if node.tap == "logits":
            values = {"norm": actual["norm"][-len(actual["logits"]) :]}
        args = arguments(node, values, self.weights)
        results = evaluate(node, args)
        form = {"form": current(self.model.ctx).delta_rule} if node.op == "delta_rule" else {}
        bounds = _bounds(node, results, args | form)
        names = (node.tap,) if node.state is None else (node.tap, node.state)
        return [_tap(node, name, actual[name], desired[name], own, bound)
                for name, own, bound in zip(names, results, bounds)]

    # ---- routing ----

    def free_run(self):
        """Flips against the reference; `route` is judged on its own logits, where it was given the ids before."""
        if not self.ids:
            return []
        wanted = [f"layers.*.moe.{x}" for x in ("ids", "logits")]
        state = self.model.new_state(cache="float32")
        _, trace = self.model.forward(self.tokens, taps=wanted, logits="none", state=state)
        flips, first = [], len(self.tokens)
        for i, ids in self.ids.items():
            node = next(x for x in self._of(i) if x.op == "route")
            found = self._flips(node, i, trace[node.tap], ids, self.scores[i], first)
            first = min([first, *(f.token for f in found)])
            flips += found
            if self.forced:
                at = next(k for k, tap in enumerate(self.taps) if tap.name == node.tap)
                self.taps[at] = self._judge_route(node, self.taps[at], trace)
        return flips

    def _judge_route(self, node, tap, values):
        """The tap of `route` on its own inputs: what float64 chooses from the engine's logits, but for rounding."""
        layer = int(node.tap.split(".")[1])
        got, logits = values[node.tap], values[f"layers.{layer}.moe.logits"]
        own = reference.route(logits, bias=self._bias(node), **node.options)[0]
        apart = self._flips(node, layer, got, own, logits, len(got))
        limit = _routing_noise(self.config.n_experts)
        worst = max(apart, key=lambda f: f.gap, default=None)
        gap, at = (worst.gap, f"token {worst.token}") if worst else (0.0, "")
        u = gap / metrics.U
        self.misrouted += [f for f in apart if not f.gap <= limit]
        return replace(tap, rms_u=u, largest_u=u, share=gap / limit, at=at)

    def _bias(self, node):
        """[E]: zeros where a router has none."""
        bias = node.weights.get("bias")
        return reference.f64(self.weights[bias.name]).reshape(-1) if bias else np.zeros(self.config.n_experts)

    def _flips(self, node, layer, got, ids, logits, first):
        score = getattr(reference, node.options["function"])
        value, flips = score(logits) + self._bias(node), []
        for t in np.flatnonzero((np.sort(got, axis=-1) != ids).any(axis=-1)):
            mine, theirs = set(got[t].tolist()), set(ids[t].tolist())
            gap = gap_of_choice(value[t], mine, theirs, node.options["groups"], node.options["top_groups"])
            taken, lost = tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine))
            flips.append(Flip(layer, int(t), taken, lost, gap, bool(t >= first)))
        return flips


def _routing_noise(E):
    """What rounding alone may put between two scores: each within (E/16 + 16) u, twice."""
    return 2 * (E / 16 + 16) * metrics.U


def gap_of_choice(value, mine, theirs, groups, top_groups):
    """How far apart the scores were that decided between two sets of experts; value [E].

    Of experts: the largest difference between one lost and the one taken for it. Of groups, where one was
    taken that is none of the reference's, or none of the experts of one of these is there: that group beside
    the other side's.
    """
    taken, lost = (sorted(a - b, key=lambda e: -value[e]) for a, b in ((mine, theirs), (theirs, mine)))
    gap = float(max((value[b] - value[a] for a, b in zip(taken, lost)), default=0.0))
    if groups == 1:
        return gap
    size = len(value) // groups
    best = np.sort(value.reshape(groups, size), axis=-1)[:, -2:].sum(-1)
    order = np.argsort(-best, kind="stable").tolist()
    chosen, others = order[:top_groups], order[top_groups:]
    strange = [g for g in others if g in {e // size for e in taken}]
    absent = [g for g in chosen if g not in {e // size for e in mine}]
    if strange:
        return float(best[chosen[-1]] - best[strange[-1]])
    return min([gap, *(float(best[g] - best[others[0]]) for g in absent if others)])


# ---- one tap ---------------------------------------------------------------------------------------


def _bounds(node: Node, results, args):
    """The budget of each result; None where the op has none."""
    if node.op in EXACT:
        return tuple(np.zeros(()) for _ in results)
    if node.op == "route_weights":
        given = {a: x for a, x in args.items() if a != "ids"}
        return budget("route", (args["ids"], results[0]), **given)[1:]
    if node.op in RESULTS:
        op, which = RESULTS[node.op]
        return (budget(op, getattr(reference, op)(**args), **args)[which],)
    if node.op not in budget_names():
        return (None,) * len(results)
    return as_tuple(budget(node.op, results if len(results) > 1 else results[0], **args))


def _tap(node, name, actual, desired, own, bound):
    actual = np.asarray(actual)
    total = metrics.measure(actual, desired.reshape(actual.shape))
    alone = metrics.measure(actual, own.reshape(actual.shape))
    share, at = None, alone.worst
    if bound is not None:
        bound = np.broadcast_to(bound, own.shape).reshape(actual.shape)
        share, at = metrics.share_of(actual, own.reshape(actual.shape), bound)
    where = metrics.coordinates(at, _axes(name, actual.ndim)) if at else ""
    return Tap(name, node.op, total.rms_relative, total.largest_relative, alone.rms_u, alone.largest_u,
               share, where, total.nonfinite_apart)


def _axes(name, ndim):
    if name.endswith((".kda.state", ".gdn.state")):
        return "head", "key", "value"
    if name.endswith("_history"):
        return "row", "channel"
    if name.endswith(("moe.ids", "moe.weights")):
        return "token", "slot"
    return metrics.AXES[ndim]


def _of_ids(node, actual, desired, forced):
    """Expert ids: the share of rows that differ stands for the error; given ones are no result."""
    rows = (np.sort(actual, axis=-1) != np.sort(desired, axis=-1)).any(axis=-1)
    apart = int(rows.sum()) if forced else 0
    return Tap(node.tap, node.op, float(rows.mean()), float(rows.any()), apart=apart)
