"""Faults of hyper-connections."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import BOTH, CALL, RUN, Fault, changed, of_call

FLOAT32_MAX = float(np.finfo(np.float32).max)

# ---- mhc_pre, step by step -----------------------------------------------------------------------------
#
# A step is a function of the call and of what it is made from; a fault is `built` with one of them wrong.


def flat_of(call):
    x = call["x"]
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def mean_of_squares(flat):
    return (flat * flat).mean(-1, keepdims=True)


def normed(call):
    flat = flat_of(call)
    return flat / np.sqrt(mean_of_squares(flat) + call["norm_eps"])


def product(call, flat):
    return flat @ call["fn"].T


def logits_of(call, m):
    n = call["x"].shape[-2]
    return m * np.repeat(call["scale"], [n, n, n * n]) + call["base"]


def pre_of(call, logits):
    return reference.sigmoid(logits) + call["eps"]


def post_of(call, logits):
    return 2 * reference.sigmoid(logits)


def over_sum(c, axis, eps):
    return c / (c.sum(axis, keepdims=True) + eps)


def balanced(c, iters, eps, first=-2, second=-1):
    c = over_sum(c, first, eps)
    for _ in range(iters - 1):
        c = over_sum(over_sum(c, second, eps), first, eps)
    return c


def comb_of(call, logits):
    return balanced(reference.softmax(logits) + call["eps"], call["iters"], call["eps"])


def y_of(call, pre):
    return (pre[..., None] * call["x"]).sum(-2)


def built(flat=normed, product=product, logits=logits_of, pre=pre_of, post=post_of, comb=comb_of, y=y_of):
    """The op of these steps, a function of the call and of the choice, which goes to the step that takes one."""
    def function(call, *choice):
        n = call["x"].shape[-2]
        m = product(call, flat(call))
        all_logits = logits(call, m, *choice)
        square = all_logits[..., 2 * n:].reshape(*m.shape[:-1], n, n)
        return y(call, pre(call, all_logits[..., :n])), post(call, all_logits[..., n:2 * n]), comb(call, square)

    return function


# ---- wrong steps ---------------------------------------------------------------------------------------


def over(root):
    """Another root: a function of the mean of squares, eps and the width."""
    def flat(call):
        x = flat_of(call)
        return x / root(mean_of_squares(x), call["norm_eps"], x.shape[-1])

    return flat


def overflowing(call):
    x = flat_of(call)
    return np.where((x * x).sum(-1, keepdims=True) > FLOAT32_MAX, 0.0, normed(call))


def normed_by_stream(call):
    x = call["x"]
    x = x / np.sqrt(mean_of_squares(x) + call["norm_eps"])
    return x.reshape(*x.shape[:-2], -1) if x.size else flat_of(call)


def streams_inner(call):
    """The values of a token as [D, n]."""
    x = normed(call).reshape(call["x"].shape)
    return np.swapaxes(x, -1, -2).reshape(flat_of(call).shape)


def eps_of_connections(call):
    return call.results(norm_eps=call["eps"]) if call["norm_eps"] != call["eps"] else None


def softmax_otherwise(call):
    """What exponentials have in common whose rows are not normalised before their columns are."""
    return built(comb=softmax_over(-2))(call)


def eps_lost(call):
    """What an eps outside of the root and none have in common."""
    return call.results(norm_eps=0.0)


def eps_of_norm(call):
    return call.results(eps=call["norm_eps"]) if call["norm_eps"] != call["eps"] else None


def fn_transposed(call, flat):
    return flat @ call["fn"].reshape(call["fn"].shape[::-1])


#: Orders of the parts of m, fn and base, from ours.
ORDERS = {"post, pre, comb": (1, 0, 2), "comb, pre, post": (2, 0, 1), "comb, post, pre": (2, 1, 0)}


def in_other_order(call, m, order):
    """Logits by our names, read from rows that stand in another order."""
    n = call["x"].shape[-2]
    sizes, parts = (n, n, n * n), ORDERS[order]
    begins = np.cumsum([0] + [sizes[part] for part in parts])
    rows = np.concatenate([np.arange(begins[at], begins[at] + sizes[part])
                           for part, at in sorted(zip(parts, range(3)))])
    return m[..., rows] * np.repeat(call["scale"], sizes) + call["base"][rows]


def exchanged(call, m):
    logits, n = logits_of(call, m), call["x"].shape[-2]
    return np.concatenate([logits[..., n:2 * n], logits[..., :n], logits[..., 2 * n:]], -1)


def scaled_by(call, m, which):
    n = call["x"].shape[-2]
    return m * np.repeat(call["scale"][list(which)], [n, n, n * n]) + call["base"]


def base_transposed(call, m):
    n, base = call["x"].shape[-2], call["base"].copy()
    base[2 * n:] = base[2 * n:].reshape(n, n).T.ravel()
    return logits_of(call, m) - call["base"] + base


def flushed_post(call, logits):
    post = post_of(call, logits)
    return np.where(post < 2.0**-125, 0.0, post)


def softmax_over(axis):
    def comb(call, logits):
        if axis is None:
            whole = logits.reshape(*logits.shape[:-2], logits.shape[-1] ** 2)
            c = reference.softmax(whole).reshape(logits.shape)
        else:
            c = np.swapaxes(reference.softmax(np.swapaxes(logits, -1, -2)), -1, -2)
        return balanced(c + call["eps"], call["iters"], call["eps"])

    return comb


def from_entries(entries):
    """Other entries in front of the normalisations."""
    return lambda call, logits: balanced(entries(logits) + call["eps"], call["iters"], call["eps"])


def eps_of_columns_alone(call, logits):
    c = over_sum(reference.softmax(logits) + call["eps"], -2, call["eps"])
    for _ in range(call["iters"] - 1):
        c = over_sum(over_sum(c, -1, 0.0), -2, call["eps"])
    return c


def rows_first(call, logits):
    return balanced(reference.softmax(logits) + call["eps"], call["iters"], call["eps"], -1, -2)


def rows_last(call, logits):
    return over_sum(comb_of(call, logits), -1, call["eps"])


def never_normalised(call, logits):
    return reference.softmax(logits) + call["eps"]


def columns_alone(call, logits):
    c = reference.softmax(logits) + call["eps"]
    for _ in range(call["iters"]):
        c = over_sum(c, -2, call["eps"])
    return c


def other_iters(call, more: int):
    return call.results(iters=call["iters"] + more) if call["iters"] + more >= 1 else None


def y_of_normed(call, pre):
    return (pre[..., None] * normed(call).reshape(call["x"].shape)).sum(-2)


# ---- mhc_post ------------------------------------------------------------------------------------------


def written_over(call):
    """Streams are read where earlier results stand already."""
    out = call["x"].copy()
    for j in range(out.shape[-2]):
        mixed = (call["comb"][..., :, j, None] * out).sum(-2)
        out[..., j, :] = call["post"][..., j, None] * call["y"] + mixed
    return out


def averaged(call):
    n = call["x"].shape[-2]
    return call.run(comb=np.full(call["comb"].shape, 1 / n))


# ---- all -----------------------------------------------------------------------------------------------


def _pre(name, text, function, source="", choices=((),), use=BOTH, **named):
    ops = PRE[:1] if use == CALL else PRE
    return Fault(f"mhc_{name}", text, ops, of_call(function), choices=choices, source=source, use=use, **named)


def _post(name, text, function, source=""):
    return Fault(f"mhc_post_{name}", text, ("mhc_post",), of_call(function), source=source)


PRE = ("mhc_pre", "mhc_pre_post", "mhc_pre_comb")
PAPER, CONFIG = "arXiv:2512.24880", "GLM-5.3-Flash: rms_norm_eps is 1e-5, hc_eps 1e-6"
TORCH = "vLLM: vllm/model_executor/kernels/mhc/torch.py"

FAULTS = (
    _pre("eps_of_connections", "the norm's eps is that of the connections; it is the model's rms_norm_eps",
         eps_of_connections, CONFIG),
    _pre("eps_lost", "the norm's eps is outside of the root, or missing: a run does not tell which",
         eps_lost, use=RUN),
    _pre("eps_of_norm", "pre and comb have the norm's eps; theirs is that of the connections", eps_of_norm, CONFIG),
    _pre("eps_missing", "the norm has no eps", built(over(lambda mean, eps, K: np.sqrt(mean))), use=CALL),
    _pre("eps_outside", "the norm's eps is outside of the root",
         built(over(lambda mean, eps, K: np.sqrt(mean) + eps)), use=CALL),
    _pre("norm_by_stream", "each stream has a norm of its own; there is one over all n D values",
         built(normed_by_stream), PAPER),
    _pre("norm_missing", "the streams are not normed before fn", built(flat_of)),
    _pre("norm_l2", "an L2 norm: the sum of squares in place of their mean",
         built(over(lambda mean, eps, K: np.sqrt(K * mean + eps)))),
    _pre("norm_overflow", "the sum of squares overflows float32: fn has no part", built(overflowing), use=CALL),
    _pre("streams_inner", "columns of fn are read as [D, n]; they are [n, D], stream by stream", built(streams_inner)),
    _pre("fn_transposed", "fn is read as [n D, (2 + n) n]", built(product=fn_transposed)),
    _pre("other_order", "rows of fn and base are read in another order", built(logits=in_other_order),
         choices=tuple((order,) for order in ORDERS),
         each="rows of fn and base are read as {}; they are pre, post, comb"),
    _pre("exchanged", "pre and post are exchanged, with their scales", built(logits=exchanged)),
    _pre("scale_of_other", "scale is read in another order", built(logits=scaled_by),
         choices=(((1, 0, 2),), ((0, 2, 1),), ((2, 1, 0),), ((1, 2, 0),), ((2, 0, 1),), ((0, 0, 0),)),
         each="pre, post and comb have scale{}"),
    _pre("scale_missing", "logits are not scaled", built(logits=lambda call, m: m + call["base"])),
    _pre("base_missing", "base is not added", built(logits=lambda call, m: logits_of(call, m) - call["base"])),
    _pre("base_scaled", "base is added before the scale", built(logits=lambda call, m: logits_of(
        call, m + call["base"]) - call["base"])),
    _pre("base_transposed", "base of comb is read as its transpose", built(logits=base_transposed)),
    _pre("pre_eps_missing", "pre has no eps", built(pre=lambda call, logits: reference.sigmoid(logits)), TORCH),
    _pre("pre_doubled", "pre has the factor 2, which is post's", built(pre=lambda call, logits: 2 * reference.sigmoid(
        logits) + call["eps"])),
    _pre("pre_softmax", "pre is a softmax over the streams; it is a sigmoid each",
         built(pre=lambda call, logits: reference.softmax(logits) + call["eps"])),
    _pre("post_not_doubled", "post is a sigmoid without the factor 2",
         built(post=lambda call, logits: reference.sigmoid(logits)), TORCH),
    _pre("post_eps", "post has an eps, as pre has",
         built(post=lambda call, logits: post_of(call, logits) + call["eps"])),
    _pre("post_twice_inside", "post is sigmoid(2 m): the factor is inside",
         built(post=lambda call, logits: reference.sigmoid(2 * logits))),
    _pre("sigmoid_flushed", "sigmoids below 2^-126 are 0", built(post=flushed_post),
         "processors that flush subnormals; torch", use=CALL),
    _pre("softmax_over_columns", "comb's softmax is over columns; it is over rows", built(comb=softmax_over(-2)),
         use=CALL),
    _pre("softmax_over_all", "comb's softmax is over all n n values; it is over rows", built(comb=softmax_over(None)),
         use=CALL),
    _pre("exp", "comb has exponentials, without the softmax", built(comb=from_entries(np.exp)), PAPER, use=CALL),
    _pre("softmax_otherwise", "comb's softmax is over columns, over all values, or not divided by its sums: a run does "
         "not tell which; it is over rows", softmax_otherwise, use=RUN),
    _pre("sigmoids", "comb has sigmoids for the softmax", built(comb=from_entries(reference.sigmoid))),
    _pre("comb_eps_missing", "the softmax of comb has no eps; its sums have", built(comb=lambda call, logits: balanced(
        reference.softmax(logits), call["iters"], call["eps"]))),
    _pre("sum_eps_missing", "the sums of comb have no eps; its softmax has", built(comb=lambda call, logits: balanced(
        reference.softmax(logits) + call["eps"], call["iters"], 0.0))),
    _pre("column_eps_alone", "the sums of comb's rows have no eps", built(comb=eps_of_columns_alone), use=CALL),
    _pre("rows_first", "comb's rows are normalised first; its columns are", built(comb=rows_first), PAPER),
    _pre("rows_last", "comb's rows are normalised once more at the end", built(comb=rows_last)),
    _pre("columns_alone", "comb's columns alone are normalised", built(comb=columns_alone)),
    _pre("never_normalised", "comb is the softmax, and is not normalised", built(comb=never_normalised)),
    _pre("iters", "another number of normalisations", other_iters, choices=((-1,), (1,)),
         each="{:+d} normalisation of columns, with that of rows before it"),
    _pre("comb_transposed", "comb comes transposed", built(comb=lambda call, logits: np.swapaxes(
        comb_of(call, logits), -1, -2))),
    _pre("logits_transposed", "the logits of comb are read by columns",
         built(comb=lambda call, logits: comb_of(call, np.swapaxes(logits, -1, -2)))),
    _pre("y_of_normed", "y is made of the normed streams; the norm is for fn alone", built(y=y_of_normed)),
    _pre("y_mean", "y is the mean of pre x; it is the sum", built(y=lambda call, pre: y_of(call, pre) / pre.shape[-1])),
    _pre("y_without_pre", "y is the mean of the streams, without pre",
         built(y=lambda call, pre: call["x"].mean(-2)), "the model's last collapse"),
    _pre("y_normalised", "pre is divided by its sum",
         built(y=lambda call, pre: y_of(call, pre / pre.sum(-1, keepdims=True)))),
    _post("not_transposed", "comb is not transposed: out[j] has comb[j, i] of stream i",
          changed(comb=lambda call: np.swapaxes(call["comb"], -1, -2)), TORCH),
    _post("post_missing", "y is added without post", changed(post=lambda call: np.ones_like(call["post"]))),
    _post("y_missing", "y is not added", changed(post=lambda call: np.zeros_like(call["post"]))),
    _post("streams_missing", "the streams are left out", changed(comb=lambda call: np.zeros_like(call["comb"]))),
    _post("comb_missing", "the streams are not mixed: comb is the identity", changed(comb=lambda call: np.broadcast_to(
        np.eye(call["x"].shape[-2]), call["comb"].shape)), "ordinary residuals"),
    _post("comb_twice", "the streams are added besides", lambda call: call.run() + call["x"], "ordinary residuals"),
    _post("averaged", "all streams have one weight, 1 / n", averaged),
    _post("post_doubled", "post has the factor 2 once more", changed(post=lambda call: 2 * call["post"])),
    _post("post_halved", "post's factor 2 is taken off", changed(post=lambda call: call["post"] / 2)),
    _post("written_over", "a stream is written before the others have read it", written_over),
)
