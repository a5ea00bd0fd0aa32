"""What ports of GLM-5.3-Flash get wrong, each written out by itself, is named: streams, indexer, selection, limits."""

import dataclasses
from dataclasses import dataclass

import faulty_runs
import numpy as np
import pytest
from conftest import DATA, GLM_CASES, canonical_weights

import kimi_linear as kl

LAYERS = 5  # of glm-a; MLA is in 1 and 4


@pytest.fixture(scope="module")
def models():
    found = {}
    for case in GLM_CASES:
        folder = DATA / "golden" / case
        found[case] = kl.ReferenceModel(kl.Config.from_file(folder / "config.json"),
                                        canonical_weights(folder / "model.safetensors"))
    return found


@pytest.fixture(scope="module")
def model(models):
    return models["glm-a"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


# ---- the port: streams and the indexer written once more, with places to go wrong ----------------------


def of_all(x, eps):
    """One norm over the n D values of a token."""
    flat = x.reshape(len(x), -1)
    return flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps)


def of_each(x, eps):
    return (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)).reshape(len(x), -1)


def sinkhorn(logits, eps, passes, axes=(1, 2), last=None, over=2):
    """Columns, then (rows, columns) as often as there are passes behind the first."""
    c = softmax(logits, over) + eps
    first, second = axes
    c = c / (c.sum(first, keepdims=True) + eps)
    for _ in range(passes - 1):
        c = c / (c.sum(second, keepdims=True) + eps)
        c = c / (c.sum(first, keepdims=True) + eps)
    return c if last is None else c / (c.sum(last, keepdims=True) + eps)


def joined(y, x, post, comb):
    return post[:, :, None] * y[:, None] + np.einsum("tij,tid->tjd", comb, x)


def layer_norm(x, w, b, eps):
    c = x - x.mean(-1, keepdims=True)
    return w * c / np.sqrt((c * c).mean(-1, keepdims=True) + eps) + b


def rms(x, w, eps):
    return w * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def of_tokens(k, gate, ape):
    """Keys of pools, [P, d]: each channel weighs the tokens of a pool."""
    n, pool = len(k) // len(ape), len(ape)
    k, gate = (x[:n * pool].reshape(n, pool, -1) for x in (k, gate))
    return (softmax(gate + ape, 1) * k).sum(1)


@dataclass
class Wiring:
    """How a port makes the parts; what is here is right."""

    begun: object = lambda x, n: np.repeat(x[:, None], n, 1)
    collapsed: object = lambda x: x.mean(1)
    eps: object = lambda of_norm, own: (of_norm, own)
    norm: object = of_all
    half: object = lambda name: name
    pre: object = lambda a, eps: sigmoid(a) + eps
    post: object = lambda a: 2 * sigmoid(a)
    comb: object = sinkhorn
    read: object = lambda x, pre: (pre[:, :, None] * x).sum(1)
    joined: object = joined
    queried: object = lambda a, raw: a                         # of the latent of queries, normed and as it was
    key: object = layer_norm
    swapped: bool = False                                      # the projections of keys and of gates
    pooled: object = of_tokens
    scored: object = lambda dots, w: (w[:, None] * np.maximum(dots, 0)).sum(0)    # [H, pools], [H]
    early: int = 0
    tail: object = lambda seen, pool: range(seen // pool * pool, seen)
    seen: object = lambda ids, T: ids                          # by attention


class Port(kl.ReferenceModel):
    def __init__(self, model, wiring):
        super().__init__(model.config, model.weights)
        self.wiring = wiring

    def streams(self, x, tap=None):
        return tap("streams", self.wiring.begun(x, self.config.streams))

    def last_norm(self, h, tap=None, snapshots=()):
        w = np.float64(self.weights["model.norm.weight"])
        return tap("norm", rms(tap("collapsed", self.wiring.collapsed(h)), w, self.config.rms_norm_eps))

    def _connected(self, name, weights, h, w, tap):
        c, port, n = self.config, self.wiring, self.config.streams
        fn, base, scale = (np.float64(w(f"{port.half(weights)}_{part}")) for part in ("fn", "base", "scale"))
        of_norm, own = port.eps(c.rms_norm_eps, c.stream_eps)
        m = port.norm(h, of_norm) @ fn.T * np.repeat(scale, [n, n, n * n]) + base
        pre, post = port.pre(m[:, :n], own), tap(f"{name}_post", port.post(m[:, n:2 * n]))
        comb = tap(f"{name}_comb", port.comb(m[:, 2 * n:].reshape(-1, n, n), own, c.stream_passes))
        return tap(name, port.read(h, pre)), lambda h, y: port.joined(y, h, post, comb)

    def _select(self, i, x, a, w, state, tap):
        c, port, T = self.config, self.wiring, len(x)

        def of(name):
            return np.float64(w(f"self_attn.indexer.{name}"))

        wk, wg = of("wk.weight"), of("index_kpool_compress_gate")
        wk, wg = (wg, wk) if port.swapped else (wk, wg)
        a = port.queried(a, x @ np.float64(w("self_attn.q_a_proj.weight")).T)
        q = tap("mla.index_q", (a @ of("wq_b.weight").T).reshape(T, c.index_heads, c.index_dim))
        k = tap("mla.index_k_raw", x @ wk.T)
        k = tap("mla.index_k", port.key(k, of("k_norm.weight"), of("k_norm.bias"), c.index_eps))
        gate = tap("mla.index_gate", x @ wg.T)
        weights = tap("mla.index_weights", x @ of("weights_proj.weight").T)
        keys, pool = port.pooled(k, gate, of("index_kpool_compress_ape")), c.index_pool
        ids = np.full((T, c.index_topk + pool - 1), -1, np.int32)
        for t in range(T):
            complete = min((t + 1 + port.early) // pool, len(keys))
            scores = port.scored(q[t] @ keys[:complete].T, weights[t])
            best = np.argsort(-scores, kind="stable")[:c.index_topk // pool]
            row = sorted({p * pool + j for p in best for j in range(pool)} | set(port.tail(t + 1, pool)))
            ids[t, :len(row)] = row
        tap("mla.select", ids)
        for row, t in zip(ids, range(T)):                       # what a query does not see it does not attend to
            row[row > t] = -1
        return ids


def traced(model, dtype="float32", without=(), length=40, **wrong):
    """A trace of a port; what it hands on has the noise of the type."""
    rng, unit = np.random.default_rng(5), {"float64": 0.0, "float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    ids = rng.integers(0, model.config.vocab_size, length)

    def noisy(x):
        if x.dtype.kind in "iu":
            return x.copy()
        y = x * (1 + unit * rng.uniform(-1, 1, x.shape))
        return y if dtype == "float64" else y.astype(faulty_runs.DTYPES[dtype]).astype(np.float64)

    run = Port(model, Wiring(**wrong)).forward(ids, taps="*", edit={"*": noisy})
    return kl.Trace({tap: x for tap, x in run.taps.items() if not tap.endswith(tuple(without))},
                    {"tokens": ids.tolist(), "dtype": dtype})


def first_alone(x, n):
    return np.concatenate([x[:, None], np.zeros((len(x), n - 1, x.shape[1]))], 1)


def other_half(name):
    return {"hc_attn": "hc_ffn", "hc_ffn": "hc_attn"}[name]


#: what goes wrong -> (how, its name, the choice, the ops that it shows at)
STREAMS = {
    "collapsed by a sum": (dict(collapsed=lambda x: x.sum(1)), "streams_collapsed_otherwise", ("their sum",),
                           {"collapsed"}),
    "the first stream goes on": (dict(collapsed=lambda x: x[:, 0]), "streams_collapsed_otherwise",
                                 ("the first of them",), {"collapsed"}),
    "begun as zeros but the first": (dict(begun=first_alone), "streams_first_alone", (), {"streams"}),
    "begun as parts": (dict(begun=lambda x, n: np.repeat(x[:, None], n, 1) / n), "streams_parted", (), {"streams"}),
    "hc_eps has the norm's": (dict(eps=lambda of_norm, own: (of_norm, of_norm)), "mhc_eps_of_norm", (),
                              {"hc", "hc_comb"}),
    "norm of each stream": (dict(norm=of_each), "mhc_norm_by_stream", (), {"hc", "hc_post", "hc_comb"}),
    "no norm": (dict(norm=lambda x, eps: x.reshape(len(x), -1)), "mhc_norm_missing", (), {"hc", "hc_post", "hc_comb"}),
    "the feed-forward's connections for attention": (dict(half=lambda name: "hc_ffn"), "mhc_weights_of_other_half", (),
                                                     {"hc", "hc_post", "hc_comb"}),
    "attention's for the feed-forward": (dict(half=lambda name: "hc_attn"), "mhc_weights_of_other_half", (),
                                         {"hc", "hc_post", "hc_comb"}),
    "both exchanged": (dict(half=other_half), "mhc_weights_of_other_half", (), {"hc", "hc_post", "hc_comb"}),
    "pre with a factor": (dict(pre=lambda a, eps: 2 * sigmoid(a) + eps), "mhc_pre_doubled", (), {"hc"}),
    "post without its factor": (dict(post=sigmoid), "mhc_post_not_doubled", (), {"hc_post"}),
    "rows first": (dict(comb=lambda a, eps, n: sinkhorn(a, eps, n, (2, 1))), "mhc_rows_first", (), {"hc_comb"}),
    "rows at the end": (dict(comb=lambda a, eps, n: sinkhorn(a, eps, n, last=2)), "mhc_rows_last", (), {"hc_comb"}),
    "one pass less": (dict(comb=lambda a, eps, n: sinkhorn(a, eps, n - 1)), "mhc_iters", (-1,), {"hc_comb"}),
    "one pass more": (dict(comb=lambda a, eps, n: sinkhorn(a, eps, n + 1)), "mhc_iters", (1,), {"hc_comb"}),
    "softmax over columns": (dict(comb=lambda a, eps, n: sinkhorn(
        a, eps, n, over=1)), "mhc_softmax_otherwise", (), {"hc_comb"}),
    "comb as it is": (dict(joined=lambda y, x, post, comb: joined(y, x, post, comb.swapaxes(1, 2))),
                      "mhc_post_not_transposed", (), {"post"}),
    "a residual besides": (dict(joined=lambda y, x, post, comb: joined(y, x, post, comb) + x), "mhc_post_comb_twice",
                           (), {"post"}),
    "streams that do not mix": (dict(joined=lambda y, x, post, comb: x + post[:, :, None] * y[:, None]),
                                "mhc_post_comb_missing", (), {"post"}),
    "added without post": (dict(joined=lambda y, x, post, comb: joined(y, x, 0 * post + 1, comb)),
                           "mhc_post_post_missing", (), {"post"}),
}
INDEXER = {
    "queries of the latent as it was": (dict(queried=lambda a, raw: raw), "input_of_other_place", ("before its norm",),
                                        {"mla.index_q"}),
    "keys without a norm": (dict(key=lambda x, w, b, eps: x), "layer_norm_missing", (), {"mla.index_k"}),
    "keys with an RMS norm": (dict(key=lambda x, w, b, eps: rms(x, w, eps)), "layer_norm_rms_norm", (),
                              {"mla.index_k"}),
    "and its bias": (dict(key=lambda x, w, b, eps: rms(x, w, eps) + b), "layer_norm_of_rms", (), {"mla.index_k"}),
    "keys without the bias": (dict(key=lambda x, w, b, eps: layer_norm(x, w, 0, eps)), "layer_norm_bias_missing", (),
                              {"mla.index_k"}),
    "matrices of keys and gates swapped": (dict(swapped=True), "index_projected_as_other", (),
                                           {"mla.index_k_raw", "mla.index_gate"}),
    "gates pooled by keys": (dict(pooled=lambda k, gate, ape: of_tokens(gate, k, ape)), "index_pool_swapped", (),
                             {"mla.select"}),
    "no ape": (dict(pooled=lambda k, gate, ape: of_tokens(k, gate, 0 * ape)), "index_pool_ape_missing", (),
               {"mla.select"}),
    "means of pools": (dict(pooled=lambda k, gate, ape: of_tokens(k, 0 * gate, 0 * ape)), "index_pool_mean", (),
                       {"mla.select"}),
    "pools from the prompt's end": (dict(pooled=lambda k, gate, ape: of_tokens(*(
        x[len(x) % len(ape):] for x in (k, gate)), ape)), "index_pool_from_the_end", (), {"mla.select"}),
    "no relu": (dict(scored=lambda dots, w: (w[:, None] * dots).sum(0)), "index_relu_missing", (), {"mla.select"}),
    "no weights of heads": (dict(scored=lambda dots, w: np.maximum(dots, 0).sum(0)), "index_weights_missing", (),
                            {"mla.select"}),
    "a pool one token early": (dict(early=1), "index_one_early", (), {"mla.select"}),
    "no tail": (dict(tail=lambda seen, pool: ()), "index_ids_tail_missing", (), {"mla.select"}),
}
MISTAKES = STREAMS | INDEXER


def ending(row):
    """Of hyper-connections which result; else the tap below its layer."""
    name = row.tap.split(".", 2)[-1]
    return "post" if row.op == "mhc_post" else name.replace("attn_hc", "hc").replace("ffn_hc", "hc")


def blamed(model, mistake, dtype="float32", **options):
    wrong, name, choice, shows = MISTAKES[mistake]
    found = kl.diff.blame(model, traced(model, dtype, length=43, **options, **wrong))
    return found, name, choice, shows


def test_the_port_is_right_but_for_its_mistakes(models):
    for model in models.values():
        for dtype in faulty_runs.DTYPES:
            assert kl.diff.blame(model, traced(model, dtype)).ok
        exact = traced(model, "float64")
        right = model.forward(exact.tokens, taps="*")
        np.testing.assert_allclose(exact["logits"], right.logits, rtol=1e-10, atol=1e-12)
        assert all(np.array_equal(exact[tap], x) for tap, x in right.taps.items() if tap.endswith("select"))


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_mistake_is_named(model, mistake, dtype):
    found, name, choice, shows = blamed(model, mistake, dtype)
    assert {r.kind for r in found.wrong} == {name}, str(found)
    assert {r.choice for r in found.wrong} == {choice}, str(found)
    assert {ending(r) for r in found.wrong} == shows, str(found)


#: Below the noise of bfloat16: as many passes as have converged, eps; and pools that it chooses otherwise itself.
FAINT = {"hc_eps has the norm's", "rows first", "rows at the end", "one pass less", "one pass more",
         "softmax over columns", *(name for name, (*_, shows) in INDEXER.items() if "mla.select" in shows)}


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name not in FAINT])
def test_a_mistake_is_named_in_bfloat16(model, mistake):
    found, name, choice, shows = blamed(model, mistake, "bfloat16")
    assert {(r.kind, r.choice) for r in found.wrong} == {(name, choice)}, str(found)


@pytest.mark.parametrize("mistake", [name for name in sorted(FAINT) if name not in INDEXER])
def test_what_is_below_the_noise_is_nothing(model, mistake):
    found, *_ = blamed(model, mistake, "bfloat16")
    assert found.ok, str(found)


@pytest.mark.parametrize("mistake", sorted(STREAMS))
def test_streams_are_judged_where_connections_are_not_handed_out(model, mistake):
    """Of the three results of mhc_pre a trace may have none: what reads and joins the streams is judged with it."""
    found, name, choice, _ = blamed(model, mistake, without=("_hc", "_hc_post", "_hc_comb", "streams"))
    assert found.wrong and all(name in (r.kind, *r.also) for r in found.wrong), str(found)


def test_a_scale_of_all_scores_cannot_be_seen(model):
    """A positive factor, of queries times keys or of the weights of heads, chooses the same pools."""
    assert kl.diff.blame(model, traced(model, scored=lambda dots, w: 3 * (w[:, None] * np.maximum(dots, 0)).sum(0))).ok


def test_the_norms_eps_for_that_of_the_connections(models):
    """Float64 knows which it is; in float32 a tenth of it, as published models have it, may as well be none."""
    wrong, names = dict(eps=lambda of_norm, own: (own, own)), {"mhc_eps_of_connections", "mhc_eps_lost"}
    for model in models.values():
        exact, single = (kl.diff.blame(model, traced(model, dtype, **wrong)) for dtype in ("float64", "float32"))
        assert {r.kind for r in exact.wrong} == {"mhc_eps_of_connections"}, str(exact)
        assert single.wrong and {r.kind for r in single.wrong} <= names, str(single)


# ---- attention and feed-forwards -----------------------------------------------------------------------


def swiglu(gate, up):
    return gate * sigmoid(gate) * up


#: (tap, its name, the choice, what a port does)
OPS = [
    ("layers.1.mla.o", "select_ignored", (), lambda s: s.run(select=None)),
    ("layers.4.mla.o", "select_of_neighbour", (-1,), lambda s: s.run(select=np.roll(s.args["select"], 1, 0))),
    ("layers.0.mlp.act", "swiglu_limit_form", ("nothing is cut",), lambda s: swiglu(s["gate"], s["up"])),
    ("layers.2.moe.shared_act", "swiglu_limit_form", ("nothing is cut",), lambda s: swiglu(s["gate"], s["up"])),
    ("layers.3.moe.out", "swiglu_limit_form", ("nothing is cut",), lambda s: s.run(limit=None)),
    ("layers.0.mlp.act", "swiglu_limit_form", ("gate is not cut",),
     lambda s: swiglu(s["gate"], np.clip(s["up"], -1.5, 1.5))),
    ("layers.2.moe.shared_act", "swiglu_limit_form", ("gate is cut on both sides",),
     lambda s: swiglu(np.clip(s["gate"], -1.5, 1.5), np.clip(s["up"], -1.5, 1.5))),
    ("layers.2.moe.shared_act", "swiglu_limit_form", ("silu(gate) is cut, not gate",),
     lambda s: np.minimum(s["gate"] * sigmoid(s["gate"]), 1.5) * np.clip(s["up"], -1.5, 1.5)),
    ("layers.2.attn_norm", "norm_of_streams", ("their mean",),
     lambda s: rms(s.tap("layers.1.out").mean(1), s["w"], 1e-5)),
    ("layers.2.out", "mhc_post_of_other_half", (),
     lambda s: joined(s["y"], s["x"], s.sibling("attn_hc_post"), s.sibling("attn_hc_comb"))),
    ("layers.2.out", "mhc_post_on_what_was_read", (),
     lambda s: np.repeat((s.sibling("ffn_hc") + s["y"])[:, None], 4, 1)),
]


@pytest.mark.parametrize("tap, name, choice, wrong", OPS, ids=[f"{name}-{i}" for i, (_, name, *_) in enumerate(OPS)])
@pytest.mark.parametrize("calls", [[40], [21, 1, 1, 17]], ids=["one call", "several"])
def test_an_op_is_named(model, tap, name, choice, wrong, calls):
    rng = np.random.default_rng(12)
    ids = [[rng.integers(0, model.config.vocab_size, n).tolist()] for n in calls]
    found = kl.diff.blame(model, faulty_runs.noisy_forward(model, ids, "float32", rng, plant={tap: wrong}))
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == [(tap, name, choice, ())], str(found)


def test_queries_of_the_indexer_from_x(model):
    """Where the latent of queries is as wide as the model nothing else stops such a port."""
    config, rng = dataclasses.replace(model.config, q_rank=48), np.random.default_rng(3)
    weights = {name: rng.normal(size=shape, scale=shape[-1] ** -0.5) for name, shape in config.weight_shapes().items()}
    tap = "layers.1.mla.index_q"

    def wrong(site):
        w = weights["model.layers.1.self_attn.indexer.wq_b.weight"]
        return site.sibling("attn_norm") @ w.T

    calls = [[rng.integers(0, 320, 16).tolist()]]
    wide = kl.ReferenceModel(config, weights)
    found = kl.diff.blame(wide, faulty_runs.noisy_forward(wide, calls, "float32", rng, plant={tap: wrong}))
    assert [(r.tap, r.kind, r.choice, r.also) for r in found.wrong] == \
        [(tap, "input_of_other_place", ("attn_norm",), ())], str(found)


@pytest.mark.parametrize("name", ["indexer.k_norm.bias", "indexer.weights_proj.weight"])
def test_a_weight_that_is_another_is_named_by_its_tensor(model, name):
    name = f"model.layers.4.self_attn.{name}"
    theirs = {**model.weights, name: np.asarray(model.weights[name], np.float32) + 0.1}
    trace = kl.faults.run(kl.ReferenceModel(model.config, theirs), list(range(7, 40)))
    found = kl.diff.blame(model, trace, weights=theirs)
    assert [r.kind for r in found.wrong] == ["weight_differs"] and name in found.verdict, str(found)


# ---- ties, runs of the engine, and everything that shows them -------------------------------------------


def test_pools_of_scores_as_near_as_rounding_are_ties(model):
    """The last pool that was chosen and the next one change places where their scores are moved together, and no
    further."""
    trace = traced(model, "float32")
    [tap] = [t for t in trace if t == "layers.1.mla.select"]
    ids = trace[tap].copy()
    equal = kl.ReferenceModel(model.config, {name: 0 * np.asarray(w) if name.endswith("weights_proj.weight") else w
                                             for name, w in model.weights.items()})
    moved = kl.faults.run(equal, trace.tokens, plant={tap: lambda s: ids})
    found = kl.diff.blame(equal, moved)
    row = next(r for r in found.rows if r.tap == tap)
    assert row.ok and row.kind == "tie", str(found)
    other = kl.diff.blame(model, {**trace, tap: np.where(ids == 4, 5, ids)})
    assert [r.tap for r in other.wrong if r.op == "index_select"] == [tap], str(other)


@pytest.mark.parametrize("case", GLM_CASES)
def test_every_comparison_runs_over_it(case):
    """Runs of the engine are right, in one call and in several; one with one op changed is named by each."""
    model = kl.Model.from_pretrained(DATA / "golden" / case)
    ids = np.random.default_rng(2).integers(3, 320, 30).tolist()
    ours, tap = model.trace(ids), "layers.2.ffn_norm"
    assert kl.diff.blame(model, ours).ok and kl.diff.traces(ours, model.reference().forward(ids, taps="*").taps).ok
    state, calls = model.new_state(), []
    for part in (ids[:13], ids[13:14], ids[14:]):
        calls.append(model.trace(part, state=state))
    assert kl.diff.blame(model, calls).ok
    theirs = model.trace(ids, edit={tap: lambda x: 1.01 * x})
    found = kl.diff.blame(model, theirs)
    assert [r.tap for r in found.wrong] == [tap]
    apart = kl.diff.traces(theirs, ours, model=model)
    assert apart.first.tap == tap
    assert tap in found.html() and tap in apart.html()

    def other(tokens, replace):
        return model.trace(tokens, edit={tap: lambda x: 1.01 * x} | (replace or {}))

    assert kl.diff.bisect(model, other, ids).tap == tap
