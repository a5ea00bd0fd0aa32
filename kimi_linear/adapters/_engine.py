"""What `engine_hooks.py` recorded, as traces: its files, a names table of one engine, and the batch of each call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import Config
from ..dataflow import in_order
from ..errors import FormatError
from ..golden import Several, add, sort_experts
from ..load.safetensors import SafetensorsFile
from ..trace import Trace
from ..weight_shapes import attn_query_rows, gdn_channels, gdn_inputs
from ._layout import BEFORE, STATE, Layout, bring, places
from ._mapped import config_of

__all__ = ["ATTN_QKV", "GDN_BA", "GDN_QKVZ", "of_slot", "read", "table"]

FORMAT = "kimi_linear engine call 1"

# ---- products that hold several taps -------------------------------------------------------------------


def _inputs_of_gdn(parts):
    """Columns of a joint product of these parts, by key head where the checkpoint has them so, else one by one."""
    def columns(c: Config):
        taps = {part: f"{part}_proj" if part in "qkv" else part for part in parts}
        if c.gdn_inputs == "grouped":
            return {taps[part]: gdn_inputs(c)[part][1] for part in parts}
        n_v = c.gdn_v_heads * c.gdn_v_dim
        widths = {**{p: s.stop - s.start for p, s in gdn_channels(c).items()}, "z": n_v,
                  "b": c.gdn_v_heads, "a": c.gdn_v_heads}
        return _one_by_one({taps[part]: widths[part] for part in parts})

    return columns


def _inputs_of_attn(c: Config):
    """Of q_proj, k_proj and v_proj one after another; the query and the gate of each head lie together."""
    n_kv = c.attn_kv_heads * c.attn_head_dim
    queries = attn_query_rows(c)
    kv = _one_by_one({"q_and_gate": 2 * c.attn_heads * c.attn_head_dim, "k_proj": n_kv, "v": n_kv})
    return queries | {tap: kv[tap] for tap in ("k_proj", "v")}


def _one_by_one(widths):
    ends = np.cumsum(list(widths.values()))
    return {tap: np.arange(end - n, end) for (tap, n), end in zip(widths.items(), ends)}


GDN_QKVZ = Several("gdn.{}", ("q_proj", "k_proj", "v_proj", "z"), _inputs_of_gdn("qkvz"))
GDN_BA = Several("gdn.{}", ("b", "a"), _inputs_of_gdn("ba"))
ATTN_QKV = Several("attn.{}", ("q_proj", "gate", "k_proj", "v"), _inputs_of_attn)

# ---- files ---------------------------------------------------------------------------------------------


def table(names: Mapping[str, Mapping[str, str | Several]], config) -> dict[str, tuple[list[str], np.ndarray | None]]:
    """A names table spread over the layers of a model: array in the file -> the taps that it holds, and the order of
    its channels, if they do not lie tap by tap.

    `names` has the sections "model", "layer", and those of the kinds of layers. Taps are joined by '|', or a `Several`.
    In a tap ``{i-1}`` is the layer before, ``{last}`` the last. ``[1]`` behind a module takes one of what it has
    stacked.
    """
    last = config.n_layers - 1
    found = {path: ([tap.replace("{last}", str(last))], None) for path, tap in names["model"].items()}
    for i, spec in enumerate(config.layers):
        for section in ("layer", spec.mixer, spec.ffn):
            for path, taps in names[section].items():
                order = None
                if isinstance(taps, Several):
                    order = np.concatenate([taps.columns(config)[part] for part in taps.parts])
                    taps = " | ".join(map(taps.tap.format, taps.parts))
                if i == 0 and "{i-1}" in taps:
                    continue
                ours = [t.strip() for t in taps.replace("{i-1}", str(i - 1)).split("|")]
                full = [t if t.startswith("layers.") else f"{BEFORE * t.startswith(BEFORE)}layers.{i}."
                        f"{t.removeprefix(BEFORE)}" for t in ours]
                found[f"model.layers.{i}.{path}"] = full, order
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
    return Trace({tap: (x[n] if several else x) if tap.endswith(STATE) else x[a:b] for tap, x in trace.items()},
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
    arrays, modules, left_out, rows = {}, {}, [], about.get("rows")
    for name, (taps, order) in spread.items():
        path_of, _, part = name.partition("[")
        stored = next((n for n in (path_of, f"{path_of}/out", f"{path_of}/out.0") if n in file), None)
        if stored is None:
            continue
        x = file[stored].array()
        x = x[int(part[:-1])] if part else x
        ours = {t: known[t] for t in taps if t in known}
        if not ours:
            continue
        kind = next(iter(ours)).removeprefix(BEFORE).split(".", 2)[-1]
        found, lengths = bring(x, ours, Layout(axes.get(kind, ""), order=order), f"{path.name}:{stored}")
        T = len(about.get("tokens", ())) or None
        if lengths and T is not None and lengths[0] != T:
            left_out.append(f"{' | '.join(taps)}: {lengths[0]} rows of {T} tokens")
            continue
        add(arrays, {t: (x[:rows] if rows and lengths else x) for t, x in found.items()}, stored, modules)
    if not arrays:
        raise ValueError(f"{path} has no module of the table: it has {', '.join(list(file)[:3]) or 'nothing'}; "
                         f"the table has {', '.join(list(spread)[:3])}, ...")
    sort_experts(arrays)
    return Trace({t: arrays[t] for t in in_order(arrays)}, _meta(about, rows, left_out, file, source))


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
