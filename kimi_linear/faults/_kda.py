"""Faults of delta nets: convolution, norms of q and k, gate, write rate and the delta rule."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .. import reference
from ..reference_delta import of_value_heads
from . import _delta, _delta_chunk, _l2
from . import scene as rules
from ._delta import wrong
from ._fault import CALL, LONG, RESTORED, RUN, SEVERAL, SPLIT, STRONG, Fault, carried, changed, in_blocks
from .site import Call, Site

BLOCKS = ((8,), (16,), (32,), (64,), (128,), (256,), (512,), (1024,), (2048,))

# ---- the delta rule, over several calls, and in chunks; its other faults are in _delta -------------------


def recurrence(q, k, v, g, beta, *, offsets=None, **switches) -> np.ndarray:
    """The outputs [T, H, V] of `wrong`, token by token."""
    return wrong(dict(q=q, k=k, v=v, g=g, beta=beta, offsets=offsets), **switches)[0]


def read(S, x):
    """S^T x of each head."""
    return np.einsum("hkv,hk->hv", S, x)


def _over_branches(site, run):
    """`run`(rows, rows of the past among them) for each branch, the results of its own rows in their places."""
    out = np.empty(site["v"].shape)
    for past, own in site.scene.branches():
        out[own] = run(np.concatenate([past, own]), len(past))[len(past):]
    return out


def turned_between_calls(site: Site, which: str):
    """The state is [V, K] where a call leaves it and [K, V] where the next takes it up, or the reverse."""
    q, k, v, g, beta = (site[a] for a in ("q", "k", "v", "g", "beta"))
    if which != "left" and k.shape[-1] == v.shape[-1]:
        return None
    begins = {int(p.rows[0]) for p in site.scene.pieces if not p.first and len(p.rows)}

    def run(rows, skip):
        turned = {t: which for t, row in enumerate(rows) if t and int(row) in begins}
        return wrong({**site.args, **dict(zip("qkv", (q[rows], k[rows], v[rows]))), "g": g[rows], "beta": beta[rows],
                      "offsets": None}, turned=turned)[0]

    return _over_branches(site, run)


def lost_at_one(site: Site, place: str):
    """One call, of all sequences or of one, begins with nothing."""
    lost = [p for p in site.scene.pieces if place in p.places and not p.first and len(p.rows)]
    return site.run(branches=site.scene.branches(rules.lost_at(place))) if lost else None


def factored_chunks(site: Site, chunk: int):
    """Chunks with exp(c_i) exp(-c_j) in place of exp(c_i - c_j), in float32: the second factor overflows."""
    q, k, g, v, beta = (site[a] for a in ("q", "k", "g", "v", "beta"))
    if not (g.min(initial=0) < -88 / chunk) or (g > 0).any():
        return None
    q, k, g = of_value_heads(q, k, g, v.shape[1], None, site.args.get("head_map", "grouped"))
    q, k, g, v, beta = (x.astype(np.float32) for x in (q, k, g, v, beta))
    K = q.shape[-1]

    def run(rows, skip):
        S, o = np.zeros((q.shape[1], K, v.shape[-1]), np.float32), []
        for i in range(0, len(rows), chunk):
            r = rows[i:i + chunk]
            y, S = _factored(q[r], k[r], v[r], g[r], beta[r], S)
            o.append(y)
        return np.concatenate(o)

    return _over_branches(site, run)


def subtracted_chunks(site: Site, chunk: int):
    """`chunk_decays_subtracted` at a site."""
    return next(f for f in _delta.FAULTS if f.name == "chunk_decays_subtracted").function(site, chunk)


def _factored(q, k, v, g, beta, S):
    c = np.cumsum(g, axis=0)
    up, down = np.exp(c), np.exp(-c)
    L = np.tril(np.einsum("ihk,jhk->hij", k * up, k * down), -1) * beta.T[:, :, None]
    P = np.tril(np.einsum("ihk,jhk->hij", q * up, k * down))
    d = np.zeros_like(v)
    for i in range(len(q)):
        d[i] = beta[i][:, None] * (v[i] - read(S, up[i] * k[i])) - np.einsum("hj,jhv->hv", L[:, i, :i], d[:i])
    o = np.einsum("ihk,hkv->ihv", q * up, S) + np.einsum("hij,jhv->ihv", P, d)
    return o, up[-1][:, :, None] * S + np.einsum("jhk,jhv->hkv", up[-1] * down * k, d)


# ---- convolution -----------------------------------------------------------------------------------


def by_calls(function):
    """A fault of one call, in a run: each call begins with the history that the call before it handed on."""
    def of_run(call, *choice):
        if not isinstance(call, Site):
            return function(call, *choice)
        if call.scene.is_restored:
            return None
        y, history = np.zeros(call["x"].shape), None
        for p in call.scene.pieces:
            if len(p.rows):
                one = Call(call.op, {**call.args, "x": call["x"][p.rows], "history": None if p.first else history})
                found = function(one, *choice)
                y[p.rows], history = one.results() if found is None else found
        return y

    return of_run


def delayed(call, n: int):
    """Reads n tokens earlier (later, where n < 0) than it should."""
    def conv(x, history=None, offsets=None, **rest):
        x, w = reference.f64(x), reference.f64(rest["w"])
        ranges, y, before = reference.sequences(len(x), offsets), np.zeros(x.shape), w.shape[1] - 1
        histories = np.zeros((len(ranges), before, x.shape[1]))
        if history is not None:
            histories[:] = history
        for r, own in zip(ranges, histories):
            zeros, rows = np.zeros((abs(n), x.shape[1])), [own, x[r]]
            stream = np.concatenate([zeros, *rows] if n > 0 else [*rows, zeros])
            first = before - min(n, 0)
            y[r] = reference.short_conv(stream, **rest)[0][first:first + r.stop - r.start]
        return y, reference.short_conv(x, history=history, offsets=offsets, **rest)[1]

    return call.results(by=conv)


def without_history(call):
    """Every call begins with zeros."""
    return call.results(history=None) if call.args.get("history") is not None else None


def history_turned(call):
    """The history is taken with the newest row first."""
    history = call.args.get("history")
    return None if history is None else call.results(history=np.asarray(history)[..., ::-1, :])


def history_moved(call, rows: int):
    """The history is read one row later, 1, or earlier, -1, with zeros where it has no row."""
    history = call.args.get("history")
    if history is None or np.shape(history)[-2] == 0:
        return None
    moved, (to, of) = np.zeros(np.shape(history)), (np.s_[:-1], np.s_[1:])[::rows]
    moved[..., to, :] = np.asarray(history)[..., of, :]
    return call.results(history=moved)


def history_too_early(call):
    """The history that is handed on ends before the last token."""
    offsets = call.args.get("offsets")
    rows = reference.sequences(len(call["x"]), offsets)
    keep = np.concatenate([np.arange(r.start, max(r.stop - 1, r.start)) for r in rows])
    lengths = [max(r.stop - 1 - r.start, 0) for r in rows]
    before = None if offsets is None else np.cumsum([0, *lengths])
    return call.run(), call.results(x=call["x"][keep], offsets=before)[1]


def history_kept(call):
    """The history that is handed on is the one that came."""
    y, after = call.results()
    before = call.args.get("history")
    return y, np.zeros_like(after) if before is None else reference.f64(before).reshape(after.shape)


def turned_after(call):
    """The history is handed on with the newest row first."""
    y, after = call.results()
    return y, after[..., ::-1, :]


def history_without_the_past(call):
    """Of fewer than W - 1 tokens: zeros for what came before them."""
    return call.run(), call.results(history=None)[1]


def history_of_outputs(call, activated: str):
    """The history that is handed on holds outputs, with their activation or without."""
    y, after = call.results()
    if activated != "with" and call.args.get("activation") is None:
        return None
    outputs = y if activated == "with" else call.run(activation=None)
    return y, call.results(x=outputs)[1].reshape(after.shape)


def packed_as_one(call):
    """offsets are ignored: rows of the sequence before it are in a sequence's convolution."""
    offsets = call.args.get("offsets")
    if offsets is None:
        return None
    history = call.args.get("history")
    first = None if history is None else np.asarray(history)[0]
    return call.run(offsets=None, history=first)


def histories_rolled(call, whose):
    """Each sequence has the history of its neighbour."""
    history = call.args.get("history")
    if history is None or call.args.get("offsets") is None or len(history) < 2:
        return None
    return call.results(history=np.roll(history, -1 if whose == "next" else 1, axis=0))


def activated_inputs(call):
    """SiLU before the convolution, and none behind it."""
    history = call.args.get("history")
    return call.run(x=reference.silu(call["x"]), activation=None,
                    history=None if history is None else reference.silu(history))


def swapped_histories(site: Site, other: str):
    """Behind the start of a call lies the history of another of q, k and v."""
    mixer, tap = site.node.tap.split(".")[2:]
    own, x = tap[0], site.sibling(f"{mixer}.{other}_proj")
    if own == other or x is None or x.shape != site["x"].shape:
        return None
    return _between_calls(site, x)


def activated_history(site: Site):
    """The history holds outputs of the convolution, where its inputs belong."""
    y = site.run()
    return _between_calls(site, y)


def _between_calls(site, x):
    branches = [rules.Branch(past, p.rows) for p, past in site.scene.pasts()]
    return site.run(branches=branches, past={"x": x})


# ---- norms of q and k, gate --------------------------------------------------------------------------


def a_log(site):
    return np.log(site["rate"])


def _unbounded(function):
    """Where the gate has no lower bound alone."""
    return lambda call: function(call) if call.args.get("lower_bound") is None else None


def _bounded(function):
    """Where the gate has a lower bound alone."""
    return lambda call, *choice: function(call, *choice) if call.args.get("lower_bound") is not None else None


def cut_off(call):
    """-rate softplus(f + dt_bias), and no less than the lower bound; None where nothing is."""
    g = call.run(lower_bound=None)
    return np.maximum(g, call["lower_bound"]) if (g < call["lower_bound"]).any() else None


def _rate(call):
    return call["rate"].reshape(-1, *[1] * (call["f"].ndim - 2))


def _sum(call):
    return call["f"] + call["dt_bias"].reshape(call["f"].shape[1:])


def no_softplus(call):
    return -_rate(call) * _sum(call)


def rate_inside(call):
    return -reference.softplus(_rate(call) * _sum(call))


def bias_outside(call):
    """-rate (softplus(f) + dt_bias)."""
    return -_rate(call) * (reference.softplus(call["f"]) + _sum(call) - call["f"])


def softplus_to(limit):
    """softplus(x) = x above a threshold: what is left out is exp(-threshold) of x."""
    def function(call):
        x = _sum(call)
        with np.errstate(over="ignore"):
            y = np.where(x > limit, x, np.log1p(np.exp(x)))
        return -_rate(call) * y if (x > limit).any() else None

    return _unbounded(function)


def softplus_in_steps(call):
    """log(1 + exp(x)), each step in float32: what 1 + exp(x) rounds off is lost, where x is far below 0."""
    x = _sum(call).astype(np.float32)
    with np.errstate(over="ignore"):
        y = np.log((np.float32(1) + np.exp(x)).astype(np.float64))
    return -_rate(call) * np.where(x > 20, x, y)


def overflowing_softplus(call):
    """log(1 + exp(x)) in float32, without a threshold."""
    x = _sum(call).astype(np.float32)
    return -_rate(call) * np.where(x > 88.72, np.inf, reference.softplus(x))


def a_log_as_decay(call):
    """g = exp(A_log) softplus(f + dt_bias), a growth."""
    return -call.run()


# ---- sums of gates -----------------------------------------------------------------------------------


def of_chunks(change):
    """c of each chunk [n, ...], changed by a function of it and of its g."""
    def function(call, *choice):
        g, c = call["g"], call.run().copy()
        for r in reference.sequences(len(g), call.args.get("offsets")):
            for first in range(r.start, r.stop, call.args.get("chunk", 64)):
                p = slice(first, min(first + call.args.get("chunk", 64), r.stop))
                c[p] = change(c[p], g[p], *choice)
        return c

    return function


def from_the_right(c, g):
    return np.cumsum(g[::-1], axis=0)[::-1]


def exclusive(c, g):
    return np.concatenate([np.zeros_like(c[:1]), c[:-1]])


def narrow_sums(c, g):
    """bfloat16 after each addition."""
    out = np.empty_like(c)
    running = np.zeros(c.shape[1:])
    for i, row in enumerate(g):
        running = out[i] = (running + row).astype(ml_dtypes.bfloat16).astype(np.float64)
    return out


def sums_over_sequences(call):
    return call.run(offsets=None) if call.args.get("offsets") is not None else None


DELTA, CONV, GATE, SUM = ("delta_rule",), ("short_conv",), ("decay_gate",), ("decay_cumsum",)
CARRYING = (*DELTA, *CONV, "latent_attention", "attention")
KDA, FLA, GGML = "arXiv:2510.26692, equation 1", "flash-linear-attention", "llama.cpp"

FAULTS = (
    *_delta.FAULTS,
    *_delta_chunk.FAULTS,
    Fault("state_transposed_between_calls", "the state is left as [V, K] and taken up as [K, V]", DELTA,
          turned_between_calls, SPLIT, choices=(("left",), ("taken up",)), each="the state is {} as [V, K], on the "
          "other side of a call as [K, V]", source="ggml and MLX keep [V, K], flash-linear-attention [K, V]", use=RUN),
    Fault("chunk_overflow", "a chunk multiplies by exp(-c_j) alone, which overflows", DELTA, factored_chunks, STRONG,
          choices=((64,), (32,), (16,), (128,)), source="float32 exp overflows above 88.7", use=RUN, looks_ahead=True),
    Fault("state_lost_between_calls", "every call begins with an empty state", CARRYING,
          carried(rules.lost), SPLIT, source="a port's prefill in batches", use=RUN),
    Fault("state_lost_at_one_call", "one call begins with an empty state", CARRYING, lost_at_one, SPLIT,
          choices=(("call 1",), ("call 2",), ("call 2, sequence 0",)), each="{} begins with an empty state",
          source="a slot that was taken for a new request", of_call=True, rare=True, use=RUN),
    Fault("state_lost_between_blocks", "every block of a call begins with an empty state",
          CARRYING, in_blocks, LONG, choices=BLOCKS, source=f"{GGML}: ubatch boundaries", use=RUN),
    Fault("state_leaks_between_sequences", "a sequence begins with the state of the one before it",
          CARRYING, carried(rules.leaked), SEVERAL, source="packed batches without offsets", use=RUN),
    Fault("state_not_rolled_back", "truncate leaves the state as it was", CARRYING,
          carried(rules.not_rolled_back), RESTORED, source=f"{GGML}: recurrent memory cannot drop single tokens",
          use=RUN),
    Fault("snapshot_without_state", "what is put back lacks this op's state (a snapshot without conv history)",
          (*DELTA, *CONV), carried(rules.empty_after_restore), RESTORED, source="prompt caches of servers", use=RUN),
    Fault("conv_taps_reversed", "the last tap is put on the oldest token", CONV, changed(w=lambda s: s["w"][:, ::-1]),
          source="torch's conv1d correlates; a convolution by the book turns the taps round"),
    Fault("conv_off_by_one", "the convolution reads one token too early, or too late", CONV, by_calls(delayed),
          choices=((1,), (-1,)), source="a padding of W in place of W - 1", looks_ahead=True),
    Fault("conv_silu_missing", "no SiLU after the convolution", CONV, changed(activation=lambda s: None),
          source="arXiv:2510.26692, section 4"),
    Fault("conv_silu_twice", "SiLU after the convolution, and once more", CONV, lambda s: reference.silu(s.run()),
          source="fused kernels have the activation inside"),
    Fault("conv_histories_swapped", "the history of another of q, k and v is taken up", CONV, swapped_histories, SPLIT,
          choices=(("q",), ("k",), ("v",)), source=f"{GGML}: one buffer [q|k|v] for the three histories", use=RUN),
    Fault("conv_history_of_outputs", "the history holds outputs, where inputs belong", CONV, activated_history, SPLIT,
          source="arXiv:2510.26692, section 4", use=RUN),
    Fault("conv_history_ignored", "the history is ignored: every call begins with zeros", CONV, without_history,
          use=CALL),
    Fault("conv_history_turned", "the history is read with the newest row first", CONV,
          by_calls(history_turned), SPLIT),
    Fault("conv_history_not_renewed", "the history that is handed on is the one that came", CONV, history_kept,
          use=CALL),
    Fault("conv_hands_on_turned", "the history that is handed on has the newest row first", CONV, turned_after,
          use=CALL),
    Fault("conv_history_cut", "the history that is handed on lacks what came before a short call", CONV,
          history_without_the_past, use=CALL),
    Fault("conv_hands_on_outputs", "the history that is handed on holds outputs, not inputs", CONV, history_of_outputs,
          choices=(("with",), ("before",)), each="the history that is handed on holds outputs, not inputs: {} their "
          "activation", use=CALL),
    Fault("conv_hands_on_too_early", "the history that is handed on ends one row early", CONV,
          by_calls(history_too_early), SPLIT),
    Fault("conv_history_off_by_one", "the history is read one row off", CONV, by_calls(history_moved), SPLIT,
          choices=((1,), (-1,)), each="the history is read one row off ({:+d})"),
    Fault("conv_offsets_ignored", "offsets are ignored: sequences run into each other", CONV, packed_as_one, use=CALL),
    Fault("conv_histories_rolled", "a sequence has the history of another", CONV, histories_rolled,
          choices=(("next",), ("one before",)), each="each sequence has the history of the {}", use=CALL,
          source="slots of a batch, taken one for another"),
    Fault("conv_silu_before", "SiLU is before the convolution, not behind it", CONV, activated_inputs, use=CALL),
    Fault("conv_taps_transposed", "w is read as [W, C]", CONV,
          changed(w=lambda s: s["w"].reshape(s["w"].shape[::-1]).T), use=CALL,
          source="vLLM and Ascend's kernels keep the taps as [W, C]"),
    Fault("conv_taps_of_next_channel", "each channel has the taps of the next", CONV,
          changed(w=lambda s: np.roll(s["w"], -1, axis=0)), use=CALL),
    *_l2.FAULTS,
    Fault("dt_bias_twice", "dt_bias is added twice", GATE, changed(dt_bias=lambda s: 2 * s["dt_bias"]),
          source=f"{FLA}: the kernel adds it; so did the caller"),
    Fault("dt_bias_missing", "dt_bias is not added", GATE, changed(dt_bias=lambda s: 0 * s["dt_bias"]), source=FLA),
    Fault("a_log_raw", "A_log is used in place of exp(A_log)", GATE, changed(rate=a_log),
          source=f"{GGML}: the converter stores -exp(A_log)"),
    Fault("a_log_negated", "exp(-A_log) is used in place of exp(A_log)", GATE, changed(rate=lambda s: 1 / s["rate"]),
          source="the minus of -exp(A_log), put inside", use=RUN),
    Fault("rate_exponentiated", "exp is taken of rate, which is exp(A_log) already", GATE,
          changed(rate=lambda s: np.exp(s["rate"])), use=CALL, source="a checkpoint holds A_log"),
    Fault("a_log_without_minus", "exp(A_log) softplus(...) without the minus: the state grows", GATE, a_log_as_decay,
          source=f"{GGML}: the converter stores -exp(A_log)"),
    Fault("softplus_missing", "-rate (f + dt_bias)", GATE, _unbounded(no_softplus), source=KDA),
    Fault("softplus_of_product", "-softplus(rate (f + dt_bias))", GATE, _unbounded(rate_inside), source=KDA),
    Fault("gate_bounded", "the bounded gate, -5 sigmoid(rate (f + dt_bias)), for the unbounded one", GATE,
          _unbounded(lambda s: s.run(lower_bound=-5.0)),
          source=f"{FLA}: lower_bound, which Kimi K3 uses"),
    Fault("gate_cut_off", "-rate softplus(f + dt_bias) cut off at lower_bound, for lower_bound sigmoid(..)", GATE,
          _bounded(cut_off), source="tokenspeed, pull request 847"),
    Fault("gate_unbounded", "-rate softplus(f + dt_bias), the gate without a bound, for the bounded one", GATE,
          _bounded(changed(lower_bound=lambda s: None)), source="Kimi-Linear has no gate_lower_bound"),
    Fault("gate_bound_twice", "the bounded gate is multiplied by its bound again", GATE,
          _bounded(lambda s, sign: sign * s["lower_bound"] * s.run()), choices=((1,), (-1,)),
          each="the bounded gate is multiplied by {:+d} times its bound again",
          source="a kernel that has the bound, and a caller that applies it"),
    Fault("gate_bounded_without_rate", "the bounded gate lacks its rate: lower_bound sigmoid(f + dt_bias)", GATE,
          _bounded(changed(rate=lambda s: np.ones_like(s["rate"]))),
          source=f"{FLA}, pull request 1107: A_log is optional there"),
    Fault("gate_exponentiated", "exp(g) is handed on where g belongs", GATE, lambda s: np.exp(s.run()),
          source="kernels differ in which of the two they take"),
    Fault("gate_bias_outside", "dt_bias is added behind the softplus", GATE, _unbounded(bias_outside), use=CALL),
    Fault("gate_in_log2", "the gate is in log2: g log2(e)", GATE, lambda s: s.run() / np.log(2), use=CALL,
          source=f"{FLA}: chunk kernels work in log2"),
    Fault("softplus_threshold", "softplus(x) is x above a threshold of 10", GATE, softplus_to(10.0), use=CALL,
          source="torch's softplus has 20, which float32 does not see"),
    Fault("softplus_in_steps", "softplus as log(1 + exp(x)) in float32: digits are lost where x is far below 0", GATE,
          _unbounded(softplus_in_steps), source=f"{GGML}: ggml's softplus; log1p keeps them"),
    Fault("softplus_overflow", "log(1 + exp(x)) overflows float32", GATE, _unbounded(overflowing_softplus), use=CALL),
    Fault("gate_heads_rolled", "each head has the rate of the next", GATE, changed(rate=lambda s: np.roll(s["rate"],
                                                                                                          -1)),
          use=CALL),
    Fault("sums_across_chunks", "sums go on over the borders of chunks", SUM,
          lambda s: s.run(chunk=max(len(s["g"]), 1)), use=CALL),
    Fault("sums_exclusive", "each sum ends before its own token", SUM, of_chunks(exclusive), use=CALL),
    Fault("sums_from_the_right", "sums run from the end of the chunk", SUM, of_chunks(from_the_right), use=CALL,
          source=f"{FLA}: reverse=True, of the backward pass"),
    Fault("sums_in_log2", "sums are in log2: multiplied by log2(e)", SUM, lambda s: s.run() / np.log(2), use=CALL,
          source=f"{FLA}: chunk_local_cumsum takes a scale, log2(e) in the chunk kernels"),
    Fault("sums_exponentiated", "exp of the sums", SUM, lambda s: np.exp(s.run()), use=CALL),
    Fault("sums_over_sequences", "offsets are ignored: chunks are counted from the first token of all", SUM,
          sums_over_sequences, use=CALL),
    Fault("sums_in_bfloat16", "sums are rounded to bfloat16 at every step", SUM, of_chunks(narrow_sums), use=CALL),
    Fault("sums_of_other_chunk", "chunks have another length", SUM, lambda s, n: s.run(chunk=n), use=CALL,
          choices=((16,), (32,), (64,), (128,)), each="chunks have {} tokens"),
    Fault("beta_without_sigmoid", "b is handed on as beta", ("sigmoid",), lambda s: s["x"],
          source=f"{FLA}: kernels take beta, or b, by a flag"),
    Fault("beta_doubled", "2 sigmoid(b)", ("sigmoid",), lambda s: 2 * s.run(), source=f"{FLA}: allow_neg_eigval"),
)
