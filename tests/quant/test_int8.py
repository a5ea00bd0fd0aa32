"""Products with int8 activations (docs/math.md#int8): the definition, one result everywhere, what it costs."""

import ctypes
import ctypes.util
import platform

import numpy as np
import pytest
from block_bytes import INT8_TYPES, blocks, values_of
from ggml_types import size_of

import kimi_linear as kl
from kimi_linear import _core

U = 2.0**-24


def product(x, data, type_id, K, **context):
    x = np.ascontiguousarray(x, dtype=np.float32)
    ctx = kl.Context(activations="int8", **context)
    y = np.full((len(x), len(data)), np.nan, np.float32)
    _core.linear(ctx._core, [y], x, [(data.reshape(-1), type_id, 1, len(data), K)], [None], [False], len(x), K)
    return y


def quantised(x):
    """x as the kernels see it, by the definition: one scale for 32 values, largest / 127."""
    b = np.asarray(x, np.float32).reshape(len(x), -1, 32)
    largest = np.abs(b).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(b * inverse)
    return (q.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)).reshape(np.shape(x))


@pytest.mark.parametrize("name", INT8_TYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 9, 21])
def test_definition_and_one_result_on_every_instruction_set(name, T):
    rng = np.random.default_rng(T)
    K = 768
    data, type_id = blocks(name, 53, K, rng)
    x = rng.standard_normal((T, K)).astype(np.float32) * np.exp(2 * rng.standard_normal((T, 1))).astype(np.float32)
    w, q = values_of(data, name).astype(np.float64), quantised(x)
    y = product(x, data, type_id, K)
    # K / 256 groups of fma on a lane, three roundings inside, a tree of three; integers are exact. Mins cancel:
    # what is summed is bounded by its parts, scale * q and min, not by their difference.
    largest = 4 * np.abs(w).reshape(53, -1, 32).max(-1).repeat(32, -1)
    budget = (K / 256 + 6) * U * (np.abs(q) @ largest.T)
    assert np.all(np.abs(y - q @ w.T) <= budget)
    for isa in kl.isa_list():
        assert np.array_equal(product(x, data, type_id, K, isa=isa), y)


def rows_of(*lengths):
    """(type, values a row): of blocks of 32 these lengths, of longer blocks those that are whole ones."""
    return [(name, K) for name in INT8_TYPES for K in lengths if size_of(name)[0] < 256 and K % size_of(name)[0] == 0]


@pytest.mark.parametrize("name, K", rows_of(32, 64, 96, 128, 192, 256, 288, 320, 384, 1056, 1088, 1152))
def test_rows_that_end_inside_a_group(name, K):
    rng = np.random.default_rng(K)
    data, type_id = blocks(name, 35, K, rng)
    x = rng.standard_normal((6, K)).astype(np.float32)
    w = values_of(data, name).astype(np.float64)
    y = product(x, data, type_id, K)
    bound = (K / 256 + 7) * U * (np.abs(quantised(x)) @ (4 * np.abs(w)).T)
    assert np.all(np.abs(y - quantised(x) @ w.T) <= bound)
    for isa in kl.isa_list():
        for rows in (slice(0, 1), slice(2, 4), slice(0, 6)):
            assert np.array_equal(product(x[rows], data, type_id, K, isa=isa), y[rows])


@pytest.mark.parametrize("name, K", [row for row in rows_of(32, 64, 128, 192, 288, 384) if row[0] != "MXFP4"])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_a_row_that_ends_inside_a_group_is_alone(name, K, T):
    """What stands where the group would go on is the next row: its scales, infinite or NaN, are not this one's."""
    rng = np.random.default_rng(K)
    data, type_id = blocks(name, 4, K, rng)
    x = rng.standard_normal((T, K)).astype(np.float32)
    wrong = data.copy()
    scales = wrong[1::2].reshape(2, K // size_of(name)[0], -1)[..., :2]
    scales[...] = np.array([0x7C00, 0x7E00], "<u2").view(np.uint8).reshape(2, 1, 2)
    for isa in kl.isa_list():
        y = product(x, wrong, type_id, K, isa=isa)
        assert np.array_equal(y[:, ::2], product(x, data, type_id, K, isa=isa)[:, ::2])
        assert not np.isfinite(y[:, 1::2]).any()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4", "Q4_K", "Q3_K", "Q6_K", "Q1_0", "Q2_0"])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 33])
def test_panels_that_are_not_full(name, rows):
    """Panels have 8, 16 or 32 rows, tiles 4 or 8 rows of x: what is left over has the same bytes."""
    rng = np.random.default_rng(rows)
    K = 512
    data, type_id = blocks(name, rows, K, rng)
    x = rng.standard_normal((9, K)).astype(np.float32)
    y = product(x, data, type_id, K, isa="scalar")
    for isa in kl.isa_list():
        for T in (1, 2, 3, 4, 5, 6, 7, 9):
            assert np.array_equal(product(x[:T], data, type_id, K, isa=isa), y[:T])


@pytest.mark.parametrize("name", INT8_TYPES)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_sums_of_the_largest_integers_do_not_saturate(name, byte):
    """Weights of all bits alike, x at 127 everywhere: the largest sums that a type has, of either sign."""
    rng = np.random.default_rng(byte)
    K = 512
    scales, type_id = blocks(name, 20, K, rng)
    data = np.full_like(scales, byte)
    per_row = size_of(name)[1]
    at = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210), "MXFP4": (0, 1)}
    first, last = at.get(name, (0, 4 if name in ("Q4_K", "Q5_K") else 2))
    data.reshape(-1, per_row)[:, first:last] = scales.reshape(-1, per_row)[:, first:last]
    x = np.repeat([[1.0], [-1.0], [0.5], [-2.0], [1.0]], K, axis=1).astype(np.float32)
    x[4, ::2] = -1
    w, q = values_of(data, name).astype(np.float64), quantised(x)
    y = product(x, data, type_id, K)
    assert np.all(np.abs(y - q @ w.T) <= (K / 256 + 6) * U * (np.abs(q) @ (4 * np.abs(w) + 1).T))
    for isa in kl.isa_list():
        for T in (1, 3, 5):
            assert np.array_equal(product(x[-T:], data, type_id, K, isa=isa), y[-T:])


@pytest.mark.parametrize("name", INT8_TYPES)
def test_batch_is_alone_and_threads_change_nothing(name):
    rng = np.random.default_rng(3)
    K, T = 2304, 70
    data, type_id = blocks(name, 130, K, rng)
    x = rng.standard_normal((T, K)).astype(np.float32)
    y = product(x, data, type_id, K, threads=1)
    assert np.array_equal(product(x, data, type_id, K, threads=3), y)
    for t in (0, 33, 69):
        assert np.array_equal(product(x[t : t + 1], data, type_id, K), y[t : t + 1])
        assert np.array_equal(product(x[t : t + 3], data, type_id, K), y[t : t + 3])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_zero_tiny_huge_and_not_finite_activations(name):
    rng = np.random.default_rng(5)
    K = 512
    data, type_id = blocks(name, 20, K, rng)
    x = rng.standard_normal((6, K)).astype(np.float32)
    x[0] = 0
    x[1] *= 1e-36  # below 2^-100: counts as zero
    x[2] *= 1e30
    x[3, 200] = np.nan
    x[4, 7] = np.inf
    y = product(x, data, type_id, K)
    assert np.array_equal(y[:2], np.zeros((2, 20), np.float32))
    assert np.isfinite(y[2]).all() and np.isfinite(y[5]).all()
    assert np.isnan(y[3:5]).all()
    for isa in kl.isa_list():
        assert np.array_equal(product(x, data, type_id, K, isa=isa), y, equal_nan=True)
        assert np.array_equal(product(x[3:4], data, type_id, K, isa=isa), y[3:4], equal_nan=True)


def test_the_error_of_int8_is_that_of_its_rounding():
    """Uniform rounding of scale = largest / 127: largest^2 / 12 / 127^2 a value."""
    rng = np.random.default_rng(7)
    K = 4096
    data, type_id = blocks("Q8_0", 64, K, rng)
    x = rng.standard_normal((40, K)).astype(np.float32)
    w = values_of(data, "Q8_0").astype(np.float64)
    error = product(x, data, type_id, K) - x.astype(np.float64) @ w.T
    largest = np.abs(x.reshape(40, -1, 32)).max(-1)
    expected = (largest**2 / 12 / 127**2).repeat(32, -1) @ (w**2).T
    assert 0.9 < np.sqrt((error**2).mean() / expected.mean()) < 1.1


def test_other_types_and_float_weights_take_float32_all_the_same():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((5, 512)).astype(np.float32)
    w = rng.standard_normal((30, 512)).astype(np.float32)
    int8 = kl.Context(activations="int8")
    assert np.array_equal(kl.ops.linear(x, w, ctx=int8), kl.ops.linear(x, w))
    data, type_id = blocks("Q4_1", 30, 512, rng)
    assert np.array_equal(product(x, data, type_id, 512), kl.ops.linear(x, values_of(data, "Q4_1")))


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="activations is 'int4'; it must be one of 'float32', 'int8', 'bfloat16'"):
        kl.Context(activations="int4")


def test_the_callers_rounding_mode_changes_no_byte():
    """A few rows are made int8 by the calling thread itself, which is not to ask it how it rounds."""
    upward, to_nearest = {"x86_64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}[platform.machine()], 0
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    w = kl.ops.quantize(np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32), "Q8_0")
    x = np.random.default_rng(2).standard_normal((1, 256)).astype(np.float32)
    ctx = kl.Context(activations="int8")
    want = kl.ops.linear(x, w, ctx=ctx)
    try:
        assert libm.fesetround(upward) == 0
        got = kl.ops.linear(x, w, ctx=ctx)
    finally:
        libm.fesetround(to_nearest)
    assert got.tobytes() == want.tobytes()
