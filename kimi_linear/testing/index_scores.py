"""What `check_op` knows of `index_scores`."""

import numpy as np

from . import indexing
from .plain import faint, maker, nans, plain
from .spec import Law

__all__ = ["SPEC"]


def inputs(rng, L, *sizes, scale=None, size=1.0, **more):
    """As `indexing.inputs`, with a scale, D^-1/2 where None."""
    x = indexing.inputs(rng, L, *sizes, **more)
    return x | dict(q=size * x["q"], scale=x["q"].shape[-1] ** -0.5 if scale is None else scale)


case = maker("index_scores", inputs)


def cases():
    """All."""
    yield from indexing.lengths(case)
    for scale in (1.0, 0.05):
        yield case(f"scale-{scale:g}", "scale", 30, scale=scale, needs={"scale"})
    yield from indexing.rim(case)
    yield case("large", "rim", 30, size=1e15)
    yield case("subnormal", "rim", 30, change=faint("q"), needs={"subnormals"}, says="every other query is 1e-39")
    yield from nans(case, 30, q=(20, 1, 3), keys=(2, 3), weights=(19, 1))


def _queries_apart(x, call):
    other = x | {"q": x["q"].copy(), "weights": x["weights"].copy()}
    other["q"][-1] *= np.float32(0.5)
    other["weights"][-1] *= np.float32(0.5)
    a, b = call(x)[0], call(other)[0]
    if a[:-1].tobytes() != b[:-1].tobytes():
        return f"one query changes the scores of others, in {int((a[:-1] != b[:-1]).sum())} values"
    return None


QUERIES_APART = Law("queries-apart", "a query changes no byte of another's result", _queries_apart)

SPEC = plain("index_scores", ("scores",), cases(), (QUERIES_APART,), narrow=("q", "keys"))
