"""What `check_op` knows of `rope`."""

import numpy as np

from .plain import Form, faint, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, H=2, K=24, rotary=16, base=1e4, first=0, step=1, scale=1.0):
    """x [T, H, K], positions [T]."""
    return dict(x=scale * rng.standard_normal((T, H, K)), positions=first + step * np.arange(T), base=base,
                rotary=rotary)


case = maker("rope", inputs)


def _zeros(x, rng):
    x["x"][::2] = 0


def cases():
    """All."""
    yield case("plain", "lengths", 12, usual=True, says="the first 16 of 24 values")
    for T in (1, 7, 65):
        yield case(f"length-{T}", "lengths", T, first=3, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for H, K, rotary in ((1, 2, 2), (3, 17, 14), (2, 32, 32), (1, 66, 34), (16, 256, 64)):
        yield case(f"width-{H}-{K}-{rotary}", "widths", 4, H, K, rotary, first=5, says="H, K, rotary")
    for first in (100, 4095, 262_000):
        yield case(f"position-{first}", "positions", 9, first=first, usual=True)
    yield case("position-apart", "positions", 9, step=1711, usual=True, says="positions need not follow each other")
    for base in (1e7, 5e6, 100.0):
        yield case(f"base-{base:g}", "base", 9, base=base, first=50, usual=True)
    yield case("zeros", "rim", 9, change=_zeros)
    yield case("tiny", "rim", 9, scale=1e-30)
    yield case("subnormal", "rim", 9, change=faint("x"), needs={"subnormals"}, says="every other row is of 1e-39")
    yield case("large", "rim", 9, scale=1e30)
    yield from nans(case, 9, x=(4, 1, 3))


FORMS = {
    "x [1, H, T, K]": Form(lambda x: {"x": np.ascontiguousarray(np.swapaxes(x["x"], 0, 1))[None]},
                           lambda found, x: {"y": np.swapaxes(found["y"][0], 0, 1)}),
    "x [1, T, H, K]": Form(lambda x: {"x": x["x"][None]}, lambda found, x: {"y": found["y"][0]}),
    "positions int32": Form(lambda x: {"positions": x["positions"].astype(np.int32)}),
}

SPEC = plain("rope", ("y",), cases(), lone_rows("rope", "x", "positions"), FORMS,
             narrow=("x",))
