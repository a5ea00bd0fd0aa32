"""Keys of pools in a run: each has the row of the token that completes its pool, and other tokens' rows are 0.

So they have a row a token, as all else that is laid end to end in a `Scene`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import reference

__all__ = ["POOLED"]


def _completing(T, offsets, pool):
    """The rows of the tokens that complete a pool, sequence by sequence."""
    rows = [r.start + np.arange(pool - 1, r.stop - r.start, pool) for r in reference.sequences(T, offsets)]
    return np.concatenate([np.arange(0), *rows])


def _spread(by: Callable, *, k, gate, ape, offsets=None):
    """index_pool, its keys [P, D] as [T, D]."""
    keys = by(k=k, gate=gate, ape=ape, offsets=offsets)
    if keys is None:
        return None
    out = np.zeros((len(k), k.shape[1]))
    out[_completing(len(k), offsets, len(ape))] = keys
    return out


def _gathered(by: Callable, *, q, keys, weights, topk, pool, offsets=None, positions=None):
    """index_select, or what is made of its arguments, of keys [T, D]; every token is a query."""
    keys = keys[_completing(len(keys), offsets, pool)]
    return by(q=q, keys=keys, weights=weights, topk=topk, pool=pool, offsets=offsets, positions=None)


#: Op -> what runs ``by(**arguments)`` with the arguments of one call, of those of a run.
POOLED = {"index_pool": _spread, "index_select": _gathered}
