"""Random weights of a config, of a size at which every part of the model matters."""

import ml_dtypes
import numpy as np

from ._names import choice

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")  # as published files keep them


def random_tensor(name, shape, rng, plus_one=False):
    """One tensor, float32: matrices keep the size of their input, gates go from almost none to strong. plus_one: norms
    are stored less 1, but those of delta nets."""
    if name.endswith("A_log"):
        return np.log(1 + 15 * rng.random(shape, np.float32))
    if name.endswith("dt_bias"):
        return -4 + 3 * rng.random(shape, np.float32)
    x = rng.standard_normal(shape, np.float32)
    if "norm" in name:
        return np.float32(0.2) * x + (0 if plus_one and "linear_attn" not in name else 1)
    if "conv1d" in name:
        return np.float32(0.5) * x
    if "correction_bias" in name:
        return np.float32(0.1) * x
    if "embed_tokens" in name:
        return x
    return x * np.float32(1.2 / shape[-1] ** 0.5)


def random_weights(config, seed=0, dtype="float32"):
    """Canonical name -> array, for every tensor of `config`; the same seed gives the same values."""
    choice(dtype, "dtype", DTYPES)
    rng = np.random.default_rng(seed)
    return {
        name: random_tensor(name, shape, rng, config.norm_plus_one).astype(
            np.float32 if name.endswith(_FLOAT32) else DTYPES[dtype])
        for name, shape in config.weight_shapes().items()
    }
