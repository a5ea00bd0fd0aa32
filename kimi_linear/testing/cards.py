"""`Card`: what `check_op` found, a line a group of cases, and why."""

import html
import math
import textwrap
from dataclasses import dataclass, field

from .._names import listed, near
from ..diff.compare import aligned
from ..diff.metrics import unit_of

__all__ = ["Card", "Row"]

WIDTH = 110  # columns of the text
REASONS = 5  # that the text gives
SIZES = 5  # errors of one size tell what made them


@dataclass(frozen=True)
class Row:
    """One case or law.

    Attributes
    ----------
    name, group : str
    status : {"holds", "fails", "not offered"}
    rms, largest : float
        Error over the rms of the result, in u of the card's dtype (2**-24, 2**-8, 2**-11): rms, and in the worst
        element. NaN where nothing was compared.
    share : float
        Largest ratio of an element's error to the bound of docs/math.md, once.
    detail : str
        Why it fails, or what is not offered.
    why : str
        The explanation that was found for a failure.
    """

    name: str
    group: str
    status: str
    rms: float = float("nan")
    largest: float = float("nan")
    share: float = float("nan")
    detail: str = ""
    why: str = ""


@dataclass(frozen=True)
class Card:
    """What `check_op` found. Prints as a table; true where every case that is offered holds, and one is.

    Attributes
    ----------
    op, conventions : str
    rows : tuple of Row
        One a case and law, in order.
    reasons : tuple of (str, tuple of str)
        What explains the failures, and the cases that each explains, most first.
    verdict : str
        One sentence.
    factor : int
        How many times the bound of docs/math.md is allowed.
    lacks : tuple of str
        What the callable may not have, in the words of ``without=``: all cases that need it raise, and no others.
    refused : str
        Why nothing was run; empty where something was.
    seconds : float
        What it took.
    dtype : str
        The type that the callable computes in.
    """

    op: str
    conventions: str
    rows: tuple
    factor: int
    reasons: tuple = ()
    lacks: tuple = ()
    refused: str = ""
    seconds: float = field(default=0.0, compare=False)
    dtype: str = "float32"

    def __bool__(self):
        return not self.refused and not self.failing and bool(self._of("holds"))

    def _of(self, status, rows=None):
        return [r for r in (self.rows if rows is None else rows) if r.status == status]

    @property
    def failing(self):
        """Names of the cases that fail."""
        return [r.name for r in self._of("fails")]

    @property
    def not_offered(self):
        """Names of the cases that the callable or its conventions have no way to ask for."""
        return [r.name for r in self._of("not offered")]

    def __getitem__(self, name):
        """The Row of a case; KeyError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no case {name!r}; near it are {', '.join(near(name, [row.name for row in self.rows]))}")

    @property
    def verdict(self):
        """One sentence."""
        if self.refused:
            return f"NOT RUN: {self.refused}"
        holds, fails, out = (len(self._of(s)) for s in ("holds", "fails", "not offered"))
        aside = f"; {out} not offered" if out else ""
        if fails:
            return f"FAILS {fails} of {fails + holds} cases{aside}{self._why(fails)}"
        worst = max((r for r in self._of("holds") if r.share == r.share), key=lambda r: r.share, default=None)
        most = "" if worst is None else f", at worst with {worst.share:.2g} of the bound ({worst.name}, {_u(worst)})"
        return f"ok: all {holds} cases hold{most}{aside}" if holds else "NOTHING was offered"

    def _why(self, fails):
        """The first reason, with how many failures it explains where that is not all, and how many more there are."""
        if not self.reasons:
            return ""
        sentence, names = self.reasons[0]
        unknown = sum(not r.why for r in self._of("fails"))
        mostly = "no known reason for most; " if 2 * unknown > fails else ""
        part = "" if len(names) == fails else f", in {len(names)} of them"
        more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f": {mostly}{sentence}{part}{more}"

    def _groups(self):
        """(group, how it went, worst error, the cases that fail) of each group."""
        for group in dict.fromkeys(r.group for r in self.rows):
            rows = [r for r in self.rows if r.group == group]
            holds, fails = self._of("holds", rows), self._of("fails", rows)
            if not holds and not fails:
                yield group, "not offered", "", ""
                continue
            compared = [r for r in fails or holds if r.largest == r.largest]
            worst = max(compared, key=lambda r: (r.share if r.share == r.share else 0), default=None)
            went = f"{len(holds)} hold" if not fails else f"{len(fails)} of {len(fails + holds)} FAIL"
            error = "" if worst is None else f"{_u(worst)}, {_number(worst.share)} of the bound"
            yield group, went, error, listed([r.name for r in fails], 2) if fails and holds else ""

    def brief(self):
        """The text without what holds: the verdict, then the groups that fail, where first, and why."""
        groups = list(self._groups())
        lines = _wrapped(f"{self._called()}: {self.verdict}", "")
        lines += [line[:WIDTH] for line in aligned([g for g in groups if "FAIL" in g[1]], "  ")]
        hold = [name for name, went, _, _ in groups if went.endswith("hold")]
        if hold and self.failing:
            lines += _wrapped(f"hold: {', '.join(hold)}", "  ")
        return "\n".join([*lines, *self._reasons()])

    def __str__(self):
        lines = _wrapped(f"{self._called()}: {len(self.rows)} cases and laws; an error may be {self.factor} times the "
                         f"bound of docs/math.md#{self.op}", "")
        lines += [line[:WIDTH] for line in aligned(list(self._groups()), "  ")]
        lines += self._reasons()
        lacking = dict.fromkeys(r.detail for r in self._of("not offered"))
        if lacking:
            lines += _wrapped(f"not offered: {'; '.join(lacking)}", "  ")
        return "\n".join([*lines, *_wrapped(self.verdict, "")])

    def _called(self):
        narrow = "" if self.dtype == "float32" else f", {self.dtype} (u = 2^{math.log2(unit_of(self.dtype)):.0f})"
        return f"{self.op}, {self.conventions} conventions{narrow}"

    def _reasons(self):
        """Lines: the first that fails, and what explains how many."""
        lines = []
        first = next(iter(self._of("fails")), None)
        if first is not None:
            lines += _wrapped(f"first: {first.name}: {first.detail}", "  ")
        for sentence, names in self.reasons[:REASONS]:
            lines += _wrapped(f"why: {sentence} (explains {len(names)} of {len(self.failing)})", "  ")
        if len(self.reasons) > REASONS:
            lines.append(f"  and {len(self.reasons) - REASONS} reasons more, in card.reasons")
        unexplained = [r for r in self._of("fails") if not r.why]
        if unexplained:
            rounded = self.dtype == "float32" and _are_of_narrow_size(unexplained)
            hint = "; their errors are as large as those of rounding to bfloat16 or float16: if it computes in one, " \
                   "dtype= must say so"
            lines += _wrapped(f"not explained: {listed([r.name for r in unexplained])}{hint if rounded else ''}", "  ")
        if self.lacks:
            lines += _wrapped(f"what raises has {', '.join(self.lacks)}: if yours is not to, "
                              f"without={list(self.lacks)} or NotImplementedError leaves these cases out", "  ")
        return lines

    __repr__ = __str__

    def _repr_html_(self):
        colour = "#1a7f37" if self else "#cf222e"
        cells = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(x)}</td>" for x in row) + "</tr>"
            for row in self._groups())
        reasons = "".join(f"<li>{html.escape(sentence)} ({len(names)})</li>" for sentence, names in self.reasons)
        verdict = html.escape(f"{self._called()}: {self.verdict}")
        return f"<table>{cells}</table><ul>{reasons}</ul><p style='color:{colour}'>{verdict}</p>"

    def to_dict(self):
        """Plain values, for JSON."""
        return {"op": self.op, "conventions": self.conventions, "dtype": self.dtype, "ok": bool(self),
                "verdict": self.verdict,
                "reasons": [{"says": s, "cases": list(names)} for s, names in self.reasons],
                "lacks": list(self.lacks),
                "rows": [{n: _finite(x) for n, x in vars(r).items()} for r in self.rows]}


def _are_of_narrow_size(rows):
    """Whether most of these errors, and some, are near what a rounding to a narrow type makes."""
    sizes = [r.rms * unit_of("float32") for r in rows if math.isfinite(r.rms)]
    near = sum(unit_of("float16") / 4 < size < 4 * unit_of("bfloat16") for size in sizes)
    return near >= max(SIZES, 0.8 * len(sizes))


def _finite(x):
    """`x`, or None for NaN and infinity, which JSON does not have."""
    return x if isinstance(x, str) or math.isfinite(x) else None


def _u(row):
    if row.rms == float("inf"):
        return "not finite"
    return f"{_number(row.rms)} u rms, {_number(row.largest)} u largest"


def _number(x):
    return f"{x:,.0f}" if 100 <= x < 1e4 else f"{x:.2g}".replace("e+0", "e")


def _wrapped(text, indent):
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "     ", break_on_hyphens=False)
