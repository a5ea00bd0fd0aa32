"""The whole model on a device: every kernel of a forward pass."""


import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES
from hip_build import DEVICE, host_build_only, host_library

import kimi_linear as kl
from kimi_linear.verify import verify

RMS, LARGEST = 1e-5, 2e-4  # between two engines, each half of it from float64 (tests/model/test_verify.py)
# One unit on every tap moves the logits of qwen35-a, whose gated norms blow up small vectors, by 9e-6 of their rms,
# those of k3-a, whose SiTU is driven to its bounds, by 2e-5, others by 2e-6; up is unbounded in k3-b and grows to 175.
WIDER = {"qwen35-a": 8, "k3-a": 8, "k3-b": 2}


@pytest.fixture(params=GOLDEN_CASES, scope="module")
def models(request):
    """(on the CPU, on the device)"""
    host_library()
    folder = DATA / "golden" / request.param
    return kl.Model.from_pretrained(folder), kl.Model.from_pretrained(folder, device=DEVICE)


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def experts_of(trace):
    return {int(name.split(".")[1]): x for name, x in trace.items() if name.endswith("moe.ids")}


def assert_near(model, got, wanted, name):
    if np.size(wanted) == 0:  # shared keys of a model without positions
        assert np.shape(got) == np.shape(wanted), name
        return
    assert np.shape(got) == np.shape(wanted), name
    if np.size(wanted) == 0:  # GLM's shared key: no channel of it has a position
        return
    size = np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))
    error = np.abs(np.asarray(got, np.float64) - wanted)
    times = WIDER.get(model.name, 1)
    assert np.sqrt(np.mean(error**2)) <= times * RMS * size and error.max(initial=0) <= times * LARGEST * size, name


@pytest.mark.parametrize("cuts", [(), (1, 2), (17,)])
def test_every_tap_and_state_is_the_cpus(models, cuts):
    """Expert ids given; the device's state after the same calls, too."""
    cpu, device = models
    tokens = ids(cpu, 70)
    states = cpu.new_state(), device.new_state()
    for part in np.split(tokens, cuts):
        wanted = cpu.trace(part, "*", state=states[0])
        got = device.trace(part, "*", state=states[1], expert_ids=experts_of(wanted) or None)
        assert list(got) == list(wanted)
        for name in wanted:
            if not name.endswith("moe.ids"):
                assert_near(cpu, got[name], wanted[name], name)
    for name in states[0]:
        assert_near(cpu, states[1][name], states[0][name], name)


def test_a_state_goes_to_a_file_and_back(models, tmp_path):
    """Device to file to device: the same bytes from there on. To the CPU and back: near."""
    cpu, device = models
    tokens = ids(cpu, 40, seed=1)
    state = device.new_state()
    device.forward(tokens[:21], state=state, logits="none")
    state.save(tmp_path / "state")
    again, on_cpu = device.load_state(tmp_path / "state"), cpu.load_state(tmp_path / "state")
    wanted = device.forward(tokens[21:], state=state)
    assert device.forward(tokens[21:], state=again).tobytes() == wanted.tobytes()
    assert all(again[name].tobytes() == state[name].tobytes() for name in state)
    near = cpu.forward(tokens[21:], state=on_cpu)
    assert np.sqrt(np.mean((near - wanted) ** 2)) <= 1e-3 * np.sqrt(np.mean(wanted**2))  # routing is its own


def test_a_batch_is_each_sequence_alone(models):
    _, device = models
    sequences = [ids(device, n, seed=n) for n in (5, 1, 30)]
    states, alone = device.new_state(3), device.new_state(3)
    together = device.forward(sequences, state=states)
    for sequence, logits, state, own in zip(sequences, together, states, alone, strict=True):
        assert device.forward(sequence, state=own).tobytes() == logits.tobytes()
        assert all(state[name].tobytes() == own[name].tobytes() for name in state)


def test_forks_and_snapshots_keep_their_bytes(models):
    _, device = models
    tokens = ids(device, 12, seed=2)
    state = device.new_state()
    device.forward(tokens[:8], state=state, logits="none")
    fork, kept = state.fork(), state.snapshot()
    wanted = device.forward(tokens[8:], state=state)
    assert device.forward(tokens[8:], state=fork).tobytes() == wanted.tobytes()
    state.restore(kept)
    assert device.forward(tokens[8:], state=state).tobytes() == wanted.tobytes()


def test_greedy_text_is_the_cpus():
    cpu, device = kl.Model.tiny(), kl.Model.tiny(device=DEVICE)
    options = dict(max_new_tokens=12, temperature=0)
    wanted = cpu.generate("In the beginning", **options).run()
    core = device.ctx._core
    core.profile(True)
    try:
        assert device.generate("In the beginning", **options).run().text == wanted.text
    finally:
        core.profile(False)
    calls = {op: n for op, n, *_ in core.profile_result()}
    assert calls["embedding"] and not calls.get("sample")  # logits lie on the host, and are drawn from there


def test_a_context_of_another_device_is_refused():
    device = kl.Model.tiny(device=DEVICE)
    state = device.new_state()
    device.ctx = kl.Context()
    with pytest.raises(ValueError, match="the context computes on cpu and the model is on hip"):
        device.forward(np.arange(5), state=state)


@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_memory_is_as_planned(cache):
    """No call takes scratch that was not measured: the second finds all of it in place."""
    device = kl.Model.tiny(device=DEVICE, cache=cache)
    plan, state, core = device.plan(context=100), device.new_state(context=100), device.ctx._core
    assert state.nbytes == plan.state
    device.forward(np.arange(40), state=state, logits="all")
    assert 0 < core.scratch_bytes <= plan.scratch
    before, again = core.allocations, device.new_state(context=100)
    of_a_state = core.allocations - before
    device.forward(np.arange(40), state=again, logits="all")
    assert core.allocations == before + of_a_state and core.scratch_bytes > 0


def nan_model():
    model = kl.Model.from_pretrained(DATA / "golden" / "kimi-a")
    weights = {name: np.array(value) for name, value in model.weights.items()}
    weights["model.layers.2.self_attn.k_proj.weight"][3, 5] = np.nan
    return kl.Model(model.config, weights, ctx=kl.Context(device=DEVICE))


def test_what_an_earlier_op_noted_costs_no_state():
    """A router's NaN is told by the next call that waits: it must not be blamed on a state that is read there."""
    model = kl.Model.from_pretrained(DATA / "golden" / "kimi-a", device=DEVICE)
    state, twin = model.new_state(), model.new_state()
    for s in (state, twin):
        model.forward([5, 6, 7], state=s)
    scores = np.zeros((4, 8), np.float32)
    scores[2, 3] = np.nan
    on_device = kl.DeviceArray.from_numpy(scores, model.ctx)
    kl.ops.route(on_device, k=2, ctx=model.ctx)
    with pytest.raises(ValueError, match=r"route: scores\[2, 3\] \(token, expert\) is NaN"):
        model.forward([8], state=state)
    assert state.position == 3
    assert model.forward([8], state=state).tobytes() == model.forward([8], state=twin).tobytes()


@pytest.mark.parametrize("logits", ["none", "last"])
def test_a_prefill_of_nan_fails_in_its_own_call_and_is_put_back(logits):
    model = nan_model()
    state = model.new_state()
    with pytest.raises(ValueError, match="is NaN; scores must be numbers"):
        model.forward(ids(model, 70), state=state, logits=logits)
    assert state.position == 0 and not any(x.any() for x in state.values())
    kl.ops.softmax(np.ones((2, 3), np.float32), ctx=model.ctx)  # nothing is left to tell


@pytest.mark.parametrize("cache, word, size", [("float16", "float16", 1e6), ("q8_0", "q8_0", 1e9)])
def test_latents_that_a_cache_cannot_hold_fail_in_their_own_call(cache, word, size):
    """The kernel that stores them notes them: told before the state moves on, and before the NaN that comes of them."""
    tiny = kl.Model.tiny()
    weights = {name: np.array(value) for name, value in tiny.weights.items()}
    [norm, *_] = [name for name in weights if name.endswith("kv_a_layernorm.weight")]
    weights[norm] *= size
    sentences = []
    for ctx in (kl.Context(), kl.Context(device=DEVICE)):
        model = kl.Model(tiny.config, weights, ctx=ctx, cache=cache)
        state = model.new_state()
        with pytest.raises(ValueError, match=f"x\\[.*\\] is .*, too large for a {word} cache") as raised:
            model.forward(ids(model, 7), state=state)
        sentences.append(str(raised.value).partition("cache_append: ")[2])
        assert state.position == 0 and not any(np.any(x) for x in state.values())
        model.forward([], state=state, logits="none")
    assert sentences[0].partition(" is ")[0] == sentences[1].partition(" is ")[0]


@host_build_only
@pytest.mark.parametrize("case, caches", [(None, ("float32", "float16", "q8_0")), ("glm-a", ("float32", "float16"))])
def test_a_step_waits_as_often_with_any_cache(case, caches):
    counts = []
    for cache in caches:
        on = dict(device=DEVICE, cache=cache)
        model = kl.Model.from_pretrained(DATA / "golden" / case, **on) if case else kl.Model.tiny(**on)
        state, count = model.new_state(context=64), host_library().kl_host_waits
        model.forward(ids(model, 9), state=state)
        model.forward([5], state=state)
        before = count()
        model.forward([6], state=state)
        counts.append(count() - before)
    assert len(set(counts)) == 1 and 0 < counts[0] < 8, counts


def test_a_call_is_interrupted_between_layers():
    model = kl.Model.from_pretrained(DATA / "golden" / "kimi-a", device=DEVICE)
    state, twin, tokens = model.new_state(), model.new_state(), ids(model, 20)
    model.ctx._core.cancel_at(3)
    with pytest.raises(KeyboardInterrupt):
        model.forward(tokens, state=state)
    model.ctx._core.cancel_at(0)
    assert state.position == 0
    assert model.forward(tokens, state=state).tobytes() == model.forward(tokens, state=twin).tobytes()


def test_verify_on_the_device():
    """Every op of a run beside float64 on its own inputs."""
    device = kl.Model.from_pretrained(DATA / "golden" / "kimi-a", device=DEVICE)
    report = verify(device, ids(device, 21))
    assert report.ok, str(report)
