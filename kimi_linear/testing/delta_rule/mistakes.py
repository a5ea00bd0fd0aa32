"""What is tried to explain a wrong `delta_rule`: its faults in `kimi_linear.faults`; and what NaN say of a chunked
kernel."""

import numpy as np

from ...faults import mistakes
from ...faults._delta import acts, wrong
from ..spec import Explanation

__all__ = ["EXPLANATIONS", "SWAPPED", "diagnose", "mistaken"]

LARGEST_EXPONENT = 88.72  # of exp in float32
ALONE = {"border", "padding", "sums"}  # switches that are not tried together with another


def mistaken(x, **switches):
    """`reference.delta_rule` with faults, by the switches of `wrong`; None where none acts on these inputs."""
    return wrong(x, **switches) if acts(x, **switches) else None


def _all():
    for fault in mistakes("delta_rule"):
        for choice in fault.choices + fault.more if hasattr(fault.function, "switches") else ():
            switches = fault.function.switches(*choice)
            yield Explanation(fault.says(choice), tuple(switches.items()), bool(ALONE & switches.keys()))


EXPLANATIONS = tuple(_all())
SWAPPED = EXPLANATIONS[0].says


# ---- not finite ----------------------------------------------------------------------------------------


def diagnose(x, actual, ref):
    """Of which token and exponent a chunked kernel's NaN may come: [(sentence, place), ...], the likeliest first.

    In a chunk, exp(c_i) exp(-c_j), c the running sum of g, overflows in float32 where -c_j > 88.7; and c_i - c_j is NaN
    where both are -infinity.
    """
    if all((np.isfinite(a) == np.isfinite(r)).all() for a, r in zip(actual, ref, strict=True)):
        return []
    if any(np.isnan(a).any() for a in x.values() if isinstance(a, np.ndarray) and a.dtype.kind == "f"):
        return [("NaN of one token reaches others: those before it, or those that do not read it", "")]
    bad = np.argwhere(~np.isfinite(actual[0]) & np.isfinite(ref[0]))
    if x.get("g") is None or not len(bad):
        return []
    token, head = (int(i) for i in bad[0][:2])
    offsets = [0, len(x["q"])] if x.get("offsets") is None else [int(n) for n in x["offsets"]]
    first = max(n for n in offsets[:-1] if n <= token)
    last = min(n for n in offsets[1:] if n > token)
    g = np.asarray(x["g"], np.float64)[first:last, head].reshape(last - first, -1)
    return [found for kind in (_infinite, _overflown) if (found := _nearest(kind, g, token - first))]


def _nearest(kind, g, token):
    """(sentence, place) for the chunk length whose first row of a kind is nearest to the first bad token, or None."""
    found = []
    for C in (64, 32, 16):
        n, row = divmod(token, C)
        at, says, what = kind(g[n * C:(n + 1) * C])
        if at is not None:
            of = f", chunks of {C}" if n else ""  # what is in the first chunk tells nothing of its length
            found.append((abs(at - row) + (at > row), says, f"{what}chunk {n}, row {at}{of}"))
    return min(found, key=lambda f: f[0])[1:] if found else None


def _infinite(g):
    """(first row with a gate of -infinity or None, sentence, what)."""
    rows = np.isneginf(g).any(-1)
    says = "NaN from -infinity minus -infinity, sums of g that are subtracted"
    return int(rows.argmax()) if rows.any() else None, says, ""


def _overflown(g):
    """(first row whose sum is below -88.7 or None, sentence, what)."""
    c = np.cumsum(np.where(np.isneginf(g), 0.0, g), axis=0).min(-1)
    at = int((-c > LARGEST_EXPONENT).argmax())
    if -c[at] <= LARGEST_EXPONENT:
        return None, "", ""
    return at, "NaN from a positive exponent", f"exp({-c[at]:.0f}) where float32 ends at exp(88.7), "
