"""Write a GGUF file of a config with random weights, as llama.cpp's converter would name and store them.

A matrix is made of blocks that are drawn from a pool of its type and deviation, so a file of 16 GB takes a minute and
no memory. No two rows are the same in practice. Norms, convolutions, routers, gates and biases are float32, as the
converter keeps them, and random one by one.
"""

import importlib.resources
import itertools
import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import gguf
import numpy as np
from random_blocks import TYPES, block_of, random_blocks, type_for

from kimi_linear.load import gguf_names
from kimi_linear.load.gguf_names import MODEL
from kimi_linear.load.safetensors import atomic_file
from kimi_linear.random_weights import random_tensor

__all__ = ["Tensor", "plan_types", "tensors_of", "vocabulary", "write_gguf"]

POOL = 1 << 22      # bytes of a pool of blocks: it stays in a processor's cache
PIECE = 1 << 24     # bytes, about, that are drawn at once
GAIN = 1.2          # of a matrix, as in kimi_linear.random_weights
SPECIALS = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
            6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
            11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
            14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>", 254: "[UNK]",
            255: "[PAD]"}  # by their distance from the first special id
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5

LAYER = {name: tensor for name, tensor in gguf_names.LAYER.items() if name != "self_attn.kv_b_proj.weight"} | {
    f"block_sparse_moe.experts.0.{name}.weight": tensor for name, tensor in gguf_names.EXPERTS.items()}


@dataclass
class Tensor:
    """A tensor of the file: its name there and in a checkpoint, its shape row-major, its storage type."""

    name: str
    source: str
    shape: tuple[int, ...]
    fan_in: int            # values that an output of it sums in the model
    type: str = "F32"
    asked: str = "F32"

    @property
    def matrix(self):
        """Whether it may be of another type than F32."""
        return (len(self.shape) > 1 and self.name.endswith(".weight") and "conv1d" not in self.name
                and "ffn_gate_inp" not in self.name)

    @property
    def nbytes(self):
        values, n_bytes = block_of(self.type)
        return math.prod(self.shape) * n_bytes // values


def tensors_of(config):
    """Every tensor of a file, F32, in the order of their use."""
    found = []
    for source, shape in config.weight_shapes().items():
        at, part = _place(source)
        if part in LAYER or source in MODEL:
            found.append(Tensor(at + (LAYER.get(part) or MODEL[source]), source, _shape(config, part, shape),
                                shape[-1]))
        elif part == "self_attn.kv_b_proj.weight":
            H, R = config.mla_heads, config.kv_rank
            found += [Tensor(at + "attn_k_b.weight", source, (H, R, config.nope_dim), R),
                      Tensor(at + "attn_v_b.weight", source, (H, config.v_head_dim, R), R)]
        elif ".experts." not in part:
            raise ValueError(f"{source} has no name in a GGUF file")
    return found


def _place(source):
    """("blk.3.", name within the layer), or ("", name)."""
    if not source.startswith("model.layers."):
        return "", source
    layer, part = source.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.", part


def _shape(config, part, shape):
    if "conv1d" in part:
        return (1, shape[0], 1, shape[1])
    if part == "self_attn.A_log":
        return (1, 1, shape[0], 1)
    return (config.n_experts, *shape) if ".experts." in part else shape


def plan_types(tensors, default, mapping=()):
    """Give each matrix its type: of the first (pattern, type) whose pattern fits its name, or the default.

    Returns
    -------
    list of str
        A sentence for each type that does not divide some rows, with what they got.
    """
    for name in (default, *(kind for _, kind in mapping)):
        if name not in TYPES:
            raise ValueError(f"the type is {name!r}; it must be one of {', '.join(TYPES)}")
    unused = [pattern for pattern, _ in mapping if not any(fnmatchcase(t.name, pattern) for t in tensors if t.matrix)]
    if unused:
        raise ValueError(f"no matrix is named like {', '.join(unused)}")
    fallen = {}
    for t in tensors:
        if t.matrix:
            t.asked = next((kind for pattern, kind in mapping if fnmatchcase(t.name, pattern)), default)
            t.type = type_for(t.asked, t.shape[-1])
            if t.type != t.asked:
                fallen.setdefault((t.asked, t.type, t.shape[-1]), []).append(t.name)
    return [f"{asked} does not divide rows of {columns}: {len(names)} tensors are {got}, such as {names[0]}"
            for (asked, got, columns), names in fallen.items()]


# ---- the file ----

def write_gguf(path, config, tensors, *, name, seed=0, progress=lambda n: None):
    """Write the file, under another name until it is whole.

    Parameters
    ----------
    path : Path
    config : Config
    tensors : list of Tensor
    name : str
        Of the model, in the metadata.
    seed : int
    progress : callable
        Called with bytes as they are written.
    """
    with atomic_file(path) as file:
        writer = gguf.GGUFWriter(None, "kimi-linear")
        add_metadata(writer, config, name)
        for t in tensors:
            kind = gguf.GGMLQuantizationType[t.type]
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, kind)
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY  # a file that is open already
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(file, file.tell())
        pools = {}
        for t in tensors:
            for piece in pieces(t, seed, pools):
                file.write(piece)
                progress(len(piece))
            writer.write_padding(file, t.nbytes)


def pieces(tensor, seed, pools):
    """The tensor's bytes, `PIECE` at a time; `pools` keeps what other tensors can use."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if not tensor.matrix:
        a = random_tensor(tensor.source, tensor.shape, rng)
        yield memoryview(-np.exp(a) if tensor.source.endswith("A_log") else a).cast("B")
        return
    std = 1.0 if "embed_tokens" in tensor.source else GAIN / tensor.fan_in**0.5
    key = tensor.type, std
    if key not in pools:
        pools[key] = random_blocks(tensor.type, std, POOL // block_of(tensor.type)[1], np.random.default_rng(seed))
    pool = pools[key]
    most = PIECE // pool.shape[1] * pool.shape[1]
    for begin in range(0, tensor.nbytes, most):
        n_bytes = min(most, tensor.nbytes - begin)
        chosen = rng.integers(0, len(pool), -(-n_bytes // pool.shape[1]))
        yield memoryview(pool.take(chosen, axis=0)).cast("B")[:n_bytes]


# ---- metadata ----

def add_metadata(writer, config, name):
    """What llama.cpp's converter writes for this architecture (keys as its gguf-py/gguf/constants.py names them)."""
    c, at = config, "kimi-linear."
    kda, moe = any(s.mixer == "kda" for s in c.layers), any(s.ffn == "moe" for s in c.layers)
    dense = sum(s.ffn == "dense" for s in c.layers)
    if any(s.ffn == "dense" for s in c.layers[dense:]):
        raise ValueError("dense layers behind sparse ones have no key in a GGUF file")
    writer.add_name(name)
    writer.add_quantization_version(2)
    integers = {
        "block_count": c.n_layers, "context_length": c.max_length, "embedding_length": c.hidden_size,
        "feed_forward_length": c.ffn_size, "vocab_size": c.vocab_size, "attention.kv_lora_rank": c.kv_rank,
        "attention.key_length": c.kv_rank + c.rope_dim, "attention.value_length": c.kv_rank,
        "attention.key_length_mla": c.nope_dim + c.rope_dim, "attention.value_length_mla": c.v_head_dim,
        "rope.dimension_count": c.rope_dim, "leading_dense_block_count": dense,
    }
    if c.q_rank:
        integers["attention.q_lora_rank"] = c.q_rank
    if kda:
        integers |= {"ssm.conv_kernel": c.conv_width, "kda.head_dim": c.kda_head_dim}
    if moe:
        integers |= {
            "expert_count": c.n_experts, "expert_used_count": c.experts_per_token,
            "expert_shared_count": c.n_shared_experts, "expert_feed_forward_length": c.moe_size,
            "expert_gating_func": 2 if c.router_function == "sigmoid" else 1, "expert_group_count": c.n_groups,
            "expert_group_used_count": c.top_groups,
        }
        writer.add_float32(at + "expert_weights_scale", c.routed_scale)
        writer.add_bool(at + "expert_weights_norm", c.renormalise)
    for key, value in integers.items():
        writer.add_uint32(at + key, value)
    heads = [c.kda_heads if s.mixer == "kda" else c.mla_heads for s in c.layers]
    if len(set(heads)) == 1:
        writer.add_uint32(at + "attention.head_count", heads[0])
    else:
        writer.add_array(at + "attention.head_count", heads)
    writer.add_array(at + "attention.head_count_kv", [int(s.mixer == "mla") for s in c.layers])
    writer.add_float32(at + "attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(at + "rope.freq_base", 10000.0)
    add_tokenizer(writer, c)


def add_tokenizer(writer, config):
    tokens, types, merges = vocabulary(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("kimi-k2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    first = config.vocab_size - 256
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(first + 1)
    writer.add_pad_token_id(first + 255)
    template = importlib.resources.files("kimi_linear") / "data" / "tiny" / "chat_template.jinja"
    writer.add_chat_template(template.read_text())


def vocabulary(n):
    """Tokens, types and merges of a made-up vocabulary that ends with the published special tokens.

    The bytes come first, then words of two letters, of three, and so on: each merges a shorter word with a letter.
    """
    if n < 512:
        raise ValueError(f"the vocabulary is {n}; it must have 512 tokens or more: 256 bytes and 256 special ones")
    alphabet = byte_alphabet()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    starts = [*letters, alphabet[32]]  # a space may begin a word
    words = ("".join(w) for size in itertools.count(1) for w in itertools.product(starts, *[letters] * size))
    words = list(itertools.islice(words, n - 512))
    tokens, types = [*alphabet, *words], [NORMAL] * (n - 256)
    for i in range(256):
        name = SPECIALS.get(i)
        tokens.append(name or f"[PAD{n - 256 + i}]")
        types.append(UNUSED if name is None else USER if "tool_" in name else CONTROL)
    return tokens, types, [f"{word[:-1]} {word[-1]}" for word in words]


def byte_alphabet():
    """The character that stands for each byte: itself where it can be seen, the next from U+0100 where not."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return [chr(b if b in seen else next(others)) for b in range(256)]
