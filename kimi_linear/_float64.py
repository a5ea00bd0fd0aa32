"""What the reference's files share: arrays as float64, and the token ranges of packed sequences."""

import warnings

import numpy as np

from ._arrays import as_array, check_shape
from .quantized import Quantized
from .reference_quant import dequantize

_SMALLEST = np.uint32(1).view(np.float32)  # 2^-149, which a conversion would flush


def f64(x) -> np.ndarray:
    """`x` as a float64 array, from all that `kl.ops` takes; float32, float16, bfloat16 and blocks widen exactly.

    A warning where they cannot: the thread takes subnormals as 0, and NumPy with it.
    """
    if _SMALLEST == 0:
        warnings.warn("this thread takes float32 below 2^-126 as 0: a library compiled with -ffast-math sets it so "
                      "when it is loaded, and so does torch.set_flush_denormal; references and comparisons are wrong "
                      "down there", RuntimeWarning, stacklevel=1)  # of one place: said once
    if isinstance(x, Quantized):
        return dequantize(x)
    a = as_array(x, "an input")
    if a.dtype.kind in "cSU":  # the imaginary part would be lost, or text be read
        raise TypeError(f"an input is {a.dtype}; it must be real numbers")
    return a.astype(np.float64, copy=False)


def of_sequences(x, name: str, shape: tuple) -> np.ndarray:
    """`x` as float64 of `shape`, [N, ...], where it may lack the first axis of one sequence; None is zeros.

    ValueError where it has another: as many values in other places would be read as if they lay in these.
    """
    if x is None:
        return np.zeros(shape)
    a = f64(x)
    check_shape(a, name, shape, *([shape[1:]] if shape[0] == 1 else []))
    return a.reshape(shape)


def sequences(T: int, offsets) -> list[slice]:
    """The token range of each sequence; without offsets, one sequence of all T."""
    if offsets is None:
        return [slice(0, T)]
    o = [int(x) for x in offsets]
    if o[0] != 0 or o[-1] != T or any(a > b for a, b in zip(o, o[1:])):
        raise ValueError(f"offsets is {o}; it must rise from 0 to the number of tokens, {T}")
    return [slice(a, b) for a, b in zip(o, o[1:])]
