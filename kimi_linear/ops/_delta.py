"""The gated delta rule, the two halves of its chunked form, and the cumulative gate."""

import math

import numpy as np

from .. import _core
from .._arrays import (
    apart,
    as_float32,
    as_offsets,
    checkpoint_counts,
    first_where,
    output,
    outputs,
    refuse_shared_outputs,
    sequences_of,
)
from .._names import choice
from .._scalars import as_finite, as_flag, as_whole
from ..context import current
from ._basic import check_eps

__all__ = ["decay_cumsum", "delta_rule", "delta_rule_inter", "delta_rule_intra"]

_GATES = {"none": 0, "head": 1, "channel": 2}
_FORMS = {"auto": 0, "recurrent": 1, "chunked": 2}
_HEAD_MAPS = {"grouped": 0, "tiled": 1}


def delta_rule(q, k, v, g, beta, *, scale=None, initial_state=None, offsets=None, form="auto", chunk=64,
               l2_norm=False, l2_eps=1e-6, head_map="grouped", checkpoints=None, final_state=None, out=None,
               ctx=None):
    """The gated delta rule: a matrix S [K, V] for each value head, and for each token::

        S <- Diag(exp(g)) S;    d = beta * (v - S^T k);    S <- S + k d^T;    o = S^T (scale * q)

    Exact at any decay: nothing is clamped, and ``g = -inf`` forgets everything. Subnormals are flushed: read as
    0, and results below 2**-126 become 0.

    Source: Kimi Linear report, arXiv:2510.26692, equation 1 (a gate each channel); Gated DeltaNet,
    arXiv:2412.06464 (a gate each head). Derivation: docs/math.md#delta_rule.

    Parameters
    ----------
    q, k : (T, Hk, K) float32
        With a batch axis in front, (B, T, Hk, K), everything has one.
    v : (T, Hv, V) float32
        Hv is a multiple of Hk.
    g : (T, Hv, K) or (T, Hv) float32, or None
        Log-decay in nats per token, <= 0, of each key channel or each head; None is no decay.
    beta : (T, Hv) float32
        Write rate, in [0, 2].
    scale : float, optional
        On q, after the norm; K ** -0.5 where None.
    initial_state : (Hv, K, V) float32, optional
        Zeros where None. ``(N, Hv, K, V)`` with `offsets`, ``(B, Hv, K, V)`` with a batch axis.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    form : {"auto", "recurrent", "chunked"}
        Token by token ("recurrent": any split of a sequence gives the same bytes); `chunk` tokens at once
        ("chunked": a split at a multiple of it does); or 16 at once and what is left over token by token
        ("auto", the fastest, unless the context names one of the others). They agree within the op's budget.
    chunk : int
        Tokens a chunk of the chunked form, 1 to 256.
    l2_norm : bool
        Norm q and k first: the bytes of ``ops.l2_norm(q, eps=l2_eps)``.
    l2_eps : float
    head_map : {"grouped", "tiled"}
        Value head h reads key head ``h // (Hv // Hk)``, or ``h % Hk``.
    checkpoints : int or increasing integers, optional
        Also return states: after every so many tokens of each sequence, or after these numbers of tokens. For
        several sequences a list of such lists, one a sequence. No other byte changes.
    final_state : array, optional
        Receives the final state; may be `initial_state`, which is then updated in place.
    out : tuple of two arrays, optional
        For `o`, which may be `v`, and for the state.
    ctx : Context, optional

    Returns
    -------
    o : as `v`, float32
    state : float32, shaped as `initial_state`
    checkpoints : (n, Hv, K, V) float32
        Only where asked for; of all sequences, one after another.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, g is positive, beta is outside [0, 2], or `offsets` or
        `checkpoints` do not rise.
    """
    v = as_float32(v, "v", ("T", "Hv", "V"), ("B", "T", "Hv", "V"))
    q, k, g, gate, sizes, scale, head_map, chunk = _keys(q, k, g, v, "v", scale, head_map, chunk)
    beta, form = _check_beta(beta, v.shape[:-1]), _FORMS[choice(form, "form", _FORMS)]
    offsets, lead = sequences_of(v, "v", 3, offsets)
    shape = (*lead, *sizes[1:])
    if initial_state is not None:
        initial_state = as_float32(initial_state, "initial_state", shape)
    cuts = None if checkpoints is None else checkpoint_counts(checkpoints, np.diff(offsets).tolist())

    o, state = outputs(out, 2)
    state = _one_state(state, final_state, shape, like=v)
    o = output(o, v.shape, "out[0]", like=v)
    refuse_shared_outputs(o, state)
    q, k, g, beta = (apart(a, o, state) for a in (q, k, g, beta))
    v = apart(v, o, state, same=o)
    initial_state = apart(initial_state, o, state, same=state)

    marks = ends = kept = None
    if cuts is not None:
        marks = np.array([c for counts in cuts for c in counts], np.int64)
        ends = np.cumsum([0, *map(len, cuts)], dtype=np.int64)
        kept = output(None, (len(marks), *sizes[1:]), like=v)
    _core.delta_rule(current(ctx)._core, o, state, q, k, v, g, beta, initial_state, offsets, len(offsets) - 1,
                     int(offsets[-1]), *sizes, scale, gate, form, head_map, chunk, as_flag(l2_norm, "l2_norm"),
                     check_eps(l2_eps, "l2_eps"), marks, ends, kept, 0 if cuts is None else len(marks))
    return (o, state) if cuts is None else (o, state, kept)


def delta_rule_intra(q, k, v, g, beta, *, scale=None, offsets=None, chunk=64, head_map="grouped", out=None,
                     ctx=None):
    """What the chunks of the delta rule are before any state is known. For rows i and j of a chunk::

        L_ij = beta_i <k_i, E_ij k_j>  (j < i)        P_ij = <scale q_i, E_ij k_j>  (j <= i)
        T = (I + L)^-1        W = T Diag(beta) (start k)        U = T Diag(beta) v

    where a = exp(g), start_i is the product of a_0 to a_i and E_ij of a_j+1 to a_i. The first half of
    ``delta_rule(form="chunked")``, to diff a kernel's intermediates one by one; the second is `delta_rule_inter`.
    Exact at any decay. Subnormals are flushed. Keys far from unit length may make L, P and what follows
    from them overflow: they are then infinite or NaN, as computed, where `delta_rule` would turn to the recurrence.

    Source: Kimi Linear report, arXiv:2510.26692, equations 2 to 9; DeltaNet in chunks, arXiv:2406.06484. Derivation:
    docs/math.md#delta_rule_intra.

    Parameters
    ----------
    q, k : (T, Hk, K) float32
        With a batch axis in front, (B, T, Hk, K), everything has one.
    v : (T, Hv, V) float32
        Hv is a multiple of Hk.
    g : (T, Hv, K) or (T, Hv) float32, or None
        Log-decay in nats per token, <= 0, of each key channel or each head; None is no decay.
    beta : (T, Hv) float32
        Write rate, in [0, 2].
    scale : float, optional
        On q; K ** -0.5 where None.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    chunk : int
        Tokens a chunk, 1 to 256, counted from the first of each sequence; the last one may be shorter.
    head_map : {"grouped", "tiled"}
        Value head h reads key head ``h // (Hv // Hk)``, or ``h % Hk``.
    out : tuple of five arrays, optional
        For L, P, T, W and U, None for one to make.
    ctx : Context, optional

    Returns
    -------
    L, P, T : (T, Hv, chunk) float32
        Row i of its chunk at its token, column j for the chunk's j-th token; 0 above the triangle and past a
        short chunk's end. L has 0 on the diagonal, T has 1.
    W : (T, Hv, K) float32
    U : as `v`, float32
        The corrections of `delta_rule` are U - W S for the state S that the chunk begins with.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, g is positive, beta is outside [0, 2], or `offsets` do not rise.
    """
    v = as_float32(v, "v", ("T", "Hv", "V"), ("B", "T", "Hv", "V"))
    q, k, g, gate, sizes, scale, head_map, chunk = _keys(q, k, g, v, "v", scale, head_map, chunk)
    beta = _check_beta(beta, v.shape[:-1])
    offsets, _ = sequences_of(v, "v", 3, offsets)
    heads = v.shape[:-1]
    shapes = (*[(*heads, chunk)] * 3, (*heads, q.shape[-1]), v.shape)
    out = tuple(output(o, shape, f"out[{i}]", like=v)
                for i, (o, shape) in enumerate(zip(outputs(out, 5), shapes, strict=True)))
    refuse_shared_outputs(*out)
    q, k, v, g, beta = (apart(a, *out) for a in (q, k, v, g, beta))
    _core.delta_rule_intra(current(ctx)._core, *out, q, k, v, g, beta, offsets, len(offsets) - 1, int(offsets[-1]),
                           *sizes, scale, gate, head_map, chunk)
    return out


def delta_rule_inter(q, k, g, P, W, U, *, scale=None, initial_state=None, offsets=None, chunk=64,
                     head_map="grouped", final_state=None, out=None, ctx=None):
    """The pass over the chunks of the delta rule, each beginning with the state S that the last one left::

        d = U - W S        o_i = S^T (start_i scale q_i) + sum_{j <= i} P_ij d_j
        S <- Diag(start_n-1) S + sum_j (end_j k_j) d_j^T

    where end_j is the product of exp(g) from row j + 1 to the chunk's last. With P, W and U of `delta_rule_intra`
    it is ``delta_rule(form="chunked")``, but for rounding. Exact at any decay. Subnormals are flushed. What is infinite
    or NaN in P, W or U reaches the results as the formula has it: no chunk is left to the recurrence.

    Source: Kimi Linear report, arXiv:2510.26692, equations 2 to 9; DeltaNet in chunks, arXiv:2406.06484. Derivation:
    docs/math.md#delta_rule_inter.

    Parameters
    ----------
    q, k : (T, Hk, K) float32
        With a batch axis in front, (B, T, Hk, K), everything has one.
    g : (T, Hv, K) or (T, Hv) float32, or None
        Log-decay in nats per token, <= 0, of each key channel or each head; None is no decay.
    P : (T, Hv, chunk) float32
        Read on and below the diagonal of each chunk only.
    W : (T, Hv, K) float32
    U : (T, Hv, V) float32
        Hv is a multiple of Hk.
    scale : float, optional
        On q, as it was for P; K ** -0.5 where None.
    initial_state : (Hv, K, V) float32, optional
        Zeros where None. ``(N, Hv, K, V)`` with `offsets`, ``(B, Hv, K, V)`` with a batch axis.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    chunk : int
        Tokens a chunk, 1 to 256, as for P, W and U.
    head_map : {"grouped", "tiled"}
        Value head h reads key head ``h // (Hv // Hk)``, or ``h % Hk``.
    final_state : array, optional
        Receives the final state; may be `initial_state`, which is then updated in place.
    out : tuple of three arrays, optional
        For `o`, the state and `d`, which may be `U`; None for one to make.
    ctx : Context, optional

    Returns
    -------
    o : as `U`, float32
    state : float32, shaped as `initial_state`
    d : as `U`, float32
        The corrections of the recurrence, beta (v - S^T k) ("v_new" elsewhere).

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, g is positive, or `offsets` do not rise.
    """
    U = as_float32(U, "U", ("T", "Hv", "V"), ("B", "T", "Hv", "V"))
    q, k, g, gate, sizes, scale, head_map, chunk = _keys(q, k, g, U, "U", scale, head_map, chunk)
    P = as_float32(P, "P", (*U.shape[:-1], chunk))
    W = as_float32(W, "W", (*U.shape[:-1], q.shape[-1]))
    offsets, lead = sequences_of(U, "U", 3, offsets)
    shape = (*lead, *sizes[1:])
    if initial_state is not None:
        initial_state = as_float32(initial_state, "initial_state", shape)

    o, state, d = outputs(out, 3)
    state = _one_state(state, final_state, shape, like=U)
    o, d = output(o, U.shape, "out[0]", like=U), output(d, U.shape, "out[2]", like=U)
    refuse_shared_outputs(o, state, d)
    q, k, g, P, W = (apart(a, o, state, d) for a in (q, k, g, P, W))
    U, initial_state = apart(U, o, state, d, same=d), apart(initial_state, o, state, d, same=state)
    _core.delta_rule_inter(current(ctx)._core, o, state, d, q, k, g, P, W, U, initial_state, offsets,
                           len(offsets) - 1, int(offsets[-1]), *sizes, scale, gate, head_map, chunk)
    return o, state, d


def decay_cumsum(g, *, chunk=64, offsets=None, out=None, ctx=None):
    """Running sum of a gate over tokens, afresh in each chunk: ``c_i = g_0 + .. + g_i``.

    For looking at gates and for comparison with kernels that work on c; `delta_rule` forms no decay from it. -inf
    stays -inf. Subnormals are kept.

    Source: flash-linear-attention, ``fla/ops/utils/cumsum.py``. Derivation: docs/math.md#decay_cumsum.

    Parameters
    ----------
    g : (T, ...) float32
        Log-decay in nats per token, <= 0, tokens first: (T, H, K) or (T, H). A batch is given by `offsets`.
    chunk : int or None
        Tokens a chunk, counted from the first of each sequence; None is the whole sequence.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    out : as `g`, float32, optional
        Result; may be `g`.
    ctx : Context, optional

    Returns
    -------
    c : as `g`, float32

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, g is positive, `chunk` is below 1, or `offsets` do not rise.
    """
    g = as_float32(g, "g")
    if g.ndim == 0 or 0 in g.shape[1:]:
        raise ValueError(f"g has shape {list(g.shape)}; it must be [T, ...], and only T may be 0")
    _check_not_positive(g)
    chunk = chunk if chunk is None else as_whole(chunk, "chunk", "an int, or None", None)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be >= 1, or None")
    offsets = as_offsets(offsets, len(g))
    c = output(out, g.shape, like=g)
    g = apart(g, c, same=c)
    T = len(g)
    _core.decay_cumsum(current(ctx)._core, c, g, offsets, len(offsets) - 1, T, math.prod(g.shape[1:]),
                       0 if chunk is None else min(chunk, max(T, 1)))
    return c


# ---- arguments ----


def _keys(q, k, g, values, name, scale, head_map, chunk):
    """What the delta rule and its halves check alike: q, k and g as float32, the gate's id, (Hk, Hv, K, V), scale,
    the head map's id, chunk. `values` is v or U."""
    *tokens, Hv, V = values.shape
    q = as_float32(q, "q", (*tokens, "Hk", "K"))
    k = as_float32(k, "k", q.shape)
    Hk, K = q.shape[-2:]
    if min(Hk, Hv, K, V) < 1 or Hv % Hk:
        raise ValueError(f"q has shape {list(q.shape)}, {name} {list(values.shape)}; Hv must be a multiple of Hk, and "
                         f"only T may be 0")
    g, gate = _check_gate(g, (*tokens, Hv), K)
    scale = K**-0.5 if scale is None else as_finite(scale, "scale", "a number, or None")
    chunk = as_whole(chunk, "chunk", largest=None)
    if not 1 <= chunk <= 256:
        raise ValueError(f"chunk is {chunk}; it must be 1 to 256")
    return q, k, g, gate, (Hk, Hv, K, V), scale, _HEAD_MAPS[choice(head_map, "head_map", _HEAD_MAPS)], chunk


def _one_state(state, final_state, shape, like):
    """The array for the final state: of `out`, of `final_state`, or a new one."""
    if state is not None and final_state is not None and state is not final_state:
        raise ValueError("final_state and out[1] are two arrays; give one of them")
    if final_state is None:
        return output(state, shape, "out[1]", like=like)
    return output(final_state, shape, "final_state", like=like)


def _check_gate(g, heads, K):
    """g as float32, and its kind; ValueError where a value is positive."""
    if g is None:
        return None, _GATES["none"]
    g = as_float32(g, "g", heads, (*heads, K))
    _check_not_positive(g)
    return g, _GATES["head" if g.ndim == len(heads) else "channel"]


def _check_not_positive(g):
    if at := first_where(g, lambda g: g > 0):
        raise ValueError(f"g{list(at)} is {g[at]}; a log-decay in nats must be <= 0: was exp(g) passed?")


def _check_beta(beta, heads):
    beta = as_float32(beta, "beta", heads)
    if at := first_where(beta, lambda beta: (beta < 0) | (beta > 2)):
        raise ValueError(f"beta{list(at)} is {beta[at]}; it must be within 0..2: was its sigmoid left out?")
    return beta
