"""GLM-5.3-Flash as a GGUF of another converter, for tests: names and keys of docs/gguf.md#glm, written a second time.

No key of ours is in it. A block behind the layers, which predicts a second token, can be there.
"""

import gguf
import gguf_files
import numpy as np
from conftest import read_safetensors

from kimi_linear.config import Config

ARCHITECTURES = ("glm5next", "glm5-next")
NAMES = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight", "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight", "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.b_proj.weight": "ssm_beta.weight", "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.o_norm.weight": "ssm_norm.weight", "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight", "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight", "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "self_attn.indexer.index_kpool_compress_ape": "indexer_compressor_ape.weight",
    "self_attn.indexer.index_kpool_compress_gate": "indexer_compressor_gate.weight",
    "hc_attn_fn": "hc_attn_fn.weight", "hc_attn_base": "hc_attn_base.weight", "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight", "hc_ffn_base": "hc_ffn_base.weight", "hc_ffn_scale": "hc_ffn_scale.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight", "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
EXPERTS = {"gate_proj": "ffn_gate_exps.weight", "up_proj": "ffn_up_exps.weight", "down_proj": "ffn_down_exps.weight"}
EXACT = ("hc_attn_fn.weight", "hc_ffn_fn.weight", "indexer.proj.weight", "indexer_compressor_ape.weight",
         "indexer_compressor_gate.weight")


def weights_of(folder):
    """(Config, canonical name -> float32 array) of a folder; its vision tower is left out."""
    weights = {name.replace("model.language_model.", "model."): x.astype(np.float32)
               for name, x in read_safetensors(folder / "model.safetensors").items() if "visual" not in name}
    return Config.from_file(folder / "config.json"), weights


def converted(c, weights):
    """GGUF name -> float32 array, shapes row-major."""
    out = {gguf_files.TOP[name]: a for name, a in weights.items() if name in gguf_files.TOP}
    for i, spec in enumerate(c.layers):
        at, blk = f"model.layers.{i}.", f"blk.{i}."
        mine = {name.removeprefix(at): a for name, a in weights.items() if name.startswith(at)}
        out |= {blk + NAMES[name]: a for name, a in mine.items() if name in NAMES}
        if spec.mixer == "kda":
            out[blk + "ssm_a"] = -np.exp(mine["self_attn.A_log"].astype(np.float64)).astype(np.float32)
            out |= {f"{blk}ssm_conv1d_{x}.weight": a.reshape(1, len(a), 1, -1)
                    for x in "qkv" for a in [mine[f"self_attn.{x}_conv1d.weight"]]}
        else:
            heads = mine["self_attn.kv_b_proj.weight"].reshape(c.mla_heads, -1, c.kv_rank)
            out[blk + "attn_k_b.weight"] = np.ascontiguousarray(heads[:, : c.nope_dim].transpose(0, 2, 1))
            out[blk + "attn_v_b.weight"] = np.ascontiguousarray(heads[:, c.nope_dim :])
        for part, stored in EXPERTS.items() if spec.ffn == "moe" else ():
            out[blk + stored] = np.stack([mine[f"mlp.experts.{e}.{part}.weight"] for e in range(c.n_experts)])
    return out


def behind(c):
    """The tensors of a block behind the layers, as far as a reader can tell it from them."""
    at, D = f"blk.{c.n_layers}.", c.hidden_size
    shapes = {"attn_norm": (D,), "nextn.eh_proj": (D, 2 * D), "nextn.shared_head_norm": (D,),
              "indexer.attn_k": (c.index_dim, D)}
    return {f"{at}{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


def metadata(c, nextn=0):
    """Key below the architecture's name -> value, of a file with so many blocks behind the layers."""
    n = c.n_layers + nextn
    heads = [c.kda_heads if layer.mixer == "kda" else c.mla_heads for layer in c.layers] + [c.mla_heads] * nextn
    keys = {
        "block_count": n, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "feed_forward_length": c.ffn_size, "vocab_size": c.vocab_size,
        "attention.head_count": heads if c.kda_heads != c.mla_heads else c.mla_heads,
        "attention.head_count_kv": [int(layer.mixer == "mla") for layer in c.layers] + [1] * nextn,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.layer_norm_epsilon": 1e-6,
        "attention.q_lora_rank": c.q_rank, "attention.kv_lora_rank": c.kv_rank, "rope.dimension_count": 0,
        "attention.key_length": c.kv_rank, "attention.value_length": c.kv_rank,
        "attention.key_length_mla": c.nope_dim, "attention.value_length_mla": c.v_head_dim,
        "attention.indexer.head_count": c.index_heads, "attention.indexer.key_length": c.index_dim,
        "attention.indexer.top_k": c.index_topk, "attention.indexer.kpool": c.index_pool,
        "ssm.conv_kernel": c.conv_width, "kda.head_dim": c.kda_head_dim, "kda.gate_lower_bound": c.gate_lower_bound,
        "hyper_connection.count": c.streams, "hyper_connection.sinkhorn_iterations": c.stream_passes,
        "hyper_connection.epsilon": c.stream_eps, "leading_dense_block_count": [x.ffn for x in c.layers].count("dense"),
        "expert_count": c.n_experts, "expert_used_count": c.experts_per_token, "expert_group_count": c.n_groups,
        "expert_group_used_count": c.top_groups, "expert_gating_func": 2, "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_size, "expert_shared_feed_forward_length": c.shared_size,
        "expert_weights_scale": c.routed_scale, "expert_weights_norm": c.renormalise,
        "swiglu_clamp_exp": [c.swiglu_limit] * n, "swiglu_clamp_shexp": [c.swiglu_limit] * n,
    }
    return keys | ({"nextn_predict_layers": nextn} if nextn else {})


def write(path, folder, dtype="F32", *, architecture="glm5next", nextn=0, keys=None, tensors=None, exact=EXACT):
    """A GGUF of a folder: `keys` replaces some, None leaves one out; `tensors` changes those to write."""
    config, weights = weights_of(folder)
    stored = converted(config, weights) | (behind(config) if nextn else {})
    stored = tensors(stored) if tensors else stored
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (metadata(config, nextn) | (keys or {})).items():
        gguf_files._add(writer, f"{architecture}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, a in stored.items():
        single = gguf_files.stays_float32(name, a) or name.endswith(exact)
        kind = gguf_files.TYPES["F32" if single else dtype]
        if a.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf_files.TYPES["F16"]
        writer.add_tensor(name, gguf.quants.quantize(a, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
