"""Memory is what the plan says: the library's own count to the byte, and the process's growth beside it."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA, GLM_CASES, GOLDEN_CASES

import kimi_linear as kl

CASES = ["tiny", *GOLDEN_CASES]
PASS = 512
_models = {}


def open_model(case):
    if case not in _models:
        _models[case] = kl.Model.tiny() if case == "tiny" else kl.Model.from_pretrained(DATA / "golden" / case)
    return _models[case]


def ids(model, T):
    return (np.arange(T) * 7 % model.config.vocab_size).astype(np.int32)


@pytest.fixture
def with_context():
    """The model on a context of its own with so many threads; its scratch counts from nothing."""
    before = []

    def use(model, threads):
        before.append((model, model.ctx))
        model.ctx = kl.Context(threads=threads)
        return model.ctx._core

    yield use
    for model, ctx in reversed(before):
        model.ctx = ctx


@pytest.mark.parametrize("cache, case", [
    (cache, case) for cache in ("float32", "float16", "q8_0") for case in CASES
    if not (cache == "q8_0" and case in ("kimi-b", "k3-a", "k3-b", *GLM_CASES))  # 32 does not divide their latents
])
def test_states_hold_what_is_planned(case, cache):
    model = open_model(case)
    for context, sequences in itertools.product((1, 511, 512, 513, 1500), (1, 3)):
        plan = model.plan(context=context, sequences=sequences, cache=cache)
        states = model.new_state(sequences, context=context, cache=cache)
        assert sum(state.nbytes for state in states) == plan.state
        grown = model.new_state(cache=cache)
        model.forward(ids(model, context), state=grown, logits="none")
        assert sequences * grown.nbytes == plan.state


def compositions(context, sequences):
    """New tokens of each sequence in one pass: full passes of few and of all, short last pieces, steps, chance."""
    for N in sorted({1, 2, 3, 4, 5, 6, sequences}):
        for few, odd in itertools.product((1, 2, 4, 8, 16), (0, 1, 4)):
            if N > sequences or odd > N or N * few > PASS or few > context:
                continue
            left, new = PASS - N * few, []
            for _ in range(N):
                new.append(few + min(left, context - few))
                left -= new[-1] - few
            yield [n - (n - 16) % 64 if i < odd and n > 16 else n for i, n in enumerate(new)]
    yield [1] * sequences
    rng = np.random.default_rng(context + sequences)
    for _ in range(8):
        N = int(rng.integers(1, sequences + 1))
        yield np.minimum(context, 1 + (rng.dirichlet([0.5] * N) * (PASS - N)).astype(int)).tolist()


@pytest.mark.parametrize("case, cache, context, sequences, threads", [
    ("tiny", "float32", 512, 1, 1), ("tiny", "float16", 530, 2, 2), ("tiny", "float32", 70, 9, 2),
    ("kimi-a", "float32", 512, 1, 2), ("kimi-a", "float16", 1300, 2, 1), ("kimi-a", "float32", 30, 9, 1),
    ("tiny", "q8_0", 530, 2, 2), ("kimi-a", "q8_0", 70, 5, 1),
    ("kimi-b", "float32", 1, 1, 2), ("kimi-b", "float32", 530, 8, 3), ("kimi-b", "float16", 64, 5, 1),
])
def test_scratch_of_the_widest_pass_is_what_is_planned(case, cache, context, sequences, threads, with_context):
    """Every composition of a pass fits, and one takes the plan to the byte."""
    model = open_model(case)
    core = with_context(model, threads)
    plan = model.plan(context=context, sequences=sequences, cache=cache)
    assert core.scratch_bytes == 0  # planning takes nothing
    largest = 0
    for new in compositions(context, sequences):
        states = model.new_state(len(new), cache=cache)
        for n, state in zip(new, states, strict=True):  # so that the pass ends at the full context
            if context > n:
                model.forward(ids(model, context - n), state=state, logits="none")
        core.trim()
        model.forward([ids(model, n) for n in new], state=states)
        assert core.scratch_bytes <= plan.scratch, new
        largest = max(largest, core.scratch_bytes)
    assert largest == plan.scratch


def test_a_long_call_takes_no_more_than_its_widest_pass(with_context):
    model = open_model("kimi-a")
    core = with_context(model, 2)
    plan = model.plan(context=1200, sequences=4)
    model.forward([ids(model, n) for n in (1200, 1, 700, 1100)], logits="none")
    assert core.scratch_bytes <= plan.scratch


def test_checkpoints_are_counted():
    model = open_model("kimi-a")
    plan = model.plan(context=1000, sequences=1)
    with_them = model.plan(context=1000, sequences=1, keep=3)
    assert with_them.checkpoints == 3 * plan.state_fixed and plan.checkpoints == 0
    assert with_them.anonymous == plan.anonymous + with_them.checkpoints
    state = model.new_state(context=1000, checkpoints_every=64, keep=3)
    model.forward(ids(model, 1000), state=state, logits="none")
    assert state.nbytes == plan.state + with_them.checkpoints


GROWTH = """
import dataclasses
import numpy as np
import kimi_linear as kl

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

wide = dataclasses.replace(kl.Model.tiny().config, kda_heads=32, kda_head_dim=256)
model = kl.Model.from_config(wide, dtype="bfloat16", ctx=kl.Context(threads=2))
tokens = np.arange(507, dtype=np.int32)
model.forward(tokens[:65])  # threads, tables and the interpreter's own memory are there
model.ctx._core.trim()
plan = model.plan(context=512, sequences=6)
before = anonymous()
states = model.new_state(6, context=512)
model.forward([tokens, *tokens[:5, None]], state=states, logits="none")  # a full pass of all
print(plan.state + plan.scratch, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status says how the process grew: Linux")
def test_the_process_grows_by_what_is_planned():
    done = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True)
    planned, grown = map(int, done.stdout.split())
    assert planned >= 256 << 20
    shadow = planned / 8 if "libasan" in os.environ.get("LD_PRELOAD", "") else 0  # a byte for each 8
    assert 0.98 * planned <= grown <= 1.02 * planned + shadow, (planned, grown)


def test_scratch_that_cannot_be_had_is_not_asked_for_again():
    """After a large call a small one asks for as much, so that the next large one finds it; unless there is no room."""
    rng, ctx = np.random.default_rng(0), kl.Context(threads=1)
    w = [rng.standard_normal((2, 32, 32), dtype=np.float32) for _ in range(3)]

    def moe(T):
        x, ids = rng.standard_normal((T, 32), dtype=np.float32), np.tile(np.array([0, 1], np.int32), (T, 1))
        kl.ops.moe(x, ids, np.ones((T, 2), np.float32), *w, ctx=ctx)
        return ctx._core.scratch_bytes

    assert moe(1000) == 0  # it took several pieces: given back
    largest = moe(1)
    assert moe(1000) == largest > 500_000
    ctx = kl.Context(threads=1)
    moe(1000)
    ctx._core.fail_at(1)
    with pytest.raises(MemoryError, match=f"scratch of {largest} bytes was wanted"):
        moe(1)
    assert moe(1) < largest / 10
