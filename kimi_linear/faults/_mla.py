"""Faults of attention over latents."""

from __future__ import annotations

import numpy as np

from .. import reference
from . import scene as rules
from ._fault import RESTORED, Fault, carried, changed
from .site import Site


def rotary(site: Site, pairs: str, theta: float):
    """The last P values of queries and shared keys turned by their position."""
    q, k_shared = site["q"].copy(), site["k_shared"]
    P = k_shared.shape[-1]
    if P % 2:
        return None
    angle = positions(site.scene)[:, None] * theta ** (-np.arange(0, P, 2) / P)
    q[..., -P:] = _turned(q[..., -P:], angle[:, None], pairs)
    return site.run(q=q, k_shared=_turned(k_shared, angle, pairs))


def positions(scene) -> np.ndarray:
    """The position of each row in its sequence."""
    out = np.zeros(scene.T)
    for past, own in scene.branches():
        out[own] = len(past) + np.arange(len(own))
    return out


def _turned(x, angle, pairs):
    a, b = (x[..., ::2], x[..., 1::2]) if pairs == "neighbours" else np.split(x, 2, axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    y = (a * c - b * s, a * s + b * c)
    return np.stack(y, -1).reshape(x.shape) if pairs == "neighbours" else np.concatenate(y, -1)


def turned_keys(site: Site):
    """w_uk [H, nope, R] read from memory that holds [H, R, nope]."""
    w = site["w_uk"]
    H, nope, R = w.shape
    return site.run(w_uk=w.reshape(H, R, nope).swapaxes(1, 2))


def interleaved_values(site: Site):
    """Outputs in the order [V, H]."""
    o = site.run()
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
    return site.run(q=np.concatenate([q[..., P:], q[..., :P]], axis=-1))


def shared_not_scored(site: Site):
    return site.run(k_shared=0 * site["k_shared"])


def unmasked(site: Site):
    """Every query of a sequence sees all of its rows."""
    return _masked(site, lambda t, S: S)


def blind_to_itself(site: Site):
    """A query sees the rows before its own; the first one its own."""
    return _masked(site, lambda t, S: max(t, 1))


def _masked(site, seen):
    q, latent, k_shared = (site[a] for a in ("q", "latent", "k_shared"))
    out = np.empty((len(q), q.shape[1], site["w_uv"].shape[1]))
    for past, own in site.scene.branches():
        rows = np.concatenate([past, own])
        k, v = _keys_and_values(latent[rows], k_shared[rows], site["w_uk"], site["w_uv"])
        for t, row in enumerate(rows):
            n = seen(t, len(rows))
            p = reference.softmax(site["scale"] * np.einsum("hsn,hn->hs", k[:, :n], q[row]))
            if t >= len(past):
                out[row] = np.einsum("hs,hsv->hv", p, v[:, :n])
    return out


def _keys_and_values(latent, k_shared, w_uk, w_uv):
    k = np.einsum("hnr,sr->hsn", w_uk, latent)
    shared = np.broadcast_to(k_shared, (len(w_uk), *k_shared.shape))
    return np.concatenate([k, shared], axis=-1), np.einsum("hvr,sr->hsv", w_uv, latent)


def of_width(width):
    return lambda site: width(site) ** -0.5


MLA, PAPER = ("latent_attention",), "arXiv:2405.04434, section 2.1"

FAULTS = (
    Fault("mla_scale_of_latent", "scores are scaled by (R + P)^-1/2, the width of the absorbed product", MLA,
          changed(scale=of_width(lambda s: s["latent"].shape[-1] + s["k_shared"].shape[-1])),
          source=f"{PAPER}: 576 for 192"),
    Fault("mla_scale_of_nope", "scores are scaled by nope^-1/2, without the shared part", MLA,
          changed(scale=of_width(lambda s: s["w_uk"].shape[1])), source=f"{PAPER}: 128 for 192"),
    Fault("mla_scale_missing", "scores are not scaled", MLA, changed(scale=lambda s: 1.0), source=PAPER),
    Fault("rotary_applied", "queries and shared keys are rotated; the model has no positions", MLA, rotary,
          choices=(("halves", 1e4), ("neighbours", 1e4)), source="config: mla_use_nope"),
    Fault("k_b_transposed", "the key half of kv_b is read as [R, nope]", MLA, turned_keys,
          source="llama.cpp: its converter transposes k_b for the absorbed form"),
    Fault("kv_b_halves_swapped", "kv_b is taken as values first, then keys", MLA, values_before_keys, source=PAPER),
    Fault("kv_b_not_by_head", "kv_b is split into all keys and all values, not head by head", MLA, unsplit_heads,
          source=PAPER),
    Fault("value_heads_interleaved", "outputs lie as [V, H], not [H, V]", MLA, interleaved_values, source=PAPER),
    Fault("key_parts_swapped", "keys are [shared | own], queries [own | shared]", MLA, shared_first,
          source="llama.cpp: the form without a split kv_b"),
    Fault("shared_key_missing", "the shared key part is not scored", MLA, shared_not_scored, source=PAPER),
    Fault("mask_missing", "queries see the rows behind their own", MLA, unmasked, source=PAPER),
    Fault("mask_off_by_one", "queries do not see their own row", MLA, blind_to_itself, source=PAPER),
    Fault("stale_cache_row", "after truncate one row too many is left in the cache", MLA, carried(rules.stale_row),
          RESTORED, source="caches that are cut by count, off by one"),
)
