"""What `check_op` knows of `layer_norm`."""

import numpy as np

from ..diff.metrics import U
from .plain import lone_rows, maker, nan_spread, plain
from .rms_norm import FORMS, norm_cases
from .rms_norm import inputs as rms_inputs

__all__ = ["SPEC"]

OVERFLOWS = "the sum of squares overflows float32"
CANCELS = "the variance is mean(x^2) - mean^2 in float32: it cancels where the mean is above the deviation"


def inputs(rng, T, D=48, *sizes, **more):
    """As rms_norm's, and b [D] of the size of results."""
    return rms_inputs(rng, T, D, *sizes, **more) | dict(b=0.5 * rng.standard_normal(D))


def _far(x, rng):
    """Numbers of 13 bits whose mean is 64: sums of them have no error, in any order; sums of their squares have."""
    apart = rng.integers(-512, 513, (len(x["x"]), x["x"].shape[1] // 2)) / 64
    x["x"][...] = 64 + rng.permuted(np.concatenate([apart, -apart], -1), axis=-1)


def _equal(x, rng):
    x["x"][...] = np.arange(1, len(x["x"]) + 1)[:, None]


case = maker("layer_norm", inputs)
REST = (
    case("far", "values", 9, 64, change=_far, usual=True, says="a mean of 64, some 14 deviations"),
    case("indexer", "widths", 5, 128, eps=1e-6, usual=True, says="keys of a lightning indexer"),
    case("equal", "rim", 4, 64, change=_equal, says="rows of one value each: nothing is left but the bias"),
)


def diagnose(x, actual, ref):
    """Rows that are right but for a factor, and that have a mean far above their deviation; rows whose squares leave
    float32."""
    with np.errstate(all="ignore"):
        rows, b = np.float64(x["x"]), np.float64(x["b"])
        got, right, sound = actual[0] - b, ref[0] - b, np.isfinite(ref[0]).all(-1)
        error, size = (np.abs(a).max(-1, initial=0) for a in (got - right, right))
        wrong = ~(error <= 1e-6 * size)  # NaN, too: a root of less than 0
        factor = (got * right).sum(-1, keepdims=True) / (right * right).sum(-1, keepdims=True)
        alike = ~(np.abs(got - factor * right).max(-1, initial=0) > 0.1 * error + 4 * U * size)
        mean, var, D = rows.mean(-1), rows.var(-1), rows.shape[-1]
        far = (var > 0) & (mean * mean > 4 * var) & (D >= 8)  # two values have a common factor always
        lost = np.isnan(got).all(-1) & (var * D > np.finfo(np.float32).max)
    for says, seen in ((OVERFLOWS, lost), (CANCELS, alike & far)):
        if wrong.any() and (seen & sound)[wrong].all():
            return [(says, "")]
    return nan_spread(x, actual, ref)


SPEC = plain("layer_norm", ("y",), norm_cases(case, rest=REST), lone_rows("layer_norm", "x"),
             {"normalized_shape": FORMS["normalized_shape"]}, diagnose=diagnose, narrow=("x", "w", "b"))
