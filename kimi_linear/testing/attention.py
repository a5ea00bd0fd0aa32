"""What `check_op` knows of `attention`."""

import numpy as np

from .plain import Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, S=None, H=4, Hkv=2, K=12, V=8, scale=None, sharp=1.0, lengths=None, cached=None):
    """q [T, H, K], k [S, Hkv, K], v [S, Hkv, V]."""
    S = T if S is None else S
    cached = lengths if cached is None else cached
    return dict(q=sharp * rng.standard_normal((T, H, K)), k=rng.standard_normal((S, Hkv, K)),
                v=rng.standard_normal((S, Hkv, V)), scale=K ** -0.5 if scale is None else scale,
                offsets=None if lengths is None else np.cumsum([0, *lengths]),
                kv_offsets=None if lengths is None or cached is lengths else np.cumsum([0, *cached]))


case = maker("attention", inputs)


def split(*cuts):
    """Calls that end at `cuts`, with all positions so far."""
    def steps(x, call):
        T, parts = len(x["q"]), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            rows = {"q": x["q"][a:b], "k": x["k"][:b], "v": x["v"][:b]}
            parts.append(call(x | {n: np.ascontiguousarray(r) for n, r in rows.items()})[0])
        return (np.concatenate(parts),)

    return steps


def _equal(x, rng):
    x["k"][...] = x["k"][0]
    x["v"][...] = x["v"][0]


def _zeros(x, rng):
    x["q"][1::2] = 0
    x["v"][::3] = 0


def cases():
    """All."""
    yield case("plain", "lengths", 12, usual=True, says="12 queries of 4 heads on 2 heads of keys, nothing before them")
    for T in (1, 2, 63, 64, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, 5, needs={"T = 0", "cache"})
    for T, S in ((1, 2), (1, 64), (1, 130), (3, 20), (17, 65)):
        yield case(f"cached-{T}-{S}", "cache", T, S, needs={"cache"}, usual=True,
                   says="the last T of S positions are the queries' own")
    for cuts in ((1,), (15,), (1, 2, 17)):
        yield case("split-" + "-".join(map(str, cuts)), "cache", 24, steps=split(*cuts), needs={"cache"}, usual=True,
                   says="in calls that end at these tokens")
    yield case("ragged", "ragged", 27, lengths=(1, 0, 12, 14), needs={"offsets"}, usual=True)
    yield case("ragged-cached", "ragged", 16, 45, lengths=(1, 12, 3), cached=(20, 12, 13), needs={"offsets", "cache"},
               usual=True, says="queries of 3 sequences and their caches")
    for sizes in ((1, 1, 1, 1), (3, 3, 16, 32), (6, 1, 17, 33), (6, 2, 33, 15), (16, 2, 256, 256)):
        yield case("width-" + "-".join(map(str, sizes)), "widths", 4, None, *sizes, says="H, Hkv, K, V")
    yield case("square", "widths", 9, None, 4, 2, 12, 12, usual=True, says="K = V: keys and values can be exchanged")
    for scale in (1.0, 0.05):
        yield case(f"scale-{scale:g}", "scale", 9, scale=scale, needs={"scale"})
    yield case("equal", "rim", 9, change=_equal, says="all positions are the same: the mean is each")
    yield case("zeros", "rim", 9, change=_zeros)
    yield case("sharp", "rim", 9, sharp=40.0, says="one position has all the weight")
    yield from nans(case, 9, q=(4, 1, 3), k=(4, 1, 3), v=(4, 1, 3))


def _heads_first(x):
    return {n: np.ascontiguousarray(np.swapaxes(x[n], 0, 1))[None] for n in "qkv"}


FORMS = {
    "[1, H, T, n]": Form(_heads_first, lambda found, x: {"o": np.swapaxes(found["o"][0], 0, 1)}),
    "[1, T, H, n]": Form(lambda x: {n: x[n][None] for n in "qkv"}, lambda found, x: {"o": found["o"][0]}),
    "[1, H, T, n], o [1, T, H, n]": Form(_heads_first, lambda found, x: {"o": found["o"][0]}),
}

SPEC = plain("attention", ("o",), cases(), (causal("q", "k", "v"),), FORMS)
