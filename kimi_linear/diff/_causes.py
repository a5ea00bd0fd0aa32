"""Faults of how ops are connected show at several ops: the one that explains most of them is their name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from .blame import Judged

__all__ = ["by_one_cause"]


def by_one_cause(rows: Sequence[Judged]) -> list[Judged]:
    """Rows of `blame`, those that a `Fault.wired` explains by the one that explains most of them.

    A row alone can leave open which of several mistakes it is: a sum that lacks what was before it, or the first of a
    new block. Nothing is named that does not explain the row itself, and where no other row has the same cause the
    plain mistake of one op goes before those of how ops are connected.
    """
    votes = Counter(cause for row in rows for cause in _causes(row))
    return [_named_by(row, votes) for row in rows]


def _causes(row):
    """(name, choice) of each wired fault that explains a row, once."""
    return dict.fromkeys((fault.name, choice) for fault, choice, _ in row.explained if fault.wired)


def _named_by(row, votes):
    causes = _causes(row)
    if not causes:
        return row
    most = max(votes[cause] for cause in causes)
    plain = [e for e in row.explained if not e[0].wired]
    wired = [e for e in row.explained if e[0].wired and votes[e[0].name, e[1]] == most]
    named = plain if plain and most == 1 else wired
    fault, choice, where = named[0]
    choices = {c for f, c, _ in named if f is fault}
    also = dict.fromkeys(f.name for f, _, _ in row.explained if f is not fault)
    return replace(row, kind=fault.name, fault=fault, choice=choice if len(choices) == 1 else (), where=where,
                   also=tuple(also))
