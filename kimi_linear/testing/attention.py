"""What `check_op` knows of `attention`."""

import numpy as np

from . import attending
from .plain import Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, S=None, H=4, Hkv=2, K=12, V=8, scale=None, sharp=1.0, lengths=None, cached=None):
    """q [T, H, K], k [S, Hkv, K], v [S, Hkv, V]."""
    S = T if S is None else S
    return dict(q=sharp * rng.standard_normal((T, H, K)), k=rng.standard_normal((S, Hkv, K)),
                v=rng.standard_normal((S, Hkv, V)), scale=K ** -0.5 if scale is None else scale,
                **attending.offsets(lengths, cached))


case = maker("attention", inputs)


def cases():
    """All."""
    yield from attending.lengths(case, "kv", "12 queries of 4 heads on 2 heads of keys, nothing before them")
    for sizes in ((1, 1, 1, 1), (3, 3, 16, 32), (6, 1, 17, 33), (6, 2, 33, 15), (16, 2, 256, 256)):
        yield case("width-" + "-".join(map(str, sizes)), "widths", 4, None, *sizes, says="H, Hkv, K, V")
    yield case("square", "widths", 9, None, 4, 2, 12, 12, usual=True, says="K = V: keys and values can be exchanged")
    yield from attending.rim(case, "kv", "v")
    yield from nans(case, 9, q=(4, 1, 3), k=(4, 1, 3), v=(4, 1, 3))


def _heads_first(x):
    return {n: np.ascontiguousarray(np.swapaxes(x[n], 0, 1))[None] for n in "qkv"}


FORMS = {
    "[1, H, T, n]": Form(_heads_first, lambda found, x: {"o": np.swapaxes(found["o"][0], 0, 1)}),
    "[1, T, H, n]": Form(lambda x: {n: x[n][None] for n in "qkv"}, lambda found, x: {"o": found["o"][0]}),
    "[1, H, T, n], o [1, T, H, n]": Form(_heads_first, lambda found, x: {"o": found["o"][0]}),
}

SPEC = plain("attention", ("o",), cases(), (causal("q", "k", "v"),), FORMS,
             narrow=("q", "k", "v"))
