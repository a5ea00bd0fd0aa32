"""The laws of the forward pass: what gives the same bytes, and what stays within the budget."""

import copy
import ctypes
import ctypes.util
import pickle
import platform

import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES

import kimi_linear as kl

CONTEXTS = [kl.Context(isa=isa, threads=n) for isa in kl.isa_list() for n in (1, 2, 3)]
CASES = ["tiny", *GOLDEN_CASES]
_models = {}


def open_model(case, **options):
    key = (case, *options.items())
    if key not in _models:
        _models[key] = kl.Model.tiny(**options) if case == "tiny" else kl.Model.from_pretrained(
            DATA / "golden" / case, **options)
    return _models[key]


@pytest.fixture(params=CASES)
def model(request):
    return open_model(request.param)


@pytest.fixture(params=[case for case in CASES if case != "qwen35-a"])  # which has no experts
def mixture(request):
    return open_model(request.param)


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def run(model, tokens, cuts=()):
    """Logits and state after reading `tokens` in calls that end at `cuts`."""
    state = model.new_state()
    ends = [*cuts, len(tokens)]
    parts = [model.forward(tokens[a:b], state=state) for a, b in zip([0, *cuts], ends, strict=True)]
    assert state.position == len(tokens)
    return np.concatenate(parts), state


def test_the_callers_rounding_mode_changes_no_byte(model):
    """Not of a call, nor of a model that is made under it: scales and rates are computed by the calling thread."""
    upward, to_nearest = {"x86_64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}[platform.machine()], 0
    libm, tokens = ctypes.CDLL(ctypes.util.find_library("m")), np.arange(9)
    want = model.forward(tokens).tobytes()
    try:
        assert libm.fesetround(upward) == 0
        got = model.forward(tokens).tobytes()
        made = kl.Model(model.config, model.weights)
    finally:
        libm.fesetround(to_nearest)
    assert got == want and made.forward(tokens).tobytes() == want


def test_same_bytes_on_every_instruction_set_and_thread_count(model):
    tokens = ids(model, 200)
    first = None
    before = model.ctx
    try:
        for ctx in CONTEXTS:
            model.ctx = ctx
            logits, state = run(model, tokens)
            got = logits.tobytes(), arrays(state)
            first = first or got
            assert got == first, ctx
    finally:
        model.ctx = before


@pytest.mark.parametrize("lengths", [[1], [64, 1], [70, 3, 1, 129, 17, 16, 64, 200, 5], [0, 9, 0]])
def test_a_batch_gives_each_sequence_the_bytes_it_gets_alone(model, lengths):
    sequences = [ids(model, n, seed=n) for n in lengths]
    states = model.new_state(len(lengths))
    together = model.forward(sequences, state=states)
    for tokens, logits, state in zip(sequences, together, states, strict=True):
        alone, own = run(model, tokens)
        assert logits.tobytes() == alone.tobytes() and arrays(state) == arrays(own)


@pytest.mark.parametrize("cuts", [(64,), (128,), (64, 128, 192), (192,)])
def test_a_split_at_multiples_of_64_is_the_whole(model, cuts):
    tokens = ids(model, 300)
    whole, state = run(model, tokens)
    split, own = run(model, tokens, cuts)
    assert whole.tobytes() == split.tobytes() and arrays(state) == arrays(own)


@pytest.mark.parametrize("pass_tokens", [64, 100, 448])
def test_the_length_of_a_pass_changes_no_byte(model, pass_tokens):
    tokens = ids(model, 500)
    whole, state = run(model, tokens)
    other = model.new_state()
    values = np.empty_like(whole)
    rows = np.arange(len(tokens), dtype=np.int64)
    model._core.forward(kl.Context()._core, [other._core], tokens, np.array([0, 500]), 500, values, rows, 500, None,
                        None, 0, pass_tokens, None)
    assert values.tobytes() == whole.tobytes() and arrays(other) == arrays(state)


@pytest.mark.parametrize("cuts", [(1,), (17,), (1, 2, 3, 50), tuple(range(1, 90))])
def test_any_other_split_is_near_the_whole(model, cuts):
    tokens = ids(model, 90)
    whole, state = run(model, tokens)
    split, own = run(model, tokens, cuts)
    assert np.sqrt(np.mean((whole - split) ** 2) / np.mean(whole**2)) < 1e-5
    for name in state:
        size = np.sqrt(np.sum(state[name] ** 2) / max(state[name].size, 1))
        assert np.abs(state[name] - own[name]).max(initial=0) <= 1e-4 * size + 1e-30


def test_decode_steps_together_are_decode_steps_alone(model):
    prompts = [ids(model, n, seed=n) for n in (5, 70, 33)]
    together = model.new_state(3)
    alone = model.new_state(3)
    model.forward(prompts, state=together, logits="none")
    for prompt, state in zip(prompts, alone, strict=True):
        model.forward(prompt, state=state, logits="none")
    for step in range(4):
        tokens = ids(model, 3, seed=100 + step)
        batch = model.forward(tokens[:, None], state=together, logits="last")
        for i in range(3):
            assert batch[i].tobytes() == model.forward(tokens[i:i + 1], state=alone[i], logits="last").tobytes()
    for a, b in zip(together, alone, strict=True):
        assert arrays(a) == arrays(b)


def test_logits_last_and_rows_are_rows_of_all(model):
    tokens = ids(model, 150)
    whole = model.forward(tokens)
    assert model.forward(tokens, logits="last").tobytes() == whole[-1].tobytes()
    assert model.forward(tokens, logits=[0, 64, 149]).tobytes() == whole[[0, 64, 149]].tobytes()
    assert model.forward(tokens, logits="none") is None
    batch = model.forward(np.stack([tokens[:40], tokens[40:80]]), logits="last")
    assert batch.shape == (2, model.config.vocab_size)
    assert batch[0].tobytes() == model.forward(tokens[:40])[-1].tobytes()


def test_taps_change_no_byte_and_every_tap_has_its_shape(model):
    tokens = ids(model, 130)
    whole, state = run(model, tokens)
    own = model.new_state()
    logits, trace = model.forward(tokens, state=own, taps="*")
    assert logits.tobytes() == whole.tobytes() and arrays(own) == arrays(state)
    assert list(trace) == model.taps
    for name, value in trace.items():
        assert value.shape[0] == len(tokens) and np.isfinite(value).all(), name
    checked = model.forward(tokens, check="finite")
    assert checked.tobytes() == whole.tobytes()


def test_given_experts_are_used(mixture):
    model = mixture
    tokens = ids(model, 40)
    trace = model.trace(tokens, "layers.*.moe.*")
    layer = next(i for i, spec in enumerate(model.config.layers) if spec.ffn == "moe")
    own = trace[f"layers.{layer}.moe.ids"]
    same = model.trace(tokens, "*", expert_ids={layer: own})
    assert same[f"layers.{layer}.moe.out"].tobytes() == trace[f"layers.{layer}.moe.out"].tobytes()
    other = np.sort((own + 1) % model.config.n_experts, axis=1)
    forced = model.trace(tokens, "*", expert_ids={layer: other})
    assert np.array_equal(forced[f"layers.{layer}.moe.ids"], other)
    ref = model.reference().forward(tokens, taps="*", expert_ids={layer: other})
    name = f"layers.{layer}.moe.weights"
    np.testing.assert_allclose(forced[name], ref.taps[name], rtol=1e-4)


def test_memory_is_as_planned_and_nothing_is_allocated_in_a_pass(model):
    ctx = kl.Context(threads=2)
    before = model.ctx
    model.ctx = ctx
    try:
        plan = model.plan(context=700)
        state = model.new_state(context=700)
        assert state.nbytes == plan.state
        tokens = ids(model, 700)
        model.forward(tokens, state=state)
        assert ctx._core.scratch_bytes <= plan.scratch
        held = ctx._core.allocations
        state.reset()
        model.forward(tokens, state=state)
        model.forward(tokens[:1], state=model.new_state(), logits="last")
        assert ctx._core.allocations - held <= 2 + 1  # the new state's block and page
    finally:
        model.ctx = before


def test_float16_cache_is_within_its_rounding(model):
    tokens = ids(model, 90)
    whole, trace = model.forward(tokens, taps="layers.*")
    experts = {int(name.split(".")[1]): value for name, value in trace.items() if name.endswith("moe.ids")}
    chosen = {name: value for name, value in trace.items() if name.endswith("mla.select")}
    half = model.forward(tokens, state=model.new_state(cache="float16"), expert_ids=experts, edit=chosen)
    assert np.sqrt(np.mean((whole - half) ** 2) / np.mean(whole**2)) < 5e-3
    assert half.tobytes() != whole.tobytes()


def test_a_long_sequence_grows_by_pages():
    model = open_model("tiny")
    state = model.new_state()
    fixed = state.nbytes
    page = model.plan().state_page
    for _ in range(3):
        model.forward(ids(model, 400), state=state, logits="none")
        assert state.nbytes == fixed + page * -(-state.position // 512)
    assert state["layers.3.mla.latent_cache"].shape == (1200, 64)


def test_state_arrays_are_those_of_the_reference(model):
    tokens = ids(model, 70)
    _, state = run(model, tokens)
    ref = model.reference().forward(tokens)
    assert set(state) == set(ref.state)
    for name, want in ref.state.items():
        assert not want.size or np.abs(state[name] - want).max() <= 1e-4 * np.sqrt(np.mean(want**2)), name
    moved = model.new_state()
    model.forward(tokens, state=moved, logits="none")
    for name, value in state.items():
        moved[name] = value
    more = ids(model, 5, seed=9)
    assert model.forward(more, state=moved).tobytes() == model.forward(more, state=state).tobytes()


def nan_model():
    model = open_model("kimi-a")
    weights = {name: np.array(value) for name, value in model.weights.items()}
    weights["model.layers.2.self_attn.k_proj.weight"][3, 5] = np.nan
    return kl.Model(model.config, weights)


def test_check_names_the_first_tap_that_is_not_finite():
    with pytest.raises(ValueError, match=r"layers\.2\.kda\.k_proj: token 0 of sequence 0, channel 3 is nan"):
        nan_model().forward([5, 6], check="finite")


def test_what_is_not_a_number_is_told_with_its_layer_and_what_finds_the_cause():
    with pytest.raises(ValueError, match=r"layer 2: route: scores\[0, 0\] \(token, expert\) is NaN; .*"
                                         r'check="finite" names .* `kimi-linear inspect --check`'):
        nan_model().forward([5, 6])


def test_a_failed_call_leaves_the_state_where_it_was():
    good, bad = open_model("kimi-a"), nan_model()
    state = bad.new_state()
    before = arrays(state)
    with pytest.raises(ValueError, match="NaN|nan"):
        bad.forward(ids(good, 70), state=state, logits="none")
    assert state.position == 0 and arrays(state) == before


def test_tied_embeddings():
    import dataclasses

    model = open_model("kimi-b")
    config = dataclasses.replace(model.config, tie_embeddings=True)
    weights = {n: np.array(v) for n, v in model.weights.items() if n != "lm_head.weight"}
    tied = kl.Model(config, weights)
    got = tied.forward(ids(model, 20))
    ref = tied.reference().forward(ids(model, 20)).logits
    assert np.abs(got - ref).max() <= 1e-4 * np.sqrt(np.mean(ref**2))


TINY = dict(case="tiny")


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.forward([1, 2, 5000]), ValueError, r"tokens\[2\] is 5000; it must be 0 <= tokens < 2048"),
    (lambda m: m.forward([1, -2]), ValueError, r"tokens\[1\] is -2"),
    (lambda m: m.forward("text"), TypeError, "tokens is text"),
    (lambda m: m.forward(["some", "texts"]), TypeError, "tokens is text"),
    (lambda m: m.forward([1.5]), TypeError, "tokens is float64; it must be an array of integers"),
    (lambda m: m.forward([], logits="last"), ValueError, "sequence 0 is empty"),
    (lambda m: m.forward([1], logits="first"), ValueError, "logits is 'first'"),
    (lambda m: m.forward([1, 2], logits=[1, 0]), ValueError, "rows must rise"),
    (lambda m: m.forward([1, 2], logits=[2]), ValueError, r"logits\[0\] is 2"),
    (lambda m: m.forward([1, 2], offsets=[0, 3, 2]), ValueError, r"offsets\[2\] is 2 after 3"),
    (lambda m: m.forward([1, 2], offsets=[0, 1]), ValueError, "offsets ends at 1; it must end at T = 2"),
    (lambda m: m.forward([1, 2], state=[m.new_state()] * 2), ValueError, "one for each of 1 sequences"),
    (lambda m: m.forward([[1], [2]], state=[m.new_state()] * 2), ValueError, "is in use, or given twice"),
    (lambda m: m.forward([1], state=open_model("kimi-a").new_state()), ValueError, "belongs to another model"),
    (lambda m: m.forward([1], state="s"), TypeError, "it must be a State"),
    (lambda m: m.forward([1], taps="layers.9.*"), ValueError, "matches no tap; near it are"),
    (lambda m: m.forward([1], check="nan"), ValueError, "check is 'nan'"),
    (lambda m: m.forward([1], expert_ids={0: [[0, 1]]}), ValueError, "expert_ids has the key 0; it must be a layer"),
    (lambda m: m.forward([1], expert_ids={1: [[0, 9]]}), ValueError, r"expert_ids\[1\]\[\(0, 1\)\] is 9"),
    (lambda m: m.forward([1, 2, 3], state=m.new_state(context=2)), ValueError,
     "has read 0 tokens and 3 more are given; it was made for a context of 2"),
    (lambda m: m.new_state(cache="int4"), ValueError, "cache is 'int4'"),
    (lambda m: m.new_state()["layers.3.kda.state"], KeyError, "is no array of this state"),
    (lambda m: m.plan(context=0), ValueError, "context is 0"),
    (lambda m: m.new_state(-1), ValueError, "n is -1; it must be None, or an int >= 0"),
    (lambda m: m.new_state(context="x"), TypeError, "context is 'x'; it must be an int"),
    (lambda m: m.new_state(checkpoints_every=1.5), TypeError, "checkpoints_every is 1.5; it must be None, or an int"),
    (lambda m: m.new_state().truncate("x"), TypeError, "n is 'x'; it must be an int"),
    (lambda m: m.forward([1], start="x"), TypeError, "start is 'x'; it must be an int, or None"),
    (lambda m: m.forward([1], taps=3), TypeError, "taps: 3 is no glob"),
    (lambda m: m.forward([1], expert_ids=3), TypeError, "expert_ids is a int; it must be a dict"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call(open_model("tiny"))


def test_a_step_that_is_not_interrupted_leaves_other_calls_interruptible():
    """A step of one token runs to its end; what its context computes afterwards does not."""
    ctx, x = kl.Context(threads=1), np.ones((2, 3), np.float32)
    model = kl.Model.tiny(ctx=ctx)
    model.forward([1], state=model.new_state())
    ctx.cancel()
    with pytest.raises(KeyboardInterrupt):
        kl.ops.add(x, x, ctx=ctx)
    kl.ops.add(x, x, ctx=ctx)


def test_a_call_that_is_refused_lets_go_of_its_states():
    model = open_model("tiny")
    one, other = model.new_state(2)
    with pytest.raises(ValueError, match="state 2 is in use, or given twice"):
        model.forward([[1], [2], [3]], state=[one, other, one])
    model.forward([[1], [2]], state=[one, other])
    assert (one.position, other.position) == (1, 1)


def test_a_batch_of_no_sequence_has_its_form():
    model = open_model("tiny")
    tokens = np.zeros((0, 3), np.int64)
    assert model.forward(tokens).shape == (0, 3, model.config.vocab_size)
    assert model.forward(tokens, stop=1).shape == (0, 3, model.config.hidden_size)


def test_a_copy_has_weights_of_its_own():
    model, name = kl.Model.tiny(), "model.norm.weight"
    before = model.forward([5, 6])
    for twin in (copy.copy(model), copy.deepcopy(model)):
        np.testing.assert_array_equal(twin.forward([5, 6], state=model.new_state()), before)
        twin.weights[name] = 2 * np.asarray(twin.weights[name], np.float32)
        assert (twin.forward([5, 6]) != before).any()
    np.testing.assert_array_equal(model.forward([5, 6]), before)
    with pytest.raises(TypeError, match="tiny borrows its weights and is not pickled; open it with from_pretrained"):
        pickle.dumps(model)
