"""Qwen3-Next and Qwen3.5 files for tests: GGUFs as llama.cpp's converter writes them, and folders of other spellings.

Names come from the `gguf` package's own table, what happens to the values from conversion/qwen.py of llama.cpp, written
here a second time.
"""

import json

import gguf
import numpy as np
from conftest import canonical_weights

from kimi_linear.config import Config
from kimi_linear.load import write_safetensors

NAMES = ("qwen-a", "qwen35-a", "qwen35-moe")
ARCHITECTURES = {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
_ENUM = {gguf.MODEL_ARCH_NAMES[x]: x for x in (gguf.MODEL_ARCH.QWEN3NEXT, gguf.MODEL_ARCH.QWEN35,
                                                 gguf.MODEL_ARCH.QWEN35MOE)}


def config_of(folder):
    return Config.from_file(folder / "config.json")


def architecture(config):
    return ARCHITECTURES[config.model_type]


def tile(x, c, width, axis=0):
    """Value heads of an axis, in the folder's order, in the file's: those of one key head apart."""
    x = np.moveaxis(x, axis, 0)
    heads = x.reshape(c.gdn_k_heads, c.gdn_v_heads // c.gdn_k_heads, width, *x.shape[1:])
    return np.moveaxis(heads.swapaxes(0, 1).reshape(x.shape), 0, axis)


def _tiled(c, name, x):
    V, before = c.gdn_v_dim, 2 * c.gdn_k_heads * c.gdn_k_dim
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return np.concatenate([x[:before], tile(x[before:], c, V)])
    if name.endswith("in_proj_z.weight"):
        return tile(x, c, V)
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
        return tile(x, c, 1)
    return tile(x, c, V, axis=1) if name.endswith("linear_attn.out_proj.weight") else x


def _ungrouped(c, x):
    """qkv and z of in_proj_qkvz."""
    width = c.gdn_v_heads // c.gdn_k_heads * c.gdn_v_dim
    groups = x.reshape(c.gdn_k_heads, -1, x.shape[1])
    q, k, v, z = np.split(groups, np.cumsum([c.gdn_k_dim, c.gdn_k_dim, width]), axis=1)
    return np.concatenate([part.reshape(-1, x.shape[1]) for part in (q, k, v)]), z.reshape(-1, x.shape[1])


def converted(config, weights, *, legacy=False, fused=False):
    """GGUF name -> array, in float32.

    `legacy` leaves in_proj_qkvz whole; `fused` has one tensor for gate and up of the experts, and one for q, k and v.
    """
    c, kind = config, architecture(config)
    names = gguf.get_tensor_name_map(_ENUM[kind], c.n_layers)
    out, stacks = {}, {}
    for name, x in weights.items():
        x = x.astype(np.float32)
        if kind != "qwen3next":
            x = _tiled(c, name, x)
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            x = x + np.float32(1)
        if name.endswith("A_log"):
            x = -np.exp(x.astype(np.float64)).astype(np.float32)
        if ".mlp.experts." in name:
            head, rest = name.split(".experts.")
            stacks.setdefault(f"{head}.experts.{rest.split('.')[1]}.weight", []).append(x)
            continue
        blk = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("in_proj_qkvz.weight") and not legacy:
            out[f"blk.{blk}.attn_qkv.weight"], out[f"blk.{blk}.attn_gate.weight"] = _ungrouped(c, x)
            continue
        name = name.replace(".dt_bias", ".dt_proj.bias")
        out[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x[0] if "shared_expert_gate" in name else x
    for name, parts in stacks.items():
        out[names.get_name(name, try_suffixes=(".weight",))] = np.stack(parts)
    return _fused(out) if fused else out


def _fused(out):
    for name in [n for n in out if n.endswith("ffn_gate_exps.weight")]:
        up = name.replace("gate", "up")
        out[name.replace("gate", "gate_up")] = np.concatenate([out.pop(name), out.pop(up)], axis=1)
    for name in [n for n in out if n.endswith("attn_q.weight")]:
        out[name.replace("attn_q", "attn_qkv")] = np.concatenate(
            [out.pop(name.replace("attn_q", f"attn_{x}")) for x in "qkv"])
    return out


def metadata(config):
    """(key below the architecture's name, value) as the converter writes them; a list is an array."""
    c = config
    keys = {
        "block_count": c.n_layers, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "attention.head_count": c.attn_heads, "attention.head_count_kv": c.attn_kv_heads,
        "attention.key_length": c.attn_head_dim, "attention.value_length": c.attn_head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps), "rope.freq_base": float(c.rope_base),
        "rope.dimension_count": c.rotary_dim, "ssm.conv_kernel": c.conv_width, "ssm.state_size": c.gdn_k_dim,
        "ssm.group_count": c.gdn_k_heads, "ssm.time_step_rank": c.gdn_v_heads,
        "ssm.inner_size": c.gdn_v_heads * c.gdn_v_dim, "full_attention_interval": 4,
    }
    if c.ffn_size:
        keys["feed_forward_length"] = c.ffn_size
    if c.model_type != "qwen3_next":
        keys["rope.dimension_sections"] = [2, 1, 1, 0]
    if c.n_experts:
        keys |= {"expert_count": c.n_experts, "expert_used_count": c.experts_per_token,
                 "expert_feed_forward_length": c.moe_size, "expert_shared_feed_forward_length": c.shared_size}
    return keys


def write(path, folder, *, keys=None, drop=(), tensors=None, more=None, **shape):
    """A GGUF of a folder in float32; `keys` replace those below the architecture's name, None takes one away."""
    config = config_of(folder)
    stored = converted(config, canonical_weights(folder / "model.safetensors"), **shape)
    stored = tensors(stored) if tensors else stored
    kind = architecture(config)
    writer = gguf.GGUFWriter(str(path), kind)
    for key, value in (metadata(config) | (keys or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string,
               list: writer.add_array}
        if value is not None:
            add[type(value)](f"{kind}.{key}", value)
    for key in ("bos", "eos", "pad"):
        getattr(writer, f"add_{key}_token_id")({"bos": 1, "eos": 2, "pad": 0}[key])
    if more is not None:
        more(writer)
    for name, x in stored.items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fused_weights(weights):
    """The experts of each layer in two tensors, as published Qwen3.5 files have them."""
    out, found = {}, {}
    for name, x in weights.items():
        if ".experts." in name:
            head, rest = name.split(".experts.")
            e, part, _ = rest.split(".")
            found.setdefault(head, {})[int(e), part] = x
        else:
            out[name] = x
    for head, parts in found.items():
        n = 1 + max(e for e, _ in parts)
        gate_up = [np.concatenate([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(n)]
        out[f"{head}.experts.gate_up_proj"] = np.stack(gate_up)
        out[f"{head}.experts.down_proj"] = np.stack([parts[e, "down_proj"] for e in range(n)])
    return out


def write_folder(path, source, change=None, **config):
    """A copy of a folder: `change` makes other tensors of its own; keys of config.json that are None go away."""
    path.mkdir()
    d = json.loads((source / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in d.items() if value is not None}))
    weights = canonical_weights(source / "model.safetensors")
    weights = {name: x[:, None] if name.endswith("conv1d.weight") else x for name, x in weights.items()}
    write_safetensors(path / "model.safetensors", change(weights) if change else weights)
    return path
