"""Sentences of a card that name a mistake must not name one that is not there."""

import sys

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.testing import check_op, specs


def by_score(scores, k, bias=None, function="sigmoid", renormalise=True, scale=1.0):
    """A router as top-k gives it: experts by falling score."""
    ids, weights = kl.reference.route(scores, k=k, bias=bias, function=function, renormalise=renormalise, scale=scale)
    order = np.argsort(-np.take_along_axis(scores, ids.astype(np.int64), -1), axis=-1, kind="stable")
    return tuple(np.take_along_axis(a, order, -1) for a in (ids, weights.astype(np.float32)))


def test_ids_by_score_are_told_as_such():
    card = check_op("route", by_score)
    assert not card and "the ids of a token do not rise" in str(card)
    assert check_op("route", by_score, conventions=kl.conventions["ours"]["route"].but(forms=("ids in any order",)))


@pytest.mark.parametrize("op", ["rms_norm", "decay_gate"])
def test_a_finite_error_is_not_explained_by_nan(op):
    right = getattr(kl.reference, op)
    card = check_op(op, lambda *args, **more: np.float32(1.01) * right(*args, **more).astype(np.float32))
    assert not card and "NaN of one row" not in str(card)


def test_another_sequence_s_state():
    def kernel(q, k, v, g, beta, initial_state=None, offsets=None):
        rolled = None if initial_state is None or offsets is None else np.roll(initial_state, 1, axis=0)
        start = initial_state if rolled is None else rolled
        return kl.ops.delta_rule(q, k, v, g, beta, initial_state=start, offsets=offsets)

    card = check_op("delta_rule", kernel, cases=["ragged"])
    assert "each sequence begins with the state of the one before" in str(card)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("error", [3e-6, 1e-5])
@pytest.mark.parametrize("op", [op for op in specs() if op != "index_select"])  # ids are right or wrong
def test_a_kernel_that_is_no_more_than_inaccurate_has_no_mistake(op, error):
    """An error of a few bounds fits every mistake that changes nothing on a case's inputs."""
    def rough(**x):
        rng = np.random.default_rng(0)
        got = getattr(kl.reference, op)(**x)
        got = [a * (1 + error * rng.standard_normal(a.shape)) if a.dtype == np.float64 else a
               for a in (got if isinstance(got, tuple) else (got,))]
        return tuple(got) if len(got) > 1 else got[0]

    card = check_op(op, rough)
    rows = [r for r in card.rows if r.status == "fails" and r.group != "laws"]
    assert rows and sum(bool(r.why) for r in rows) <= 1, card


def test_two_mistakes_are_tried_where_one_of_them_cannot_be():
    """The state read as [V, K] by its memory, K = V or not, and no scale."""
    def kernel(q, k, v, g, beta, scale=None, initial_state=None, **options):
        if initial_state is not None:
            initial_state = np.ascontiguousarray(initial_state.swapaxes(-1, -2)).reshape(initial_state.shape)
        return kl.ops.delta_rule(q, k, v, g, beta, scale=1.0, initial_state=initial_state, **options)

    card = check_op("delta_rule", kernel, cases=["lengths", "carried", "widths"])
    assert "the initial state is read with K and V swapped; and the scale is missing" in card.verdict, card


def tanh_gate(x, gate):
    return x * np.repeat(np.tanh(gate), x.shape[-1] // gate.shape[-1], axis=-1)


def without_last_row(x, w, bias=None):
    y = kl.ops.linear(x, w, bias)
    y[..., -1] = 0
    return y


def over_all_scores(scores, k, renormalise=True, function="sigmoid", **options):
    ids, weights = kl.ops.route(scores, k=k, renormalise=False, function=function, **options)
    s = getattr(kl.reference, function)(scores)
    return ids, weights / s.sum(-1, keepdims=True) if renormalise else weights


@pytest.mark.parametrize("op, kernel", [
    ("sigmoid_gate", tanh_gate), ("linear", without_last_row), ("route", over_all_scores),
    ("rms_norm", lambda x, w, eps: kl.ops.rms_norm(kl.ops.rms_norm(x, w, eps=eps), w, eps=eps)),
    ("embedding", lambda ids, table: table[ids % max(len(table) - 1, 1)]),
    ("swiglu", lambda gate, up: gate / (1 + np.exp(-np.float32(1.5) * gate)) * up),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_fits_a_case_by_chance_is_not_named(op, kernel):
    card = check_op(op, kernel, without="out")
    named = [s for s, cases in card.reasons if "NaN" not in s and {card[c].group for c in cases} != {"laws"}]
    assert not card and not named, card


def test_nan_that_stays_in_its_row_or_is_lost_is_told_as_such():
    def reversed_heads(x, gate):
        return kl.ops.sigmoid_gate(x, np.ascontiguousarray(gate[..., ::-1]))

    def cleaned(x, gate):
        return kl.ops.sigmoid_gate(np.nan_to_num(x), np.nan_to_num(gate))

    def spread(x, gate):
        return kl.ops.sigmoid_gate(x, gate) + np.float32(0) * x.sum()

    def cleaned_delta(**x):
        return kl.ops.delta_rule(**{n: np.nan_to_num(a) if n in "qkv" else a for n, a in x.items()})

    for op, kernel, says in (("sigmoid_gate", reversed_heads, "NaN of one value reaches others of its row"),
                             ("sigmoid_gate", cleaned, "NaN is lost: there are numbers where it belongs"),
                             ("sigmoid_gate", spread, "NaN of one row reaches others"),
                             ("delta_rule", cleaned_delta, "NaN is lost: there are numbers where it belongs")):
        card = check_op(op, kernel, cases=["nan"])
        assert not card and {s for s, _ in card.reasons} == {says}, card


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_softmax_whose_maximum_is_another():
    def softmax(x, most):
        e = np.exp(x - most)
        return e / e.sum(-1, keepdims=True)

    for most, says in ((lambda x: np.maximum(x.max(-1, keepdims=True), 0), "the largest is sought from 0 on"),
                       (lambda x: x.max(initial=-np.inf), "the largest of all rows is taken off"),
                       (lambda x: np.float32(0), "exp(x) without taking off the largest")):
        card = check_op("softmax", lambda x, most=most: softmax(x, most(x)), cases=["values", "rim"])
        assert not card and all(s.startswith(says) for s, _ in card.reasons), card


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind, called", [("bfloat16", "bfloat16"), ("float16", "float16 or TF32")])
def test_a_kernel_that_rounds_at_every_step_is_told_so(kind, called):
    """No one rounding gives its results; that all of them are numbers of the type is so."""
    def narrow(a):
        return a.astype(getattr(ml_dtypes, kind, kind)).astype(np.float32)

    def norm(x, w, eps):
        y = kl.ops.rms_norm(narrow(x), np.ones_like(w), eps=eps)
        return narrow(narrow(w) * narrow(y))

    card = check_op("rms_norm", norm, cases=["lengths", "widths", "values"])
    says = f"all results are numbers of {called}: they are rounded to it, and maybe what they are made of"
    assert not card and card.reasons[0][0] == says and len(card.reasons[0][1]) > 0.7 * len(card.failing), card


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_a_right_kernel_returns():
    """More bits than a double has lie among bytes of padding; complex numbers and text are no results."""
    assert check_op("softmax", lambda x: kl.reference.softmax(x).astype(np.longdouble))
    for dtype, shown in ((complex, "complex128"), (str, "<U32")):
        card = check_op("softmax", lambda x, dtype=dtype: kl.reference.softmax(x).astype(dtype))
        assert not card and f"a result is {shown}; it must be real numbers" in card.verdict


@pytest.mark.parametrize("named, error, words", [
    (dict(factor=float("nan")), ValueError, "factor is nan"), (dict(factor=-1), ValueError, "factor is -1; .* > 0"),
    (dict(factor=None), TypeError, "factor is None"), (dict(without=5), TypeError, "without is 5; it must be text"),
    (dict(arrays=5), ValueError, "arrays is 5; it must be \"numpy\""),
])
def test_arguments_of_check_op_are_named(named, error, words):
    with pytest.raises(error, match=words):
        check_op("softmax", kl.ops.softmax, **named)


@pytest.mark.parametrize("conventions, arrays, package", [("fla-gdn", None, "torch"), ("mlx", None, "mlx"),
                                                          ("ours", "torch:cuda", "torch")])
def test_arrays_of_a_package_that_is_not_there(monkeypatch, conventions, arrays, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    with pytest.raises(ImportError, match=f"no arrays of {package}.*arrays=\"numpy\" hands over NumPy's"):
        check_op("delta_rule", kl.ops.delta_rule, conventions=conventions, arrays=arrays)


def test_an_output_that_is_not_written_is_told_as_such():
    card = check_op("softmax", lambda x, out=None: kl.ops.softmax(x), cases="laws")
    assert card["out"].detail == "out= is taken, and its y is left as it was"

    def doubled(x, out=None):
        y = kl.ops.softmax(x)
        if out is not None:
            out[...] = 2 * y
        return y

    card = check_op("softmax", doubled, cases="laws")
    assert card["out"].detail == "out= has other values of y than a new array gets"
