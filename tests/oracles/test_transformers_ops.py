"""transformers' own torch functions as oracles of the ops, both beside float64.

Ours must stay within the op's budget. A budget counts the roundings of our order of sums; a sum of n terms in any
order has at most n - 1 where 16 lanes have n / 16 and a few, so theirs must stay within ANY_ORDER = 16 budgets:
a wrong formula is further off by many powers of ten.
"""

import numpy as np
import pytest
import torch
from oracle import ours, t, tokens, within
from transformers.models.glm5_next import modeling_glm5_next as glm
from transformers.models.kimi_linear import modeling_kimi_linear as modeling

import kimi_linear as kl
from kimi_linear import reference

ANY_ORDER = 16


@pytest.fixture
def rng():
    return np.random.default_rng(20251026)


def f32(x):
    return np.asarray(x, np.float32)


def both(op, theirs, **inputs):
    """Ours within its budget of float64, theirs within ANY_ORDER of it; gives ours."""
    got = getattr(kl.ops, op)(**inputs)
    within(op, got, 1, **inputs)
    within(op, theirs, ANY_ORDER, **inputs)
    return got


def delta_inputs(rng, T, H, K, strongest=None):
    """q, k, v, g, beta as a layer has them: g from almost none to -3 nats, one in eight `strongest`."""
    q, k, v = (rng.standard_normal((T, H, K)) for _ in range(3))
    g = -3 * rng.random((T, H, K)) ** 4
    if strongest is not None:
        g = np.where(rng.random(g.shape) < 0.125, strongest, g)
    return dict(zip(["q", "k", "v", "g", "beta"], map(f32, (q, k, v, g, rng.random((T, H))))))


def run_delta(function, initial=None, **inputs):
    """A delta rule of transformers on one sequence: (o [T, H, V], state [H, K, V])."""
    given = [t(inputs[n])[None] for n in ("q", "k", "v", "g", "beta")]
    initial = None if initial is None else t(initial)[None]
    o, state = function(*given, initial_state=initial, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return o[0].numpy(), state[0].numpy()


SIZES = [(1, 1, 8), (70, 2, 16), (130, 3, 33), (64, 1, 128)]


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("T, H, K", SIZES)
def test_delta_rule_recurrent(rng, T, H, K, carried):
    inputs = delta_inputs(rng, T, H, K)
    initial = f32(rng.standard_normal((H, K, K))) if carried else None
    theirs = run_delta(modeling.recurrent_kimi_delta_attention, initial, **inputs)
    both("delta_rule", theirs, **inputs, initial_state=initial, l2_norm=True)


@pytest.mark.parametrize("T, H, K", SIZES)
def test_delta_rule_chunked(rng, T, H, K):
    """Their chunked form is the same rule. It subtracts sums of g over a chunk (here down to -64 * 3 / 5), each
    rounded to u of its size, so its exponentials are off by up to 64 u * 40 = 1.5e-4: an absolute bound, times
    the largest result."""
    inputs = delta_inputs(rng, T, H, K)
    initial = f32(rng.standard_normal((H, K, K)))
    theirs = run_delta(modeling.chunk_kimi_delta_attention, initial, **inputs)
    got = kl.ops.delta_rule(**inputs, initial_state=initial, l2_norm=True)
    for a, b in zip(got, theirs, strict=True):
        assert np.abs(a - b).max() <= 1.5e-4 * np.abs(a).max()


def test_strong_gates_cost_their_chunked_form_digits_and_ours_none(rng):
    """One gate in eight at -100 nats: a chunk's sum goes to -800, where an ulp is 6e-5, and the difference of two
    sums is wrong by as much. Ours has no such sum: within the same budget as with weak gates."""
    inputs = delta_inputs(rng, 130, 2, 32, strongest=-100.0)
    ref = reference.delta_rule(**inputs, l2_norm=True)
    got = both("delta_rule", run_delta(modeling.recurrent_kimi_delta_attention, **inputs), **inputs, l2_norm=True)
    theirs = run_delta(modeling.chunk_kimi_delta_attention, **inputs)
    for r, a, b in zip(ref, got, theirs, strict=True):
        size = np.sqrt(np.mean(r**2))
        ours_off, theirs_off = (float(np.sqrt(np.mean((x - r) ** 2)) / size) for x in (a, b))
        assert ours_off < 5e-7 and theirs_off > 10 * ours_off, (ours_off, theirs_off)


@pytest.mark.parametrize("D", [1, 15, 16, 33, 256])
def test_norms(rng, D):
    x, z = f32(rng.standard_normal((7, D)) * 10.0 ** rng.integers(-3, 3, (7, 1))), f32(3 * rng.standard_normal((7, D)))
    w = f32(rng.standard_normal(D))
    with torch.no_grad():
        norm, gated = modeling.KimiLinearRMSNorm(D, 1e-5), modeling.KimiLinearRMSNormGated(D, 1e-5)
        norm.weight.copy_(t(w))
        gated.weight.copy_(t(w))
        both("rms_norm", norm(t(x)).numpy(), x=x, w=w, eps=1e-5)
        both("gated_rms_norm", gated(t(x), t(z)).numpy(), x=x, z=z, w=w, eps=1e-5)
    both("l2_norm", modeling.l2norm(t(x)).numpy(), x=x)


@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
def test_short_conv(rng, W):
    """A prompt, then single tokens over the kept history: theirs [1, C, T] with W columns kept, ours [W-1, C]."""
    C, T = 37, 21
    x, w = f32(rng.standard_normal((T, C))), f32(rng.standard_normal((C, W)))
    y = modeling.causal_conv1d_fn(t(x.T)[None], t(w), activation="silu")[0].numpy().T
    got, history = kl.ops.short_conv(x, w)
    within("short_conv", (got, history), 1, x=x, w=w)
    within("short_conv", (y, x[T - W + 1:]), ANY_ORDER, x=x, w=w)

    kept = t(x[T - W:].T)[None]
    for step in f32(rng.standard_normal((4, 1, C))):
        y = modeling.causal_conv1d_update(t(step.T)[None], kept, t(w), activation="silu")[0].numpy().T
        after = kept[0].numpy().T[1:]
        history = both("short_conv", (y, after), x=step, w=w, history=history)[1]
        assert history.tobytes() == np.ascontiguousarray(after).tobytes()


def test_decay_gate(rng):
    """Their softplus is log(1 + exp(x)): off by the rounding of 1 + e, u however small the gate is. Ours is
    relative to the gate, and so nearer where gates are weak."""
    T, H, K, D = 50, 3, 16, 24
    x, A_log = f32(rng.standard_normal((T, D))), f32(rng.standard_normal(H))
    config = modeling.KimiLinearConfig(hidden_size=D, linear_head_dim=K, linear_num_heads=H)
    gate = modeling.KimiLinearForgetGate(config)
    with torch.no_grad():
        for p in gate.parameters():
            p.copy_(t(f32(2 * rng.standard_normal(p.shape))))
        gate.dt_bias.copy_(t(f32(rng.uniform(-12, 25, H * K))))
        gate.A_log.copy_(t(A_log).view(1, 1, H, 1))
        f = gate.f_b_proj(gate.f_a_proj(t(x))).numpy().reshape(T, H, K)
        theirs = gate(t(x)[None])[0].numpy()
    inputs = dict(f=f, rate=np.exp(A_log.astype(np.float64)).astype(np.float32),
                  dt_bias=gate.dt_bias.detach().numpy().reshape(H, K))
    got, ref = kl.ops.decay_gate(**inputs), reference.decay_gate(**inputs)
    within("decay_gate", got, 1, **inputs)
    rate, u = inputs["rate"][:, None], 2.0**-24
    assert (np.abs(theirs - ref) <= u * (8 * np.abs(ref) + rate * (2 + np.abs(f + inputs["dt_bias"])))).all()
    weak = (ref > -1e-4) & (ref < -1e-20)               # x from -50: its rounding alone moves the gate by 50 u
    assert weak.sum() > 100
    ours_off, theirs_off = ((np.abs(a - ref) / -ref)[weak].max() for a in (got, theirs))
    assert ours_off < 60 * u < 1e-3 < theirs_off


def router(E, k, groups, top, renormalise, scale, D=32):
    config = modeling.KimiLinearConfig(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=k, n_group=groups, topk_group=top, n_shared_experts=2,
        norm_topk_prob=renormalise, routed_scaling_factor=scale, moe_intermediate_size=24)
    config._experts_implementation = "eager"
    return config


@pytest.mark.parametrize("E, k, groups, top, renormalise, scale", [
    (8, 2, 1, 1, True, 2.446), (16, 5, 4, 2, False, 0.7), (64, 8, 8, 4, True, 1.0), (6, 1, 1, 1, False, 3.0),
    (16, 6, 8, 3, True, 2.0)])
def test_route_and_moe(rng, E, k, groups, top, renormalise, scale):
    """Their router and their experts, modules of their own with random weights; ids equal, in every token."""
    T, D = 60, 32
    moe = modeling.KimiLinearMoE(router(E, k, groups, top, renormalise, scale)).eval()
    x = f32(rng.standard_normal((T, D)))
    with torch.no_grad():
        for p in [*moe.parameters(), moe.gate.e_score_correction_bias]:
            p.copy_(t(f32(rng.standard_normal(p.shape) / p.shape[-1] ** 0.5)))
        scores, weights, ids = (a.numpy() for a in moe.gate(t(x)))
        routed = moe.experts(t(x), t(ids), t(weights)).numpy()
        shared = moe.shared_experts(t(x)).numpy()
        whole = moe(t(x)[None])[0].numpy()
    order = np.argsort(ids, axis=1)
    ids, weights = (np.take_along_axis(a, order, axis=1) for a in (ids.astype(np.int32), weights))
    rule = dict(scores=scores, k=k, bias=moe.gate.e_score_correction_bias.numpy(), groups=groups, top_groups=top,
                renormalise=renormalise, scale=scale)
    own_ids, own_weights = kl.ops.route(**rule)
    assert np.array_equal(own_ids, ids)
    within("route", (own_ids, own_weights), 1, **rule)
    within("route", (ids, weights), ANY_ORDER, **rule)

    gate_up, down = (p.detach().numpy() for p in (moe.experts.gate_up_proj, moe.experts.down_proj))
    F = gate_up.shape[1] // 2
    inputs = dict(x=x, ids=ids, weights=weights, w_gate=gate_up[:, :F], w_up=gate_up[:, F:], w_down=down)
    both("moe", routed, **inputs)
    both("moe", whole, **inputs, shared=shared)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("T", [1, 70])
def test_latent_attention(rng, T, implementation):
    """Their attention module from q and the latents on, each attention implementation; before o_proj (the identity)."""
    H, nope, rope, v, R = 3, 10, 6, 9, 20
    config = modeling.KimiLinearConfig(
        hidden_size=H * v, num_attention_heads=H, num_key_value_heads=H, kv_lora_rank=R, qk_nope_head_dim=nope,
        qk_rope_head_dim=rope, v_head_dim=v, attn_implementation=implementation)
    module = modeling.KimiLinearAttention(config, 0).eval()
    x = t(f32(rng.standard_normal((1, T, H * v))))
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.eye(H * v) if name.startswith("o_proj") else
                    t(f32(rng.standard_normal(p.shape) * 2 / p.shape[-1] ** 0.5)))
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        out = module(x, attention_mask=mask)[0][0].numpy().reshape(T, H, v)
        q = module.q_proj(x)[0].numpy().reshape(T, H, nope + rope)
        raw, k_shared = module.kv_a_proj_with_mqa(x)[0].split([R, rope], dim=-1)
        latent = module.kv_a_layernorm(raw).numpy()
    kv_b = module.kv_b_proj.weight.detach().numpy().reshape(H, nope + v, R)
    both("latent_attention", out, q=q, latent=latent, k_shared=k_shared.numpy(), w_uk=kv_b[:, :nope],
         w_uv=kv_b[:, nope:], scale=(nope + rope) ** -0.5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("T, S, W", [(1, 1, 1), (1, 90, 40), (20, 70, 33), (70, 70, 9)])
def test_latent_attention_of_selected_positions(rng, T, S, W, implementation):
    """The attention behind GLM-5.3-Flash's indexer in float64, its mask made of indices. (A row of none, which theirs
    averages over all and the indexer never gives, is ours alone.)"""
    H, nope, v, R = 3, 10, 9, 20
    config = glm.Glm5NextTextConfig(
        hidden_size=H * v, num_attention_heads=H, num_key_value_heads=H, kv_lora_rank=R, q_lora_rank=8,
        qk_nope_head_dim=nope, qk_rope_head_dim=0, v_head_dim=v, num_hidden_layers=1,
        attn_implementation=implementation)
    module = glm.Glm5NextTextAttention(config, 0).double().eval()
    kv_b, q, latent = (f32(rng.standard_normal(shape)) for shape in ((H * (nope + v), R), (T, H, nope), (S, R)))
    select = np.full((T, W), -1, np.int32)
    for i in range(T):
        seen = S - T + i + 1
        chosen = np.sort(rng.permutation(seen)[:rng.integers(1, min(W, seen) + 1)])
        select[i, :len(chosen)] = chosen
    queries = t(q).double().transpose(0, 1)[None]
    with torch.no_grad():
        module.kv_b_proj.weight.copy_(t(kv_b))
        keys, values = module.expand_kv(t(latent).double()[None, None], torch.zeros(1, 1, S, 0).double())
        mask = module.build_attention_mask_from_topk(t(select)[None].long(), queries, S)
        attend = glm.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, glm.eager_attention_forward)
        out = attend(module, queries, keys, values, mask, dropout=0.0, scaling=nope**-0.5)[0][0].numpy()
    w = kv_b.reshape(H, nope + v, R)
    inputs = dict(q=q, latent=latent, k_shared=np.zeros((S, 0), np.float32), w_uk=w[:, :nope], w_uv=w[:, nope:],
                  scale=nope**-0.5, select=select)
    if implementation == "sdpa":  # eager's softmax is float32's
        np.testing.assert_allclose(reference.latent_attention(**inputs), out, rtol=1e-12, atol=1e-12)
    both("latent_attention", out, **inputs)


def test_elementwise_linear_and_embedding(rng):
    """torch's own functions, which transformers' modules are made of."""
    gate, up = f32(4 * rng.standard_normal((9, 31))), f32(rng.standard_normal((9, 31)))
    both("swiglu", (torch.nn.functional.silu(t(gate)) * t(up)).numpy(), gate=gate, up=up)
    far = f32(30 * rng.standard_normal((9, 31)))  # Kimi K3's SiTU, as modeling_kimi_linear.py has it
    gated = 4 * torch.tanh(t(gate) / 4) * torch.sigmoid(t(gate))
    both("situ", (gated * (25 * torch.tanh(t(far) / 25))).numpy(), gate=gate, up=far, beta=4.0, linear_beta=25.0)
    both("situ", (gated * t(far)).numpy(), gate=gate, up=far, beta=4.0)
    both("sigmoid", torch.sigmoid(t(gate)).numpy(), x=gate)
    both("softmax", torch.softmax(t(gate), -1).numpy(), x=gate)
    w, bias = f32(rng.standard_normal((17, 31))), f32(rng.standard_normal(17))
    both("linear", torch.nn.functional.linear(t(gate), t(w), t(bias)).numpy(), x=gate, w=w, bias=bias)
    half = t(w).bfloat16()
    want = torch.nn.functional.embedding(torch.tensor([3, 0, 16]), half).float().numpy()
    assert kl.ops.embedding(np.array([3, 0, 16]), half).tobytes() == want.tobytes()
    ids = tokens("tiny", 5)
    table = ours("tiny").weights["model.embed_tokens.weight"]
    assert np.array_equal(kl.ops.embedding(ids, table), table.astype(np.float32)[ids])


@pytest.mark.parametrize("D", [1, 16, 33, 128, 2304])
@pytest.mark.parametrize("mean, eps", [(0, 1e-6), (3, 1e-5), (1e4, 1e-6)])
def test_layer_norm(rng, D, mean, eps):
    """torch's, of which the indexers' k_norm is made: in float64 it is the reference, in float32 near it."""
    x, w = f32(mean + rng.standard_normal((9, D))), f32(1 + 0.3 * rng.standard_normal(D))
    b = f32(rng.standard_normal(D))
    norm = torch.nn.functional.layer_norm
    given = dict(x=x, w=w, b=b, eps=eps)
    want = norm(t(x).double(), (D,), t(w).double(), t(b).double(), eps).numpy()
    np.testing.assert_allclose(reference.layer_norm(**given), want, rtol=1e-10, atol=1e-10 * max(1, mean))
    if mean < 100:
        both("layer_norm", norm(t(x), (D,), t(w), t(b), eps).numpy(), **given)
    else:  # their float32 mean is off by more than ours
        within("layer_norm", kl.ops.layer_norm(**given), 1, **given)


@pytest.fixture(scope="module")
def feed_forwards():
    """GLM-5.3-Flash's feed-forwards in float64, small, with products on both sides of the limit."""
    config = glm.Glm5NextTextConfig(hidden_size=24, intermediate_size=40, moe_intermediate_size=16,
                                     num_local_experts=5, swiglu_limit=10.0)
    torch.manual_seed(7)
    made = [glm.Glm5NextTextMLP(config).double(), glm.Glm5NextTextExperts(config).double()]
    with torch.no_grad():
        for module in made:
            for p in module.parameters():
                p.copy_((torch.randn(p.shape) * 6 * p.shape[-1] ** -0.5).bfloat16())  # float32 holds them
    return made


def test_the_limit_of_glm(rng, feed_forwards):
    mlp, experts = feed_forwards
    x = f32(1.5 * rng.standard_normal((13, 24)))
    ids = np.sort(np.argsort(rng.random((13, 5)), axis=-1)[:, :2], axis=-1)
    weights = f32(rng.random((13, 2)))
    with torch.no_grad():
        dense = mlp(t(x).double()).numpy()
        routed = experts(t(x).double(), torch.as_tensor(ids), t(weights).double()).numpy()
    w_gate, w_up, w_down = (f32(p.weight.detach().numpy()) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gate, up = reference.linear(x, w_gate), reference.linear(x, w_up)
    assert gate.max() > 10 > -10 > gate.min() and up.max() > 10 > -10 > up.min()
    h = reference.swiglu(gate, up, limit=10)
    np.testing.assert_allclose(reference.linear(h, w_down), dense, rtol=0, atol=1e-12 * np.abs(dense).max())
    joined, down = (f32(p.detach().numpy()) for p in (experts.gate_up_proj, experts.down_proj))
    given = dict(x=x, ids=ids, weights=weights, w_gate=joined[:, :16], w_up=joined[:, 16:], w_down=down, limit=10.0)
    np.testing.assert_allclose(reference.moe(**given), routed, rtol=0, atol=1e-12 * np.abs(routed).max())
    within("moe", kl.ops.moe(**given), 1, **given)
    shared = kl.ops.moe(**given, shared=(w_gate, w_up, w_down))
    within("moe", shared, 1, **given, shared=(w_gate, w_up, w_down))
    np.testing.assert_allclose(shared, routed + dense, rtol=0, atol=1e-5 * np.abs(routed).max())
