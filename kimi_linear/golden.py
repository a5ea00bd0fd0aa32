"""Module paths of transformers (and of the golden files) and the taps that hold the same numbers.

A golden file names each array ``<module path>``, where needed behind a prompt's prefix:
``short/model.layers.2.mlp``. Leading batch axes of 1 are dropped, heads are split, router choices are sorted
by expert id, and the convolution cache, [q|k|v channels, W] with the newest column last, becomes three
histories [W-1, H * K], oldest first. The output of ``kv_a_proj_with_mqa``, [T, R + P], becomes the latent before
its norm and the shared key part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from .config import Config

#: Outside the layers.
GLOBAL = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "logits", "logits": "logits"}

#: Module path below ``model.layers.<i>`` -> tap below ``layers.<i>``, by kind of mixer and feed-forward.
LAYER = {"": "out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

KDA = {
    "self_attn": "kda.out", "self_attn.o_proj": "kda.out",
    "self_attn.q_proj": "kda.q_proj", "self_attn.k_proj": "kda.k_proj", "self_attn.v_proj": "kda.v_proj",
    "self_attn.forget_gate": "kda.g", "self_attn.forget_gate.f_a_proj": "kda.f_a",
    "self_attn.forget_gate.f_b_proj": "kda.f", "self_attn.b_proj": "kda.b",
    "self_attn.g_a_proj": "kda.g_a", "self_attn.g_b_proj": "kda.z", "self_attn.o_norm": "kda.o_norm",
}

MLA = {
    "self_attn": "mla.out", "self_attn.o_proj": "mla.out",
    "self_attn.kv_a_proj_with_mqa": "mla.{}", "self_attn.kv_a_layernorm": "mla.latent",
}
PLAIN_Q = {"self_attn.q_proj": "mla.q"}
LOW_RANK_Q = {
    "self_attn.q_a_proj": "mla.q_a", "self_attn.q_a_layernorm": "mla.q_a_norm", "self_attn.q_b_proj": "mla.q",
}

DENSE = {"mlp": "mlp.out", "mlp.down_proj": "mlp.out", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up"}

MOE = {
    "mlp": "moe.out", "mlp.gate/ids": "moe.ids", "mlp.gate/weights": "moe.weights",
    "mlp.shared_experts": "moe.shared", "mlp.shared_experts.down_proj": "moe.shared",
    "mlp.shared_experts.gate_proj": "moe.shared_gate", "mlp.shared_experts.up_proj": "moe.shared_up",
}

#: Name below ``cache/<i>`` -> state below ``layers.<i>``; "conv" holds three.
KDA_CACHE = {"state": "kda.state", "conv": "kda.{}_history"}
MLA_CACHE = {"keys": "mla.latent_cache", "values": "mla.k_shared_cache"}

#: A module without a tap: latent times kv_b^T, [T, H * (nope + V)]; see `kv_b`.
KV_B = "self_attn.kv_b_proj"


def tap_of(name: str, config: Config) -> str | None:
    """The tap or state array that holds what a module path names; None where there is none.

    Where an array holds several of ours the name has ``{}`` in place of what differs: ``cache/<i>/conv`` (q, k,
    v) and ``kv_a_proj_with_mqa`` (latent_raw, k_shared).
    """
    if name in GLOBAL:
        return GLOBAL[name]
    found = re.fullmatch(r"(?:model\.layers\.|cache/)(\d+)(?:[./](.+))?", name)
    if not found or int(found[1]) >= config.n_layers:
        return None
    i, rest = int(found[1]), found[2] or ""
    tap = _table(config, i, name.startswith("cache/")).get(rest)
    return None if tap is None else f"layers.{i}.{tap}"


def _table(config: Config, i: int, cache: bool) -> dict[str, str]:
    spec = config.layers[i]
    if cache:
        return KDA_CACHE if spec.mixer == "kda" else MLA_CACHE
    mixer = KDA if spec.mixer == "kda" else MLA | (LOW_RANK_Q if config.q_rank else PLAIN_Q)
    return LAYER | mixer | (DENSE if spec.ffn == "dense" else MOE)


def names(config: Config) -> dict[str, str]:
    """Every module path and cache name of a model of this config -> its tap or state array."""
    table = dict(GLOBAL)
    for i in range(config.n_layers):
        modules, caches = _table(config, i, False), _table(config, i, True)
        table |= {f"model.layers.{i}" + (f".{m}" if m else ""): f"layers.{i}.{t}" for m, t in modules.items()}
        table |= {f"cache/{i}/{m}": f"layers.{i}.{t}" for m, t in caches.items()}
    return table


def paths(tap: str, config: Config) -> list[str]:
    """Module paths and cache names that hold a tap, the inverse of `tap_of`; empty for taps of our own."""
    wanted = re.sub(r"\.[qkv]_history$", ".{}_history", tap)
    wanted = re.sub(r"mla\.(latent_raw|k_shared)$", "mla.{}", wanted)
    return [name for name, t in names(config).items() if t == wanted]


def to_taps(arrays: Mapping[str, np.ndarray], config: Config, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by module path -> arrays by tap, in the shapes of our taps.

    Parameters
    ----------
    arrays : mapping, which may be lazy
        Names that do not begin with `prefix`, and modules that have no tap, are left out.
    prefix : for example ``"short/"``.

    Raises
    ------
    ValueError
        If an array's size does not fit the tap's shape; the message gives both.
    """
    out: dict[str, np.ndarray] = {}
    for name in arrays:
        if not name.startswith(prefix):
            continue
        tap = tap_of(name[len(prefix):], config)
        if tap is None:
            continue
        if tap.endswith("_history"):
            out |= _histories(np.asarray(arrays[name]), tap, config)
        elif tap.endswith("mla.{}"):
            kv_a = np.asarray(arrays[name]).reshape(-1, config.kv_rank + config.rope_dim)
            out[tap.format("latent_raw")] = kv_a[:, :config.kv_rank]
            out[tap.format("k_shared")] = kv_a[:, config.kv_rank:]
        else:
            out[tap] = _shaped(np.asarray(arrays[name]), tap, name, config)
    for tap in [t for t in out if t.endswith("moe.ids")]:
        _sort_experts(out, tap)
    return out


def _histories(conv: np.ndarray, tap: str, config: Config) -> dict[str, np.ndarray]:
    """[..., q|k|v channels, W] or [..., W-1] -> three [W-1, H * K]."""
    n = config.conv_width - 1
    conv = conv.reshape(3, config.kda_heads * config.kda_head_dim, -1)
    return {tap.format(s): conv[j, :, conv.shape[-1] - n:].T for j, s in enumerate("qkv")}


def _tail(tap: str, config: Config) -> tuple[int, ...] | None:
    """The axes of a tap after tokens, where it has heads."""
    kind = tap.split(".", 2)[-1]
    heads = (config.kda_heads, config.kda_head_dim)
    return {
        "kda.g": heads, "kda.f": heads, "kda.z": heads, "kda.o_norm": heads,
        "kda.state": (config.kda_head_dim, config.kda_head_dim),
        "mla.q": (config.mla_heads, config.nope_dim + config.rope_dim),
    }.get(kind)


def _shaped(x: np.ndarray, tap: str, name: str, config: Config) -> np.ndarray:
    tail = _tail(tap, config) or x.shape[-1:]
    if x.size % max(int(np.prod(tail)), 1):
        raise ValueError(f"{name} has shape {x.shape}; for {tap} it must be [T, {', '.join(map(str, tail))}]")
    return x.reshape(-1, *tail)


def _sort_experts(out: dict[str, np.ndarray], tap: str) -> None:
    """Ascending expert id in each row, the weights with them."""
    order = np.argsort(out[tap], axis=-1, kind="stable")
    out[tap] = np.take_along_axis(out[tap], order, axis=-1).astype(np.int32)
    weights = tap.removesuffix("ids") + "weights"
    if weights in out:
        out[weights] = np.take_along_axis(out[weights], order, axis=-1)


def kv_b(latent: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The output of ``kv_b_proj``, which is no tap of ours: latent [T, R], weight [H * (nope + V), R]."""
    return latent @ weight.T
