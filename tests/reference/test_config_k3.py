"""config.json of Kimi K3: a text model inside of one that sees, and what no 48B model has."""

import json
import math

import pytest

from kimi_linear.cli.inspect import parameters
from kimi_linear.config import Config, ConfigError

CASES = ("k3-a", "k3-b")


@pytest.fixture(params=CASES)
def content(request, data_dir):
    return json.loads((data_dir / "golden" / request.param / "config.json").read_text())


def test_what_is_written_reads_back_equal(content):
    config = Config.from_dict(content)
    assert Config.from_dict(config.to_dict()) == config
    assert config.model_type == config.to_dict()["model_type"] == "kimi_k3"


def test_the_text_model_alone_is_the_same_model(content):
    flat = content["text_config"] | {"model_type": "kimi_k3"}
    assert Config.from_dict(flat) == Config.from_dict(content)


def test_special_tokens_are_taken_from_around_the_text_model(content):
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        content[key] = content["text_config"].pop(key, content.get(key))
    config = Config.from_dict(content)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 0)


@pytest.mark.parametrize("text, words", [
    (None, "text_config is missing; it must hold"), (3, "text_config is 3; it must be")])
def test_a_file_without_its_text_model(text, words):
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"model_type": "kimi_k3", "text_config": text})


def test_a_text_model_inside_of_another_kind(content):
    with pytest.raises(ConfigError, match='model_type is "kimi_linear"; only "kimi_k3" is supported'):
        Config.from_dict(content | {"model_type": "kimi_linear"})


def test_each_part_may_stand_alone(content):
    """A model of the family with any one of K3's parts, and the tensors that it has then."""
    plain = {key: value for key, value in content["text_config"].items()
             if key not in ("attn_res_block_size", "routed_expert_hidden_size", "mla_use_output_gate",
                            "activation_situ_beta", "activation_situ_linear_beta")} | {"hidden_act": "silu"}
    linear = {key: value for key, value in plain["linear_attn_config"].items() if key != "use_full_rank_gate"}
    plain["linear_attn_config"] = linear
    before = Config.from_dict(plain).weight_shapes()
    parts = [({"attn_res_block_size": 2}, "model.output_attn_res_norm.weight"),
             ({"routed_expert_hidden_size": 32}, "routed_expert_up_proj"), ({"mla_use_output_gate": True}, "g_proj"),
             ({"linear_attn_config": linear | {"use_full_rank_gate": True}}, "g_proj")]
    for part, name in parts:
        config = Config.from_dict(plain | part)
        assert any(name in x for x in config.weight_shapes().keys() - before.keys()), part
        assert Config.from_dict(config.to_dict()) == config
    situ = Config.from_dict(plain | {"hidden_act": "situ", "activation_situ_beta": 4})
    assert (situ.situ_beta, situ.situ_linear_beta) == (4, None) and situ.weight_shapes() == before


MLA_LAYERS = [*range(4, 93, 4), 93]
PUBLISHED = {
    "model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"], "text_config": {
        "model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 7168, "num_hidden_layers": 93,
        "intermediate_size": 33792, "hidden_act": "situ", "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0, "attn_res_block_size": 12, "rms_norm_eps": 1e-5,
        "linear_attn_config": {
            "head_dim": 128, "num_heads": 96, "short_conv_kernel_size": 4, "gate_lower_bound": -5.0,
            "use_full_rank_gate": True, "kda_layers": [i for i in range(1, 94) if i not in MLA_LAYERS],
            "full_attn_layers": MLA_LAYERS},
        "num_attention_heads": 96, "num_key_value_heads": 96, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True,
        "mla_use_output_gate": True, "num_experts": 896, "num_experts_per_token": 16, "num_shared_experts": 2,
        "moe_intermediate_size": 3072, "routed_expert_hidden_size": 3584, "latent_moe_use_norm": True,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "routed_scaling_factor": 1.0, "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid", "num_expert_group": 1, "topk_group": 1,
        "max_position_embeddings": 1048576, "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": False}}


def test_the_published_model_has_as_many_parameters_as_its_files():
    """2,779,484,478,208 in the files, where A_log of the 69 KDA layers is padded from 96 values to 128."""
    config = Config.from_dict(PUBLISHED)
    assert sum(math.prod(shape) for shape in config.weight_shapes().values()) == 2_779_484_478_208 - 69 * (128 - 96)
    assert sum(layer.mixer == "kda" for layer in config.layers) == 69
    assert parameters(config)[1] == 105_364_019_968 - 69 * (128 - 96)
