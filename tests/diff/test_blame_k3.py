"""What ports of Kimi K3 get wrong, each written out by itself, is named: its stream, its weights, its gates."""

import dataclasses
from dataclasses import dataclass, field

import faulty_runs
import numpy as np
import pytest
from conftest import DATA, K3_CASES, canonical_weights, mxfp4, read_safetensors

import kimi_linear as kl
from kimi_linear import reference
from kimi_linear.diff._weights import compare_weights

FOLDER = DATA / "golden" / "k3-a"
LAYERS, BLOCK = 7, 3
MIXER, FFN, LAST = "self_attention_res", "mlp_res", "output_attn_res"


@pytest.fixture(scope="module")
def models():
    found = {}
    for case in K3_CASES:
        folder = DATA / "golden" / case
        found[case] = kl.ReferenceModel(kl.Config.from_file(folder / "config.json"),
                                        canonical_weights(folder / "model.safetensors"))
    return found


@pytest.fixture(scope="module")
def model(models):
    return models["k3-a"]


# ---- the stream, with places to go wrong -------------------------------------------------------------


@dataclass
class Wiring:
    """How a port wires a layer; half 2 i is the mixer of layer i. What is here is right."""

    begins: object = lambda half: fresh(half)
    kept: object = lambda p, x: p                   # as a snapshot
    restarted: object = lambda p, x, y: y           # the sum where a block begins
    added: object = lambda p, x, y: p + y           # and where none does
    read: object = lambda half, p, x: x             # by the norm
    seen: object = lambda half, snapshots, p: snapshots
    weight: object = lambda half, norm, proj: norm * proj
    names: dict = field(default_factory=dict)       # of scores, one for another


class Port(kl.ReferenceModel):
    """The reference with its stream written once more."""

    def __init__(self, model, wiring):
        super().__init__(model.config, model.weights)
        self.wiring = wiring

    def layer(self, i, h, state=None, tap=None, expert_ids=None, snapshots=None):
        def w(name):
            return self.weights[f"model.layers.{i}.{name}"]

        def named(name, x):
            return tap(f"layers.{i}.{name}", x)

        def mixer(x):
            x = named("attn_norm", self._norm(x, w("input_layernorm.weight")))
            return (self._kda if self.config.layers[i].mixer == "kda" else self._mla)(i, x, w, state, named)

        def ffn(x):
            x = named("ffn_norm", self._norm(x, w("post_attention_layernorm.weight")))
            dense = self.config.layers[i].ffn == "dense"
            return self._dense(x, w, named) if dense else self._moe(x, w, named, expert_ids)

        h = named("mid", self.half(2 * i, h, f"layers.{i}.{MIXER}", mixer, lambda x: named("attn_res", x), snapshots))
        return named("out", self.half(2 * i + 1, h, f"layers.{i}.{FFN}", ffn, lambda x: named("ffn_res", x), snapshots))

    def half(self, n, p, score, block, tap, snapshots):
        x = tap(self.mixed(n, p, score, snapshots))
        begins = self.wiring.begins(n)
        y = block(self.wiring.read(n, p, x))
        if begins:
            snapshots.append(self.wiring.kept(p, x))
        return self.wiring.restarted(p, x, y) if begins else self.wiring.added(p, x, y)

    def mixed(self, n, p, score, snapshots):
        score = self.wiring.names.get(score.split(".")[-1], score) if score else score
        score = score if "." in score or score == LAST else f"layers.{n // 2}.{score}"
        norm, proj = (np.float64(self.weights[f"model.{score}_{part}.weight"]).reshape(-1) for part in ("norm", "proj"))
        v = np.stack([*self.wiring.seen(n, snapshots, p), p])
        a = (self.wiring.weight(n, norm, proj) * v).sum(-1) / np.sqrt((v * v).mean(-1) + self.config.rms_norm_eps)
        return (reference.softmax(a.T).T[..., None] * v).sum(0)

    def last_norm(self, h, tap=None, snapshots=()):
        x = tap("output_res", self.mixed(2 * LAYERS, h, LAST, snapshots))
        return tap("norm", self._norm(self.wiring.read(2 * LAYERS, h, x), self.weights["model.norm.weight"]))


def traced(model, dtype="float32", without=(), **wrong):
    """A trace of a port; what it hands on has the noise of the type."""
    rng, unit = np.random.default_rng(5), {"float64": 0.0, "float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    ids = rng.integers(0, model.config.vocab_size, 14)

    def noisy(x):
        if x.dtype.kind in "iu":
            return x
        y = x * (1 + unit * rng.uniform(-1, 1, x.shape))
        return y if dtype == "float64" else y.astype(faulty_runs.DTYPES[dtype]).astype(np.float64)

    run = Port(model, Wiring(**wrong)).forward(ids, taps="*", edit={"*": noisy})
    return kl.Trace({tap: x for tap, x in run.taps.items() if not tap.endswith(tuple(without))},
                    {"tokens": ids.tolist(), "dtype": dtype})


def halves(*layers):
    return {2 * i for i in layers}


def fresh(half):
    return half % (2 * BLOCK) == 0


#: what goes wrong -> (how, its name, the choice)
WIRINGS = {
    "the snapshot is the mixture": (dict(kept=lambda p, x: x), "snapshot_of_mixture", ()),
    "the stream never restarts": (dict(restarted=lambda p, x, y: p + y), "stream_not_restarted",
                                  ("the sum before it",)),
    "it restarts from the mixture": (dict(restarted=lambda p, x, y: x + y), "stream_not_restarted", ("the mixture",)),
    "blocks a layer early": (dict(begins=lambda half: half in halves(2, 5)), "blocks_begin_elsewhere",
                             ("a layer early",)),
    "blocks a layer late": (dict(begins=lambda half: half in halves(1, 4)), "blocks_begin_elsewhere",
                            ("a layer late",)),
    "a layer early but for the first": (dict(begins=lambda half: half in halves(0, 2, 5)), "blocks_begin_elsewhere",
                                        ("a layer early, and at the first",)),
    "a layer late but for the first": (dict(begins=lambda half: half in halves(0, 1, 4)), "blocks_begin_elsewhere",
                                       ("a layer late, and at the first",)),
    "blocks count halves": (dict(begins=lambda half: half % BLOCK == 0), "blocks_begin_elsewhere",
                            ("after so many halves of layers",)),
    "a snapshot at the feed-forward": (dict(begins=lambda half: fresh(half) or fresh(half - 1)),
                                       "blocks_begin_elsewhere", ("at their feed-forward, too",)),
    "at the feed-forward alone": (dict(begins=lambda half: fresh(half - 1)), "blocks_begin_elsewhere",
                                  ("at their feed-forward",)),
    "one block": (dict(begins=lambda half: half == 0), "blocks_begin_elsewhere", ("at the first layer alone",)),
    "a block is a layer": (dict(begins=lambda half: half % 2 == 0), "blocks_begin_elsewhere", ("at every layer",)),
    "seen too late": (dict(seen=lambda half, B, p: B[:-1] if half % 2 and fresh(half - 1) else B),
                      "attn_res_without_newest", ()),
    "seen too early": (dict(seen=lambda half, B, p: [*B, p] if fresh(half) else B), "attn_res_x_twice", ()),
    "newest alone": (dict(seen=lambda half, B, p: B[-1:]), "attn_res_newest_alone", ()),
    "without the embedding": (dict(seen=lambda half, B, p: B[1:]), "attn_res_without_oldest", ()),
    "mixers read the sum": (dict(read=lambda half, p, x: x if half % 2 or half == 2 * LAYERS else p),
                            "norm_of_running_sum", ()),
    "feed-forwards read the sum": (dict(read=lambda half, p, x: p if half % 2 else x), "norm_of_running_sum", ()),
    "all read the sum": (dict(read=lambda half, p, x: p), "norm_of_running_sum", ()),
    "the head reads the sum": (dict(read=lambda half, p, x: p if half == 2 * LAYERS else x), "norm_of_running_sum", ()),
    "added to the mixture": (dict(added=lambda p, x, y: x + y), "residual_of_mixture", ()),
    "weights of both halves exchanged": (dict(names={MIXER: FFN, FFN: MIXER}), "attn_res_weight_of_other", None),
    "the output's scores by the last layer's": (dict(names={LAST: f"layers.{LAYERS - 1}.{FFN}"}),
                                                "attn_res_weight_of_other", (FFN,)),
    "norm left out of the scores": (dict(weight=lambda half, norm, proj: proj), "attn_res_weight_in_part", ("proj",)),
    "proj left out of the scores": (dict(weight=lambda half, norm, proj: norm), "attn_res_weight_in_part", ("norm",)),
}


def test_the_port_is_right_but_for_its_mistakes(model):
    for dtype in faulty_runs.DTYPES:
        assert kl.diff.blame(model, traced(model, dtype)).ok
    ids = traced(model, "float64").tokens
    np.testing.assert_allclose(traced(model, "float64")["logits"], model.forward(ids).logits, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mistake", WIRINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_wiring_is_named(model, mistake, dtype):
    wrong, name, choice = WIRINGS[mistake]
    found = kl.diff.blame(model, traced(model, dtype, **wrong))
    assert {r.kind for r in found.wrong} == {name}, str(found)
    assert choice is None or {r.choice for r in found.wrong} == {choice}, str(found)


@pytest.mark.parametrize("mistake", WIRINGS)
@pytest.mark.parametrize("without", [("_res",), ("mid",)])
def test_a_wiring_is_named_where_mixtures_or_sums_are_not_handed_out(model, mistake, without):
    wrong, name, choice = WIRINGS[mistake]
    found = kl.diff.blame(model, traced(model, without=without, **wrong))
    name = "attn_res_missing" if name == "norm_of_running_sum" and "_res" in without else name
    assert {r.kind for r in found.wrong} == {name}, str(found)
    assert choice is None or {r.choice for r in found.wrong} == {choice}, str(found)


def test_a_port_without_a_mixture_reads_the_running_sum(model):
    """As a port has it that knows no attention residuals: no snapshots, one sum from the first layer to the last."""
    for without in ((), ("_res",), ("_res", "mid")):
        found = kl.diff.blame(model, traced(model, without=without, begins=lambda half: False))
        assert {(r.kind, r.choice) for r in found.wrong} == {("blocks_begin_elsewhere", ("nowhere",))}, str(found)


# ---- ops ---------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(site, name):
    return np.asarray(site.weights[f"model.layers.{site.node.tap.split('.')[1]}.{name}"], np.float64)


def normed(x, w, eps):
    return w * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def softplus_gate(site):
    x = site["f"] + site["dt_bias"].reshape(site["f"].shape[1:])
    return -site["rate"][:, None] * np.log1p(np.exp(x))


MOE = "block_sparse_moe"
#: (tap, its name, the choice, what a port does)
OPS = [
    ("layers.0.mlp.act", "situ_of_swiglu", (), lambda s: s["gate"] * sigmoid(s["gate"]) * s["up"]),
    ("layers.3.moe.shared_act", "situ_of_swiglu", (), lambda s: s["gate"] * sigmoid(s["gate"]) * s["up"]),
    ("layers.4.moe.routed", "experts_swiglu", (), lambda s: s.run(situ=None)),
    ("layers.4.moe.routed", "experts_up_unbounded", (), lambda s: s.run(situ=(4.0, None))),
    ("layers.1.moe.shared_act", "situ_up_unbounded", (),
     lambda s: 4 * np.tanh(s["gate"] / 4) * sigmoid(s["gate"]) * s["up"]),
    ("layers.1.moe.shared_act", "situ_sigmoid_missing", (),
     lambda s: 4 * np.tanh(s["gate"] / 4) * 25 * np.tanh(s["up"] / 25)),
    ("layers.0.mlp.act", "situ_up_by_beta", (),
     lambda s: 4 * np.tanh(s["gate"] / 4) * sigmoid(s["gate"]) * 4 * np.tanh(s["up"] / 4)),
    ("layers.2.mla.gated", "gate_raw", (), lambda s: s["x"] * s["gate"]),
    ("layers.2.mla.gated", "gate_silu", (), lambda s: s["x"] * s["gate"] * sigmoid(s["gate"])),
    ("layers.6.mla.gated", "gate_left_out", (), lambda s: s["x"]),
    ("layers.1.kda.o_norm", "gate_without_activation", (), lambda s: normed(s["x"], s["w"], 1e-5) * s["z"]),
    ("layers.1.kda.o_norm", "gated_norm_silu", (),
     lambda s: normed(s["x"], s["w"], 1e-5) * s["z"] * sigmoid(s["z"])),
    ("layers.1.kda.g", "gate_unbounded", (), softplus_gate),
    ("layers.3.kda.g", "gate_cut_off", (), lambda s: np.maximum(softplus_gate(s), -5)),
    ("layers.3.kda.g", "gate_bound_twice", (-1,), lambda s: 5 * s.run()),
    ("layers.3.kda.g", "gate_bound_twice", (1,), lambda s: -5 * s.run()),
    ("layers.3.kda.g", "a_log_raw", (), lambda s: -5 * sigmoid(
        np.log(s["rate"])[:, None] * (s["f"] + s["dt_bias"].reshape(s["f"].shape[1:])))),
    ("layers.2.moe.logits", "input_of_other_place", ("attn_norm",),
     lambda s: s.sibling("attn_norm") @ dense(s, f"{MOE}.gate.weight").T),
    ("layers.2.moe.logits", "input_of_other_place", ("before its norm",),
     lambda s: s.sibling("ffn_res") @ dense(s, f"{MOE}.gate.weight").T),
    ("layers.2.moe.latent", "input_of_other_place", ("before its norm",),
     lambda s: s.sibling("ffn_res") @ dense(s, f"{MOE}.routed_expert_down_proj.weight").T),
    ("layers.5.moe.out", "shared_not_added", (), lambda s: s.sibling("moe.routed_up")),
    ("layers.5.moe.out", "shared_added_twice", (), lambda s: s.sibling("moe.routed_up") + 2 * s.sibling("moe.shared")),
    ("layers.5.moe.out", "routed_not_added", (), lambda s: s.sibling("moe.shared")),
    ("layers.2.moe.routed_norm", "norm_missing", (), lambda s: s["x"]),
    ("layers.2.moe.routed_norm", "norm_eps_other", (1e-6,), lambda s: normed(s["x"], s["w"], 1e-6)),
    ("layers.6.mla.q_a_norm", "norm_eps_other", (1e-5,), lambda s: normed(s["x"], s["w"], 1e-5)),
]


def port(model, tap, wrong, dtype="float32"):
    rng = np.random.default_rng(12)
    calls = [[rng.integers(0, model.config.vocab_size, 16).tolist()]]
    return kl.diff.blame(model, faulty_runs.noisy_forward(model, calls, dtype, rng, plant={tap: wrong}))


@pytest.mark.parametrize("tap, name, choice, wrong", OPS, ids=[f"{name}-{i}" for i, (_, name, *_) in enumerate(OPS)])
def test_an_op_is_named(model, tap, name, choice, wrong):
    found = port(model, tap, wrong)
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, name, choice, ())], str(found)


@pytest.mark.parametrize("tap, name, choice, wrong", [
    ("layers.2.moe.weights", "router_scale_twice", (), lambda s: 1.7 * s.run()),
    ("layers.3.moe.out", "scaled_in_sum", ("b",), lambda s: s["a"] + 1.7 * s["b"]),
    ("layers.3.moe.out", "scaled_in_sum", ("a",), lambda s: 1.7 * s["a"] + s["b"])])
def test_a_factor_of_routing_is_named(models, tap, name, choice, wrong):
    """Of k3-b: k3-a has the factor 1, as the published model."""
    found = port(models["k3-b"], tap, wrong)
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, name, choice, ())], str(found)


@pytest.mark.parametrize("tap, place, weight", [
    ("layers.3.moe.logits", "moe.latent", f"{MOE}.gate.weight"),
    ("layers.3.moe.shared_up", "moe.latent", f"{MOE}.shared_experts.up_proj.weight"),
    ("layers.2.mla.gate", "mla.o", "self_attn.g_proj.weight")])
def test_a_place_as_wide_is_named(model, tap, place, weight):
    """Where the latent, or attention's output, is as wide as the model, nothing else stops such a port."""
    config = dataclasses.replace(model.config, expert_latent=48, v_head_dim=16)
    rng = np.random.default_rng(3)
    weights = {name: rng.normal(size=shape, scale=shape[-1] ** -0.5) for name, shape in config.weight_shapes().items()}

    def wrong(site):
        latent = site["x"] @ dense(site, f"{MOE}.routed_expert_down_proj.weight").T if place == "moe.latent" else None
        return (site.sibling(place).reshape(-1, 48) if latent is None else latent) @ dense(site, weight).T

    found = port(kl.ReferenceModel(config, weights), tap, wrong)
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == \
        [(tap, "input_of_other_place", (place,), ())], str(found)


# ---- weights -----------------------------------------------------------------------------------------


def raw(folder):
    tensors = read_safetensors(folder / "model.safetensors")
    return {name.removeprefix("language_model."): x for name, x in tensors.items()}


def swapped_nibbles(packed, scale):
    return mxfp4(packed << 4 | packed >> 4, scale)


def other_bias(packed, scale):
    return mxfp4(packed, scale - 1)


def next_scale(packed, scale):
    return mxfp4(packed, np.roll(scale, 1, axis=0))


EXPERT = "model.layers.4.block_sparse_moe.experts.{}.{}.weight"


@pytest.mark.parametrize("unpacked", [swapped_nibbles, other_bias, next_scale])
def test_blocks_unpacked_wrongly_are_named_by_their_tensor(model, unpacked):
    """The experts of a layer; without weights= the sentence asks for them."""
    file, theirs = raw(FOLDER), dict(model.weights)
    for name in [EXPERT.format(e, part) for e in range(10) for part in ("w1", "w2", "w3")]:
        theirs[name] = unpacked(file[f"{name}_packed"], file[f"{name}_scale"])
        np.testing.assert_array_equal(mxfp4(file[f"{name}_packed"], file[f"{name}_scale"]), model.weights[name])
    ids = np.random.default_rng(4).integers(0, 320, 12).tolist()
    trace = kl.faults.run(kl.ReferenceModel(model.config, theirs), ids)
    [row] = kl.diff.blame(model, trace).wrong
    assert (row.tap, row.kind) == ("layers.4.moe.routed", "unknown") and EXPERT.format(0, "w1") in row.weight
    found = kl.diff.blame(model, trace, weights=theirs)
    assert [(r.tap, r.kind) for r in found.wrong] == [("layers.4.moe.routed", "weight_differs")]
    assert {d.name for d in found.weights} <= {n for n in theirs if ".4.block_sparse_moe.experts." in n}


def test_decays_of_the_padding_are_named_by_a_log(model):
    """A file has more values than heads, the heads' first; and a mapping of it as it is differs in nothing."""
    name = "model.layers.1.self_attn.A_log"
    whole = raw(FOLDER)[name].reshape(-1)
    assert kl.diff.blame(model, kl.faults.run(model, [3, 1, 4]), weights={**model.weights, name: whole}).ok
    padding = np.r_[np.float32(0.3), np.float32(0.0)]
    theirs = {**model.weights, name: padding}
    ids = np.random.default_rng(4).integers(0, 320, 12).tolist()
    trace = kl.faults.run(kl.ReferenceModel(model.config, theirs), ids)
    [row] = kl.diff.blame(model, trace).wrong
    assert (row.tap, row.kind) == ("layers.1.kda.g", "unknown") and f"compares {name}" in row.text
    found = kl.diff.blame(model, trace, weights=theirs)
    assert found.weights[0].name == name and [r.kind for r in found.wrong] == ["weight_differs"]


@pytest.mark.parametrize("part", ["norm", "proj"])
def test_either_half_of_a_score_weight_is_compared(model, part):
    name = f"model.layers.4.mlp_res_{part}.weight"
    theirs = {**model.weights, name: np.asarray(model.weights[name], np.float32)[..., ::-1]}
    trace = kl.faults.run(kl.ReferenceModel(model.config, theirs), [7, 8, 9, 10, 11])
    found = kl.diff.blame(model, trace, weights=theirs)
    assert [(r.tap, r.kind) for r in found.wrong] == [("layers.4.ffn_res", "weight_differs")]
    assert name in found.verdict


# ---- a right run, and everything that shows it ---------------------------------------------------------


@pytest.mark.parametrize("case", K3_CASES)
def test_every_comparison_runs_over_it(case, tmp_path):
    """Runs of the engine are right; one with one op changed is named by each."""
    model = kl.Model.from_pretrained(DATA / "golden" / case)
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    ours, tap = model.trace(ids), "layers.2.ffn_norm"
    assert kl.diff.blame(model, ours).ok and kl.diff.traces(ours, model.reference().forward(ids, taps="*").taps).ok
    theirs = model.trace(ids, edit={tap: lambda x: 1.01 * x})
    found = kl.diff.blame(model, theirs)
    assert [r.tap for r in found.wrong] == [tap]
    apart = kl.diff.traces(theirs, ours, model=model)
    assert apart.first.tap == tap
    assert tap in found.html() and tap in apart.html()

    def other(tokens, replace):
        return model.trace(tokens, edit={tap: lambda x: 1.01 * x} | (replace or {}))

    assert kl.diff.bisect(model, other, ids).tap == tap


def test_padding_behind_a_log_is_k3s_alone(model):
    """Of another family a tensor of more heads is another shape, and told."""
    tiny = kl.Model.tiny()
    for ours, told in ((model, False), (tiny, True)):
        name = next(n for n in ours.weights if n.endswith("A_log"))
        longer = np.concatenate([np.asarray(ours.weights[name]).reshape(-1), np.ones(3, np.float32)])
        found, _ = compare_weights(ours, {name: longer})
        assert [d.name for d in found] == [name] * told
