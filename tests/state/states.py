"""Making states, and comparing them by bytes."""

import numpy as np


def ids(model, n, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n).astype(np.int32)


def read(model, tokens, *, cuts=(), **options):
    """A state that read `tokens` in calls ending at `cuts`."""
    state = model.new_state(**options)
    for piece in np.split(np.asarray(tokens), cuts):
        model.forward(piece, state=state, logits="none")
    return state


def contents(state):
    """Everything that a state holds, as bytes."""
    return {"position": state.position, "tokens": list(state.tokens)} | {n: a.tobytes() for n, a in state.items()}


def assert_same(a, b, model, n=37):
    """Two states hold the same bytes, and go on to the same logits and bytes."""
    assert contents(a) == contents(b)
    more = ids(model, n, 99)
    left, right = model.forward(more, state=a), model.forward(more, state=b)
    assert left.tobytes() == right.tobytes()
    assert contents(a) == contents(b)
