"""The float64 model against golden arrays of independent implementations, and against itself in pieces."""

import functools
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, GOLDEN_CASES, PROMPTS, TINY, canonical_weights, read_safetensors

from kimi_linear import golden
from kimi_linear.config import Config
from kimi_linear.dataflow import begins_block
from kimi_linear.reference_model import ReferenceModel


@functools.cache
def model(folder: Path) -> ReferenceModel:
    config = Config.from_file(folder / "config.json")
    return ReferenceModel(config, canonical_weights(folder / "model.safetensors"))


@functools.cache
def result(folder: Path, prompt: str):
    return model(folder).forward(tokens_of(folder, prompt), taps="*")


def tokens_of(folder: Path, prompt: str) -> np.ndarray:
    return read_safetensors(folder / "golden.safetensors")[f"{prompt}/tokens"]


def named_pairs(folder, arrays, prompt, run):
    """(name, theirs, ours) of a prompt's floating arrays; every name must be known, ids must be equal."""
    config, weights = model(folder).config, model(folder).weights
    ours = run.taps | run.state
    for name in arrays:
        path = name.removeprefix(prompt)
        if not name.startswith(prompt) or path == "tokens":
            continue
        if path.endswith(golden.KV_B):
            i = path.split(".")[2]
            weight = weights[f"model.layers.{i}.{golden.KV_B}.weight"].astype(np.float64)
            latent = ours[f"layers.{i}.mla.latent"]
            yield name, arrays[name].reshape(len(latent), -1), golden.kv_b(latent, weight)
            continue
        group = {n: arrays[n] for n in (name, name.replace("gate/weights", "gate/ids"))}     # sorted together
        for tap, theirs in golden.to_taps(group, config, prompt).items():
            assert ours[tap].shape == theirs.shape, name
            if theirs.dtype.kind == "i":
                assert (ours[tap] == theirs).all(), name
            else:
                yield name, theirs, ours[tap]


def worst(pairs):
    """Name, largest error and rms error of the worst array, over that array's rms; and the names seen."""
    largest, rms, seen = (0.0, ""), (0.0, ""), set()
    for name, theirs, ours in pairs:
        seen.add(name)
        if not ours.size:  # the shared keys of an MLA without any
            continue
        size = np.sqrt(np.mean(ours**2))
        error = np.abs(ours - theirs.astype(np.float64)) / size
        largest = max(largest, (float(error.max()), name))
        rms = max(rms, (float(np.sqrt(np.mean(error**2))), name))
    return largest, rms, seen


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_float64_array(golden_case, prompt):
    arrays = read_safetensors(golden_case / "golden64.safetensors")
    largest, _, seen = worst(named_pairs(golden_case, arrays, prompt + "/", result(golden_case, prompt)))
    floats = {n for n, x in arrays.items() if n.startswith(prompt) and x.dtype == np.float64}
    assert seen >= floats
    assert largest[0] <= 1e-11, largest


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_float32_array(golden_case, prompt):
    """transformers in float32: 1e-4 rms and 2e-3 largest, of which it uses a tenth."""
    arrays = read_safetensors(golden_case / "golden.safetensors")
    largest, rms, seen = worst(named_pairs(golden_case, arrays, prompt + "/", result(golden_case, prompt)))
    floats = {n for n, x in arrays.items() if n.startswith(prompt) and x.dtype == np.float32}
    assert seen >= floats
    assert largest[0] <= 2e-3, largest
    assert rms[0] <= 1e-4, rms


def test_tiny():
    arrays = read_safetensors(DATA / "tiny" / "golden64.safetensors")
    run = model(TINY).forward(arrays["tokens"], taps=["layers.*.out", "logits"])
    largest, _, seen = worst(named_pairs(TINY, arrays, "", run))
    assert seen == set(arrays) - {"tokens"}
    assert largest[0] <= 1e-11, largest


@pytest.mark.parametrize("cuts", [[1], [17], [64], list(range(1, 70)), [0, 30, 30]])
def test_pieces_equal_the_whole(golden_case, cuts):
    whole = result(golden_case, "long")
    tokens = tokens_of(golden_case, "long")
    state, logits = None, []
    for part in np.split(tokens, cuts):
        run = model(golden_case).forward(part, state=state)
        state = run.state
        logits.append(run.logits)
    size = np.sqrt(np.mean(whole.logits**2))
    np.testing.assert_allclose(np.concatenate(logits), whole.logits, rtol=0, atol=1e-11 * size)
    assert state.keys() == whole.state.keys()
    for name, x in whole.state.items():
        np.testing.assert_allclose(state[name], x, rtol=0, atol=1e-11 * np.sqrt(np.mean(x**2)), err_msg=name)


def test_a_carried_state_is_not_changed(golden_case):
    first = model(golden_case).forward([5, 6, 7])
    before = {name: x.copy() for name, x in first.state.items()}
    model(golden_case).forward([8, 9], state=first.state)
    assert all((first.state[name] == x).all() for name, x in before.items())


def test_layer_by_layer_is_forward(golden_case):
    m, whole = model(golden_case), result(golden_case, "short")
    h, state, snapshots = m.embed(tokens_of(golden_case, "short")), {}, []
    for i in range(m.config.n_layers):
        h = m.layer(i, h, state, snapshots=snapshots)
        assert (h == whole.taps[f"layers.{i}.out"]).all()
    assert (m.head(h, snapshots=snapshots) == whole.logits).all()
    assert len(snapshots) == sum(begins_block(m.config, i) for i in range(m.config.n_layers))
    assert state.keys() == whole.state.keys()


def shapes_of_mixer(c, mixer, T):
    D, H, K = c.hidden_size, c.kda_heads, c.kda_head_dim
    if mixer == "kda":
        shapes = {f"kda.{s}_proj": (T, H * K) for s in "qkv"} | {f"kda.{s}_conv": (T, H, K) for s in "qkv"}
        shapes |= {f"kda.{s}": (T, H, K) for s in ("q", "k", "f", "g", "o", "z", "o_norm")}
        shapes |= {} if c.kda_full_rank_gate else {"kda.g_a": (T, K)}
        return shapes | {"kda.f_a": (T, K), "kda.b": (T, H), "kda.beta": (T, H), "kda.out": (T, D)}
    if mixer == "mla":
        shapes = {"mla.q": (T, c.mla_heads, c.nope_dim + c.rope_dim), "mla.latent_raw": (T, c.kv_rank),
                  "mla.latent": (T, c.kv_rank), "mla.k_shared": (T, c.rope_dim),
                  "mla.o": (T, c.mla_heads, c.v_head_dim), "mla.out": (T, D)}
        shapes |= {f"mla.{s}": (T, c.mla_heads, c.v_head_dim) for s in ("gate", "gated") if c.mla_gated}
        if c.index_heads:
            shapes |= {f"mla.index_{s}": (T, c.index_dim) for s in ("k_raw", "k", "gate")}
            shapes |= {"mla.index_q": (T, c.index_heads, c.index_dim), "mla.index_weights": (T, c.index_heads),
                       "mla.select": (T, c.index_topk + c.index_pool - 1)}
        return shapes | ({"mla.q_a": (T, c.q_rank), "mla.q_a_norm": (T, c.q_rank)} if c.q_rank else {})
    if mixer == "gdn":
        keys, values = (c.gdn_k_heads, c.gdn_k_dim), (c.gdn_v_heads, c.gdn_v_dim)
        shapes = {}
        for s, heads in zip("qkv", (keys, keys, values)):
            shapes |= {f"gdn.{s}_proj": (T, heads[0] * heads[1]), f"gdn.{s}_conv": (T, *heads)}
        shapes |= {f"gdn.{s}": (T, *keys) for s in "qk"} | {f"gdn.{s}": (T, *values) for s in ("o", "z", "o_norm")}
        return shapes | {f"gdn.{s}": (T, c.gdn_v_heads) for s in ("a", "g", "b", "beta")} | {"gdn.out": (T, D)}
    queries, keys = (T, c.attn_heads, c.attn_head_dim), (T, c.attn_kv_heads, c.attn_head_dim)
    shapes = {f"attn.{s}": queries for s in ("q_proj", "gate", "q_norm", "q", "o", "gated")}
    return shapes | {f"attn.{s}": keys for s in ("k_proj", "v", "k_norm", "k")} | {"attn.out": (T, D)}


def shapes_of_ffn(c, ffn, T):
    D = c.hidden_size
    if ffn == "dense":
        return {f"mlp.{s}": (T, c.ffn_size) for s in ("gate", "up", "act")} | {"mlp.out": (T, D)}
    k = (T, c.experts_per_token)
    shapes = {f"moe.shared_{s}": (T, c.shared_size) for s in ("gate", "up", "act")}
    shapes |= {"moe.shared_g": (T, 1), "moe.shared_gated": (T, D)} if c.shared_gated else {}
    if c.expert_latent:
        L = (T, c.expert_latent)
        shapes |= {"moe.latent": L, "moe.routed": L, "moe.routed_up": (T, D)}
        shapes |= {"moe.routed_norm": L} if c.expert_latent_norm else {}
    return shapes | {"moe.logits": (T, c.n_experts), "moe.ids": k, "moe.weights": k, "moe.shared": (T, D),
                     "moe.out": (T, D)}


def test_taps_have_their_names_and_shapes(golden_case):
    c, run, T = model(golden_case).config, result(golden_case, "short"), 21
    D = c.hidden_size
    stream = (T, c.streams, D) if c.streams else (T, D)
    expected = {"embed": (T, D), "norm": (T, D), "logits": (T, c.vocab_size)}
    expected |= {"streams": stream, "collapsed": (T, D)} if c.streams else {}
    expected |= {"output_res": (T, D)} if c.attn_res_block else {}
    states = {}
    for i, spec in enumerate(c.layers):
        shapes = shapes_of_mixer(c, spec.mixer, T) | shapes_of_ffn(c, spec.ffn, T)
        shapes |= {s: (T, D) for s in ("attn_norm", "ffn_norm")} | {"out": stream}
        shapes |= {} if begins_block(c, i) else {"mid": stream}
        for s in ("attn_hc", "ffn_hc") if c.streams else ():
            shapes |= {s: (T, D), f"{s}_post": (T, c.streams), f"{s}_comb": (T, c.streams, c.streams)}
        shapes |= {s: (T, D) for s in ("attn_res", "ffn_res") if c.attn_res_block}
        expected |= {f"layers.{i}.{name}": shape for name, shape in shapes.items()}
        states |= {f"layers.{i}.{name}": shape for name, shape in state_shapes(c, spec.mixer, T).items()}
    assert {name: x.shape for name, x in run.taps.items()} == expected
    assert {name: x.shape for name, x in run.state.items()} == states


def state_shapes(c, mixer, T):
    if mixer == "mla":
        shapes = {"mla.latent_cache": (T, c.kv_rank), "mla.k_shared_cache": (T, c.rope_dim)}
        if c.index_heads:
            shapes |= {f"mla.index_{s}_cache": (T, c.index_dim) for s in ("k", "gate")}
            shapes |= {"mla.pool_cache": (T // c.index_pool, c.index_dim)}
        return shapes
    if mixer == "attn":
        return {f"attn.{s}_cache": (T, c.attn_kv_heads, c.attn_head_dim) for s in "kv"}
    keys, values = (c.kda_heads, c.kda_head_dim), (c.kda_heads, c.kda_head_dim)
    if mixer == "gdn":
        keys, values = (c.gdn_k_heads, c.gdn_k_dim), (c.gdn_v_heads, c.gdn_v_dim)
    shapes = {f"{mixer}.{s}_history": (c.conv_width - 1, h * n) for s, (h, n) in zip("qkv", (keys, keys, values))}
    return shapes | {f"{mixer}.state": (values[0], keys[1], values[1])}


def test_edit(golden_case):
    m, whole = model(golden_case), result(golden_case, "short")
    tokens = tokens_of(golden_case, "short")
    same = m.forward(tokens, edit={"*": lambda x: x, "layers.1.out": whole.taps["layers.1.out"]})
    assert (same.logits == whole.logits).all()
    off = m.forward(tokens, edit={"layers.*.mid": lambda x: 0 * x}, taps="layers.1.mid")
    assert (off.taps["layers.1.mid"] == 0).all() and (off.logits != whole.logits).any()
    with pytest.raises(ValueError, match=r"edit of embed has shape \(2,\); it must have \(21, "):
        m.forward(tokens, edit={"embed": np.zeros(2)})


def test_an_edit_by_place_is_that_of_the_whole_in_parts(golden_case):
    m, tokens = model(golden_case), tokens_of(golden_case, "short")
    i = m.config.n_layers - 1

    def fourth(x, at):
        assert (at.sequence == 0).all() and len(at.position) == len(x)
        x[at.position == 4] *= 0.5
        return x

    edit = {f"layers.{i}.ffn_norm": fourth}
    whole, plain = m.forward(tokens, edit=edit).logits, result(golden_case, "short").logits
    assert np.flatnonzero((np.abs(whole - plain) > 1e-11).any(-1)).tolist() == [4]
    first = m.forward(tokens[:3], edit=edit)
    rest = m.forward(tokens[3:], state=first.state, edit=edit)
    np.testing.assert_allclose(rest.logits, whole[3:], rtol=0, atol=1e-11)
    without = {name: x for name, x in first.state.items() if not name.endswith("_cache")}
    with pytest.raises(ValueError, match=rf"edit of layers.{i}.ffn_norm takes a place, and a state without attention"):
        m.forward(tokens[3:], state=without, edit=edit)


def test_globs_are_those_of_the_engine(golden_case):
    m = model(golden_case)
    taps = m.forward([1, 2], taps="layers.1").taps
    assert len(taps) > 10 and all(name.startswith("layers.1.") for name in taps)
    assert not m.forward([1, 2]).taps and "layers.4.moe.scores" not in m.forward([1, 2], taps="*").taps
    for options in ({"taps": "layer.1.out"}, {"edit": {"layer.1.out": np.negative}}, {"taps": "*.probs"}):
        with pytest.raises(ValueError, match=f"{[*options][0]}: .* matches no tap; near it are "):
            m.forward([1, 2], **options)


def test_what_the_reference_refuses(golden_case):
    m = model(golden_case)
    wrong = [("In", TypeError, "tokens is <U2"), ([m.config.vocab_size], ValueError, r"tokens\[0\] is"),
             ([[1], [2]], ValueError, r"tokens has shape \[2, 1\]")]
    for tokens, error, words in wrong:
        with pytest.raises(error, match=words):
            m.forward(tokens)
    with pytest.raises(ValueError, match="expert_ids has the key 99; it must be a layer with a mixture"):
        m.forward([1], expert_ids={99: [[0, 1]]})
    assert m.forward([]).logits.shape == (0, m.config.vocab_size)


def test_a_result_is_shown_in_a_line(golden_case):
    run = result(golden_case, "long")
    assert repr(run) == f"ReferenceResult(70 tokens, {len(run.taps)} taps, {len(run.state)} state arrays)"


@pytest.mark.parametrize("case", [case for case in GOLDEN_CASES if case != "qwen35-a"])  # which has no experts
def test_forced_experts(case):
    folder = DATA / "golden" / case
    m, whole, tokens = model(folder), result(folder, "short"), tokens_of(folder, "short")
    i = max(i for i, spec in enumerate(m.config.layers) if spec.ffn == "moe")
    ids = whole.taps[f"layers.{i}.moe.ids"]
    assert (m.forward(tokens, expert_ids={i: ids[:, ::-1]}).logits == whole.logits).all()
    other = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    run = m.forward(tokens, expert_ids={i: other}, taps="*.moe.*")
    assert (run.taps[f"layers.{i}.moe.ids"] == other).all()
    if m.config.renormalise:
        sums = run.taps[f"layers.{i}.moe.weights"].sum(-1)
        np.testing.assert_allclose(sums, m.config.routed_scale, rtol=1e-14)
    with pytest.raises(ValueError, match="expert_ids has shape"):
        m.forward(tokens, expert_ids={i: other + m.config.n_experts})


def test_weights_are_fetched_lazily_and_missing_ones_named(golden_case):
    weights = model(golden_case).weights
    asked = []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    m = ReferenceModel(model(golden_case).config, Lazy(weights))
    assert not asked
    m.layer(1, m.streams(np.ones((2, m.config.hidden_size))))
    assert asked and all(name.startswith("model.layers.1.") for name in asked)
    lost = (next(name for name in weights if name.endswith("A_log")), "model.norm.weight")
    with pytest.raises(ValueError, match=f"weights lacks 2 tensors: {lost[0]}, {lost[1]}"):
        ReferenceModel(m.config, {n: x for n, x in weights.items() if n not in lost})


def test_only_one_sequence():
    with pytest.raises(ValueError, match="one sequence a call"):
        model(TINY).forward([1, 2, 3], offsets=[0, 1, 3])


def test_tied_embeddings(golden_case):
    d = Config.from_file(golden_case / "config.json").to_dict() | dict(tie_word_embeddings=True)
    m = ReferenceModel(Config.from_dict(d), model(golden_case).weights)
    x = np.ones((1, m.config.hidden_size))
    run = m.forward([3], edit={"norm": x})
    table = m.weights["model.embed_tokens.weight"].astype(float)
    np.testing.assert_allclose(run.logits, x @ table.T, rtol=1e-12)


def test_names_have_inverses(golden_case):
    c = model(golden_case).config
    for name, tap in golden.names(c).items():
        assert golden.tap_of(name, c) == tap
        held = [tap.format(s) for s in ("k_shared", "q", "gate", "v_proj", "a")]
        assert any(name in golden.paths(t, c) for t in held)
    assert golden.paths("layers.0.mid", c) == []
    assert golden.tap_of("model.layers.99.mlp", c) is None
    assert golden.tap_of("model.layers.0.self_attn.rotary", c) is None
    with pytest.raises(ValueError, match="has shape"):
        delta = next(i for i, spec in enumerate(c.layers) if spec.mixer in ("kda", "gdn"))
        golden.to_taps({f"cache/{delta}/state": np.zeros(5)}, c)
