"""config.json of Kimi-Linear and Kimi K3 to the fields of Config, and back.

Two forms are read: as published (``first_k_dense_replace``, ``moe_layer_freq``, layer lists inside
``linear_attn_config``) and as transformers 5.23 saves it (``mlp_layer_types``, ``layer_types`` beside the
lists). What one form says twice must agree. Layer patterns come from the lists alone, which count from 1; no
period is ever assumed.

Kimi K3 sees, too: its file has the text model in ``text_config``, which calls itself ``kimi_linear``; written is the
text model alone, as ``kimi_k3``. What K3 has and the 48B model has not is a key each, and any of them may stand alone:
SiTU, attention residuals, experts on a latent, a gate on the output of MLA, an output gate of full rank in KDA, a
bounded decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_reader import (
    INERT,
    INERT_ANYWHERE,
    LARGEST,
    MOST_EXPERTS,
    MOST_LAYERS,
    USED,
    WIDEST_CONV,
    Reader,
    common,
    eos_of,
    experts_fit,
    own_keys,
    short,
)

#: Every known key: "used" ones shape the model or are checked, "inert" ones change no result.
KEYS: dict[str, str] = {
    **dict.fromkeys([
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act",
        "rms_norm_eps", "latent_eps", "l2_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "model_max_length", "max_position_embeddings", "linear_attn_config", "layer_types", "linear_head_dim",
        "linear_num_heads", "linear_conv_kernel_dim", "num_attention_heads", "num_key_value_heads",
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim",
        "mla_use_nope", "rope_scaling", "attention_bias", "num_experts", "num_experts_per_token",
        "num_shared_experts", "moe_intermediate_size", "moe_router_activation_func", "moe_renormalize",
        "routed_scaling_factor", "use_grouped_topk", "num_expert_group", "topk_group",
        "first_k_dense_replace", "moe_layer_freq", "mlp_layer_types", "num_nextn_predict_layers",
        "topk_method", "quantization_config", "allow_neg_eigval", "use_full_rank_gate", "mla_use_output_gate",
        "attn_res_block_size", "routed_expert_hidden_size", "latent_moe_use_norm", "activation_situ_beta",
        "activation_situ_linear_beta",
    ], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "head_dim", "rope_theta", "rope_parameters", "pretraining_tp", "aux_loss_alpha", "seq_aux",
    ], INERT),
}

#: The keys inside linear_attn_config.
LINEAR_KEYS: dict[str, str] = dict.fromkeys(
    ["head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers", "gate_lower_bound",
     "use_full_rank_gate"], USED)

#: model_type of a file that sees, too, and the keys around its text_config; those of INHERITED count where it has none.
K3 = "kimi_k3"
INHERITED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
OUTER_KEYS: dict[str, str] = {
    **dict.fromkeys(["model_type", "text_config", *INHERITED], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "vision_config", "media_placeholder_token_id", "image_token_id", "video_token_id", "ignore_index",
        "use_unified_vision_chunk", "video_placeholder", "image_placeholder",
    ], INERT),
}

ARCHITECTURES = {"kimi_linear": "KimiLinearForCausalLM", K3: "KimiK3ForConditionalGeneration"}

#: How the experts' matrices may be stored in a folder: by compressed-tensors' name of the format.
MXFP4 = "mxfp4-pack-quantized"

#: Known keys of which only these values are supported (none: only null). Absent and null are the first.
ONLY: dict[str, tuple] = {
    "model_type": ("kimi_linear", K3),
    "hidden_act": ("silu", "swish", "situ"),
    "mla_use_nope": (True,),
    "rope_scaling": (),
    "attention_bias": (False,),
    "num_nextn_predict_layers": (0,),
    "topk_method": ("noaux_tc",),
    "allow_neg_eigval": (False,),
}

ROUTER_FUNCTIONS = ("sigmoid", "softmax")

#: How a folder's weights are stored, as fields of Config: a GGUF changes nothing of them.
PUBLISHED: dict[str, Any] = {}


def read(d: Mapping[str, Any]) -> tuple[dict[str, Any], Reader]:
    """The fields of a Config, ``layers`` as (mixer, ffn) pairs, and the reader that knows what is wrong with them."""
    r, found = _reader(d)
    if not found:
        return {}, r
    r.only(ONLY)
    n = r.integer("num_hidden_layers", most=MOST_LAYERS)
    n_experts = r.integer("num_experts", least=0, most=MOST_EXPERTS, default=0)
    whole = not r.failed
    experts_fit(r, n, n_experts)
    mixers, ffns = (_mixers(r, n), _ffns(r, n, n_experts)) if whole else ([], [])
    fields = dict(model_type=_model_type(d), n_layers=n, n_experts=n_experts, layers=list(zip(mixers, ffns)))
    fields |= common(r)
    fields |= _situ(r)
    fields |= _kda(r, "kda" in mixers)
    fields |= _mla(r, "mla" in mixers)
    fields |= dict(
        ffn_size=r.needed("intermediate_size", "dense" in ffns),
        attn_res_block=r.integer("attn_res_block_size", least=0, most=MOST_LAYERS, default=0))
    _check_packing(r)
    return fields | _moe(r, n_experts, "moe" in ffns), r


def _model_type(d: Mapping[str, Any]) -> str:
    return K3 if d.get("model_type") == K3 else "kimi_linear"


def _reader(d: Mapping[str, Any]) -> tuple[Reader, bool]:
    """Of the text model, wherever it is, and whether it is there."""
    inner = {"linear_attn_config": LINEAR_KEYS}
    if "text_config" not in d:
        return Reader(d, KEYS, inner), True
    around = Reader(d, OUTER_KEYS)
    around.only({"model_type": (K3,)})
    if around.get("text_config") is None:
        around.missing("text_config", "it must hold the config of the text model")
    text = around.object("text_config")
    return (around, False) if text is None else (Reader(text, KEYS, inner, ("text_config", around, INHERITED)), True)


def _check_packing(r: Reader) -> None:
    """Matrices of a folder may be MXFP4, which their names tell; nothing else."""
    told = r.object("quantization_config")
    if told is not None and told.get("format") != MXFP4:
        r.problem("quantization_config", told, f"its format must be {MXFP4}, or it must be null")


def _situ(r: Reader) -> dict[str, Any]:
    """The activation of feed-forwards: SwiGLU, or SiTU with its two bounds."""
    if r.get("hidden_act") != "situ":
        return {}
    bound = dict(rule="it must be a finite number > 0", test=lambda x: x > 0)
    linear = r.get("activation_situ_linear_beta")
    return dict(
        situ_beta=r.number("activation_situ_beta", **bound),
        situ_linear_beta=None if linear is None else r.number("activation_situ_linear_beta", **bound))


def to_dict(config) -> dict[str, Any]:
    """The published form; ``mlp_layer_types`` in place of two keys where dense layers are no prefix."""
    linear = {
        "head_dim": config.kda_head_dim, "num_heads": config.kda_heads,
        "short_conv_kernel_size": config.conv_width,
        "kda_layers": [i + 1 for i, s in enumerate(config.layers) if s.mixer == "kda"],
        "full_attn_layers": [i + 1 for i, s in enumerate(config.layers) if s.mixer == "mla"],
    }
    if config.gate_lower_bound is not None:
        linear["gate_lower_bound"] = config.gate_lower_bound
    if config.kda_full_rank_gate:
        linear["use_full_rank_gate"] = True
    d = {
        "architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type,
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.n_layers, "intermediate_size": config.ffn_size,
        "hidden_act": "silu" if config.situ_beta is None else "situ", "rms_norm_eps": config.rms_norm_eps,
        "num_attention_heads": config.mla_heads, "num_key_value_heads": config.mla_heads,
        "linear_attn_config": linear, "q_lora_rank": config.q_rank or None, "kv_lora_rank": config.kv_rank,
        "qk_nope_head_dim": config.nope_dim, "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.v_head_dim, "mla_use_nope": True, "rope_scaling": None,
        "model_max_length": config.max_length,
        "num_experts": config.n_experts, "num_experts_per_token": config.experts_per_token,
        "num_shared_experts": config.n_shared_experts, "moe_intermediate_size": config.moe_size,
        "moe_router_activation_func": config.router_function, "moe_renormalize": config.renormalise,
        "routed_scaling_factor": config.routed_scale, "use_grouped_topk": True,
        "num_expert_group": config.n_groups, "topk_group": config.top_groups, "num_nextn_predict_layers": 0,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_of(config),
        "pad_token_id": config.pad_token_id,
    }
    d |= own_keys(config) | _k3_keys(config)
    n_dense = sum(s.ffn == "dense" for s in config.layers)
    if all(s.ffn == "dense" for s in config.layers[:n_dense]):
        d["first_k_dense_replace"], d["moe_layer_freq"] = n_dense, 1
    else:
        d["mlp_layer_types"] = ["dense" if s.ffn == "dense" else "sparse" for s in config.layers]
    return d


def _k3_keys(config) -> dict[str, Any]:
    """The keys of what only K3 has, where the model has it."""
    keys = {
        "activation_situ_beta": config.situ_beta, "activation_situ_linear_beta": config.situ_linear_beta,
        "mla_use_output_gate": config.mla_gated, "attn_res_block_size": config.attn_res_block,
        "routed_expert_hidden_size": config.expert_latent, "latent_moe_use_norm": config.expert_latent_norm,
    }
    return {key: value for key, value in keys.items() if value}


def _mixers(r: Reader, n: int) -> list[str]:
    """The mixer of each layer, from the two lists (or layer_types where there are no lists)."""
    words = {"linear_attention": "kda", "full_attention": "mla"}
    named = r.names("layer_types", n, tuple(words))
    spoken = None if named is None else [words[x] for x in named]
    kda_key, full_key = "linear_attn_config.kda_layers", "linear_attn_config.full_attn_layers"
    if r.get(kda_key) is None and r.get(full_key) is None:
        if spoken is None and r.get("layer_types") is None:
            r.problems.append(f"{kda_key} and {full_key} are missing; they must list the layers, from 1")
        return spoken or ["kda"] * n
    kda, full = r.integers(kda_key, MOST_LAYERS), r.integers(full_key, MOST_LAYERS)
    if kda is None and r.get(kda_key) is not None or full is None and r.get(full_key) is not None:
        return ["kda"] * n
    kda, full = kda or [], full or []
    if sorted(kda + full) != list(range(1, n + 1)):
        r.problems.append(
            f"{kda_key} {short(kda)} and full_attn_layers {short(full)} are not a partition of the layers "
            f"1..{n}; each layer must be in one of them, once")
        return ["kda"] * n
    is_kda = set(kda)
    mixers = ["kda" if i in is_kda else "mla" for i in range(1, n + 1)]
    if spoken is not None and spoken != mixers:
        r.problem("layer_types", named, "it contradicts the lists of linear_attn_config")
    return mixers


def _ffns(r: Reader, n: int, n_experts: int) -> list[str]:
    """The feed-forward of each layer: MoE where l >= first_k_dense_replace and l mod moe_layer_freq = 0."""
    first = r.integer("first_k_dense_replace", least=0, default=0)
    every = r.integer("moe_layer_freq", default=1)
    ruled = ["moe" if n_experts and i >= first and i % every == 0 else "dense" for i in range(n)]
    words = {"dense": "dense", "sparse": "moe"}
    named = r.names("mlp_layer_types", n, tuple(words))
    if named is None:
        return ruled
    ffns = [words[x] for x in named]
    if "moe" in ffns and not n_experts:
        r.problem("num_experts", r.get("num_experts"), "mlp_layer_types has sparse layers; it must be >= 1")
    if (r.get("first_k_dense_replace") is not None or r.get("moe_layer_freq") is not None) and ffns != ruled:
        r.problem("mlp_layer_types", named, "it contradicts first_k_dense_replace and moe_layer_freq")
    return ffns


def _kda(r: Reader, occurs: bool) -> dict[str, Any]:
    inner = "linear_attn_config."
    names = dict(kda_heads=("num_heads", "linear_num_heads"), kda_head_dim=("head_dim", "linear_head_dim"),
                 conv_width=("short_conv_kernel_size", "linear_conv_kernel_dim"))
    fields: dict[str, Any] = {}
    for field, (published, beside) in names.items():
        most = WIDEST_CONV if field == "conv_width" else LARGEST
        key = inner + published if r.get(inner + published) is not None or r.get(beside) is None else beside
        fields[field] = r.needed(key, occurs, most=most)
        if key != beside:
            r.agrees(beside, fields[field], key)
    bound = r.get(inner + "gate_lower_bound")
    fields["gate_lower_bound"] = None if bound is None else r.number(
        inner + "gate_lower_bound", rule="it must be a finite number < 0 (nats per token)",
        test=lambda x: x < 0)
    full = "use_full_rank_gate"
    fields["kda_full_rank_gate"] = r.flag(inner + full, r.flag(full, False))
    if r.get(full) is not None:
        r.agrees(full, fields["kda_full_rank_gate"], inner + full)
    return fields


def _mla(r: Reader, occurs: bool) -> dict[str, Any]:
    heads = r.needed("num_attention_heads", occurs)
    kv_heads = r.get("num_key_value_heads")
    if occurs and kv_heads not in (None, heads, 1):           # 1: the latent taken as a single key head
        r.problem("num_key_value_heads", kv_heads, f"it must be num_attention_heads, {heads}")
    nope, rope = r.needed("qk_nope_head_dim", occurs), r.integer("qk_rope_head_dim", least=0, default=0)
    if occurs:
        r.agrees("qk_head_dim", nope + rope, "qk_nope_head_dim + qk_rope_head_dim")
    return dict(
        mla_heads=heads, nope_dim=nope, rope_dim=rope, v_head_dim=r.needed("v_head_dim", occurs),
        kv_rank=r.needed("kv_lora_rank", occurs), q_rank=r.integer("q_lora_rank", least=0, default=0),
        mla_gated=r.flag("mla_use_output_gate", False))


def _moe(r: Reader, n_experts: int, occurs: bool) -> dict[str, Any]:
    k, size = r.needed("num_experts_per_token", occurs), r.needed("moe_intermediate_size", occurs)
    groups, top = r.integer("num_expert_group", default=1), r.integer("topk_group", default=1)
    function = r.get("moe_router_activation_func", "sigmoid")
    if function not in ROUTER_FUNCTIONS:
        r.problem("moe_router_activation_func", function, "only sigmoid or softmax is supported")
    if top > groups:
        r.problem("topk_group", top, f"it must be at most num_expert_group, {groups}")
    if not r.flag("use_grouped_topk", True) and groups > 1:
        r.problem("use_grouped_topk", False, f"it contradicts num_expert_group, which says {groups}")
    if occurs and n_experts % groups:
        r.problem("num_expert_group", groups, f"it must divide num_experts, {n_experts}")
    elif occurs and k > n_experts // groups * min(top, groups):
        r.problem("num_experts_per_token", k, f"it must be at most {n_experts // groups * min(top, groups)}, "
                  f"the experts of {min(top, groups)} of {groups} groups")
    n_shared = r.integer("num_shared_experts", least=0, default=0)
    latent = r.integer("routed_expert_hidden_size", least=0, default=0)
    return dict(
        expert_latent=latent, expert_latent_norm=r.flag("latent_moe_use_norm", False) and latent > 0,
        experts_per_token=k, moe_size=size, n_shared_experts=n_shared, shared_size=n_shared * size,
        n_groups=groups, top_groups=top, renormalise=r.flag("moe_renormalize", True),
        routed_scale=r.number("routed_scaling_factor", default=1.0, rule="it must be a finite number",
                              test=lambda x: True),
        router_function=function)
