"""How every tap is made: the one table of the model's dataflow, and any op of it run again in float64.

A `Node` says of a tap which op makes it, from which taps, weights and options. `nodes(config)` lists them in
the order of the pass. With it an op can be judged on *its own* inputs, the values that a run really had there
(the error that it adds), apart from the whole chain (the error that has gathered by then).

    values = model.trace(tokens, "layers.3.*")
    node = kimi_linear.dataflow.table(model.config)["layers.3.kda.g"]
    run_node(node, values, model.weights)          # float64, to lay beside values["layers.3.kda.g"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _reference_fast, reference
from ._arrays import as_tuple
from .config import Config
from .weight_shapes import (
    FFN_SCORE,
    FFN_STREAMS,
    LATENT_DOWN,
    LATENT_NORM,
    LATENT_UP,
    MIXER_SCORE,
    MIXER_STREAMS,
    MOE_NAMES,
    OUTPUT_SCORE,
    ROUTER_BIAS,
    SHARED_GATE,
    attn_query_rows,
    gdn_channels,
    gdn_inputs,
    score_weight,
)

__all__ = ["Experts", "Node", "Weight", "arguments", "begins_block", "evaluate", "in_order", "nodes", "run_node",
           "stream_axes", "stream_of", "table"]

#: The tap that stands for the token ids themselves, [T]: the input of the embedding.
TOKENS = "tokens"

#: What stands for the position of each token in its sequence, [T], where it is given; else they are counted.
POSITIONS = "positions"

#: Taps of a layer in the order of the pass; names below ``layers.<i>``.
LAYER_ORDER = """
    attn_res attn_hc attn_hc_post attn_hc_comb attn_norm

    kda.q_proj kda.k_proj kda.v_proj kda.q_conv kda.k_conv kda.v_conv
    kda.q_history kda.k_history kda.v_history kda.q kda.k
    kda.f_a kda.f kda.g kda.b kda.beta kda.o kda.state kda.g_a kda.z kda.o_norm kda.out

    mla.q_a mla.q_a_norm mla.q mla.latent_raw mla.latent mla.latent_cache mla.k_shared mla.k_shared_cache
    mla.index_q mla.index_k_raw mla.index_k mla.index_k_cache mla.index_gate mla.index_gate_cache mla.pool_cache
    mla.index_weights mla.select mla.probs mla.o mla.gate mla.gated mla.out

    gdn.q_proj gdn.k_proj gdn.v_proj gdn.q_conv gdn.k_conv gdn.v_conv
    gdn.q_history gdn.k_history gdn.v_history gdn.q gdn.k
    gdn.a gdn.g gdn.b gdn.beta gdn.o gdn.state gdn.z gdn.o_norm gdn.out

    attn.q_proj attn.gate attn.k_proj attn.v attn.q_norm attn.k_norm attn.q attn.k attn.k_cache attn.v_cache
    attn.probs attn.o attn.gated attn.out

    mid ffn_res ffn_hc ffn_hc_post ffn_hc_comb ffn_norm

    mlp.gate mlp.up mlp.act mlp.out

    moe.logits moe.scores moe.ids moe.weights moe.shared_gate moe.shared_up moe.shared_act moe.shared
    moe.shared_g moe.shared_gated moe.latent moe.routed moe.routed_norm moe.routed_up moe.out

    out
""".split()
_PLACE = {name: i for i, name in enumerate(LAYER_ORDER)}


class Weight(NamedTuple):
    """A weight of the checkpoint as an op takes it: its name, and what is taken of it.

    A name with ``{}`` is that of one tensor an expert. Where two tensors make it, `other` is the second of them.
    """

    name: str
    view: Callable[..., np.ndarray] | None = None
    count: int = 0
    other: str = ""


@dataclass(frozen=True)
class Node:
    """One op of the pass.

    Attributes
    ----------
    tap : str
        What it makes; the first result of the op.
    op : str
        Its name in `kimi_linear.reference`; "cache_append" copies.
    shape : tuple of int
        The tap's axes after tokens.
    inputs : mapping from argument to tap
        Where an argument is a list of arrays, ``snapshots.0``, ``snapshots.1``, ... are its parts.
    weights : mapping from argument to Weight
    options : mapping from argument to value
    state : str or None
        The state array that is the op's second result.
    initial : mapping from argument to state array
        What an earlier call left; without, the sequence begins here. Where the argument is also an input
        (the latents of attention) the earlier rows go before it.
    positions : str or None
        The op takes the positions of its tokens; this state array has a row for each token before them.
    """

    tap: str
    op: str
    shape: tuple[int, ...]
    inputs: Mapping[str, str]
    weights: Mapping[str, Weight] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    state: str | None = None
    initial: Mapping[str, str] = field(default_factory=dict)
    positions: str | None = None


class Experts:
    """One matrix of each expert, fetched when it is asked for; as an array, all of them stacked."""

    def __init__(self, weights: Mapping[str, np.ndarray], name: str, count: int):
        self.weights, self.name, self.count = weights, name, count

    def __len__(self):
        return self.count

    def __getitem__(self, e):
        if not 0 <= e < self.count:
            raise IndexError(f"expert {e} of {self.count}")
        return self.weights[self.name.format(int(e))]

    def __array__(self, dtype=None, copy=None):
        return np.stack([np.asarray(self[e]) for e in range(self.count)]).astype(dtype or np.float64)


# ---- the table -------------------------------------------------------------------------------------


def nodes(config: Config) -> list[Node]:
    """Every op of a model, in the order of the pass."""
    c, D = config, (config.hidden_size,)
    out = [Node("embed", "embedding", D, {"ids": TOKENS}, {"table": Weight("model.embed_tokens.weight")})]
    for i, spec in enumerate(c.layers):
        out += _layer(c, i, spec)
    if c.streams:
        out.insert(1, Node("streams", "mhc_expand", stream_axes(c), {"x": "embed"}, options={"n": c.streams}))
    *snapshots, h = stream_of(c, c.n_layers)
    if c.streams:
        out.append(Node("collapsed", "mhc_collapse", D, {"x": h}))
        h = "collapsed"
    if c.attn_res_block:
        out.append(_attn_res(c, "output_res", h, snapshots, Weight, f"model.{OUTPUT_SCORE}"))
        h = "output_res"
    head = "model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"
    norm = {"w": _norm(c, Weight("model.norm.weight"))}
    return out + [
        Node("norm", "rms_norm", D, {"x": h}, norm, {"eps": c.rms_norm_eps}),
        Node("logits", "linear", (c.vocab_size,), {"x": "norm"}, {"w": Weight(head)}),
    ]


def table(config: Config) -> dict[str, Node]:
    """`nodes` by tap."""
    return {node.tap: node for node in nodes(config)}


def layer_of(name: str) -> int | None:
    """The layer of a tap or a state array; None of what is outside of layers."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit() else None


def in_order(names: Iterable[str]) -> list[str]:
    """Names of taps and state arrays in the order of the pass; unknown ones last, as they came."""
    names = list(names)
    given = {name: i for i, name in enumerate(names)}
    return sorted(names, key=lambda name: (*_place(name), given[name]))


def _place(name: str) -> tuple[int, int]:
    if name in ("embed", "streams"):
        return 0, int(name == "streams")
    layer = layer_of(name)
    if layer is not None:
        return 1 + layer, _PLACE.get(name.split(".", 2)[2], len(_PLACE))
    last = 1 << 40
    return last, {"output_res": 0, "collapsed": 1, "norm": 2, "logits": 3}.get(name, 4)


class _Layer:
    """Names of one layer: ``t`` of a tap, ``w`` of a weight; `add` appends a node."""

    def __init__(self, i: int):
        self.i, self.nodes = i, []

    def t(self, name: str) -> str:
        return f"layers.{self.i}.{name}"

    def w(self, name: str, view=None, count: int = 0) -> Weight:
        return Weight(f"model.layers.{self.i}.{name}", view, count)

    def add(self, tap, op, shape, inputs, weights=None, *, state=None, initial=None, positions=None, **options):
        """`inputs`, `state`, `initial` and `positions` below this layer; ``weights`` from argument to name."""
        def here(names):
            return {argument: self.t(name) for argument, name in (names or {}).items()}

        weights = {a: w if isinstance(w, Weight) else self.w(w) for a, w in (weights or {}).items()}
        self.nodes.append(Node(self.t(tap), op, tuple(shape), here(inputs), weights, options,
                               self.t(state) if state else None, here(initial),
                               self.t(positions) if positions else None))

    def linear(self, tap, shape, x, weight, view=None):
        self.add(tap, "linear", shape, {"x": x}, {"w": self.w(weight, view)})

    def residual(self, tap, shape, before, x, connection):
        """h + x, h being outside the layer for its first half; or what hyper-connections make of the two."""
        if len(shape) == 1:
            self.nodes.append(Node(self.t(tap), "add", shape, {"a": before, "b": self.t(x)}))
            return
        inputs = {"y": x, "post": f"{connection}_post", "comb": f"{connection}_comb"}
        inputs = {argument: self.t(name) for argument, name in inputs.items()} | {"x": before}
        self.nodes.append(Node(self.t(tap), "mhc_post", shape, inputs))


def _layer(c: Config, i: int, spec) -> list[Node]:
    """The nodes of layer i."""
    layer, D = _Layer(i), (c.hidden_size,)
    *snapshots, h = stream_of(c, i)
    before, after = ({"w": _norm(c, layer.w(f"{name}_layernorm.weight"))} for name in ("input", "post_attention"))

    def norm(tap, weights, half, score, connection, h, snapshots):
        if c.attn_res_block:
            layer.nodes.append(_attn_res(c, layer.t(f"{half}_res"), h, snapshots, layer.w, score))
            h = layer.t(f"{half}_res")
        if c.streams:
            _mhc_pre(c, layer, f"{half}_hc", h, connection)
            h = layer.t(f"{half}_hc")
        layer.nodes.append(Node(layer.t(tap), "rms_norm", D, {"x": h}, weights, {"eps": c.rms_norm_eps}))

    norm("attn_norm", before, "attn", MIXER_SCORE, MIXER_STREAMS, h, snapshots)
    {"kda": _kda, "mla": _mla, "gdn": _gdn, "attn": _attn}[spec.mixer](c, layer)
    if begins_block(c, i):
        snapshots = [*snapshots, h]
        h = layer.t(f"{spec.mixer}.out")
    else:
        layer.residual("mid", stream_axes(c), h, f"{spec.mixer}.out", "attn_hc")
        h = layer.t("mid")
    norm("ffn_norm", after, "ffn", FFN_SCORE, FFN_STREAMS, h, snapshots)
    (_dense if spec.ffn == "dense" else _moe)(c, layer)
    layer.residual("out", stream_axes(c), h, "mlp.out" if spec.ffn == "dense" else "moe.out", "ffn_hc")
    return layer.nodes


def stream_of(config: Config, layer: int) -> list[str]:
    """The taps that are the stream which enters a layer: with attention residuals its snapshots, then what has been
    added up since the last; else that alone."""
    begins = [*range(0, layer, config.attn_res_block), layer] if config.attn_res_block else [layer]
    first = "streams" if config.streams else "embed"
    return [f"layers.{i - 1}.out" if i else first for i in begins]


def stream_axes(config: Config) -> tuple[int, ...]:
    """The axes of the stream between layers, after tokens."""
    return (config.streams, config.hidden_size) if config.streams else (config.hidden_size,)


def begins_block(config: Config, layer: int) -> bool:
    """Whether a layer of a model with attention residuals keeps what has been added up as a snapshot, and its mixer's
    output is the first of a new sum."""
    return config.attn_res_block > 0 and layer % config.attn_res_block == 0


def _attn_res(c: Config, tap: str, h: str, snapshots: list[str], w: Callable, score: str) -> Node:
    """The mixture of h and the snapshots before it; `w` makes a Weight of the name that begins with `score`."""
    inputs = {f"snapshots.{j}": name for j, name in enumerate(snapshots)} | {"x": h}
    weight = w(f"{score}_norm.weight", score_weight)._replace(other=w(f"{score}_proj.weight").name)
    return Node(tap, "attn_res", (c.hidden_size,), inputs, {"w": weight}, {"eps": c.rms_norm_eps})


def _mhc_pre(c: Config, layer: _Layer, tap: str, h: str, connection: str) -> None:
    """The three results of one op: what a block reads, and how its output and the streams go on."""
    n = c.streams
    weights = {part: layer.w(f"{connection}_{part}") for part in ("fn", "base", "scale")}
    options = dict(norm_eps=c.rms_norm_eps, eps=c.stream_eps, iters=c.stream_passes)
    for op, name, shape in (("mhc_pre", tap, (c.hidden_size,)), ("mhc_pre_post", f"{tap}_post", (n,)),
                            ("mhc_pre_comb", f"{tap}_comb", (n, n))):
        layer.nodes.append(Node(layer.t(name), op, shape, {"x": h}, weights, options))


def _kda(c: Config, layer: _Layer) -> None:
    H, K = heads = (c.kda_heads, c.kda_head_dim)
    for s in "qkv":
        layer.linear(f"kda.{s}_proj", (H * K,), "attn_norm", f"self_attn.{s}_proj.weight")
    for s in "qkv":
        history = f"kda.{s}_history"
        layer.add(f"kda.{s}_conv", "short_conv", heads, {"x": f"kda.{s}_proj"},
                  {"w": f"self_attn.{s}_conv1d.weight"}, state=history, initial={"history": history})
    for s in "qk":
        layer.add(f"kda.{s}", "l2_norm", heads, {"x": f"kda.{s}_conv"}, eps=c.l2_eps)
    layer.linear("kda.f_a", (K,), "attn_norm", "self_attn.f_a_proj.weight")
    layer.linear("kda.f", heads, "kda.f_a", "self_attn.f_b_proj.weight")
    rate = layer.w("self_attn.A_log", _rate)
    dt_bias = layer.w("self_attn.dt_bias", partial(_split, H))
    layer.add("kda.g", "decay_gate", heads, {"f": "kda.f"}, {"rate": rate, "dt_bias": dt_bias},
              lower_bound=c.gate_lower_bound)
    layer.linear("kda.b", (H,), "attn_norm", "self_attn.b_proj.weight")
    layer.add("kda.beta", "sigmoid", (H,), {"x": "kda.b"})
    layer.add("kda.o", "delta_rule", heads,
              {"q": "kda.q", "k": "kda.k", "v": "kda.v_conv", "g": "kda.g", "beta": "kda.beta"},
              state="kda.state", initial={"initial_state": "kda.state"})
    if c.kda_full_rank_gate:
        layer.linear("kda.z", heads, "attn_norm", "self_attn.g_proj.weight")
    else:
        layer.linear("kda.g_a", (K,), "attn_norm", "self_attn.g_a_proj.weight")
        layer.linear("kda.z", heads, "kda.g_a", "self_attn.g_b_proj.weight")
    layer.add("kda.o_norm", "gated_rms_norm", heads, {"x": "kda.o", "z": "kda.z"},
              {"w": "self_attn.o_norm.weight"}, eps=c.rms_norm_eps)
    layer.linear("kda.out", (c.hidden_size,), "kda.o_norm", "self_attn.o_proj.weight")


def _mla(c: Config, layer: _Layer) -> None:
    H, R, P, nope = c.mla_heads, c.kv_rank, c.rope_dim, c.nope_dim
    _mla_query(c, layer)
    kv_a, kv_b = "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_b_proj.weight"
    layer.linear("mla.latent_raw", (R,), "attn_norm", kv_a, partial(_rows, 0, R))
    layer.add("mla.latent", "rms_norm", (R,), {"x": "mla.latent_raw"},
              {"w": "self_attn.kv_a_layernorm.weight"}, eps=c.latent_eps)
    layer.linear("mla.k_shared", (P,), "attn_norm", kv_a, partial(_rows, R, R + P))
    caches = {"latent": "mla.latent_cache", "k_shared": "mla.k_shared_cache"}
    for (s, kept), width in zip(caches.items(), (R, P)):
        layer.add(kept, "cache_append", (width,), {"x": f"mla.{s}"}, initial={"x": kept})
    w_uk = layer.w(kv_b, partial(_head_rows, H, 0, nope))
    w_uv = layer.w(kv_b, partial(_head_rows, H, nope, None))
    if c.index_heads:
        _indexer(c, layer)
    select = {"select": "mla.select"} if c.index_heads else {}
    layer.add("mla.o", "latent_attention", (H, c.v_head_dim),
              {"q": "mla.q", "latent": "mla.latent", "k_shared": "mla.k_shared"} | select,
              {"w_uk": w_uk, "w_uv": w_uv},
              initial=caches, scale=(nope + P) ** -0.5)
    o = "mla.o"
    if c.mla_gated:
        layer.linear("mla.gate", (H, c.v_head_dim), "attn_norm", "self_attn.g_proj.weight")
        layer.add("mla.gated", "sigmoid_gate", (H, c.v_head_dim), {"x": "mla.o", "gate": "mla.gate"})
        o = "mla.gated"
    layer.linear("mla.out", (c.hidden_size,), o, "self_attn.o_proj.weight")


def _indexer(c: Config, layer: _Layer) -> None:
    """What MLA attends to."""
    n, at = c.index_dim, "self_attn.indexer."
    layer.linear("mla.index_q", (c.index_heads, n), "mla.q_a_norm", f"{at}wq_b.weight")
    layer.linear("mla.index_k_raw", (n,), "attn_norm", f"{at}wk.weight")
    layer.add("mla.index_k", "layer_norm", (n,), {"x": "mla.index_k_raw"},
              {"w": f"{at}k_norm.weight", "b": f"{at}k_norm.bias"}, eps=c.index_eps)
    layer.linear("mla.index_gate", (n,), "attn_norm", f"{at}index_kpool_compress_gate")
    caches = {"k": "mla.index_k_cache", "gate": "mla.index_gate_cache"}
    for (s, kept) in caches.items():
        layer.add(kept, "cache_append", (n,), {"x": f"mla.index_{s}"}, initial={"x": kept})
    layer.add("mla.pool_cache", "index_pool", (n,), {s: f"mla.index_{s}" for s in caches},
              {"ape": f"{at}index_kpool_compress_ape"}, initial=caches)
    layer.linear("mla.index_weights", (c.index_heads,), "attn_norm", f"{at}weights_proj.weight")
    layer.add("mla.select", "index_select", (c.index_topk + c.index_pool - 1,),
              {"q": "mla.index_q", "keys": "mla.pool_cache", "weights": "mla.index_weights"},
              positions="mla.latent_cache", topk=c.index_topk, pool=c.index_pool)


def _mla_query(c: Config, layer: _Layer) -> None:
    shape = (c.mla_heads, c.nope_dim + c.rope_dim)
    if not c.q_rank:
        layer.linear("mla.q", shape, "attn_norm", "self_attn.q_proj.weight")
        return
    layer.linear("mla.q_a", (c.q_rank,), "attn_norm", "self_attn.q_a_proj.weight")
    layer.add("mla.q_a_norm", "rms_norm", (c.q_rank,), {"x": "mla.q_a"},
              {"w": "self_attn.q_a_layernorm.weight"}, eps=c.latent_eps)
    layer.linear("mla.q", shape, "mla.q_a_norm", "self_attn.q_b_proj.weight")


def _gdn(c: Config, layer: _Layer) -> None:
    Hv = c.gdn_v_heads
    keys, values = (c.gdn_k_heads, c.gdn_k_dim), (Hv, c.gdn_v_dim)
    heads, inputs, channels = dict(q=keys, k=keys, v=values), gdn_inputs(c), gdn_channels(c)

    def projected(tap, shape, part):
        name, rows = inputs[part]
        layer.linear(tap, shape, "attn_norm", f"linear_attn.{name}", partial(_taken, rows))

    for s, (H, n) in heads.items():
        projected(f"gdn.{s}_proj", (H * n,), s)
    for s, shape in heads.items():
        history = f"gdn.{s}_history"
        layer.add(f"gdn.{s}_conv", "short_conv", shape, {"x": f"gdn.{s}_proj"},
                  {"w": layer.w("linear_attn.conv1d.weight", partial(_taken, channels[s]))},
                  state=history, initial={"history": history})
    for s in "qk":
        layer.add(f"gdn.{s}", "l2_norm", keys, {"x": f"gdn.{s}_conv"}, eps=c.l2_eps)
    projected("gdn.a", (Hv,), "a")
    layer.add("gdn.g", "decay_gate", (Hv,), {"f": "gdn.a"},
              {"rate": layer.w("linear_attn.A_log", _rate), "dt_bias": "linear_attn.dt_bias"})
    projected("gdn.b", (Hv,), "b")
    layer.add("gdn.beta", "sigmoid", (Hv,), {"x": "gdn.b"})
    layer.add("gdn.o", "delta_rule", values,
              {"q": "gdn.q", "k": "gdn.k", "v": "gdn.v_conv", "g": "gdn.g", "beta": "gdn.beta"},
              state="gdn.state", initial={"initial_state": "gdn.state"}, head_map="tiled" if c.gdn_tiled else "grouped")
    projected("gdn.z", values, "z")
    layer.add("gdn.o_norm", "gated_rms_norm", values, {"x": "gdn.o", "z": "gdn.z"},
              {"w": "linear_attn.norm.weight"}, eps=c.rms_norm_eps, activation="silu")
    layer.linear("gdn.out", (c.hidden_size,), "gdn.o_norm", "linear_attn.out_proj.weight")


def _attn(c: Config, layer: _Layer) -> None:
    queries, keys, eps = (c.attn_heads, c.attn_head_dim), (c.attn_kv_heads, c.attn_head_dim), {"eps": c.rms_norm_eps}
    for part, rows in attn_query_rows(c).items():
        layer.linear(f"attn.{part}", queries, "attn_norm", "self_attn.q_proj.weight", partial(_taken, rows))
    layer.linear("attn.k_proj", keys, "attn_norm", "self_attn.k_proj.weight")
    layer.linear("attn.v", keys, "attn_norm", "self_attn.v_proj.weight")
    for s, shape in (("q", queries), ("k", keys)):
        weights = {"w": _norm(c, layer.w(f"self_attn.{s}_norm.weight"))}
        layer.add(f"attn.{s}_norm", "rms_norm", shape, {"x": f"attn.{s}_proj"}, weights, **eps)
    for s, shape in (("q", queries), ("k", keys)):
        layer.add(f"attn.{s}", "rope", shape, {"x": f"attn.{s}_norm"}, positions="attn.k_cache",
                  base=c.rope_base, rotary=c.rotary_dim)
    caches = {s: f"attn.{s}_cache" for s in "kv"}
    for s, kept in caches.items():
        layer.add(kept, "cache_append", keys, {"x": f"attn.{s}"}, initial={"x": kept})
    layer.add("attn.o", "attention", queries, {s: f"attn.{s}" for s in "qkv"}, initial=caches,
              scale=c.attn_head_dim ** -0.5)
    layer.add("attn.gated", "sigmoid_gate", queries, {"x": "attn.o", "gate": "attn.gate"})
    layer.linear("attn.out", (c.hidden_size,), "attn.gated", "self_attn.o_proj.weight")


def _ffn(c: Config, layer: _Layer, taps, width: int, prefix: str) -> None:
    gate, up, act, out = taps
    layer.linear(gate, (width,), "ffn_norm", f"{prefix}.gate_proj.weight")
    layer.linear(up, (width,), "ffn_norm", f"{prefix}.up_proj.weight")
    if c.situ_beta is None:
        layer.add(act, "swiglu", (width,), {"gate": gate, "up": up}, **_limit(c))
    else:
        layer.add(act, "situ", (width,), {"gate": gate, "up": up}, beta=c.situ_beta, linear_beta=c.situ_linear_beta)
    layer.linear(out, (c.hidden_size,), act, f"{prefix}.down_proj.weight")


def _limit(c: Config) -> dict[str, float]:
    """SwiGLU's, where it has one."""
    return {} if c.swiglu_limit is None else {"limit": c.swiglu_limit}


def _dense(c: Config, layer: _Layer) -> None:
    _ffn(c, layer, ("mlp.gate", "mlp.up", "mlp.act", "mlp.out"), c.ffn_size, "mlp")


def _moe(c: Config, layer: _Layer) -> None:
    names, k = MOE_NAMES[c.moe_names], (c.experts_per_token,)
    prefix = names.prefix
    layer.linear("moe.logits", (c.n_experts,), "ffn_norm", f"{prefix}.gate.weight")
    bias = {"bias": f"{prefix}.{ROUTER_BIAS}"} if c.router_bias else {}
    rule = dict(function=c.router_function, renormalise=c.renormalise, scale=c.routed_scale,
                k=c.experts_per_token, groups=c.n_groups, top_groups=c.top_groups)
    layer.add("moe.ids", "route", k, {"scores": "moe.logits"}, bias, **rule)
    layer.add("moe.weights", "route_weights", k, {"scores": "moe.logits", "ids": "moe.ids"}, bias, **rule)
    inputs = {"x": "ffn_norm", "ids": "moe.ids", "weights": "moe.weights"}
    shared = {"shared": _shared(c, layer, prefix, names.shared)} if c.shared_size else {}
    experts = {argument: layer.w(f"{prefix}.experts.{{}}.{name}.weight", count=c.n_experts)
               for argument, name in zip(("w_gate", "w_up", "w_down"), names.experts)}
    act = _limit(c) if c.situ_beta is None else {"situ": (c.situ_beta, c.situ_linear_beta)}
    if not c.expert_latent:
        layer.add("moe.out", "moe", (c.hidden_size,), inputs | shared, experts, **act)
        return
    L = (c.expert_latent,)
    layer.linear("moe.latent", L, "ffn_norm", f"{prefix}.{LATENT_DOWN}")
    layer.add("moe.routed", "moe", L, inputs | {"x": "moe.latent"}, experts, **act)
    y = "moe.routed"
    if c.expert_latent_norm:
        layer.add("moe.routed_norm", "rms_norm", L, {"x": y}, {"w": f"{prefix}.{LATENT_NORM}"}, eps=c.rms_norm_eps)
        y = "moe.routed_norm"
    layer.linear("moe.routed_up" if shared else "moe.out", (c.hidden_size,), y, f"{prefix}.{LATENT_UP}")
    if shared:
        layer.add("moe.out", "add", (c.hidden_size,), {"a": "moe.routed_up", "b": shared["shared"]})


def _shared(c: Config, layer: _Layer, prefix: str, name: str) -> str:
    """The shared expert; returns the tap that is added."""
    taps = ("moe.shared_gate", "moe.shared_up", "moe.shared_act", "moe.shared")
    _ffn(c, layer, taps, c.shared_size, f"{prefix}.{name}")
    if not c.shared_gated:
        return "moe.shared"
    layer.linear("moe.shared_g", (1,), "ffn_norm", f"{prefix}.{SHARED_GATE}")
    layer.add("moe.shared_gated", "sigmoid_gate", (c.hidden_size,), {"x": "moe.shared", "gate": "moe.shared_g"})
    return "moe.shared_gated"


def _norm(c: Config, weight: Weight) -> Weight:
    """The weight of a norm of layers, queries or keys, or of the final one, as the op takes it."""
    return weight._replace(view=_plus_one) if c.norm_plus_one else weight


def _plus_one(w):
    return 1 + reference.f64(w)


def _rate(a_log):
    """exp(A_log) as ops take it: in float64, rounded once."""
    return np.exp(reference.f64(a_log)).astype(np.float32).reshape(-1)


def _split(H, x):
    return np.asarray(x).reshape(H, -1)


def _taken(rows, w):
    return w[rows]


def _rows(first, last, w):
    return w[first:last]


def _head_rows(H, first, last, w):
    """Rows first to last of each head: [H * n, R] -> [H, last - first, R]."""
    return np.asarray(w).reshape(H, -1, w.shape[-1])[:, first:last]


# ---- running a node --------------------------------------------------------------------------------


def arguments(
    node: Node,
    values: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    state: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The op's arguments by name.

    Parameters
    ----------
    node : Node
    values : mapping from tap to array [T, ...]
        ``"tokens"`` are the ids of the embedding.
    weights : mapping from canonical name to array
    state : mapping from state array to array, optional
        What the sequence had before these tokens; without, nothing. Positions go on from it, unless `values` has
        ``"positions"``.

    Raises
    ------
    KeyError
        If `values` lacks a tap; the message names it and the op.
    """
    args = {a: _value(node, tap, values) for a, tap in node.inputs.items()}
    for a, name in node.initial.items():
        if state is not None and name in state:
            before = state.widened(name) if hasattr(state, "widened") else np.asarray(state[name])
            args[a] = np.concatenate([before.astype(args[a].dtype), args[a]]) if a in node.inputs else before
    for a, weight in node.weights.items():
        if weight.count:
            args[a] = Experts(weights, weight.name, weight.count)
        else:
            parts = [weights[name] for name in (weight.name, weight.other) if name]
            args[a] = weight.view(*parts) if weight.view else parts[0]
    if node.op == "attn_res":
        parts = [args.pop(a) for a in node.inputs if a.startswith("snapshots.")]
        args["snapshots"] = np.stack(parts) if parts else np.empty((0, *args["x"].shape), args["x"].dtype)
    for a in _FLAT.get(node.op, ()):
        args[a] = args[a].reshape(len(args[a]), int(np.prod(args[a].shape[1:])))
    if node.op == "index_select":
        args["positions"] = 1 + int(_positions(node, values, state, len(args["q"]))[-1:].max(initial=-1))
    elif node.positions:
        args["positions"] = _positions(node, values, state, len(args["x"]))
    return args | dict(node.options)


#: What is one result of an op, and no op of its own: the op, and which.
RESULTS = {"mhc_pre_post": ("mhc_pre", 1), "mhc_pre_comb": ("mhc_pre", 2)}


def same_call(a: Node, b: Node) -> bool:
    """Whether two nodes are results of one call of an op."""
    ops = {RESULTS.get(node.op, (node.op, 0))[0] for node in (a, b)}
    return len(ops) == 1 and (a.inputs, a.weights) == (b.inputs, b.weights)


#: Ops that choose: what they give are integers, a set in each row.
CHOICES = ("route", "index_select")

#: Arguments that ops take as rows of one length.
_FLAT = {"linear": ("x",), "sigmoid_gate": ("x", "gate")}


def _positions(node, values, state, T):
    if POSITIONS in values:
        return np.asarray(values[POSITIONS])
    known = state is not None and node.positions in state
    return np.arange(T) + (len(state[node.positions]) if known else 0)


def _value(node, tap, values):
    if tap not in values:
        raise KeyError(f"{node.tap} = {node.op}({', '.join(node.inputs.values())}): there is no {tap}")
    return np.asarray(values[tap])


#: Ops whose formula is row by row, and what computes the same faster.
_FAST = {"attention": _reference_fast, "delta_rule": _reference_fast, "latent_attention": _reference_fast}


def evaluate(node: Node, args: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """All results of the op in float64, in the op's own shapes; `args` as `arguments` gives them."""
    args = dict(args)
    if node.op == "cache_append":
        return (reference.f64(args["x"]),)
    if node.op in RESULTS:
        op, which = RESULTS[node.op]
        return (getattr(reference, op)(**args)[which],)
    if node.op == "route_weights":
        args = {a: args[a] for a in ("scores", "ids", "function", "renormalise", "scale")}
    return as_tuple(getattr(_FAST.get(node.op, reference), node.op)(**args))


def run_node(
    node: Node,
    values: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    state: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """A tap [T, ...] as float64 makes it from given values of its inputs; arguments as for `arguments`."""
    y = evaluate(node, arguments(node, values, weights, state))[0]
    return y.reshape(len(y), *node.shape)
