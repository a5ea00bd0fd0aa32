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


@pytest.mark.parametrize("op", ["sigmoid", "swiglu", "situ", "add", "softmax"])
def test_rim_of_float32(op):
    inputs, ref = rim(op)
    judge(op, everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx)), ref, **inputs)


def test_sigmoid_keeps_its_digits_over_the_whole_range():
    x = np.linspace(-87, 87, 100_003, dtype=np.float32)
    judge("sigmoid", everywhere(lambda ctx: kl.ops.sigmoid(x, ctx=ctx)), kl.reference.sigmoid(x), x=x)


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "l2_norm", "gated_rms_norm"])
def test_norms_of_tiny_and_huge_rows(op, scale):
    inputs = op_inputs(op, 3, 100)
    inputs["x"] = (np.sign(inputs["x"]) * np.float32(scale)).astype(np.float32)
    judge(op, everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx)),
          getattr(kl.reference, op)(**inputs), **inputs)


@pytest.mark.parametrize("scale", [0, 1e-45, 1e-30, 1e-25, 1e-20, 1e-14, 1e-10])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "l2_norm", "gated_rms_norm"])
def test_norms_without_eps(op, scale):
    inputs = op_inputs(op, 3, 100) | dict(eps=0.0)
    inputs["x"] *= np.float32(scale)
    got = everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx))
    with np.errstate(invalid="ignore", divide="ignore"):
        ref = getattr(kl.reference, op)(**inputs)  # 0 / 0 is NaN in both
    judge(op, got, ref, **inputs)


@pytest.mark.parametrize("op, first", [("rms_norm", "x"), ("layer_norm", "x"), ("l2_norm", "x"), ("softmax", "x"),
                                       ("sigmoid", "x"),
                                       ("swiglu", "gate"), ("swiglu", "up"), ("situ", "gate"), ("situ", "up"),
                                       ("add", "b"), ("gated_rms_norm", "z")])
def test_in_place(op, first):
    inputs = op_inputs(op, 5, 33)
    wanted = getattr(kl.ops, op)(**inputs)
    got = getattr(kl.ops, op)(**inputs, out=inputs[first])
    assert got is inputs[first] and got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("shift", [1, 33, -33])
@pytest.mark.parametrize("op, name", [("rms_norm", "x"), ("layer_norm", "x"), ("l2_norm", "x"), ("softmax", "x"),
                                      ("sigmoid", "x"),
                                      ("swiglu", "gate"), ("swiglu", "up"), ("situ", "gate"), ("situ", "up"),
                                      ("add", "a"), ("add", "b"),
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
    one = np.ones(40, np.float32)
    for y in (kl.ops.softmax(x), kl.ops.rms_norm(x, one, eps=1e-5), kl.ops.layer_norm(x, one, one, eps=1e-5),
              kl.ops.l2_norm(x)):
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


# ---- situ -------------------------------------------------------------------------------------------


def situ_everywhere(**inputs):
    got = everywhere(lambda ctx: kl.ops.situ(**inputs, ctx=ctx))
    with np.errstate(invalid="ignore"):  # 0 times infinity
        judge("situ", got, kl.reference.situ(**inputs), **inputs)
    return got


@pytest.mark.parametrize("beta, linear_beta", [(4, 25), (4, None), (1, None), (1.7, 3.3), (0.1, 0.1), (1e-3, 1e6),
                                               (1e6, 1e-3), (1e-40, 3e38), (3e38, 1e-40)])
def test_situ_of_other_betas(beta, linear_beta):
    for scale in (1e-3, 1.0, 30.0):
        gate, up = normal(3, 3000, scale=scale), normal(3, 3000, seed=1, scale=scale)
        situ_everywhere(gate=gate, up=up, beta=beta, linear_beta=linear_beta)


def test_situ_keeps_its_digits_over_all_exponents():
    """tanh is x where x is small: of 128 mantissas in each exponent, with either sign and in either place."""
    bits = np.arange(0, 0x7F800000, 1 << 16, np.uint32)
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    one = np.ones_like(x)
    for beta in (1.0, 4.0):
        situ_everywhere(gate=x, up=one, beta=beta)
        situ_everywhere(gate=one, up=x, beta=beta, linear_beta=beta)


def test_situ_of_infinities_and_nan():
    inf, nan = np.inf, np.nan
    gate = np.float32([inf, -inf, inf, -inf, 0, inf, nan, 1, -0.0, 0.0])
    up = np.float32([2, 2, -inf, inf, inf, 0, 1, nan, 3, 3])
    bounded, alone = (situ_everywhere(gate=gate, up=up, beta=4, linear_beta=n) for n in (25, None))
    assert bounded[2] == -100 and bounded[3] == 0 and bounded[4] == 0 and np.isnan(bounded[6:8]).all()
    assert alone[0] == 8 and alone[2] == -inf
    assert np.isnan(alone[[3, 4, 6, 7]]).all() and np.isfinite(alone[[1, 5]]).all()
    for got, linear_beta in ((bounded, 25), (alone, None)):
        with np.errstate(invalid="ignore"):
            ref = kl.reference.situ(gate, up, beta=4, linear_beta=linear_beta)
        there = ~np.isnan(ref)
        assert np.array_equal(np.signbit(got[there]), np.signbit(ref[there]))  # of zeros, too


def test_situ_is_odd_in_up():
    gate, up = normal(5, 40, scale=5), normal(5, 40, seed=1, scale=30)
    here, there = (kl.ops.situ(gate, u, beta=4, linear_beta=25) for u in (up, -up))
    assert (-here).tobytes() == there.tobytes()


def test_situ_tends_to_swiglu():
    gate, up = normal(5, 40, scale=2), normal(5, 40, seed=1)
    got, wanted = kl.ops.situ(gate, up, beta=1e5, linear_beta=1e5), kl.reference.swiglu(gate, up)
    assert np.abs(got - wanted).max() < 1e-5


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
    (lambda: kl.ops.layer_norm(X, X[0, :7], X[0], eps=0), ValueError, r"w has shape \[7\]; it must be \[8\]"),
    (lambda: kl.ops.layer_norm(X, X[0], X[0, :7], eps=0), ValueError, r"b has shape \[7\]; it must be \[8\]"),
    (lambda: kl.ops.layer_norm(X, X[0], None, eps=0), TypeError, "b is a NoneType"),
    (lambda: kl.ops.layer_norm(X, X[0], X[0], eps=-1), ValueError, "eps is -1.0; it must be >= 0"),
    (lambda: kl.ops.swiglu(X, X, limit=0), ValueError, "limit is 0.0; it must be > 0 in float32, or None"),
    (lambda: kl.ops.swiglu(X, X, limit=-10), ValueError, "limit is -10.0; it must be > 0"),
    (lambda: kl.ops.swiglu(X, X, limit=1e-60), ValueError, "limit is 1e-60; it must be > 0 in float32"),
    (lambda: kl.ops.swiglu(X, X, limit=float("inf")), ValueError, "limit is inf; it must be finite in float32"),
    (lambda: kl.ops.swiglu(X, X, limit=float("nan")), ValueError, "limit is nan"),
    (lambda: kl.ops.swiglu(X, X, limit="x"), TypeError, "limit is 'x'; it must be a number > 0, or None"),
    (lambda: kl.ops.situ(X, X[:3], beta=4), ValueError, r"up has shape \[3, 8\]; it must be \[4, 8\]"),
    (lambda: kl.ops.situ(X, X, beta=0), ValueError, "beta is 0.0; it must be > 0 in float32"),
    (lambda: kl.ops.situ(X, X, beta=1e-60), ValueError, "beta is 1e-60; it must be > 0 in float32"),
    (lambda: kl.ops.situ(X, X, beta=float("inf")), ValueError, "beta is inf; it must be finite in float32"),
    (lambda: kl.ops.situ(X, X, beta=float("nan")), ValueError, "beta is nan"),
    (lambda: kl.ops.situ(X, X, beta=None), TypeError, "beta is None; it must be a number > 0"),
    (lambda: kl.ops.situ(X, X, beta=4, linear_beta=-25), ValueError, "linear_beta is -25.0; it must be > 0"),
    (lambda: kl.ops.situ(X, X, beta=4, linear_beta=0), ValueError, "linear_beta is 0.0; it must be > 0"),
    (lambda: kl.ops.situ(X, X, beta=4, linear_beta="x"), TypeError, "linear_beta is 'x'; it must be a number > 0"),
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
