"""Ops of Kimi Delta Attention: short convolution, decay gate, gated delta rule."""

import numpy as np

from .. import _core
from .._arrays import as_float32, as_integers, as_offsets, output, outputs
from ..context import current
from ._basic import activation_id, check_eps

__all__ = ["decay_gate", "delta_rule", "short_conv"]

_GATES = {"none": 0, "head": 1, "channel": 2}
_FORMS = {"auto": 0, "recurrent": 1, "chunked": 2}
_HEAD_MAPS = {"grouped": 0, "tiled": 1}


def short_conv(x, w, *, history=None, offsets=None, activation="silu", out=None, ctx=None):
    """Causal depthwise convolution over the history and the new tokens, then SiLU.

    ``y[t, c] = act(sum_j w[c, j] * x[t - W + 1 + j, c])``, summed in rising ``j``: any split of a sequence
    gives the same bytes. Subnormals are flushed: read as 0, and results below 2**-126 become 0.

    Source: Kimi Linear report, arXiv:2510.26692, section 4; before it Mamba, arXiv:2312.00752. Derivation:
    docs/math.md#short_conv.

    Parameters
    ----------
    x : (T, C) or (B, T, C) float32
        Projections, before the convolution.
    w : (C, W) float32
        Taps, 1 <= W <= 8; the last one multiplies the current token.
    history : (W-1, C) float32, optional
        Inputs before the first token, oldest first; zeros where None. ``(N, W-1, C)`` with `offsets`,
        ``(B, W-1, C)`` with a batch axis.
    offsets : (N+1,) integers, optional
        Where each of N sequences begins among the T tokens, and T.
    activation : {"silu", None}
    out : tuple of two arrays, optional
        For `y` and the new history, None for one to make; the history's may be `history`.

    Returns
    -------
    y : as `x`, float32
    history : float32, shaped as `history`
        The last W-1 inputs of each sequence, bit by bit.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, `offsets` do not rise from 0 to T, or `activation` is another.
    NotImplementedError
        If W is above 8.
    """
    x = as_float32(x, "x", ("T", "C"), ("B", "T", "C"))
    w = as_float32(w, "w", (x.shape[-1], "W"))
    C, W = w.shape
    if W < 1 or C < 1:
        raise ValueError(f"w has shape {list(w.shape)}; it must be [C, W] with C and W >= 1")
    kind = activation_id(activation, ("silu", None))
    offsets, lead = _sequences(x, "x", 2, offsets)
    shape = (*lead, W - 1, C)
    if history is not None:
        history = as_float32(history, "history", shape)
    y, after = outputs(out, 2)
    y, after = output(y, x.shape), output(after, shape, "out[1]")
    x, w, history = _apart(x, y, after), _apart(w, y, after), _apart(history, y, after, same=after)
    N, T = len(offsets) - 1, x.size // C
    _core.short_conv(current(ctx)._core, y, after, x, w, history, offsets, N, T, C, W, kind)
    return y, after


def decay_gate(f, rate, dt_bias, *, lower_bound=None, out=None, ctx=None):
    """Log-decay in nats per token: ``-rate * softplus(f + dt_bias)``.

    With a lower bound it is ``lower_bound * sigmoid(rate * (f + dt_bias))`` instead, within (lower_bound, 0).

    Source: Kimi Linear report, arXiv:2510.26692; lower bound: flash-linear-attention,
    ``fla/ops/kda/gate.py``. Derivation: docs/math.md#decay_gate.

    Parameters
    ----------
    f : (T, H, K) or (T, H) float32
        Raw gate, of every key channel or of every head; with a batch axis in front, too.
    rate : (H,) float32
        exp(A_log) of a checkpoint, >= 0.
    dt_bias : (H, K) or (H,) float32
    lower_bound : float, optional
        Finite and below 0.
    out : as `f`, float32, optional
        Result; may be `f`.

    Returns
    -------
    g : as `f`, float32
        Never positive.

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, a rate is negative or `lower_bound` is not below 0.
    """
    dt_bias = as_float32(dt_bias, "dt_bias", ("H", "K"), ("H",))
    f = as_float32(f, "f", ("T", *dt_bias.shape), ("B", "T", *dt_bias.shape))
    H = dt_bias.shape[0]
    K = dt_bias.shape[1] if dt_bias.ndim == 2 else 1
    if dt_bias.size == 0:
        raise ValueError(f"dt_bias has shape {list(dt_bias.shape)}; H and K must be >= 1")
    rate = as_float32(rate, "rate", (H,))
    for h in np.flatnonzero(rate < 0)[:1]:
        raise ValueError(f"rate[{h}] is {rate[h]}; it must be >= 0: exp(A_log), was A_log passed?")
    if lower_bound is not None and not -np.inf < float(lower_bound) < 0:
        raise ValueError(f"lower_bound is {lower_bound}; it must be finite and below 0, or None")
    g = output(out, f.shape)
    bound = 0.0 if lower_bound is None else float(lower_bound)
    rate, dt_bias = _apart(rate, g), _apart(dt_bias, g)
    _core.decay_gate(current(ctx)._core, g, f, rate, dt_bias, f.size // dt_bias.size, H, K, bound)
    return g


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
        ("auto", the fastest). They agree within the op's budget.
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
    *tokens, Hv, V = v.shape
    q = as_float32(q, "q", (*tokens, "Hk", "K"))
    k = as_float32(k, "k", q.shape)
    Hk, K = q.shape[-2:]
    if min(Hk, Hv, K, V) < 1 or Hv % Hk:
        raise ValueError(f"q has shape {list(q.shape)}, v {list(v.shape)}; Hv must be a multiple of Hk, and "
                         f"only T may be 0")
    g, gate = _check_gate(g, (*tokens, Hv), K)
    beta = _check_beta(beta, (*tokens, Hv))
    scale = K**-0.5 if scale is None else float(scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    form, head_map = _choice(form, "form", _FORMS), _choice(head_map, "head_map", _HEAD_MAPS)
    if not 1 <= int(chunk) <= 256:
        raise ValueError(f"chunk is {chunk}; it must be 1 to 256")
    offsets, lead = _sequences(v, "v", 3, offsets)
    shape = (*lead, Hv, K, V)
    if initial_state is not None:
        initial_state = as_float32(initial_state, "initial_state", shape)
    cuts = None if checkpoints is None else _cuts(checkpoints, np.diff(offsets))

    o, state = outputs(out, 2)
    if state is not None and final_state is not None and state is not final_state:
        raise ValueError("final_state and out[1] are two arrays; give one of them")
    o = output(o, v.shape)
    state = output(state if final_state is None else final_state, shape, "final_state")
    q, k, g, beta = (_apart(a, o, state) for a in (q, k, g, beta))
    v = _apart(v, o, state, same=o)
    initial_state = _apart(initial_state, o, state, same=state)

    marks = ends = kept = None
    if cuts is not None:
        marks = np.array([c for counts in cuts for c in counts], np.int64)
        ends = np.cumsum([0, *map(len, cuts)], dtype=np.int64)
        kept = np.empty((len(marks), Hv, K, V), np.float32)
    _core.delta_rule(current(ctx)._core, o, state, q, k, v, g, beta, initial_state, offsets, len(offsets) - 1,
                     int(offsets[-1]), Hk, Hv, K, V, scale, gate, form, head_map, int(chunk), bool(l2_norm),
                     check_eps(l2_eps), marks, ends, kept, 0 if cuts is None else len(marks))
    return (o, state) if cuts is None else (o, state, kept)


def _cuts(checkpoints, lengths):
    """Token counts after which a state is kept, a list for each sequence."""
    if isinstance(checkpoints, int | np.integer):
        if checkpoints < 1:
            raise ValueError(f"checkpoints is {checkpoints}; it must be >= 1, or a list of token counts")
        step = int(checkpoints)
        return [list(range(step, n + 1, step)) for n in lengths.tolist()]
    lists = list(checkpoints)
    if not any(np.ndim(c) for c in lists):
        lists = [lists]
    if len(lists) != len(lengths):
        raise ValueError(f"checkpoints has {len(lists)} lists; there are {len(lengths)} sequences, and each "
                         f"must have one")
    result = []
    for n, (given, length) in enumerate(zip(lists, lengths.tolist(), strict=True)):
        counts = as_integers(given, f"checkpoints[{n}]", ("n",), dtype=np.int64).tolist()
        if any(a >= b for a, b in zip([-1, *counts], [*counts, length + 1])):
            raise ValueError(f"checkpoints[{n}] is {counts}; it must rise within 0..{length}, its tokens")
        result.append(counts)
    return result


def _check_gate(g, heads, K):
    """g as float32, and its kind; ValueError where a value is positive."""
    if g is None:
        return None, _GATES["none"]
    g = as_float32(g, "g", heads, (*heads, K))
    if g.size and (g > 0).any():
        at = tuple(int(i) for i in np.argwhere(g > 0)[0])
        raise ValueError(f"g{list(at)} is {g[at]}; a log-decay in nats must be <= 0: was exp(g) passed?")
    return g, _GATES["head" if g.ndim == len(heads) else "channel"]


def _check_beta(beta, heads):
    beta = as_float32(beta, "beta", heads)
    bad = (beta < 0) | (beta > 2)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"beta{list(at)} is {beta[at]}; it must be within 0..2: was its sigmoid left out?")
    return beta


def _choice(value, name, table):
    if value not in table:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, table))}")
    return table[value]


def _sequences(x, name, axes, offsets):
    """Offsets of the sequences in x, and the axes that its states have in front: none, (N,) or (B,)."""
    if x.ndim > axes:
        if offsets is not None:
            raise ValueError(f"offsets is given, and {name} has shape {list(x.shape)}, with a batch axis; it "
                             f"must be one of them")
        B, T = x.shape[:2]
        return np.arange(B + 1, dtype=np.int64) * T, (B,)
    lead = () if offsets is None else (np.size(offsets) - 1,)
    return as_offsets(offsets, len(x)), lead


def _apart(a, *written, same=None):
    """`a`, copied where it shares memory with an output; `same` is the one output that it may be."""
    if a is None:
        return None
    for o in written:
        if np.may_share_memory(a, o) and not (o is same and a.ctypes.data == o.ctypes.data):
            return a.copy()
    return a
