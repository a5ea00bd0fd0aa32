"""Matrix products, and the mixture of experts that is built on them."""

import numpy as np

from .. import _core
from .._arrays import (
    apart,
    as_either,
    as_float32,
    as_integers,
    as_weight,
    output,
    outputs,
    refuse_shared,
    refuse_shared_outputs,
)
from .._names import choice
from .._scalars import as_flag, as_real, as_whole
from ..context import current
from ..quantized import Quantized
from ._basic import activation_id, betas_of, limit_of, sigmoid_gate, swiglu
from ._basic import situ as situ_op

_ROUTERS = {"sigmoid": 0, "softmax": 1}
_MAX_WEIGHTS = 7  # of one linear, as csrc/python/ops_dense.c has it


def embedding(ids, table, *, out=None, ctx=None):
    """Rows of a table: ``table[ids]``, widened exactly.

    Derivation: docs/math.md#embedding.

    Parameters
    ----------
    ids : (...) integers
        Token ids, ``0 <= id < vocabulary``.
    table : (vocabulary, D) float32, float16, bfloat16 or Quantized
    out : (..., D) float32, optional
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, or an id is out of range; the message says which, and where.
    """
    weight, (vocabulary, D) = as_weight(table, "table")
    ids = as_integers(ids, "ids", low=0, high=vocabulary)
    y = output(out, (*ids.shape, D), like=weight[0])
    refuse_shared(y, ids=ids, table=weight[0])
    _core.embedding(current(ctx)._core, y, ids, weight, ids.size)
    return y


def linear(x, w, bias=None, *, out=None, ctx=None):
    """Matrix product ``x @ w.T + bias``, with one weight or several over one x.

    Each element is a dot product of 16 lanes and a halving tree, so a row has the same bytes in any batch. A
    weight that is the transposed view of a contiguous array is used as it lies, and gives the same bytes too.
    Derivation: docs/math.md#linear.

    Parameters
    ----------
    x : (..., D) float32
    w : (M, D) float32, float16, bfloat16 or Quantized, or a list of such arrays
        Used as they lie: a narrower type is widened exactly, in registers or a few rows at a time; so are blocks.
    bias : (M,) float32, optional
        With a list of weights, a list of biases (or None each).
    out : (..., M) float32, optional
        With a list of weights, a tuple of arrays (or None each). Shares no memory with x, w or bias.
    ctx : Context, optional

    Returns
    -------
    y : (..., M) float32, or a list of them for a list of weights

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, the shapes disagree, or `out` overlaps an input.
    """
    x = as_float32(x, "x")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., D] with D >= 1")
    if not isinstance(w, (list, tuple)):
        return _linear_of(x, [w], [bias], [out], ctx, "w")[0]
    count = len(w)
    biases = [None] * count if bias is None else bias
    outs = (None,) * count if out is None else out
    for name, given in (("bias", biases), ("out", outs)):
        if not isinstance(given, (list, tuple)) or len(given) != count:
            raise ValueError(f"{name} must be a list of {count}, one (or None) for each weight")
    return _linear_of(x, w, biases, outs, ctx, "w[{}]", "bias[{}]")


def _linear_of(x, weights, biases, outs, ctx, w_name, bias_name="bias"):
    D = x.shape[-1]
    stored, flags, ys, bs = [], [], [], []
    for i, (w, bias, out) in enumerate(zip(weights, biases, outs, strict=True)):
        weight, transposed, rows = _as_stored(w, w_name.format(i), D)
        y = output(out, (*x.shape[:-1], rows), like=x)
        bias = None if bias is None else as_float32(bias, bias_name.format(i), (rows,))
        stored.append(weight)
        flags.append(transposed)
        ys.append(y)
        bs.append(bias)
    named = {w_name.format(i): weight[0] for i, weight in enumerate(stored)}
    named |= {bias_name.format(i): bias for i, bias in enumerate(bs)}
    for y in ys:
        refuse_shared(y, x=x, **named)
    refuse_shared_outputs(*ys)
    for i in range(0, len(ys), _MAX_WEIGHTS):
        part = slice(i, i + _MAX_WEIGHTS)
        _core.linear(current(ctx)._core, ys[part], x, stored[part], bs[part], flags[part], x.size // D, D)
    return ys


def _as_stored(w, name, D):
    """(the core's tuple, whether it is stored transposed, its rows); `w` is [rows, D]."""
    a = w if isinstance(w, Quantized) else as_either(w, name)
    transposed = isinstance(a, np.ndarray) and a.ndim == 2 and a.flags.f_contiguous and not a.flags.c_contiguous
    weight, shape = as_weight(a.T if transposed else a, name)
    rows, cols = shape[::-1] if transposed else shape
    if cols != D:
        raise ValueError(f"{name} has shape [{rows}, {cols}]; it must be [M, {D}], as x has {D} columns")
    return weight, transposed, rows


def route(scores, *, k, bias=None, groups=1, top_groups=1, function="sigmoid", renormalise=True, scale=1.0,
          out=None, ctx=None):
    """Choose k experts for each token, and their weights.

    ``s`` is the sigmoid or softmax of the scores, ``s' = s + bias``. Of `groups` equal groups of experts the
    `top_groups` with the largest sum of their two largest ``s'`` stay; of these the k largest ``s'``, the
    lowest id among equals. The weights are ``s`` of the chosen, divided by their sum (+ 1e-20) when
    renormalised, times `scale`.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2. Derivation: docs/math.md#route.

    Parameters
    ----------
    scores : (..., E) float32
        The router's logits.
    k : int
        Experts a token, at most ``E / groups * top_groups``.
    bias : (E,) float32, optional
        For the choice only.
    groups, top_groups : int
        `groups` divides E.
    function : {"sigmoid", "softmax"}
    renormalise : bool
    scale : float
    out : tuple of (..., k) int32 and (..., k) float32, optional
    ctx : Context, optional

    Returns
    -------
    ids : (..., k) int32
        Ascending in each row.
    weights : (..., k) float32
        In the order of the ids.

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, a score is NaN (the message says which token and expert), or k does not fit the groups.
    """
    scores = as_float32(scores, "scores")
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores has shape {list(scores.shape)}; it must be [..., E] with E >= 1")
    router = _ROUTERS[choice(function, "function", _ROUTERS)]
    E = scores.shape[-1]
    T = scores.size // E
    bias = None if bias is None else as_float32(bias, "bias", (E,))
    k, groups, top_groups = (as_whole(x, name, largest=None) for x, name in
                             ((k, "k"), (groups, "groups"), (top_groups, "top_groups")))
    if not 1 <= k <= E:
        raise ValueError(f"k is {k}; it must be 1 <= k <= E = {E}")
    for name, value in (("groups", groups), ("top_groups", top_groups)):
        if value > E:
            raise ValueError(f"{name} is {value}; it must be at most E = {E}")
    given_ids, given_weights = outputs(out, 2)
    ids = output(given_ids, (*scores.shape[:-1], k), "out[0]", np.int32, like=scores)
    weights = output(given_weights, (*scores.shape[:-1], k), "out[1]", like=scores)
    refuse_shared_outputs(ids, weights)
    scores, bias = apart(scores, ids, weights), apart(bias, ids, weights)
    _core.route(current(ctx)._core, ids, weights, scores, bias, T, E, k, groups, top_groups,
                router, as_flag(renormalise, "renormalise"), as_real(scale, "scale"))
    return ids, weights


def moe(x, ids, weights, w_gate, w_up, w_down, *, shared=None, shared_gate=None, activation="silu", situ=None,
        limit=None, out=None, ctx=None):
    """Mixture of experts: the weighted sum of a token's experts, then the shared expert.

    ``y = sum_e weights_e * (w_down_e @ swiglu(w_gate_e @ x, w_up_e @ x)) + shared``, by ascending expert id.
    With `situ` an expert, and the shared one that is given by its matrices, has :func:`situ` for `swiglu`, with `limit`
    that limit of :func:`swiglu`.
    The tokens are grouped by expert inside, and a token has the same bytes alone as in any batch.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2. Derivation: docs/math.md#moe.

    Parameters
    ----------
    x : (..., D) float32
    ids : (..., k) integers
        Expert ids, ascending in each row, as `route` gives them.
    weights : (..., k) float32
        In the order of the ids.
    w_gate, w_up : (E, F, D) float32, float16, bfloat16 or Quantized
    w_down : (E, D, F) float32, float16, bfloat16 or Quantized
    shared : (..., D) float32, or a tuple (w_gate, w_up, w_down), optional
        The shared expert's output, or its matrices [S, D], [S, D], [D, S].
    shared_gate : (1, D), optional
        The shared expert is scaled by ``sigmoid(shared_gate @ x)`` (Qwen3-Next); with `shared` only.
    activation : {"silu"}
        Of the gate, where there is no `situ`.
    situ : tuple of (float, float or None), optional
        ``(beta, linear_beta)`` of :func:`situ`: (4, 25) in Kimi K3.
    limit : float, optional
        Of :func:`swiglu`, > 0: 10 in GLM-5.3-Flash. Not beside `situ`.
    out : (..., D) float32, optional
        Shares no memory with the inputs.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, the shapes disagree, `out` overlaps an input, an id is not an expert's, the ids of a
        token do not ascend, a beta of `situ` or `limit` is not above 0 and finite, or both are given.
    """
    activation_id(activation, ("silu",))
    betas, most = _situ_of(situ), limit_of(limit)
    if situ is not None and limit is not None:
        raise ValueError(f"limit is {limit} beside situ; it must be None, it is SwiGLU's")
    x = as_float32(x, "x")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., D] with D >= 1")
    gate, (E, F, D) = as_weight(w_gate, "w_gate", ndim=3)
    up, up_shape = as_weight(w_up, "w_up", ndim=3)
    down, down_shape = as_weight(w_down, "w_down", ndim=3)
    for name, shape, wanted in (("w_gate", (E, F, D), (E, F, x.shape[-1])), ("w_up", up_shape, (E, F, D)),
                                ("w_down", down_shape, (E, D, F))):
        if tuple(shape) != wanted:
            raise ValueError(f"{name} has shape {list(shape)}; it must be {list(wanted)}")
    rows = x.shape[:-1]
    ids = as_integers(ids, "ids", (*rows, "k"), low=0, high=E, on_device=True)
    weights = as_float32(weights, "weights", ids.shape)
    shared = _shared(x, shared, shared_gate, situ, limit, ctx)
    y = output(out, x.shape, like=x)
    refuse_shared(y, x=x, ids=ids, weights=weights, shared=shared, w_gate=gate[0], w_up=up[0], w_down=down[0])
    _core.moe(current(ctx)._core, y, x, ids, weights, gate, up, down, shared, x.size // D, D, F,
              ids.shape[-1], *betas, most)
    return y


def _situ_of(situ):
    """The betas as the core takes them, (0, 0) for SwiGLU."""
    if situ is None:
        return 0.0, 0.0
    if not isinstance(situ, tuple | list) or len(situ) != 2:
        raise TypeError(f"situ is {situ!r:.40}; it must be (beta, linear_beta), or None for SwiGLU")
    return betas_of(*situ, name="{} of situ")


def _shared(x, shared, gate, situ, limit, ctx):
    """Output of the shared expert [..., D], or None."""
    if shared is None:
        if gate is not None:
            raise ValueError("shared_gate needs shared: there is no shared expert to scale")
        return None
    if isinstance(shared, tuple):
        if len(shared) != 3:
            raise ValueError(f"shared is a tuple of {len(shared)}; it must be (w_gate, w_up, w_down)")
        w_gate, w_up, w_down = shared
        parts = _linear_of(x, [w_gate, w_up], [None] * 2, [None] * 2, ctx, "shared[{}]")
        h = swiglu(*parts, limit=limit, ctx=ctx) if situ is None else situ_op(
            *parts, beta=situ[0], linear_beta=situ[1], ctx=ctx)
        shared = _linear_of(h, [w_down], [None], [None], ctx, "shared[2]")[0]
    shared = as_float32(shared, "shared", x.shape)
    if gate is None:
        return shared
    scale = _linear_of(x, [gate], [None], [None], ctx, "shared_gate")[0]
    if scale.shape[-1] != 1:
        raise ValueError(f"shared_gate has {scale.shape[-1]} rows; it must be [1, D]")
    return sigmoid_gate(shared, scale, ctx=ctx)
