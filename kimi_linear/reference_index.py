"""The indexer of sparse attention in float64: keys of pools, their scores, and the positions that a query attends to.

Sources: DeepSeek-V3.2, arXiv:2512.02556 (a key for each position); GLM-5.3-Flash (a key for each pool of them).
"""

from __future__ import annotations

import numpy as np

from ._arrays import check_shape
from ._batches import any_batch
from ._float64 import f64, sequences

__all__ = ["best_first", "index_pool", "index_scores", "index_select", "index_sequences"]


@any_batch
def index_pool(k, gate, ape, *, offsets=None):
    """``keys[p, d] = sum_j softmax_j(gate[p P + j, d] + ape[j, d]) k[p P + j, d]``: k, gate [T, D], ape [P, D].

    Pools are P consecutive tokens from the first of a sequence; complete ones alone -> [sum of len // P, D].
    """
    k, gate, ape = f64(k), f64(gate), f64(ape)
    check_shape(gate, "gate", k.shape)
    check_shape(ape, "ape", ("P", k.shape[1]))
    (P, D), keys = ape.shape, [np.zeros((0, k.shape[1]))]
    for r in sequences(len(k), offsets):
        n = (r.stop - r.start) // P
        whole = slice(r.start, r.start + n * P)
        logits = gate[whole].reshape(n, P, D) + ape
        e = np.exp(logits - logits.max(1, keepdims=True))
        p = e / e.sum(1, keepdims=True)
        keys.append((p * k[whole].reshape(n, P, D)).sum(1))
    return np.concatenate(keys)


@any_batch
def index_scores(q, keys, weights, *, scale, pool, offsets=None, positions=None):
    """``s[t, p] = scale sum_h weights[t, h] max(0, q[t, h] . keys[p])``, -inf where pool p is not complete for query t.

    q [T, H, D]; keys [sum of positions // pool, D], one sequence behind the other; weights [T, H]; positions [N] or an
    int, those of the queries alone where None -> [T, most pools]. Query t of L is at position ``positions - L + t``.
    """
    q, keys, weights = f64(q), f64(keys), f64(weights)
    rows, positions = index_sequences(len(q), offsets, positions)
    scores = np.full((len(q), max((S // pool for S in positions), default=0)), -np.inf)
    check_shape(keys, "keys", (sum(S // pool for S in positions), q.shape[2]))
    first = 0
    for r, S in zip(rows, positions, strict=True):
        n = S // pool
        dots = np.einsum("thd,pd->thp", q[r], keys[first:first + n])
        s = scale * np.einsum("th,thp->tp", weights[r], np.maximum(dots, 0.0))
        complete = _seen(r, S) // pool
        scores[r, :n] = np.where(np.arange(n) < complete[:, None], s, -np.inf)
        first += n
    return scores


@any_batch
def index_select(q, keys, weights, *, topk, pool, offsets=None, positions=None):
    """The positions that each query attends to, rising, -1 behind the last: [T, topk + pool - 1] int32.

    Of the pools complete for it the ``topk // pool`` with the largest `index_scores` (scale 1; the lower pool among
    equals, NaN above all), or all where they are no more; and the positions of its incomplete pool, up to its own.
    """
    if pool < 1 or topk < 1 or topk % pool:
        raise ValueError(f"topk is {topk}; it must be a multiple of pool = {pool}")
    scores = index_scores(q, keys, weights, scale=1.0, pool=pool, offsets=offsets, positions=positions)
    ids = np.full((len(scores), topk + pool - 1), -1, np.int32)
    for r, S in zip(*index_sequences(len(scores), offsets, positions), strict=True):
        for t, seen in zip(range(r.start, r.stop), _seen(r, S), strict=True):
            complete = seen // pool
            chosen = np.sort(best_first(scores[t, :complete])[:topk // pool])
            whole = (chosen[:, None] * pool + np.arange(pool)).ravel()
            row = np.concatenate([whole, np.arange(complete * pool, seen)])
            ids[t, :len(row)] = row
    return ids


def best_first(scores):
    """Pools by their scores [n], the largest first, the lower pool among equals; NaN is above all."""
    return np.lexsort((-np.where(np.isnan(scores), np.inf, scores), ~np.isnan(scores)))


def index_sequences(T, offsets, positions):
    """Rows of each sequence's queries, and how many positions each has."""
    rows = sequences(T, offsets)
    lengths = [r.stop - r.start for r in rows]
    if positions is None:
        return rows, lengths
    positions = [int(S) for S in np.broadcast_to(positions, len(rows))]
    for n, (S, L) in enumerate(zip(positions, lengths, strict=True)):
        if S < L:
            raise ValueError(f"sequence {n} has {S} positions for {L} queries; the queries' own must be among them")
    return rows, positions


def _seen(r, S):
    """Positions that each query of a sequence sees."""
    L = r.stop - r.start
    return S - L + 1 + np.arange(L)
