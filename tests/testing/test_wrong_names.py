"""Sentences of a card that name a mistake must not name one that is not there."""

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.testing import check_op


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
