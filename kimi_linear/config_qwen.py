"""config.json of Qwen3-Next and Qwen3.5 to the fields of Config, and back.

Read are the published forms (``full_attention_interval``, rotary keys at the top) and what transformers 5.23 saves
(``layer_types``, ``rope_parameters``); what is said twice must agree. A vision-language file holds the text model in
``text_config``: that counts, and special tokens are taken from around it where it has none. Tied embeddings are the
whole model's, so what is said around it counts first, as in transformers, which writes a false inside by default.
Rotary sections (``mrope_section``) change nothing for text, whose three positions are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .config_reader import (
    INERT,
    INERT_ANYWHERE,
    MOST_EXPERTS,
    MOST_LAYERS,
    USED,
    WIDEST_CONV,
    Reader,
    common,
    eos_of,
    experts_fit,
    own_keys,
)


class Kind(NamedTuple):
    """What a model_type settles: the class that transformers has, how the delta net's inputs are stored, the limits of
    num_experts, and values that some keys must have."""

    architecture: str
    gdn_inputs: str
    experts: Mapping[str, int]
    only: Mapping[str, tuple]


KINDS = {
    "qwen3_next": Kind("Qwen3NextForCausalLM", "grouped", dict(least=0), {}),
    "qwen3_5_text": Kind("Qwen3_5ForCausalLM", "split", dict(least=0, default=0), {"num_experts": (0,)}),
    "qwen3_5_moe_text": Kind("Qwen3_5MoeForCausalLM", "split", dict(least=1), {
        "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}),
}

#: model_type of a vision-language file -> that of its text_config.
WRAPPERS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}

#: Every known key: "used" ones shape the model or are checked, "inert" ones change no result.
KEYS: dict[str, str] = {
    **dict.fromkeys([
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act",
        "rms_norm_eps", "latent_eps", "l2_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "max_position_embeddings", "layer_types", "full_attention_interval", "num_attention_heads",
        "num_key_value_heads", "head_dim", "attention_bias", "attn_output_gate", "rope_theta",
        "partial_rotary_factor", "rope_parameters", "rope_scaling", "use_sliding_window", "linear_num_key_heads",
        "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
        "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "quantization_config", "gdn_tiled",
        "norm_plus_one",
    ], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "sliding_window", "max_window_layers", "mamba_ssm_dtype", "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
    ], INERT),
}

#: The keys inside rope_parameters, or inside rope_scaling in older files.
ROPE_KEYS: dict[str, str] = {
    **dict.fromkeys(["rope_type", "type", "rope_theta", "partial_rotary_factor"], USED),
    **dict.fromkeys(["mrope_section", "mrope_interleaved"], INERT),
}

#: The keys around a text_config; those of INHERITED count where it has none, TIED in any case.
TIED = "tie_word_embeddings"
INHERITED = (TIED, "bos_token_id", "eos_token_id", "pad_token_id")
OUTER_KEYS: dict[str, str] = {
    **dict.fromkeys(["model_type", "text_config", "quantization_config", *INHERITED], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "language_model_only",
    ], INERT),
}

#: Known keys of which only these values are supported (none: only null). Absent and null are the first.
ONLY: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    "use_sliding_window": (False,),
    "quantization_config": (),
}

MIXERS = {"linear_attention": "gdn", "full_attention": "attn"}


def read(d: Mapping[str, Any]) -> tuple[dict[str, Any], Reader]:
    """The fields of a Config, ``layers`` as (mixer, ffn) pairs, and the reader that knows what is wrong with them."""
    kind = WRAPPERS.get(d["model_type"], d["model_type"])
    r, found = _reader(d, kind)
    if not found:
        return {}, r
    r.only(ONLY | {"model_type": (kind,)} | dict(KINDS[kind].only))
    n = r.integer("num_hidden_layers", most=MOST_LAYERS)
    n_experts = r.integer("num_experts", most=MOST_EXPERTS, **KINDS[kind].experts)
    whole = not r.failed
    experts_fit(r, n, n_experts)
    mixers, ffns = (_mixers(r, n), _ffns(r, n, n_experts)) if whole else ([], [])
    fields = dict(model_type=kind, n_layers=n, n_experts=n_experts, layers=list(zip(mixers, ffns)))
    fields |= common(r)
    fields |= _gdn(r, "gdn" in mixers)
    fields |= _attn(r, "attn" in mixers)
    fields |= dict(ffn_size=r.needed("intermediate_size", "dense" in ffns))
    fields |= _moe(r, n_experts, "moe" in ffns)
    return fields | dict(
        gdn_inputs=KINDS[kind].gdn_inputs, norm_plus_one=r.flag("norm_plus_one", True), router_bias=False,
        moe_names="mlp"), r


def _reader(d: Mapping[str, Any], kind: str) -> tuple[Reader, bool]:
    """Of the text model, wherever it is, and whether it is there."""
    inner = {"rope_parameters": ROPE_KEYS, "rope_scaling": ROPE_KEYS}
    if d["model_type"] == kind:
        return Reader(d, KEYS, inner), True
    around = Reader(d, OUTER_KEYS)
    around.only({"quantization_config": ()})
    if around.get("text_config") is None:
        around.missing("text_config", "it must hold the config of the text model")
    text = around.object("text_config")
    if text is None:
        return around, False
    if around.get(TIED) is not None:
        text = {key: value for key, value in text.items() if key != TIED}
    return Reader(text, KEYS, inner, ("text_config", around, INHERITED)), True


def _mixers(r: Reader, n: int) -> list[str]:
    """The mixer of each layer: named, or attention where (l + 1) mod full_attention_interval = 0."""
    named = r.names("layer_types", n, tuple(MIXERS))
    interval = r.get("full_attention_interval")
    if interval is None:
        if named is None and r.get("layer_types") is None:
            r.missing("layer_types", "it, or full_attention_interval, must say which layers are which")
        return [MIXERS[x] for x in named or ["linear_attention"] * n]
    interval = r.integer("full_attention_interval")
    ruled = ["gdn" if (i + 1) % interval else "attn" for i in range(n)]
    if "full_attention_interval" not in r.failed and named is not None and [MIXERS[x] for x in named] != ruled:
        r.problem("layer_types", named, f"it contradicts full_attention_interval, which says {interval}")
    return ruled


def _ffns(r: Reader, n: int, n_experts: int) -> list[str]:
    """The feed-forward of each layer: MoE where (l + 1) mod decoder_sparse_step = 0 and l is not listed as dense."""
    every = r.integer("decoder_sparse_step", default=1)
    dense = set(r.integers("mlp_only_layers", MOST_LAYERS) or ())
    for i in sorted(dense - set(range(n)))[:1]:
        r.problem("mlp_only_layers", i, f"it must list layers from 0 to {n - 1}")
    return ["moe" if n_experts and i not in dense and (i + 1) % every == 0 else "dense" for i in range(n)]


def _gdn(r: Reader, occurs: bool) -> dict[str, Any]:
    k_heads = r.needed("linear_num_key_heads", occurs)
    v_heads = r.needed("linear_num_value_heads", occurs)
    if occurs and v_heads % k_heads and not r.failed & {"linear_num_key_heads", "linear_num_value_heads"}:
        r.problem("linear_num_value_heads", v_heads, f"it must be a multiple of linear_num_key_heads, {k_heads}")
    return dict(
        gdn_k_heads=k_heads, gdn_v_heads=v_heads, gdn_k_dim=r.needed("linear_key_head_dim", occurs),
        gdn_v_dim=r.needed("linear_value_head_dim", occurs),
        conv_width=r.needed("linear_conv_kernel_dim", occurs, most=WIDEST_CONV), gdn_tiled=r.flag("gdn_tiled", False))


def _attn(r: Reader, occurs: bool) -> dict[str, Any]:
    heads = r.needed("num_attention_heads", occurs)
    kv_heads = r.needed("num_key_value_heads", occurs)
    if occurs and heads % kv_heads and not r.failed & {"num_attention_heads", "num_key_value_heads"}:
        r.problem("num_attention_heads", heads, f"it must be a multiple of num_key_value_heads, {kv_heads}")
    width = r.needed("head_dim", occurs)
    return dict(attn_heads=heads, attn_kv_heads=kv_heads, attn_head_dim=width) | _rotary(r, width, occurs)


def _rotary(r: Reader, width: int, occurs: bool) -> dict[str, Any]:
    for place, unsaid in (("rope_parameters", "default"), ("rope_scaling", None)):
        given = r.get(f"{place}.rope_type", r.get(f"{place}.type", unsaid))
        if given != "default" and r.inner[place]:
            r.problem(place, r.get(place), 'only a rope_type of "default" is supported')
    base = _rope_number(r, "rope_theta", occurs, 10000.0, "it must be a finite number > 0", lambda x: x > 0)
    rule = "it must be a number > 0 and at most 1"
    factor = _rope_number(r, "partial_rotary_factor", occurs, 0.0, rule, lambda x: 0 < x <= 1)
    rotary = int(width * factor)
    if occurs and factor and "head_dim" not in r.failed and (rotary % 2 or not rotary):
        r.problem(_rope_key(r, "partial_rotary_factor"), factor,
                  f"of a head_dim of {width} it rotates {rotary} dims; they must be even, and at least 2")
    return dict(rope_base=base, rotary_dim=rotary)


def _rope_key(r: Reader, key: str) -> str:
    """Where a number of the rotation is: inside an object, or at the top."""
    places = [f"rope_parameters.{key}", f"rope_scaling.{key}"]
    return next((place for place in places if r.get(place) is not None), key)


def _rope_number(r: Reader, key: str, needed: bool, otherwise: float, rule: str, test) -> float:
    """A number that each of its places, where it is given at all, must give alike; 0 or `otherwise` if it is wrong."""
    where = _rope_key(r, key)
    if not needed and r.get(where) is None:
        return otherwise
    value = r.number(where, rule=rule, test=test)
    for other in (f"rope_scaling.{key}", key):
        if other != where:
            r.agrees(other, value, where)
    return value if where not in r.failed else otherwise


def _moe(r: Reader, n_experts: int, occurs: bool) -> dict[str, Any]:
    k, size = r.needed("num_experts_per_tok", occurs), r.needed("moe_intermediate_size", occurs)
    if occurs and k > n_experts:
        r.problem("num_experts_per_tok", k, f"it must be at most num_experts, {n_experts}")
    default = None if occurs else 0
    shared = r.integer("shared_expert_intermediate_size", least=0, default=default)
    renormalise = r.flag("norm_topk_prob", True)
    if not n_experts:                                     # whatever the rest says
        k, size, shared, renormalise = 0, 0, 0, True
    return dict(
        experts_per_token=k, moe_size=size, n_shared_experts=int(shared > 0), shared_size=shared,
        shared_gated=shared > 0, n_groups=1, top_groups=1, renormalise=renormalise, routed_scale=1.0,
        router_function="softmax")


#: How a folder's weights are stored, as fields of Config.
PUBLISHED = {"gdn_tiled": False, "norm_plus_one": True}


def to_dict(config) -> dict[str, Any]:
    """The form that transformers 5.23 saves of the text model alone.

    ``gdn_tiled`` and ``norm_plus_one`` are keys of ours, written where weights are stored as GGUF files have them.
    """
    c, kind = config, KINDS[config.model_type]
    words = {mixer: word for word, mixer in MIXERS.items()}
    d = {
        "architectures": [kind.architecture], "model_type": c.model_type, "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "num_hidden_layers": c.n_layers, "intermediate_size": c.ffn_size,
        "hidden_act": "silu", "rms_norm_eps": c.rms_norm_eps, "layer_types": [words[s.mixer] for s in c.layers],
        "linear_num_key_heads": c.gdn_k_heads, "linear_num_value_heads": c.gdn_v_heads,
        "linear_key_head_dim": c.gdn_k_dim, "linear_value_head_dim": c.gdn_v_dim,
        "linear_conv_kernel_dim": c.conv_width, "num_attention_heads": c.attn_heads,
        "num_key_value_heads": c.attn_kv_heads, "head_dim": c.attn_head_dim, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base} | _factor(c),
        "max_position_embeddings": c.max_length, "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_token_id, "eos_token_id": eos_of(c), "pad_token_id": c.pad_token_id,
    }
    d |= own_keys(c, **PUBLISHED)
    if not c.n_experts:
        return d | ({"num_experts": 0} if kind.experts.get("default") is None else {})
    d |= {
        "num_experts": c.n_experts, "num_experts_per_tok": c.experts_per_token, "moe_intermediate_size": c.moe_size,
        "shared_expert_intermediate_size": c.shared_size, "norm_topk_prob": c.renormalise,
    }
    dense = [i for i, s in enumerate(c.layers) if s.ffn == "dense"]
    return d | ({} if "mlp_only_layers" in kind.only else {"decoder_sparse_step": 1, "mlp_only_layers": dense})


def _factor(c) -> dict[str, float]:
    """The partial_rotary_factor of which head_dim, rounded down, gives rotary_dim."""
    if not c.rotary_dim:
        return {}
    factor = c.rotary_dim / c.attn_head_dim
    return {"partial_rotary_factor": factor if int(c.attn_head_dim * factor) == c.rotary_dim
            else math.nextafter(factor, 1.0)}
