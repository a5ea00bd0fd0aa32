"""mlx-lm and this engine on the same folders: every module, caches, steps, batches; and check_op on MLX's functions.

Float32 on MLX's CPU backend. mlx-lm reads the packaged model and Kimi K3's folders by its own loader. Folders that
transformers wrote spell a dense layer otherwise than the published checkpoint, and their config.json lacks keys that
mlx-lm asks for: their tensors are handed over by the published names, with our config.
"""

import dataclasses
import functools
import importlib
import json

import live
import numpy as np
import oracle
import pytest
from conftest import DATA, K3_CASES, PROMPTS, read_safetensors
from one_ulp import noise
from oracle import near, tokens

import kimi_linear as kl
from kimi_linear.adapters import mlx as adapter
from kimi_linear.diff import blame, traces
from kimi_linear.testing import check_op

NOT_HERE = "mlx and mlx-lm are not installed: they are in the extra `oracles` on Linux, x86-64"
mx, nn, activations, gated_delta, kimi_k3, utils = (pytest.importorskip(name, reason=NOT_HERE) for name in (
    "mlx.core", "mlx.nn", "mlx_lm.models.activations", "mlx_lm.models.gated_delta", "mlx_lm.models.kimi_k3",
    "mlx_lm.utils"))

mx.set_default_device(mx.cpu)

T = 150                                     # two chunks of 64, and a part
U = 2.0**-24
KIMI = ("tiny", "kimi-a", "one-expert", "all-dense", "tied", "plain-groups")
QWEN = ("qwen-a", "next-1")
CASES = KIMI + QWEN + K3_CASES
UNSEEN = {"kda.g", "gdn.g", "moe.shared_gated"}


@functools.cache
def ours(case):
    """With the eps that mlx-lm has for a latent, which is that of the other norms, save in K3."""
    config = oracle.ours(case).config
    eps = config.latent_eps if case in K3_CASES else config.rms_norm_eps
    return kl.Model.from_pretrained(oracle.folder(case), latent_eps=eps)


def missing_keys(case):
    c = ours(case).config
    if case in KIMI:
        return {"rope_theta": 1e4}          # not used
    attention = next(i for i, spec in enumerate(c.layers) if spec.mixer == "attn")
    return {"rope_theta": c.rope_base, "partial_rotary_factor": c.rotary_dim / c.attn_head_dim,
            "full_attention_interval": attention + 1}


@functools.cache
def theirs(case):
    """The case's model in mlx-lm, float32 on the file's values."""
    if case == "tiny" or case in K3_CASES:
        model, _ = utils.load_model(oracle.folder(case))
    else:
        file = json.loads((oracle.folder(case) / "config.json").read_text())
        config = file | ours(case).config.to_dict() | missing_keys(case)
        kind, arguments = utils._get_classes(config)
        model = kind(arguments.from_dict(config))
        weights = {}
        for name, x in mx.load(str(oracle.folder(case) / "model.safetensors")).items():
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = name.replace(f"block_sparse_moe.{part}", f"mlp.{part}")
            weights[name] = x
        model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.set_dtype(mx.float32)
    return model.eval()


def run(case, ids, cache=None):
    return np.array(theirs(case)(mx.array(ids), cache=cache))


# ---- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, T])
@pytest.mark.parametrize("case", CASES)
def test_every_module_and_cache(case, length):
    """Their float32 against our float32 and our float64, each expert as they chose it."""
    ids = tokens(case, length)
    want = adapter.trace(theirs(case), ids, state=True)
    model, state = ours(case), ours(case).new_state()
    _, got = model.forward(ids, state=state, taps="*", expert_ids=live.experts(want))
    lacking = {n.split(".", 2)[-1] for n in (set(model.taps) | set(state)) - set(want)}
    assert set(want) <= set(model.taps) | set(state) and lacking <= UNSEEN | {"moe.weights"}
    assert ("moe.weights" in lacking) == (case in QWEN)
    floats = [n for n in want if not n.endswith("moe.ids")]
    live.assert_all_near(dict(got) | dict(state.items()), want, floats)
    reference = model.reference().forward(ids, taps="*", expert_ids=live.experts(want))
    live.assert_all_near(reference.taps | reference.state, want, floats)


@pytest.mark.parametrize("case", CASES)
def test_free_run(case):
    """The same experts wherever float32 can tell them apart, then the same logits."""
    ids = tokens(case, 64, seed=1)
    want = adapter.trace(theirs(case), ids)
    live.same_experts_and_logits(ours(case), want, ids)


@pytest.mark.parametrize("case", CASES)
def test_step_by_step(case):
    """A prompt, then one token at a time, where mlx-lm multiplies queries instead of latents."""
    ids = tokens(case, 30, seed=2)
    cuts = [0, 21, *range(22, 31)]
    cache, state = theirs(case).make_cache(), ours(case).new_state()
    for a, b in zip(cuts, cuts[1:]):
        near(ours(case).forward(ids[a:b], state=state), run(case, ids[None, a:b], cache)[0], f"logits of {a}..{b}")
    found = {}
    for i, layer in enumerate(cache):
        found |= adapter._state_of(layer, i, ours(case).config)
    assert set(found) == set(state)
    live.assert_all_near(dict(state.items()), found, found)


@pytest.mark.parametrize("case", CASES)
def test_batch_of_two(case):
    """Of one length, with a cache and one step more."""
    ids = np.stack([tokens(case, 33, seed=s) for s in (3, 4)])
    cache, states = theirs(case).make_cache(), [ours(case).new_state() for _ in ids]
    for part in (ids[:, :32], ids[:, 32:]):
        for want, got in zip(run(case, part, cache), ours(case).forward(list(part), state=states)):
            near(got, want, "logits")


def test_what_mlx_lm_has_for_eps_of_a_latent():
    """That of the other norms; ours is the training code's 1e-6, and the difference is not rounding."""
    model, ids = oracle.ours("kimi-a"), tokens("kimi-a", 20)
    want = adapter.trace(theirs("kimi-a"), ids)
    assert (model.config.latent_eps, model.config.rms_norm_eps) == (1e-6, 1e-5)
    assert model.config.latent_eps == kl.Model.tiny().config.latent_eps
    wrong = blame(model, want).wrong
    assert {r.tap for r in wrong} == {n for n in want if n.endswith("mla.latent")}
    assert all("eps" in r.kind for r in wrong), wrong


@pytest.mark.parametrize("length", [5, T])
@pytest.mark.parametrize("case", K3_CASES)
def test_kimi_k3_is_within_its_conditioning(case, length):
    """SiTU is driven to its bounds, and what is off grows on the way. Of every tap and cache: 4 times what one float32
    unit on each tap does to the float64 model, as tests/model/test_verify.py has it for our engine; rms and largest.
    Measured over three seeds: 0.36 of that in rms, 0.78 of the largest."""
    ids = tokens(case, length)
    want, model = adapter.trace(theirs(case), ids, state=True), ours(case).reference()
    exact = model.forward(ids, taps="*", expert_ids=live.experts(want))
    moved = noise(model, ids, exact)
    for name, x in (exact.taps | exact.state).items():
        if name in want and not name.endswith("moe.ids"):
            near(want[name], x, name, rms=max(5e-6, 4 * moved[name][0]), largest=max(1e-4, 4 * moved[name][1]))


@pytest.mark.parametrize("case", ["tiny", "kimi-a", "qwen-a", *K3_CASES])
def test_diff_and_blame_of_theirs(case, monkeypatch):
    """No divergence, and nothing to blame; then both, by name, when a gate of one layer of theirs is another."""
    ids = tokens(case, 70)
    mine, right = ours(case).trace(ids), adapter.trace(theirs(case), ids)
    assert traces(mine, right).ok
    found = blame(ours(case), right)
    assert not found.wrong and len(found.rows) > 90, found
    at, kind = ("linear_attn", "gdn") if case in QWEN else ("self_attn", "kda")
    i = next(i for i, spec in enumerate(ours(case).config.layers) if i >= 2 and spec.mixer == kind)
    mixer = theirs(case).layers[i][at]
    monkeypatch.setitem(mixer, "dt_bias", mixer.dt_bias + 0.5)                     # a module is a dict
    wrong = adapter.trace(theirs(case), ids)
    assert traces(mine, wrong).first.tap == f"layers.{i}.{kind}.o"
    assert [r.tap for r in blame(ours(case), wrong).wrong] == [f"layers.{i}.{kind}.o"]


def test_a_known_fault_is_named(monkeypatch):
    """beta is 2 sigmoid(b), which mlx-lm has as an option."""
    ids, real = tokens("tiny", 40), gated_delta.gated_delta_update
    module = importlib.import_module(type(theirs("tiny")).__module__)
    monkeypatch.setattr(module, "gated_delta_update", functools.partial(real, allow_neg_eigval=True))
    wrong = blame(ours("tiny"), adapter.trace(theirs("tiny"), ids)).wrong
    assert {r.tap.split(".", 2)[-1] for r in wrong} == {"kda.beta"}
    assert all(r.kind != "unknown" for r in wrong), wrong


def test_swiglu_in_place_of_situ_is_named(monkeypatch):
    """In one layer's experts, and then everywhere."""
    def swiglu(up, gate, *betas):
        return activations.swiglu(gate, up)

    with monkeypatch.context() as patch:
        patch.setitem(theirs("k3-a").layers[4].mlp.switch_mlp, "activation", swiglu)
        assert kinds_of_wrong("k3-a") == {"layers.4.moe.routed": "experts_swiglu"}
    monkeypatch.setattr(kimi_k3, "_situ", swiglu)
    taps = {"mlp.act": "situ_of_swiglu", "moe.shared_act": "situ_of_swiglu", "moe.routed": "experts_swiglu"}
    assert kinds_of_wrong("k3-a") == {n: taps[kind] for n in ours("k3-a").taps if (kind := n.split(".", 2)[-1]) in taps}


def test_attention_residuals_without_a_norm_are_named(monkeypatch):
    """Everywhere but in the first, whose mixture is of one."""
    def unnormed(raw, inv_rms, x, w, eps):
        every = mx.concatenate([raw, x[None]])
        return (mx.softmax(every @ w, axis=0)[..., None] * every).sum(axis=0)

    monkeypatch.setattr(kimi_k3, "_attn_res_combine", unnormed)
    mixtures = [n for n in ours("k3-a").taps if n.endswith("_res")]
    assert kinds_of_wrong("k3-a") == dict.fromkeys(mixtures[1:], "attn_res_scores_unnormed")


def kinds_of_wrong(case):
    return {r.tap: r.kind for r in blame(ours(case), adapter.trace(theirs(case), tokens(case, 40))).wrong}


@pytest.mark.parametrize("case", K3_CASES)
def test_a_single_token_as_on_metal(case, monkeypatch):
    """There K3 compiles that step, inside of which no array has a value: it is run as it is written."""
    model, ids = theirs(case), tokens(case, 1)
    want = adapter.trace(model, ids, state=True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    got = adapter.trace(model, ids, state=True)
    assert set(got) == set(want) and all(np.array_equal(got[n], want[n]) for n in want)
    assert all(layer.self_attn._step is None for layer in model.layers if layer.is_linear)


@pytest.mark.parametrize("case", ["tiny", "qwen-a", *K3_CASES])
def test_config_of(case):
    """As the folder has it, save what mlx-lm does not keep."""
    lost = ("bos_token_id", "eos_token_ids", "pad_token_id", "max_length")
    config = oracle.ours(case).config
    found = dataclasses.replace(adapter.config_of(theirs(case)), **{name: getattr(config, name) for name in lost})
    assert found == config


def test_adapter():
    """Globs, types and meta of a trace; other models of the same classes are not in it; what is refused."""
    model, ids = theirs("kimi-a"), tokens("kimi-a", 7)
    calls = {kind: kind.__call__ for kind in {type(m) for m in model.modules()}}
    whole = adapter.trace(model, ids)
    part = adapter.trace(model, ids, ["layers.3.mla", "layers.1.moe.ids", "logits"])
    assert set(part) == {n for n in whole if n.startswith("layers.3.mla.")} | {"layers.1.moe.ids", "logits"}
    assert all(np.array_equal(part[n], whole[n]) for n in part)
    assert whole["layers.1.moe.ids"].dtype == np.int32 and whole["logits"].dtype == np.float32
    assert whole.meta["tokens"] == ids.tolist() and whole.meta["source"] == "mlx-lm"
    assert whole.meta["dtype"] == "float32" and "layers.0.kda.state" not in whole
    with pytest.raises(ValueError, match="'layers.9' matches no tap"):
        adapter.trace(model, ids, "layers.9")
    with pytest.raises(ValueError, match="it must be a Model of mlx_lm.models.kimi_linear"):
        adapter.trace(nn.Linear(2, 2), ids)
    assert calls == {kind: kind.__call__ for kind in calls}


def test_the_limits_are_those_of_two_float32_engines():
    """An error of one tap in a thousand parts is found: the measure is able to fail."""
    ids = tokens("kimi-a", 20)
    want = adapter.trace(theirs("kimi-a"), ids, "layers.*.out")
    with pytest.raises(AssertionError, match="layers.2.out"):
        live.assert_all_near({n: x * (1.001 if n == "layers.2.out" else 1) for n, x in want.items()}, want, want)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", K3_CASES)
def test_mlx_lm_reads_the_golden_folders_of_kimi_k3(case, prompt):
    """By its own loader, MXFP4 as stored, float32: what make_golden_mlx.py got of numbers that it unpacked itself."""
    folder = DATA / "golden" / case
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    golden = read_safetensors(folder / "golden64.safetensors")
    ids = golden[f"{prompt}/tokens"][None]
    near(np.array(model(mx.array(ids)))[0], golden[f"{prompt}/logits"], "logits")
    assert ("Quantized" in type(model.layers[-1].mlp.switch_mlp.up_proj).__name__) == (case == "k3-a")


# ---- ops -------------------------------------------------------------------------------------------


def conv1d(x, weight):
    channels, taps, _ = weight.shape
    layer = nn.Conv1d(channels, channels, taps, groups=channels, bias=False)
    layer.weight = weight
    return layer(x)


def unit_k(x, eps):
    return gated_delta.normalize_qk(x, x, inv_scale=x.shape[-1] ** -0.5, eps=eps)[1]


SQUARES = "the sum of squares overflows float32"
EXPONENT = "exp(x) as 2^(x log2 e), the product rounded to float32: |x| u of a small sigmoid"
SIGMOID = "1 / (1 + exp(-x)) in float32: a sigmoid of 0 below -88.7"
EMPTY = "raised ValueError"
FAILING = {
    "rms_norm": {"overflow": SQUARES},
    "l2_norm": {"overflow": SQUARES},
    "layer_norm": {"overflow": SQUARES},
    "softmax": {"steep": "results below 2^-126 are 0"},
    "swiglu": {"large": EXPONENT, "negative": EXPONENT, "vanishing": SIGMOID},
    "situ": {"vanishing": SIGMOID},
    "attn_res": {"overflow": SQUARES.replace("squares", "squares of the running sum")},
    "short_conv": {"length-0": EMPTY, "carried-0": EMPTY},
    "attention": {"nan-v": "NaN of one row reaches others"},
    "delta_rule": {"length-0": EMPTY, "carried-0": EMPTY},
}


@pytest.mark.parametrize("op, fn, conventions", [
    ("layer_norm", mx.fast.layer_norm, "mlx"),
    ("rms_norm", mx.fast.rms_norm, "mlx"), ("softmax", nn.softmax, "mlx"), ("swiglu", activations.swiglu, "mlx"),
    ("short_conv", conv1d, "mlx"), ("attention", mx.fast.scaled_dot_product_attention, "mlx"),
    ("delta_rule", gated_delta.gated_delta_ops, "mlx"), ("l2_norm", unit_k, "ours"),
    ("situ", kimi_k3._situ, "mlx"), ("attn_res", kimi_k3._attn_res_combine, "mlx"),
])
def test_functions_of_mlx(op, fn, conventions):
    """They hold but for what docs/check-your-kernel.md#mlx lists, and the card says why where it knows."""
    card = check_op(op, fn, conventions=conventions, arrays="mlx")
    assert {name: card[name].why.partition(":")[0] for name in card.failing} == {
        name: why.partition(":")[0] for name, why in FAILING[op].items()}, card
    assert len([r for r in card.rows if r.status == "holds"]) >= 18


def test_every_convention_of_mlx_is_judged():
    forward = {op for op in kl.conventions["mlx"] if not op.endswith("_backward")}  # gradients: test_gradients_torch.py
    assert forward == FAILING.keys() - {"l2_norm"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_delta_rule_holds_in_narrow_types(dtype):
    card = check_op("delta_rule", gated_delta.gated_delta_ops, conventions="mlx", dtype=dtype, without=["T = 0"])
    assert card and card.dtype == dtype, card


def f32(x):
    return mx.array(np.asarray(x, np.float32))


def test_the_exponential_of_the_cpu_backend():
    """2^p(x log2 e): the rounded product, and log2 e in float32, make 1.25 |x| u; a polynomial 3 u."""
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    error = np.abs(np.array(mx.exp(f32(x))).astype(np.float64) / np.exp(x.astype(np.float64)) - 1) / U
    assert (error <= 1.25 * np.abs(x) + 3).all() and error.max() > 60 and error[np.abs(x) < 1].max() < 3
    assert np.array(mx.exp(f32([-88.1, 88.1, -np.inf, np.inf]))).tolist() == [0, np.inf, 0, np.inf]


@pytest.mark.parametrize("bound", [None, -5.0])
def test_decays(bound):
    """exp(g) of both gates. Relative to g: an exponential of A_log, at most 2.78, a sum f + dt, which is off by u of
    the larger, and a softplus or sigmoid, whose exponential is of that sum; then exp(g) itself."""
    rng = np.random.default_rng(20261123)
    f, dt = (4 * rng.standard_normal((40, 3, 16))).astype(np.float32), rng.uniform(-4, -1, (3, 16)).astype(np.float32)
    a_log = np.log(rng.uniform(1, 16, (3, 1))).astype(np.float32)
    rate = np.exp(a_log[:, 0].astype(np.float64))
    arrays = f32(a_log), f32(f[None]), f32(dt)
    got = gated_delta.compute_g(*arrays) if bound is None else gated_delta.compute_lower_bound_g(*arrays, bound)
    g = kl.reference.decay_gate(f, rate, dt, lower_bound=bound)
    x = (np.abs(f) + np.abs(dt)) * (1 if bound is None else rate[:, None])
    of_g = 1.25 * (2.78 + x) + 3 * 3 + 4 + x            # in u: two exponentials, products, the sum inside the second
    of_alpha = np.abs(g) * (of_g + 1.25) + 3
    known = g > -80                                     # below, exp has other limits
    error = np.abs(np.array(got)[0] / np.exp(g) - 1) / U
    assert known.mean() > 0.9 and (error <= of_alpha)[known].all()
    assert (np.array(got)[0][g < -90] == 0).all()
