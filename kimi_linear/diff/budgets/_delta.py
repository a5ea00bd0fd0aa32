"""Budgets of the delta rule, of its chunked halves and of the cumulative gate: docs/math.md#delta_rule."""

import copy

import numpy as np

from ..._arrays import checkpoint_counts
from ..._float64 import f64, sequences
from ...reference_delta import chunks_of, decays, of_value_heads, states_from
from ...reference_delta import delta_rule_intra as exact_intra
from ._basic import FLUSH, U, finite

__all__ = ["decay_cumsum", "delta_rule", "delta_rule_inter", "delta_rule_intra"]

EXP = 1.6  # error of exp, in u
FACTOR = EXP + 1  # error that one more factor exp(g) brings to a decay: its own, and the product's
AUTO = 16  # tokens of a chunk of form "auto"; a tail shorter than that is recurrent


def decay_cumsum(ref, g, chunk=64, offsets=None):
    """All g have one sign: the i-th sum of a chunk carries i roundings of no more than itself."""
    c = np.abs(np.asarray(ref, np.float64))
    bound = np.zeros(c.shape)
    for r in sequences(len(c), offsets):
        for part in chunks_of(r, chunk):
            i = np.arange(part.stop - part.start).reshape(-1, *[1] * (c.ndim - 1))
            bound[part] = i * U / (1 - i * U) * finite(c[part])
    return bound


def delta_rule(ref, q, k, v, g, beta, scale=None, initial_state=None, offsets=None, form="auto", chunk=64,
               l2_norm=False, l2_eps=1e-6, head_map="grouped", checkpoints=None, final_state=None, stored=0.0):
    """A running bound, computed beside the recurrence in float64; where a form works in chunks, two of them.

    Two bounds of the state's error are carried and each is kept below the other: E of every element, and e,
    the 2-norm of every column. E follows single elements through strong decays; e follows the whole through
    I - beta k k^T, whose 2-norm is 1 for unit keys, where E would double with every token. A chunk may be run
    by the recurrence instead (its triangles may overflow), so from each chunk the larger bound goes on.

    Stored: both operands of a product, that of T with W and U among them, each rounded to the narrow type: 4
    roundings a term. The state itself is float32.
    """
    q, k, v, beta = f64(q), f64(k), f64(v), f64(beta)
    (T, Hv, V), K = v.shape, q.shape[-1]
    key = 4 * stored  # relative error of every q and k
    if l2_norm:
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + l2_eps) for a in (q, k))
        key += (K / 32 + 8) * U + 2 * stored
    scale = K**-0.5 if scale is None else scale
    q, k, g = of_value_heads(q, k, g, Hv, scale, head_map)
    ranges = sequences(T, offsets)
    cuts = checkpoint_counts(checkpoints, [r.stop - r.start for r in ranges])
    S0 = states_from(initial_state, (len(ranges), Hv, K, V))
    step = {"auto": AUTO, "chunked": chunk}.get(form, 1)

    o, E = np.zeros((T, Hv, V)), np.zeros_like(S0)
    kept = []
    with np.errstate(invalid="ignore", over="ignore"):
        for n, r in enumerate(ranges):
            bound = _Bound(S0[n], key, abs(scale))
            kept += [bound.E.copy()] * (0 in cuts[n])
            for part in chunks_of(r, step):
                rows = list(zip(q[part], k[part], v[part], g[part], beta[part]))
                for count in (r.start + c - part.start for c in cuts[n]):
                    if 0 < count <= len(rows):
                        early = copy.copy(bound)
                        early.run(rows[:count], form)
                        kept.append(early.E)
                o[part] = bound.run(rows, form)
            E[n] = bound.E if r.stop > r.start else 0.0  # a state handed on is a copy
    bounds = o.reshape(np.shape(ref[0])), E.reshape(np.shape(ref[1]))
    return bounds if checkpoints is None else (*bounds, np.array(kept).reshape(-1, Hv, K, V))


class _Bound:
    """Values S [H, K, V] of the recurrence, and bounds of the error of what float32 makes of them.

    Attributes are replaced and never written into, so that a shallow copy is a fork.
    """

    def __init__(self, S, key, scale):
        self.S, self.key, self.scale = S, key, scale
        self.E = np.full(S.shape, FLUSH)  # each element
        self.e = np.sqrt(S.shape[1]) * FLUSH + np.zeros((S.shape[0], 1, S.shape[2]))  # each column's 2-norm
        self.sum = (S.shape[1] / 2 + 1.5) * U  # two chains of K / 2 fma, and their sum

    def run(self, rows, form):
        """Tokens as `token` takes them, no more than a chunk of the form; the bounds of their o."""
        solved = form == "chunked" or form == "auto" and len(rows) == AUTO
        return self.chunk(rows) if solved else [self.token(*row) for row in rows]

    def token(self, q, k, v, g, beta):
        """One token of the recurrence: q, k, g [H, K], v [H, V], beta [H]; the bound of o [H, V]."""
        K = self.S.shape[1]
        a, q, k = np.exp(g)[:, :, None], q[:, :, None], k[:, :, None]
        v, beta = v[:, None], beta[:, None, None]
        q1, k1, q2, k2 = np.abs(q), np.abs(k), column_norm(q), column_norm(k)

        # S' = a S: exp, then a product
        here = FACTOR * U * a * (np.abs(self.S) + self.E) + FLUSH * (np.abs(self.S) + 2)
        S, E = a * self.S, a * self.E + here
        e = np.minimum(a.max(1, keepdims=True) * self.e + column_norm(here), column_norm(E))

        # d = beta (v - S'^T k)
        size = (k1 * (np.abs(S) + E)).sum(1, keepdims=True)
        read = (self.sum + self.key) * size + FLUSH * ((np.abs(S) + E).sum(1, keepdims=True) + K)
        error = v - (k * S).sum(1, keepdims=True)
        d = beta * error
        inherited = beta * np.minimum(k2 * e, (k1 * E).sum(1, keepdims=True))
        here = beta * read + FLUSH * (3 + beta + np.abs(error))
        here = here + 2.5 * U * (np.abs(d) + inherited + here)

        # S = S' + k d^T: one fma
        after = S + k * d
        wide = np.abs(d) + inherited + here
        fma = U * (np.abs(after) + E) + self.key * k1 * wide + FLUSH * (1 + wide)
        E = E + k1 * (inherited + here) + fma
        e = np.minimum(self._grow(beta, k2) * e + k2 * here + column_norm(fma), column_norm(E))
        self.S, self.E, self.e = after, np.minimum(E, e), e

        # o = S^T (scale q): the product with scale, and the sum
        size = np.abs(after) + self.E
        bound = np.minimum(q2 * e, (q1 * self.E).sum(1, keepdims=True))
        bound = bound + (self.sum + 1.5 * U + self.key) * (q1 * size).sum(1, keepdims=True)
        return (bound + FLUSH * ((1 + self.scale) * size.sum(1, keepdims=True) + K))[:, 0]

    def chunk(self, rows):
        """A chunk of tokens, solved at once or run by the recurrence."""
        fork = copy.copy(self)
        o = np.array([fork.token(*row) for row in rows])
        o = np.maximum(o, self._solved(rows))
        self.E, self.e = np.maximum(self.E, fork.E), np.maximum(self.e, fork.e)
        return o

    def _solved(self, rows):
        """A chunk solved at once. E and e are of the state that the computed exp(g) and corrections make without
        further rounding. M is the size of all that meets in a sum, and Z of that the part of the incoming state;
        N counts the roundings of its decays and chains so far, in u; G is M without decay, for what flushing
        loses."""
        K = self.S.shape[1]
        S, E, e = self.S, self.E, self.e
        M = Z = G = np.abs(S) + E
        chain, dots = K + 2, np.ceil(K / 16) + 7  # roundings of a term of S^T x, and of one of L or P
        N, key = np.zeros_like(M), self.key / U
        o = []

        def read(x1, M, Z, N):
            return U * (x1 * (N + (dots + key) * M + max(chain - dots, 0) * Z)).sum(1, keepdims=True)

        def flushed(x1, G, i):
            return FLUSH * (2 * (i + 3) * ((1 + x1) * G).sum(1, keepdims=True) + K + i + 6)

        for i, (q, k, v, g, beta) in enumerate(rows):
            a, q, k = np.exp(g)[:, :, None], q[:, :, None], k[:, :, None]
            v, beta = v[:, None], beta[:, None, None]
            q1, k1, q2, k2 = np.abs(q), np.abs(k), column_norm(q), column_norm(k)

            # the error of exp is the state's; one more product of every decay, one more fma of every chain
            here = EXP * U * a * (np.abs(S) + E)
            S, E, Z, M, N = a * S, a * E + here, a * Z, a * M, a * (N + 2 * M)
            e = np.minimum(a.max(1, keepdims=True) * e + column_norm(here), column_norm(E))

            # d = beta (v - sums)
            d = beta * (v - (k * S).sum(1, keepdims=True))
            inherited = beta * np.minimum(k2 * e, (k1 * E).sum(1, keepdims=True))
            here = beta * (read(k1, M, Z, N) + (i + 2) * U * np.abs(v))
            here = here + (1 + beta) * flushed(k1, G, i) + FLUSH * np.abs(v)

            # the write, as exact as d
            wide = np.abs(d) + inherited + here
            S, E = S + k * d, E + k1 * (inherited + here)
            M, N, G = M + k1 * wide, N + key * k1 * wide, G + (1 + k1) * wide
            e = np.minimum(self._grow(beta, k2) * e + k2 * here, column_norm(E))
            E = np.minimum(E, e)

            bound = np.minimum(q2 * e, (q1 * E).sum(1, keepdims=True)) + read(q1, M, Z, N)
            o.append((bound + (1 + self.scale) * flushed(q1, G, i))[:, 0])

        # S: its own product, the decayed keys, a chain of fma
        here = U * (N + M) + FLUSH * 2 * (len(rows) + 3) * (1 + G)
        E = E + here
        e = np.minimum(e + column_norm(here), column_norm(E))
        self.S, self.E, self.e = S, np.minimum(E, e), e
        return np.array(o)

    def _grow(self, beta, k2):
        """The 2-norm of I - beta k k^T."""
        return np.maximum(1, np.abs(1 - beta * k2 * k2 * (1 + 2 * self.key)))


def delta_rule_intra(ref, q, k, v, g, beta, scale=None, offsets=None, chunk=64, head_map="grouped"):
    """L and P: decays and a dot. T, from (I + L') T' = I + R: |T' - T| <= |T| (|L' - L| |T'| + |R|), a
    row after the other, where |T'| <= |T| + |T' - T|. W and U: the error of T, and a chain of fma."""
    scale = np.shape(q)[-1] ** -0.5 if scale is None else scale
    exact = exact_intra(q, k, v, g, beta, scale=scale, offsets=offsets, chunk=chunk, head_map=head_map)
    v, beta = f64(v), f64(beta)
    q, k, g = of_value_heads(q, k, g, v.shape[1], scale, head_map)
    K = k.shape[-1]
    bounds = [np.zeros(x.shape) for x in exact]
    with np.errstate(invalid="ignore", over="ignore"):
        for part in [p for r in sequences(len(v), offsets) for p in chunks_of(r, chunk)]:
            n = part.stop - part.start
            L, _, T = (np.abs(x[part, :, :n]).transpose(1, 0, 2) for x in exact[:3])          # [H, n, n]
            rate, keys, values = (np.abs(x[part]).swapaxes(0, 1) for x in (beta, k, v))       # [H, n, ...]
            i, j = np.indices((n, n))
            low = i >= j

            dots = (FACTOR * (i - j) + np.ceil(K / 16) + 7) * U
            dP = dots * _sizes(q[part], k[part], g[part]) + _flushed(i, q[part], k[part]) * (1 + abs(scale))
            dL = rate[:, :, None] * dots * _sizes(k[part], k[part], g[part])
            dL = np.where(i > j, dL + (1 + rate[:, :, None]) * _flushed(i, k[part], k[part]), 0)
            wide, dT, residual = T.copy(), np.zeros_like(T), np.zeros_like(T)
            for m in range(1, n):  # a row asks for those above it alone
                of = np.s_[:, m, :m]
                above = wide[:, :m, :m]
                residual[of] = ((dL[of][:, None] @ above) + (m - j[0, :m]) * U * (L[of][:, None] @ above))[:, 0]
                residual[of] += FLUSH * (m - j[0, :m] + 1)
                dT[of] = (T[:, m, None, :m + 1] @ residual[:, :m + 1, :m])[:, 0]
                wide[of] += dT[of]
            wide = wide * rate[:, None]
            faded = decays(g[part])[0].swapaxes(0, 1) * keys
            dW = (dT * rate[:, None] + wide * (FACTOR * (j + 1) + i + 3) * U) @ faded
            dU = (dT * rate[:, None] + wide * (i + 3) * U) @ values
            lost = np.where(low, (1 + wide + T) * 2 * (j + 3), 0) * FLUSH
            dW, dU = dW + lost @ (1 + keys), dU + lost @ (1 + values)
            for bound, square in zip(bounds, (dL, np.where(low, dP, 0), dT)):
                bound[part, :, :n] = square.transpose(1, 0, 2)
            bounds[3][part], bounds[4][part] = dW.swapaxes(0, 1), dU.swapaxes(0, 1)
    return tuple(bounds)


def _sizes(x, k, g):
    """sum_c |x_ic| E_ij,c |k_jc| of a chunk, [H, n, n]; x, k, g [n, H, K]."""
    a, keys = np.exp(g), np.abs(k)
    out = np.zeros((x.shape[1], len(x), len(x)))
    for i in range(len(x)):
        keys[:i] = keys[:i] * a[i]
        out[:, i, :i + 1] = np.einsum("hk,jhk->hj", np.abs(x[i]), keys[:i + 1])
    return out


def _flushed(i, x, k):
    """What flushing loses in the dots of `_sizes`."""
    return FLUSH * 2 * (i + 3) * np.einsum("ihk,jhk->hij", 1 + np.abs(x), 1 + np.abs(k))


def delta_rule_inter(ref, q, k, g, P, W, U, scale=None, initial_state=None, offsets=None, chunk=64,
                     head_map="grouped", final_state=None):
    """As `delta_rule`, a chunk at a time: the state's error goes on through Diag(start) - sum_j (end_j k_j) W_j^T,
    in size by element and in 2-norm by column, and into o through start_i q_i - sum_j P_ij W_j."""
    scale = np.shape(q)[-1] ** -0.5 if scale is None else scale
    P, W, U_ = f64(P), f64(W), f64(U)
    (rows, H, V), K = U_.shape, np.shape(q)[-1]
    q, k, g = of_value_heads(q, k, g, H, scale, head_map)
    ranges = sequences(rows, offsets)
    states = states_from(initial_state, (len(ranges), H, K, V))
    o, d, end = np.zeros(U_.shape), np.zeros(U_.shape), np.zeros_like(states)
    with np.errstate(invalid="ignore", over="ignore"):
        for n, r in enumerate(ranges):
            S, E = states[n], np.full(states[n].shape, FLUSH)
            e = column_norm(E)
            for part in chunks_of(r, chunk):
                local = [x[part].swapaxes(0, 1) for x in (q, k, P[..., :part.stop - part.start], W, U_)]
                decay = [x.swapaxes(0, 1) for x in decays(g[part])]
                o_part, d_part, S, E, e = _inter_chunk(*local, *decay, S, E, e, abs(scale))
                o[part], d[part] = o_part.swapaxes(0, 1), d_part.swapaxes(0, 1)
            end[n] = E if r.stop > r.start else 0.0
    return o, end.reshape(np.shape(ref[1])), d


def _inter_chunk(q, k, P, W, U_, start, end, S, E, e, scale):
    """Bounds of o and d, and S, E, e after the chunk; head first: q, k, W, start, end [H, n, K], P [H, n, n]."""
    n, K = k.shape[1:]
    i, j = np.indices((n, n))
    P = np.where(i >= j, P, 0)
    size, age = np.abs(S) + E, np.arange(n)[:, None]
    queries, keys = start * q, end * k

    def inherited(X):
        return np.minimum(np.abs(X) @ E, column_norm(X.swapaxes(1, 2)).swapaxes(1, 2) * e)

    # d = U - W S: a chain of K, and the difference
    d = U_ - W @ S
    lost = FLUSH * 2 * (n + 3) * (1 + np.abs(S) + E).sum(1, keepdims=True)
    here = U * (np.abs(U_) + (K + 1) * np.abs(W) @ size) + FLUSH * (np.abs(W) @ size + np.abs(U_) + K + 3) + lost
    through = inherited(W)
    wide = np.abs(d) + through + here

    # o: the scale, the decays, a chain of K and of up to i + 1 further terms
    own = (np.abs(queries) * ((FACTOR + 1) * (age + 1) + K + 2)) @ size + (np.abs(P) * (i - j + 1)) @ wide
    o = inherited(queries - P @ W) + np.abs(P) @ here + U * own
    most = (1 + np.abs(q)).max((1, 2), keepdims=True)
    o = o + (1 + scale) * FLUSH * 2 * (n + 3) * (most * (1 + size).sum(1, keepdims=True) + (1 + np.abs(P)) @ wide + n)

    # S: a product, the decayed keys, a chain of n
    G = start[:, -1, :, None] * np.eye(K) - keys.swapaxes(1, 2) @ W
    own = (FACTOR + 1) * n * start[:, -1, :, None] * size
    own = own + (np.abs(keys) * ((FACTOR + 1) * (n - 1 - age) + 1)).swapaxes(1, 2) @ wide
    own = U * own + np.abs(keys).swapaxes(1, 2) @ here
    own = own + FLUSH * 2 * (n + 3) * (1 + size + (1 + np.abs(k)).swapaxes(1, 2) @ wide)
    E = np.abs(G) @ E + own
    e = np.minimum(_spectral(G) * e + column_norm(own), column_norm(E))
    S = start[:, -1, :, None] * S + keys.swapaxes(1, 2) @ d
    return o, through + here, S, np.minimum(E, e), e


def _spectral(G):
    """The 2-norm of each matrix [H, 1, 1]; NaN where it is not finite."""
    squared = [np.linalg.eigvalsh(X.T @ X)[-1] if np.isfinite(X).all() else np.nan for X in G]
    return np.sqrt(np.maximum(squared, 0))[:, None, None]


def column_norm(x):
    """The 2-norm of every column: [H, K, V] -> [H, 1, V]."""
    return np.sqrt((x * x).sum(1, keepdims=True))
