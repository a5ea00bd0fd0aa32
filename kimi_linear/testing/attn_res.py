"""What `check_op` knows of `attn_res`."""

import numpy as np

from .plain import DROPPED, Form, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, D=48, n=4, scale=1.0, eps=1e-5, steep=1.5, spread=0.5):
    """snapshots [n, T, D] and x [T, D] of a size; w [D] for scores that differ by some `steep`."""
    def rows(*shape):
        return scale * rng.standard_normal((*shape, D)) * np.exp(spread * rng.standard_normal((*shape, 1)))

    return dict(snapshots=rows(n, T), x=rows(T), w=steep * D**-0.5 * rng.standard_normal(D), eps=eps)


case = maker("attn_res", inputs)


def _no_weight(x, rng):
    x["w"][...] = 0


def _alike(x, rng):
    x["snapshots"][...] = x["x"]


def _grown(x, rng):
    x["snapshots"] *= np.float32(0.25) ** np.arange(len(x["snapshots"]), 0, -1, dtype=np.float32)[:, None, None]


def _zero(x, rng):
    x["snapshots"][1, ::2] = 0
    x["x"][1::2] = 0


def _one_huge(x, rng):
    x["snapshots"][1] *= np.float32(1e20)


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for n in (1, 2, 8, 15, 16, 40):
        yield case(f"snapshots-{n}", "snapshots", 3, 48, n, usual=True)
    yield case("snapshots-0", "snapshots", 3, 48, 0, needs={"n = 0"}, says="no snapshots: x itself")
    for D in (1, 2, 15, 16, 17, 33, 64, 7168):
        yield case(f"width-{D}", "widths", 3, D)
    yield case("no-weight", "values", 4, change=_no_weight, says="w is zero: the mean of the candidates")
    yield case("alike", "values", 4, change=_alike, says="the candidates are equal")
    yield case("grown", "values", 4, change=_grown, usual=True, says="each snapshot four times as large as the last")
    for steep in (10.0, 100.0):
        yield case(f"steep-{steep:g}", "values", 4, steep=steep, says="scores far apart: mostly one candidate")
    for eps in (1e-6, 1e-5):
        yield case(f"faint-{eps:g}", "eps", 5, scale=eps**0.5, eps=eps, usual=True, says="squares as large as eps")
    yield case("fainter", "eps", 5, scale=1e-4, spread=1.0, says="squares below eps")
    yield case("zeros", "rim", 4, change=_zero, says="rows of zeros among the candidates")
    yield case("tiny", "rim", 4, scale=1e-20, says="squares underflow")
    yield case("subnormal", "rim", 4, scale=1e-39, needs={"subnormals"})
    yield case("huge", "rim", 4, scale=1e15)
    yield case("overflow", "rim", 4, scale=1e25, says="squares overflow float32")
    yield case("one-huge", "rim", 4, change=_one_huge, says="squares of one snapshot overflow float32")
    yield from nans(case, 5, x=(2, 3), snapshots=(1, 2, 3))


def _inv_rms(x):
    v = x["snapshots"].astype(np.float64)
    with np.errstate(divide="ignore"):
        return {"inv_rms": (1 / np.sqrt((v * v).mean(-1) + x["eps"])).astype(np.float32)}


FORMS = {
    "snapshots [T, n, D]": Form(lambda x: {"snapshots": np.ascontiguousarray(x["snapshots"].swapaxes(0, 1))}),
    "w in two, norm.weight and proj.weight": Form(
        lambda x: {"w": DROPPED, "norm_weight": np.full_like(x["w"], 2), "proj_weight": x["w"] / x["w"].dtype.type(2)}),
    "inv_rms of the snapshots": Form(_inv_rms),
}

SPEC = plain("attn_res", ("y",), cases(), lone_rows("attn_res", "x", "snapshots"), FORMS,
             narrow=("snapshots", "x", "w"))
