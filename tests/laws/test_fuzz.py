"""Random sequences of everything that can be done with states: no crash, positions and tokens right, and the bytes of a
straightforward replay."""

import tempfile
from pathlib import Path

import numpy as np
from conftest import DATA
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

import kimi_linear as kl

MODEL = kl.Model.from_pretrained(DATA / "golden" / "kimi-a", ctx=kl.Context(threads=2))
LENGTHS = st.sampled_from([1, 1, 2, 16, 17, 63, 64, 65, 130])
EVERY, KEEP = 32, 2


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


class Sequence:
    """A state, and how it came to be: a copy that nothing moves any more, and the calls since."""

    def __init__(self, state, base=None, calls=(), tokens=()):
        self.state, self.base, self.calls, self.tokens = state, base, list(calls), list(tokens)

    def read(self, ids):
        self.calls.append(ids)
        self.tokens += ids.tolist()

    def replayed(self):
        """The same calls again, one by one, alone."""
        state = MODEL.new_state() if self.base is None else self.base.fork()
        for ids in self.calls:
            MODEL.forward(ids, state=state, logits="none")
        return state

    def copied(self, state):
        return Sequence(state, self.base, self.calls, self.tokens)


class States(RuleBasedStateMachine):
    """Each rule is a verb; after each one the state that it moved is looked at."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def ids(self, n):
        return self.rng.integers(3, MODEL.config.vocab_size, n).astype(np.int32)

    def check(self, *sequences):
        for s in sequences:
            assert s.state.position == len(s.tokens) == len(s.state.tokens)
            assert s.state.tokens == s.tokens
            assert arrays(s.state) == arrays(s.replayed())

    @rule(target=sequences, checkpoints=st.booleans())
    def new(self, checkpoints):
        options = {"checkpoints_every": EVERY, "keep": KEEP} if checkpoints else {}
        return Sequence(MODEL.new_state(**options))

    @rule(s=sequences, n=LENGTHS)
    def read(self, s, n):
        ids = self.ids(n)
        MODEL.forward(ids, state=s.state, logits="last")
        s.read(ids)
        self.check(s)

    @rule(chosen=st.lists(st.tuples(sequences, LENGTHS), min_size=1, max_size=4, unique_by=lambda c: id(c[0])))
    def read_together(self, chosen):
        batch = [self.ids(n) for _, n in chosen]
        MODEL.forward(batch, state=[s.state for s, _ in chosen], logits="none")
        for (s, _), ids in zip(chosen, batch, strict=True):
            s.read(ids)
        self.check(*(s for s, _ in chosen))

    @rule(s=sequences, n=st.sampled_from([2, 64, 130]), nth=st.integers(1, 60))
    def interrupted(self, s, n, nth):
        MODEL.ctx._core.cancel_at(nth)
        ids = self.ids(n)
        try:
            MODEL.forward(ids, state=s.state, logits="none")
            s.read(ids)
        except KeyboardInterrupt:
            pass
        finally:
            MODEL.ctx._core.cancel_at(0)
        self.check(s)

    @rule(s=sequences, n=LENGTHS)
    def refused(self, s, n):
        bad = self.ids(n)
        bad[-1] = MODEL.config.vocab_size
        try:
            MODEL.forward(bad, state=s.state)
            raise AssertionError("an id outside the vocabulary was read")
        except ValueError:
            self.check(s)

    @rule(target=sequences, s=sequences)
    def fork(self, s):
        fork = s.copied(s.state.fork())
        self.check(s, fork)
        return fork

    @rule(s=sequences, n=LENGTHS)
    def there_and_back(self, s, n):
        snapshot = s.state.snapshot()
        MODEL.forward(self.ids(n), state=s.state, logits="none")
        s.state.restore(snapshot)
        self.check(s)

    @rule(target=sequences, s=sequences)
    def save_and_load(self, s):
        with tempfile.TemporaryDirectory() as folder:
            s.state.save(Path(folder) / "state")
            loaded = s.copied(MODEL.load_state(Path(folder) / "state"))
        self.check(loaded)
        return loaded

    @rule(s=sequences, back=st.integers(0, 140))
    def truncate(self, s, back):
        n = max(0, s.state.position - back)
        try:
            s.state.truncate(n)
        except ValueError:
            self.check(s)  # past the oldest checkpoint: nothing moved
            return
        s.tokens = s.tokens[:n]
        assert s.state.position == n and s.state.tokens == s.tokens
        s.base, s.calls = s.state.fork(), []
        s.read(extra := self.ids(3))
        MODEL.forward(extra, state=s.state, logits="none")
        self.check(s)

    @rule(s=sequences)
    def reset(self, s):
        s.state.reset()
        s.base, s.calls, s.tokens = None, [], []
        self.check(s)

    @rule(target=sequences, s=consumes(sequences))
    def drop(self, s):
        s.state = None
        return multiple()


States.TestCase.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck))
TestStates = States.TestCase
