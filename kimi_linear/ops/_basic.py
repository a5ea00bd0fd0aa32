"""Elementwise ops, norms, and attention over depth."""

import math

import numpy as np

from .. import _core
from .._arrays import apart, as_float32, output
from .._names import choice
from .._scalars import as_finite, as_real
from ..context import current

_ACTIVATIONS = {"none": 0, None: 0, "sigmoid": 1, "silu": 2}


def activation_id(name, allowed):
    """C id of an activation's name; ValueError lists what is allowed."""
    return _ACTIVATIONS[choice(name, "activation", allowed)]


def check_eps(eps, name="eps"):
    """eps as float; TypeError or ValueError unless it is a finite number >= 0."""
    eps = as_real(eps, name, "a number >= 0")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name} is {eps}; it must be >= 0 and finite")
    return eps


def betas_of(beta, linear_beta, name="{}"):
    """SiTU's betas as the core takes them, 0 for none; TypeError or ValueError unless they are above 0 and finite."""
    values = [as_finite(beta, name.format("beta"), "a number > 0")]
    if linear_beta is not None:
        values.append(as_finite(linear_beta, name.format("linear_beta"), "a number > 0, or None"))
    for word, value in zip(("beta", "linear_beta"), values):
        if not np.float32(value) > 0:
            raise ValueError(f"{name.format(word)} is {value}; it must be > 0 in float32")
    return (*values, 0.0)[:2]


def limit_of(limit):
    """SwiGLU's limit as the core takes it, 0 for none; TypeError or ValueError unless it is above 0 and finite."""
    if limit is None:
        return 0.0
    value = as_finite(limit, "limit", "a number > 0, or None")
    if not np.float32(value) > 0:
        raise ValueError(f"limit is {value}; it must be > 0 in float32, or None")
    return value


def _rows(x):
    """(T, D): every axis but the last is a row."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., D] with D >= 1")
    return int(np.prod(x.shape[:-1], dtype=np.int64)), x.shape[-1]


def add(a, b, *, out=None, ctx=None):
    """Sum of two arrays of one shape: the residual connection.

    Derivation: docs/math.md#add.

    Parameters
    ----------
    a, b : (...) float32
    out : (...) float32, optional
        Result; may be `a` or `b`.
    ctx : Context, optional

    Returns
    -------
    y : (...) float32
        ``a + b``, rounded once.

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, or the shapes disagree.
    """
    a = as_float32(a, "a")
    b = as_float32(b, "b", a.shape)
    y = output(out, a.shape, like=a)
    a, b = apart(a, y, same=y), apart(b, y, same=y)
    _core.add(current(ctx)._core, y, a, b, a.size)
    return y


def sigmoid(x, *, out=None, ctx=None):
    """Logistic function ``1 / (1 + exp(-x))``: the write rate beta of KDA.

    Derivation: docs/math.md#sigmoid.

    Parameters
    ----------
    x : (...) float32
    out : (...) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (...) float32
        Within 4 u of the exact value, relative, and 2**-149 where that is below 2**-126.

    Raises
    ------
    TypeError, ValueError
        If the type is none that widens to float32.
    """
    x = as_float32(x, "x")
    y = output(out, x.shape, like=x)
    x = apart(x, y, same=y)
    _core.sigmoid(current(ctx)._core, y, x, x.size)
    return y


def sigmoid_gate(x, gate, *, out=None, ctx=None):
    """Output gate: ``x * sigmoid(gate)``, one gate for each value, each head or each row.

    Value d of a row has the gate ``d // (D / G)``. Source: Gated Attention for Large Language Models,
    arXiv:2505.06708. Derivation: docs/math.md#sigmoid_gate.

    Parameters
    ----------
    x : (..., D) float32
    gate : (..., G) float32
        Before its sigmoid. G divides D: D after the attention of Qwen3-Next, 1 for its shared expert.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, or the shapes disagree; the message gives both.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    gate = as_float32(gate, "gate")
    if gate.ndim != x.ndim or gate.shape[:-1] != x.shape[:-1] or gate.shape[-1] == 0 or D % gate.shape[-1]:
        wanted = ", ".join(map(str, (*x.shape[:-1], "G")))
        raise ValueError(f"gate has shape {list(gate.shape)}; it must be [{wanted}], G a divisor of {D}")
    y = output(out, x.shape, like=x)
    x, gate = apart(x, y, same=y), apart(gate, y)
    _core.sigmoid_gate(current(ctx)._core, y, x, gate, T, D, gate.shape[-1])
    return y


def swiglu(gate, up, *, limit=None, out=None, ctx=None):
    """Gated activation of a feed-forward: ``gate * sigmoid(gate) * up``.

    With a limit it is that of ``min(gate, limit)`` and ``clip(up, -limit, limit)``; NaN stays NaN.

    Source: arXiv:2002.05202, eq. 5 (with SiLU); the limit: transformers, ``models/glm5_next`` (``swiglu_limit``).
    Derivation: docs/math.md#swiglu.

    Parameters
    ----------
    gate, up : (...) float32
        Of one shape.
    limit : float, optional
        > 0, in units of `gate` and `up`: 10 in GLM-5.3-Flash.
    out : (...) float32, optional
        Result; may be `gate` or `up`.
    ctx : Context, optional

    Returns
    -------
    y : (...) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree, or `limit` is not above 0 and finite.
    """
    gate = as_float32(gate, "gate")
    up = as_float32(up, "up", gate.shape)
    limit = limit_of(limit)
    y = output(out, gate.shape, like=gate)
    gate, up = apart(gate, y, same=y), apart(up, y, same=y)
    _core.swiglu(current(ctx)._core, y, gate, up, gate.size, limit)
    return y


def situ(gate, up, *, beta, linear_beta=None, out=None, ctx=None):
    """Gated activation of Kimi K3's feed-forwards: SwiGLU with factors that level off.

    ``beta * tanh(gate / beta) * sigmoid(gate) * up'``, with ``up' = linear_beta * tanh(up / linear_beta)``; the sigmoid
    takes the gate as it is. SwiGLU is what it tends to as both betas rise.

    Source: mlx-lm, ``mlx_lm/models/kimi_k3.py`` (``_situ``); SwiGLU: arXiv:2002.05202. Derivation: docs/math.md#situ.

    Parameters
    ----------
    gate, up : (...) float32
        Of one shape.
    beta : float
        Where the gate levels off, > 0: 4 in Kimi K3.
    linear_beta : float, optional
        Where `up` levels off, > 0: 25 in Kimi K3. None: `up` is taken as it is.
    out : (...) float32, optional
        Result; may be `gate` or `up`.
    ctx : Context, optional

    Returns
    -------
    y : (...) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree, or a beta is not above 0 and finite.
    """
    gate = as_float32(gate, "gate")
    up = as_float32(up, "up", gate.shape)
    betas = betas_of(beta, linear_beta)
    y = output(out, gate.shape, like=gate)
    gate, up = apart(gate, y, same=y), apart(up, y, same=y)
    _core.situ(current(ctx)._core, y, gate, up, gate.size, *betas)
    return y


def softmax(x, *, out=None, ctx=None):
    """Softmax over the last axis, shifted by its largest value.

    Derivation: docs/math.md#softmax.

    Parameters
    ----------
    x : (..., D) float32
        -inf gives exactly 0; NaN anywhere makes its row NaN.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If the type is none that widens to float32, or D is 0.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    y = output(out, x.shape, like=x)
    x = apart(x, y, same=y)
    _core.softmax(current(ctx)._core, y, x, T, D)
    return y


def rms_norm(x, w, *, eps, out=None, ctx=None):
    """Root-mean-square norm over the last axis: ``w * x / sqrt(mean(x**2) + eps)``.

    Source: arXiv:1910.07467. Derivation: docs/math.md#rms_norm.

    Parameters
    ----------
    x : (..., D) float32
        Finite values of any size: a sum of squares that overflows or underflows is taken again on scaled rows.
    w : (D,) float32
        Plain weight (a checkpoint that stores ``w - 1`` adds 1 at load).
    eps : float
        In units of ``x**2``, >= 0.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree or `eps` is negative.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    w = as_float32(w, "w", (D,))
    y = output(out, x.shape, like=x)
    x, w = apart(x, y, same=y), apart(w, y)
    _core.rms_norm(current(ctx)._core, y, x, w, T, D, check_eps(eps))
    return y


def layer_norm(x, w, b, *, eps, out=None, ctx=None):
    """Layer norm over the last axis: ``w * (x - m) / sqrt(mean((x - m)**2) + eps) + b`` with ``m = mean(x)``.

    The mean is taken off before anything is squared, and taken to more digits than a float32 has: one far above the
    deviation costs no digit of the result. Source: arXiv:1607.06450. Derivation: docs/math.md#layer_norm.

    Parameters
    ----------
    x : (..., D) float32
        Finite values of any size: sums that overflow or underflow are taken again on scaled rows.
    w, b : (D,) float32
        Weight and bias.
    eps : float
        In units of ``x**2``, >= 0.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree or `eps` is negative.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    w, b = as_float32(w, "w", (D,)), as_float32(b, "b", (D,))
    y = output(out, x.shape, like=x)
    x, w, b = apart(x, y, same=y), apart(w, y), apart(b, y)
    _core.layer_norm(current(ctx)._core, y, x, w, b, T, D, check_eps(eps))
    return y


def gated_rms_norm(x, z, w, *, eps, activation="sigmoid", out=None, ctx=None):
    """RMS norm, weight, then an output gate: ``rms_norm(x, w) * activation(z)``.

    Source: Kimi Linear report, arXiv:2510.26692 (sigmoid); Gated DeltaNet, arXiv:2412.06464 (silu).
    Derivation: docs/math.md#gated_rms_norm.

    Parameters
    ----------
    x, z : (..., D) float32
        Output of the delta rule, and the gate before its activation.
    w : (D,) float32
    eps : float
        In units of ``x**2``, >= 0.
    activation : {"sigmoid", "silu"}
        ``"sigmoid"`` in Kimi-Linear, ``"silu"`` in Qwen3-Next.
    out : (..., D) float32, optional
        Result; may be `x` or `z`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, `eps` is negative or `activation` is another.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    z = as_float32(z, "z", x.shape)
    w = as_float32(w, "w", (D,))
    y = output(out, x.shape, like=x)
    x, z, w = apart(x, y, same=y), apart(z, y, same=y), apart(w, y)
    kind = activation_id(activation, ("sigmoid", "silu"))
    _core.gated_rms_norm(current(ctx)._core, y, x, z, w, T, D, check_eps(eps), kind)
    return y


def l2_norm(x, *, eps=1e-6, out=None, ctx=None):
    """Unit vectors over the last axis: ``x / sqrt(sum(x**2) + eps)``.

    Source: flash-linear-attention, ``fla/modules/l2norm.py`` (eps inside the root). Derivation: docs/math.md#l2_norm.

    Parameters
    ----------
    x : (..., D) float32
    eps : float
        In units of ``x**2``, >= 0.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type or a shape does not fit, or `eps` is negative.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    y = output(out, x.shape, like=x)
    x = apart(x, y, same=y)
    _core.l2_norm(current(ctx)._core, y, x, T, D, check_eps(eps))
    return y


def attn_res(snapshots, x, w, *, eps, out=None, ctx=None):
    """Attention over depth: of each token a mixture of what earlier blocks of layers gave and the running sum.

    The candidates ``v`` of a token are the snapshots and, last, `x`. Each has a score, ``sum(w * v / sqrt(mean(v**2) +
    eps))``; the softmax of the scores weighs the candidates as they are, without the norm. Without snapshots the result
    is `x`. Source: Attention Residuals, arXiv:2603.15031 (of blocks, as Kimi K3 has it). Derivation:
    docs/math.md#attn_res.

    Parameters
    ----------
    snapshots : (n, ..., D) float32
        The embedding and the sum of each finished block, n >= 0 of them. A list of arrays like `x` is copied into one.
    x : (..., D) float32
        The running sum of the block at hand.
    w : (D,) float32
        Weight of the norm times weight of the projection, value by value.
    eps : float
        In units of ``x**2``, >= 0.
    out : (..., D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree or `eps` is negative.
    """
    x = as_float32(x, "x")
    T, D = _rows(x)
    if isinstance(snapshots, list | tuple) and not snapshots:
        snapshots = np.empty((0, *x.shape), np.float32)
    snapshots = as_float32(snapshots, "snapshots", ("n", *x.shape))
    w = as_float32(w, "w", (D,))
    y = output(out, x.shape, like=x)
    x, snapshots, w = apart(x, y, same=y), apart(snapshots, y), apart(w, y)
    _core.attn_res(current(ctx)._core, y, snapshots, x, w, len(snapshots), T, D, check_eps(eps))
    return y
