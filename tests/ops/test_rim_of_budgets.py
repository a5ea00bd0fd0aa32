"""Inputs at the rim, where a bound needs a term that elsewhere does not show: underflow between two factors, elements
that are small in a huge row, scores of which u is a nat."""

import numpy as np
import pytest
from judge import everywhere, judge, normal

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

CONTEXTS = [kl.Context(threads=1)]
if any(d.name == "hip-host" and d.available for d in kl.devices()):
    CONTEXTS.append(kl.Context(device="hip-host"))


def holds(op, **inputs):
    """The op, on every instruction set and on a device, within its budget."""
    ref = getattr(kl.reference, op)(**inputs)
    judge(op, everywhere(lambda ctx: getattr(kl.ops, op)(**inputs, ctx=ctx)), ref, **inputs)
    for ctx in CONTEXTS:
        judge(op, getattr(kl.ops, op)(**inputs, ctx=ctx), ref, **inputs)


def f32(*values):
    return np.array(values, np.float32)


def test_scores_of_residuals_of_which_u_is_a_nat():
    """The candidate that the softmax takes may be the other one: the bound is how far apart they lie."""
    x, w = normal(3, 64), np.full(64, 1e7, np.float32)
    inputs = dict(snapshots=np.stack([x[:, ::-1], normal(3, 64, seed=1), -x]), x=x, w=w, eps=1e-6)
    holds("attn_res", **inputs)
    candidates = np.concatenate([inputs["snapshots"], x[None]])
    bound = budget("attn_res", kl.reference.attn_res(**inputs), **inputs)
    assert np.isfinite(bound).all() and (bound <= 1.01 * np.ptp(candidates, axis=0)).all()


@pytest.mark.parametrize("op", ["rms_norm", "l2_norm", "gated_rms_norm"])
@pytest.mark.parametrize("D", [3, 100, 600])
def test_what_is_small_in_a_row_whose_squares_overflow(op, D):
    x = normal(2, D) * np.float32(2.0) ** np.linspace(-56, 20, D, dtype=np.float32)
    x[:, -1] = 2.0**66
    inputs = dict(x=x, w=normal(D, seed=2), z=normal(2, D, seed=1), eps=1e-6)
    names = {"rms_norm": ("x", "w", "eps"), "l2_norm": ("x", "eps"), "gated_rms_norm": ("x", "z", "w", "eps")}[op]
    holds(op, **{n: inputs[n] for n in names})


def test_silu_that_underflows_before_it_meets_up():
    gate = f32(3e-45, -7e-45, 1e-41, -100, -95, 2.0**-126)
    holds("situ", gate=gate, up=np.full(6, 2.0**100, np.float32), beta=4.0)
    holds("situ", gate=gate, up=np.full(6, 2.0**100, np.float32), beta=2.0**100, linear_beta=2.0**110)
    holds("swiglu", gate=gate, up=np.full(6, 2.0**100, np.float32))
    holds("swiglu", gate=gate, up=np.full(6, 2.0**100, np.float32), limit=2.0**90)


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_norm_and_gate_that_underflow_before_they_meet(activation):
    x = np.zeros((3, 128), np.float32)
    x[:, 0], x[:, 1] = 1, f32(3e-44, 1e-40, 1e-44)
    z = np.full((3, 128), 1e25 if activation == "silu" else 20, np.float32)
    z[:, 0] = f32(-100, -95, -103)
    holds("gated_rms_norm", x=x, z=z, w=np.full(128, 4, np.float32), eps=1e-12, activation=activation)


def test_a_routing_weight_that_underflows_before_it_meets_the_scale():
    scores = np.full((400, 8), 20, np.float32)
    scores[:, 3] = np.linspace(-103, -98, 400)
    holds("route", scores=scores, k=8, scale=100.0)


def test_scores_of_which_u_is_a_nat():
    """24575 (20000 - 2^-9) lies 16 from its float32: a weight of e^-48 is computed as e^-32."""
    q, k = np.full((1, 1, 1), 24575, np.float32), f32(20000, 20000 - 2.0**-9).reshape(2, 1, 1)
    sizes = dict(scale=1.0, offsets=[0, 1], kv_offsets=[0, 2])
    holds("attention", q=q, k=k, v=f32(0, 1).reshape(2, 1, 1), **sizes)
    latent = np.stack([k[:, 0, 0], f32(0, 1)], axis=1)
    holds("latent_attention", q=np.append(q, np.zeros_like(q), axis=2), latent=latent, k_shared=np.zeros_like(k[:, 0]),
          w_uk=f32(1, 0).reshape(1, 1, 2), w_uv=f32(0, 1).reshape(1, 1, 2), **sizes)


def test_the_bound_of_attention_is_no_wider_than_its_values_lie_apart():
    q, k = np.full((1, 1, 4), 1e9, np.float32), np.ones((9, 1, 4), np.float32)
    inputs = dict(q=q, k=k, v=normal(9, 1, 4, seed=1), scale=1.0, offsets=[0, 1], kv_offsets=[0, 9])
    bound = budget("attention", kl.reference.attention(**inputs), **inputs)
    assert np.isfinite(bound).all() and (bound <= 1.01 * np.ptp(inputs["v"], axis=0)).all()


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_latents_that_are_subnormal(form):
    latent = f32(3, 5, 7, 11).reshape(4, 1) * np.float32(2.0**-149)
    inputs = dict(q=normal(4, 1, 2), latent=latent, k_shared=normal(4, 1), w_uk=normal(1, 1, 1),
                  w_uv=np.full((1, 2, 1), 2.0**100, np.float32), scale=1.0)
    ref = kl.reference.latent_attention(**inputs)
    for ctx in CONTEXTS:
        judge("latent_attention", kl.ops.latent_attention(**inputs, form=form, ctx=ctx), ref, **inputs)


def test_shared_experts_of_other_width_have_a_budget():
    x, ids, weights = normal(2, 5), np.array([[0], [0]], np.int32), np.ones((2, 1), np.float32)
    expert = normal(3, 5), normal(3, 5, seed=1), normal(5, 3)
    holds("moe", x=x, ids=ids, weights=weights, w_gate=expert[0][None], w_up=expert[1][None], w_down=expert[2][None],
          shared=expert, shared_gate=normal(1, 5))


def test_rows_above_one_that_overflows_keep_their_bound():
    T, K = 40, 4
    q, k, v = (normal(T, 1, K, seed=i) for i in range(3))
    k[12:] *= np.float32(1e17)
    inputs = dict(q=q, k=k, v=v, g=np.zeros((T, 1), np.float32), beta=np.ones((T, 1), np.float32), chunk=64)
    with np.errstate(all="ignore"):
        ref = kl.reference.delta_rule_intra(**inputs)
        got = kl.ops.delta_rule_intra(**inputs)
        bounds = budget("delta_rule_intra", ref, **inputs)
    for g, r, bound in zip(got, ref, bounds, strict=True):
        assert np.isfinite(bound[:12]).all() and (np.abs(g[:12] - r[:12]) <= bound[:12]).all()
