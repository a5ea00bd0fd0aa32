"""Faults of attention over pieces of the keys (split-K, flash-decoding), which are to be merged by their sums."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import LONG, SPLIT, Fault
from ._masks import CACHED, keys_and_values
from .site import Site

#: How many positions a piece has, of S that a call has.
LENGTHS = {f"pieces of {n}": lambda S, n=n: n for n in (16, 32, 64, 128, 256, 512)}
COUNTS = {f"{n} pieces": lambda S, n=n: -(-S // n) for n in (2, 4, 8, 16)}
DECODING = " in calls of one token"  # behind a cut: in a run, longer calls are right


def in_pieces(merged, onward=False):
    """The fault that merges wrongly what pieces give, each its sum of exp(score - m) v, m its largest score.

    ``merged(l)`` are the pieces' factors [H, P], of the sums of exp(score - m), l. `onward`: m is the largest so far.
    """
    def function(call, cut):
        cut, decoding, _ = cut.partition(DECODING)
        of_run, length = isinstance(call, Site), (LENGTHS | COUNTS)[cut]
        pairs = list(_of_run(call) if of_run else _of_call(call))
        wanted = [pair for pair in pairs if len(pair[0]) == 1] if decoding else pairs
        if decoding and (not of_run or cut in LENGTHS and len(wanted) == len(pairs)):
            return None
        if all(length(len(seen)) >= len(seen) for _, seen in wanted):
            return None
        q, (k, v), scale = call["q"], keys_and_values(call.op, call), call.args["scale"]
        o = call.run() if len(wanted) < len(pairs) else np.zeros((*q.shape[:2], v.shape[-1]))
        for rows, seen in wanted:
            keys, values, select = k[:, seen], v[:, seen], call.args.get("select")
            chosen = reference.seen_by(len(rows), len(seen), None if select is None else select[rows])
            for t, s in zip(rows, chosen):
                o[t] = _attend(q[t], keys[:, s], values[:, s], scale, length(len(seen)), merged, onward)
        return o

    return function


def _attend(q, k, v, scale, length, merged, onward):
    """One query [H, n] over positions in pieces of a length."""
    s = scale * (k @ q[..., None])[..., 0]
    if s.shape[1] == 0:
        return 0.0
    first, piece = np.arange(0, s.shape[1], length), np.arange(s.shape[1]) // length
    m = np.maximum.reduceat(s, first, axis=1)
    e = np.exp(s - (np.maximum.accumulate(m, axis=1) if onward else m)[:, piece])
    p = e * merged(np.add.reduceat(e, first, axis=1))[:, piece]
    return (p[:, None] @ v)[:, 0]


def _of_call(call):
    """(rows, positions) of each sequence that has rows."""
    offsets, kv_offsets = call.args.get("offsets"), call.args.get("kv_offsets")
    S = len(call.args[CACHED[call.op]])
    cached = reference.sequences(S, offsets if kv_offsets is None else kv_offsets)
    for r, c in zip(reference.sequences(len(call.args["q"]), offsets), cached, strict=True):
        if r.stop > r.start:
            yield np.arange(r.start, r.stop), np.arange(c.start, c.stop)


def _of_run(site):
    """The same of each call of a run: positions are the rows behind it, and its own."""
    for piece, past in site.scene.pasts():
        yield piece.rows, np.concatenate([past, piece.rows])


def _last(l):
    return np.where(np.arange(l.shape[1]) == l.shape[1] - 1, 1 / l, 0.0)


def _fault(name, text, merged, scenario=LONG, onward=False):
    lengths, counts = (tuple((cut,) for cut in cuts) for cuts in (LENGTHS, COUNTS))
    decoding = tuple((cut + DECODING,) for (cut,) in lengths + counts)
    return Fault(name, text, ("attention", "latent_attention"), in_pieces(merged, onward), scenario,
                 choices=lengths, more=counts, in_runs=decoding, each=f"{text}: {{}}", rare=True,
                 source="flash-decoding; arXiv:2205.14135, algorithm 1")


def _as_one(l):
    return np.broadcast_to(1 / l.sum(1, keepdims=True), l.shape)


FAULTS = (
    _fault("pieces_averaged", "results of pieces of the keys are averaged, not weighted by their sums of exp",
           lambda l: 1 / l / l.shape[1]),
    _fault("pieces_added", "results of pieces of the keys are added, each divided by its own sum of exp",
           lambda l: 1 / l),
    _fault("pieces_not_rescaled", "sums of pieces of the keys, each from its own largest score, are added as they are",
           _as_one),
    _fault("pieces_before_not_rescaled", "sums of pieces of the keys are not rescaled where a later one has a larger "
           "score", _as_one, onward=True),
    _fault("pieces_last_alone", "of the pieces of the keys the last alone is kept", _last,
           SPLIT),  # in one call pieces of a length are the blocks of `state_lost_between_blocks`
)
