"""Gradients beside torch's own differentiation: the reference to float64, and functions of torch as kernels of them."""

import numpy as np
import pytest
import torch
from test_check_op_torch import CHUNKED, OVERFLOW, RECURRENT, SUMS

import kimi_linear as kl
from kimi_linear.reference_delta import key_heads
from kimi_linear.testing import autograd, check_op, spec

OP = "delta_rule_backward"
CUBED = "through the l2 norm, its inverse cubed underflows float32"


def recurrence(q, k, v, g, beta, initial_state=None, scale=None, cu_seqlens=None, output_final_state=True,
               use_qk_l2norm_in_kernel=False):
    """fla's conventions, in the type of the arguments, and nothing written in place."""
    if use_qk_l2norm_in_kernel:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    (_, T, H, K), (Hv, V) = q.shape, v.shape[2:]
    q, k = (x.repeat_interleave(Hv // H, dim=2) for x in (q, k))
    q, a = q * (K**-0.5 if scale is None else scale), (g if g.dim() == 4 else g[..., None]).exp()
    bounds = [0, T] if cu_seqlens is None else [int(n) for n in cu_seqlens]
    o, states = [v[0, :0]], []
    for n, ends in enumerate(zip(bounds, bounds[1:])):
        S = v.new_zeros(Hv, K, V) if initial_state is None else initial_state[n]
        for t in range(*ends):
            S = S * a[0, t][..., None]
            d = beta[0, t][:, None] * (v[0, t] - torch.einsum("hkv,hk->hv", S, k[0, t]))
            S = S + k[0, t][..., None] * d[:, None]
            o.append(torch.einsum("hkv,hk->hv", S, q[0, t])[None])
        states.append(S)
    return torch.cat(o)[None], torch.stack(states)


@pytest.mark.parametrize("case", [c.name for c in spec(OP).cases if c.steps is None and "T = 0" not in c.needs])
def test_the_reference_is_torchs_gradient(case):
    """Of the recurrence in float64, in every case."""
    x = next(c for c in spec(OP).cases if c.name == case).make("channel")
    (Hk, K), (Hv, V) = x["q"].shape[1:], x["v"].shape[1:]
    x.setdefault("initial_state", np.zeros((len(x.get("offsets", [0, 0])) - 1, Hv, K, V)))
    leaves = {n: torch.from_numpy(np.float64(x[n])).requires_grad_()
              for n in ("q", "k", "v", "g", "beta", "initial_state")}
    given = {n: a.reshape(-1, Hv, K, V) if n == "initial_state" else a[None] for n, a in leaves.items()}
    of = key_heads(Hk, Hv, x.get("head_map", "grouped"))
    given |= {n: given[n][:, :, of] for n in "qk"}
    o, state = recurrence(**given, scale=x.get("scale"), cu_seqlens=x.get("offsets"),
                          use_qk_l2norm_in_kernel=x.get("l2_norm", False))
    loss = (o[0] * torch.from_numpy(np.float64(x["do"]))).sum()
    if "dstate" in x:
        loss = loss + (state * torch.from_numpy(np.float64(x["dstate"])).reshape(state.shape)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, a, r in zip(spec(OP).results, found, kl.reference.delta_rule_backward(**x), strict=True):
        a = a.numpy().reshape(r.shape)
        assert np.abs(a - r).max() <= 1e-12 * np.abs(a).max(), name


@pytest.mark.parametrize("project", RECURRENT)
def test_transformers_recurrent_form_holds(project):
    """All but keys of 1e25, and of 1e15 where rsqrt is differentiated: that cubes its result, which is subnormal."""
    card = check_op(OP, autograd(RECURRENT[project]), conventions=project)
    assert card.failing == ["norm-huge", "norm-overflow"][project == "hf":], card
    assert card["norm-overflow"].why == OVERFLOW and card["norm-huge"].why == ("" if project == "hf" else CUBED), card
    assert {"ragged", "scale-1", "grouped-1-4"} <= set(card.not_offered)


@pytest.mark.parametrize("project", CHUNKED)
def test_transformers_chunked_form_fails_the_rim_and_the_card_says_why(project):
    card = check_op(OP, autograd(CHUNKED[project]), conventions=project, without=["-inf"])
    assert {"plain", "length-200", "carried-65", "split-37", "gate-5-long", "keys-equal"} <= {
        row.name for row in card.rows if row.status == "holds"}
    reasons = dict(card.reasons)
    assert reasons.keys() - {CUBED} == {OVERFLOW, SUMS} and ("norm-huge" in reasons.get(CUBED, ())) == (project != "hf")
    assert all(row.why for row in card.rows if row.status == "fails"), card
    assert {"strong-then-weak", "some-1e4"} <= set(reasons[SUMS])


def test_a_function_without_a_graph_is_told():
    def detached(**x):
        return tuple(y.detach() for y in recurrence(**x))

    card = check_op(OP, autograd(detached), conventions="fla", cases="plain")
    assert "no result requires a gradient: torch has recorded no graph" in card["plain"].detail
    with pytest.raises(TypeError, match=r"grads is 'dy'; it must be a list of names: \['dy'\]"):
        autograd(recurrence, "dy")
    with pytest.raises(TypeError, match="fn is a int; it must be callable"):
        autograd(3)


def test_what_is_not_differentiated_is_zero():
    def detached(initial_state=None, **x):
        return recurrence(initial_state=None if initial_state is None else initial_state.detach(), **x)

    assert check_op(OP, autograd(recurrence), conventions="fla", without=["tiled heads"])["plain"].status == "holds"
    card = check_op(OP, autograd(detached), conventions="fla", cases=["lengths", "carried", "gates"])
    assert card.reasons[0][0] == "the initial state's gradient is zero", card
    assert "plain" not in card.failing
