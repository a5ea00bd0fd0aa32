"""rope: budget, pairs, positions far away, in place, same bytes everywhere."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge

import kimi_linear as kl


def inputs(T, H=3, K=40, rotary=16, base=1e4, far=1000, scale=1.0):
    rng = np.random.default_rng([T, H, K, rotary])
    return dict(x=(scale * rng.standard_normal((T, H, K))).astype(np.float32), positions=rng.integers(0, far, T),
                base=base, rotary=rotary)


def check(given):
    ref = kl.reference.rope(**given)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.rope(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge("rope", got, ref, **given)
    in_place = given["x"].copy()
    assert kl.ops.rope(**(given | dict(x=in_place)), out=in_place) is in_place
    assert in_place.tobytes() == got.tobytes()
    return got


@pytest.mark.parametrize("T", [0, 1, 5, 300])
def test_within_budget_and_in_place(T):
    check(inputs(T))


@pytest.mark.parametrize("K, rotary", [(1, 0), (2, 2), (15, 14), (16, 16), (17, 2), (33, 30), (34, 34), (66, 64),
                                       (256, 64)])
def test_widths(K, rotary):
    given = inputs(4, K=K, rotary=rotary)
    got = check(given)
    assert got[..., rotary:].tobytes() == given["x"][..., rotary:].tobytes()


@pytest.mark.parametrize("far", [10, 262_144, 2**31])
@pytest.mark.parametrize("base", [1e4, 1e7, 1.0, 0.5])
def test_positions_far_away(far, base):
    check(inputs(20, rotary=32, base=base, far=far))


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e37])
def test_rim(scale):
    check(inputs(9, scale=scale))


def test_position_zero_is_exact():
    given = inputs(3) | dict(positions=np.zeros(3, np.int64))
    assert np.array_equal(kl.ops.rope(**given), given["x"])


def test_scores_depend_on_the_distance_alone():
    given = inputs(1, K=32, rotary=32)
    q, k = given["x"][:, :1], given["x"][:, 1:2]

    def score(i, j):
        a, b = (kl.ops.rope(x, [p], base=1e4, rotary=32).astype(np.float64) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    assert abs(score(7, 3) - score(1007, 1003)) < 1e-5 < abs(score(7, 3) - score(7, 4))


def test_pairs_are_half_apart_and_turn_against_the_clock():
    x = np.zeros((1, 1, 6), np.float32)
    x[0, 0, 0] = 1
    y = kl.ops.rope(x, [1], base=100.0, rotary=4)[0, 0]
    np.testing.assert_allclose(y, [np.cos(1), 0, np.sin(1), 0, 0, 0], atol=1e-7)
    y = kl.ops.rope(np.roll(x, 1, -1), [1], base=100.0, rotary=4)[0, 0]
    np.testing.assert_allclose(y, [0, np.cos(0.1), 0, np.sin(0.1), 0, 0], atol=1e-7)


def test_batch_axis_and_heads_apart():
    given = inputs(6)
    flat = kl.ops.rope(**given)
    batch = given | dict(x=given["x"].reshape(2, 3, 3, 40), positions=given["positions"].reshape(2, 3))
    assert kl.ops.rope(**batch).tobytes() == flat.tobytes()
    one = kl.ops.rope(**(given | dict(x=given["x"][2:3, 1:2], positions=given["positions"][2:3])))
    assert one.tobytes() == np.ascontiguousarray(flat[2:3, 1:2]).tobytes()


def test_nan_stays_in_its_pair():
    given = inputs(3)
    clean = kl.ops.rope(**given)
    given["x"][1, 2, 3] = np.nan
    got = kl.ops.rope(**given)
    assert np.isnan(got[1, 2, [3, 11]]).all() and np.isnan(got).sum() == 2
    assert np.array_equal(got[~np.isnan(got)], clean[~np.isnan(got)])


def test_budget_catches_angles_in_float32():
    given = inputs(50, rotary=32, far=100_000)
    speed = (given["base"] ** (-2 * np.arange(16) / 32)).astype(np.float32)
    angle = (given["positions"].astype(np.float32)[:, None, None] * speed).astype(np.float64)
    a, b = given["x"][..., :16], given["x"][..., 16:32]
    c, s = np.cos(angle), np.sin(angle)
    wrong = np.concatenate([a * c - b * s, b * c + a * s, given["x"][..., 32:]], -1)
    with pytest.raises(AssertionError, match="times its budget"):
        judge("rope", wrong, kl.reference.rope(**given), **given)


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((3, 40), np.float32)), ValueError, r"x has shape \[3, 40\]; it must be \[T, H, K\]"),
    (dict(x=np.zeros((3, 3, 40))), TypeError, "x is float64"),
    (dict(positions=[1, 2]), ValueError, r"positions has shape \[2\]; it must be \[3\]"),
    (dict(positions=[1, -2, 3]), ValueError, r"positions\[1\] is -2"),
    (dict(positions=[1.0, 2.0, 3.0]), TypeError, "positions is float64"),
    (dict(rotary=15), ValueError, "rotary is 15; it must be even, from 0 to K = 40"),
    (dict(rotary=42), ValueError, "rotary is 42"),
    (dict(base=0.0), ValueError, "base is 0.0; it must be > 0"),
    (dict(base=np.inf), ValueError, "base is inf"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.rope(**(inputs(3) | change))


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((2, 3, 8), np.float32)
    for sizes, base, message in [((2, 3, 8, 3), 1.0, "rotary is 3; it must be even, from 0 to K = 8"),
                                 ((2, 3, 8, 10), 1.0, "rotary is 10"), ((2, 3, 8, 4), -1.0, "base is -1"),
                                 ((2, 3, 7, 4), 1.0, "out has 48 values")]:
        with pytest.raises(ValueError, match=message):
            kl._core.rope(core, x.copy(), x, np.array([0, 1]), *sizes, base)
    with pytest.raises(ValueError, match=r"positions\[1\] is -1; it must be >= 0"):
        kl._core.rope(core, x.copy(), x, np.array([0, -1]), 2, 3, 8, 4, 1.0)
