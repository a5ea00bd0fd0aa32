"""A pasted log of llama.cpp's ``llama-eval-callback``: corner values and sums, beside a trace of ours.

    found = llama_log.compare(Path("log.txt").read_text(), model.trace(tokens), model=model)
    print(found)                                # a Report, as of kl.diff.traces

Each tensor is printed with up to three values from both ends of every axis, to four decimals, and the sum of all. What
lies between is not in the log, so that a tap "agrees" as far as its corners and its sum go; the report says so.

`NAMES` is the table of the graph's names, as ggml has them: ``name-layer``. Axes are ggml's ``ne`` from last to first.
Format from ggml-org/llama.cpp: common/debug.cpp and examples/eval-callback/eval-callback.cpp; names from
src/models/kimi-linear.cpp, qwen3next.cpp, qwen35.cpp, qwen35moe.cpp and src/llama-graph.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ..conventions import conventions
from ..dataflow import in_order, layer_of
from ..diff import metrics
from ..diff.traces import Divergence, Report, Row, threshold_for
from ._layout import BEFORE, Place, places
from ._layout import STATE as IS_STATE
from ._mapped import config_of

__all__ = ["NAMES", "Printed", "compare", "parse", "spread", "taps_of"]

#: Name in the graph, with its op in front where several nodes have the name -> tap, or taps joined along the channels,
#: by the kind of layer.
NAMES = {
    "model": {
        "model.embed_tokens": "embed", "model.input_embed": "embed", "inp_embd": "embed", "result_norm": "norm",
        "result_output": "logits",
    },
    "layer": {
        "attn_norm": "attn_norm", "ffn_inp": "mid", "attn_residual": "mid", "ffn_norm": "ffn_norm",
        "attn_post_norm": "ffn_norm", "l_out": "out",
    },
    "kda": {
        "g1 f_b(f_a(cur))": "kda.f", "kda_g1": "kda.g", "kda_beta": "kda.b", "attn_output": "kda.o",
        "new_state": "kda.state", "g2 g_b(g_a(cur_2d))": "kda.z", "kda_out": "kda.out",
    },
    "mla": {
        "mla_Q": "mla.q", "kv_cmpr_reshape": "mla.latent", "Kcur": "mla.latent | mla.k_shared", "mla_out": "mla.out",
    },
    "gdn": {
        **dict.fromkeys(("linear_attn_qkv_mixed", "qkv_mixed"), "gdn.q_proj | gdn.k_proj | gdn.v_proj"),
        "conv_output_silu": "gdn.q_conv | gdn.k_conv | gdn.v_conv", "a": "gdn.a", "alpha": "gdn.a", "gate": "gdn.g",
        "b": "gdn.b", "beta": "gdn.b", "beta_sigmoid": "gdn.beta", "attn_output": "gdn.o", "new_state": "gdn.state",
        "z": "gdn.z", "final_output": "gdn.o_norm", "linear_attn_out": "gdn.out",
    },
    "attn": {
        "Qcur_view": "attn.q_proj", "Qcur_reshaped": "attn.q_proj", "gate": "attn.gate", "gate_reshaped": "attn.gate",
        "MUL_MAT Kcur": "attn.k_proj", "MUL_MAT Vcur": "attn.v", "Qcur_normed": "attn.q_norm",
        "Kcur_normed": "attn.k_norm", "ROPE Qcur": "attn.q", "ROPE Kcur": "attn.k", "attn_pregate": "attn.o",
        "attn_gated": "attn.gated", "attn_output": "attn.out",
    },
    "dense": {
        "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_swiglu": "mlp.act", "ffn_gate_par": "mlp.act",
        "ffn_out": "mlp.out",
    },
    "moe": {
        "ffn_moe_logits": "moe.logits", "ffn_gate": "moe.shared_gate", "ffn_up": "moe.shared_up",
        "ffn_swiglu": "moe.shared_act", "ffn_gate_par": "moe.shared_act", "ffn_shexp": "moe.shared",
        "shared_expert_gate": "moe.shared_g", "ffn_shexp_gated": "moe.shared_gated", "ffn_out": "moe.out",
    },
}

#: The state's last two axes there.
STATE = conventions["ggml"]["delta_rule"].state
#: Half of the last decimal that is printed.
PRINTED = 0.5e-4
MOST = 3  # values from each end of an axis

_HEAD = re.compile(r"^.*?(?:ggml_debug|common_debug_cb_eval|debug_cb_eval): +(.+?) = \((\w+)\) +(\S+)\((.*)\) = "
                   r"\{(\d+), (\d+), (\d+), (\d+)\}\s*$")
_SUM = re.compile(r"^\s*sum\s*=\s*(\S+)\s*$")
_VALUE = re.compile(r"\.\.\.|[-+]?(?:nan|inf|\d+\.?\d*(?:[eE][-+]?\d+)?)")


@dataclass
class Printed:
    """One tensor of the log.

    Attributes
    ----------
    name : str
        Without the layer.
    layer : int or None
    op, dtype : str
    shape : tuple of int
        ``ne`` from last to first.
    values : dict of index to float
    sum : float or None
    run : int
        Number of the graph's evaluation in the log.
    """

    name: str
    layer: int | None
    op: str
    dtype: str
    shape: tuple[int, ...]
    values: dict = field(default_factory=dict, repr=False)
    sum: float | None = None
    run: int = 0


# ---- the log -------------------------------------------------------------------------------------------


def parse(text) -> list[Printed]:
    """The tensors of a log, in order.

    Raises
    ------
    ValueError
        If there is none; the message says what a line must look like.
    """
    found, open_one, seen, run, first = [], None, set(), 0, None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, layer = _layered(head[1])
            first = first or (name, layer)
            run += (name, layer) == first and bool(seen)
            seen.add((name, layer))
            shape = tuple(int(head[i]) for i in (8, 7, 6, 5))
            open_one = _Reader(Printed(name, layer, head[3], head[2], shape, run=run))
            found.append(open_one.tensor)
        elif open_one is not None:
            total = _SUM.match(line)
            if total:
                open_one.tensor.sum = _float(total[1])
            else:
                open_one.line(line)
    if not found:
        raise ValueError("the log has no tensor: its lines must be like \"ggml_debug:  attn_norm-0 = (f32)  MUL(...) = "
                         '{256, 5, 1, 1}", as llama-eval-callback prints them')
    return found


def _layered(name):
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return (found[1], int(found[2])) if found else (name, None)


class _Reader:
    """Places the numbers of a tensor's lines: brackets open and close axes, dots jump to an axis' end."""

    def __init__(self, tensor):
        self.tensor, self.index, self.next = tensor, [], {}

    def line(self, line):
        text = line.strip()
        if text.startswith("[") and text.rstrip(",").endswith("]"):
            self._row(text)
        elif text == "[":
            self._open()
        elif text.startswith("]"):
            self._close()
        elif text.startswith("..."):
            self._jump()

    def _place(self):
        """Where the number of the next block, inside those that are open, is kept."""
        return tuple(self.index)

    def _open(self):
        self.index.append(self.next.get(self._place(), 0))

    def _close(self):
        if self.index:
            last = self.index.pop()
            self.next[self._place()] = last + 1

    def _jump(self):
        """The blocks that follow are the last of their axis."""
        if len(self.index) < 4:
            self.next[self._place()] = max(self.tensor.shape[len(self.index)] - MOST, 0)

    def _row(self, text):
        if len(self.index) != 2:  # sequences and blocks are open, rows are next
            return
        row, at, size = self.next.get(self._place(), 0), 0, self.tensor.shape[3]
        for word in _VALUE.findall(text.lower()):
            if word == "...":
                at = max(size - MOST, at)
            elif at < size:
                self.tensor.values[(*self.index, row, at)] = _float(word)
                at += 1
        self.next[self._place()] = row + 1


def _float(text):
    try:
        return float(text)
    except ValueError:
        return float("nan")


# ---- beside a trace ------------------------------------------------------------------------------------


def taps_of(config) -> dict[tuple[str, int | None], list[str]]:
    """(name in the graph, layer) -> taps of a model, joined along the channels."""
    return {(name, None): [tap] for name, tap in NAMES["model"].items()} | spread(NAMES, ("layer",), config)


def spread(names, sections, config) -> dict[tuple[str, int | None], list[str]]:
    """The names of some sections, and of the kinds of each layer, with the taps of a model that they are."""
    found, known = {}, places(config)
    for i, spec in enumerate(config.layers):
        for section in (*sections, spec.mixer, spec.ffn):
            for name, taps in names[section].items():
                found[name, i] = [f"layers.{i}.{t.strip()}" for t in taps.split("|")]
    return {name: taps for name, taps in found.items() if all(t in known for t in taps)}


def compare(log, ours, *, model, run=0, threshold=None) -> Report:
    """Corner values and sums of a log beside a trace of the same tokens.

    Parameters
    ----------
    log : str or list of Printed
    ours : Trace
        Of the same tokens; made with ``states=True`` it has the states, too.
    model : Model or Config
    run : int
        Which evaluation of the graph: 0 is the first batch.
    threshold : float, optional
        As for `kimi_linear.diff.traces`; what printing rounds off is allowed besides.

    Returns
    -------
    Report
        A row a tap: ``tokens`` counts the rows that are off among those printed. The notes say how much was seen, what
        was left out, and where corners agree and sums do not.

    Raises
    ------
    ValueError
        If the log has no tensor of that run, or none whose tap is in the trace.
    """
    config = config_of(model)
    tensors = [t for t in (parse(log) if isinstance(log, str) else log) if t.run == run]
    if not tensors:
        raise ValueError(f"run is {run}; the log has no tensor of it")
    names, known = taps_of(config), places(config)
    rows, notes, unknown, lacking, seen = {}, [], 0, [], [0, 0]
    for tensor in tensors:
        taps = names.get((f"{tensor.op} {tensor.name}", tensor.layer), names.get((tensor.name, tensor.layer)))
        if taps is None or tensor.op == "VIEW" and len(taps) == 1 and not tensor.values:
            unknown += taps is None
            continue
        if any(t not in ours for t in taps):
            lacking += taps
            continue
        row, note = _row(tensor, taps, ours, known, threshold, seen)
        rows |= {row.tap: row} if row else {}
        notes += [note] if note else []
    if not rows:
        seen = ", ".join(sorted({t.name for t in tensors})[:6])
        raise ValueError(f"no tensor of the log can be laid beside the trace: "
                         f"{notes[0] if notes else f'it has {seen}'}")
    notes.insert(0, f"{seen[0]:,} of {seen[1]:,} values of these taps are in the log: corners and sums are compared")
    if unknown:
        notes.append(f"{unknown} tensors of the log have no tap")
    if lacking:
        notes.append(f"not in the trace: {', '.join(dict.fromkeys(lacking))}")
    rows = list(rows.values())
    done = {t for r in rows for t in r.tap.split(" | ")}
    return Report(rows, _first(rows), [n for n in ours if n in known and n not in done], [], notes)


def _row(tensor, taps, ours, known, threshold, seen):
    """(Row, note) of a tensor; None where its shape is not the tap's."""
    tap = " | ".join(taps)
    parts = [metrics.as_float64(ours[t], t) for t in taps]
    y = parts[0] if len(parts) == 1 else np.concatenate([p.reshape(len(p), -1) for p in parts], -1)
    place = known[taps[0]] if len(taps) == 1 else Place("TC", (y.shape[-1],))
    if tap.endswith(IS_STATE) and STATE == "VK":
        y = y.swapaxes(-1, -2)
    y, note = _as_theirs(y, tensor, place, tap)
    if y is None:
        return None, note
    at = [i for i in tensor.values if all(a < n for a, n in zip(i, y.shape))]
    if not at:
        return None, f"{tap}: the log has no values of {tensor.name}"
    got, want = np.array([tensor.values[i] for i in at]), np.array([y[i] for i in at])
    seen[0], seen[1] = seen[0] + len(at), seen[1] + y.size
    rms = metrics.measure(y, y).size or 1.0
    limit = (threshold_for(np.float32) if threshold is None else threshold)
    limit = limit + PRINTED / rms
    error = metrics.distance(got, want)[0] / rms
    token = np.array([_token(i, y.shape, place) for i in at])
    over = error > 8 * limit  # one value, not a row's rms
    worst = at[int(error.argmax())]
    notes = [note] if note else []
    if not over.any() and tensor.sum is not None and not _sum_agrees(tensor, y, limit * rms):
        notes.append(f"{tap}: the corners agree and the sum does not: {tensor.sum:g}, ours {y.sum():g}; the "
                     "difference is in what is not printed")
        over, worst = np.ones(len(at), bool), ()
    first = int(token[over].min()) if over.any() else None
    rms_error = float(np.sqrt((error ** 2).mean()))
    row = Row(tap, tuple(y.shape), (tensor.dtype, "float32"), rms_error, float(error.max()), float("nan"),
              tuple(int(i) for i in worst), first, len(set(token[over].tolist())), limit,
              nonfinite=int((~np.isfinite(got)).sum()))
    return row, "; ".join(notes)


def _as_theirs(y, tensor, place, tap):
    """Ours in the shape of theirs, and a note; None where that cannot be."""
    size = int(np.prod(tensor.shape))
    if y.size == size:
        return y.reshape(tensor.shape), ""
    if "T" in place.axes and size % place.width == 0 and size < y.size:
        n = size // place.width
        return y[-n:].reshape(tensor.shape), f"{tap}: the log has {n} of {len(y)} tokens, taken as the last"
    return None, (f"{tap}: {list(tensor.shape)} in the log and {list(y.shape)} in the trace; left out: are these the "
                  "same tokens?")


def _token(index, shape, place):
    """Row of a value, its axes being [sequences, tokens, ..]; 0 of a state."""
    if "T" not in place.axes:
        return 0
    flat = int(np.ravel_multi_index(index, shape))
    return flat // place.width


def _sum_agrees(tensor, y, error):
    """Whether the sum fits: that of all values as float32 adds them, or, of older builds, of those that are printed."""
    printed = sum(tensor.values.values())
    if abs(tensor.sum - printed) <= PRINTED * len(tensor.values) + 1e-6:
        return True
    with np.errstate(all="ignore"):
        total = np.float64(np.float32(y.sum()))
    if not np.isfinite([tensor.sum, total]).all():
        return metrics.distance(np.float64(tensor.sum), total)[0] == 0
    n, size = y.size, np.abs(y).sum()
    allowed = error * np.sqrt(n) * 4 + metrics.U * np.sqrt(n) * size + 1e-6 * abs(tensor.sum)
    return abs(tensor.sum - y.sum()) <= allowed


def _first(rows):
    order = {tap: i for i, tap in enumerate(in_order(r.tap.split(" | ")[0] for r in rows))}
    rows.sort(key=lambda r: order[r.tap.split(" | ")[0]])
    row = next((r for r in rows if not r.ok), None)
    if row is None:
        return None
    what = "a value is off by" if row.worst else "the sum is off, the corners by"
    sentence = (f"DIVERGES at {row.tap}, token {row.first}: {what} {row.largest:.2e} of the tap's rms, as far as the "
                f"log goes; the {rows.index(row)} taps before it agree")
    return Divergence(row.tap, layer_of(row.tap.removeprefix(BEFORE)), row.first, row.largest, row.threshold, sentence)
