"""The drawings of a page, as inline SVG: heat map, histogram, where an error concentrates, error by depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._grid import Grid
from ._html import text
from ._opened import DECADES, Axis, Opened

__all__ = ["concentration", "depth", "heat_map", "histogram", "legend", "times"]

WIDTH = 960
CELLS = 4000  # of a heat map, about, at most: columns are joined to keep to it
CHAR = 6.4  # of 11 px


def _svg(width, height, label, *parts):
    return (f"<svg viewBox='0 0 {width:.0f} {height:.0f}' width='{width:.0f}' height='{height:.0f}' role='img' "
            f"aria-label='{text(label)}'>{''.join(parts)}</svg>")


def _text(x, y, words, anchor="start", kind=""):
    place = "" if anchor == "start" else f" text-anchor='{anchor}'"
    return f"<text x='{x:.1f}' y='{y:.1f}'{place}{f' class={kind}' if kind else ''}>{text(words)}</text>"


def _nice(n, most):
    """A step of 1, 2 or 5 times a power of ten that gives at most `most` steps in n."""
    step = 1
    while n / step > most:
        step = int(step * (2.5 if str(step)[0] == "2" else 2))
    return step


# ---- heat map --------------------------------------------------------------------------------------


def heat_map(grid: Grid, label: str, row: int = 18, most: int = CELLS) -> str:
    """A cell for each row and column of the grid; its title, shown under the pointer, says what and how much."""
    if not grid:
        return ""
    T, R = len(grid.columns), len(grid.labels)
    grid = grid.at_most(max(most // R, 20))
    columns = len(grid.columns)
    left = min(max(len(x) for x in grid.labels), 34) * CHAR + 12
    wide = max(min((WIDTH - left - 8) / columns, 18), 2)
    levels, cells = grid.levels(), []
    for r in range(R):
        for c in np.flatnonzero(levels[r] >= 0):
            cells.append(f"<rect x='{c}' y='{r}' width='1' height='1' class='h{levels[r, c]}'>"
                         f"<title>{text(_title(grid, r, c, levels[r, c]))}</title></rect>")
    body = f"<g class='cells' transform='translate({left:.1f} 4) scale({wide:.4f} {row})'>{''.join(cells)}</g>"
    names = [_text(left - 8, 4 + row * (r + 0.5) + 4, _shortened(x), "end") for r, x in enumerate(grid.labels)]
    low, right = 4 + row * R, left + wide * columns
    cuts = [f"<path class='axis' d='M{left + wide * c:.1f} 0V{low + 4}'/>" for c in grid.cuts]
    step = _nice(T, 12 if wide * columns > 300 else 6)
    ticks = [_text(left + wide * columns * (t + 0.5) / T, low + 15, t, "middle", "soft") for t in range(0, T, step)]
    ticks.append(_text(left - 8, low + 15, "token", "end", "soft"))
    return _svg(right + 8, low + 20, label, body, *names, *cuts, *ticks)


def _title(grid, r, c, level):
    value = grid.values[r, c]
    much = "none" if level == 0 else "not finite" if level == 9 else grid.scale.style.format(value)
    return f"{grid.columns[c]}: {much} {grid.names[r][c] if grid.names else ''}".rstrip()


def _shortened(x):
    return x if len(x) <= 34 else f"...{x[-31:]}"


def legend(grid: Grid, limit: str) -> str:
    """The colours of a heat map, and where what is allowed ends."""
    edges, one = grid.scale.edges, grid.scale.one
    present = set(grid.levels().ravel().tolist())
    names = ["none", f"< {times(edges[0] * one)}", *(f"from {times(e * one)}" for e in edges), "not finite"]
    wide, parts = 74, []
    for i, name in enumerate(names[:10 if 9 in present else 9]):
        x = i * wide + (10 if i > 4 else 0)
        parts.append(f"<rect x='{x}' y='0' width='{wide - 2}' height='9' class='h{i}'/>")
        parts.append(_text(x, 22, name, kind="soft"))
    parts.append(f"<path class='limit' d='M{5 * wide + 4} 0V26'/>")
    parts.append(_text(0, 40, f"In {limit}. Under the pointer a cell says what it is.", kind="soft"))
    return _svg(wide * 10 + 12, 44, "legend", *parts)


def times(x: float) -> str:
    """An edge of a scale."""
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


# ---- distributions ---------------------------------------------------------------------------------


def histogram(opened: Opened) -> str:
    """Elements by the size of their error in u of the rms; u is 2**-24."""
    counts = opened.counts
    if counts is None or not counts.sum():
        return ""
    used = np.flatnonzero(counts)
    low, high = used[0] // 2 * 2, min(-(-(used[-1] + 1) // 2) * 2, len(counts))
    low, high = max(low - 2, 0), min(high + 2, len(counts))
    n, tall, wide = high - low, 90, min(22, 420 / (high - low))
    parts = [f"<path class='axis' d='M26 {tall + 14}H{26 + n * wide:.1f}'/>"]
    for i in range(low, high):
        if counts[i]:
            height = max(tall * counts[i] / counts.max(), 1)
            at = 10 ** (DECADES[0] + i / 2)
            parts.append(f"<rect class='bar' x='{26 + (i - low) * wide:.1f}' y='{tall + 14 - height:.1f}' "
                         f"width='{wide - 1:.1f}' height='{height:.1f}'><title>{counts[i]:,} elements from "
                         f"{at:.1g} u</title></rect>")
    every = 2 if n * wide / (n / 2) > 34 and n <= 20 else 4
    for i in range(low + low % 2, high + 1, every):
        parts.append(_text(26 + (i - low) * wide, tall + 28, f"{_power(DECADES[0] + i // 2)} u", "middle", "soft"))
    return _svg(26 + n * wide + 26, tall + 34, "histogram of errors", *parts)


def _power(e):
    return f"{10.0 ** e:g}" if -3 <= e <= 3 else f"1e{e}"


def concentration(axis: Axis) -> str:
    """The part of the squared error at each index of an axis."""
    shares = np.asarray(axis.shares)
    step = -(-len(shares) // 140)
    if step > 1:
        shares = np.add.reduceat(shares, np.arange(0, len(shares), step))
    wide, tall = 420, 40
    each = min(wide / len(shares), 26)
    parts = [f"<path class='axis' d='M0 {tall + 4}H{each * len(shares):.1f}'/>"]
    for i, s in enumerate(shares):
        height = tall * s / shares.max()
        if height >= 0.5:
            parts.append(f"<rect class='bar' x='{i * each:.1f}' y='{tall + 4 - height:.1f}' "
                         f"width='{max(each - 1, each * 0.8):.1f}' height='{height:.1f}'><title>{text(axis.name)} "
                         f"{i * step}: {100 * s:.2g} %</title></rect>")
    parts.append(_text(0, tall + 17, 0, kind="soft"))
    parts.append(_text(each * len(shares), tall + 17, len(axis.shares) - 1, "end", "soft"))
    return _svg(wide, tall + 22, f"error by {axis.name}", *parts)


# ---- depth -----------------------------------------------------------------------------------------


def depth(labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], limit: float) -> str:
    """Errors by layer on a logarithmic scale, one line a series; `limit` is drawn across."""
    values = [np.asarray(v, float) for _, v in series]
    finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values]) if values else np.zeros(0)
    if not finite.size:
        return ""
    low = int(np.floor(np.log10(min(finite.min(), limit))))
    high = int(np.ceil(np.log10(max(finite.max(), limit)) + 1e-9))
    low = max(low, high - 16)
    left, tall, wide = 46, 150, min(WIDTH - 200, 90 * max(len(labels) - 1, 1))
    xs = left + 10 + (wide - 20) * (np.arange(len(labels)) + 0.5) / len(labels)

    def y(v):
        return 8 + tall * (1 - (np.log10(v) - low) / max(high - low, 1))

    parts = []
    for e in range(low, high + 1, _nice(high - low, 5)):
        parts.append(f"<path class='axis' d='M{left} {y(10.0 ** e):.1f}H{left + wide}'/>")
        parts.append(_text(left - 6, y(10.0 ** e) + 4, f"1e{e}", "end", "soft"))
    parts.append(f"<path class='limit' d='M{left} {y(limit):.1f}H{left + wide}'/>")
    parts.append(_text(left + wide + 6, y(limit) + 4, "limit", kind="soft"))
    every = _nice(len(labels), 16)
    for i in range(0, len(labels), every):
        parts.append(_text(xs[i], tall + 24, labels[i].removeprefix("layer "), "middle", "soft"))
    parts.append(_text(left - 6, tall + 24, "layer", "end", "soft"))
    for n, ((name, _), v) in enumerate(zip(series, values)):
        parts += _line(name, v, xs, y, 10.0 ** low, n, left + 10 + 150 * n, tall + 44)
    return _svg(left + wide + 50, tall + 50, "error by depth", *parts)


def _line(name, v, xs, y, floor, n, x_name, y_name):
    """Points, joined; what is 0 or not finite is left out."""
    there = np.flatnonzero(np.isfinite(v) & (v > 0))
    at = [(xs[i], y(max(v[i], floor))) for i in there]
    joined = "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
    dots = [f"<circle class='d{n}' cx='{a:.1f}' cy='{b:.1f}' r='3'><title>{text(name)}: {v[i]:.2e}</title></circle>"
            for (a, b), i in zip(at, there)]
    key = f"<circle class='d{n}' cx='{x_name:.0f}' cy='{y_name - 4:.0f}' r='4'/>", _text(x_name + 9, y_name, name)
    return [f"<path class='s{n}' d='M{joined}'/>" if len(at) > 1 else "", *dots, *key]
