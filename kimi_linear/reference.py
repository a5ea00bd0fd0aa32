"""Every op of the model in float64 NumPy: the measure by which everything else is judged. For reading.

Names and arguments are those of ``kimi_linear.ops``. Inputs of any float type are widened to float64, ids
stay integers. Shape letters: T tokens, N sequences, H heads (Hk of keys, Hv of values), K key width, V value
width, D model width, R latent rank, P width of the shared key part, C channels, W taps, E experts, F inner
width. With ``offsets`` [N+1] the tokens of N sequences lie one after another and states have a leading axis
N; with a batch axis in front, [B, T, ...], there are B equally long ones and states have a leading axis B. The
delta rule and its chunked form are in :mod:`kimi_linear.reference_delta`, the indexer of sparse attention in
:mod:`kimi_linear.reference_index`, gradients in :mod:`kimi_linear.reference_backward`, the block types in
:mod:`kimi_linear.reference_quant`; they are names of this module, too.

Sources: Kimi Linear report, arXiv:2510.26692 (delta rule, decay, block); DeepSeek-V2, arXiv:2405.04434
(latent attention); DeepSeek-V3, arXiv:2412.19437 (routing); Salmon et al., SC 2011 (Philox).
"""

from __future__ import annotations

import numpy as np

from ._arrays import as_array, check_shape
from ._batches import any_batch
from ._float64 import f64, of_sequences, sequences
from .quantized import Quantized
from .reference_backward import (  # noqa: F401
    decay_gate_backward,
    gated_rms_norm_backward,
    l2_norm_backward,
    rms_norm_backward,
    short_conv_backward,
    swiglu_backward,
)
from .reference_delta import decay_cumsum, delta_rule, delta_rule_inter, delta_rule_intra  # noqa: F401
from .reference_delta_backward import delta_rule_backward  # noqa: F401
from .reference_index import best_first, index_pool, index_scores, index_select, index_sequences  # noqa: F401
from .reference_quant import dequantize, quantize  # noqa: F401

# ---- element by element, norms -------------------------------------------------------------------


def add(a, b):
    """``a + b``."""
    return f64(a) + f64(b)


def sigmoid(x):
    """``1 / (1 + exp(-x))``, by the branch whose exponential does not overflow."""
    x = f64(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def silu(x):
    """``x * sigmoid(x)``."""
    return f64(x) * sigmoid(x)


def softplus(x):
    """``ln(1 + exp(x))`` as ``max(x, 0) + log1p(exp(-|x|))``: no threshold, no overflow."""
    x = f64(x)
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def swiglu(gate, up, *, limit=None):
    """``silu(gate) * up``; with a limit of ``min(gate, limit)`` and ``clip(up, -limit, limit)``, NaN staying NaN."""
    gate, up = f64(gate), f64(up)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return silu(gate) * up


def situ(gate, up, *, beta, linear_beta=None):
    """``beta tanh(gate / beta) sigmoid(gate) up'``: up' = ``linear_beta tanh(up / linear_beta)``, or up where None."""
    gate, up = f64(gate), f64(up)
    bounded = up if linear_beta is None else linear_beta * np.tanh(up / linear_beta)
    return beta * np.tanh(gate / beta) * sigmoid(gate) * bounded


def sigmoid_gate(x, gate):
    """``x * sigmoid(gate)``: x [..., D], gate [..., G], each for D / G values that follow each other."""
    x, gate = f64(x), f64(gate)
    if x.shape[-1] % gate.shape[-1]:
        raise ValueError(f"gate has {gate.shape[-1]} values for {x.shape[-1]} of x; it must divide them")
    return x * np.repeat(sigmoid(gate), x.shape[-1] // gate.shape[-1], axis=-1)


def softmax(x):
    """``exp(x - max) / sum``, over the last axis."""
    x = f64(x)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, w, *, eps):
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis; x [..., D], w [D]."""
    x = f64(x)
    return f64(w) * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(x, w, b, *, eps):
    """``w * (x - m) / sqrt(mean((x - m)^2) + eps) + b``, m = mean(x), over the last axis; x [..., D], w, b [D]."""
    x = f64(x)
    c = x - x.mean(-1, keepdims=True)
    return f64(w) * c / np.sqrt((c * c).mean(-1, keepdims=True) + eps) + f64(b)


def gated_rms_norm(x, z, w, *, eps, activation="sigmoid"):
    """``rms_norm(x, w) * act(z)``, act being "sigmoid" or "silu"; x, z [..., D], w [D]."""
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f'activation is {activation!r}; it must be "sigmoid" or "silu"')
    return rms_norm(x, w, eps=eps) * (sigmoid(z) if activation == "sigmoid" else silu(z))


def l2_norm(x, *, eps=1e-6):
    """``x / sqrt(sum(x^2) + eps)`` over the last axis."""
    x = f64(x)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


def attn_res(snapshots, x, w, *, eps):
    """Attention over depth: of each token the candidates, snapshots [n, ..., D] and x [..., D], mixed by the softmax of
    their scores, ``sum(w * v / sqrt(mean(v^2) + eps))``; w [D]. Without snapshots x itself.
    """
    x = f64(x)
    if len(snapshots) == 0:
        return x.copy()
    v = np.concatenate([f64(snapshots), x[None]])
    scores = rms_norm(v, w, eps=eps).sum(-1)
    e = np.exp(scores - scores.max(0))
    return ((e / e.sum(0))[..., None] * v).sum(0)


# ---- hyper-connections --------------------------------------------------------------------------


def mhc_expand(x, *, n):
    """x [..., D] n times: [..., n, D]."""
    return np.repeat(f64(x)[..., None, :], n, axis=-2)


def mhc_collapse(x):
    """The mean of streams [..., n, D]: [..., D]."""
    return f64(x).mean(-2)


def mhc_pre(x, fn, base, scale, *, norm_eps, eps=1e-6, iters=20):
    """(y [..., D], post [..., n], comb [..., n, n]) of streams x [..., n, D]: y is sum(pre[i] * x[i]).

    ``m = fn @ flat(x) / sqrt(mean(flat(x)^2) + norm_eps)``, flat(x) being all n D values; fn [(2 + n) n, n D], base
    [(2 + n) n], scale [3]. pre is ``sigmoid + eps``, post ``2 sigmoid``, comb a softmax over its rows, ``+ eps``, of
    which columns, then rows and columns in turn, are divided by their sum + eps.
    """
    x, base, scale = f64(x), f64(base), f64(scale)
    n, D = x.shape[-2:]
    flat = x.reshape(*x.shape[:-2], n * D)
    m = (flat / np.sqrt((flat * flat).mean(-1, keepdims=True) + norm_eps)) @ f64(fn).T
    pre = sigmoid(m[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(m[..., n:2 * n] * scale[1] + base[n:2 * n])
    comb = softmax((m[..., 2 * n:] * scale[2] + base[2 * n:]).reshape(*x.shape[:-2], n, n)) + eps
    comb = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + eps)
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    return (pre[..., None] * x).sum(-2), post, comb


def mhc_post(y, x, post, comb):
    """``out[j] = post[j] y + sum_i comb[i, j] x[i]``; y [..., D], x [..., n, D], post [..., n], comb [..., n, n]."""
    return f64(post)[..., None] * f64(y)[..., None, :] + np.swapaxes(f64(comb), -1, -2) @ f64(x)


# ---- matrix products -----------------------------------------------------------------------------


def embedding(ids, table):
    """Rows of a table: ids [T] integers, table [vocab, D] -> [T, D]."""
    table = table if isinstance(table, Quantized) else as_array(table, "table")
    ids = as_array(ids, "ids")
    for t in np.flatnonzero((ids < 0) | (ids >= len(table)))[:1]:
        raise ValueError(f"ids[{t}] is {ids.flat[t]}; it must be in 0..{len(table) - 1}")
    return f64(table[ids])


def linear(x, w, bias=None):
    """``x w^T + bias``: x [..., n], w [m, n], bias [m] -> [..., m]."""
    y = f64(x) @ f64(w).T
    return y if bias is None else y + f64(bias)


# ---- KDA: the delta rule itself is in reference_delta.py ------------------------------------------


@any_batch
def short_conv(x, w, *, history=None, offsets=None, activation="silu"):
    """Causal depthwise convolution, ``y[t, c] = act(sum_j w[c, j] x[t - W + 1 + j, c])``.

    x [T, C]; w [C, W], the last tap on the current token; history [W-1, C] (or [N, W-1, C]): the inputs
    before the first, oldest first, zeros where None. Returns y [T, C] and the new history.
    """
    if activation not in ("silu", None):
        raise ValueError(f'activation is {activation!r}; it must be "silu" or None')
    x, w = f64(x), f64(w)
    (T, C), W = x.shape, w.shape[1]
    check_shape(w, "w", (C, "W"))
    ranges = sequences(T, offsets)
    shape = (len(ranges), W - 1, C)
    history = of_sequences(history, "history", shape)
    y, after = np.zeros((T, C)), np.zeros(shape)
    for n, r in enumerate(ranges):
        seen = np.concatenate([history[n], x[r]])
        length = r.stop - r.start
        for j in range(W):
            y[r] += w[:, j] * seen[j:j + length]
        after[n] = seen[length:]
    return silu(y) if activation else y, after if offsets is not None else after[0]


def decay_gate(f, rate, dt_bias, *, lower_bound=None):
    """Log-decay in nats per token: ``-rate * softplus(f + dt_bias)``; with a lower bound, ``lower_bound *
    sigmoid(rate * (f + dt_bias))``.

    Per channel: f [T, H, K], dt_bias [H, K]; per head: f [T, H], dt_bias [H]. rate [H] = exp(A_log).
    """
    f, rate, dt_bias = f64(f), f64(rate), f64(dt_bias)
    axes = 1 if dt_bias.size == rate.size == f.shape[-1] else 2
    rate = rate.reshape(-1, *[1] * (axes - 1))
    x = f + dt_bias.reshape(f.shape[-axes:])
    return -rate * softplus(x) if lower_bound is None else lower_bound * sigmoid(rate * x)


# ---- MLA -----------------------------------------------------------------------------------------


@any_batch
def latent_attention(q, latent, k_shared, w_uk, w_uv, *, scale, offsets=None, kv_offsets=None, select=None,
                     form="auto"):
    """Attention over a latent cache: head h has keys ``[w_uk_h c | k_shared]`` and values ``w_uv_h c``.

    q [T, H, nope + P]; latent c [S, R]; k_shared [S, P]; w_uk [H, nope, R]; w_uv [H, V, R] -> o [T, H, V].
    The query t of a sequence's T sees the first S - T + t + 1 of its S positions; with select [T, W] those that its row
    names, rising from 0 within the sequence and -1 behind the last, alone (of none 0). "expanded" ("auto")
    computes keys and values; "absorbed" moves w_uk to the query and w_uv behind the sum, and works on
    latents.
    """
    forms = {"auto": _expanded, "expanded": _expanded, "absorbed": _absorbed}
    if form not in forms:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(forms)}")
    q, latent, k_shared, w_uk, w_uv = f64(q), f64(latent), f64(k_shared), f64(w_uk), f64(w_uv)
    rows = sequences(len(q), offsets)
    cached = sequences(len(latent), offsets if kv_offsets is None else kv_offsets)
    o = np.zeros((len(q), q.shape[1], w_uv.shape[1]))
    for r, c in zip(rows, cached, strict=True):
        T, S = r.stop - r.start, c.stop - c.start
        if S < T:
            raise ValueError(f"latent has {S} positions for {T} queries; the queries' own must be among them")
        seen = seen_by(T, S, None if select is None else select[r])
        o[r] = forms[form](q[r], latent[c], k_shared[c], w_uk, w_uv, scale, seen)
    return o


def seen_by(T, S, select=None):
    """For each of T queries, the last of S positions, an index of the positions that it attends to."""
    if select is None:
        return [slice(S - T + t + 1) for t in range(T)]
    return [_selected(row, t, S - T + t + 1) for t, row in enumerate(np.asarray(select))]


def _selected(row, t, seen):
    positions = row[:np.argmax(row < 0)] if (row < 0).any() else row
    if (row[len(positions):] != -1).any() or (np.diff(positions) <= 0).any() or (positions >= seen).any():
        raise ValueError(f"select[{t}] of a sequence is {row.tolist()}; positions of a query must rise within 0 to "
                         f"{seen - 1}, its own, and -1 follow the last")
    return positions


def _expanded(q, latent, k_shared, w_uk, w_uv, scale, seen):
    H = q.shape[1]
    k = np.einsum("hnr,sr->hsn", w_uk, latent)
    k = np.concatenate([k, np.broadcast_to(k_shared, (H, *k_shared.shape))], axis=-1)      # [H, S, nope + P]
    v = np.einsum("hvr,sr->hsv", w_uv, latent)                                             # [H, S, V]
    return _attend(q, k, v, scale, seen)


def _absorbed(q, latent, k_shared, w_uk, w_uv, scale, seen):
    nope = w_uk.shape[1]
    q = np.concatenate([np.einsum("hnr,thn->thr", w_uk, q[..., :nope]), q[..., nope:]], axis=-1)
    k = np.concatenate([latent, k_shared], axis=-1)[None]                   # one key head, [1, S, R + P]
    return np.einsum("hvr,thr->thv", w_uv, _attend(q, k, latent[None], scale, seen))


def _attend(q, k, v, scale, seen):
    """Softmax attention, query by query: q [T, H, n], k [H or 1, S, n], v [H or 1, S, V], T indices -> [T, H, V]."""
    o = np.zeros((len(q), q.shape[1], v.shape[-1]))
    for t, s in enumerate(seen):
        if k[:, s].shape[1] == 0:
            continue
        p = softmax(scale * (k[:, s] @ q[t][:, :, None])[..., 0])                          # [H, seen]
        o[t] = (p[:, None, :] @ v[:, s])[:, 0]
    return o


# ---- attention with grouped queries --------------------------------------------------------------


def rope(x, positions, *, base, rotary):
    """Pairs (x[j], x[j + rotary / 2]) of each head turned by ``positions * base ** (-2 j / rotary)``; the rest stays.

    x [..., H, K], positions [...] integers -> y as x.
    """
    x, half = f64(x), rotary // 2
    if rotary % 2 or not 0 <= rotary <= x.shape[-1]:
        raise ValueError(f"rotary is {rotary}; it must be even, from 0 to K = {x.shape[-1]}")
    angle = f64(as_array(positions, "positions"))[..., None, None] * base ** (-2.0 * np.arange(half) / max(rotary, 1))
    a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)


@any_batch
def attention(q, k, v, *, scale, offsets=None, kv_offsets=None):
    """Causal attention: q [T, H, K], k [S, Hkv, K], v [S, Hkv, V] -> o [T, H, V]; query head h has head h // (H / Hkv).

    The query t of a sequence's T sees the first S - T + t + 1 of its S positions.
    """
    q, k, v = f64(q), f64(k), f64(v)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {k.shape[1]}; these must divide those")
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.swapaxes(0, 1), group, axis=0) for a in (k, v))                    # [H, S, .]
    rows = sequences(len(q), offsets)
    cached = sequences(k.shape[1], offsets if kv_offsets is None else kv_offsets)
    o = np.zeros((*q.shape[:2], v.shape[-1]))
    for r, c in zip(rows, cached, strict=True):
        T, S = r.stop - r.start, c.stop - c.start
        if S < T:
            raise ValueError(f"k has {S} positions for {T} queries; the queries' own must be among them")
        o[r] = _attend(q[r], k[:, c], v[:, c], scale, seen_by(T, S))
    return o


# ---- mixture of experts --------------------------------------------------------------------------


def _top(x, k):
    """Indices of the k largest of each row, the lowest index first among equals."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


@any_batch
def route(scores, *, k, bias=None, groups=1, top_groups=1, function="sigmoid", renormalise=True, scale=1.0):
    """Choose k experts a token: scores [T, E] are the router's logits, bias [E] is for the choice only.

    s = sigmoid or softmax of the scores; s' = s + bias; of `groups` equal groups the `top_groups` best by the
    sum of their two largest s' stay; among them the k largest s', the lowest id among equals. Weights are s
    of the chosen, divided by their sum (+ 1e-20) when renormalised, times scale.

    Returns ids [T, k] int32, ascending in each row, and weights [T, k] in their order.
    """
    s = _router_scores(scores, function)
    chosen = s if bias is None else s + f64(bias)
    T, E = s.shape
    if E % groups or not 1 <= top_groups <= groups or not 1 <= k <= E // groups * top_groups:
        raise ValueError(f"k is {k} with {E} experts, groups {groups}, top_groups {top_groups}; groups must "
                         f"divide the experts and the chosen groups hold at least k")
    if groups > 1:
        members = chosen.reshape(T, groups, E // groups)
        best = _top(np.sort(members, axis=-1)[..., -2:].sum(-1), top_groups)               # [T, top_groups]
        kept = np.zeros((T, groups), bool)
        np.put_along_axis(kept, best, True, axis=-1)
        chosen = np.where(kept[:, :, None], members, -np.inf).reshape(T, E)
    ids = np.sort(_top(chosen, k), axis=-1).astype(np.int32)
    return ids, route_weights(scores, ids, function=function, renormalise=renormalise, scale=scale)


def route_weights(scores, ids, *, function="sigmoid", renormalise=True, scale=1.0):
    """The weights that `route` gives to chosen ids [T, k]; NaN in a row of scores makes them all NaN."""
    s = _router_scores(scores, function)
    w = np.take_along_axis(s, as_array(ids, "ids").astype(np.int64), axis=-1)
    if renormalise:
        w = w / (w.sum(-1, keepdims=True) + 1e-20)
    return np.where(np.isnan(s).any(-1, keepdims=True), np.nan, w * scale)


def _router_scores(scores, function):
    if function == "none":  # they are what the others would make of them
        return f64(scores)
    if function not in ("sigmoid", "softmax"):
        raise ValueError(f'function is {function!r}; it must be "sigmoid" or "softmax"')
    return sigmoid(scores) if function == "sigmoid" else softmax(scores)


@any_batch
def moe(x, ids, weights, w_gate, w_up, w_down, *, shared=None, shared_gate=None, activation="silu", situ=None,
        limit=None):
    """``y = sum_e weights_e * w_down_e swiglu(w_gate_e x, w_up_e x)`` by ascending e, then ``+ shared``.

    x [T, D]; ids, weights [T, k]; w_gate, w_up [E of [F, D]] and w_down [E of [D, F]] arrays, or sequences
    that are asked only for the experts in use; shared is the shared expert's output [T, D], or its three
    matrices; shared_gate [1, D] scales it by ``sigmoid(shared_gate x)``. With ``situ``, (beta, linear_beta), every
    expert has `situ` for `swiglu`; with ``limit`` it is swiglu's.
    """
    if activation != "silu":
        raise ValueError(f"activation is {activation!r}; it must be 'silu'")
    if situ is not None and limit is not None:
        raise ValueError(f"limit is {limit} beside situ; it must be None, it is SwiGLU's")
    if isinstance(shared, tuple):
        shared = _expert(x, *shared, situ, limit)
    if shared_gate is not None:
        shared = sigmoid(linear(x, shared_gate)) * shared
    x, ids, weights = f64(x), as_array(ids, "ids"), f64(weights)
    y = np.zeros_like(x)
    for e in np.unique(ids):
        t, slot = np.nonzero(ids == e)
        np.add.at(y, t, weights[t, slot][:, None] * _expert(x[t], w_gate[e], w_up[e], w_down[e], situ, limit))
    return y if shared is None else y + f64(shared)


def _expert(x, w_gate, w_up, w_down, betas, limit):
    gate, up = linear(x, w_gate), linear(x, w_up)
    h = swiglu(gate, up, limit=limit) if betas is None else situ(gate, up, beta=betas[0], linear_beta=betas[1])
    return linear(h, w_down)


# ---- sampling ------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10: four 32-bit words of counter and two of key -> four words. Salmon et al., SC 2011."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def uniform(seed, sequence, position):
    """A number of [0, 1) with 53 bits: key = seed, counter = (position, sequence), low words first."""
    def words(x):
        return x & 0xFFFFFFFF, x >> 32 & 0xFFFFFFFF

    x0, x1, _, _ = philox((*words(int(position)), *words(int(sequence))), words(int(seed)))
    return ((x0 << 21) + (x1 >> 11)) * 2.0**-53


def sample_weight(logits, temperature):
    """``t = (x - max x) * log2(e) / temperature`` and the weights ``2^t``, float32; logits [vocab], temperature > 0.

    Softmax before its division, in float32 as `sample` defines it: a difference, a product with the rounded factor,
    and a polynomial for the broken part of t, each step rounded once. Weights below ``2^-126.5`` are 0.
    """
    x, f32 = as_array(logits, "logits").astype(np.float32), np.float32
    with np.errstate(over="ignore", under="ignore"):
        t = (x - x.max()) * f32(min(np.log2(np.e) / f64(temperature), np.finfo(f32).max))
        n = np.rint(np.maximum(t, f32(-127)))
        broken, p = f64(np.maximum(t, f32(-127)) - n), f32(float.fromhex("0x1.417a9cp-13"))
        for c in ("0x1.5f0948p-10", "0x1.3b2dd2p-7", "0x1.c6af7ap-5", "0x1.ebfbdcp-3", "0x1.62e43p-1", "1"):
            p = f32(f64(p) * broken + float.fromhex(c))
        return t, np.where(n < -126, f32(0), np.ldexp(p, n.astype(int)))


def sample(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sequence=0, position=0):
    """Draw a token id from logits [vocab]; -infinity masks a token. Rows of logits [T, vocab] give T ids, and every
    argument may then be T values.

    Temperature 0 is the largest logit. Otherwise weights (`sample_weight`) in the order of x descending, then id
    ascending: the first top_k stay (0: all), of these w >= min_p, of these the shortest prefix with a sum >= top_p of
    their sum (1: all). The first whose running sum exceeds `uniform` of that prefix's sum is drawn. Temperature, top_p
    and min_p are float32.
    """
    x = f64(logits)
    if x.ndim == 2:
        given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, sequence=sequence,
                     position=position)
        each = {name: np.broadcast_to(np.asarray(value, object), len(x)) for name, value in given.items()}
        return np.array([sample(row, **{name: values[t] for name, values in each.items()})
                         for t, row in enumerate(x)], np.int32)
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}; they must "
                         f"be >= 0, >= 0, in (0, 1] and in [0, 1]")
    bad = np.flatnonzero(np.isnan(x) | (x == np.inf))
    if len(bad) or (x == -np.inf).all():
        i = bad[0] if len(bad) else 0
        raise ValueError(f"logits[{i}] is {x[i]}; logits must be finite, or -inf for some")
    if temperature == 0:
        return int(np.argmax(x))
    top_p, min_p = np.float32(top_p), np.float32(min_p)
    t, w = sample_weight(logits, np.float32(temperature))
    order = _top(x, top_k or len(x))
    order = order[(w[order] > 0) & (t[order] >= np.float32(np.log2(f64(min_p)) if min_p else -np.inf))]
    running = np.cumsum(f64(w[order]))
    if top_p < 1:
        running = running[:np.searchsorted(running, f64(top_p) * running[-1]) + 1]
    drawn = np.searchsorted(running, uniform(seed, sequence, position) * running[-1], side="right")
    return int(order[min(drawn, len(running) - 1)])
