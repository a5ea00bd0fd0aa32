"""A long sequence through one State; tests/long/stream.py is the same at 131,072 tokens."""

import pytest
from states import contents, ids
from streams import ANYWHERE, SPLITS, distance, routes_of, stream

import kimi_linear as kl
from kimi_linear.laws import BUDGET, TOKEN_BUDGET


@pytest.fixture(scope="module")
def tiny():
    return kl.Model.tiny()


def test_a_long_stream_is_as_planned_and_the_same_at_any_split(tiny):
    n = 16_384
    plan, results = tiny.plan(context=n), []
    for lengths in SPLITS.values():
        logits, state = stream(tiny, n, lengths)
        assert state.position == n and state.nbytes == plan.state
        results.append((logits.tobytes(), contents(state)))
    assert results[0] == results[1]


def test_a_stream_whose_calls_end_anywhere_is_within_the_budget(tiny):
    n = 4096
    whole, _ = stream(tiny, n, SPLITS["calls of 4096"])
    for lengths in ANYWHERE.values():
        logits, state = stream(tiny, n, lengths, routes_of(tiny, n))
        total, worst = distance(whole, logits)
        assert state.position == n and total <= BUDGET and worst <= TOKEN_BUDGET, (total, worst)


def test_a_state_that_grows_holds_what_the_plan_says_for_its_length(tiny):
    state = tiny.new_state()
    for n in (1, 511, 1, 600):
        tiny.forward(ids(tiny, n, n), state=state, logits="none")
        assert state.nbytes == tiny.plan(context=state.position).state
