"""Gradients of the small ops of a delta net's layer in float64: what a backward kernel must give.

Re-exported by :mod:`kimi_linear.reference`, whose conventions hold here. A function ``<op>_backward`` takes the
gradients of the op's results, then the op's own arguments, and gives d<argument> in their order. A weight's gradient
is summed over all tokens. The derivations are docs/math.md#backward; n is the normalised x, s a sigmoid and t = 1 - s,
always taken as sigmoid(-z), in which nothing cancels.
"""

from __future__ import annotations

import numpy as np

from . import reference
from ._arrays import check_shape
from ._batches import any_batch
from ._float64 import f64, of_sequences, sequences

__all__ = ["decay_gate_backward", "gated_rms_norm_backward", "l2_norm_backward", "rms_norm_backward",
           "short_conv_backward", "swiglu_backward"]


def rms_norm_backward(dy, x, w, *, eps):
    """``n = x r``, ``r = 1 / sqrt(mean(x^2) + eps)``; ``dx = r (w dy - n mean(n w dy))``, ``dw = sum(n dy)``.

    dy, x [..., D], w [D] -> dx [..., D], dw [D], which is summed over every axis but the last.
    """
    dy, x, w = _alike(dy, x, "dy"), f64(x), f64(w)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    n = x * r
    dx = r * (w * dy - n * (n * w * dy).mean(-1, keepdims=True))
    return dx, _over_tokens(n * dy)


def gated_rms_norm_backward(dy, x, z, w, *, eps, activation="sigmoid"):
    """Of ``y = m a(z)``, ``m = rms_norm(x, w)``: ``dz = dy m a'(z)``; dx and dw are rms_norm's, of ``dy a(z)``.

    ``a' = s t`` (sigmoid) or ``s (1 + z t)`` (silu). dy, x, z [..., D], w [D] -> dx, dz [..., D], dw [D].
    """
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f'activation is {activation!r}; it must be "sigmoid" or "silu"')
    dy, z = _alike(dy, x, "dy"), _alike(z, x, "z")
    a, slope = (reference.sigmoid, sigmoid_slope) if activation == "sigmoid" else (reference.silu, silu_slope)
    dx, dw = rms_norm_backward(dy * a(z), x, w, eps=eps)
    return dx, dy * reference.rms_norm(x, w, eps=eps) * slope(z), dw


def l2_norm_backward(dy, x, *, eps=1e-6):
    """``n = x r``, ``r = 1 / sqrt(sum(x^2) + eps)``; ``dx = r (dy - n sum(n dy))``. dy, x [..., D] -> dx [..., D]."""
    dy, x = _alike(dy, x, "dy"), f64(x)
    r = 1 / np.sqrt((x * x).sum(-1, keepdims=True) + eps)
    n = x * r
    return r * (dy - n * (n * dy).sum(-1, keepdims=True))


@any_batch
def short_conv_backward(dy, x, w, *, history=None, offsets=None, activation="silu", dfinal=None):
    """Of ``y[t] = act(c[t])``, ``c[t] = sum_j w[j] x[t - W + 1 + j]``, a channel: ``dc = dy act'(c)``,
    ``dx[t] = sum_j w[j] dc[t + W - 1 - j]``, ``dw[j] = sum_t dc[t] x[t - W + 1 + j]``.

    dy, x [T, C], w [C, W], history [W-1, C] (or [N, W-1, C]) -> dx [T, C], dw [C, W], and dhistory in the shape of the
    history that the op hands on, where history is None of the zeros that stood there. Tokens behind a sequence's end
    give nothing. dfinal, shaped as it, is the gradient of the history that is handed on: a copy of the last W - 1
    inputs, to whose gradients it is added, or of what came before where a sequence is shorter than that.
    """
    if activation not in ("silu", None):
        raise ValueError(f'activation is {activation!r}; it must be "silu" or None')
    dy, x, w = _alike(dy, x, "dy"), f64(x), f64(w)
    (T, C), W = x.shape, w.shape[1]
    check_shape(w, "w", (C, "W"))
    ranges = sequences(T, offsets)
    history, dfinal = (of_sequences(a, name, (len(ranges), W - 1, C))
                       for a, name in ((history, "history"), (dfinal, "dfinal")))
    dx, dw, dhistory = np.zeros((T, C)), np.zeros((C, W)), np.zeros(history.shape)
    for n, r in enumerate(ranges):
        seen, length = np.concatenate([history[n], x[r]]), r.stop - r.start
        dc, dseen = dy[r], np.zeros(seen.shape)
        if activation:
            dc = dc * silu_slope(sum(w[:, j] * seen[j:j + length] for j in range(W)))
        for j in range(W):
            dseen[j:j + length] += w[:, j] * dc
            dw[:, j] += (dc * seen[j:j + length]).sum(0)
        dseen[length:] += dfinal[n]
        dhistory[n], dx[r] = dseen[:W - 1], dseen[W - 1:]
    return dx, dw, dhistory if offsets is not None else dhistory[0]


def decay_gate_backward(dg, f, rate, dt_bias, *, lower_bound=None):
    """With ``x = f + dt_bias``: ``df = -rate sigmoid(x) dg`` and ``drate = -sum(softplus(x) dg)``; with a lower bound,
    ``q = lower_bound s t dg``, s = sigmoid(rate x): ``df = rate q`` and ``drate = sum(x q)``. ``ddt_bias = sum(df)``.

    Shapes as of `decay_gate`: dg, df as f, drate [H] over tokens and channels, ddt_bias as dt_bias over tokens. The
    gradient is that of rate = exp(A_log); dA_log = rate drate.
    """
    dg, f, rate, dt_bias = _alike(dg, f, "dg"), f64(f), f64(rate), f64(dt_bias)
    axes = 1 if dt_bias.size == rate.size == f.shape[-1] else 2
    rates = rate.reshape(-1, *[1] * (axes - 1))
    x = f + dt_bias.reshape(f.shape[-axes:])
    if lower_bound is None:
        df, of_rate = -rates * reference.sigmoid(x) * dg, -reference.softplus(x) * dg
    else:
        q = lower_bound * sigmoid_slope(rates * x) * dg
        df, of_rate = rates * q, x * q
    return df, _of_heads(of_rate, axes).reshape(rate.shape), _over_tokens(df, axes).reshape(dt_bias.shape)


def swiglu_backward(dy, gate, up):
    """``dgate = dy up silu'(gate)``, ``silu' = s (1 + gate t)``; ``dup = dy silu(gate)``. All [..., F]."""
    dy, up = _alike(dy, gate, "dy"), _alike(up, gate, "up")
    return dy * up * silu_slope(gate), dy * reference.silu(gate)


# ---- what they share -----------------------------------------------------------------------------


def sigmoid_slope(z):
    """``s t``, the derivative of sigmoid."""
    return reference.sigmoid(z) * reference.sigmoid(-f64(z))


def silu_slope(z):
    """``s (1 + z t)``, the derivative of silu."""
    return reference.sigmoid(z) * (1 + f64(z) * reference.sigmoid(-f64(z)))


def _of_heads(terms, axes):
    """Terms [..., H, K] (axes 2) or [..., H] (1) summed to [H]."""
    return _over_tokens(terms.sum(-1) if axes == 2 else terms)


def _over_tokens(terms, axes=1):
    """Terms summed over all but their last axes."""
    return terms.sum(tuple(range(terms.ndim - axes)))


def _alike(a, x, name):
    """`a` as float64; ValueError where it has not the shape of x."""
    a = f64(a)
    check_shape(a, name, np.shape(x))
    return a
