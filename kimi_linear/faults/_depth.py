"""Faults of attention residuals that a run alone shows: which sums are snapshots, where a stream begins, what scores.

A layer has two halves, its mixer and its feed-forward; half 2 i is the mixer of layer i. Each half reads a mixture, and
what it makes is added to the running sum, or is the first of a new one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set

import numpy as np

from .. import reference
from ._fault import RUN, Fault
from .site import Site

MIXER_HALF = ("attn_res", "attn_norm", "mid")
FFN_HALF = ("ffn_res", "ffn_norm", "out")


class Stream:
    """The running sum of a run with attention residuals, half by half, as its taps and other places of blocks make it.

    Parameters
    ----------
    site : Site
        Of an attn_res, of the norm behind it, or of a residual's add.
    """

    def __init__(self, site: Site):
        self.site = site
        halves = [tap for tap in site.table if re.fullmatch(r"layers\.\d+\.(attn|ffn)_res", tap)]
        self.halves = len(halves)
        self.begins = {h for h in range(0, self.halves, 2) if f"layers.{h // 2}.mid" not in site.table}
        layer, name = (site.node.tap.split(".", 2)[1:] + ["", ""])[:2]
        self.half = 2 * int(layer) + (name in FFN_HALF) if name in MIXER_HALF + FFN_HALF else self.halves

    @property
    def of_model(self) -> bool:
        """Whether the model has attention residuals."""
        return self.halves > 0

    def mixture(self, half: int) -> str:
        """The tap of the mixture that a half reads."""
        names = f"layers.{half // 2}.attn_res", f"layers.{half // 2}.ffn_res"
        return names[half % 2] if half < self.halves else "output_res"

    def made(self, half: int) -> np.ndarray:
        """What a half adds."""
        table, layer = self.site.table, f"layers.{half // 2}"
        if half % 2 == 0 and half in self.begins:
            return self.site.tap(table[f"{layer}.ffn_res"].inputs["x"])
        return self.site.tap(table[f"{layer}.{'out' if half % 2 else 'mid'}"].inputs["b"])

    def before(self, half: int, adds: Callable) -> np.ndarray:
        """The sum that a half finds: the run's own, or what is there if halves leave ``adds(stream, half)``."""
        if half == 0:
            return self.site.tap("embed")
        tap = f"layers.{half // 2 - 1}.out"
        return self.site.tap(tap) if half % 2 == 0 and self.site.has(tap) else adds(self, half - 1)


def beginning_at(begins: Set[int]) -> Callable:
    """What halves leave where new sums begin at some of them."""
    def adds(stream, half):
        return stream.made(half) if half in begins else stream.before(half, adds) + stream.made(half)

    return adds


# ---- which sums are snapshots ------------------------------------------------------------------------


def _early(L, n):
    return {l for l in range(L) if (l + 1) % n == 0}


def _late(L, n):
    return {l for l in range(L) if l % n == 1 % n}


def _mixers(layers):
    return {2 * l for l in layers}


#: Where blocks begin wrongly: halves, from the number of layers, the length of a block and where they begin rightly.
ELSEWHERE = {
    "a layer early": lambda L, n, begins: _mixers(_early(L, n)),
    "a layer late": lambda L, n, begins: _mixers(_late(L, n)),
    "a layer early, and at the first": lambda L, n, begins: _mixers(_early(L, n) | {0}),
    "a layer late, and at the first": lambda L, n, begins: _mixers(_late(L, n) | {0}),
    "at their feed-forward, too": lambda L, n, begins: begins | {h + 1 for h in begins},
    "at their feed-forward": lambda L, n, begins: {h + 1 for h in begins},
    "after so many halves of layers": lambda L, n, begins: {h for h in range(2 * L) if h % n == 0},
    "at every layer": lambda L, n, begins: _mixers(range(L)),
    "at the first layer alone": lambda L, n, begins: {0},
    "nowhere": lambda L, n, begins: set(),
}


def begun_elsewhere(site: Site, where: str):
    """The mixture, or the sum, if blocks begin elsewhere."""
    stream = Stream(site)
    if not stream.of_model:
        return None
    L, mixers = stream.halves // 2, sorted(stream.begins)
    n = (mixers[1] - mixers[0]) // 2 if len(mixers) > 1 else L
    begins = ELSEWHERE[where](L, n, stream.begins)
    if begins == stream.begins:
        return None
    return _remade(site, stream, begins, beginning_at(begins))


def _remade(site, stream, begins, adds):
    """An op of the stream where snapshots are kept at the halves `begins`, and each half leaves what `adds` says."""
    if site.op == "add":
        return adds(stream, stream.half)
    snapshots = [stream.before(h, adds) for h in sorted(begins) if h < stream.half]
    return _mixed(site, snapshots, stream.before(stream.half, adds))


def _mixed(site, snapshots, x):
    stacked = np.stack(snapshots) if snapshots else np.empty((0, *x.shape))
    return reference.attn_res(stacked, x, site["w"], eps=site["eps"])


def of_mixtures(site: Site):
    """Snapshots are the mixtures that the first halves of the blocks read, not the sums beside them."""
    return _mixed(site, _mixtures(site), site["x"]) if len(site["snapshots"]) else None


def _mixtures(site):
    stream, found = Stream(site), []
    for half in sorted(stream.begins):
        if half < stream.half:
            tap = stream.mixture(half)
            found.append(site.tap(tap) if tap in site.values else _as_wrong(site.of_node(site.table[tap])))
    return found


def _as_wrong(site):
    """A mixture that the trace lacks, with the same fault."""
    y = of_mixtures(site)
    return site.run() if y is None else y


# ---- the running sum ---------------------------------------------------------------------------------


def not_restarted(site: Site, what: str):
    """Where a block begins the mixer's output is added to what was there: the sum before it, or their mixture."""
    stream = Stream(site)
    if not stream.of_model:
        return None

    def adds(stream, half):
        of_mixture = half in stream.begins and what == "the mixture"
        old = site.tap(stream.mixture(half)) if of_mixture else stream.before(half, adds)
        return old + stream.made(half)

    return _remade(site, stream, stream.begins, adds)


def on_mixture(site: Site):
    """The residual adds to the mixture that the half read."""
    stream = Stream(site)
    if not stream.of_model:
        return None

    def adds(stream, half):
        return stream.made(half) + (0 if half in stream.begins else site.tap(stream.mixture(half)))

    return _remade(site, stream, stream.begins, adds)


def norm_of_sum(site: Site):
    """The norm of the running sum, beside a mixture that nobody reads."""
    stream = Stream(site)
    if not stream.of_model:
        return None
    mixture = site.table[stream.mixture(stream.half)]
    alone = len(mixture.inputs) == 1 or not site.has(mixture.tap)  # a mixture nobody has seen is attn_res_missing
    return None if alone else site.run(x=site.tap(mixture.inputs["x"]))


# ---- the weight of the scores ------------------------------------------------------------------------


def weight_of_other(site: Site, which: str):
    """Scores by the weight of another mixture of the layer, or by that of the output."""
    w, stream = site.node.weights["w"], Stream(site)
    layer = min(stream.half, stream.halves - 1) // 2
    of = f"model.{which}" if which == "output_attn_res" else f"model.layers.{layer}.{which}"
    if w.name == f"{of}_norm.weight" or len(site["snapshots"]) == 0:
        return None
    return site.with_weights(w=w._replace(name=f"{of}_norm.weight", other=f"{of}_proj.weight"))


def weight_in_part(site: Site, part: str):
    """Scores by the projection without the norm's weight, or by this alone."""
    w = site.node.weights["w"]
    alone = site.weights[w.other if part == "proj" else w.name]
    return site.run(w=reference.f64(alone).reshape(-1)) if len(site["snapshots"]) else None


PAPER, ORDINARY = "arXiv:2603.15031", "ordinary residuals: x + f(norm(x))"
MIXTURE, SUM = ("attn_res",), ("mid", "out")
BOTH_HALVES = ("attn_res", "ffn_res", "output_res", *SUM)

FAULTS = (
    Fault("snapshot_of_mixture", "snapshots are the mixtures that blocks begin with, not the sums before them", MIXTURE,
          of_mixtures, use=RUN, wired=True, source="one name for what enters a layer and for what its norm reads"),
    Fault("stream_not_restarted", "where a block begins the mixer's output is added to something; it is the first of a "
          "new sum", (*MIXTURE, "add"), not_restarted, taps=BOTH_HALVES, use=RUN, wired=True,
          choices=(("the sum before it",), ("the mixture",)),
          each="where a block begins the mixer's output is added to {}; it is the first of a new sum",
          source=ORDINARY),
    Fault("blocks_begin_elsewhere", "blocks of layers, each with a snapshot and a new sum, begin elsewhere",
          (*MIXTURE, "add"), begun_elsewhere, taps=BOTH_HALVES, use=RUN, wired=True,
          choices=tuple((where,) for where in ELSEWHERE), each="blocks, each with a snapshot and a new sum, begin {}",
          source=f"{PAPER}: its blocks count sublayers; attn_res_block_size counts layers, from layer 0"),
    Fault("residual_of_mixture", "what a half of a layer makes is added to the mixture that it read, not to the "
          "running sum", (*MIXTURE, "add"), on_mixture, taps=BOTH_HALVES, use=RUN, wired=True, source=ORDINARY),
    Fault("norm_of_running_sum", "the norm is of the running sum; it must be of the mixture", ("rms_norm",),
          norm_of_sum, taps=("attn_norm", "ffn_norm", "norm"), use=RUN, source=ORDINARY),
    Fault("attn_res_weight_of_other", "the scores have the weight of another mixture", MIXTURE, weight_of_other,
          use=RUN, choices=(("self_attention_res",), ("mlp_res",), ("output_attn_res",)),
          each="the scores have the weight of {}"),
    Fault("attn_res_weight_in_part", "the scores' weight is norm times proj; one of them is left out", MIXTURE,
          weight_in_part, use=RUN, choices=(("norm",), ("proj",)),
          each="the scores' weight is that of {} alone; it is norm times proj"),
)
