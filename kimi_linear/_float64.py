"""What the reference's files share: arrays as float64, and the token ranges of packed sequences."""

import numpy as np

from ._arrays import as_array
from .quantized import Quantized
from .reference_quant import dequantize


def f64(x) -> np.ndarray:
    """`x` as a float64 array, from all that `kl.ops` takes; float32, float16, bfloat16 and blocks widen exactly."""
    if isinstance(x, Quantized):
        return dequantize(x)
    return as_array(x, "an input").astype(np.float64, copy=False)


def sequences(T: int, offsets) -> list[slice]:
    """The token range of each sequence; without offsets, one sequence of all T."""
    if offsets is None:
        return [slice(0, T)]
    o = [int(x) for x in offsets]
    if o[0] != 0 or o[-1] != T or any(a > b for a, b in zip(o, o[1:])):
        raise ValueError(f"offsets is {o}; it must rise from 0 to the number of tokens, {T}")
    return [slice(a, b) for a, b in zip(o, o[1:])]
