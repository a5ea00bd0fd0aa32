"""Positions that an indexer chose: which pools are others than float64's, and how near their scores lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import reference

__all__ = ["gaps_of", "scores_of"]


def scores_of(site) -> np.ndarray:
    """Of an index_select of a run: the scores of the pools of its sequence, [T, pools]; -inf of those that are not
    complete for a query, or that its sequence does not have."""
    pools = len(site.args["q"]) // site.args["pool"]

    def scores(topk, **args):
        found = reference.index_scores(**args, scale=1.0)
        return np.pad(found, ((0, 0), (0, max(pools - found.shape[1], 0))), constant_values=-np.inf)

    return site.run(by=scores)


def gaps_of(scores: np.ndarray, theirs: np.ndarray, ours: np.ndarray, pool: int) -> np.ndarray:
    """By how much the best pool that a row lacks is better than the worst that it has for it, [T]: 0 where both have
    the same, and infinite where theirs is not some of the complete pools and the tail."""
    gaps = np.zeros(len(scores))
    for t in np.flatnonzero((np.sort(theirs, -1) != np.sort(ours, -1)).any(-1)):
        gaps[t] = _gap(scores[t], *(x[t][x[t] >= 0].tolist() for x in (theirs, ours)), pool)
    return gaps


def _gap(scores, theirs: Sequence[int], ours: Sequence[int], pool):
    complete = int((scores != -np.inf).sum())
    mine, others = ({p // pool for p in x if p // pool < complete} for x in (ours, theirs))
    tail = [p for p in ours if p // pool >= complete]
    whole = sorted([p * pool + i for p in others for i in range(pool)] + tail)
    taken, lost = sorted(others - mine), sorted(mine - others)
    if sorted(theirs) != whole or len(taken) != len(lost):
        return np.inf
    return abs(float(scores[lost].max() - scores[taken].min())) if taken else 0.0
