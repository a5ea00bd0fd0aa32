"""What `check_op` knows of `decay_cumsum`."""

import numpy as np

from .plain import Form, causal, drawn, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, H=2, K=16, chunk=64, kind="channel", lengths=None, strongest=1.6):
    """g [T, H, K] or [T, H], at most 0."""
    g = -np.exp(rng.uniform(np.log(1e-3), np.log(strongest), (T, H, K) if kind == "channel" else (T, H)))
    return dict(g=g, chunk=chunk, offsets=None if lengths is None else np.cumsum([0, *lengths]))


case = maker("decay_cumsum", inputs)


def split(*cuts):
    """Calls that end at `cuts`, borders of chunks."""
    def steps(x, call):
        T = len(x["g"])
        return (np.concatenate([call(x | {"g": np.ascontiguousarray(x["g"][a:b])})[0]
                                for a, b in zip((0, *cuts), (*cuts, T), strict=True)]),)

    return steps


def _infinite(x, rng):
    x["g"][70, 0] = -np.inf


def _of_subnormals(x, rng):
    x["g"][:, 0] *= np.float32(1e-40)


def cases():
    """All."""
    yield case("plain", "lengths", 70, usual=True, says="70 tokens: a chunk of 64 and one of 6")
    for T in (1, 2, 63, 64, 65, 200):
        yield case(f"length-{T}", "lengths", T, usual=T > 1)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for chunk in (1, 16, 32, 128):
        yield case(f"chunk-{chunk}", "chunks", 70, chunk=chunk, needs={"chunk"}, usual=True)
    for cuts in ((64,), (64, 128)):
        yield case("split-" + "-".join(map(str, cuts)), "chunks", 150, steps=split(*cuts), usual=True,
                   says="in calls that end at borders of chunks")
    for K in (1, 15, 17, 33, 128):
        yield case(f"width-{K}", "widths", 20, 2, K)
    yield case("per-head", "kinds", 70, 5, kind="head", needs={"gate per head"}, usual=True)
    yield case("ragged", "ragged", 150, lengths=(0, 1, 70, 0, 66, 13), needs={"offsets"}, usual=True,
               says="sequences of 0, 1, 70, 0, 66 and 13 tokens: chunks begin anew")
    yield case("mixed", "rim", 130, change=drawn("g", [-0.0, -1e-30, -1e-3, -5, -100, -1e4]), says="from -0 to -1e4")
    yield case("wide", "rim", 130, strongest=200.0)
    yield case("subnormal", "rim", 20, change=_of_subnormals, needs={"subnormals"}, says="sums of one head are exact")
    yield case("infinite", "rim", 130, change=_infinite, needs={"-inf"}, says="one -inf stays to the end of its chunk")
    yield from nans(case, 70, g=(20, 1, 3))


FORMS = {
    "g [1, T, H, K]": Form(lambda x: {"g": x["g"][None]}, lambda found, x: {"c": found["c"][0]}),
    "g [1, H, T, K]": Form(lambda x: {"g": np.ascontiguousarray(np.swapaxes(x["g"], 0, 1))[None]},
                           lambda found, x: {"c": np.swapaxes(found["c"][0], 0, 1)}),
    "c in log2": Form(back=lambda found, x: {"c": np.float64(found["c"]) * np.log(2)}),
}

SPEC = plain("decay_cumsum", ("c",), cases(), (causal("g"),), FORMS)
