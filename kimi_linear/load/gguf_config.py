"""The metadata of a GGUF of architecture ``kimi-linear``, as the content of a config.json.

Where the metadata and the tensors both tell a size they must agree; where a key is absent the tensors are asked.
Keys, and which of them not to rely on: docs/gguf.md.
"""

import re
import warnings
from collections.abc import Mapping

import numpy as np

from ..config import MOST_LAYERS, Config, ConfigError
from ..errors import FormatError
from . import gguf_kept
from .gguf import MetaArray, place
from .safetensors import TensorView
from .strict_json import show

ARCHITECTURE = "kimi-linear"
_PREFIX = ARCHITECTURE + "."

#: config.json's keys and the GGUF's, for messages.
NAMES = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length", "model_max_length": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "num_attention_heads": "attention.head_count",
    "linear_attn_config.num_heads": "attention.head_count", "linear_attn_config.head_dim": "kda.head_dim",
    "linear_attn_config.short_conv_kernel_size": "ssm.conv_kernel",
    "linear_attn_config.gate_lower_bound": "kda.gate_lower_bound", "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank", "qk_nope_head_dim": "attention.key_length_mla",
    "qk_rope_head_dim": "rope.dimension_count", "v_head_dim": "attention.value_length_mla",
    "num_experts": "expert_count", "num_experts_per_token": "expert_used_count",
    "num_shared_experts": "expert_shared_count", "moe_intermediate_size": "expert_feed_forward_length",
    "routed_scaling_factor": "expert_weights_scale", "moe_renormalize": "expert_weights_norm",
    "num_expert_group": "expert_group_count", "topk_group": "expert_group_used_count",
    "first_k_dense_replace": "leading_dense_block_count",
}
#: Known keys that change nothing here.
INERT = {
    "attention.value_length", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier", "expert_shared_feed_forward_length",
    "nextn_predict_layers",
}
_USED = {*NAMES.values(), "attention.head_count_kv", "attention.key_length", "expert_gating_func"}
_ROUTERS = {1: "softmax", 2: "sigmoid"}


def check_architecture(metadata: Mapping, where: str) -> None:
    """Raise FormatError unless the file is a Kimi-Linear model."""
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise FormatError(f"its general.architecture is {show(found)}; {ARCHITECTURE!r} is supported", where)


def read_config(metadata: Mapping, tensors: Mapping[str, TensorView], where: str) -> tuple[Config, dict]:
    """The config of a checked architecture, and config.json's content for it.

    Parameters
    ----------
    metadata : mapping
        Of the (first) file.
    tensors : mapping of str to TensorView
        Of all files, by their GGUF names.
    where : str
        The file, for messages.

    Returns
    -------
    config : Config
    content : dict
        As the folder had it that our converter read (gguf_kept.py); else the published form.

    Raises
    ------
    FormatError
        With every key that is missing, of the wrong type or value, or says other than the tensors do.
    """
    r = _Reader(metadata, tensors)
    d = _read(r)
    if r.problems:
        raise FormatError(r.problems, where)
    unknown = sorted(key for key in metadata if key.startswith(_PREFIX)
                     and key.removeprefix(_PREFIX) not in _USED | INERT)
    if unknown:
        warnings.warn(f"{where}: unknown keys, ignored: " + ", ".join(unknown), stacklevel=3)
    try:
        config = Config.from_dict(d)
        given = config.to_dict()
        content = gguf_kept.restored(given, metadata, r.problems)
        if r.problems:
            raise FormatError(r.problems, where)
        return (config if gguf_kept.same(content, given) else Config.from_dict(content)), content
    except ConfigError as error:
        raise FormatError([_renamed(problem) for problem in error.problems], where) from None


def _renamed(problem: str) -> str:
    """A sentence about config.json's keys, about the GGUF's."""
    keys = "|".join(map(re.escape, sorted(NAMES, key=len, reverse=True)))
    problem = re.sub(r"\b(bos|eos|pad)_token_id\b", r"tokenizer.ggml.\1_token_id", problem)
    return re.sub(rf"\b({keys})\b", lambda m: _PREFIX + NAMES[m[1]], problem)


class _Reader:
    """Typed access to keys and to tensors' sizes; problems are collected."""

    def __init__(self, metadata: Mapping, tensors: Mapping[str, TensorView]):
        self.metadata, self.tensors = metadata, tensors
        self.problems: list[str] = []

    def wrong(self, key: str, value: object, rule: str) -> None:
        shown = f"an array of {value.kind}" if isinstance(value, MetaArray) else show(value)
        self.problems.append(f"{key} is {shown}; it must be {rule}")

    def integer(self, key: str, default: int | None = None) -> int | None:
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return default
        if type(value) is int and 0 <= value < 2**63:
            return value
        self.wrong(_PREFIX + key, value, "an integer >= 0")
        return default

    def needed(self, key: str) -> int:
        value = self.integer(key)
        if value is None and self.metadata.get(_PREFIX + key) is None:
            self.problems.append(f"{_PREFIX}{key} is missing; it must be an integer >= 0")
        return value or 0

    def typed(self, key: str, kind: type, default=None):
        """A float (or bool) of that key; an integer will do for a float.

        A float32 becomes the shortest decimal that it is the rounding of: 1e-05, as config.json has it.
        """
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return default
        if kind is float and type(value) in (int, float):
            narrow = np.float32(value)
            return float(str(narrow)) if narrow == value else value
        if type(value) is kind:
            return value
        self.wrong(_PREFIX + key, value, "a number" if kind is float else "a bool")
        return default

    def per_layer(self, key: str, n: int) -> list[int]:
        """An integer for each of n layers: an array of so many, or one that holds for all."""
        value = self.metadata.get(_PREFIX + key)
        if isinstance(value, MetaArray) and value.count == n and value.kind.startswith(("int", "uint")):
            return [int(x) for x in value.values()]
        if type(value) is int:
            return [value] * n
        if value is None:
            self.problems.append(f"{_PREFIX}{key} is missing; it must have an integer for each of {n} layers")
        elif isinstance(value, MetaArray):
            self.problems.append(f"{_PREFIX}{key} is an array of {value.count} {value.kind}; it must have an integer "
                                 f"for each of {n} layers")
        else:
            self.wrong(_PREFIX + key, value, f"an integer for each of {n} layers")
        return []

    def ne(self, tensor: str, axis: int, short: int = 1) -> int | None:
        """A size of a tensor, the fastest axis 0; None where there is no such tensor or axis."""
        view = self.tensors.get(tensor)
        if view is None:
            return None
        sizes = view.shape[::-1]
        return sizes[axis] if axis < len(sizes) else short

    def size(self, key: str, tensor: str, axis: int, value: int | None = None) -> int | None:
        """A size that a key (or `value`, which was read from it) and a tensor tell: they must agree."""
        told = self.integer(key) if value is None else value
        found = self.ne(tensor, axis)
        if told is not None and found is not None and told != found:
            self.contradiction(key, told, tensor, f"is {found} along axis {axis}")
        return told if told is not None else found

    def contradiction(self, key: str, told: object, tensor: str, found: str) -> None:
        view = self.tensors[tensor]
        self.problems.append(f"{_PREFIX}{key} is {told}, but {tensor} {place(view)} {found} "
                             f"(its sizes are {list(view.shape[::-1])})")


def _read(r: _Reader) -> dict:
    n = r.needed("block_count")
    if not 1 <= n <= MOST_LAYERS:
        if not r.problems:
            r.wrong(_PREFIX + "block_count", n, f"an integer from 1 to {MOST_LAYERS}")
        return {}
    mla_layers = _mla_layers(r, n)
    if mla_layers is None:
        return {}
    mla, kda = ([i for i in range(n) if mla_layers[i] == kind] for kind in (True, False))
    eps = r.typed("attention.layer_norm_rms_epsilon", float)
    d = {
        "model_type": "kimi_linear", "num_hidden_layers": n, "rms_norm_eps": eps,
        "hidden_size": r.size("embedding_length", "token_embd.weight", 0),
        "vocab_size": _vocabulary(r),
        "model_max_length": r.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in r.tensors,
        "mla_use_nope": True,
    }
    heads = r.per_layer("attention.head_count", n)
    d["linear_attn_config"] = _kda(r, kda, heads) | {
        "kda_layers": [i + 1 for i in kda], "full_attn_layers": [i + 1 for i in mla]}
    return d | _mla(r, mla, heads) | _ffn(r, n) | _specials(r)


def _mla_layers(r: _Reader, n: int) -> list[bool] | None:
    """Whether each layer is MLA, by head_count_kv, in which 0 marks KDA; the tensors must agree."""
    marks = r.per_layer("attention.head_count_kv", n)
    for i, mark in enumerate(marks):
        kda, mla = f"blk.{i}.ssm_a", f"blk.{i}.attn_kv_a_mqa.weight"
        if mark == 0 and mla in r.tensors:
            r.contradiction(f"attention.head_count_kv[{i}]", "0, which marks KDA", mla, "belongs to MLA")
        elif mark != 0 and kda in r.tensors:
            r.contradiction(f"attention.head_count_kv[{i}]", f"{mark}, which marks MLA", kda, "belongs to KDA")
    return [mark != 0 for mark in marks] or None


def _vocabulary(r: _Reader) -> int | None:
    """From its key, the embedding and the list of tokens, as far as they are there."""
    size = r.size("vocab_size", "token_embd.weight", 1)
    tokens = r.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, MetaArray) and size is not None and tokens.count != size:
        r.problems.append(f"tokenizer.ggml.tokens has {tokens.count} tokens, but the model's vocabulary has {size}")
    return size


def _of_kind(r: _Reader, heads: list[int], layers: list[int]) -> int | None:
    """The head count of these layers, which must be the same."""
    found = {heads[i] for i in layers} if heads else set()
    if len(found) > 1:
        r.problems.append(f"{_PREFIX}attention.head_count differs among layers of one kind: {sorted(found)}")
    return found.pop() if found else None


def _kda(r: _Reader, layers: list[int], heads: list[int]) -> dict:
    if not layers:
        return {}
    at = f"blk.{layers[0]}."
    width = r.size("kda.head_dim", at + "ssm_f_a.weight", 1)
    return {
        "num_heads": r.size("attention.head_count", at + "ssm_beta.weight", 1, _of_kind(r, heads, layers)),
        "head_dim": r.size("kda.head_dim", at + "ssm_norm.weight", 0, width),
        "short_conv_kernel_size": r.size("ssm.conv_kernel", at + "ssm_conv1d_q.weight", 0),
        "gate_lower_bound": r.typed("kda.gate_lower_bound", float),
    }


def _mla(r: _Reader, layers: list[int], heads: list[int]) -> dict:
    if not layers:
        return {}
    at = f"blk.{layers[0]}."
    H = _of_kind(r, heads, layers)
    rank = r.size("attention.kv_lora_rank", at + "attn_kv_a_norm.weight", 0)
    q_rank = r.size("attention.q_lora_rank", at + "attn_q_a.weight", 1)
    q = at + ("attn_q_b.weight" if q_rank else "attn_q.weight")
    rope, key = _rope_width(r, at + "attn_kv_a_mqa.weight", rank), r.integer("attention.key_length_mla")
    rows = r.ne(q, 1)
    if rows is not None and H:
        if key is not None and rows != H * key:
            r.contradiction("attention.key_length_mla", f"{key} of {H} heads", q, f"has {rows} rows")
        elif key is None and rows % H == 0:
            key = rows // H
    value = r.integer("attention.value_length_mla")
    width = r.ne(at + "attn_output.weight", 0)
    if width is not None and H:
        if value is not None and width != H * value:
            r.contradiction("attention.value_length_mla", f"{value} of {H} heads", at + "attn_output.weight",
                            f"takes {width} values")
        elif value is None and width % H == 0:
            value = width // H
    if key is not None and rope is not None and key <= rope:
        r.problems.append(f"{_PREFIX}attention.key_length_mla is {key}; it must be above the {rope} of "
                          f"rope.dimension_count, which it includes")
    return {
        "num_attention_heads": H, "kv_lora_rank": rank, "q_lora_rank": q_rank or None, "v_head_dim": value,
        "qk_rope_head_dim": rope, "qk_nope_head_dim": None if key is None or rope is None else key - rope,
    }


def _rope_width(r: _Reader, kv_a: str, rank: int | None) -> int | None:
    """Width of the shared part of a key: rows of kv_a behind the latent's.

    The key rope.dimension_count says the same, but in files whose converter wrote the config's head_dim (a model
    width over heads, 72) there; and so says key_length.
    """
    told, rows = r.integer("rope.dimension_count"), r.ne(kv_a, 1)
    if rows is None or rank is None:
        return told
    found = rows - rank
    heads, D = r.metadata.get(_PREFIX + "attention.head_count"), r.integer("embedding_length")
    head_dim = D // heads if type(heads) is int and heads > 0 and D else None
    if told is not None and told not in (found, head_dim):
        r.contradiction("rope.dimension_count", told, kv_a, f"has {rows} rows, {found} behind the latent's {rank}")
    length = r.integer("attention.key_length")
    if length is not None and length not in (rows, head_dim, r.integer("attention.key_length_mla")):
        r.contradiction("attention.key_length", length, kv_a, f"has {rows} rows")
    return found


def _ffn(r: _Reader, n: int) -> dict:
    sparse = [i for i in range(n) if f"blk.{i}.ffn_gate_inp.weight" in r.tensors]
    dense = [i for i in range(n) if f"blk.{i}.ffn_gate.weight" in r.tensors]
    d: dict = {"num_experts": 0}
    if dense:
        d["intermediate_size"] = r.size("feed_forward_length", f"blk.{dense[0]}.ffn_gate.weight", 1)
    else:
        d["intermediate_size"] = r.integer("feed_forward_length")
    told = r.integer("leading_dense_block_count")
    leading = told if told is not None else (sparse[0] if sparse else n)
    for i in range(n):
        wrong = f"blk.{i}.ffn_gate.weight" if i >= leading else f"blk.{i}.ffn_gate_inp.weight"
        if wrong in r.tensors and (sparse or i < leading):
            r.contradiction("leading_dense_block_count", leading, wrong,
                            f"makes layer {i} {'sparse' if i < leading else 'dense'}")
            break
    if not sparse:
        if n_experts := r.integer("expert_count"):
            r.problems.append(f"{_PREFIX}expert_count is {n_experts}, but no layer has a router, ffn_gate_inp.weight")
        return d
    at = f"blk.{sparse[0]}."
    width = r.size("expert_feed_forward_length", at + "ffn_gate_exps.weight", 1)
    shared = r.ne(at + "ffn_gate_shexp.weight", 1) or 0
    n_shared = r.integer("expert_shared_count", shared // width if width else 0)
    if shared and width and n_shared * width != shared:
        r.contradiction("expert_shared_count", f"{n_shared} of width {width}", at + "ffn_gate_shexp.weight",
                        f"has {shared} rows")
    function = r.integer("expert_gating_func", 2)
    if function not in _ROUTERS:
        r.wrong(_PREFIX + "expert_gating_func", function, "1 (softmax) or 2 (sigmoid)")
    return d | {
        "first_k_dense_replace": leading,
        "num_experts": r.size("expert_count", at + "ffn_gate_inp.weight", 1),
        "num_experts_per_token": r.needed("expert_used_count"),
        "num_shared_experts": n_shared, "moe_intermediate_size": width,
        "moe_router_activation_func": _ROUTERS.get(function),
        "moe_renormalize": r.typed("expert_weights_norm", bool, True),
        "routed_scaling_factor": r.typed("expert_weights_scale", float, 1.0),
        "num_expert_group": r.integer("expert_group_count", 1), "topk_group": r.integer("expert_group_used_count", 1),
    }


def _specials(r: _Reader) -> dict:
    """Ids of special tokens; a generation may end with eos and with eot."""
    found = {}
    for name in ("bos", "eos", "eot", "padding"):
        value = r.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            r.wrong(f"tokenizer.ggml.{name}_token_id", value, "an integer")
        elif value is not None:
            found[name] = value
    eos = list(dict.fromkeys(found[name] for name in ("eos", "eot") if name in found))
    return {"bos_token_id": found.get("bos"), "eos_token_id": eos, "pad_token_id": found.get("padding")}
