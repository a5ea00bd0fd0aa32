"""The chunked delta rule as float32 computes it, in NumPy: the order of sums of docs/math.md#delta_rule, subnormals
flushed. Not the engine and not for speed: an algorithm of the same order, against which the budget is tried."""

import numpy as np

SMALLEST = 2.0**-126
BLOCK = 16  # rows of a block of the triangles


def f32(x):
    """Rounded to float32, held in float64; subnormals become 0."""
    x = np.asarray(x, np.float64).astype(np.float32).astype(np.float64)
    return np.where(np.abs(x) < SMALLEST, 0.0, x)


def fma(a, b, c):
    """The product of two float32 is exact in float64; its sum is rounded twice, which moves a bound by 2^-29."""
    return f32(a * b + c)


class Float32:
    """The chunk's arithmetic; exp is put off by up to 0.6 u before it is rounded, so that it errs by up to 1.6 u."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def exp(self, g):
        with np.errstate(under="ignore"):
            a = np.exp(g)
        return np.where(a == 1, 1.0, f32(a * (1 + 2.0**-24 * self.rng.uniform(-0.6, 0.6, a.shape))))

    def dots(self, x, y):
        """<x, y> over the last axis: 16 lanes of fma, the halving tree."""
        K = x.shape[-1]
        shape = np.broadcast_shapes(x.shape, y.shape)
        x, y = (np.concatenate([np.broadcast_to(a, shape), np.zeros((*shape[:-1], -K % 16))], -1) for a in (x, y))
        lanes = np.zeros((*shape[:-1], 16))
        for i in range(0, K, 16):
            lanes = fma(x[..., i:i + 16], y[..., i:i + 16], lanes)
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = f32(lanes[..., :half] + lanes[..., half:])
        return lanes[..., 0]

    def chain(self, x, S, start=0.0):
        """sum_k x_k S_kv for x [..., H, K] and S [H, K, V], by fma in rising k."""
        u = np.zeros((*x.shape[:-1], S.shape[-1])) + start
        for i in range(S.shape[1]):
            u = fma(x[..., i, None], S[:, i], u)
        return u

    def decays(self, a):
        """start [n, H, K] of a chunk, a running product."""
        start = a.copy()
        for i in range(1, len(a)):
            start[i] = f32(start[i - 1] * a[i])
        return start

    def triangles(self, q, k, a, beta):
        """L and P [n, n, H], and the keys decayed to the chunk's end: kt runs within a block of 16 rows, and from
        block to block; rows of a later block are decayed from its first row on."""
        n, H, _ = k.shape
        L, P, kt = np.zeros((n, n, H)), np.zeros((n, n, H)), k.copy()
        for i0 in range(0, n, BLOCK):
            rows = range(i0, min(i0 + BLOCK, n))
            first = np.ones(k.shape[1:])
            for i in rows:
                first = a[i] if i == i0 else f32(first * a[i])
                kt[i0:i] = f32(kt[i0:i] * a[i])
                L[i, i0:i] = f32(beta[i] * self.dots(k[i], kt[i0:i]))
                P[i, i0:i + 1] = self.dots(q[i], kt[i0:i + 1])
                if i0:
                    L[i, :i0] = f32(beta[i] * self.dots(f32(first * k[i]), kt[:i0]))
                    P[i, :i0] = self.dots(f32(first * q[i]), kt[:i0])
            kt[:i0] = f32(kt[:i0] * first)
        assert np.isfinite(L).all() and np.isfinite(P).all()
        return L, P, kt

    def chunk(self, q, k, v, a, beta, S):
        """One chunk: q (scaled), k, a [n, H, K], v [n, H, V], beta [n, H], S [H, K, V] -> o, S."""
        n = len(k)
        start = self.decays(a)
        L, P, end = self.triangles(q, k, a, beta)
        u, o = self.chain(f32(start * k), S), self.chain(f32(start * q), S)
        d = f32(beta[:, :, None] * f32(v - u))
        for i in range(n):
            for j in range(i):
                d[i] = fma(-L[i, j, :, None], d[j], d[i])
            for j in range(i + 1):
                o[i] = fma(P[i, j, :, None], d[j], o[i])
        S = f32(start[-1][:, :, None] * S)
        for j in range(n):
            S = fma(end[j][:, :, None], d[j][:, None], S)
        return o, S

    def token(self, q, k, v, a, beta, S):
        """One token of the recurrence, sums over even and odd rows apart."""
        def read(x, S):
            return f32(self.chain(x[..., ::2], S[:, ::2]) + self.chain(x[..., 1::2], S[:, 1::2]))

        S = f32(a[:, :, None] * S)
        d = f32(beta[:, None] * f32(v - read(k, S)))
        S = fma(k[:, :, None], d[:, None], S)
        return read(q, S), S

    def delta_rule(self, q, k, v, g, beta, scale=None, initial_state=None, form="chunked", chunk=64):
        """As kl.ops.delta_rule, one key head a value head; "auto" is chunks of 16 and a recurrent tail."""
        q, k, v, beta, g = (f32(x) for x in (q, k, v, beta, np.where(np.isinf(g), -1e30, g)))
        (T, H, K), V = q.shape, v.shape[-1]
        a = self.exp(np.broadcast_to(g if g.ndim == 3 else g[..., None], q.shape))
        q = f32(f32(K**-0.5 if scale is None else scale) * q)
        S = np.zeros((H, K, V)) if initial_state is None else f32(initial_state)
        chunk = 16 if form == "auto" else chunk
        whole = T - T % chunk if form == "auto" else T
        o = np.zeros(v.shape)
        for t in range(0, whole, chunk):
            r = slice(t, min(t + chunk, whole))
            o[r], S = self.chunk(q[r], k[r], v[r], a[r], beta[r], S)
        for t in range(whole, T):
            o[t], S = self.token(q[t], k[t], v[t], a[t], beta[t], S)
        return o, S

    def intra(self, q, k, v, g, beta, chunk=64):
        """L, P, T [T, H, chunk], W, U as kl.reference.delta_rule_intra, at the default scale."""
        q, k, v, beta, g = (f32(x) for x in (q, k, v, beta, np.where(np.isinf(g), -1e30, g)))
        N, H, K = q.shape
        a, q = self.exp(g), f32(f32(K**-0.5) * q)
        squares, W, U = np.zeros((3, N, H, chunk)), np.zeros(k.shape), np.zeros(v.shape)
        for t in range(0, N, chunk):
            r = slice(t, min(t + chunk, N))
            n = r.stop - t
            L, P, _ = self.triangles(q[r], k[r], a[r], beta[r])
            T = np.zeros((n, n, H))
            keys = f32(self.decays(a[r]) * k[r])
            for i in range(n):
                for m in range(i):
                    T[i, :m + 1] = fma(-L[i, m], T[m, :m + 1], T[i, :m + 1])
                T[i, i] = 1
                for j in range(i + 1):
                    M = f32(T[i, j] * beta[r][j])[:, None]
                    W[t + i] = fma(M, keys[j], W[t + i])
                    U[t + i] = fma(M, v[t + j], U[t + i])
            squares[:, r, :, :n] = np.array([L, P, T]).transpose(0, 1, 3, 2)
        return (*squares, W, U)

    def inter(self, q, k, g, P, W, U, initial_state=None, chunk=64):
        """o, state, d as kl.reference.delta_rule_inter, at the default scale."""
        q, k, P, W, U, g = (f32(x) for x in (q, k, P, W, U, np.where(np.isinf(g), -1e30, g)))
        N, H, K = q.shape
        a, q = self.exp(g), f32(f32(K**-0.5) * q)
        S = np.zeros((H, K, U.shape[-1])) if initial_state is None else f32(initial_state)
        o, d = np.zeros((2, *U.shape))
        for t in range(0, N, chunk):
            r = slice(t, min(t + chunk, N))
            start, end = self.decays(a[r]), k[r].copy()
            for i in range(len(end)):
                end[:i] = f32(end[:i] * a[t + i])
            o[r] = self.chain(f32(start * q[r]), S)
            d[r] = f32(U[r] - self.chain(W[r], S))
            S = f32(start[-1][:, :, None] * S)
            for j in range(len(end)):
                S = fma(end[j][:, :, None], d[t + j][:, None], S)
                for i in range(j, len(end)):
                    o[t + i] = fma(P[t + i, :, j, None], d[t + j], o[t + i])
        return o, S, d
