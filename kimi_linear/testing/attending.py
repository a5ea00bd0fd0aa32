"""What the cases of `attention` and `latent_attention` share: queries, and the positions that they see."""

import numpy as np

__all__ = ["lengths", "offsets", "rim", "split"]


def offsets(lengths, cached):
    """`offsets` and `kv_offsets` of sequences of these lengths, whose positions are `cached`, or as many."""
    return dict(offsets=None if lengths is None else np.cumsum([0, *lengths]),
                kv_offsets=None if lengths is None or cached is None else np.cumsum([0, *cached]))


def split(names, *cuts):
    """Calls that end at `cuts`, with all rows of the arrays `names` so far."""
    def steps(x, call):
        T, parts = len(x["q"]), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            rows = {"q": x["q"][a:b], **{name: x[name][:b] for name in names}}
            parts.append(call(x | {n: np.ascontiguousarray(r) for n, r in rows.items()})[0])
        return (np.concatenate(parts),)

    return steps


def lengths(case, names, says):
    """Cases of queries, of positions before them, of calls and of sequences."""
    yield case("plain", "lengths", 12, usual=True, says=says)
    for T in (1, 2, 63, 64, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, 5, needs={"T = 0", "cache"})
    for T, S in ((1, 2), (1, 64), (1, 130), (3, 20), (17, 65)):
        yield case(f"cached-{T}-{S}", "cache", T, S, needs={"cache"}, usual=True,
                   says="the last T of S positions are the queries' own")
    yield case("cached-2-1100", "cache", 2, 1100, needs={"cache"}, usual=1100,
               says="many positions, which kernels take in pieces and merge")
    for cuts in ((1,), (15,), (1, 2, 17)):
        yield case("split-" + "-".join(map(str, cuts)), "cache", 24, steps=split(names, *cuts), needs={"cache"},
                   usual=True, says="in calls that end at these tokens")
    yield case("ragged", "ragged", 27, lengths=(1, 0, 12, 14), needs={"offsets"}, usual=True)
    yield case("ragged-cached", "ragged", 16, 45, lengths=(1, 12, 3), cached=(20, 12, 13), needs={"offsets", "cache"},
               usual=True, says="queries of 3 sequences and their caches")


def rim(case, names, values):
    """Cases of other scales, and of softmax at its rim; `names` are the arrays of positions, `values` the one that is
    summed."""
    def equal(x, rng):
        for name in names:
            x[name][...] = x[name][0]

    def zeros(x, rng):
        x["q"][1::2] = 0
        x[values][::3] = 0

    def below_normal(x, rng):
        x[values] *= np.float32(1e-39)

    for scale in (1.0, 0.05):
        yield case(f"scale-{scale:g}", "scale", 9, scale=scale, needs={"scale"})
    yield case("equal", "rim", 9, change=equal, says="all positions are the same: the mean is each")
    yield case("zeros", "rim", 9, change=zeros)
    yield case("sharp", "rim", 9, sharp=40.0, says="one position has all the weight")
    yield case("subnormal", "rim", 9, change=below_normal, needs={"subnormals"}, says="values of 1e-39")
