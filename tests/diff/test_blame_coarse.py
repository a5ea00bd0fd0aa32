"""Right runs in a narrow type of which little is known: kept as float32 and without a dtype, or the layers' results
alone, within which experts flip."""

import faulty_runs
import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import faults


@pytest.fixture(scope="module")
def bench(golden_dir):
    return faulty_runs.Bench(kl.Model.from_pretrained(golden_dir / "kimi-a"))


def only(traces, *ends):
    """The streams of a run: of each trace the taps that end so, outside a layer's ops."""
    return [kl.Trace({t: x for t, x in trace.items() if t.endswith(ends) and t.count(".") < 3}, trace.meta)
            for trace in traces]


def untold(trace):
    """Kept as float32 by somebody who did not say what it was."""
    return kl.Trace({t: x if x.dtype.kind in "iu" else x.astype(np.float32) for t, x in trace.items()},
                    {"tokens": trace.meta["tokens"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("taps", ["all", "few"])
def test_a_right_run_kept_in_a_wider_type(monkeypatch, dtype, taps):
    """The checkpoint is in bfloat16, and a run in it is no run with products alone in it."""
    monkeypatch.setitem(faulty_runs.DTYPES, "float16", np.float16)
    model, rng = kl.Model.tiny(), np.random.default_rng(5)
    [trace] = faulty_runs.noisy_forward(model, [[rng.integers(0, 2048, 24).tolist()]], dtype, rng)
    if taps == "few":
        [trace] = only([trace], "out", "mid", "norm", "logits", "embed", "logits")
    found = kl.diff.blame(model, untold(trace))
    assert found.ok and any(f"most ops are as exact as {dtype}" in note for note in found.notes), str(found)
    assert found.unit == float(ml_dtypes.finfo(dtype).eps) / 2


def test_a_fault_beside_a_type_that_is_not_said():
    model, rng = kl.Model.tiny(), np.random.default_rng(6)
    plant = {"layers.2.kda.beta": "beta_doubled"}
    [trace] = faulty_runs.noisy_forward(model, [[rng.integers(0, 2048, 24).tolist()]], "bfloat16", rng, plant=plant)
    found = kl.diff.blame(model, untold(trace))
    assert [(r.tap, r.kind) for r in found.wrong] == [("layers.2.kda.beta", "beta_doubled")], str(found)


@pytest.mark.parametrize("scenario, seed", [(faults.WHOLE, 1), (faults.SPLIT, 1), (faults.RESTORED, 0)])
def test_experts_that_flip_within_a_layer_are_ties(bench, scenario, seed):
    model, traces = bench.run(scenario, "bfloat16", seed)
    found = kl.diff.blame(model, only(traces, "out", "embed", "logits"))
    ties = [r.tap for r in found.rows if r.kind == "tie"]
    assert found.ok and ties and f"as near as rounding: {ties[0]}" in str(found), str(found)


@pytest.mark.parametrize("fault", ["expert_weights_missing", "router_weights_by_score", "router_bias_in_weights"])
def test_a_fault_is_named_beside_experts_that_flip(bench, fault):
    tap = {"expert_weights_missing": "layers.1.moe.out"}.get(fault, "layers.1.moe.weights")
    model, traces = bench.run(faults.by_name(fault).scenario, "bfloat16", 3, {tap: fault})
    found = kl.diff.blame(model, only(traces, "out", "mid", "norm", "embed", "logits"))
    assert fault in (found.wrong[0].kind, *found.wrong[0].also) and found.wrong[0].where == tap, str(found)


def test_a_router_that_is_wrong_is_no_tie(bench):
    """Its scores are not near each other."""
    model, traces = bench.run(faults.WHOLE, "bfloat16", 2, {"layers.1.moe.ids": "router_bias_missing"})
    found = kl.diff.blame(model, only(traces, "out", "embed", "logits"))
    assert found.wrong[0].tap == "layers.1.out" and found.wrong[0].kind == "router_bias_missing", str(found)


def test_a_fault_before_the_router_changes_its_choice(bench):
    """Where a group's experts are as its result shows, a fault further up makes other scores, and other experts."""
    model, traces = bench.run(faults.WHOLE, "float32", 2, {"layers.1.ffn_norm": "norm_weight_plus_one"})
    found = kl.diff.blame(model, only(traces, "out", "mid", "embed", "logits"))
    assert [(r.tap, r.kind, r.where) for r in found.wrong] == [
        ("layers.1.out", "norm_weight_plus_one", "layers.1.ffn_norm")], str(found)


def test_nothing_finite_explains_what_is_not(bench):
    """A result that is finite beside a float64 one that is not has no name."""
    model, [trace] = bench.run(faults.WHOLE, "float32", 1)
    trace["layers.1.mid"][5, 3] = np.nan
    found = kl.diff.blame(model, trace)
    assert {r.tap for r in found.wrong} >= {"layers.1.mid", "layers.1.out"}
    assert {r.kind for r in found.wrong} == {"unknown"}, str(found)


def test_expert_ids_that_are_none(bench):
    """One twice is wrong, and the router is; one that is not there, or -1 for padding, is told."""
    model, [trace] = bench.run(faults.WHOLE, "float32", 1)
    ids = trace["layers.2.moe.ids"]
    first = ids[4].copy()
    ids[4] = first[0]
    found = kl.diff.blame(model, trace)
    assert found.wrong[0].tap == "layers.2.moe.ids" and found.wrong[0].at == "token 4", str(found)
    for wrong in (-1, model.config.n_experts):
        ids[4] = *first[:-1], wrong
        with pytest.raises(ValueError, match=rf"layers.2.moe.ids has \[\d+, {wrong}\] at token 4; expert ids must be "
                                             rf"in 0..{model.config.n_experts - 1}"):
            kl.diff.blame(model, trace)


def test_tokens_of_another_number(bench):
    model, [trace] = bench.run(faults.WHOLE, "float32", 1)
    with pytest.raises(ValueError, match="tokens has 31 ids; the call has 32 tokens"):
        kl.diff.blame(model, trace, tokens=trace.tokens[:-1])
