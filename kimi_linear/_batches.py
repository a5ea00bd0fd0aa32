"""A batch axis for what is written on tokens: [B, T, ...] is B sequences of T tokens, one after another.

The reference and the budgets have the formula on [T, ...]; here is what makes `kl.ops`'s other shapes of that and back.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import NamedTuple

import numpy as np

from ._arrays import as_array
from ._float64 import f64

__all__ = ["any_batch", "packed", "packed_results", "unpacked"]


class _Form(NamedTuple):
    axes: int             # of the first argument of `tokens`, without a batch
    tokens: str           # arguments that have a row for each token
    positions: str        # those that have one for each cached position
    results: str          # whether each result has a row for each token (t), some for each sequence (n) or neither (-)
    sequences: bool = True  # whether tokens of a sequence know of each other: there are offsets
    others: str = ""      # arguments that have some rows for each sequence


_FORMS = {
    "short_conv": _Form(2, "x", "", "t-"),
    "short_conv_backward": _Form(2, "dy x", "", "t--"),
    "delta_rule": _Form(3, "q k v g beta", "", "t--"),
    "delta_rule_backward": _Form(3, "do q k v g beta", "", "ttttt-"),
    "delta_rule_intra": _Form(3, "q k v g beta", "", "ttttt"),
    "delta_rule_inter": _Form(3, "q k g P W U", "", "t-t"),
    "latent_attention": _Form(3, "q select", "latent k_shared", "t"),
    "attention": _Form(3, "q", "k v", "t"),
    "index_pool": _Form(2, "k gate", "", "n"),
    "index_scores": _Form(3, "q weights", "", "t", others="keys"),
    "index_select": _Form(3, "q weights", "", "t", others="keys"),
    "route": _Form(2, "scores", "", "tt", sequences=False),
    "moe": _Form(2, "x ids weights shared", "", "t", sequences=False),
}


def packed(op, given):
    """Arguments on [T, ...] that say the same, and the axes that stood for T; None where they stood so already.

    Parameters
    ----------
    op : str
    given : dict of str to anything
        Arguments by name.

    Raises
    ------
    ValueError
        If there are offsets and a batch axis.
    """
    form = _FORMS.get(op)
    if form is None:
        return given, None
    first, *others = form.tokens.split()
    lead = as_array(given[first], first).shape[:1 - form.axes]
    if len(lead) == 1:
        return given, None
    if form.sequences and len(lead) != 2:
        return given, None  # the formula says what it needs
    if form.sequences and (given.get("offsets") is not None or given.get("kv_offsets") is not None):
        raise ValueError(f"{first} has a batch axis and offsets are given; it must be one of them")
    rows, flat = math.prod(lead), dict(given)
    for name in (first, *others):
        if given.get(name) is not None and not isinstance(given[name], tuple):
            flat[name] = _flat(as_array(given[name], name), len(lead), rows)
    for name in form.positions.split():
        x = as_array(given[name], name)
        S = x.shape[1]
        flat[name] = _flat(x, 2, lead[0] * S)
        flat["kv_offsets"] = np.arange(lead[0] + 1) * S
    for name in form.others.split():
        x = as_array(given[name], name)
        flat[name] = _flat(x, 2, lead[0] * x.shape[1])
    if form.sequences:
        flat["offsets"] = np.arange(lead[0] + 1) * lead[1]
    return flat, lead


def _flat(x, axes, rows):
    return (x if x.dtype.kind in "iu" else f64(x)).reshape(rows, *x.shape[axes:])


def unpacked(op, results, lead):
    """Results (one, or a tuple) of the arguments that `packed` gave, for the axes that there were."""
    def of_lead(r, kind):
        rows = lead if kind == "t" else (lead[0], len(r) // max(lead[0], 1))
        return r.reshape(*rows, *r.shape[1:])

    return _of_rows(op, results, of_lead)


def packed_results(op, results, lead):
    """The inverse of `unpacked`."""
    def of_rows(r, kind):
        a = as_array(r, "a result")
        return _flat(a, len(lead), math.prod(a.shape[:len(lead)]))

    return _of_rows(op, results, of_rows)


def _of_rows(op, results, change):
    kinds = _FORMS[op].results
    if not isinstance(results, tuple):
        return change(results, kinds[0])
    return tuple(r if kind == "-" else change(r, kind) for r, kind in zip(results, kinds))


def any_batch(op):
    """A decorator: a function on [T, ...] that takes the other shapes of `_FORMS`, too."""
    signature = inspect.signature(op)

    @functools.wraps(op)
    def of_any(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return op(*args, **kwargs)  # Python's sentence has the function's name
        given, lead = packed(op.__name__, given)
        return op(*args, **kwargs) if lead is None else unpacked(op.__name__, op(**given), lead)

    return of_any
