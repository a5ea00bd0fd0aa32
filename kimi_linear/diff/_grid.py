"""What a heat map shows: an error for each layer, or tap, and token, and how it stands to what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .. import dataflow
from . import metrics

__all__ = ["ERRORS", "NOISE", "SHARES", "Grid", "Line", "Scale", "by_layer", "by_tap", "grid_of",
           "layer_of"]


class Scale(NamedTuple):
    """Levels 1 to 8 of a heat map, by multiples of what is allowed; level 0 is no error, 9 is not finite."""

    edges: tuple[float, ...]  # seven; the fourth is 1
    style: str = "{:.1e}"  # of a value
    one: float = 1.0  # what the legend calls 1


ERRORS = Scale((1e-3, 1e-2, 1e-1, 1, 10, 100, 1000))
NOISE = Scale((0.5 / 7, 1 / 7, 2 / 7, 1, 10, 100, 1000), "{:.3g}", 7.0)
SHARES = Scale((0.05, 0.2, 0.5, 1, 10, 100, 1000), "{:.3g}")


class Line(NamedTuple):
    """One tap: its error of each token, and what is allowed."""

    tap: str
    values: np.ndarray
    limit: float


@dataclass(frozen=True)
class Grid:
    """Rows by columns.

    Attributes
    ----------
    labels : list of str
        Of the rows.
    columns : list of str
        Of the columns: ``token 5``.
    values, relative : [rows, columns] float64
        The error, and the same over what is allowed; NaN where nothing is known.
    names : list of lists of str
        Of each cell, what in its row it is the error of; or empty.
    scale : Scale
    cuts : tuple of int
        Columns at which a sequence or a call begins.
    """

    labels: list[str]
    columns: list[str]
    values: np.ndarray
    relative: np.ndarray
    names: list[list[str]] = field(default_factory=list)
    scale: Scale = ERRORS
    cuts: tuple[int, ...] = ()

    def __bool__(self):
        return bool(self.values.size)

    def levels(self) -> np.ndarray:
        """0 to 9 for each cell; -1 where nothing is known."""
        with np.errstate(invalid="ignore"):
            level = 1 + np.searchsorted(self.scale.edges, np.nan_to_num(self.relative, posinf=0), side="right")
        level = np.where(self.relative == 0, 0, np.where(np.isinf(self.values), 9, level))
        return np.where(np.isnan(self.relative), -1, level)

    def at_most(self, columns: int) -> Grid:
        """The same in no more columns: of neighbours the worst one is kept."""
        n, T = max(1, columns), len(self.columns)
        if T <= n:
            return self
        width = -(-T // n)
        starts = np.arange(0, T, width)
        # the index of the worst of each run of columns; where nothing is known, the first
        worst = np.stack([s + np.argmax(np.nan_to_num(self.relative[:, s:s + width], nan=-1.0, posinf=np.inf), axis=1)
                          for s in starts], axis=1)
        rows = np.arange(len(self.labels))[:, None]
        names = [[line[i] for i in at] for line, at in zip(self.names, worst)]
        ends = np.minimum(starts + width, T) - 1
        columns = [f"{self.columns[a]} to {self.columns[b].rpartition(' ')[2]}" for a, b in zip(starts, ends)]
        return replace(self, columns=columns, values=self.values[rows, worst], relative=self.relative[rows, worst],
                       names=names, cuts=tuple(sorted({c // width for c in self.cuts})))


def layer_of(tap: str) -> str:
    """``layer 3``, or what is outside layers: ``embed``, ``head``."""
    layer = dataflow.layer_of(tap)
    if layer is not None:
        return f"layer {layer}"
    return "head" if tap in ("norm", "logits") else tap


def by_tap(lines: Sequence[Line], columns: Sequence[str], scale: Scale = ERRORS, cuts=()) -> Grid:
    """A row for each tap."""
    T = len(columns)
    values = np.array([line.values for line in lines], np.float64).reshape(len(lines), T)
    values = np.where(np.isnan(values), np.inf, values)
    with np.errstate(over="ignore"):
        relative = values / np.array([max(line.limit, 1e-300) for line in lines]).reshape(-1, 1)
    return Grid([short(line.tap) for line in lines], list(columns), values, relative, [], scale, tuple(cuts))


def by_layer(lines: Sequence[Line], columns: Sequence[str], scale: Scale = ERRORS, cuts=()) -> Grid:
    """A row for each layer: of its taps the one that is furthest over, token by token."""
    taps = by_tap(lines, columns, scale, cuts)
    groups: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        groups.setdefault(layer_of(line.tap), []).append(i)
    worst = [np.array(g)[np.argmax(taps.relative[g], axis=0)] if columns else np.zeros(0, int)
             for g in groups.values()]
    at = np.array(worst, int).reshape(len(groups), len(columns)), np.arange(len(columns))[None, :]
    names = [[taps.labels[i] for i in row] for row in at[0]]
    return replace(taps, labels=list(groups), values=taps.values[at], relative=taps.relative[at], names=names)


def short(tap: str) -> str:
    """A tap's name below its layer."""
    return tap.split(".", 2)[2] if layer_of(tap).startswith("layer ") else tap


ROWS = 32  # of the heat map of one array: channels are joined to keep to it


def grid_of(actual, desired, axes: Sequence[str], bound=None) -> tuple[Grid, str]:
    """Tokens by heads, or channels, of one array: the largest share of the budget, or without `bound` the rms error
    over the rms; and what is allowed, in words."""
    a, d = metrics.as_float64(actual, "actual"), metrics.as_float64(desired, "desired")
    error, _ = metrics.distance(a, d)
    if not error.size:
        return Grid([], [], np.zeros((0, 0)), np.zeros((0, 0))), ""
    if bound is not None:
        cells = metrics.shares_of(error, bound)
    else:
        cells = metrics.over(error, metrics.measure(a, d).size)
    names = list(axes)
    while cells.ndim < 2:
        cells, names = cells[None], ["", *names]
    column = names.index("token") if "token" in names else 0
    row = next(i for i in range(cells.ndim) if i != column)
    cells = np.moveaxis(cells, (row, column), (0, 1)).reshape(cells.shape[row], cells.shape[column], -1)
    step = -(-len(cells) // ROWS)
    starts = np.arange(0, len(cells), step)
    labels = [f"{names[row]} {i}" if step == 1 else f"{names[row]} {i} to {min(i + step, len(cells)) - 1}"
              for i in starts]
    if bound is not None:
        values, allowed, scale = np.maximum.reduceat(cells.max(-1), starts), 1.0, SHARES
        said = "the budget of each element"
    else:
        squares = np.add.reduceat((cells**2).sum(-1), starts)
        counts = np.diff([*starts, len(cells)])[:, None] * cells.shape[-1]
        values, allowed, scale = np.sqrt(squares / counts), metrics.TRANSFORMERS_TOLERANCE, ERRORS
        said = f"{allowed:.0e} of the rms"
    columns = [f"{names[column]} {t}" for t in range(values.shape[1])]
    return Grid([x.strip() for x in labels], columns, values, values / allowed, [], scale), said
