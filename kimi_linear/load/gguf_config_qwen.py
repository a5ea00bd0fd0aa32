"""The metadata of a GGUF of architecture ``qwen3next``, ``qwen35`` or ``qwen35moe``, as the content of a config.json.

Source: the converter of llama.cpp, conversion/qwen.py, and its readers, src/models/qwen3next.cpp, qwen35.cpp.
"""

from .gguf import MetaArray
from .gguf_keys import Keys

#: config.json's keys and the GGUF's, for messages.
NAMES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "partial_rotary_factor": "rope.dimension_count", "rope_parameters.partial_rotary_factor": "rope.dimension_count",
    "rope_theta": "rope.freq_base", "rope_parameters.rope_theta": "rope.freq_base",
    "linear_conv_kernel_dim": "ssm.conv_kernel", "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank", "linear_key_head_dim": "ssm.state_size",
    "linear_value_head_dim": "ssm.inner_size", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length", "norm_topk_prob": "expert_weights_norm",
    "full_attention_interval": "full_attention_interval", "layer_types": "attention.recurrent_layers",
}
KNOWN = frozenset({
    *NAMES.values(), "attention.value_length", "rope.dimension_sections", "rope.scaling.type", "expert_gating_func",
    "expert_weights_scale", "nextn_predict_layers",
    "rope.scaling.factor", "rope.scaling.original_context_length",  # of a scaling, which is refused
    "expert_shared_count", "expert_group_count", "expert_group_used_count", "leading_dense_block_count",  # nothing
})
_INTERVAL = 4  # where no key says it


def read_next(r: Keys) -> dict:
    """Of ``qwen3next``: a mixture of experts in every layer."""
    d = _read(r, "qwen3_next", sparse=True)
    return d | {"norm_topk_prob": r.typed("expert_weights_norm", bool, True)}


def read_dense(r: Keys) -> dict:
    """Of ``qwen35``."""
    return _read(r, "qwen3_5_text", sparse=False)


def read_moe(r: Keys) -> dict:
    """Of ``qwen35moe``, whose weights of experts are always renormalised."""
    d = _read(r, "qwen3_5_moe_text", sparse=True)
    if not r.typed("expert_weights_norm", bool, True):
        r.wrong(r.prefix + "expert_weights_norm", False, "true: this architecture always renormalises")
    return d


def described(r: Keys, content: dict) -> dict:
    """With the sections of the rotary embedding, which text does not need."""
    sections = r.metadata.get(r.prefix + "rope.dimension_sections")
    rope = content.get("rope_parameters")
    if not isinstance(sections, MetaArray) or not isinstance(rope, dict):
        return content
    parts = {"mrope_section": [int(x) for x in sections.values()][:3], "mrope_interleaved": True}
    return content | {"rope_parameters": rope | parts}


def _read(r: Keys, model_type: str, *, sparse: bool) -> dict:
    n, blocks = r.layers_and_blocks()
    recurrent = _recurrent(r, n, blocks) if n else []
    if not recurrent:
        return {}
    gdn, attn = ([i for i in range(n) if recurrent[i] == kind] for kind in (True, False))
    eps = r.typed("attention.layer_norm_rms_epsilon", float)
    if eps is None:
        r.problems.append(f"{r.prefix}attention.layer_norm_rms_epsilon is missing; it must be a number")
    d = {
        "model_type": model_type, "num_hidden_layers": n, "rms_norm_eps": eps,
        "layer_types": ["linear_attention" if kind else "full_attention" for kind in recurrent],
        "hidden_size": r.size("embedding_length", "token_embd.weight", 0), "vocab_size": r.vocabulary(),
        "max_position_embeddings": r.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in r.tensors,
        "intermediate_size": r.size("feed_forward_length", "" if sparse else "blk.0.ffn_gate.weight", 1),
    }
    d |= _gdn(r, gdn) | _attn(r, attn, blocks) | (_moe(r) if sparse else {}) | r.specials()
    return {key: value for key, value in d.items() if value is not None}


def _recurrent(r: Keys, n: int, blocks: int) -> list[bool]:
    """Whether each layer is linear: an array says it, or the interval of those that are not; the tensors must agree."""
    key, told = "attention.recurrent_layers", r.metadata.get(r.prefix + "attention.recurrent_layers")
    if isinstance(told, MetaArray) and told.count in (n, blocks) and told.kind.startswith(("bool", "int", "uint")):
        found = [bool(x) for x in told.values()][:n]
    elif told is not None:
        shown = f"an array of {told.count} {told.kind}" if isinstance(told, MetaArray) else told
        r.problems.append(f"{r.prefix}{key} is {shown}; it must be an array of {blocks} bools, one a block")
        return []
    else:
        key = "full_attention_interval"
        every = r.integer(key, _INTERVAL)
        if every < 1:
            r.wrong(r.prefix + key, every, "an integer >= 1")
            return []
        found = [(i + 1) % every != 0 for i in range(n)]
    for i, linear in enumerate(found):
        wrong = f"blk.{i}.attn_q.weight" if linear else f"blk.{i}.ssm_a"
        if wrong in r.tensors:
            at, kind = (f"{key}[{i}]", found[i]) if told is not None else (key, r.integer(key, _INTERVAL))
            r.contradiction(at, f"{kind}, by which layer {i} has {'linear' if linear else 'full'} attention", wrong,
                            "belongs to the other")
            return []
    return found


def _gdn(r: Keys, layers: list[int]) -> dict:
    at = f"blk.{layers[0]}." if layers else ""
    keys, width, inner = (r.needed(f"ssm.{key}") for key in ("group_count", "state_size", "inner_size"))
    heads = r.size("ssm.time_step_rank", at + "ssm_a", 0)
    if heads and inner % heads:
        r.wrong(r.prefix + "ssm.inner_size", inner, f"a multiple of ssm.time_step_rank, {heads}")
    if heads and keys and heads % keys:
        r.wrong(r.prefix + "ssm.time_step_rank", heads, f"a multiple of ssm.group_count, {keys}")
    if heads is None:
        r.problems.append(f"{r.prefix}ssm.time_step_rank is missing; it must be an integer >= 1")
    value = inner // heads if heads else 0
    norm, rows = at + "ssm_norm.weight", r.ne(at + "ssm_conv1d.weight", 1)
    if norm in r.tensors and value and r.ne(norm, 0) != value:
        r.contradiction("ssm.inner_size", f"{inner} of {heads} heads", norm, f"is {r.ne(norm, 0)} along axis 0")
    if rows is not None and rows != 2 * keys * width + inner:
        r.contradiction("ssm.state_size", f"{width} of {keys} key heads beside an inner_size of {inner}",
                        at + "ssm_conv1d.weight", f"has {rows} channels")
    return {"linear_num_key_heads": keys, "linear_num_value_heads": heads, "linear_key_head_dim": width,
            "linear_value_head_dim": value,
            "linear_conv_kernel_dim": r.size("ssm.conv_kernel", at + "ssm_conv1d.weight", 0)}


def _attn(r: Keys, layers: list[int], blocks: int) -> dict:
    at = f"blk.{layers[0]}." if layers else ""
    H, Hkv = (r.of_kind(r.per_layer(key, blocks), layers, key) if layers else r.integer(key)
              for key in ("attention.head_count", "attention.head_count_kv"))
    K = r.size("attention.key_length", at + "attn_q_norm.weight", 0)
    if K is None:
        r.problems.append(f"{r.prefix}attention.key_length is missing; it must be an integer >= 1")
        return {}
    if K < 1:
        r.wrong(r.prefix + "attention.key_length", K, "an integer >= 1")
        return {}
    if (value := r.integer("attention.value_length", K)) != K:
        r.wrong(r.prefix + "attention.value_length", value, f"attention.key_length, {K}")
    for name, key, heads, parts in (("attn_q", "head_count", H, 2), ("attn_k", "head_count_kv", Hkv, 1)):
        rows, wanted = r.ne(f"{at}{name}.weight", 1), (heads or 0) * parts * K  # of q: the query and its gate
        if heads and rows is not None and rows != wanted:
            r.contradiction(f"attention.{key}", f"{heads} of width {K}", f"{at}{name}.weight",
                            f"has {rows} rows; it must have {wanted}")
    return {"num_attention_heads": H, "num_key_value_heads": Hkv, "head_dim": K} | _rope(r, K)


def _rope(r: Keys, K: int) -> dict:
    width = r.integer("rope.dimension_count", K)
    if not 0 < width <= K or width % 2:
        r.wrong(r.prefix + "rope.dimension_count", width, f"an even number from 2 to attention.key_length, {K}")
    scaling = r.metadata.get(r.prefix + "rope.scaling.type", "none")
    if scaling != "none":
        r.wrong(r.prefix + "rope.scaling.type", scaling, "'none'")
    sections = r.metadata.get(r.prefix + "rope.dimension_sections")
    if sections is not None and not (isinstance(sections, MetaArray) and sections.kind in ("int32", "uint32")
                                     and sections.count in (3, 4)):
        r.wrong(r.prefix + "rope.dimension_sections", sections, "an array of 4 int32")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": r.typed("rope.freq_base", float, 10000.0),
                                "partial_rotary_factor": factor_of(width, K)}}


def factor_of(width: int, K: int) -> float:
    """The shortest decimal that gives `width` as the integer part of its product with K."""
    for digits in range(1, 17):
        factor = round(width / K, digits)
        if int(K * factor) == width:
            return factor
    return (width + 0.5) / K


def _moe(r: Keys) -> dict:
    at = "blk.0."  # every layer has experts
    for key, only, what in (("expert_gating_func", 1, "1 (softmax)"), ("expert_weights_scale", 1.0, "1")):
        if (value := r.typed(key, type(only), only)) not in (only, 0):
            r.wrong(r.prefix + key, value, what)
    return {
        "num_experts": r.size("expert_count", at + "ffn_gate_inp.weight", 1),
        "num_experts_per_tok": r.needed("expert_used_count"),
        "moe_intermediate_size": r.size("expert_feed_forward_length", at + "ffn_down_exps.weight", 0),
        "shared_expert_intermediate_size": r.size("expert_shared_feed_forward_length", at + "ffn_gate_shexp.weight",
                                                  1),
    }
