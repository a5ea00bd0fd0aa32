"""Taps that a caller changes on the way."""

import signal
import threading

import numpy as np
import pytest
from inside import CASES, MIXTURES, arrays, every_tap, float32, ids, open_model

import kimi_linear as kl
from kimi_linear import reference
from kimi_linear.dataflow import RESULTS, arguments, evaluate, nodes
from kimi_linear.diff.budgets import budget
from kimi_linear.diff.budgets import names as budget_names
from kimi_linear.weight_shapes import MOE_NAMES, ROUTER_BIAS


@pytest.fixture(params=CASES)
def model(request):
    return open_model(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return open_model(request.param)


@pytest.fixture
def tiny():
    return open_model("tiny")


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
    run = model.reference().forward(tokens, taps=["*"])
    values = {"tokens": tokens} | {name: float32(x) for name, x in (run.taps | run.state).items()}
    judged = 0
    for node in nodes(model.config):
        if node.tap.endswith("_cache") or node.tap == "embed":
            continue
        edit = {name: values[name] for name in node.inputs.values() if not name.endswith("_cache")}
        got = model.trace(tokens, node.tap, edit=edit)[node.tap]
        args = arguments(node, values, model.weights)
        desired = evaluate(node, args)
        if node.op in ("route", "index_select"):
            assert np.array_equal(got, desired[0])
        elif node.op == "route_weights":
            bound = budget("route", (args["ids"], desired[0]), **{a: x for a, x in args.items() if a != "ids"})[1]
            assert (np.abs(got - desired[0]) <= bound).all(), node.tap
        elif node.op in RESULTS:
            op, which = RESULTS[node.op]
            results = getattr(reference, op)(**args)
            assert (np.abs(got - results[which]) <= budget(op, results, **args)[which]).all(), node.tap
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
    last = "output_res" if model.config.attn_res_block else f"layers.{model.config.n_layers - 1}.out"
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
    name = f"model.layers.{layer}.{MOE_NAMES[c.moe_names].prefix}.{ROUTER_BIAS}"
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


def test_a_function_of_two_arguments_knows_where_its_rows_are(tiny):
    """In later passes, of other sequences, behind a state, of logits; row 5 of a pass is not token 5."""
    name, seen = "layers.2.kda.beta", []

    def at_five(x, place):
        seen.append((place.sequence[0], place.position[0], len(place.position)))
        x[place.position == 5] = 0
        return x

    sequences = [ids(tiny, n, seed=n) for n in (1000, 30)]
    arrays = [tiny.trace(s, name)[name].copy() for s in sequences]
    for a in arrays:
        a[5] = 0
    given = tiny.forward(sequences, edit={name: np.concatenate(arrays)})
    made = tiny.forward(sequences, edit={name: at_five})
    assert all(a.tobytes() == b.tobytes() for a, b in zip(given, made, strict=True))
    assert seen == [(0, 0, 512), (0, 512, 488), (1, 0, 30)]
    state = tiny.new_state()
    tiny.forward(sequences[1][:3], state=state)
    seen.clear()
    tiny.forward(sequences[1][3:10], state=state, edit={name: at_five})
    assert seen == [(0, 3, 7)]
    places = []
    tiny.forward(sequences, logits=[7, 999, 1002], edit={"logits": lambda x, at: places.append(at) or x})
    assert places[0].sequence.tolist() == [0, 0, 1] and places[0].position.tolist() == [7, 999, 2]
    seen.clear()
    tiny.trace(sequences[0], name, tokens_slice=slice(600, 610), edit={name: at_five})
    assert {first for _, first, _ in seen} == {0, 512}
    assert tiny.forward([1, 2], edit={name: lambda x, scale=1: x * scale}) is not None  # one argument is needed


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


@pytest.mark.parametrize("rows", ["last", [1, 3]])
def test_an_array_of_logits_has_the_rows_that_are_asked_for(tiny, rows):
    wanted = np.random.default_rng(0).standard_normal((1 if rows == "last" else 2, tiny.config.vocab_size))
    got = tiny.forward([1, 2, 3, 4, 5], logits=rows, edit={"logits": wanted.astype(np.float32)})
    assert np.array_equal(got.reshape(wanted.shape), wanted.astype(np.float32))


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


def test_who_waits_for_a_context_hears_signals(tiny):
    """Another thread's call has it, and ends when this test says so."""
    ctx, inside, go_on = kl.Context(threads=1), threading.Event(), threading.Event()
    model = kl.Model.tiny(ctx=ctx)

    def stay(x):
        inside.set()
        assert go_on.wait(30)
        return x

    class Alarm(Exception):
        pass

    def raise_alarm(*_):
        raise Alarm

    worker = threading.Thread(target=lambda: model.forward(ids(tiny, 3), edit={"embed": stay}))
    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        worker.start()
        assert inside.wait(30)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            kl.ops.softmax(np.zeros((1, 3), np.float32), ctx=ctx)
        assert not go_on.is_set() and worker.is_alive()
    finally:
        signal.signal(signal.SIGALRM, before)
        go_on.set()
        worker.join()
    assert kl.ops.softmax(np.zeros((1, 2), np.float32), ctx=ctx).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("form", [{}, {"tokens_slice": slice(600, 610)}])
def test_edits_of_logits_are_one_rule_for_both_forms_of_a_trace(tiny, form):
    """Where no logits are made they cannot be changed; a slice makes them in some of its calls alone."""
    tokens = ids(tiny, 650)
    with pytest.raises(ValueError, match="edit has 'logits', and this call makes none: ask for them"):
        tiny.trace(tokens, "embed", edit={"logits": np.negative}, **form)
    plain = tiny.trace(tokens, "logits", **form)["logits"]
    for glob in ("logits", "logit*"):
        assert tiny.trace(tokens, "logits", edit={glob: np.negative}, **form)["logits"].tobytes() == (-plain).tobytes()
