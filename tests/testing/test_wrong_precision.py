"""Kernels whose formula is right and whose precision is not: none passes, and none is given another's name."""

import functools

import numpy as np
import planted_ops
import pytest
from planted_ops import F

import kimi_linear as kl
from kimi_linear.testing import check_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FLUSHING = ["linear", "rms_norm", "gated_rms_norm", "sigmoid_gate", "rope", "attention", "latent_attention",
            "decay_gate", "decay_cumsum", "route", "moe", "attn_res", "mhc_pre", "mhc_post",
            "index_pool", "index_scores"]


def off(x, size):
    """x with relative errors of up to `size`, the same for the same value."""
    x = np.ascontiguousarray(x, F)
    part = (x.view(np.uint32).astype(np.uint64) * 2654435761 % 2**32) / 2.0**31 - 1
    return np.where(np.isfinite(x) & (x != 0), x.astype(np.float64) * (1 + size * part), x).astype(F)


def with_sigmoid(monkeypatch, sigmoid):
    monkeypatch.setattr(planted_ops, "sigmoid", sigmoid)
    monkeypatch.setattr(planted_ops, "silu", lambda x: x * sigmoid(x))


def without_subnormals(op, **arguments):
    """Results below 2^-126 are 0."""
    results = getattr(kl.ops, op)(**arguments)
    several = results if isinstance(results, tuple) else (results,)
    flushed = tuple(np.where(np.abs(y) < 2.0**-126, 0, y).astype(y.dtype) for y in several)
    return flushed if isinstance(results, tuple) else flushed[0]


@pytest.mark.parametrize("op", FLUSHING)
def test_results_that_are_flushed_are_called_so(op):
    card = check_op(op, functools.partial(without_subnormals, op), without=["out"])
    # mhc_pre has a case of which all small results are twice a sigmoid: that its sigmoids are flushed says the same
    also = ["sigmoids below 2^-126 are 0"] if op == "mhc_pre" else []
    assert not card and [says for says, _ in card.reasons] == [*also, "results below 2^-126 are 0"], card


@pytest.mark.parametrize("op", ["sigmoid_gate", "swiglu", "gated_rms_norm"])
def test_an_exponential_that_flushes_is_not_another_mistake(op, monkeypatch):
    def sigmoid(x):
        e = np.exp(np.float64(np.minimum(x, 0)))
        e = np.where(e < 2.0**-126, 0, e).astype(F)
        return e / (F(1) + np.exp(-np.abs(x)))

    with_sigmoid(monkeypatch, sigmoid)
    card = check_op(op, getattr(planted_ops, op), cases=["rim"])
    assert not card and [says for says, _ in card.reasons] == ["sigmoids below 2^-126 are 0"], card


def test_an_exponential_of_a_rounded_product_is_called_so(monkeypatch):
    """2^(x log2 e), as MLX's CPU backend has it."""
    def sigmoid(x):
        y = F(1) / (F(1) + np.exp2(np.float64(np.abs(x) * F(np.log2(np.e)))).astype(F))
        return np.where(x < 0, y, F(1) - y)

    with_sigmoid(monkeypatch, sigmoid)
    card = check_op("swiglu", planted_ops.swiglu, cases=["large", "negative"])
    says = "exp(x) as 2^(x log2 e), the product rounded to float32: |x| u of a small sigmoid"
    assert card.failing == ["large", "negative"] and [why for why, _ in card.reasons] == [says], card


@pytest.mark.parametrize("op", ["swiglu", "sigmoid_gate", "gated_rms_norm", "short_conv", "moe", "route"])
def test_an_exponential_of_18_bits_fails(op, monkeypatch):
    def sigmoid(x):
        e = off(np.exp(-np.abs(np.float64(x))), 2.0**-18)
        return np.where(x < 0, e, F(1)) / (F(1) + e)

    with_sigmoid(monkeypatch, sigmoid)
    assert not check_op(op, getattr(planted_ops, op), without=["subnormals"] if op != "short_conv" else [])


def test_a_norm_of_18_bits_within_a_delta_rule_fails():
    def kernel(q, k, l2_norm=False, l2_eps=1e-6, **more):
        if l2_norm:
            q, k = (a * off(F(1) / np.sqrt((a * a).sum(-1, keepdims=True) + F(l2_eps)), 2.0**-18) for a in (q, k))
        return kl.ops.delta_rule(q, k, **more)

    card = check_op("delta_rule", kernel, cases=["norm", "norm-one-token"], without=["out"])
    assert "norm" in card.failing, card


@pytest.mark.parametrize("op", ["attention", "latent_attention"])
def test_sums_over_positions_may_go_one_by_one(op):
    """1,100 positions, products and sums rounded one after another: as right as any other order."""
    def attend(q, k, v, scale):
        T, S, o = len(q), len(k), np.zeros((len(q), v.shape[1]), F)
        for t in range(T):
            score = (k[:S - T + t + 1] @ q[t]) * F(scale)
            total, acc = F(0), np.zeros(v.shape[1], F)
            for p, row in zip(np.exp(score - score.max()), v, strict=False):
                total, acc = total + p, acc + p * row
            o[t] = acc / total
        return o

    def attention(q, k, v, scale):
        return np.stack([attend(q[:, h], k[:, h // (q.shape[1] // k.shape[1])], v[:, h // (q.shape[1] // k.shape[1])],
                                scale) for h in range(q.shape[1])], axis=1)

    def latent_attention(q, latent, k_shared, w_uk, w_uv, scale):
        return np.stack([attend(q[:, h], np.concatenate([latent @ w_uk[h].T, k_shared], 1), latent @ w_uv[h].T, scale)
                         for h in range(q.shape[1])], axis=1)

    kernel = {"attention": attention, "latent_attention": latent_attention}[op]
    card = check_op(op, kernel, cases=["cached-2-1100", "plain"])
    assert card, card


def test_tf32_is_not_taken_for_float16():
    def tf32(x):
        bits = np.ascontiguousarray(x, F).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F)

    card = check_op("attention", lambda q, k, v, **more: kl.ops.attention(tf32(q), tf32(k), tf32(v), **more),
                    without=["NaN", "out"])
    assert not card and all("float16:" not in says or "TF32" in says for says, _ in card.reasons), card


def test_zeros_of_one_case_are_no_reason_of_their_own():
    """float16 has no room for 1e-30: zeros, which columns that are left out would give as well."""
    def half(a):
        return a.astype(np.float16).astype(F)

    card = check_op("linear", lambda x, w, **more: kl.ops.linear(half(x), half(w), **more), without=["out"])
    assert not card and [says for says, _ in card.reasons] == ["inputs have 10 bits, as in TF32"], card
