"""Budget of latent attention: derived in docs/math.md#latent_attention."""

import numpy as np

from ...reference import seen_by
from ._basic import TINY, U, reweighed

__all__ = ["latent_attention"]

_BLOCK, _SEGMENT = 64, 512


def latent_attention(ref, q, latent, k_shared, w_uk, w_uv, scale, offsets=None, kv_offsets=None, select=None,
                     form="auto", stored=0.0):
    """Holds for both forms. Per query and head, over the positions s that it attends to, with weights w_s:

    each score is off by e_s <= (K/16 + R/16 + P/16 + 16) u scale sum |q| |w_uk| |c|, which moves its weight
    by e_s + (distance to the maximum + what running maxima cost) u; the result by sum_s w_s |v_s - o| of
    that, plus the roundings of the sums themselves, in proportion to sum_s w_s |w_uv| |c_s|. Stored: scale q, and in
    one form the keys and the values, in the other w_uk^T q and sum_s w_s c_s; and the weights.
    """
    arrays = (q, latent, k_shared, w_uk, w_uv)
    q, latent, k_shared, w_uk, w_uv = (np.asarray(x).astype(np.float64) for x in arrays)
    offsets = [0, len(q)] if offsets is None else [int(i) for i in offsets]
    if kv_offsets is None:
        kv_offsets = offsets if len(latent) == len(q) else [0, len(latent)]
    bound = np.empty(np.shape(ref))
    for n in range(len(offsets) - 1):
        t, s = slice(offsets[n], offsets[n + 1]), slice(int(kv_offsets[n]), int(kv_offsets[n + 1]))
        seen = seen_by(t.stop - t.start, s.stop - s.start, None if select is None else select[t])
        for h in range(q.shape[1]):
            bound[t, h] = _head(q[t, h], latent[s], k_shared[s], w_uk[h], w_uv[h], abs(scale), np.sign(scale),
                                stored / U, seen)
    return bound


def _head(q, c, k_shared, w_uk, w_uv, scale, sign, stored, seen):
    """One head of one sequence: q [T, K+P], c [S, R], k_shared [S, P], w_uk [K, R], w_uv [V, R] -> [T, V]."""
    (K, R), P = w_uk.shape, k_shared.shape[1]
    k = np.concatenate([c @ w_uk.T, k_shared], axis=1)
    v = c @ w_uv.T
    k_size = np.concatenate([np.abs(c) @ np.abs(w_uk).T, np.abs(k_shared)], axis=1)
    v_size = np.abs(c) @ np.abs(w_uv).T
    # expanded: R products a key, and K + P; absorbed: K a value of the query, and R + P
    score_lost = (R * np.abs(q[:, :K]).sum(1)[:, None] + K * np.abs(c).sum(1) + K + R + 2 * P)
    value_lost = R + np.abs(w_uv).sum(1)
    return attended(q, k, v, k_size, v_size, scale, sign, K / 16 + R / 16 + P / 16 + 16 + 2 * stored,
                    R / 16 + 16 + 2 * stored, (score_lost, value_lost), seen)


def attended(q, k, v, k_size, v_size, scale, sign, score_units, value_units, lost, seen=None):
    """Softmax attention of one head with the blocks and segments of the engine: q [T, n], k [S, n], v [S, V]; seen: of
    each query an index of the positions that it attends to, by default all up to its own.

    Keys and values are sums whose terms have the sizes k_size and v_size; a score is off by score_units, a value
    by value_units u of these. Lost: what underflows on the way in the product of q and k [T, S], and in values [V]
    a position, in TINY.
    """
    out = np.zeros((len(q), v.shape[1]))
    score_lost, value_lost = lost
    for t, s in enumerate(seen_by(len(q), len(k)) if seen is None else seen):
        keys, values, sizes = k[s], v[s], v_size[s]
        n = len(keys)
        if n == 0:
            continue  # exactly 0
        score = sign * scale * (keys @ q[t])
        distance = score.max() - score
        score_error = score_units * scale * (k_size[s] @ np.abs(q[t]))
        merges = n / _BLOCK + 2 * (n / _SEGMENT)
        error = (score_error + 2 * distance + 3 * merges + 4) * U            # relative, of exp(score - max)
        error = error + TINY * (1 + scale * score_lost[t, s])
        error[np.isinf(distance)] = 0                                        # masked: its weight is 0
        w, gained, least = reweighed(distance, error)
        o = w @ values
        apart = np.abs(values - o)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            moved = np.fmin(gained @ apart / least, apart.max(axis=0))
            size = np.fmin((w + gained) @ sizes / least, sizes.max(axis=0))
        sums = (value_units + n + merges) * U * size
        denominator = (8 + 3 * merges) * U * (np.abs(o) + moved)
        lost_here = (n + 1) * TINY * (1 + value_lost + sizes.max(axis=0))
        out[t] = moved + sums + denominator + lost_here
    return out
