"""config.json of GLM-5.3-Flash to the fields of Config, and back.

Two forms are read: as published (``linear_attn_config``, ``first_k_dense_replace``, and ``deepseek_sparse_attention``
among ``layer_types``) and as transformers 5.23 saves it (``indexed_attention`` in its place, keys that begin with
``linear_``). A file that sees has the text model in ``text_config``; that counts, and special tokens are taken from
around it where it has none. Written is the text model alone, as ``glm5_next_text``. Source: Hugging Face transformers,
model glm5_next; of the published keys llama.cpp's converters, which check them (docs/gguf.md#glm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

#: model_type of the text model, and of a file that sees.
TEXT, WRAPPER = "glm5_next_text", "glm5_next"

#: Every known key: "used" ones shape the model or are checked, "inert" ones change no result.
KEYS: dict[str, str] = {
    **dict.fromkeys([
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act",
        "rms_norm_eps", "latent_eps", "l2_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "max_position_embeddings", "layer_types", "mlp_layer_types", "first_k_dense_replace", "linear_attn_config",
        "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim", "linear_lower_bound", "num_attention_heads",
        "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim",
        "v_head_dim", "mla_use_nope", "attention_bias", "index_n_heads", "index_head_dim", "index_topk", "index_kpool",
        "index_kpool_always_select_tail", "index_kpool_compress", "indexer_types", "index_topk_freq",
        "index_topk_pattern", "index_eps", "mhc", "moe_router_dtype", "hc_mult", "hc_eps", "hc_sinkhorn_iters",
        "swiglu_limit", "n_routed_experts", "num_local_experts", "num_experts_per_tok",
        "n_shared_experts", "moe_intermediate_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
        "scoring_func", "topk_method", "moe_layer_freq", "rope_scaling", "quantization_config",
    ], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "head_dim", "rope_theta", "rope_parameters", "index_skip_topk_offset", "num_nextn_predict_layers", "ep_size",
        "pretraining_tp", "aux_loss_alpha", "seq_aux", "indexer_rope_interleave", "partial_rotary_factor",
        "index_share_for_mtp_iteration",
    ], INERT),
}

#: The keys inside linear_attn_config.
LINEAR_KEYS: dict[str, str] = dict.fromkeys(
    ["head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers", "gate_lower_bound",
     "safe_gate", "use_full_rank_gate"], USED)

#: The keys around a text_config; those of INHERITED count where it has none.
INHERITED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
OUTER_KEYS: dict[str, str] = {
    **dict.fromkeys(["model_type", "text_config", *INHERITED], USED),
    **INERT_ANYWHERE,
    **dict.fromkeys([
        "vision_config", "image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id",
        "video_start_token_id", "video_end_token_id",
    ], INERT),
}

#: Known keys of which only these values are supported (none: only null). Absent and null are the first.
ONLY: dict[str, tuple] = {
    "model_type": (TEXT,),
    "hidden_act": ("silu", "swish"),
    "qk_rope_head_dim": (0,),
    "mla_use_nope": (True,),
    "attention_bias": (False,),
    "index_kpool_always_select_tail": (True,),
    "index_kpool_compress": (True,),
    "index_topk_freq": (1,),
    "index_topk_pattern": (),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_scaling": (),
    "mhc": (True,),
    "moe_router_dtype": ("float32",),
    "linear_attn_config.use_full_rank_gate": (False,),
}

#: What transformers takes where a file says nothing.
BOUND, STREAMS, PASSES, STREAM_EPS, LIMIT, POOL, TOPK, SCALE = -5.0, 4, 20, 1e-6, 10.0, 16, 2048, 2.5
INDEX_EPS = 1e-6              # of the norm of the indexer's keys, which no published key tells

#: How a folder's weights are stored, as fields of Config: a GGUF changes nothing of them.
PUBLISHED: dict[str, Any] = {}


def read(d: Mapping[str, Any]) -> tuple[dict[str, Any], Reader]:
    """The fields of a Config, ``layers`` as (mixer, ffn) pairs, and the reader that knows what is wrong with them."""
    r, found = _reader(d)
    if not found:
        return {}, r
    r.only(ONLY)
    if (packed := r.get("quantization_config")) is not None:
        r.problem("quantization_config", packed, "weights in FP8 and other packed types are not read from a folder; "
                  "take the bfloat16 files, as GLM-5.3-Flash-BF16, or a GGUF")
    n = r.integer("num_hidden_layers", most=MOST_LAYERS)
    n_experts = _experts(r)
    whole = not r.failed
    experts_fit(r, n, n_experts)
    mixers, ffns = (_mixers(r, n), _ffns(r, n, n_experts)) if whole else ([], [])
    fields = dict(model_type=TEXT, n_layers=n, n_experts=n_experts, layers=list(zip(mixers, ffns)),
                  moe_names="mlp.plural")
    fields |= common(r)
    fields["latent_eps"] = r.number("latent_eps", default=fields["rms_norm_eps"])
    fields |= _kda(r, "kda" in mixers)
    fields |= _mla(r, "mla" in mixers)
    fields |= _streams(r)
    limit = r.get("swiglu_limit", LIMIT)
    fields["swiglu_limit"] = None if limit == 0 else r.number(
        "swiglu_limit", default=LIMIT, rule="it must be a finite number > 0, or 0 for none", test=lambda x: x > 0)
    fields["ffn_size"] = r.needed("intermediate_size", "dense" in ffns)
    return fields | _moe(r, n_experts, "moe" in ffns), r


def _reader(d: Mapping[str, Any]) -> tuple[Reader, bool]:
    """Of the text model, wherever it is, and whether it is there."""
    inner = {"linear_attn_config": LINEAR_KEYS}
    if d.get("model_type") != WRAPPER:
        return Reader(d, KEYS, inner), True
    around = Reader(d, OUTER_KEYS)
    if around.get("text_config") is None:
        around.missing("text_config", "it must hold the config of the text model")
    text = around.object("text_config")
    return (around, False) if text is None else (Reader(text, KEYS, inner, ("text_config", around, INHERITED)), True)


def to_dict(config) -> dict[str, Any]:
    """The text model as transformers saves it."""
    n = config.n_layers
    return {
        "architectures": ["Glm5NextForConditionalGeneration"], "model_type": TEXT, "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": n, "intermediate_size": config.ffn_size,
        "hidden_act": "silu", "rms_norm_eps": config.rms_norm_eps, "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_of(config), "pad_token_id": config.pad_token_id,
        "layer_types": ["linear_attention" if s.mixer == "kda" else "indexed_attention" for s in config.layers],
        "mlp_layer_types": ["dense" if s.ffn == "dense" else "sparse" for s in config.layers],
        "indexer_types": ["full"] * n,
        "linear_head_dim": config.kda_head_dim, "linear_num_heads": config.kda_heads,
        "linear_conv_kernel_dim": config.conv_width, "linear_lower_bound": config.gate_lower_bound,
        "num_attention_heads": config.mla_heads, "num_key_value_heads": config.mla_heads,
        "q_lora_rank": config.q_rank, "kv_lora_rank": config.kv_rank, "qk_nope_head_dim": config.nope_dim,
        "qk_rope_head_dim": 0, "v_head_dim": config.v_head_dim,
        "index_n_heads": config.index_heads, "index_head_dim": config.index_dim, "index_topk": config.index_topk,
        "index_kpool": config.index_pool, "index_kpool_always_select_tail": True,
        "hc_mult": config.streams, "hc_eps": config.stream_eps, "hc_sinkhorn_iters": config.stream_passes,
        "swiglu_limit": config.swiglu_limit or 0, "n_routed_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token, "n_shared_experts": config.n_shared_experts,
        "moe_intermediate_size": config.moe_size, "n_group": config.n_groups, "topk_group": config.top_groups,
        "norm_topk_prob": config.renormalise, "routed_scaling_factor": config.routed_scale,
    } | own_keys(config, latent_eps=config.rms_norm_eps, index_eps=INDEX_EPS)


def _experts(r: Reader) -> int:
    """n_routed_experts, or num_local_experts, as which some files have it."""
    key = "n_routed_experts" if r.get("n_routed_experts") is not None else "num_local_experts"
    n = r.integer(key, least=0, most=MOST_EXPERTS, default=0)
    r.agrees("num_local_experts", n, key)
    return n


def _mixers(r: Reader, n: int) -> list[str]:
    """The mixer of each layer: by layer_types, by the lists of linear_attn_config, or every fourth one of MLA."""
    words = {"linear_attention": "kda", "indexed_attention": "mla", "deepseek_sparse_attention": "mla",
             "full_attention": "mla"}
    named = r.names("layer_types", n, tuple(words))
    indexers = r.names("indexer_types", n, ("full",))
    if indexers is None and r.get("indexer_types") is not None:
        return ["kda"] * n
    listed = _listed(r, n)
    if named is not None:
        mixers = [words[x] for x in named]
        if listed is not None and listed != mixers:
            r.problem("layer_types", named, "it contradicts the lists of linear_attn_config")
        return mixers
    return listed or ["mla" if i % 4 == 3 else "kda" for i in range(n)]


def _listed(r: Reader, n: int) -> list[str] | None:
    """By kda_layers and full_attn_layers, which count from 0, or from 1 as Kimi's do; None where they are absent."""
    kda_key, full_key = "linear_attn_config.kda_layers", "linear_attn_config.full_attn_layers"
    kda, full = r.integers(kda_key, MOST_LAYERS), r.integers(full_key, MOST_LAYERS)
    if kda is None and full is None:
        return None
    both = sorted((kda or []) + (full or []))
    first = both[0] if both else 0
    if first not in (0, 1) or both != list(range(first, first + n)):
        r.problems.append(f"{kda_key} and full_attn_layers are not a partition of the layers 0..{n - 1}, or 1..{n}; "
                          f"each layer must be in one of them, once")
        return None
    return ["kda" if i + first in set(kda or []) else "mla" for i in range(n)]


def _ffns(r: Reader, n: int, n_experts: int) -> list[str]:
    """The feed-forward of each layer: the first three are dense where nothing else is said."""
    words = {"dense": "dense", "sparse": "moe"}
    named = r.names("mlp_layer_types", n, tuple(words))
    first = r.integer("first_k_dense_replace", least=0, default=3)
    ruled = ["moe" if n_experts and i >= first else "dense" for i in range(n)]
    ffns = ruled if named is None else [words[x] for x in named]
    if "moe" in ffns and not n_experts:
        r.problem("n_routed_experts", r.get("n_routed_experts"), "mlp_layer_types has sparse layers; it must be >= 1")
    if named is not None and r.get("first_k_dense_replace") is not None and ffns != ruled:
        r.problem("mlp_layer_types", named, "it contradicts first_k_dense_replace")
    return ffns


def _kda(r: Reader, occurs: bool) -> dict[str, Any]:
    inner = "linear_attn_config."
    names = dict(kda_heads=("num_heads", "linear_num_heads"), kda_head_dim=("head_dim", "linear_head_dim"),
                 conv_width=("short_conv_kernel_size", "linear_conv_kernel_dim"))
    fields: dict[str, Any] = {}
    for field, (published, beside) in names.items():
        most = {"most": WIDEST_CONV} if field == "conv_width" else {}
        key = inner + published if r.get(inner + published) is not None else beside
        fields[field] = r.needed(key, occurs, **most)
        if key != beside:
            r.agrees(beside, fields[field], key)
    return fields | {"gate_lower_bound": _bound(r, inner)}


def _bound(r: Reader, inner: str) -> float | None:
    """The bound of the decay: -5 where a file has no word of it, none where it says null and no safe gate."""
    safe = r.flag(inner + "safe_gate", True)
    key = inner + "gate_lower_bound" if r.get(inner + "gate_lower_bound") is not None else "linear_lower_bound"
    said_none = key in r.d and r.d[key] is None
    if r.get(key) is None and (not safe or (said_none and r.get("linear_attn_config") is None)):
        return None
    return r.number(key, default=BOUND, rule="it must be a finite number < 0 (nats per token)", test=lambda x: x < 0)


def _mla(r: Reader, occurs: bool) -> dict[str, Any]:
    heads = r.needed("num_attention_heads", occurs)
    if occurs:
        r.agrees("num_key_value_heads", heads, "num_attention_heads")
    nope = r.needed("qk_nope_head_dim", occurs)
    if occurs:
        r.agrees("qk_head_dim", nope, "qk_nope_head_dim")
    topk = r.integer("index_topk", default=TOPK) if occurs else 0
    pool = r.integer("index_kpool", most=512, default=POOL) if occurs else 0
    dim = r.needed("index_head_dim", occurs)
    if occurs and 512 % pool:
        r.problem("index_kpool", pool, "it must be a power of two up to 512")
    elif occurs and topk % pool:
        r.problem("index_topk", topk, f"it must be a multiple of index_kpool, {pool}")
    elif occurs and dim % pool:
        r.problem("index_head_dim", dim, f"it must be a multiple of index_kpool, {pool}")
    return dict(
        mla_heads=heads, nope_dim=nope, v_head_dim=r.needed("v_head_dim", occurs),
        kv_rank=r.needed("kv_lora_rank", occurs), q_rank=r.needed("q_lora_rank", occurs),
        index_heads=r.needed("index_n_heads", occurs), index_dim=dim, index_topk=topk, index_pool=pool,
        index_eps=r.number("index_eps", default=INDEX_EPS))


def _streams(r: Reader) -> dict[str, Any]:
    return dict(
        streams=r.integer("hc_mult", most=64, default=STREAMS),
        stream_passes=r.integer("hc_sinkhorn_iters", most=1000, default=PASSES),
        stream_eps=r.number("hc_eps", default=STREAM_EPS))


def _moe(r: Reader, n_experts: int, occurs: bool) -> dict[str, Any]:
    k, size = r.needed("num_experts_per_tok", occurs), r.needed("moe_intermediate_size", occurs)
    groups, top = r.integer("n_group", default=1), r.integer("topk_group", default=1)
    if top > groups:
        r.problem("topk_group", top, f"it must be at most n_group, {groups}")
    if occurs and n_experts % groups:
        r.problem("n_group", groups, f"it must divide n_routed_experts, {n_experts}")
    elif occurs and k > n_experts // groups * min(top, groups):
        r.problem("num_experts_per_tok", k, f"it must be at most {n_experts // groups * min(top, groups)}, "
                  f"the experts of {min(top, groups)} of {groups} groups")
    n_shared = r.integer("n_shared_experts", least=0, default=0)
    return dict(
        experts_per_token=k, moe_size=size, n_shared_experts=n_shared, shared_size=n_shared * size, n_groups=groups,
        top_groups=top, renormalise=r.flag("norm_topk_prob", True),
        routed_scale=r.number("routed_scaling_factor", default=SCALE, rule="it must be a finite number",
                              test=lambda x: True))
