"""What the ops that attend over a cache share: their arguments, with and without a batch axis."""

import numpy as np

from .._arrays import BFLOAT16, as_either, as_float32, as_offsets, check_shape, contiguous
from ..device_array import DeviceArray

__all__ = ["as_cache", "both_offsets", "one_axis", "typed"]


def one_axis(q, caches, offsets, kv_offsets):
    """(q, caches, batch, offsets, kv_offsets): a batch axis becomes one of all rows, and offsets that say the same.

    Parameters
    ----------
    q : array, (axes)
        The axes of a q without a batch, named; the first is tokens.
    caches : dict of str to (array, (axes))
        By argument name; the first of the axes is positions.
    offsets, kv_offsets : as the caller was given them

    Returns
    -------
    batch : tuple of int
        (B, T) of a batch, else empty.
    """
    q, axes = as_float32(q[0], "q"), q[1]
    caches = {name: (as_cache(x, name), its) for name, (x, its) in caches.items()}
    if q.ndim != len(axes) + 1:
        check_shape(q, "q", axes)
        for name, (x, its) in caches.items():
            check_shape(x, name, its)
        return q, [x for x, _ in caches.values()], (), offsets, kv_offsets
    if offsets is not None or kv_offsets is not None:
        raise ValueError("offsets are for [T, ...]; q has a batch axis, whose sequences are equally long")
    (B, T), S = q.shape[:2], "S"
    for name, (x, its) in caches.items():
        check_shape(x, name, (B, S, *its[1:]))
        S = x.shape[1]
    q, *rest = (x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in (q, *(x for x, _ in caches.values())))
    return q, rest, (B, T), np.arange(B + 1) * T, np.arange(B + 1) * S


def both_offsets(offsets, kv_offsets, T, S):
    """Both as the core takes them, checked; `kv_offsets` are `offsets` where there is nothing before the queries."""
    offsets = as_offsets(offsets, T)
    kv_offsets = as_offsets(offsets if kv_offsets is None and S == T else kv_offsets, S, "kv_offsets")
    _check_lengths(offsets, kv_offsets)
    return offsets, kv_offsets


def _check_lengths(offsets, kv_offsets):
    """ValueError where a sequence has fewer positions than queries."""
    if len(offsets) != len(kv_offsets):
        raise ValueError(f"kv_offsets has {len(kv_offsets)} values and offsets {len(offsets)}; one has to "
                         f"have as many as the other")
    for n, (queries, positions) in enumerate(zip(np.diff(offsets), np.diff(kv_offsets), strict=True)):
        if positions < queries:
            raise ValueError(f"sequence {n} has {positions} positions for {queries} queries; the queries' "
                             f"own must be among them")


def typed(cache):
    """(buffer, type id) for the C core."""
    return (cache, 0) if cache.dtype == np.float32 else (cache.view(np.uint16), 1)


def as_cache(x, name):
    """A cache as it lies: contiguous float32 or float16; bfloat16 widens to float32."""
    a = as_either(x, name)
    if a.dtype == BFLOAT16 and not isinstance(a, DeviceArray):
        a = a.astype(np.float32)
    if a.dtype not in (np.float32, np.float16):
        raise TypeError(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16: "
                        f"{name}.astype('float32')")
    return contiguous(a)
