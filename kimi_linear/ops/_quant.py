"""Float32 to blocks and back."""

import numpy as np

from .. import _core
from .._arrays import as_either, as_float32, contiguous, first_where, output, refuse_shared
from ..context import current
from ..quantized import Quantized, storage_type

__all__ = ["dequantize", "quantize"]


def quantize(x, type, *, out=None, ctx=None):
    """Rows of float32 to rows of blocks of a storage type.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4, Q1_0 and Q2_0 are closed formulas, the bytes those of ggml. Q2_K
    to Q6_K, IQ4_NL and IQ4_XS are a search for the scales with the least squared error. IQ1, IQ2, IQ3 and NVFP4 can
    only be read.

    Source: layouts of ggml (github.com/ggml-org/ggml); MXFP4: OCP Microscaling, arXiv:2310.10537.
    Derivation: docs/math.md#quantize; the types: docs/block-types.md.

    Parameters
    ----------
    x : (..., D) float32
        D is a multiple of the type's block.
    type : str or int
        Name or id of a block type, as in ``kl.storage_types``.
    out : (..., bytes a row) uint8, optional
        Receives the blocks. Shares no memory with x.
    ctx : Context, optional

    Returns
    -------
    w : Quantized
        Of the shape of x.

    Raises
    ------
    TypeError, ValueError
        If the type of x does not fit, a value is NaN or infinite (the message says where, and nothing is written), the
        type is unknown, or D is not whole blocks.
    NotImplementedError
        If the type can only be read; the message names those that can be written.
    """
    kind = storage_type(type)
    x = as_float32(x, "x")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., D] with D >= 1")
    if kind.values == 1:
        raise ValueError(f"type is {kind.name}, which has no blocks; cast x to its dtype")
    D = x.shape[-1]
    data = output(out, (*x.shape[:-1], kind.row_bytes(D)), dtype=np.uint8, like=x)
    refuse_shared(data, x=x)
    try:
        _core.quantize(current(ctx)._core, data, x, kind.id, x.size // D, D)
    except ValueError:
        _refuse_not_finite(x)
        raise
    return Quantized(data, kind.name, x.shape)


def _refuse_not_finite(x):
    """ValueError with the place of the first value that is not finite, on the axes of x."""
    if at := first_where(x, lambda x: ~np.isfinite(x)):
        raise ValueError(f"x[{', '.join(map(str, at))}] is {x[at]}; it must be finite") from None


def dequantize(q, type=None, shape=None, *, out=None, ctx=None):
    """Values of blocks, in float32.

    The bytes are those of gguf.quants for any content of the blocks; where that is NaN, so is this.

    Source: layouts of ggml (github.com/ggml-org/ggml); MXFP4: OCP Microscaling, arXiv:2310.10537.
    Derivation: docs/math.md#dequantize; the types: docs/block-types.md.

    Parameters
    ----------
    q : Quantized, or (..., bytes a row) uint8
    type : str or int, optional
        Name or id of a storage type; with raw bytes only, and then needed.
    shape : tuple of int, optional
        Of the values; by default that of q, its last axis in values.
    out : (..., D) float32, optional
        Shares no memory with q.
    ctx : Context, optional

    Returns
    -------
    x : (..., D) float32

    Raises
    ------
    ValueError
        If the type is unknown, or the bytes are not the rows that shape and type say.
    TypeError
        If the type is missing, or given twice.
    """
    if isinstance(q, Quantized):
        if type is not None and storage_type(type).name != q.type:
            raise TypeError(f"type is {type!r}; q is {q.type} already")
        kind, data = q.storage, q.data
        shape = q.shape if shape is None else tuple(shape)
    else:
        if type is None:
            raise TypeError("type is missing; raw bytes need the name of theirs")
        kind, data = storage_type(type), as_either(q, "q")
        if data.dtype != np.uint8:
            raise TypeError(f"q is {data.dtype}; it must be uint8: q.view('uint8')")
        shape = _shape_of(data, kind) if shape is None else tuple(shape)
    D = shape[-1] if shape else 0
    if D < 1:
        raise ValueError(f"shape is {list(shape)}; it must be [..., D] with D >= 1")
    n_rows = int(np.prod(shape[:-1]))
    if data.size != n_rows * kind.row_bytes(D, "shape"):
        raise ValueError(f"q has {data.size} bytes; {kind.name} of shape {list(shape)} has "
                         f"{n_rows * kind.row_bytes(D)}")
    x = output(out, shape, like=data)
    refuse_shared(x, q=data)
    data = contiguous(data)
    if kind.values == 1 and isinstance(data, np.ndarray) and data.ctypes.data % kind.bytes:
        data = data.copy()  # floats of their own size are read at aligned addresses
    _core.dequantize(current(ctx)._core, x, data, kind.id, n_rows, D)
    return x


def _shape_of(data, kind):
    if data.ndim == 0 or data.shape[-1] % kind.bytes:
        raise ValueError(f"q has shape {list(data.shape)}; a row of {kind.name} is a multiple of {kind.bytes} bytes")
    return (*data.shape[:-1], data.shape[-1] // kind.bytes * kind.values)
