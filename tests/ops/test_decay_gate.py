"""decay_gate: both forms, per channel and per head, its rim, same bytes everywhere, errors."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl

RIM = np.array([0, -0.0, 1e-45, -1e-40, 1e-30, 3e38, -3e38, 88, -88, 104, -104, 1e4, -1e4, 20, -20, 1, -1],
               np.float32)


def run_and_judge(f, rate, dt_bias, **kw):
    def run(ctx):
        out, check = guarded(f.shape)
        kl.ops.decay_gate(f, rate, dt_bias, **kw, out=out, ctx=ctx)
        check()
        return out.copy()

    got = everywhere(run)
    ref = kl.reference.decay_gate(f, rate, dt_bias, **kw)
    ref = np.where(ref < -np.finfo(np.float32).max, -np.inf, ref)
    judge("decay_gate", got, ref, f=f, rate=rate, dt_bias=dt_bias, **kw)
    assert (got <= 0).all()
    return got


@pytest.mark.parametrize("lower_bound", [None, -5.0, -0.25])
@pytest.mark.parametrize("K", [1, 15, 16, 17, 128])
@pytest.mark.parametrize("T, H", [(0, 3), (1, 1), (5, 3), (4, 33)])
def test_within_budget(T, H, K, lower_bound):
    rate = np.exp(normal(H, seed=1, scale=2))
    run_and_judge(normal(T, H, K, scale=4), rate, normal(H, K, seed=2), lower_bound=lower_bound)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("H", [1, 16, 33])
def test_one_gate_a_head_is_K_of_1(H, lower_bound):
    f, rate, bias = normal(6, H, scale=4), np.exp(normal(H, seed=1)), normal(H, seed=2)
    got = run_and_judge(f, rate, bias, lower_bound=lower_bound)
    one = kl.ops.decay_gate(f[..., None], rate, bias[:, None], lower_bound=lower_bound)
    assert got.tobytes() == one.tobytes()


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("rate", [0.0, 1e-40, 1e-3, 1.0, 16.0, 1e4])
def test_rim(rate, lower_bound):
    f, rates = np.tile(RIM, (2, 3, 1)), np.full(3, rate, np.float32)
    with np.errstate(over="ignore"):
        run_and_judge(f, rates, normal(3, len(RIM)), lower_bound=lower_bound)
        run_and_judge(f, rates, 0 * normal(3, len(RIM)), lower_bound=lower_bound)


def test_the_bias_cancels_within_budget():
    f = normal(50, 2, 16, scale=100)
    run_and_judge(f, np.ones(2, np.float32), -f[7] * np.float32(1 + 2.0**-20))


def test_worked_values():
    f = np.array([[[0.3, -0.2]], [[1, 0]], [[-1, 2]]], np.float32)
    rate, bias = np.array([2], np.float32), np.array([[0.5, -0.5]], np.float32)
    np.testing.assert_allclose(
        kl.ops.decay_gate(f, rate, bias)[:, 0],
        [[-2.342201332, -0.806372098], [-3.402826556, -0.948153968], [-0.948153968, -3.402826556]], rtol=3e-7)
    np.testing.assert_allclose(
        kl.ops.decay_gate(f, rate, bias, lower_bound=-5)[:, 0],
        [[-4.160091926, -0.989080557], [-4.762870634, -1.344707107], [-1.344707107, -4.762870634]], rtol=3e-7)


def test_infinities_and_nan_follow_the_formula():
    f = np.array([[np.inf, -np.inf, np.nan, 0]], np.float32)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    np.testing.assert_array_equal(kl.ops.decay_gate(f, one, zero)[0, :3], [-np.inf, 0, np.nan])
    np.testing.assert_array_equal(kl.ops.decay_gate(f, zero, zero)[0], [np.nan, 0, np.nan, 0])
    np.testing.assert_array_equal(kl.ops.decay_gate(f, one, zero, lower_bound=-5)[0], [-5, 0, np.nan, -2.5])


def test_a_batch_axis_and_in_place():
    f, rate, bias = normal(2, 3, 4, 16), np.exp(normal(4)), normal(4, 16)
    wanted = np.stack([kl.ops.decay_gate(f[n], rate, bias) for n in range(2)])
    assert kl.ops.decay_gate(f, rate, bias).tobytes() == wanted.tobytes()
    assert kl.ops.decay_gate(f, rate, bias, out=f) is f and f.tobytes() == wanted.tobytes()


def test_the_budget_rejects_what_is_wrong():
    f, rate, bias = normal(20, 3, 8), np.exp(normal(3)), normal(3, 8, seed=1)
    ref = kl.reference.decay_gate(f, rate, bias)
    for got in (kl.ops.decay_gate(f, np.ones(3, np.float32), bias), kl.ops.decay_gate(f, rate, 0 * bias),
                np.exp(ref), kl.ops.decay_gate(f, rate, bias, lower_bound=-5)):
        with pytest.raises(AssertionError, match="times its budget"):
            judge("decay_gate", got, ref, f=f, rate=rate, dt_bias=bias)


F, RATE, BIAS = normal(4, 2, 8), np.ones(2, np.float32), normal(2, 8)


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.decay_gate(F, RATE[:1], BIAS), ValueError, r"rate has shape \[1\]; it must be \[2\]"),
    (lambda: kl.ops.decay_gate(F[..., :7], RATE, BIAS), ValueError, r"f has shape \[4, 2, 7\]; it must be"),
    (lambda: kl.ops.decay_gate(F, -RATE, BIAS), ValueError, r"rate\[0\] is -1.0; it must be >= 0.*A_log"),
    (lambda: kl.ops.decay_gate(F, RATE, BIAS, lower_bound=5), ValueError, "lower_bound is 5; it must be f"),
    (lambda: kl.ops.decay_gate(F, RATE, BIAS, lower_bound=-np.inf), ValueError, "lower_bound is -inf"),
    (lambda: kl.ops.decay_gate(F, RATE, BIAS, lower_bound=np.nan), ValueError, "lower_bound is nan"),
    (lambda: kl.ops.decay_gate(F[..., :0], RATE, BIAS[:, :0]), ValueError, "H and K must be >= 1"),
    (lambda: kl.ops.decay_gate(F.astype(float), RATE, BIAS), TypeError, "f is float64"),
    (lambda: kl.ops.decay_gate(F, RATE, BIAS, out=F[:2]), ValueError, r"out has shape \[2, 2, 8\]"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
