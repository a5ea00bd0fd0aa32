"""A `Site`: one op of the pass at one place, with its inputs, to be run rightly or wrongly in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import dataflow, reference
from ..dataflow import Node
from .scene import Branch, Scene

__all__ = ["CARRIED", "Site", "through"]

#: The ops that carry a state, and their arguments that have a row a token.
CARRIED = {
    "short_conv": ("x",),
    "delta_rule": ("q", "k", "v", "g", "beta"),
    "latent_attention": ("q", "latent", "k_shared"),
}


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
        What else is known of the run.
    weights : mapping from canonical name to array
    """

    node: Node
    args: Mapping[str, Any]
    scene: Scene
    values: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, node: Node, values, weights, scene: Scene) -> Site:
        """The site of a node, its inputs taken from `values`; KeyError where one is missing."""
        args = dataflow.arguments(node, values, weights)
        if "rate" in node.weights:
            args["rate"] = np.exp(reference.f64(weights[node.weights["rate"].name])).reshape(-1)
        return cls(node, args, scene, values, weights)

    def __getitem__(self, argument: str):
        """An argument; arrays in float64."""
        x = self.args[argument]
        return reference.f64(x) if isinstance(x, np.ndarray) and x.dtype.kind not in "iu" else x

    def sibling(self, name: str) -> np.ndarray | None:
        """Another tap of the same layer, or None where it is not known."""
        layer = self.node.tap.split(".")[1]
        x = self.values.get(f"layers.{layer}.{name}")
        return None if x is None else reference.f64(x)

    def run(self, branches: Sequence[Branch] | None = None, past: Mapping[str, np.ndarray] | None = None,
            **changes) -> np.ndarray:
        """The op's first result, right but for what is changed.

        Parameters
        ----------
        branches : list of Branch, optional
            How states are carried; by default rightly.
        past : mapping from argument to array, optional
            Other rows for the past of each branch.
        **changes
            Arguments to replace.
        """
        args = {**self.args, **changes}
        if self.node.op not in CARRIED:
            return dataflow.evaluate(self.node, args)[0]
        return through(self.node, args, branches or self.scene.branches(), past or {})

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


def through(node: Node, args, branches: Sequence[Branch], past) -> np.ndarray:
    """An op that carries a state, over branches: [rows, ...]."""
    args = dict(args)
    rows = np.concatenate([np.concatenate(b) for b in branches])
    owned = np.concatenate([np.repeat([False, True], [len(b.past), len(b.own)]) for b in branches])
    T = len(args[CARRIED[node.op][0]])
    for a in CARRIED[node.op]:
        x = args[a][rows]
        if a in past:
            x = np.where(owned.reshape(-1, *[1] * (x.ndim - 1)), x, past[a][rows])
        args[a] = x
    offsets = np.cumsum([0, *(len(b.past) + len(b.own) for b in branches)])
    y = _evaluate(node, args, offsets)[owned]
    out = np.empty((T, *y.shape[1:]))
    out[rows[owned]] = y
    return out


def _evaluate(node, args, offsets):
    if node.op == "delta_rule" and (np.asarray(args["g"]) > 0).any():
        from ._kda import recurrence  # the reference refuses a growing state; a foreign run may have one

        return recurrence(*(reference.f64(args[a]) for a in CARRIED["delta_rule"]), offsets=offsets)
    return dataflow.evaluate(node, {**args, "offsets": offsets})[0]
