"""The limit of swiglu: what is cut and where, NaN, zeros and infinities, the same bytes everywhere."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl


def check(**given):
    with np.errstate(invalid="ignore"):  # 0 times infinity
        ref = kl.reference.swiglu(**given)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.swiglu(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge("swiglu", got, ref, **given)
    return got


@pytest.mark.parametrize("limit", [10, 7, 0.75, 7.1, 1e-3, 1e-30, 100, 1e18])
@pytest.mark.parametrize("D", [1, 15, 16, 17, 33, 2048])
def test_within_budget(D, limit):
    for scale in (1.0, limit, 1e4):
        check(gate=normal(3, D, scale=scale), up=normal(3, D, seed=1, scale=scale), limit=limit)


def test_both_are_cut_to_the_bit():
    """What is cut is as if it were the limit; gate is cut above alone."""
    limit = np.float32(7.1)
    gate, up = normal(9, 100, scale=20), normal(9, 100, seed=1, scale=20)
    assert (gate > limit).any() and (gate < -limit).any() and (up > limit).any() and (up < -limit).any()
    got = check(gate=gate, up=up, limit=7.1)
    assert got.tobytes() == kl.ops.swiglu(np.minimum(gate, limit), np.clip(up, -limit, limit)).tobytes()


def test_a_limit_beyond_all_values_changes_no_byte():
    gate, up = normal(9, 100, scale=20), normal(9, 100, seed=1, scale=20)
    assert kl.ops.swiglu(gate, up, limit=1e3).tobytes() == kl.ops.swiglu(gate, up).tobytes()


def test_nan_stays_nan_and_infinities_are_cut():
    nan, inf = np.nan, np.inf
    gate = np.float32([nan, nan, nan, 3, 30, -30, inf, -inf, inf, 0.0, -0.0, 0.0, 1])
    up = np.float32([3, 30, nan, nan, nan, nan, -inf, 3, inf, inf, inf, -inf, -0.0])
    for n in range(1, len(gate) + 1):  # in each lane of what is left of a row
        got = check(gate=gate[:n], up=up[:n], limit=10)
        assert np.isnan(got[:6]).all()
    assert got[6] < -99 and np.isnan(got[7]) and got[8] == -got[6]
    assert np.signbit(got[9:]).tolist() == [False, True, True, True] and not got[9:].any()


@pytest.mark.parametrize("first", ["gate", "up"])
def test_in_place(first):
    given = dict(gate=normal(5, 33, scale=9), up=normal(5, 33, seed=1, scale=9), limit=7)
    wanted = kl.ops.swiglu(**given)
    assert kl.ops.swiglu(**given, out=given[first]).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("limit", [-1, np.nan, np.inf])
def test_the_core_checks_the_limit_itself(limit):
    x, y = normal(8), np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="swiglu: limit is .*; it must be > 0 and finite, or 0 for none"):
        kl._core.swiglu(kl.Context()._core, y, x, x, 8, limit)
    assert not y.any()
