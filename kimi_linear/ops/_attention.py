"""Softmax attention with grouped queries, and rotary positions."""

import math

import numpy as np

from .. import _core
from .._arrays import apart, as_float32, as_integers, check_shape, output, refuse_shared
from .._scalars import as_finite, as_real, as_whole
from ..context import current
from ._cached import both_offsets, one_axis, typed


def rope(x, positions, *, base, rotary, out=None, ctx=None):
    """Rotary positions: pairs of values of each head are turned by an angle that grows with the position.

    Values j and ``j + rotary / 2`` of a head, j below ``rotary / 2``, are turned by
    ``positions[t] * base ** (-2 j / rotary)``; the others are copied. Angle, cosine and sine are computed in double.

    Source: RoFormer, arXiv:2104.09864, with the pairs of GPT-NeoX, arXiv:2204.06745. Derivation: docs/math.md#rope.

    Parameters
    ----------
    x : (..., H, K) float32
        (T, H, K), or with a batch axis before T.
    positions : (...) int
        One for each token, >= 0; the axes of `x` but for the last two.
    base : float
        > 0: rope_theta of a config.
    rotary : int
        How many of the first values of a head are turned: even, 0 to K.
    out : (..., H, K) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., H, K) float32

    Raises
    ------
    ValueError
        If shapes disagree, `rotary` is odd or above K, `base` is not > 0, or a position is negative.
    TypeError
        If positions are not integers, or an argument is of another type.
    """
    x = as_float32(x, "x")
    if x.ndim < 3 or min(x.shape[-2:]) < 1:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [T, H, K] with H and K >= 1")
    H, K = x.shape[-2:]
    positions = as_integers(positions, "positions", x.shape[:-2], dtype=np.int64, low=0, high=2**62)
    base = as_real(base, "base")
    if not 0.0 < base < math.inf:
        raise ValueError(f"base is {base}; it must be > 0 and finite")
    rotary = as_whole(rotary, "rotary", largest=None)
    if not 0 <= rotary <= K or rotary % 2:
        raise ValueError(f"rotary is {rotary}; it must be even, from 0 to K = {K}")
    y = output(out, x.shape, like=x)
    x = apart(x, y, same=y)
    _core.rope(current(ctx)._core, y, x, positions, positions.size, H, K, rotary, base)
    return y


def attention(q, k, v, *, scale, offsets=None, kv_offsets=None, out=None, ctx=None):
    """Causal softmax attention; groups of query heads share a head of keys and values.

    ``o[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, c]) v[s, c]`` with ``c = h // (H / Hkv)``. The new tokens' own
    positions are the last of k and v: query t of T sees the first ``S - T + t + 1`` of S positions, and nothing of
    the others, NaN included. A sequence may be cut into calls anywhere: the bytes stay the same.

    Source: grouped queries, arXiv:2305.13245; the running maximum, arXiv:1805.02867. Derivation:
    docs/math.md#attention.

    Parameters
    ----------
    q : (T, H, K) float32
    k : (S, Hkv, K) float32 or float16
        Hkv divides H. Used as it lies.
    v : (S, Hkv, V) float32 or float16
    scale : float
        On the scores: K ** -0.5 in the models.
    offsets : (N+1,) int, optional
        Where the queries of each of N sequences begin; without it, one sequence.
    kv_offsets : (N+1,) int, optional
        Where the positions of each sequence begin; `offsets` where it is not given.
    out : (T, H, V) float32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    o : (T, H, V) float32
        With a leading batch axis on q, k and v (equal lengths, no offsets), so has the result.

    Raises
    ------
    ValueError
        If shapes or offsets disagree, or a sequence has fewer positions than queries, or `out` overlaps an input.
    TypeError
        If an array is of another type.
    """
    scale = as_finite(scale, "scale")
    q, (k, v), batch, offsets, kv_offsets = one_axis(
        (q, ("T", "H", "K")), {"k": (k, ("S", "Hkv", "K")), "v": (v, ("S", "Hkv", "V"))}, offsets, kv_offsets)
    (T, H, K), (S, Hkv), V = q.shape, k.shape[:2], v.shape[2]
    check_shape(k, "k", ("S", "Hkv", K))
    check_shape(v, "v", (S, Hkv, "V"))
    if min(H, Hkv, K, V) < 1 or H % Hkv:
        raise ValueError(f"q is {[T, H, K]}, k {list(k.shape)} and v {list(v.shape)}; no axis but the first may be "
                         f"empty, and the heads of k must divide those of q")
    offsets, kv_offsets = both_offsets(offsets, kv_offsets, T, S)
    o = output(out, (*(batch or (T,)), H, V), like=q)
    refuse_shared(o, q=q, k=k, v=v)
    sizes = (len(offsets) - 1, T, S, H, Hkv, K, V)
    _core.attention(current(ctx)._core, o, q, *typed(k), *typed(v), offsets, kv_offsets, sizes, scale)
    return o
