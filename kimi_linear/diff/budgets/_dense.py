"""Budgets of the matrix products and of what routes between them: docs/math.md#linear, #route, #moe."""

import numpy as np

from ... import reference
from ._basic import TINY, U, situ, softmax, swiglu, through_clip, through_silu, through_situ, through_tanh

__all__ = ["embedding", "linear", "moe", "route"]


def embedding(ref, ids, table):
    """A widening: exact."""
    return np.zeros_like(ref)


def _dot(x, w):
    """Error of ``x @ w.T``: the longest of 16 lanes rounds ceil(D/16) times, the tree 4 times; of D <= 16 terms it
    rounds log2(D) times, for where it adds a zero it is exact."""
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64))
    D = x.shape[-1]
    roundings = -(-D // 16) + 5 if D > 16 else 1 + max(D - 1, 0).bit_length()
    return roundings * U * (x @ w.T) + D * TINY


def linear(ref, x, w, bias=None, stored=0.0):
    """The dot product, then one rounding when the bias is added. Stored: the product, before that."""
    if bias is None:
        return _dot(x, w)
    return _dot(x, w) + U * np.abs(ref) + stored * np.abs(ref - np.asarray(bias, np.float64)) + TINY


def route(ref, scores, k, bias=None, groups=1, top_groups=1, function="sigmoid", renormalise=True, scale=1.0):
    """Ids are exact. Weights: the scores' errors, k - 1 additions, a division (whose result may underflow before it
    meets the scale), the constant, the scale.

    Meant for scores whose choice does not hang on less than the error of s.
    """
    ids, weights = ref
    at = np.asarray(ids, np.int64)
    s = (reference.sigmoid if function == "sigmoid" else reference.softmax)(scores)
    error = 4 * U * s + TINY if function == "sigmoid" else softmax(s, scores)
    s, error = np.take_along_axis(s, at, -1), np.take_along_axis(error, at, -1)
    if not renormalise:
        return np.zeros(ids.shape), (error + 2 * U * s) * abs(scale) + TINY
    total = s.sum(-1, keepdims=True) + 1e-20
    spread = error.sum(-1, keepdims=True) / total
    bound = (error / total + (spread + (k + 5) * U) * s / total + TINY) * abs(scale) + TINY
    return np.zeros(ids.shape), bound


def _swiglu(gate, up, gate_error, up_error, limit, stored):
    """(value, bound of its error) of what has errors already. Stored: the sigmoid and its product with gate."""
    if limit is not None:
        gate_error, up_error = through_clip(gate, gate_error, -np.inf, limit), through_clip(up, up_error, -limit, limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    silu = reference.silu(gate)
    h = silu * up
    return h, (through_silu(gate, gate_error) * (np.abs(up) + up_error) + np.abs(silu) * up_error
               + swiglu(h, gate, up, limit, stored))


def _situ(gate, up, gate_error, up_error, beta, linear_beta):
    """The same; nothing is stored."""
    a, b = reference.situ(gate, np.ones_like(up), beta=beta), up
    if linear_beta is not None:
        b, up_error = linear_beta * np.tanh(up / linear_beta), through_tanh(up, up_error, linear_beta)
    h = a * b
    return h, (through_situ(gate, gate_error, beta) * (np.abs(b) + up_error) + np.abs(a) * up_error
               + situ(h, gate, up, beta, linear_beta))


def _expert(x, w_gate, w_up, w_down, betas, limit, stored):
    """(value, bound of its error) of ``w_down swiglu(w_gate x, w_up x)``, or of `situ` where there are betas: each
    product's own error, and what it becomes in the next. Stored: each product, what the activation has, and h."""
    gate, up = reference.linear(x, w_gate), reference.linear(x, w_up)
    gate_error = _dot(x, w_gate) + stored * np.abs(gate)
    up_error = _dot(x, w_up) + stored * np.abs(up)
    if betas is None:
        h, h_error = _swiglu(gate, up, gate_error, up_error, limit, stored)
    else:
        h, h_error = _situ(gate, up, gate_error, up_error, *betas)
    h_error += stored * np.abs(h)
    down, value = np.abs(np.asarray(w_down, np.float64)), reference.linear(h, w_down)
    return value, h_error @ down.T + _dot(np.abs(h) + h_error, down) + stored * np.abs(value)


def _shared_error(x, shared, shared_gate, betas, limit, stored):
    """Bound of the error of what is added last: 0 where it is given as an array and not scaled. Stored: the gate's
    logit, its sigmoid, and the product."""
    given = isinstance(shared, tuple)
    value, error = _expert(x, *shared, betas, limit, stored) if given else (np.asarray(shared, np.float64), 0.0)
    if shared_gate is None:
        return error
    logit = np.abs(np.asarray(x, np.float64) @ np.asarray(shared_gate, np.float64).T) if stored else 0.0
    share_error = (_dot(x, shared_gate) + stored * logit) / 4 + 4 * U + stored  # sigmoid' <= 1/4
    return share_error * (np.abs(value) + error) + error + (U + stored) * np.abs(value)


def moe(ref, x, ids, weights, w_gate, w_up, w_down, shared=None, shared_gate=None, activation="silu", situ=None,
        limit=None, stored=0.0):
    """The experts' own errors by their weights, k + 1 additions, and the shared expert's error. Stored: besides theirs,
    the weights, what they multiply, and each sum."""
    x, ids, weights = np.asarray(x, np.float64), np.asarray(ids), np.asarray(weights, np.float64)
    k = ids.shape[-1]
    total, size = np.zeros_like(ref), np.zeros_like(ref)
    for e in np.unique(ids):
        t, slot = np.nonzero(ids == e)
        value, error = _expert(x[t], w_gate[e], w_up[e], w_down[e], situ, limit, stored)
        weight = np.abs(weights[t, slot])[:, None]
        np.add.at(total, t, weight * error)
        np.add.at(size, t, weight * np.abs(value))
    if shared is not None:
        total += _shared_error(x, shared, shared_gate, situ, limit, stored)
    return 1.01 * total + ((k + 1) * U + (k + 2) * stored) * size + (U + stored) * np.abs(ref) + (k + 1) * TINY
