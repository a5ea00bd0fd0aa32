"""`Call` and `Site`: an op with its inputs, alone or at its place of a pass, to be run rightly or wrongly in float64.

A fault's function takes either: both have `op`, `args`, ``[argument]``, `inputs` and `run`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from .. import dataflow, reference
from .._arrays import as_tuple
from ..dataflow import Node
from ..editing import rising
from ._pools import POOLED
from .scene import Branch, Scene

__all__ = ["CARRIED", "Call", "Site", "through"]

#: The ops that carry a state, and their arguments that have a row a token.
CARRIED = {
    "short_conv": ("x",),
    "delta_rule": ("q", "k", "v", "g", "beta"),
    "latent_attention": ("q", "latent", "k_shared", "select"),
    "attention": ("q", "k", "v"),
    "index_pool": ("k", "gate"),
    "index_select": ("q", "keys", "weights"),
}


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes
    ----------
    op : str
    args : mapping from argument to value
    wrongly : callable(Call) -> results, optional
        What runs in place of the reference: another fault, to have two at once.
    """

    op: str
    args: Mapping[str, Any]
    wrongly: Callable | None = None

    def __getitem__(self, argument: str):
        """An argument; arrays in float64."""
        return _widened(self.args[argument])

    @property
    def inputs(self) -> list[str]:
        """Arguments that are arrays of reals, but for biases."""
        reals = [a for a, x in self.args.items() if isinstance(x, np.ndarray) and x.dtype.kind not in "iu"]
        return [a for a in reals if "bias" not in a]

    def results(self, by: Callable | None = None, **changes) -> tuple[np.ndarray, ...]:
        """All results: of the op, or of ``by(**arguments)``, on arguments that are right but for `changes`."""
        args = {**self.args, **changes}
        if by is not None:
            return as_tuple(by(**args))
        if self.wrongly is not None:
            return as_tuple(self.wrongly(Call(self.op, args)))
        return dataflow.evaluate(Node("", self.op, (), {}), args)

    def run(self, by: Callable | None = None, **changes) -> np.ndarray:
        """The first of `results`."""
        return self.results(by, **changes)[0]


def _widened(x):
    return reference.f64(x) if isinstance(x, np.ndarray) and x.dtype.kind not in "iu" else x


@dataclass(frozen=True)
class Site:
    """What a fault's function gets.

    Attributes
    ----------
    node : Node
    args : mapping from argument to value
        As `kimi_linear.dataflow.arguments` has them, all rows of the scene end to end; ``rate`` is not rounded.
    scene : Scene
    values : mapping from tap to array
        What else is known of the run; of a ChainMap the last gives what the run gave.
    weights : mapping from canonical name to array
    table : mapping from tap to Node
        All of the model's, where they are known.
    """

    node: Node
    args: Mapping[str, Any]
    scene: Scene
    values: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    table: Mapping[str, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Node, values, weights, scene: Scene, table: Mapping[str, Node] | None = None) -> Site:
        """The site of a node, its inputs taken from `values`; KeyError where one is missing."""
        args = dataflow.arguments(node, values, weights)
        if "rate" in node.weights:
            args["rate"] = np.exp(reference.f64(weights[node.weights["rate"].name])).reshape(-1)
        return cls(node, args, scene, values, weights, table or {})

    def of_node(self, node: Node) -> Site:
        """The site of another node of the same run."""
        return Site.of(node, self.values, self.weights, self.scene, self.table)

    def with_weights(self, **weights: dataflow.Weight) -> np.ndarray:
        """The op's first result with other tensors of the checkpoint."""
        return self.of_node(replace(self.node, weights={**self.node.weights, **weights})).run()

    def __getitem__(self, argument: str):
        """An argument; arrays in float64."""
        return _widened(self.args[argument])

    @property
    def op(self) -> str:
        """The node's."""
        return self.node.op

    @property
    def inputs(self) -> list[str]:
        """Arguments that come from taps, if reals."""
        arguments = dict.fromkeys(a.split(".")[0] for a in self.node.inputs)  # snapshots.0, snapshots.1, .. are one
        return [a for a in arguments if np.asarray(self.args[a]).dtype.kind not in "iu"]

    def has(self, tap: str) -> bool:
        """Whether the run gave a tap, and it was not made of others on the way to this op."""
        values = self.values
        while isinstance(values, ChainMap):
            values = values.maps[-1]
        return tap in values

    def tap(self, name: str) -> np.ndarray:
        """Another tap of the run, made rightly of the others where it is not known; KeyError where it cannot be."""
        if name in self.values or name not in self.table:
            return reference.f64(self.values[name])
        node = self.table[name]
        made = {tap: self.tap(tap) for tap in node.inputs.values() if tap not in self.values}
        site = Site.of(node, ChainMap(made, self.values), self.weights, self.scene, self.table)
        return site.shaped(site.run())

    def sibling(self, name: str) -> np.ndarray | None:
        """Another tap of the same layer, or None where it is not known."""
        layer = self.node.tap.split(".")[1]
        x = self.values.get(f"layers.{layer}.{name}")
        return None if x is None else reference.f64(x)

    def run(self, by: Callable | None = None, *, branches: Sequence[Branch] | None = None,
            past: Mapping[str, np.ndarray] | None = None, **changes) -> np.ndarray:
        """The op's first result, right but for what is changed.

        Parameters
        ----------
        by : callable(**arguments), optional
            What to run in place of the op; ops that carry a state get `offsets`, too. Where it gives None so does this.
        branches : list of Branch, optional
            How states are carried; by default rightly.
        past : mapping from argument to array, optional
            Other rows for the past of each branch.
        **changes
            Arguments to replace.
        """
        args = {**self.args, **changes}
        by = by or partial(_evaluated, self.node)
        if self.node.op not in CARRIED:
            return _first(by, **args)
        if self.node.op in POOLED:
            by = partial(POOLED[self.node.op], partial(_first, by))
        carried = [a for a in CARRIED[self.node.op] if args.get(a) is not None]
        return through(by, args, carried, branches or self.scene.branches(), past or {})

    def by_calls(self, rule: Callable[[dict], tuple]) -> np.ndarray | None:
        """The outputs of a delta rule whose every call begins with the state that `rule` left.

        ``rule(arguments)`` gives (o, state) of the rows of one sequence in one call; one row alone is right. None where
        a sequence was put back: its state there is not known.
        """
        if self.scene.is_restored:
            return None
        o, state = np.empty(self.args["v"].shape), None
        for p in self.scene.pieces:
            if len(p.rows):
                args = {**self.args, **{a: self.args[a][p.rows] for a in CARRIED[self.op]}}
                args["initial_state"] = None if p.first else state
                o[p.rows], state = rule(args) if len(p.rows) > 1 else dataflow.evaluate(self.node, args)
        return o

    def last_states(self) -> np.ndarray:
        """The states, [N, ...], that the op leaves behind the last token of each sequence."""
        branches = self.scene.branches()
        ends = {p.sequence: p.rows[-1] for p in self.scene.pieces if len(p.rows)}
        states = []
        for end in ends.values():
            rows = np.concatenate(next(b for b in branches if end in b.own))
            args = {**self.args, **{a: self.args[a][rows] for a in CARRIED[self.node.op]}}
            states.append(dataflow.evaluate(self.node, args)[1])
        return np.array(states)

    def shaped(self, y: np.ndarray) -> np.ndarray:
        """A result [T, ...] in the tap's axes."""
        return y.reshape(len(y), *self.node.shape)


def through(by: Callable, args, carried, branches: Sequence[Branch], past) -> np.ndarray:
    """An op that carries a state, over branches: [rows, ...]; the arguments `carried` have a row a token."""
    args = dict(args)
    rows = np.concatenate([np.concatenate(b) for b in branches])
    owned = np.concatenate([np.repeat([False, True], [len(b.past), len(b.own)]) for b in branches])
    T = len(args[carried[0]])
    for a in carried:
        x = args[a][rows]
        if a in past:
            x = np.where(owned.reshape(-1, *[1] * (x.ndim - 1)), x, past[a][rows])
        args[a] = x
    offsets = np.cumsum([0, *(len(b.past) + len(b.own) for b in branches)])
    y = as_tuple(by(**{**args, "offsets": offsets}))[0]
    if y is None:
        return None
    out = np.empty((T, *y.shape[1:]), y.dtype if y.dtype.kind in "iu" else np.float64)
    out[rows[owned]] = y[owned]
    return out


def _first(by, **args):
    return as_tuple(by(**args))[0]


def _evaluated(node, **args):
    if node.op == "delta_rule" and (np.asarray(args["g"]) > 0).any():
        from ._delta import wrong  # the reference refuses a growing state; a foreign run may have one

        return wrong(args)
    if args.get("select") is not None:
        args["select"] = _within_sight(args["select"], args.get("offsets"))
    return dataflow.evaluate(node, args)


def _within_sight(select, offsets):
    """What queries see of the positions that they select, as the reference takes them: rising, then -1."""
    select, own = np.asarray(select), np.empty(len(select), np.int64)
    for r in reference.sequences(len(select), offsets):
        own[r] = np.arange(r.stop - r.start)
    select = rising(np.where(select > own[:, None], -1, select))
    again = np.diff(select, axis=-1, prepend=-2) == 0
    return rising(np.where(again, -1, select))
