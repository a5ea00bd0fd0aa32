"""GGUF files for tests: a Hugging Face folder as llama.cpp's converter writes it, by the `gguf` package.

Names, transposes and value changes of the published converter, in one storage type. Sizes that the published model
does not have are written where llama.cpp looks for them: head_count as an array where the kinds of layers differ.
"""

import base64
import json
from pathlib import Path

import gguf
import numpy as np
from conftest import canonical_weights

from kimi_linear.config import Config

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4")}
PLAIN = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight", "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight", "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.b_proj.weight": "ssm_beta.weight", "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.dt_bias": "ssm_dt.bias", "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight", "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight", "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
EXPERTS = {"w1": "ffn_gate_exps.weight", "w3": "ffn_up_exps.weight", "w2": "ffn_down_exps.weight"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}


def converted(config, weights, *, conv_axes=4, legacy_kv_b=False, fused=False):
    """The tensors under their GGUF names, in float32, shapes row-major.

    `conv_axes` is how many a convolution has; `legacy_kv_b` leaves kv_b whole; `fused` puts q, k and v of KDA
    layers into one tensor.
    """
    out = {TOP[name]: a for name, a in weights.items() if name in TOP}
    c = config
    for i in range(c.n_layers):
        at, blk = f"model.layers.{i}.", f"blk.{i}."
        mine = {name.removeprefix(at): a.astype(np.float32) for name, a in weights.items() if name.startswith(at)}
        out |= {blk + PLAIN[name]: a for name, a in mine.items() if name in PLAIN}
        for part, name in EXPERTS.items():
            stack = [mine[f"block_sparse_moe.experts.{e}.{part}.weight"] for e in range(c.n_experts)
                     if f"block_sparse_moe.experts.{e}.{part}.weight" in mine]
            if stack:
                out[blk + name] = np.stack(stack)
        if "self_attn.A_log" in mine:
            out |= {blk + name: a for name, a in _kda(c, mine, conv_axes).items()}
            if fused:
                parts = [out.pop(f"{blk}attn_{x}.weight") for x in "qkv"]
                out[blk + "attn_qkv.weight"] = np.concatenate(parts)
        elif legacy_kv_b:
            out[blk + "attn_kv_b.weight"] = mine["self_attn.kv_b_proj.weight"]
        else:
            heads = mine["self_attn.kv_b_proj.weight"].reshape(c.mla_heads, c.nope_dim + c.v_head_dim, c.kv_rank)
            out[blk + "attn_k_b.weight"] = np.ascontiguousarray(heads[:, : c.nope_dim].transpose(0, 2, 1))
            out[blk + "attn_v_b.weight"] = np.ascontiguousarray(heads[:, c.nope_dim :])
    return {name: a.astype(np.float32) for name, a in out.items()}


def _kda(c, mine, conv_axes):
    channels = c.kda_heads * c.kda_head_dim
    shape = {4: (1, channels, 1, c.conv_width), 3: (channels, 1, c.conv_width), 2: (channels, c.conv_width)}[conv_axes]
    rate = np.exp(mine["self_attn.A_log"].astype(np.float64)).astype(np.float32)
    parts = {f"ssm_conv1d_{x}.weight": mine[f"self_attn.{x}_conv1d.weight"].reshape(shape) for x in "qkv"}
    return parts | {"ssm_a": -rate.reshape((1, 1, -1, 1) if conv_axes == 4 else (-1, 1))}


def stays_float32(name, a):
    """What the converter keeps in float32 whatever the file's type."""
    kept = ("_norm.weight", "ffn_gate_inp.weight")
    return a.ndim == 1 or name.endswith(kept) or "conv1d" in name or not name.endswith(".weight")


def metadata(config):
    """(key below "kimi-linear.", value) as the converter writes them; a list is an array of int32."""
    c = config
    heads = [c.kda_heads if layer.mixer == "kda" else c.mla_heads for layer in c.layers]
    kinds = {layer.mixer for layer in c.layers}
    keys = {
        "block_count": c.n_layers, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "feed_forward_length": c.ffn_size, "vocab_size": c.vocab_size,
        "attention.head_count": heads if len(kinds) == 2 and c.kda_heads != c.mla_heads else heads[0],
        "attention.head_count_kv": [int(layer.mixer == "mla") for layer in c.layers],
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps), "attention.kv_lora_rank": c.kv_rank,
        "attention.key_length": c.kv_rank + c.rope_dim, "attention.value_length": c.hidden_size // heads[0],
        "attention.key_length_mla": c.nope_dim + c.rope_dim, "attention.value_length_mla": c.v_head_dim,
        "rope.dimension_count": c.rope_dim, "rope.freq_base": 10000.0, "ssm.conv_kernel": c.conv_width,
        "kda.head_dim": c.kda_head_dim, "expert_count": c.n_experts, "expert_used_count": c.experts_per_token,
        "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_size,
        "leading_dense_block_count": sum(layer.ffn == "dense" for layer in c.layers),
        "expert_weights_scale": float(c.routed_scale), "expert_gating_func": {"softmax": 1, "sigmoid": 2}[
            c.router_function], "expert_group_used_count": c.top_groups,
    }
    if c.q_rank:
        keys["attention.q_lora_rank"] = c.q_rank
    if not c.renormalise:
        keys["expert_weights_norm"] = False
    if c.n_groups > 1:
        keys["expert_group_count"] = c.n_groups
    return keys


def byte_alphabet():
    """Byte -> the character that GPT-2 writes for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def tokenizer_keys(folder):
    """(tokens, types, bos, eos, pad, template) of a folder as the converter writes them, eos the tokenizer's."""
    letters = byte_alphabet()
    lines = (folder / "tiktoken.model").read_text().splitlines()
    tokens = ["".join(letters[b] for b in base64.b64decode(line.split()[0])) for line in lines]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {int(i): entry for i, entry in config["added_tokens_decoder"].items()}
    for i in range(len(tokens), len(tokens) + 256):
        entry = added.get(i)
        tokens.append(entry["content"] if entry else f"[PAD{i}]")
        types.append(gguf.TokenType.UNUSED if entry is None else gguf.TokenType.CONTROL)
    ids = {name: tokens.index(name) for name in ("[BOS]", "[EOS]", "[PAD]")}
    template = (folder / "chat_template.jinja").read_text()
    return tokens, types, ids["[BOS]"], ids["[EOS]"], ids["[PAD]"], template


def write(path, folder, dtype="F32", *, keys=None, drop=(), tensors=None, more=None, split=None, **shape):
    """A GGUF of a Hugging Face folder.

    Parameters
    ----------
    path : Path
    folder : Path
    dtype : str
        A key of TYPES.
    keys : dict, optional
        Keys below "kimi-linear." to write instead; None leaves one out.
    drop : tuple of str
        GGUF names of tensors to leave out.
    tensors : callable, optional
        From the converted tensors to those to write.
    more : callable, optional
        Called with the GGUFWriter, for keys of other kinds.
    split : tuple of (int, int), optional
        Number and count of the part to write: its share of the tensors, and the metadata in the first alone.
    **shape
        For `converted`.
    """
    folder = Path(folder)
    config = Config.from_file(folder / "config.json")
    return write_weights(path, config, canonical_weights(folder / "model.safetensors"), dtype, keys=keys, drop=drop,
                         tensors=tensors, more=more, split=split, folder=folder, **shape)


def write_weights(path, config, weights, dtype="F32", *, keys=None, drop=(), tensors=None, more=None, split=None,
                  folder=None, **shape):
    """The same of a config and its weights by canonical names; `folder` may have the files of a tokenizer."""
    stored = converted(config, weights, **shape)
    stored = {name: a for name, a in (tensors(stored) if tensors else stored).items() if name not in drop}
    writer = gguf.GGUFWriter(str(path), "kimi-linear")
    if split is not None:
        number, count = split
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(stored))
        names = list(stored)
        size = -(-len(names) // count)
        stored = {name: stored[name] for name in names[number * size : (number + 1) * size]}
    if split is None or split[0] == 0:
        for key, value in (metadata(config) | (keys or {})).items():
            _add(writer, "kimi-linear." + key, value)
        if folder is not None and (folder / "tiktoken.model").is_file():
            _add_tokenizer(writer, folder)
        if more is not None:
            more(writer)
    for name, a in stored.items():
        kind = TYPES["F32" if stays_float32(name, a) else dtype]
        if a.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = TYPES["F16"]
        raw = gguf.quants.quantize(a, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string,
           list: writer.add_array}
    if value is not None:
        add[type(value)](key, value)


def _add_tokenizer(writer, folder):
    tokens, types, bos, eos, pad, template = tokenizer_keys(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(pad)
    writer.add_chat_template(template)
