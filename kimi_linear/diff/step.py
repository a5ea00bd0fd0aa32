"""`step`: one call of one layer again, from a trace that has the states before and after it."""

from __future__ import annotations

import numpy as np

from .. import dataflow
from .._arrays import as_array
from ..trace import BEFORE
from . import metrics
from ._noise import ATTENDS, judged, seen_by, unit_of_arrays
from .blame import NO_TOKENS, WRONG, Blame, Judged, ranked

__all__ = ["step"]


def step(model, trace, layer: int, *, dtype=None) -> Blame:
    """Judge every op of one layer in one call, from the states that the call found.

    A decode step at position 5,000 is judged alone: nothing before it is run.

        trace = model.trace(ids, "layers.2", states="layers.2", tokens_slice=slice(5000, 5001))
        print(kl.diff.step(model, trace, 2))

    Parameters
    ----------
    model : Model or ReferenceModel
        Of the same checkpoint.
    trace : Trace, or mapping from tap to array
        With the layer's taps, and ``before.layers.N...`` for what its state held: of `model.trace` with ``states``, or
        of an adapter. State arrays without ``before.`` are what the call left, and are judged.
    layer : int
    dtype : optional
        The type that they computed in; by default that of the metadata, or the coarsest of the arrays.

    Returns
    -------
    Blame
        Kinds are "right" and "unknown": faults are named by `kimi_linear.diff.blame`, from a sequence's beginning on.

    Raises
    ------
    ValueError
        If the model has no such layer, the trace no tap of it or several sequences, or a tap another shape.
    """
    if not 0 <= layer < model.config.n_layers:
        raise ValueError(f"layer is {layer}; the model has 0..{model.config.n_layers - 1}")
    of_layer = [n for n in dataflow.nodes(model.config) if n.tap.startswith(f"layers.{layer}.")]
    here = [n for n in of_layer if n.tap in trace and n.op != "cache_append"]
    if not here:
        raise ValueError(f"the trace has no tap of layer {layer}: it has {', '.join(list(trace)[:4]) or 'none'}")
    offsets = np.ravel(getattr(trace, "meta", {}).get("offsets", (0, 0)))
    if len(offsets) != 2:
        raise ValueError(f"the trace has {len(offsets) - 1} sequences; it must have one: adapters.vllm.of_slot takes "
                         "one out")
    values = {n: as_array(trace[n], n) for n in trace if not n.startswith(BEFORE)}
    before = {n.removeprefix(BEFORE): as_array(trace[n], n) for n in trace if n.startswith(BEFORE)}
    shapes = {n.tap: n.shape for n in dataflow.nodes(model.config) if n.op != "cache_append"}
    _check(values, shapes, len(values[here[0].tap]))
    position = _position(trace)
    before = before if position else {}  # a pool may hold what another sequence left
    values[dataflow.POSITIONS] = position + np.arange(len(values[here[0].tap]))
    said = getattr(trace, "meta", {}).get("dtype") if dtype is None else dtype
    unit = unit_of_arrays([*values.values(), *before.values()]) if said is None else metrics.stated_unit(said)
    rows, skipped = [], []
    for node in here:
        if not len(values[node.tap]):
            skipped.append((node.tap, NO_TOKENS))
            continue
        lacking = [a for a in node.initial.values() if a not in before] if position else []
        if lacking:
            why = f"the trace lacks {BEFORE}{lacking[0]}, and the call begins at position {position}"
            skipped.append((node.tap, why))
            continue
        try:
            rows += _judge(node, values, before, model.weights, unit)
        except KeyError as error:
            skipped.append((node.tap, str(error.args[0])))
        except ValueError as error:
            skipped.append((node.tap, str(error)))
    return Blame(ranked(rows), skipped, unit, [f"layer {layer} at position {position}, from the state that it found"])


def _check(values, shapes, T):
    """ValueError where a tap has other rows than the layer's first, or other axes than the model's."""
    for tap in values.keys() & shapes.keys():
        x = values[tap]
        if x.shape[:1] != (T,) or x.size != T * int(np.prod(shapes[tap])):
            raise ValueError(f"{tap} has shape {list(x.shape)}; it must be {[T, *shapes[tap]]}")


def _position(trace):
    meta = getattr(trace, "meta", {})
    given = np.ravel(meta.get("position", 0))
    return int(given[0]) if given.size else 0


def _judge(node, values, before, weights, unit):
    """The rows of an op: its tap, and the state that it left."""
    args = dataflow.arguments(node, values, weights, before)
    fixed = {a: args.pop(a) for a in (*node.weights, *node.options) if a in args}
    x = np.asarray(values[node.tap])
    got = [x if x.dtype.kind in "iu" else x.astype(np.float64)]
    if node.state in values:
        got.append(values[node.state].astype(np.float64))

    def run(given):
        results = dataflow.evaluate(node, {**given, **fixed})
        return (results[0].reshape(len(x), *node.shape), *results[1:])

    units = [max(unit, unit_of_arrays([values[n]])) for n in (node.tap, node.state) if n in values]
    with np.errstate(all="ignore"):
        found = judged(run, args, got, unit, units, seen_by(args) if node.op in ATTENDS else None)
    for name, (times, error, at, _) in zip((node.tap, node.state), found):
        kind = "right" if times < WRONG else "unknown"
        axes = ("token",) if name == node.tap else ("head", "key", "value")[-len(at):]
        place = metrics.coordinates(at[:len(axes)], axes) if at else ""
        yield Judged(name, node.op, (name,), times, error, place, kind, where=name)
