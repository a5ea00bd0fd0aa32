"""What the cases of `index_scores` and `index_select` share."""

import numpy as np

__all__ = ["inputs", "lengths", "rim"]


def inputs(rng, L, S=None, H=3, D=16, pool=4, lengths=None, **more):
    """q [L, H, D], weights [L, H], keys [pools, D]; `lengths`: (queries, positions) of each sequence, in place of L
    and S."""
    queries, positions = ([L], [L if S is None else S]) if lengths is None else map(list, zip(*lengths))
    T, pools = sum(queries), sum(n // pool for n in positions)
    return dict(q=rng.standard_normal((T, H, D)), keys=rng.standard_normal((pools, D)),
                weights=rng.standard_normal((T, H)) * H**-0.5, pool=pool,
                offsets=None if lengths is None else np.cumsum([0, *queries]),
                positions=None if S is None and lengths is None else np.array(positions), **more)


def lengths(case, **more):
    """Cases of queries, of positions before them, of pools, widths and sequences."""
    yield case("plain", "lengths", 62, usual=True, says="62 queries, and no position before them", **more)
    for T in (1, 3, 4, 5, 67):
        yield case(f"length-{T}", "lengths", T, usual=True, **more)
    yield case("length-0", "lengths", 0, 9, needs={"T = 0", "cache"}, **more)
    for T, S in ((1, 2), (1, 64), (1, 131), (5, 43), (17, 65)):
        yield case(f"cached-{T}-{S}", "cache", T, S, needs={"cache"}, usual=True,
                   says="the last T of S positions are the queries' own", **more)
    yield case("cached-2-2050", "cache", 2, 2050, needs={"cache"}, usual=True, says="several pages of keys", **more)
    for pool, D in ((1, 16), (2, 8), (16, 32), (4, 128)):
        yield case(f"pool-{pool}-{D}", "widths", 9, 8 * pool + 5, 2, D, pool, needs={"cache"}, usual=True,
                   says="positions of a key, and its width", **_of_pool(more, pool))
    for H, D in ((1, 16), (32, 20), (5, 4)):
        yield case(f"heads-{H}-{D}", "widths", 9, 40, H, D, needs={"cache"}, usual=True, says="H, D", **more)
    yield case("ragged", "ragged", 0, lengths=((9, 9), (0, 0), (1, 1), (14, 14)), needs={"offsets"}, usual=True, **more)
    yield case("ragged-cached", "ragged", 0, lengths=((2, 41), (12, 12), (3, 22), (0, 9), (1, 30)),
               needs={"offsets", "cache"}, usual=True, says="queries of 5 sequences and their positions", **more)


def _of_pool(more, pool):
    return more | {"topk": 3 * pool} if "topk" in more else more


def _one_negative(x, rng):
    """No dot is above 0."""
    x["q"][...], x["keys"][...] = np.abs(x["q"]), -np.abs(x["keys"])


def _positive_weights(x, rng):
    x["weights"][...] = np.abs(x["weights"])


def _equal_keys(x, rng):
    x["keys"][...] = x["keys"][0]


def rim(case, **more):
    """Cases of signs, of equals and of NaN."""
    yield case("positive-weights", "rim", 30, change=_positive_weights, usual=True, **more)
    yield case("no-dot-above-0", "rim", 30, change=_one_negative, says="all scores are 0", **more)
    yield case("equal-keys", "rim", 30, change=_equal_keys, says="all scores of a query are one", **more)
