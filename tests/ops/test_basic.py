"""Elementwise ops and norms: budget, edges, same bytes everywhere, guards, in place, errors."""

import numpy as np
import pytest
from basic_inputs import OPS, op_inputs, rim
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl

WIDTHS = [1, 2, 15, 16, 17, 33, 128, 2304]
ROWS = [0, 1, 5]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("T", ROWS)
def test_within_budget_same_bytes_and_guarded(op, D, T):
    inputs = op_inputs(op, T, D, scale=4.0)
    before = {k: np.copy(v) for k, v in inputs.items()}

    def run(ctx):
        out, check = guarded((T, D))
        result = getattr(kl.ops, op)(**inputs, out=out, ctx=ctx)
        assert result is out
        check()
        return out.copy()

    judge(op, everywhere(run), getattr(kl.reference, op)(**inputs), **inputs)
    for name, value in before.items():
        assert np.array_equal(value, inputs[name]), f"{op} changed its input {name}"


@pytest.mark.parametrize("op", ["sigmoid", "swiglu", "add", "softmax"])
def test_rim_of_float32(op):
    inputs, ref = rim(op)
    judge(op, everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx)), ref, **inputs)


def test_sigmoid_keeps_its_digits_over_the_whole_range():
    x = np.linspace(-87, 87, 100_003, dtype=np.float32)
    judge("sigmoid", everywhere(lambda ctx: kl.ops.sigmoid(x, ctx=ctx)), kl.reference.sigmoid(x), x=x)


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("op", ["rms_norm", "l2_norm", "gated_rms_norm"])
def test_norms_of_tiny_and_huge_rows(op, scale):
    inputs = op_inputs(op, 3, 100)
    inputs["x"] = (np.sign(inputs["x"]) * np.float32(scale)).astype(np.float32)
    judge(op, everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx)),
          getattr(kl.reference, op)(**inputs), **inputs)


@pytest.mark.parametrize("scale", [0, 1e-45, 1e-30, 1e-25, 1e-20, 1e-14, 1e-10])
@pytest.mark.parametrize("op", ["rms_norm", "l2_norm", "gated_rms_norm"])
def test_norms_without_eps(op, scale):
    inputs = op_inputs(op, 3, 100) | dict(eps=0.0)
    inputs["x"] *= np.float32(scale)
    got = everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx))
    with np.errstate(invalid="ignore", divide="ignore"):
        ref = getattr(kl.reference, op)(**inputs)  # 0 / 0 is NaN in both
    judge(op, got, ref, **inputs)


@pytest.mark.parametrize("op, first", [("rms_norm", "x"), ("l2_norm", "x"), ("softmax", "x"), ("sigmoid", "x"),
                                       ("swiglu", "gate"), ("swiglu", "up"), ("add", "b"), ("gated_rms_norm", "z")])
def test_in_place(op, first):
    inputs = op_inputs(op, 5, 33)
    wanted = getattr(kl.ops, op)(**inputs)
    got = getattr(kl.ops, op)(**inputs, out=inputs[first])
    assert got is inputs[first] and got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("shift", [1, 33, -33])
@pytest.mark.parametrize("op, name", [("rms_norm", "x"), ("l2_norm", "x"), ("softmax", "x"), ("sigmoid", "x"),
                                      ("swiglu", "gate"), ("swiglu", "up"), ("add", "a"), ("add", "b"),
                                      ("gated_rms_norm", "x"), ("gated_rms_norm", "z")])
def test_an_output_over_part_of_an_input(op, name, shift):
    inputs = op_inputs(op, 50, 33)
    wanted = getattr(kl.ops, op)(**inputs)
    memory, n = np.zeros(52 * 33, np.float32), inputs[name].size
    start = max(-shift, 0)
    memory[start:start + n] = inputs[name].reshape(-1)
    inputs[name] = memory[start:start + n].reshape(inputs[name].shape)
    out = memory[start + shift:start + shift + n].reshape(wanted.shape)
    assert getattr(kl.ops, op)(**inputs, out=out) is out and out.tobytes() == wanted.tobytes()


def test_an_output_over_the_weight():
    x, memory = normal(2, 8), np.ones(20, np.float32)
    wanted = kl.ops.rms_norm(x, memory[:8].copy(), eps=1e-5)
    assert kl.ops.rms_norm(x, memory[:8], eps=1e-5, out=memory[4:].reshape(2, 8)).tobytes() == wanted.tobytes()


def test_nan_stays_in_its_row():
    x = normal(4, 40)
    x[2, 7] = np.nan
    for y in (kl.ops.softmax(x), kl.ops.rms_norm(x, np.ones(40, np.float32), eps=1e-5), kl.ops.l2_norm(x)):
        assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, axis=0)).all()


def test_gate_by_silu():
    inputs = op_inputs("gated_rms_norm", 5, 33) | dict(activation="silu")
    judge("gated_rms_norm", everywhere(lambda ctx: kl.ops.gated_rms_norm(**inputs, ctx=ctx)),
          kl.reference.gated_rms_norm(**inputs), **inputs)


def test_inputs_of_other_kinds_give_the_same():
    import ml_dtypes

    x = normal(6, 32).astype(ml_dtypes.bfloat16)
    wanted = kl.ops.l2_norm(x.astype(np.float32))
    strided = np.zeros((6, 64), np.float32)
    strided[:, ::2] = x.astype(np.float32)
    read_only = x.astype(np.float32)
    read_only.flags.writeable = False
    for given in (x, strided[:, ::2], read_only, memoryview(x.astype(np.float32))):
        assert kl.ops.l2_norm(given).tobytes() == wanted.tobytes()
    half = normal(6, 32).astype(np.float16)
    assert kl.ops.l2_norm(half).tobytes() == kl.ops.l2_norm(half.astype(np.float32)).tobytes()


X, W = normal(4, 8), normal(8)


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.rms_norm(X, W[:7], eps=1e-5), ValueError, r"w has shape \[7\]; it must be \[8\]"),
    (lambda: kl.ops.rms_norm(X, W, eps=-1), ValueError, "eps is -1.0; it must be >= 0"),
    (lambda: kl.ops.rms_norm(X, W, eps=float("nan")), ValueError, "eps is nan"),
    (lambda: kl.ops.rms_norm(X.astype(float), W, eps=0), TypeError, r"x is float64.*x.astype\('float32'\)"),
    (lambda: kl.ops.rms_norm(X, W.astype(int), eps=0), TypeError, "w is int64"),
    (lambda: kl.ops.rms_norm(X[:, :0], W[:0], eps=0), ValueError, "D >= 1"),
    (lambda: kl.ops.add(X, X[:3]), ValueError, r"b has shape \[3, 8\]; it must be \[4, 8\]"),
    (lambda: kl.ops.add(X, X, out=X[:, ::2]), ValueError, r"out has shape \[4, 4\]; it must be \[4, 8\]"),
    (lambda: kl.ops.add(X, X, out=np.zeros((8, 4), np.float32).T), ValueError, "out is strided"),
    (lambda: kl.ops.add(X, X, out=X.astype(float)), TypeError, "out is float64; it must be float32"),
    (lambda: kl.ops.add(X, X, ctx="cpu"), TypeError, "ctx is str"),
    (lambda: kl.ops.gated_rms_norm(X, X, W, eps=0, activation="relu"), ValueError, "activation is 'relu'"),
    (lambda: kl.ops.sigmoid(object()), TypeError, "x is a object"),
    (lambda: kl.Context(isa="sse2"), NotImplementedError, 'isa is "sse2"'),
    (lambda: kl.Context(threads=-1), ValueError, "threads is -1"),
    (lambda: kl.Context(threads="two"), TypeError, "threads is 'two'; it must be an int"),
    (lambda: kl.ops.l2_norm(X, eps="x"), TypeError, "eps is 'x'; it must be a number"),
    (lambda: kl.ops.l2_norm([[1.0, 2.0]]), TypeError, r"numpy\.asarray\(x, 'float32'\)"),
    (lambda: kl.Context(device="gpu"), ValueError, "device is 'gpu'"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_read_only_out_is_refused():
    out = np.zeros_like(X)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        kl.ops.add(X, X, out=out)
    assert not out.any()
