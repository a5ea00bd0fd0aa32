"""What `check_op` knows of `latent_attention`."""

import numpy as np

from .plain import DROPPED, Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, S=None, H=2, nope=8, P=4, R=12, V=8, scale=None, sharp=1.0, lengths=None, cached=None):
    """q [T, H, nope + P], latent [S, R], k_shared [S, P], w_uk [H, nope, R], w_uv [H, V, R]."""
    S = T if S is None else S
    cached = lengths if cached is None else cached
    return dict(q=sharp * rng.standard_normal((T, H, nope + P)), latent=rng.standard_normal((S, R)),
                k_shared=rng.standard_normal((S, P)), w_uk=rng.standard_normal((H, nope, R)) / R**0.5,
                w_uv=rng.standard_normal((H, V, R)) / R**0.5, scale=(nope + P) ** -0.5 if scale is None else scale,
                offsets=None if lengths is None else np.cumsum([0, *lengths]),
                kv_offsets=None if lengths is None or cached is lengths else np.cumsum([0, *cached]))


case = maker("latent_attention", inputs)


def split(*cuts):
    """Calls that end at `cuts`, with all rows of the cache so far."""
    def steps(x, call):
        T, parts = len(x["q"]), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            rows = {"q": x["q"][a:b], "latent": x["latent"][:b], "k_shared": x["k_shared"][:b]}
            parts.append(call(x | {n: np.ascontiguousarray(r) for n, r in rows.items()})[0])
        return (np.concatenate(parts),)

    return steps


def _equal(x, rng):
    x["latent"][...] = x["latent"][0]
    x["k_shared"][...] = x["k_shared"][0]


def _zeros(x, rng):
    x["q"][1::2] = 0
    x["latent"][::3] = 0


def cases():
    """All."""
    yield case("plain", "lengths", 12, usual=True, says="12 queries of 2 heads, nothing cached before them")
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
    for sizes in ((1, 1, 1, 1, 1), (3, 16, 8, 32, 16), (1, 17, 3, 33, 15), (2, 128, 64, 512, 128)):
        yield case("width-" + "-".join(map(str, sizes)), "widths", 4, None, *sizes, says="H, nope, P, R, V")
    yield case("square", "widths", 9, None, 2, 12, 4, 12, 12, usual=True,
               says="nope = V = R: kv_b can be turned unseen")
    for scale in (1.0, 0.05):
        yield case(f"scale-{scale:g}", "scale", 9, scale=scale, needs={"scale"})
    yield case("equal", "rim", 9, change=_equal, says="all positions are the same: the mean is each")
    yield case("zeros", "rim", 9, change=_zeros)
    yield case("sharp", "rim", 9, sharp=40.0, says="one position has all the weight")
    yield from nans(case, 9, q=(4, 1, 3))


def _kv_b(x):
    """[H (nope + V), R], head by head."""
    return np.concatenate([x["w_uk"], x["w_uv"]], 1).reshape(-1, x["w_uk"].shape[2])


FORMS = {
    "w_uk and w_uv in one, [H (nope + V), R]": Form(lambda x: {"w_uk": _kv_b(x), "w_uv": DROPPED}),
    "w_uk [H, R, nope]": Form(lambda x: {"w_uk": np.ascontiguousarray(np.swapaxes(x["w_uk"], 1, 2))}),
    "w_uv [H, R, V]": Form(lambda x: {"w_uv": np.ascontiguousarray(np.swapaxes(x["w_uv"], 1, 2))}),
    "q [1, H, T, n]": Form(lambda x: {"q": np.ascontiguousarray(np.swapaxes(x["q"], 0, 1))[None]},
                           lambda found, x: {"o": np.swapaxes(found["o"][0], 0, 1)}),
    "q [1, T, H, n]": Form(lambda x: {"q": x["q"][None]}, lambda found, x: {"o": found["o"][0]}),
    "cache [1, S, n]": Form(lambda x: {n: x[n][None] for n in ("latent", "k_shared")}),
    "latent and k_shared in one, [S, R + P]": Form(
        lambda x: {"latent": np.concatenate([x["latent"], x["k_shared"]], -1), "k_shared": DROPPED}),
}

SPEC = plain("latent_attention", ("o",), cases(), (causal("q", "latent", "k_shared"),), FORMS)
