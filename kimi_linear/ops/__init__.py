"""Every op of the model as a function on arrays: float32 in, float32 out, on the CPU.

The same names with the same arguments stand in :mod:`kimi_linear.reference` in float64.
"""

from ._basic import add, gated_rms_norm, l2_norm, rms_norm, sigmoid, softmax, swiglu

__all__ = ["add", "gated_rms_norm", "l2_norm", "rms_norm", "sigmoid", "softmax", "swiglu"]
