"""check_op on torch functions: transformers' own, and fla's formulas, each by its conventions."""

import types

import pytest
import torch
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import kimi_linear as kl
from kimi_linear.testing import check_op

torch.set_num_threads(1)

OVERFLOW = "in its l2 norm, the sum of squares overflows float32"
SUMS = "decays are formed by subtracting float32 sums of g over chunks of 64: digits are lost after a strong gate"
INFINITE = "NaN from -infinity minus -infinity, sums of g that are subtracted"
SPREADS = "NaN of one token reaches others: those before it, or those that do not read it"

RECURRENT = {"hf": kimi.recurrent_kimi_delta_attention, "hf-gdn": qwen.torch_recurrent_gated_delta_rule}
CHUNKED = {"hf": kimi.chunk_kimi_delta_attention, "hf-gdn": qwen.torch_chunk_gated_delta_rule}


@pytest.mark.parametrize("project", RECURRENT)
def test_transformers_recurrent_form_holds(project):
    """All but one case: keys of 1e25, whose squares leave float32."""
    card = check_op("delta_rule", RECURRENT[project], conventions=project)
    assert card.failing == ["norm-overflow"] and card["norm-overflow"].why == OVERFLOW, card
    assert all(r.share < 1 for r in card.rows if r.status == "holds" and r.share == r.share)
    other = "gate-head" if project == "hf" else "gate-channel"
    assert {"ragged", "scale-1", "grouped-1-4", "tiled-2-6", other, "gate-none", "out"} <= set(card.not_offered)


@pytest.mark.parametrize("project", CHUNKED)
def test_transformers_chunked_form_fails_the_rim_and_the_card_says_why(project):
    card = check_op("delta_rule", CHUNKED[project], conventions=project)
    assert not card
    failing = {row.group for row in card.rows if row.status == "fails"}
    assert failing == {"rim gates", "nan", "l2_norm"}, card
    held = {row.name for row in card.rows if row.status == "holds"}
    assert {"plain", "length-200", "carried-65", "split-37", "gate-5", "beta-2", "keys-equal"} <= held
    reasons = {says.partition(": chunk ")[0]: names for says, names in card.reasons}
    assert reasons.keys() == {OVERFLOW, SUMS, INFINITE, SPREADS}, card
    assert {"strong-then-weak", "some-100", "some-1e4"} <= set(reasons[SUMS])
    assert {"gate-inf", "one-inf", "every-gate-65"} <= set(reasons[INFINITE])
    assert len(reasons[SPREADS]) == 5 and all(name.startswith("nan-") for name in reasons[SPREADS])
    assert all(row.why for row in card.rows if row.status == "fails")
    assert SUMS in card.verdict or SPREADS in card.verdict


def test_torchs_layer_norm_holds():
    """All but one case: rows of 1e25, whose squares leave float32."""
    card = check_op("layer_norm", torch.nn.functional.layer_norm, conventions="hf")
    assert {name: card[name].why for name in card.failing} == {"overflow": "the sum of squares overflows float32"}, card


@pytest.mark.parametrize("module, experts, says", [
    ("glm5_next", "Glm5NextTextExperts", []),
    ("step3p7", "Step3p7Experts", ["of the limit: silu(gate) is cut, not gate"]),
])
def test_limits_of_transformers(module, experts, says):
    """GLM-5.3-Flash cuts gate and up, Step 3.7 silu(gate) and up."""
    modeling = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    gated = getattr(modeling, experts)._apply_gate

    def fn(gate_up, swiglu_limit):
        of = types.SimpleNamespace(swiglu_limit=swiglu_limit, limit=swiglu_limit, act_fn=torch.nn.functional.silu)
        return gated(of, gate_up)

    card = check_op("swiglu", fn, conventions="hf", cases="limit")
    assert bool(card) == (not says) and [reason for reason, _ in card.reasons] == says, card


# ---- fla's conventions, written from the formula ---------------------------------------------------


def unit(x):
    x = x * torch.where(x.abs().amax(-1, keepdim=True) > 1e15, 2.0**-64, 1.0)
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def naive(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
          cu_seqlens=None):
    """[B, T, H, n] tensors, a state [N, H, K, V]; g of a channel or, without the last axis, of a head."""
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    B, T, H, K = q.shape
    groups = v.shape[2] // H
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    q = q * (K**-0.5 if scale is None else scale)
    g = g if g.dim() == 4 else g[..., None]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    states = torch.zeros(len(bounds) - 1, v.shape[2], K, v.shape[3])
    if initial_state is not None:
        states = states + initial_state
    o = torch.empty_like(v)
    for n, (first, last) in enumerate(zip(bounds, bounds[1:])):
        S = states[n]
        for t in range(first, last):
            S = S * g[0, t].exp()[..., None]
            d = beta[0, t][:, None] * (v[0, t] - torch.einsum("hkv,hk->hv", S, k[0, t]))
            S = S + k[0, t][..., None] * d[:, None]
            o[0, t] = torch.einsum("hkv,hk->hv", S, q[0, t])
        states[n] = S
    return o, states if output_final_state else None


@pytest.mark.parametrize("project", ["fla", "fla-gdn"])
def test_flas_formula_holds(project):
    card = check_op("delta_rule", naive, conventions=project)
    assert card, card
    assert {"ragged-carried", "scale-0.37", "grouped-2-6", "norm-small"} <= {
        r.name for r in card.rows if r.status == "holds"}


def test_a_state_with_values_first():
    """fla's state_v_first, and vLLM."""
    def v_first(initial_state=None, **x):
        o, state = naive(initial_state=None if initial_state is None else initial_state.transpose(-1, -2), **x)
        return o, state.transpose(-1, -2)

    assert check_op("delta_rule", v_first, conventions=kl.conventions["fla"]["delta_rule"].but(state="VK"))
    assert check_op("delta_rule", v_first, conventions="vllm")
    card = check_op("delta_rule", v_first, conventions="fla", cases=["lengths", "carried"])
    assert card.reasons[0][0] == "the state lies as [V, K]: initial and final state have K and V swapped"


def test_what_a_tensor_function_writes_is_seen():
    def writes(k, **x):
        k.mul_(2)
        return naive(k=k, **x)

    card = check_op("delta_rule", writes, conventions="fla", cases="plain")
    assert card["plain"].detail == "its input k was changed first at [0, 0, 0, 0]"


def test_other_array_makers():
    def numpy_naive(**x):
        given = {n: torch.from_numpy(a) if hasattr(a, "shape") else a for n, a in x.items()}
        return tuple(r.numpy() for r in naive(**given))

    assert check_op("delta_rule", numpy_naive, conventions="fla", arrays="numpy", cases="carried")
    assert check_op("delta_rule", naive, conventions="fla", arrays="torch:cpu", cases="lengths")
    assert check_op("delta_rule", naive, conventions="fla", arrays=torch.tensor, cases="lengths")


# ---- every other op --------------------------------------------------------------------------------


def qwen_norm(x, weight, eps):
    norm = qwen.Qwen3NextRMSNorm(x.shape[-1], eps)
    norm.weight.data = weight
    return norm(x).detach()


def qwen_gated_norm(hidden_states, gate, weight, eps):
    norm = qwen.Qwen3NextRMSNormGated(weight.shape[0], eps)
    norm.weight.data = weight
    return norm(hidden_states, gate).detach()


def qwen_l2_norm(x, eps):
    return qwen.l2norm(x, -1, eps)


SQUARES = "the sum of squares overflows float32"
SIGMOID = "1 / (1 + exp(-x)) in float32: a sigmoid of 0 below -88.7"


@pytest.mark.parametrize("op, project, fn, failing", [
    ("embedding", "hf", torch.nn.functional.embedding, {}),
    ("linear", "hf", torch.nn.functional.linear, {}),
    ("softmax", "hf", torch.nn.functional.softmax, {}),
    ("rms_norm", "hf", torch.nn.functional.rms_norm, {"overflow": SQUARES}),
    ("rms_norm", "hf-gdn", qwen_norm, {"overflow": SQUARES}),
    ("gated_rms_norm", "hf-gdn", qwen_gated_norm, {"overflow": SQUARES, "closed": SIGMOID, "closed-silu": SIGMOID}),
    ("l2_norm", "ours", qwen_l2_norm, {"overflow": SQUARES}),
])
def test_functions_of_torch_and_transformers(op, project, fn, failing):
    """They hold but for the rim that their formulas leave float32 on, and the card says so."""
    card = check_op(op, fn, conventions=project, arrays="torch")
    assert {name: card[name].why for name in card.failing} == failing, card
    assert len([r for r in card.rows if r.status == "holds"]) >= 19


# ---- gradients, by autograd -------------------------------------------------------------------------


def convolved(x, w, history=None, offsets=None, activation="silu"):
    """torch's conv1d, behind the history."""
    if offsets is not None:
        raise NotImplementedError("offsets")
    before = torch.zeros(w.shape[1] - 1, x.shape[1]) if history is None else history
    y = torch.nn.functional.conv1d(torch.cat([before, x]).T[None], w[:, None], groups=len(w))[0].T
    return torch.nn.functional.silu(y) if activation else y


def gated(x, z, w, eps, activation="sigmoid"):
    gate = torch.sigmoid if activation == "sigmoid" else torch.nn.functional.silu
    return torch.nn.functional.rms_norm(x, w.shape, w, eps) * gate(z)


def decay(f, rate, dt_bias, lower_bound=None):
    x, rate = f + dt_bias, rate.reshape(-1, *[1] * (dt_bias.ndim - 1))
    return -rate * torch.nn.functional.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)


def backward(forward, *names):
    """A gradient as autograd has it; of a history that is not there, that of zeros."""
    def fn(**x):
        dy = x.pop("dg" if "dg" in x else "dy")
        if "history" in names and x.get("history") is None:
            x["history"] = torch.zeros(x["w"].shape[1] - 1, len(x["w"]))
        given = [x[n].requires_grad_() for n in names]
        return torch.autograd.grad(forward(**x), given, dy, materialize_grads=True)

    return fn


CUBED = "r^3 underflows float32: the projection is lost, or its digits"


@pytest.mark.parametrize("op, fn, failing", [
    ("rms_norm_backward", backward(lambda x, w, eps: torch.nn.functional.rms_norm(x, w.shape, w, eps), "x", "w"),
     {"overflow": SQUARES, "huge": CUBED}),
    ("gated_rms_norm_backward", backward(gated, "x", "z", "w"),
     {"overflow": SQUARES, "huge": CUBED, "closed-sigmoid": SIGMOID, "closed-silu": SIGMOID}),
    ("l2_norm_backward", backward(lambda x, eps: qwen.l2norm(x, -1, eps), "x"), {"overflow": SQUARES, "huge": CUBED}),
    ("short_conv_backward", backward(convolved, "x", "w", "history"), {}),
    ("decay_gate_backward", backward(decay, "f", "rate", "dt_bias"), {"bounded-mixed": SIGMOID}),
    ("swiglu_backward", backward(lambda gate, up: torch.nn.functional.silu(gate) * up, "gate", "up"),
     {"vanishing": SIGMOID}),
])
def test_gradients_of_autograd(op, fn, failing):
    """They hold but for the rim that their formulas leave float32 on, and the card says so."""
    card = check_op(op, fn, arrays="torch", without=["out", "T = 0"])
    assert {name: card[name].why for name in card.failing} == failing, card
    assert len([r for r in card.rows if r.status == "holds"]) >= 22


# ---- narrow types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("project", RECURRENT)
def test_transformers_forms_hold_in_narrow_types(project, dtype):
    """They compute in float32 and give the type that they were given."""
    for forms in (RECURRENT, CHUNKED):
        card = check_op("delta_rule", forms[project], conventions=project, dtype=dtype,
                        cases=["lengths", "carried", "widths", "gates", "beta", "laws"])
        assert card and card.dtype == str(dtype).removeprefix("torch."), card


def test_a_torch_module_in_bfloat16():
    seen = set()

    def module(x, w, eps):
        seen.update((x.dtype, w.dtype))
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        return w * y.to(x.dtype)

    named = dict(arrays="torch", cases=["lengths", "widths", "values", "eps"])
    assert check_op("rms_norm", module, dtype=torch.bfloat16, **named)
    assert seen == {torch.bfloat16}
    half = check_op("rms_norm", lambda x, w, eps: module(x.bfloat16(), w.bfloat16(), eps), **named)
    assert not half and "bfloat16" in half.verdict and half.dtype == "float32"
