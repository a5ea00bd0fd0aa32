"""The metadata of a GGUF as the content of a config.json: any architecture's, and here those of the Kimi family.

Where the metadata and the tensors both tell a size they must agree; where a key is absent the tensors are asked.
Keys, and which of them not to rely on: docs/gguf.md.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..config import Config, ConfigError
from ..errors import FormatError
from . import gguf_config_glm as glm
from . import gguf_config_qwen as qwen
from . import gguf_kept
from .gguf import place
from .gguf_keys import Keys
from .safetensors import TensorView
from .strict_json import show

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
#: What ``kimi-k3`` has beside them.
K3_NAMES = {
    "activation_situ_beta": "activation.situ_beta", "activation_situ_linear_beta": "activation.situ_linear_beta",
    "attn_res_block_size": "attn_res.block_size", "routed_expert_hidden_size": "expert_latent_length",
}
#: Known keys that change nothing here.
INERT = {
    "attention.value_length", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier", "expert_shared_feed_forward_length",
    "nextn_predict_layers",
}
_USED = {*NAMES.values(), "attention.head_count_kv", "attention.key_length", "expert_gating_func"}
_ROUTERS = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True)
class Architecture:
    """How a kind of GGUF says what config.json says.

    Attributes
    ----------
    name : str
        Its general.architecture.
    read : callable
        From `Keys` to the content of a config.json.
    names : dict of str to str
        config.json's keys and the GGUF's, for messages.
    known : set of str
        Keys below the name that are read, or change nothing.
    form : dict
        Fields of the Config by which the file's tensors are others than the folder's.
    described : callable
        What `Config.to_dict` lacks of config.json and the file says: (Keys, content) to content.
    """

    name: str
    read: Callable
    names: Mapping[str, str]
    known: frozenset
    form: Mapping = field(default_factory=dict)
    described: Callable = lambda keys, content: content


def architecture_of(config: Config) -> Architecture:
    """The architecture that a model is written as; ValueError where GGUF has none for it."""
    if config.model_type not in _OF_MODEL_TYPE:
        raise ValueError(f"model_type is {config.model_type!r}; a GGUF can hold {', '.join(_OF_MODEL_TYPE)}")
    name = _OF_MODEL_TYPE[config.model_type]
    return ARCHITECTURES["kimi-k3" if name == "kimi-linear" and _has_parts_of_k3(config) else name]


def _has_parts_of_k3(c: Config) -> bool:
    """Whether a model of the Kimi family has what ``kimi-linear`` has no key or tensor for."""
    return c.situ_beta is not None or bool(c.attn_res_block or c.expert_latent or c.mla_gated or c.kda_full_rank_gate)


def stored_form(config: Config) -> Config:
    """A config of a folder as that of its GGUF."""
    return replace(config, **architecture_of(config).form)


def check_architecture(metadata: Mapping, where: str) -> None:
    """Raise FormatError unless the file's architecture is one of `ARCHITECTURES`."""
    found = metadata.get("general.architecture")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        names = ", ".join(map(repr, ARCHITECTURES))
        raise FormatError(f"its general.architecture is {show(found)}; supported are {names}", where)


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
        Of the tensors as they lie (`Architecture.form`).
    content : dict
        As the folder had it that our converter read (gguf_kept.py); else the published form.

    Raises
    ------
    FormatError
        With every key that is missing, of the wrong type or value, or says other than the tensors do.
    """
    kind = ARCHITECTURES[metadata["general.architecture"]]
    r = Keys(kind.name, metadata, tensors)
    d = kind.read(r)
    if r.problems:
        raise FormatError(r.problems, where)
    unknown = sorted(key for key in metadata if key.startswith(r.prefix)
                     and key.removeprefix(r.prefix) not in kind.known)
    if unknown:
        warnings.warn(f"{where}: unknown keys, ignored: " + ", ".join(unknown), stacklevel=3)
    try:
        config = Config.from_dict(d)
        given = kind.described(r, config.to_dict())
        content = gguf_kept.restored(given, metadata, r.problems)
        if r.problems:
            raise FormatError(r.problems, where)
        if not gguf_kept.same(content, given):
            config = Config.from_dict(content)
        return replace(config, **kind.form), content
    except ConfigError as error:
        raise FormatError([_renamed(problem, kind) for problem in error.problems], where) from None


def _renamed(problem: str, kind: Architecture) -> str:
    """A sentence about config.json's keys, about the GGUF's."""
    keys = "|".join(map(re.escape, sorted(kind.names, key=len, reverse=True)))
    problem = re.sub(r"\b(bos|eos|pad)_token_id\b", r"tokenizer.ggml.\1_token_id", problem)
    return re.sub(rf"\b({keys})\b", lambda m: f"{kind.name}.{kind.names[m[1]]}", problem)


# ---- kimi-linear -----------------------------------------------------------------------------------


def _read(r: Keys) -> dict:
    n = r.layers()
    return _of_layers(r, n, r.per_layer("attention.head_count_kv", n)) if n else {}


def _of_layers(r: Keys, n: int, marks: list[int]) -> dict:
    """The same of n layers, of which 0 among `marks` says which are KDA; there may be more blocks."""
    mla_layers = _mla_layers(r, marks)
    if mla_layers is None:
        return {}
    mla, kda = ([i for i in range(n) if mla_layers[i] == kind] for kind in (True, False))
    eps = r.typed("attention.layer_norm_rms_epsilon", float)
    d = {
        "model_type": "kimi_linear", "num_hidden_layers": n, "rms_norm_eps": eps,
        "hidden_size": r.size("embedding_length", "token_embd.weight", 0),
        "vocab_size": r.vocabulary(),
        "model_max_length": r.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in r.tensors,
        "mla_use_nope": True,
    }
    heads = r.per_layer("attention.head_count", r.integer("block_count"))
    d["linear_attn_config"] = _kda(r, kda, heads) | {
        "kda_layers": [i + 1 for i in kda], "full_attn_layers": [i + 1 for i in mla]}
    return d | _mla(r, mla, heads) | _ffn(r, n) | r.specials()


def _mla_layers(r: Keys, marks: list[int]) -> list[bool] | None:
    """Whether each layer is MLA, by head_count_kv, in which 0 marks KDA; the tensors must agree."""
    for i, mark in enumerate(marks):
        kda, mla = f"blk.{i}.ssm_a", f"blk.{i}.attn_kv_a_mqa.weight"
        if mark == 0 and mla in r.tensors:
            r.contradiction(f"attention.head_count_kv[{i}]", "0, which marks KDA", mla, "belongs to MLA")
        elif mark != 0 and kda in r.tensors:
            r.contradiction(f"attention.head_count_kv[{i}]", f"{mark}, which marks MLA", kda, "belongs to KDA")
    return [mark != 0 for mark in marks] or None


def _kda(r: Keys, layers: list[int], heads: list[int]) -> dict:
    if not layers:
        return {}
    at = f"blk.{layers[0]}."
    width = r.size("kda.head_dim", at + "ssm_f_a.weight", 1)
    return {
        "num_heads": r.size("attention.head_count", at + "ssm_beta.weight", 1, r.of_kind(heads, layers)),
        "head_dim": r.size("kda.head_dim", at + "ssm_norm.weight", 0, width),
        "short_conv_kernel_size": r.size("ssm.conv_kernel", at + "ssm_conv1d_q.weight", 0),
        "gate_lower_bound": r.typed("kda.gate_lower_bound", float),
    }


def _mla(r: Keys, layers: list[int], heads: list[int]) -> dict:
    if not layers:
        return {}
    at = f"blk.{layers[0]}."
    H = r.of_kind(heads, layers)
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
        r.problems.append(f"{r.prefix}attention.key_length_mla is {key}; it must be above the {rope} of "
                          f"rope.dimension_count, which it includes")
    return {
        "num_attention_heads": H, "kv_lora_rank": rank, "q_lora_rank": q_rank or None, "v_head_dim": value,
        "qk_rope_head_dim": rope, "qk_nope_head_dim": None if key is None or rope is None else key - rope,
    }


def _rope_width(r: Keys, kv_a: str, rank: int | None) -> int | None:
    """Width of the shared part of a key: rows of kv_a behind the latent's.

    The key rope.dimension_count says the same, but in files whose converter wrote the config's head_dim (a model
    width over heads, 72) there; and so says key_length.
    """
    told, rows = r.integer("rope.dimension_count"), r.ne(kv_a, 1)
    if rows is None or rank is None:
        return told
    found = rows - rank
    heads, D = r.metadata.get(r.prefix + "attention.head_count"), r.integer("embedding_length")
    head_dim = D // heads if type(heads) is int and heads > 0 and D else None
    if told is not None and told not in (found, head_dim):
        r.contradiction("rope.dimension_count", told, kv_a, f"has {rows} rows, {found} behind the latent's {rank}")
    length = r.integer("attention.key_length")
    if length is not None and length not in (rows, head_dim, r.integer("attention.key_length_mla")):
        r.contradiction("attention.key_length", length, kv_a, f"has {rows} rows")
    return found


def _sparse(r: Keys, n: int) -> list[int]:
    """The layers that have a router."""
    return [i for i in range(n) if f"blk.{i}.ffn_gate_inp.weight" in r.tensors]


def _ffn(r: Keys, n: int) -> dict:
    sparse = _sparse(r, n)
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
            r.problems.append(f"{r.prefix}expert_count is {n_experts}, but no layer has a router, ffn_gate_inp.weight")
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
        r.wrong(r.prefix + "expert_gating_func", function, "1 (softmax) or 2 (sigmoid)")
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


# ---- kimi-k3 ---------------------------------------------------------------------------------------


def _read_k3(r: Keys) -> dict:
    """As ``kimi-linear``; each part that it lacks is there where its key or its tensor is."""
    d = _read(r)
    if not d:
        return {}
    n = d["num_hidden_layers"]
    d["linear_attn_config"]["use_full_rank_gate"] = _in_all(r, n, "ssm_g.weight", "ssm_a", "KDA")
    gated = _in_all(r, n, "attn_gate.weight", "attn_kv_a_mqa.weight", "MLA")
    return d | {"model_type": "kimi_k3", "mla_use_output_gate": gated} | _situ(r) | _residuals(r, n) | _latent(r, n)


def _in_all(r: Keys, n: int, rest: str, mark: str, kind: str) -> bool:
    """Whether the layers of a kind, which have the tensor `mark`, have another, which all of them must or none."""
    layers = [i for i in range(n) if f"blk.{i}.{mark}" in r.tensors]
    there = [i for i in layers if f"blk.{i}.{rest}" in r.tensors]
    if there and len(there) < len(layers):
        lacking = next(i for i in layers if i not in there)
        first = f"blk.{there[0]}.{rest}"
        r.problems.append(f"blk.{lacking}.{rest} is missing; {first} {place(r.tensors[first])} is there, and all "
                          f"{kind} layers must have it, or none")
    return bool(there)


def _situ(r: Keys) -> dict:
    beta, linear = (r.typed(f"activation.{key}", float) for key in ("situ_beta", "situ_linear_beta"))
    if beta is None:
        if linear:
            r.problems.append(f"{r.prefix}activation.situ_linear_beta is {linear}, but activation.situ_beta, without "
                              "which there is no SiTU, is missing")
        return {}
    # of a linear beta that is not above 0 llama.cpp makes none
    return {"hidden_act": "situ", "activation_situ_beta": beta,
            "activation_situ_linear_beta": linear if linear is not None and linear > 0 else None}


def _residuals(r: Keys, n: int) -> dict:
    """Attention residuals: a key, and a score for each half of a layer and for the output."""
    told = r.integer("attn_res.block_size")
    names = [f"blk.{i}.{half}_res_score.weight" for i in range(n) for half in ("attn", "ffn")]
    there = [name for name in ["output_res_score.weight", *names] if name in r.tensors]
    if there and not told:
        r.problems.append(f"{r.prefix}attn_res.block_size is {'missing' if told is None else told}, but {there[0]} "
                          f"{place(r.tensors[there[0]])} scores residuals; it must be the layers to a snapshot")
    elif told and not there:
        r.problems.append(f"{r.prefix}attn_res.block_size is {told}, but no tensor scores residuals, as "
                          "output_res_score.weight")
    return {"attn_res_block_size": told or 0}


def _latent(r: Keys, n: int) -> dict:
    """Experts on a latent: its width, and whether their sum is normed."""
    sparse = _sparse(r, n)
    if not sparse:
        return {}
    down = f"blk.{sparse[0]}.ffn_routed_down.weight"
    size = r.size("expert_latent_length", down, 1)
    if size and down not in r.tensors:
        r.problems.append(f"{r.prefix}expert_latent_length is {size}, but {down} is missing")
    return {"routed_expert_hidden_size": size or 0,
            "latent_moe_use_norm": _in_all(r, n, "ffn_routed_norm.weight", "ffn_gate_inp.weight", "sparse")}


# ---- glm5next --------------------------------------------------------------------------------------


def _read_glm(r: Keys) -> dict:
    """As ``kimi-linear``, under the keys of another config.json, and what only this has."""
    n, blocks = r.layers_and_blocks()
    d = _of_layers(r, n, glm.marks(r, n, blocks)) if n else {}
    return glm.read(r, d, n, blocks) if d else {}


_GLM = dict(names=glm.NAMES, known=frozenset({*glm.NAMES.values(), *glm.MORE} | _USED | INERT))
_QWEN = dict(names=qwen.NAMES, known=qwen.KNOWN)
_FOLDED = {"norm_plus_one": False}  # 1 + w is what the norms of a file hold
ARCHITECTURES = {kind.name: kind for kind in (
    Architecture("kimi-linear", _read, NAMES, frozenset(_USED | INERT)),
    Architecture("kimi-k3", _read_k3, NAMES | K3_NAMES, frozenset({*K3_NAMES.values()} | _USED | INERT)),
    Architecture("glm5next", _read_glm, **_GLM),
    Architecture("glm5-next", _read_glm, **_GLM),
    Architecture("qwen3next", qwen.read_next, **_QWEN, form=_FOLDED),
    Architecture("qwen35", qwen.read_dense, **_QWEN, form=_FOLDED | {"gdn_tiled": True}, described=qwen.described),
    Architecture("qwen35moe", qwen.read_moe, **_QWEN, form=_FOLDED | {"gdn_tiled": True}, described=qwen.described),
)}
_OF_MODEL_TYPE = {"kimi_linear": "kimi-linear", "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35",
                  "qwen3_5_moe_text": "qwen35moe", "kimi_k3": "kimi-linear",
                  "glm5_next_text": "glm5next"}
