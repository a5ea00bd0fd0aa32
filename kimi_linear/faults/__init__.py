"""A catalogue of faults that ports of this model family had: each a wrong form of one op, to plant and to know again.

A `Fault` names the ops that it can be at, the scenario in which it shows, and a function that computes the op's
wrong result in float64 from the op's inputs. The same function plants it (`run` with ``plant=``) and recognises it
(`kimi_linear.diff.blame`): a foreign result that the function reproduces has that fault.

    for fault in kl.faults.for_op("delta_rule"):
        print(fault.name, fault.text)
    theirs = kl.faults.run(model, tokens, plant={"layers.2.kda.o": "decay_after_update"})
    print(kl.diff.blame(model, theirs))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import dataflow
from .._names import Named, near
from ..trace import Trace
from . import (
    _any,
    _attention,
    _backward,
    _backward_kda,
    _delta_backward,
    _depth,
    _index,
    _inputs,
    _kda,
    _layer_norm,
    _limit,
    _mhc,
    _mla,
    _moe,
    _pieces,
    _residuals,
    _select,
    _streams,
)
from ._fault import (
    BOTH,
    CALL,
    CHUNKS,
    CHUNKS_SPLIT,
    FAINT,
    LARGE,
    LONG,
    RESTORED,
    RUN,
    SEVERAL,
    SPLIT,
    STRONG,
    TIES,
    WHOLE,
    Fault,
)
from .scene import Scene
from .site import Call, Site

__all__ = [
    "BOTH", "CALL", "CATALOGUE", "CHUNKS", "CHUNKS_SPLIT", "FAINT", "LARGE", "LONG", "RESTORED", "RUN", "SEVERAL",
    "SPLIT", "STRONG", "TIES", "WHOLE", "Call", "Fault", "Scene", "Site", "at", "by_name", "for_op", "mistakes", "run",
]

_PARTS = (_kda, _delta_backward, _mla, _index, _select, _attention, _residuals, _mhc, _streams, _depth, _pieces, _moe,
          _backward, _backward_kda, _any, _layer_norm, _limit, _inputs)
_ALL = tuple(f for part in _PARTS for f in part.FAULTS)

#: Every fault that is planted in a model, by name.
CATALOGUE: dict[str, Fault] = Named("a fault of the catalogue", {f.name: f for f in _ALL if f.use != CALL})


def by_name(name: str) -> Fault:
    """A fault of the catalogue.

    Raises
    ------
    ValueError
        If there is none of that name; near names are shown.
    """
    if name not in CATALOGUE:
        raise ValueError(f"{name!r} is no fault of the catalogue; near it are {', '.join(near(name, CATALOGUE))}")
    return CATALOGUE[name]


def for_op(op: str) -> list[Fault]:
    """The faults that an op can have, its own before those of any op."""
    own = [f for f in CATALOGUE.values() if op in f.ops]
    return own + [f for f in CATALOGUE.values() if "*" in f.ops]


def mistakes(op: str) -> list[Fault]:
    """The faults that one call of an op can have, those of any op last: what `kimi_linear.testing.check_op` tries."""
    return [f for wanted in (op, "*") for f in _ALL if wanted in f.ops and f.use != RUN]


def at(node: dataflow.Node, scene: Scene) -> list[Fault]:
    """The faults that a node can have, and that can show in such calls."""
    return [f for f in for_op(node.op) if f.concerns(node) and f.shows_in(scene)]


def run(model, tokens, *, plant: Mapping[str, object] | None = None, positions: Sequence | None = None,
        after: Callable[[str, np.ndarray], np.ndarray] | None = None) -> list[Trace]:
    """A float64 forward pass with every tap, and with faults where they are planted.

    Parameters
    ----------
    model : Model or ReferenceModel
    tokens : list of calls, each a list of sequences, each a list of ids
        One list of ids is one call of one sequence.
    plant : mapping from tap to fault, optional
        A `Fault`, the name of one, or a pair of it and a choice (by default its first); or a function from the Site
        to the op's result.
    positions : sequence, optional
        For each call None, or the position at which each sequence is put back before it.
    after : callable, optional
        (tap, result) -> what is handed on, and traced: rounding, noise.

    Returns
    -------
    list of Trace
        One for each call, in the shapes that ``model.trace`` gives.

    Raises
    ------
    ValueError
        If a fault cannot be at its tap, or there is no token.
    """
    calls = _calls(tokens)
    offsets = [np.cumsum([0, *map(len, call)]) for call in calls]
    scene = Scene(offsets, positions)
    ids = [np.concatenate([np.asarray(s, np.int64) for s in call]) for call in calls]
    values = {dataflow.TOKENS: scene.lay(ids), dataflow.POSITIONS: scene.positions()}
    plant = dict(plant or {})
    with np.errstate(all="ignore"):
        table = dataflow.table(model.config)
        for node in table.values():
            if node.op == "cache_append":
                continue
            site = Site.of(node, values, model.weights, scene, table)
            y = _planted(plant.pop(node.tap), site) if node.tap in plant else site.shaped(site.run())
            values[node.tap] = y if after is None else after(node.tap, y)
    if plant:
        raise ValueError(f"plant names {', '.join(plant)}; this model has no such tap")
    given = {dataflow.TOKENS, dataflow.POSITIONS, *(node.tap for node in table.values() if node.op == "index_pool")}
    taps = {tap: scene.split(x) for tap, x in values.items() if tap not in given}
    positions = list(positions) if positions is not None else [None] * len(calls)
    return [Trace({tap: parts[c] for tap, parts in taps.items()}, _meta(ids[c], offsets[c], positions[c]))
            for c in range(len(calls))]


def _calls(tokens):
    """Calls of sequences of ids, from these, from sequences, or from ids."""
    depth = _depth(tokens)
    if not 1 <= depth <= 3:
        what = "has no token" if depth <= 0 else f"is {depth} deep"
        raise ValueError(f"tokens {what}; it must be ids, a list of sequences of them, or a list of calls of those")
    return tokens if depth == 3 else [tokens] if depth == 2 else [[tokens]]


def _depth(x):
    """How many lists are around an id; below 0 where there is no id."""
    return 1 + max(map(_depth, x), default=-9) if np.iterable(x) and not isinstance(x, str) else 0


def _meta(ids, offsets, position):
    meta = {"tokens": ids.tolist(), "offsets": offsets.tolist(), "source": "kimi_linear.faults"}
    return meta if position is None else {**meta, "position": np.ravel(position).tolist()}


def _planted(fault, site):
    if callable(fault) and not isinstance(fault, Fault):
        return site.shaped(fault(site))
    fault, choice = fault if isinstance(fault, tuple) else (fault, None)
    fault = by_name(fault) if isinstance(fault, str) else fault
    choice = fault.choices[0] if choice is None else choice
    y = fault.result(site, choice) if fault.concerns(site.node) else None
    if y is None:
        raise ValueError(f"{fault.name} cannot be at {site.node.tap} ({site.node.op})")
    return y
