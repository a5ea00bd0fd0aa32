"""Budgets of the indexer of sparse attention: derived in docs/math.md#index_pool, #index_scores, #index_select."""

import numpy as np

from ... import reference
from ..._float64 import f64, sequences
from ._basic import TINY, U, reweighed
from ._dense import _dot

__all__ = ["index_pool", "index_scores", "index_select"]


def index_pool(ref, k, gate, ape, offsets=None, stored=0.0):
    """In each channel a softmax over P whose logits are off by u |logit|, and their difference to the largest by u of
    itself; then the sums over P. Stored: the weights, and their products with k."""
    k, gate, ape = f64(k), f64(gate), f64(ape)
    P, D = ape.shape
    whole = [slice(r.start, r.start + (r.stop - r.start) // P * P) for r in sequences(len(k), offsets)]
    v, g = (np.concatenate([a[:0], *(a[r] for r in whole)]).reshape(-1, P, D).swapaxes(0, 1) for a in (k, gate))
    with np.errstate(all="ignore"):
        logits = g + ape[:, None]
        distance, error = logits.max(axis=0) - logits, U * np.abs(logits)
        error = error + (distance + error + error.max(axis=0) + 2) * U
        p, gained, least = reweighed(distance, error)
        apart = np.abs(v - (p * v).sum(axis=0))
        moved = np.fmin((gained * apart).sum(axis=0) / least, apart.max(axis=0))
        size = np.fmin(((p + gained) * np.abs(v)).sum(axis=0) / least, np.abs(v).max(axis=0))
    sums = ((P + 1) * U + 2 * stored) * size
    return moved + sums + P * U * (np.abs(ref) + moved) + TINY * (P + 2 * np.abs(v).sum(axis=0))


def index_scores(ref, q, keys, weights, scale, pool, offsets=None, positions=None, stored=0.0):
    """Each dot's own error by the size of its head's weight, H roundings of the sum, the scale and its product. Stored:
    each dot, and its product with the weight."""
    q, keys, w = f64(q), f64(keys), np.abs(f64(weights))
    T, H, D = q.shape
    bound, first = np.zeros(np.shape(ref)), 0
    for r, S in zip(*reference.index_sequences(T, offsets, positions), strict=True):
        n, L = S // pool, r.stop - r.start
        mine = keys[first:first + n]
        size = np.maximum((q[r].reshape(-1, D) @ mine.T).reshape(L, H, n), 0.0)
        error = _dot(q[r].reshape(-1, D), mine).reshape(L, H, n) + stored * size
        spread = np.einsum("th,thp->tp", w[r], 1.01 * error + (H * U + stored) * size)
        bound[r, :n] = abs(scale) * (spread + H * TINY)
        first += n
    return np.where(np.isinf(ref), 0.0, bound + 2 * U * np.abs(ref) + TINY)


def index_select(ref, q, keys, weights, topk, pool, offsets=None, positions=None, stored=0.0):
    """Ids are exact where no other choice lies within rounding: infinite for a query whose choice hangs on less than
    the scores' errors, unless all that are so near are equal, of which the lower pool is right. Stored: as there."""
    about = dict(q=q, keys=keys, weights=weights, scale=1.0, pool=pool, offsets=offsets, positions=positions)
    with np.errstate(all="ignore"):
        scores = reference.index_scores(**about)
        error = index_scores(scores, **about, stored=stored)
    bound = np.zeros(np.shape(ref))
    for r, S in zip(*reference.index_sequences(len(scores), offsets, positions), strict=True):
        for t in range(r.start, r.stop):
            complete = (S - r.stop + t + 1) // pool
            if _hangs(scores[t, :complete], error[t, :complete], topk // pool):
                bound[t] = np.inf
    return bound


def _hangs(scores, error, k):
    """Whether the k best of scores [n] are others for scores within the errors."""
    if len(scores) <= k:
        return False
    order = reference.best_first(scores)
    s = np.where(np.isnan(scores), np.inf, scores)
    error = np.where(np.isfinite(s), error, 0.0)
    low, high = (s - error)[order[:k]].min(), (s + error)[order[k:]].max()
    near = s[(s + error >= low) & (s - error <= high)]
    return low <= high and not (near == near[:1]).all()
