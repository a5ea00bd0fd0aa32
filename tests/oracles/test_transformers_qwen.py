"""transformers and this engine on Qwen3-Next and Qwen3.5: every module, logits, caches, routing."""

import copy

import live
import pytest
import torch
from oracle import ALL_QWEN_CASES, QWEN, SMALL_QWEN, ours, theirs, tokens

from kimi_linear.adapters import transformers as adapter
from kimi_linear.diff import blame, traces

T = 150                                     # two chunks of 64, and a part


@pytest.mark.parametrize("length", [5, T])
@pytest.mark.parametrize("case", ALL_QWEN_CASES)
def test_every_module_and_cache(case, length):
    live.every_module_and_cache(case, length)


@pytest.mark.parametrize("case", ALL_QWEN_CASES)
def test_free_run(case):
    live.free_run(case)


@pytest.mark.parametrize("case", ALL_QWEN_CASES)
def test_step_by_step(case):
    live.step_by_step(case)


@pytest.mark.parametrize("case", ALL_QWEN_CASES)
def test_ragged_batch_is_their_padded_batch(case):
    live.ragged_batch(case)


@pytest.mark.parametrize("case", ALL_QWEN_CASES)
def test_every_norm_has_their_eps(case):
    assert set(live.eps_of_norms(case).values()) == {ours(case).config.rms_norm_eps}


def test_the_cases_are_what_was_asked_for():
    """Our config of a folder that transformers wrote says what the table says, and the table has the range it must."""
    ratios, shares, taps = set(), set(), set()
    for case, (kind, layers, (k_heads, v_heads, k, v, base), (n, n_kv, d, share), more) in SMALL_QWEN.items():
        c = ours(case).config
        assert [spec.mixer for spec in c.layers] == [{"l": "gdn", "a": "attn"}[x] for x in layers]
        if "l" in layers:
            assert (c.gdn_k_heads, c.gdn_v_heads, c.gdn_k_dim, c.gdn_v_dim) == (k_heads, v_heads, k, v)
            assert c.conv_width == more.get("linear_conv_kernel_dim", 4)
            ratios, taps = ratios | {v_heads // k_heads}, taps | {c.conv_width}
        if "a" in layers:
            assert (c.attn_heads, c.attn_kv_heads, c.attn_head_dim, c.rope_base) == (n, n_kv, d, base)
            assert c.rotary_dim == int(d * share)
            shares.add(share)
        assert c.tie_embeddings == more.get("tie_word_embeddings", False)
        assert c.renormalise == more.get("norm_topk_prob", True) and bool(c.n_experts) == (kind != "dense")
        assert adapter.config_of(theirs(case)) == c
    assert ratios >= {1, 2, 4} and taps == {2, 3, 4} and min(shares) == 0.25 and max(shares) == 1.0
    assert {kind for kind, *_ in SMALL_QWEN.values()} == set(QWEN)


@pytest.mark.parametrize("case", ["qwen-a", "qwen35-moe"])
def test_diff_and_blame_of_theirs(case):
    """No divergence, and nothing to blame but the differences of running sums, which their chunks are made of; then
    both, by name, when one tensor of theirs is another."""
    ids = tokens(case, 70)
    mine = ours(case).trace(ids)
    right = adapter.trace(theirs(case), ids)
    found = blame(ours(case), right)
    assert traces(mine, right).ok and len(found.rows) > 120
    assert {(r.op, r.kind, r.choice) for r in found.wrong} == {("delta_rule", "chunk_decays_subtracted", (64,))}, found
    other = copy.deepcopy(theirs(case))
    with torch.no_grad():
        other.model.layers[3].self_attn.k_norm.weight += 0.02
    wrong = adapter.trace(other, ids)
    assert traces(mine, wrong).first.tap == "layers.3.attn.k_norm"
    taps = {r.tap: r.kind for r in blame(ours(case), wrong).wrong}
    assert taps.pop("layers.3.attn.k_norm") == "unknown" and set(taps.values()) == {"chunk_decays_subtracted"}


def test_adapter():
    """Globs and caches of a trace; what is refused."""
    model, ids = theirs("qwen-a"), tokens("qwen-a", 7)
    whole = adapter.trace(model, ids, state=True)
    part = adapter.trace(model, ids, ["layers.3.attn", "layers.1.gdn.state"], state=True)
    assert set(part) == {n for n in whole if n.startswith("layers.3.attn.")} | {"layers.1.gdn.state"}
    assert whole["layers.3.attn.k_cache"].shape == (7, 2, 32) and whole["layers.1.gdn.state"].shape == (4, 16, 24)
    with pytest.raises(ValueError, match="model is a Qwen3NextModel; it must be a KimiLinearForCausalLM, a Qwen3Next"):
        adapter.trace(model.model, ids)
