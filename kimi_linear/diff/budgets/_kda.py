"""Budgets of the short convolution and the decay gate. Derivations: docs/math.md, sections of these names."""

import numpy as np

from ... import reference
from ..._float64 import f64
from ._basic import FLUSH, TINY, U, finite, through_silu

__all__ = ["decay_gate", "short_conv"]


def short_conv(ref, x, w, history=None, offsets=None, activation="silu", stored=0.0):
    """W roundings on sum |w x|, through SiLU's slope; then SiLU within 5 u.

    Subnormal inputs count as 0, so FLUSH meets |w| and |x|. The history is a copy: no error at all. Stored: the sum,
    before SiLU, and the sigmoid in it.
    """
    total = _convolve(x, w, history, offsets) if activation is not None else None
    x, w = np.abs(f64(x)), np.abs(f64(w))
    before = None if history is None else np.abs(f64(history))
    magnitude = _convolve(x, w, before, offsets)
    reach = _convolve(np.ones_like(x), w, None if before is None else np.ones_like(before), offsets)
    taken = _convolve(x, np.ones_like(w), before, offsets)
    W = w.shape[1]
    bound = W * U * magnitude + FLUSH * (reach + taken + W)
    if activation is not None:
        bound = through_silu(total, bound + stored * magnitude)
        bound = bound + (6 * U + stored) * np.abs(ref[0]) + FLUSH * (2 + magnitude)
    return bound, np.zeros_like(ref[1])


def _convolve(x, w, history, offsets):
    return reference.short_conv(x, w, history=history, offsets=offsets, activation=None)[0]


def decay_gate(ref, f, rate, dt_bias, lower_bound=None):
    """The rounded x = f + dt_bias moves softplus by sigmoid(x) |x| u; the rest is relative.

    With a lower bound the sigmoid's argument rate x has two roundings, and its slope is s (1 - s).
    """
    x = f64(f) + f64(dt_bias)
    s, x = reference.sigmoid(x), np.abs(x)
    rate = np.abs(f64(rate).reshape(-1, *[1] * (np.ndim(dt_bias) - 1)))
    if lower_bound is None:
        return U * (6 * np.abs(ref) + finite(rate * s * x)) + TINY * (2 + 2 * rate)
    s = np.abs(ref) / -lower_bound
    moved = -lower_bound * 2 * finite(s * (1 - s) * rate * x)
    return U * (6 * np.abs(ref) + moved) + TINY * (2 - lower_bound)
