"""Weights in every storage type, for the tests of the HIP kernels."""

import ml_dtypes
import numpy as np
from block_data import READ_ONLY

import kimi_linear as kl

CPU = kl.Context()


def stored(w, type):
    """w in a storage type, written by the CPU; of a type that nobody writes here any blocks of its shape."""
    plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if type in READ_ONLY:
        return random_blocks(type, *w.shape)
    return w.astype(plain[type]) if type in plain else kl.ops.quantize(w, type, ctx=CPU)


def random_blocks(type, *shape, seed=0):
    """Blocks of any content, as a Quantized; those with huge values, infinity or NaN are zeros."""
    kind = kl.storage_types[type]
    blocks = np.random.default_rng(seed).integers(0, 256, (np.prod(shape) // kind.values, kind.bytes), np.uint8)
    values = kl.ops.dequantize(kl.Quantized(blocks, type, (len(blocks), kind.values)), ctx=CPU)
    blocks[~(np.abs(values) < 1e6).all(-1)] = 0
    assert blocks.any()
    return kl.Quantized(blocks.reshape(*shape[:-1], -1), type, shape)
