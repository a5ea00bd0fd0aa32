"""Figures, verdicts and messages of `compare`, and of `assert_close`, which raises with them."""

import ml_dtypes
import numpy as np
import pytest
from tensors import Tensor

from kimi_linear import diff, ops, reference
from kimi_linear.diff import metrics
from kimi_linear.diff.compare import judge
from kimi_linear.testing import assert_close

U = 2.0**-24


@pytest.fixture
def norm(rng):
    """inputs, the op's result and the reference of an rms_norm."""
    inputs = dict(
        x=rng.standard_normal((5, 3, 32)).astype(np.float32),
        w=rng.standard_normal(32).astype(np.float32),
        eps=1e-5,
    )
    return inputs, ops.rms_norm(**inputs), reference.rms_norm(**inputs)


# ---- figures ----


def test_the_size_is_that_of_finite_values():
    e = metrics.measure([3.0, 4.5, np.inf, np.nan], [3.0, 4.0, np.inf, np.nan])
    assert (e.size, e.largest, e.desired_nonfinite, e.nonfinite_apart) == (np.sqrt(12.5), 0.5, 2, 0)


def test_a_budget_that_is_no_number_allows_nothing():
    assert metrics.share_of([1.0, 2.0], [1.0, 2.0], np.nan)[0] == 0
    assert metrics.share_of([1.0, 2.0], [1.0, 3.0], np.nan) == (np.inf, (1,))


def test_what_a_narrow_type_adds_to_a_budget():
    one_off = np.array([1 + 2.0**-10], np.float16)  # the next float16
    u = 2.0**-11  # the result rounds, and so does what is in its budget
    enough = u / (1 + u) * (1 + 1e-9)
    assert judge(one_off, [1.0], enough).ok
    assert not judge(one_off, [1.0], enough * (1 - 1e-6)).ok
    assert judge(np.zeros(1, np.float16), [2.0**-25], 0).ok  # half of the least subnormal
    assert not judge(np.zeros(1, np.float16), [2.0**-25 * 1.01], 0).ok


def test_figures_by_hand():
    e = metrics.measure([[3.0, 4.0]], [[3.0, 5.0]])
    assert e.largest == 1 and e.worst == (0, 1)
    np.testing.assert_allclose(
        [e.size, e.rms, e.rms_relative, e.rms_u, e.largest_u, e.nmse, e.cosine],
        [
            np.sqrt(17),
            np.sqrt(0.5),
            np.sqrt(0.5 / 17),
            np.sqrt(0.5 / 17) / U,
            1 / np.sqrt(17) / U,
            1 / 34,
            29 / (5 * np.sqrt(34)),
        ],
        rtol=1e-14,
    )


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_figures_do_not_depend_on_scale(scale, rng):
    d = rng.standard_normal((4, 5))
    a = d * (1 + 1e-3)
    e = metrics.measure(a * scale, d * scale)
    np.testing.assert_allclose([e.rms_relative, e.nmse, e.cosine], [1e-3, 1e-6, 1.0], rtol=1e-9)


def test_what_is_not_finite():
    nan, inf = np.nan, np.inf
    e = metrics.measure([1.0, nan, inf, -inf, nan], [1.0, nan, inf, inf, 2.0])
    assert (e.actual_nonfinite, e.desired_nonfinite, e.nonfinite_apart) == (4, 3, 2)
    assert e.largest == inf and e.worst == (3,)
    same = metrics.measure([nan, inf, 1.0], [nan, inf, 1.0])
    assert same.exact and same.nonfinite_apart == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_nothing_to_compare(shape):
    e = metrics.measure(np.zeros(shape), np.zeros(shape))
    assert e.exact and e.worst == ()
    assert diff.compare(np.zeros(shape), np.zeros(shape))


def test_zero_reference():
    assert metrics.measure([0.0], [0.0]).rms_relative == 0
    assert metrics.measure([1e-30], [0.0]).rms_relative == np.inf


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (1e-6, (True, True, True)),
        (3e-4, (True, True, False)),
        (1e-3, (False, True, False)),
        (1e-2, (False, False, False)),
    ],
)
def test_usual_gates(error, expected):
    d = np.ones((8, 8))
    passed = metrics.gates(d * (1 + error), d)
    assert (passed.ggml, passed.fla, passed.transformers) == expected
    assert passed.all == all(expected)


def test_least_tolerance_is_the_one_allclose_passes(rng):
    d = rng.standard_normal(100)
    a = d + 1e-3 * rng.standard_normal(100)
    t = metrics.smallest_tolerance(a, d)
    assert np.allclose(a, d, rtol=t * (1 + 1e-9), atol=t * (1 + 1e-9))
    assert not np.allclose(a, d, rtol=t * (1 - 1e-3), atol=t * (1 - 1e-3))


# ---- verdicts ----


def test_inside_the_budget(norm):
    inputs, y, ref = norm
    found = diff.compare(y, ref, op="rms_norm", inputs=inputs)
    assert found and found.ok and 0 < found.share <= 1
    by_hand = (np.abs(y - ref) / diff.budget("rms_norm", ref, **inputs)).max()
    np.testing.assert_allclose(found.share, by_hand)
    assert found.verdict.startswith("ok: rms_norm uses 0.")


def test_over_the_budget_names_the_element(norm):
    inputs, y, ref = norm
    y[4, 2, 17] *= 1 + 2e-5
    found = diff.compare(y, ref, op="rms_norm", inputs=inputs)
    assert not found and found.at == (4, 2, 17)
    assert found.verdict.startswith("OVER BUDGET: rms_norm at token 4, head 2, channel 17 is ")
    assert np.allclose(y, ref, rtol=1e-4, atol=1e-4), "the usual gate sees nothing"
    assert "transformers' 1e-4 passes" in str(found)
    named = diff.compare(y, ref, op="rms_norm", inputs=inputs, axes=("row", "group", "d"))
    assert "row 4, group 2, d 17" in named.verdict


def test_without_inputs_the_usual_gates_decide(norm):
    inputs, y, ref = norm
    assert diff.compare(y, ref).ok
    found = diff.compare(y * np.float32(1.001), ref, op="rms_norm")
    assert not found.ok and found.share is None
    assert "the gates of ggml, transformers would fail" in found.verdict and "inputs=" in found.verdict
    assert diff.compare(ref, ref).verdict == "ok: every element is the same"


def test_a_narrow_type_is_allowed_its_own_rounding(norm):
    inputs, _, ref = norm
    for dtype in (np.float16, ml_dtypes.bfloat16):
        stored = ref.astype(np.float32).astype(dtype)
        assert diff.compare(stored, ref, op="rms_norm", inputs=inputs).ok
        assert diff.compare(stored.astype(np.float32), ref, op="rms_norm", inputs=inputs, dtype=dtype).ok
        assert not diff.compare(stored.astype(np.float32), ref, op="rms_norm", inputs=inputs).ok
        twice = (stored.astype(np.float32) * 1.05).astype(dtype)
        found = diff.compare(twice, ref, op="rms_norm", inputs=inputs)
        assert not found.ok and f"{np.dtype(dtype).name} alone" in str(found)


def test_ops_with_several_results(rng):
    inputs = dict(
        q=rng.standard_normal((6, 2, 8)) / 3,
        k=rng.standard_normal((6, 2, 8)) / 3,
        v=rng.standard_normal((6, 2, 4)),
        g=-np.abs(rng.standard_normal((6, 2, 8))),
        beta=rng.random((6, 2)),
    )
    inputs = {n: x.astype(np.float32) for n, x in inputs.items()}
    got, ref = ops.delta_rule(**inputs), reference.delta_rule(**inputs)
    found = diff.compare(got, ref, op="delta_rule", inputs=inputs)
    assert found.ok and len(found.parts) == 2
    assert found.share == max(p.share for p in found.parts)
    state = diff.compare(got[1], ref[1], op="delta_rule", inputs=inputs)
    assert state.share == found.parts[1].share
    wrong = got[1].copy()
    wrong[1, 3, 2] += 1e-4
    assert not diff.compare((got[0], wrong), ref, op="delta_rule", inputs=inputs)
    assert not diff.compare(wrong, ref[1], op="delta_rule", inputs=inputs)
    with pytest.raises(
        ValueError, match=r"desired has shape \[3\]; delta_rule on these inputs gives \[6, 2, 4\] and"
    ):
        diff.compare(np.zeros(3), np.zeros(3), op="delta_rule", inputs=inputs)


def test_not_finite_is_never_ok(norm):
    inputs, y, ref = norm
    y[0, 0, 0] = np.nan
    assert not diff.compare(y, ref) and "NOT FINITE" in diff.compare(y, ref).verdict
    found = diff.compare(y, ref, op="rms_norm", inputs=inputs)
    assert not found and found.share == np.inf and "not finite" in str(found)


def test_expert_ids_are_sets():
    assert diff.compare(np.array([[3, 1], [0, 2]]), np.array([[1, 3], [2, 0]]))
    found = diff.compare(np.array([[3, 1], [0, 2]]), np.array([[1, 3], [2, 5]]))
    assert not found and found.at == (1,)
    assert "[0]" in str(found) and "in place of [5]" in str(found)


def test_expert_ids_and_weights_are_compared_in_one_order(rng):
    inputs = dict(scores=rng.standard_normal((6, 16)).astype(np.float32), k=4)
    (ids, weights), desired = ops.route(**inputs), reference.route(**inputs)
    turned = ids[:, ::-1], weights[:, ::-1]
    for op, given in (("route", inputs), ("route", None), (None, None)):
        assert diff.compare(turned, desired, op=op, inputs=given), op
        found = diff.compare((turned[0], weights), desired, op=op, inputs=given)
        assert not found and found.parts[0].ok and not found.parts[1].ok, "these weights are of other experts"
    one = dict(inputs, scores=inputs["scores"][0])
    assert diff.compare(tuple(x[::-1] for x in ops.route(**one)), reference.route(**one), op="route", inputs=one)


def test_an_array_alone_takes_the_bound_of_the_result_that_it_is(rng):
    inputs = dict(scores=rng.standard_normal((6, 16)).astype(np.float32), k=4)
    got, desired = ops.route(**inputs), reference.route(**inputs)
    both = diff.compare(got, desired, op="route", inputs=inputs)
    assert diff.compare(got[1], desired[1], op="route", inputs=inputs).share == both.parts[1].share
    q, k, v, g = (rng.standard_normal((8, 8, 8)).astype(np.float32) / 3 for _ in range(4))
    inputs = dict(q=q, k=k, v=v, g=-np.abs(g), beta=rng.random((8, 8)).astype(np.float32))
    got, desired = ops.delta_rule(**inputs), reference.delta_rule(**inputs)
    both = diff.compare(got, desired, op="delta_rule", inputs=inputs)
    for i in range(2):
        alone = diff.compare(got[i], desired[i], op="delta_rule", inputs=inputs)
        assert alone and alone.rows == both.parts[i].rows, "the same figures and names of axes"
    assert "head " in alone.rows[-1][2] and "key " in alone.rows[-1][2]
    assert diff.compare((got[0],), (desired[0],), op="delta_rule", inputs=inputs).share == both.parts[0].share
    with pytest.raises(ValueError, match="desired may be result . or . of delta_rule, which have one shape; give all"):
        diff.compare(q, q, op="delta_rule", inputs=inputs)
    with pytest.raises(ValueError, match="desired has 3 results; delta_rule on these inputs has 2"):
        diff.compare((*got, q), (*desired, q), op="delta_rule", inputs=inputs)


def test_token_ids_are_no_set():
    ids, other = np.array([5, 9, 7]), np.array([9, 5, 7])
    for op in ("sample", None):
        found = diff.compare(ids, other, op=op)
        assert not found and found.at == (0,)
        assert found.verdict == "DIFFERENT: 2 of 3 integers are others, the first at [0]: 5 in place of 9"
        assert diff.compare(ids, ids.astype(np.int32), op=op).verdict == "ok: every element is the same"
    assert not diff.compare(ids[None], other[None], op="sample") and diff.compare(ids[None], other[None])
    assert diff.compare(np.array(3), np.array(3)) and not diff.compare(np.array(3), np.array(4))
    assert diff.compare(np.zeros((3, 0), int), np.zeros((3, 0), int))
    found = diff.compare(np.array([[3, 3, 5]]), np.array([[3, 5, 5]]))
    assert not found and "[3]" in str(found) and "in place of [5]" in str(found)


def test_tensors_that_numpy_cannot_read_by_itself(rng):
    x, w = rng.standard_normal((5, 32)).astype(np.float32), rng.standard_normal((4, 32)).astype(np.float32)
    assert diff.compare(ops.softmax(x), reference.softmax(x), op="softmax", inputs=dict(x=Tensor(x)))
    found = diff.compare(Tensor(ops.linear(x, w)), Tensor(reference.linear(x, w)), op="linear",
                         inputs=dict(x=Tensor(x), w=Tensor(w)))
    assert found and found.share is not None
    results = tuple(map(Tensor, ops.route(x, k=2))), tuple(map(Tensor, reference.route(x, k=2)))
    assert diff.compare(*results, op="route", inputs=dict(scores=Tensor(x), k=2))


def test_weights_in_blocks_have_a_budget(rng):
    x = rng.standard_normal((5, 32)).astype(np.float32)
    w = ops.quantize(rng.standard_normal((4, 32)).astype(np.float32), "Q8_0")
    assert diff.compare(ops.linear(x, w), reference.linear(x, w), op="linear", inputs=dict(x=x, w=w))


# ---- how it looks, and bad input ----


def test_html_is_escaped(norm):
    inputs, y, ref = norm
    page = diff.compare(y, ref, axes=("<b>", "&", "c"))._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_bad_input(norm):
    inputs, y, ref = norm
    with pytest.raises(ValueError, match=r"actual has shape \[5, 3, 31\] and desired \[5, 3, 32\]"):
        diff.compare(y[..., 1:], ref)
    with pytest.raises(ValueError, match="op is 'sample'; it must be one with a budget: add, "):
        diff.compare(y, ref, op="sample", inputs=inputs)
    with pytest.raises(ValueError, match="axes are token; the array has 3 axes"):
        diff.compare(y, ref, axes=("token",))
    with pytest.raises(ValueError, match="actual has 2 results and desired 1"):
        diff.compare((y, y), (ref,))
    with pytest.raises(TypeError, match="actual is"):
        diff.compare(np.array(["a"]), np.array([1.0]))


def test_an_op_that_there_is_not(norm):
    x = np.ones((2, 3), np.float32)
    for call in (assert_close, diff.compare):
        for arrays in ((x, x), ((x, x), (x, x))):
            with pytest.raises(ValueError, match="op is 'rms_nrm'; there is no such op, near it are rms_norm"):
                call(*arrays, op="rms_nrm")
    assert diff.compare(x, x, op="sample") and diff.compare(x, x, op="route_weights")


def test_assert_close(norm):
    inputs, y, ref = norm
    assert_close(y, ref, op="rms_norm", inputs=inputs)
    assert_close(y, ref)
    y[1, 1, 1] += 1e-4
    with pytest.raises(AssertionError, match=r"rms_norm differ\nrms error") as raised:
        assert_close(y, ref, op="rms_norm", inputs=inputs)
    assert "OVER BUDGET: rms_norm at token 1, head 1, channel 1" in str(raised.value)
    with pytest.raises(AssertionError, match="arrays differ"):
        assert_close(ref * 2, ref)


def test_an_error_beyond_all_measure_is_infinite():
    """Its square is no float64."""
    e = diff.compare(np.array([1e200]), np.array([1e-10])).errors
    assert e.nmse == np.inf and 1e209 < e.rms_relative < 1e211
