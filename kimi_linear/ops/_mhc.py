"""Manifold-constrained hyper-connections: the streams of a token in front of a block, and behind it."""

from .. import _core
from .._arrays import apart, as_float32, as_weight, output, outputs, refuse_shared, refuse_shared_outputs
from .._scalars import as_whole, at_least
from ..context import current
from ._basic import check_eps


def _streams(x):
    """(T, n, D) of streams [..., n, D]."""
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., n, D] with n and D >= 1")
    n, D = x.shape[-2:]
    return x.size // (n * D), n, D


def mhc_expand(x, *, n, out=None, ctx=None):
    """Make n streams that begin alike: ``out[i] = x``.

    Source: mHC, arXiv:2512.24880. Derivation: docs/math.md#mhc_expand.

    Parameters
    ----------
    x : (..., D) float32
    n : int
        Streams, 1 to 64.
    out : (..., n, D) float32, optional
        Shares no memory with `x`.
    ctx : Context, optional

    Returns
    -------
    out : (..., n, D) float32

    Raises
    ------
    TypeError, ValueError
        If the type does not widen to float32, n is out of range, or `out` overlaps `x`.
    """
    x, n = as_float32(x, "x"), at_least(n, 1, "n")
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., D] with D >= 1")
    result = output(out, (*x.shape[:-1], n, x.shape[-1]), like=x)
    refuse_shared(result, x=x)
    _core.mhc_expand(current(ctx)._core, result, x, x.size // x.shape[-1], n, x.shape[-1])
    return result


def mhc_collapse(x, *, out=None, ctx=None):
    """The mean of n streams, what GLM-5.3-Flash's last norm reads: ``out = sum of x[i] / n``.

    Source: mHC, arXiv:2512.24880; the mean is that of transformers, ``models/glm5_next`` (Glm5NextTextHyperHead).
    Derivation: docs/math.md#mhc_collapse.

    Parameters
    ----------
    x : (..., n, D) float32
        Up to 64 streams.
    out : (..., D) float32, optional
        Shares no memory with `x`.
    ctx : Context, optional

    Returns
    -------
    out : (..., D) float32

    Raises
    ------
    TypeError, ValueError
        If the type does not widen to float32, there are more than 64 streams, or `out` overlaps `x`.
    """
    x = as_float32(x, "x")
    T, n, D = _streams(x)
    result = output(out, (*x.shape[:-2], D), like=x)
    refuse_shared(result, x=x)
    _core.mhc_collapse(current(ctx)._core, result, x, T, n, D)
    return result


def mhc_pre(x, fn, base, scale, *, norm_eps, eps=1e-6, iters=20, out=None, ctx=None):
    """Of each token the one stream that a block reads, and the weights by which its result goes back into n streams.

    One product with the normed streams gives ``m = fn @ flat(x) / sqrt(mean(flat(x)**2) + norm_eps)``, of which the
    first n make ``pre``, the next n ``post``, the rest, row by row, the [n, n] of ``comb``::

        pre = sigmoid(m * scale[0] + base) + eps
        post = 2 * sigmoid(m * scale[1] + base)
        C = softmax(m * scale[2] + base, axis=-1) + eps
        comb: C / (C.sum(-2) + eps), then iters - 1 times C / (C.sum(-1) + eps) and C / (C.sum(-2) + eps)
        y = sum of pre[i] * x[i]

    The product is made in float32 whatever the context's activations. Source: mHC, arXiv:2512.24880; as
    transformers, ``models/glm5_next``, has it. Derivation: docs/math.md#mhc_pre.

    Parameters
    ----------
    x : (..., n, D) float32
        The streams, up to 64 of them.
    fn : ((2 + n) * n, n * D) float32, float16, bfloat16 or Quantized
        Its columns are those of ``x.reshape(..., n * D)``. Used as it lies, as `linear`'s w; published files of
        GLM-5.3-Flash have it in Q8_0.
    base : ((2 + n) * n,) float32
    scale : (3,) float32
        Of pre, post and comb.
    norm_eps : float
        In units of ``x**2``, >= 0: the model's ``rms_norm_eps``, which is not `eps`.
    eps : float
        >= 0, of pre, comb and each of its sums: ``hc_eps``. With 0, rows whose logits are more than 103 apart can leave
        a column 0 / 0.
    iters : int
        How often columns are normalised, 1 to 1000.
    out : tuple of 3 arrays or None, optional
        y, post, comb; they share no memory with an input or each other.
    ctx : Context, optional

    Returns
    -------
    y : (..., D) float32
    post : (..., n) float32
        From 0 to 2.
    comb : (..., n, n) float32
        Columns sum to 1, rows nearly. Row i is where stream i goes: `mhc_post`.

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, the shapes disagree, an eps is negative, `iters` or n is out of range, or `out` overlaps
        an input.
    """
    x = as_float32(x, "x")
    T, n, D = _streams(x)
    lead, rows = x.shape[:-2], (2 + n) * n
    weight, shape = as_weight(fn, "fn")
    if shape != (rows, n * D):
        raise ValueError(f"fn has shape {list(shape)}; it must be [{rows}, {n * D}], (2 + n) n rows for {n} streams of "
                         f"{D}")
    base, scale = as_float32(base, "base", (rows,)), as_float32(scale, "scale", (3,))
    given = zip(outputs(out, 3), ((*lead, D), (*lead, n), (*lead, n, n)), strict=True)
    results = tuple(output(o, shape, f"out[{i}]", like=x) for i, (o, shape) in enumerate(given))
    for y in results:
        refuse_shared(y, x=x, fn=weight[0], base=base, scale=scale)
    refuse_shared_outputs(*results)
    _core.mhc_pre(current(ctx)._core, *results, x, weight, base, scale, T, n, D, check_eps(norm_eps, "norm_eps"),
                  check_eps(eps), as_whole(iters, "iters"))
    return results


def mhc_post(y, x, post, comb, *, out=None, ctx=None):
    """A block's result into the streams: ``out[j] = post[j] * y + sum over i of comb[i, j] * x[i]``.

    Source: mHC, arXiv:2512.24880. Derivation: docs/math.md#mhc_post.

    Parameters
    ----------
    y : (..., D) float32
        What the block made.
    x : (..., n, D) float32
        The streams, up to 64, from which `mhc_pre` made its input.
    post : (..., n) float32
    comb : (..., n, n) float32
        Row i is where stream i goes.
    out : (..., n, D) float32, optional
        Result; may be `x`.
    ctx : Context, optional

    Returns
    -------
    out : (..., n, D) float32

    Raises
    ------
    TypeError, ValueError
        If a type is none that widens to float32, the shapes disagree, or there are more than 64 streams.
    """
    x = as_float32(x, "x")
    T, n, D = _streams(x)
    lead = x.shape[:-2]
    y, post = as_float32(y, "y", (*lead, D)), as_float32(post, "post", (*lead, n))
    comb = as_float32(comb, "comb", (*lead, n, n))
    result = output(out, x.shape, like=x)
    y, x, post, comb = apart(y, result), apart(x, result, same=result), apart(post, result), apart(comb, result)
    _core.mhc_post(current(ctx)._core, result, y, x, post, comb, T, n, D)
    return result
