"""The gradients of the gated delta rule in float64, token by token from the last to the first.

Re-exported by :mod:`kimi_linear.reference`, whose conventions hold here. The derivation is
docs/math.md#delta_rule_backward.
"""

from __future__ import annotations

import numpy as np

from ._arrays import check_shape
from ._batches import any_batch
from ._float64 import f64, of_sequences, sequences
from .reference_backward import l2_norm_backward
from .reference_delta import chunks_of, key_heads, of_value_heads, states_from

__all__ = ["delta_rule_backward"]

BLOCK = 64  # tokens whose states are kept at once; of those before them the first alone


@any_batch
def delta_rule_backward(do, q, k, v, g, beta, *, dstate=None, scale=None, initial_state=None, offsets=None,
                        l2_norm=False, l2_eps=1e-6, head_map="grouped"):
    """What a loss's gradients of o and of the final state are for the arguments of `delta_rule`. Per value head and
    token, from the last to the first, A the gradient of the state behind the token, S' the state before its write,
    d and S as in `delta_rule`, q with the scale::

        dq = scale S do;          A <- A + q do^T
        dv = beta A^T k;          dbeta = <A^T k, v - S'^T k>
        dk = A d - S' dv;         A <- A - k dv^T
        dg = sum over V of A S';  A <- Diag(a) A

    Parameters
    ----------
    do : (T, Hv, V)
    q, k, v, g, beta, scale, initial_state, offsets, l2_norm, l2_eps, head_map : as in `delta_rule`
        g is not None: zeros [T, Hv] are no decay.
    dstate : as the final state; None is zeros.

    Returns
    -------
    dq, dk : (T, Hk, K)
        Summed over the value heads that read a key head; with `l2_norm` of q and k before the norm.
    dv : (T, Hv, V)
    dg : as g
        Of g itself, not of its running sums; a gate a head is the sum over its channels.
    dbeta : (T, Hv)
    dinitial_state : as the final state

    Sources: the transpose of arXiv:2510.26692, equation 1; results and their order as in flash-linear-attention,
    fla/ops/kda (chunk_kda).
    """
    if g is None:
        raise ValueError("g is None; it must be an array, zeros where nothing decays: its gradient is a result")
    given_q, given_k, kind = f64(q), f64(k), np.ndim(g)
    if l2_norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + l2_eps) for x in (given_q, given_k))
    do, v, beta = f64(do), f64(v), f64(beta)
    T, Hv, V = v.shape
    check_shape(do, "do", v.shape)
    check_shape(beta, "beta", (T, Hv))
    check_shape(given_q, "q", (T, "Hk", "K"))
    (_, Hk, K), scale = given_q.shape, given_q.shape[-1] ** -0.5 if scale is None else scale
    q, k, g = of_value_heads(q, k, g, Hv, scale, head_map)

    ranges = sequences(T, offsets)
    states = states_from(initial_state, (len(ranges), Hv, K, V))
    A = of_sequences(dstate, "dstate", states.shape).copy()
    dq, dk, dg = np.zeros((3, T, Hv, K))
    dv, dbeta = np.zeros(v.shape), np.zeros(beta.shape)
    for n, r in enumerate(ranges):
        parts = chunks_of(r, BLOCK)
        begins = [states[n]]
        for part in parts:
            begins.append(_forward(k[part], v[part], g[part], beta[part], begins[-1])[-1][1])
        for part, S in zip(reversed(parts), reversed(begins[:-1])):
            kept = _forward(k[part], v[part], g[part], beta[part], S)
            for t, (before, after) in reversed(list(zip(range(part.start, part.stop), kept))):
                error = v[t] - _over_keys(before, k[t])
                d = beta[t][:, None] * error
                dq[t] = scale * _over_values(after, do[t])
                A[n] += _outer(q[t], do[t])
                read = _over_keys(A[n], k[t])
                dbeta[t] = (read * error).sum(-1)
                dv[t] = beta[t][:, None] * read
                dk[t] = _over_values(A[n], d) - _over_values(before, dv[t])
                A[n] -= _outer(k[t], dv[t])
                dg[t] = (A[n] * before).sum(-1)
                A[n] *= np.exp(g[t])[:, :, None]

    dq, dk = (_of_key_heads(x, key_heads(Hk, Hv, head_map), Hk) for x in (dq, dk))
    if l2_norm:
        dq, dk = (l2_norm_backward(dx, x, eps=l2_eps) for dx, x in ((dq, given_q), (dk, given_k)))
    return dq, dk, dv, dg if kind == 3 else dg.sum(-1), dbeta, A if offsets is not None else A[0]


def _forward(k, v, g, beta, S):
    """States (before its write, behind it) of each token of a part."""
    kept = []
    for k_t, v_t, g_t, beta_t in zip(k, v, g, beta):
        before = np.exp(g_t)[:, :, None] * S
        S = before + _outer(k_t, beta_t[:, None] * (v_t - _over_keys(before, k_t)))
        kept.append((before, S))
    return kept


def _outer(x, y):
    return x[:, :, None] * y[:, None, :]


def _over_keys(S, x):
    """S^T x of each head: [H, K, V], [H, K] -> [H, V]."""
    return np.einsum("hkv,hk->hv", S, x)


def _over_values(S, y):
    """S y of each head: [H, K, V], [H, V] -> [H, K]."""
    return np.einsum("hkv,hv->hk", S, y)


def _of_key_heads(x, heads, Hk):
    """The sum over the value heads that read each key head: [T, Hv, K] -> [T, Hk, K]."""
    out = np.zeros((len(x), Hk, x.shape[-1]))
    np.add.at(out, (slice(None), heads), x)
    return out
