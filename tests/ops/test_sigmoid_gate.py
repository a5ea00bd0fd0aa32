"""sigmoid_gate: budget, a gate for each value, head and row, in place, same bytes everywhere."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge

import kimi_linear as kl


def inputs(T, D, G, scale=3.0):
    rng = np.random.default_rng([T, D, G])
    return dict(x=rng.standard_normal((T, D)).astype(np.float32),
                gate=(scale * rng.standard_normal((T, G))).astype(np.float32))


def check(given):
    ref = kl.reference.sigmoid_gate(**given)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.sigmoid_gate(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge("sigmoid_gate", got, ref, **given)
    in_place = given["x"].copy()
    kl.ops.sigmoid_gate(in_place, given["gate"], out=in_place)
    assert in_place.tobytes() == got.tobytes()
    return got


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("D, G", [(1, 1), (15, 15), (16, 1), (17, 1), (33, 33), (34, 2), (60, 20), (4096, 4096),
                                  (2048, 1), (4096, 16)])
def test_within_budget_and_in_place(T, D, G):
    check(inputs(T, D, G))


def test_rows_shared_by_threads():
    check(inputs(700, 64, 4))


@pytest.mark.parametrize("G", [1, 6])
def test_rim(G):
    given = inputs(9, 6, G)
    given["gate"][:, 0] = [-np.inf, -104, -100, -88, -0.0, 20, 88.7, 1e4, np.inf]
    given["x"][:, 3] = [1e-45, 3e38, -1e-40, 0, -0.0, 1, 3e38, -1, 2]
    got = check(given)
    assert (got[0, 0] == 0) and got[8, 0] == given["x"][8, 0]


def test_gate_for_each_value_is_that_of_the_head_repeated():
    given = inputs(5, 24, 3)
    each = given | dict(gate=np.repeat(given["gate"], 8, axis=1))
    assert kl.ops.sigmoid_gate(**given).tobytes() == kl.ops.sigmoid_gate(**each).tobytes()


def test_out_may_be_the_gate():
    given = inputs(5, 24, 24)
    wanted = kl.ops.sigmoid_gate(**given)
    assert kl.ops.sigmoid_gate(**given, out=given["gate"]).tobytes() == wanted.tobytes()


def test_nan_stays_where_it_goes():
    given = inputs(4, 24, 3)
    given["x"][1, 5], given["gate"][2, 1] = np.nan, np.nan
    bad = np.isnan(kl.ops.sigmoid_gate(**given))
    assert bad[1, 5] and bad[2, 8:16].all() and bad.sum() == 9


@pytest.mark.parametrize("change, error, message", [
    (dict(gate=np.zeros((4, 5), np.float32)), ValueError, r"gate has shape \[4, 5\]; it must be \[4, G\], G a divisor"),
    (dict(gate=np.zeros((3, 3), np.float32)), ValueError, r"gate has shape \[3, 3\]"),
    (dict(gate=np.zeros(24, np.float32)), ValueError, r"gate has shape \[24\]"),
    (dict(gate=np.zeros((4, 0), np.float32)), ValueError, r"gate has shape \[4, 0\]"),
    (dict(x=np.zeros((4, 24))), TypeError, "x is float64"),
    (dict(out=np.zeros((4, 23), np.float32)), ValueError, r"out has shape \[4, 23\]"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.sigmoid_gate(**(inputs(4, 24, 3) | change))


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"gate is \[T, G\] = \[2, 3\]; G must divide D = 8"):
        kl._core.sigmoid_gate(core, x.copy(), x, np.zeros((2, 3), np.float32), 2, 8, 3)
    with pytest.raises(ValueError, match="gate has 16 values"):
        kl._core.sigmoid_gate(core, x.copy(), x, x, 2, 8, 4)
