"""What the calls of a foreign run are: their tokens, their sequences, and how their arrays lie."""

from __future__ import annotations

import numpy as np

from .._arrays import as_array
from ..faults import Scene
from ..trace import Trace


def strange(call):
    """The names that are not of the form of a tap or a state."""
    of_model = "embed", "streams", "output_res", "collapsed", "norm", "logits", "tokens", "hidden"
    return [name for name in call if not name.startswith(("layers.", "before.layers.")) and name not in of_model]


def of_lone_tokens(x, shape):
    """Whether an array [n, 1, ..], read as n tokens of one sequence, may be of n sequences; `shape` is a tap's."""
    return x.ndim > 2 and x.shape[1] == 1 < len(x) and x.shape[1:] != shape


def scene_of(calls, nodes):
    """The Scene of calls.

    Raises
    ------
    ValueError
        If their offsets end elsewhere than their rows, or they are of other requests.
    """
    _check_slots([getattr(x, "meta", {}).get("slots") for x in calls])
    lengths = [length_of(x, nodes) for x in calls]
    offsets = [np.ravel(getattr(x, "meta", {}).get("offsets", [0, n])) for x, n in zip(calls, lengths)]
    for c, (n, o) in enumerate(zip(lengths, offsets)):
        if int(o[-1]) != n:
            raise ValueError(f"call {c} has offsets up to {o[-1]} and taps of {n} rows; a tap's first axis must be the "
                             "tokens, without one for the batch")
    return Scene(offsets, [getattr(x, "meta", {}).get("position") for x in calls])


def _check_slots(slots):
    """ValueError where the calls of an engine are of other requests, or have them in another order."""
    for c, found in enumerate(slots):
        if found and slots[0] and found != slots[0]:
            first, here = (", ".join(map(str, x)) for x in (slots[0], found))
            raise ValueError(f"call {c} has the requests of slots {here}, and call 0 those of {first}; take those of "
                             "one request: adapters.vllm.of_slot(calls, slot), or --slot")


def length_of(call, nodes):
    """Tokens of a call: rows of its first tap, but for logits, which may be those of last tokens alone."""
    tap = next((tap for tap in call if tap in nodes and tap != "logits"), "logits")
    return len(call[tap]) if tap in call else 0


def without_batch(calls, nodes):
    """(the calls, a note or ""): without a first axis of 1, where all taps have it in front of their tokens."""
    found = [_without_batch(x, nodes) for x in calls]
    if None in found or all(length_of(x, nodes) == 1 for x in found):
        return calls, ""
    return found, "arrays are [1, T, ..]: the first axis is read as a batch of one sequence"


def _without_batch(call, nodes):
    """A call whose taps, but for logits, are [1, T, ..] of one T; None where they are not."""
    taps = [tap for tap in call if tap in nodes and tap != "logits"]
    first = as_array(call[taps[0]], taps[0]) if taps else np.zeros(0)
    if not taps or not _in_batch(first, nodes[taps[0]]):
        return None
    T, arrays = first.shape[1], {tap: as_array(call[tap], tap) for tap in call}
    if not all(_in_batch(arrays[tap], nodes[tap]) and arrays[tap].shape[1] == T for tap in taps):
        return None
    plain = {tap: x[0] if tap in nodes and x.shape[:2] == (1, T) else x for tap, x in arrays.items()}
    return Trace(plain, call.meta) if hasattr(call, "meta") else plain


def _in_batch(x, node):
    """Whether an array is [1, T, ..]."""
    return x.ndim > 1 and x.shape[0] == 1 and x.size == x.shape[1] * int(np.prod(node.shape))


def rows_of_last(scene, arrays, node):
    """Rows that logits of last tokens alone are of, where arrays have one of each sequence in a call of more tokens;
    else none."""
    rows, width = [], int(np.prod(node.shape))
    for c, x in enumerate(arrays):
        pieces = sorted((p for p in scene.pieces if p.call == c and len(p.rows)), key=lambda p: p.source.start)
        every = np.concatenate([p.rows for p in pieces]) if pieces else np.arange(0)
        of_last = x.size == len(pieces) * width
        if not of_last and x.size != len(every) * width:
            return np.arange(0)
        rows.append(np.array([p.rows[-1] for p in pieces], int) if of_last else every)
    at = np.concatenate(rows)
    return at if len(at) < scene.T else np.arange(0)


def names_no_layer(calls, nodes):
    """A sentence where no tap of a layer is there, and most names are none of ours; else "" ."""
    names = list(calls[0])
    foreign = strange(names)
    if any(name.startswith("layers.") for name in names if name in nodes) or 2 * len(foreign) <= len(names):
        return ""
    known = next(tap for tap in nodes if tap.startswith("layers."))
    return (f"theirs has no tap of a layer of this model, and nothing can be judged: {len(foreign)} of its "
            f"{len(names)} names are none of ours, as {foreign[0]!r}; ours are as {known!r} (model.taps lists them)")


def wrong_kinds(config, calls):
    """A sentence where layers have the taps of another kind than they should."""
    apart, mixers = [], {spec.mixer for spec in config.layers}
    for i, spec in enumerate(config.layers):
        names = {tap.split(".")[2] for tap in calls[0] if tap.startswith(f"layers.{i}.") and tap.count(".") > 2}
        others = (mixers - {spec.mixer}) & names
        if others and spec.mixer not in names:
            apart.append((i, min(others), spec.mixer))
    if not apart:
        return ""
    words = ", ".join(f"{i} is {other} and must be {right}" for i, other, right in apart[:6])
    return f"WRONG: layer_pattern_off_by_one: layer {words}; {_PATTERNS[apart[0][2]]}"


_LISTS = "kda_layers and full_attn_layers of config.json count from 1"
_INTERVAL = "layer l, from 0, is full attention where (l + 1) mod full_attention_interval is 0"
_PATTERNS = {"kda": _LISTS, "mla": _LISTS, "gdn": _INTERVAL, "attn": _INTERVAL}
