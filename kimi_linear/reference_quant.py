"""Every block type's formula in NumPy, vectorised over blocks: the twins of csrc/quant, for reading.

A twin takes blocks [n, bytes a block] uint8 and gives values [n, values a block] float32. The formulas' operations
are rounded to float32 one by one, in their order, so that the bytes are those of ``kl.ops.dequantize``. The twins of
quantize are those of the closed formulas; the searches for scales of the other types have none. The codebooks of
IQ1, IQ2 and IQ3 are constants of the format, read from the core. Layouts: docs/block-types.md.

Source: ggml (github.com/ggml-org/ggml), whose layouts these are; MXFP4: OCP Microscaling, arXiv:2310.10537.
"""

import functools

import numpy as np

from . import _core
from ._arrays import as_array
from .quantized import Quantized, storage_type

__all__ = ["dequantize", "quantize"]

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # E2M1, doubled

READ, WRITE = {}, {}


def _reads(f):
    """Enters ``read_q4_0`` as the twin of Q4_0."""
    READ[f.__name__.removeprefix("read_").upper()] = f
    return f


def _writes(f):
    WRITE[f.__name__.removeprefix("write_").upper()] = f
    return f


# ---- parts of blocks ------------------------------------------------------------------------------


def fields(blocks, *sizes):
    """The consecutive fields of these numbers of bytes."""
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=1)


def f16(field):
    """float16 scales: [n, bytes] -> [n, bytes / 2] float32."""
    return np.ascontiguousarray(field).view("<f2").astype(np.float32)


def words(field, dtype):
    """Little-endian words of a field."""
    return np.ascontiguousarray(field).view(dtype)


def nibbles(field, width):
    """Bytes in groups of `width`: the low nibbles of a group, then its high ones."""
    q = field.reshape(len(field), -1, 1, width) >> np.array([0, 4], np.uint8).reshape(2, 1)
    return (q & 15).reshape(len(field), -1)


def pairs(field, width):
    """Bytes in groups of `width`: bits 0 and 1 of a group, then 2 and 3, 4 and 5, 6 and 7."""
    q = field.reshape(len(field), -1, 1, width) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return (q & 3).reshape(len(field), -1)


def bits(field, width):
    """Bytes in groups of `width`: bit 0 of a group, then bit 1, up to bit 7."""
    q = field.reshape(len(field), -1, 1, width) >> np.arange(8, dtype=np.uint8).reshape(8, 1)
    return (q & 1).reshape(len(field), -1)


def spread(scale, count):
    """Each sub-block's scale for its `count` values."""
    return np.repeat(scale, count, axis=1)


def f32(q):
    return q.astype(np.float32)


# ---- 32 values, one scale -------------------------------------------------------------------------


@_reads
def read_q4_0(blocks):
    """``d (q - 8)``."""
    d, q = fields(blocks, 2, 16)
    return f16(d) * (f32(nibbles(q, 16)) - 8)


@_reads
def read_q4_1(blocks):
    """``d q + m``."""
    d, m, q = fields(blocks, 2, 2, 16)
    return f16(d) * f32(nibbles(q, 16)) + f16(m)


@_reads
def read_q5_0(blocks):
    """``d (q - 16)``, bit 4 of q apart."""
    d, high, low = fields(blocks, 2, 4, 16)
    return f16(d) * (f32(nibbles(low, 16) | bits(high, 1) << 4) - 16)


@_reads
def read_q5_1(blocks):
    """``d q + m``, bit 4 of q apart."""
    d, m, high, low = fields(blocks, 2, 2, 4, 16)
    return f16(d) * f32(nibbles(low, 16) | bits(high, 1) << 4) + f16(m)


@_reads
def read_q8_0(blocks):
    """``d q``."""
    d, q = fields(blocks, 2, 32)
    return f16(d) * f32(q.view(np.int8))


@_reads
def read_iq4_nl(blocks):
    """``d v(q)``, sixteen levels v."""
    d, q = fields(blocks, 2, 16)
    return f16(d) * IQ4[nibbles(q, 16)]


@_reads
def read_mxfp4(blocks):
    """``2^(e - 128) v(q)``, v the doubled E2M1 float."""
    e, q = fields(blocks, 1, 16)
    return np.ldexp(np.float32(1), e.astype(np.int32) - 128) * FP4[nibbles(q, 16)]


@_reads
def read_nvfp4(blocks):
    """``u(scale) / 2 v(q)`` by sixteen values; u is E4M3 without its sign, whose NaN counts as 0."""
    scale, q = fields(blocks, 4, 32)
    exponent, fraction = (scale >> 3 & 15).astype(np.int32), f32(scale & 7) / 8
    u = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    u = np.where(scale == 0x7F, np.float32(0), u)
    return spread(u * np.float32(0.5), 16) * FP4[nibbles(q, 8)]


# ---- K types: 256 values, scales of sub-blocks ----------------------------------------------------


def scales_and_minima(packed):
    """Eight 6-bit scales and minima of 12 bytes."""
    first, second, third = fields(packed, 4, 4, 4)
    scale = np.hstack([first & 63, third & 15 | first >> 6 << 4])
    minimum = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    return f32(scale), f32(minimum)


@_reads
def read_q2_k(blocks):
    """``(d scale) q - dmin min``; scale and min are nibbles."""
    scales, q, d, dmin = fields(blocks, 16, 64, 2, 2)
    a, m = f16(d) * f32(scales & 15), f16(dmin) * f32(scales >> 4)
    return spread(a, 16) * f32(pairs(q, 32)) - spread(m, 16)


@_reads
def read_q3_k(blocks):
    """``(d (scale - 32)) (q - 4)``, bit 2 of q apart."""
    high, low, packed, d = fields(blocks, 32, 64, 12, 2)
    scale = nibbles(packed[:, :8], 8) | pairs(packed[:, 8:], 4) << 4
    a = f16(d) * (f32(scale) - 32)
    return spread(a, 16) * (f32(pairs(low, 32) | bits(high, 32) << 2) - 4)


@_reads
def read_q4_k(blocks):
    """``(d scale) q - dmin min``."""
    d, dmin, packed, q = fields(blocks, 2, 2, 12, 128)
    scale, minimum = scales_and_minima(packed)
    return spread(f16(d) * scale, 32) * f32(nibbles(q, 32)) - spread(f16(dmin) * minimum, 32)


@_reads
def read_q5_k(blocks):
    """``(d scale) q - dmin min``, bit 4 of q apart."""
    d, dmin, packed, high, low = fields(blocks, 2, 2, 12, 32, 128)
    scale, minimum = scales_and_minima(packed)
    q = nibbles(low, 32) | bits(high, 32) << 4
    return spread(f16(d) * scale, 32) * f32(q) - spread(f16(dmin) * minimum, 32)


@_reads
def read_q6_k(blocks):
    """``(d scale) (q - 32)``, bits 4 and 5 of q apart."""
    low, high, scale, d = fields(blocks, 128, 64, 16, 2)
    q = nibbles(low, 64) | pairs(high, 32) << 4
    return spread(f16(d) * f32(scale.view(np.int8)), 16) * (f32(q) - 32)


@_reads
def read_iq4_xs(blocks):
    """``(d (scale - 32)) v(q)``, sixteen levels v."""
    d, high, low, q = fields(blocks, 2, 2, 4, 128)
    scale = nibbles(low, 1) | (words(high, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8) << 4
    return spread(f16(d) * (f32(scale) - 32), 32) * IQ4[nibbles(q, 16)]


# ---- three-valued, and two ------------------------------------------------------------------------


def digits(field, width, count):
    """Base-3 digits of bytes that are fractions of 256, in groups of `width` bytes."""
    q = field.reshape(len(field), -1, 1, width) * (3 ** np.arange(count)).astype(np.uint8).reshape(count, 1)
    return (q.astype(np.uint16) * 3 >> 8).reshape(len(field), -1)


@_reads
def read_tq1_0(blocks):
    """``d (q - 1)``, five values to a byte, in the last four bytes four."""
    first, second, third, d = fields(blocks, 32, 16, 4, 2)
    return f16(d) * (f32(np.hstack([digits(first, 32, 5), digits(second, 16, 5), digits(third, 4, 4)])) - 1)


@_reads
def read_tq2_0(blocks):
    """``d (q - 1)``."""
    q, d = fields(blocks, 64, 2)
    return f16(d) * (f32(pairs(q, 32)) - 1)


@_reads
def read_q2_0(blocks):
    """``d (q - 1)``, four neighbours a byte; q is 3 in no block that a quantiser writes."""
    d, q = fields(blocks, 2, 16)
    return f16(d) * (f32(pairs(q, 1)) - 1)


@_reads
def read_q1_0(blocks):
    """``d (2 q - 1)``: d or -d."""
    d, q = fields(blocks, 2, 16)
    return f16(d) * (2 * f32(bits(q, 1)) - 1)


# ---- codebooks ------------------------------------------------------------------------------------


@functools.cache
def codebook(name):
    """Rows of a codebook as float32."""
    width, data = _core.codebooks()[name]
    return np.frombuffer(data, np.int8).reshape(-1, width).astype(np.float32)


def rows_with_signs(name, row, signs):
    """Codebook rows [n, r] with their sign bits, bit j of `signs` (8 values each) for value j: [n, values]."""
    grid = codebook(name)[row].reshape(len(row), -1, 8)
    negative = signs[..., None] >> np.arange(8, dtype=signs.dtype) & 1
    return np.where(negative, -grid, grid).reshape(len(row), -1)


def even(seven):
    """Seven sign bits and an eighth that makes their number even."""
    s = seven.astype(np.uint8)
    parity = functools.reduce(np.bitwise_xor, (s >> k & 1 for k in range(7)))
    return s | parity << 7


def four_sevens(packed):
    """The sign bits of a sub-block, four times seven of a 32-bit word, and the 4-bit scale above them."""
    signs = packed[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    return even(signs).reshape(len(packed), -1), f32(packed >> 28)


@_reads
def read_iq2_xxs(blocks):
    """``(d (scale + 0.5) / 4) sign grid``."""
    d, rest = fields(blocks, 2, 64)
    row = rest.reshape(len(rest), 8, 8)[..., :4].reshape(len(rest), -1)
    signs, scale = four_sevens(words(rest, "<u4")[:, 1::2])
    a = f16(d) * (np.float32(0.5) + scale) * np.float32(0.25)
    return spread(a, 32) * rows_with_signs("iq2_xxs", row, signs)


@_reads
def read_iq2_xs(blocks):
    """``(d (scale + 0.5) / 4) sign grid``."""
    d, rows, scales = fields(blocks, 2, 64, 8)
    row = words(rows, "<u2")
    a = f16(d) * (np.float32(0.5) + f32(nibbles(scales, 1))) * np.float32(0.25)
    return spread(a, 16) * rows_with_signs("iq2_xs", row & 511, even(row >> 9))


@_reads
def read_iq2_s(blocks):
    """``(d (scale + 0.5) / 4) sign grid``."""
    d, low, signs, high, scales = fields(blocks, 2, 32, 32, 8, 8)
    row = low | pairs(high, 1).astype(np.uint16) << 8
    a = f16(d) * (np.float32(0.5) + f32(nibbles(scales, 1))) * np.float32(0.25)
    return spread(a, 16) * rows_with_signs("iq2_s", row, signs)


@_reads
def read_iq3_xxs(blocks):
    """``(d (scale + 0.5) / 2) sign grid``."""
    d, row, packed = fields(blocks, 2, 64, 32)
    signs, scale = four_sevens(words(packed, "<u4"))
    a = f16(d) * (np.float32(0.5) + scale) * np.float32(0.5)
    return spread(a, 32) * rows_with_signs("iq3_xxs", row, signs)


@_reads
def read_iq3_s(blocks):
    """``(d (2 scale + 1)) sign grid``."""
    d, low, high, signs, scales = fields(blocks, 2, 64, 8, 32, 4)
    row = low | bits(high, 1).astype(np.uint16) << 8
    a = f16(d) * (2 * f32(nibbles(scales, 1)) + 1)
    return spread(a, 32) * rows_with_signs("iq3_s", row, signs)


def rows_with_delta(row, minus):
    """Rows of the IQ1 codebook, moved by 1/8, down where `minus`."""
    delta = np.where(minus, np.float32(-0.125), np.float32(0.125))
    return (codebook("iq1")[row] + delta[..., None]).reshape(len(row), -1)


@_reads
def read_iq1_s(blocks):
    """``(d (2 scale + 1)) (grid + delta)``."""
    d, low, high = fields(blocks, 2, 32, 16)
    high = words(high, "<u2")
    top = high[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    a = f16(d) * (2 * f32(high >> 12 & 7) + 1)
    return spread(a, 32) * rows_with_delta(low | top.reshape(len(low), -1) << 8, spread(high >> 15, 4))


@_reads
def read_iq1_m(blocks):
    """``(d (2 scale + 1)) (grid + delta)``; d is in the top nibbles of the scales."""
    low, high, scales = fields(blocks, 32, 16, 8)
    packed = words(scales, "<u2")
    d = np.bitwise_or.reduce(packed >> 12 << np.array([0, 4, 8, 12], np.uint16), axis=1, keepdims=True)
    scale = (packed[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(low), -1)
    a = d.view(np.float16).astype(np.float32) * (2 * f32(scale) + 1)
    top = nibbles(high, 1)
    return spread(a, 16) * rows_with_delta(low | (top & 7).astype(np.uint16) << 8, top >> 3)


# ---- closed formulas of quantize ------------------------------------------------------------------


def inverse(d):
    """``1 / d``, and 0 where d is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def to_byte(x):
    """Toward zero, the low eight bits; 0 for what no int32 holds."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(x) < 2.0**31, x, np.float32(0)).astype(np.int32).astype(np.uint8)


def extreme(x):
    """The value of each block that is farthest from zero, the first of equals."""
    return np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)


def round_half_away(x):
    return np.copysign(np.floor(np.abs(x) + np.float32(0.5) * (np.abs(x) < 2**23)), x)


def half_bytes(d):
    with np.errstate(over="ignore"):
        return d.astype(np.float16).view(np.uint8)


def join(q, width):
    """The inverse of nibbles."""
    q = q.reshape(len(q), -1, 2, width)
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(len(q), -1)


def join_bits(q):
    return np.packbits(q, axis=1, bitorder="little")


def about_zero(x, half):
    """d = extreme / -half; ``q = x / d + half`` to nearest, halves up."""
    d = extreme(x) / np.float32(-half)
    return d, np.minimum(to_byte(x * inverse(d) + np.float32(half + 0.5)), np.uint8(2 * half - 1))


def from_minimum(x, levels):
    """m = min x, d = (max x - m) / levels; ``q = (x - m) / d`` to nearest, halves up."""
    m, greatest = (np.take_along_axis(x, at[:, None], 1) for at in (x.argmin(1), x.argmax(1)))  # the first of equals
    d = (greatest - m) / np.float32(levels)
    return d, m, np.minimum(to_byte((x - m) * inverse(d) + np.float32(0.5)), np.uint8(levels))


def by_largest(x, levels):
    """d = max |x| / levels; ``q = x / d`` to nearest, halves away from zero."""
    d = np.abs(x).max(1, keepdims=True) / np.float32(levels)
    return d, to_byte(round_half_away(x * inverse(d)))


@_writes
def write_q4_0(x):
    d, q = about_zero(x, 8)
    return np.hstack([half_bytes(d), join(q, 16)])


@_writes
def write_q4_1(x):
    d, m, q = from_minimum(x, 15)
    return np.hstack([half_bytes(d), half_bytes(m), join(q, 16)])


@_writes
def write_q5_0(x):
    d, q = about_zero(x, 16)
    return np.hstack([half_bytes(d), join_bits(q >> 4), join(q & 15, 16)])


@_writes
def write_q5_1(x):
    d, m, q = from_minimum(x, 31)
    return np.hstack([half_bytes(d), half_bytes(m), join_bits(q >> 4), join(q & 15, 16)])


@_writes
def write_q8_0(x):
    d, q = by_largest(x, 127)
    return np.hstack([half_bytes(d), q])


@_writes
def write_tq2_0(x):
    d, q = by_largest(x, 1)
    q = (q + 1).reshape(len(q), 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    return np.hstack([np.bitwise_or.reduce(q, axis=2).reshape(len(q), -1), half_bytes(d)])


@_writes
def write_tq1_0(x):
    d, q = by_largest(x, 1)
    parts = []
    for part, width, count in zip(fields((q + 1).astype(np.uint16), 160, 80, 16), (32, 16, 4), (5, 5, 4)):
        number = (part.reshape(len(x), count, width) * 3 ** np.arange(4, 4 - count, -1).reshape(count, 1)).sum(1)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.hstack([*parts, half_bytes(d)])


@_writes
def write_q2_0(x):
    d, q = by_largest(x, 1)
    four = (q + 1).reshape(len(q), 16, 4) << np.array([0, 2, 4, 6], np.uint8)
    return np.hstack([half_bytes(d), np.bitwise_or.reduce(four, axis=2)])


@_writes
def write_q1_0(x):
    """d = mean |x|, of a sum in the order of the values; q = x >= 0."""
    d = np.cumsum(np.abs(x), axis=1, dtype=np.float32)[:, -1:] / np.float32(128)
    return np.hstack([half_bytes(d), join_bits(x >= 0)])


@_writes
def write_mxfp4(x):
    """e = floor(log2(max |x|)) + 125 in eight bits, log2 rounded to float32; q: the nearest, the first of equals."""
    largest = np.abs(x).max(1, keepdims=True).astype(np.float64)
    with np.errstate(divide="ignore"):
        log2 = np.log2(largest).astype(np.float32)
    e = to_byte(np.where(largest > 0, np.floor(log2) + 125, np.float32(0)))
    level = np.ldexp(np.float32(1), e.astype(np.int32) - 128) * FP4
    q = np.abs(level[:, None] - x[..., None]).argmin(2).astype(np.uint8)
    return np.hstack([e, join(q, 16)])


# ---- the two ops ----------------------------------------------------------------------------------


def dequantize(q, type=None, shape=None):
    """Values of blocks, in float64: a Quantized, or raw rows [..., bytes] of uint8 and their type."""
    kind, data = (q.storage, q.data) if isinstance(q, Quantized) else (storage_type(type), as_array(q, "q"))
    if shape is None:
        shape = (*data.shape[:-1], data.shape[-1] // kind.bytes * kind.values)
    blocks = np.ascontiguousarray(data).reshape(-1, kind.bytes)
    with np.errstate(invalid="ignore", over="ignore"):
        if kind.values == 1:
            values = words(blocks, "<u2").astype(np.uint32) << 16 if kind.name == "BF16" else blocks
            return words(values, "<f2" if kind.name == "F16" else "<f4").astype(np.float64).reshape(shape)
        return READ[kind.name](blocks).astype(np.float64).reshape(shape)


def quantize(x, type):
    """Rows of float32 to blocks; NotImplementedError where the type has no closed formula."""
    kind, x = storage_type(type), as_array(x, "x").astype(np.float32)
    if kind.name not in WRITE:
        raise NotImplementedError(f"{kind.name} has no closed formula; those that have are {', '.join(WRITE)}")
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        blocks = WRITE[kind.name](x.reshape(-1, kind.values))
    return Quantized(blocks.reshape(*x.shape[:-1], kind.row_bytes(x.shape[-1])), kind.name, x.shape)
