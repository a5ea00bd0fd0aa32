"""`replay`: hundreds of recorded calls of an op, each judged by float64 on its own inputs, the worst first."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference
from .._arrays import as_tuple
from ..conventions import convention, conventions
from . import metrics
from ._noise import ATTENDS, judged, seen_by, unit_of_arrays
from .blame import WRONG, level_of
from .budgets import budget
from .budgets import names as budget_names
from .compare import aligned

__all__ = ["Replay", "Replayed", "replay"]

INTEGERS = ("ids", "offsets", "kv_offsets", "positions")  # arguments that are no floats


@dataclass(frozen=True)
class Replayed:
    """One call.

    Attributes
    ----------
    file, op : str
    times : float
        Error over noise, of the worst result: what rounding inputs and results once would change is 1.
    error : float
        rms error over the rms of the reference; of ids, the share of rows with another set.
    share : float or None
        Largest ratio of an element's error to the op's budget, where it has one: the bar of our own float32.
    result : int
        Number of the worst result; of a delta rule 0 is o, 1 the state.
    at : str
        Its worst element.
    dtype : str
        Whose rounding the noise is.
    notes : tuple of str
        What was not looked at, or lay oddly in memory.
    """

    file: str
    op: str
    times: float
    error: float
    share: float | None
    result: int
    at: str
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where it is below 7 times the noise."""
        return self.times < WRONG


@dataclass
class Replay:
    """What `replay` found. Prints as a table; true where every call could be judged and none is wrong.

    Attributes
    ----------
    rows : list of Replayed
        The worst first.
    skipped : list of (file, reason)
    notes : list of str
    """

    rows: list[Replayed]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Replayed]:
        """The calls that are wrong in themselves."""
        return [r for r in self.rows if not r.ok]

    @property
    def ok(self) -> bool:
        """True where every call could be judged and none is wrong."""
        return bool(self.rows) and not self.wrong and not self.skipped

    def __bool__(self):
        return self.ok

    @property
    def verdict(self) -> str:
        """One sentence."""
        out = f"; {len(self.skipped)} could not be judged" if self.skipped else ""
        n = len(self.rows)
        if not n:
            return f"NOT JUDGED: none of {len(self.skipped)} calls could be judged: {self.skipped[0][1]}" if out else \
                "NOT JUDGED: there is no call"
        first = self.rows[0]
        if first.ok:
            word = "ok" if not out else "INCOMPLETE"
            return (f"{word}: none of {n} calls is wrong; the furthest, {first.file}, is at {first.times:.2g} times "
                    f"its noise{out}")
        times = f"{first.times:.3g} times" if np.isfinite(first.times) else "beyond"
        return (f"WRONG: {len(self.wrong)} of {n} calls; the worst is {first.file} ({first.op}), {times} its noise, "
                f"result {first.result} at {first.at}{out}")

    def table(self, top=12) -> str:
        """The text, with so many rows."""
        lines = aligned([_HEAD, *(_cells(r) for r in self.rows[:top])])
        if len(self.rows) > top:
            lines.append(f"... and {len(self.rows) - top} more, {sum(not r.ok for r in self.rows[top:])} of them wrong")
        for reason, n in Counter(reason for _, reason in self.skipped).most_common(5):
            first = next(f for f, r in self.skipped if r == reason)
            lines.append(f"not judged ({n}): {first}: {reason}")
        shown = Counter(note for r in self.rows for note in r.notes)
        lines += [f"{note} ({n} call{'s' * (n > 1)})" for note, n in shown.most_common(4)]
        return "\n".join([*lines, "", *self.notes, self.verdict])

    def __str__(self):
        return self.table()

    __repr__ = __str__

    def _repr_html_(self):
        def row(cells, tag):
            return "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(_cells(r), "td") for r in self.rows[:12])
        return f"<p><b>{html.escape(self.verdict)}</b></p><table>{row(_HEAD, 'th')}{body}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not finite is null."""
        def plain(r):
            return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(r).items()}

        return {"ok": self.ok, "verdict": self.verdict, "wrong_from": WRONG,
                "rows": [plain(r) | {"ok": r.ok, "notes": list(r.notes)} for r in self.rows],
                "skipped": [list(s) for s in self.skipped], "notes": self.notes}


_HEAD = ("call", "op", "times its noise", "rms error", "of the budget", "result", "worst at", "rounding of")


def _cells(r: Replayed):
    share = "" if r.share is None else f"{r.share:.3g}"
    return (r.file, r.op, f"{r.times:.3g}", f"{r.error:.2e}", share, str(r.result), r.at, r.dtype)


def replay(path, *, op: str | None = None, conventions: Any = None, dtype: Any = None,
           progress: Callable[[int, int], None] | None = None) -> Replay:
    """Judge recorded calls of ops, each by our float64 reference on the call's own inputs.

    Parameters
    ----------
    path : str or path, or list of them
        A folder of calls as `kimi_linear.adapters.record_calls` writes them, or one file: safetensors or npz with
        ``in/NAME`` and ``out/0``, ...
    op : str, optional
        A name in `kimi_linear.ops`, where the file does not say; with it, calls of other ops are left out.
    conventions : str or Convention, optional
        Whose names and layouts the calls have; by default as the file says, else ours.
    dtype : optional
        The type that they computed in; by default the coarsest of a call's own arrays.
    progress : callable(done, total), optional

    Returns
    -------
    Replay

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no files, or `op` or `conventions` is none that there is. What is wrong with one file is in
        ``skipped``, and the others are judged.
    """
    from ..adapters.calls import files_of
    from ._conventional import parameters

    if op is not None:
        parameters(op)
    if isinstance(conventions, str):
        _named(conventions, op or "delta_rule")
    unit = None if dtype is None else metrics.stated_unit(dtype)
    files = [f for p in (path if isinstance(path, list | tuple) else [path]) for f in files_of(p)]
    rows, skipped, others = [], [], 0
    for i, file in enumerate(files):
        try:
            row = _judge(file, op, conventions, unit)
        except (ValueError, TypeError, KeyError, IndexError, OSError, ZeroDivisionError) as error:
            skipped.append((file.name, _sentence(error, file)))
        else:
            others += row is None
            rows += [row] if row else []
        if progress is not None:
            progress(i + 1, len(files))
    notes = [f"{others} calls of other ops were left out"] if others else []
    level, note = level_of([r.times for r in rows if np.isfinite(r.times)])
    if note:
        notes.append(note)
    rows = [replace(r, times=r.times / level) for r in rows]
    return Replay(sorted(rows, key=lambda r: (-r.times, -(r.share or 0), r.file)), skipped, notes)


def _named(project, op):
    """The convention of a project; ours for ops of which it has none."""
    if project != "ours" or op in conventions["ours"]:
        return convention(project, op)
    return None


def _judge(file, op, project, unit):
    from ..adapters.calls import load_call
    from ._conventional import ours

    call = load_call(file)
    if op is not None and call.op not in (None, op):
        return None
    name = op or call.op
    if name is None:
        raise ValueError("the file does not say of which op it is; give op=")
    how = project if project is not None else call.conventions or "ours"
    args, got, notes = ours(name, _named(how, name) if isinstance(how, str) else how, call.inputs, call.results)
    for n, x in args.items():
        if isinstance(x, np.ndarray) and x.dtype.kind in "iub" and n not in INTEGERS:
            raise ValueError(f"{n} is {x.dtype}; it must be floats")

    def run(given):
        with np.errstate(all="ignore"):
            return as_tuple(getattr(reference, name)(**given))

    given = [x for v in args.values() for x in as_tuple(v)]
    of_call = unit or unit_of_arrays(given + list(got))
    units = [max(of_call, unit_of_arrays([x])) for x in got]
    got = [x if x.dtype.kind in "iu" or x.dtype == np.float64 else x.astype(np.float64) for x in map(np.asarray, got)]
    found = judged(run, args, got, of_call, units, seen_by(args) if name in ATTENDS else None)
    notes += [f"result {i} was not looked at" for i in range(len(found), len(got))]
    worst = max(range(len(found)), key=lambda i: found[i][0])
    times, error, at, y = found[worst]
    axes = metrics.axis_names(y.shape) if worst == 0 or y.ndim < 3 else ("sequence", "head", "key", "value")[-y.ndim:]
    place = metrics.coordinates(at[:y.ndim], axes[:len(at[:y.ndim])]) if at else ""
    return Replayed(file.name, name, times, error, _share(name, args, got, [f[3] for f in found], of_call), worst,
                    place, metrics.type_of_unit(of_call), (*notes, *_oddities(call.layout)))


def _share(op, args, got, exact, unit):
    """Largest error over the budget, which is for float32; None where there is none."""
    if op not in budget_names() or unit > metrics.U or any(y.dtype.kind in "iu" for y in exact):
        return None
    try:
        with np.errstate(all="ignore"):
            whole = getattr(reference, op)(**args)
            bounds = as_tuple(budget(op, whole, **args))
    except (TypeError, ValueError):
        return None
    shares = [metrics.share_of(x, y, np.broadcast_to(b, y.shape))[0] for x, y, b in zip(got, exact, bounds)]
    return float(max(shares))


def _oddities(layout):
    """What lay in memory as no fresh copy does: where a copy may be right and the original was not."""
    strided = [n for n, x in layout.items() if isinstance(x, dict) and _is_strided(x)]
    return (f"not contiguous when recorded: {', '.join(strided[:4])}",) if strided else ()


def _is_strided(x):
    shape, strides = x.get("shape", []), x.get("strides", [])
    want = 1
    for n, s in zip(reversed(shape), reversed(strides)):
        if n > 1 and s != want:
            return True
        want *= n
    return False


def _sentence(error, file):
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.removeprefix(f"{file}: ").removeprefix(f"{Path(file).name}: ")
