"""Bugs that ports had, by where they were reported: check_op fails each, and says what it is."""

import math

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.testing import check_op

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F = np.float32
PORTS = []


def port(op, says):
    """Registers a kernel with a bug, and the words by which the card must name it."""
    def keep(kernel):
        PORTS.append(pytest.param(op, says, kernel, id=f"{op}-{kernel.__name__}"))
        return kernel

    return keep


# ---- the delta rule ------------------------------------------------------------------------------------


@port("delta_rule", "in its l2 norm, the vector is not normalised")
def decoding_without_norm(q, l2_norm=False, **x):
    return kl.ops.delta_rule(q, l2_norm=l2_norm and len(q) > 1, **x)


@port("delta_rule", "in its l2 norm, one norm for a token, over all heads")
def norm_before_the_split(q, k, l2_norm=False, l2_eps=1e-6, **x):
    if l2_norm:
        q, k = ((a / np.sqrt((np.float64(a) ** 2).sum((-2, -1), keepdims=True) + l2_eps)).astype(F) for a in (q, k))
    return kl.ops.delta_rule(q, k, **x)


@port("delta_rule", "key heads are found the other way")
def decoding_with_tiled_heads(q, head_map="grouped", **x):
    return kl.ops.delta_rule(q, head_map="tiled" if len(q) == 1 else head_map, **x)


@port("delta_rule", "each sequence gives the final state of the one before")
def slots_taken_for_another(offsets=None, **x):
    o, state = kl.ops.delta_rule(offsets=offsets, **x)
    return o, state if offsets is None else np.roll(state, 1, axis=0)


@port("delta_rule", "a sequence without tokens gets a state of zero")
def empty_slots_are_zero(offsets=None, **x):
    o, state = kl.ops.delta_rule(offsets=offsets, **x)
    if offsets is not None:
        state[np.diff(offsets) == 0] = 0
    return o, state


@port("delta_rule", "every head begins with the initial state of the first")
def state_of_the_first_head(initial_state=None, **x):
    if initial_state is not None:
        initial_state = np.broadcast_to(initial_state[..., :1, :, :], initial_state.shape).copy()
    return kl.ops.delta_rule(initial_state=initial_state, **x)


@port("delta_rule", "each value head has the beta of the first")
def beta_of_the_first_head(beta, **x):
    return kl.ops.delta_rule(beta=np.broadcast_to(beta[:, :1], beta.shape).copy(), **x)


@port("delta_rule", "the gate is looked up by the number of the key head")
def gates_by_key_head(q, v, g, head_map="grouped", **x):
    Hk, H = q.shape[1], v.shape[1]
    key_head = np.arange(H) % Hk if head_map == "tiled" else np.arange(H) // (H // Hk)
    return kl.ops.delta_rule(q, v=v, g=None if g is None else g[:, key_head].copy(), head_map=head_map, **x)


@port("delta_rule", "the last channel of each head is not decayed")
def gates_but_the_last(g, **x):
    if g is not None and g.ndim == 3:
        g = g.copy()
        g[..., -1] = 0
    return kl.ops.delta_rule(g=g, **x)


# ---- what is before it ---------------------------------------------------------------------------------


@port("decay_gate", "cut off at lower_bound")
def softplus_cut_off(f, rate, dt_bias, lower_bound=None):  # tokenspeed, pull request 847
    g = kl.ops.decay_gate(f, rate, dt_bias)
    return g if lower_bound is None else np.maximum(g, F(lower_bound))


@port("decay_gate", "the bounded gate lacks its rate")
def bounded_without_rate(f, rate, dt_bias, lower_bound=None):
    return kl.ops.decay_gate(f, rate if lower_bound is None else np.ones_like(rate), dt_bias, lower_bound=lower_bound)


@port("short_conv", "w is read as [W, C]")
def taps_by_rows(x, w, **more):
    return kl.ops.short_conv(x, np.ascontiguousarray(w.reshape(w.shape[::-1]).T), **more)


@port("short_conv", "the history that is handed on has the newest row first")
def newest_first(**x):
    y, after = kl.ops.short_conv(**x)
    return y, np.ascontiguousarray(after[..., ::-1, :])


# ---- norms, attention, rope ----------------------------------------------------------------------------


def of_token(x, eps, mean):
    y = np.float64(x).reshape(len(x), math.prod(x.shape[1:]))
    return (y / np.sqrt((mean(y * y, axis=-1, keepdims=True)) + eps)).reshape(x.shape)


@port("rms_norm", "one norm for a token, over all heads")
def rms_norm_before_the_split(x, w, eps):
    return w * of_token(x, eps, np.mean)


@port("l2_norm", "one norm for a token, over all heads")
def l2_norm_before_the_split(x, eps=1e-6):
    return of_token(x, eps, np.sum)


@port("gated_rms_norm", "the output gate is not put through its activation")
def raw_gate(x, z, w, eps, activation="sigmoid"):
    return kl.ops.rms_norm(x, w, eps=eps) * z


@port("attention", "scores are scaled twice")
def queries_scaled_before(q, k, v, scale, **more):
    return kl.ops.attention(q * F(scale), k, v, scale=scale, **more)


@port("latent_attention", "scores are scaled twice")
def latent_queries_scaled_before(q, scale, **x):
    return kl.ops.latent_attention(q * F(scale), scale=scale, **x)


def half_a_head_apart(x, positions, base, rotary, width):
    n, K, y = rotary // 2, x.shape[-1], np.float64(x)
    b = slice(K // 2, K // 2 + n)
    angle = (positions[:, None] * base ** (-2.0 * np.arange(n) / max(width, 1)))[:, None]
    c, s = np.cos(angle), np.sin(angle)
    turned = y.copy()
    turned[..., :n], turned[..., b] = y[..., :n] * c - y[..., b] * s, y[..., b] * c + y[..., :n] * s
    return turned


@port("rope", "half a head apart are turned, not half of `rotary`, with speeds of the head")
def pairs_and_speeds_of_head(x, positions, base, rotary):  # pie, pull request 603
    return half_a_head_apart(x, positions, base, rotary, x.shape[-1])


@port("rope", "half a head apart are turned, not half of `rotary`, with speeds of rotary")
def pairs_of_head(x, positions, base, rotary):  # coreai-models, issue 66
    return half_a_head_apart(x, positions, base, rotary, rotary)


# ---- experts -------------------------------------------------------------------------------------------


@port("swiglu", "its form with erf")
def exact_gelu(gate, up):
    return gate / 2 * (1 + np.vectorize(math.erf, otypes=[float])(gate / 2**0.5)) * up


@port("swiglu", "x sigmoid(1.702 x)")
def quick_gelu(gate, up):
    return gate * kl.ops.sigmoid(F(1.702) * gate) * up


@port("route", "weights are (s + bias) - bias")
def less_bias(scores, bias=None, function="sigmoid", renormalise=True, scale=1.0, **x):  # flashinfer, request 3875
    ids, _ = kl.ops.route(scores, bias=bias, function=function, **x)
    s = getattr(kl.ops, function)(scores)
    w = np.take_along_axis(s if bias is None else (s + bias) - bias, ids.astype(np.int64), -1)
    return ids, F(scale) * (w / (w.sum(-1, keepdims=True) + F(1e-20)) if renormalise else w)


@port("moe", "each token's weights are divided by their sum (again)")
def renormalised_again(weights, **x):
    return kl.ops.moe(weights=weights / weights.sum(-1, keepdims=True), **x)


@port("moe", "w_up is read as [D, F]")
def w_up_by_columns(w_up, **x):
    E, n, D = w_up.shape
    return kl.ops.moe(w_up=np.ascontiguousarray(w_up.reshape(E, D, n).swapaxes(1, 2)), **x)


@pytest.mark.parametrize("op, says, kernel", PORTS)
def test_it_is_named(op, says, kernel):
    card = check_op(op, kernel, without="out")
    assert not card and says in card.reasons[0][0], card
    assert len(card.reasons[0][1]) == len(card.failing), card
