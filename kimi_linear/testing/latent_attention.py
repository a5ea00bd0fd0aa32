"""What `check_op` knows of `latent_attention`."""

import numpy as np

from . import attending
from .plain import DROPPED, Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, S=None, H=2, nope=8, P=4, R=12, V=8, scale=None, sharp=1.0, lengths=None, cached=None, chosen=None):
    """q [T, H, nope + P], latent [S, R], k_shared [S, P], w_uk [H, nope, R], w_uv [H, V, R]; `chosen` is W of select
    [T, W], or that and the fewest that a row has."""
    S = T if S is None else S
    x = dict(q=sharp * rng.standard_normal((T, H, nope + P)), latent=rng.standard_normal((S, R)),
                k_shared=rng.standard_normal((S, P)), w_uk=rng.standard_normal((H, nope, R)) / R**0.5,
                w_uv=rng.standard_normal((H, V, R)) / R**0.5, scale=(nope + P) ** -0.5 if scale is None else scale,
                **attending.offsets(lengths, cached))
    if chosen is not None:
        W, least = chosen if isinstance(chosen, tuple) else (chosen, 1)
        pairs = zip(lengths or [T], cached or lengths or [S], strict=True)
        x["select"] = np.concatenate([_rows(rng, *pair, W, least) for pair in pairs])
    return x


def _rows(rng, T, S, W, least):
    """For each of a sequence's queries up to W of the positions that it sees, rising, -1 behind them."""
    select = np.full((T, W), -1, np.int32)
    for t in range(T):
        seen = S - T + t + 1
        n = rng.integers(min(least, seen), min(W, seen) + 1)
        select[t, :n] = np.sort(rng.permutation(seen)[:n])
    return select


case = maker("latent_attention", inputs)


CACHES = ("latent", "k_shared")


def cases():
    """All."""
    yield from attending.lengths(case, CACHES, "12 queries of 2 heads, nothing cached before them")
    for sizes in ((1, 1, 1, 1, 1), (3, 16, 8, 32, 16), (1, 17, 3, 33, 15), (2, 128, 64, 512, 128)):
        yield case("width-" + "-".join(map(str, sizes)), "widths", 4, None, *sizes, says="H, nope, P, R, V")
    yield case("square", "widths", 9, None, 2, 12, 4, 12, 12, usual=True,
               says="nope = V = R: kv_b can be turned unseen")
    yield from selected()
    yield from attending.rim(case, CACHES, "latent")
    yield from nans(case, 9, q=(4, 1, 3))


def _all(x, rng):
    """Every position that a query sees."""
    T, S = len(x["q"]), len(x["latent"])
    x["select"][...] = np.where(np.arange(x["select"].shape[1]) <= np.arange(S - T, S)[:, None],
                                np.arange(x["select"].shape[1]), -1)


def _unread(x, rng):
    """NaN in every position that no query selects."""
    for name in CACHES:
        x[name][np.setdiff1d(np.arange(len(x[name])), x["select"])] = np.nan


def selected():
    """Cases of queries that attend to some of what they see."""
    def one(name, *sizes, needs=(), **more):
        return case(name, "select", *sizes, needs={"select", *needs}, **more)

    yield one("select", 12, chosen=5, usual=True, says="of what each query sees up to 5 positions, -1 behind them")
    yield one("select-full", 9, 40, chosen=(16, 16), needs={"cache"}, usual=True, says="16 positions for each query")
    yield one("select-one", 12, chosen=1, usual=True, says="a position a query")
    yield one("select-all", 12, chosen=14, change=_all, usual=True, says="all that a query sees, and two of -1")
    yield one("select-of-1100", 2, 1100, chosen=(600, 560), needs={"cache"}, usual=600)
    yield one("select-ragged", 27, lengths=(1, 0, 12, 14), chosen=4, needs={"offsets"}, usual=True,
              says="positions are counted within a sequence")
    yield one("select-ragged-cached", 16, 45, lengths=(1, 12, 3), cached=(20, 12, 13), chosen=6,
              needs={"offsets", "cache"}, usual=True)
    yield one("select-none", 12, chosen=(2, 0), needs={"empty rows"}, says="some queries attend to nothing: 0")
    yield one("select-wide", 4, 70, 2, 128, 64, 512, 128, chosen=(66, 60), needs={"cache"})
    yield one("select-unread", 9, 60, chosen=5, change=_unread, needs={"cache", "NaN"},
              says="NaN in all that no query selects")


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
    "cache [1, S, n]": Form(lambda x: {n: x[n][None] for n in CACHES}),
    "select [T, 1, W]": Form(lambda x: {"select": x["select"][:, None]} if "select" in x else {}),
    "latent and k_shared in one, [S, R + P]": Form(
        lambda x: {"latent": np.concatenate([x["latent"], x["k_shared"]], -1), "k_shared": DROPPED}),
}

SPEC = plain("latent_attention", ("o",), cases(), (causal("q", *CACHES),), FORMS,
             narrow=("q", "latent", "k_shared", "w_uk", "w_uv"))
