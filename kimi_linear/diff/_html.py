"""Parts of HTML that notebooks and pages are made of: escaped text, tables, sections, a whole document.

No script, no font, no address: a document says so itself in its Content-Security-Policy, and a browser keeps to it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["HEAT", "LEVELS", "TITLE", "document", "folded", "fragment", "notes", "section", "table", "text", "verdict"]

TITLE = "kimi_linear"
LEVELS = 10  # colours of a heat map, ``h0`` to ``h9``

_GREYS = (
    ("#eef1f4", "#dde6ee", "#c3d3e2", "#a2bbd3", "#7d9dbf"),
    ("#1d232a", "#233342", "#2b455d", "#365a7e", "#4a77a8"),
)
_WARM = ("#f0c24b", "#ee8f3b", "#dd4b32", "#b3123f", "#6f3fb5")
HEAT = (*_GREYS[0], *_WARM)  # of plots


def _colours(theme):
    return "".join(f"--h{i}:{c};" for i, c in enumerate((*_GREYS[theme], *_WARM)))


#: Of every part; colours that change with the theme are variables.
CSS = (
    ".kl{--ok:#1a7f37;--no:#cf222e;--soft:#737a83;--line:rgba(127,127,127,.28);--tint:rgba(207,34,46,.09);"
    "--bar:#7d9dbf;--mark:#dd4b32;" + _colours(0) + "font:14px/1.5 system-ui,sans-serif;"
    "font-variant-numeric:tabular-nums}"
    "@media(prefers-color-scheme:dark){.kl{--ok:#4ac26b;--no:#ff7b72;--tint:rgba(248,81,73,.16);--bar:#4a77a8;"
    "--mark:#ee8f3b;" + _colours(1) + "}}"
    ".kl .verdict{font-weight:600;border-left:4px solid var(--ok);padding:.1em 0 .1em .8em;margin:.6em 0;"
    "overflow-wrap:anywhere}.kl .verdict.no{border-color:var(--no)}"
    ".kl table{border-collapse:collapse;margin:.4em 0;font-size:13px}"
    ".kl th,.kl td{text-align:left;padding:.15em 1em .15em 0;border:0;vertical-align:top;white-space:nowrap}"
    ".kl th{font-weight:500;color:var(--soft);border-bottom:1px solid var(--line)}"
    ".kl td.wide{white-space:normal;overflow-wrap:anywhere}"
    ".kl tr.no{background:var(--tint)}.kl tr.no td:first-child{color:var(--no);font-weight:600}"
    ".kl .note,.kl .soft{color:var(--soft);margin:.2em 0}"
    ".kl svg{display:block;max-width:100%;height:auto;margin:.5em 0;font:11px system-ui,sans-serif}"
    ".kl svg text{fill:currentColor}.kl svg .soft{fill:var(--soft)}.kl svg .bar{fill:var(--bar)}"
    ".kl svg .axis{stroke:var(--line);fill:none}"
    ".kl svg .s0,.kl svg .s1{fill:none;stroke-width:1.8;stroke:var(--mark)}.kl svg .s1{stroke:var(--bar)}"
    ".kl svg .d0{fill:var(--mark)}.kl svg .d1{fill:var(--bar)}.kl svg .limit{stroke:var(--soft);stroke-dasharray:3 3}"
    ".kl .cells rect:hover{stroke:currentColor;stroke-width:1;vector-effect:non-scaling-stroke}"
    ".kl .cells{shape-rendering:crispEdges}"
    + "".join(f".kl .h{i}{{fill:var(--h{i})}}" for i in range(LEVELS))
)

_PAGE_CSS = (
    "html{color-scheme:light dark}body{margin:0;background:#fff;color:#1f2328}"
    "@media(prefers-color-scheme:dark){body{background:#0f1318;color:#d7dde4}}"
    "@media(prefers-color-scheme:dark){body.kl{--soft:#8b949e}}"
    "main{max-width:1100px;margin:0 auto;padding:2em 1.5em 4em}"
    "header .soft{font-size:13px}h1{font-size:14px;font-weight:500;margin:0;color:var(--soft)}"
    "header .verdict{font-size:19px;line-height:1.4;margin:.5em 0 .6em}"
    "h2{font-size:16px;font-weight:600;margin:2.4em 0 .2em}h3{font-size:14px;font-weight:600;margin:1.4em 0 .1em}"
    "details{margin:.6em 0}summary{cursor:pointer;font-weight:600}"
    ".scroll{overflow-x:auto}.pair{display:flex;flex-wrap:wrap;gap:0 3em}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(x) -> str:
    """Escaped, for elements and attributes."""
    return html.escape(str(x))


def verdict(sentence: str, ok: bool) -> str:
    """The sentence, with a bar in the colour of the answer."""
    return f"<p class='verdict{'' if ok else ' no'}'>{text(sentence)}</p>"


def table(rows: Iterable[Sequence], head: Sequence[str] = (), wrong: Iterable[bool] = (),
          wide: int | None = None) -> str:
    """Rows of text; `wrong` tells which rows to tint, `wide` the column whose lines may break."""
    lines = [_row(head, "th")] if head else []
    wrong = list(wrong)
    for i, cells in enumerate(rows):
        lines.append(_row(cells, "td", " class='no'" if i < len(wrong) and wrong[i] else "", wide))
    return f"<table>{''.join(lines)}</table>"


def _row(cells, tag, style="", wide=None):
    def cell(i, c):
        return f"<{tag}{' class=wide' if i == wide else ''}>{text(c)}</{tag}>"

    return f"<tr{style}>{''.join(cell(i, c) for i, c in enumerate(cells))}</tr>"


def notes(lines: Iterable[str]) -> str:
    """A paragraph each, quiet."""
    return "".join(f"<p class='note'>{text(line)}</p>" for line in lines)


def section(title: str, *parts: str, about: str = "") -> str:
    """A part of a page; nothing where there is nothing in it."""
    inside = "".join(parts)
    said = f"<p class='soft'>{text(about)}</p>" if about else ""
    return f"<section><h2>{text(title)}</h2>{said}<div class='scroll'>{inside}</div></section>" if inside else ""


def folded(title: str, *parts: str) -> str:
    """What opens on a click."""
    return f"<details><summary>{text(title)}</summary><div class='scroll'>{''.join(parts)}</div></details>"


def fragment(*parts: str) -> str:
    """For notebooks: the parts, with their style."""
    return f"<div class='kl'><style>{CSS}</style>{''.join(parts)}</div>"


def document(title: str, *parts: str) -> str:
    """A page that needs nothing else."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\">"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{text(title)}</title><link rel='icon' href='data:,'><style>{CSS}{_PAGE_CSS}</style></head>"
        f"<body class='kl'><main>{''.join(parts)}</main></body></html>\n"
    )
