"""A config.json becomes a description of the model: sizes, one LayerSpec a layer, every weight's shape.

What the keys of each family of models mean is said in config_kimi.py, config_qwen.py and config_glm.py; each reads its
published form and what transformers 5.23 saves, and writes one of them back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import config_glm, config_kimi, config_qwen
from .config_kimi import KEYS, LINEAR_KEYS  # noqa: F401
from .config_reader import L2_EPS, LATENT_EPS, MOST_LAYERS, ConfigError, short  # noqa: F401
from .errors import FormatError
from .weight_shapes import weight_shapes

#: model_type of a file -> the module that translates it.
FAMILIES = {**dict.fromkeys(["kimi_linear", config_kimi.K3], config_kimi),
            **dict.fromkeys([*config_qwen.KINDS, *config_qwen.WRAPPERS], config_qwen),
            **dict.fromkeys([config_glm.TEXT, config_glm.WRAPPER], config_glm)}

#: The letter of a mixer, where the layers of a model are told in a word.
MIXER_LETTERS = {"kda": "K", "mla": "M", "gdn": "G", "attn": "A"}


@dataclass(frozen=True)
class LayerSpec:
    """One layer: its mixer and its feed-forward.

    Attributes
    ----------
    mixer : {"kda", "mla", "gdn", "attn"}
        Kimi Delta Attention, latent attention, the gated delta net (one gate a head), gated attention.
    ffn : {"dense", "moe"}
    """

    mixer: str
    ffn: str


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model. What is about a kind of layer has a default, for models without such layers."""

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
    layers: tuple[LayerSpec, ...]
    kda_heads: int = 0
    kda_head_dim: int = 0              # K = V
    conv_width: int = 0                # W, taps
    gate_lower_bound: float | None = None  # nats per token, < 0; None is the softplus gate
    kda_full_rank_gate: bool = False   # the output gate of KDA is one projection, not two of low rank
    mla_heads: int = 0
    nope_dim: int = 0
    rope_dim: int = 0                  # width kept, never rotated
    v_head_dim: int = 0
    kv_rank: int = 0                   # R
    q_rank: int = 0                    # 0 is a plain projection
    mla_gated: bool = False            # the output of MLA times the sigmoid of a projection
    index_heads: int = 0               # of the indexer that chooses what MLA attends to; 0: it attends to all
    index_dim: int = 0
    index_topk: int = 0                # positions that it chooses, in pools
    index_pool: int = 0                # of so many neighbours, which have a key together
    index_eps: float = 1e-6            # of the norm of its keys
    ffn_size: int = 0                  # width of a dense feed-forward
    swiglu_limit: float | None = None  # of SwiGLU's two inputs, in all feed-forwards
    situ_beta: float | None = None     # of SiTU, the activation of all feed-forwards; None is SwiGLU
    situ_linear_beta: float | None = None  # of its other factor; None: that is as it is
    n_experts: int = 0
    experts_per_token: int = 0
    n_shared_experts: int = 0
    moe_size: int = 0                  # width of one expert
    expert_latent: int = 0             # width that routed experts read and write, below the model's; 0 is the model's
    expert_latent_norm: bool = False   # their sum is normed before it goes up again
    n_groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    routed_scale: float = 1.0
    router_function: str = "sigmoid"   # or "softmax"
    gdn_k_heads: int = 0               # Hk
    gdn_v_heads: int = 0               # Hv, a multiple of Hk
    gdn_k_dim: int = 0                 # K
    gdn_v_dim: int = 0                 # V
    gdn_tiled: bool = False            # value head h uses key head h % Hk, not h // (Hv / Hk)
    gdn_inputs: str = "split"          # in_proj_qkv, _z, _b, _a; or "grouped" by key head: in_proj_qkvz, in_proj_ba
    attn_heads: int = 0                # H
    attn_kv_heads: int = 0             # Hkv
    attn_head_dim: int = 0             # K
    rotary_dim: int = 0                # of K, the first so many dims are rotated
    rope_base: float = 10000.0
    shared_size: int = 0               # inner width of the shared expert(s) in all; 0: none
    shared_gated: bool = False         # the shared expert's output times sigmoid of a logit of its own
    router_bias: bool = True           # the choice of experts has a bias
    norm_plus_one: bool = False        # norms of layers, queries and keys, and the final one, are stored less 1
    attn_res_block: int = 0            # layers to a snapshot of attention residuals; 0: residuals are added
    streams: int = 0                   # residual streams that hyper-connections mix; 0: there is one
    stream_passes: int = 0             # of Sinkhorn's normalisation of their mixing weights
    stream_eps: float = 1e-6           # added to these weights and sums
    moe_names: str = "block_sparse_moe"    # spelling of the mixture's tensors, a key of MOE_NAMES

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Config:
        """Read the content of a config.json, in any of its family's forms.

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
        kind = "kimi_linear" if d.get("model_type") is None else d["model_type"]
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise ConfigError([f"model_type is {short(kind)}; only {' or '.join(map(short, FAMILIES))} is supported"])
        fields, reader = FAMILIES[kind].read(d)
        if reader.unknown:
            warnings.warn("config: unknown keys, ignored: " + ", ".join(sorted(reader.unknown)), stacklevel=2)
        if reader.problems:
            raise ConfigError(reader.problems)
        return cls(**fields | {"layers": tuple(LayerSpec(*pair) for pair in fields["layers"])})

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Config:
        """Read a config.json.

        Raises
        ------
        OSError
            If it cannot be read.
        ConfigError
            If it is no regular file, not JSON, has a key twice, or is not usable.
        """
        from .load.strict_json import load_object  # which needs Config, by way of the package

        try:
            content = load_object(path)
        except FormatError as e:
            raise ConfigError([f"{e.where}: {problem}" for problem in e.problems]) from None
        return cls.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        """A config.json that reads back equal."""
        return FAMILIES[self.model_type].to_dict(self)

    def published(self) -> Config:
        """This config of weights that are stored as in a Hugging Face folder, whatever a GGUF had done to them."""
        return replace(self, **FAMILIES[self.model_type].PUBLISHED)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this config holds, in the order of their use.

        Canonical spelling and shapes: ``A_log`` is [H], a convolution's taps are [channels, W], the dense
        feed-forward is ``mlp``. Matrices are [rows out, columns in].
        """
        return weight_shapes(self)


def layer_pattern(config):
    """``kKKM``: one letter a layer, that of its mixer, small where the feed-forward is dense."""
    letters = ((MIXER_LETTERS[layer.mixer], layer.ffn) for layer in config.layers)
    return "".join(letter.lower() if ffn == "dense" else letter for letter, ffn in letters)
