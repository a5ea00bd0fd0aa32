"""Budgets of the elementwise ops, the norms and attention over depth."""

import numpy as np

from ... import reference
from ..._float64 import f64

__all__ = ["add", "attn_res", "gated_rms_norm", "l2_norm", "layer_norm", "rms_norm", "sigmoid", "sigmoid_gate", "situ",
           "softmax", "swiglu"]

U = 2.0**-24
TINY = 2.0**-149  # the smallest subnormal: results down there are rounded to a multiple of it
FLUSH = 2.0**-126  # what an operation with flushed subnormals may lose


def finite(x):
    """x, and 0 where it is not finite."""
    return np.where(np.isfinite(x), x, 0.0)


def through_silu(x, error):
    """What an error of x becomes in silu(x): |silu'(x)| of it and, as |silu''| <= 1/2, a part of its square that covers
    an error 4 times as large; 1.1 of it at most, for |silu'| <= 1.1 everywhere."""
    s = reference.sigmoid(x)
    return np.fmin(1.1 * error, np.abs(s * (1 + x * (1 - s))) * error + error * error)


def through_clip(x, error, low, high):
    """What an error of x becomes in clip(x, low, high): at most itself, and none where x is far outside."""
    y = np.clip(x, low, high)
    return np.maximum(np.clip(x + error, low, high) - y, y - np.clip(x - error, low, high))


def through_tanh(x, error, beta):
    """What an error of x becomes in beta tanh(x / beta): the slope's part of it and, as the second derivative is 0.77 /
    beta at most, a part of its square that covers an error 4 times as large; never more than it was."""
    t = np.tanh(x / beta)
    return np.fmin(error, (1 - t * t) * error + 1.54 / beta * error * error)


def through_situ(x, error, beta):
    """The same in beta tanh(x / beta) sigmoid(x), whose slope is at most silu's, and whose second derivative is at most
    1/2 + 0.77 / beta."""
    t, s = np.tanh(x / beta), reference.sigmoid(x)
    slope = s * (1 - t * t) + beta * t * s * (1 - s)
    return np.fmin(1.1 * error, np.abs(slope) * error + (1 + 1.54 / beta) * error * error)


def reweighed(distance, error):
    """A softmax over the first axis whose exponents -distance are off by `error`: its weights, what each may gain, and
    the least that their sum may come to."""
    e = np.exp(-distance)
    total = e.sum(axis=0)
    w = e / total
    gained = np.where(error < 1, np.expm1(np.minimum(error, 1)) * w, np.exp(np.minimum(error - distance, 700)) / total)
    return w, gained, (w * np.exp(-error)).sum(axis=0)


def _relative(ref, units, stored=0.0):
    return (units * U + stored) * np.abs(ref) + TINY


def add(ref, a, b):
    """One rounding."""
    return _relative(ref, 1)


def sigmoid(ref, x):
    """exp within 1.6 u, one sum, one division: 4 u."""
    return _relative(ref, 4)


def sigmoid_gate(ref, x, gate, stored=0.0):
    """sigmoid and a product: 6 u; a sigmoid that underflows is off by TINY before it meets x. Stored: the sigmoid."""
    return _relative(ref, 6, stored) + TINY * np.abs(np.asarray(x, np.float64))


def swiglu(ref, gate, up, limit=None, stored=0.0):
    """sigmoid within 4 u, then two products: 6 u; a sigmoid that underflows is off by TINY before them, and so is its
    product with gate before the second. A limit in float32 is off by 1 u, which 1.3 times reaches silu(limit): 9 u.
    Stored: the sigmoid, and its product with gate."""
    gate, up = f64(gate), f64(up)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return _relative(ref, 6 if limit is None else 9, 2 * stored) + TINY * (1 + np.abs(gate)) * np.abs(up)


def situ(ref, gate, up, beta, linear_beta=None):
    """Gate's factor: its quotient and product with beta, tanh within 4.3 u, and beta in float32, 7.3 u; sigmoid and two
    products: 14 u. That of up, where it is bounded, 7.3 u more. What underflows is off by TINY before what follows: the
    quotient, which meets beta, that product, the sigmoid, and the product of both."""
    gate, up = f64(gate), f64(up)
    s, a = reference.sigmoid(gate), np.abs(beta * np.tanh(gate / beta))
    b, lost = (up, 0.0) if linear_beta is None else (linear_beta * np.tanh(up / linear_beta), linear_beta + 1)
    lost = ((beta + 1) * s + a + 1) * np.abs(b) + a * s * lost
    return _relative(ref, 14 if linear_beta is None else 21) + TINY * lost


def softmax(ref, x, stored=0.0):
    """The rounded difference x - m moves exp by |x - m| u; then a sum of D terms in 16 lanes, and a division. Stored:
    exp, and the sum."""
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.abs(x - x.max(axis=-1, keepdims=True))
    shift = np.where(np.isfinite(distance), distance, 0)
    spread = (np.abs(ref) * shift).sum(axis=-1, keepdims=True)  # what the same rounding does to the sum
    return _relative(ref, x.shape[-1] / 16 + 8 + shift + spread, 2 * stored)


def rms_norm(ref, x, w, eps, stored=0.0):
    """A sum of squares of one sign in 16 lanes (half of its error survives the root), then five roundings.

    A product that underflows before it meets w is off by TINY. Stored: 1 / rms, and its product with x.
    """
    return _relative(ref, np.shape(x)[-1] / 32 + 8, 2 * stored) + TINY * np.abs(np.asarray(w, np.float64))


def layer_norm(ref, x, w, b, eps, stored=0.0):
    """In units of the root: a shift of all differences, which is what the mean of the rest is off by, and 2 u of each;
    the root as rms_norm's, 2 u for its differences, and half the square of the shift; two products, then the sum with
    b. The first mean is off by `first`, of which the rest knows all but a rounding.

    Never more than two rows of that norm can lie apart. Stored: the difference, 1 / root, their product, that with w.
    """
    x, w = f64(x), np.abs(f64(w))
    lanes = -(-x.shape[-1] // 16)
    with np.errstate(all="ignore"):  # rows that are not finite, or equal values without eps
        c = np.abs(x - x.mean(-1, keepdims=True))
        var = (c * c).mean(-1, keepdims=True)
        root = np.sqrt(var + eps)
        first = (lanes + 5) * U * np.abs(x).mean(-1, keepdims=True)
        shift = ((lanes + 6) * (np.sqrt(var) + first) + first) * U / root + 4 * TINY / np.maximum(root, 2.0**-50)
        z = c / root
        lost = shift + z * ((lanes / 2 + 12) * U + shift * shift + U * first / root)
        lost = np.fmin(lost, 1.01 * (z + x.shape[-1] ** 0.5))
    return w * (lost + 4 * stored * z) + U * np.abs(ref) + TINY * (1 + w)


def l2_norm(ref, x, eps=1e-6, stored=0.0):
    """As rms_norm. Stored: 1 / norm."""
    return _relative(ref, np.shape(x)[-1] / 32 + 8, stored)


def gated_rms_norm(ref, x, z, w, eps, activation="sigmoid", stored=0.0):
    """rms_norm, then a gate within 4 u (sigmoid) or 5 u (silu), and a product; each is off by what underflows in it
    before it meets the other. Stored: the norm's two and its result, and the gate."""
    z = f64(z)
    with np.errstate(invalid="ignore"):  # a row of zeros without eps
        norm = np.abs(reference.rms_norm(x, w, eps=eps))
    act, lost = (reference.sigmoid(z), 1.0) if activation == "sigmoid" else (np.abs(reference.silu(z)), 1 + np.abs(z))
    lost = (1 + np.abs(f64(w))) * act + lost * norm
    return _relative(ref, np.shape(x)[-1] / 32 + 14, 4 * stored) + TINY * lost


def attn_res(ref, snapshots, x, w, eps, stored=0.0):
    """Each score is off by e_j, of its dot and of its norm, which moves its weight by e_j + (distance to the maximum +
    what e does to it) u; the result by sum_j p_j |v_j - y| of that, plus the roundings of the sums over j. Without
    snapshots nothing is rounded. Stored: 1 / rms, its product with v, that with w, and the score; and the weights."""
    if len(snapshots) == 0:
        return np.zeros(np.shape(ref))
    v, w = np.concatenate([f64(snapshots), f64(x)[None]]), f64(w)
    n, D = len(v), v.shape[-1]
    lanes = -(-D // 16)
    with np.errstate(all="ignore"):  # rows that are NaN, of zeros without eps or of infinities
        terms = reference.rms_norm(v, w, eps=eps)
        score, size = terms.sum(-1), np.abs(terms).sum(-1)
        distance = score.max(axis=0) - score
        error = ((lanes + 5) * U + 4 * stored) * size + (lanes / 2 + 6) * U * np.abs(score)
        error = error + (D + np.abs(w).sum()) * D**0.5 * 2.0**-96
        error = error + (distance + error + error.max(axis=0) + 2) * U
        p, gained, least = (a[..., None] for a in reweighed(distance, error))
        apart = np.abs(v - (p * v).sum(axis=0))
        moved = np.fmin((gained * apart).sum(axis=0) / least, apart.max(axis=0))
        size = np.fmin(((p + gained) * np.abs(v)).sum(axis=0) / least, np.abs(v).max(axis=0))
    sums = ((n + 1) * U + stored) * size
    total = (-(-n // 16) + 4) * U * (np.abs(ref) + moved)
    return moved + sums + total + TINY * (n + 2 * np.abs(v).sum(axis=0))
