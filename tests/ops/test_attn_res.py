"""attn_res: budget from none to many snapshots, rows of any size, in place, same bytes everywhere."""

import ml_dtypes
import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl


def inputs(n, T, D, scale=1.0, steep=2.0, eps=1e-5):
    """`steep`: about how far scores of ordinary rows lie apart."""
    return dict(snapshots=normal(n, T, D, scale=scale), x=normal(T, D, seed=1, scale=scale),
                w=normal(D, seed=2, scale=steep * D**-0.5), eps=eps)


def check(given):
    with np.errstate(all="ignore"):
        ref = kl.reference.attn_res(**given)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.attn_res(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    before = {name: np.copy(value) for name, value in given.items()}
    got = everywhere(run)
    judge("attn_res", got, ref, **given)
    assert all(np.array_equal(before[name], value, equal_nan=True) for name, value in given.items())
    in_place = given | dict(x=given["x"].copy())
    kl.ops.attn_res(**in_place, out=in_place["x"])
    assert in_place["x"].tobytes() == got.tobytes()
    return got


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("n, D", [(0, 17), (1, 1), (2, 15), (3, 16), (8, 17), (15, 33), (16, 33), (40, 20), (8, 7168)])
def test_within_budget_and_in_place(n, T, D):
    check(inputs(n, T, D))


def test_rows_shared_by_threads():
    check(inputs(3, 700, 64))


@pytest.mark.parametrize("steep", [0.0, 30.0, 1e3, 1e6])
def test_scores_that_are_equal_and_far_apart(steep):
    check(inputs(5, 4, 100, steep=steep))


@pytest.mark.parametrize("eps, scale", [(1e-6, 1e-42), (1e-6, 1e-4), (1e-6, 1e19), (1e-6, 3e38), (0, 1e-45), (0, 1e-20),
                                        (0, 1e30)])
@pytest.mark.parametrize("D", [33, 600])
def test_tiny_and_huge_rows(D, eps, scale):
    """Beside ordinary ones, among the candidates of one token and in the next."""
    given = inputs(4, 3, D, eps=eps)
    for rows in (given["snapshots"][::2], given["x"][None, 1:]):
        rows[:, 1:] = np.sign(rows[:, 1:]) * np.float32(scale)
        rows[..., -1] = 1
    check(given)


def test_rows_of_zeros():
    given = inputs(3, 4, 20)
    given["snapshots"][1], given["x"][2] = 0, 0
    check(given)
    assert np.isnan(check(given | dict(eps=0.0))).all()  # 0 / 0 is a score of every token


def test_no_snapshots_give_x_bit_for_bit():
    given = inputs(0, 3, 20)
    given["x"][0, :6] = [-0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38]
    for snapshots in (given["snapshots"], [], ()):
        got = everywhere(lambda ctx, s=snapshots: kl.ops.attn_res(**given | dict(snapshots=s), ctx=ctx))
        assert got.tobytes() == given["x"].tobytes()
    assert kl.ops.attn_res(**given, out=given["x"]) is given["x"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name, at", [("x", (2, 3)), ("snapshots", (1, 2, 3))])
def test_a_row_that_is_not_finite_is_nan_and_no_other(name, at, value):
    given = inputs(3, 4, 20)
    given[name][at] = value
    got = check(given)
    assert np.isnan(got[2]).all() and np.isfinite(np.delete(got, 2, axis=0)).all()


def test_a_weight_of_zero_does_not_hide_what_is_not_finite():
    given = inputs(2, 2, 20)
    given["w"][3], given["x"][1, 3] = 0, np.inf
    assert np.isnan(check(given)).any(-1).tolist() == [False, True]


# ---- what must be equal ----


def test_equal_candidates_that_share_their_weight_are_themselves():
    x = normal(4, 20)
    x[0, 0] = -0.0
    got = kl.ops.attn_res(np.stack([x] * 3), x, normal(20), eps=1e-5)
    assert got.tobytes() == x.tobytes()  # 1/4 four times


def test_without_a_weight_it_is_the_mean():
    given = inputs(3, 4, 20) | dict(w=np.zeros(20, np.float32))
    want = np.mean([*given["snapshots"], given["x"]], axis=0, dtype=np.float64)
    np.testing.assert_allclose(check(given), want, rtol=0, atol=1e-6)


def test_a_score_far_above_the_others_takes_its_candidate_bit_for_bit():
    given = inputs(3, 4, 20)
    given["w"][...] = 100 * given["snapshots"][1, 0]
    assert kl.ops.attn_res(**given)[0].tobytes() == given["snapshots"][1, 0].tobytes()


@pytest.mark.parametrize("power", [-30, 20, 90])
def test_candidates_times_a_power_of_two(power):
    """Without eps scores do not change, and the result is as much larger, whichever rows are rescaled on the way."""
    given = inputs(3, 4, 20, eps=0.0)
    factor = np.float32(2.0**power)
    more = given | {name: given[name] * factor for name in ("snapshots", "x")}
    assert kl.ops.attn_res(**more).tobytes() == (kl.ops.attn_res(**given) * factor).tobytes()


def test_a_token_alone_has_the_bytes_that_it_has_among_others():
    given = inputs(5, 9, 100)
    whole = kl.ops.attn_res(**given)
    for t in range(9):
        part = slice(t, t + 1)
        alone = kl.ops.attn_res(given["snapshots"][:, part], given["x"][part], given["w"], eps=given["eps"])
        assert alone.tobytes() == whole[part].tobytes()


def test_more_axes_lists_and_narrow_types():
    given = inputs(3, 6, 20)
    whole = kl.ops.attn_res(**given)
    batch = given | dict(snapshots=given["snapshots"].reshape(3, 2, 3, 20), x=given["x"].reshape(2, 3, 20))
    assert kl.ops.attn_res(**batch).tobytes() == whole.tobytes()
    assert kl.ops.attn_res(**given | dict(snapshots=list(given["snapshots"]))).tobytes() == whole.tobytes()
    np.testing.assert_array_equal(kl.reference.attn_res(**batch).reshape(6, 20), kl.reference.attn_res(**given))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = {name: x.astype(dtype) if isinstance(x, np.ndarray) else x for name, x in given.items()}
        wide = {name: x.astype(np.float32) if isinstance(x, np.ndarray) else x for name, x in narrow.items()}
        assert kl.ops.attn_res(**narrow).tobytes() == kl.ops.attn_res(**wide).tobytes()


@pytest.mark.parametrize("j", [0, 2])
def test_out_may_be_a_snapshot_which_is_then_copied(j):
    given = inputs(3, 6, 20)
    wanted = kl.ops.attn_res(**given)
    assert kl.ops.attn_res(**given, out=given["snapshots"][j]).tobytes() == wanted.tobytes()


# ---- errors ----


@pytest.mark.parametrize("change, error, message", [
    (dict(snapshots=np.zeros((3, 4, 23), np.float32)), ValueError,
     r"snapshots has shape \[3, 4, 23\]; it must be \[n, 4, 24\]"),
    (dict(snapshots=np.zeros((4, 24), np.float32)), ValueError, r"snapshots has shape \[4, 24\]"),
    (dict(snapshots=np.zeros((3, 4, 24))), TypeError, "snapshots is float64; it must be float32"),
    (dict(snapshots=[np.zeros((4, 24), np.float32), np.zeros(24, np.float32)]), ValueError, "snapshots is a list"),
    (dict(x=np.zeros((4, 24))), TypeError, "x is float64"),
    (dict(x=np.zeros((4, 0), np.float32)), ValueError, r"x has shape \[4, 0\]; it must be \[..., D\] with D >= 1"),
    (dict(w=np.zeros(23, np.float32)), ValueError, r"w has shape \[23\]; it must be \[24\]"),
    (dict(eps=-1), ValueError, "eps is -1.0; it must be >= 0"),
    (dict(eps="x"), TypeError, "eps is 'x'"),
    (dict(out=np.zeros((4, 23), np.float32)), ValueError, r"out has shape \[4, 23\]"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.attn_res(**(inputs(3, 4, 24) | change))


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="snapshots has 16 values"):
        kl._core.attn_res(core, x.copy(), x, x, x[0].copy(), 2, 2, 8, 0.0)
    with pytest.raises(ValueError, match="snapshots"):
        kl._core.attn_res(core, x.copy(), x, x, x[0].copy(), -1, 2, 8, 0.0)
    with pytest.raises(ValueError, match="attn_res: eps is nan; it must be >= 0"):
        kl._core.attn_res(core, x.copy(), x, x, x[0].copy(), 1, 2, 8, np.nan)
