"""The indexer of sparse attention: keys of pools, their scores, and the positions that a query attends to."""

import numpy as np

from .. import _core
from .._arrays import as_float32, as_integers, as_offsets, check_shape, output, refuse_shared, sequences_of
from .._scalars import as_finite, at_least
from ..context import current
from ._cached import as_cache, typed

__all__ = ["index_pool", "index_scores", "index_select"]

_PAGE = 512  # positions of a cache's page: no pool crosses one


def index_pool(k, gate, ape, *, offsets=None, out=None, ctx=None):
    """Keys of pools: of each P consecutive tokens the mean of their keys, weighed in each channel by its own softmax.

    ``keys[p, d] = sum_j softmax_j(gate[p P + j, d] + ape[j, d]) * k[p P + j, d]``. Pools are counted from the first
    token of a sequence; a last one that is not complete has no key. What is not a number stays in its channel and pool.

    Source: GLM-5.3-Flash (k-pool compression), for the indexer of DeepSeek-V3.2, arXiv:2512.02556. Derivation:
    docs/math.md#index_pool.

    Parameters
    ----------
    k : (T, D) or (B, T, D) float32
        Keys of tokens, after their norm.
    gate : as `k`
        What each token is weighed by in its pool, before the softmax.
    ape : (P, D) float32
        Added to the gate by place in the pool; P divides 512, and D.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    out : float32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    keys : (pools, D) float32
        ``len // P`` of each sequence, one sequence behind the other; (B, T // P, D) of a batch.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, `offsets` do not rise from 0 to T, or `out` overlaps an input.
    """
    k = as_float32(k, "k", ("T", "D"), ("B", "T", "D"))
    gate = as_float32(gate, "gate", k.shape)
    ape = as_float32(ape, "ape", ("P", k.shape[-1]))
    P, D = ape.shape
    if D < 1:
        raise ValueError(f"k has shape {list(k.shape)}; D must be >= 1")
    if P < 1 or _PAGE % P or D % P:
        raise ValueError(f"ape has shape {list(ape.shape)}; its rows, the pool, must divide {_PAGE} and D = {D}")
    batch = k.shape[:1] if k.ndim == 3 else ()
    offsets, _ = sequences_of(k, "k", 2, offsets)
    N, T = len(offsets) - 1, k.size // D
    pools = int((np.diff(offsets) // P).sum())
    keys = output(out, (*batch, k.shape[1] // P, D) if batch else (pools, D), like=k)
    refuse_shared(keys, k=k, gate=gate, ape=ape)
    rows = output(None, (T, 2 * D), like=k)
    _core.index_pool(current(ctx)._core, keys, 0, rows, 0, k, gate, ape, offsets, np.zeros(N, np.int64), offsets,
                     (N, T, T, D, P))
    return keys


def index_scores(q, keys, weights, *, scale, pool, offsets=None, positions=None, out=None, ctx=None):
    """How much each query would look at each pool: ``scale * sum_h weights[t, h] * max(0, q[t, h] . keys[p])``.

    -infinity where the pool is not complete for the query: the pool's last position is behind the query's own. The
    queries are the last of their sequence's positions: query t of L is at position ``positions - L + t``.

    Source: DeepSeek-V3.2, arXiv:2512.02556 (the lightning indexer; ``pool=1``); in pools GLM-5.3-Flash. Derivation:
    docs/math.md#index_scores.

    Parameters
    ----------
    q : (T, H, D) float32
        Queries of the indexer.
    keys : (pools, D) float32 or float16
        One for each complete pool of a sequence, ``positions // pool`` of them, as `index_pool` gives them; the
        sequences one behind the other.
    weights : (T, H) float32
        Of heads; the models have H**-0.5 in them.
    scale : float
        D**-0.5 in the models.
    pool : int
        Positions of a key: 1, or what `index_pool` had as P. It divides 512 and D.
    offsets : (N+1,) integers, optional
        Where the queries of each of N sequences begin; without it, one sequence.
    positions : int or (N,) integers, optional
        How many positions each sequence has, its queries' own counted; without it, the queries' own are all.
    out : (T, most pools) float32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    scores : (T, most pools) float32
        As wide as the most pools that a sequence has. With a leading batch axis on q, keys and weights (equal lengths,
        no offsets), so has the result.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, a sequence has fewer positions than queries, or `out` overlaps an input.
    """
    scale = as_finite(scale, "scale")
    q, keys, weights, lead, offsets, positions, sizes = _checked(q, keys, weights, pool, offsets, positions)
    most = int((positions // sizes[-1]).max(initial=0))
    scores = output(out, (*lead, most), like=q)
    refuse_shared(scores, q=q, keys=keys, weights=weights)
    _core.index_scores(current(ctx)._core, scores, q, *typed(keys), weights, offsets, positions, sizes, scale)
    return scores


def index_select(q, keys, weights, *, topk, pool, offsets=None, positions=None, out=None, ctx=None):
    """The positions that each query attends to: of the pools with the largest scores, and of its incomplete pool.

    Of the pools that are complete for a query the ``topk // pool`` with the largest `index_scores` are chosen, the
    lower pool among equals, or all where they are no more; each gives its `pool` positions. The positions of the
    query's incomplete pool, up to and with its own, are always among the result. A scale above 0 would change no id
    but by its rounding, so there is none here: the scores are those of ``scale=1``. NaN counts as the largest score,
    so that a key that is not a number shows.

    Source: DeepSeek-V3.2, arXiv:2512.02556 (``pool=1``); in pools GLM-5.3-Flash. Derivation: docs/math.md#index_select.

    Parameters
    ----------
    q, keys, weights, pool, offsets, positions
        As `index_scores` has them.
    topk : int
        Positions that the chosen pools have; a multiple of `pool`.
    out : (T, topk + pool - 1) int32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    ids : (T, topk + pool - 1) int32
        Positions within the query's own sequence, rising, -1 behind the last: what sparse attention attends to.
        A query that sees no more than topk + pool - 1 positions has all of them. With a batch axis as `index_scores`.

    Raises
    ------
    TypeError, ValueError
        As `index_scores`, and if `topk` is no multiple of `pool`, or positions are above 2**31 - 1.
    """
    topk, pool = at_least(topk, 1, "topk", largest=2**31 - 1), at_least(pool, 1, "pool", largest=_PAGE)
    if topk % pool:
        raise ValueError(f"topk is {topk}; it must be a multiple of pool = {pool}")
    q, keys, weights, lead, offsets, positions, sizes = _checked(q, keys, weights, pool, offsets, positions)
    ids = output(out, (*lead, topk + pool - 1), dtype=np.int32, like=q)
    refuse_shared(ids, q=q, keys=keys, weights=weights)
    _core.index_select(current(ctx)._core, ids, q, *typed(keys), weights, offsets, positions, sizes, topk)
    return ids


def _checked(q, keys, weights, pool, offsets, positions):
    """(q, keys, weights, axes before the last of the result, offsets, positions, sizes) as the core takes them."""
    pool = at_least(pool, 1, "pool", largest=_PAGE)
    q = as_float32(q, "q", ("T", "H", "D"), ("B", "T", "H", "D"))
    lead, (H, D) = q.shape[:-2], q.shape[-2:]
    if min(H, D) < 1:
        raise ValueError(f"q has shape {list(q.shape)}; H and D must be >= 1")
    if _PAGE % pool or D % pool:
        raise ValueError(f"pool is {pool}; it must divide {_PAGE} and D = {D}")
    weights = as_float32(weights, "weights", (*lead, H))
    keys = as_cache(keys, "keys")
    if len(lead) == 2 and offsets is not None:
        raise ValueError("offsets are for [T, ...]; q has a batch axis, whose sequences are equally long")
    T = q.size // (H * D)
    offsets = as_offsets(np.arange(lead[0] + 1) * lead[1] if len(lead) == 2 else offsets, T)
    positions = _positions(positions, np.diff(offsets))
    if len(lead) == 2:
        if positions.size and (positions != positions[0]).any():
            raise ValueError("positions differ; q has a batch axis, whose sequences are equally long")
        check_shape(keys, "keys", (lead[0], int(positions[0]) // pool if positions.size else "pools", D))
    else:
        check_shape(keys, "keys", (int((positions // pool).sum()), D))
    return q, keys, weights, lead, offsets, positions, (len(offsets) - 1, T, H, D, pool)


def _positions(positions, queries):
    """int64 [N]: positions of each sequence, at least as many as its queries."""
    if positions is None:
        return queries.astype(np.int64)
    if np.ndim(positions) == 0:
        positions = np.full(len(queries), at_least(positions, 0, "positions", largest=2**40))
    a = as_integers(positions, "positions", (len(queries),), dtype=np.int64, low=0, high=2**40)
    for n in np.flatnonzero(a < queries)[:1]:
        raise ValueError(f"sequence {n} has {a[n]} positions for {queries[n]} queries; the queries' own must be among "
                         f"them")
    return a
