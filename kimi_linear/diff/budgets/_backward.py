"""Budgets of gradients: of kernels in float32 that follow the formula in any sensible order. Derivations:
docs/math.md#backward. A bound is a sum of magnitudes of terms, each times the roundings that the term has gone through;
a sum over tokens may be added up one by one."""

import numpy as np

from ... import reference
from ..._float64 import f64
from ._basic import TINY, U, finite

__all__ = ["decay_gate_backward", "gated_rms_norm_backward", "l2_norm_backward", "rms_norm_backward",
           "short_conv_backward", "swiglu_backward"]

ONE = 18.0  # from here on a sigmoid in float32 is 1, and 1 - sigmoid is 0


def lost(*factors):
    """What an underflow may take from a product in any order: TINY, before the factors that follow."""
    product = TINY
    for f in factors:
        product = product * (1 + np.abs(f))
    return product


def over_tokens(terms, axes=1):
    """Terms summed over all but their last axes, and how many a sum has."""
    lead = terms.shape[:terms.ndim - axes]
    return terms.sum(tuple(range(len(lead)))), int(np.prod(lead))


# ---- slopes ----------------------------------------------------------------------------------------


def slope_of_sigmoid(z, stored=0.0):
    """s t, and what it may be off by, also as s (1 - s)."""
    s, t = reference.sigmoid(z), reference.sigmoid(-f64(z))
    return s * t, s * ((10 * U + 2 * stored) * t + _of_complement(z, s, t, stored)) + lost(s)


def slope_of_silu(z, stored=0.0):
    """s (1 + z t), and what it may be off by, also as s + z s (1 - s)."""
    z = f64(z)
    s, t = reference.sigmoid(z), reference.sigmoid(-z)
    off = np.abs(z) * ((11 * U + 2 * stored) * t + _of_complement(z, s, t, stored))
    return s * (1 + z * t), s * (6 * U + 2 * stored + off) + lost(s, z)


def _of_complement(z, s, t, stored):
    """What 1 - s is off by: as much as s, beside which t may be small; t itself where the difference is 0."""
    return np.where(f64(z) < ONE, (4 * U + stored) * s, t)


# ---- norms ------------------------------------------------------------------------------------------


def rms_norm_backward(ref, dy, x, w, eps, stored=0.0):
    """Stored: 1 / rms, its product with x, those of dy with w and with that, the mean and the difference."""
    dx, of_w = _through_norm(f64(dy), 0.0, f64(x), f64(w), eps, np.mean, stored)
    return dx, of_w


def l2_norm_backward(ref, dy, x, eps=1e-6, stored=0.0):
    """As rms_norm's without a weight, and of a sum."""
    return _through_norm(f64(dy), 0.0, f64(x), 1.0, eps, np.sum, stored)[0]


def gated_rms_norm_backward(ref, dy, x, z, w, eps, activation="sigmoid", stored=0.0):
    """rms_norm's, of a gradient behind a gate within 5 u and a product; and three products, one of them with the gate's
    slope. Stored: what rms_norm's has, the gate, its slope, and the products with them."""
    dy, x, z, w = f64(dy), f64(x), f64(z), f64(w)
    with np.errstate(all="ignore"):  # rows that are NaN, or of zeros without eps
        if activation == "sigmoid":
            g, gone, (slope, off) = dy * reference.sigmoid(z), lost(dy), slope_of_sigmoid(z, stored)
        else:
            g, gone, (slope, off) = dy * reference.silu(z), lost(dy, z), slope_of_silu(z, stored)
        dx, dw = _through_norm(g, (6 * U + 2 * stored) * np.abs(g) + gone, x, w, eps, np.mean, stored)
        m = np.abs(reference.rms_norm(x, w, eps=eps))
        units = (_root(x.shape[-1]) + 5) * U + 5 * stored
        dz = np.abs(dy) * m * (units * np.abs(slope) + off) + lost(dy, w, m, slope)
    return dx, dz, dw


def _root(D):
    """Roundings of 1 / rms: half of those of D squares in 16 lanes, the mean and eps; the root and the division."""
    return -(-D // 16) / 2 + 6


def _through_norm(g, off, x, w, eps, total, stored):
    """Of a gradient g that is off by `off`: p = w g, c = mean(n p) or the sum, dx = r (p - n c), or as r p - x r^3
    mean(x p); and dw = sum(n g)."""
    D = x.shape[-1]
    root, lanes = _root(D), -(-D // 16)
    with np.errstate(all="ignore"):  # rows that are NaN, or of zeros without eps
        r = 1 / np.sqrt(total(x * x, axis=-1, keepdims=True) + eps)
        n, p = np.abs(x * r), np.abs(w * g)
        size = total(n * p, axis=-1, keepdims=True)
        moved = np.abs(w) * off + lost(w, g)
        of_c = total(n * moved + lost(n, p), axis=-1, keepdims=True) + TINY
        dx = ((root + 3) * U + 3 * stored) * p + moved
        dx = dx + ((3 * root + lanes + 12) * U + 8 * stored) * n * size + n * of_c + lost(n, size)
        terms, tokens = over_tokens(n * np.abs(g))
        dw = ((root + 2 + tokens) * U + 3 * stored) * terms + over_tokens(n * off + lost(n, g))[0]
        return r * dx + lost(r), dw + TINY


# ---- convolution -------------------------------------------------------------------------------------


def short_conv_backward(ref, dy, x, w, history=None, offsets=None, activation="silu", dfinal=None, stored=0.0):
    """dc = dy silu'(c): the slope is off by its own and by what c, W u sum |w x|, moves it. Then W products for dx, to
    which dfinal is added, and one a token for dw. Stored: c, its sigmoid and slope, and dc."""
    dy, x, w = f64(dy), f64(x), f64(w)
    history = None if history is None else f64(history)
    size = np.abs(dy), np.abs(x), np.abs(w), None if history is None else np.abs(history)
    with np.errstate(all="ignore"):  # rows that are NaN
        dc, off = size[0], np.zeros(dy.shape)
        if activation is not None:
            slope, moved = _slope_of_sum(_forward(x, w, history, offsets), _forward(*size[1:], offsets),
                                         w.shape[1], stored)
            dc, off = dc * np.abs(slope), dc * moved + (U + stored) * dc * np.abs(slope) + lost(dy, slope)
        last = None if dfinal is None else np.abs(f64(dfinal))
        exact, carried = (reference.short_conv_backward(d, *size[1:3], history=size[3], offsets=offsets,
                                                        activation=None, dfinal=e)
                          for d, e in ((dc, last), (off, None)))
    units = w.shape[1] + 2, len(x) + 1, w.shape[1] + 2
    return tuple(n * (U * a + TINY) + b for n, a, b in zip(units, exact, carried))


def _forward(x, w, history, offsets):
    return reference.short_conv(x, w, history=history, offsets=offsets, activation=None)[0]


def _slope_of_sum(c, magnitude, W, stored):
    """silu'(c) and what it is off by, of a c that is off by E: its own error, and E times the largest |silu''(v)| <=
    (2 + |v|) exp(-|v|) within 4 E of c; silu' lies between -0.1 and 1.1."""
    slope, off = slope_of_silu(c, stored)
    error = (W * U + stored) * magnitude + W * TINY
    near = np.maximum(np.abs(c) - 4 * error, 0)
    return slope, off + np.fmin(1.2, error * np.fmin(0.5, (2 + near) * np.exp(-near)))


# ---- gates -------------------------------------------------------------------------------------------


def decay_gate_backward(ref, dg, f, rate, dt_bias, lower_bound=None):
    """The rounded x = f + dt_bias moves sigmoid by s t |x| u and softplus by s |x| u; with a lower bound the argument
    rate x has two roundings. Then a product or two, and sums over tokens, of drate over channels."""
    dg, rate, bias = np.abs(f64(dg)), np.abs(f64(rate)), f64(dt_bias)
    axes = 1 if bias.size == rate.size == np.shape(f)[-1] else 2
    rates = rate.reshape(-1, *[1] * (axes - 1))
    x = f64(f) + bias.reshape(np.shape(f)[-axes:])
    with np.errstate(all="ignore"):  # gates of -infinity
        if lower_bound is None:
            slope, plus = reference.sigmoid(x), reference.softplus(x)
            moved = U * finite(slope * reference.sigmoid(-x) * np.abs(x))
            df, off = rates * dg * slope, rates * dg * (6 * U * slope + moved)
            terms, of_terms = dg * plus, dg * U * (6 * plus + finite(slope * np.abs(x))) + 2 * lost(dg, plus)
        else:
            slope, own = slope_of_sigmoid(rates * x)
            own = own + 2 * U * finite(slope * rates * np.abs(x))
            q, of_q = -lower_bound * dg * slope, -lower_bound * dg * (own + 2 * U * slope) + lost(lower_bound, dg)
            df, off = rates * q, rates * (of_q + U * q)
            terms, of_terms = finite(np.abs(x) * q), finite(np.abs(x) * (of_q + 2 * U * q)) + lost(x, q)
        off = off + lost(rates, dg, slope)
        sums, tokens = over_tokens(df, axes)
        dt = tokens * U * sums + over_tokens(off, axes)[0] + TINY
        of_rate = _of_heads(terms, axes) * (terms.size // max(rate.size, 1)) * U + _of_heads(of_terms, axes) + TINY
    return off, of_rate.reshape(np.shape(rate)), dt.reshape(bias.shape)


def _of_heads(terms, axes):
    return over_tokens(terms.sum(-1) if axes == 2 else terms)[0]


def swiglu_backward(ref, dy, gate, up, stored=0.0):
    """A slope and two products; silu within 5 u and one. Stored: the sigmoid, the slope or silu, and a product."""
    dy, gate, up = f64(dy), f64(gate), f64(up)
    slope, off = slope_of_silu(gate, stored)
    dgate = np.abs(dy * up) * (off + (2 * U + stored) * np.abs(slope)) + lost(dy, up, slope)
    return dgate, (6 * U + 2 * stored) * np.abs(ref[1]) + lost(dy, gate)
