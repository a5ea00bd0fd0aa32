"""embedding: exact rows of a table in any storage type."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded, judge

import kimi_linear as kl

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def table(vocabulary, D, dtype):
    return (3 * np.random.default_rng([vocabulary, D]).standard_normal((vocabulary, D))).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("D", [1, 15, 16, 17, 33, 2304])
@pytest.mark.parametrize("T", [0, 1, 5, 40])
def test_rows_are_exact(T, D, dtype):
    inputs = dict(ids=np.random.default_rng(T).integers(0, 50, T), table=table(50, D, dtype))

    def run(ctx):
        out, check = guarded((T, D))
        assert kl.ops.embedding(**inputs, out=out, ctx=ctx) is out
        check()
        return out.copy()

    judge("embedding", everywhere(run), kl.reference.embedding(**inputs), **inputs)


def test_every_float16_and_bfloat16_widens_exactly():
    for dtype in TYPES[1:]:
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(256, 256)
        got = everywhere(lambda ctx, every=every: kl.ops.embedding(np.arange(256), every, ctx=ctx))
        wanted = every.astype(np.float32)
        assert np.array_equal(got, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(wanted))


def test_axes_of_ids_are_kept():
    w = table(9, 8, np.float32)
    ids = np.array([[0, 8, 3], [1, 1, 2]])
    assert np.array_equal(kl.ops.embedding(ids, w), w[ids])
    assert kl.ops.embedding([4, 5], w).shape == (2, 8)


W = table(9, 8, np.float32)


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.embedding([0, 3, 9], W), ValueError, r"ids\[2\] is 9; it must be 0 <= ids < 9"),
    (lambda: kl.ops.embedding([[0], [-1]], W), ValueError, r"ids\[\(1, 0\)\] is -1"),
    (lambda: kl.ops.embedding([0.5], W), TypeError, "ids is float64"),
    (lambda: kl.ops.embedding([0], W.astype(float)), TypeError, "table is float64"),
    (lambda: kl.ops.embedding([0], W[0]), ValueError, r"table has shape \[8\]"),
    (lambda: kl.ops.embedding([0], W, out=W[:1]), ValueError, "out shares memory with table"),
    (lambda: kl._core.embedding(kl.Context()._core, np.zeros((1, 8), np.float32), np.array([99], np.int32),
                                (W, 0, 1, 9, 8), 1), ValueError, r"embedding: ids\[0\] is 99; it must"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
