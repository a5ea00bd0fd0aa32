"""Blocks and values with what can go wrong in them."""

import numpy as np
from random_blocks import random_blocks

import kimi_linear as kl

BLOCK_TYPES = [t for t in kl.storage_types.values() if t.values > 1]
WRITABLE = [t.name for t in BLOCK_TYPES if t.writable]
READ_ONLY = [t.name for t in BLOCK_TYPES if not t.writable]

#: float16: zeros, subnormals, the normal rims, infinities, NaN quiet and signalling
HALVES = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01,
                   0xFE00, 0xFFFF], "<u2")


def raw_blocks(kind, n_random=500):
    """Blocks of random bytes, of every byte alone, and with every special float16 at every even place."""
    rng = np.random.default_rng(kind.id)
    random = rng.integers(0, 256, (n_random, kind.bytes), dtype=np.uint8)
    alike = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.bytes, 1)
    places = np.arange(0, kind.bytes - 1, 2)
    special = rng.integers(0, 256, (len(places), len(HALVES), kind.bytes), dtype=np.uint8)
    for i, at in enumerate(places):
        special[i, :, at:at + 2] = HALVES.view(np.uint8).reshape(-1, 2)
    return np.concatenate([random, alike, special.reshape(-1, kind.bytes)])


def drawn(type, *shape, scale=1.0, seed=0):
    """Random blocks of a standard deviation, of any type, as a Quantized."""
    n = int(np.prod(shape)) // kl.storage_types[type].values
    blocks = random_blocks(type, scale, n, np.random.default_rng(seed))
    return kl.Quantized(blocks.reshape(*shape[:-1], -1), type, shape)


def same_floats(a, b):
    """Bit for bit, any NaN equal to any."""
    return a.shape == b.shape and bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def edge_values(rows_each=40, cols=256):
    """Name -> rows: zeros of both signs, ties, huge, tiny, subnormal, one sign, powers of two and just below."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((rows_each, cols)).astype(np.float32)
    powers = rng.integers(-149, 127, x.shape)
    below = np.nextafter(np.ldexp(np.float32(1), powers[:, :1]), np.float32(0))
    with np.errstate(over="ignore"):
        huge = np.clip(x * np.float32(1e38), -np.finfo(np.float32).max, np.finfo(np.float32).max)
    return {
        "normal": x, "zeros": x * 0, "ties": np.round(x * 4) / 2,
        "steps": rng.choice(np.float32([-8, -.5, 0, 7.5]), x.shape),
        "positive": np.abs(x), "negative": -np.abs(x), "constant": np.full_like(x, -3.3), "1e4": x * np.float32(1e4),
        "1e30": x * np.float32(1e30), "huge": huge, "1e-6": x * np.float32(1e-6), "1e-39": x * np.float32(1e-39),
        "1e-44": x * np.float32(1e-44), "powers": np.ldexp(np.sign(x), powers), "below": below * np.sign(x),
    }
