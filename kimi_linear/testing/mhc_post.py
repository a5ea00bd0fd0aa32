"""What `check_op` knows of `mhc_post`."""

import numpy as np

from .plain import Form, filled, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, n=4, D=24, size=1.0):
    """comb of rows and columns that add up to 1, or nearly."""
    comb = np.exp(rng.standard_normal((T, n, n)))
    for axis in (-2, -1, -2, -1, -2):
        comb = comb / comb.sum(axis, keepdims=True)
    return dict(y=size * rng.standard_normal((T, D)), x=size * rng.standard_normal((T, n, D)),
                post=2 / (1 + np.exp(rng.standard_normal((T, n)))), comb=comb)


case = maker("mhc_post", inputs)


def _identity(x, rng):
    x["comb"][...] = np.eye(4)


def _permutation(x, rng):
    x["comb"][...] = np.eye(4)[[1, 2, 3, 0]]


def _signed(x, rng):
    x["comb"] -= np.float32(0.25)


def _huge_stream(x, rng):
    x["x"][:, 2] *= np.float32(1e30)


def _zero(x, rng):
    x["y"][::2] = 0
    x["x"][1::2] = 0


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for n in (1, 2, 3, 8, 16):
        yield case(f"streams-{n}", "streams", 3, n, usual=True)
    for D in (1, 2, 15, 16, 17, 33, 4096):
        yield case(f"width-{D}", "widths", 3, 4, D)
    yield case("identity", "values", 4, change=_identity, says="each stream stays where it is")
    yield case("permutation", "values", 4, change=_permutation, says="each stream moves on by one")
    yield case("signed", "values", 4, change=_signed, says="a comb of both signs")
    yield case("no-post", "values", 4, change=filled("post", 0), says="post is zero: the streams alone")
    yield case("no-comb", "values", 4, change=filled("comb", 0), says="comb is zero: y alone")
    yield case("zeros", "rim", 4, change=_zero, says="tokens of zeros")
    yield case("subnormal", "rim", 4, size=1e-39, needs={"subnormals"})
    yield case("huge", "rim", 4, size=1e37)
    yield case("one-huge", "rim", 4, change=_huge_stream, says="one stream is 1e30")
    yield from nans(case, 5, y=(2, 3), x=(2, 1, 3), post=(2, 1), comb=(2, 1, 3))


_ALL = ("y", "x", "post", "comb")

FORMS = {
    "[1, T, ...]": Form(lambda x: {n: x[n][None] for n in _ALL}, lambda found, x: {n: a[0] for n, a in found.items()}),
    "post [T, n, 1]": Form(lambda x: {"post": x["post"][..., None]}),
    "comb [T, to, from]": Form(lambda x: {"comb": np.ascontiguousarray(np.swapaxes(x["comb"], -1, -2))}),
}

SPEC = plain("mhc_post", ("streams",), cases(), lone_rows("mhc_post", "x", "y", "post", "comb"), FORMS,
             narrow=("y", "x"))
