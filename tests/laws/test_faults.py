"""Interrupts in every region and memory that runs out at every site, through Python: the right exception, the state at
the end of a whole pass, and what is read after that is what would have been read."""

import threading
import time

import numpy as np
import pytest
from conftest import DATA

import kimi_linear as kl

BEFORE = 37  # tokens that a state has read before the call that fails


@pytest.fixture
def model():
    return kl.Model.from_pretrained(DATA / "golden" / "kimi-a", ctx=kl.Context(threads=2))


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def started(model, n):
    """Each with BEFORE tokens read."""
    states = model.new_state(n)
    model.forward([ids(model, BEFORE, seed=i) for i in range(n)], state=states, logits="none")
    return states


CALLS = {  # new tokens of each sequence, options
    "prompt": ([150], {}),
    "passes": ([1100], {"logits": "last"}),
    "batch": ([70, 1, 64, 3], {}),
    "taps": ([80], {"taps": "*"}),
    "checked": ([20], {"check": "finite", "logits": "none"}),
}


def stopped_by(model, call, fault, nth, error):
    """Runs a call with the fault at its nth place; None where it has no such place, else what it left: (states,
    tokens of each)."""
    lengths, options = CALLS[call]
    states = started(model, len(lengths))
    tokens = [ids(model, n, seed=10 + n) for n in lengths]
    model.ctx._core.trim()  # scratch is taken anew
    getattr(model.ctx._core, fault)(nth)
    try:
        model.forward(tokens, state=states, **options)
        return None
    except error:
        return states, tokens
    finally:
        getattr(model.ctx._core, fault)(0)


def whole(model, call):
    lengths, _ = CALLS[call]
    states = started(model, len(lengths))
    logits = model.forward([ids(model, n, seed=10 + n) for n in lengths], state=states, logits="last")
    return [x.tobytes() for x in logits], [arrays(state) for state in states]


def check_continues(model, states, tokens, want):
    logits = []
    for state, new in zip(states, tokens, strict=True):
        done = state.position - BEFORE
        assert done == len(new) or done % 64 == 0
        if done < len(new):
            logits.append(model.forward(new[done:], state=state, logits="last").tobytes())
        else:
            logits.append(None)
    for got, value in zip(logits, want[0], strict=True):
        assert got in (None, value)
    assert [arrays(state) for state in states] == want[1]


@pytest.mark.parametrize("call", CALLS)
def test_interrupts_in_every_layer(model, call):
    """At the first regions and at every fifth behind them: several in each layer."""
    want = whole(model, call)
    nth, passes = 1, set()
    while (left := stopped_by(model, call, "cancel_at", nth, KeyboardInterrupt)) is not None:
        passes.add(left[0][0].position - BEFORE)
        check_continues(model, *left, want)
        nth += 1 if nth < 8 else 5 if call != "passes" else 23
    assert nth > 12 * model.config.n_layers
    assert passes == ({0, 512, 1024} if call == "passes" else {0})


@pytest.mark.parametrize("call", CALLS)
def test_memory_that_runs_out_at_every_site(model, call):
    want = whole(model, call)
    nth = 1
    while (left := stopped_by(model, call, "fail_at", nth, MemoryError)) is not None:
        assert {state.position for state in left[0]} == {BEFORE}  # all memory is taken at entry
        check_continues(model, *left, want)
        nth += 1
    assert nth > 1


def test_a_state_that_finds_no_memory_is_not_made(model):
    model.ctx._core.fail_at(1)
    with pytest.raises(MemoryError, match="out of memory: state of"):
        model.new_state()
    model.ctx._core.fail_at(2)
    with pytest.raises(MemoryError, match="out of memory: cache page 0"):
        model.new_state(context=100)
    assert model.new_state(context=100).position == 0


def test_a_step_is_not_interrupted(model):
    state, other = started(model, 2)[0], started(model, 2)[0]
    want = model.forward([5], state=other)
    model.ctx._core.cancel_at(3)
    assert model.forward([5], state=state).tobytes() == want.tobytes()
    before = arrays(state)
    with pytest.raises(KeyboardInterrupt):  # it waited for the next call that can be
        model.forward([6, 7], state=state)
    assert state.position == BEFORE + 1 and arrays(state) == before
    assert model.forward([6, 7], state=state).tobytes() == model.forward([6, 7], state=other).tobytes()


def test_cancel_from_another_thread(model):
    state = model.new_state()
    tokens = ids(model, 60_000)

    def cancel():
        while state.position == 0:
            time.sleep(0.001)
        model.ctx.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(KeyboardInterrupt):
        model.forward(tokens, state=state, logits="none")
    canceller.join()
    read = state.position
    assert 0 < read < len(tokens) and read % 64 == 0
    fresh = model.new_state()
    model.forward(tokens[:read], state=fresh, logits="none")
    assert arrays(fresh) == arrays(state)
