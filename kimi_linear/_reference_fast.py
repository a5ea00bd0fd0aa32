"""`attention`, `latent_attention` and `delta_rule` of `reference` again, for runs of thousands of tokens.

`reference` is the formula, row by row. Here rows share matrix products: the results differ from it by float64's
rounding alone, which tests/reference/test_reference_fast.py asserts.
"""

from __future__ import annotations

import numpy as np

from . import reference, reference_delta
from ._float64 import f64, sequences

__all__ = ["attend", "attention", "delta_rule", "latent_attention"]

BLOCK = 64  # queries that share a product


def attention(q, k, v, *, scale, offsets=None, kv_offsets=None):
    """`reference.attention`: arguments and result are its."""
    pairs = _pairs(len(q), len(k), offsets, kv_offsets)
    if pairs is None or q.shape[1] % k.shape[1]:
        return reference.attention(q, k, v, scale=scale, offsets=offsets, kv_offsets=kv_offsets)
    q, k, v = f64(q), f64(k), f64(v)
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.swapaxes(0, 1), group, axis=0) for a in (k, v))               # [H, S, .]
    o = np.empty((*q.shape[:2], v.shape[-1]))
    for r, c in pairs:
        o[r] = _causal(q[r], k[:, c], v[:, c], scale)
    return o


def latent_attention(q, latent, k_shared, w_uk, w_uv, *, scale, offsets=None, kv_offsets=None, select=None,
                     form="auto"):
    """`reference.latent_attention`: arguments and result are its."""
    pairs = _pairs(len(q), len(latent), offsets, kv_offsets)
    if pairs is None or select is not None or form not in ("auto", "expanded"):
        return reference.latent_attention(q, latent, k_shared, w_uk, w_uv, scale=scale, offsets=offsets,
                                          kv_offsets=kv_offsets, select=select, form=form)
    q, latent, k_shared, w_uk, w_uv = (f64(x) for x in (q, latent, k_shared, w_uk, w_uv))
    o = np.empty((len(q), q.shape[1], w_uv.shape[1]))
    for r, c in pairs:
        k = latent[c] @ w_uk.swapaxes(1, 2)                                          # [H, S, nope]
        k = np.concatenate([k, np.broadcast_to(k_shared[c], (len(k), *k_shared[c].shape))], axis=-1)
        v = latent[c] @ w_uv.swapaxes(1, 2)                                          # [H, S, V]
        o[r] = _causal(q[r], k, v, scale)
    return o


def _pairs(T, S, offsets, kv_offsets):
    """(queries, positions) of each sequence as slices; None where the formula refuses them."""
    rows, cached = sequences(T, offsets), sequences(S, offsets if kv_offsets is None else kv_offsets)
    short = any(c.stop - c.start < r.stop - r.start for r, c in zip(rows, cached))
    return None if short or len(rows) != len(cached) else list(zip(rows, cached))


def _causal(q, k, v, scale):
    """`attend` where the last positions are the queries' own."""
    T, S = len(q), k.shape[1]
    return attend(q, k, v, scale, np.zeros(T, int), np.arange(S - T, S) + 1)


def attend(q, k, v, scale, first, end):
    """Softmax attention in which query t sees the rows first[t] to end[t]; none of these falls from t to t + 1.

    Parameters
    ----------
    q : (T, H, n); k : (H, S, n); v : (H, S, V)
    first, end : (T,) integers

    Returns
    -------
    (T, H, V)
    """
    o, room = np.empty((*q.shape[:2], v.shape[-1])), np.empty(BLOCK * k.shape[1])
    block = BLOCK if np.isfinite(k).all() and np.isfinite(v).all() else 1   # what a query does not see is 0 times v
    for t in range(0, len(o), block):
        rows = slice(t, min(t + block, len(o)))
        seen = slice(first[rows][0], end[rows][-1])
        s, n = np.arange(seen.start, seen.stop), rows.stop - t
        hidden = (s < first[rows, None]) | (s >= end[rows, None])
        for h in range(q.shape[1]):
            p = np.matmul(scale * q[rows, h], k[h, seen].T, out=room[:n * len(s)].reshape(n, len(s)))
            np.copyto(p, -np.inf, where=hidden)
            p -= p.max(-1, keepdims=True)
            np.exp(p, out=p)
            o[rows, h] = p @ v[h, seen] / p.sum(-1, keepdims=True)
    return o


def delta_rule(q, k, v, g, beta, *, offsets=None, initial_state=None, scale=None, form="auto", head_map="grouped",
               **rest):
    """`reference.delta_rule`: arguments and results are its. Options in `rest`, and values that are not finite, are
    left to it."""
    def formula():
        return reference_delta.delta_rule(q, k, v, g, beta, offsets=offsets, initial_state=initial_state, scale=scale,
                                          form=form, head_map=head_map, **rest)

    if rest or form not in ("auto", "recurrent"):
        return formula()
    v, beta = f64(v), f64(beta)
    T, H, V = v.shape
    rows = *reference_delta.of_value_heads(q, k, g, H, scale, head_map), v, beta
    ranges = sequences(T, offsets)
    states = reference_delta.states_from(initial_state, (len(ranges), H, rows[1].shape[-1], V))
    o = np.empty((T, H, V))
    for n, r in enumerate(ranges):
        o[r] = _recurrent(*(x[r] for x in rows), states[n])
    if not (np.isfinite(o).all() and np.isfinite(states).all()):
        return formula()
    return o, states if offsets is not None else states[0]


def _recurrent(q, k, g, v, beta, S):
    """Token by token, S [H, K, V] in place. k and q meet the decayed state together: what q finds of the token's own
    k d^T is (k q) d."""
    both, a, keys = np.stack([k, q], axis=2), np.exp(g)[..., None], k[..., None]     # [T, H, 2, K], [T, H, K, 1]
    own, beta = (k * q).sum(-1)[..., None], beta[..., None]
    o, found = np.empty(v.shape), np.empty((len(S), 2, S.shape[2]))
    for t in range(len(v)):
        S *= a[t]
        np.matmul(both[t], S, out=found)
        d = beta[t] * (v[t] - found[:, 0])
        S += keys[t] * d[:, None]
        o[t] = found[:, 1] + own[t] * d
    return o
