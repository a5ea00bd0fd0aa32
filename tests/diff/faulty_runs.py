"""Runs with planted faults: models and calls in which each fault shows, and noise on every tap."""

from collections import ChainMap
from types import SimpleNamespace

import ml_dtypes
import numpy as np

import kimi_linear as kl
from kimi_linear import faults
from kimi_linear.dataflow import nodes
from kimi_linear.diff._blame_run import TIED_ROWS, Run
from kimi_linear.diff._ratios import ratios, score
from kimi_linear.faults import Scene, Site

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

#: Lengths of the sequences of each call, and the positions that they are put back to.
CALLS = {
    faults.SPLIT: ([[14], [9], [9]], None),
    faults.SEVERAL: ([[12, 9, 11]], None),
    faults.RESTORED: ([[18], [10], [6]], [None, [11], None]),
    faults.LONG: ([[40]], None),
    faults.CHUNKS: ([[56]], None),
    faults.CHUNKS_SPLIT: ([[41], [29], [1], [1]], None),
}
ONE_CALL = ([[32]], None)
#: Faults that only another scenario tells from a second name, where no state is behind a call: chunk_p_exclusive, or in
#: one chunk its blocks of 16, for which chunks of 16 may be taken.
TOLD_APART = dict.fromkeys(("chunk_q_exclusive", "chunk_inter_missing", "chunk_d_without_state",
                            "chunk_total_undecayed", "chunk_blocks_forgotten_in_l", "chunk_blocks_forgotten_in_p",
                            "chunk_blocks_forgotten_in_l_and_p", "chunk_blocks_decayed_by_own_in_l_and_p"),
                           faults.CHUNKS_SPLIT)
#: Faults that eps alone tells apart: of scores, by an L2 norm or over the root of the width.
TOLD_APART_BY_EPS = ("attn_res_l2", "attn_res_scaled", "layer_norm_eps_other", "layer_norm_eps_outside")
#: And those that float64 alone tells apart: 1e-6 for 1e-5, or nothing.
TOLD_APART_EXACTLY = ("mhc_eps_of_connections", "mhc_eps_lost")
#: Places of attention residuals at which a fault has no second name: with two snapshots and more, and not where a block
#: begins, or where one does.
AT = {"attn_res_without_newest": "layers.6.ffn_res", "attn_res_without_oldest": "layers.6.ffn_res",
      "attn_res_newest_alone": "layers.6.ffn_res", "attn_res_missing": "layers.3.ffn_res",
      "residual_missing": "layers.5.out", "stream_not_restarted": "layers.3.ffn_res",
      "blocks_begin_elsewhere": "output_res", "snapshot_of_mixture": "layers.6.ffn_res"}


class Bench:
    """A model in float64, and variants of its weights by scenario."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {name: np.asarray(model.weights[name], np.float64) for name in model.weights}
        rng = np.random.default_rng(1)
        for name, w in self.weights.items():  # the golden biases are too small to change a choice
            if name.endswith("e_score_correction_bias"):
                self.weights[name] = 0.3 * rng.standard_normal(w.shape)
        self.nodes = [n for n in nodes(self.config) if n.op != "cache_append"]

    def model(self, scenario):
        """What `run` and `blame` need of a model, such that faults of this scenario show."""
        weights, change = dict(self.weights), _CHANGES.get(scenario)
        if change is _mild and self.config.gate_lower_bound is not None:
            change = _mild_though_bounded
        if change:
            weights |= {name: change(name, w) for name, w in weights.items()}
        return SimpleNamespace(config=self.config, weights=weights)

    def lengths(self, scenario):
        """Of the calls, and positions; where pools are chosen, twice as long and one more, that there is something to
        choose, and a pool that is not complete."""
        lengths, positions = CALLS.get(scenario, ONE_CALL)
        if not self.config.index_heads:
            return lengths, positions
        longer = [[2 * n + 1 for n in call] for call in lengths]
        return longer, positions and [p and [2 * n for n in p] for p in positions]

    def tokens(self, scenario, rng):
        """(calls, positions)."""
        lengths, positions = self.lengths(scenario)
        return [[rng.integers(0, self.config.vocab_size, n).tolist() for n in call] for call in lengths], positions

    def scene(self, scenario):
        lengths, positions = self.lengths(scenario)
        return Scene([np.cumsum([0, *call]) for call in lengths], positions)

    def places(self, fault):
        """Taps that it can be at."""
        places = [n.tap for n in self.nodes if fault.concerns(n)]
        if self.config.streams:  # those of layer 0 are the same until a block has joined them
            places = [p for p in places if not p.startswith(("layers.0.attn", "layers.0.mid")) or "norm" in p]
        return [AT[fault.name]] if self.config.attn_res_block and AT.get(fault.name) in places else places

    def run(self, scenario, dtype, seed, plant=None):
        """noisy_forward of this scenario: (model, traces)."""
        rng, model = np.random.default_rng(seed), self.model(scenario)
        calls, positions = self.tokens(scenario, rng)
        return model, noisy_forward(model, calls, dtype, rng, plant=plant, positions=positions)


def noisy_forward(model, tokens, dtype, rng, *, plant=None, positions=None):
    """A float64 pass whose every tap gets noise of one unit of `dtype` and is stored in it, with planted faults."""
    kind = np.dtype(DTYPES[dtype])
    unit = float(ml_dtypes.finfo(kind).eps) / 2 if dtype != "float64" else 0.0

    def store(tap, y):
        if y.dtype.kind in "iu":
            return y
        return (y * (1 + unit * rng.uniform(-1, 1, y.shape))).astype(kind).astype(np.float64)

    def narrow(x):
        return x if x.dtype.kind in "iu" else x.astype(kind)

    with np.errstate(all="ignore"):
        found = faults.run(model, tokens, plant=plant, positions=positions, after=store)
        return [kl.Trace({tap: narrow(x) for tap, x in t.items()}, {**t.meta, "dtype": dtype}) for t in found]


def judged_at(tap):
    """Where a fault of a tap shows that no trace has: keys of pools have no row a token."""
    return tap.replace("pool_cache", "select")


def effect(model, traces, tap, fault, choice):
    """How far the fault moves its op on these inputs, over the noise that `blame` allows it."""
    run, planted = Run(model, traces, None, None), tap
    tap = judged_at(tap)
    group, _ = run.group(tap)
    with np.errstate(all="ignore"):
        y, y_f = run.run(group), run.run(group, faulty=(planted, fault, choice))
        if y.dtype.kind in "iu":
            return _effect_on_ids(run, tap, group, y, y_f)
        return score(*ratios(y_f, y, run.noise(tap, group, y)))


def _effect_on_ids(run, tap, group, y, y_f):
    """The largest gap over rounding; of equal scores, none, unless there are so many that they are a rule."""
    run.values[tap] = y_f
    row, (_, other, gaps) = run.judge_ids(tap, (tap,), group, y)
    return np.inf if row.ok and (gaps[other] == 0).sum() >= TIED_ROWS else row.noise


# ---- weights in which a scenario shows ---------------------------------------------------------------


def _faint(name, w):
    if name.endswith("indexer.wk.weight"):
        return w * 1e-3
    return w * 1e-5 if name.endswith(("q_conv1d.weight", "k_conv1d.weight", "attn.conv1d.weight")) else w


def _mild(name, w):
    return w - 3 if name.endswith("A_log") else w


def _mild_though_bounded(name, w):
    return w - 4 if name.endswith("dt_bias") else w


def _large(name, w):
    return w * 3e5 if name.endswith(("up_proj.weight", "w3.weight", "v_proj.weight")) else w


def _tied(name, w):
    """Experts 3 j, 3 j + 1 and 3 j + 2 get the same scores, and all pools."""
    if name.endswith("weights_proj.weight"):
        return 0 * w
    if not name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight", "e_score_correction_bias")):
        return w
    return w[np.arange(len(w)) // 3 * 3]


_CHANGES = {faults.FAINT: _faint, faults.CHUNKS: _mild, faults.CHUNKS_SPLIT: _mild, faults.LARGE: _large,
            faults.TIES: _tied}


def site_of(model, traces, tap):
    """The Site of a tap in a run."""
    run, local = Run(model, traces, None, None), {}
    *before, node = run.group(tap)[0]
    for other in before:
        site = Site.of(other, ChainMap(local, run.values), model.weights, run.scene, run.nodes)
        local[other.tap] = site.shaped(site.run())
    return Site.of(node, ChainMap(local, run.values), model.weights, run.scene, run.nodes)


# ---- cases -------------------------------------------------------------------------------------------


def case(bench, fault, dtype, seed):
    """A run with a fault at a random place that can have it, and what `blame` says; None where there is no place."""
    rng = np.random.default_rng([seed, *map(ord, fault.name)])
    dtype = "float64" if fault.scenario == faults.TIES else dtype  # noise parts what is equal
    chosen = {"index_pool", "index_select"} & set(fault.ops)  # bfloat16 itself chooses other pools in many rows
    dtype = "float32" if (chosen or fault.name in TOLD_APART_BY_EPS) and dtype == "bfloat16" else dtype
    dtype = "float64" if fault.name in TOLD_APART_EXACTLY else dtype
    in_chunks = fault.scenario in (faults.CHUNKS, faults.CHUNKS_SPLIT) and len(fault.choices) > 1
    choices = fault.choices
    if in_chunks:  # more than three chunks: of fewer, several faults are the same; or one of more than a block has
        choices = [(16,) if (16,) in choices else ()]
    places = [(tap, choice) for tap in bench.places(fault) for choice in choices]
    scenario = TOLD_APART.get(fault.name, fault.scenario)
    for i in rng.permutation(len(places)):
        tap, choice = places[i]
        try:
            model, traces = bench.run(scenario, dtype, seed, {tap: (fault, choice)})
        except ValueError as error:
            if "cannot be at" not in str(error):
                raise
            continue
        return SimpleNamespace(tap=tap, fault=fault, choice=choice, dtype=dtype,
                               effect=effect(model, traces, tap, fault, choice), blame=kl.diff.blame(model, traces))
    return None


def verdict(case, visible):
    """"named", "faint", or what went wrong."""
    wrong = case.blame.wrong
    if case.effect < visible:
        others = [r for r in wrong if r.kind != case.fault.name or r.tap != judged_at(case.tap)]
        return f"another name below the noise: {others}" if others else "faint"
    alone = len(wrong) == 1 and (wrong[0].tap, wrong[0].kind, wrong[0].also) == (judged_at(case.tap), case.fault.name,
                                                                                 ())
    return "named" if alone else f"{case.effect:.3g} times the noise, but {case.blame}"


def check(case, visible):
    """AssertionError unless it is named, first and alone, where it is visible, and nothing else is where not."""
    said = verdict(case, visible)
    assert said in ("named", "faint"), f"{case.fault.name}{case.choice} at {case.tap}, {case.dtype}: {said}"


# ---- faults never told of ------------------------------------------------------------------------------


def _zeroed(y):
    y = y.copy()
    y[..., y.shape[-1] // 3] = 0
    return y


def _sign_of_one_head(y):
    y = y.copy()
    y[:, 1] *= -1
    return y


def _rolled(y):
    return np.roll(y, 1, axis=-1)


def _shifted_weight(site):
    return site.run(w=site["w"] + 0.1)


def _of_result(change):
    return lambda site: change(site.shaped(site.run()))


#: name -> (tap below a layer, function of the Site): none of them is in the catalogue.
UNTOLD = {
    "channel zeroed after the convolution": ("kda.v_conv", _of_result(_zeroed)),
    "channel zeroed in a projection": ("kda.k_proj", _of_result(_zeroed)),
    "one logit of the router zeroed": ("moe.logits", _of_result(_zeroed)),
    "sign of one head of the delta rule": ("kda.o", _of_result(_sign_of_one_head)),
    "sign of one head of attention": ("mla.o", _of_result(_sign_of_one_head)),
    "weight of a norm shifted": ("ffn_norm", _shifted_weight),
    "weight of the gated norm shifted": ("kda.o_norm", _shifted_weight),
    "channels rolled": ("kda.z", _of_result(_rolled)),
    "gate five per cent too strong": ("kda.g", _of_result(lambda y: 1.05 * y)),
    "q normalised to two": ("kda.q", _of_result(lambda y: 2 * y)),
    "third token repeated": ("mid", _of_result(lambda y: y[[0, 1, 2, 2, *range(4, len(y))]])),
    "experts summed with a wrong factor": ("moe.out", lambda s: s.run(weights=0.9 * s["weights"])),
    "cubic SiLU": ("moe.shared_act", lambda s: s["gate"] ** 3 * s["up"]),
    "weights of experts squared": ("moe.weights", lambda s: s.run() ** 2),
    "experts mirrored": ("moe.ids", lambda s: np.sort(len(s.args["scores"][0]) - 1 - s.run(), -1).astype(np.int32)),
    "softmax half as warm": ("mla.o", lambda s: s.run(scale=0.5 * s["scale"])),
}


def untold_case(bench, name, dtype, seed):
    """A run with one of `UNTOLD` at a random layer that has the tap."""
    rng = np.random.default_rng([seed, *map(ord, name)])
    ending, function = UNTOLD[name]
    tap = str(rng.choice([n.tap for n in bench.nodes if n.tap.split(".", 2)[-1] == ending]))
    model, traces = bench.run(faults.WHOLE, dtype, seed, {tap: function})
    return SimpleNamespace(tap=tap, blame=kl.diff.blame(model, traces))
