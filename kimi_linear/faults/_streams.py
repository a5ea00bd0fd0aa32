"""Faults of how hyper-connections are wired, which a run alone shows: how streams begin and end, what joins them."""

from __future__ import annotations

import numpy as np

from ..weight_shapes import FFN_STREAMS, MIXER_STREAMS
from ._fault import RUN, Fault
from ._mhc import PRE
from .site import Site

#: What is made of the streams [T, n, D] in place of their mean, or of what a block reads.
COLLAPSED = {
    "their sum": lambda x: x.sum(-2),
    "their mean": lambda x: x.mean(-2),
    "the first of them": lambda x: x[..., 0, :],
    "the last of them": lambda x: x[..., -1, :],
}


def collapsed(site: Site, how: str):
    """The streams joined behind the last layer."""
    return None if how == "their mean" else COLLAPSED[how](site["x"])


def first_alone(site: Site):
    y = site.run()
    y[..., 1:, :] = 0
    return y


def parted(site: Site):
    """Each stream has a part of the embedding, and their sum is all of it."""
    return site.run() / site["n"]


def weights_of_other_half(site: Site):
    """The connections of the mixer around the feed-forward, or the reverse."""
    swapped = {}
    for argument, w in site.node.weights.items():
        a, b = (MIXER_STREAMS, FFN_STREAMS) if MIXER_STREAMS in w.name else (FFN_STREAMS, MIXER_STREAMS)
        swapped[argument] = w._replace(name=w.name.replace(a, b))
    return site.with_weights(**swapped)


def joined_as_other_half(site: Site):
    """post and comb are those that the other half of the layer made."""
    layer, half = site.node.tap.rsplit(".", 1)
    other = "attn_hc" if half == "out" else "ffn_hc"
    if half == "mid":
        return None  # the feed-forward's are not made yet
    return site.run(**{part: site.tap(f"{layer}.{other}_{part}") for part in ("post", "comb")})


def on_what_was_read(site: Site):
    """An ordinary residual for all streams: what the block read, and what it made of it."""
    layer, half = site.node.tap.rsplit(".", 1)
    read = site.tap(f"{layer}.{'attn_hc' if half == 'mid' else 'ffn_hc'}")
    return np.repeat((read + site["y"])[..., None, :], site["x"].shape[-2], axis=-2)


def norm_of_streams(site: Site, how: str):
    """The norm in front of a block reads the streams otherwise than by mhc_pre, which is there, too."""
    before = site.table.get(site.node.inputs["x"])
    if before is None or before.op != "mhc_pre" or not site.has(before.tap):
        return None
    return site.run(x=COLLAPSED[how](site.tap(before.inputs["x"])))


POST, ORDINARY = ("mhc_post",), "ordinary residuals: x + f(norm(x))"

FAULTS = (
    Fault("streams_collapsed_otherwise", "behind the last layer the streams are joined otherwise than by their mean",
          ("mhc_collapse",), collapsed, use=RUN, each="behind the last layer {} is taken; it is the streams' mean",
          choices=(("their sum",), ("the first of them",), ("the last of them",)), source="arXiv:2409.19606 sums them"),
    Fault("streams_first_alone", "the embedding is the first stream alone, and the others begin as zeros; all begin "
          "with it", ("mhc_expand",), first_alone, use=RUN),
    Fault("streams_parted", "each stream begins with 1 / n of the embedding; it begins with all of it", ("mhc_expand",),
          parted, use=RUN),
    Fault("mhc_weights_of_other_half", "the connections are those of the other half of the layer", PRE,
          weights_of_other_half, use=RUN),
    Fault("mhc_post_of_other_half", "post and comb are those of the mixer, kept for the feed-forward", POST,
          joined_as_other_half, taps=("out",), use=RUN),
    Fault("mhc_post_on_what_was_read", "an ordinary residual: what the block read and what it made, for all streams",
          POST, on_what_was_read, use=RUN, source=ORDINARY),
    Fault("norm_of_streams", "the norm in front of a block is of the streams, not of what mhc_pre makes of them",
          ("rms_norm",), norm_of_streams, taps=("attn_norm", "ffn_norm"), use=RUN, source=ORDINARY,
          each="the norm in front of a block is of the streams, {}, not of what mhc_pre makes of them",
          choices=(("their mean",), ("the first of them",))),  # a norm does not tell a mean from a sum
)
