"""Kernels to be judged: every op but the delta rule in float32 NumPy, right and with planted bugs.

Each bug is a change of a line, as people make them; none of it uses the package.
"""

import numpy as np

F = np.float32
BUGS = {}  # (op, bug) -> words that the card must say


def f(x):
    return np.asarray(x, F)


def sigmoid(x):
    return F(1) / (F(1) + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.maximum(x, F(0)) + np.log1p(np.exp(-np.abs(x)))


# ---- embedding, norms, products --------------------------------------------------------------------------


def embedding(ids, table, what=None):
    if what == "one behind":
        ids = (ids + 1) % len(table)
    if what == "int16":
        ids = ids.astype(np.uint16)
    if what == "transposed":
        table = table.T.reshape(table.shape)
    y = table[ids]
    if what == "scaled":
        y = y * F(table.shape[1] ** 0.5)
    if what == "padding":
        y[ids == 0] = 0
    return y


BUGS |= {("embedding", "one behind"): "row of id +1", ("embedding", "int16"): "16 bits",
         ("embedding", "transposed"): "read as [D, vocab]", ("embedding", "scaled"): "scaled by the root of the width",
         ("embedding", "padding"): "row of id 0"}


def mean_square(x, what):
    """The mean of squares, of rows brought near 1 by a power of 2, and that power."""
    most = np.abs(x).max(-1, keepdims=True, initial=0)
    power = F(1) if what == "overflow" else np.where(most > 1e15, F(2.0**-64), F(1))
    y = x * power
    return (y * y).mean(-1, keepdims=True, dtype=F), y, power


def rms_norm(x, w, eps, what=None):
    if what == "centred":
        x = x - x.mean(-1, keepdims=True)
    square, x, power = mean_square(x, what)
    eps = F(1e-6 if what == "eps" else eps) * power * power
    if what == "on the sum":
        eps = eps / F(x.shape[-1])
    length = np.sqrt(square) + eps if what == "outside" else np.sqrt(square + eps)
    if what == "sum":
        length = np.sqrt(square * F(x.shape[-1]) + eps)
    y = x / length
    return y if what == "no weight" else (F(1) + w) * y if what == "1 + w" else w * y


BUGS |= {("rms_norm", "centred"): "mean is taken off", ("rms_norm", "eps"): "eps is 1e-06",
         ("rms_norm", "on the sum"): "eps is on the sum", ("rms_norm", "outside"): "eps is outside of the root",
         ("rms_norm", "sum"): "an L2 norm", ("rms_norm", "no weight"): "weight is left out",
         ("rms_norm", "1 + w"): "1 + w", ("rms_norm", "overflow"): "overflows float32"}


def layer_norm(x, w, b, eps, what=None):
    D = x.shape[-1]
    most = np.abs(x).max(-1, keepdims=True, initial=0)
    power = F(1) if what == "overflow" else np.where(most > 1e15, F(2.0**-64), F(1))
    x = x * power
    mean = x.mean(-1, keepdims=True, dtype=F)
    c = x - mean
    c = c - c.mean(-1, keepdims=True, dtype=F)
    of = x if what == "over rms" else c
    var = (of * of).mean(-1, keepdims=True, dtype=F)
    if what == "one pass":
        var = (x * x).mean(-1, keepdims=True, dtype=F) - mean * mean
    if what == "n - 1":
        var = var * F(D) / F(D - 1)
    eps = F(1e-5 if what == "eps" else eps) * power * power
    if what == "rms":
        return rms_norm(x, w, eps) + b
    length = np.sqrt(var) + eps if what == "outside" else np.sqrt(var + (eps / F(D) if what == "on the sum" else eps))
    y = np.where(length > 0, (x if what == "uncentred" else c) / length, F(0) * c)
    if what == "bias first":
        return w * (y + b)
    if what == "swapped":
        w, b = b, w
    return (F(1) + w if what == "1 + w" else w) * y + (F(0) if what == "no bias" else b)


BUGS |= {("layer_norm", "over rms"): "not off what is squared", ("layer_norm", "one pass"): "it cancels where",
         ("layer_norm", "n - 1"): "D - 1", ("layer_norm", "eps"): "eps is 1e-05", ("layer_norm", "rms"): "an RMS norm",
         ("layer_norm", "outside"): "outside of the root", ("layer_norm", "on the sum"): "on the sum of squares",
         ("layer_norm", "uncentred"): "but not off x", ("layer_norm", "bias first"): "before the weight",
         ("layer_norm", "swapped"): "weight and bias are swapped", ("layer_norm", "1 + w"): "1 + w",
         ("layer_norm", "no bias"): "bias is left out", ("layer_norm", "overflow"): "overflows float32"}


def gated_rms_norm(x, z, w, eps, activation="sigmoid", what=None):
    gate = silu(z) if (activation == "silu") != (what == "silu") else sigmoid(z)
    if what == "gate first":
        return rms_norm(x * gate, w, eps)
    if what == "no gate":
        return rms_norm(x, w, eps)
    if what == "all heads" and x.ndim == 3:
        flat = rms_norm(x.reshape(len(x), -1), np.tile(w, x.shape[1]), eps)
        return flat.reshape(x.shape) * gate
    return rms_norm(x, w, eps, {"1 + w": "1 + w", "outside": "outside"}.get(what)) * gate


BUGS |= {("gated_rms_norm", "silu"): "output gate is SiLU", ("gated_rms_norm",
                                                             "gate first"): "multiplies before the norm",
         ("gated_rms_norm", "no gate"): "output gate is left out", ("gated_rms_norm", "all heads"): "over all heads",
         ("gated_rms_norm", "1 + w"): "1 + w", ("gated_rms_norm", "outside"): "eps is outside of the root"}


def l2_norm(x, eps=1e-6, what=None):
    if what == "none":
        return x
    square, x, power = mean_square(x, what)
    total = square * F(x.shape[-1])
    eps = F(1e-5 if what == "eps" else eps) * power * power
    if what == "mean":
        eps = eps * F(x.shape[-1])
    length = {"outside": np.sqrt(total) + F(1e-6), "floor": np.maximum(np.sqrt(total), F(1e-6)),
              "rms": np.sqrt(square + eps)}.get(what, np.sqrt(total + eps))
    return x / length


BUGS |= {("l2_norm", "none"): "not normalised", ("l2_norm", "eps"): "eps 1e-05 under the root",
         ("l2_norm", "mean"): "eps on the mean", ("l2_norm", "outside"): "eps outside of the root",
         ("l2_norm", "floor"): "max(|x|", ("l2_norm", "overflow"): "overflows float32"}


def linear(x, w, bias=None, what=None):
    if what == "transposed":
        w = w.T.reshape(w.shape)
    if what == "tail":
        x = np.where(np.arange(x.shape[1]) < x.shape[1] // 16 * 16, x, F(0))
    if what == "bfloat16":
        x, w = (((a.view(np.uint32) + 0x7FFF + ((a.view(np.uint32) >> 16) & 1)) & 0xFFFF0000).view(F) for a in (x, w))
    y = x @ w.T
    if bias is None or what == "no bias":
        return y
    return y + bias * F(2 if what == "bias twice" else 1)


BUGS |= {("linear", "transposed"): "read as [n, m]", ("linear", "tail"): "past a multiple of 16",
         ("linear", "bfloat16"): "inputs are rounded to bfloat16", ("linear", "no bias"): "bias is not added",
         ("linear", "bias twice"): "bias is added twice"}


# ---- KDA -----------------------------------------------------------------------------------------------


def short_conv(x, w, history=None, offsets=None, activation="silu", what=None):
    (T, C), W = x.shape, w.shape[1]
    if what == "reversed":
        w = w[:, ::-1]
    bounds = [0, T] if offsets is None else offsets.tolist()
    shape = (len(bounds) - 1, W - 1, C)
    before = np.zeros(shape, F) if history is None or what == "no history" else history.reshape(shape)
    if what == "newest first":
        before = before[:, ::-1]
    if what in ("read late", "read early"):
        before = np.pad(before, ((0, 0), (1, 1), (0, 0)))[:, 2:] if what == "read late" else \
            np.pad(before, ((0, 0), (1, 0), (0, 0)))[:, :W - 1]
    y, after = np.zeros((T, C), F), np.zeros(shape, F)
    for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
        seen = np.concatenate([before[n], x[a:b]])
        for j in range(W):
            y[a:b] += w[:, j] * seen[j:j + b - a]
        after[n] = seen[len(seen) - W + 1:]
        if what == "not renewed":
            after[n] = before[n]
        if what == "handed on early":
            after[n] = seen[len(seen) - W:-1] if b > a else before[n]
        if what == "outputs":
            after[n] = np.concatenate([before[n], y[a:b]])[len(seen) - W + 1:]
    if what == "late":
        y = np.concatenate([np.zeros((1, C), F), y[:-1]])
    if activation and what != "no silu":
        y = silu(y)
    if what == "silu twice":
        y = silu(y)
    return y, after if offsets is not None else after[0]


BUGS |= {("short_conv", "reversed"): "last tap is put on the oldest", ("short_conv",
                                                                       "no history"): "history is ignored",
         ("short_conv", "newest first"): "newest row first", ("short_conv", "not renewed"): "the one that came",
         ("short_conv", "read late"): "read one row off (+1)", ("short_conv", "read early"): "read one row off (-1)",
         ("short_conv", "handed on early"): "handed on ends one row early",
         ("short_conv", "outputs"): "holds outputs, not inputs: before their activation",
         ("short_conv", "no silu"): "no SiLU", ("short_conv", "silu twice"): "once more"}


def decay_gate(f, rate, dt_bias, lower_bound=None, what=None):
    r = rate.reshape(-1, *[1] * (f.ndim - 2))
    if what == "A_log":
        r = np.log(r)
    x = f + dt_bias * F({"no bias": 0, "bias twice": 2}.get(what, 1))
    if lower_bound is not None and what != "unbounded":
        return F(lower_bound) * sigmoid(r * x)
    y = {"no softplus": lambda: -r * x, "inside": lambda: -softplus(r * x),
         "overflow": lambda: -r * np.log(1 + np.exp(x)),
         "bounded": lambda: F(-5) * sigmoid(r * x), "clamped": lambda: np.maximum(-r * softplus(x), F(-5)),
         "exp": lambda: np.exp(-r * softplus(x)), "sign": lambda: r * softplus(x)}
    return y[what]() if what in y else -r * softplus(x)


BUGS |= {("decay_gate", "A_log"): "A_log is used in place", ("decay_gate", "no bias"): "dt_bias is not added",
         ("decay_gate", "bias twice"): "dt_bias is added twice", ("decay_gate", "no softplus"): "-rate (f + dt_bias)",
         ("decay_gate", "inside"): "-softplus(rate", ("decay_gate", "bounded"): "the bounded gate",
         ("decay_gate", "clamped"): "clamped at -5", ("decay_gate", "exp"): "exp(g) is handed on",
         ("decay_gate", "sign"): "without the minus"}


def decay_cumsum(g, chunk=64, offsets=None, what=None):
    bounds = [0, len(g)] if offsets is None or what == "offsets" else offsets.tolist()
    c = np.zeros_like(g)
    for first, last in zip(bounds, bounds[1:]):
        for a in range(first, last, max(len(g), 1) if what == "across" else chunk):
            p = slice(a, min(a + (len(g) if what == "across" else chunk), last))
            c[p] = np.cumsum(g[p], axis=0, dtype=F)
            if what == "exclusive":
                c[p] = np.concatenate([np.zeros_like(c[p][:1]), c[p][:-1]])
            if what == "reverse":
                c[p] = np.cumsum(g[p][::-1], axis=0, dtype=F)[::-1]
    return np.exp(c) if what == "exp" else c * F(1.4426950408889634) if what == "log2" else c


BUGS |= {("decay_cumsum", "across"): "go on over the borders", ("decay_cumsum", "exclusive"): "before its own token",
         ("decay_cumsum", "reverse"): "from the end of the chunk", ("decay_cumsum", "exp"): "exp of the sums",
         ("decay_cumsum", "log2"): "multiplied by log2(e)", ("decay_cumsum", "offsets"): "offsets are ignored"}


# ---- MLA -----------------------------------------------------------------------------------------------


def latent_attention(q, latent, k_shared, w_uk, w_uv, scale, offsets=None, kv_offsets=None, select=None, what=None):
    scale = {"no scale": 1.0, "576": (latent.shape[1] + k_shared.shape[1]) ** -0.5, "128": w_uk.shape[1] ** -0.5}.get(
        what, scale)
    if what == "turned":
        w_uk = w_uk.reshape(w_uk.shape[0], w_uk.shape[2], w_uk.shape[1]).swapaxes(1, 2)
    rows = [0, len(q)] if offsets is None else offsets.tolist()
    cached = [0, len(latent)] if offsets is None else rows if kv_offsets is None else kv_offsets.tolist()
    o, P = np.zeros((len(q), len(w_uk), w_uv.shape[1]), F), k_shared.shape[1]
    for a, b, c, d in zip(rows, rows[1:], cached, cached[1:]):
        k = np.einsum("hnr,sr->hsn", w_uk, latent[c:d])
        k = np.concatenate([k, np.broadcast_to(k_shared[c:d], (len(w_uk), d - c, P))], -1)
        if what == "rotary":
            k[..., -P:] = turn(k[..., -P:], np.arange(d - c))
        v = np.einsum("hvr,sr->hsv", w_uv, latent[c:d])
        for t in range(b - a):
            last = d - c - (b - a) + t + 1
            last = {"no mask": d - c, "off by one": max(last - 1, 1), "left": t + 1}.get(what, last)
            query = q[a + t]
            if what == "rotary":
                query = query.copy()
                query[:, -P:] = turn(query[:, None, -P:], np.array([d - c - (b - a) + t]))[:, 0]
            row = slice(last) if select is None or what == "dense" else read(select, a + t, d - c, what)
            s = F(scale) * np.einsum("hsn,hn->hs", k[:, row], query)
            o[a + t] = softly(s, v[:, row], d - c, what) if s.size else 0
    return o


def read(select, t, S, what):
    """Row t of the selection, as a kernel reads it."""
    row = select[(t + 1) % len(select)] if what == "neighbour" else select[t]
    if what == "index":
        return row  # NumPy's -1, too, is the last
    if what == "clamped":
        return np.maximum(row, 0)
    row = row[row >= 0]
    return {"from 1": row[row > 0] - 1, "short": row[:select.shape[1] - 1]}.get(what, row)


def softly(s, v, S, what):
    """Values weighted by the softmax of scores [H, n] over pieces: 4 of S positions, or of 16 ("16, ...")."""
    n = 16 if (what or "").startswith("16, ") else -(-S // 4)
    m = sums = values = F(0)
    for i, first in enumerate(range(0, s.shape[1], n)):
        part = s[:, first:first + n]
        own = part.max(-1, keepdims=True)
        p = np.exp(part - own)
        l, o, w = p.sum(-1, keepdims=True), np.einsum("hs,hsv->hv", p, v[:, first:first + n]), F(1) / F(i + 1)
        if what == "16, last" or i == 0:
            m, sums, values = own, l, o
        elif what == "16, averaged":
            values, sums = (values / sums * F(i) + o / l) * w, F(1)
        elif what == "4, added":
            values, sums = values / sums + o / l, F(1)
        elif what == "4, own":
            values, sums = values + o, sums + l
        else:
            high = np.maximum(m, own)
            before, now = np.exp(m - high), np.exp(own - high)
            before = F(1) if what == "16, onward" else before
            m, sums, values = high, sums * before + l * now, values * before + o * now
    return values / sums


def turn(x, positions):
    """Rotary in halves; x [H, S, P]."""
    P = x.shape[-1]
    if P % 2:
        return x
    angle = positions[:, None] * 1e4 ** (-np.arange(0, P, 2) / P)
    a, b, c, s = x[..., :P // 2], x[..., P // 2:], f(np.cos(angle)), f(np.sin(angle))
    return np.concatenate([a * c - b * s, a * s + b * c], -1)


BUGS |= {("latent_attention", "no scale"): "scores are not scaled",
         ("latent_attention", "576"): "width of the absorbed product", ("latent_attention", "128"): "by nope^-1/2",
         ("latent_attention", "turned"): "read as [R, nope]", ("latent_attention", "rotary"): "are rotated",
         ("latent_attention", "no mask"): "see the rows behind", ("latent_attention", "off by one"): "their own row",
         ("latent_attention", "left"): "query t sees rows 0 to t",
         ("latent_attention", "dense"): "the selection is ignored",
         ("latent_attention", "index"): "-1 is read as a position, the last of its sequence",
         ("latent_attention", "clamped"): "-1 is read as a position, the first",
         ("latent_attention", "from 1"): "selected positions are moved by -1",
         ("latent_attention", "short"): "the last entry of a full row is not read"}


# ---- grouped-query attention ---------------------------------------------------------------------------


def attention(q, k, v, scale, offsets=None, kv_offsets=None, what=None):
    scale = {"no scale": 1, "V": v.shape[-1] ** -0.5}.get(what, scale)
    rows = [0, len(q)] if offsets is None else offsets.tolist()
    cached = [0, len(k)] if offsets is None else rows if kv_offsets is None else kv_offsets.tolist()
    H, Hkv = q.shape[1], k.shape[1]
    use = np.arange(H) % Hkv if what == "tiled" else np.arange(H) // (H // Hkv)
    o = np.zeros((len(q), H, v.shape[-1]), F)
    for a, b, c, d in zip(rows, rows[1:], cached, cached[1:]):
        keys, values = (x[c:d, use].swapaxes(0, 1) for x in (k, v))
        for t in range(b - a):
            last = d - c - (b - a) + t + 1
            last = {"no mask": d - c, "off by one": max(last - 1, 1), "left": t + 1}.get(what, last)
            s = F(scale) * np.einsum("hsn,hn->hs", keys[:, :last], q[a + t])
            o[a + t] = softly(s, values[:, :last], d - c, what)
    return o


BUGS |= {("attention", "no scale"): "scores of grouped heads are not scaled", ("attention", "V"): "scaled by V^-1/2",
         ("attention", "tiled"): "key head h % Hkv", ("attention", "no mask"): "see the positions behind",
         ("attention", "off by one"): "their own position", ("attention", "left"): "query t sees positions 0 to t"}
BUGS |= {(op, bug): words for op in ("attention", "latent_attention") for bug, words in {
    "16, averaged": "are averaged, not weighted by their sums of exp: pieces of 16",
    "4, added": "are added, each divided by its own sum of exp: 4 pieces",
    "4, own": "each from its own largest score, are added as they are: 4 pieces",
    "16, onward": "are not rescaled where a later one has a larger score: pieces of 16",
    "16, last": "the last alone is kept: pieces of 16"}.items()}


def rope(x, positions, base, rotary, what=None):
    n = {"all": x.shape[-1] // 2 * 2}.get(what, rotary)
    base = 1e6 if what == "base" else base
    speed = base ** (-2 * np.arange(n // 2) / (x.shape[-1] if what == "width" else n))
    angle = (positions + (what == "from 1"))[:, None, None] * speed * (-1 if what == "back" else 1)
    c, s = f(np.cos(angle)), f(np.sin(angle))
    even, odd = (slice(0, n, 2), slice(1, n, 2)) if what == "pairs" else (slice(0, n // 2), slice(n // 2, n))
    y = x.copy()
    y[..., even] = x[..., even] * c - x[..., odd] * s
    y[..., odd] = x[..., odd] * c + x[..., even] * s
    return y


BUGS |= {("rope", "all"): "all values of a head", ("rope", "base"): "base is 1e+06",
         ("rope", "width"): "over the width",
         ("rope", "from 1"): "positions are +1", ("rope", "back"): "negative angle", ("rope", "pairs"): "neighbours"}


def sigmoid_gate(x, gate, what=None):
    act = {"raw": lambda g: g, "silu": silu, "complement": lambda g: sigmoid(-g),
           "twice": lambda g: sigmoid(g) ** 2}.get(what, sigmoid)
    return x * np.repeat(act(gate), x.shape[-1] // gate.shape[-1], axis=-1)


BUGS |= {("sigmoid_gate", "raw"): "not put through a sigmoid", ("sigmoid_gate", "silu"): "SiLU of the gate",
         ("sigmoid_gate", "complement"): "1 - sigmoid", ("sigmoid_gate", "twice"): "applied twice"}


# ---- experts -------------------------------------------------------------------------------------------


def limited(gate, up, limit, what=None):
    """SwiGLU's two inputs to silu(a) b, within the limit."""
    if limit is None or what == "no limit":
        return gate, up
    low = F(-np.inf) if what == "up above" else F(-limit)
    a = gate if what == "gate free" else np.clip(gate, F(-limit) if what == "both sides" else F(-np.inf), F(limit))
    return a, up if what == "up free" else np.clip(up, low, F(limit))


def swiglu(gate, up, limit=None, what=None):
    if limit is not None:
        limit = 7 if what == "7" else limit
        if what == "after":
            return np.minimum(silu(gate), F(limit)) * np.clip(up, F(-limit), F(limit))
        if what == "product":
            return np.clip(silu(gate) * up, F(-limit), F(limit))
        if what != "swapped":
            gate, up = limited(gate, up, limit, what)
    if what == "swapped":
        gate, up = limited(up, gate, limit)
    if what == "clamped":
        gate, up = np.minimum(gate, F(7)), np.clip(up, F(-7), F(7))
    act = {"gelu": lambda x: x / 2 * (1 + np.tanh(F(0.7978845608) * (x + F(0.044715) * x * x * x))),
           "sigmoid": sigmoid, "relu": lambda x: np.maximum(x, F(0)), "nothing": lambda x: x}.get(what, silu)
    return act(gate) * up


BUGS |= {("swiglu", "swapped"): "SiLU is on w3 x (up)", ("swiglu", "clamped"): "clamped at 7", ("swiglu",
                                                                                                "gelu"): "GELU",
         ("swiglu", "after"): "silu(gate) is cut, not gate", ("swiglu", "product"): "the product is cut",
         ("swiglu", "both sides"): "gate is cut on both sides", ("swiglu", "up above"): "up is cut above alone",
         ("swiglu", "gate free"): "gate is not cut", ("swiglu", "up free"): "up is not cut",
         ("swiglu", "no limit"): "nothing is cut", ("swiglu", "7"): "the limit is 7",
         ("swiglu", "sigmoid"): "GLU, without the factor", ("swiglu", "relu"): "ReLU", ("swiglu",
                                                                                        "nothing"): "no activation"}


def situ(gate, up, beta, linear_beta=None, what=None):
    if what == "halves":
        gate, up = up, gate
    if what == "betas" and linear_beta is not None:
        beta, linear_beta = linear_beta, beta
    b, c = F(beta), F(1 if linear_beta is None else linear_beta)
    of_sigmoid = {"scaled": gate / b, "times beta": b * gate, "bounded": b * np.tanh(gate / b)}.get(what, gate)
    y = {"no beta": np.tanh(gate), "not outside": np.tanh(gate / b), "not inside": b * np.tanh(gate), "silu": gate,
         "clamp": np.clip(gate, -b, b)}.get(what, b * np.tanh(gate / b)) * sigmoid(of_sigmoid)
    if what == "swish":
        y = gate * sigmoid(b * gate)
    if linear_beta is None or what == "up":
        return y * up
    return y * (np.tanh(up / c) if what == "up not outside" else c * np.tanh(up / c))


BUGS |= {("situ", "scaled"): "takes gate / beta", ("situ", "times beta"): "takes beta gate",
         ("situ", "bounded"): "takes beta tanh(gate / beta)", ("situ", "no beta"): "tanh(x) of gate",
         ("situ", "not outside"): "tanh(x / beta) of gate", ("situ", "not inside"): "beta tanh(x) of gate",
         ("situ", "silu"): "gate is not bounded", ("situ", "clamp"): "a clamp at beta of gate",
         ("situ", "swish"): "Swish", ("situ", "up"): "up is not bounded",
         ("situ", "up not outside"): "tanh(x / beta) of up", ("situ", "halves"): "gate and up are swapped",
         ("situ", "betas"): "beta and linear_beta are swapped"}


def softmax(x, what=None):
    if what == "axis":
        e = np.exp(x - x.max(0, initial=-np.inf))
        return e / e.sum(0)
    most = F(0) if what == "overflow" else x.max(-1, keepdims=True)
    e = np.exp2(x - most) if what == "exp2" else np.exp(x - most)
    total = e.sum(-1, keepdims=True, dtype=F)
    y = e / (total + np.exp(-most) if what == "plus one" else total)
    return np.log(y) if what == "log" else y


BUGS |= {("softmax", "axis"): "over tokens", ("softmax", "overflow"): "without taking off the largest",
         ("softmax", "exp2"): "2 ** x", ("softmax", "plus one"): "one more in the sum", ("softmax",
                                                                                         "log"): "the logarithm"}


def route(scores, k, bias=None, groups=1, top_groups=1, function="sigmoid", renormalise=True, scale=1.0, what=None):
    s = softmax(scores) if (function == "softmax") != (what == "softmax") else sigmoid(scores)
    chosen = s if bias is None or what == "no bias" else s + bias
    T, E = s.shape
    if groups > 1 and what != "no groups":
        members = np.sort(chosen.reshape(T, groups, -1), -1)
        best = members[..., -1] if what == "largest" else members[..., -2:].sum(-1)
        kept = np.argsort(-best, axis=-1, kind="stable")[:, :top_groups]
        mask = (np.arange(groups)[None, :, None] == kept[:, None, :]).any(-1)
        chosen = np.where(np.repeat(mask, E // groups, -1), chosen, -np.inf)
    if what == "last of equals":
        order = E - 1 - np.argsort(-chosen[:, ::-1], axis=-1, kind="stable")
    else:
        order = np.argsort(-chosen, axis=-1, kind="stable")
    ids = np.sort(order[:, :k], -1).astype(np.int32)
    w = np.take_along_axis(s + bias if what == "biased" and bias is not None else s, ids.astype(np.int64), -1)
    if renormalise != (what == "not renormalised"):
        w = w / (w.sum(-1, keepdims=True) + F(1e-20))
    return ids, w * F({"no scale": 1, "scale twice": scale**2}.get(what, scale))


BUGS |= {("route", "no bias"): "without the bias", ("route", "softmax"): "softmax for sigmoid",
         ("route", "no groups"): "among all groups", ("route", "largest"): "by their best expert",
         ("route", "biased"): "is in the weights", ("route", "not renormalised"): "not divided by their sum",
         ("route", "no scale"): "routed_scaling_factor is forgotten", ("route", "scale twice"): "is applied twice",
         ("route", "last of equals"): "the last expert wins"}


def gated(gate, up, betas, limit, what):
    return swiglu(gate, up, limit, what if what in ("after", "no limit", "both sides") else None) if betas is None \
        else situ(gate, up, *betas)


def moe(x, ids, weights, w_gate, w_up, w_down, shared=None, shared_gate=None, situ=None, limit=None, what=None):
    y = np.zeros_like(x)
    if limit is not None and what == "sum cut":
        y = np.clip(moe(x, ids, weights, w_gate, w_up, w_down, situ=situ), F(-limit), F(limit))
        return y if shared is None else y + shared
    if what == "swapped":
        w_gate, w_up = w_up, w_gate
    for t in range(len(x)):
        for e, weight in zip(ids[t], weights[t]):
            e = (e + 1) % len(w_gate) if what == "next expert" else e
            xt = x[t] * weight if what == "on the input" else x[t]
            h = gated(w_gate[e] @ xt, w_up[e] @ xt, None if what == "swiglu" else situ, limit, what)
            y[t] += (F(1) if what in ("on the input", "no weights") else weight) * (w_down[e] @ h)
    if shared is None or what == "no shared":
        return y
    if shared_gate is not None and what != "no gate":
        shared = shared * (x @ shared_gate.T if what == "raw gate" else sigmoid(x @ shared_gate.T))
    return y + shared * F(2 if what == "shared twice" else 1)


BUGS |= {("moe", "swapped"): "SiLU is on w3 x (up)", ("moe", "next expert"): "expert e + 1",
         ("moe", "on the input"): "before the expert", ("moe", "no weights"): "with weight 1",
         ("moe", "no shared"): "shared expert is left out", ("moe", "shared twice"): "shared expert is added twice",
         ("moe", "no gate"): "gate is left out", ("moe", "raw gate"): "not put through a sigmoid",
         ("moe", "swiglu"): "where SiTU belongs", ("moe", "sum cut"): "on the sum of the experts",
         ("moe", "after"): "silu(gate) is cut, not gate", ("moe", "no limit"): "nothing is cut",
         ("moe", "both sides"): "gate is cut on both sides"}


# ---- attention over depth --------------------------------------------------------------------------------


def attn_res(snapshots, x, w, eps, what=None):
    if len(snapshots) == 0:
        return x.copy()
    if what == "no newest":
        snapshots = snapshots[:-1]
    v = snapshots if what == "no x" else np.concatenate([snapshots, x[None]])
    square, near, power = mean_square(v, what)
    eps = F(0 if what == "no eps" else eps) * power * power
    length = np.sqrt(square) + eps if what == "outside" else np.sqrt(square + eps)
    if what == "l2":
        length = np.sqrt(square * F(x.shape[-1]) + eps)
    terms = w * v if what == "no norm" else w * (near / length)
    scores = terms if what == "channels" else terms.sum(-1, keepdims=True, dtype=F)
    if what == "scaled":
        scores = scores * F(x.shape[-1] ** -0.5)
    axis = 1 if what == "tokens" else 0
    e = np.exp(scores - scores.max(axis, keepdims=True, initial=-np.inf))
    p = e / e.sum(axis, keepdims=True, dtype=F)
    if what == "mean":
        p = np.full_like(p, F(1) / F(len(v)))
    y = (p * (near / length if what == "normed" else v)).sum(0, dtype=F)
    return y + x if what == "residual" else y


BUGS |= {("attn_res", "normed"): "mixed after their norm", ("attn_res", "no norm"): "without their norm",
         ("attn_res", "no eps"): "has no eps", ("attn_res", "outside"): "eps is outside of the root",
         ("attn_res", "l2"): "an L2 norm", ("attn_res", "overflow"): "overflows float32",
         ("attn_res", "no x"): "running sum is no candidate", ("attn_res", "no newest"): "newest snapshot is left out",
         ("attn_res", "mean"): "all candidates have one weight", ("attn_res", "tokens"): "over tokens",
         ("attn_res", "channels"): "each channel", ("attn_res", "scaled"): "D^-1/2",
         ("attn_res", "residual"): "is added to the mixture"}


# ---- hyper-connections -----------------------------------------------------------------------------------


def mhc_pre(x, fn, base, scale, norm_eps, eps=1e-6, iters=20, what=None):
    T, n, D = x.shape
    flat = x.reshape(T, n * D)
    if what == "inner":
        flat = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(T, n * D)
    if what == "by stream":
        square, near, power = mean_square(x, what)
        near = (near / np.sqrt(square + F(norm_eps) * power * power)).reshape(T, n * D)
        root = F(1)
    else:
        square, near, power = mean_square(flat, what)
        if what == "l2":
            square = square * F(n * D)
        root = np.sqrt(square + F({"hc eps": eps, "no norm eps": 0}.get(what, norm_eps)) * power * power)
    m = flat @ fn.T if what == "no norm" else (near @ fn.T) / root
    order = [1, 0, 2] if what == "scales" else [0, 1, 2]
    logits = m * np.repeat(scale[order], [n, n, n * n]) + (F(0) if what == "no base" else base)
    a, b, c = np.split(logits, [n, 2 * n], -1)
    if what == "pre and post":
        a, b = b, a
    pre = sigmoid(a) + F(0 if what == "pre eps" else eps)
    post = sigmoid(b) * F(1 if what == "once" else 2)
    c = c.reshape(T, n, n)
    axis = 1 if what == "columns" else 2
    c = np.exp(c - c.max(axis, keepdims=True))
    c = c / c.sum(axis, keepdims=True, dtype=F) + F(0 if what == "comb eps" else eps)
    first, second = (2, 1) if what == "rows first" else (1, 2)
    c = c / (c.sum(first, keepdims=True, dtype=F) + F(eps))
    for _ in range(iters - (0 if what == "one more" else 1)):
        c = c / (c.sum(second, keepdims=True, dtype=F) + F(eps))
        c = c / (c.sum(first, keepdims=True, dtype=F) + F(eps))
    if what == "transposed":
        c = np.ascontiguousarray(c.swapaxes(1, 2))
    if what == "normed":
        x = (near / root).reshape(T, n, D)
    y = (pre[..., None] * x).sum(1, dtype=F)
    return y / F(n) if what == "mean" else y, post, c


def mhc_post(y, x, post, comb, what=None):
    post, across = post[..., None], comb if what == "not transposed" else comb.swapaxes(1, 2)
    if what == "no post":
        post = np.ones_like(post)
    if what == "doubled":
        post = F(2) * post
    added = F(0) if what == "no y" else post * y[:, None]
    if what == "no streams":
        return added + np.zeros_like(x)
    if what == "written over":
        out = x.copy()
        for j in range(x.shape[1]):
            out[:, j] = added[:, j] + (comb[:, :, j, None] * out).sum(1, dtype=F)
        return out
    return added + (x if what == "identity" else across @ x)


BUGS |= {("mhc_pre", "inner"): "read as [D, n]", ("mhc_pre", "by stream"): "each stream has a norm of its own",
         ("mhc_pre", "l2"): "an L2 norm", ("mhc_pre", "hc eps"): "eps is that of the connections",
         ("mhc_pre", "no norm eps"): "the norm has no eps", ("mhc_pre", "no norm"): "not normed before fn",
         ("mhc_pre", "overflow"): "overflows float32", ("mhc_pre", "scales"): "have scale(1, 0, 2)",
         ("mhc_pre", "no base"): "base is not added", ("mhc_pre", "pre and post"): "are exchanged",
         ("mhc_pre", "pre eps"): "pre has no eps", ("mhc_pre", "once"): "without the factor 2",
         ("mhc_pre", "columns"): "softmax is over columns", ("mhc_pre", "comb eps"): "the softmax of comb has no eps",
         ("mhc_pre", "rows first"): "rows are normalised first", ("mhc_pre", "one more"): "+1 normalisation",
         ("mhc_pre", "transposed"): "comb comes transposed", ("mhc_pre", "normed"): "made of the normed streams",
         ("mhc_pre", "mean"): "the mean of pre x",
         ("mhc_post", "not transposed"): "comb is not transposed", ("mhc_post", "no post"): "added without post",
         ("mhc_post", "doubled"): "factor 2 once more", ("mhc_post", "no y"): "y is not added",
         ("mhc_post", "no streams"): "streams are left out", ("mhc_post", "written over"): "is written before",
         ("mhc_post", "identity"): "comb is the identity"}


# ---- the indexer of sparse attention ---------------------------------------------------------------------


def index_pool(k, gate, ape, offsets=None, what=None):
    P, D = ape.shape
    at, keys = [0, len(k)] if offsets is None else offsets.tolist(), []
    if what == "swapped":
        k, gate = gate, k
    for a, b in zip(at, at[1:]):
        n = (b - a) // P
        a = b - n * P if what == "from the end" else a // P * P if what == "of the call" else a
        of, g = (x[a:a + n * P].reshape(n, P, D) for x in (k, gate))
        logits = g if what in ("no ape", "ape on k") else g + ape
        if what == "ape on k":
            of = of + ape
        axis = 2 if what == "channels" else 1
        e = np.exp(logits - (F(0) if what == "no maximum" else logits.max(axis, keepdims=True, initial=-np.inf)))
        p = np.full_like(e, F(1) / F(P)) if what == "mean" else e if what == "raw" else e / e.sum(axis, keepdims=True)
        keys.append((p * of).sum(1, dtype=F))
    return np.concatenate(keys)


BUGS |= {("index_pool", "swapped"): "gate and k are swapped", ("index_pool", "from the end"): "from the last token",
         ("index_pool", "of the call"): "from the call's first token", ("index_pool", "no ape"): "ape is left out",
         ("index_pool", "ape on k"): "added to the keys", ("index_pool", "channels"): "over channels",
         ("index_pool", "no maximum"): "exp overflows float32", ("index_pool", "mean"): "a mean, no softmax",
         ("index_pool", "raw"): "not divided by their sum, the largest"}


def of_pools(q, keys, weights, pool, offsets, positions, what):
    """Query, position, and its scores of the pools of its sequence, as far as they are complete."""
    at = [0, len(q)] if offsets is None else offsets.tolist()
    cached = np.diff(at) if positions is None else np.ravel(positions)
    first = 0
    for a, b, S in zip(at, at[1:], cached):
        mine = keys[:S // pool] if what == "first keys" else keys[first:first + S // pool]
        first += S // pool
        for t in range(a, b):
            seen = t - a + 1 if what == "left" else S - (b - t) + 1
            dots, w = mine @ q[t].T, np.abs(weights[t]) * F(0) + F(1) if what == "no weights" else weights[t]
            heads = w * (dots if what == "no relu" else np.maximum(dots, F(0)))
            if what == "relu behind":
                heads = np.maximum(w * dots, F(0))
            s = heads.max(-1) if what == "max" else heads.sum(-1, dtype=F)
            complete = (seen + {"early": 1, "late": -1}.get(what, 0)) // pool
            yield t, S - (b - t), s[:min(complete, len(mine))]


def index_scores(q, keys, weights, scale, pool, offsets=None, positions=None, what=None):
    rows = list(of_pools(q, keys, weights, pool, offsets, positions, what))
    cached = np.diff([0, len(q)] if offsets is None else offsets) if positions is None else np.ravel(positions)
    y = np.full((len(q), int(cached.max(initial=0)) // pool), -np.inf, F)
    for t, _, s in rows:
        y[t, :len(s)] = s * F({"no scale": 1, "scale twice": scale**2}.get(what, scale))
    return y


SCORES = {"first keys": "keys of the first", "left": "query t is at position t", "no weights": "without their weights",
          "no relu": "without relu", "relu behind": "not of its dot", "max": "taken for the sum over heads",
          "early": "one token before", "late": "one token after"}
BUGS |= {("index_scores", bug): words for bug, words in SCORES.items()}
BUGS |= {("index_scores", "no scale"): "not scaled", ("index_scores", "scale twice"): "scaled twice"}


def index_select(q, keys, weights, topk, pool, offsets=None, positions=None, what=None):
    ids = np.full((len(q), topk + pool - 1), -1, np.int32)
    k = topk if what == "in pools" else topk // pool
    for t, position, s in of_pools(q, keys, weights, pool, offsets, positions, what):
        s = np.where(np.isnan(s), np.inf, s)
        best = np.argsort(s if what == "least" else -s, kind="stable")
        if what == "last of equals":
            best = len(s) - 1 - np.argsort(-s[::-1], kind="stable")
        if what == "newest":
            best = np.arange(len(s))[::-1]
        chosen = np.sort(best[:k])
        row = chosen if what == "pools" else (chosen[:, None] * pool + np.arange(pool)).ravel()
        begin = (position + 1) // pool * pool
        tail = np.arange(begin, position + 1 - (what == "not itself"))
        if what == "whole tail":
            tail = np.arange(position // pool * pool, position // pool * pool + pool)
        row = np.unique(np.concatenate([row, tail[:0] if what == "no tail" else tail]))[:ids.shape[1]]
        ids[t, :len(row)] = row
    return np.sort(ids, 1) if what == "in front" else ids


BUGS |= {("index_select", bug): words for bug, words in SCORES.items()}
BUGS |= {("index_select", "in pools"): "counted in pools", ("index_select", "least"): "with the least scores",
         ("index_select", "last of equals"): "the higher pool", ("index_select", "newest"): "the newest pools",
         ("index_select", "pools"): "ids are of pools", ("index_select", "not itself"): "own position is left out",
         ("index_select", "whole tail"): "to its end", ("index_select", "no tail"): "incomplete pool are left out",
         ("index_select", "in front"): "in front of the positions"}
