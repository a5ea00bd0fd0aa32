"""Ops of Kimi Delta Attention before the delta rule: short convolution, decay gate."""

import numpy as np

from .. import _core
from .._arrays import apart, as_float32, first_where, output, outputs, refuse_shared_outputs, sequences_of
from .._scalars import as_real
from ..context import current
from ._basic import activation_id

__all__ = ["decay_gate", "short_conv"]


def short_conv(x, w, *, history=None, offsets=None, activation="silu", out=None, ctx=None):
    """Causal depthwise convolution over the history and the new tokens, then SiLU.

    ``y[t, c] = act(sum_j w[c, j] * x[t - W + 1 + j, c])``, summed in rising ``j``: any split of a sequence
    gives the same bytes. Subnormals are flushed: read as 0, and results below 2**-126 become 0.

    Source: Kimi Linear report, arXiv:2510.26692, section 4; before it Mamba, arXiv:2312.00752. Derivation:
    docs/math.md#short_conv.

    Parameters
    ----------
    x : (T, C) or (B, T, C) float32
        Projections, before the convolution.
    w : (C, W) float32
        Taps, 1 <= W <= 8; the last one multiplies the current token.
    history : (W-1, C) float32, optional
        Inputs before the first token, oldest first; zeros where None. ``(N, W-1, C)`` with `offsets`,
        ``(B, W-1, C)`` with a batch axis.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    activation : {"silu", None}
    out : tuple of two arrays, optional
        For `y` and the new history, None for one to make; the history's may be `history`.
    ctx : Context, optional

    Returns
    -------
    y : as `x`, float32
    history : float32, shaped as `history`
        The last W-1 inputs of each sequence, bit by bit.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, `offsets` do not rise from 0 to T, or `activation` is another.
    NotImplementedError
        If W is above 8.
    """
    x = as_float32(x, "x", ("T", "C"), ("B", "T", "C"))
    w = as_float32(w, "w", (x.shape[-1], "W"))
    C, W = w.shape
    if W < 1 or C < 1:
        raise ValueError(f"w has shape {list(w.shape)}; it must be [C, W] with C and W >= 1")
    kind = activation_id(activation, ("silu", None))
    offsets, lead = sequences_of(x, "x", 2, offsets)
    shape = (*lead, W - 1, C)
    if history is not None:
        history = as_float32(history, "history", shape)
    y, after = outputs(out, 2)
    y, after = output(y, x.shape, "out[0]", like=x), output(after, shape, "out[1]", like=x)
    refuse_shared_outputs(y, after)
    x, w, history = apart(x, y, after), apart(w, y, after), apart(history, y, after, same=after)
    N, T = len(offsets) - 1, x.size // C
    _core.short_conv(current(ctx)._core, y, after, x, w, history, offsets, N, T, C, W, kind)
    return y, after


def decay_gate(f, rate, dt_bias, *, lower_bound=None, out=None, ctx=None):
    """Log-decay in nats per token: ``-rate * softplus(f + dt_bias)``.

    With a lower bound it is ``lower_bound * sigmoid(rate * (f + dt_bias))`` instead, within (lower_bound, 0).

    Source: Kimi Linear report, arXiv:2510.26692; lower bound: flash-linear-attention,
    ``fla/ops/kda/gate.py``. Derivation: docs/math.md#decay_gate.

    Parameters
    ----------
    f : (T, H, K) or (T, H) float32
        Raw gate, of every key channel or of every head; with a batch axis in front, too.
    rate : (H,) float32
        exp(A_log) of a checkpoint, >= 0.
    dt_bias : (H, K) or (H,) float32
    lower_bound : float, optional
        Finite and below 0.
    out : as `f`, float32, optional
        Result; may be `f`.
    ctx : Context, optional

    Returns
    -------
    g : as `f`, float32
        Never positive.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, a rate is negative or `lower_bound` is not below 0.
    """
    dt_bias = as_float32(dt_bias, "dt_bias", ("H", "K"), ("H",))
    f = as_float32(f, "f", ("T", *dt_bias.shape), ("B", "T", *dt_bias.shape))
    H = dt_bias.shape[0]
    K = dt_bias.shape[1] if dt_bias.ndim == 2 else 1
    if dt_bias.size == 0:
        raise ValueError(f"dt_bias has shape {list(dt_bias.shape)}; H and K must be >= 1")
    rate = as_float32(rate, "rate", (H,))
    if h := first_where(rate, lambda r: r < 0):
        raise ValueError(f"rate[{h[0]}] is {rate[h]}; it must be >= 0: exp(A_log), was A_log passed?")
    bound = 0.0 if lower_bound is None else as_real(lower_bound, "lower_bound", "a number, or None")
    if lower_bound is not None and not -np.inf < bound < 0:
        raise ValueError(f"lower_bound is {lower_bound}; it must be finite and below 0, or None")
    g = output(out, f.shape, like=f)
    f, rate, dt_bias = apart(f, g, same=g), apart(rate, g), apart(dt_bias, g)
    _core.decay_gate(current(ctx)._core, g, f, rate, dt_bias, f.size // dt_bias.size, H, K, bound)
    return g
