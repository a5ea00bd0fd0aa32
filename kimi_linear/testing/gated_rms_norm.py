"""What `check_op` knows of `gated_rms_norm`."""

import numpy as np

from .plain import Form, drawn, lone_rows, maker, plain
from .rms_norm import FORMS as NORM_FORMS
from .rms_norm import norm_cases

__all__ = ["SPEC"]


def inputs(rng, T, D=48, scale=1.0, eps=1e-5, spread=1.0, H=None, activation="sigmoid"):
    """x, z [T, D] or [T, H, D], w [D]."""
    lead = (T,) if H is None else (T, H)
    x = scale * rng.standard_normal((*lead, D)) * np.exp(spread * rng.standard_normal((*lead, 1)))
    return dict(x=x, z=3 * rng.standard_normal((*lead, D)), w=1 + 0.3 * rng.standard_normal(D), eps=eps,
                activation=activation)


case = maker("gated_rms_norm", inputs)


def rest():
    """What a gate adds."""
    yield case("heads-of-a-model", "heads", 2, 128, 1.0, 1e-5, 1.0, 32)
    for activation in ("sigmoid", "silu"):
        yield case(activation, "activation", 6, activation=activation, usual=True, needs={activation})
    yield case("saturated", "rim", 6, change=drawn("z", [-70, -20, 0, 20, 100, 1e4]),
               says="gates next to 0, and 1")
    yield case("closed", "rim", 6, change=drawn("z", [-1e4, -100, -90, -88]), needs={"subnormals"},
               says="gates of -88 and below")
    yield case("closed-silu", "rim", 6, activation="silu", change=drawn("z", [-1e4, -100, -90, -88]),
               needs={"silu", "subnormals"})


FORMS = {"w less 1": NORM_FORMS["w less 1"], "swish": Form(
    lambda x: {"activation": {"silu": "swish"}.get(x.get("activation"), "sigmoid")})}

SPEC = plain("gated_rms_norm", ("y",), norm_cases(case, rest=rest()), lone_rows("gated_rms_norm", "x", "z"), FORMS,
             narrow=("x", "z", "w"))
