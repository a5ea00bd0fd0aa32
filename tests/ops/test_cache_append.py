"""cache_append: rows into pages of a cache, float32 as they are, float16 rounded to nearest even."""

import numpy as np
import pytest
from judge import everywhere

import kimi_linear as kl


def append(cache, x, start, offsets=None, kv_offsets=None, ctx=None):
    """`x` [T, D] behind the first start[n] rows of each sequence of `cache` [S, D], in place."""
    core = (ctx or kl.Context())._core
    offsets = np.array([0, len(x)] if offsets is None else offsets, np.int64)
    kv_offsets = np.array([0, len(cache)] if kv_offsets is None else kv_offsets, np.int64)
    start = np.atleast_1d(np.asarray(start, np.int64))
    half = cache.dtype == np.float16
    kl._core.cache_append(core, cache.view(np.uint16) if half else cache, int(half), x, offsets, start,
                          kv_offsets, len(offsets) - 1, *x.shape, len(cache))
    return cache


def rows(T, D, seed=0, scale=1.0):
    return (scale * np.random.default_rng([seed, T, D]).standard_normal((T, D))).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, D, start", [(0, 3, 2), (1, 1, 0), (5, 24, 509), (600, 17, 300), (3, 576, 1029)])
def test_rows_land_and_others_stay(T, D, start, dtype):
    x = rows(T, D)
    wanted = np.full((start + T + 2, D), 7, dtype)
    wanted[start:start + T] = x.astype(dtype)
    got = everywhere(lambda ctx: append(np.full_like(wanted, 7), x, start, ctx=ctx))
    assert got.tobytes() == wanted.tobytes()


def test_each_sequence_behind_its_own():
    x = rows(9, 5)
    cache = np.zeros((20, 5), np.float32)
    append(cache, x, [2, 0, 6], offsets=[0, 4, 4, 9], kv_offsets=[0, 7, 8, 20])
    wanted = np.zeros_like(cache)
    wanted[2:6], wanted[14:19] = x[:4], x[4:]
    assert cache.tobytes() == wanted.tobytes()


def test_float16_is_to_nearest_even_for_every_float16_and_its_neighbours():
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact[:-1] + exact[1:]) / 2
    beside = [np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9e9))]
    x = np.concatenate([exact, middle, *beside, [65519.9]])
    x = np.concatenate([x, -x]).astype(np.float32)[:, None]
    got = everywhere(lambda ctx: append(np.zeros(x.shape, np.float16), x, 0, ctx=ctx))
    assert got.tobytes() == x.astype(np.float16).tobytes()


def test_tiny_values_and_what_is_not_finite():
    x = np.array([[1e-45, -1e-40, 2.0**-25, 2.0**-24, np.inf, -np.inf, np.nan, -0.0]], np.float32)
    got = everywhere(lambda ctx: append(np.zeros(x.shape, np.float16), x, 0, ctx=ctx))
    np.testing.assert_array_equal(got, x.astype(np.float16))
    assert np.signbit(got[0, [1, 5, 7]]).all()


def test_what_float16_cannot_hold_is_refused_and_nothing_written():
    x = rows(700, 33)
    x[650, 7] = 65520
    x[690, 2] = -1e30
    cache = np.zeros((700, 33), np.float16)
    for threads in (1, 3):
        with pytest.raises(ValueError, match=r"x\[650, 7\] is 65520, too large for a float16 cache"):
            append(cache, x, 0, ctx=kl.Context(threads=threads))
        assert not cache.any()
    assert append(np.zeros((700, 33), np.float32), x, 0).tobytes() == x.tobytes()


@pytest.mark.parametrize("change, message", [
    (dict(start=[8]), r"start\[0\] is 8; the rows do not fit behind it"),
    (dict(start=[-1]), r"start\[0\] is -1; it must be >= 0"),
    (dict(offsets=[0, 3]), "offsets must rise from 0 to 4"),
    (dict(kv_offsets=[0, 11]), "kv_offsets must rise from 0 to 10"),
    (dict(start=[0, 0]), "start has 2 values"),
])
def test_errors_are_sentences(change, message):
    cache = np.zeros((10, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        append(cache, rows(4, 3), **(dict(start=[0]) | change))
    assert not cache.any()
