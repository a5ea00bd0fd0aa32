"""Random blocks of every storage type of ggml, of a standard deviation that is asked for: no quantiser is needed.

Quantised values are random bits, so each of a type's levels occurs. Scales within a block are near the largest, as a
quantiser leaves them; a block's minimum cancels its mean. One factor for all blocks, found by dequantising a sample,
then gives the values the deviation. Layouts are those of ggml.
"""

import ml_dtypes
import numpy as np

import kimi_linear as kl

__all__ = ["TYPES", "block_of", "random_blocks", "type_for"]

FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
RUN = 32  # values of a float type that stay together: its block here

#: Where a block's half-precision factor d is; those with a minimum: where, as a multiple of d.
D_AT = {"Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0,
        "Q6_K": 208, "IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "IQ4_NL": 0,
        "IQ4_XS": 0, "TQ1_0": 52, "TQ2_0": 64, "Q1_0": 0, "Q2_0": 0}
MIN_AT = {"Q4_1": (2, -7.5), "Q5_1": (2, -15.5), "Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}
SIGNED = {"Q4_0", "Q5_0", "IQ4_NL"}  # levels lie to one side of zero: d has either sign, in ggml's files, too
#: Factors of types that store them as codes, by code.
CODES = {"MXFP4": 2.0 ** (np.arange(255) - 128.0),
         "NVFP4": np.array([m * 2.0**-10 if e == 0 else (8 + m) * 2.0 ** (e - 11)
                            for e in range(16) for m in range(8)][:127])}
CODES_AT = {"MXFP4": slice(0, 1), "NVFP4": slice(0, 4)}

TYPES = (*FLOATS, *D_AT, "IQ1_M", *CODES)

#: What rows get that a type's block does not divide, as llama.cpp's quantiser chooses.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0",
            "TQ2_0": "Q4_0", "Q2_0": "Q4_0"}


def block_of(name):
    """(values, bytes) of a block."""
    if name in FLOATS:
        return RUN, RUN * FLOATS[name].itemsize
    return kl.storage_types[name].values, kl.storage_types[name].bytes


def type_for(name, columns):
    """The type that rows of `columns` values are stored in where `name` is asked for."""
    if name in FLOATS or columns % block_of(name)[0] == 0:
        return name
    other = FALLBACK.get(name) or ("IQ4_NL" if name.startswith("IQ") else "F16")
    return other if columns % block_of(other)[0] == 0 else "F16"


def random_blocks(name, std, n, rng):
    """Blocks of a type whose values have mean 0 and a standard deviation.

    Parameters
    ----------
    name : str
        Of `TYPES`.
    std : float
    n : int
    rng : numpy.random.Generator

    Returns
    -------
    (n, bytes of a block) uint8
    """
    if name in FLOATS:
        return (std * rng.standard_normal((n, RUN), np.float32)).astype(FLOATS[name]).view(np.uint8)
    raw = rng.integers(0, 256, (n, block_of(name)[1]), np.uint8)
    if name in SCALES:
        SCALES[name](raw, rng)
    _set_factor(name, raw, 1.0, rng)
    values = kl.reference.dequantize(raw[:2048], name)
    _set_factor(name, raw, std / np.sqrt(np.mean(np.square(values, dtype=np.float64))), rng)
    return raw


# ---- fields of a block ----

def _set_factor(name, raw, d, rng):
    if name in CODES:
        return _set_codes(name, raw, d, rng)
    if name == "IQ1_M":
        return _set_iq1_m(raw, d)
    sign = rng.choice(np.float32([-1, 1]), len(raw)) if name in SIGNED else 1
    _set_half(raw, D_AT[name], d * sign)
    if name in MIN_AT:
        at, factor = MIN_AT[name]
        _set_half(raw, at, d * factor)


def _set_half(raw, at, value):
    raw[:, at : at + 2] = np.broadcast_to(np.asarray(value, "<f2"), len(raw)).copy().view(np.uint8).reshape(-1, 2)


def _set_codes(name, raw, d, rng):
    """The two codes around d, mixed so that the mean of their squares is d's."""
    codes = CODES[name]
    low = int(np.clip(np.searchsorted(codes, d, "right") - 1, 0, len(codes) - 2))
    below, above = codes[low] ** 2, codes[low + 1] ** 2
    at = raw[:, CODES_AT[name]]
    at[...] = low + (rng.random(at.shape) < (d * d - below) / (above - below))


def _set_iq1_m(raw, d):
    """IQ1_M keeps its factor in the high nibbles of four words of scales, the lowest first."""
    bits = int(np.float16(d).view(np.uint16))
    for i in range(4):
        high = raw[:, 48 + 2 * i + 1]
        high[...] = high & 0x0F | (bits >> 4 * i & 0x0F) << 4


def _scales_q2_k(raw, rng):
    """Scale and minimum, 4 bits each, are equal, so that the mean is 0."""
    raw[:, :16] = 17 * rng.integers(6, 16, (len(raw), 16), np.uint8)


def _scales_q4_k(raw, rng):
    """Eight scales and eight equal minima of 6 bits in 12 bytes: the last four of each are split in 2 and 4."""
    scale = rng.integers(24, 64, (len(raw), 8), np.uint8)
    first, last = scale[:, :4], scale[:, 4:]
    raw[:, 4:8] = raw[:, 8:12] = first | last >> 4 << 6
    raw[:, 12:16] = 17 * (last & 15)


def _scales_q6_k(raw, rng):
    magnitude = rng.integers(48, 128, (len(raw), 16), np.int8)
    raw[:, 192:208] = (magnitude * rng.choice(np.int8([-1, 1]), magnitude.shape)).view(np.uint8)


def _levels_q8_0(raw, rng):
    """ggml writes no -128."""
    raw[:, 2:][raw[:, 2:] == 0x80] = 0x81


def _levels_tq2_0(raw, rng):
    """Two bits a value, of which 3 stands for nothing."""
    trits = rng.integers(0, 3, (len(raw), 64, 4), np.uint8)
    raw[:, :64] = (trits << np.uint8([0, 2, 4, 6])).sum(-1, dtype=np.uint8)


def _levels_q2_0(raw, rng):
    """The same, four neighbours a byte."""
    trits = rng.integers(0, 3, (len(raw), 16, 4), np.uint8)
    raw[:, 2:] = (trits << np.uint8([0, 2, 4, 6])).sum(-1, dtype=np.uint8)


SCALES = {"Q2_K": _scales_q2_k, "Q4_K": _scales_q4_k, "Q5_K": _scales_q4_k, "Q6_K": _scales_q6_k,
          "Q8_0": _levels_q8_0, "TQ2_0": _levels_tq2_0, "Q2_0": _levels_q2_0}
