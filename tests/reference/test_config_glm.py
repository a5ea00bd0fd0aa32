"""Config of GLM-5.3-Flash: published and saved forms, every check by name, and the shapes of the weights."""

import copy
import json
import math
import warnings

import pytest
from conftest import DATA

from kimi_linear.cli.inspect import parameters
from kimi_linear.config import Config, ConfigError, LayerSpec, layer_pattern
from kimi_linear.config_glm import KEYS, ONLY, OUTER_KEYS
from kimi_linear.config_reader import USED

CASES = ("glm-a", "glm-b")
MLA = range(3, 45, 4)  # counted from 0, as the published lists are
#: GLM-5.3-Flash as published; the sizes are those of its card and of what transformers takes by default.
PUBLISHED = {
    "architectures": ["Glm5NextForConditionalGeneration"], "model_type": "glm5_next", "tie_word_embeddings": False,
    "image_token_id": 154854, "video_token_id": 154855, "vision_config": {"model_type": "glm5_next_vision"},
    "text_config": {
        "model_type": "glm5_next_text", "vocab_size": 154880, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 45, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 1048576,
        "layer_types": ["deepseek_sparse_attention" if i in MLA else "linear_attention" for i in range(45)],
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42, "first_k_dense_replace": 3, "moe_layer_freq": 1,
        "linear_attn_config": {
            "num_heads": 64, "head_dim": 128, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
            "kda_layers": [i for i in range(45) if i not in MLA], "full_attn_layers": [*MLA]},
        "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 256, "qk_rope_head_dim": 0, "v_head_dim": 256, "mla_use_nope": True,
        "attention_bias": False, "attention_dropout": 0.0, "head_dim": 0,
        "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "index_kpool": 4,
        "index_kpool_compress": True, "index_kpool_always_select_tail": True, "indexer_types": ["full"] * 45,
        "indexer_rope_interleave": True, "index_share_for_mtp_iteration": True,
        "mhc": True, "hc_mult": 4, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0,
        "n_routed_experts": 288, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32",
        "num_nextn_predict_layers": 1, "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829],
        "dtype": "bfloat16", "use_cache": True}}


def read(d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Config.from_dict(d)


def changed(*absent, outer=None, linear=None, **keys):
    """The published file with keys of its text model, around it, and of linear_attn_config, changed."""
    d = copy.deepcopy(PUBLISHED)
    text = d["text_config"]
    text |= keys
    text["linear_attn_config"] |= linear or {}
    for key in absent:
        del text[key]
    return d | (outer or {})


def problems(d):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(d)
    return caught.value.problems


@pytest.fixture(params=CASES)
def content(request):
    return json.loads((DATA / "golden" / request.param / "config.json").read_text())


def test_published():
    c = read(PUBLISHED)
    assert (c.model_type, c.streams, c.stream_passes, c.swiglu_limit, c.latent_eps) == (
        "glm5_next_text", 4, 20, 10.0, 1e-5)
    assert (c.index_heads, c.index_dim, c.index_topk, c.index_pool, c.index_eps) == (32, 128, 2048, 4, 1e-6)
    assert c.layers[2:5] == (LayerSpec("kda", "dense"), LayerSpec("mla", "moe"), LayerSpec("kda", "moe"))
    assert layer_pattern(c) == "kkkM" + "KKKM" * 10 + "K" and c.gate_lower_bound == -5 and c.rope_dim == 0
    shapes, at = c.weight_shapes(), "model.layers.3."
    assert shapes[at + "hc_attn_fn"] == (24, 16384) and shapes[at + "hc_ffn_scale"] == (3,)
    assert shapes[at + "self_attn.indexer.wq_b.weight"] == (4096, 1536)
    assert shapes[at + "self_attn.indexer.index_kpool_compress_ape"] == (4, 128)
    assert shapes[at + "mlp.experts.287.down_proj.weight"] == (4096, 2048)


def test_parameters_of_the_published_model():
    """Counted apart from weight_shapes()."""
    D, vocab, inner = 4096, 154880, 64 * 128
    streams = 2 * (24 * 4 * D + 24 + 3) + 2 * D
    kda = 3 * (inner * D + 4 * inner) + 2 * (128 * D + 128 * inner) + 64 + inner + 64 * D + 128 + inner * D
    indexer = 32 * 128 * 1536 + 128 * D + 2 * 128 + 32 * D + 4 * 128 + 128 * D
    mla = 1536 * D + 1536 + 64 * 256 * 1536 + 512 * D + 512 + 64 * 512 * 512 + 64 * 256 * D + indexer
    expert, dense = 3 * 2048 * D, 3 * 12288 * D
    moe = 288 * D + 288 + 289 * expert
    total = 2 * vocab * D + D + 45 * streams + 34 * kda + 11 * mla + 3 * dense + 42 * moe
    assert parameters(read(PUBLISHED)) == (total, total - 42 * 280 * expert)
    assert sum(map(math.prod, read(PUBLISHED).weight_shapes().values())) == total
    assert total == 313_326_811_966  # llama.cpp's name of its size: 313B


def test_the_bfloat16_files_have_as_many_bytes():
    """642,646,653,816 in the 120 files of GLM-5.3-Flash-BF16: with the layer behind, which has one stream, and the
    vision tower, as transformers counts it; vectors of the streams, of the decay and of the choice are in float32."""
    shapes = read(PUBLISHED).weight_shapes()
    D, vision = 4096, 563_627_008
    behind = {name: s for name, s in shapes.items() if name.startswith("model.layers.43.") and ".hc_" not in name}
    every = [*shapes.items(), *behind.items(), ("eh_proj", (D, 2 * D)), *(("norm", (D,)) for _ in range(3))]
    single = ("_base", "hc_attn_scale", "hc_ffn_scale", "A_log", "dt_bias", "e_score_correction_bias")
    total = sum((4 if name.endswith(single) else 2) * math.prod(s) for name, s in every)
    assert total + 2 * vision == 642_646_653_816


def test_weight_shapes_are_those_of_the_files(content):
    from conftest import read_safetensors

    case = "glm-a" if content["text_config"]["hc_mult"] == 4 else "glm-b"
    files = read_safetensors(DATA / "golden" / case / "model.safetensors")
    found = {name.replace("model.language_model.", "model."): x.shape for name, x in files.items()
             if "visual" not in name}
    found = {name: (s[0], s[2]) if name.endswith("conv1d.weight") else s for name, s in found.items()}
    assert found == read(content).weight_shapes()


def test_what_is_written_reads_back_equal(content):
    c = read(content)
    again = read(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.weight_shapes() == c.weight_shapes() and c.to_dict().keys() <= set(KEYS)
    assert c.to_dict()["model_type"] == "glm5_next_text"


VARIANTS = {
    "as published": {}, "tied": dict(tie_word_embeddings=True), "no limit": dict(swiglu_limit=0),
    "one stream": dict(hc_mult=1), "eps": dict(l2_eps=1e-5, latent_eps=1e-6, index_eps=0.0, hc_eps=0.0),
    "no experts": dict(n_routed_experts=0, mlp_layer_types=None, first_k_dense_replace=None),
    "dense behind": dict(mlp_layer_types=["sparse"] * 44 + ["dense"], first_k_dense_replace=None),
    "pool of one": dict(index_kpool=1), "groups": dict(n_group=4, topk_group=2),
    "three shared": dict(n_shared_experts=3),
    "no bound": dict(linear={"gate_lower_bound": None, "safe_gate": False}),
    "another bound": dict(linear={"gate_lower_bound": -2.5}), "no length": dict(max_position_embeddings=None),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name):
    c = read(changed(**VARIANTS[name]))
    again = read(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.weight_shapes() == c.weight_shapes()


def test_the_text_model_alone_is_the_same_model():
    assert read(PUBLISHED["text_config"]) == read(PUBLISHED)


def test_all_forms_agree():
    """The lists of linear_attn_config count from 0, or from 1 as Kimi's; transformers has its keys side by side."""
    wanted = read(PUBLISHED)
    lists = {key: [i + 1 for i in PUBLISHED["text_config"]["linear_attn_config"][key]]
             for key in ("kda_layers", "full_attn_layers")}
    assert read(changed(linear=lists)) == wanted
    assert read(changed("layer_types", "mlp_layer_types")) == read(changed("layer_types", linear=lists)) == wanted
    flat = dict(linear_num_heads=64, linear_head_dim=128, linear_conv_kernel_dim=4, linear_lower_bound=-5.0)
    assert read(changed("linear_attn_config", **flat)) == read(changed(**flat)) == wanted
    for word in ("indexed_attention", "full_attention"):
        types = [word if i in MLA else "linear_attention" for i in range(45)]
        assert read(changed("linear_attn_config", **flat | {"layer_types": types})) == wanted


def test_defaults():
    """What transformers takes where a file says nothing."""
    absent = ("first_k_dense_replace", "mlp_layer_types", "hc_mult", "hc_eps", "hc_sinkhorn_iters", "swiglu_limit",
              "index_topk", "routed_scaling_factor", "norm_topk_prob", "indexer_types", "n_group", "topk_group", "mhc")
    assert read(changed(*absent)) == read(PUBLISHED)
    assert read(changed("index_kpool")).index_pool == 16
    assert read(changed("linear_attn_config", "layer_types", linear_num_heads=64, linear_head_dim=128,
                        linear_conv_kernel_dim=4)) == read(PUBLISHED)


def test_tokens_of_the_text_count():
    d = changed("eos_token_id", "pad_token_id", outer=dict(eos_token_id=[1, 2], pad_token_id=3, bos_token_id=4))
    c = read(d)
    assert (c.eos_token_ids, c.pad_token_id, c.bos_token_id) == ((1, 2), 3, 4)
    assert read(changed(outer=dict(eos_token_id=7))).eos_token_ids == (154820, 154827, 154829)


@pytest.mark.parametrize("text, words", [
    (None, "text_config is missing; it must hold the config of the text model"),
    (3, "text_config is 3; it must be an object")])
def test_a_file_without_its_text_model(text, words):
    assert words in problems({"model_type": "glm5_next", "text_config": text})


def test_packed_weights_say_what_to_do():
    """The published FP8 files are refused, wherever their quantization_config is."""
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for d, name in ((changed(outer=dict(quantization_config=packed)), "quantization_config"),
                    (changed(quantization_config=packed), "text_config.quantization_config")):
        (problem,) = problems(d)
        assert problem.startswith(f'{name} is {{"quant_method": "fp8"')
        assert problem.endswith("are not read from a folder; take the bfloat16 files, as GLM-5.3-Flash-BF16, or a GGUF")


WRONG = {key: dict(**{key: "x"}) for key in ONLY if "." not in key} | {
    "linear_attn_config.use_full_rank_gate": dict(linear={"use_full_rank_gate": True}),
    "linear_attn_config.safe_gate": dict(linear={"safe_gate": 1}),
    "linear_attn_config.gate_lower_bound": dict(linear={"gate_lower_bound": 0.5}),
    "linear_attn_config.num_heads": dict(linear={"num_heads": 0}),
    "linear_attn_config.short_conv_kernel_size": dict(linear={"short_conv_kernel_size": 9}),
    "linear_attn_config.kda_layers": dict(linear={"kda_layers": [0, 1, 3]}),
    "linear_attn_config.full_attn_layers": dict(linear={"full_attn_layers": "3"}),
    "linear_num_heads": dict(linear_num_heads=32), "layer_types": dict(layer_types=["linear_attention"] * 45),
    "mlp_layer_types": dict(mlp_layer_types=["dense"] * 4 + ["sparse"] * 41),
    "n_routed_experts": dict(n_routed_experts=0, first_k_dense_replace=None),
    "num_local_experts": dict(num_local_experts=7), "indexer_types": dict(indexer_types=["full", "shared"]),
    "num_key_value_heads": dict(num_key_value_heads=8), "qk_head_dim": dict(qk_head_dim=192),
    "q_lora_rank": dict(q_lora_rank=None), "index_n_heads": dict(index_n_heads=0), "index_kpool": dict(index_kpool=3),
    "index_topk": dict(index_topk=2046), "index_head_dim": dict(index_head_dim=126), "index_eps": dict(index_eps=-1),
    "hc_mult": dict(hc_mult=65), "hc_sinkhorn_iters": dict(hc_sinkhorn_iters=0), "hc_eps": dict(hc_eps="x"),
    "swiglu_limit": dict(swiglu_limit=-1.0), "topk_group": dict(topk_group=2), "n_group": dict(n_group=5, topk_group=5),
    "num_experts_per_tok": dict(n_group=4, num_experts_per_tok=73), "norm_topk_prob": dict(norm_topk_prob=1),
    "routed_scaling_factor": dict(routed_scaling_factor="x"), "vocab_size": dict(vocab_size=0),
    "latent_eps": dict(latent_eps=-1e-6), "intermediate_size": dict(intermediate_size=None),
    "moe_intermediate_size": dict(moe_intermediate_size=0), "kv_lora_rank": dict(kv_lora_rank=0),
}


@pytest.mark.parametrize("key", WRONG)
def test_each_refusal_names_its_key(key):
    found = problems(changed(**WRONG[key]))
    assert any(problem.startswith((f"text_config.{key} ", key + " ")) for problem in found), found


def test_lists_that_are_no_partition():
    for lists in ({"kda_layers": [0, 1], "full_attn_layers": [1]}, {"kda_layers": [2, 3], "full_attn_layers": [4]},
                  {"kda_layers": [], "full_attn_layers": []}):
        (problem,) = problems(changed(linear=lists))
        assert "are not a partition of the layers 0..44, or 1..45; each layer must be in one of them, once" in problem


def test_every_key_is_known_once():
    """The published file has none that is unknown; a key that is used is one that some check or field reads."""
    assert set(PUBLISHED) <= set(OUTER_KEYS) and set(PUBLISHED["text_config"]) <= set(KEYS)
    assert {key for key in ONLY if "." not in key} <= {key for key, use in KEYS.items() if use == USED}
    with pytest.warns(UserWarning, match="text_config.strange"):
        Config.from_dict(changed(strange=1))
