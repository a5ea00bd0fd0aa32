"""Block types as ggml reads and writes them: by `gguf.quants`, and by ggml-quants.c where the package lacks a type.

gguf 0.19 has no formula for Q1_0 and Q2_0, and no number for Q2_0. Theirs are stated here value by value, as
dequantize_row_q1_0, quantize_row_q1_0_ref and those of q2_0 compute them.
"""

import warnings

import gguf
import numpy as np

BY_VALUE = {"Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18)}  # number, values and bytes a block


def id_of(name):
    """ggml's number."""
    return BY_VALUE[name][0] if name in BY_VALUE else int(gguf.GGMLQuantizationType[name])


def size_of(name):
    """(values, bytes) of a block."""
    return BY_VALUE[name][1:] if name in BY_VALUE else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def dequantize(raw, name):
    """float32 values of rows of blocks."""
    if name not in BY_VALUE:
        return _by_gguf("dequantize", raw, name)
    values, n_bytes = size_of(name)
    blocks = np.ascontiguousarray(raw).reshape(-1, n_bytes)
    y = np.array([_read(name, block) for block in blocks], np.float32)
    return y.reshape(*np.shape(raw)[:-1], np.shape(raw)[-1] // n_bytes * values)


def quantize(x, name):
    """Rows of blocks of float32 values."""
    if name not in BY_VALUE:
        return _by_gguf("quantize", x, name)
    values, n_bytes = size_of(name)
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = np.array([_write(name, block) for block in x.reshape(-1, values)], np.uint8)
    return blocks.reshape(*x.shape[:-1], x.shape[-1] // values * n_bytes)


def _by_gguf(what, x, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return getattr(gguf.quants, what)(x, gguf.GGMLQuantizationType[name])


def _read(name, block):
    d, q = np.float32(block[:2].view("<f2")[0]), [int(byte) for byte in block[2:]]
    if name == "Q1_0":
        return [d if q[j // 8] >> j % 8 & 1 else -d for j in range(128)]
    with np.errstate(invalid="ignore"):
        return [np.float32((q[j // 4] >> 2 * (j % 4) & 3) - 1) * d for j in range(64)]


def _write(name, x):
    q = [0] * 16
    if name == "Q1_0":
        d = np.float32(0)
        for v in x:
            d += np.abs(v)
        d /= np.float32(128)
        for j, v in enumerate(x):
            q[j // 8] |= int(v >= 0) << j % 8
    else:
        d = np.abs(x).max()
        inverse = np.float32(1) / d if d > 0 else np.float32(0)
        for j, v in enumerate(x):
            q[j // 4] |= min(max(_rounded(v * inverse) + 1, 0), 3) << 2 * (j % 4)
    return [*np.array([d]).astype("<f2").view(np.uint8), *q]


def _rounded(v):
    """C's roundf as an integer; 0 for what no int32 holds, where C leaves it open."""
    if not abs(v) < 2.0**31:
        return 0
    return int(np.sign(v)) * int(np.floor(abs(float(v)) + 0.5))
