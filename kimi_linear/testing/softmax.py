"""What `check_op` knows of `softmax`."""

import numpy as np

from ..faults import mistakes
from .plain import lone_rows, maker, nan_spread, nans, plain

__all__ = ["SPEC"]

LARGEST = 88.72  # of whose exp float32 has room


def inputs(rng, T, D=32, scale=2.0, mean=0.0):
    """x [T, D]."""
    return dict(x=mean + scale * rng.standard_normal((T, D)))


case = maker("softmax", inputs)


def _equal(x, rng):
    x["x"][...] = x["x"][:, :1]


def _masked(x, rng):
    x["x"][:, ::3] = -np.inf
    x["x"][0, 1:] = -np.inf


def _one_above(x, rng):
    x["x"][:, 5] = 1e4


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 7, 32, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for D in (1, 2, 15, 16, 17, 33, 256, 5000):
        yield case(f"width-{D}", "widths", 3, D)
    yield case("equal", "values", 4, change=_equal, says="all the same: 1 / D")
    for mean in (100.0, -150.0, 1e4):
        yield case(f"mean{mean:g}", "values", 4, 32, 2.0, mean, says="exp(x) alone leaves float32")
    yield case("steep", "rim", 4, 32, 100.0, says="most of them are 0")
    yield case("one-above", "rim", 4, change=_one_above, says="one is 1, the rest 0")
    yield case("masked", "rim", 4, change=_masked, needs={"-inf"}, says="-inf is 0 exactly")
    yield from nans(case, 5, x=(2, 3))


def diagnose(x, actual, ref):
    """NaN of rows whose exponentials leave float32."""
    most = x["x"].max(-1)
    rows = np.isnan(actual[0]).any(-1) & ~np.isnan(ref[0]).any(-1)
    if not rows.any() or not (np.abs(most[rows]) > 85).all():
        return nan_spread(x, actual, ref)
    if (most[~rows] > LARGEST).any():
        return [("the largest of all rows is taken off, not each row's own: far below it all is 0 / 0", "")]
    names = (["softmax_from_zero"] if (most[rows] < 0).all() else []) + ["softmax_overflow"]
    return [(f.text, "") for name in names for f in mistakes("softmax") if f.name == name]


SPEC = plain("softmax", ("y",), cases(), lone_rows("softmax", "x"), diagnose=diagnose,
             narrow=("x",))
