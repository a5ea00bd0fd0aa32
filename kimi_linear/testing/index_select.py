"""What `check_op` knows of `index_select`: a choice, whose ids are right or wrong.

A query whose choice hangs on less than the scores' errors is not judged (docs/math.md#index_select)."""

import numpy as np

from . import indexing
from .index_scores import QUERIES_APART
from .plain import maker, plain

__all__ = ["SPEC"]

case = maker("index_select", indexing.inputs)


def _few_values(x, rng):
    """Dots and scores are whole numbers, and many are equal."""
    for name in ("q", "keys", "weights"):
        x[name][...] = rng.choice(np.float32([-1, 0, 1]), x[name].shape)


def _nan_key(x, rng):
    x["keys"][[2, 5]] = np.nan


def cases():
    """All."""
    yield from indexing.lengths(case, topk=8)
    for topk in (4, 12, 28, 64):
        yield case(f"topk-{topk}", "topk", 50, topk=topk, usual=True, says="positions of the pools that are chosen")
    yield case("topk-2048", "topk", 2, 9001, 2, 16, topk=2048, needs={"cache"}, usual=True,
               says="as the models have it")
    yield from indexing.rim(case, topk=8)
    yield case("ties", "rim", 60, topk=12, change=_few_values, needs={"ties"}, says="of equals the lower pool")
    yield case("nan-keys", "nan", 60, topk=12, change=_nan_key, needs={"NaN"}, says="keys of NaN are chosen first")


SPEC = plain("index_select", ("ids",), cases(), (QUERIES_APART,), narrow=("q", "keys"), narrow_results=())
