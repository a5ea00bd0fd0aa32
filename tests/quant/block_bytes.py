"""Random blocks whose scales are those of weights: all other bits are free."""

import ggml_types
import numpy as np

INT8_TYPES = ["Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q1_0",
              "Q2_0"]
_SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
_HAS_MIN = ("Q2_K", "Q4_K", "Q5_K", "Q4_1")


def blocks(name, rows, K, rng, size=1e-2):
    """(bytes [rows, bytes of a row], type id) of rows of K values; float16 scales about `size`."""
    values, n_bytes = ggml_types.size_of(name)
    b = rng.integers(0, 256, (rows * K // values, n_bytes), dtype=np.uint8)
    at = _SCALE_AT.get(name, 0)
    if name == "MXFP4":
        b[:, 0] = rng.integers(110, 121, len(b))
    else:
        for first in (at, at + 2) if name in _HAS_MIN else (at,):
            d = (rng.standard_normal(len(b)) * size).astype(np.float16)
            b[:, first : first + 2] = d.view(np.uint8).reshape(-1, 2)
    return b.reshape(rows, -1), ggml_types.id_of(name)


def values_of(data, name):
    """The float32 values of blocks, as ggml reads them."""
    return ggml_types.dequantize(data, name)
