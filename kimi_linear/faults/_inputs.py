"""Faults of which rows of the layer's matrices are taken for which input, and of which norm for which of q and k."""

from __future__ import annotations

import numpy as np

from ._any import of_whole
from ._fault import RUN, Fault
from .site import Site

#: Inputs that ports take one for another: of one size, and side by side in a matrix or a checkpoint.
PAIRS = {"qk", "kv", "vq", "vz", "ba"}
#: Of these a gated delta net's: in a joint matrix the rows of the second lie behind those of the first.
JOINT = {"qk", "vz", "ba"}

#: What a projection may read in place of its norm, where it is as wide.
PLACES = ("before its norm", "attn_norm", "ffn_norm", "moe.latent", "mla.o")


def query_and_gate_in_turn(site: Site):
    """Of each head's rows of q_proj the even ones for the query, the odd ones for the gate."""
    H, K = site.node.shape
    odd = int(site.node.tap.endswith("gate"))
    return of_whole(site, lambda whole: whole.reshape(H, K, 2, -1)[:, :, odd].reshape(H * K, -1))


def rows_of(site: Site, other: str):
    """The product with the weight of another input."""
    own = site.node.tap.split(".")[-1][0]
    if own + other not in PAIRS and other + own not in PAIRS:
        return None
    w = _of_other(site, own, other)
    return None if w is None or w.shape != site["w"].shape else site.run(w=w)


def _of_other(site, own, other):
    name = site.node.weights["w"].name
    if "linear_attn" not in name:
        name = name.replace(f"{own}_proj", f"{other}_proj")
        return np.asarray(site.weights[name]) if name in site.weights else None
    ahead, behind = own + other in JOINT, other + own in JOINT
    if not ahead and not behind:
        return None
    if "in_proj_qkvz" in name or "in_proj_ba" in name or "in_proj_qkv." in name and own in "qk":
        rows = _rows(site)
        breaks = np.flatnonzero(np.diff(rows) != 1)
        n = int(breaks[0]) + 1 if len(breaks) else len(rows)
        rows, whole = rows + (n if ahead else -n), np.asarray(site.weights[name])
        return whole[rows] if rows.max() < len(whole) else None
    apart = {"v": "in_proj_qkv.weight", "z": "in_proj_z.weight", "b": "in_proj_b.weight", "a": "in_proj_a.weight"}
    whole = np.asarray(site.weights[name.rsplit("in_proj", 1)[0] + apart[other]])
    return whole[-len(site["w"]):]


def _rows(site):
    """The rows of its matrix that an input has."""
    weight = site.node.weights["w"]
    index = np.arange(len(site.weights[weight.name]))
    return index if weight.view is None else weight.view(index)


def at_other_place(site: Site, place: str):
    """A projection of another tap of its layer than the norm that it is of."""
    tap = site.node.tap.split(".")
    here, there = site.node.inputs["x"], ".".join([*tap[:2], place])
    norm = site.table.get(here)
    if norm is None or norm.op != "rms_norm" or there == here:
        return None
    if place == "before its norm":
        there = norm.inputs["x"]
    if there not in site.values or np.prod(site.table[there].shape) != np.prod(norm.shape):
        return None
    return site.run(x=site.tap(there).reshape(site["x"].shape))


def norm_of_other(site: Site):
    """The norm of the keys for the queries, or the reverse."""
    w = site.node.weights["w"]
    a, b = ("q_norm", "k_norm") if "q_norm" in w.name else ("k_norm", "q_norm")
    weights = {"w": w._replace(name=w.name.replace(a, b))}
    return site.with_weights(**weights)


FAULTS = (
    Fault("query_and_gate_in_turn", "of each head the rows of q_proj are query and gate in turn; they lie one "
          "half behind the other", ("linear",), query_and_gate_in_turn, taps=("attn.q_proj", "attn.gate"), use=RUN,
          source="a view [K, 2] for [2, K]"),
    Fault("input_of_other", "one input of the mixer is made with the rows of another", ("linear",), rows_of,
          taps=("kda.[qkv]_proj", "gdn.[qkv]_proj", "gdn.[zab]", "attn.k_proj", "attn.v"),
          choices=tuple((x,) for x in "qkvzba"), each="it is made with the rows of {}", use=RUN,
          source="fused projections differ in their order: b before a, z before v"),
    Fault("input_of_other_place", "a projection reads another place of its layer", ("linear",), at_other_place,
          taps=("*.*",), use=RUN, choices=tuple((place,) for place in PLACES),
          each="it reads what is at another place: {}",
          source="Kimi K3: the router and the shared expert read what the latent is made from"),
    Fault("norm_weight_of_other", "q has the norm of k, or k that of q", ("rms_norm",), norm_of_other,
          taps=("attn.q_norm", "attn.k_norm"), use=RUN),
)
