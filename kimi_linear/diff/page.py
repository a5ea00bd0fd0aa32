"""Results to look at: one HTML page that needs nothing else, what notebooks show, and plots.

Every result of this package is a `Page`: ``report.html("report.html")`` writes it, and the last line of a notebook's
cell shows the same parts, fewer of them. A function below says for each kind of result what is on its page, in the
order in which one asks: what is the answer, where is it, what does it look like there, and everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..load.atomic import write_text
from . import _svg
from ._grid import layer_of
from ._html import TITLE, document, folded, fragment, notes, section, table, text, verdict
from ._opened import Opened

if TYPE_CHECKING:
    from .bisect import Bisection
    from .blame import Blame
    from .compare import Comparison
    from .traces import Report

__all__ = ["Page", "Plotted", "of_bisect", "of_blame", "of_compare", "of_traces"]

SHOWN = 40  # rows of a notebook's table
FEWER = 1500  # cells of its heat map


class Page:
    """A result that can be looked at: it has `verdict` and `ok`, and `_parts`, one of the functions below."""

    def html(self, path=None) -> str | None:
        """One self-contained page: no script, no address, in the colours that the reader's system prefers.

        Parameters
        ----------
        path : str or path, optional
            The file to write, in UTF-8, whole or not at all. Without, the page is returned as text.

        Raises
        ------
        OSError
            If the file cannot be written; what was there before is there still.
        """
        page = document(f"{TITLE}: {self.verdict}", *self._parts(False))
        if path is None:
            return page
        write_text(path, page, errors="backslashreplace")
        return None

    def _repr_html_(self):
        return fragment(*self._parts(True))


class Plotted(Page):
    """A page whose heat map can be drawn by matplotlib, too."""

    def plot(self):
        """A matplotlib figure: the heat map, and beside it the error by depth.

        Raises
        ------
        ImportError
            Where matplotlib is not installed.
        ValueError
            If there is nothing to draw: expert ids alone, no array with a row a token.
        """
        from ._plot import figure

        return figure(self)


def _header(what, result, facts=""):
    said = f"<p class='soft'>{text(facts)}</p>" if facts else ""
    return f"<header><h1>{TITLE}: {text(what)}</h1>{verdict(result.verdict, result.ok)}{said}</header>"


def _joined(*facts):
    return "; ".join(f for f in facts if f)


def _map(grid, label, unit, brief=False):
    most = FEWER if brief else _svg.CELLS
    return (_svg.heat_map(grid, label, most=most), _svg.legend(grid, unit)) if grid else ()


# ---- traces ----------------------------------------------------------------------------------------


def of_traces(report: Report, brief: bool):
    """The parts of the page of `traces`; `brief`: of what a notebook shows."""
    from .traces import head, row_cells

    grid, parts = report.grid(), report.has_parts
    error = "added error" if parts else "error"
    limits = sorted({r.threshold for r in report.rows if r.kind == "float"})
    limit = f"multiples of each tap's limit, {' or '.join(f'{x:.1e}' for x in limits)} of its rms"
    drawn = _map(grid, f"{error} of layers and tokens", limit, brief)

    def listed(rows):
        named = [(c[0], r.verdict, *c[1:]) for r in rows for c in [row_cells(r, parts)]]
        tap, *others = head(parts)
        return table(named, (tap, "verdict", *others), [not r.ok for r in rows])

    if brief:
        some = [r for r in report.rows if not r.ok] or sorted(report.rows, key=lambda r: -r.rms)[:8]
        return (verdict(report.verdict, report.ok), *drawn, listed(some[:SHOWN]), notes(_more(some)),
                notes(report.left_out()))
    facts = _joined(f"{len(report.columns):,} tokens", f"{len(report.rows):,} taps",
                    *(f"{n}: {x}" for n, x in zip("ab", report.about) if x))
    why = ("What each op of a adds, beside float64 on the inputs that it had there." if parts else
           "What has gathered by each tap. With the model (model=, --model) it is told which op adds it.")
    layer = _layer_of_interest(report)
    inside = _svg.heat_map(report.grid(layer), f"taps of {layer}", 15) if layer else ""
    return (
        _header("two traces", report, facts),
        section(f"{error.capitalize()} by layer and token", *drawn, about=f"{why} Of a layer its worst tap."),
        section(f"Inside {layer}", inside, about="Its taps in the order of the dataflow."),
        *_opened(report.opened, report.first.tap if report.first else None),
        section("Error by depth", _depth(report), about="The rms error of a tap, over the tap's rms."),
        section("Every tap", listed(report.rows), about=_MEANING if parts else ""),
        section("Left out", notes(report.left_out())),
    )


_MEANING = ("In the order of the dataflow. ADDS: what is over the limit comes from this op; inherited: it came with "
            "the op's inputs.")


def _more(rows):
    return [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []


def _layer_of_interest(report):
    worst = max((r for r in report.rows if r.kind == "float"), key=lambda r: r.rms, default=None)
    tap = report.first.tap if report.first else worst.tap if worst else ""
    layer = layer_of(tap)
    return layer if layer.startswith("layer ") and report.grid(layer) else ""


def _depth(result):
    labels, series, limit = result.by_depth()
    return _svg.depth(labels, list(series.items()), limit) if len(labels) > 1 else ""


# ---- one array -------------------------------------------------------------------------------------


def _opened(several, first):
    """The first one open, the others to be unfolded."""
    out = []
    for i, x in enumerate(several):
        shape = " x ".join(map(str, x.shape))
        if i == 0:
            what = "The first tap that diverges" if x.name == first else "A closer look"
            out.append(section(f"{what}: {x.name}", *_inside(x), about=shape))
        else:
            out.append(folded(f"{x.name}, {shape}", *_inside(x)))
    return out


def _inside(x: Opened, facts: bool = True):
    if facts:
        yield table(x.facts)
    if x.worst:
        yield f"<h3>{'Worst elements' if x.counts is not None else 'Rows'}</h3>{table(x.worst, x.head)}"
    drawn = [f"<div><h3>by {text(a.name)}</h3>{_svg.concentration(a)}{notes([a.text])}</div>"
             for a in x.axes]
    bars = _svg.histogram(x)
    if bars:
        said = notes([(f"{x.exact:,} elements are exact; " if x.exact else "") + "u is 2^-24 of the rms"])
        drawn.append(f"<div><h3>how large the errors are</h3>{bars}{said}</div>")
    if drawn:
        yield f"<h3>Where the squared error is</h3><div class='pair'>{''.join(drawn)}</div>"


# ---- blame -----------------------------------------------------------------------------------------


def of_blame(found: Blame, brief: bool):
    """The parts of the page of `blame`."""
    from .blame import HEAD, WRONG, cells

    grid = found.grid()
    drawn = _map(grid, "error over noise of layers and tokens", f"times an op's noise; from {WRONG:.0f} it is wrong",
                 brief)

    def listed(rows):
        return table([cells(r) for r in rows], HEAD, [not r.ok for r in rows])

    if brief:
        some = found.wrong or found.rows[:8]
        return (verdict(found.verdict, found.ok), *drawn, listed(some[:SHOWN]), notes(_more(some)),
                notes(found.left_out()))
    first = found.wrong[0] if found.wrong else None
    layer = f"layer {first.layer}" if first and first.layer is not None else ""
    inside = _svg.heat_map(found.grid(layer), f"ops of {layer}", 15) if layer else ""
    facts = _joined(f"{len(found.columns):,} tokens", f"{len(found.rows):,} ops judged",
                    f"{len(found.wrong):,} wrong" if found.wrong else "", f"rounding {found.unit:.1e}")
    return (
        _header("which op is wrong in itself", found, facts),
        section("Added error by layer and token", *drawn,
                about="Every op again in float64 on the inputs that it had: what it adds, over what rounding them and "
                      "its result once may move it by. Of a layer its worst op."),
        section(f"Inside {layer}", inside, about="Its ops in the order of the dataflow."),
        section("What it is", *_named(found)),
        *_beside(found.opened),
        section("Worst op by depth", _depth(found)),
        section("Every op", listed(found.in_order()), about="In the order of the dataflow."),
        section("Left out, and remarks", notes(found.left_out())),
    )


def _named(found):
    """What is known of the faults that were found."""
    for kind, fault in {r.kind: r.fault for r in found.wrong if r.fault}.items():
        taps = ", ".join(r.where or r.tap for r in found.wrong if r.kind == kind)
        known = ("what is done", fault.text), ("at", taps), ("shows in", fault.scenario), ("source", fault.source)
        yield f"<h3>{text(kind)}</h3>{table([k for k in known if k[1]], wide=1)}"


def _beside(opened):
    for i, x in enumerate(opened):
        title = f"{x.name}: theirs beside float64 on their inputs"
        yield section(title, *_inside(x)) if i == 0 else folded(title, *_inside(x))


# ---- compare, bisect -------------------------------------------------------------------------------


def of_compare(found: Comparison, brief: bool):
    """The parts of the page of `compare`."""
    rows = table(found.rows)
    if brief:
        return rows, verdict(found.verdict, found.ok)
    sections = []
    for i, part in enumerate(found.parts or (found,)):
        name = f"result {i}" if found.parts else found.op or "result"
        sections.append(section(f"{name}: {part.verdict}" if found.parts else "Figures", table(part.rows)))
        x = part.opened(name)
        if x is not None:
            grid, limit = part.grid()
            drawn = _map(grid, "error by token", f"multiples of {limit}")
            sections.append(section(f"Where the error of {name} is", *drawn, *_inside(x, False)))
    return _header(found.op or "two arrays", found), *sections


def of_bisect(found: Bisection, brief: bool):
    """The parts of the page of `bisect`."""
    steps = table([(tap, f"{d:.2e}") for tap, d in found.steps], ("replaced up to", "difference left"))
    if brief:
        return verdict(found.verdict, found.ok), steps
    about = ("The second run gets the first one's values up to a tap; what is then left of the difference comes from "
             "the ops behind it.")
    return _header("two engines, swapped by halves", found), section("Steps", steps, about=about)

