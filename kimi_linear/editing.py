"""Edits of a forward pass: taps replaced by arrays, or by what a function makes of them."""

import inspect
from typing import NamedTuple

import numpy as np

from ._arrays import as_float32, as_integers
from .context import Context, nested
from .trace import matches

__all__ = ["Edits", "Place"]


class Place(NamedTuple):
    """Where rows of an edited tap are: arrays [n] of each row's sequence in the call, and its position in that."""

    sequence: np.ndarray
    position: np.ndarray


_MOST = 2**31 - 1  # no position is as large


class Edits:
    """What ``edit=`` of a forward call asks for, checked before the call begins.

    Parameters
    ----------
    table : mapping from tap to (layer, id, shape without T, dtype)
        The taps that the call makes, without the logits.
    n_experts : int
    T : int
        Tokens of the call.
    n_logits : int
        Rows of logits of the call; "logits" may be edited where it is not 0.
    vocab : int
    edit : mapping from glob to array or function
    place : Place
        Of all T rows.
    logit_rows : (n_logits,) integers
        Of which of them the logits are.

    Raises
    ------
    TypeError
        If `edit` is no mapping, or an array's dtype is not the tap's.
    ValueError
        If a glob matches no tap (near names are shown), or an array's shape is not the tap's.
    """

    def __init__(self, table, n_experts, T, n_logits, vocab, edit, place, logit_rows):
        if not hasattr(edit, "items"):
            raise TypeError(f"edit is a {type(edit).__name__}; it must be a dict from tap to array or function")
        self.n_experts, self._lender, self._place, self._logit_rows = n_experts, None, place, logit_rows
        shapes = {name: (T, *entry[2]) for name, entry in table.items()}
        if n_logits:
            shapes["logits"] = (n_logits, vocab)
        self.changes = {}
        for pattern, change in edit.items():
            if pattern == "logits" and not n_logits:
                raise ValueError("edit has 'logits', and this call makes none: ask for them, with logits='all' or "
                                 "among the taps of a trace")
            for name in matches(shapes, str(pattern), "edit"):
                value = change if callable(change) else self._checked(name, change, shapes[name])
                self.changes.setdefault(name, []).append(value)
        self.places = [table[name][:2] for name in self.changes if name != "logits"]
        self._of_place = {table[name][:2]: (name, *table[name][2:]) for name in self.changes if name != "logits"}

    def _checked(self, name, value, shape, call=""):
        """A tap's new value: float32 or wider-able, of exactly its shape; expert ids ascending and all different, and
        so are positions that are attended to, with -1 behind the last."""
        what = f"edit[{name!r}]{call}"
        if name.endswith("mla.select"):
            ids = rising(as_integers(value, what, shape, low=-1, high=_MOST))
            self._refuse_twice(ids, ids >= 0, what, "the positions of a token")
            return ids
        if not name.endswith("moe.ids"):
            return as_float32(value, what, shape)
        ids = np.sort(as_integers(value, what, shape, low=0, high=self.n_experts), axis=-1)
        self._refuse_twice(ids, ids >= 0, what, "a token's experts")
        return ids

    @staticmethod
    def _refuse_twice(ids, given, what, whose):
        twice = (np.diff(ids) == 0) & given[:, 1:]
        if twice.any():
            t = int(np.argwhere(twice)[0, 0])
            raise ValueError(f"{what}[{t}] is {ids[t].tolist()}; {whose} must be different")

    def rows(self, layer, tap, first, n, view):
        """Replace rows first..first+n-1 of a tap; `view` is their memory."""
        name, shape, dtype = self._of_place[layer, tap]
        x = np.frombuffer(bytes(view), dtype).reshape(n, *shape).copy()
        view[:] = self._changed(name, x, slice(first, first + n)).tobytes()

    def logits(self, values):
        """The rows of logits that the call gives, changed."""
        return self._changed("logits", values, self._logit_rows) if "logits" in self.changes else values

    def _changed(self, name, x, rows):
        for change in self.changes[name]:
            if callable(change):
                x = self._returned(name, self._call(change, x, rows), x)
            else:
                x = change[rows if name != "logits" else slice(None)]
        return x

    def _returned(self, name, value, x):
        if value is None:  # not taken for "as it is": a forgotten return would pass for an edit that does nothing
            raise TypeError(f"edit[{name!r}](rows) returned None; it must return the new rows, {x.dtype} "
                            f"{list(x.shape)}, as rows itself where it has changed that copy in place")
        return self._checked(name, value, x.shape, "(rows)")

    def _call(self, function, x, rows):
        """`function` of a copy, and of its place where it takes two arguments; ops that it calls run in a context of
        their own, since this call's is taken."""
        if self._lender is None:
            self._lender = Context(threads=1)
        place = (Place(*(a[rows] for a in self._place)),) if takes_place(function) else ()
        with nested(self._lender):
            return function(x.copy(), *place)


def rising(ids):
    """Positions of each row in rising order, -1, which stands for none, behind the last."""
    ids = np.sort(np.where(ids < 0, _MOST, ids), axis=-1)
    return np.where(ids == _MOST, -1, ids).astype(np.int32)


def takes_place(function):
    """Whether a function needs a second argument by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those in C do not tell
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2
