"""Kimi K3 as a GGUF of another converter, for tests: llama.cpp's names and keys, written here a second time.

No key of ours is in it. Bytes of experts are packed a second time, too: by columns of codes.
"""

import json

import gguf
import gguf_files
import numpy as np
from conftest import read_safetensors

from kimi_linear.config import Config
from kimi_linear.load import write_safetensors

CASES = ("k3-a", "k3-b")
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])  # E2M1
K3 = {
    "block_sparse_moe.routed_expert_down_proj.weight": "ffn_routed_down.weight",
    "block_sparse_moe.routed_expert_norm.weight": "ffn_routed_norm.weight",
    "block_sparse_moe.routed_expert_up_proj.weight": "ffn_routed_up.weight",
}
SCORES = {"self_attention_res": "attn_res_score.weight", "mlp_res": "ffn_res_score.weight"}


def weights_of(folder):
    """(Config, canonical name -> array) of a folder: A_log without padding, packed matrices as (codes, scales)."""
    config = Config.from_file(folder / "config.json")
    out = {}
    for name, x in read_safetensors(folder / "model.safetensors").items():
        name = name.removeprefix("language_model.")
        if name.endswith("A_log"):
            x = x.reshape(-1)[: config.kda_heads]
        elif name.endswith("conv1d.weight"):
            x = x.reshape(len(x), -1)
        elif name.endswith("_packed"):
            codes = np.empty((len(x), 2 * x.shape[1]), np.uint8)
            codes[:, ::2], codes[:, 1::2] = x & 15, x >> 4
            name, x = name.removesuffix("_packed"), codes
        out[name] = x
    scales = [name for name in out if name.endswith("_scale")]
    return config, out | {name.removesuffix("_scale"): (out[name.removesuffix("_scale")], out.pop(name))
                          for name in scales}


def values(w):
    """An array, or codes and scales, as float32."""
    if not isinstance(w, tuple):
        return w.astype(np.float32)
    codes, scales = w
    return (CODES[codes] * np.repeat(np.ldexp(1.0, scales.astype(int) - 127), 32, axis=1)).astype(np.float32)


def blocks(w):
    """ggml's blocks of codes and scales."""
    codes, scales = w
    groups = codes.reshape(len(codes), -1, 32)
    parts = [scales[..., None], groups[..., :16] + 16 * groups[..., 16:]]
    return np.concatenate(parts, axis=-1).astype(np.uint8).reshape(len(codes), -1)


def converted(config, weights):
    """GGUF name -> array in float32; of packed experts their blocks, uint8."""
    c = config
    plain = {name: values(w) for name, w in weights.items() if ".experts." not in name}
    out = {}
    for name, a in plain.items():
        if name in gguf_files.TOP:
            out[gguf_files.TOP[name]] = a
    for i, spec in enumerate(c.layers):
        at, blk = f"model.layers.{i}.", f"blk.{i}."
        mine = {name.removeprefix(at): a for name, a in plain.items() if name.startswith(at)}
        gate = {"kda": "ssm_g.weight", "mla": "attn_gate.weight"}[spec.mixer]
        names = gguf_files.PLAIN | K3 | {"self_attn.g_proj.weight": gate}
        out |= {blk + names[name]: a for name, a in mine.items() if name in names}
        out |= {blk + stored: mine[f"{score}_norm.weight"] * mine[f"{score}_proj.weight"][0]
                for score, stored in SCORES.items() if f"{score}_norm.weight" in mine}
        if spec.mixer == "kda":
            out |= {blk + name: a for name, a in gguf_files._kda(c, mine, 4).items()}
            out[blk + "ssm_a"] = out[blk + "ssm_a"].reshape(-1)
        else:
            heads = mine["self_attn.kv_b_proj.weight"].reshape(c.mla_heads, -1, c.kv_rank)
            out[blk + "attn_k_b.weight"] = np.ascontiguousarray(heads[:, : c.nope_dim].transpose(0, 2, 1))
            out[blk + "attn_v_b.weight"] = np.ascontiguousarray(heads[:, c.nope_dim :])
        for part, stored in gguf_files.EXPERTS.items() if spec.ffn == "moe" else ():
            stack = [weights[f"{at}block_sparse_moe.experts.{e}.{part}.weight"] for e in range(c.n_experts)]
            out[blk + stored] = np.stack([blocks(w) if isinstance(w, tuple) else values(w) for w in stack])
    if c.attn_res_block:
        score = "model.output_attn_res_{}.weight"
        out["output_res_score.weight"] = plain[score.format("norm")] * plain[score.format("proj")][0]
    return out


def metadata(c):
    """Key below ``kimi-k3.`` -> value, as llama.cpp's converter writes it."""
    keys = gguf_files.metadata(c) | {"attention.value_length": c.kv_rank, "expert_weights_norm": c.renormalise}
    if c.gate_lower_bound is not None:
        keys["kda.gate_lower_bound"] = float(c.gate_lower_bound)
    own = {"activation.situ_beta": c.situ_beta, "activation.situ_linear_beta": c.situ_linear_beta,
           "attn_res.block_size": c.attn_res_block, "expert_latent_length": c.expert_latent}
    return keys | {key: value for key, value in own.items() if value}


def write(path, folder, dtype="BF16", *, keys=None, drop=(), tensors=None, more=None):
    """A GGUF of a folder; the arguments are those of `gguf_files.write`."""
    config, weights = weights_of(folder)
    stored = converted(config, weights)
    stored = {name: a for name, a in (tensors(stored) if tensors else stored).items() if name not in drop}
    writer = gguf.GGUFWriter(str(path), "kimi-k3")
    for key, value in (metadata(config) | (keys or {})).items():
        gguf_files._add(writer, "kimi-k3." + key, value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if more is not None:
        more(writer)
    for name, a in stored.items():
        kind = gguf_files.TYPES["F32" if gguf_files.stays_float32(name, a) else dtype]
        if a.dtype == np.uint8:
            writer.add_tensor(name, a, raw_dtype=gguf_files.TYPES["MXFP4"])
        else:
            writer.add_tensor(name, gguf.quants.quantize(a, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed_folder(target, folder, change=None, config=None):
    """A copy of a folder, its tensors (as they are called there) and the content of its config.json changed."""
    tensors = read_safetensors(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config(content) if config else content))
    write_safetensors(target / "model.safetensors", change(tensors) if change else tensors)
    return target
