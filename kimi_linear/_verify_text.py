"""How a verify report looks: as text for a terminal, and as HTML for a notebook."""

from .diff import _html as parts
from .diff.metrics import U

__all__ = ["bar", "html_table", "render", "verdict"]

GREEN, RED, DIM, BOLD, PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[1m", "\033[0m"
BAR = 12
EIGHTHS = " ▏▎▍▌▋▊▉█"
FLIPS_SHOWN = 8
SHARP = ("add",)  # their budget is the one rounding that they cannot do without: always nearly used up


def render(report, *, all_taps=False, colour=False, ascii_only=False):
    """What was run, the table (of ops, or of every tap), what the whole chain gathered, the verdict."""
    paint = _painter(colour)
    table = _tap_lines(report, paint, ascii_only) if all_taps else _op_lines(report, paint, ascii_only)
    end = verdict(report)
    return "\n".join(
        [
            *_head(report, paint),
            "",
            *table,
            "",
            *_summary(report),
            "",
            paint(end, GREEN + BOLD if report.ok else RED + BOLD),
        ]
    )


def _painter(colour):
    return (lambda text, code: f"{code}{text}{PLAIN}") if colour else (lambda text, code: text)


def _head(report, paint):
    ids = "expert ids from the reference" if report.forced else "its own expert ids"
    with_ids = f", {ids}" if report.choices else ""
    return [
        paint(
            f"{report.model}: {report.tokens:,} tokens through {len(report.layers)} layers {report.layers}"
            f"{with_ids}, beside float64",
            BOLD,
        ),
        paint(
            f"Each op on its own inputs, its error over the rms of its result, in u = 2^-24 = {U:.1e};", DIM
        ),
        paint(
            "share: the largest error of any element, over the budget of that element (docs/math.md).", DIM
        ),
    ]


def bar(share, ascii_only=False):
    """A share of 1 as a bar; full where it is over."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    if share > 0:
        eighths = max(eighths, 1)
    if ascii_only:
        full = -(-eighths // 8)
        return "#" * full + "." * (BAR - full)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(BAR, "·")


def _share(share, paint, ascii_only):
    if share is None:
        return " " * BAR + "  no budget"
    text = f"{bar(share, ascii_only=ascii_only)}  {_percent(share):>9}"
    return text if share <= 1 else paint(text, RED)


def _percent(share):
    if share > 10:
        return f"{share:.3g} x" if share != float("inf") else "beyond"
    return f"{100 * share:.1f} %" if share else "exact"


def _times(share):
    return f"{share:.3g} times" if share != float("inf") else "beyond"


def _u(x):
    """Error in u: ``exact``, ``0.41``, ``12.3``, ``1.2e+06``."""
    if x is None:
        return "given"
    if x == 0:
        return "exact"
    if x < 0.005 or x >= 1e5:
        return f"{x:.1e}"
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def _op_lines(report, paint, ascii_only):
    names = max(len(op.name) for op in report.ops)
    head = (
        f"  {'op':<{names}}  {'taps':>4}  {'rms, u':>8}  {'largest, u':>10}  "
        f"{'share of its budget':<{BAR + 11}}  worst at"
    )
    lines = [paint(head, DIM)]
    for op in sorted(report.ops, key=lambda op: op.name in SHARP and op.ok):
        where = f"{op.where}  {paint(op.at, DIM)}" if op.at and op.share != 0 else ""
        where = paint("one rounding, the least there is", DIM) if op.name in SHARP and op.ok else where
        lines.append(
            f"  {op.name:<{names}}  {op.taps:>4}  {_u(op.rms_u):>8}  {_u(op.largest_u):>10}  "
            f"{_share(op.share, paint, ascii_only)}  {where}".rstrip()
        )
    return lines


def _tap_lines(report, paint, ascii_only):
    names = max(len(tap.name) for tap in report.taps)
    ops = max(len(tap.op) for tap in report.taps)
    head = (
        f"  {'tap':<{names}}  {'op':<{ops}}  {'total rms':>9}  {'largest':>8}  {'own rms, u':>10}  "
        f"{'largest, u':>10}  {'share of its budget':<{BAR + 11}}  worst at"
    )
    lines = [paint(head, DIM)]
    for tap in report.taps:
        total = ("same", "") if tap.total_rms == 0 else (f"{tap.total_rms:.1e}", f"{tap.total_largest:.1e}")
        share = " " * (BAR + 11) if tap.rms_u is None else _share(tap.share, paint, ascii_only)
        where = tap.at if tap.share else ""
        lines.append(
            f"  {tap.name:<{names}}  {tap.op:<{ops}}  {total[0]:>9}  {total[1]:>8}  {_u(tap.rms_u):>10}  "
            f"{_u(tap.largest_u):>10}  {share}  {paint(where, DIM)}".rstrip()
        )
    return lines


def _summary(report):
    rms, largest = report.worst_rms, report.worst_largest
    held, chain = report.memory / 2**20, f"no tap is further from float64 than {rms.total_rms:.1e} of its rms"
    lines = [
        ("whole chain", f"{chain} in rms ({rms.name})"),
        ("", f"and {largest.total_largest:.1e} in any one element ({largest.name})"),
        *_routing(report),
        ("memory", f"{held:.0f} MiB of taps at a time, of both runs; {report.seconds:.1f} s"),
        *(("note", note) for note in report.notes),
    ]
    return [f"{label:<12}  {text}" for label, text in lines]


def _routing(report):
    if report.flips is None or not report.choices:
        return []
    n = len(report.flips)
    if not n:
        return [("free run", f"no flip among {report.choices:,} choices of experts")]
    lines = [("free run", f"{n:,} of {report.choices:,} choices of experts flip")]
    for f in report.flips[:FLIPS_SHOWN]:
        after = ", behind an earlier flip" if f.follows else ""
        what = f"{_ids(f.taken)} for {_ids(f.lost)}, scores {f.gap:.1e} apart{after}"
        lines.append(("", f"layer {f.layer}, token {f.token}: {what}"))
    return lines + ([("", f"and {n - FLIPS_SHOWN:,} more")] if n > FLIPS_SHOWN else [])


def _ids(ids):
    return " and ".join(map(str, ids)) or "none"


def verdict(report):
    """One sentence: what is wrong first, or how near the nearest op is to its budget."""
    apart = [tap for tap in report.taps if tap.apart]
    if apart and apart[0].op == "route":
        return (
            f"FAILED: {apart[0].name}: {apart[0].apart:,} tokens did not use the expert ids that were given"
        )
    if apart:
        return (
            f"FAILED: {apart[0].name} is the first of {len(apart)} taps that are finite in one run only "
            f"({apart[0].apart:,} elements)"
        )
    over = [tap for tap in report.taps if not tap.ok]
    if over:
        first, ops = over[0], ", ".join(sorted({tap.op for tap in over}))
        where = f"at {len(over)} taps; the first is" if len(over) > 1 else "at"
        return (
            f"FAILED: {ops} over budget {where} {first.name}, {_times(first.share)} its budget at {first.at}"
        )
    wide = [f for f in report.flips or () if not f.ok]
    if wide:
        return (
            f"FAILED: in the free run layer {wide[0].layer} flips at token {wide[0].token} between scores "
            f"{wide[0].gap:.1e} apart, which rounding does not explain"
        )
    judged = [op for op in report.ops if op.share is not None and op.name not in SHARP]
    without = [op.name for op in report.ops if op.share is None]
    near = (
        f"; the nearest is {judged[0].name} with {_percent(judged[0].share)}"
        if judged and judged[0].share
        else ""
    )
    rest = f" ({', '.join(without)}: no budget)" if without else ""
    given = sum(tap.rms_u is None for tap in report.taps)
    taps = f"{len(report.taps) - given} of {len(report.taps)}" if given else f"all {len(report.taps)}"
    rest += "; route was not judged: its choices were given" if given else ""
    return f"ok: {taps} taps, every op inside its own budget{near}{rest}"


def html_table(report):
    """For notebooks; names are escaped."""
    names = ("op", "taps", "rms, u", "largest, u", "", "of its budget", "worst at")
    cells = [(op.name, op.taps, _u(op.rms_u), _u(op.largest_u), "" if op.share is None else bar(op.share),
              "no budget" if op.share is None else _percent(op.share), f"{op.where} {op.at}") for op in report.ops]
    ops = parts.table(cells, names, [not op.ok for op in report.ops])
    title = _head(report, _painter(False))[:1]
    return parts.fragment(parts.verdict(report.verdict, report.ok), parts.notes(title), ops,
                          parts.notes(_summary(report)))
