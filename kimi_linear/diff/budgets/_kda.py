"""Budgets of the KDA ops. Derivations: docs/math.md, sections short_conv, decay_gate and delta_rule."""

import numpy as np

from ... import reference

__all__ = ["decay_gate", "delta_rule", "short_conv"]

U = 2.0**-24
TINY = 2.0**-149  # the smallest subnormal
FLUSH = 2.0**-126  # what an operation with flushed subnormals may lose
EXP = 1.6  # error of exp, in u
SLOPE = 1.1  # largest slope of SiLU


def short_conv(ref, x, w, history=None, offsets=None, activation="silu"):
    """W roundings on sum |w x|, through SiLU's slope of at most 1.1; then SiLU within 5 u.

    Subnormal inputs count as 0, so FLUSH meets |w| and |x|. The history is a copy: no error at all.
    """
    x, w = np.abs(_f64(x)), np.abs(_f64(w))
    before = None if history is None else np.abs(_f64(history))
    magnitude = _convolve(x, w, before, offsets)
    reach = _convolve(np.ones_like(x), w, None if before is None else np.ones_like(before), offsets)
    taken = _convolve(x, np.ones_like(w), before, offsets)
    W = w.shape[1]
    bound = W * U * magnitude + FLUSH * (reach + taken + W)
    if activation is not None:
        bound = SLOPE * bound + 6 * U * np.abs(ref[0]) + FLUSH * (2 + magnitude)
    return bound, np.zeros_like(ref[1])


def _convolve(x, w, history, offsets):
    return reference.short_conv(x, w, history=history, offsets=offsets, activation=None)[0]


def decay_gate(ref, f, rate, dt_bias, lower_bound=None):
    """The rounded x = f + dt_bias moves softplus by sigmoid(x) |x| u; the rest is relative.

    With a lower bound the sigmoid's argument rate x has two roundings, and its slope is s (1 - s).
    """
    x = _f64(f) + _f64(dt_bias)
    s, x = reference.sigmoid(x), np.abs(x)
    rate = np.abs(_f64(rate).reshape(-1, *[1] * (np.ndim(dt_bias) - 1)))
    if lower_bound is None:
        return U * (6 * np.abs(ref) + _finite(rate * s * x)) + TINY * (2 + rate)
    s = np.abs(ref) / -lower_bound
    moved = -lower_bound * 2 * _finite(s * (1 - s) * rate * x)
    return U * (6 * np.abs(ref) + moved) + TINY * (2 - lower_bound)


def delta_rule(ref, q, k, v, g, beta, scale=None, initial_state=None, offsets=None, form="auto", chunk=64,
               l2_norm=False, l2_eps=1e-6, head_map="grouped", checkpoints=None, final_state=None):
    """A running bound, computed beside the recurrence in float64.

    Two bounds of the state's error are carried and each is kept below the other: E of every element, and e,
    the 2-norm of every column. E follows single elements through strong decays; e follows the whole through
    I - beta k k^T, whose 2-norm is 1 for unit keys, where E would double with every token.
    """
    q, k, v, beta = _f64(q), _f64(k), _f64(v), _f64(beta)
    (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
    key = 0.0  # relative error of every q and k
    if l2_norm:
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + l2_eps) for a in (q, k))
        key = (K / 32 + 8) * U
    heads = np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk
    scale = K**-0.5 if scale is None else scale
    q, k = scale * q[:, heads], k[:, heads]
    g = np.zeros((T, Hv, 1)) if g is None else _f64(g).reshape(T, Hv, K if np.ndim(g) == 3 else 1)
    offsets = [0, T] if offsets is None else [int(n) for n in offsets]
    S0 = np.zeros((len(offsets) - 1, Hv, K, V)) if initial_state is None else _f64(initial_state)
    S0 = S0.reshape(-1, Hv, K, V)

    o, E = np.zeros((T, Hv, V)), np.zeros_like(S0)
    kept = []
    cuts = _cuts(checkpoints, np.diff(offsets))
    with np.errstate(invalid="ignore", over="ignore"):
        for n, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            run = _Bound(S0[n], key, abs(scale))
            kept += [run.E.copy()] * (0 in cuts[n])
            for t in range(first, last):
                o[t] = run.step(q[t], k[t], v[t], g[t], beta[t])
                kept += [run.E.copy()] * (t + 1 - first in cuts[n])
            E[n] = run.E if last > first else 0.0  # a state handed on is a copy
    bounds = o.reshape(np.shape(ref[0])), E.reshape(np.shape(ref[1]))
    return bounds if checkpoints is None else (*bounds, np.array(kept).reshape(-1, Hv, K, V))


class _Bound:
    """Values S [H, K, V] of the recurrence, and bounds of the error of what float32 makes of them."""

    def __init__(self, S, key, scale):
        self.S, self.key, self.scale = S.copy(), key, scale
        self.E = np.full(S.shape, FLUSH)  # each element
        self.e = np.sqrt(S.shape[1]) * FLUSH + np.zeros((S.shape[0], 1, S.shape[2]))  # each column's 2-norm
        self.sum = (S.shape[1] / 2 + 1.5) * U  # two chains of K / 2 fma, and their sum

    def step(self, q, k, v, g, beta):
        """One token: q, k, g [H, K], v [H, V], beta [H]; the bound of o [H, V]."""
        K = self.S.shape[1]
        a, q, k = np.exp(g)[:, :, None], q[:, :, None], k[:, :, None]
        v, beta = v[:, None], beta[:, None, None]
        q1, k1 = np.abs(q), np.abs(k)
        q2, k2 = (np.sqrt((x * x).sum(1, keepdims=True)) for x in (q, k))

        # S' = a S: exp, then a product
        here = (EXP + 1) * U * a * (np.abs(self.S) + self.E) + FLUSH * (np.abs(self.S) + 2)
        S, E = a * self.S, a * self.E + here
        e = np.minimum(a.max(1, keepdims=True) * self.e + _norm(here), _norm(E))

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
        grow = np.maximum(1, np.abs(1 - beta * k2 * k2 * (1 + 2 * self.key)))
        E = E + k1 * (inherited + here) + fma
        e = np.minimum(grow * e + k2 * here + _norm(fma), _norm(E))
        self.S, self.E, self.e = after, np.minimum(E, e), e

        # o = S^T (scale q): the product with scale, and the sum
        size = np.abs(after) + self.E
        bound = np.minimum(q2 * e, (q1 * self.E).sum(1, keepdims=True))
        bound = bound + (self.sum + 1.5 * U + self.key) * (q1 * size).sum(1, keepdims=True)
        return (bound + FLUSH * ((1 + self.scale) * size.sum(1, keepdims=True) + K))[:, 0]


def _norm(x):
    return np.sqrt((x * x).sum(1, keepdims=True))


def _cuts(checkpoints, lengths):
    """Token counts after which a state is kept, for each sequence."""
    if checkpoints is None:
        return [()] * len(lengths)
    if isinstance(checkpoints, int | np.integer):
        return [range(checkpoints, n + 1, checkpoints) for n in lengths]
    return checkpoints if np.ndim(checkpoints[0]) else [checkpoints]


def _f64(x):
    return np.asarray(x).astype(np.float64)


def _finite(x):
    return np.where(np.isfinite(x), x, 0.0)
