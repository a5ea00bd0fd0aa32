"""transformers and this engine on the same folders: every module, logits, caches, routing, text."""

import copy
import json

import live
import numpy as np
import pytest
import torch
from conftest import DATA
from oracle import KIMI_CASES, LARGEST, RMS, SMALL, folder, near, ours, theirs, tokens

from kimi_linear.adapters import transformers as adapter
from kimi_linear.diff import traces
from kimi_linear.perplexity import perplexity

T = 150                                     # two chunks of 64, and a part


@pytest.mark.parametrize("length", [5, T])
@pytest.mark.parametrize("case", KIMI_CASES)
def test_every_module_and_cache(case, length):
    live.every_module_and_cache(case, length)


@pytest.mark.parametrize("case", KIMI_CASES)
def test_free_run(case):
    live.free_run(case)


def test_a_flip_is_judged_by_its_gap():
    """Second against third of eight experts: their difference, near or far."""
    model = ours("kimi-a")
    bias = model.weights["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"].astype(np.float64)
    wanted = np.array([0.5, 0.4, 0.4 - 2e-6, 0.2, 0.2, 0.2, 0.2, 0.2]) - bias
    scores = np.log(wanted / (1 - wanted))
    assert abs(live.gap(model, 1, scores, [0, 1], [0, 2]) - 2e-6) < 1e-12
    assert live.gap(model, 1, scores, [0, 1], [0, 3]) > 0.19


@pytest.mark.parametrize("case", KIMI_CASES)
def test_step_by_step(case):
    live.step_by_step(case)


@pytest.mark.parametrize("case", ["tiny", "kimi-b", "groups"])
def test_ragged_batch_is_their_padded_batch(case):
    live.ragged_batch(case)


def test_what_transformers_saves_is_what_it_was_given():
    """Our config of a folder that transformers wrote says what make_golden asked for."""
    for case, asked in SMALL.items():
        c = ours(case).config
        mixers = ["kda" if i in asked["kda"] else "mla" for i in range(1, c.n_layers + 1)]
        assert [spec.mixer for spec in c.layers] == mixers
        assert [spec.ffn for spec in c.layers].count("dense") == asked["dense"]
        assert (c.kda_heads, c.kda_head_dim, c.conv_width) == (asked["heads"], asked["width"], asked["conv"])
        assert (c.mla_heads, c.nope_dim, c.rope_dim, c.v_head_dim, c.kv_rank) == asked["mla"]
        assert (c.n_experts, c.experts_per_token, c.n_groups, c.top_groups, c.n_shared_experts, c.moe_size,
                c.routed_scale, c.renormalise) == asked["moe"]
        assert c.q_rank == (asked.get("q_lora") or 0) and c.tie_embeddings == (case == "tied")
        assert adapter.config_of(theirs(case)) == c


@pytest.mark.parametrize("case", KIMI_CASES)
def test_every_norm_has_their_eps(case):
    """Those on latents apart."""
    c, found = ours(case).config, live.eps_of_norms(case)
    latent = {name: found.pop(name) for name in ("kv_a_layernorm", "q_a_layernorm") if name in found}
    assert set(latent.values()) <= {c.latent_eps} and set(found.values()) == {c.rms_norm_eps}
    assert ("q_a_layernorm" in latent) == (c.q_rank > 0 and any(spec.mixer == "mla" for spec in c.layers))


def test_diff_of_ours_and_theirs():
    """No divergence; then one, by name, when a rate of decay in layer 2 of theirs is 2 % larger."""
    ids = tokens("tiny", 70)
    report = traces(ours("tiny").trace(ids), adapter.trace(theirs("tiny"), ids))
    assert report.ok, str(report)
    other = copy.deepcopy(theirs("tiny"))
    with torch.no_grad():
        other.model.layers[2].self_attn.forget_gate.A_log[0, 0, 1] += 0.02
    report = traces(ours("tiny").trace(ids), adapter.trace(other, ids))
    assert not report.ok and report.first.tap == "layers.2.kda.g"


def test_adapter():
    """Globs, types and meta of a trace; what is refused."""
    model, ids = theirs("kimi-a"), tokens("kimi-a", 7)
    whole = adapter.trace(model, ids)
    part = adapter.trace(model, torch.from_numpy(ids).to(torch.int32), ["layers.3.mla", "layers.1.moe.ids", "logits"])
    assert set(part) == {n for n in whole if n.startswith("layers.3.mla.")} | {"layers.1.moe.ids", "logits"}
    assert all(np.array_equal(part[n], whole[n]) for n in part)
    assert whole["layers.1.moe.ids"].dtype == np.int32 and whole["logits"].dtype == np.float32
    assert whole.meta["tokens"] == ids.tolist() and whole.meta["source"] == "transformers"
    assert "layers.0.kda.state" in adapter.trace(model, ids, "layers.0.*", state=True)
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="'layers.9' matches no tap"):
        adapter.trace(model, ids, "layers.9")
    with pytest.raises(ValueError, match="model is a Linear; it must be a KimiLinearForCausalLM"):
        adapter.trace(torch.nn.Linear(2, 2), ids)
    with pytest.raises(ValueError, match=r"tokens has shape \[1, 7\]; it must be \[T\], one sequence"):
        adapter.trace(model, ids[None])
    half = adapter.trace(type(model).from_pretrained(folder("kimi-a"), dtype=torch.bfloat16).eval(), ids, "logits")
    assert half["logits"].dtype == np.float32 and half.meta["dtype"] == "bfloat16"
    near(half["logits"], whole["logits"], "bfloat16", rms=0.5, largest=5)


def heldout(n):
    text = (DATA / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    return np.array(ours("tiny").tokenizer.encode(text[:6 * n])[:n])


def test_perplexity_of_the_tiny_model():
    """Mean loss of 512 held-out tokens in windows of 128; errors of logits are near 1e-6 and average out."""
    ids = heldout(512)
    with torch.no_grad():
        logits = theirs("tiny")(torch.from_numpy(ids.reshape(4, 128))).logits[:, :-1].double()
    want = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]),
                                             torch.from_numpy(ids.reshape(4, 128)[:, 1:].reshape(-1)))
    got = perplexity(ours("tiny"), ids, window=128)
    assert got.scored == 4 * 127
    assert abs(got.nll_per_token - want.item()) <= 1e-5 * want.item()


@pytest.mark.parametrize("n", range(2))
def test_greedy_text_of_the_tiny_model(n):
    recorded = json.loads((DATA / "tiny" / "expected.json").read_text())["greedy"][n]
    with torch.no_grad():
        out = theirs("tiny").generate(torch.tensor([recorded["prompt_ids"]]), max_new_tokens=24, do_sample=False)
    want = out[0, len(recorded["prompt_ids"]):].tolist()
    got = ours("tiny").generate(recorded["prompt"], max_new_tokens=24, temperature=0).run()
    assert got.tokens == want == recorded["ids"][:24]


def test_the_limits_are_those_of_two_float32_engines():
    """An error of one tap in a thousand parts is found: the measure is able to fail."""
    ids = tokens("kimi-a", 20)
    want = adapter.trace(theirs("kimi-a"), ids, "layers.*.out")
    with pytest.raises(AssertionError, match="layers.2.out"):
        live.assert_all_near({n: x * (1.001 if n == "layers.2.out" else 1) for n, x in want.items()}, want, want)
    assert RMS < 1e-3 and LARGEST < 1e-2
