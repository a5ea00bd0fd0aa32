"""Names and shapes of a model's tensors, and which rows of a joint matrix are whose.

Canonical spelling: ``A_log`` is [H], a convolution's taps are [channels, W], matrices are [rows out, columns in].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._float64 import f64

Shapes = dict[str, tuple[int, ...]]


class MoeNames(NamedTuple):
    """How the tensors of a mixture are spelled: the three of an expert in the order gate, up, down."""

    prefix: str
    experts: tuple[str, str, str]
    shared: str


MOE_NAMES = {
    "block_sparse_moe": MoeNames("block_sparse_moe", ("w1", "w3", "w2"), "shared_experts"),
    "mlp": MoeNames("mlp", ("gate_proj", "up_proj", "down_proj"), "shared_expert"),
    "mlp.plural": MoeNames("mlp", ("gate_proj", "up_proj", "down_proj"), "shared_experts"),
}
ROUTER_BIAS = "gate.e_score_correction_bias"
SHARED_GATE = "shared_expert_gate.weight"
#: Around the routed experts, where they read and write a latent.
LATENT_DOWN, LATENT_NORM, LATENT_UP = (f"routed_expert_{x}.weight" for x in ("down_proj", "norm", "up_proj"))
#: What scores residuals, before each half of a layer and before the final norm; see `_score`.
MIXER_SCORE, FFN_SCORE, OUTPUT_SCORE = "self_attention_res", "mlp_res", "output_attn_res"
#: What hyper-connections are made of, before each half of a layer; see `_streams`.
MIXER_STREAMS, FFN_STREAMS = "hc_attn", "hc_ffn"


def weight_shapes(c) -> Shapes:
    """Name and shape of every tensor of a Config, in the order of their use."""
    D = c.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (c.vocab_size, D)}
    for i, spec in enumerate(c.layers):
        parts = _score(c, MIXER_SCORE) | _streams(c, MIXER_STREAMS)
        parts |= {"input_layernorm.weight": (D,)} | MIXERS[spec.mixer](c)
        parts |= _score(c, FFN_SCORE) | _streams(c, FFN_STREAMS)
        parts |= {"post_attention_layernorm.weight": (D,)} | FFNS[spec.ffn](c)
        shapes |= _under(f"model.layers.{i}", parts)
    shapes |= _under("model", _score(c, OUTPUT_SCORE) | {"norm.weight": (D,)})
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, D)
    return shapes


def _score(c, name: str) -> Shapes:
    """What scores the candidates of a mixture of residuals: the weight of a norm, and a projection to one value."""
    D = c.hidden_size
    return {f"{name}_norm.weight": (D,), f"{name}_proj.weight": (1, D)} if c.attn_res_block else {}


def _streams(c, name: str) -> Shapes:
    """What a block's hyper-connections are made of: a projection of all streams, an offset, three factors."""
    n = c.streams
    return {f"{name}_fn": ((2 + n) * n, n * c.hidden_size), f"{name}_base": ((2 + n) * n,),
            f"{name}_scale": (3,)} if n else {}


def score_weight(norm, proj) -> np.ndarray:
    """The vector [D] that scores a mixture of residuals: its norm times its projection, in float64, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (f64(norm) * f64(proj).reshape(-1)).astype(np.float32)


def _kda(c) -> Shapes:
    D, H, K, W = c.hidden_size, c.kda_heads, c.kda_head_dim, c.conv_width
    gate = {"g_proj.weight": (H * K, D)} if c.kda_full_rank_gate else {
        "g_a_proj.weight": (K, D), "g_b_proj.weight": (H * K, K)}
    shapes: Shapes = {}
    for x in "qkv":
        shapes |= {f"{x}_proj.weight": (H * K, D), f"{x}_conv1d.weight": (H * K, W)}
    shapes |= {
        "f_a_proj.weight": (K, D), "f_b_proj.weight": (H * K, K), "A_log": (H,), "dt_bias": (H * K,),
        "b_proj.weight": (H, D), **gate, "o_norm.weight": (K,), "o_proj.weight": (D, H * K),
    }
    return _under("self_attn", shapes)


def _mla(c) -> Shapes:
    D, H, R, P = c.hidden_size, c.mla_heads, c.kv_rank, c.rope_dim
    n_q = H * (c.nope_dim + P)
    if c.q_rank:
        shapes: Shapes = {"q_a_proj.weight": (c.q_rank, D), "q_a_layernorm.weight": (c.q_rank,),
                          "q_b_proj.weight": (n_q, c.q_rank)}
    else:
        shapes = {"q_proj.weight": (n_q, D)}
    shapes |= {
        "kv_a_proj_with_mqa.weight": (R + P, D), "kv_a_layernorm.weight": (R,),
        "kv_b_proj.weight": (H * (c.nope_dim + c.v_head_dim), R),
        **({"g_proj.weight": (H * c.v_head_dim, D)} if c.mla_gated else {}),
        **(_under("indexer", _indexer(c)) if c.index_heads else {}),
        "o_proj.weight": (D, H * c.v_head_dim),
    }
    return _under("self_attn", shapes)


def _indexer(c) -> Shapes:
    D, n, P = c.hidden_size, c.index_dim, c.index_pool
    return {"wq_b.weight": (c.index_heads * n, c.q_rank), "wk.weight": (n, D), "k_norm.weight": (n,),
            "k_norm.bias": (n,), "weights_proj.weight": (c.index_heads, D), "index_kpool_compress_ape": (P, n),
            "index_kpool_compress_gate": (n, D)}


def _gdn(c) -> Shapes:
    D, Hv, V = c.hidden_size, c.gdn_v_heads, c.gdn_v_dim
    n_qkv = 2 * c.gdn_k_heads * c.gdn_k_dim + Hv * V
    inputs: dict[str, Shapes] = {
        "grouped": {"in_proj_qkvz.weight": (n_qkv + Hv * V, D), "in_proj_ba.weight": (2 * Hv, D)},
        "split": {"in_proj_qkv.weight": (n_qkv, D), "in_proj_z.weight": (Hv * V, D), "in_proj_b.weight": (Hv, D),
                  "in_proj_a.weight": (Hv, D)},
    }
    return _under("linear_attn", inputs[c.gdn_inputs] | {
        "conv1d.weight": (n_qkv, c.conv_width), "A_log": (Hv,), "dt_bias": (Hv,), "norm.weight": (V,),
        "out_proj.weight": (D, Hv * V)})


def _attn(c) -> Shapes:
    D, H, Hkv, K = c.hidden_size, c.attn_heads, c.attn_kv_heads, c.attn_head_dim
    return _under("self_attn", {
        "q_proj.weight": (2 * H * K, D), "k_proj.weight": (Hkv * K, D), "v_proj.weight": (Hkv * K, D),
        "q_norm.weight": (K,), "k_norm.weight": (K,), "o_proj.weight": (D, H * K)})


def _dense(c) -> Shapes:
    return _ffn("mlp", c.ffn_size, c.hidden_size)


def _moe(c) -> Shapes:
    D, E, n, names = c.hidden_size, c.n_experts, c.moe_size, MOE_NAMES[c.moe_names]
    L = c.expert_latent or D
    gate, up, down = names.experts
    shapes: Shapes = {"gate.weight": (E, D)} | ({ROUTER_BIAS: (E,)} if c.router_bias else {})
    if c.expert_latent:
        shapes[LATENT_DOWN] = (L, D)
    for e in range(E):
        shapes |= {f"experts.{e}.{gate}.weight": (n, L), f"experts.{e}.{up}.weight": (n, L),
                   f"experts.{e}.{down}.weight": (L, n)}
    if c.expert_latent:
        shapes |= ({LATENT_NORM: (L,)} if c.expert_latent_norm else {}) | {LATENT_UP: (D, L)}
    if c.shared_size:
        shapes |= _ffn(names.shared, c.shared_size, D) | ({SHARED_GATE: (1, D)} if c.shared_gated else {})
    return _under(names.prefix, shapes)


def _ffn(prefix: str, width: int, D: int) -> Shapes:
    return {f"{prefix}.gate_proj.weight": (width, D), f"{prefix}.up_proj.weight": (width, D),
            f"{prefix}.down_proj.weight": (D, width)}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


MIXERS = {"kda": _kda, "mla": _mla, "gdn": _gdn, "attn": _attn}
FFNS = {"dense": _dense, "moe": _moe}


# ---- rows of joint matrices -------------------------------------------------------------------------


def gdn_inputs(c) -> dict[str, tuple[str, Any]]:
    """What the gated delta net projects its input to: part -> (tensor below ``linear_attn``, its rows).

    Parts are q, k [Hk * K], v, z [Hv * V], b and a [Hv], each with its heads in order. In a grouped tensor the rows of
    a key head lie together: q, k, then v and z of its value heads; b, then a of its value heads.
    """
    Hk, r, K, V = c.gdn_k_heads, c.gdn_v_heads // max(c.gdn_k_heads, 1), c.gdn_k_dim, c.gdn_v_dim
    if c.gdn_inputs == "grouped":
        qkvz = _grouped(Hk, {"q": K, "k": K, "v": r * V, "z": r * V})
        return {part: ("in_proj_qkvz.weight", rows) for part, rows in qkvz.items()} | {
            part: ("in_proj_ba.weight", rows) for part, rows in _grouped(Hk, {"b": r, "a": r}).items()}
    whole = slice(None)
    return {part: ("in_proj_qkv.weight", rows) for part, rows in gdn_channels(c).items()} | {
        part: (f"in_proj_{part}.weight", whole) for part in "zba"}


def gdn_channels(c) -> dict[str, slice]:
    """The channels of q, k and v in the gated delta net's convolution."""
    n_k, n_v = c.gdn_k_heads * c.gdn_k_dim, c.gdn_v_heads * c.gdn_v_dim
    return {"q": slice(0, n_k), "k": slice(n_k, 2 * n_k), "v": slice(2 * n_k, 2 * n_k + n_v)}


def _grouped(groups: int, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Rows of each part where `groups` groups lie one after another, each of the parts in turn."""
    rows = np.arange(groups * sum(widths.values())).reshape(groups, -1)
    ends = np.cumsum(list(widths.values()))
    return {part: rows[:, end - n:end].ravel() for (part, n), end in zip(widths.items(), ends)}


def attn_query_rows(c) -> dict[str, np.ndarray]:
    """Rows of q_proj of gated attention: of each head its query, then its gate; each [H * K]."""
    return _grouped(c.attn_heads, {"q_proj": c.attn_head_dim, "gate": c.attn_head_dim})
