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
