"""transformers' hyper-connections (GLM-5.3-Flash) beside ours: the module, and the layer that is built on it."""

import types

import numpy as np
import pytest
import torch
from oracle import t, within
from transformers.models.glm5_next import modeling_glm5_next as modeling

import kimi_linear as kl
from kimi_linear.testing import check_op

OVERFLOW = "the sum of squares overflows float32: fn has no part"
FLUSHED = "sigmoids below 2^-126 are 0"
ANY_ORDER = 16  # of a sum: test_transformers_ops.py


def module(n, D, seed, dtype, norm_eps=1e-5, eps=1e-6, iters=20):
    """A hyper-connection with random weights, and its weights and numbers by our names."""
    rng = np.random.default_rng(seed)
    config = types.SimpleNamespace(hc_mult=n, hc_sinkhorn_iters=iters, hc_eps=eps, rms_norm_eps=norm_eps, hidden_size=D)
    weights = dict(fn=0.3 * rng.standard_normal(((2 + n) * n, n * D)), base=rng.standard_normal((2 + n) * n),
                   scale=rng.standard_normal(3))
    weights = {name: a.astype(dtype) for name, a in weights.items()}
    made = modeling.Glm5NextTextHyperConnection(config)
    for name, a in weights.items():
        setattr(made, name, torch.nn.Parameter(t(a), requires_grad=False))
    return made, weights | dict(norm_eps=norm_eps, eps=eps, iters=iters)


@pytest.fixture
def in_float64(monkeypatch):
    """What the module computes in float32 whatever it is given is in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


SIZES = [(1, 7, 3), (4, 24, 11), (4, 256, 2), (5, 3, 4)]


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("norm_eps, eps", [(1e-5, 1e-6), (0.3, 0.02)])
@pytest.mark.parametrize("n, D, T", SIZES)
def test_mhc_pre_in_float64(n, D, T, norm_eps, eps, iters, in_float64):
    made, given = module(n, D, 1, np.float64, norm_eps, eps, iters)
    x = np.random.default_rng(2).standard_normal((2, T, n, D))
    post, comb, y = (a.numpy() for a in made(t(x)))
    for ours, theirs in zip(kl.reference.mhc_pre(x, **given), (y, post, comb), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n, D, T", SIZES)
def test_mhc_pre_in_float32(n, D, T):
    made, given = module(n, D, 1, np.float32)
    x = np.random.default_rng(2).standard_normal((T, n, D)).astype(np.float32)
    post, comb, y = (a[0].numpy() for a in made(t(x)[None]))
    within("mhc_pre", kl.ops.mhc_pre(x, **given), 1, x=x, **given)
    within("mhc_pre", (y, post, comb), ANY_ORDER, x=x, **given)


def test_a_layer_of_blocks_between_hyper_connections(in_float64):
    """Of a layer whose attention is a sine and whose feed-forward is a cosine."""
    n, D = 4, 24
    layer = modeling.Glm5NextTextDecoderLayer.__new__(modeling.Glm5NextTextDecoderLayer)
    torch.nn.Module.__init__(layer)
    layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
    layer.attn_hc, attn = module(n, D, 1, np.float64)
    layer.ffn_hc, ffn = module(n, D, 2, np.float64)
    layer.block_type = "linear_attention"
    layer.self_attn = lambda hidden_states, **_: torch.sin(hidden_states)
    layer.mlp = torch.cos
    x = np.random.default_rng(3).standard_normal((2, 5, n, D))
    theirs = layer(t(x))[0].numpy()
    for given, block in ((attn, np.sin), (ffn, np.cos)):
        y, post, comb = kl.reference.mhc_pre(x, **given)
        x = kl.reference.mhc_post(block(y), x, post, comb)
    np.testing.assert_allclose(x, theirs, rtol=1e-12, atol=1e-12)


def run_module(hidden_streams, fn, base, scale, rms_norm_eps, hc_eps, hc_sinkhorn_iters):
    n, D = hidden_streams.shape[2:]
    made, _ = module(n, D, 1, np.float32, rms_norm_eps, hc_eps, hc_sinkhorn_iters)
    made.fn.data, made.base.data, made.scale.data = fn, base, scale
    return made(hidden_streams)


def layer_lines(hidden_states, residual, post, comb):
    """What a layer does behind a block."""
    dtype = hidden_states.dtype
    return post.to(dtype).unsqueeze(-1) * hidden_states.unsqueeze(-2) + torch.matmul(
        comb.to(dtype).transpose(-1, -2), residual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_op_of_the_module(dtype):
    """All holds but no tokens, which raise, the norm of tokens whose squares leave float32, and torch's sigmoid of
    -90."""
    card = check_op("mhc_pre", run_module, conventions="hf", dtype=dtype, without=["T = 0"])
    failing = {row.name: row.why for row in card.rows if row.status == "fails"}
    wide = {} if dtype == "float16" else dict.fromkeys(["overflow", "one-huge"], OVERFLOW)
    assert failing == wide | ({"vanishing": FLUSHED} if dtype == "float32" else {}), card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_op_of_the_lines_of_the_layer(dtype):
    assert check_op("mhc_post", layer_lines, conventions="hf", dtype=dtype)
