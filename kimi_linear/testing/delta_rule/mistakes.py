"""What is tried to explain a wrong `delta_rule`: its faults in `kimi_linear.faults`, of the recurrence and of the
chunked form; and what NaN say of a chunked kernel."""

import functools
from collections import deque

import numpy as np

from ...faults import mistakes
from ...faults._delta import that_act, wrong
from ...faults._delta_chunk import TERMS, Chunks, longest
from ..plain import LOST
from ..spec import Explanation
from .cases import TOKENS

__all__ = ["EXPLANATIONS", "SWAPPED", "acting", "diagnose", "mistaken", "start"]

LARGEST_EXPONENT = 88.72  # of exp in float32
ALONE = {"border", "padding", "sums", "chunk", "rolled", "backwards"}  # switches that are tried with no other
START = 15  # tokens, fewer than a chunk has, that rule out most mistakes


def mistaken(x, chunk=None, **switches):
    """`reference.delta_rule` with faults, by the switches of `wrong`, or with one of the chunked form: `chunk` is its
    name and a length. None where none acts on these inputs."""
    if chunk is None:
        on = that_act(x, **switches)
        return wrong(x, **on) if on or not any(switches.values()) else None
    name, length = chunk
    return _shared(x).chunks.wrong(TERMS[name], length)


def acting(x, switches):
    """Switches of which those that do the same are equal: all chunks that no sequence fills are one, and of two heads
    the next is the one before."""
    if switches.get("rolled", "")[1:] == ("one before",) and x["v"].shape[1] == 2:
        return {"rolled": (switches["rolled"][0], "next")}
    if "chunk" not in switches:
        return switches
    name, length = switches["chunk"]
    return {"chunk": (name, None if length is None or length > longest(x) else length)}


def start(x, switches):
    """The first tokens of many, where a mistake's results for them are the same without the others."""
    return None if len(x["q"]) <= 2 * START or _looks_ahead(**switches) else _shared(x).start


def _looks_ahead(chunk=(None,), gate=None, **switches):
    return gate == "next" or chunk[0] in AHEAD


class _Shared:
    """What the mistakes of one call share."""

    def __init__(self, x):
        self.x = x

    @functools.cached_property
    def chunks(self):
        return Chunks(self.x)

    @functools.cached_property
    def start(self):
        x = {n: a[:START] if n in TOKENS and a is not None else a for n, a in self.x.items()}
        return x if x.get("offsets") is None else x | {"offsets": np.minimum(x["offsets"], START)}


_held = deque(maxlen=2)  # of the last inputs and of their start: the mistakes of a case are tried one after another


def _shared(x):
    for shared in tuple(_held):
        if shared.x is x:
            return shared
    _held.append(_Shared(x))
    return _held[-1]


def _all():
    for fault in mistakes("delta_rule"):
        for choice in fault.choices + fault.more if hasattr(fault.function, "switches") else ():
            switches = fault.function.switches(*choice)
            yield Explanation(fault.says(choice), tuple(switches.items()), bool(ALONE & switches.keys()),
                              "border" in switches)


EXPLANATIONS = tuple(_all())
AHEAD = {f.name for f in mistakes("delta_rule") if f.looks_ahead}
SWAPPED = EXPLANATIONS[0].says


# ---- not finite ----------------------------------------------------------------------------------------


def diagnose(x, actual, ref):
    """Of which token and exponent a chunked kernel's NaN may come: [(sentence, place), ...], the likeliest first.

    In a chunk, exp(c_i) exp(-c_j), c the running sum of g, overflows in float32 where -c_j > 88.7; and c_i - c_j is NaN
    where both are -infinity.
    """
    if all((np.isfinite(a) == np.isfinite(r)).all() for a, r in zip(actual, ref, strict=True)):
        return []
    if any(np.isnan(a).any() for a in x.values() if isinstance(a, np.ndarray) and a.dtype.kind not in "iu"):
        if any((~np.isfinite(a) & np.isfinite(r)).any() for a, r in zip(actual, ref, strict=True)):
            return [("NaN of one token reaches others: those before it, or those that do not read it", "")]
        return [(LOST, "")]
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
