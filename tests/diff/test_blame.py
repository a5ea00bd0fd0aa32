"""`blame`: planted faults are named at their op and layer, faults never told of are unknown there, noise is nothing."""

import json

import faulty_runs
import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import faults
from kimi_linear.diff import _blame_run
from kimi_linear.diff.blame import WRONG

VISIBLE = 8.0  # times the noise: from there an op's fault must be named


@pytest.fixture(scope="module")
def model(golden_dir):
    return kl.Model.from_pretrained(golden_dir / "kimi-a")


@pytest.fixture(scope="module")
def bench(model):
    return faulty_runs.Bench(model)


@pytest.fixture(scope="module")
def benches(bench, golden_dir):
    """Of Kimi-Linear, Qwen3-Next, Qwen3.5, Kimi K3 and GLM-5.3-Flash."""
    others = "qwen-a", "qwen35-moe", "k3-a", "k3-b", "glm-a", "glm-b"
    return bench, *(faulty_runs.Bench(kl.Model.from_pretrained(golden_dir / case)) for case in others)


NAMES = list(faults.CATALOGUE)


@pytest.mark.parametrize("name", NAMES)
def test_planted_fault_is_named(benches, name):
    """In each model that it can be in; where it can be in none, in the second K3, which has a factor of routing, or in
    those with streams, an indexer and a limit."""
    dtype = ("float64", "float32", "bfloat16")[NAMES.index(name) % 3]
    cases = [faulty_runs.case(bench, faults.by_name(name), dtype, seed=7) for bench in benches[:4]]
    if not any(cases):
        cases = [faulty_runs.case(bench, faults.by_name(name), dtype, seed=7) for bench in benches[4:]]
    assert any(cases), f"{name} can be nowhere"
    for case in filter(None, cases):
        faulty_runs.check(case, VISIBLE)


#: What ports of Qwen3-Next and Qwen3.5 got wrong: fault -> where, with attention in layer 3.
OF_QWEN = {
    "norm_weight_less_one": ("layers.1.attn_norm", "layers.2.ffn_norm", "layers.3.attn.q_norm", "norm"),
    "inputs_not_grouped": ("layers.0.gdn.q_proj", "layers.1.gdn.v_proj", "layers.2.gdn.z", "layers.4.gdn.b"),
    "key_heads_other_way": ("layers.1.gdn.o",), "rope_of_all": ("layers.3.attn.q", "layers.3.attn.k"),
    "query_and_gate_swapped": ("layers.3.attn.q_proj", "layers.3.attn.gate"),
    "query_and_gate_apart": ("layers.3.attn.q_proj",), "router_renormalise_other": ("layers.4.moe.weights",),
    "gate_left_out": ("layers.2.moe.shared_gated", "layers.3.attn.gated"), "rope_neighbours": ("layers.3.attn.k",),
    "attention_heads_tiled": ("layers.3.attn.o",), "gated_norm_silu": ("layers.0.gdn.o_norm",),
    "chunk_overflow": ("layers.0.gdn.o",), "softplus_in_steps": ("layers.0.gdn.g",),
}


@pytest.mark.parametrize("name, tap", [(name, tap) for name, taps in OF_QWEN.items() for tap in taps])
def test_what_ports_of_qwen_got_wrong_is_named(benches, name, tap):
    """Not one is below the noise of float32."""
    for bench in benches[1:3]:
        if name == "inputs_not_grouped" and bench.config.gdn_inputs == "split":
            continue
        model, traces = bench.run(faults.WHOLE, "float32", 7, {tap: name})
        found = kl.diff.blame(model, traces)
        assert [(r.tap, r.kind, r.also) for r in found.wrong] == [(tap, name, ())], str(found)


@pytest.mark.parametrize("cut, when", [("4 pieces", " in calls of one token"), ("pieces of 16", ""),
                                       ("pieces of 16", " in calls of one token")])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("pieces_")])
def test_pieces_of_keys_that_are_merged_wrongly_are_named(benches, name, cut, when):
    """Also where a prompt was read rightly, and the steps behind it take the keys in pieces."""
    choice = cut + when
    for bench, tap in zip(benches, ("layers.3.mla.o", "layers.3.attn.o", "layers.3.attn.o")):
        ids = np.random.default_rng(3).integers(0, bench.config.vocab_size, 34).tolist()
        model, calls = bench.model(faults.WHOLE), [[ids[:20]], *([[i]] for i in ids[20:])]
        traces = faulty_runs.noisy_forward(model, calls, "bfloat16", np.random.default_rng(4),
                                           plant={tap: (name, (choice,))})
        found = kl.diff.blame(model, traces)
        assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, name, (choice,), ())], str(found)


@pytest.mark.parametrize("ending", ["kda.o", "kda.k_conv", "mla.o", "gdn.o", "gdn.v_conv", "attn.o"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_lost_at_one_of_several_calls_is_named_with_the_call(benches, ending, dtype):
    """Of all sequences, or of one of two."""
    bench = benches[0] if ending.startswith(("kda", "mla")) else benches[1]
    tap = f"layers.{3 if ending in ('mla.o', 'attn.o') else 1}.{ending}"
    model, ids = bench.model(faults.CHUNKS), np.random.default_rng(8).integers(0, bench.config.vocab_size, (4, 2, 9))
    for place, n in (("call 2", 1), ("call 1", 2), ("call 2, sequence 1", 2)):
        calls = [[s.tolist() for s in call[:n]] for call in ids]
        traces = faulty_runs.noisy_forward(model, calls, dtype, np.random.default_rng(9),
                                           plant={tap: ("state_lost_at_one_call", (place,))})
        found = kl.diff.blame(model, traces)
        assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == \
            [(tap, "state_lost_at_one_call", (place,), ())], str(found)
        assert found.wrong[0].text == f"state_lost_at_one_call ({place}): one call begins with an empty state"


CHUNKED = ["chunk_total_undecayed", "chunk_total_twice", "chunk_no_first_gate", "chunk_inter_missing",
           "chunk_sums_clamped_20", "chunk_end_too_early", "chunk_inverse_cut_1", "chunk_columns_clamped_20"]


@pytest.mark.parametrize("length", [64, 128])
@pytest.mark.parametrize("name", CHUNKED)
def test_a_fault_of_chunks_is_named_with_their_length(bench, name, length):
    """A prompt in chunks, and steps of one token behind it, which are right on the state that it left."""
    dtype, tap = ("float32", "bfloat16")[CHUNKED.index(name) % 2], "layers.1.kda.o"
    ids = np.random.default_rng(5).integers(0, bench.config.vocab_size, 152).tolist()
    model = bench.model(faults.CHUNKS)
    traces = faulty_runs.noisy_forward(model, [[ids[:150]], [ids[150:151]], [ids[151:]]], dtype,
                                       np.random.default_rng(6), plant={tap: (name, (length,))})
    found = kl.diff.blame(model, traces)
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, name, (length,), ())], str(found)


def test_a_chunk_that_a_prompt_does_not_fill_has_no_length(bench):
    """And the fault of one that no ordinary fault explains has a name all the same."""
    model, traces = bench.run(faults.WHOLE, "float32", 3, {"layers.1.kda.o": ("chunk_inverse_sign", (64,))})
    [row] = kl.diff.blame(model, traces).wrong
    assert (row.kind, row.choice, row.also) == ("chunk_inverse_sign", (), ())


def test_a_fault_that_is_the_same_in_chunks_of_any_length_has_none(bench):
    ids = np.random.default_rng(5).integers(0, bench.config.vocab_size, 150).tolist()
    traces = faulty_runs.noisy_forward(bench.model(faults.CHUNKS), [[ids]], "float32", np.random.default_rng(6),
                                       plant={"layers.1.kda.o": ("chunk_l_with_diagonal", (32,))})
    [row] = kl.diff.blame(bench.model(faults.CHUNKS), traces).wrong
    assert (row.kind, row.choice, row.also) == ("chunk_l_with_diagonal", (), ())


def test_pieces_of_one_call_are_blocks_without_a_past(bench):
    """Two names would be one."""
    model, traces = bench.run(faults.LONG, "float32", 3, {"layers.3.mla.o": ("pieces_last_alone", ("pieces of 16",))})
    [row] = kl.diff.blame(model, traces).wrong
    assert (row.kind, row.choice, row.also) == ("state_lost_between_blocks", (16,), ())


@pytest.mark.parametrize("name", faulty_runs.UNTOLD)
def test_untold_fault_is_unknown_at_its_op(bench, name):
    dtype = ("float64", "float32", "bfloat16")[list(faulty_runs.UNTOLD).index(name) % 3]
    case = faulty_runs.untold_case(bench, name, dtype, seed=11)
    assert [(r.tap, r.kind) for r in case.blame.wrong] == [(case.tap, "unknown")], str(case.blame)
    assert case.blame.wrong[0].layer == int(case.tap.split(".")[1]) and "no known fault" in case.blame.verdict


@pytest.mark.parametrize("dtype", faulty_runs.DTYPES)
@pytest.mark.parametrize("scenario", [faults.WHOLE, faults.RESTORED])
def test_noise_is_no_fault(bench, scenario, dtype):
    for seed in range(2):
        model, traces = bench.run(scenario, dtype, seed)
        found = kl.diff.blame(model, traces)
        assert found and not found.wrong and found.verdict.startswith("ok: none of 155 ops"), str(found)


def test_faint_effect_is_not_visible_and_never_another_name(bench):
    """beta in bfloat16 where all taps are: below the noise."""
    model, traces = bench.run(faults.WHOLE, "bfloat16", 5, {"layers.1.kda.beta": "bfloat16_result"})
    found = kl.diff.blame(model, traces)
    assert found.ok and f"less than {WRONG:.0f} times its noise is not visible here" in found.verdict


def test_a_systematic_fault_is_named_in_every_layer(bench):
    taps = [f"layers.{i}.kda.o" for i in (0, 1, 2, 4)]
    model, traces = bench.run(faults.WHOLE, "float32", 1, {tap: "scale_missing" for tap in taps})
    found = kl.diff.blame(model, traces)
    assert sorted(r.tap for r in found.wrong) == taps and {r.kind for r in found.wrong} == {"scale_missing"}
    assert "and 3 more like it" in found.verdict


def test_engines_of_ours_are_right(model):
    ids = np.arange(40) % model.config.vocab_size
    assert kl.diff.blame(model, model.trace(ids)).ok
    assert kl.diff.blame(model, model.trace([ids[:11], ids[11:]])).ok
    assert kl.diff.blame(model, model.reference().forward(ids, taps="*"), tokens=ids).ok
    state = model.new_state()
    parts = [model.forward(x, state=state, taps="*")[1] for x in (ids[:13], ids[13:14], ids[14:])]
    found = kl.diff.blame(model, parts)
    assert found.ok and len(found.rows) > 150


def test_a_trace_that_begins_later_asks_for_the_calls_before(model, tmp_path):
    """By `tokens_slice`, behind a state, in a file; with the earlier calls it is judged, put back or not."""
    ids, state = np.arange(40) % model.config.vocab_size, model.new_state()
    first = model.trace(ids[:9], state=state)
    second = model.trace(ids[9:14], state=state)
    model.trace(ids[:14], tokens_slice=slice(9, 14), to=tmp_path / "late.safetensors")
    late = [model.trace(ids[:14], tokens_slice=slice(9, 14)), second, kl.Trace.load(tmp_path / "late.safetensors")]
    for trace in late:
        assert trace.meta["position"] == [9]
        with pytest.raises(ValueError, match="call 0 begins at position 9 .* give the earlier calls, too"):
            kl.diff.blame(model, trace)
        assert kl.diff.blame(model, [first, trace]).ok
    assert first.meta["position"] == [0]
    states = model.new_state(2)
    parts = [[ids[:3], ids[:5]], [ids[3:9], ids[5:6]]]
    both = [model.forward(x, state=states, taps="*")[1] for x in parts]
    assert [t.meta["position"] for t in both] == [[0, 0], [3, 5]] and kl.diff.blame(model, both).ok


def test_places_are_named_piece_by_piece():
    scene = faults.Scene([[0, 2, 3], [0, 0, 2]])
    assert scene.places() == [scene.place(i) for i in range(scene.T)]
    assert scene.places()[0] == "call 0, sequence 0, token 0" and scene.places()[-1] == "call 1, sequence 1, token 1"


def test_no_tokens(model):
    found = kl.diff.blame(model, model.trace(np.arange(9), tokens_slice=slice(0, 0)))
    assert not found and found.verdict == "NOT JUDGED: the trace has no tokens" and len(found.skipped) == 155
    assert found.html()


def spoiled(at, value):
    def edit(x):
        x = x.copy()
        x[at] = value
        return x

    return edit


@pytest.mark.parametrize("value, wrong", [(np.inf, False), (np.nan, True), (-np.inf, True)])
def test_values_that_are_not_finite_are_told_apart(model, value, wrong):
    """Gate and up of 1e30 are past float32's range: the result is +inf, and nothing else."""
    far = {f"layers.0.mlp.{x}": spoiled((3, 4), np.float32(1e30)) for x in ("gate", "up")}
    act, out = {"layers.0.mlp.act": spoiled((3, 4), value)}, {"layers.0.mlp.out": np.zeros_like}
    found = kl.diff.blame(model, model.trace(np.arange(9), edit=far | act | out))
    assert {r.tap for r in found.wrong} == {*far, *out, *(act if wrong else ())}, str(found)


def test_a_sum_past_the_range_may_be_nan_for_an_infinity(model):
    """What is past float32's range in the parts of a delta rule comes out as NaN there, and as an infinity in float64:
    the op is right."""
    tame = {"layers.0.kda.o": lambda x: x, "layers.*.moe.logits": lambda x: np.clip(np.nan_to_num(x, nan=0.1), -9, 9)}
    trace = model.trace(np.arange(9), edit=tame | {"layers.0.kda.k": spoiled((3, 0, 3), np.float32(1e30))})
    assert np.isnan(trace["layers.0.kda.o"]).any()
    assert "layers.0.kda.o" not in [r.tap for r in kl.diff.blame(model, trace).wrong]


EDITS = {
    "layers.1.kda.beta": (lambda x: 2 * x, "beta_doubled"),
    "layers.3.moe.weights": (lambda x: x / 2.446, "router_scale_missing"),
    "layers.4.kda.q": (lambda x: x * np.float32(1.01), "unknown"),
    "layers.0.mlp.act": (lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), "bfloat16_result"),
    "layers.5.mla.o": (lambda x: x.swapaxes(1, 2).reshape(x.shape), "value_heads_interleaved"),
    "layers.2.kda.g": (lambda x: np.maximum(x, -5), "decay_clamped"),
}


@pytest.mark.parametrize("tap", EDITS)
def test_edits_of_a_real_engine_are_named(model, tap):
    """In float32 as the engine computes it."""
    change, kind = EDITS[tap]
    found = kl.diff.blame(model, model.trace(np.arange(5, 45), edit={tap: change}))
    assert [(r.tap, r.kind) for r in found.wrong] == [(tap, kind)], str(found)


def test_states_are_judged(model):
    ids = [np.arange(30), np.arange(40, 49)]
    states = model.new_state(2)
    first = model.forward([x[:7] for x in ids], state=states, taps="*")[1]
    second = model.forward([x[7:] for x in ids], state=states, taps="*")[1]
    arrays = {n: np.stack([s[n] for s in states]) for n in states[0] if "kda" in n}
    found = kl.diff.blame(model, [first, kl.Trace({**second, **arrays}, second.meta)])
    assert found.ok and len(found.rows) == 155 + 4 * 4, str(found)
    name = "layers.2.kda.state"
    turned = {**arrays, name: arrays[name].swapaxes(-1, -2), "layers.1.kda.k_history": arrays["layers.1.kda.q_history"]}
    found = kl.diff.blame(model, [first, kl.Trace({**second, **turned}, second.meta)])
    assert {r.tap: r.kind for r in found.wrong} == {name: "stored_transposed", "layers.1.kda.k_history": "unknown"}
    assert "must be [H, K, V]" in "".join(r.text for r in found.wrong)


def test_transformers_chunks_lose_bits_under_strong_decay(golden_dir):
    """Real data: transformers 5.23 takes chunks of 64 and subtracts cumulative sums; where decay is strong this costs
    tens of times the noise of float32. It is told by the module behind it, o_norm, since kda.o is not in the trace."""
    model = kl.Model.from_pretrained(golden_dir / "kimi-b")
    path = golden_dir / "kimi-b" / "golden.safetensors"
    assert kl.diff.blame(model, kl.Trace.load(path, names="hf", config=model.config, prefix="short/")).ok
    found = kl.diff.blame(model, kl.Trace.load(path, names="hf", config=model.config, prefix="long/"))
    assert {(r.kind, r.choice) for r in found.wrong} == {("chunk_decays_subtracted", (64,))}
    assert {r.where for r in found.wrong} == {"layers.1.kda.o", "layers.2.kda.o", "layers.4.kda.o"}
    assert max(r.left for r in found.wrong) < 2 and "at layers.1.kda.o" in str(found)


def test_ops_without_their_inputs_are_judged_in_groups(bench):
    plant = {"layers.2.kda.o": "decay_after_update"}
    model, [trace] = bench.run(faults.WHOLE, "float32", 2, plant)
    kept = {t: x for t, x in trace.items() if t.rsplit(".", 1)[-1] not in ("o", "q", "k", "beta")}
    found = kl.diff.blame(model, kl.Trace(kept, trace.meta))
    assert [(r.tap, r.kind, r.where) for r in found.wrong] == [
        ("layers.2.kda.o_norm", "decay_after_update", "layers.2.kda.o")]
    assert set(found.wrong[0].group) == {f"layers.2.kda.{x}" for x in ("q", "k", "beta", "o", "o_norm")}
    alone = kl.diff.blame(model, {t: x for t, x in trace.items() if t.startswith(("layers.2", "layers.3"))})
    assert alone.skipped[0][0] == "layers.2.attn_norm" and "lacks tokens" in alone.skipped[0][1]
    assert [r.kind for r in alone.wrong] == ["decay_after_update"]


def test_near_ties_are_told_from_faults(bench):
    model, [trace] = bench.run(faults.WHOLE, "float64", 4)
    scores = 1 / (1 + np.exp(-trace["layers.3.moe.logits"]))
    value = scores + model.weights["model.layers.3.block_sparse_moe.gate.e_score_correction_bias"]
    order = np.argsort(-value, -1)
    gap = value[np.arange(len(value)), order[:, 1]] - value[np.arange(len(value)), order[:, 2]]
    t = int(gap.argmin())
    ids = trace["layers.3.moe.ids"].copy()
    ids[t] = np.sort(order[t, [0, 2]])
    [other] = faults.run(model, trace.tokens.tolist(), plant={"layers.3.moe.ids": lambda site: ids})
    near, far = (kl.diff.blame(model, other, dtype=dtype) for dtype in (_unit_like(gap[t]), "float64"))
    assert [r.tap for r in near.rows if r.kind == "tie"] == ["layers.3.moe.ids"] and near.ok, str(near)
    assert [(r.tap, r.kind) for r in far.wrong] == [("layers.3.moe.ids", "unknown")]


def _unit_like(gap):
    """A type whose rounding would explain the gap."""
    return "bfloat16" if gap > 2.0**-13 else "float16"


def test_noise_level_is_found_where_the_trace_does_not_say(bench):
    """bfloat16 results in a float32 file without a dtype."""
    model, [trace] = bench.run(faults.WHOLE, "bfloat16", 3, {"layers.4.kda.beta": "beta_doubled"})
    wide = {t: x if x.dtype.kind in "iu" else x.astype(np.float32) for t, x in trace.items()}
    found = kl.diff.blame(model, wide, tokens=trace.tokens)
    assert [(r.tap, r.kind) for r in found.wrong] == [("layers.4.kda.beta", "beta_doubled")]
    assert found.unit == 2.0**-8 and "as exact as bfloat16" in found.notes[0]
    narrow = {t: x if x.dtype.kind in "iu" else x.astype(ml_dtypes.bfloat16) for t, x in trace.items()}
    assert kl.diff.blame(model, narrow, tokens=trace.tokens, dtype="bfloat16").wrong[0].kind == "beta_doubled"


def test_layers_of_another_kind(bench):
    model, [trace] = bench.run(faults.WHOLE, "float32", 3)
    swapped = {t.replace("layers.3.mla", "layers.3.kda").replace("layers.2.kda", "layers.2.mla"): x
               for t, x in trace.items() if not t.startswith("layers.3.mla.q")}
    found = kl.diff.blame(model, swapped)
    assert not found and found.verdict.startswith("WRONG: layer_pattern_off_by_one: layer 2 is mla and must be kda, 3")


def test_values_that_come_to_the_same_are_not_told_apart():
    """An eps of 1e-12 for 1e-6: 1e-8 is as good, and a floor of any length; 1e-5 is another."""
    model, rows = kl.Model.tiny(), []
    for eps in (1e-12, 1e-5):
        [trace] = faults.run(model, np.arange(3, 30), plant={"layers.2.kda.q": ("l2_eps_other", (eps,))})
        rows += kl.diff.blame(model, kl.Trace(dict(trace), {**trace.meta, "dtype": "float32"})).wrong
    assert [(r.kind, r.choice) for r in rows] == [("l2_eps_other", ()), ("l2_eps_other", (1e-5,))]
    assert (1e-12,) in rows[0].alike and "are the same here)" in rows[0].text and "1e-05" not in rows[0].text
    assert rows[1].alike == () and rows[1].text.startswith("l2_eps_other (1e-05): ")


def test_another_checkpoint(bench):
    model, [trace] = bench.run(faults.WHOLE, "float32", 3)
    rng = np.random.default_rng(0)
    model.weights |= {n: w + rng.standard_normal(w.shape) for n, w in model.weights.items() if w.ndim > 1}
    assert "is it the same checkpoint?" in str(kl.diff.blame(model, trace))


def test_what_cannot_be_blamed(model):
    with pytest.raises(TypeError, match="theirs has a int; it must be a Trace or a mapping"):
        kl.diff.blame(model, 3)
    with pytest.raises(ValueError, match="theirs has no tap of this model: it has foo; the model has embed"):
        kl.diff.blame(model, {"foo": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"layers.0.out has shape \[3, 2\]; it must be \[3, 64\]"):
        kl.diff.blame(model, {"layers.0.out": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="norm has 4 rows; the call has 3 tokens"):
        kl.diff.blame(model, {"layers.0.out": np.zeros((3, 64)), "norm": np.zeros((4, 64))})
    with pytest.raises(ValueError, match="dtype is 'int7'; it must be one of float64, float32"):
        kl.diff.blame(model, {"norm": np.zeros((3, 64))}, dtype="int7")
    with pytest.raises(ValueError, match="call 0 has offsets up to 5 and taps of 3 rows"):
        kl.diff.blame(model, kl.Trace({"norm": np.zeros((3, 64))}, {"offsets": [0, 5]}))
    with pytest.raises(ValueError, match="an empty list"):
        kl.diff.blame(model, [])


def test_as_text_html_and_json(bench):
    model, traces = bench.run(faults.WHOLE, "float32", 1, {"layers.1.kda.v_conv": ("conv_off_by_one", (1,))})
    found = kl.diff.blame(model, traces)
    assert "conv_off_by_one (1): the convolution reads one token too early" in str(found)
    assert len(str(found).splitlines()) < 24 and "<table>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["rows"][0]["kind"] == "conv_off_by_one" and plain["rows"][0]["layer"] == 1 and not plain["ok"]


# ---- long runs, in which faults are tried on the first rows first --------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_first_rows_of_a_fault_are_those_of_the_whole_unless_it_looks_ahead(benches, name):
    """What `blame` rules a fault out by in a long run."""
    fault = faults.by_name(name)
    bench = next(b for b in benches if b.places(fault))
    tap = bench.places(fault)[0]
    model, (trace,) = bench.run(faults.WHOLE, "float32", 3)
    whole = _blame_run.Run(model, trace, None, None)
    start = whole.of_first(16)
    for choice in fault.choices:
        parts = [run._try([run.nodes[tap]], run.nodes[tap], fault, choice) for run in (start, whole)]
        if fault.looks_ahead or any(y is None for y in parts):
            continue
        np.testing.assert_allclose(parts[0], parts[1][:16], rtol=1e-9, atol=1e-9 * np.abs(parts[0]).max())


@pytest.mark.parametrize("tap, fault", [("layers.2.kda.o", "decay_in_log2"), ("layers.3.mla.o", "mask_missing"),
                                        ("layers.1.kda.q_conv", "conv_off_by_one"), ("layers.4.kda.o", None)])
def test_long_runs_are_judged_as_short_ones(bench, monkeypatch, tap, fault):
    plant = {tap: fault or faulty_runs.UNTOLD["sign of one head of the delta rule"][1]}
    tokens = [[np.random.default_rng(0).integers(0, bench.config.vocab_size, 96).tolist()]]
    model = bench.model(faults.WHOLE)
    traces = faulty_runs.noisy_forward(model, tokens, "float32", np.random.default_rng(1), plant=plant)
    short = kl.diff.blame(model, traces)
    monkeypatch.setattr(_blame_run, "STARTS", (16, 24))
    long = kl.diff.blame(model, traces)
    assert [(r.tap, r.kind) for r in long.wrong] == [(tap, fault or "unknown")]
    assert long.to_dict() == short.to_dict()


def test_a_long_run_of_ours_is_right():
    """2,000 tokens, on which attention sums 2,000 rows in float32."""
    model = kl.Model.tiny()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 2000)
    found = kl.diff.blame(model, model.trace(ids))
    assert found.ok, found.verdict


# ---- weights ----

WEIGHT = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def other_weight(model):
    """(a run with one weight turned end to end, all weights of it)."""
    weights = {name: np.asarray(model.weights[name]) for name in model.weights}
    weights[WEIGHT] = weights[WEIGHT][::-1].copy()
    [trace] = faults.run(kl.ReferenceModel(model.config, weights), [1, 2, 3, 4, 5])
    return trace, weights


def test_a_weight_that_differs_is_named(model, other_weight):
    trace, weights = other_weight
    found = kl.diff.blame(model, trace, weights=weights)
    x = np.float64(weights[WEIGHT])
    most = np.abs(x - x[::-1]).max()
    at = [int(i) for i in np.argwhere(np.abs(x - x[::-1]) == most)[0]]
    says = f"weight {WEIGHT} differs: max abs {most:.3g}, {most / np.sqrt((x * x).mean()):.2g} of its rms, at {at}"
    assert found.verdict == f"WRONG: {says}; it shows in layers.2.kda.q_proj"
    assert [(r.tap, r.kind, r.text) for r in found.wrong] == [("layers.2.kda.q_proj", "weight_differs", says)]
    assert says in str(found) and says in found.html() and not found.ok
    assert json.loads(json.dumps(found.to_dict()))["weights"][0]["name"] == WEIGHT
    assert kl.diff.blame(model, trace, weights=kl.ReferenceModel(model.config, weights)).verdict == found.verdict


def test_what_is_said_where_no_weight_is_known_to_differ(model, other_weight):
    trace, _ = other_weight
    hint = f"no known fault explains it; is its weight the same? weights= (--weights) compares {WEIGHT}"
    assert hint in kl.diff.blame(model, trace).verdict
    assert "explains it; its weights are the same as ours" in kl.diff.blame(model, trace, weights=model).verdict


def test_weights_that_differ_beside_ops_that_are_wrong(model, other_weight):
    weights = other_weight[1] | {"lm_head.weight": other_weight[1]["lm_head.weight"][:-1]}
    [trace] = faults.run(model, [1, 2, 3, 4, 5], plant={"layers.1.kda.g": "dt_bias_twice"})
    found = kl.diff.blame(model, trace, weights=weights)
    assert found.verdict.startswith("WRONG: weight lm_head.weight differs: it has shape [")
    assert found.verdict.endswith(", and 1 more; no op shows it; wrong besides: layers.1.kda.g")
    [trace] = faults.run(model, [1, 2, 3, 4, 5])
    assert not kl.diff.blame(model, trace, weights=weights)


def test_weights_in_another_type_or_with_an_axis_more_are_the_same(model, other_weight):
    [trace] = faults.run(model, [1, 2, 3, 4, 5])
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        theirs = {name: np.asarray(model.weights[name]).astype(dtype)[None] for name in model.weights}
        assert kl.diff.blame(model, trace, weights=theirs).ok
    theirs[WEIGHT] = theirs[WEIGHT] * np.nan
    assert "differs: max abs inf" in kl.diff.blame(model, trace, weights=theirs).verdict


@pytest.mark.parametrize("theirs, ours, same", [
    (np.float16([1, np.inf]), np.float32([1, 99840]).astype(ml_dtypes.bfloat16), False),
    (np.float32([1, 99840]), np.float16([1, np.inf]), False),
    (np.zeros(4, np.int8), np.float32([.9, -.5, .2, .1]), False),
    (np.int8([3, -2]), np.float32([3, -2]), True),
    (np.float32([np.nan, 1, np.inf]), np.float16([np.nan, 1, np.inf]), True),
    (np.float16([.1, 3]), np.float32([.1, 3]), True),
    (np.float32([0, 1e-3]), np.float32([0, 0]), False),
])
def test_what_is_the_same_weight(theirs, ours, same):
    """Rounded to a narrower float type, and nothing else: what left its range, or was cut to an integer, differs."""
    from kimi_linear.diff._weights import compare_weights

    found, _ = compare_weights({"w": ours}, {"w": theirs})
    assert [d.name for d in found] == ([] if same else ["w"]), found
    assert same or found[0].text.startswith("weight w differs: max abs ")


@pytest.mark.parametrize("case", ["qwen-a", "qwen35-moe"])
def test_weights_of_a_gguf_of_a_qwen_folder_are_the_same(case, golden_dir, tmp_path):
    """Its norms are 1 + w, its value heads may lie in another order."""
    kl.convert(golden_dir / case, tmp_path / "x.gguf")
    folder, file = (kl.Model.from_pretrained(path) for path in (golden_dir / case, tmp_path / "x.gguf"))
    assert folder.config.norm_plus_one != file.config.norm_plus_one
    for ours, theirs in ((folder, file), (file, folder)):
        assert kl.diff.blame(ours, ours.trace([1, 2, 3]), weights=theirs).ok
    name = "model.layers.0.linear_attn.out_proj.weight"
    file.weights[name] = np.roll(file.weights[name], folder.config.gdn_v_dim, 1)
    found = kl.diff.blame(folder, folder.trace([1, 2, 3]), weights=file)
    assert [d.name for d in found.weights] == [name]


def test_weights_that_are_none(model):
    trace = model.trace([1, 2, 3])
    with pytest.raises(TypeError, match="weights is a list; it must be a Model, or a mapping"):
        kl.diff.blame(model, trace, weights=[1])
    with pytest.raises(ValueError, match="weights has no name of this model: it has q; the model has model.embed"):
        kl.diff.blame(model, trace, weights={"q": 1})
