"""What `check_op` knows of `latent_attention`."""

import numpy as np

from . import attending
from .plain import DROPPED, Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, S=None, H=2, nope=8, P=4, R=12, V=8, scale=None, sharp=1.0, lengths=None, cached=None):
    """q [T, H, nope + P], latent [S, R], k_shared [S, P], w_uk [H, nope, R], w_uv [H, V, R]."""
    S = T if S is None else S
    return dict(q=sharp * rng.standard_normal((T, H, nope + P)), latent=rng.standard_normal((S, R)),
                k_shared=rng.standard_normal((S, P)), w_uk=rng.standard_normal((H, nope, R)) / R**0.5,
                w_uv=rng.standard_normal((H, V, R)) / R**0.5, scale=(nope + P) ** -0.5 if scale is None else scale,
                **attending.offsets(lengths, cached))


case = maker("latent_attention", inputs)


CACHES = ("latent", "k_shared")


def cases():
    """All."""
    yield from attending.lengths(case, CACHES, "12 queries of 2 heads, nothing cached before them")
    for sizes in ((1, 1, 1, 1, 1), (3, 16, 8, 32, 16), (1, 17, 3, 33, 15), (2, 128, 64, 512, 128)):
        yield case("width-" + "-".join(map(str, sizes)), "widths", 4, None, *sizes, says="H, nope, P, R, V")
    yield case("square", "widths", 9, None, 2, 12, 4, 12, 12, usual=True,
               says="nope = V = R: kv_b can be turned unseen")
    yield from attending.rim(case, CACHES, "latent")
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
    "cache [1, S, n]": Form(lambda x: {n: x[n][None] for n in CACHES}),
    "latent and k_shared in one, [S, R + P]": Form(
        lambda x: {"latent": np.concatenate([x["latent"], x["k_shared"]], -1), "k_shared": DROPPED}),
}

SPEC = plain("latent_attention", ("o",), cases(), (causal("q", *CACHES),), FORMS,
             narrow=("q", "latent", "k_shared", "w_uk", "w_uv"))
