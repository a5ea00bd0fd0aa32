"""What `engine_hooks.py` recorded, as traces: its files, a names table of one engine, and the batch of each call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..dataflow import in_order
from ..errors import FormatError
from ..load.safetensors import SafetensorsFile
from ..trace import Trace
from ._layout import BEFORE, Layout, bring, places
from ._mapped import config_of

__all__ = ["of_slot", "read", "table"]

FORMAT = "kimi_linear engine call 1"


def table(names: Mapping[str, Mapping[str, str]], config) -> dict[str, str]:
    """A names table spread over the layers of a model: array in the file -> tap, or taps joined by '|'.

    `names` has the sections "model", "layer", "kda", "mla", "dense" and "moe". In a tap ``{i-1}`` is the layer before,
    ``{last}`` the last. ``[1]`` behind a module takes one of what it has stacked.
    """
    last = config.n_layers - 1
    found = {path: tap.replace("{last}", str(last)) for path, tap in names["model"].items()}
    for i, spec in enumerate(config.layers):
        for section in ("layer", spec.mixer, spec.ffn):
            for path, taps in names[section].items():
                if i == 0 and "{i-1}" in taps:
                    continue
                ours = [t.strip() for t in taps.replace("{i-1}", str(i - 1)).split("|")]
                full = [t if t.startswith("layers.") else f"{BEFORE * t.startswith(BEFORE)}layers.{i}."
                        f"{t.removeprefix(BEFORE)}" for t in ours]
                found[f"model.layers.{i}.{path}"] = " | ".join(full)
    return found


def read(folder, names, axes, model, source) -> list[Trace]:
    """The traces of a folder, one for each recorded call, in order.

    Parameters
    ----------
    folder : str or path
    names : mapping
        For `table`.
    axes : mapping from the last part of a tap to letters
        Where theirs does not lie as ours.
    model : Model or Config
    source : str
    """
    config, folder = config_of(model), Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; it must be the folder that engine_hooks.attach was given")
    files = sorted(folder.glob("call-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no call-*.safetensors; was the model run, in eager mode, after attach?")
    spread, known = table(names, config), places(config)
    return [_call(path, spread, axes, known, source) for path in files]


def of_slot(traces, slot=None) -> list[Trace]:
    """Of recorded calls the rows of one request, call by call; by default the request that came first.

    Raises
    ------
    ValueError
        If no call has such a slot; the message names those that there are.
    """
    slots = dict.fromkeys(s for t in traces for s in t.meta.get("slots", ()))
    if slot is None and slots:
        slot = next(iter(slots))
    if slot not in slots:
        raise ValueError(f"slot is {slot}; the calls have {', '.join(map(str, slots)) or 'no slots'}")
    return [_part(t, t.meta["slots"].index(slot)) for t in traces if slot in t.meta.get("slots", ())]


def _part(trace, n):
    """The n-th sequence of a call."""
    a, b = trace.meta["offsets"][n:n + 2]
    meta = {k: v for k, v in trace.meta.items() if k not in ("layout", "slots")}
    meta |= {"offsets": [0, b - a], "slots": [trace.meta["slots"][n]]}
    if "tokens" in meta:
        meta["tokens"] = meta["tokens"][a:b]
    if "position" in meta:
        meta["position"] = [meta["position"][n]]
    several = len(trace.meta["slots"]) > 1
    return Trace({tap: (x[n] if several else x) if tap.endswith("kda.state") else x[a:b] for tap, x in trace.items()},
                 meta)


def _call(path, spread, axes, known, source):
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise FormatError(f"its format is {file.metadata.get('format')!r}; it must be {FORMAT!r}", str(path))
    if "world" in file.metadata:
        raise ValueError(f"{path} is of one of {file.metadata['world']} ranks, which have a part of the heads each; "
                         "record with one rank")
    about = {k: json.loads(v) for k, v in file.metadata.items()
             if k in ("tokens", "positions", "offsets", "slots", "rows", "layout")}
    arrays, left_out, rows = {}, [], about.get("rows")
    for name, taps in spread.items():
        path_of, _, part = name.partition("[")
        stored = next((n for n in (path_of, f"{path_of}/out", f"{path_of}/out.0") if n in file), None)
        if stored is None:
            continue
        x = file[stored].array()
        x = x[int(part[:-1])] if part else x
        ours = {t.strip(): known[t.strip()] for t in taps.split("|") if t.strip() in known}
        kind = next(iter(ours)).removeprefix(BEFORE).split(".", 2)[-1]
        found, lengths = bring(x, ours, Layout(axes.get(kind, "")), f"{path.name}:{stored}")
        T = len(about.get("tokens", ())) or None
        if lengths and T is not None and lengths[0] != T:
            left_out.append(f"{taps}: {lengths[0]} rows of {T} tokens")
            continue
        arrays |= {t: (x[:rows] if rows and lengths else x) for t, x in found.items()}
    if not arrays:
        raise ValueError(f"{path} has no module of the table: it has {', '.join(list(file)[:3]) or 'nothing'}; "
                         f"the table has {', '.join(list(spread)[:3])}, ...")
    _sort_experts(arrays)
    return Trace({t: arrays[t] for t in in_order(arrays)}, _meta(about, rows, left_out, file, source))


def _sort_experts(arrays):
    """Ascending expert ids in each row."""
    for tap in [t for t in arrays if t.endswith("moe.ids")]:
        arrays[tap] = np.sort(arrays[tap], axis=-1)


def _meta(about, rows, left_out, file, source):
    tokens = about.get("tokens", [])[:rows]
    positions = about.get("positions", [])[:rows]
    offsets = about.get("offsets") or _runs(positions) or [0, len(tokens)]
    meta = {"source": source, "call": int(file.metadata["call"]), "offsets": offsets, "layout": about.get("layout", {})}
    meta |= {"tokens": tokens} if tokens else {}
    meta |= {"slots": about["slots"][:len(offsets) - 1]} if about.get("slots") else {}
    if positions:
        starts = [positions[a] for a, b in zip(offsets, offsets[1:]) if b > a]
        longest = max(b - a for a, b in zip(offsets, offsets[1:]))
        meta["position"] = starts
        meta["kind"] = "prefill" if not any(starts) else "decode" if all(starts) and longest == 1 else "mixed"
    dtypes = [v["dtype"] for k, v in meta["layout"].items() if "/out" in k]
    meta |= {"dtype": max(set(dtypes), key=dtypes.count)} if dtypes else {}
    return meta | ({"left_out": left_out} if left_out else {})


def _runs(positions):
    """Offsets of sequences where nobody says: a sequence ends where the positions do not rise by 1."""
    if not positions:
        return None
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return [0, *cuts.tolist(), len(positions)]
