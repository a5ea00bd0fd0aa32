"""What `check_op` knows of `l2_norm`."""

import numpy as np

from .plain import lone_rows, maker, plain
from .rms_norm import norm_cases

__all__ = ["SPEC"]


def inputs(rng, T, D=48, scale=1.0, eps=1e-6, spread=1.0, H=None):
    """x [T, D] or [T, H, D] of a size; rows are D ** 0.5 times as long."""
    lead = (T,) if H is None else (T, H)
    return dict(x=scale * rng.standard_normal((*lead, D)) * np.exp(spread * rng.standard_normal((*lead, 1))), eps=eps)


case = maker("l2_norm", inputs)
SPEC = plain("l2_norm", ("y",), norm_cases(case, (1e-6, 1e-5), 48**-0.5), lone_rows("l2_norm", "x"),
             narrow=("x",))
