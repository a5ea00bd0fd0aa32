"""Budgets of grouped-query attention and of rotary positions: derived in docs/math.md#attention and #rope."""

import numpy as np

from ._basic import TINY, U
from ._mla import attended

__all__ = ["attention", "rope"]


def attention(ref, q, k, v, scale, offsets=None, kv_offsets=None, stored=0.0):
    """That of latent attention with keys and values that are exact.

    A score is off by (K/16 + 7) u scale sum |q| |k|, a value by nothing; the running maximum, the segments and the
    sums over positions are the same. Stored: scale q, and the weights.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    offsets = [0, len(q)] if offsets is None else [int(i) for i in offsets]
    if kv_offsets is None:
        kv_offsets = offsets if len(k) == len(q) else [0, len(k)]
    group, units = q.shape[1] // k.shape[1], q.shape[2] / 16 + 7 + stored / U
    bound = np.empty(np.shape(ref))
    for n in range(len(offsets) - 1):
        t, s = slice(offsets[n], offsets[n + 1]), slice(int(kv_offsets[n]), int(kv_offsets[n + 1]))
        for h in range(q.shape[1]):
            key, value = k[s, h // group], v[s, h // group]
            lost = np.full((len(q[t]), len(key)), q.shape[2]), 0.0
            bound[t, h] = attended(q[t, h], key, value, np.abs(key), np.abs(value), abs(scale), np.sign(scale),
                                   units, 8 + stored / U, lost)
    return bound


def rope(ref, x, positions, base, rotary, stored=0.0):
    """Cosine and sine are rounded, then a product and an fma: 4 u of |a cos| + |b sin|.

    Angles are off by 2**-50 of themselves at most (the power, the product, the libraries' cosines), which moves the
    pair by that much of its length. What is copied is exact. Stored: the cosine, the sine, and the products.
    """
    x, half = np.asarray(x, np.float64), rotary // 2
    angle = np.asarray(positions, np.float64)[..., None, None] * base ** (-2.0 * np.arange(half) / max(rotary, 1))
    a, b = np.abs(x[..., :half]), np.abs(x[..., half:rotary])
    c, s, moved = np.abs(np.cos(angle)), np.abs(np.sin(angle)), 2.0**-50 * (1 + angle) * (a + b)
    units = 4 * U + 2 * stored
    pair = [units * (a * c + b * s), units * (b * c + a * s)]
    return np.concatenate([*(p + moved + 2 * TINY for p in pair), np.zeros_like(x[..., rotary:])], axis=-1)
