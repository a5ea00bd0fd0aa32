"""route: the choice (ties, groups, bias), the weights, NaN, errors."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge

import kimi_linear as kl

CASES = [
    dict(k=1), dict(k=3), dict(k=8, scale=2.446), dict(k=3, renormalise=False, scale=0.5),
    dict(k=3, function="softmax"), dict(k=3, function="softmax", renormalise=False),
    dict(k=3, groups=4, top_groups=2), dict(k=4, groups=4, top_groups=1), dict(k=5, groups=16, top_groups=5),
    dict(k=16), dict(k=8, groups=2, top_groups=2, scale=-1.0),
]


def scores(T, E, seed=0, gap=1e-3):
    """Logits whose order, and that of sums of two, does not hang on rounding: distinct multiples of `gap`."""
    rng = np.random.default_rng([seed, T, E])
    steps = np.stack([rng.choice(40 * E, E, replace=False) for _ in range(T)]) if T else np.zeros((0, E))
    return ((steps - 20 * E) * gap * 3).astype(np.float32)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("T", [0, 1, 37])
def test_ids_exact_and_weights_within_budget(T, with_bias, options):
    bias = np.random.default_rng(1).uniform(-0.2, 0.2, 16).astype(np.float32) if with_bias else None
    inputs = dict(scores=scores(T, 16), bias=bias) | options

    def run(ctx):
        ids, check_ids = guarded((T, options["k"]), np.int32, fill=-9)
        weights, check_weights = guarded((T, options["k"]))
        got = kl.ops.route(**inputs, out=(ids, weights), ctx=ctx)
        assert got[0] is ids and got[1] is weights
        check_ids()
        check_weights()
        return ids.copy(), weights.copy()

    judge("route", everywhere(run), kl.reference.route(**inputs), **inputs)


def test_real_size():
    inputs = dict(scores=scores(64, 256, gap=1e-4), k=8, scale=2.446,
                  bias=np.random.default_rng(1).uniform(-0.1, 0.1, 256).astype(np.float32))
    got = everywhere(lambda ctx: kl.ops.route(**inputs, ctx=ctx))
    judge("route", got, kl.reference.route(**inputs), **inputs)


def test_ties_go_to_the_lowest_index():
    x = np.array([[1, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [5, -1, 5, 5, 5, -1]], np.float32)
    ids, weights = everywhere(lambda ctx: kl.ops.route(x, k=2, ctx=ctx))
    assert ids.tolist() == [[1, 2], [0, 1], [0, 2]]
    assert np.array_equal(weights, np.full((3, 2), 0.5, np.float32))
    ids, _ = kl.ops.route(x, k=2, groups=3, top_groups=1)
    assert ids.tolist() == [[0, 1], [0, 1], [2, 3]]


def test_bias_chooses_and_does_not_weigh():
    x = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    ids, weights = kl.ops.route(x, k=2, bias=np.array([-2, 0, 0, 2], np.float32), renormalise=False)
    assert ids.tolist() == [[1, 3]]
    assert np.allclose(weights, [[1 / (1 + np.exp(-2.0)), 0.5]], rtol=1e-6)
    masked, _ = kl.ops.route(x, k=2, bias=np.array([-np.inf, 0, 0, 0], np.float32))
    assert masked.tolist() == [[1, 2]]


def test_a_group_counts_by_its_two_best():
    x = np.full((1, 9), -8.0, np.float32)
    x[0, [0, 3, 4, 6]] = 4.0, 2.0, 2.0, 3.0
    ids, _ = kl.ops.route(x, k=2, groups=3, top_groups=1)
    assert ids.tolist() == [[3, 4]]


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_a_token_alone_has_the_same_bytes(function):
    x = scores(20, 33)
    ids, weights = kl.ops.route(x, k=5, function=function)
    for t in range(20):
        i, w = kl.ops.route(x[t], k=5, function=function)
        assert i.shape == (5,) and i.tobytes() == ids[t].tobytes() and w.tobytes() == weights[t].tobytes()


def test_saturated_and_vanishing_scores():
    x = np.array([[200, 150, -200, 0], [-87, -95, -100, -200]], np.float32)
    inputs = dict(scores=x, k=2)
    got = everywhere(lambda ctx: kl.ops.route(**inputs, ctx=ctx))
    judge("route", got, kl.reference.route(**inputs), **inputs)


S = scores(4, 8)


def spoiled(value):
    x = S.copy()
    x[2, 5] = value
    return x


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.route(spoiled(np.nan), k=2), ValueError, r"scores\[2, 5\] \(token, expert\) is NaN"),
    (lambda: kl.ops.route(spoiled(np.inf), k=2, function="softmax"), ValueError, r"scores\[2, 5\] is inf"),
    (lambda: kl.ops.route(S, k=2, bias=np.full(8, np.nan, np.float32)), ValueError, r"bias\[0\] is nan"),
    (lambda: kl.ops.route(S, k=0), ValueError, "k is 0; it must be 1 <= k"),
    (lambda: kl.ops.route(S, k=9), ValueError, "k is 9; it must be 1 <= k <= E = 8"),
    (lambda: kl.ops.route(S, k=3, groups=4, top_groups=1), ValueError, "k is 3; it must be 1 <= k <= 2"),
    (lambda: kl.ops.route(S, k=1, groups=3), ValueError, "groups is 3; it must divide the 8 experts"),
    (lambda: kl.ops.route(S, k=1, groups=2, top_groups=3), ValueError, "top_groups is 3; it must be"),
    (lambda: kl.ops.route(S, k=1, scale=np.inf), ValueError, "scale is inf; it must be finite"),
    (lambda: kl.ops.route(S, k=1, function="relu"), ValueError, "function is 'relu'"),
    (lambda: kl.ops.route(S, k=1.5), TypeError, "k is 1.5; it must be an int"),
    (lambda: kl.ops.route(S, k=1, bias=S[0, :7]), ValueError, r"bias has shape \[7\]; it must be \[8\]"),
    (lambda: kl.ops.route(S.astype(float), k=1), TypeError, "scores is float64"),
    (lambda: kl.ops.route(S, k=1, out=(np.zeros((4, 1)), None)), TypeError, r"out\[0\] is float64"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
