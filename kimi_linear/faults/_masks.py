"""Attention, of either op, in which queries see other rows than theirs; and the keys and values of its heads."""

from __future__ import annotations

from functools import partial

import numpy as np

from .. import _reference_fast, reference
from .site import Site

#: What has a row for each cached position.
CACHED = {"attention": "k", "latent_attention": "latent"}


def keys_and_values(op, x):
    """Of each query head, [H, S, n] and [H, S, V], from the op's arguments."""
    if op == "attention":
        group = x["q"].shape[1] // x["k"].shape[1]
        return tuple(np.repeat(reference.f64(x[a]).swapaxes(0, 1), group, axis=0) for a in "kv")
    latent, k_shared, w_uk, w_uv = (reference.f64(x[a]) for a in ("latent", "k_shared", "w_uk", "w_uv"))
    k, v = (latent @ w.swapaxes(1, 2) for w in (w_uk, w_uv))
    return np.concatenate([k, np.broadcast_to(k_shared, (len(w_uk), *k_shared.shape))], axis=-1), v


def masked(seen):
    """A query at position t of its call, from `begin` to `end`, sees the rows from the first to before the second of
    seen(t, begin, end)."""
    def function(call):
        if call.args.get("select") is not None:
            return None  # what a query attends to is then no matter of a mask
        return call.run(by=partial(_attend, call.op, _limits(call, seen)))

    return function


def _limits(call, seen):
    """(sequence, n, S) -> first, end [n] of what its last n rows of S see, and the slices in which neither falls."""
    spans = call.scene.spans() if isinstance(call, Site) else None

    def of_sequence(i, n, S):
        of_rows = [(S - n, S)] * n if spans is None else spans[i]
        seen_by = [seen(t, *span) for t, span in zip(range(S - n, S), of_rows, strict=True)]
        first, end = np.array(seen_by, int).reshape(-1, 2).T
        cuts = np.flatnonzero((np.diff(first) < 0) | (np.diff(end) < 0)) + 1
        return first, end, [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n])]

    return of_sequence


def _attend(op, of_sequence, q, scale, offsets=None, kv_offsets=None, select=None, **rest):
    q = reference.f64(q)
    k, v = keys_and_values(op, {"q": q, **rest})
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    cached = reference.sequences(k.shape[1], offsets if kv_offsets is None else kv_offsets)
    for i, (r, c) in enumerate(zip(reference.sequences(len(q), offsets), cached)):
        first, end, parts = of_sequence(i, r.stop - r.start, c.stop - c.start)
        for p in parts:
            o[r][p] = _reference_fast.attend(q[r][p], k[:, c], v[:, c], scale, first[p], end[p])
    return o


def to_the_end(t, begin, end):
    return 0, end


def not_itself(t, begin, end):
    return 0, max(t, 1)


def cached_alone(t, begin, end):
    """What was cached before the call; of a first call what is right."""
    return 0, begin or t + 1


def last_alone(call, n):
    """A query sees the last n rows alone."""
    return masked(lambda t, begin, end: (max(t + 1 - n, 0), t + 1))(call)


def from_the_left(call):
    """Query t of a call sees rows 0 to t, whatever was cached before it."""
    if not isinstance(call, Site) and len(call["q"]) == len(call[CACHED[call.op]]):
        return None
    return masked(lambda t, begin, end: (0, t - begin + 1))(call)


def one_sequence(call):
    """offsets are ignored: queries see the rows of sequences before their own."""
    if call.args.get("offsets") is None:
        return None
    return call.run(offsets=None, kv_offsets=None)
