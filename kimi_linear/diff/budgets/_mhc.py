"""Budgets of hyper-connections: docs/math.md#mhc_pre, #mhc_post."""

import numpy as np

from ... import reference
from ..._float64 import f64
from ._basic import TINY, U

__all__ = ["mhc_collapse", "mhc_expand", "mhc_post", "mhc_pre"]


def mhc_expand(ref, x, n):
    """A copy."""
    return np.zeros(np.shape(ref))


def mhc_collapse(ref, x):
    """n - 1 sums and a division."""
    n = np.shape(x)[-2]
    return n * U * np.abs(f64(x)).sum(-2) / n + TINY


def mhc_pre(ref, x, fn, base, scale, norm_eps, eps=1e-6, iters=20, stored=0.0):
    """The dot's error over the root becomes the logits'; through the sigmoids that of pre and post, through softmax and
    the normalisations that of comb; y has pre's and its sum's. Stored: 1 / rms and its product with x, m, what it makes
    with scale, the logits; the sigmoids; exp, sums and quotients of comb; products and sums of y."""
    _, post, comb = ref
    x, scale = f64(x), f64(scale)
    n = x.shape[-2]
    with np.errstate(all="ignore"):  # tokens that are NaN, of zeros without eps or of infinities
        logits, error = _logits(x, f64(fn), f64(base), scale, norm_eps, stored)
        s, moved = _sigmoid(logits[..., :2 * n], error[..., :2 * n], stored)
        pre, pre_error = s[..., :n] + eps, moved[..., :n]
        pre_error = pre_error + (U + stored) * (pre + pre_error)
        y_error = ((pre_error + n * (U + stored) * (pre + pre_error))[..., None] * np.abs(x)).sum(-2) + n * TINY
        post_error = (2 + stored) * moved[..., n:] + stored * post + TINY
        square = (*x.shape[:-2], n, n)
        comb_error = _balanced(logits[..., 2 * n:].reshape(square), error[..., 2 * n:].reshape(square), eps, iters,
                               stored)
    return y_error, post_error, np.fmin(comb * comb_error, 1.0) + TINY


def _logits(x, fn, base, scale, eps, stored):
    """(value, bound of its error) of m scale + base."""
    n, D = x.shape[-2:]
    K, lanes = n * D, -(-n * D // 16)
    normed = x.reshape(*x.shape[:-2], K)
    normed = normed / np.sqrt((normed * normed).mean(-1, keepdims=True) + eps)
    m, size = normed @ fn.T, np.abs(normed) @ np.abs(fn).T
    error = ((lanes + 5) * U + 2 * stored) * size + ((lanes / 2 + 6) * U + stored) * np.abs(m)
    error = error + (K + np.abs(fn).sum(-1)) * K**0.5 * 2.0**-96
    scale = np.repeat(scale, [n, n, n * n])
    logits = m * scale + base
    return logits, np.abs(scale) * error + (U + stored) * (np.abs(m * scale) + np.abs(logits)) + TINY


def _sigmoid(x, error, stored):
    """(value, bound of its error): sigmoid' is s (1 - s), 1/4 at most, |sigmoid''| below 0.1; and its logarithm moves
    no more than x."""
    s = reference.sigmoid(x)
    moved = np.fmin(np.fmin(error / 4, s * (1 - s) * error + 0.05 * error * error), s * np.expm1(np.fmin(error, 1.0)))
    return s, moved + (4 * U + stored) * (s + moved) + TINY


def _balanced(logits, error, eps, iters, stored):
    """Largest logarithm of what an entry of comb is off by, its logits being off by `error`.

    To first order the errors d of the logarithms go through each normalisation as d - sum p d, p being what the sum's
    terms are of it, and gain its roundings. The matrices of these steps are multiplied from the last to the first.
    """
    n = logits.shape[-1]
    distance = logits.max(-1, keepdims=True) - logits
    error = error + (distance + error + error.max(-1, keepdims=True) + 2) * U + stored
    softmax = np.exp(-distance)
    softmax = softmax / softmax.sum(-1, keepdims=True)
    steps, c = [], softmax + eps
    for i in range(2 * iters - 1):
        axis = -2 if i % 2 == 0 else -1
        c = c / (c.sum(axis, keepdims=True) + eps)
        steps.append((c, axis))
    rounding = (n + 1) * U + 2 * stored
    begun = U + stored + 2 * TINY / (softmax + eps)

    def total(bend):
        """With a part of the second order, that sums are bent: `bend` a step."""
        from_entry = np.broadcast_to(np.eye(n * n).reshape(n * n, n, n), (*logits.shape[:-2], n * n, n, n))
        found = 0.0
        for p, axis in reversed(steps):
            found = found + (rounding + bend) * np.abs(from_entry).sum((-2, -1))
            from_entry = from_entry - p[..., None, :, :] * from_entry.sum(axis, keepdims=True)
        found = found + (np.abs(from_entry) * begun[..., None, :, :]).sum((-2, -1))
        from_entry = from_entry * (softmax / (softmax + eps))[..., None, :, :]
        found = found + (rounding + bend) * np.abs(from_entry).sum((-2, -1))
        from_entry = from_entry - softmax[..., None, :, :] * from_entry.sum(-1, keepdims=True)
        return found + (np.abs(from_entry) * error[..., None, :, :]).sum((-2, -1))

    largest = np.maximum(total(0.0).max(-1), error.max((-2, -1)))[..., None]
    return np.expm1(np.fmin(total(largest * largest), 700.0)).reshape(logits.shape)


def mhc_post(ref, y, x, post, comb, stored=0.0):
    """A product and n fma. Stored: post and comb, and what each makes."""
    y, x, post, comb = f64(y), f64(x), f64(post), f64(comb)
    n = x.shape[-2]
    size = np.abs(post)[..., None] * np.abs(y)[..., None, :] + np.swapaxes(np.abs(comb), -1, -2) @ np.abs(x)
    return ((n + 1) * U + 2 * stored) * size + (n + 1) * TINY
