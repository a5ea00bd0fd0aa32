"""Faults of attention to selected positions."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import CALL, Fault, of_call
from ._masks import keys_and_values


class _Query:
    """A query of a call: its row t, its own position, the rows of its sequence and what it selects of them."""

    def __init__(self, t, own, cached, chosen):
        self.t, self.own, self.cached, self.chosen = t, own, cached, chosen


def queries(call):
    """All, in order."""
    select, offsets, kv_offsets = (call.args.get(a) for a in ("select", "offsets", "kv_offsets"))
    cached = reference.sequences(len(call["latent"]), offsets if kv_offsets is None else kv_offsets)
    found = []
    for r, c in zip(reference.sequences(len(call["q"]), offsets), cached, strict=True):
        before = c.stop - c.start - (r.stop - r.start)
        found += [_Query(t, before + t - r.start, c, select[t][select[t] >= 0]) for t in range(r.start, r.stop)]
    return found


def attending(wrong):
    """A query attends to the positions that ``wrong(query, select, *choice)`` gives, counted within its sequence (one
    may be there twice); None where none of them gives others than are right."""
    def function(call, *choice):
        if call.args.get("select") is None:
            return None
        of = queries(call)
        lists = [wrong(q, call.args["select"], *choice) for q in of]
        if all(np.array_equal(a, q.chosen) for a, q in zip(lists, of)):
            return None
        return _attend(call, of, lists)

    return function


def _attend(call, of, lists, values_of=None):
    """o of lists of positions; the values are those of the positions ``values_of(list)`` where that is given."""
    q, scale = call["q"], call.args["scale"]
    k, v = keys_and_values(call.op, call)
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for query, positions in zip(of, lists):
        rows = query.cached.start + np.asarray(positions, int)
        if len(rows) == 0:
            continue
        p = reference.softmax(scale * (k[:, rows] @ q[query.t][:, :, None])[..., 0])
        of_values = rows if values_of is None else query.cached.start + values_of(positions)
        o[query.t] = (p[:, None] @ v[:, of_values])[:, 0]
    return o


def everything(call):
    """The selection is ignored."""
    return call.run(select=None) if call.args.get("select") is not None else None


def none_read_as(query, select, which):
    """Each -1 is one more time the last position (an index from the end), or the first (clamped)."""
    added = np.full(select.shape[1] - len(query.chosen), 0)
    if which == "the last of its sequence":
        added += query.cached.stop - query.cached.start - 1
    return np.concatenate([query.chosen, added])


def with_itself(query, select):
    return np.union1d(query.chosen, query.own)


def of_neighbour(query, select, step):
    """The row of another query; what of it the query does not see is left out."""
    row = select[(query.t + step) % len(select)]
    return row[(row >= 0) & (row <= query.own)]


def shifted(query, select, by):
    """Positions counted from another number than 0; what is then none is left out."""
    moved = query.chosen + by
    return moved[(moved >= 0) & (moved < query.cached.stop - query.cached.start)]


def complement(query, select):
    return np.setdiff1d(np.arange(query.own + 1), query.chosen)


def less_last(query, select):
    return query.chosen[:select.shape[1] - 1]


def from_the_batch(call):
    """Positions are rows of all sequences' caches end to end."""
    if call.args.get("select") is None or call.args.get("offsets") is None:
        return None
    of, S = queries(call), len(call["latent"])
    for query in of:
        query.cached = slice(0, S)
    return _attend(call, of, [q.chosen for q in of])


def not_renormalised(call):
    """The softmax is over all that a query sees; what is not selected is left out of the sum behind it."""
    if call.args.get("select") is None:
        return None
    q, scale = call["q"], call.args["scale"]
    k, v = keys_and_values(call.op, call)
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for query in queries(call):
        first, chosen = query.cached.start, query.chosen
        p = reference.softmax(scale * (k[:, first:first + query.own + 1] @ q[query.t][:, :, None])[..., 0])
        o[query.t] = (p[:, None, chosen] @ v[:, first + chosen])[:, 0]
    return o


def values_not_gathered(call):
    """Weights of the selected positions on the values of as many first ones."""
    if call.args.get("select") is None:
        return None
    of = queries(call)
    return _attend(call, of, [q.chosen for q in of], values_of=lambda positions: np.arange(len(positions)))


def row_per_head(call):
    """select is read as [T, H, W]: head h of query t has row t H + h, of as many as there are."""
    select, H = call.args.get("select"), call["q"].shape[1]
    if select is None or H == 1:
        return None
    of, o = queries(call), 0
    for h in range(H):
        rows = [select[(query.t * H + h) % len(select)] for query in of]
        lists = [row[(row >= 0) & (row <= query.own)] for row, query in zip(rows, of)]
        found = _attend(call, of, lists)
        o = o + found * (np.arange(H) == h)[:, None]
    return o


def _fault(name, text, function, **named):
    return Fault(name, text, ("latent_attention",), of_call(function), **named)


SPARSE = "DeepSeek-V3.2, arXiv:2512.02556"
KERNEL = "FlashMLA's sparse kernels: indices [s_q, h_kv, topk], -1 for none"

FAULTS = (
    _fault("select_ignored", "the selection is ignored: queries attend to all that they see", everything,
           source=SPARSE),
    _fault("select_none_is_a_position", "-1 is read as a position", attending(none_read_as),
           choices=(("the last of its sequence",), ("the first",)), each="-1 is read as a position, {}", source=KERNEL),
    _fault("select_from_the_batch", "selected positions are counted from the batch's first row, not the sequence's",
           from_the_batch, use=CALL, source=KERNEL),  # of a run, state_leaks_between_sequences is the same
    _fault("select_with_itself", "a query attends to its own position, selected or not", attending(with_itself),
            source=SPARSE),
    _fault("select_not_renormalised", "the softmax is over all positions, of which the selected are then kept",
           not_renormalised, source=SPARSE),
    _fault("select_of_neighbour", "a query has another query's row of the selection", attending(of_neighbour),
            choices=((1,), (-1,)), each="a query has the selection of the query {:+d} from it"),
    _fault("select_shifted", "selected positions do not count from 0", attending(shifted),
           choices=((-1,), (1,)), each="selected positions are moved by {:+d}"),
    _fault("select_row_per_head", "the selection is read as [T, H, W], a row for each head", row_per_head,
           source=KERNEL),
    _fault("select_complement", "the selected positions are left out, and the others attended to",
           attending(complement), source="boolean masks: True to keep, or to mask"),
    _fault("select_less_last", "the last entry of a full row is not read", attending(less_last)),
    _fault("select_values_not_gathered", "keys are of the selected positions, values of as many first ones",
           values_not_gathered),
)
