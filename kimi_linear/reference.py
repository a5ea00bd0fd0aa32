"""Every op of the model in float64 NumPy: the measure by which everything else is judged. For reading.

Names and arguments are those of ``kimi_linear.ops``. Inputs of any float type are widened to float64, ids
stay integers. Shape letters: T tokens, N sequences, H heads (Hk of keys, Hv of values), K key width, V value
width, D model width, R latent rank, P width of the shared key part, C channels, W taps, E experts, F inner
width. With ``offsets`` [N+1] the tokens of N sequences lie one after another and states have a leading axis
N.

Sources: Kimi Linear report, arXiv:2510.26692 (delta rule, decay, block); DeepSeek-V2, arXiv:2405.04434
(latent attention); DeepSeek-V3, arXiv:2412.19437 (routing); Salmon et al., SC 2011 (Philox).
"""

from __future__ import annotations

import numpy as np

from ._arrays import as_array


def f64(x) -> np.ndarray:
    """`x` as a float64 array, from all that `kl.ops` takes; float32, float16 and bfloat16 widen exactly."""
    return as_array(x, "x").astype(np.float64, copy=False)


def _sequences(T: int, offsets) -> list[slice]:
    """The token range of each sequence; without offsets, one sequence of all T."""
    if offsets is None:
        return [slice(0, T)]
    o = [int(x) for x in offsets]
    if o[0] != 0 or o[-1] != T or any(a > b for a, b in zip(o, o[1:])):
        raise ValueError(f"offsets is {o}; it must rise from 0 to the number of tokens, {T}")
    return [slice(a, b) for a, b in zip(o, o[1:])]


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


def swiglu(gate, up):
    """``silu(gate) * up``."""
    return silu(gate) * f64(up)


def softmax(x):
    """``exp(x - max) / sum``, over the last axis."""
    x = f64(x)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, w, *, eps):
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis; x [..., D], w [D]."""
    x = f64(x)
    return f64(w) * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def gated_rms_norm(x, z, w, *, eps, activation="sigmoid"):
    """``rms_norm(x, w) * act(z)``, act being "sigmoid" or "silu"; x, z [..., D], w [D]."""
    if activation not in ("sigmoid", "silu"):
        raise ValueError(f'activation is {activation!r}; it must be "sigmoid" or "silu"')
    return rms_norm(x, w, eps=eps) * (sigmoid(z) if activation == "sigmoid" else silu(z))


def l2_norm(x, *, eps=1e-6):
    """``x / sqrt(sum(x^2) + eps)`` over the last axis."""
    x = f64(x)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


# ---- matrix products -----------------------------------------------------------------------------


def embedding(ids, table):
    """Rows of a table: ids [T] integers, table [vocab, D] -> [T, D]."""
    ids = np.asarray(ids)
    for t in np.flatnonzero((ids < 0) | (ids >= len(table)))[:1]:
        raise ValueError(f"ids[{t}] is {ids.flat[t]}; it must be in 0..{len(table) - 1}")
    return f64(np.asarray(table)[ids])


def linear(x, w, bias=None):
    """``x w^T + bias``: x [..., n], w [m, n], bias [m] -> [..., m]."""
    y = f64(x) @ f64(w).T
    return y if bias is None else y + f64(bias)


# ---- KDA -----------------------------------------------------------------------------------------


def short_conv(x, w, *, history=None, offsets=None, activation="silu"):
    """Causal depthwise convolution, ``y[t, c] = act(sum_j w[c, j] x[t - W + 1 + j, c])``.

    x [T, C]; w [C, W], the last tap on the current token; history [W-1, C] (or [N, W-1, C]): the inputs
    before the first, oldest first, zeros where None. Returns y [T, C] and the new history.
    """
    if activation not in ("silu", None):
        raise ValueError(f'activation is {activation!r}; it must be "silu" or None')
    x, w = f64(x), f64(w)
    (T, C), W = x.shape, w.shape[1]
    ranges = _sequences(T, offsets)
    shape = (len(ranges), W - 1, C)
    history = np.zeros(shape) if history is None else f64(history).reshape(shape)
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
    f = f64(f)
    rate = f64(rate).reshape(-1, *[1] * (f.ndim - 2))
    x = f + f64(dt_bias).reshape(f.shape[1:])
    return -rate * softplus(x) if lower_bound is None else lower_bound * sigmoid(rate * x)


def decay_cumsum(g, *, chunk=64, offsets=None):
    """Inclusive running sum of g [T, ...] over tokens, afresh in each chunk (None: each sequence)."""
    g = f64(g)
    c = np.empty_like(g)
    for r in _sequences(len(g), offsets):
        for part in _chunks(r, chunk):
            c[part] = np.cumsum(g[part], axis=0)
    return c


def _chunks(r: slice, chunk: int | None) -> list[slice]:
    step = chunk or max(r.stop - r.start, 1)
    return [slice(t, min(t + step, r.stop)) for t in range(r.start, r.stop, step)]


def delta_rule(q, k, v, g, beta, *, scale=None, initial_state=None, offsets=None, form="auto", chunk=64,
               l2_norm=False, l2_eps=1e-6, head_map="grouped", checkpoints=None, final_state=None):
    """The gated delta rule. Per value head and token, with a = exp(g)::

        S <- Diag(a) S;   d = beta (v - S^T k);   S <- S + k d^T;   o = S^T (scale q)

    Parameters
    ----------
    q, k : (T, Hk, K); v : (T, Hv, V); beta : (T, Hv)
    g : (T, Hv, K), (T, Hv) or None
        Log-decay in nats per token, <= 0; -infinity forgets everything.
    scale : float
        On q, after the norm; None is K ** -0.5.
    initial_state : (Hv, K, V), or (N, Hv, K, V) with offsets; None is zeros.
    form : "recurrent" ("auto"), "chunked" or "pairwise"
        Chunked solves `chunk` tokens at once, with decays that are products of the factors in between: exact
        for every gate. Pairwise is the textbook chunk, which subtracts cumulative sums: NaN where g is
        -infinity.
    head_map : value head h reads key head h // (Hv / Hk) ("grouped") or h % Hk ("tiled").
    checkpoints : int, optional
        Also return the states after every so many tokens of each sequence, [n, Hv, K, V].
    final_state : array, optional
        Receives the final state; may be initial_state.

    Returns
    -------
    o : (T, Hv, V); state : as initial_state; checkpoints where asked for.

    Source: arXiv:2510.26692, equations 1 (recurrence) and 2 to 9 (chunk).
    """
    forms = {"auto": _recurrent, "recurrent": _recurrent, "chunked": _chunked, "pairwise": _pairwise}
    if form not in forms:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(forms)}")
    if l2_norm:
        q, k = (f64(x) / np.sqrt((f64(x) ** 2).sum(-1, keepdims=True) + l2_eps) for x in (q, k))
    q, k, v, beta = f64(q), f64(k), f64(v), f64(beta)
    (T, Hk, K), (Hv, V) = q.shape, v.shape[1:]
    heads = _key_heads(Hk, Hv, head_map)
    q, k = q[:, heads] * (K ** -0.5 if scale is None else scale), k[:, heads]
    g = np.zeros((T, Hv)) if g is None else f64(g)
    if (g > 0).any():
        raise ValueError(f"g has a value {g.max():g} > 0; it must be a log-decay <= 0: was exp(g) passed?")
    g = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, Hv, K))

    ranges = _sequences(T, offsets)
    shape = (len(ranges), Hv, K, V)
    states = np.zeros(shape) if initial_state is None else f64(initial_state).reshape(shape).copy()
    o, kept = np.zeros((T, Hv, V)), []
    step = 1 if form in ("auto", "recurrent") else chunk
    for n, r in enumerate(ranges):
        for whole in _chunks(r, checkpoints):
            for part in _chunks(whole, step):
                o[part], states[n] = forms[form](q[part], k[part], v[part], g[part], beta[part], states[n])
            if checkpoints and whole.stop - whole.start == checkpoints:
                kept.append(states[n].copy())
    state = states if offsets is not None else states[0]
    if final_state is not None:
        final_state[...] = state
    return (o, state, np.array(kept).reshape(-1, Hv, K, V)) if checkpoints else (o, state)


def _key_heads(Hk: int, Hv: int, head_map: str) -> np.ndarray:
    """The key head of each value head."""
    if head_map not in ("grouped", "tiled") or Hv % Hk:
        raise ValueError(f'head_map is {head_map!r} for {Hv} value and {Hk} key heads; it must be "grouped" '
                         f'or "tiled", and the value heads a multiple of the key heads')
    return np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk


def _recurrent(q, k, v, g, beta, S):
    """One token: q, k, g [1, H, K], v [1, H, V], beta [1, H], S [H, K, V] -> o [1, H, V], S."""
    q, k, v, g, beta = q[0], k[0], v[0], g[0], beta[0]
    S = np.exp(g)[:, :, None] * S
    d = beta[:, None] * (v - np.einsum("hkv,hk->hv", S, k))
    S = S + k[:, :, None] * d[:, None, :]
    return np.einsum("hkv,hk->hv", S, q)[None], S


def _chunked(q, k, v, g, beta, S):
    """One chunk of n tokens, every decay a product of the factors exp(g) in between."""
    n, a = len(g), np.exp(g)
    start = np.empty_like(a)                 # start[i] = prod_{s <= i} a_s,  i.e. exp(c_i)
    to = np.ones_like(a)                     # to[j] = prod_{j < s <= i} a_s for the row i of the loop
    L, P = np.zeros((2, a.shape[1], n, n))   # [H, n, n], lower triangles
    for i in range(n):
        start[i] = a[i] * (start[i - 1] if i else 1.0)
        to[:i] *= a[i]
        L[:, i, :i] = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], to[:i] * k[:i])
        P[:, i, :i + 1] = np.einsum("hk,jhk->hj", q[i], to[:i + 1] * k[:i + 1])
    return _inter(q, k, v, beta, S, L, P, start, to)


def _pairwise(q, k, v, g, beta, S):
    """One chunk of n tokens, every decay the exponential of a difference of cumulative sums c."""
    n, c = len(g), np.cumsum(g, axis=0)
    L, P = np.zeros((2, g.shape[1], n, n))
    for i in range(n):
        L[:, i, :i] = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], np.exp(c[i] - c[:i]) * k[:i])
        P[:, i, :i + 1] = np.einsum("hk,jhk->hj", q[i], np.exp(c[i] - c[:i + 1]) * k[:i + 1])
    return _inter(q, k, v, beta, S, L, P, np.exp(c), np.exp(c[-1] - c))


def _wy(k, v, beta, L, start):
    """W and U of the chunk: (I + L) [W | U] = Diag(beta) [start * k | v], row by row from the top."""
    X = beta[:, :, None] * np.concatenate([start * k, v], axis=-1)           # [n, H, K + V]
    for i in range(1, len(X)):
        X[i] -= np.einsum("hj,jhx->hx", L[:, i, :i], X[:i])
    return X[..., :k.shape[-1]], X[..., k.shape[-1]:]


def _inter(q, k, v, beta, S, L, P, start, end):
    """The chunk's outputs and final state from the incoming S; start and end are decays, as exp(c_i) and
    exp(c_{n-1} - c_j)."""
    W, U = _wy(k, v, beta, L, start)
    d = U - np.einsum("ihk,hkv->ihv", W, S)
    o = np.einsum("ihk,hkv->ihv", start * q, S)
    for i in range(len(o)):                  # rows after i are left out, so that their NaN stays theirs
        o[i] += np.einsum("hj,jhv->hv", P[:, i, :i + 1], d[:i + 1])
    S = start[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", end * k, d)
    return o, S


# ---- MLA -----------------------------------------------------------------------------------------


def latent_attention(q, latent, k_shared, w_uk, w_uv, *, scale, offsets=None, kv_offsets=None, form="auto"):
    """Attention over a latent cache: head h has keys ``[w_uk_h c | k_shared]`` and values ``w_uv_h c``.

    q [T, H, nope + P]; latent c [S, R]; k_shared [S, P]; w_uk [H, nope, R]; w_uv [H, V, R] -> o [T, H, V].
    The query t of a sequence's T sees the first S - T + t + 1 of its S positions. "expanded" ("auto")
    computes keys and values; "absorbed" moves w_uk to the query and w_uv behind the sum, and works on
    latents.
    """
    forms = {"auto": _expanded, "expanded": _expanded, "absorbed": _absorbed}
    if form not in forms:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(forms)}")
    q, latent, k_shared, w_uk, w_uv = f64(q), f64(latent), f64(k_shared), f64(w_uk), f64(w_uv)
    rows = _sequences(len(q), offsets)
    cached = _sequences(len(latent), offsets if kv_offsets is None else kv_offsets)
    o = np.zeros((len(q), q.shape[1], w_uv.shape[1]))
    for r, c in zip(rows, cached, strict=True):
        T, S = r.stop - r.start, c.stop - c.start
        if S < T:
            raise ValueError(f"latent has {S} positions for {T} queries; the queries' own must be among them")
        o[r] = forms[form](q[r], latent[c], k_shared[c], w_uk, w_uv, scale)
    return o


def _expanded(q, latent, k_shared, w_uk, w_uv, scale):
    T, S, H = len(q), len(latent), q.shape[1]
    k = np.einsum("hnr,sr->hsn", w_uk, latent)
    k = np.concatenate([k, np.broadcast_to(k_shared, (H, *k_shared.shape))], axis=-1)      # [H, S, nope + P]
    v = np.einsum("hvr,sr->hsv", w_uv, latent)                                             # [H, S, V]
    return _attend(q, k, v, scale, T, S)


def _absorbed(q, latent, k_shared, w_uk, w_uv, scale):
    T, S, nope = len(q), len(latent), w_uk.shape[1]
    q = np.concatenate([np.einsum("hnr,thn->thr", w_uk, q[..., :nope]), q[..., nope:]], axis=-1)
    k = np.concatenate([latent, k_shared], axis=-1)[None]                   # one key head, [1, S, R + P]
    return np.einsum("hvr,thr->thv", w_uv, _attend(q, k, latent[None], scale, T, S))


def _attend(q, k, v, scale, T, S):
    """Softmax attention, query by query: q [T, H, n], k [H or 1, S, n], v [H or 1, S, V] -> [T, H, V]."""
    o = np.zeros((T, q.shape[1], v.shape[-1]))
    for t in range(T):
        seen = S - T + t + 1
        p = softmax(scale * (k[:, :seen] @ q[t][:, :, None])[..., 0])                      # [H, seen]
        o[t] = (p[:, None, :] @ v[:, :seen])[:, 0]
    return o


# ---- mixture of experts --------------------------------------------------------------------------


def _top(x, k):
    """Indices of the k largest of each row, the lowest index first among equals."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


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
    w = np.take_along_axis(s, np.asarray(ids).astype(np.int64), axis=-1)
    if renormalise:
        w = w / (w.sum(-1, keepdims=True) + 1e-20)
    return np.where(np.isnan(s).any(-1, keepdims=True), np.nan, w * scale)


def _router_scores(scores, function):
    if function == "none":  # they are what the others would make of them
        return f64(scores)
    if function not in ("sigmoid", "softmax"):
        raise ValueError(f'function is {function!r}; it must be "sigmoid" or "softmax"')
    return sigmoid(scores) if function == "sigmoid" else softmax(scores)


def moe(x, ids, weights, w_gate, w_up, w_down, *, shared=None, shared_gate=None, activation="silu"):
    """``y = sum_e weights_e * w_down_e swiglu(w_gate_e x, w_up_e x)`` by ascending e, then ``+ shared``.

    x [T, D]; ids, weights [T, k]; w_gate, w_up [E of [F, D]] and w_down [E of [D, F]] arrays, or sequences
    that are asked only for the experts in use; shared is the shared expert's output [T, D], or its three
    matrices; shared_gate [1, D] scales it by ``sigmoid(shared_gate x)``.
    """
    if activation != "silu":
        raise ValueError(f"activation is {activation!r}; it must be 'silu'")
    if isinstance(shared, tuple):
        shared = linear(swiglu(linear(x, shared[0]), linear(x, shared[1])), shared[2])
    if shared_gate is not None:
        shared = sigmoid(linear(x, shared_gate)) * shared
    x, ids, weights = f64(x), np.asarray(ids), f64(weights)
    y = np.zeros_like(x)
    for e in np.unique(ids):
        t, slot = np.nonzero(ids == e)
        expert = linear(swiglu(linear(x[t], w_gate[e]), linear(x[t], w_up[e])), w_down[e])
        np.add.at(y, t, weights[t, slot][:, None] * expert)
    return y if shared is None else y + f64(shared)


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


def sample(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sequence=0, position=0):
    """Draw a token id from logits [vocab]; -infinity masks a token.

    Temperature 0 is the largest logit. Otherwise p = softmax(logits / temperature), by probability descending
    and id ascending; the first top_k stay (0: all), of these p >= min_p * max p, of these, renormalised, the
    shortest prefix with a sum >= top_p (1: all). The first whose running sum, renormalised, exceeds `uniform`
    is drawn.
    """
    x = f64(logits)
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}; they must "
                         f"be >= 0, >= 0, in (0, 1] and in [0, 1]")
    bad = np.flatnonzero(np.isnan(x) | (x == np.inf))
    if len(bad) or (x == -np.inf).all():
        i = bad[0] if len(bad) else 0
        raise ValueError(f"logits[{i}] is {x[i]}; logits must be finite, or -inf for some")
    if temperature == 0:
        return int(np.argmax(x))
    p = softmax(x / temperature)
    order = _top(p, top_k or len(p))
    order = order[p[order] >= min_p * p[order[0]]]
    if top_p < 1:
        running = np.cumsum(p[order]) / np.cumsum(p[order])[-1]
        order = order[:np.searchsorted(running, top_p) + 1]
    running = np.cumsum(p[order]) / np.cumsum(p[order])[-1]
    drawn = np.searchsorted(running, uniform(seed, sequence, position), side="right")
    return int(order[min(drawn, len(order) - 1)])
