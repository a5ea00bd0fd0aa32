"""Which rows of a run belong together: sequences, the calls that they were split into, and steps back.

Calls of packed sequences are laid end to end, sequence by sequence, in the order in which each was read. Then
every op works on rows alone, but for those that carry a state; for them a `Scene` says which rows are the
past of which. Every way to carry a state, the right one and the wrong ones, is a rule: a function from the rows
that a sequence has seen, and the piece that is to come, to the rows that this piece finds behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Branch", "Piece", "Scene", "empty_after_restore", "kept", "leaked", "lost", "lost_at", "not_rolled_back",
           "stale_row"]


@dataclass(frozen=True)
class Piece:
    """The tokens of one sequence in one call.

    Attributes
    ----------
    rows : int array
        Where they lie, all laid end to end.
    source : slice
        Where they lie in their call.
    dropped : int
        Rows that the sequence had read and forgot before this call (`truncate`, `restore`).
    before : int array
        Rows of the sequences before it in its call.
    first : bool
        True where its sequence begins here.
    """

    sequence: int
    call: int
    rows: np.ndarray
    source: slice
    dropped: int
    before: np.ndarray
    first: bool

    @property
    def places(self) -> tuple[str, str]:
        """Its call, and itself: ``("call 2", "call 2, sequence 1")``."""
        return f"call {self.call}", f"call {self.call}, sequence {self.sequence}"


class Branch(NamedTuple):
    """Rows to be run as one sequence: the past, whose results are known, and its own."""

    past: np.ndarray
    own: np.ndarray


NONE = np.empty(0, int)


class Scene:
    """The rows of one or several calls.

    Parameters
    ----------
    offsets : sequence of offsets [N+1], one for each call
    positions : sequence, optional
        For each call None, or the number of tokens that each sequence has before it; less than it has read means
        that it was truncated or put back.

    Raises
    ------
    ValueError
        If the calls have other numbers of sequences, or a position is past what was read.
    """

    def __init__(self, offsets: Sequence, positions: Sequence | None = None):
        offsets = [[int(x) for x in o] for o in offsets]
        positions = list(positions) if positions is not None else [None] * len(offsets)
        counts = {len(o) - 1 for o in offsets}
        if len(counts) != 1:
            raise ValueError(f"the calls have {sorted(counts)} sequences; every call must have all of them")
        self.n_sequences, self.n_calls = counts.pop(), len(offsets)
        for c, given in enumerate(positions):
            if given is not None and np.size(given) != self.n_sequences:
                raise ValueError(f"call {c} has {np.size(given)} positions; it must have {self.n_sequences}, one for "
                                 "each sequence")
        lengths = [[b - a for a, b in zip(o, o[1:])] for o in offsets]
        starts = np.cumsum([0, *(lengths[c][n] for n in range(self.n_sequences) for c in range(self.n_calls))])
        self.T = int(starts[-1])
        rows = {(n, c): np.arange(starts[i], starts[i + 1]) for i, (n, c) in enumerate(self._places())}
        seen = [0] * self.n_sequences
        pieces = {}
        for c in range(self.n_calls):
            for n in range(self.n_sequences):
                at = seen[n] if positions[c] is None else int(np.ravel(positions[c])[n])
                if not 0 <= at <= seen[n]:
                    raise ValueError(f"call {c} begins at position {at} of sequence {n}, of which the calls before "
                                     f"it have {seen[n]}; give the earlier calls, too")
                before = np.concatenate([NONE, *(rows[m, c] for m in range(n))])
                source = slice(offsets[c][n], offsets[c][n + 1])
                pieces[n, c] = Piece(n, c, rows[n, c], source, seen[n] - at, before, seen[n] == 0)
                seen[n] = at + lengths[c][n]
        self.pieces = tuple(pieces[place] for place in self._places())

    def _places(self):
        return [(n, c) for n in range(self.n_sequences) for c in range(self.n_calls)]

    # ---- what it has ----

    @property
    def is_split(self) -> bool:
        """Whether a sequence goes on from where an earlier call ended."""
        return any(not p.first and not p.dropped for p in self.pieces)

    @property
    def is_restored(self) -> bool:
        """Whether a sequence was put back to an earlier position."""
        return any(p.dropped for p in self.pieces)

    @property
    def has_several(self) -> bool:
        """Whether there are several sequences."""
        return self.n_sequences > 1

    # ---- rows ----

    def lay(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """An array of each call -> all rows end to end."""
        return np.concatenate([np.asarray(arrays[p.call])[p.source] for p in self.pieces])

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """The inverse of `lay`."""
        of_call = [[p for p in self.pieces if p.call == c] for c in range(self.n_calls)]
        return [np.concatenate([x[p.rows] for p in pieces]) for pieces in of_call]

    def place(self, row: int) -> str:
        """``token 5``; with several calls or sequences, also which, of whose tokens in this call it is."""
        p = next(p for p in self.pieces if len(p.rows) and p.rows[0] <= row <= p.rows[-1])
        return self._name(p, row - p.rows[0])

    def places(self) -> list[str]:
        """`place` of every row."""
        return [self._name(p, i) for p in self.pieces for i in range(len(p.rows))]

    def _name(self, p, i):
        call = f"call {p.call}, " if self.n_calls > 1 else ""
        sequence = f"sequence {p.sequence}, " if self.has_several else ""
        return f"{call}{sequence}token {i}"

    def positions(self) -> np.ndarray:
        """The position of each row in its sequence, [T]."""
        out = np.empty(self.T, np.int64)
        for b in self.branches():
            out[b.own] = len(b.past) + np.arange(len(b.own))
        return out

    def branches(self, rule: Rule | None = None) -> list[Branch]:
        """What runs as one sequence when states are carried by a rule; by default rightly."""
        rule, out, seen = rule or kept, [], NONE
        for p in self.pieces:
            seen = rule(NONE if p.first else seen, p)
            last = out[-1] if out else None
            if last and np.array_equal(seen, np.concatenate(last)):
                out[-1] = Branch(last.past, np.concatenate([last.own, p.rows]))
            else:
                out.append(Branch(seen, p.rows))
            seen = np.concatenate([seen, p.rows])
        return out

    def spans(self) -> list[np.ndarray]:
        """Of each branch: where the call of each of its rows begins, and where it ends, counted in it: [rows, 2]."""
        calls = np.empty((self.T, 2), int)
        for p in self.pieces:
            calls[p.rows] = (p.rows[0], p.rows[-1] + 1) if len(p.rows) else 0
        found = []
        for b in self.branches():
            rows = np.concatenate(b)
            found.append(np.clip(calls[rows] - (rows - np.arange(len(rows)))[:, None], 0, len(rows)))
        return found

    def pasts(self) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each piece that has rows, and the rows of its past."""
        branches = self.branches()
        for p in self.pieces:
            for b in branches:
                if len(p.rows) and p.rows[0] in b.own:
                    yield p, np.concatenate([b.past, b.own[b.own < p.rows[0]]])

    def seen(self) -> np.ndarray:
        """[T]: tokens of its sequence that each token sees, itself among them."""
        n = np.zeros(self.T, int)
        for past, own in self.branches():
            n[own] = len(past) + 1 + np.arange(len(own))
        return n

    def blocks(self, n: int) -> list[Branch]:
        """Every n tokens of a call as if they began a sequence."""
        return [Branch(NONE, p.rows[i:i + n]) for p in self.pieces for i in range(0, len(p.rows), n)]


# ---- rules: (rows that the sequence has seen, the next piece) -> rows of its past ------------------

Rule = Callable[[np.ndarray, Piece], np.ndarray]


def kept(seen, piece):
    """The right one: everything, less what was dropped."""
    return seen[:max(len(seen) - piece.dropped, 0)]


def lost(seen, piece):
    """Every call begins with nothing."""
    return NONE


def lost_at(place):
    """The call at a place, ``Piece.places``, begins with nothing; the others rightly."""
    return lambda seen, piece: NONE if place in piece.places else kept(seen, piece)


def empty_after_restore(seen, piece):
    """A call behind a step back begins with nothing."""
    return NONE if piece.dropped else seen


def not_rolled_back(seen, piece):
    """A step back does nothing."""
    return seen


def stale_row(seen, piece):
    """A step back leaves one row too many."""
    return seen[:len(seen) - piece.dropped + 1] if piece.dropped else seen


def leaked(seen, piece):
    """A sequence begins with what the sequence before it left."""
    return piece.before if piece.first else kept(seen, piece)
