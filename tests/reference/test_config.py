"""Config: both forms, every check by name, all problems at once, and the shapes of the weights."""

import copy
import dataclasses
import json
import random
import warnings

import pytest
from conftest import canonical_weights

from kimi_linear.config import FAMILIES, KEYS, LINEAR_KEYS, Config, ConfigError, LayerSpec
from kimi_linear.config_reader import Reader, common

#: Kimi-Linear-48B-A3B as published; inert keys but for one of each kind are left out.
PUBLISHED = dict(
    architectures=["KimiLinearForCausalLM"], model_type="kimi_linear", vocab_size=163840,
    hidden_size=2304, num_hidden_layers=27, intermediate_size=9216, hidden_act="silu",
    rms_norm_eps=1e-5, num_attention_heads=32, num_key_value_heads=32, head_dim=72,
    linear_attn_config=dict(
        head_dim=128, num_heads=32, short_conv_kernel_size=4,
        kda_layers=[1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27]),
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    mla_use_nope=True, rope_theta=10000.0, rope_scaling=None, model_max_length=1048576, num_experts=256,
    num_experts_per_token=8, num_shared_experts=1, moe_intermediate_size=1024,
    moe_router_activation_func="sigmoid", moe_renormalize=True, routed_scaling_factor=2.446,
    use_grouped_topk=True, num_expert_group=1, topk_group=1, first_k_dense_replace=1, moe_layer_freq=1,
    num_nextn_predict_layers=0, tie_word_embeddings=False, bos_token_id=163584, eos_token_id=163586,
    pad_token_id=163839, torch_dtype="bfloat16", use_cache=True)


def changed(*removed, **values):
    """The published config with keys changed (``linear__x`` inside linear_attn_config) or removed."""
    d = copy.deepcopy(PUBLISHED)
    for key in removed:
        del d[key]
    for key, value in values.items():
        if key.startswith("linear__"):
            d["linear_attn_config"][key[8:]] = value
        else:
            d[key] = value
    return d


def problems(d):
    with pytest.raises(ConfigError) as e:
        Config.from_dict(d)
    return e.value.problems


def test_published():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = Config.from_dict(PUBLISHED)
    assert [i for i, s in enumerate(c.layers) if s.mixer == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    assert [i for i, s in enumerate(c.layers) if s.ffn == "dense"] == [0]
    assert (c.kda_heads, c.kda_head_dim, c.conv_width, c.gate_lower_bound) == (32, 128, 4, None)
    assert (c.nope_dim, c.rope_dim, c.v_head_dim, c.kv_rank, c.q_rank) == (128, 64, 128, 512, 0)
    assert (c.eos_token_ids, c.latent_eps, c.rms_norm_eps) == ((163586,), 1e-6, 1e-5)


def test_parameters_of_the_published_model():
    """The total of spec section 1.2, from the shapes alone."""
    total = 0
    for shape in Config.from_dict(PUBLISHED).weight_shapes().values():
        n = 1
        for x in shape:
            n *= x
        total += n
    assert total == 49_122_681_728


def test_a_family_says_only_what_its_layers_have():
    needed = {f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING}
    assert needed == {"model_type", "n_layers", "layers", *common(Reader({}, {}))}


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()), ids=lambda module: module.__name__)
def test_a_family_is_whole(family):
    for name in ("read", "to_dict", "PUBLISHED"):
        assert hasattr(family, name), f"{family.__name__} has no {name}"


def test_transformers_form(golden_dir):
    a, b = (Config.from_file(golden_dir / x / "config.json") for x in ("kimi-a", "kimi-b"))
    assert [s.mixer for s in a.layers] == ["kda", "kda", "kda", "mla", "kda", "mla"]
    assert [s.ffn for s in a.layers] == ["dense"] + ["moe"] * 5
    assert b.layers[:3] == (LayerSpec("mla", "dense"), LayerSpec("kda", "dense"), LayerSpec("kda", "moe"))
    assert (b.q_rank, b.n_groups, b.top_groups, b.n_shared_experts, b.renormalise) == (20, 3, 2, 2, False)
    assert (b.conv_width, b.router_function, b.routed_scale) == (3, "sigmoid", 1.3)


def test_weight_shapes_are_those_of_the_files(kimi_case, tiny_dir):
    for folder in (kimi_case, tiny_dir):
        weights = canonical_weights(folder / "model.safetensors")
        shapes = Config.from_file(folder / "config.json").weight_shapes()
        assert {name: x.shape for name, x in weights.items()} == shapes


VARIANTS = {
    "published": {},
    "two dense": dict(first_k_dense_replace=2),
    "every third is sparse": dict(moe_layer_freq=3),
    "all dense": dict(num_experts=None),
    "tied": dict(tie_word_embeddings=True),
    "low-rank q": dict(q_lora_rank=1536),
    "bound": dict(linear__gate_lower_bound=-5.0),
    "only kda": dict(linear__kda_layers=list(range(1, 28)), linear__full_attn_layers=[]),
    "only mla": dict(linear__kda_layers=[], linear__full_attn_layers=list(range(1, 28))),
    "no shared expert": dict(num_shared_experts=0),
    "groups": dict(num_expert_group=8, topk_group=2, num_shared_experts=3),
    "softmax": dict(moe_router_activation_func="softmax", moe_renormalize=False),
    "several ends": dict(eos_token_id=[5, 7], pad_token_id=None),
    "latent eps": dict(latent_eps=1e-5),
    "l2 eps": dict(l2_eps=1e-5),
    "conv 1": dict(linear__short_conv_kernel_size=1),
    "odd heads": dict(linear__head_dim=20, v_head_dim=7, qk_rope_head_dim=0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name):
    c = Config.from_dict(changed(**VARIANTS[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Config.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c
    assert again.weight_shapes() == c.weight_shapes()


def test_round_trip_of_the_transformers_form(kimi_case):
    c = Config.from_file(kimi_case / "config.json")
    assert Config.from_dict(c.to_dict()) == c


def test_dense_layers_that_are_no_prefix():
    kinds = ["sparse", "dense"] * 13 + ["sparse"]
    d = changed("first_k_dense_replace", "moe_layer_freq", mlp_layer_types=kinds)
    c = Config.from_dict(d)
    assert [s.ffn for s in c.layers] == ["moe" if x == "sparse" else "dense" for x in kinds]
    assert c.to_dict()["mlp_layer_types"] == kinds and "first_k_dense_replace" not in c.to_dict()


def test_the_rule_of_the_sparse_layers():
    """MoE where l >= first_k_dense_replace and l mod moe_layer_freq = 0, counted from layer 0."""
    c = Config.from_dict(changed(first_k_dense_replace=4, moe_layer_freq=3))
    assert [i for i, s in enumerate(c.layers) if s.ffn == "moe"] == [6, 9, 12, 15, 18, 21, 24]


def test_shapes_follow_the_variants():
    tied = Config.from_dict(changed(**VARIANTS["tied"])).weight_shapes()
    assert "lm_head.weight" not in tied
    low = Config.from_dict(changed(**VARIANTS["low-rank q"])).weight_shapes()
    assert low["model.layers.3.self_attn.q_b_proj.weight"] == (6144, 1536)
    assert "model.layers.3.self_attn.q_proj.weight" not in low
    none = Config.from_dict(changed(**VARIANTS["no shared expert"])).weight_shapes()
    assert not any("shared_experts" in name for name in none)
    three = Config.from_dict(changed(**VARIANTS["groups"])).weight_shapes()
    assert three["model.layers.1.block_sparse_moe.shared_experts.down_proj.weight"] == (2304, 3072)


REFUSED = {
    "rope_scaling": dict(rope_scaling={"type": "yarn"}),
    "mla_use_nope": dict(mla_use_nope=False),
    "hidden_act": dict(hidden_act="gelu"),
    "activation_situ_beta": dict(hidden_act="situ", activation_situ_beta=0),
    "activation_situ_linear_beta": dict(hidden_act="situ", activation_situ_beta=4, activation_situ_linear_beta=-25),
    "num_nextn_predict_layers": dict(num_nextn_predict_layers=1),
    "attention_bias": dict(attention_bias=True),
    "num_key_value_heads": dict(num_key_value_heads=8),
    "moe_router_activation_func": dict(moe_router_activation_func="tanh"),
    "quantization_config": dict(quantization_config={"format": "pack-quantized"}),
    "allow_neg_eigval": dict(allow_neg_eigval=True),
    "mla_use_output_gate": dict(mla_use_output_gate=1),
    "attn_res_block_size": dict(attn_res_block_size=-1),
    "routed_expert_hidden_size": dict(routed_expert_hidden_size=3584.5),
    "latent_moe_use_norm": dict(latent_moe_use_norm="yes"),
    "use_full_rank_gate": dict(use_full_rank_gate=True, linear__use_full_rank_gate=False),
    "hidden_size": dict(hidden_size=0),
    "vocab_size": dict(vocab_size=True),
    "num_hidden_layers": dict(num_hidden_layers=27.0),
    "num_experts": dict(num_experts=70_000),
    "intermediate_size": dict(intermediate_size=None),
    "rms_norm_eps": dict(rms_norm_eps=float("nan")),
    "routed_scaling_factor": dict(routed_scaling_factor=10**400),
    "moe_renormalize": dict(moe_renormalize=1),
    "num_experts_per_token": dict(num_experts_per_token=257),
    "num_expert_group": dict(num_expert_group=3),
    "topk_group": dict(topk_group=2),
    "use_grouped_topk": dict(use_grouped_topk=False, num_expert_group=2),
    "eos_token_id": dict(eos_token_id=[1, 163840]),
    "bos_token_id": dict(bos_token_id=-1),
    "linear_attn_config": dict(linear_attn_config=[1]),
    "linear_attn_config.kda_layers": dict(linear__kda_layers="all"),
    "linear_attn_config.short_conv_kernel_size": dict(linear__short_conv_kernel_size=9),
    "linear_attn_config.gate_lower_bound": dict(linear__gate_lower_bound=0.0),
    "linear_num_heads": dict(linear_num_heads=16),
    "qk_head_dim": dict(qk_head_dim=128),
    "layer_types": dict(layer_types=["linear_attention"] * 27),
    "mlp_layer_types": dict(mlp_layer_types=["sparse"] * 27),
    "max_position_embeddings": dict(max_position_embeddings=4096),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name(key):
    found = problems(changed(**REFUSED[key]))
    assert any(p.startswith(key + " ") for p in found), found
    assert key.split(".")[0] in KEYS


@pytest.mark.parametrize("kda, full", [
    ([1, 2], [2, 3]), ([1, 2], []), ([0, 1], [2]), ([1, 2, 3], [4]), ([1, 1, 2], [3])])
def test_layers_must_be_a_partition(kda, full):
    d = changed(num_hidden_layers=3, linear__kda_layers=kda, linear__full_attn_layers=full)
    assert any("partition of the layers 1..3" in p for p in problems(d))


def test_a_pattern_is_never_derived():
    d = changed()
    del d["linear_attn_config"]["kda_layers"], d["linear_attn_config"]["full_attn_layers"]
    assert any("kda_layers and linear_attn_config.full_attn_layers are missing" in p for p in problems(d))


def test_all_problems_at_once():
    found = problems(changed("hidden_size", mla_use_nope=False, v_head_dim=-1, topk_group=5))
    assert [p.split()[0] for p in found] == ["mla_use_nope", "hidden_size", "v_head_dim", "topk_group"]


def test_a_wrong_size_brings_no_others_with_it():
    assert len(problems(changed(num_hidden_layers=-3))) == 1
    assert len(problems(changed(vocab_size="many"))) == 1


def test_unknown_keys_are_one_warning():
    with pytest.warns(UserWarning) as seen:
        Config.from_dict(changed(sliding_window=4, linear__rank=3, zeta=None))
    assert [str(w.message) for w in seen] == [
        "config: unknown keys, ignored: linear_attn_config.rank, sliding_window, zeta"]


def test_every_published_key_is_known(kimi_case, tiny_dir):
    for folder in (kimi_case, tiny_dir):
        d = json.loads((folder / "config.json").read_text())
        assert set(d) <= set(KEYS) and set(d["linear_attn_config"]) <= set(LINEAR_KEYS)


def test_any_value_anywhere_gives_a_config_or_its_error():
    """Random values at random keys: nothing but ConfigError is raised, and what is read round-trips."""
    values = [None, 0, 1, -1, 3, 4, 2**40, 10**400, 1.5, float("nan"), float("inf"), True, False, "", "x",
              [], [1], [[1]], [None], ["dense"], {}]
    rng, read = random.Random(0), 0
    for _ in range(2000):
        d = changed()
        for _ in range(rng.choice([1, 1, 2, 4])):
            inner = d["linear_attn_config"]
            if rng.random() < 0.3 and isinstance(inner, dict):
                inner[rng.choice(list(LINEAR_KEYS))] = rng.choice(values)
            else:
                d[rng.choice(list(KEYS))] = rng.choice(values)
        try:
            c = Config.from_dict(d)
        except ConfigError:
            continue
        assert Config.from_dict(c.to_dict()) == c
        read += 1
    assert 0 < read < 2000


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Config.from_file(path)


@pytest.mark.parametrize("text, words", [
    ('{"vocab_size": 1, "vocab_size": 2}', "config.json: the key 'vocab_size' is there twice"),
    ('{"linear_attn_config": {"num_heads": 1, "num_heads": 2}}', "config.json: the key 'num_heads' is there twice"),
    ('{"routed_scaling_factor": NaN}', "config.json: it holds NaN, which JSON does not have"),
])
def test_a_file_is_read_as_strictly_as_a_folders(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Config.from_file(path)


def test_a_deep_value_is_a_sentence():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="vocab_size is a deeply nested value; it must be an integer"):
        Config.from_dict(changed(vocab_size=deep))


def test_experts_of_all_layers_have_a_limit():
    """Each has a name and three shapes: a small file must not take minutes and gigabytes."""
    Config.from_dict(changed(num_experts=2**17 // 27))
    with pytest.raises(ConfigError, match="num_experts is 4855; with 27 layers it must be at most 4854"):
        Config.from_dict(changed(num_experts=4855))
