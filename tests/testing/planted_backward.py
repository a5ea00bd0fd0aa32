"""Backward kernels to be judged: float32 NumPy, right and with planted bugs, in an order of sums of their own.

Each bug is a change of a line, as people make them; none of it uses the package.
"""

import numpy as np
from planted_ops import F, mean_square, sigmoid, silu, softplus

BUGS = {}  # (op, bug) -> words that the card must say


def added(terms, what=None):
    """Rows [T, ...] added up one by one, the last first; or as bugs have it."""
    if what == "last":
        return terms[-1:].sum(0, dtype=F)
    total = np.zeros(terms.shape[1:], F)
    for row in terms[::-1]:
        total = total + row
    return total / F(max(len(terms), 1)) if what == "averaged" else total


def silu_slope(z, what=None):
    """s + z s (1 - s), which is no better than its difference."""
    s = sigmoid(z)
    return {"first": s, "second": z * s * (F(1) - s), "none": np.ones_like(z)}.get(what, s + z * s * (F(1) - s))


# ---- norms -------------------------------------------------------------------------------------------


def _norm(g, x, w, eps, what, total):
    """dx = r p - x r^3 mean(x p), of rows brought near 1 by a power of 2; the normalised x."""
    square, near, power = mean_square(x, what)
    D = F(x.shape[-1])
    eps = {"no eps": F(0), "eps": F(2 * eps)}.get(what, F(eps)) * power * power
    root = np.sqrt(square * (D if total else F(1)) + (F(0) if what == "outside" else eps))
    r = F(1) / (root + (eps if what == "outside" else F(0)))
    p = g * (np.ones_like(w) if what == "no weight" else w)
    along = near * (g if what == "projected without w" else p)
    c = along.sum(-1, keepdims=True, dtype=F)
    if total == (what == "other total"):
        c = c / D
    again = (near * r) * ((c * r) * (F(1) if what == "raw once" else r))
    dx = (r * p - F({"no projection": 0, "added": -1}.get(what, 1)) * again) * power
    if what == "no length":
        dx = dx / (r * power)
    if what == "centred":
        dx = dx - r * power * p.mean(-1, keepdims=True, dtype=F)
    return dx, near * r


def rms_norm_backward(dy, x, w, eps, what=None):
    dx, n = _norm(dy, x, w, eps, what, False)
    terms = {"raw": x * dy, "weighted": w * n * dy, "bias": dy + 0 * n}.get(what, n * dy)
    return dx, added(terms.reshape(-1, x.shape[-1]), what)


BUGS |= {("rms_norm_backward", bug): words for bug, words in {
    "no projection": "left out", "added": "projection is added", "projected without w": "w is not in the projection",
    "other total": "a sum for its mean", "raw once": "in 1 of its two places", "no eps": "no eps",
    "outside": "eps is outside", "no length": "lacks its factor r", "centred": "LayerNorm",
    "no weight": "w is left out", "overflow": "overflows float32", "raw": "without the normalisation of x",
    "weighted": "w is in its own gradient", "bias": "without x", "averaged": "means over tokens",
    "last": "last block of 1 tokens"}.items()}


def l2_norm_backward(dy, x, eps=1e-6, what=None):
    return _norm(dy, x, np.ones(x.shape[-1], F), eps, what, True)[0]


BUGS |= {("l2_norm_backward", bug): words for bug, words in {
    "no projection": "left out", "added": "projection is added", "other total": "a mean for its sum",
    "no eps": "no eps", "outside": "eps is outside", "no length": "lacks its factor r",
    "overflow": "overflows float32"}.items()}


def gated_rms_norm_backward(dy, x, z, w, eps, activation="sigmoid", what=None):
    other = what in ("activation", "slope")
    s, is_silu = sigmoid(z), (activation == "silu") != (what == "activation")
    a = silu(z) if is_silu else s
    dx, n = _norm(dy if what == "gate not in dx" else dy * a, x, w, eps, what, False)
    slope = silu_slope(z, what) if is_silu != (what == "slope") else s * (F(1) - s)
    slope = {"no slope": np.ones_like(z), "s": s if not other and not is_silu else slope}.get(what, slope)
    dz = dy * ((x if what == "dz of raw" else n) * (F(1) if what == "dz without w" else w)) * slope
    of_w = n * dy if what == "gate not in dw" else n * dy * a
    return dx, dz, added(of_w.reshape(-1, x.shape[-1]), what)


BUGS |= {("gated_rms_norm_backward", bug): words for bug, words in {
    "no projection": "left out", "activation": "the gate is SiLU, not sigmoid", "no eps": "no eps",
    "slope": "derivative of SiLU for that of sigmoid", "first": "x s (1 - s), is missing",
    "second": "its first term, s, is missing", "s": "without 1 - s", "no slope": "without the derivative of the gate",
    "dz without w": "dz lacks w", "dz of raw": "dz has x for", "gate not in dx": "gate is left out of dx",
    "gate not in dw": "gate is left out of dw", "averaged": "means over tokens"}.items()}


# ---- convolution -------------------------------------------------------------------------------------


def short_conv_backward(dy, x, w, history=None, offsets=None, activation="silu", dfinal=None, what=None):
    (T, C), W = x.shape, w.shape[1]
    bounds = [0, T] if offsets is None else offsets.tolist()
    N = len(bounds) - 1
    before = np.zeros((N, W - 1, C), F) if history is None or what == "no history" else history.reshape(N, W - 1, C)
    dx, dhistory, products = np.zeros((T, C), F), np.zeros((N, W - 1, C), F), np.zeros((T, C, W), F)
    seen = [np.concatenate([h, x[a:b]]) for h, a, b in zip(before, bounds, bounds[1:])]
    dc = dy.copy()
    for own, a, b in zip(seen, bounds, bounds[1:]):
        if activation == "silu":
            c = sum((w[:, j] * own[j:j + b - a] for j in range(W - 1, -1, -1)), np.zeros((b - a, C), F))
            dc[a:b] *= silu_slope(silu(c) if what == "of output" else c, what)
        for j in range(W):
            products[a:b, :, j] = dc[a:b] * own[j:j + b - a]
    ends = bounds
    if what == "runs on":
        bounds = [0, T]
    taps = w[:, ::-1] if what in ("reversed dx", "back") else w
    for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
        ahead = np.concatenate([dc[a:b], np.zeros((W - 1, C), F)])
        if what == "back":
            ahead = np.concatenate([np.zeros((W - 1, C), F), dc[a:b]])
        whole = np.concatenate([np.zeros((W - 1, C), F), ahead])
        rows = np.zeros((W - 1 + b - a, C), F)
        for j in range(W - 1, -1, -1):
            rows += taps[:, j] * whole[W - 1 - j:][:len(rows)]
        own = rows[W - 1:]
        if what == "back":
            own = sum(taps[:, W - 1 - j] * ahead[j:j + b - a] for j in range(W))
        if what == "blocks" and b - a > 64:
            own = np.concatenate([_without(dc[a:b][i:i + 64], taps) for i in range(0, b - a, 64)])
        dx[a:b] = own
        if what != "runs on":
            dhistory[n] = rows[:W - 1]
    if what == "runs on":
        for n, (a, b) in enumerate(zip(offsets, offsets[1:]) if offsets is not None else [(0, T)]):
            dhistory[n] = _history_of(dc[a:b], taps)
    if dfinal is not None and what != "no dfinal":
        for n, (a, b) in enumerate(zip(ends, ends[1:])):
            own = dfinal.reshape(N, W - 1, C)[n]
            for row in range(W - 1):  # of W - 1 + b - a that are there, the last are handed on
                at = row + b - a
                if at >= W - 1:
                    dx[a + at - (W - 1)] += own[row - max(W - 1 - (b - a), 0) if what == "moved" else row]
                elif what != "moved":
                    dhistory[n, at] += own[row]
    dw = added(products, what)
    if what == "reversed dw":
        dw = dw[:, ::-1].copy()
    if what == "no dhistory":
        dhistory[...] = 0
    if what == "turned":
        dhistory = dhistory[:, ::-1].copy()
    return dx, dw, dhistory if offsets is not None else dhistory[0]


def _whole(dc, w):
    W = w.shape[1]
    rows = np.zeros((W - 1 + len(dc), dc.shape[1]), F)
    for j in range(W):
        rows[j:j + len(dc)] += w[:, j] * dc
    return rows


def _without(dc, w):
    return _whole(dc, w)[w.shape[1] - 1:]


def _history_of(dc, w):
    return _whole(dc, w)[:w.shape[1] - 1]


BUGS |= {("short_conv_backward", bug): words for bug, words in {
    "reversed dw": "newest first, in dw", "reversed dx": "newest first, in dx", "back": "tokens before it",
    "runs on": "sequences run into each other, in dx", "blocks": "each block of 64 tokens",
    "no dhistory": "gets no gradient", "turned": "newest row first", "no history": "counts for zeros everywhere",
    "none": "derivative is left out", "first": "x s (1 - s), is missing", "second": "its first term, s, is missing",
    "no dfinal": "history that is handed on is ignored",
    "moved": "goes to the wrong ones, and what is left of the old one gets none",
    "of output": "taken of the output", "averaged": "means over tokens", "last": "last block of 1 tokens"}.items()}


# ---- gates -------------------------------------------------------------------------------------------


def decay_gate_backward(dg, f, rate, dt_bias, lower_bound=None, what=None):
    axes = dt_bias.ndim
    if what == "log":
        rate = np.log(rate)
    rates, x = rate.reshape(-1, *[1] * (axes - 1)), f + dt_bias * F({"no bias": 0, "bias twice": 2}.get(what, 1))
    if lower_bound is None:
        s = sigmoid(x)
        slope = {"no slope": F(1), "of softplus": softplus(x), "s (1 - s)": s * (F(1) - s),
                 "threshold": np.where(x > 5, F(1), s)}.get(what, s)
        plus = {"no softplus": F(1), "drate of s": s, "threshold": np.where(x > 5, x, softplus(x)),
                "steps": np.log(F(1) + np.exp(np.minimum(x, F(80)))) + np.maximum(x - F(80), F(0)),
                "overflow": np.where(x > 88.7, F(np.inf), softplus(x))}.get(what, softplus(x))
        df = -(dg * slope) if what == "no rate" else -(dg * slope) * rates
        of_rate = df if what == "drate of df" else -dg * plus
    else:
        y = x if what == "at x" else rates * x
        s = sigmoid(y)
        q = dg * F(1 if what == "no bound" else lower_bound) * (s if what == "bounded s" else s * (F(1) - s))
        df, of_rate = q if what == "bounded no rate" else q * rates, q if what == "no x" else q * x
    drate = added(of_rate, what)
    drate = drate.sum(-1, dtype=F) if axes == 2 else drate
    if what == "a_log":
        drate = drate * rate
    if what == "over":
        drate = drate / rate
    ddt = added(df, what)
    return df, drate, ddt / rates if what == "bias without rate" else ddt


BUGS |= {("decay_gate_backward", bug): words for bug, words in {
    "no slope": "sigmoid, is missing", "of softplus": "softplus itself", "s (1 - s)": "s (1 - s) for softplus'",
    "threshold": "threshold of 5", "no softplus": "softplus is missing", "drate of s": "sigmoid(x) for softplus(x)",
    "steps": "digits are lost", "overflow": "overflows float32", "no rate": "df lacks the rate",
    "drate of df": "the sum of df",
    "log": "A_log is used in place", "no bias": "dt_bias is added 0 times", "bias twice": "dt_bias is added 2 times",
    "at x": "taken at x", "no bound": "lower_bound is left out", "bounded s": "s stands for s (1 - s)",
    "bounded no rate": "df of the bounded gate lacks", "no x": "drate of the bounded gate lacks x",
    "a_log": "multiplied by rate", "over": "divided by rate", "bias without rate": "ddt_bias lacks",
    "averaged": "means over tokens", "last": "last block of 1 tokens"}.items()}


def swiglu_backward(dy, gate, up, what=None):
    if what == "exchanged":
        gate, up = up, gate
    slope = {"sigmoid": sigmoid(gate) * (F(1) - sigmoid(gate)), "silu": silu(gate)}.get(what, silu_slope(gate, what))
    dgate = dy * slope if what == "no up" else up * (slope * dy)
    dup = dy * {"gate": gate, "dup of sigmoid": sigmoid(gate)}.get(what, silu(gate))
    return (dup, dgate) if what in ("exchanged", "results") else (dgate, dup)


BUGS |= {("swiglu_backward", bug): words for bug, words in {
    "first": "x s (1 - s), is missing", "second": "its first term, s, is missing",
    "exchanged": "SiLU is taken to be on up", "results": "dgate and dup are exchanged",
    "sigmoid": "derivative of sigmoid for", "silu": "SiLU itself for",
    "no up": "dgate lacks up", "gate": "without the activation", "dup of sigmoid": "dup = dy sigmoid"}.items()}
