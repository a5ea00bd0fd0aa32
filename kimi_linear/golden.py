"""Module paths of transformers (and of the golden files) and the taps that hold the same numbers.

A golden file names each array ``<module path>``, where needed behind a prompt's prefix:
``short/model.layers.2.mlp``. The axes of a batch and of its tokens become one, heads are split, router choices are
sorted by expert id, and the convolution cache, [q|k|v channels, W] with the newest column last, becomes three
histories [W-1, channels], oldest first. A module whose output holds several taps (the joint projections) is cut
into them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from .config import Config
from .weight_shapes import MOE_NAMES, attn_query_rows, gdn_channels, gdn_inputs


class Several(NamedTuple):
    """An array that holds several taps: their name with ``{}`` for what differs, what that is, and columns of each."""

    tap: str
    parts: tuple[str, ...]
    columns: Callable[[Config], Mapping[str, slice | np.ndarray]]


def _latent_columns(c: Config):
    return {"latent_raw": slice(0, c.kv_rank), "k_shared": slice(c.kv_rank, c.kv_rank + c.rope_dim)}


def _kda_channels(c: Config):
    n = c.kda_heads * c.kda_head_dim
    return {s: slice(j * n, (j + 1) * n) for j, s in enumerate("qkv")}


def _index_columns(c: Config):
    return {"k": slice(0, c.index_dim), "gate": slice(c.index_dim, 2 * c.index_dim)}


def _grouped_columns(c: Config):
    """Of in_proj_qkvz and in_proj_ba, whose columns lie by key head."""
    taps = {part: f"{part}_proj" if part in "qkv" else part for part in "qkvzba"}
    return {taps[part]: columns for part, (_, columns) in gdn_inputs(c).items()}


#: Outside the layers.
LOGITS = ("lm_head", "logits")
GLOBAL = {"model.embed_tokens": "embed", "model.norm": "norm", **dict.fromkeys(LOGITS, "logits")}

#: Module path below ``model.layers.<i>`` -> tap below ``layers.<i>``, by kind of mixer and feed-forward.
LAYER = {"": "out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
#: Of attention residuals, which are no modules: names of our own golden files.
RESIDUALS = {"attn_res": "attn_res", "mlp_res": "ffn_res"}
OUTPUT_RESIDUAL = {"model.output_attn_res": "output_res"}
#: Of hyper-connections, which give three results; so our golden files name them.
STREAMS = {f"{half}_hc{path}": f"{half}_hc{tap}" for half in ("attn", "ffn")
           for path, tap in (("", ""), ("/post", "_post"), ("/comb", "_comb"))}
OUTPUT_STREAM = {"model.hc_head": "collapsed"}

KDA = {
    "self_attn": "kda.out", "self_attn.o_proj": "kda.out",
    "self_attn.q_proj": "kda.q_proj", "self_attn.k_proj": "kda.k_proj", "self_attn.v_proj": "kda.v_proj",
    "self_attn.forget_gate": "kda.g", "self_attn.forget_gate.f_a_proj": "kda.f_a",
    "self_attn.forget_gate.f_b_proj": "kda.f", "self_attn.f_a_proj": "kda.f_a", "self_attn.f_b_proj": "kda.f",
    "self_attn.b_proj": "kda.b",
    "self_attn.delta_rule": "kda.o", "self_attn.o_norm": "kda.o_norm",
}
KDA_GATE = {
    False: {"self_attn.g_a_proj": "kda.g_a", "self_attn.g_b_proj": "kda.z"},
    True: {"self_attn.g_proj": "kda.z"},
}

MLA = {
    "self_attn": "mla.out", "self_attn.o_proj": "mla.out",
    "self_attn.kv_a_proj_with_mqa": Several("mla.{}", ("latent_raw", "k_shared"), _latent_columns),
    "self_attn.kv_a_layernorm": "mla.latent", "self_attn.attention": "mla.o",
}
MLA_GATE = {"self_attn.g_proj": "mla.gate", "self_attn.gated": "mla.gated"}
INDEXER = {
    "self_attn.indexer.wq_b": "mla.index_q", "self_attn.indexer.wk": "mla.index_k_raw",
    "self_attn.indexer.k_norm": "mla.index_k", "self_attn.indexer.weights_proj": "mla.index_weights",
    "self_attn.indexer/ids": "mla.select",
}
PLAIN_Q = {"self_attn.q_proj": "mla.q"}
LOW_RANK_Q = {
    "self_attn.q_a_proj": "mla.q_a", "self_attn.q_a_layernorm": "mla.q_a_norm", "self_attn.q_b_proj": "mla.q",
}

GDN = {
    "linear_attn": "gdn.out", "linear_attn.out_proj": "gdn.out", "linear_attn.norm": "gdn.o_norm",
}
GDN_INPUTS = {
    "grouped": {
        "linear_attn.in_proj_qkvz": Several("gdn.{}", ("q_proj", "k_proj", "v_proj", "z"), _grouped_columns),
        "linear_attn.in_proj_ba": Several("gdn.{}", ("b", "a"), _grouped_columns),
    },
    "split": {
        "linear_attn.in_proj_qkv": Several("gdn.{}_proj", ("q", "k", "v"), gdn_channels),
        "linear_attn.in_proj_z": "gdn.z", "linear_attn.in_proj_b": "gdn.b", "linear_attn.in_proj_a": "gdn.a",
    },
}

ATTN = {
    "self_attn": "attn.out", "self_attn.o_proj": "attn.out",
    "self_attn.q_proj": Several("attn.{}", ("q_proj", "gate"), attn_query_rows),
    "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v",
    "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
}

DENSE = {"mlp": "mlp.out", "mlp.down_proj": "mlp.out", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up"}

MOE = {
    "mlp": "moe.out", "mlp.gate/ids": "moe.ids", "mlp.gate/weights": "moe.weights",
}
#: Of golden files, and of Kimi K3, whose router is a matrix, with the choice made beside it.
LOGITS_OF_ROUTER = {"mlp.gate": "moe.logits"}
LATENTS = {
    "mlp.routed_expert_down_proj": "moe.latent", "mlp.experts": "moe.routed",
    "mlp.routed_expert_norm": "moe.routed_norm",
}
SHARED = {
    names: {f"mlp.{shared}": "moe.shared", f"mlp.{shared}.down_proj": "moe.shared",
            f"mlp.{shared}.gate_proj": "moe.shared_gate", f"mlp.{shared}.up_proj": "moe.shared_up"}
    for names, (_, _, shared) in MOE_NAMES.items()
}
SHARED_SCORE = {"mlp.shared_expert_gate": "moe.shared_g"}

#: Name below ``cache/<i>`` -> state below ``layers.<i>``, by kind of mixer.
CACHES = {
    "kda": {"state": "kda.state", "conv": Several("kda.{}_history", ("q", "k", "v"), _kda_channels)},
    "mla": {"keys": "mla.latent_cache", "values": "mla.k_shared_cache",
            "indexer": Several("mla.index_{}_cache", ("k", "gate"), _index_columns)},
    "gdn": {"state": "gdn.state", "conv": Several("gdn.{}_history", ("q", "k", "v"), gdn_channels)},
    "attn": {"keys": "attn.k_cache", "values": "attn.v_cache"},
}

#: A module without a tap: latent times kv_b^T, [T, H * (nope + V)]; see `kv_b`.
KV_B = "self_attn.kv_b_proj"


def tap_of(name: str, config: Config) -> str | None:
    """The tap or state array that holds what a module path names; None where there is none.

    Where an array holds several of ours the name has ``{}`` in place of what differs: ``cache/<i>/conv`` (q, k,
    v) and the joint projections, such as ``kv_a_proj_with_mqa`` (latent_raw, k_shared).
    """
    entry = _entry(name, config)
    return entry.tap if isinstance(entry, Several) else entry


def _entry(name: str, config: Config) -> str | Several | None:
    name = name.removeprefix("language_model.").replace("model.language_model.", "model.")
    name = name.replace(".block_sparse_moe", ".mlp")  # as published models' code has it
    if name in _outside(config):
        return _outside(config)[name]
    found = re.fullmatch(r"(?:model\.layers\.|cache/)(\d+)(?:[./](.+))?", name)
    if not found or int(found[1]) >= config.n_layers:
        return None
    i, rest = int(found[1]), found[2] or ""
    entry = _table(config, i, name.startswith("cache/")).get(rest)
    return _in_layer(entry, i) if entry is not None else None


def _in_layer(entry: str | Several, i: int) -> str | Several:
    at = f"layers.{i}."
    return entry._replace(tap=at + entry.tap) if isinstance(entry, Several) else at + entry


def _table(config: Config, i: int, cache: bool) -> dict[str, str | Several]:
    spec = config.layers[i]
    if cache:
        return {name: held for name, held in CACHES[spec.mixer].items() if name != "indexer" or config.index_heads}
    mixers = {
        "kda": KDA | KDA_GATE[config.kda_full_rank_gate],
        "mla": MLA | (LOW_RANK_Q if config.q_rank else PLAIN_Q) | (MLA_GATE if config.mla_gated else {})
        | (INDEXER if config.index_heads else {}),
        "gdn": GDN | GDN_INPUTS[config.gdn_inputs], "attn": ATTN,
    }
    latents = LATENTS | ({"mlp.routed_expert_up_proj": "moe.routed_up"} if config.shared_size else {})
    moe = MOE | SHARED[config.moe_names] | (latents if config.expert_latent else {})
    moe |= (SHARED_SCORE if config.shared_gated else {}) | (
        LOGITS_OF_ROUTER if config.expert_latent or config.streams else {})
    residuals = (RESIDUALS if config.attn_res_block else {}) | (STREAMS if config.streams else {})
    return LAYER | residuals | mixers[spec.mixer] | {"dense": DENSE, "moe": moe}[spec.ffn]


def _outside(config: Config) -> dict[str, str]:
    """Module paths outside of the layers."""
    return GLOBAL | (OUTPUT_RESIDUAL if config.attn_res_block else {}) | (OUTPUT_STREAM if config.streams else {})


def _entries(config: Config) -> dict[str, str | Several]:
    """Every module path and cache name of a model of this config, and what it holds."""
    table: dict[str, str | Several] = dict(_outside(config))
    for i in range(config.n_layers):
        modules, caches = _table(config, i, False), _table(config, i, True)
        table |= {f"model.layers.{i}" + (f".{m}" if m else ""): _in_layer(t, i) for m, t in modules.items()}
        table |= {f"cache/{i}/{m}": _in_layer(t, i) for m, t in caches.items()}
    return table


def names(config: Config) -> dict[str, str]:
    """Every module path and cache name of a model of this config -> its tap or state array, as `tap_of` has it."""
    return {name: e.tap if isinstance(e, Several) else e for name, e in _entries(config).items()}


def paths(tap: str, config: Config) -> list[str]:
    """Module paths and cache names that hold a tap, the inverse of `tap_of`; empty for taps of our own."""
    def held(entry):
        return [entry.tap.format(part) for part in entry.parts] if isinstance(entry, Several) else [entry]

    return [name for name, entry in _entries(config).items() if tap in held(entry)]


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

    Warns
    -----
    UserWarning
        As `add`.
    """
    out: dict[str, np.ndarray] = {}
    modules: dict[str, str] = {}
    for name in arrays:
        if not name.startswith(prefix):
            continue
        entry = _entry(name[len(prefix):], config)
        if entry is None:
            continue
        held = _cut(np.asarray(arrays[name]), name, entry, config) if isinstance(entry, Several) else {
            entry: np.asarray(arrays[name])}
        add(out, {tap: _shaped(x, tap, name, config) for tap, x in held.items()}, name, modules)
    sort_experts(out)
    return out


def add(taps: dict[str, np.ndarray], found: Mapping[str, np.ndarray], module: str, modules: dict[str, str]) -> None:
    """Adds to `taps` those of one module, in place of what another gave; `modules` has that of each.

    Warns
    -----
    UserWarning
        If two modules give one tap other values: which they are, and which is taken.
    """
    for tap, x in found.items():
        if tap in taps and not np.array_equal(taps[tap], x, equal_nan=True):
            warnings.warn(f"{tap} is given by {modules[tap]} and by {module}, and their values differ; "
                          f"that of {module} is taken", stacklevel=3)
        taps[tap], modules[tap] = x, module


def offsets_of(arrays: Mapping[str, np.ndarray], config: Config, prefix: str = "") -> list[int] | None:
    """Where the sequences of a batch without padding begin and end in the rows of `to_taps`, by the modules whose
    results are [sequences, tokens, channels]; None of one sequence."""
    shapes = set()
    for name in arrays:
        path = name.removeprefix(prefix)
        entry = _entry(path, config) if name.startswith(prefix) and path not in LOGITS else None
        if isinstance(entry, str) and not path.startswith("cache/") and _tail(entry, config) is None \
                and np.ndim(arrays[name]) == 3:
            shapes.add(np.shape(arrays[name])[:2])
    if len(shapes) != 1:
        return None
    (n, length), = shapes
    return [length * i for i in range(n + 1)] if n > 1 else None


def _cut(x: np.ndarray, name: str, entry: Several, config: Config) -> dict[str, np.ndarray]:
    """The taps of an array [T, columns], or the histories [W-1, channels] of one [channels, W] or [channels, W-1]."""
    known = entry.columns(config)
    columns = {part: known[part] for part in entry.parts}
    width = sum(s.stop - s.start if isinstance(s, slice) else len(s) for s in columns.values())
    if x.size % max(width, 1):
        raise ValueError(f"{name} has shape {x.shape}; it must have {width} columns, of {', '.join(entry.parts)}")
    if entry.tap.endswith("_history"):
        x = x.reshape(width, -1)
        x = x[:, x.shape[1] - (config.conv_width - 1):].T
    return {entry.tap.format(part): x.reshape(-1, width)[:, s] for part, s in columns.items()}


def _tail(tap: str, config: Config) -> tuple[int, ...] | None:
    """The axes of a tap after tokens, where it has heads."""
    c, kind = config, tap.split(".", 2)[-1]
    kda, values = (c.kda_heads, c.kda_head_dim), (c.gdn_v_heads, c.gdn_v_dim)
    latents = (c.mla_heads, c.v_head_dim)
    queries, keys = (c.attn_heads, c.attn_head_dim), (c.attn_kv_heads, c.attn_head_dim)
    streams = (c.streams, c.hidden_size) if c.streams else None
    return {
        "kda.g": kda, "kda.f": kda, "kda.z": kda, "kda.o": kda, "kda.o_norm": kda,
        "kda.state": (c.kda_head_dim, c.kda_head_dim),
        "mla.q": (c.mla_heads, c.nope_dim + c.rope_dim), **dict.fromkeys(["mla.o", "mla.gate", "mla.gated"], latents),
        "mla.index_q": (c.index_heads, c.index_dim), **dict.fromkeys(["out", "mid"], streams),
        **dict.fromkeys(["attn_hc_comb", "ffn_hc_comb"], (c.streams, c.streams)),
        "gdn.z": values, "gdn.o_norm": values, "gdn.state": (c.gdn_k_dim, c.gdn_v_dim),
        "attn.q_proj": queries, "attn.gate": queries, "attn.q_norm": queries,
        "attn.k_proj": keys, "attn.v": keys, "attn.k_norm": keys,
    }.get(kind)


def _shaped(x: np.ndarray, tap: str, name: str, config: Config) -> np.ndarray:
    if tap.endswith(("attn.k_cache", "attn.v_cache")):                # [..., Hkv, T, K] there
        return x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)
    tail = _tail(tap, config) or x.shape[-1:]
    if x.size % max(int(np.prod(tail)), 1):
        raise ValueError(f"{name} has shape {x.shape}; for {tap} it must be [T, {', '.join(map(str, tail))}]")
    return x.reshape(-1 if x.size else int(np.prod(x.shape[:-1])), *tail)


def sort_experts(taps: dict[str, np.ndarray]) -> None:
    """Expert ids as int32, ascending in each row, and their weights with them."""
    for tap in [t for t in taps if t.endswith("moe.ids")]:
        order = np.argsort(taps[tap], axis=-1, kind="stable")
        taps[tap] = np.take_along_axis(taps[tap], order, axis=-1).astype(np.int32)
        weights = tap.removesuffix("ids") + "weights"
        if weights in taps:
            taps[weights] = np.take_along_axis(taps[weights], order, axis=-1)


def kv_b(latent: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The output of ``kv_b_proj``, which is no tap of ours: latent [T, R], weight [H * (nope + V), R]."""
    return latent @ weight.T
