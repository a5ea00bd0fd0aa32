"""Looking inside: taps edited, layers run alone, traces in files, weights replaced and saved."""

import fnmatch
import shutil

import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES, TINY

import kimi_linear as kl
from kimi_linear import reference
from kimi_linear.dataflow import arguments, evaluate, nodes
from kimi_linear.diff.budgets import budget
from kimi_linear.diff.budgets import names as budget_names

CASES = ["tiny", *GOLDEN_CASES]
MIXTURES = [case for case in CASES if case != "qwen35-a"]  # which has none
FOLDERS = {"tiny": TINY, **{case: DATA / "golden" / case for case in GOLDEN_CASES}}
_models = {}


def open_model(case):
    if case not in _models:
        _models[case] = kl.Model.from_pretrained(FOLDERS[case])
    return _models[case]


@pytest.fixture(params=CASES)
def model(request):
    return open_model(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return open_model(request.param)


@pytest.fixture
def tiny():
    return open_model("tiny")


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def attention_of(model):
    """(layer, mixer) of the first layer of attention."""
    return next((i, spec.mixer) for i, spec in enumerate(model.config.layers) if spec.mixer in ("mla", "attn"))


def every_tap(model):
    """All taps, `moe.scores` too, without the logits."""
    scores = [f"layers.{i}.moe.scores" for i, layer in enumerate(model.config.layers) if layer.ffn == "moe"]
    return [*(name for name in model.taps if name != "logits"), *scores]


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def float32(x):
    return x if x.dtype == np.int32 else np.asarray(x, np.float32)


# ---- edits -----------------------------------------------------------------------------------------


def test_the_identity_changes_no_byte(model):
    tokens = ids(model, 83)
    whole = model.forward(tokens)
    trace = model.trace(tokens, [*every_tap(model), "logits"])
    for name in [*every_tap(model), "logits"]:
        state = model.new_state()
        assert model.forward(tokens, edit={name: lambda x: x}).tobytes() == whole.tobytes(), name
        assert model.forward(tokens, state=state, edit={name: trace[name]}).tobytes() == whole.tobytes(), name
    identity = model.forward(tokens, taps="*", edit=dict.fromkeys(["*", *every_tap(model)], lambda x: x))[1]
    assert all(identity[name].tobytes() == trace[name].tobytes() for name in identity)


def test_the_identity_changes_no_state_of_a_batch_in_several_passes(tiny):
    sequences = [ids(tiny, n, seed=n) for n in (700, 1, 90)]
    plain, edited = tiny.new_state(3), tiny.new_state(3)
    logits = tiny.forward(sequences, state=plain)
    same = tiny.forward(sequences, state=edited, edit={"*": lambda x: x})
    for a, b, s, t in zip(logits, same, plain, edited, strict=True):
        assert a.tobytes() == b.tobytes() and arrays(s) == arrays(t)


@pytest.mark.parametrize("case", CASES)
def test_each_op_keeps_its_budget_on_the_values_of_the_reference(case):
    """Inputs of a tap replaced by the reference's: what the engine makes of them is what float64 makes of them."""
    model = open_model(case)
    tokens = ids(model, 70)
    values = model.reference().forward(tokens, taps=["*"]).taps
    values = {"tokens": tokens} | {name: float32(x) for name, x in values.items()}
    judged = 0
    for node in nodes(model.config):
        if node.op == "cache_append" or node.tap == "embed":
            continue
        edit = {name: values[name] for name in node.inputs.values()}
        got = model.trace(tokens, node.tap, edit=edit)[node.tap]
        args = arguments(node, values, model.weights)
        desired = evaluate(node, args)
        if node.op == "route":
            assert np.array_equal(got, desired[0])
        elif node.op == "route_weights":
            bound = budget("route", (args["ids"], desired[0]), **{a: x for a, x in args.items() if a != "ids"})[1]
            assert (np.abs(got - desired[0]) <= bound).all(), node.tap
        elif node.op in budget_names():
            bound = budget(node.op, desired if len(desired) > 1 else desired[0], **args)
            bound = bound[0] if isinstance(bound, tuple) else bound
            error = np.abs(got.reshape(desired[0].shape) - desired[0])
            assert (error <= bound).all(), (node.tap, float((error / bound).max()))
        else:
            assert np.allclose(got.reshape(desired[0].shape), desired[0], rtol=2**-24, atol=0), node.tap
        judged += 1
    assert judged == len(model.taps) - 1


def test_a_tap_of_the_reference_gives_the_rest_of_the_reference(model):
    """The last layer's residual stream from the reference: no error is inherited, only norm and head add theirs.

    The norm is within (D/32 + 8) u of each of its values, the head sums D products of it: D/16 + 16 u more of the
    sum of their sizes (docs/math.md), both with room for the rounding of the value replaced, 1 u.
    """
    tokens, D = ids(model, 50), model.config.hidden_size
    last = f"layers.{model.config.n_layers - 1}.out"
    wanted = model.reference().forward(tokens, taps=[last, "norm"])
    got = model.forward(tokens, edit={last: float32(wanted.taps[last])})
    head = "model.embed_tokens.weight" if model.config.tie_embeddings else "lm_head.weight"
    size = np.abs(wanted.taps["norm"]) @ np.abs(reference.f64(model.weights[head])).T
    assert (np.abs(got - wanted.logits) <= (D / 32 + 8 + 2 + D / 16 + 16) * 2**-24 * size).all()


def test_new_expert_ids_are_weighed_by_the_router(mixture):
    model = mixture
    tokens = ids(model, 40)
    E, k = model.config.n_experts, model.config.experts_per_token
    for layer in (i for i, spec in enumerate(model.config.layers) if spec.ffn == "moe"):
        given = np.argsort(np.random.default_rng(1).random((40, E)), axis=-1)[:, :k].astype(np.int32)
        forced, trace = model.forward(tokens, taps="*.moe.*", expert_ids={layer: given})
        edited, other = model.forward(tokens, taps="*.moe.*", edit={f"layers.{layer}.moe.ids": given})
        assert forced.tobytes() == edited.tobytes()
        assert all(trace[name].tobytes() == other[name].tobytes() for name in trace)


def test_edited_scores_choose_and_weigh(mixture):
    model = mixture
    c, tokens = model.config, ids(model, 40)
    layer = next(i for i, spec in enumerate(c.layers) if spec.ffn == "moe")
    scores = np.random.default_rng(2).random((40, c.n_experts), np.float32)
    trace = model.trace(tokens, f"layers.{layer}.moe.*", edit={f"layers.{layer}.moe.scores": scores})
    name = f"model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias"
    bias = model.weights[name] if c.router_bias else None
    chosen, weights = reference.route(scores, k=c.experts_per_token, bias=bias, groups=c.n_groups, scale=c.routed_scale,
                                      top_groups=c.top_groups, function="none", renormalise=c.renormalise)
    assert np.array_equal(trace[f"layers.{layer}.moe.ids"], chosen)
    # a sum of k terms, a quotient, a product: (k + 2) roundings
    limit = (c.experts_per_token + 2) * 2**-24 * weights
    assert (np.abs(trace[f"layers.{layer}.moe.weights"] - weights) <= limit).all()


def test_ablating_an_expert_changes_what_comes_behind_it_at_its_tokens(tiny):
    tokens = ids(tiny, 60)
    layer = next(i for i, spec in enumerate(tiny.config.layers) if spec.ffn == "moe")
    before = tiny.trace(tokens)
    chosen = before[f"layers.{layer}.moe.ids"]
    expert = int(np.bincount(chosen[30:].reshape(-1)).argmax())
    used = (chosen == expert).any(-1)
    weights = np.where(chosen == expert, np.float32(0), before[f"layers.{layer}.moe.weights"])
    after = tiny.trace(tokens, edit={f"layers.{layer}.moe.weights": weights})
    order = list(before)
    first = order.index(f"layers.{layer}.moe.weights")
    untouched = [*order[:first], *(n for n in order if n.startswith(f"layers.{layer}.moe.shared"))]
    for name in untouched:
        assert after[name].tobytes() == before[name].tobytes(), name
    out = f"layers.{layer}.moe.out"
    assert 0 < used.sum() < len(tokens)
    assert np.array_equal(after[out][~used], before[out][~used])
    assert (after[out][used] != before[out][used]).any(-1).all()
    start = int(np.argmax(used))  # causal: tokens before the first that uses the expert are as they were
    assert after["logits"][:start].tobytes() == before["logits"][:start].tobytes()
    assert (after["logits"][start] != before["logits"][start]).any()
    assert np.array_equal(after[out][used],
                          tiny.trace(tokens, out, edit={f"layers.{layer}.moe.weights": lambda w: weights})[out][used])


def test_a_function_sees_the_rows_of_each_pass_and_sequence_once(tiny):
    sequences = [ids(tiny, n, seed=n) for n in (600, 30)]
    seen = []

    def halve(x):
        seen.append(x.shape)
        return x * np.float32(0.5)

    name = "layers.0.kda.beta"
    plain = tiny.forward(sequences, taps=[name, "layers.0.kda.b"])[1]
    trace = tiny.forward(sequences, taps=[name, "layers.0.kda.b"], edit={name: halve})[1]
    assert trace["layers.0.kda.b"].tobytes() == plain["layers.0.kda.b"].tobytes()
    assert np.array_equal(trace[name], plain[name] * np.float32(0.5))
    H = tiny.config.kda_heads
    assert seen == [(512, H), (88, H), (30, H)]


def test_changes_are_made_in_order_and_functions_may_call_ops(tiny):
    tokens, name = ids(tiny, 20), "layers.1.attn_norm"
    whole = tiny.trace(tokens, name)[name]
    edit = {name: lambda x: kl.ops.softmax(x), "layers.1.attn_nor?": lambda x: x + np.float32(1)}
    assert np.array_equal(tiny.trace(tokens, name, edit=edit)[name], kl.ops.softmax(whole) + np.float32(1))


def test_a_function_may_run_the_model_itself(tiny):
    tokens, other = ids(tiny, 20), ids(tiny, 20, seed=9)
    patched = tiny.forward(tokens, edit={"layers.2.mid": lambda x: tiny.trace(other, "layers.2.mid")["layers.2.mid"]})
    given = tiny.trace(other, "layers.2.mid")["layers.2.mid"]
    assert patched.tobytes() == tiny.forward(tokens, edit={"layers.2.mid": given}).tobytes()


def test_logits_are_edited_last(tiny):
    tokens = ids(tiny, 20)
    whole = tiny.forward(tokens)
    assert np.array_equal(tiny.forward(tokens, edit={"logits": np.negative}), -whole)
    assert np.array_equal(tiny.forward(tokens, logits="last", edit={"logits": np.negative}), -whole[-1])
    assert np.array_equal(tiny.trace(tokens, "logits", edit={"logits": np.zeros_like(whole)})["logits"], 0 * whole)


@pytest.mark.parametrize("T", [1, 40, 700])
def test_an_exception_in_a_function_leaves_the_state_at_the_end_of_a_pass(tiny, T):
    prompt, tokens = ids(tiny, 70), ids(tiny, T, seed=1)
    state, twin = tiny.new_state(), tiny.new_state()
    for s in (state, twin):
        tiny.forward(prompt, state=s, logits="none")
    calls = []

    def fails(x):
        calls.append(len(x))
        if sum(calls) == T:
            raise LookupError("not this one")
        return x

    with pytest.raises(LookupError, match="not this one"):
        tiny.forward(tokens, state=state, edit={"layers.3.mla.out": fails})
    done = 512 if T == 700 else 0
    tiny.forward(tokens[:done], state=twin, logits="none")
    assert state.position == 70 + done and arrays(state) == arrays(twin)
    rest = tokens[done:]
    assert tiny.forward(rest, state=state).tobytes() == tiny.forward(rest, state=twin).tobytes()


def test_wrong_edits_are_refused_before_anything_is_read(tiny):
    tokens, state = ids(tiny, 5), tiny.new_state()
    moe = next(i for i, spec in enumerate(tiny.config.layers) if spec.ffn == "moe")
    same, bad = np.zeros((5, tiny.config.experts_per_token), np.int32), tiny.config.n_experts
    wrong = [
        ({"layers.0.kda.gate": np.negative}, ValueError, r"edit: 'layers\.0\.kda\.gate' .*layers\.0\.kda\.g\b"),
        ({"embed": np.zeros((4, 128), np.float32)}, ValueError, r"edit\['embed'\] has shape \[4, 128\]"),
        ({"embed": np.zeros((5, tiny.config.hidden_size))}, TypeError, "float64"),
        ({"embed": lambda x: x[:-1]}, ValueError, "has shape"),
        ({"embed": lambda x: x.astype(np.float64)}, TypeError, "float64"),
        ({"embed": lambda x: None}, TypeError, r"edit\['embed'\]\(rows\) returned None; it must return the new rows, "
                                               r"float32 \[5, 256\], as rows itself where it has changed that copy"),
        ({"embed": lambda x: x.sort()}, TypeError, "returned None"),  # in place, and not returned
        ({f"layers.{moe}.moe.ids": lambda x: None}, TypeError, r"moe.ids'\]\(rows\) returned None; .* int32 \[5, "),
        ({"embed": lambda x: x.T}, ValueError, r"'embed'\]\(rows\) has shape \[256, 5\]; it must be \[5, 256\]"),
        ({"*.kda.beta": lambda x: 0.5}, TypeError, r"'layers.0.kda.beta'\]\(rows\) is float64; it must be float32"),
        ({f"layers.{moe}.moe.ids": same}, ValueError, "must be different"),
        ({f"layers.{moe}.moe.ids": same + bad}, ValueError, f"is {bad}"),
        ({"layers.3.mla.probs": np.negative}, ValueError, "matches no tap"),
        ([np.negative], TypeError, "list"),
    ]
    for edit, error, message in wrong:
        with pytest.raises(error, match=message):
            tiny.forward(tokens, state=state, edit=edit)
        assert state.position == 0
    fresh = tiny.new_state()
    assert tiny.forward(tokens, state=state).tobytes() == tiny.forward(tokens, state=fresh).tobytes()


def test_rows_changed_in_place_and_returned(tiny):
    """The same bytes as a new array; the caller's own is not written."""
    tokens, name = ids(tiny, 600), "layers.0.kda.beta"

    def halve(x):
        x *= np.float32(0.5)
        return x

    edited = tiny.forward(tokens, edit={name: halve})
    assert edited.tobytes() == tiny.forward(tokens, edit={name: lambda x: x * np.float32(0.5)}).tobytes()
    given = tiny.trace(tokens, name)[name]
    before = given.tobytes()
    assert tiny.forward(tokens, edit={name: given} | {"layers.0.kda.bet?": halve}).tobytes() == edited.tobytes()
    assert given.tobytes() == before


def test_logits_that_cannot_be_edited_come_when_the_states_have_moved_on(tiny):
    tokens, state, twin = ids(tiny, 5), tiny.new_state(), tiny.new_state()
    with pytest.raises(TypeError, match=r"edit\['logits'\]\(rows\) returned None"):
        tiny.forward(tokens, state=state, edit={"logits": lambda x: None})
    tiny.forward(tokens, state=twin, logits="none")
    assert state.position == 5 and arrays(state) == arrays(twin)


def test_a_function_cannot_use_the_context_of_its_own_call(tiny):
    ctx = kl.Context(threads=1)
    model = kl.Model.tiny(ctx=ctx)
    with pytest.raises(ValueError, match="in use by the call"):
        model.forward(ids(tiny, 3), edit={"embed": lambda x: kl.ops.softmax(x, ctx=ctx)})
    assert model.forward(ids(tiny, 3)).tobytes() == tiny.forward(ids(tiny, 3)).tobytes()


# ---- part of the model -----------------------------------------------------------------------------


def test_parts_of_the_model_compose_to_the_whole(model):
    tokens, n = ids(model, 150), model.config.n_layers
    whole = model.forward(tokens, taps="*")[1]
    assert model.forward(embeds=whole["embed"]).tobytes() == whole["logits"].tobytes()
    for cut in range(1, n):
        h = model.forward(tokens, stop=cut)
        assert h.tobytes() == whole[f"layers.{cut - 1}.out"].tobytes()
        assert model.forward(embeds=h, start=cut).tobytes() == whole["logits"].tobytes()
    h = whole["embed"]
    for layer in range(n):
        h = model.forward(embeds=h, start=layer, stop=layer + 1) if layer < n - 1 else h
    assert model.forward(embeds=h, start=n - 1, logits="last").tobytes() == whole["logits"][-1].tobytes()


def test_parts_come_in_the_form_of_the_tokens(tiny):
    sequences = [ids(tiny, n, seed=n) for n in (9, 70)]
    parts = tiny.forward(sequences, stop=2)
    assert [p.shape for p in parts] == [(9, tiny.config.hidden_size), (70, tiny.config.hidden_size)]
    for logits, alone in zip(tiny.forward(embeds=parts, start=2), tiny.forward(sequences), strict=True):
        assert logits.tobytes() == alone.tobytes()
    batch = np.stack([ids(tiny, 9), ids(tiny, 9, seed=1)])
    half = tiny.forward(batch, stop=2)
    assert half.shape == (2, 9, tiny.config.hidden_size)
    assert tiny.forward(embeds=half, start=2).tobytes() == tiny.forward(batch).tobytes()
    assert list(tiny.forward(batch, stop=2, taps="layers.1.*.out")[1]) == ["layers.1.kda.out", "layers.1.moe.out"]


def test_embeds_move_a_state_on(tiny):
    tokens = ids(tiny, 90)
    rows = tiny.trace(tokens, "embed")["embed"]
    a, b = tiny.new_state(), tiny.new_state()
    assert tiny.forward(tokens, state=a).tobytes() == tiny.forward(tokens, state=b, embeds=rows).tobytes()
    assert arrays(a) == arrays(b)


def test_states_are_told_what_they_have_read(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(kl.State, "_append", lambda self, ids: told.append((self, ids)))
    a, b = tiny.new_state(2)
    x, y = ids(tiny, 700), ids(tiny, 5, seed=1)
    tiny.forward([x, y], state=[a, b], logits="none")
    assert told == [(a, x.tolist()), (b, y.tolist())]

    calls = []

    def second(values):
        calls.append(len(values))
        return values if len(calls) == 1 else None

    told.clear()
    with pytest.raises(TypeError):
        tiny.forward(x, state=a, logits="none", edit={"norm": second})
    tiny.forward(embeds=np.ones((3, tiny.config.hidden_size), np.float32), state=b, logits="none")
    assert told == [(a, x[:512].tolist()), (b, [-1, -1, -1])]
    assert (a.position, b.position) == (1212, 8)


def test_wrong_parts_are_refused(tiny):
    tokens, n, D = ids(tiny, 5), tiny.config.n_layers, tiny.config.hidden_size
    rows = np.zeros((5, D), np.float32)
    for options, error, message in [
        (dict(tokens=tokens, start=1), ValueError, "embeds must then be"),
        (dict(embeds=rows, start=3, stop=3), ValueError, "start < stop"),
        (dict(embeds=rows, start=0, stop=n + 1), ValueError, "stop 7"),
        (dict(embeds=rows, start=1, state=tiny.new_state()), ValueError, "state is given and only layers"),
        (dict(tokens=tokens, stop=1, state=tiny.new_state()), ValueError, "state is given and only layers"),
        (dict(tokens=tokens, embeds=rows[:4]), ValueError, r"embeds has shape \[4"),
        (dict(embeds=rows.astype(np.float64)), TypeError, "float64"),
        (dict(), TypeError, "tokens is None"),
        (dict(tokens=tokens, stop=2, taps="layers.3.*"), ValueError, "matches no tap"),
        (dict(tokens=tokens, stop=2, edit={"norm": np.negative}), ValueError, "matches no tap"),
    ]:
        with pytest.raises(error, match=message):
            tiny.forward(**options)


# ---- taps on request, traces in files, log-probabilities -------------------------------------------


def test_taps_on_request_are_in_no_glob_but_their_own(model):
    tokens = ids(model, 5)
    assert list(model.trace(tokens)) == model.taps
    assert not any(fnmatch.fnmatch(name, "*.moe.scores") for name in model.taps)
    layer, mixer = attention_of(model)
    probs = f"layers.{layer}.{mixer}.probs"
    assert probs not in model.trace(tokens, f"layers.{layer}")
    assert probs not in model.trace(tokens, f"layers.{layer}.{mixer}.*")
    assert list(model.trace(tokens, probs)) == [probs]


def test_scores_are_the_routers(mixture):
    model = mixture
    tokens, function = ids(model, 30), getattr(reference, model.config.router_function)
    trace = model.trace(tokens, ["*.moe.scores", "*.moe.logits"])
    exact = model.reference().forward(tokens[:3], taps="*.moe.scores").taps
    for name in exact:
        own = function(trace[name.replace("scores", "logits")])
        assert (np.abs(trace[name] - own) <= budget(model.config.router_function, own,
                                                    x=trace[name.replace("scores", "logits")])).all()


def attention_args(model, layer, mixer, state, q):
    """The arguments of a layer's attention in the reference, and its values [S, H, V]."""
    c = model.config

    def cache(name):
        return state.widened(f"layers.{layer}.{mixer}.{name}_cache")

    if mixer == "attn":
        k, v = cache("k"), cache("v")
        values = np.repeat(reference.f64(v), c.attn_heads // c.attn_kv_heads, axis=1)
        return dict(q=q, k=k, v=v, scale=c.attn_head_dim**-0.5), values
    kv_b = reference.f64(model.weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"])
    kv_b = kv_b.reshape(c.mla_heads, -1, c.kv_rank)
    w_uk, w_uv = kv_b[:, : c.nope_dim], kv_b[:, c.nope_dim :]
    return dict(q=q, latent=cache("latent"), k_shared=cache("k_shared"), w_uk=w_uk, w_uv=w_uv,
                scale=(c.nope_dim + c.rope_dim) ** -0.5), np.einsum("sr,hvr->shv", cache("latent").astype(float), w_uv)


@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_probs_are_what_attention_weighs_its_values_with(model, cache):
    """An attention's o is the values summed by its probs: its own budget, and one rounding of each probability."""
    layer, mixer = attention_of(model)
    state = model.new_state(cache=cache)
    model.forward(ids(model, 20), state=state, logits="none")
    _, trace = model.forward(ids(model, 33, seed=1), state=state, logits="none",
                             taps=[f"layers.{layer}.{mixer}.{x}" for x in ("probs", "q", "o")])
    p, q, o = (trace[f"layers.{layer}.{mixer}.{x}"].astype(np.float64) for x in ("probs", "q", "o"))
    assert p.shape == (33, q.shape[1], 53)
    assert np.abs(p.sum(-1) - 1).max() <= 53 * 2**-24
    assert (p[np.broadcast_to((np.arange(53) > np.arange(20, 53)[:, None])[:, None], p.shape)] == 0).all()
    op = {"mla": "latent_attention", "attn": "attention"}[mixer]
    args, values = attention_args(model, layer, mixer, state, q)
    desired = getattr(reference, op)(**args)
    rounding = 2**-24 * np.einsum("ths,shv->thv", p, np.abs(values)) + 53 * 2**-149 * np.abs(values).max()
    assert (np.abs(np.einsum("ths,shv->thv", p, values) - desired) <= rounding * 1.01).all()
    assert (np.abs(o - desired) <= budget(op, desired, **args)).all()


def test_probs_need_one_sequence_and_memory(tiny, monkeypatch):
    with pytest.raises(ValueError, match="one sequence; 2 are given"):
        tiny.trace([ids(tiny, 3), ids(tiny, 4)], "*.mla.probs")
    monkeypatch.setattr("kimi_linear._call.SMALL", 0)
    monkeypatch.setattr("kimi_linear._call.available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="probs of 100 x 8 x 100, heads of all layers"):
        tiny.trace(ids(tiny, 100), "*.mla.probs")


@pytest.mark.parametrize("rows", [None, slice(500, 530), slice(-3, None), slice(5, 5), slice(0, 512)])
def test_a_trace_in_a_file_is_the_trace_in_memory(tiny, rows, tmp_path):
    tokens, seen = ids(tiny, 1100), []
    taps = ["layers.[03].*", "*.moe.ids", "*.moe.scores", "norm", "logits"]
    whole = tiny.trace(tokens, taps)
    kept = slice(None) if rows is None else rows
    options = dict(tokens_slice=rows, progress=lambda done, total: seen.append((done, total)))
    for trace in (tiny.trace(tokens, taps, to=tmp_path / "a.safetensors", **options),
                  tiny.trace(tokens, taps, **options | {"tokens_slice": kept})):
        assert list(trace) == list(whole)
        for name in whole:
            assert trace[name].dtype == whole[name].dtype and trace[name].tobytes() == whole[name][kept].tobytes()
        assert np.array_equal(trace.tokens, tokens[kept])
    assert seen and all(done <= total for done, total in seen) and seen[-1][0] == seen[-1][1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_streamed_trace_takes_edits_and_moves_a_state_on(tiny, tmp_path):
    tokens = ids(tiny, 600)
    beta = np.random.default_rng(3).random((600, tiny.config.kda_heads), np.float32)
    edit = {"layers.0.kda.beta": beta, "layers.1.mid": lambda x: x * np.float32(2), "logits": np.negative}
    a, b = tiny.new_state(), tiny.new_state()
    logits, whole = tiny.forward(tokens, state=a, taps=["layers.*.out", "logits"], edit=edit)
    trace = tiny.trace(tokens, ["layers.*.out", "logits"], to=tmp_path / "t", state=b, edit=edit)
    assert all(trace[name].tobytes() == whole[name].tobytes() for name in whole) and arrays(a) == arrays(b)
    tiny.trace(tokens[:10], "norm", tokens_slice=slice(0, 2), state=b)
    assert b.position == 610


def test_what_a_streamed_trace_refuses_writes_nothing(tiny, tmp_path, monkeypatch):
    tokens, path = ids(tiny, 20), tmp_path / "t.safetensors"
    for options, error, message in [
        (dict(taps="*.mla.probs"), ValueError, "mla.probs needs all positions"),
        (dict(offsets=[0, 20]), ValueError, "one sequence"),
        (dict(tokens_slice=slice(0, 9, 2)), ValueError, "must rise by 1"),
        (dict(tokens_slice=3), TypeError, "must be a slice"),
        (dict(edit={"embed": np.zeros((3, 2), np.float32)}), ValueError, "has shape"),
        (dict(taps="layers.9.*"), ValueError, "matches no tap"),
    ]:
        with pytest.raises(error, match=message):
            tiny.trace(tokens, to=path, **options)
    with pytest.raises(ValueError, match="one sequence"):
        tiny.trace([tokens, tokens], to=path)
    with pytest.raises(LookupError):
        tiny.trace(tokens, to=path, edit={"norm": lambda x: {}["none"]})
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="1,000 are free"):
        tiny.trace(tokens, to=path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("T", [1, 2, 513, 700])
def test_logprobs_are_log_softmax_of_the_logits(model, T):
    tokens = ids(model, T)
    logits = model.forward(tokens).astype(np.float64)[:-1]
    top = logits.max(-1, keepdims=True)
    whole = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    got = model.logprobs(tokens)
    assert got.shape == (T - 1,) and got.dtype == np.float64
    # the same float64 formula in another order: a few roundings of numbers up to max |logit - top| + log(vocab)
    assert np.allclose(got, whole[np.arange(T - 1), tokens[1:]], rtol=1e-12, atol=1e-12)


def test_logprobs_take_text_and_refuse_none(tiny):
    text = "In the beginning God created the heaven"
    assert np.array_equal(tiny.logprobs(text), tiny.logprobs(tiny.tokenizer.encode(text)))
    with pytest.raises(ValueError, match="tokens is empty"):
        tiny.logprobs([])


# ---- weights ---------------------------------------------------------------------------------------


def test_a_replaced_weight_is_used_and_old_states_are_refused(model):
    model, tokens = kl.Model.from_pretrained(model._checkpoint.path), ids(model, 40)
    before, state = model.forward(tokens), model.new_state()
    mixer = model.config.layers[0].mixer
    last = "linear_attn.out_proj" if mixer == "gdn" else "self_attn.o_proj"
    name, out = f"model.layers.0.{last}.weight", f"layers.0.{mixer}.out"
    old = model.weights[name]
    new = np.zeros(old.shape, np.float32)
    model.weights[name] = new
    new += 1  # it was copied
    assert not model.weights[name].any() and not model.weights[name].flags.writeable
    logits, trace = model.forward(tokens, taps=out)
    assert not trace[out].any() and (logits != before).any()
    exact = model.reference().forward(tokens[:5]).logits
    assert np.sqrt(np.mean((logits[:5] - exact) ** 2) / np.mean(exact**2)) < 1e-4
    with pytest.raises(ValueError, match="before a weight was replaced"):
        model.forward(tokens, state=state)
    model.weights[name] = old
    assert model.forward(tokens, state=model.new_state()).tobytes() == before.tobytes()


def test_wrong_weights_are_refused(tiny):
    weights, name = kl.Model.tiny().weights, "model.norm.weight"
    for key, value, error, message in [
        ("model.norms.weight", weights[name], KeyError, "near it are model.norm.weight"),
        (name, np.zeros(3, np.float32), ValueError, "must be"),
        (name, np.zeros(weights[name].shape), TypeError, "float64"),
    ]:
        with pytest.raises(error, match=message):
            weights[key] = value
    for key, message in (("model.norms.weight", "near it are model.norm.weight"), ("?", "near it are model.embed")):
        with pytest.raises(KeyError, match=message):
            weights[key]
    assert "?" not in weights and weights.get("?") is None and name in weights
    assert repr(weights).startswith("Weights(233 tensors of 'tiny': model.embed_tokens.weight, ")


def test_the_same_seed_gives_the_same_random_model(tiny):
    a, b, c = (kl.Model.from_config(tiny.config, seed=s) for s in (1, 1, 2))
    tokens = ids(tiny, 10)
    assert a.forward(tokens).tobytes() == b.forward(tokens).tobytes() != c.forward(tokens).tobytes()


def saved_as(model, folder):
    model.save_pretrained(folder)
    return kl.Model.from_pretrained(folder)


def assert_same_model(a, b):
    assert a.config == b.config and a.generation_config == b.generation_config and list(a.weights) == list(b.weights)
    for name in a.weights:
        x, y = a.weights[name], b.weights[name]
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


def test_what_is_saved_is_read_back(model, tmp_path):
    other = saved_as(model, tmp_path / "new" / "folder")
    assert_same_model(model, other)
    tokens = ids(model, 20)
    assert model.forward(tokens).tobytes() == other.forward(tokens).tobytes()
    if model.tokenizer is not None:
        assert other.tokenizer.encode("In the beginning") == model.tokenizer.encode("In the beginning")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_and_changed_models_are_saved_in_shards(tiny, dtype, tmp_path, monkeypatch):
    model = kl.Model.from_config(tiny.config, seed=3, dtype=dtype)
    model.weights["model.norm.weight"] = np.full(tiny.config.hidden_size, 2, np.float32)
    monkeypatch.setattr("kimi_linear.saving.SHARD", 2_000_000)
    assert_same_model(model, saved_as(model, tmp_path / "m"))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()


def test_a_checkpoint_is_not_overwritten_unasked(tiny, tmp_path, monkeypatch):
    small = kl.Model.from_config(tiny.config, seed=4)
    small.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        tiny.save_pretrained(tmp_path)
    with monkeypatch.context() as m:
        free = shutil.disk_usage(tmp_path)._replace(free=1000)
        m.setattr(shutil, "disk_usage", lambda folder: free)
        with pytest.raises(OSError, match="1,000 are free"):
            tiny.save_pretrained(tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    monkeypatch.setattr("kimi_linear.saving.SHARD", 2_000_000)
    tiny.save_pretrained(tmp_path, overwrite=True)
    assert_same_model(tiny, kl.Model.from_pretrained(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="own"):
        kl.Model.from_pretrained(tmp_path).save_pretrained(tmp_path, overwrite=True)
