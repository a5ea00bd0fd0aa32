"""The heat map and the error by depth, drawn by matplotlib."""

from __future__ import annotations

from io import BytesIO
from textwrap import fill

import numpy as np

from ._grid import NOISE
from ._html import HEAT
from ._opened import DECADES
from ._svg import times


def figure(result):
    """A figure of a `Report`, a `Blame` or a `Comparison`.

    Raises
    ------
    ImportError
        Where matplotlib is not installed; it says how to install it.
    ValueError
        If there is nothing to draw.
    """
    try:
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot() needs matplotlib, which is not installed: pip install matplotlib. html() shows the "
                          "same without it") from None
    grid, title, unit, depth = _data(result)
    if not grid:
        raise ValueError("there is nothing to draw: no array has a row a token")

    class Shown(Figure):
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self):
            file = BytesIO()
            self.savefig(file, format="png", dpi=90)
            return file.getvalue()

    fig = Shown(figsize=(11, max(2.6, min(0.24 * len(grid.labels) + 1.4, 9))), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(3, 1.3))
    levels = np.ma.masked_less(grid.levels(), 0)
    image = left.imshow(levels, aspect="auto", interpolation="nearest", cmap=ListedColormap(HEAT),
                        norm=BoundaryNorm(np.arange(-0.5, 10), 10))
    left.set_yticks(range(len(grid.labels)), grid.labels, fontsize=8)
    left.set(xlabel="token", title=title)
    left.xaxis.get_major_locator().set_params(integer=True)
    for cut in grid.cuts:
        left.axvline(cut - 0.5, color="0.4", linewidth=0.6)
    bar = fig.colorbar(image, ax=left, ticks=np.arange(1.5, 8), pad=0.01)
    bar.ax.set_yticklabels([times(e * grid.scale.one) for e in grid.scale.edges], fontsize=7)
    bar.set_label(unit, fontsize=8)
    if depth:
        _by_depth(right, depth, unit if grid.scale is NOISE else "rms error, of the tap's rms")
    else:
        _histogram(right, result)
    fig.suptitle(fill(result.verdict, 150), fontsize=9, x=0.01, ha="left")
    return fig


def _data(result):
    """(heat map, its title, its unit, labels and series by depth or None)."""
    if hasattr(result, "by_depth"):
        grid, depth = result.grid(), result.by_depth()
        if grid.scale is NOISE:
            return grid, "added error", "times its noise", depth
        return grid, "added error" if result.has_parts else "error", f"multiples of {depth[2]:.2g}", depth
    part = result if result.arrays is not None else next((p for p in result.parts if p.arrays is not None), None)
    if part is None:
        raise ValueError("expert ids have no heat map; print the comparison")
    grid, allowed = part.grid()
    return grid, "error", f"multiples of {allowed}", None


def _by_depth(axes, depth, unit):
    labels, series, limit = depth
    for (name, values), colour in zip(series.items(), (HEAT[7], HEAT[4])):
        values = np.array(values, float)
        values[~(np.isfinite(values) & (values > 0))] = np.nan
        axes.semilogy(range(len(labels)), values, "o-", color=colour, markersize=3.5, label=name)
    axes.axhline(limit, color="0.5", linewidth=0.8, linestyle=":")
    step = max(-(-len(labels) // 8), 1)
    axes.set_xticks(range(0, len(labels), step), [x.removeprefix("layer ") for x in labels[::step]], fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.set(xlabel="layer", title="error by depth")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _histogram(axes, result):
    part = result if result.arrays is not None else next(p for p in result.parts if p.arrays is not None)
    counts = part.opened("").counts
    edges = 10.0 ** (DECADES[0] + np.arange(len(counts) + 1) / 2)
    axes.stairs(counts, edges, fill=True, color=HEAT[4])
    axes.set(xscale="log", xlabel="error, u", ylabel="elements", title="how large the errors are")
    axes.spines[["top", "right"]].set_visible(False)
