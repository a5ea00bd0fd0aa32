"""A config and a tokenizer as the metadata of a GGUF, as llama.cpp's converter writes them.

The inverse of gguf_config.py, gguf_config_qwen.py and gguf_tokenizer.py, which say what each key is; what has no key is
kept by gguf_kept.py. Nothing is lost: what was written is read back before the file is made.
"""

import json
import warnings
from collections.abc import Mapping

import numpy as np

from .. import config_glm, config_kimi
from ..config import Config
from ..tokenizer import Tokenizer
from ..tokenizer_json import JsonTokenizer
from . import gguf_heads as order
from . import gguf_kept as kept
from . import gguf_scores as scores
from . import gguf_tokenizer_json as by_merges
from .byte_alphabet import spelled
from .gguf_config import architecture_of, read_config, stored_form
from .gguf_keys import CONTROL, NORMAL, UNUSED, USER, with_specials
from .gguf_tokenizer import RANKS, SHOWN_CONTROLS, read_tokenizer
from .gguf_write import Values

QUANTIZATION_VERSION = 2  # of ggml's block layouts
_ROUTERS = {"softmax": 1, "sigmoid": 2}
#: Type of most matrices -> general.file_type, llama.cpp's number for it.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
              "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24,
              "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
              "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41}
GUESSED = 1024  # no type of its own
#: model_type of models whose config.json is kept whole, with what is around its text model.
WHOLE = (*config_kimi.ARCHITECTURES, config_glm.TEXT)


def metadata_of(checkpoint, tokenizer: Tokenizer | None, stored: Mapping, name: str) -> dict:
    """All keys but general.file_type of a Hugging Face checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    tokenizer : Tokenizer or None
    stored : mapping of str to a tensor with `shape`
        By GGUF names: what the file will hold.
    name : str
        For general.name.

    Raises
    ------
    ValueError
        If a key of config.json, or a part of the tokenizer, would be lost; if dense layers are no prefix.
    """
    architecture = architecture_of(checkpoint.config).name
    metadata = {"general.architecture": architecture, "general.type": "model", "general.name": name,
                "general.quantization_version": QUANTIZATION_VERSION}
    content = text_content(checkpoint)
    keys = keys_of(checkpoint.config, content)
    metadata |= {f"{architecture}.{key}": _single(value) for key, value in keys.items()}
    metadata |= _no_vocabulary(checkpoint.config) if tokenizer is None else vocabulary_keys(
        tokenizer, checkpoint.config.vocab_size)
    where = f"the GGUF of {checkpoint.path}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are not known: the folder's reader has warned
        metadata = _arrays(metadata)
        metadata |= _arrays(_kept(checkpoint, content, read_config(metadata, stored, where)[1]))
        wanted = checkpoint.content if checkpoint.config.model_type in WHOLE else content
        _check_config(checkpoint, wanted, *read_config(metadata, stored, where))
    if tokenizer is not None:
        _check_tokenizer(tokenizer, metadata)
    return metadata


def _arrays(metadata: Mapping) -> dict:
    return {key: Values(key, *value) if isinstance(value, tuple) else value for key, value in metadata.items()}


def _single(value):
    """A float as the file will hold it."""
    return float(np.float32(value)) if isinstance(value, float) else value


# ---- config ----------------------------------------------------------------------------------------


def keys_of(c: Config, content: Mapping) -> dict:
    """What the config's family writes: key below the architecture's name -> value; an array is (kind, items)."""
    if c.model_type == config_glm.TEXT:
        return glm_keys(c)
    return config_keys(c) if c.model_type in WHOLE else qwen_keys(c, content)


def config_keys(c: Config) -> dict:
    """Of Kimi-Linear and Kimi K3: key below the architecture's name -> value; an array is (kind, items).

    Raises
    ------
    ValueError
        If a dense layer follows a sparse one: the format counts leading dense layers only.
    """
    kinds = {layer.mixer for layer in c.layers}
    heads = [c.kda_heads if layer.mixer == "kda" else c.mla_heads for layer in c.layers]
    sparse = [layer.ffn == "moe" for layer in c.layers]
    n_dense = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[n_dense:]):
        i = n_dense + sparse[n_dense:].index(False)
        raise ValueError(f"config.json's pattern of dense and sparse layers cannot be kept: layer {i} is dense behind "
                         f"the sparse layer {n_dense}, and a GGUF counts leading dense layers only")
    keys: dict = {
        "block_count": c.n_layers, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "feed_forward_length": c.ffn_size, "vocab_size": c.vocab_size,
        "attention.head_count": heads[0] if len(set(heads)) == 1 else ("int32", heads),
        "attention.head_count_kv": ("int32", [int(layer.mixer == "mla") for layer in c.layers]),
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": 10000.0,
        "leading_dense_block_count": n_dense,
    }
    if "mla" in kinds:
        keys |= _mla_keys(c)
    if "kda" in kinds:
        keys |= {"ssm.conv_kernel": c.conv_width, "kda.head_dim": c.kda_head_dim}
        keys |= {} if c.gate_lower_bound is None else {"kda.gate_lower_bound": c.gate_lower_bound}
    return keys | _k3_keys(c) | (_moe_keys(c) if True in sparse else {})


def _k3_keys(c: Config) -> dict:
    """Of the parts that only ``kimi-k3`` has, and that a key tells; that of experts is among theirs."""
    keys = {"activation.situ_beta": c.situ_beta, "activation.situ_linear_beta": c.situ_linear_beta,
            "attn_res.block_size": c.attn_res_block}
    return {key: value for key, value in keys.items() if value}


def _mla_keys(c: Config) -> dict:
    keys = {
        "attention.kv_lora_rank": c.kv_rank, "attention.key_length": c.kv_rank + c.rope_dim,
        "attention.value_length": c.kv_rank, "attention.key_length_mla": c.nope_dim + c.rope_dim,
        "attention.value_length_mla": c.v_head_dim, "rope.dimension_count": c.rope_dim,
    }
    return keys | ({"attention.q_lora_rank": c.q_rank} if c.q_rank else {})


def _moe_keys(c: Config) -> dict:
    keys = {
        "expert_count": c.n_experts, "expert_used_count": c.experts_per_token,
        "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_size,
        "expert_weights_scale": c.routed_scale, "expert_weights_norm": c.renormalise,
        "expert_gating_func": _ROUTERS[c.router_function], "expert_group_used_count": c.top_groups,
    }
    keys |= {"expert_group_count": c.n_groups} if c.n_groups > 1 else {}
    return keys | ({"expert_latent_length": c.expert_latent} if c.expert_latent else {})


def glm_keys(c: Config) -> dict:
    """Of GLM-5.3-Flash: key below ``glm5next.`` -> value; an array is (kind, items).

    Raises
    ------
    ValueError
        As of `config_keys`.
    """
    keys = config_keys(c) | {
        "hyper_connection.count": c.streams, "hyper_connection.sinkhorn_iterations": c.stream_passes,
        "hyper_connection.epsilon": c.stream_eps,
    }
    del keys["rope.freq_base"]
    if c.index_heads:
        keys |= {
            "attention.indexer.head_count": c.index_heads, "attention.indexer.key_length": c.index_dim,
            "attention.indexer.top_k": c.index_topk, "attention.indexer.kpool": c.index_pool,
            "attention.layer_norm_epsilon": c.index_eps,
        }
    if c.n_experts:
        keys |= {"expert_group_count": c.n_groups, "expert_shared_feed_forward_length": c.shared_size}
    limits = ("float32", [c.swiglu_limit] * c.n_layers)
    return keys | ({"swiglu_clamp_exp": limits, "swiglu_clamp_shexp": limits} if c.swiglu_limit else {})


def text_content(checkpoint) -> Mapping:
    """config.json; of a model that sees, what it would be for its text model alone, which is all that is converted.

    Of Kimi K3 and GLM these are the keys of its text_config as they are; those around it are kept beside them.
    """
    if checkpoint.config.model_type in WHOLE:
        return kept.taken_out(checkpoint.content)[0]
    inside = "text_config" in checkpoint.content
    return checkpoint.config.published().to_dict() if inside else checkpoint.content


def qwen_keys(c: Config, content: Mapping) -> dict:
    """Of the Qwen kinds: key below the architecture's name -> value; an array is (kind, items).

    Raises
    ------
    ValueError
        If dense layers are among sparse ones: the format has no key for it.
    """
    kinds = {layer.ffn for layer in c.layers}
    if len(kinds) > 1 or (c.model_type == "qwen3_next" and kinds == {"dense"}):
        i = [layer.ffn for layer in c.layers].index("dense")
        raise ValueError(f"config.json's pattern of dense and sparse layers cannot be kept: layer {i} is dense, and a "
                         f"GGUF of architecture {architecture_of(c).name} has experts in every layer or in none")
    keys: dict = {
        "block_count": c.n_layers, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "vocab_size": c.vocab_size, "attention.head_count": c.attn_heads, "attention.head_count_kv": c.attn_kv_heads,
        "attention.key_length": c.attn_head_dim, "attention.value_length": c.attn_head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_base,
        "rope.dimension_count": c.rotary_dim, "ssm.conv_kernel": c.conv_width, "ssm.state_size": c.gdn_k_dim,
        "ssm.group_count": c.gdn_k_heads, "ssm.time_step_rank": c.gdn_v_heads,
        "ssm.inner_size": c.gdn_v_heads * c.gdn_v_dim,
    }
    keys |= {"feed_forward_length": c.ffn_size} if c.ffn_size else {}
    keys |= _layer_kinds([layer.mixer == "gdn" for layer in c.layers])
    if c.model_type != "qwen3_next":
        keys["rope.dimension_sections"] = ("int32", _sections(content, c.rotary_dim // 2))
    if "moe" in kinds:
        keys |= {"expert_count": c.n_experts, "expert_used_count": c.experts_per_token,
                 "expert_feed_forward_length": c.moe_size, "expert_shared_feed_forward_length": c.shared_size}
        keys |= {} if c.renormalise else {"expert_weights_norm": False}
    return keys


def _layer_kinds(linear: list[bool]) -> dict:
    """The interval of full attention, or which layers are linear where there is no such interval."""
    every = linear.index(False) + 1 if False in linear else len(linear) + 1
    if linear == [(i + 1) % every != 0 for i in range(len(linear))]:
        return {"full_attention_interval": every}
    return {"attention.recurrent_layers": ("bool", linear)}


def _sections(content: Mapping, n: int) -> list[int]:
    """How the n pairs of the rotary embedding are shared by time, height and width, and a fourth of none.

    Text does not need them; llama.cpp does, and that they are no more than a head is wide. By default as even as can
    be: 11, 11 and 10 of the 32 of published models.
    """
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    found = rope.get("mrope_section") if isinstance(rope, Mapping) else None
    return [*(found or ((n + 2) // 3, (n + 1) // 3, n // 3)), 0, 0, 0, 0][:4]


def _kept(checkpoint, content: Mapping, given: Mapping) -> dict:
    """Keys of our own (gguf_kept.py); `given` is what the others say of config.json's content."""
    found = kept.differences(given, content)
    if (around := kept.taken_out(checkpoint.content)[1]) is not None:
        found[kept.AROUND] = json.dumps(around, ensure_ascii=False)
    if checkpoint.generation_config:
        found[kept.GENERATION] = json.dumps(checkpoint.generation_config, ensure_ascii=False)
    found[kept.TYPES] = kept.dtypes_of(checkpoint.tensors)
    named = {name: t.array() for name, t in checkpoint.tensors.items() if name.endswith(".A_log")}
    for name, a_log in named.items():
        kept.check_rate(name, a_log)
    a_logs = [*named.values()]
    if any(map(kept.needs_keeping, a_logs)):
        if stored_form(checkpoint.config).gdn_tiled:
            a_logs = [a_log[order.tiled(checkpoint.config)] for a_log in a_logs]
        found[kept.RATES] = ("float32", np.concatenate(a_logs).astype(np.float32))
    norms = kept.kept_norms(checkpoint.tensors) if checkpoint.config.norm_plus_one else []
    factors = scores.kept_scores(checkpoint.tensors)
    found |= {scores.KEY: ("float32", np.concatenate(factors))} if factors else {}
    return found | ({kept.NORMS: ("float32", np.concatenate(norms))} if norms else {})


def _check_config(checkpoint, wanted: Mapping, config: Config, content: Mapping) -> None:
    """Refuse a key that reading gives back as another: config and content are what it gives."""
    lost = _lost(wanted, content)
    if not lost:
        own = stored_form(checkpoint.config)
        lost = [key for key, value in vars(own).items() if value != getattr(config, key)]
    if lost:
        raise ValueError(f"config.json of {checkpoint.path}: a GGUF cannot keep {', '.join(lost)}")


def _lost(wanted: Mapping, content: Mapping, path: str = "") -> list[str]:
    """Keys that only one of the two has, or both with other values."""
    text = "text_config"
    inside = _lost(wanted[text], content[text], text + ".") if text in wanted and text in content else []
    return inside + [path + key for key in {**wanted, **content} if (key != text or not inside)
                     and (key not in content or key not in wanted or not kept.same(wanted[key], content[key]))]


# ---- tokenizer -------------------------------------------------------------------------------------


def _no_vocabulary(c: Config) -> dict:
    ids = {"bos": c.bos_token_id, "eos": c.eos_token_ids[0] if c.eos_token_ids else None, "padding": c.pad_token_id}
    found = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    return {"tokenizer.ggml.model": "none"} | found


def vocabulary_keys(tokenizer: Tokenizer, n: int) -> dict:
    """Tokens, types, merges, special ids and the template, for a vocabulary of n; an array is (kind, items).

    Raises
    ------
    ValueError
        If the tokenizer has more tokens than the model, or what no key says.
    """
    if tokenizer.vocab_size > n:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, and config.json a vocabulary of {n}; the "
                         f"tokens must fit it")
    if isinstance(tokenizer, JsonTokenizer):
        return by_merges.keys_of(tokenizer, n)
    base = [tokenizer.id_to_bytes(i) for i in range(tokenizer.n_base)]
    tokens, types = [spelled(token) for token in base], [NORMAL] * len(base)
    names = {i: name for name, i in tokenizer.special_ids.items()}
    for i in range(tokenizer.n_base, n):
        token, kind = _special(i, names.get(i), i in tokenizer._skipped)
        tokens.append(token)
        types.append(kind)
    keys = {"model": "gpt2", "pre": RANKS, "tokens": ("string", tokens), "token_type": ("int32", types),
            "merges": ("string", merges(base))}
    return with_specials(tokenizer, keys)


def _special(i: int, name: str | None, skipped: bool) -> tuple[str, int]:
    """Spelling and type of a special token; a slot without a name is unused."""
    if name is None or (skipped and name == f"<|reserved_token_{i}|>"):
        return f"[PAD{i}]", UNUSED
    return name, CONTROL if skipped or name.startswith(SHOWN_CONTROLS) else USER


def merges(tokens: list[bytes]) -> list[str]:
    """For each token, in order, the two parts that it is built from last; none where there are more.

    The parts are what merging makes of its bytes with the ranks below its own.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for rank, token in enumerate(tokens):
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2:
            found.append(" ".join(map(spelled, parts)))
    return found


def _parts(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """`token` merged as far as ranks below `limit` go, the lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _check_tokenizer(tokenizer: Tokenizer, metadata: Mapping) -> None:
    """Refuse what reading would not give back."""
    back = read_tokenizer(metadata, "the GGUF to be written")
    for what, a, b in (("special tokens", tokenizer.special_ids, back.special_ids),
                       ("base tokens", tokenizer._bytes, back._bytes),
                       ("tokens that decoding leaves out", tokenizer._skipped, back._skipped),
                       ("names of special tokens", tokenizer._names, back._names),
                       ("chat template", tokenizer.chat_template, back.chat_template)):
        if a != b:
            raise ValueError(f"the tokenizer's {what} cannot be kept in a GGUF: they would be read back as others")
    if isinstance(tokenizer, JsonTokenizer) and by_merges.merges_of(tokenizer.spec) != by_merges.merges_of(back.spec):
        raise ValueError("the tokenizer's merges cannot be kept in a GGUF: they would be read back as others")
