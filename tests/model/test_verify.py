"""The whole engine beside float64 on three models, in one piece and in many; and `verify` finds faults."""

import dataclasses
import functools

import numpy as np
import pytest
from conftest import DATA, PROMPTS, read_safetensors
from one_ulp import noise, relative

import kimi_linear as kl
from kimi_linear import golden
from kimi_linear._call import Call
from kimi_linear.verify import Tap, gap_of_choice, verify

FORMS = ["auto", "recurrent", "chunked"]  # of the delta rule
CUTS = {"whole": [], "one at a time": None, "at 1": [1], "at 17": [17], "at 64": [64]}


@functools.cache
def model(folder, form="auto"):
    return kl.Model.from_pretrained(folder, ctx=kl.Context(delta_rule=form))


@functools.cache
def tokens_of(folder, prompt):
    return read_safetensors(folder / "golden.safetensors")[f"{prompt}/tokens"]


@functools.cache
def exact(folder, prompt):
    return model(folder).reference().forward(tokens_of(folder, prompt), taps="*")


@functools.cache
def conditioning(folder, prompt):
    return noise(model(folder).reference(), tokens_of(folder, prompt), exact(folder, prompt))


@functools.cache
def engine(folder, prompt, cuts, form):
    """Every tap of the prompt given in pieces, and the state after them."""
    m, tokens = model(folder, form), tokens_of(folder, prompt)
    at = range(1, len(tokens)) if CUTS[cuts] is None else CUTS[cuts]
    state, parts = m.new_state(), []
    for piece in np.split(tokens, at):
        if len(piece):
            parts.append(m.trace(piece, "*", state=state))
    taps = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return taps | dict(state.items())


def test_the_noise_is_one_unit(golden_case):
    """The allowance of the next test: half to one unit (2^-23) on a tap alone, far less than the bars."""
    moved = conditioning(golden_case, "short")
    assert 2.0**-24 < moved["embed"][0] < 2.0**-23
    # qwen35-a: its gated norms blow up small vectors; k3-a: SiTU is driven to its bounds
    most = {"qwen35-a": 2e-5, "k3-a": 4e-5}.get(golden_case.name, 5e-6)
    assert 2.0**-24 < moved["logits"][0] < most


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_tap_and_state(golden_case, prompt, cuts, form):
    """5e-6 rms and 1e-4 largest, or 4 times what one-ulp noise on every tap does to the reference."""
    run = exact(golden_case, prompt)
    ours, moved = engine(golden_case, prompt, cuts, form), conditioning(golden_case, prompt)
    desired = run.taps | run.state
    assert ours.keys() == desired.keys()
    for name, x in desired.items():
        if name.endswith("moe.ids"):
            assert (ours[name] == x).all(), name
            continue
        rms, largest = relative(ours[name], x)
        bars = max(5e-6, 4 * moved[name][0]), max(1e-4, 4 * moved[name][1])
        assert rms <= bars[0] and largest <= bars[1], f"{name}: {rms:.2e} rms, {largest:.2e}; allowed {bars}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_module_of_transformers(golden_case, prompt, form):
    """1e-4 rms and 2e-3 largest, of which transformers itself uses a tenth."""
    m, ours = model(golden_case), engine(golden_case, prompt, "whole", form)
    arrays = {
        n: x
        for n, x in read_safetensors(golden_case / "golden.safetensors").items()
        if n.startswith(prompt + "/") and not n.endswith("/tokens")
    }
    theirs = golden.to_taps(arrays, m.config, prompt + "/")
    for name, x in theirs.items():
        if name.endswith("moe.ids"):
            assert (ours[name] == x).all(), name
            continue
        rms, largest = relative(ours[name], x)
        assert rms <= 1e-4 and largest <= 2e-3, f"{name}: {rms:.2e} rms, {largest:.2e}"
    unseen = {n for n in arrays if golden.tap_of(n.removeprefix(prompt + "/"), m.config) is None}
    for name in unseen:  # the one module that we have no tap for
        assert name.endswith(golden.KV_B)
        i = name.split(".")[2]
        kv = golden.kv_b(
            ours[f"layers.{i}.mla.latent"], np.float64(m.weights[f"model.layers.{i}.{golden.KV_B}.weight"])
        )
        rms, largest = relative(kv, arrays[name].reshape(kv.shape))
        assert rms <= 1e-4 and largest <= 2e-3, f"{name}: {rms:.2e} rms, {largest:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_op_in_its_budget(golden_case, prompt, form):
    report = verify(model(golden_case, form), tokens_of(golden_case, prompt))
    assert report.ok, str(report)
    assert not report.flips and report.flips is not None
    assert all(op.share is not None for op in report.ops), "an op has no budget"


@pytest.mark.parametrize("form, n", [("auto", 2000), ("recurrent", 150), ("chunked", 150)])
def test_tiny(form, n):
    """Held-out text: 2e-6 of every tap's rms, and every op inside its own budget."""
    m = kl.Model.tiny(ctx=kl.Context(delta_rule=form))
    text = (DATA / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    report = verify(m, m.tokenizer.encode(text, specials=False)[:n])
    assert report.tokens == n
    assert report.ok, str(report)
    assert report.worst_rms.total_rms <= 2e-6, str(report)
    assert all(op.share is not None for op in report.ops)
    assert {t.name for t in report.taps} >= set(m.taps)


# ---- that it can fail ----


class Changed:
    """A model whose reference reads other weights: one op of the engine is then wrong, by that reference."""

    def __init__(self, model, **changes):
        self._model, self._changes = model, changes

    def __getattr__(self, name):
        return getattr(self._model, name)

    def reference(self):
        weights = dict(self._model.weights)
        for name, change in self._changes.items():
            weights[name] = change(np.array(weights[name], np.float64))
        return kl.ReferenceModel(self._model.config, weights)


def changed(folder, name, change):
    return verify(Changed(model(folder), **{name: change}), tokens_of(folder, "short"))


@pytest.fixture
def kimi_a(golden_dir):
    return golden_dir / "kimi-a"


@pytest.mark.parametrize(
    ("weight", "change", "op", "tap"),
    [
        ("model.layers.2.self_attn.dt_bias", lambda w: w + 1e-4, "decay_gate", "layers.2.kda.g"),
        (
            "model.layers.1.self_attn.k_conv1d.weight",
            lambda w: w[:, ::-1],
            "short_conv",
            "layers.1.kda.k_conv",
        ),
        (
            "model.layers.3.self_attn.kv_b_proj.weight",
            lambda w: w * (1 + 1e-3),
            "latent_attention",
            "layers.3.mla.o",
        ),
        (
            "model.layers.5.self_attn.kv_a_layernorm.weight",
            lambda w: w * (1 + 1e-5),
            "rms_norm",
            "layers.5.mla.latent",
        ),
        ("model.layers.0.mlp.down_proj.weight", lambda w: w * (1 + 1e-4), "linear", "layers.0.mlp.out"),
        ("model.layers.4.block_sparse_moe.experts.3.w1.weight", lambda w: -w, "moe", "layers.4.moe.out"),
        (
            "model.layers.4.self_attn.o_norm.weight",
            lambda w: w * (1 + 1e-5),
            "gated_rms_norm",
            "layers.4.kda.o_norm",
        ),
    ],
)
def test_the_op_that_is_wrong_is_named_and_no_other(kimi_a, weight, change, op, tap):
    report = changed(kimi_a, weight, change)
    assert not report.ok
    assert [t.name for t in report.taps if not t.ok] == [tap]
    assert [o.name for o in report.ops if not o.ok] == [op]
    assert report.verdict.startswith(f"FAILED: {op} over budget at {tap}, ")
    after = report.taps[[t.name for t in report.taps].index(tap) :]
    assert after[-1].name == "logits" and after[-1].total_rms > 1e-7  # inherited, and not blamed


@pytest.mark.parametrize("eps", ["rms_norm_eps", "latent_eps", "l2_eps"])
def test_each_eps_is_in_its_own_norms(golden_dir, eps):
    """As large as no model has it, in one kind of norm at a time: a norm that took the other's would be far off."""
    plain = model(golden_dir / "kimi-b")
    assert plain.config.q_rank and plain.config.rms_norm_eps == plain.config.latent_eps
    changed = kl.Model(dataclasses.replace(plain.config, **{eps: 1e-2}), plain._tensors)
    assert verify(changed, np.arange(8), free_run=False)


def test_a_wide_flip_fails(kimi_a):
    def swapped(bias):
        return bias[::-1] + np.linspace(0, 1, len(bias))

    report = changed(kimi_a, "model.layers.1.block_sparse_moe.gate.e_score_correction_bias", swapped)
    first = next(f for f in report.flips if not f.ok)
    assert first.layer == 1 and first.gap > 1e-5 and first.taken and first.lost
    assert report.misrouted and not report.ok
    assert all(f.layer == 1 for f in report.misrouted)
    assert "route" in report.verdict
    assert "choices of experts flip" in str(report)


@pytest.mark.parametrize(("value", "mine", "theirs", "groups", "top", "gap"), [
    ([0.9, 0.8, 0.7, 0.1], {0, 2}, {0, 1}, 1, 1, 0.1),
    ([0.9, 0.8, 0.7, 0.1], {2, 3}, {0, 1}, 1, 1, 0.7),      # 0.9 for 0.7 and 0.8 for 0.1
    ([0.9, 0.1, 0.5, 0.4, 0.3, 0.2], {2, 3}, {0, 1}, 3, 1, 0.1),   # a group of 0.9 for one of 1.0
    ([0.9, 0.1, 0.8, 0.2, 0.4, 0.5], {0, 1}, {0, 2}, 3, 2, 0.1),   # of two groups the second was another's
    ([0.9, 0.6, 0.8, 0.5, 0.1, 0.2], {0, 3}, {0, 2}, 3, 2, 0.3),   # inside a group that both have
])
def test_gap(value, mine, theirs, groups, top, gap):
    assert gap_of_choice(np.array(value), mine, theirs, groups, top) == pytest.approx(gap)


def test_a_tap_of_which_one_is_finite_is_not_ok():
    """Also where the op has no budget."""
    assert Tap("x", "route", 0, 0).ok and not Tap("x", "route", 0, 0, apart=1).ok
    assert Tap("x", "add", 0, 0, share=1).ok and not Tap("x", "add", 0, 0, share=1.1).ok


def test_own_expert_ids(kimi_a):
    report = verify(model(kimi_a), tokens_of(kimi_a, "short"), forced=False, free_run=False)
    assert report.ok and report.flips is None
    assert "expert ids from the reference" not in str(report)
    assert report.verdict.startswith(f"ok: all {len(report.taps)} taps") and not report.misrouted
    free = verify(model(kimi_a), tokens_of(kimi_a, "short"), forced=False)
    assert free.taps == report.taps and not free.misrouted


@pytest.mark.parametrize("forced", [True, False])
def test_route_is_judged_or_said_not_to_be(kimi_a, forced):
    bias = "model.layers.1.block_sparse_moe.gate.e_score_correction_bias"
    wrong = Changed(model(kimi_a), **{bias: lambda bias: bias[::-1] + np.linspace(0, 1, len(bias))})
    report = verify(wrong, tokens_of(kimi_a, "short"), forced=forced, free_run=False)
    unjudged = [tap.name for tap in report.taps if tap.rms_u is None]
    if forced:
        assert report.ok and unjudged and {tap.op for tap in report.taps if tap.name in unjudged} == {"route"}
        assert f"ok: {len(report.taps) - len(unjudged)} of {len(report.taps)} taps, " in report.verdict
        assert "; route was not judged: its choices were given" in report.verdict
    else:
        assert not report.ok and not unjudged and "route over budget at layers.1.moe.ids" in report.verdict
        assert {flip.layer for flip in report.misrouted} == {1}
        assert report.misrouted == verify(wrong, tokens_of(kimi_a, "short"), forced=False).misrouted


def test_layer_by_layer_is_the_same(kimi_a, monkeypatch):
    whole = verify(model(kimi_a), tokens_of(kimi_a, "short"))
    monkeypatch.setattr("kimi_linear.verify.MEMORY", 1)
    pieces = verify(model(kimi_a), tokens_of(kimi_a, "short"))
    assert pieces.memory < whole.memory
    assert pieces.taps[:-1] == whole.taps[:-1]
    assert pieces.taps[-1].name == "logits" and pieces.notes == [
        "logits: the last 1 of 21 tokens, as all would take more memory"
    ]


def test_the_engine_runs_each_layer_once(kimi_a, monkeypatch):
    whole = verify(model(kimi_a), tokens_of(kimi_a, "short"), free_run=False)
    ran, plain = [], Call.run

    def counted(call, *args):
        ran.extend(range(call.start, call.stop))
        return plain(call, *args)

    monkeypatch.setattr(Call, "run", counted)
    monkeypatch.setattr("kimi_linear.verify.MEMORY", 300_000)
    pieces = verify(model(kimi_a), tokens_of(kimi_a, "short"), free_run=False)
    assert ran == list(range(model(kimi_a).config.n_layers)) and pieces.memory < whole.memory
    assert pieces.taps[:-1] == whole.taps[:-1]


def test_a_layer_at_a_time_each_tap_is_judged_alike(golden_case, monkeypatch):
    """Also what comes behind the layers, of a family whose norms are stored less 1, or whose stream has snapshots."""
    tokens = tokens_of(golden_case, "short")
    whole = verify(model(golden_case), tokens, free_run=False)
    monkeypatch.setattr("kimi_linear.verify.MEMORY", 1)
    pieces = verify(model(golden_case), tokens, free_run=False)
    assert pieces.ok and pieces.taps[:-1] == whole.taps[:-1]
    assert pieces.taps[-1].name == "logits" and any("the last 1 of 21 tokens" in note for note in pieces.notes)


def test_progress_and_bad_input(kimi_a):
    seen = []
    verify(model(kimi_a), [1, 2, 3], progress=lambda done, total, tap: seen.append((done, total, tap)))
    assert (
        [s[0] for s in seen] == sorted(s[0] for s in seen)
        and seen[0][2] == "embed"
        and seen[-1][2] == "logits"
    )
    assert all(done < total for done, total, _ in seen)
    with pytest.raises(ValueError, match="tokens is empty"):
        verify(model(kimi_a), [])
    with pytest.raises(ValueError, match=r"tokens\[1\] is 320"):
        verify(model(kimi_a), [5, 320])


def test_how_it_looks(kimi_a):
    report = verify(model(kimi_a), tokens_of(kimi_a, "short"))
    text = report.render()
    assert "\033" not in text and "\033[32m" in report.render(colour=True)
    assert report.render(ascii_only=True).isascii()
    assert all(len(line) < 130 for line in text.splitlines())
    every = report.render(all_taps=True)
    assert all(name in every for name in model(kimi_a).taps)
    report.model = "<script>"
    assert "&lt;script&gt;" in report._repr_html_() and "<script>" not in report._repr_html_()
    import json

    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] and len(plain["taps"]) == len(report.taps) and plain["ops"][0]["share"] <= 1
