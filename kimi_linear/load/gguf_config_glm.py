"""The metadata of a GGUF of GLM-5.3-Flash, ``glm5next`` or ``glm5-next``, as the content of a config.json.

What it shares with ``kimi-linear`` is read by gguf_config.py; here it gets this config's keys, and the rest is read.
Sources: docs/gguf.md#glm.
"""

from collections.abc import Mapping

from ..config_glm import BOUND, INDEX_EPS, STREAM_EPS, TEXT
from .gguf import MetaArray
from .gguf_keys import Keys

#: This config's keys and those of ``kimi-linear`` that mean the same.
_SHARED = {
    "num_hidden_layers": "num_hidden_layers", "hidden_size": "hidden_size", "vocab_size": "vocab_size",
    "intermediate_size": "intermediate_size", "max_position_embeddings": "model_max_length",
    "rms_norm_eps": "rms_norm_eps", "tie_word_embeddings": "tie_word_embeddings", "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id", "num_attention_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim", "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token", "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "moe_intermediate_size", "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "moe_renormalize", "n_group": "num_expert_group", "topk_group": "topk_group",
    "first_k_dense_replace": "first_k_dense_replace", "scoring_func": "moe_router_activation_func",
}
_LINEAR = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim",
           "linear_conv_kernel_dim": "short_conv_kernel_size"}
_KPOOL, _BLOCK_SIZE = "attention.indexer.kpool", "attention.indexer.block_size"
#: config.json's keys and the GGUF's, for messages.
NAMES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "index_eps": "attention.layer_norm_epsilon",
    "num_attention_heads": "attention.head_count", "linear_num_heads": "attention.head_count",
    "linear_head_dim": "kda.head_dim", "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_lower_bound": "kda.gate_lower_bound", "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank", "qk_nope_head_dim": "attention.key_length_mla",
    "qk_rope_head_dim": "rope.dimension_count", "v_head_dim": "attention.value_length_mla",
    "index_n_heads": "attention.indexer.head_count", "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k", "index_kpool": _KPOOL,
    "index_kpool_always_select_tail": "attention.indexer.kpool_select_tail",
    "indexer_types": "attention.indexer.types", "hc_mult": "hyper_connection.count",
    "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations", "hc_eps": "hyper_connection.epsilon",
    "swiglu_limit": "swiglu_clamp_exp", "n_routed_experts": "expert_count", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length", "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm", "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
    "first_k_dense_replace": "leading_dense_block_count", "scoring_func": "expert_gating_func",
}
#: Known keys beside them: the other spelling, the limit of the shared expert, and what says a size again.
MORE = {_BLOCK_SIZE, "swiglu_clamp_shexp", "attention.indexer.index_share_mtp", "ssm.state_size", "ssm.group_count",
        "ssm.inner_size", "ssm.time_step_rank", "attention.recurrent_layers", "full_attention_interval"}


def marks(r: Keys, n: int, blocks: int) -> list[int]:
    """head_count_kv of each layer, in which 0 marks KDA.

    Files of pull request 27752 have one number for all blocks: there the tensors say it.
    """
    if type(r.metadata.get(r.prefix + "attention.head_count_kv")) is int:
        return [int(f"blk.{i}.ssm_a" not in r.tensors) for i in range(n)]
    return r.per_layer("attention.head_count_kv", blocks)[:n]


def read(r: Keys, kimi: Mapping, n: int, blocks: int) -> dict:
    """The content of a config.json; `kimi` is what it would be of ``kimi-linear``, of the n layers among the blocks."""
    linear = kimi["linear_attn_config"]
    mla = [i - 1 for i in linear["full_attn_layers"]]
    d = {"model_type": TEXT, "linear_lower_bound": _bound(r, linear), "swiglu_limit": _limit(r, n, blocks),
         "layer_types": ["indexed_attention" if i in mla else "linear_attention" for i in range(n)],
         "first_k_dense_replace": n}
    d |= {key: kimi[name] for key, name in _SHARED.items() if kimi.get(name) is not None}
    d |= {key: linear[name] for key, name in _LINEAR.items() if linear.get(name) is not None}
    return d | (_indexer(r, mla, blocks) if mla else {}) | {
        "hc_mult": r.needed("hyper_connection.count"),
        "hc_sinkhorn_iters": r.needed("hyper_connection.sinkhorn_iterations"),
        "hc_eps": r.typed("hyper_connection.epsilon", float, STREAM_EPS)}


def _bound(r: Keys, linear: Mapping) -> float | None:
    """The bound of the decay; where it is absent none, but in files of pull request 27752, whose engine has it."""
    bound = linear.get("gate_lower_bound")
    older = r.prefix + _BLOCK_SIZE in r.metadata and r.prefix + _KPOOL not in r.metadata
    return BOUND if bound is None and older else bound


def _indexer(r: Keys, mla: list[int], blocks: int) -> dict:
    at = f"blk.{mla[0]}."
    keys = r.size("attention.indexer.key_length", at + "indexer.attn_k.weight", 1)
    ape = at + ("indexer.kpool_ape.weight" if at + "indexer.kpool_ape.weight" in r.tensors
                else "indexer_compressor_ape.weight")
    spelling = _KPOOL if r.prefix + _KPOOL in r.metadata else _BLOCK_SIZE
    types = r.metadata.get(r.prefix + "attention.indexer.types")
    if types is not None and not _are_true(types, mla, blocks):
        r.wrong(r.prefix + "attention.indexer.types", types, "an array of true: each layer has an indexer of its own")
    return {
        "index_n_heads": r.size("attention.indexer.head_count", at + "indexer.proj.weight", 1),
        "index_head_dim": keys, "index_topk": r.needed("attention.indexer.top_k"),
        "index_kpool": r.size(spelling, ape, 1),
        "index_kpool_always_select_tail": r.typed("attention.indexer.kpool_select_tail", bool, True),
        "index_eps": r.typed("attention.layer_norm_epsilon", float, INDEX_EPS)}


def _are_true(value: object, layers: list[int], blocks: int) -> bool:
    """Whether a value is an array, one a layer or block, that is true of these layers."""
    if not isinstance(value, MetaArray) or not value.kind.startswith(("bool", "int", "uint")):
        return False
    return layers[-1] < value.count <= blocks and all(value.values()[i] for i in layers)


def _limit(r: Keys, n: int, blocks: int) -> float:
    """The limit of SwiGLU's inputs, 0 for none: one for all feed-forwards, of which two keys have one a block."""
    found = {}
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        value = r.metadata.get(r.prefix + key)
        if isinstance(value, MetaArray) and value.kind in ("float32", "float64") and value.count in (n, blocks):
            found[key] = {float(str(x)) for x in value.values()[:n]}
        elif type(value) in (int, float):
            found[key] = {r.typed(key, float)}
        elif value is not None:
            r.wrong(r.prefix + key, value, f"a number, or an array of {blocks} float32, one a block")
    limits = set().union(*found.values())
    if len(limits) > 1:
        r.problems.append(f"{r.prefix}{' and '.join(found)} have the limits {sorted(limits)}; all feed-forwards must "
                          "have one")
    return min(limits, default=0.0)
