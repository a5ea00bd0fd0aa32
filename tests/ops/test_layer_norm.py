"""layer_norm: means far above the deviation, rows of equal values, rows of any size, what must be equal."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl


def inputs(T, D, mean=0.0, eps=1e-6):
    return dict(x=normal(T, D) + np.float32(mean), w=normal(D, seed=2), b=normal(D, seed=3), eps=eps)


def check(given):
    with np.errstate(all="ignore"):
        ref = kl.reference.layer_norm(**given)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.layer_norm(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge("layer_norm", got, ref, **given)
    return got


@pytest.mark.parametrize("mean", [3, -100, 1e4, 1e6, -3e7, 1e12])
@pytest.mark.parametrize("D", [1, 15, 16, 17, 128, 2304])
def test_a_mean_far_above_the_deviation(D, mean):
    """Up to means in whose last digit the deviation is, and beyond, where all values are equal or two neighbours."""
    for eps in (1e-6, 0.0 if abs(mean) < 1e7 and D > 1 else 1e-5):
        check(inputs(5, D, mean, eps))


def test_a_mean_costs_no_digit():
    """The values are multiples of 2^-10 and the mean one of 8: their sums are exact, and so are the differences."""
    x = np.round(normal(40, 128) * 1024) / np.float32(1024)
    x -= np.round(x.mean(-1, keepdims=True) * 1024) / np.float32(1024)
    given = inputs(40, 128) | dict(x=x)
    here, there = (kl.ops.layer_norm(**given | dict(x=x + np.float32(mean))) for mean in (0, 4096))
    np.testing.assert_allclose(here, there, rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [0, 3.3, -0.1, 1e-40, 1e10, 2.0**127, -3e38])
@pytest.mark.parametrize("D", [1, 16, 33, 600])
def test_equal_values_give_the_bias(D, value):
    """Also where their sum overflows, and where eps times 2^-192 would be 0."""
    given = inputs(3, D) | dict(x=np.full((3, D), value, np.float32))
    got = check(given)
    if D < 600:
        np.testing.assert_allclose(got, np.tile(given["b"], (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("eps, scale", [(1e-6, 1e-42), (1e-6, 1e-4), (1e-6, 1e19), (1e-6, 3e37), (0, 1e-45), (0, 1e-42),
                                        (0, 1e-20), (0, 1e-12), (0, 1e30), (1e-30, 1e-38), (1e-36, 1e-20)])
@pytest.mark.parametrize("D", [33, 600])
def test_tiny_and_huge_rows(D, eps, scale):
    """Beside ordinary ones; of one sign, so that the mean is as large as they are, and of both."""
    given = inputs(4, D, eps=eps)
    x = given["x"].clip(-5, 5)
    x[1], x[2], x[3] = x[1] * np.float32(scale), np.abs(x[2]) * np.float32(scale), np.sign(x[3]) * np.float32(scale)
    check(given | dict(x=x))


@pytest.mark.parametrize("eps", [1e-6, 1e-35])
def test_equal_values_but_one_beside_an_eps_that_hides_nothing(eps):
    for value in (1e-30, 2.0**-31, 2.0**-30, 1.0, 1e30):
        given = inputs(2, 40, eps=eps) | dict(x=np.full((2, 40), value, np.float32))
        given["x"][:, 7] = np.nextafter(np.float32(value), np.float32(0))
        check(given)


def test_a_row_of_zeros_without_eps_is_nan():
    given = inputs(3, 20, eps=0.0)
    given["x"][1] = 0
    assert np.isnan(check(given)).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other(value):
    given = inputs(4, 40)
    given["x"][2, 17] = value
    got = check(given)
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, axis=0)).all()


@pytest.mark.parametrize("power", [-30, 20, 90])
def test_rows_times_a_power_of_two(power):
    given = inputs(4, 40, 3.0, eps=0.0)
    more = given | dict(x=given["x"] * np.float32(2.0**power))
    assert kl.ops.layer_norm(**more).tobytes() == kl.ops.layer_norm(**given).tobytes()


def test_mean_and_deviation_of_the_result():
    y = kl.ops.layer_norm(normal(9, 256) + np.float32(7), np.ones(256, np.float32), np.zeros(256, np.float32), eps=0)
    assert np.abs(y.mean(-1, dtype=np.float64)).max() < 1e-6
    np.testing.assert_allclose(y.std(-1, dtype=np.float64), 1, rtol=1e-6)


def test_a_row_alone_more_axes_and_narrow_types():
    given = inputs(6, 33)
    whole = kl.ops.layer_norm(**given)
    for t in range(6):
        assert kl.ops.layer_norm(**given | dict(x=given["x"][t])).tobytes() == whole[t].tobytes()
    assert kl.ops.layer_norm(**given | dict(x=given["x"].reshape(2, 3, 33))).tobytes() == whole.tobytes()
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = {n: a.astype(dtype) if isinstance(a, np.ndarray) else a for n, a in given.items()}
        wide = {n: a.astype(np.float32) if isinstance(a, np.ndarray) else a for n, a in narrow.items()}
        assert kl.ops.layer_norm(**narrow).tobytes() == kl.ops.layer_norm(**wide).tobytes()


def test_an_output_over_weight_or_bias():
    memory = normal(60)
    x, w, b = memory[:40].reshape(2, 20).copy(), memory[40:], memory[20:40]
    wanted = kl.ops.layer_norm(x, w.copy(), b.copy(), eps=1e-6)
    assert kl.ops.layer_norm(x, w, b, eps=1e-6, out=memory[15:55].reshape(2, 20)).tobytes() == wanted.tobytes()


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="b has 7 values"):
        kl._core.layer_norm(core, x.copy(), x, x[0].copy(), x[0, :7].copy(), 2, 8, 0.0)
    with pytest.raises(ValueError, match="layer_norm: eps is nan; it must be >= 0"):
        kl._core.layer_norm(core, x.copy(), x, x[0].copy(), x[0].copy(), 2, 8, np.nan)
