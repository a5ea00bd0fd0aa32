"""Faults of grouped-query attention, of rotary positions and of the output gate."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import CALL, RUN, SEVERAL, SPLIT, Fault, changed
from ._masks import cached_alone, from_the_left, last_alone, masked, not_itself, one_sequence, to_the_end
from ._mla import in_pairs, interleaved_values
from .scene import Branch
from .site import Site

# ---- attention -----------------------------------------------------------------------------------------


def tiled_heads(call):
    """Query head h uses key head h % Hkv."""
    H, Hkv = call["q"].shape[1], call["k"].shape[1]
    if Hkv in (1, H):
        return None
    use = np.arange(H) % Hkv
    return call.run(k=call["k"][:, use], v=call["v"][:, use])


def exchanged(call):
    """Values for keys and keys for values."""
    k, v = call["k"], call["v"]
    return call.run(k=v, v=k) if k.shape == v.shape else None


def first_head(call):
    """All query heads use the first head of keys and values."""
    k, v = call["k"], call["v"]
    return call.run(k=np.repeat(k[:, :1], k.shape[1], 1), v=np.repeat(v[:, :1], v.shape[1], 1))


def unturned_past(site: Site):
    """Keys of earlier calls as they were before rope."""
    k = site.sibling("attn.k_norm")
    if k is None or k.shape != site["k"].shape:
        return None
    return site.run(branches=[Branch(past, p.rows) for p, past in site.scene.pasts()], past={"k": k})


def scaled_by_hidden(site: Site):
    x, (H, K) = site.sibling("attn_norm"), site.node.shape
    width = K if x is None else x.shape[-1] // H
    return site.run(scale=width ** -0.5) if width != K else None


# ---- rope ----------------------------------------------------------------------------------------------


def pairs_of_head(call, speeds: str):
    """Value j of a head is turned with value j + K / 2, j below rotary / 2; speeds are of rotary, or of K."""
    x, n, K = call["x"], call["rotary"] // 2, call["x"].shape[-1]
    if n == 0 or 2 * n == K or n > K // 2:
        return None
    y, a, b = x.copy(), x[..., :n], x[..., K // 2:K // 2 + n]
    angle = _angles(call, 2 * n, K if speeds == "of the head" else None)
    c, s = np.cos(angle), np.sin(angle)
    y[..., :n], y[..., K // 2:K // 2 + n] = a * c - b * s, b * c + a * s
    return y


def _turned(call, angle=None, pairs="halves", first=0, rotary=None):
    """rope with other angles [.., rotary / 2], pairs, or the values from `first` on turned."""
    x, n = call["x"], call["rotary"] if rotary is None else rotary
    if n == 0 or first + n > x.shape[-1]:
        return None
    angle = _angles(call, n) if angle is None else angle
    turned = in_pairs(x[..., first:first + n], angle, pairs)
    return np.concatenate([x[..., :first], turned, x[..., first + n:]], axis=-1)


def _angles(call, rotary, over=None):
    speed = call["base"] ** (-2.0 * np.arange(rotary // 2) / (rotary if over is None else over))
    return reference.f64(np.asarray(call.args["positions"]))[..., None, None] * speed


def angles_of_float32(call):
    speed = np.float32(call["base"]) ** (-2 * np.arange(call["rotary"] // 2, dtype=np.float32) / max(call["rotary"], 1))
    positions = np.asarray(call.args["positions"]).astype(np.float32)
    return _turned(call, (positions[..., None, None] * speed.astype(np.float32)).astype(np.float64))


def counted_in_call(call):
    """Positions that begin anew in each call."""
    positions = np.arange(len(call["x"]))
    if isinstance(call, Site):
        for piece in call.scene.pieces:
            positions[piece.rows] = np.arange(len(piece.rows))
    return call.run(positions=positions)


def moved_behind_first(site: Site, by: int):
    positions = np.array(site.args["positions"])
    for piece in site.scene.pieces:
        positions[piece.rows] += 0 if piece.first else by
    return site.run(positions=positions)


def counted_over_sequences(site: Site, calls: str):
    """Positions of a sequence have those of the sequences before it in a call added."""
    if calls == "the first call" and site.scene.n_calls == 1:
        return None
    positions = np.array(site.args["positions"])
    for piece in site.scene.pieces:
        positions[piece.rows] += len(piece.before) if piece.call == 0 or calls == "each call" else 0
    return site.run(positions=positions)


def moved(call, by: int):
    return call.run(positions=np.asarray(call.args["positions"]) + by)


def all_turned(call):
    K = call["x"].shape[-1]
    return _turned(call, rotary=K) if K % 2 == 0 and K != call["rotary"] else None


def of_last(call):
    K, n = call["x"].shape[-1], call["rotary"]
    return _turned(call, first=K - n) if n != K else None


# ---- sigmoid_gate --------------------------------------------------------------------------------------


def tiled_gate(call):
    """Value d has the gate d % G."""
    D, G = call["x"].shape[-1], call["gate"].shape[-1]
    return call.run(gate=np.tile(call["gate"], D // G)) if 1 < G < D else None


def with_factor(of_gate):
    def function(call):
        gate = call["gate"]
        return call["x"] * np.repeat(of_gate(gate), call["x"].shape[-1] // gate.shape[-1], axis=-1)

    return function


ATTENTION, ROPE, GATE = ("attention",), ("rope",), ("sigmoid_gate",)
NEOX, GATED = "arXiv:2104.09864 has neighbours, GPT-NeoX halves", "arXiv:2505.06708"

FAULTS = (
    Fault("attention_scale_missing", "scores of grouped heads are not scaled", ATTENTION, changed(scale=lambda s: 1.0)),
    Fault("attention_scale_of_value", "scores are scaled by V^-1/2", ATTENTION,
          changed(scale=lambda s: s["v"].shape[-1] ** -0.5), use=CALL),
    Fault("attention_scale_divides", "scores are divided by the scale", ATTENTION,
          changed(scale=lambda s: 1 / s["scale"])),
    Fault("attention_scale_twice", "scores are scaled twice", ATTENTION, changed(scale=lambda s: s["scale"] ** 2),
          use=CALL, source="the caller scales the queries; so does the kernel"),
    Fault("attention_heads_tiled", "query head h uses key head h % Hkv, not h // (H / Hkv)", ATTENTION, tiled_heads,
          source="arXiv:2305.13245: heads of a group are neighbours"),
    Fault("attention_first_head", "all query heads use the first key head", ATTENTION, first_head),
    Fault("attention_heads_interleaved", "outputs of grouped heads lie as [V, H], not [H, V]", ATTENTION,
          interleaved_values),
    Fault("attention_keys_for_values", "keys and values are exchanged", ATTENTION, exchanged),
    Fault("attention_mask_missing", "queries see the positions behind their own", ATTENTION,
          masked(to_the_end), looks_ahead=True),
    Fault("attention_mask_off_by_one", "queries do not see their own position", ATTENTION,
          masked(not_itself)),
    Fault("attention_mask_from_the_left", "query t sees positions 0 to t, whatever was cached before it", ATTENTION,
          from_the_left, SPLIT, source="torch's is_causal aligns at the first row"),
    Fault("attention_own_call_missing", "queries do not see the positions of their own call", ATTENTION,
          masked(cached_alone), SPLIT, source="attention before the new rows are appended", use=RUN, looks_ahead=True),
    Fault("attention_cached_keys_unturned", "keys are cached before rope: those of earlier calls are not turned",
          ATTENTION, unturned_past, SPLIT, source="caches that hold what k_proj or k_norm gave", use=RUN),
    Fault("attention_scale_of_hidden", "scores are scaled by (hidden / heads)^-1/2; a head has another width",
          ATTENTION, scaled_by_hidden, source="head_dim of config.json is left out", use=RUN),
    Fault("attention_window", "a query sees the last positions alone", ATTENTION,
          last_alone, use=CALL, choices=((16,), (32,), (64,), (128,)),
          each="a query sees the last {} positions alone"),
    Fault("attention_offsets_ignored", "offsets are ignored: queries see the sequences before their own", ATTENTION,
          one_sequence, use=CALL),
    Fault("rope_neighbours", "neighbours are turned, not values half of `rotary` apart", ROPE,
          lambda s: _turned(s, pairs="neighbours"), source=NEOX),
    Fault("rope_pairs_of_head", "values half a head apart are turned, not half of `rotary`", ROPE, pairs_of_head,
          choices=(("of rotary",), ("of the head",)),
          each="values half a head apart are turned, not half of `rotary`, with speeds {}",
          source="pie, pull request 603; coreai-models, issue 66"),
    Fault("rope_backwards", "pairs are turned by the negative angle", ROPE,
          lambda s: _turned(s, -_angles(s, s["rotary"]))),
    Fault("rope_missing", "nothing is turned", ROPE, lambda s: s["x"]),
    Fault("rope_of_all", "all values of a head are turned", ROPE, all_turned,
          source="partial_rotary_factor is left out"),
    Fault("rope_of_last", "the last values of a head are turned, not the first", ROPE, of_last),
    Fault("rope_speed_of_width", "speeds are base^(-2j / K), over the width of the head", ROPE,
          lambda s: None if s["rotary"] == s["x"].shape[-1] else
          _turned(s, _angles(s, s["rotary"], s["x"].shape[-1]))),
    Fault("rope_base_other", "another base", ROPE,
          lambda s, base: s.run(base=base) if s["base"] != base else None,
          choices=((1e4,), (1e6,), (1e7,)), each="base is {:g}", source="rope_theta of another model"),
    Fault("rope_position_off_by_one", "positions count from 1, or are one behind", ROPE, moved,
          choices=((1,), (-1,)), each="positions are {:+d}"),
    Fault("rope_positions_from_zero", "positions are those in the call", ROPE, counted_in_call, SPLIT,
          source="a cache that is not counted"),
    Fault("rope_positions_shifted_between_calls", "positions of later calls are one off; those of the first are right",
          ROPE, moved_behind_first, SPLIT, choices=((-1,), (1,)), each="behind the first call positions are {:+d}",
          source="a cache that is counted before, or behind, its new row", use=RUN),
    Fault("rope_positions_over_sequences", "positions go on over the sequences of a call", ROPE, counted_over_sequences,
          SEVERAL, choices=(("each call",), ("the first call",)), each="positions go on over the sequences of {}",
          source="packed batches: one arange for all rows", use=RUN),
    Fault("rope_angle_of_float32", "angles are float32", ROPE, angles_of_float32,
          source="transformers computes angles in float32"),
    Fault("gate_raw", "the gate is not put through a sigmoid", GATE, with_factor(lambda g: g)),
    Fault("gate_silu", "SiLU of the gate, not its sigmoid", GATE, with_factor(reference.silu),
          source="Gated DeltaNet's output gate"),
    Fault("gate_of_complement", "1 - sigmoid(gate)", GATE, changed(gate=lambda s: -s["gate"])),
    Fault("gate_twice", "the gate is applied twice", GATE, with_factor(lambda g: reference.sigmoid(g) ** 2)),
    Fault("gate_left_out", "x without its gate", GATE, lambda s: s["x"], source=GATED),
    Fault("gate_tiled", "value d has the gate d % G, not d // (D / G)", GATE, tiled_gate, use=CALL),
)
