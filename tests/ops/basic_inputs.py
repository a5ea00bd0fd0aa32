"""Inputs of the elementwise ops and the norms, for their tests on every backend."""

import numpy as np
from judge import normal

import kimi_linear as kl

OPS = ["add", "sigmoid", "swiglu", "situ", "softmax", "rms_norm", "layer_norm", "gated_rms_norm", "l2_norm"]
RIM = np.array([0, -0.0, 1, -1, 1e-45, -1e-40, 1e-30, 3e38, -3e38, 87, -87, 88.7, -104, 1e4, -1e4, 20, -20], np.float32)


def op_inputs(op, T, D, scale=1.0):
    x = normal(T, D, scale=scale)
    return {
        "add": dict(a=x, b=normal(T, D, seed=1)),
        "sigmoid": dict(x=x),
        "swiglu": dict(gate=x, up=normal(T, D, seed=1)),
        "situ": dict(gate=x, up=normal(T, D, seed=1, scale=10 * scale), beta=4.0, linear_beta=25.0),
        "softmax": dict(x=x),
        "rms_norm": dict(x=x, w=normal(D, seed=2), eps=1e-5),
        "layer_norm": dict(x=x, w=normal(D, seed=2), b=normal(D, seed=3), eps=1e-6),
        "gated_rms_norm": dict(x=x, z=normal(T, D, seed=1, scale=3), w=normal(D, seed=2), eps=1e-5),
        "l2_norm": dict(x=x, eps=1e-6),
    }[op]


def rim(op):
    """(inputs, reference) of an elementwise op or softmax at the edges of float32; what float32 lacks is infinite."""
    x = np.tile(RIM, (3, 1))
    inputs = {"add": dict(a=x, b=x[::-1] * 0.5), "sigmoid": dict(x=x), "swiglu": dict(gate=x, up=np.sign(x)),
              "situ": dict(gate=x, up=x[:, ::-1], beta=4.0, linear_beta=25.0), "softmax": dict(x=x)}[op]
    with np.errstate(over="ignore"):
        ref = getattr(kl.reference, op)(**inputs)
    return inputs, np.where(np.abs(ref) > np.finfo(np.float32).max, np.copysign(np.inf, ref), ref)
