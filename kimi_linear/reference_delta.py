"""The gated delta rule in float64: the recurrence, the chunked form, and its two halves as ops of their own.

Re-exported by :mod:`kimi_linear.reference`, whose conventions hold here. The derivation is
docs/math.md#delta_rule; names are those of its formulas: a = exp(g), and for row i and column j of a chunk the
decays start_i = prod_{s <= i} a_s, E_ij = prod_{j < s <= i} a_s and end_j = prod_{s > j} a_s, each of them a
product of the factors in between.

Sources: arXiv:2510.26692 (a gate each channel), arXiv:2412.06464 (a gate each head), arXiv:2406.06484 (chunks).
"""

from __future__ import annotations

import numpy as np

from ._arrays import check_shape, checkpoint_counts
from ._batches import any_batch
from ._float64 import f64, of_sequences, sequences

__all__ = ["decay_cumsum", "delta_rule", "delta_rule_inter", "delta_rule_intra"]


def decay_cumsum(g, *, chunk=64, offsets=None):
    """Inclusive running sum of g [T, ...] over tokens, afresh in each chunk (None: each sequence)."""
    g = f64(g)
    c = np.empty_like(g)
    for r in sequences(len(g), offsets):
        for part in chunks_of(r, chunk):
            c[part] = np.cumsum(g[part], axis=0)
    return c


@any_batch
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
    form : "recurrent", "auto", "chunked" or "pairwise"
        Recurrent is the formula above, and "auto" is it, too, whatever the engine makes of it. Chunked is
        `delta_rule_intra`, then `delta_rule_inter`: exact for every gate; a head's chunk whose L or P is
        not finite is taken token by token, so that NaN lands where the formula has it. Pairwise is the
        textbook chunk, which subtracts cumulative sums: NaN where g is -infinity.
    head_map : value head h reads key head h // (Hv / Hk) ("grouped") or h % Hk ("tiled").
    checkpoints : int, increasing integers, or a list of such for each sequence; optional
        Also return states, [n, Hv, K, V]: after every so many tokens of each sequence, or after these
        numbers of tokens. Each is the final state of a run that ended there; nothing else changes.
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
    q, v, beta = f64(q), f64(v), f64(beta)
    T, Hv, V = v.shape
    check_shape(beta, "beta", (T, Hv))
    check_shape(q, "q", (T, "Hk", "K"))
    q, k, g = of_value_heads(q, k, g, Hv, scale, head_map)
    K = q.shape[-1]

    ranges = sequences(T, offsets)
    cuts = checkpoint_counts(checkpoints, [r.stop - r.start for r in ranges])
    states = states_from(initial_state, (len(ranges), Hv, K, V))
    o, kept = np.zeros((T, Hv, V)), []

    def run(r, S):
        return forms[form](q[r], k[r], v[r], g[r], beta[r], S)

    for n, r in enumerate(ranges):
        kept += [states[n].copy()] * (0 in cuts[n])
        for part in chunks_of(r, 1 if forms[form] is _recurrent else chunk):
            ends = [r.start + c for c in cuts[n] if part.start < r.start + c <= part.stop]
            kept += [run(slice(part.start, end), states[n])[1] for end in ends]
            o[part], states[n] = run(part, states[n])
    state = states if offsets is not None else states[0]
    if final_state is not None:
        final_state[...] = state
    return (o, state) if checkpoints is None else (o, state, np.array(kept).reshape(-1, Hv, K, V))


@any_batch
def delta_rule_intra(q, k, v, g, beta, *, scale=None, offsets=None, chunk=64, head_map="grouped"):
    """What the chunks of the delta rule are before any state is known. For rows i and j of a chunk::

        L_ij = beta_i <k_i, E_ij k_j>  (j < i)        P_ij = <scale q_i, E_ij k_j>  (j <= i)
        T = (I + L)^-1        W = T Diag(beta) (start k)        U = T Diag(beta) v

    so that the corrections of `delta_rule` are d = U - W S for the S that the chunk begins with.

    Parameters
    ----------
    q, k, v, g, beta, scale, offsets, head_map : as in `delta_rule`
    chunk : int
        Tokens a chunk, counted from the first of each sequence; the last one is shorter.

    Returns
    -------
    L, P, T : (T, Hv, chunk)
        Row i of its chunk at its token, column j for the j-th token of the chunk; zeros above the triangle
        and past a short chunk's end. L has zeros on the diagonal, T ones.
    W : (T, Hv, K); U : (T, Hv, V)

    Source: arXiv:2510.26692, equations 2 to 9; arXiv:2406.06484.
    """
    q, v, beta = f64(q), f64(v), f64(beta)
    rows, Hv, V = v.shape
    check_shape(beta, "beta", (rows, Hv))
    check_shape(q, "q", (rows, "Hk", "K"))
    q, k, g = of_value_heads(q, k, g, Hv, scale, head_map)
    squares = np.zeros((3, rows, Hv, chunk))
    W, U = np.zeros(k.shape), np.zeros(v.shape)
    for r in sequences(rows, offsets):
        for part in chunks_of(r, chunk):
            n = part.stop - part.start
            L, P = _triangles(q[part], k[part], g[part], beta[part])
            T, W[part], U[part] = _solve(k[part], v[part], beta[part], L, decays(g[part])[0])
            squares[:, part, :, :n] = np.array([L, P, T]).transpose(0, 2, 1, 3)
    return (*squares, W, U)


@any_batch
def delta_rule_inter(q, k, g, P, W, U, *, scale=None, initial_state=None, offsets=None, chunk=64,
                     head_map="grouped", final_state=None):
    """The pass over chunks, each beginning with the state S that the last one left::

        d = U - W S        o_i = S^T (start_i scale q_i) + sum_{j <= i} P_ij d_j
        S <- Diag(start_{n-1}) S + sum_j (end_j k_j) d_j^T

    Parameters
    ----------
    q, k, g, scale, initial_state, offsets, head_map, final_state : as in `delta_rule`; scale as it was for P
    P, W, U, chunk : of `delta_rule_intra`

    Returns
    -------
    o : (T, Hv, V); state : as initial_state
    d : (T, Hv, V)
        The corrections, those of the recurrence ("v_new" elsewhere).

    Source: arXiv:2510.26692, equations 2 to 9.
    """
    q, P, W, U = f64(q), f64(P), f64(W), f64(U)
    T, Hv, V = U.shape
    check_shape(q, "q", (T, "Hk", "K"))
    q, k, g = of_value_heads(q, k, g, Hv, scale, head_map)
    check_shape(W, "W", q.shape)
    check_shape(P, "P", (T, Hv, chunk))
    ranges = sequences(T, offsets)
    states = states_from(initial_state, (len(ranges), Hv, k.shape[-1], V))
    o, d = np.zeros((2, T, Hv, V))
    for n, r in enumerate(ranges):
        for part in chunks_of(r, chunk):
            triangle = P[part, :, :part.stop - part.start].transpose(1, 0, 2)
            o[part], states[n], d[part] = _pass(q[part], k[part], triangle, W[part], U[part], states[n],
                                                *decays(g[part]))
    state = states if offsets is not None else states[0]
    if final_state is not None:
        final_state[...] = state
    return o, state, d


# ---- arguments -----------------------------------------------------------------------------------


def chunks_of(r: slice, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be >= 1")
    step = chunk or max(r.stop - r.start, 1)
    return [slice(t, min(t + step, r.stop)) for t in range(r.start, r.stop, step)]


def key_heads(Hk, Hv, head_map):
    """The key head of each value head."""
    if head_map not in ("grouped", "tiled") or Hv % Hk:
        raise ValueError(f'head_map is {head_map!r} for {Hv} value and {Hk} key heads; it must be "grouped" '
                         f'or "tiled", and the value heads a multiple of the key heads')
    return np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk


def of_value_heads(q, k, g, Hv, scale, head_map):
    """q, scaled, and k and g as [T, Hv, K]: one key head and one gate a channel for each value head."""
    q, k = f64(q), f64(k)
    T, Hk, K = q.shape
    check_shape(k, "k", q.shape)
    heads = key_heads(Hk, Hv, head_map)
    g = np.zeros((T, Hv)) if g is None else f64(g)
    check_shape(g, "g", (T, Hv), (T, Hv, K))
    if (g > 0).any():
        raise ValueError(f"g has a value {g.max():g} > 0; it must be a log-decay <= 0: was exp(g) passed?")
    g = np.broadcast_to(g[..., None] if g.ndim == 2 else g, (T, Hv, K))
    return q[:, heads] * (K ** -0.5 if scale is None else scale), k[:, heads], g


def states_from(initial_state, shape):
    return of_sequences(initial_state, "initial_state", shape).copy()


# ---- the forms: tokens q, k, g [n, H, K], v [n, H, V], beta [n, H], state S [H, K, V] -> o, S ----


def _recurrent(q, k, v, g, beta, S):
    """Token by token."""
    o = np.zeros(v.shape)
    for t in range(len(q)):
        S = np.exp(g[t])[:, :, None] * S
        d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * d[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", S, q[t])
    return o, S


def _chunked(q, k, v, g, beta, S):
    """One chunk, every decay a product of the factors exp(g) in between."""
    L, P = _triangles(q, k, g, beta)
    o, after = with_triangles(q, k, v, beta, S, L, P, *decays(g))
    for h in np.flatnonzero(~np.isfinite(L).all((1, 2)) | ~np.isfinite(P).all((1, 2))):
        one = slice(h, h + 1)
        o[:, one], after[one] = _recurrent(q[:, one], k[:, one], v[:, one], g[:, one], beta[:, one], S[one])
    return o, after


def _pairwise(q, k, v, g, beta, S):
    """One chunk, every decay the exponential of a difference of cumulative sums c."""
    n, c = len(g), np.cumsum(g, axis=0)
    L, P = np.zeros((2, g.shape[1], n, n))
    for i in range(n):
        L[:, i, :i] = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], np.exp(c[i] - c[:i]) * k[:i])
        P[:, i, :i + 1] = np.einsum("hk,jhk->hj", q[i], np.exp(c[i] - c[:i + 1]) * k[:i + 1])
    return with_triangles(q, k, v, beta, S, L, P, np.exp(c), np.exp(c[-1] - c))


def with_triangles(q, k, v, beta, S, L, P, start, end):
    """One chunk of given L and P [H, n, n], and decays start and end [n, H, K]."""
    _, W, U = _solve(k, v, beta, L, start)
    return _pass(q, k, P, W, U, S, start, end)[:2]


def decays(g):
    """start and end [n, H, K] of one chunk."""
    a = np.exp(g)
    end = np.ones_like(a)
    end[:-1] = np.cumprod(a[:0:-1], axis=0)[::-1]
    return np.cumprod(a, axis=0), end


def _triangles(q, k, g, beta):
    """L and P [H, n, n] of one chunk."""
    n, a = len(g), np.exp(g)
    E = np.ones_like(a)                      # E[j] = E_ij for the row i of the loop
    L, P = np.zeros((2, a.shape[1], n, n))
    for i in range(n):
        E[:i] *= a[i]
        L[:, i, :i] = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], E[:i] * k[:i])
        P[:, i, :i + 1] = np.einsum("hk,jhk->hj", q[i], E[:i + 1] * k[:i + 1])
    return L, P


def _solve(k, v, beta, L, start):
    """T = (I + L)^-1 [H, n, n], row by row from the top; W and U. What is above a triangle is left out, not
    multiplied by 0, so that NaN of a row reaches no row above it."""
    H, n, _ = L.shape
    T = np.zeros((H, n, n))
    W, U = np.zeros(k.shape), np.zeros(v.shape)
    for i in range(n):
        T[:, i, i] = 1
        for j in range(i):
            T[:, i, :j + 1] -= L[:, i, j, None] * T[:, j, :j + 1]
        M = T[:, i, :i + 1] * beta[:i + 1].T
        W[i] = np.einsum("hj,jhk->hk", M, start[:i + 1] * k[:i + 1])
        U[i] = np.einsum("hj,jhv->hv", M, v[:i + 1])
    return T, W, U


def _pass(q, k, P, W, U, S, start, end):
    """One chunk's outputs, final state and corrections from the incoming S; P [H, n, n]."""
    d = U - np.einsum("ihk,hkv->ihv", W, S)
    o = np.einsum("ihk,hkv->ihv", start * q, S)
    for i in range(len(o)):
        o[i] += np.einsum("hj,jhv->hv", P[:, i, :i + 1], d[:i + 1])
    S = start[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", end * k, d)
    return o, S, d
