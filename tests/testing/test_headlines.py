"""What a card's one sentence claims: no reason that explains little stands for all."""

import numpy as np
import pytest

import kimi_linear as kl

OPS = ("rms_norm", "linear", "swiglu", "softmax", "delta_rule", "route", "moe", "short_conv")


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_writes_nothing_is_told_so(op):
    def kernel(**arguments):
        results = getattr(kl.ops, op)(**arguments)
        return tuple(map(np.zeros_like, results)) if isinstance(results, tuple) else np.zeros_like(results)

    card = kl.testing.check_op(op, kernel, cases=["lengths"])
    assert "cases: all results are zero, as if nothing were written" in card.verdict.replace("; 1 not offered", "")


def test_what_explains_few_cases_is_no_headline_for_all():
    def kernel(x):
        return kl.ops.softmax(x) * (2 if x.shape[-1] > 1 and np.isfinite(x).all() else 1)

    card = kl.testing.check_op("softmax", kernel, cases=["plain", "lengths", "widths"])
    assert not card and (not card.reasons or "no known reason for most" in card.verdict), card.verdict


def test_a_reason_for_some_says_for_how_many():
    def kernel(x, w, eps):
        y = kl.ops.rms_norm(x, w, eps=eps)
        return y if x.shape[-1] > 60 else y / w

    card = kl.testing.check_op("rms_norm", kernel, cases=["widths", "eps"])
    sentence, names = card.reasons[0]
    assert card.verdict.endswith(sentence if len(names) == len(card.failing) else f", in {len(names)} of them")


def rounded(kind):
    import ml_dtypes

    return lambda x: x.astype(getattr(ml_dtypes, kind, kind)).astype(np.float32)


@pytest.mark.parametrize("says, kernel", [
    ("the results are rounded to bfloat16", lambda **x: tuple(map(rounded("bfloat16"), kl.ops.delta_rule(**x)))),
    ("the results are rounded to float16", lambda **x: tuple(map(rounded("float16"), kl.ops.delta_rule(**x)))),
    ("q, k and v are rounded to bfloat16",
     lambda q, k, v, **x: kl.ops.delta_rule(*map(rounded("bfloat16"), (q, k, v)), **x)),
    ("q and k are exchanged", lambda q, k, v, **x: kl.ops.delta_rule(k, q, v, **x)),
])
def test_common_slips_of_a_delta_rule_are_named(says, kernel):
    card = kl.testing.check_op("delta_rule", kernel, cases=["lengths", "carried", "keys"], without=["out"])
    assert f"cases: {says}" in card.verdict.replace("; 1 not offered", ""), card.verdict


def test_a_kernel_that_always_normalises_is_found():
    """Most cases have q and k of unit length; one has not, and asks for no norm."""
    def kernel(q, k, v, **x):
        return kl.ops.delta_rule(kl.ops.l2_norm(q), kl.ops.l2_norm(k), v, **x)

    card = kl.testing.check_op("delta_rule", kernel, cases=["keys"])
    assert "keys-lengths" in card.failing


def test_results_in_another_order_are_one_reason():
    def kernel(**x):
        o, state = kl.ops.delta_rule(**x)
        return state, o

    card = kl.testing.check_op("delta_rule", kernel, cases=["lengths", "carried", "widths"], without=["out"])
    assert card.reasons[0][0] == "the state is given before o" and len(card.reasons) == 1, card.verdict


def test_zeros_of_a_kernel_that_writes_have_their_own_reasons():
    """Two cases fail with zeros, each by another mistake: that nothing is written is neither."""
    def kernel(x, z, w, eps, activation="sigmoid"):
        with np.errstate(over="ignore"):
            squares = (x * x).sum(-1, keepdims=True) / np.float32(x.shape[-1])
            gate = 1 / (1 + np.exp(-z))
        y = w * x / np.sqrt(squares + np.float32(eps)) * gate
        return y * z if activation == "silu" else y

    card = kl.testing.check_op("gated_rms_norm", kernel, without=["out"])
    assert card.failing and "as if nothing were written" not in str(card), str(card)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("noise, told", [(2**-8, True), (2**-12, True), (0.2, False), (1e-5, False)])
def test_errors_of_the_size_of_a_narrow_type_are_told_as_such(noise, told):
    rng = np.random.default_rng(0)

    def noisy(**x):
        return tuple((a * (1 + noise * rng.standard_normal(a.shape))).astype(np.float32)
                     for a in kl.ops.delta_rule(**x))

    card = kl.testing.check_op("delta_rule", noisy, cases=["lengths", "carried"])
    assert not card and ("dtype= must say so" in str(card)) == told and not card.reasons, card
