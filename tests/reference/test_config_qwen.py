"""Config of Qwen3-Next and Qwen3.5: published and saved forms, every check by name, and the shapes of the weights."""

import copy
import dataclasses
import json
import math
import random
import warnings

import pytest
from conftest import DATA, QWEN_CASES, canonical_weights

from kimi_linear.config import Config, ConfigError, LayerSpec
from kimi_linear.config_qwen import KEYS, OUTER_KEYS, ROPE_KEYS
from kimi_linear.config_reader import USED

#: Qwen3-Next-80B-A3B-Instruct as published.
NEXT = dict(
    architectures=["Qwen3NextForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    decoder_sparse_step=1, eos_token_id=151645, full_attention_interval=4, head_dim=256, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=5120, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128,
    max_position_embeddings=262144, mlp_only_layers=[], model_type="qwen3_next", moe_intermediate_size=512,
    norm_topk_prob=True, num_attention_heads=16, num_experts=512, num_experts_per_tok=10, num_hidden_layers=48,
    num_key_value_heads=2, output_router_logits=False, partial_rotary_factor=0.25, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.001, shared_expert_intermediate_size=512,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.57.0.dev0", use_cache=True,
    use_sliding_window=False, vocab_size=151936)

#: A Qwen3.5 vision-language file: the sizes of the dense class, 3 value heads a key head, an interval of 4.
DENSE = dict(
    architectures=["Qwen3_5ForConditionalGeneration"], model_type="qwen3_5", image_token_id=248056,
    video_token_id=248057, vision_start_token_id=248053, vision_end_token_id=248054, tie_word_embeddings=True,
    transformers_version="5.23.0", vision_config={"model_type": "qwen3_5_vision", "depth": 27},
    text_config=dict(
        attention_bias=False, attn_output_gate=True, dtype="bfloat16", eos_token_id=248044, full_attention_interval=4,
        head_dim=256, hidden_act="silu", hidden_size=4096, intermediate_size=12288, linear_conv_kernel_dim=4,
        linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=48, linear_value_head_dim=128,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8, mamba_ssm_dtype="float32",
        max_position_embeddings=262144, mlp_only_layers=[], model_type="qwen3_5_text", mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False, num_attention_heads=16, num_hidden_layers=32, num_key_value_heads=4,
        rms_norm_eps=1e-6, use_cache=True, vocab_size=248320, rope_parameters=dict(
            mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25, rope_theta=10000000,
            rope_type="default")))

#: A mixture of Qwen3.5 with the sizes of its class.
MIXTURE = DENSE | dict(
    architectures=["Qwen3_5MoeForConditionalGeneration"], model_type="qwen3_5_moe", tie_word_embeddings=False,
    text_config={k: v for k, v in DENSE["text_config"].items() if k not in ("intermediate_size", "layer_types")} | dict(
        model_type="qwen3_5_moe_text", hidden_size=2048, num_hidden_layers=40, num_key_value_heads=2,
        linear_num_value_heads=32, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
        shared_expert_intermediate_size=512))
PUBLISHED = {"next": NEXT, "dense": DENSE, "mixture": MIXTURE}


def changed(d, *removed, **values):
    """A config with keys changed or removed; those of ``text_config`` where it has one, ``outer__x`` around it."""
    d = copy.deepcopy(d)
    text = d.get("text_config", d)
    for key in removed:
        del text[key]
    for key, value in values.items():
        where, key = (d, key[7:]) if key.startswith("outer__") else (text, key)
        if "__" in key:
            key, inner = key.split("__")
            where, key = where[key], inner
        where[key] = value
    return d


def read(d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Config.from_dict(d)


def problems(d):
    with pytest.raises(ConfigError) as e:
        Config.from_dict(d)
    return e.value.problems


def parameters(c):
    return sum(math.prod(shape) for shape in c.weight_shapes().values())


def test_next():
    c = read(NEXT)
    assert [i for i, s in enumerate(c.layers) if s.mixer == "attn"] == list(range(3, 48, 4))
    assert {s.ffn for s in c.layers} == {"moe"} and {s.mixer for s in c.layers} == {"gdn", "attn"}
    assert (c.gdn_k_heads, c.gdn_v_heads, c.gdn_k_dim, c.gdn_v_dim, c.conv_width) == (16, 32, 128, 128, 4)
    assert (c.attn_heads, c.attn_kv_heads, c.attn_head_dim, c.rotary_dim, c.rope_base) == (16, 2, 256, 64, 1e7)
    assert (c.n_experts, c.experts_per_token, c.moe_size, c.shared_size, c.shared_gated) == (512, 10, 512, 512, True)
    assert (c.router_function, c.renormalise, c.router_bias, c.moe_names) == ("softmax", True, False, "mlp")
    assert (c.norm_plus_one, c.gdn_inputs, c.gdn_tiled, c.l2_eps) == (True, "grouped", False, 1e-6)
    assert (c.eos_token_ids, c.max_length) == ((151645,), 262144)


def test_parameters_of_next():
    """The totals that its card and spec sheets give, without the layer of multi-token prediction."""
    assert parameters(read(NEXT)) == 79_674_391_296


def test_dense():
    c = read(DENSE)
    assert (c.model_type, c.tie_embeddings, c.eos_token_ids) == ("qwen3_5_text", True, (248044,))
    assert {s.ffn for s in c.layers} == {"dense"} and c.layers[3].mixer == "attn" and c.layers[4].mixer == "gdn"
    assert (c.ffn_size, c.gdn_inputs, c.gdn_v_heads, c.rotary_dim) == (12288, "split", 48, 64)
    assert (c.n_experts, c.shared_size, c.shared_gated) == (0, 0, False)
    shapes = c.weight_shapes()
    at = "model.layers.0.linear_attn."
    assert "lm_head.weight" not in shapes
    assert [shapes[f"{at}in_proj_{x}.weight"][0] for x in ("qkv", "z", "b", "a")] == [10240, 6144, 48, 48]
    assert shapes["model.layers.3.self_attn.q_proj.weight"] == (8192, 4096)
    assert shapes[f"{at}conv1d.weight"] == (10240, 4) and shapes[f"{at}out_proj.weight"] == (4096, 6144)


def test_mixture():
    c = read(MIXTURE)
    assert (c.model_type, c.n_layers, c.n_experts, c.renormalise) == ("qwen3_5_moe_text", 40, 256, True)
    assert set(c.layers) == {LayerSpec("gdn", "moe"), LayerSpec("attn", "moe")}
    shapes = c.weight_shapes()
    assert shapes["model.layers.7.mlp.shared_expert_gate.weight"] == (1, 2048)
    assert shapes["model.layers.7.mlp.experts.255.down_proj.weight"] == (2048, 512)
    assert not any("bias" in name and "dt_bias" not in name for name in shapes)


@pytest.mark.parametrize("case", QWEN_CASES)
def test_weight_shapes_are_those_of_the_files(case):
    folder = DATA / "golden" / case
    shapes = read(json.loads((folder / "config.json").read_text())).weight_shapes()
    assert {name: x.shape for name, x in canonical_weights(folder / "model.safetensors").items()} == shapes


@pytest.mark.parametrize("case", QWEN_CASES)
def test_round_trip_of_the_saved_form(case):
    d = json.loads((DATA / "golden" / case / "config.json").read_text())
    c = read(d)
    again = read(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.weight_shapes() == c.weight_shapes()
    assert c.to_dict().keys() <= set(KEYS) and c.to_dict()["architectures"] == d["architectures"]


VARIANTS = {
    "as published": {},
    "tied": dict(tie_word_embeddings=True),
    "several ends": dict(eos_token_id=[5, 7], pad_token_id=3),
    "one attention layer": dict(full_attention_interval=20),
    "only attention": dict(full_attention_interval=1),
    "two sparse": dict(decoder_sparse_step=24),
    "some dense": dict(mlp_only_layers=[0, 5]),
    "no experts": dict(num_experts=0),
    "not renormalised": dict(norm_topk_prob=False),
    "no shared expert": dict(shared_expert_intermediate_size=0),
    "odd widths": dict(head_dim=98, partial_rotary_factor=0.17, linear_value_head_dim=7),
    "all rotated": dict(partial_rotary_factor=1),
    "eps": dict(l2_eps=1e-5, rms_norm_eps=0.0),
    "weights of a GGUF": dict(gdn_tiled=True, norm_plus_one=False),
    "conv 1": dict(linear_conv_kernel_dim=1),
    "default scaling": dict(rope_scaling={"type": "default", "rope_theta": 10000000}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name):
    c = read(changed(NEXT, **VARIANTS[name]))
    again = read(json.loads(json.dumps(c.to_dict())))
    assert again == c and again.weight_shapes() == c.weight_shapes()


@pytest.mark.parametrize("d", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_round_trip_of_a_text_config(d):
    c = read(d)
    assert read(json.loads(json.dumps(c.to_dict()))) == c
    alone = d["text_config"] | {"tie_word_embeddings": d["tie_word_embeddings"]}
    assert read(alone) == c


@pytest.mark.parametrize("width", range(2, 260, 43))
def test_any_rotated_width_reads_back(width):
    """The factor that is written, times head_dim, is rounded down to the same number."""
    c = read(NEXT)
    for rotary in range(2, width + 1, 2):
        one = dataclasses.replace(c, attn_head_dim=width, rotary_dim=rotary)
        assert Config.from_dict(one.to_dict()) == one


def test_both_forms_agree():
    saved = changed(NEXT, "full_attention_interval", "partial_rotary_factor", "rope_theta", "rope_scaling",
                    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 12,
                    rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25))
    assert read(saved) == read(NEXT)
    both = NEXT | {k: saved[k] for k in ("layer_types", "rope_parameters")}
    assert read(both) == read(NEXT)


def test_the_rule_of_the_sparse_layers():
    c = read(changed(NEXT, decoder_sparse_step=3, mlp_only_layers=[5, 6]))
    assert [i for i, s in enumerate(c.layers) if s.ffn == "moe"] == [i for i in range(2, 48, 3) if i != 5]


@pytest.mark.parametrize("outer, inner, tied", [(True, None, True), (None, True, True), (None, None, False),
                                                (True, False, True), (False, True, False)])
def test_tied_at_either_level(outer, inner, tied):
    assert read(changed(DENSE, outer__tie_word_embeddings=outer, tie_word_embeddings=inner)).tie_embeddings is tied


def test_special_tokens_of_the_text_count():
    d = changed(DENSE, outer__eos_token_id=7, outer__bos_token_id=5, outer__pad_token_id=[1])
    assert problems(d) == ["pad_token_id is [1]; it must be an integer from 0 to 248319"]
    c = read(changed(DENSE, outer__eos_token_id=7, outer__bos_token_id=5))
    assert (c.eos_token_ids, c.bos_token_id) == ((248044,), 5)


#: The problem's key -> (published file, what is changed).
REFUSED = {
    "model_type": (NEXT, dict(model_type="qwen4")),
    "rope_scaling": (NEXT, dict(rope_scaling={"type": "yarn", "rope_theta": 1e7})),
    "attention_bias": (NEXT, dict(attention_bias=True)),
    "use_sliding_window": (NEXT, dict(use_sliding_window=True)),
    "attn_output_gate": (NEXT, dict(attn_output_gate=False)),
    "hidden_act": (NEXT, dict(hidden_act="gelu")),
    "quantization_config": (NEXT, dict(quantization_config={"quant_method": "fp8"})),
    "rope_theta": (NEXT, dict(rope_theta=0)),
    "partial_rotary_factor": (NEXT, dict(partial_rotary_factor=0.2542)),
    "head_dim": (NEXT, dict(head_dim=None)),
    "num_attention_heads": (NEXT, dict(num_key_value_heads=3)),
    "linear_num_value_heads": (NEXT, dict(linear_num_value_heads=24)),
    "linear_num_key_heads": (NEXT, dict(linear_num_key_heads="16")),
    "linear_conv_kernel_dim": (NEXT, dict(linear_conv_kernel_dim=9)),
    "layer_types": (NEXT, dict(layer_types=["linear_attention"] * 48)),
    "full_attention_interval": (NEXT, dict(full_attention_interval=0)),
    "decoder_sparse_step": (NEXT, dict(decoder_sparse_step=0)),
    "mlp_only_layers": (NEXT, dict(mlp_only_layers=[48])),
    "num_experts": (NEXT, dict(num_experts=40_000)),
    "num_experts_per_tok": (NEXT, dict(num_experts_per_tok=513)),
    "moe_intermediate_size": (NEXT, dict(moe_intermediate_size=None)),
    "shared_expert_intermediate_size": (NEXT, dict(shared_expert_intermediate_size=None)),
    "intermediate_size": (NEXT, dict(num_experts=0, intermediate_size=None)),
    "norm_topk_prob": (NEXT, dict(norm_topk_prob=1)),
    "norm_plus_one": (NEXT, dict(norm_plus_one="yes")),
    "gdn_tiled": (NEXT, dict(gdn_tiled=2)),
    "rms_norm_eps": (NEXT, dict(rms_norm_eps=-1.0)),
    "tie_word_embeddings": (NEXT, dict(tie_word_embeddings=0)),
    "eos_token_id": (NEXT, dict(eos_token_id=[151936])),
    "vocab_size": (NEXT, dict(vocab_size=0)),
    "rope_parameters": (NEXT, dict(rope_parameters=[])),
    "rope_parameters.rope_theta": (NEXT, dict(rope_parameters=dict(rope_theta="1e7"))),
    "rope_parameters.partial_rotary_factor": (NEXT, dict(rope_parameters=dict(partial_rotary_factor=1.5))),
    "text_config": (DENSE, dict(outer__text_config=3)),
    "text_config.model_type": (DENSE, dict(model_type="qwen3_5_moe_text")),
    "text_config.rope_parameters": (DENSE, dict(rope_parameters__rope_type="yarn")),
    "text_config.eos_token_id": (DENSE, dict(eos_token_id=248320)),
    "text_config.num_experts": (DENSE, dict(num_experts=8)),
    "text_config.norm_topk_prob": (MIXTURE, dict(norm_topk_prob=False)),
    "text_config.mlp_only_layers": (MIXTURE, dict(mlp_only_layers=[1])),
    "text_config.decoder_sparse_step": (MIXTURE, dict(decoder_sparse_step=2)),
    "text_config.rope_parameters.rope_theta": (MIXTURE, dict(rope_parameters__rope_theta=-1.0)),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name(key):
    d, change = REFUSED[key]
    assert any(p.startswith(key + " ") for p in problems(changed(d, **change))), problems(changed(d, **change))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_that_counts_is_refused_by_name(name):
    """A value of no type that any of them takes; those that a file of its kind must not have, too."""
    d = PUBLISHED[name]
    prefix = "text_config." if "text_config" in d else ""
    of_ropes = {"rope_parameters": {}} if d is NEXT else {}
    for key in (k for k, use in KEYS.items() if use == USED and not k.startswith("rope_")):
        where = f"outer__{key}" if key == "tie_word_embeddings" and prefix else key
        found = problems(changed(d, **{where: {"x": 1}}))
        assert any(p.startswith(f"{'' if 'outer' in where else prefix}{key} ") for p in found), (key, found)
    for key in ("rope_type", "rope_theta", "partial_rotary_factor"):
        found = problems(changed(d, **of_ropes | {f"rope_parameters__{key}": {"x": 1}}))
        assert any(p.startswith(f"{prefix}rope_parameters") for p in found), (key, found)


@pytest.mark.parametrize("change, says", [
    (dict(rope_theta=5e6, rope_parameters=dict(rope_theta=1e7)),
     "rope_theta is 5000000.0; it contradicts rope_parameters.rope_theta, which says 10000000.0"),
    (dict(partial_rotary_factor=0.3),
     "partial_rotary_factor is 0.3; of a head_dim of 256 it rotates 76 dims; they must be even, and at least 2"),
    (dict(layer_types=None, full_attention_interval=None),
     "layer_types is missing; it, or full_attention_interval, must say which layers are which"),
    (dict(rope_scaling={"factor": 4.0}), 'rope_scaling is {"factor": 4.0}; only a rope_type of "default" is supported'),
    (dict(num_attention_heads=15), "num_attention_heads is 15; it must be a multiple of num_key_value_heads, 2"),
    (dict(linear_num_value_heads=24),
     "linear_num_value_heads is 24; it must be a multiple of linear_num_key_heads, 16"),
    (dict(partial_rotary_factor=None), "partial_rotary_factor is missing; it must be a number > 0 and at most 1"),
])
def test_what_contradicts(change, says):
    if "even" in says:
        change = dict(head_dim=250, partial_rotary_factor=0.3)
        says = says.replace("256", "250").replace("76", "75")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert problems(changed(NEXT, **change)) == [says]


def test_all_problems_at_once():
    found = problems(changed(DENSE, "hidden_size", attention_bias=True, head_dim=-1))
    assert [p.split()[0] for p in found] == [f"text_config.{k}" for k in ("attention_bias", "hidden_size", "head_dim")]
    assert len(problems(changed(NEXT, num_hidden_layers=-3))) == 1
    assert problems({"model_type": "qwen3_5"}) == ["text_config is missing; it must hold the config of the text model"]


def test_a_type_that_is_not_known_is_the_only_problem():
    for kind in ("qwen2", ["qwen3_next"], 3, {}):
        found = problems({"model_type": kind})
        assert len(found) == 1 and '"kimi_linear" or "kimi_k3" or "qwen3_next" or ' in found[0]


def test_unknown_keys_are_one_warning():
    with pytest.warns(UserWarning) as seen:
        Config.from_dict(changed(DENSE, outer__zeta=1, eta=2, rope_parameters__factor=3))
    assert [str(w.message) for w in seen] == [
        "config: unknown keys, ignored: text_config.eta, text_config.rope_parameters.factor, zeta"]


def test_any_value_anywhere_gives_a_config_or_its_error():
    """Random values at random keys: nothing but ConfigError is raised, and what is read round-trips."""
    values = [None, 0, 1, -1, 3, 4, 2**40, 10**400, 1.5, float("nan"), float("inf"), True, False, "", "x",
              [], [1], [[1]], [None], ["full_attention"], {}, "default"]
    rng, got = random.Random(0), 0
    for _ in range(2000):
        d = copy.deepcopy(rng.choice([NEXT, DENSE, MIXTURE]))
        text = d.get("text_config", d)
        places = [(KEYS, text), (OUTER_KEYS, d), (ROPE_KEYS, text.setdefault("rope_parameters", {}))]
        for _ in range(rng.choice([1, 1, 2, 4])):
            keys, where = rng.choice(places)
            where[rng.choice(list(keys))] = rng.choice(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                c = Config.from_dict(d)
        except ConfigError:
            continue
        assert Config.from_dict(c.to_dict()) == c
        got += 1
    assert 0 < got < 2000
