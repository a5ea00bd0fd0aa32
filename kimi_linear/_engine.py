"""From a Config and tensors to what ``_core.Model`` takes."""

import numpy as np

from . import _core
from ._arrays import TYPE_IDS, as_array
from ._names import choice
from .context import ACTIVATIONS
from .load.gguf import FILE_TYPES
from .quantized import Quantized

CACHE_TYPES = {"float32": 0, "float16": 1, "q8_0": 8}
_PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # by the bytes that must divide their address
_MIXERS = {"kda": 0, "mla": 1, "gdn": 2, "attn": 3}
_FFNS = {"dense": 0, "moe": 1}
_NUMBERS = (
    "vocab_size", "hidden_size", "rms_norm_eps", "latent_eps", "l2_eps", "conv_width", "mla_heads", "nope_dim",
    "rope_dim", "v_head_dim", "kv_rank", "q_rank", "attn_heads", "attn_kv_heads", "attn_head_dim", "rotary_dim",
    "rope_base", "ffn_size", "n_experts", "experts_per_token", "shared_size", "moe_size", "n_groups", "top_groups",
    "routed_scale", "expert_latent", "attn_res_block", "streams", "stream_passes", "stream_eps", "index_heads",
    "index_dim", "index_topk", "index_pool", "index_eps",
)


def config_numbers(config, activations="float32"):
    """The config, and what its products compute with, as the dict of numbers that the C core reads."""
    numbers = {name: getattr(config, name) for name in _NUMBERS}
    if any(layer.mixer == "gdn" for layer in config.layers):
        delta = config.gdn_k_heads, config.gdn_v_heads, config.gdn_k_dim, config.gdn_v_dim
    else:
        delta = config.kda_heads, config.kda_heads, config.kda_head_dim, config.kda_head_dim
    numbers |= dict(zip(("delta_k_heads", "delta_v_heads", "delta_k_dim", "delta_v_dim"), delta, strict=True))
    numbers |= {
        "delta_tiled": int(config.gdn_tiled),
        "norm_plus_one": int(config.norm_plus_one),
        "shared_gated": int(config.shared_gated),
        "tied": int(config.tie_embeddings),
        "activations": ACTIVATIONS[activations],
        "gate_lower_bound": config.gate_lower_bound or 0.0,
        "kda_full_rank_gate": int(config.kda_full_rank_gate),
        "mla_gated": int(config.mla_gated),
        "expert_latent_norm": int(config.expert_latent_norm),
        "swiglu_limit": config.swiglu_limit or 0.0,
        "situ_beta": config.situ_beta or 0.0,
        "situ_linear_beta": config.situ_linear_beta or 0.0,
        "router": int(config.router_function == "softmax"),
        "renormalise": int(config.renormalise),
        "layers": [(_MIXERS[layer.mixer], _FFNS[layer.ffn]) for layer in config.layers],
    }
    return numbers


def core_model(context, config, tensors, activations="float32", progress=None):
    """A ``_core.Model`` over borrowed tensors.

    Parameters
    ----------
    context : Context
    config : Config
    tensors : mapping from canonical name to array, or to a TensorView of a mapped file
        What a GGUF stores otherwise goes to C as it lies, under the names of its `stored`.
    activations : {"float32", "int8", "bfloat16"}
    progress : callable, optional
        As for ``Model.from_pretrained``.
    """
    buffers, index, entries = [], {}, []

    def place(buffer):
        if id(buffer) not in index:
            index[id(buffer)] = len(buffers)
            buffers.append(buffer)
        return index[id(buffer)]

    for name, tensor in _as_stored(tensors):
        if hasattr(tensor, "file") and tensor.dtype in FILE_TYPES and tensor.nbytes:
            type_id = FILE_TYPES[tensor.dtype]
            if tensor.dtype not in _PLAIN or tensor.offset % _PLAIN[tensor.dtype] == 0:
                entries.append((name, place(tensor.file.mapping), tensor.offset, type_id, tuple(tensor.shape)))
                continue
        if isinstance(tensor, Quantized):
            entries.append((name, place(tensor.data), 0, FILE_TYPES[tensor.type], tensor.shape))
            continue
        a = tensor.array() if hasattr(tensor, "file") else as_array(tensor, name)
        if a.dtype not in TYPE_IDS:
            raise TypeError(f"{name} is {a.dtype}; it must be float32, float16 or bfloat16")
        a = np.ascontiguousarray(a).reshape(a.shape)
        entries.append((name, place(a.view(np.uint16) if a.dtype.itemsize == 2 else a), 0, TYPE_IDS[a.dtype], a.shape))
    return _core.Model(context._core, config_numbers(config, activations), buffers, entries, 0, progress)


def _as_stored(tensors):
    for name, tensor in tensors.items():
        if hasattr(tensor, "blocks"):
            yield name, tensor.blocks()
            continue
        partner = getattr(tensor, "partner", name)
        if partner != name and not hasattr(tensors[partner], "partner"):
            yield name, tensor.array()  # the other factor of what is stored was replaced: each goes by itself
            continue
        yield from getattr(tensor, "stored", {name: tensor}).items()


def planning_model(context, config, dtype):
    """A ``_core.Model`` without weights, of matrices all of one storage type: it can only be planned with."""
    entries = [(name, -1, 0, FILE_TYPES[dtype], tuple(shape)) for name, shape in config.weight_shapes().items()]
    return _core.Model(context._core, config_numbers(config), [], entries, 1)


def cache_type(name):
    """Type id of a cache; ValueError lists the names."""
    return CACHE_TYPES[choice(name, "cache", CACHE_TYPES)]
