"""What `check_op` knows of `mhc_pre`."""

import numpy as np

from .plain import Form, filled, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, n=4, D=24, size=1.0, steep=1.5, spread=1.0, norm_eps=1e-5, eps=1e-6, iters=20):
    """Streams of a size; logits that differ by some `steep` from token to token and by `spread` from base."""
    rows = (2 + n) * n
    return dict(x=size * rng.standard_normal((T, n, D)) * np.exp(0.5 * rng.standard_normal((T, n, 1))),
                fn=steep * (n * D) ** -0.5 * rng.standard_normal((rows, n * D)),
                base=spread * rng.standard_normal(rows), scale=np.array([0.8, 1.3, 1.7]), norm_eps=norm_eps,
                eps=eps, iters=iters)


case = maker("mhc_pre", inputs)


def _turned(order):
    """A change of a case: comb is nearly a permutation."""
    def change(x, rng):
        x["base"][8:] = 8 * np.eye(4)[order].ravel()

    return change


def _pairs(x, rng):
    x["base"][8:] += 8 * np.kron(np.eye(2), np.ones((2, 2))).ravel()


def _zero(x, rng):
    x["x"][::2] = 0
    x["x"][1::2, 2] = 0


def _one_huge(x, rng):
    x["x"][:, 1] *= np.float32(1e20)


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for n in (1, 2, 3, 8, 16):
        yield case(f"streams-{n}", "streams", 3, n, usual=True)
    for D in (1, 2, 15, 16, 17, 33):
        yield case(f"width-{D}", "widths", 3, 4, D)
    yield case("width-4096", "widths", 2, 4, 4096)
    for iters in (1, 2, 3, 40):
        yield case(f"iters-{iters}", "iters", 6, iters=iters, spread=3.0, usual=True)
    yield case("no-fn", "values", 4, change=filled("fn", 0), says="weights are base's alone")
    yield case("no-base", "values", 4, change=filled("base", 0))
    yield case("identity", "values", 4, change=_turned([0, 1, 2, 3]), says="comb is nearly the identity")
    yield case("permutation", "values", 4, change=_turned([1, 2, 3, 0]), says="comb is nearly a permutation")
    yield case("pairs", "values", 4, change=_pairs, says="streams mix in pairs")
    for steep in (5.0, 15.0):
        yield case(f"steep-{steep:g}", "values", 6, steep=steep, says="logits far apart")
    yield case("eps-0", "eps", 5, eps=0.0)
    yield case("eps-0.01", "eps", 5, eps=0.01, usual=True, says="an eps that is seen wherever it is added")
    for eps in (1e-6, 1e-5):
        yield case(f"faint-{eps:g}", "eps", 5, size=eps**0.5, norm_eps=eps, eps=1e-4, usual=True,
                   says="squares as large as norm_eps")
    yield case("zeros", "rim", 4, change=_zero, says="streams and tokens of zeros")
    yield case("tiny", "rim", 4, size=1e-20, says="squares underflow")
    yield case("subnormal", "rim", 4, size=1e-39, needs={"subnormals"})
    yield case("vanishing", "rim", 6, steep=100.0, needs={"subnormals"}, says="sigmoids below 2^-126")
    yield case("huge", "rim", 4, size=1e15)
    yield case("overflow", "rim", 4, size=1e25, says="squares overflow float32")
    yield case("one-huge", "rim", 4, change=_one_huge, says="squares of one stream overflow float32")
    yield from nans(case, 5, x=(2, 1, 3), base=(5,))


FORMS = {
    "x [1, T, n, D]": Form(lambda x: {"x": x["x"][None]}, lambda found, x: {n: a[0] for n, a in found.items()}),
    "post, comb, y": Form(back=lambda found, x: {"post": found["y"], "comb": found["post"], "y": found["comb"]}),
    "post [T, n, 1]": Form(back=lambda found, x: found | {"post": found["post"][..., 0]}),
    "hc_sinkhorn_eps": Form(lambda x: {"hc_sinkhorn_eps": x["eps"]}),
    "fn [n D, (2 + n) n]": Form(lambda x: {"fn": np.ascontiguousarray(x["fn"].T)}),
}

#: comb in a narrow type is rounded at each of its normalisations.
SPEC = plain("mhc_pre", ("y", "post", "comb"), cases(), lone_rows("mhc_pre", "x"), FORMS, narrow=("x",),
             narrow_results=("y",), narrow_rms=2.56)
