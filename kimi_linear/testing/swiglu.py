"""What `check_op` knows of `swiglu`."""

import numpy as np

from .plain import DROPPED, Form, filled, gates, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, F=48, scale=2.0, limit=None, of_up=1.0):
    """gate, up [T, F], and the limit."""
    return dict(gate=scale * rng.standard_normal((T, F)), up=of_up * rng.standard_normal((T, F)), limit=limit)


case = maker("swiglu", inputs)


def _nan(name, at):
    def change(x, rng):
        x[name][at] = np.nan

    return change


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 7, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for F in (1, 15, 16, 17, 33, 1024, 9216):
        yield case(f"width-{F}", "widths", 2, F)
    yield case("large", "rim", 6, 48, 30.0, says="past the clamps of some")
    yield case("limit", "limit", 9, 48, 12.0, limit=10.0, of_up=12.0, usual=True, needs={"limit"},
               says="GLM-5.3-Flash's: gate above it, up on both sides")
    yield case("limit-7", "limit", 9, 48, 6.0, limit=7.0, of_up=6.0, usual=True, needs={"limit"})
    yield case("limit-low", "limit", 9, 48, limit=0.75, usual=True, needs={"limit"}, says="most values are cut")
    yield case("limit-far", "limit", 9, 17, limit=100.0, usual=True, needs={"limit"}, says="no value is cut")
    yield case("limit-huge", "limit", 4, 48, 1e30, limit=10.0, of_up=1e30, needs={"limit"}, says="all values are cut")
    for name, at in (("gate", (2, 3)), ("up", (3, 1))):
        yield case(f"limit-nan-{name}", "limit", 5, limit=10.0, change=_nan(name, at), needs={"limit", "NaN"},
                   says="NaN stays NaN")
    yield from gates(case, "gate")
    yield case("zero", "rim", 3, change=filled("gate", 0.0))
    yield case("negative", "rim", 3, change=filled("gate", -60.0), says="silu of -60 is next to nothing")
    yield case("tiny", "rim", 3, 48, 1e-30)
    yield from nans(case, 5, gate=(2, 3), up=(3, 1))


FORMS = {
    "gate and up in one, [gate | up]": Form(
        lambda x: {"gate": np.concatenate([x["gate"], x["up"]], -1), "up": DROPPED}),
    "up and gate in one, [up | gate]": Form(
        lambda x: {"gate": np.concatenate([x["up"], x["gate"]], -1), "up": DROPPED}),
}

SPEC = plain("swiglu", ("y",), cases(), lone_rows("swiglu", "gate", "up"), FORMS,
             narrow=("gate", "up"))
