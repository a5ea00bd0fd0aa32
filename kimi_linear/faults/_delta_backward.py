"""Faults of the delta rule's gradients: one float64 pass down with a switch for each, and the list of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..reference_delta import key_heads
from ._fault import CALL, Fault

__all__ = ["FAULTS", "wrong"]

LENGTHS = (16,), (32,), (64,)
LOG2_E = np.float32(np.log2(np.e))
ATTENTION_GYM = "meta-pytorch/attention-gym, pull requests 461 and 465"
FLA = "flash-linear-attention: fla/ops/kda/chunk_bwd.py, chunk_intra.py"

# ---- the pass with its faults --------------------------------------------------------------------------


def wrong(x, **on):
    """`reference.delta_rule_backward` of the arguments `x` with faults; None where none of them acts."""
    q, k, v, g, beta, do = (np.asarray(x[n], np.float64) for n in ("q", "k", "v", "g", "beta", "do"))
    (T, Hk, K), (Hv, V), kind = q.shape, v.shape[1:], g.ndim
    if any(_idle(x, name, value, Hk != Hv, kind) for name, value in on.items()):
        return None
    given, eps = (q, k), x.get("l2_eps", 1e-6)
    if x.get("l2_norm"):
        q, k = (a * _inverse(a, eps, on.get("norm")) for a in given)
    head_map, scale = x.get("head_map") or "grouped", K**-0.5 if x.get("scale") is None else x["scale"]
    heads = key_heads(Hk, Hv, {"grouped": "tiled", "tiled": "grouped"}[head_map] if "heads" in on else head_map)
    q, k = q[:, heads] * scale, k[:, heads]
    gates = np.broadcast_to(g[..., None] if kind == 2 else g, (T, Hv, K))
    offsets = [0, T] if x.get("offsets") is None else [int(n) for n in x["offsets"]]
    shape = (len(offsets) - 1, Hv, K, V)
    S0, A = (np.zeros(shape) if x.get(n) is None else np.array(x[n], np.float64).reshape(shape)
             for n in ("initial_state", "dstate"))
    if on.get("dstate") == "swapped":
        A = A.swapaxes(-1, -2).copy()
    if on.get("dstate") == "ignored":
        A[:] = 0
    if on.get("initial") == "ignored":
        S0 = np.zeros(shape)
    grads = [np.zeros(a.shape) for a in (q, k, v, gates, beta)]
    for n in reversed(range(len(A))):
        r = slice(offsets[n], offsets[n + 1])
        if on.get("ragged") and n + 1 < len(A):
            A[n] = A[n + 1]
        rows = [a[r] for a in (q, k, v, gates, beta, do)]
        if "sums" in on:
            rows[3] = _by_sums(rows[3], *on["sums"])
        *of_rows, A[n] = _sequence(*rows, S0[n], A[n], on)
        for whole, part in zip(grads, of_rows):
            whole[r] = part
    dq, dk, dv, dg, dbeta = grads
    if on.get("dq") != "unscaled":
        dq = dq * scale * (scale if on.get("dq") == "twice" else 1)
    dk = dk * (scale if on.get("dk") == "scaled" else 1)
    dq, dk = (_of_key_heads(a, heads, Hk, on.get("shared")) for a in (dq, dk))
    if x.get("l2_norm"):
        dq, dk = (_through_norm(a, b, eps, on.get("norm")) for a, b in ((dq, given[0]), (dk, given[1])))
    if kind == 2:
        dg = {"mean": dg.mean, "first": lambda axis: dg[..., 0]}.get(on.get("of_head"), dg.sum)(axis=-1)
    A = {"swapped": lambda: A.swapaxes(-1, -2), "zero": lambda: 0 * A}.get(on.get("dinitial"), lambda: A)()
    if "exchanged" in on:
        dq, dk = dk, dq
    return dq, dk, dv, dg, dbeta, A if x.get("offsets") is not None else A[0]


def _idle(x, name, value, grouped, kind):
    """Whether a fault can do nothing with these arguments."""
    T, (K, V) = len(x["q"]), (x["q"].shape[-1], x["v"].shape[-1])
    lacks = {
        "heads": not grouped, "shared": not grouped, "norm": not x.get("l2_norm"), "of_head": kind != 2,
        "ragged": x.get("offsets") is None or len(x["offsets"]) < 3,
        "dstate": x.get("dstate") is None or value == "swapped" and K != V,
        "initial": x.get("initial_state") is None, "dinitial": value == "swapped" and K != V,
        "border": isinstance(value, tuple) and T <= value[1], "exchanged": K == 0,
    }
    return lacks.get(name, False)


def _sequence(q, k, v, g, beta, do, S, A, on):
    """One sequence, all heads: dq (without the scale), dk, dv, dg, dbeta and the gradient of S."""
    kept, border = [], on.get("border", ("", 0))
    for t in range(len(q)):
        if border[0] == "state" and t % border[1] == 0 and t:
            S = 0 * S
        before = np.exp(g[t])[:, :, None] * S
        after = before + k[t][:, :, None] * (beta[t][:, None] * (v[t] - _over_keys(before, k[t])))[:, None]
        kept.append((S, before, after))
        S = _rounded(after) if on.get("rounded") == "S" else after
    dq, dk, dv, dg, dbeta = (np.zeros(a.shape) for a in (q, k, v, g, beta))
    of_c = np.zeros(g.shape)
    for t in reversed(range(len(q))):
        if border[0] == "gradient" and t % border[1] == border[1] - 1 and t < len(q) - 1:
            A = 0 * A
        A = _rounded(A) if on.get("rounded") == "A" else A
        S, before, after = kept[t]
        b, later = beta[t][:, None], A
        dq[t] = _over_values({"before": before, "undecayed": S}.get(on.get("read"), after), do[t])
        A = A + q[t][:, :, None] * do[t][:, None]
        read = _over_keys(later if on.get("order") == "after" else A, k[t])
        was = _over_keys(before, k[t])
        error = _rounded(v[t]) - _rounded(was) if on.get("rounded") == "error" else v[t] - was
        dbeta[t] = (read * {"unread": v[t], "times beta": b * error}.get(on.get("dbeta"), error)).sum(-1)
        if on.get("dbeta") == "sigmoid":
            dbeta[t] *= beta[t] * (1 - beta[t])
        dv[t] = read if on.get("dv") == "without beta" else b * read
        write = b * read
        of_write, of_read = _over_values(A, b * error), _over_values(before, write)
        dk[t] = {"no read": of_write, "no write": -of_read}.get(on.get("dk"), of_write - of_read)
        through = A - k[t][:, :, None] * write[:, None]
        dg[t] = (({"unwritten": A}.get(on.get("dg"), through))
                 * {"after": after, "of decay": S}.get(on.get("dg"), before)).sum(-1)
        of_c[t] = q[t] * _over_values(before, do[t]) - k[t] * (of_read + _over_values(later, b * error))
        if isinstance(on.get("dg"), tuple) and (t % on["dg"][1] == on["dg"][1] - 1 or t == len(q) - 1):
            of_c[t] += (later * after).sum(-1)
        A = through if on.get("order") == "undecayed" else np.exp(g[t])[:, :, None] * through
    return dq, dk, dv, _gate(dg, of_c, on.get("dg")), dbeta, A


def _gate(dg, of_c, how):
    """The gradient of g, where a fault is in all of it; `of_c` is that of its running sum in a chunk."""
    if isinstance(how, tuple) and how[0] == "of sums":
        return of_c
    if isinstance(how, tuple):
        return np.concatenate([np.append(dg[t + 1:t + how[1]], 0 * dg[:1], axis=0) for t in range(0, len(dg), how[1])])
    factors = {"negated": -1, "log2": np.log(2), "of log2": 1 / np.log(2)}
    return factors.get(how, 1) * dg if isinstance(how, str) else dg


def _over_keys(S, x):
    return np.einsum("hkv,hk->hv", S, x)


def _over_values(S, y):
    return np.einsum("hkv,hv->hk", S, y)


def _rounded(x):
    with np.errstate(over="ignore"):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def _of_key_heads(x, heads, Hk, shared):
    out = np.zeros((len(x), Hk, x.shape[-1]))
    if shared in ("first", "last"):
        for h in reversed(range(len(heads))) if shared == "first" else range(len(heads)):
            out[:, heads[h]] = x[:, h]
        return out
    np.add.at(out, (slice(None), heads), x)
    return out / (len(heads) // Hk) if shared == "mean" else out


def _by_sums(g, C, log2, once):
    """Gates that are the differences of float32 running sums, afresh every C rows, which are rounded once or at each
    step, and then may be taken to log2; -inf less -inf is NaN."""
    out = [np.zeros((0, *g.shape[1:]))]
    for t in range(0, len(g), C):
        c = np.cumsum(np.float32(g[t:t + C]), axis=0, dtype=np.float64 if once else np.float32).astype(np.float32)
        c = np.float64(c * LOG2_E) / LOG2_E if log2 else np.float64(c)
        with np.errstate(invalid="ignore"):
            out.append(np.diff(c, axis=0, prepend=0))
    return np.concatenate(out)


def _inverse(x, eps, how):
    squares = x * x
    if how == "overflow":
        with np.errstate(over="ignore"):
            squares = np.float32(squares).astype(np.float64)
    return 1 / np.sqrt(squares.sum(-1, keepdims=True) + eps)


def _through_norm(dy, x, eps, how):
    inverse = _inverse(x, eps, how)
    if how == "left out":
        return dy
    y = x * inverse
    along = 0 if how == "unprojected" else y * (y * dy).sum(-1, keepdims=True)
    if how == "cubed":
        along = along * ((inverse**3).astype(np.float32) / inverse**3)
    return (dy - along) * (1 if how == "not divided" else inverse)


# ---- the list ------------------------------------------------------------------------------------------


def _fault(name, text, source="", *, alone=True, choices=((),), each="", **switches):
    """A Fault whose switches are values, or functions of its choice; `alone` is tried with no other."""
    def function(call, *choice):
        return wrong(call.args, **{n: s(*choice) if callable(s) else s for n, s in switches.items()})

    return Fault(f"backward_{name}", text, ("delta_rule_backward",), function, use=CALL, source=source,
                 choices=choices, each=each, rare=alone)


def _of_each():
    yield _fault("dq_unscaled", "dq is without the scale", alone=False, dq="unscaled")
    yield _fault("dq_scaled_twice", "dq has the scale twice", alone=False, dq="twice")
    yield _fault("dk_scaled", "dk has the scale, which is q's alone", alone=False, dk="scaled")
    yield _fault("dq_before_write", "dq reads the state before the token's own write", read="before")
    yield _fault("dq_undecayed", "dq reads the state before the token's decay and write", read="undecayed")
    yield _fault("dk_without_read", "dk is that of the write alone: what the read of the state adds is missing",
                 dk="no read")
    yield _fault("dk_without_write", "dk is that of the read alone: what the write adds is missing", dk="no write")
    yield _fault("dv_without_beta", "dv is without beta", alone=False, dv="without beta")
    yield _fault("dbeta_of_v", "dbeta is <A^T k, v>: what was read of the state is not taken off v", dbeta="unread")
    yield _fault("dbeta_times_beta", "dbeta has beta once too often", alone=False, dbeta="times beta")
    yield _fault("dbeta_of_logit", "dbeta is of beta's logit: it has beta (1 - beta)", alone=False, dbeta="sigmoid")
    yield _fault("dq_and_dk_exchanged", "dq and dk are exchanged", exchanged=True)


def _gates():
    yield _fault("dg_negated", "dg has the other sign", alone=False, dg="negated")
    yield _fault("dg_of_decay", "dg is of the decay exp(g), not of g", alone=False, dg="of decay")
    yield _fault("dg_log2", "dg is ln 2 times too small: of a gate in log2", FLA, alone=False, dg="log2")
    yield _fault("dg_of_log2", "dg is 1 / ln 2 times too large: of a gate in nats, divided as one in log2", FLA,
                 alone=False, dg="of log2")
    yield _fault("dg_behind_write", "dg has the state behind the token's write for that before it", dg="after")
    yield _fault("dg_before_write", "dg has the gradient of the state before that of the token's write is taken off",
                 dg="unwritten")
    yield _fault("dg_of_sums", "dg is of the running sums of g: it is not added up from the chunk's end",
                 FLA, choices=LENGTHS, each="dg is of the running sums of g: it is not added up from the chunk's end, "
                 "chunks of {}", dg=lambda C: ("of sums", C))
    yield _fault("dg_one_late", "dg is that of the next token: the sum from the chunk's end leaves its own row out",
                 choices=LENGTHS, each="dg is that of the next token: the sum from the chunk's end leaves its own row "
                 "out, chunks of {}", dg=lambda C: ("one late", C))
    yield _fault("dg_mean", "dg of a gate a head is the mean over its channels, not the sum", of_head="mean")
    yield _fault("dg_first", "dg of a gate a head is that of its first channel", of_head="first")


def _states():
    yield _fault("dstate_ignored", "the final state's gradient is ignored", alone=False, dstate="ignored")
    yield _fault("dstate_swapped", "the final state's gradient is read with K and V swapped", alone=False,
                 dstate="swapped")
    yield _fault("initial_ignored", "the pass up begins with zeros, not with the initial state", alone=False,
                 initial="ignored")
    yield _fault("dinitial_zero", "the initial state's gradient is zero", alone=False, dinitial="zero")
    yield _fault("dinitial_swapped", "the initial state's gradient has K and V swapped", alone=False,
                 dinitial="swapped")
    yield _fault("do_after", "a token's own do reaches the state's gradient behind what is read of it", order="after")
    yield _fault("undecayed", "the state's gradient does not go through the decay", order="undecayed")
    yield _fault("offsets_ignored", "sequences run into each other: the state's gradient goes on to the one before",
                 ragged=True)
    for what, words in (("state", "the state is lost at the border of chunks, and gradients are of zeros there"),
                        ("gradient", "the state's gradient is lost at the border of chunks")):
        yield _fault(f"{what}_lost", words, choices=LENGTHS, each=f"{words}, chunks of {{}}",
                     border=lambda C, what=what: (what, C))


def _rest():
    yield _fault("heads_other_way", "key heads are found the other way: grouped for tiled, or the reverse",
                 alone=False, heads="other")
    yield _fault("shared_mean", "gradients of a shared key head are the mean over its value heads, not the sum",
                 shared="mean")
    yield _fault("shared_one", "gradients of a shared key head are those of one of its value heads",
                 "heads that write the same place", choices=(("first",), ("last",)),
                 each="gradients of a shared key head are those of the {} of its value heads", shared=lambda h: h)
    yield _fault("norm_left_out", "dq and dk are of the normalised q and k", norm="left out")
    yield _fault("norm_unprojected", "through the l2 norm, the part along q and k is not taken off",
                 norm="unprojected")
    yield _fault("norm_not_divided", "through the l2 norm, dq and dk are not divided by the norm", norm="not divided")
    yield _fault("norm_cubed", "through the l2 norm, its inverse cubed underflows float32", "the derivative of rsqrt",
                 norm="cubed")
    yield _fault("norm_overflow", "in its l2 norm, the sum of squares overflows float32", norm="overflow")
    says = ("decays are formed by subtracting float32 sums of g{}{} over chunks of {}: digits are lost after a strong "
            "gate")
    for log2, of in ((False, ""), (True, " in log2")):
        for once, kind in ((True, ""), (False, ", rounded at each step,")):
            yield _fault(f"sums_in_float32{'' if once else '_each'}{of.replace(' ', '_')}",
                         says.format(of, kind, "some tokens"), FLA, choices=LENGTHS, each=says.format(of, kind, "{}"),
                         sums=lambda C, log2=log2, once=once: (C, log2, once))
    for what, words in (("S", "the state is rounded to bfloat16 behind every token"),
                        ("A", "the state's gradient is rounded to bfloat16 behind every token"),
                        ("error", "v and S^T k are rounded to bfloat16 before they are subtracted")):
        yield _fault(f"{what}_in_bfloat16", words, ATTENTION_GYM if what == "error" else "", rounded=what)


PARTS = _of_each, _gates, _states, _rest
FAULTS = tuple(f for part in PARTS for f in part())
