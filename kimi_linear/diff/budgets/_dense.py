"""Budgets of the matrix products and of what routes between them: docs/math.md#linear, #route, #moe."""

import numpy as np

from ._basic import TINY, U
from ._basic import softmax as _softmax

__all__ = ["embedding", "linear", "moe", "route"]


def embedding(ref, ids, table):
    """A widening: exact."""
    return np.zeros_like(ref)


def _dot(x, w):
    """Error of ``x @ w.T``: the longest of 16 lanes rounds ceil(D/16) times, the tree 4 times."""
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64))
    D = x.shape[-1]
    return (-(-D // 16) + 5) * U * (x @ w.T) + D * TINY


def linear(ref, x, w, bias=None):
    """The dot product, then one rounding when the bias is added."""
    return _dot(x, w) + U * np.abs(ref) + TINY


def route(ref, scores, k, bias=None, groups=1, top_groups=1, function="sigmoid", renormalise=True, scale=1.0):
    """Ids are exact. Weights: the scores' errors, k - 1 additions, a division, the constant, the scale.

    Meant for scores whose choice does not hang on less than the error of s.
    """
    from ...reference import sigmoid, softmax

    ids, weights = ref
    at = np.asarray(ids, np.int64)
    s = (sigmoid if function == "sigmoid" else softmax)(scores)
    error = 4 * U * s + TINY if function == "sigmoid" else _softmax(s, scores)
    s, error = np.take_along_axis(s, at, -1), np.take_along_axis(error, at, -1)
    if not renormalise:
        return np.zeros(ids.shape), (error + 2 * U * s) * abs(scale) + TINY
    total = s.sum(-1, keepdims=True) + 1e-20
    spread = error.sum(-1, keepdims=True) / total
    bound = (error / total + (spread + (k + 5) * U) * s / total) * abs(scale) + TINY
    return np.zeros(ids.shape), bound


def moe(ref, x, ids, weights, w_gate, w_up, w_down, shared=None):
    """Each product's own error, what it becomes in the next (|silu'| <= 1.1), and k + 1 additions."""
    from ...reference import linear as product
    from ...reference import silu

    x, ids, weights = np.asarray(x, np.float64), np.asarray(ids), np.asarray(weights, np.float64)
    k = ids.shape[-1]
    total, size = np.zeros_like(ref), np.zeros_like(ref)
    for e in np.unique(ids):
        t, slot = np.nonzero(ids == e)
        gate, up = product(x[t], w_gate[e]), product(x[t], w_up[e])
        gate_error, up_error = _dot(x[t], w_gate[e]), _dot(x[t], w_up[e])
        h = silu(gate) * up
        h_error = (1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu(gate)) * up_error
                   + 8 * U * np.abs(h) + TINY * (1 + np.abs(gate * up)))
        down = np.abs(np.asarray(w_down[e], np.float64))
        weight = np.abs(weights[t, slot])[:, None]
        np.add.at(total, t, weight * (h_error @ down.T + _dot(np.abs(h) + h_error, down)))
        np.add.at(size, t, weight * np.abs(product(h, w_down[e])))
    return 1.01 * total + (k + 1) * U * size + U * np.abs(ref) + (k + 1) * TINY
