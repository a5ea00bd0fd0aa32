"""Experts within a group of ops: between scores as near as rounding the other choice is as right, and shows behind."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import product

import numpy as np

from . import metrics
from ._ratios import ratios, score, sums_in
from .blame import WRONG

__all__ = ["with_their_experts"]

TRIED = 3  # of the experts that were chosen last, and of those that were not chosen next
#: Ops that take a row to other rows.
MIXING = ("short_conv", "delta_rule", "attention", "latent_attention", "index_pool", "index_select")


def with_their_experts(run, row, detail, level):
    """A row of `blame` and its detail, with the experts within its group that its result shows, where these are others
    by scores as near as rounding; the run keeps them."""
    group, y, noise = detail
    x, sums, of_rows, found = run.values[row.tap], sums_in(group), row.of_token, False
    for i in _inner_routers(group):
        choice, key = run.group(group[i].tap)[0], (row.tap, group[i].tap)
        value, rounding = run.rounding_of_choice(choice)
        ids, changed = np.array(run.run(choice)), False
        values = _given(run, group, i)
        for other, near in _other_choices(value, ids, WRONG * rounding):
            near &= of_rows >= WRONG
            if near.any():
                again = y.copy()
                again[near] = _behind(run, group[i:], values, near, {key: other[near]})
                error = ratios(x, again, noise, sums)[1] / level
                near &= error < of_rows / 2
                ids[near], of_rows, changed = other[near], np.where(near, error, of_rows), changed or near.any()
        if changed:
            found, run.chosen[key] = True, ids
            for start in filter(None, run.starts):
                start.chosen[key] = ids[:start.scene.T]
    if not found:
        return row, detail
    y = run.run(group)
    total, of_rows = ratios(x, y, noise, sums)
    of_rows, at = of_rows / level, run.scene.place(int(of_rows.argmax()))
    return replace(row, noise=score(total / level, of_rows), error=metrics.rms_relative(x, y), at=at,
                   of_token=of_rows), (group, y, noise)


def _given(run, group, i):
    """Tap -> values that the ops of a group from the i-th on are given from before it."""
    known = copy(run)
    known.values = dict(run.values)
    for node in group[:i]:
        known.values[node.tap] = known.run([node])
    return {tap: known.values[tap] for node in group[i:] for tap in node.inputs.values() if tap in known.values}


def _behind(run, group, values, rows, chosen):
    """What the ops of a group make of some rows of what they are given, with ids that are chosen for these."""
    part = copy(run)
    part.values, part.chosen = {tap: x[rows] for tap, x in values.items()}, chosen
    return part.run(group)


def _inner_routers(group) -> list[int]:
    """Where in a group the routers are behind which every row is by itself."""
    last = max((i for i, node in enumerate(group) if node.op in MIXING), default=-1)
    return [i for i, node in enumerate(group[:-1]) if node.op == "route" and i > last]


def _other_choices(value, ids, limit) -> Iterator:
    """Ids with the expert that was chosen last, or last but one, .., exchanged for the one that came next, or behind
    it; and where the scores of the two lie within `limit`.

    Parameters
    ----------
    value : (T, E) array
        What experts are chosen by.
    ids : (T, k) integers
        They may be changed in place between two of the pairs.
    limit : (T,) array
    """
    rows, k = np.arange(len(ids)), ids.shape[1]
    for a, b in product(range(min(TRIED, k)), range(min(TRIED, value.shape[1] - k))):
        mine, others = np.take_along_axis(value, ids, 1), value.copy()
        np.put_along_axis(others, ids, -np.inf, 1)
        out, into = np.argsort(mine, axis=1)[:, a], np.argsort(-others, axis=1)[:, b]
        other = ids.copy()
        other[rows, out] = into
        yield np.sort(other, axis=1), mine[rows, out] - others[rows, into] < limit
