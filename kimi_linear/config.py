"""A config.json becomes a description of the model: sizes, one LayerSpec a layer, every weight's shape.

Two forms are read: as published (``first_k_dense_replace``, ``moe_layer_freq``, layer lists inside
``linear_attn_config``) and as transformers 5.23 saves it (``mlp_layer_types``, ``layer_types`` beside the
lists). What one form says twice must agree. Layer patterns come from the lists alone, which count from 1; no
period is ever assumed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

USED, INERT = "used", "inert"

#: Every known key: "used" ones shape the model or are checked, "inert" ones change no result.
KEYS: dict[str, str] = {
    **dict.fromkeys([
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act",
        "rms_norm_eps", "latent_eps", "l2_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "model_max_length", "max_position_embeddings", "linear_attn_config", "layer_types", "linear_head_dim",
        "linear_num_heads", "linear_conv_kernel_dim", "num_attention_heads", "num_key_value_heads",
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim",
        "mla_use_nope", "rope_scaling", "attention_bias", "num_experts", "num_experts_per_token",
        "num_shared_experts", "moe_intermediate_size", "moe_router_activation_func", "moe_renormalize",
        "routed_scaling_factor", "use_grouped_topk", "num_expert_group", "topk_group",
        "first_k_dense_replace", "moe_layer_freq", "mlp_layer_types", "num_nextn_predict_layers",
        "topk_method", "quantization_config", "allow_neg_eigval", "use_full_rank_gate", "mla_use_output_gate",
        "attn_res_block_size", "routed_expert_hidden_size", "latent_moe_use_norm",
    ], USED),
    **dict.fromkeys([
        "architectures", "auto_map", "head_dim", "initializer_range", "rope_theta", "rope_parameters",
        "use_cache", "dtype", "torch_dtype", "transformers_version", "attention_dropout", "pretraining_tp",
        "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "output_attentions",
        "output_hidden_states", "return_dict", "_name_or_path", "_attn_implementation", "_from_model_config",
        "activation_situ_beta", "activation_situ_linear_beta", "chunk_size_feed_forward", "id2label",
        "label2id", "problem_type", "is_encoder_decoder",
    ], INERT),
}

#: The keys inside linear_attn_config.
LINEAR_KEYS: dict[str, str] = dict.fromkeys(
    ["head_dim", "num_heads", "short_conv_kernel_size", "kda_layers", "full_attn_layers", "gate_lower_bound"],
    USED)

#: Known keys of which only these values are supported (none: only null). Absent and null are the first.
ONLY: dict[str, tuple] = {
    "model_type": ("kimi_linear",),
    "hidden_act": ("silu", "swish"),
    "mla_use_nope": (True,),
    "rope_scaling": (),
    "attention_bias": (False,),
    "num_nextn_predict_layers": (0,),
    "topk_method": ("noaux_tc",),
    "quantization_config": (),
    "allow_neg_eigval": (False,),
    "use_full_rank_gate": (False,),
    "mla_use_output_gate": (False,),
    "attn_res_block_size": (0,),
    "routed_expert_hidden_size": (),
    "latent_moe_use_norm": (False,),
}

ROUTER_FUNCTIONS = ("sigmoid", "softmax")
LATENT_EPS = 1e-6             # of the norms on the latent and the low-rank q: the training code's default
L2_EPS = 1e-6                 # of the L2 norms of q and k, under the root of the sum: the training code's
LARGEST = 2**31 - 1           # of any size in a config
MOST_LAYERS = 4096
MOST_EXPERTS = 65536
MOST_EXPERTS_IN_ALL = 2**20   # of all layers together
MOST_EOS = 1024
WIDEST_CONV = 8


class ConfigError(ValueError):
    """A config that cannot be used; `problems` holds one sentence a problem."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"config: {count}:\n" + "\n".join(f"  {p}" for p in problems))


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its mixer, ``"kda"`` or ``"mla"``, and its feed-forward, ``"dense"`` or ``"moe"``."""

    mixer: str
    ffn: str


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a Kimi-Linear model. Sizes of a kind of layer that does not occur may be 0."""

    model_type: str
    vocab_size: int
    hidden_size: int
    n_layers: int
    rms_norm_eps: float
    latent_eps: float
    l2_eps: float
    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    max_length: int
    kda_heads: int
    kda_head_dim: int                  # K = V
    conv_width: int                    # W, taps
    gate_lower_bound: float | None     # nats per token, < 0; None is the softplus gate
    mla_heads: int
    nope_dim: int
    rope_dim: int                      # width kept, never rotated
    v_head_dim: int
    kv_rank: int                       # R
    q_rank: int                        # 0 is a plain projection
    ffn_size: int                      # width of a dense feed-forward
    n_experts: int
    experts_per_token: int
    n_shared_experts: int
    moe_size: int                      # width of one expert
    n_groups: int
    top_groups: int
    renormalise: bool
    routed_scale: float
    router_function: str               # "sigmoid" or "softmax"
    layers: tuple[LayerSpec, ...]

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Config:
        """Read the content of a config.json, in either form.

        Raises
        ------
        ConfigError
            A ValueError that lists every problem: missing keys, wrong types, values that are not supported,
            keys that contradict each other.

        Warns
        -----
        UserWarning
            Once, with all unknown keys.
        """
        if not isinstance(d, Mapping):
            raise ConfigError([f"config is a {type(d).__name__}; it must be a JSON object"])
        reader = _Reader(d)
        fields = _read(reader)
        if reader.unknown:
            warnings.warn("config: unknown keys, ignored: " + ", ".join(sorted(reader.unknown)), stacklevel=2)
        if reader.problems:
            raise ConfigError(reader.problems)
        return cls(**fields)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Config:
        """Read a config.json. Raises OSError, or ConfigError when it is not JSON or not usable."""
        with open(path, encoding="utf-8") as f:
            try:
                d = json.load(f)
            except (ValueError, RecursionError) as e:     # bad JSON, bad UTF-8, bottomless nesting
                raise ConfigError([f"{os.fspath(path)} is not JSON: {e}"]) from None
        return cls.from_dict(d)

    def to_dict(self) -> dict[str, Any]:
        """The published form; ``mlp_layer_types`` in place of two keys where dense layers are no prefix."""
        linear = {
            "head_dim": self.kda_head_dim, "num_heads": self.kda_heads,
            "short_conv_kernel_size": self.conv_width,
            "kda_layers": [i + 1 for i, s in enumerate(self.layers) if s.mixer == "kda"],
            "full_attn_layers": [i + 1 for i, s in enumerate(self.layers) if s.mixer == "mla"],
        }
        if self.gate_lower_bound is not None:
            linear["gate_lower_bound"] = self.gate_lower_bound
        d = {
            "architectures": ["KimiLinearForCausalLM"], "model_type": self.model_type,
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers, "intermediate_size": self.ffn_size,
            "hidden_act": "silu", "rms_norm_eps": self.rms_norm_eps,
            "num_attention_heads": self.mla_heads, "num_key_value_heads": self.mla_heads,
            "linear_attn_config": linear, "q_lora_rank": self.q_rank or None, "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.nope_dim, "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.v_head_dim, "mla_use_nope": True, "rope_scaling": None,
            "model_max_length": self.max_length,
            "num_experts": self.n_experts, "num_experts_per_token": self.experts_per_token,
            "num_shared_experts": self.n_shared_experts, "moe_intermediate_size": self.moe_size,
            "moe_router_activation_func": self.router_function, "moe_renormalize": self.renormalise,
            "routed_scaling_factor": self.routed_scale, "use_grouped_topk": True,
            "num_expert_group": self.n_groups, "topk_group": self.top_groups, "num_nextn_predict_layers": 0,
            "tie_word_embeddings": self.tie_embeddings, "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else [*self.eos_token_ids],
            "pad_token_id": self.pad_token_id,
        }
        if self.latent_eps != LATENT_EPS:
            d["latent_eps"] = self.latent_eps
        if self.l2_eps != L2_EPS:
            d["l2_eps"] = self.l2_eps
        n_dense = sum(s.ffn == "dense" for s in self.layers)
        if all(s.ffn == "dense" for s in self.layers[:n_dense]):
            d["first_k_dense_replace"], d["moe_layer_freq"] = n_dense, 1
        else:
            d["mlp_layer_types"] = ["dense" if s.ffn == "dense" else "sparse" for s in self.layers]
        return d

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this config holds, in the order of their use.

        Canonical spelling and shapes: ``A_log`` is [H], a convolution's taps are [H * K, W], the dense
        feed-forward is ``mlp``. Matrices are [rows out, columns in].
        """
        D = self.hidden_size
        shapes = {"model.embed_tokens.weight": (self.vocab_size, D)}
        for i, spec in enumerate(self.layers):
            parts = {"input_layernorm.weight": (D,)}
            parts |= self._kda_shapes() if spec.mixer == "kda" else self._mla_shapes()
            parts |= {"post_attention_layernorm.weight": (D,)}
            parts |= _ffn_shapes("mlp", self.ffn_size, D) if spec.ffn == "dense" else self._moe_shapes()
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
        shapes["model.norm.weight"] = (D,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    def _kda_shapes(self) -> dict[str, tuple[int, ...]]:
        D, H, K, W = self.hidden_size, self.kda_heads, self.kda_head_dim, self.conv_width
        shapes = {}
        for x in "qkv":
            shapes |= {f"{x}_proj.weight": (H * K, D), f"{x}_conv1d.weight": (H * K, W)}
        shapes |= {
            "f_a_proj.weight": (K, D), "f_b_proj.weight": (H * K, K), "A_log": (H,), "dt_bias": (H * K,),
            "b_proj.weight": (H, D), "g_a_proj.weight": (K, D), "g_b_proj.weight": (H * K, K),
            "o_norm.weight": (K,), "o_proj.weight": (D, H * K),
        }
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}

    def _mla_shapes(self) -> dict[str, tuple[int, ...]]:
        D, H, R, P = self.hidden_size, self.mla_heads, self.kv_rank, self.rope_dim
        n_q = H * (self.nope_dim + P)
        if self.q_rank:
            shapes = {"q_a_proj.weight": (self.q_rank, D), "q_a_layernorm.weight": (self.q_rank,),
                      "q_b_proj.weight": (n_q, self.q_rank)}
        else:
            shapes = {"q_proj.weight": (n_q, D)}
        shapes |= {
            "kv_a_proj_with_mqa.weight": (R + P, D), "kv_a_layernorm.weight": (R,),
            "kv_b_proj.weight": (H * (self.nope_dim + self.v_head_dim), R),
            "o_proj.weight": (D, H * self.v_head_dim),
        }
        return {f"self_attn.{name}": shape for name, shape in shapes.items()}

    def _moe_shapes(self) -> dict[str, tuple[int, ...]]:
        D, E, n = self.hidden_size, self.n_experts, self.moe_size
        shapes = {"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)}
        for e in range(E):
            shapes |= {f"experts.{e}.w1.weight": (n, D), f"experts.{e}.w3.weight": (n, D),
                       f"experts.{e}.w2.weight": (D, n)}
        if self.n_shared_experts:
            shapes |= _ffn_shapes("shared_experts", n * self.n_shared_experts, D)
        return {f"block_sparse_moe.{name}": shape for name, shape in shapes.items()}


def _ffn_shapes(prefix: str, width: int, D: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.gate_proj.weight": (width, D), f"{prefix}.up_proj.weight": (width, D),
            f"{prefix}.down_proj.weight": (D, width)}


class _Reader:
    """Typed access to a mapping that collects problems instead of raising at the first."""

    def __init__(self, d: Mapping[str, Any]):
        self.d = d
        self.problems: list[str] = []
        self.failed: set[str] = set()                     # keys of sizes that are missing or wrong
        self.unknown = [str(k) for k in d if k not in KEYS]
        linear = d.get("linear_attn_config")
        if linear is not None and not isinstance(linear, Mapping):
            self.problem("linear_attn_config", linear, "it must be an object")
            linear = None
        self.linear: Mapping[str, Any] = linear or {}
        self.unknown += [f"linear_attn_config.{k}" for k in self.linear if k not in LINEAR_KEYS]

    def problem(self, key: str, value: Any, rule: str) -> None:
        self.problems.append(f"{key} is {_short(value)}; {rule}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, ``linear_attn_config.x`` inside; absent and null are the default."""
        inner = key.removeprefix("linear_attn_config.")
        value = self.d.get(key) if inner == key else self.linear.get(inner)
        return default if value is None else value

    def integer(self, key: str, *, least: int = 1, most: int = LARGEST, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{key} is missing; it must be an integer from {least} to {most}")
        elif isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(key, value, f"it must be an integer from {least} to {most}")
        else:
            return value
        self.failed.add(key)
        return least

    def number(self, key: str, *, default: float | None = None, rule: str = "it must be a finite number >= 0",
               test=lambda x: x >= 0) -> float:
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{key} is missing; {rule}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not abs(value) <= sys.float_info.max or not test(value):
            self.problem(key, value, rule)
        else:
            return float(value)
        return 0.0

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, value, "it must be true or false")
            return default
        return value

    def integers(self, key: str, most: int) -> list[int] | None:
        """A list of integers, or None where the key is absent or wrong."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or any(type(x) is not int for x in value):
            self.problem(key, value, "it must be a list of integers")
        elif len(value) > most:
            self.problems.append(f"{key} has {len(value)} entries; at most {most} are possible")
        else:
            return list(value)
        return None

    def names(self, key: str, n: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of n of the allowed words, or None where the key is absent or wrong."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, (list, tuple)) and len(value) == n and all(x in allowed for x in value):
            return list(value)
        self.problem(key, value, f"it must be a list of {n} words, each one of {', '.join(allowed)}")
        return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_one_of(value: Any, allowed: tuple) -> bool:
    """Equality that does not take 0 for false or 1 for true."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def _read(r: _Reader) -> dict[str, Any]:
    for key, allowed in ONLY.items():
        value = r.get(key)
        if value is not None and not _is_one_of(value, allowed):
            r.problem(key, value, f"only {' or '.join(map(_short, allowed)) or 'null'} is supported")
    n = r.integer("num_hidden_layers", most=MOST_LAYERS)
    n_experts = r.integer("num_experts", least=0, most=MOST_EXPERTS, default=0)
    whole = not r.failed
    if n * n_experts > MOST_EXPERTS_IN_ALL:
        r.problem("num_experts", n_experts, f"with {n} layers it must be at most {MOST_EXPERTS_IN_ALL // n}")
    mixers, ffns = (_mixers(r, n), _ffns(r, n, n_experts)) if whole else ([], [])
    vocab = r.integer("vocab_size")
    most_id = LARGEST if "vocab_size" in r.failed else vocab - 1
    fields = dict(
        model_type="kimi_linear", vocab_size=vocab, hidden_size=r.integer("hidden_size"), n_layers=n,
        rms_norm_eps=r.number("rms_norm_eps"), latent_eps=r.number("latent_eps", default=LATENT_EPS),
        l2_eps=r.number("l2_eps", default=L2_EPS),
        tie_embeddings=r.flag("tie_word_embeddings", False), max_length=_max_length(r),
        layers=tuple(LayerSpec(m, f) for m, f in zip(mixers, ffns)),
    )
    fields |= _special_tokens(r, most_id)
    fields |= _kda(r, "kda" in mixers)
    fields |= _mla(r, "mla" in mixers)
    fields |= dict(ffn_size=_needed(r, "intermediate_size", "dense" in ffns), n_experts=n_experts)
    fields |= _moe(r, n_experts, "moe" in ffns)
    return fields


def _needed(r: _Reader, key: str, needed: bool) -> int:
    """A size that must be there when such a layer occurs, and may be 0 or absent otherwise."""
    return r.integer(key) if needed else r.integer(key, least=0, default=0)


def _agrees(r: _Reader, key: str, expected: Any, source: str) -> None:
    """A key that repeats another one must say the same."""
    value = r.get(key)
    if value is not None and value != expected:
        r.problem(key, value, f"it contradicts {source}, which says {_short(expected)}")


def _max_length(r: _Reader) -> int:
    key = "model_max_length" if r.get("model_max_length") is not None else "max_position_embeddings"
    n = r.integer(key, most=2**62, default=LARGEST)
    if key == "model_max_length":
        _agrees(r, "max_position_embeddings", n, key)
    return n


def _special_tokens(r: _Reader, most_id: int) -> dict[str, Any]:
    def one(key):
        return None if r.get(key) is None else r.integer(key, least=0, most=most_id)

    if isinstance(r.get("eos_token_id"), (list, tuple)):
        eos = tuple(r.integers("eos_token_id", MOST_EOS) or ())
        for e in eos:
            if not 0 <= e <= most_id:
                r.problem("eos_token_id", e, f"it must be an integer from 0 to {most_id}")
    else:
        eos = () if r.get("eos_token_id") is None else (one("eos_token_id"),)
    return dict(bos_token_id=one("bos_token_id"), eos_token_ids=eos, pad_token_id=one("pad_token_id"))


def _mixers(r: _Reader, n: int) -> list[str]:
    """The mixer of each layer, from the two lists (or layer_types where there are no lists)."""
    words = {"linear_attention": "kda", "full_attention": "mla"}
    named = r.names("layer_types", n, tuple(words))
    spoken = None if named is None else [words[x] for x in named]
    kda_key, full_key = "linear_attn_config.kda_layers", "linear_attn_config.full_attn_layers"
    if r.get(kda_key) is None and r.get(full_key) is None:
        if spoken is None and r.get("layer_types") is None:
            r.problems.append(f"{kda_key} and {full_key} are missing; they must list the layers, from 1")
        return spoken or ["kda"] * n
    kda, full = r.integers(kda_key, MOST_LAYERS), r.integers(full_key, MOST_LAYERS)
    if kda is None and r.get(kda_key) is not None or full is None and r.get(full_key) is not None:
        return ["kda"] * n
    kda, full = kda or [], full or []
    if sorted(kda + full) != list(range(1, n + 1)):
        r.problems.append(
            f"{kda_key} {_short(kda)} and full_attn_layers {_short(full)} are not a partition of the layers "
            f"1..{n}; each layer must be in one of them, once")
        return ["kda"] * n
    is_kda = set(kda)
    mixers = ["kda" if i in is_kda else "mla" for i in range(1, n + 1)]
    if spoken is not None and spoken != mixers:
        r.problem("layer_types", named, "it contradicts the lists of linear_attn_config")
    return mixers


def _ffns(r: _Reader, n: int, n_experts: int) -> list[str]:
    """The feed-forward of each layer: MoE where l >= first_k_dense_replace and l mod moe_layer_freq = 0."""
    first = r.integer("first_k_dense_replace", least=0, default=0)
    every = r.integer("moe_layer_freq", default=1)
    ruled = ["moe" if n_experts and i >= first and i % every == 0 else "dense" for i in range(n)]
    words = {"dense": "dense", "sparse": "moe"}
    named = r.names("mlp_layer_types", n, tuple(words))
    if named is None:
        return ruled
    ffns = [words[x] for x in named]
    if "moe" in ffns and not n_experts:
        r.problem("num_experts", r.get("num_experts"), "mlp_layer_types has sparse layers; it must be >= 1")
    if (r.get("first_k_dense_replace") is not None or r.get("moe_layer_freq") is not None) and ffns != ruled:
        r.problem("mlp_layer_types", named, "it contradicts first_k_dense_replace and moe_layer_freq")
    return ffns


def _kda(r: _Reader, occurs: bool) -> dict[str, Any]:
    inner = "linear_attn_config."
    names = dict(kda_heads=("num_heads", "linear_num_heads"), kda_head_dim=("head_dim", "linear_head_dim"),
                 conv_width=("short_conv_kernel_size", "linear_conv_kernel_dim"))
    fields: dict[str, Any] = {}
    for field, (published, beside) in names.items():
        most = WIDEST_CONV if field == "conv_width" else LARGEST
        key = inner + published if r.get(inner + published) is not None or r.get(beside) is None else beside
        fields[field] = r.integer(key, most=most) if occurs else r.integer(key, least=0, most=most, default=0)
        if key != beside:
            _agrees(r, beside, fields[field], key)
    bound = r.get(inner + "gate_lower_bound")
    fields["gate_lower_bound"] = None if bound is None else r.number(
        inner + "gate_lower_bound", rule="it must be a finite number < 0 (nats per token)",
        test=lambda x: x < 0)
    return fields


def _mla(r: _Reader, occurs: bool) -> dict[str, Any]:
    heads = _needed(r, "num_attention_heads", occurs)
    kv_heads = r.get("num_key_value_heads")
    if occurs and kv_heads not in (None, heads, 1):           # 1: the latent taken as a single key head
        r.problem("num_key_value_heads", kv_heads, f"it must be num_attention_heads, {heads}")
    nope, rope = _needed(r, "qk_nope_head_dim", occurs), r.integer("qk_rope_head_dim", least=0, default=0)
    if occurs:
        _agrees(r, "qk_head_dim", nope + rope, "qk_nope_head_dim + qk_rope_head_dim")
    return dict(
        mla_heads=heads, nope_dim=nope, rope_dim=rope, v_head_dim=_needed(r, "v_head_dim", occurs),
        kv_rank=_needed(r, "kv_lora_rank", occurs), q_rank=r.integer("q_lora_rank", least=0, default=0))


def _moe(r: _Reader, n_experts: int, occurs: bool) -> dict[str, Any]:
    k, size = _needed(r, "num_experts_per_token", occurs), _needed(r, "moe_intermediate_size", occurs)
    groups, top = r.integer("num_expert_group", default=1), r.integer("topk_group", default=1)
    function = r.get("moe_router_activation_func", "sigmoid")
    if function not in ROUTER_FUNCTIONS:
        r.problem("moe_router_activation_func", function, "only sigmoid or softmax is supported")
    if top > groups:
        r.problem("topk_group", top, f"it must be at most num_expert_group, {groups}")
    if not r.flag("use_grouped_topk", True) and groups > 1:
        r.problem("use_grouped_topk", False, f"it contradicts num_expert_group, which says {groups}")
    if occurs and n_experts % groups:
        r.problem("num_expert_group", groups, f"it must divide num_experts, {n_experts}")
    elif occurs and k > n_experts // groups * min(top, groups):
        r.problem("num_experts_per_token", k, f"it must be at most {n_experts // groups * min(top, groups)}, "
                  f"the experts of {min(top, groups)} of {groups} groups")
    return dict(
        experts_per_token=k, moe_size=size,
        n_shared_experts=r.integer("num_shared_experts", least=0, default=0),
        n_groups=groups, top_groups=top, renormalise=r.flag("moe_renormalize", True),
        routed_scale=r.number("routed_scaling_factor", default=1.0, rule="it must be a finite number",
                              test=lambda x: True),
        router_function=function)
