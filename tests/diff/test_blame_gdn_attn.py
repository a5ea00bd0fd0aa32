"""`blame`, `traces` and `step` on gated delta nets and gated attention: each op runs again, a wrong one is told."""

import functools

import faulty_runs
import numpy as np
import pytest
from conftest import DATA, QWEN_CASES, canonical_weights

import kimi_linear as kl
from kimi_linear import faults
from kimi_linear.trace import BEFORE

SCENES = {
    "one call": ([[list(range(3, 35))]], None),
    "packed and split": ([[list(range(3, 14)), list(range(40, 45))], [list(range(14, 30)), [45]]], None),
    "put back": ([[list(range(3, 21))], [list(range(30, 40))]], [None, [11]]),
}


@functools.cache
def reference_of(case):
    folder = DATA / "golden" / case
    weights = canonical_weights(folder / "model.safetensors")
    return kl.ReferenceModel(kl.Config.from_file(folder / "config.json"), weights)


@pytest.fixture(params=QWEN_CASES)
def model(request):
    return reference_of(request.param)


@pytest.mark.parametrize("scene", SCENES)
def test_run_is_the_reference(model, scene):
    """Positions, histories, states and caches of each sequence are its own, whatever the calls."""
    calls, positions = SCENES[scene]
    found = faults.run(model, calls, positions=positions)
    for n in range(len(calls[0])):
        ids = calls[0][n] if len(calls) == 1 else calls[0][n][: positions[1][0] if positions else None] + calls[1][n]
        exact, last = model.forward(ids, taps="*").taps, found[-1]
        start, end = last.meta["offsets"][n : n + 2]
        for tap, x in last.items():
            want = exact[tap][len(ids) - (end - start) :]
            np.testing.assert_allclose(x[start:end], want, rtol=0, atol=1e-11 * np.abs(want).max(), err_msg=tap)


@pytest.mark.parametrize("scene, dtype", [*zip(SCENES, ("float32", "bfloat16", "float32"))])
def test_noise_is_no_fault(model, scene, dtype):
    calls, positions = SCENES[scene]
    traces = faulty_runs.noisy_forward(model, calls, dtype, np.random.default_rng(2), positions=positions)
    found = kl.diff.blame(model, traces)
    assert found.ok and not found.skipped, str(found)
    assert len(found.rows) == len(traces[0])


def test_a_reference_run_is_right(model):
    ids = np.arange(3, 40)
    run = model.forward(ids, taps="*")
    found = kl.diff.blame(model, run, tokens=ids)
    assert found.ok and {r.tap for r in found.rows} >= {n for n in run.state if not n.endswith("_cache")}
    assert not found.skipped


def ungated(site):
    return site["x"]


def _without_one(site):
    return site.run(w=site["w"] - 1)


#: Tap -> what is done wrong there.
WRONG = {
    "layers.3.attn.q": lambda s: s.run(positions=s["positions"] + 1),
    "layers.3.attn.k": lambda s: s.run(base=2 * s["base"]),
    "layers.3.attn.q_norm": _without_one,
    "layers.3.attn.gate": lambda s: s.run(w=s["w"][::-1]),
    "layers.3.attn.o": lambda s: s.run(scale=1.1 * s["scale"]),
    "layers.3.attn.gated": ungated,
    "layers.1.gdn.q_proj": lambda s: s.run(w=np.roll(s["w"], 1, 0)),
    "layers.1.gdn.v_conv": lambda s: s.run(w=s["w"][::-1]),
    "layers.1.gdn.g": lambda s: s.run(dt_bias=0 * s["dt_bias"]),
    "layers.1.gdn.o": lambda s: s.run(head_map="tiled"),
    "layers.1.gdn.o_norm": lambda s: s.run(activation="sigmoid"),
    "layers.1.attn_norm": _without_one,
    "layers.2.moe.shared_g": lambda s: 2 * s.run(),
    "layers.2.moe.shared_gated": ungated,
    "norm": _without_one,
}


@pytest.mark.parametrize("tap", WRONG)
def test_a_wrong_op_is_found_where_it_is(tap):
    model = reference_of("qwen-a")
    calls, _ = SCENES["packed and split"]
    traces = faulty_runs.noisy_forward(model, calls, "float32", np.random.default_rng(4), plant={tap: WRONG[tap]})
    found = kl.diff.blame(model, traces)
    assert [r.tap for r in found.wrong] == [tap], str(found)


@pytest.mark.parametrize("tap, name", [
    ("layers.1.gdn.o", "decay_after_update"), ("layers.1.gdn.o", "scale_missing"), ("layers.0.gdn.k", "l2_missing"),
    ("layers.1.gdn.beta", "beta_without_sigmoid"), ("layers.3.attn.out", "bfloat16_result"),
])
def test_a_fault_of_the_catalogue_is_named(tap, name):
    model = reference_of("qwen35-moe")
    rng = np.random.default_rng(6)
    traces = faulty_runs.noisy_forward(model, [[list(range(3, 35))]], "float32", rng, plant={tap: name})
    found = kl.diff.blame(model, traces)
    assert [(r.tap, r.kind) for r in found.wrong] == [(tap, name)], str(found)


def test_layers_of_another_kind_are_told():
    model = reference_of("qwen35-a")
    run = model.forward(np.arange(9), taps="*")
    taps = {n.replace("layers.3.", "layers.x.").replace("layers.2.", "layers.3.").replace("layers.x.", "layers.2."): x
            for n, x in run.taps.items()}
    found = kl.diff.blame(model, taps, tokens=np.arange(9))
    assert "layer 2 is attn and must be gdn, 3 is gdn and must be attn" in found.verdict
    assert "full_attention_interval" in found.verdict


def test_errors_are_told_in_two():
    """With the model, `traces` tells what an op adds from what came with its inputs."""
    model = reference_of("qwen-a")
    ids = list(range(3, 35))
    wrong, = faults.run(model, ids, plant={"layers.3.attn.k": WRONG["layers.3.attn.k"]})
    right, = faults.run(model, ids)
    rows = {r.tap: r for r in kl.diff.traces(wrong, right, model=model).rows}
    assert rows["layers.3.attn.k"].added > 0.01 and rows["layers.3.attn.k"].inherited < 1e-12
    assert rows["layers.3.attn.gated"].added < 1e-12 < 0.01 < rows["layers.3.attn.gated"].inherited


@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_goes_on_from_its_state(model, layer):
    ids = np.arange(3, 30)
    before = model.forward(ids[:11]).state
    run = model.forward(ids[11:], state=before, taps="*")
    arrays = run.taps | {n: x for n, x in run.state.items() if n.endswith((".state", "_history"))}
    arrays |= {BEFORE + n: x for n, x in before.items()}
    arrays = {n: x if x.dtype.kind == "i" else x.astype(np.float32) for n, x in arrays.items()}
    found = kl.diff.step(model, kl.Trace(arrays, {"position": [11], "offsets": [0, 16]}), layer)
    assert found.ok and not found.skipped, str(found)
    late = kl.diff.step(model, kl.Trace(arrays, {"position": [12], "offsets": [0, 16]}), layer)
    assert {r.tap for r in late.wrong} == ({"layers.3.attn.q", "layers.3.attn.k"} if layer == 3 else set())
