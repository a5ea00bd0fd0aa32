"""What `check_op` knows of `linear`."""

import numpy as np

from .plain import Form, faint, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, n=48, m=20, bias=True, scale=1.0):
    """x [T, n], w [m, n] of a checkpoint's size, bias [m]."""
    return dict(x=scale * rng.standard_normal((T, n)), w=rng.standard_normal((m, n)) / max(n, 1) ** 0.5,
                bias=rng.standard_normal(m) if bias else None)


case = maker("linear", inputs)


def _zeros(x, rng):
    x["x"][1::2] = 0
    x["w"][::3] = 0


def _cancelling(x, rng):
    """Sums of large terms that nearly vanish."""
    half = x["x"].shape[1] // 2
    x["x"][:, half:] = -x["x"][:, :half]
    x["w"][:, half:] = x["w"][:, :half] * np.float32(1.0001)


def cases():
    """All."""
    yield case("plain", "lengths", 5, 48, 20, False, usual=True, says="without a bias")
    for T in (1, 2, 3, 17, 65):
        yield case(f"length-{T}", "lengths", T, 48, 20, False, usual=True)
    yield case("length-0", "lengths", 0, 48, 20, False, needs={"T = 0"})
    for n, m in ((1, 1), (1, 16), (16, 1), (15, 17), (17, 15), (31, 33), (64, 64), (130, 5), (200, 7)):
        yield case(f"width-{n}-{m}", "widths", 4, n, m, False, says="n columns to m")
    yield case("square", "widths", 4, 32, 32, False, usual=True, says="a matrix that can be turned unseen")
    yield case("model", "widths", 2, 2304, 72, False, says="2,304 columns")
    yield case("down", "widths", 2, 9216, 8, False, says="9,216 columns")
    for T in (1, 6):
        yield case(f"bias-{T}", "bias", T, usual=True, needs={"bias"})
    yield case("zeros", "rim", 4, 48, 20, False, change=_zeros)
    yield case("cancelling", "rim", 4, 48, 20, False, change=_cancelling)
    yield case("large", "rim", 4, 48, 20, False, 1e30)
    yield case("tiny", "rim", 4, 48, 20, False, 1e-30)
    yield case("subnormal", "rim", 4, 48, 20, False, change=faint("x"), needs={"subnormals"},
               says="every other row is of 1e-39")
    yield from nans(case, 5, 48, 20, False, x=(2, 47))


FORMS = {"w [n, m]": Form(lambda x: {"w": np.ascontiguousarray(x["w"].T)})}

SPEC = plain("linear", ("y",), cases(), lone_rows("linear", "x"), FORMS,
             narrow=("x", "w", "bias"))
