"""What `check_op` knows of `rms_norm`; its cases serve the other norms."""

import numpy as np

from .plain import Form, lone_rows, maker, nans, plain

__all__ = ["SPEC", "norm_cases"]


def inputs(rng, T, D=48, scale=1.0, eps=1e-5, spread=1.0, H=None):
    """x [T, D] or [T, H, D] of a size, w [D] around 1."""
    lead = (T,) if H is None else (T, H)
    return dict(x=scale * rng.standard_normal((*lead, D)) * np.exp(spread * rng.standard_normal((*lead, 1))),
                w=1 + 0.3 * rng.standard_normal(D), eps=eps)


def _zero(x, rng):
    x["x"][1::2] = 0


def _spike(x, rng):
    x["x"][:, 3] = 1e4


def _mean(x, rng):
    x["x"] += np.float32(3)


def _signs(x, rng):
    if "w" in x:
        x["w"][::3] *= np.float32(-1)
        x["w"][1::3] = 0


def norm_cases(case, eps=(1e-6, 1e-5), size=1.0, rest=()):
    """Cases of a norm of rows: `size` is that of rows whose squares count as much as eps."""
    yield case("plain", "lengths", 9, usual=True)
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for D in (1, 2, 15, 16, 17, 33, 63, 64, 65, 128, 2304):
        yield case(f"width-{D}", "widths", 3, D)
    yield case("offset", "values", 5, change=_mean, usual=True, says="a mean of 3")
    yield case("spike", "values", 5, change=_spike, says="one channel of 1e4")
    yield case("weights", "values", 5, change=_signs, says="weights of 0 and below it")
    for value in eps:
        yield case(f"eps-{value:g}", "eps", 5, 48, 1e-2 * size, value, 0.3, usual=True, says=f"eps = {value:g}")
        yield case(f"faint-{value:g}", "eps", 5, 48, value**0.5 * size, value, 0.3, usual=True,
                   says="squares as large as eps")
    yield case("zeros", "rim", 4, change=_zero, says="every other row is zero")
    yield case("tiny", "rim", 4, 48, 1e-20, says="squares underflow")
    yield case("subnormal", "rim", 4, 48, 1e-39, needs={"subnormals"})
    yield case("huge", "rim", 4, 48, 1e15)
    yield case("overflow", "rim", 4, 48, 1e25, says="squares overflow float32")
    yield case("heads", "heads", 6, 16, 1.0, 1e-5, 1.0, 4, usual=True, needs={"heads axis"},
               says="[T, H, D], a norm for each head")
    yield from rest
    yield from nans(case, 5, x=(2, 3))


def _less_1(w):
    return (w - np.float32(1)).astype(w.dtype)


FORMS = {
    "w less 1": Form(lambda x: {"w": _less_1(x["w"])}, exact=lambda x: {"w": _less_1(x["w"]).astype(np.float64) + 1}),
    "normalized_shape": Form(lambda x: {"normalized_shape": (x["x"].shape[-1],)}),
}

SPEC = plain("rms_norm", ("y",), norm_cases(maker("rms_norm", inputs)), lone_rows("rms_norm", "x"), FORMS,
             narrow=("x", "w"))
