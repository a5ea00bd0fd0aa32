"""Faults of attention over latents."""

from __future__ import annotations

import numpy as np

from .. import _reference_fast, reference
from . import scene as rules
from ._fault import CALL, RESTORED, RUN, SPLIT, Fault, carried, changed
from ._masks import cached_alone, from_the_left, last_alone, masked, not_itself, one_sequence, to_the_end
from .site import Site


def rotary(call, pairs: str, theta: float):
    """The last P values of queries and shared keys turned by their position."""
    if call["k_shared"].shape[-1] % 2 or not call["k_shared"].shape[-1]:
        return None

    def attend(q, k_shared, latent, offsets=None, kv_offsets=None, **rest):
        q, k_shared = reference.f64(q).copy(), reference.f64(k_shared)
        P = k_shared.shape[-1]
        of_queries, of_keys = positions(len(q), len(latent), offsets, kv_offsets)
        speed = theta ** (-np.arange(0, P, 2) / P)
        q[..., -P:] = in_pairs(q[..., -P:], (of_queries[:, None] * speed)[:, None], pairs)
        k_shared = in_pairs(k_shared, of_keys[:, None] * speed, pairs)
        return _reference_fast.latent_attention(q, latent, k_shared, offsets=offsets, kv_offsets=kv_offsets, **rest)

    return call.run(by=attend)


def positions(T, S, offsets, kv_offsets):
    """(of queries [T], of cached rows [S]), each in its sequence."""
    of_queries, of_keys = np.zeros(T), np.zeros(S)
    cached = reference.sequences(S, offsets if kv_offsets is None else kv_offsets)
    for r, c in zip(reference.sequences(T, offsets), cached):
        of_keys[c] = np.arange(c.stop - c.start)
        of_queries[r] = of_keys[c][len(of_keys[c]) - (r.stop - r.start):]
    return of_queries, of_keys


def in_pairs(x, angle, pairs):
    """Pairs of values, neighbours or half of x apart, turned by their angle."""
    a, b = (x[..., ::2], x[..., 1::2]) if pairs == "neighbours" else np.split(x, 2, axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    y = (a * c - b * s, a * s + b * c)
    return np.stack(y, -1).reshape(x.shape) if pairs == "neighbours" else np.concatenate(y, -1)


def turned(argument):
    """A matrix of each head, [H, n, R], read from memory that holds [H, R, n]."""
    def function(call):
        w = call[argument]
        H, n, R = w.shape
        return call.run(**{argument: w.reshape(H, R, n).swapaxes(1, 2)})

    return function


def interleaved_values(call):
    """Outputs in the order [V, H]."""
    o = call.run()
    return o.swapaxes(1, 2).reshape(o.shape)


def values_before_keys(site: Site):
    """kv_b taken as [values | keys] in each head."""
    uk, uv = site["w_uk"], site["w_uv"]
    return site.run(w_uk=uv, w_uv=uk) if uk.shape == uv.shape else None


def unsplit_heads(site: Site):
    """kv_b split into all keys and all values, and not head by head."""
    uk, uv = site["w_uk"], site["w_uv"]
    H, nope, R = uk.shape
    rows = np.concatenate([uk, uv], axis=1).reshape(-1, R)
    return site.run(w_uk=rows[:H * nope].reshape(uk.shape), w_uv=rows[H * nope:].reshape(uv.shape))


def shared_first(site: Site):
    """Queries [nope | P] against keys [P | nope]."""
    q, P = site["q"], site["k_shared"].shape[-1]
    return None if P == 0 else site.run(q=np.concatenate([q[..., P:], q[..., :P]], axis=-1))


def shared_not_scored(site: Site):
    return site.run(k_shared=0 * site["k_shared"]) if site["k_shared"].shape[-1] else None


def of_width(width):
    return lambda site: width(site) ** -0.5


MLA, PAPER = ("latent_attention",), "arXiv:2405.04434, section 2.1"

FAULTS = (
    Fault("mla_scale_of_latent", "scores are scaled by (R + P)^-1/2, the width of the absorbed product", MLA,
          changed(scale=of_width(lambda s: s["latent"].shape[-1] + s["k_shared"].shape[-1])),
          source=f"{PAPER}: 576 for 192"),
    Fault("mla_scale_of_nope", "scores are scaled by nope^-1/2, without the shared part", MLA,
          lambda s: s.run(scale=s["w_uk"].shape[1] ** -0.5) if s["k_shared"].shape[-1] else None,
          source=f"{PAPER}: 128 for 192"),
    Fault("mla_scale_missing", "scores are not scaled", MLA, changed(scale=lambda s: 1.0), source=PAPER),
    Fault("rotary_applied", "queries and shared keys are rotated; the model has no positions", MLA, rotary,
          choices=(("halves", 1e4), ("neighbours", 1e4)), source="config: mla_use_nope"),
    Fault("k_b_transposed", "the key half of kv_b is read as [R, nope]", MLA, turned("w_uk"),
          source="llama.cpp: its converter transposes k_b for the absorbed form"),
    Fault("kv_b_halves_swapped", "kv_b is taken as values first, then keys", MLA, values_before_keys, source=PAPER),
    Fault("kv_b_not_by_head", "kv_b is split into all keys and all values, not head by head", MLA, unsplit_heads,
          source=PAPER),
    Fault("value_heads_interleaved", "outputs lie as [V, H], not [H, V]", MLA, interleaved_values, source=PAPER),
    Fault("key_parts_swapped", "keys are [shared | own], queries [own | shared]", MLA, shared_first,
          source="llama.cpp: the form without a split kv_b"),
    Fault("shared_key_missing", "the shared key part is not scored", MLA, shared_not_scored, source=PAPER),
    Fault("mask_missing", "queries see the rows behind their own", MLA, masked(to_the_end), source=PAPER,
          looks_ahead=True),
    Fault("mask_off_by_one", "queries do not see their own row", MLA, masked(not_itself),
          source=PAPER),
    Fault("mask_own_call_missing", "queries do not see the rows of their own call", MLA, masked(cached_alone), SPLIT,
          source="attention before the new rows are appended", use=RUN, looks_ahead=True),
    Fault("stale_cache_row", "after truncate one row too many is left in the cache", (*MLA, "attention"),
          carried(rules.stale_row), RESTORED, source="caches that are cut by count, off by one", use=RUN),
    Fault("mla_scale_of_value", "scores are scaled by V^-1/2", MLA,
          changed(scale=of_width(lambda s: s["w_uv"].shape[1])), use=CALL),
    Fault("mla_scale_divides", "scores are divided by the scale", MLA, changed(scale=lambda s: 1 / s["scale"]),
          use=CALL),
    Fault("mla_scale_twice", "scores are scaled twice", MLA, changed(scale=lambda s: s["scale"] ** 2), use=CALL,
          source="the caller scales the queries; so does the kernel"),
    Fault("v_b_transposed", "the value half of kv_b is read as [R, V]", MLA, turned("w_uv"), use=CALL,
          source="llama.cpp: attn_v_b"),
    Fault("mask_from_the_left", "query t sees rows 0 to t, whatever was cached before it", MLA,
          from_the_left, SPLIT, source="torch's is_causal aligns at the first row, flash-attention at the last"),
    Fault("window", "a query sees the last rows alone", MLA, last_alone,
          use=CALL, choices=((16,), (32,), (64,), (128,)), each="a query sees the last {} rows alone"),
    Fault("mla_offsets_ignored", "offsets are ignored: queries see the sequences before their own", MLA, one_sequence,
          use=CALL),
    Fault("own_keys_missing", "the keys' own part is not scored", MLA, changed(w_uk=lambda s: 0 * s["w_uk"]), use=CALL),
)
