"""Looking inside: layers run alone, taps on request, traces in files, weights replaced and saved."""

import fnmatch
import shutil

import numpy as np
import pytest
from inside import CASES, MIXTURES, arrays, ids, open_model

import kimi_linear as kl
from kimi_linear import reference
from kimi_linear._call import attention_probs
from kimi_linear.diff.budgets import budget
from kimi_linear.load import SafetensorsFile


@pytest.fixture(params=CASES)
def model(request):
    return open_model(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return open_model(request.param)


@pytest.fixture
def tiny():
    return open_model("tiny")


def attention_of(model):
    """(layer, mixer) of the first layer of attention."""
    return next((i, spec.mixer) for i, spec in enumerate(model.config.layers) if spec.mixer in ("mla", "attn"))


# ---- part of the model -----------------------------------------------------------------------------


def stream(model, taps, layer):
    """What enters a layer, of the taps: [T, D]; with attention residuals snapshots [T, n, D], then that."""
    h = taps[f"layers.{layer - 1}.out"]
    if not (every := model.config.attn_res_block):
        return h
    return np.stack([taps[f"layers.{i - 1}.out"] if i else taps["embed"] for i in range(0, layer, every)] + [h], axis=1)


def test_parts_of_the_model_compose_to_the_whole(model):
    tokens, n = ids(model, 150), model.config.n_layers
    whole = model.forward(tokens, taps="*")[1]
    assert model.forward(embeds=whole["embed"]).tobytes() == whole["logits"].tobytes()
    for cut in range(1, n):
        h = model.forward(tokens, stop=cut)
        assert h.tobytes() == stream(model, whole, cut).tobytes()
        assert model.forward(embeds=h, start=cut).tobytes() == whole["logits"].tobytes()
    h = whole["embed"]
    for layer in range(n):
        h = model.forward(embeds=h, start=layer, stop=layer + 1) if layer < n - 1 else h
    assert model.forward(embeds=h, start=n - 1, logits="last").tobytes() == whole["logits"][-1].tobytes()


def test_a_trace_ends_with_the_last_layer_that_makes_a_tap(tiny):
    """The same bytes, and layers behind it are not run: their NaN is not met."""
    tokens, whole = ids(tiny, 90), tiny.trace(ids(tiny, 90))
    weights = {name: np.array(value) for name, value in tiny.weights.items()}
    weights["model.layers.3.input_layernorm.weight"][:] = np.nan
    broken = kl.Model(tiny.config, weights)
    for taps in ("layers.2.*", ["embed", "layers.0.kda.g", "layers.2.moe.out"], "embed"):
        trace = broken.trace(tokens, taps)
        assert trace.keys() and all(x.tobytes() == whole[name].tobytes() for name, x in trace.items())
    for more in ({"state": broken.new_state()}, {"check": "finite"}, {"edit": {"layers.5.out": np.negative}}):
        with pytest.raises(ValueError, match="NaN|not finite|nan"):
            broken.trace(tokens, "layers.2.*", **more)
    with pytest.raises(ValueError, match="NaN"):
        broken.trace(tokens, "layers.4.moe.out")


def test_the_head_alone(model):
    """What the stream behind a layer would say: of the last layer the logits themselves."""
    n, tokens = model.config.n_layers, ids(model, 70)
    whole, trace = model.forward(tokens, taps=["layers.*.out", "embed", "norm"])
    head = {"embeds": stream(model, trace, n), "start": n}
    assert model.forward(**head).tobytes() == whole.tobytes()
    assert model.forward(**head, logits="last").tobytes() == whole[-1].tobytes()
    logits, taps = model.forward(**head, taps="*", logits="all")
    behind = ["output_res"] if model.config.attn_res_block else ["collapsed"] if model.config.streams else []
    assert list(taps) == [*behind, "norm", "logits"] and taps["norm"].tobytes() == trace["norm"].tobytes()
    assert logits.tobytes() == taps["logits"].tobytes() == whole.tobytes()
    for tap in () if behind else ("embed", "layers.0.out"):
        w = np.float32(model.weights["model.norm.weight"]) + model.config.norm_plus_one
        head = model.weights["model.embed_tokens.weight" if model.config.tie_embeddings else "lm_head.weight"]
        wanted = kl.ops.linear(kl.ops.rms_norm(trace[tap], w, eps=model.config.rms_norm_eps), head)
        assert np.allclose(model.forward(embeds=trace[tap], start=n), wanted, atol=1e-5 * np.abs(wanted).max())


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


def test_what_is_given_is_cut_into_passes_as_the_tokens_are(tiny):
    """Rows of embeds and expert ids of a ragged call of several passes: the second sequence is cut in the middle."""
    x = [ids(tiny, n, seed=n) for n in (300, 400)]
    trace = tiny.trace(np.concatenate(x), ["embed", "*.moe.ids"], offsets=[0, 300, 700])
    given = {int(tap.split(".")[1]): chosen for tap, chosen in trace.items() if tap != "embed"}
    rows = [trace["embed"][:300], trace["embed"][300:]]
    wanted = b"".join(a.tobytes() for a in tiny.forward(x, logits="last"))
    for options in ({"embeds": rows}, {"tokens": x, "expert_ids": given}):
        assert b"".join(a.tobytes() for a in tiny.forward(**options, logits="last")) == wanted


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


def test_rows_of_other_sequences_than_the_tokens_are_refused(tiny):
    rows = tiny.trace(ids(tiny, 4), "embed")["embed"]
    two = [rows[:2], rows[2:]]
    for tokens, embeds, message in [
        ([[1], [2, 3, 4]], two, r"embeds\[0\] has 2 rows; it must have 1"),
        (np.ones((2, 2), np.int32), [rows[:2], rows[:1]], r"embeds\[1\] has 1 rows; it must have 2"),
        ([[1], [2, 3, 4]], rows.reshape(2, 2, -1), r"embeds\[0\] has 2 rows; it must have 1"),
        ([1, 2, 3, 4], two, "embeds has 2 sequences and tokens 1"),
        ([1, 2, 3, 4], rows.reshape(2, 2, -1), "embeds has 2 sequences and tokens 1"),
        ([[1, 2], [3, 4]], rows[None], "embeds has 1 sequences and tokens 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny.forward(tokens, embeds=embeds)
    alone = [tiny.forward(embeds=x) for x in two]
    for tokens in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]], np.int32)):
        for embeds in (two, rows.reshape(2, 2, -1), rows):
            together = tiny.forward(tokens, embeds=embeds)
            assert [x.tobytes() for x in together] == [x.tobytes() for x in alone]
    assert tiny.forward([1, 2, 3, 4], offsets=[0, 2, 4], embeds=two).tobytes() == np.concatenate(alone).tobytes()


def test_wrong_parts_are_refused(tiny):
    tokens, n, D = ids(tiny, 5), tiny.config.n_layers, tiny.config.hidden_size
    rows = np.zeros((5, D), np.float32)
    for options, error, message in [
        (dict(tokens=tokens, start=1), ValueError, "embeds must then be"),
        (dict(embeds=rows, start=3, stop=3), ValueError, "start < stop"),
        (dict(embeds=rows, start=0, stop=n + 1), ValueError, "stop 7"),
        (dict(embeds=rows, start=n + 1), ValueError, "or both be 6: the final norm and the head alone"),
        (dict(embeds=rows, start=n, stop=n - 1), ValueError, "start < stop"),
        (dict(tokens=tokens, start=n), ValueError, "embeds must then be"),
        (dict(embeds=rows, start=n, taps="layers.*"), ValueError, "matches no tap"),
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
    assert list(model.trace(tokens, "*.probs"))[0] == probs


def test_a_part_of_a_trace_has_what_was_made_on_request(tiny, tmp_path):
    trace = tiny.trace(ids(tiny, 5), ["*", "*.probs", "*.scores"])
    trace.save(tmp_path / "trace")
    for whole in (trace, kl.Trace.load(tmp_path / "trace")):
        assert list(whole.filter("*")) == list(whole)
        assert {"layers.3.mla.probs", "layers.3.moe.scores"} < {*whole.filter("layers.3")}
        assert "layers.3.mla.probs" in whole.filter("*.mla.*")
    states = tiny.trace(ids(tiny, 5), "layers.1", states="layers.1.kda.state").filter("*.state")
    assert repr(states).startswith("Trace(2 taps of 5 tokens, ")


def test_names_are_completed_in_a_notebook(tiny):
    state, trace = tiny.new_state(), tiny.trace([1, 2], "layers.1")
    for held in (state, trace, tiny.weights):
        assert held._ipython_key_completions_() == list(held) and len(list(held)) > 1


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
    parts = ["probs", "q", "o", "select"] if model.config.index_heads else ["probs", "q", "o"]
    model.forward(ids(model, 20), state=state, logits="none")
    _, trace = model.forward(ids(model, 33, seed=1), state=state, logits="none",
                             taps=[f"layers.{layer}.{mixer}.{x}" for x in parts])
    p, q, o = (trace[f"layers.{layer}.{mixer}.{x}"].astype(np.float64) for x in ("probs", "q", "o"))
    assert p.shape == (33, q.shape[1], 53)
    assert np.abs(p.sum(-1) - 1).max() <= 53 * 2**-24
    assert (p[np.broadcast_to((np.arange(53) > np.arange(20, 53)[:, None])[:, None], p.shape)] == 0).all()
    op = {"mla": "latent_attention", "attn": "attention"}[mixer]
    args, values = attention_args(model, layer, mixer, state, q)
    if model.config.index_heads:
        args["select"] = trace[f"layers.{layer}.mla.select"]
    desired = getattr(reference, op)(**args)
    rounding = 2**-24 * np.einsum("ths,shv->thv", p, np.abs(values)) + 53 * 2**-149 * np.abs(values).max()
    assert (np.abs(np.einsum("ths,shv->thv", p, values) - desired) <= rounding * 1.01).all()
    assert (np.abs(o - desired) <= budget(op, desired, **args)).all()


def test_probs_of_selected_positions(tiny):
    """They are the weights of latent_attention(select=), and 0 elsewhere; all of them for a token that selects none."""
    layer, mixer = attention_of(tiny)
    name, state, select = f"layers.{layer}.{mixer}.probs", tiny.new_state(), np.full((9, 6), -1, np.int32)
    for t in range(1, 9):
        select[t, :t % 6 + 1] = np.arange(t % 6 + 1) * (20 + t) // 6
    tiny.forward(ids(tiny, 20), state=state, logits="none")
    _, trace = tiny.forward(ids(tiny, 9, seed=1), state=state, logits="none", taps=[name.replace("probs", "q")])
    q = trace[name.replace("probs", "q")]
    p = attention_probs(tiny, state, name, q, select).astype(np.float64)
    args, values = attention_args(tiny, layer, mixer, state, q)
    desired = reference.latent_attention(**args, select=select)
    rounding = 2**-24 * np.einsum("ths,shv->thv", p, np.abs(values)) + 29 * 2**-149 * np.abs(values).max()
    assert (np.abs(np.einsum("ths,shv->thv", p, values) - desired) <= rounding * 1.01).all()
    chosen = np.array([np.isin(np.arange(29), row) for row in select])
    assert (p[~np.broadcast_to(chosen[:, None], p.shape)] == 0).all() and not p[0].any()
    assert (p[1:].max(-1) > 0).all()


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


def test_a_streamed_trace_takes_experts_and_gives_states_of_any_token(tiny):
    """Behind the first 512 tokens, which are a call of their own, and at rows where no call would end by itself."""
    tokens, rows = ids(tiny, 600), slice(530, 570)
    chosen = {int(tap.split(".")[1]): x for tap, x in tiny.trace(tokens, "*.moe.ids").items()}
    trace = tiny.trace(tokens, "norm", tokens_slice=rows, states="*.kda.state", expert_ids=chosen)
    wanted = tiny.trace(tokens, "norm")["norm"][rows]
    assert np.allclose(trace["norm"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for at, before in ((530, "before."), (570, "")):
        state = tiny.new_state()
        for first, last in ((0, 512), (512, 530), (530, 570)):
            if first < at:
                tiny.forward(tokens[first:last], state=state, logits="none")
        assert all(np.array_equal(trace[before + name], state[name]) for name in state if name.endswith(".state"))


def test_texts_of_a_trace_stay_texts_in_its_file(tmp_path):
    meta = {"model": "2024", "source": "true", "note": "null", "list": "[1]", "quoted": '"x"', "plain": "as it is",
            "dtype": "NaN", "deep": "[" * 99999, "number": 2024, "none": None, "truth": True, "tokens": [1, 2]}
    kl.Trace({"embed": np.zeros((2, 3), np.float32)}, meta).save(tmp_path / "t")
    read = kl.Trace.load(tmp_path / "t").meta
    assert {key: read[key] for key in meta} == meta
    assert SafetensorsFile(tmp_path / "t").metadata["plain"] == "as it is"


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
        (dict(tokens_slice=slice(5, 2)), ValueError, "must rise by 1"),
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


def test_the_first_weight_is_put_back():
    model, name = kl.Model.tiny(), "model.layers.1.self_attn.o_proj.weight"
    before, first = model.forward([5, 6, 7]), model.weights[name]
    del model.weights[name]  # in place already
    state = model.new_state()
    model.forward([1], state=state)
    for factor in (0, 2):
        model.weights[name] = np.asarray(first, np.float32) * np.float32(factor)
    assert (model.forward([5, 6, 7]) != before).any()
    del model.weights[name]
    assert model.weights[name].dtype == first.dtype and model.weights[name].tobytes() == first.tobytes()
    assert model.forward([5, 6, 7]).tobytes() == before.tobytes()
    with pytest.raises(ValueError, match="before a weight was replaced"):
        model.forward([1], state=state)
    with pytest.raises(KeyError, match="near it are model.norm.weight"):
        del model.weights["model.norms.weight"]


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


def test_nothing_of_a_checkpoint_that_is_replaced_stays(tiny, tmp_path):
    """A tokenizer, a template or end tokens of another model would be read with the new one."""
    tiny.save_pretrained(tmp_path)
    others = ("tokenizer.json", "special_tokens_map.json", "generation_config.json")
    for name in (*others, "README.md"):
        (tmp_path / name).write_text("{}")
    small = kl.Model.from_config(tiny.config, seed=4)
    small.save_pretrained(tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert kl.Model.from_pretrained(tmp_path).tokenizer is None
    tiny.save_pretrained(tmp_path, overwrite=True)
    assert kl.Model.from_pretrained(tmp_path).tokenizer.encode("In") == tiny.tokenizer.encode("In")


def test_a_tokenizer_alone_is_not_mixed_with_a_model_unasked(tiny, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds a checkpoint \(tokenizer.json\); overwrite=True \(--force\)"):
        tiny.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
