"""linear: budget, every storage type and layout in the same bytes, batches, several weights, BLAS, errors."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl

BFLOAT16 = ml_dtypes.bfloat16


def in_order(x, w):
    """The contract, word for word: 16 lanes of fma by rising k, zeros behind the end, the halving tree.

    The 64-bit significand of longdouble holds a product of two float32 exactly; a sum rounded to it and then
    to float32 differs from the fma in about one of 2**40 cases.
    """
    pad = -x.shape[1] % 16
    x, w = (np.pad(a.astype(np.longdouble), ((0, 0), (0, pad))) for a in (x, w))
    lanes = np.zeros((len(x), len(w), 16), np.float32)
    for k in range(0, x.shape[1], 16):
        lanes = (x[:, None, k: k + 16] * w[None, :, k: k + 16] + lanes).astype(np.float32)
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@pytest.mark.parametrize("D", [1, 16, 17, 100, 769, 1600])
@pytest.mark.parametrize("T", [1, 6, 8])
def test_the_order_of_sums_is_the_contract(T, D):
    x, w = normal(T, D), normal(10, D, seed=1)
    assert np.finfo(np.longdouble).nmant >= 63
    assert everywhere(lambda ctx: kl.ops.linear(x, w, ctx=ctx)).tobytes() == in_order(x, w).tobytes()


@pytest.mark.parametrize("D", [1, 15, 16, 17, 33, 770])
@pytest.mark.parametrize("M", [1, 3, 4, 17, 60])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 6, 7, 13])
def test_within_budget_same_bytes_and_guarded(T, M, D):
    inputs = dict(x=normal(T, D), w=normal(M, D, seed=1), bias=normal(M, seed=2))

    def run(ctx):
        out, check = guarded((T, M))
        assert kl.ops.linear(**inputs, out=out, ctx=ctx) is out
        check()
        return out.copy()

    judge("linear", everywhere(run), kl.reference.linear(**inputs), **inputs)


def test_real_width():
    inputs = dict(x=normal(70, 2304), w=normal(130, 2304, seed=1, scale=0.02))
    fast = [isa for isa in kl.isa_list() if isa != "scalar"]
    got = [kl.ops.linear(**inputs)] + [kl.ops.linear(**inputs, ctx=kl.Context(isa=isa)) for isa in fast]
    judge("linear", got[0], kl.reference.linear(**inputs), **inputs)
    assert all(g.tobytes() == got[0].tobytes() for g in got)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("M, D", [(1, 16), (5, 33), (64, 128), (67, 17), (100, 257)])
def test_storage_type_and_layout_change_no_byte(dtype, M, D):
    w = normal(M, D, seed=3).astype(dtype)
    wide = w.astype(np.float32)
    for T in (1, 4, 9, 30):
        x = normal(T, D)
        wanted = kl.ops.linear(x, wide)
        transposed = np.ascontiguousarray(w.T).T
        for given in (w, transposed, np.repeat(w, 2, axis=0)[::2]):
            got = everywhere(lambda ctx, given=given, x=x: kl.ops.linear(x, given, ctx=ctx))
            assert got.tobytes() == wanted.tobytes(), (T, given.flags)


def test_a_row_has_the_same_bytes_in_any_batch():
    x, w = normal(41, 300), normal(50, 300, seed=1)
    whole = everywhere(lambda ctx: kl.ops.linear(x, w, ctx=ctx))
    for size in (1, 2, 5, 6, 7, 12, 40):
        parts = [kl.ops.linear(x[t: t + size], w) for t in range(0, 41, size)]
        assert np.concatenate(parts).tobytes() == whole.tobytes(), size
    rows = [kl.ops.linear(x, w[i: i + 7]) for i in range(0, 50, 7)]
    assert np.concatenate(rows, axis=1).tobytes() == whole.tobytes()


def test_many_rows_of_x_and_few_of_w_are_split_between_threads():
    x, w = normal(300, 64), normal(3, 64, seed=1)
    whole = everywhere(lambda ctx: kl.ops.linear(x, w, ctx=ctx))
    assert whole.tobytes() == np.concatenate([kl.ops.linear(x[t: t + 1], w) for t in range(300)]).tobytes()


def test_several_weights_over_one_x_are_the_single_ones():
    x = normal(2, 3, 40)
    ws = [normal(M, 40, seed=M) for M in (1, 5, 64, 7, 2, 3, 9, 16, 4)]
    ws[2] = ws[2].astype(BFLOAT16)
    ws[3] = np.asfortranarray(ws[3])
    biases = [None if i % 2 else normal(len(w), seed=i) for i, w in enumerate(ws)]
    got = everywhere(lambda ctx: tuple(kl.ops.linear(x, ws, biases, ctx=ctx)))
    for y, w, b in zip(got, ws, biases, strict=True):
        assert y.shape == (2, 3, len(w))
        assert y.tobytes() == kl.ops.linear(x, w, b).tobytes()
    outs = tuple(np.empty_like(y) for y in got)
    assert all(a is b for a, b in zip(kl.ops.linear(x, ws, biases, out=outs), outs, strict=True))


@pytest.mark.parametrize("scale", [1e-42, 1e-22, 1e18])
def test_rim_of_float32(scale):
    inputs = dict(x=normal(5, 50, scale=scale), w=normal(20, 50, seed=1, scale=scale))
    got = everywhere(lambda ctx: kl.ops.linear(**inputs, ctx=ctx))
    judge("linear", got, kl.reference.linear(**inputs), **inputs)


@pytest.mark.parametrize("T", [3, 10])
def test_products_that_underflow_below_zero(T):
    """-0 in a lane meets the padding: every form of the product must do the same with it."""
    x, w = np.full((T, 17), 1e-30, np.float32), np.full((18, 17), -1e-30, np.float32)
    got = everywhere(lambda ctx: kl.ops.linear(x, w, ctx=ctx))
    assert got.tobytes() == kl.ops.linear(x, np.asfortranarray(w)).tobytes()
    assert got[:1].tobytes() == kl.ops.linear(x[:1], w).tobytes()


@pytest.mark.parametrize("T", [1, 9])
def test_nan_stays_in_its_row_and_column(T):
    x, w = normal(T, 33), normal(10, 33, seed=1)
    x[0, 32], w[4, 3] = np.nan, np.inf
    y = everywhere(lambda ctx: kl.ops.linear(x, w, ctx=ctx))
    assert np.isnan(y[0]).all() and not np.isfinite(y[:, 4]).any()
    assert np.isfinite(np.delete(y[1:], 4, axis=1)).all()


def test_whole_numbers_are_exact():
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-50, 50, s).astype(np.float32) for s in ((30, 200), (40, 200)))
    assert np.array_equal(kl.ops.linear(x, w), x.astype(np.float64) @ w.T.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_blas_by_name_is_within_the_budget_of_a_sum_in_any_order(T, dtype):
    inputs = dict(x=normal(T, 200), w=normal(150, 200, seed=1).astype(dtype))
    if kl._core.blas_name() == "none":
        with pytest.raises(NotImplementedError, match="gemm: this build has no BLAS"):
            kl.Context(gemm="blas")
        return
    got = kl.ops.linear(**inputs, ctx=kl.Context(gemm="blas", threads=2))
    size = np.abs(inputs["x"]).astype(float) @ np.abs(inputs["w"].astype(float)).T
    assert (np.abs(got - kl.reference.linear(**inputs)) <= 200 * 2.0**-24 * size).all()


X, W = normal(4, 8), normal(3, 8, seed=1)


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.linear(X, W[:, :7]), ValueError, r"w has shape \[3, 7\]; it must be \[M, 8\]"),
    (lambda: kl.ops.linear(X, [W, W[:, :7]]), ValueError, r"w\[1\] has shape \[3, 7\]"),
    (lambda: kl.ops.linear(X, W, np.zeros(4, np.float32)), ValueError, r"bias has shape \[4\]; it must"),
    (lambda: kl.ops.linear(X, W.astype(float)), TypeError, "w is float64"),
    (lambda: kl.ops.linear(X.astype(float), W), TypeError, "x is float64"),
    (lambda: kl.ops.linear(X, [W, W], [None]), ValueError, "bias must be a list of 2"),
    (lambda: kl.ops.linear(X, [W, W], out=X), ValueError, "out must be a list of 2"),
    (lambda: kl.ops.linear(X, W, out=np.empty((4, 4), np.float32)), ValueError, r"out has shape \[4, 4\]"),
    (lambda: kl.ops.linear(X, np.eye(8, dtype=np.float32), out=X), ValueError, "out shares memory with x"),
    (lambda: kl.ops.linear(np.float32(1), W), ValueError, r"x has shape \[\]; it must be \[..., D\]"),
    (lambda: kl._core.linear(kl.Context()._core, [], X, [(W, 0, 1, 3, 8)], [None], [0], 4, 8), ValueError,
     "an out, a bias and a flag each"),
    (lambda: kl._core.linear(kl.Context()._core, [X], X, [(W, 0, 1, 3, 8)], [None], [0], 4, 7), ValueError,
     "x has 32 values"),
    (lambda: kl._core.linear(kl.Context()._core, [X[:, :3].copy()], X, [(W, 0, 1, 3, 8)], [None], [0], 4, -8),
     ValueError, "x: a size is negative"),
    (lambda: kl._core.linear(kl.Context()._core, [X[:, :4].copy()], X, [(X[:3].T.copy(), 0, 1, 8, 3)], [None],
                             [0], 4, 8), ValueError, "out has 16 values"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
