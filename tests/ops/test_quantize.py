"""quantize, dequantize as ops: outputs, axes, errors. What the types are: tests/quant."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded

import kimi_linear as kl

X = np.random.default_rng(2).standard_normal((2, 3, 512)).astype(np.float32)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_outputs_hold_exactly_the_blocks(name):
    kind = kl.storage_types[name]

    def blocks(ctx):
        out, check = guarded((2, 3, kind.row_bytes(512)), np.uint8, 0xA5)
        w = kl.ops.quantize(X, name, out=out, ctx=ctx)
        assert w.data is out and w.shape == X.shape
        check()
        return out.copy()

    data = everywhere(blocks)

    def values(ctx):
        out, check = guarded(X.shape)
        assert kl.ops.dequantize(data, name, out=out, ctx=ctx) is out
        check()
        return out.copy()

    assert np.array_equal(everywhere(values), kl.reference.dequantize(data, name))


def test_shapes():
    w = kl.ops.quantize(X, "Q8_0")
    flat = kl.ops.dequantize(w.data.ravel(), "Q8_0", (6, 512))
    assert np.array_equal(flat, np.asarray(w).reshape(6, 512))
    assert np.array_equal(kl.ops.dequantize(w, shape=(3, 1024)), flat.reshape(3, 1024))
    assert kl.ops.quantize(X[:, :0], "Q8_0").shape == (2, 0, 512)
    assert kl.ops.dequantize(w[:, :0]).shape == (2, 0, 512)
    assert kl.ops.dequantize(kl.ops.quantize(X[0, 0], "Q8_0")).shape == (512,)
    assert np.array_equal(kl.ops.dequantize(w[:, ::2]), np.asarray(w)[:, ::2])


def test_narrow_floats_widen_first():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert kl.ops.quantize(X.astype(dtype), "Q8_0") == kl.ops.quantize(X.astype(dtype).astype(np.float32), "Q8_0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named_and_nothing_written(value):
    for at in ((0, 0, 0), (1, 2, 511), (1, 0, 7)):
        x = np.tile(X, (1, 100, 1))
        x[at] = x[1, 299, 511] = value
        out = np.full((2, 300, 544), 9, np.uint8)
        with pytest.raises(ValueError, match=rf"x\[{at[0]}, {at[1]}, {at[2]}\] is {value}; it must be finite"):
            kl.ops.quantize(x, "Q8_0", out=out)
        assert (out == 9).all()
    core = kl.Context(threads=2)._core
    bad = np.full((3, 32), value, np.float32)
    with pytest.raises(ValueError, match=r"quantize: x\[0, 0\] is -?(nan|inf); it must be finite"):
        kl._core.quantize(core, np.zeros(102, np.uint8), bad, 8, 3, 32)


W = kl.ops.quantize(X, "Q8_0")
CORE = kl.Context()._core


@pytest.mark.parametrize("run, error, sentence", [
    (lambda: kl.ops.quantize(X, "Q8"), ValueError, "type is 'Q8'; it must be one of F32, F16, Q4_0, "),
    (lambda: kl.ops.quantize(X[..., :100], "Q4_K"), ValueError,
     "x has rows of 100 values; Q4_K needs a multiple of 256"),
    (lambda: kl.ops.quantize(X, "F16"), ValueError, "type is F16, which has no blocks; cast x to its dtype"),
    (lambda: kl.ops.quantize(X.astype(float), "Q8_0"), TypeError, "x is float64"),
    (lambda: kl.ops.quantize(np.float32(1), "Q8_0"), ValueError, r"x has shape \[\]; it must be \[..., D\]"),
    (lambda: kl.ops.quantize(X, "Q8_0", out=np.zeros((2, 3, 512), np.uint8)), ValueError,
     r"out has shape \[2, 3, 512\]"),
    (lambda: kl.ops.quantize(X, "Q8_0", out=np.zeros((2, 3, 544), np.int8)), TypeError,
     "out is int8; it must be uint8"),
    (lambda: kl.ops.quantize(X, "Q8_0", out=X.view(np.uint8).ravel()[:3264].reshape(2, 3, 544)), ValueError,
     "out shares memory with x"),
    (lambda: kl.ops.dequantize(W.data), TypeError, "type is missing"),
    (lambda: kl.ops.dequantize(W, "Q4_0"), TypeError, "type is 'Q4_0'; q is Q8_0 already"),
    (lambda: kl.ops.dequantize(W.data.view(np.int8), "Q8_0"), TypeError, "q is int8; it must be uint8"),
    (lambda: kl.ops.dequantize(W.data[..., :-1], "Q8_0"), ValueError, "a row of Q8_0 is a multiple of 34 bytes"),
    (lambda: kl.ops.dequantize(W.data, "Q8_0", (2, 3, 500)), ValueError, "shape has rows of 500 values"),
    (lambda: kl.ops.dequantize(W.data, "Q8_0", (2, 2, 512)), ValueError,
     r"q has 3264 bytes; Q8_0 of shape .* has 2176"),
    (lambda: kl.ops.dequantize(W, out=np.zeros((2, 3, 511), np.float32)), ValueError, r"out has shape \[2, 3, 511\]"),
    (lambda: kl._core.quantize(CORE, W.data, X, 7, 6, 500), ValueError, "type is 7 with rows of 500 values"),
    (lambda: kl._core.dequantize(CORE, X, W.data, 77, 6, 512), ValueError, "type is 77 with rows of 512"),
    (lambda: kl._core.quantize(CORE, np.zeros(X.nbytes, np.uint8), X, 0, 6, 512), NotImplementedError,
     "quantize: F32 is no block type here; types to write are Q4_0"),
])
def test_errors(run, error, sentence):
    with pytest.raises(error, match=sentence):
        run()
