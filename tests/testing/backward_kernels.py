"""Kernels of `delta_rule_backward` in float32 NumPy, right ones: as a recurrence, and as training kernels have it, by
chunks whose gradient of g is a running sum from the chunk's end."""

import numpy as np

from kimi_linear.reference_delta import key_heads

__all__ = ["chunked", "recurrent"]


def recurrent(**x):
    """Token by token."""
    return _of_sequences(_recurrent, **x)


def chunked(chunk=64, diagonal=False, solved=None, **x):
    """By chunks; `diagonal` forms the gradient of g with the terms of the diagonal, which cancel; `solved` inverts
    I + L, by default row by row."""
    return _of_sequences(lambda *of_head: _by_chunks(*of_head, chunk, diagonal, solved), **x)


def _of_sequences(kernel, do, q, k, v, g, beta, dstate=None, scale=None, initial_state=None, offsets=None,
                  l2_norm=False, l2_eps=1e-6, head_map="grouped"):
    """A kernel ``(q, k, v, g, beta, S, do, A) -> dq, dk, dv, dg, dbeta, dS`` of one head and sequence, for all."""
    (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
    given, f32 = (q, k), np.float32
    if l2_norm:
        q, k = (x * _inverse(x, l2_eps) for x in given)
    scale = f32(K**-0.5 if scale is None else scale)
    bounds = [0, T] if offsets is None else [int(n) for n in offsets]
    states = np.zeros((len(bounds) - 1, Hv, K, V), f32)
    S0, A = (states if a is None else a.reshape(states.shape) for a in (initial_state, dstate))
    gates = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, Hv, K))
    dq, dk = np.zeros((2, T, Hk, K), f32)
    dv, dg, dbeta, dS = np.zeros(v.shape, f32), np.zeros((T, Hv, K), f32), np.zeros((T, Hv), f32), states.copy()
    for h, of in enumerate(key_heads(Hk, Hv, head_map)):
        for n, r in enumerate(map(slice, bounds, bounds[1:])):
            one = kernel(q[r, of] * scale, k[r, of], v[r, h], gates[r, h], beta[r, h], S0[n, h], do[r, h], A[n, h])
            dq[r, of] += one[0] * scale
            dk[r, of] += one[1]
            dv[r, h], dg[r, h], dbeta[r, h], dS[n, h] = one[2:]
    if l2_norm:
        dq, dk = (_through_norm(dx, x, l2_eps) for dx, x in zip((dq, dk), given))
    return dq, dk, dv, dg if g.ndim == 3 else dg.sum(-1), dbeta, dS if offsets is not None else dS[0]


def _inverse(x, eps):
    wide = x.astype(np.float64)  # squares may overflow float32
    return (1 / np.sqrt((wide * wide).sum(-1, keepdims=True) + eps)).astype(np.float32)


def _through_norm(dy, x, eps):
    y = x * _inverse(x, eps)
    return _inverse(x, eps) * (dy - y * (y * dy).sum(-1, keepdims=True))


def _recurrent(q, k, v, g, beta, S, do, A):
    before, after = [], []
    for t in range(len(q)):
        before.append(np.exp(g[t])[:, None] * S)
        S = before[t] + np.outer(k[t], beta[t] * (v[t] - k[t] @ before[t]))
        after.append(S)
    dq, dk, dv, dg, dbeta = (np.zeros_like(x) for x in (q, k, v, g, beta))
    for t in reversed(range(len(q))):
        error = v[t] - k[t] @ before[t]
        dq[t] = after[t] @ do[t]
        A = A + np.outer(q[t], do[t])
        read = k[t] @ A
        dbeta[t], dv[t] = read @ error, beta[t] * read
        dk[t] = A @ (beta[t] * error) - before[t] @ dv[t]
        A = A - np.outer(k[t], dv[t])
        dg[t] = (A * before[t]).sum(-1)
        A = np.exp(g[t])[:, None] * A
    return dq, dk, dv, dg, dbeta, A


def _by_chunks(q, k, v, g, beta, S, do, A, chunk, diagonal, solved):
    parts = [slice(t, min(t + chunk, len(q))) for t in range(0, len(q), chunk)]
    kept = []
    for r in parts:
        kept.append(_Chunk(q[r], k[r], v[r], g[r], beta[r], S, solved))
        S = kept[-1].end_state
    results = [np.zeros_like(x) for x in (q, k, v, g, beta)]
    for r, c in zip(reversed(parts), reversed(kept)):
        *one, A = c.backward(do[r], A, diagonal)
        for whole, part in zip(results, one):
            whole[r] = part
    return *results, A


class _Chunk:
    """One chunk: its triangles, corrections d, and the state that it leaves."""

    def __init__(self, q, k, v, g, beta, S, solved):
        self.q, self.k, self.v, self.g, self.beta, self.S = q, k, v, g, beta, S
        n, a = len(q), np.exp(g)
        self.E = np.zeros((n, n, g.shape[1]), np.float32)  # [i, j]: the decay from behind j to behind i
        for i in range(n):
            self.E[i, :i] = self.E[i - 1, :i] * a[i]
            self.E[i, i] = 1
        self.start = np.cumprod(a, axis=0)
        self.end = self.E[-1]
        self.keys = np.tril(np.einsum("ik,ijk,jk->ij", k, self.E, k, optimize=True), -1)
        self.P = np.tril(np.einsum("ik,ijk,jk->ij", q, self.E, k, optimize=True))
        self.error0 = v - (self.start * k) @ S
        self.inverse = np.eye(n, dtype=np.float32)
        for i in range(1, n):
            self.inverse[i, :i] = -(beta[i] * self.keys[i, :i]) @ self.inverse[:i, :i]
        if solved is not None:
            self.inverse = np.float32(solved(np.eye(n) + beta[:, None] * self.keys))
        self.d = self.inverse @ (beta[:, None] * self.error0)
        self.end_state = self.start[-1][:, None] * S + (self.end * k).T @ self.d

    def backward(self, do, A, diagonal):
        """Gradients of q, k, v, g, beta and of the state that the chunk began with."""
        q, k, beta, E, d = self.q, self.k, self.beta[:, None], self.E, self.d
        x = self.inverse.T @ (self.P.T @ do + (self.end * k) @ A)
        dL, dP = np.tril(-x @ d.T, -1), np.tril(do @ d.T)
        dbeta = (x * self.error0).sum(-1) + (dL * self.keys).sum(-1)
        own, dP = np.diag(dP)[:, None], np.tril(dP, 0 if diagonal else -1)
        dq = np.einsum("ij,ijk,jk->ik", dP, E, k, optimize=True) + self.start * (do @ self.S.T)
        row = beta * np.einsum("ij,ijk,jk->ik", dL, E, k, optimize=True) - self.start * ((beta * x) @ self.S.T)
        column = (np.einsum("ij,ijk,ik->jk", dL * beta, E, k, optimize=True) + self.end * (d @ A.T)
                  + np.einsum("ij,ijk,ik->jk", dP, E, q, optimize=True))
        dc = q * dq + k * row - k * column
        dc[-1] += (A * self.end_state).sum(-1)
        dg = np.cumsum(dc[::-1], axis=0)[::-1]
        if not diagonal:
            dq, column = dq + own * k, column + own * q
        dS = self.start[-1][:, None] * A + (self.start * q).T @ do - (self.start * k).T @ (beta * x)
        return dq, row + column, beta * x, dg, dbeta, dS
