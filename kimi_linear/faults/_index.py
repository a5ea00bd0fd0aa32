"""Faults of the indexer of sparse attention: keys of pools, their scores, and the positions that are chosen."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import BOTH, CALL, RUN, SEVERAL, TIES, Fault, of_call
from .site import Site

# ---- keys of pools ----


def pooled(weigh, at=None):
    """Other weights ``weigh(gate [n, P, D], ape)`` of a pool's tokens, or other tokens ``at(r, P)`` [n, P] of a
    sequence's pools."""
    def function(call):
        k, gate, ape = call["k"], call["gate"], call["ape"]
        P, keys = len(ape), [np.zeros((0, k.shape[1]))]
        for r in reference.sequences(len(k), call["offsets"]):
            n = (r.stop - r.start) // P
            rows = r.start + np.arange(n * P).reshape(n, P) if at is None else at(r, P)
            keys.append((weigh(gate[rows], ape) * k[rows]).sum(1))
        return np.concatenate(keys)

    return function


def softmax(logits, axis=1):
    """Over the tokens of a pool [n, P, D]."""
    e = np.exp(logits - logits.max(axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis, keepdims=True)


def right(gate, ape):
    return softmax(gate + ape)


def without_maximum(gate, ape):
    """exp in float32 as it is: it overflows."""
    with np.errstate(over="ignore"):
        e = np.exp(np.float32(gate + ape)).astype(np.float64)
    return e / e.sum(1, keepdims=True)


def from_the_end(r, P):
    """The last pool ends with the last token."""
    n = (r.stop - r.start) // P
    return r.stop - n * P + np.arange(n * P).reshape(n, P)


def of_the_call(r, P):
    """Pools as if the call's first token began all of them."""
    n = (r.stop - r.start) // P
    return r.start // P * P + np.arange(n * P).reshape(n, P)


def strided(r, P):
    """Pool p has the tokens p, p + n, ..."""
    n = (r.stop - r.start) // P
    return r.start + np.arange(n * P).reshape(P, n).T


def ape_on_keys(call):
    k, ape = call["k"].copy(), call["ape"]
    for r in reference.sequences(len(k), call.args.get("offsets")):
        k[r] += ape[np.arange(r.stop - r.start) % len(ape)]
    return call.run(k=k, ape=0 * ape)


# ---- scores ----


def weighed(dots, w):
    """Right: [L, n] of dots [L, H, n] and the weights of heads [L, H]."""
    return np.einsum("lh,lhn->ln", w, np.maximum(dots, 0.0))


def parts(call):
    """(rows, positions, keys) of each sequence."""
    first = 0
    rows = reference.index_sequences(len(call["q"]), call["offsets"], call["positions"])
    for r, S in zip(*rows, strict=True):
        n = S // call["pool"]
        yield r, S, call["keys"][first:first + n]
        first += n


def seen_by(r, S):
    L = r.stop - r.start
    return S - L + 1 + np.arange(L)


def scores_of(call, formula=weighed, seen=seen_by, early=0, keys=None):
    """Scores [T, most pools], -inf where a pool is not complete; `early`: it is so many positions before."""
    q, w, pool = call["q"], call["weights"], call["pool"]
    scores = np.full((len(q), max((S // pool for _, S, _ in parts(call)), default=0)), -np.inf)
    for r, S, mine in parts(call):
        mine = mine if keys is None else keys(mine, call)
        s = formula(np.einsum("thd,pd->thp", q[r], mine), w[r])
        complete = np.minimum((seen(r, S) + early) // pool, len(mine))
        scores[r, :len(mine)] = np.where(np.arange(len(mine)) < complete[:, None], s, -np.inf)
    return scores


def chosen(call, scores, k=None, order=reference.best_first, positions=None, tail=None):
    """Ids by other scores, number of pools, order of them; `positions`: of chosen pools, `tail`: of (seen, pool)."""
    pool, topk = call["pool"], call["topk"]
    ids = np.full((len(scores), topk + pool - 1), -1, np.int64)
    for r, S, _ in parts(call):
        for t, seen in zip(range(r.start, r.stop), seen_by(r, S), strict=True):
            of = scores[t, :np.flatnonzero(scores[t] != -np.inf).max(initial=-1) + 1]
            best = np.sort(order(of)[:topk // pool if k is None else k(call)])
            whole = (best[:, None] * pool + np.arange(pool)).ravel() if positions is None else positions(best, r)
            last = np.arange(seen // pool * pool, seen) if tail is None else tail(seen, pool)
            row = np.unique(np.concatenate([whole, last[last >= 0]]).astype(np.int64))[:ids.shape[1]]
            ids[t, :len(row)] = row
    return ids


def by_scores(formula=weighed, scale=None, **how):
    """Other scores, and what is chosen by them."""
    def function(call):
        scores = scores_of(call, formula, **how)
        if call.op == "index_select":
            return chosen(call, scores)
        return np.where(scores == -np.inf, scores, scores * (call["scale"] if scale is None else scale(call)))

    return function


def by_ids(**how):
    """Right scores, and another choice."""
    def function(call):
        return chosen(call, scores_of(call), **how)

    return function


def first_keys(keys, call):
    """Of every sequence the first one's."""
    return call["keys"][:len(keys)]


def as_if_uncached(r, S):
    return 1 + np.arange(r.stop - r.start)


def all_of_it(r, S):
    return np.full(r.stop - r.start, S)


def higher_first(scores):
    """Of equals the higher pool."""
    return len(scores) - 1 - reference.best_first(scores[::-1])


def least_first(scores):
    return np.argsort(scores, kind="stable")


def newest_first(scores):
    return np.arange(len(scores))[::-1]


def in_order(scores):
    return np.arange(len(scores))


def whole_tail(seen, pool):
    """The pool of the query's own position, to its end."""
    return np.arange((seen - 1) // pool * pool, (seen - 1) // pool * pool + pool)


def of_the_batch(call):
    """Ids counted from the first position of the call."""
    ids, first = call.run().astype(np.int64), 0
    for r, S, _ in parts(call):
        ids[r] = np.where(ids[r] < 0, -1, ids[r] + first)
        first += S
    return ids


def behind_nothing(call):
    """-1 in front."""
    ids = call.run().astype(np.int64)
    return np.sort(ids, axis=1)


def best_first_ids(call):
    """In order of the scores, pool by pool, the tail behind."""
    ids, scores, pool = call.run().astype(np.int64), scores_of(call), call["pool"]
    for r, S, _ in parts(call):
        for t, seen in zip(range(r.start, r.stop), seen_by(r, S), strict=True):
            order = reference.best_first(scores[t, :seen // pool])[:call["topk"] // pool]
            whole = (order[:, None] * pool + np.arange(pool)).ravel()
            ids[t, :len(whole)] = whole
    return ids


def zeros_behind(call):
    ids = call.run().astype(np.int64)
    return np.where(ids < 0, 0, ids)


def projected_as_other(site: Site):
    """A projection with the matrix of the other: keys with the gate's, or the gate with the keys'."""
    names, w = ("wk.weight", "index_kpool_compress_gate"), site.node.weights["w"]
    a, b = names if w.name.endswith(names[0]) else names[::-1]
    return site.with_weights(w=w._replace(name=w.name.replace(a, b)))


def _pool(name, text, function, source="", **named):
    return Fault(f"index_pool_{name}", text, ("index_pool",), of_call(function), source=source, **named)


def _score(name, text, function, source="", ops=("index_scores", "index_select"), **named):
    named.setdefault("use", BOTH if "index_select" in ops else CALL)  # a scale of all scores changes no choice
    return Fault(f"index_{name}", text, ops, of_call(function), source=source, **named)


def _ids(name, text, function, source="", **named):
    return Fault(f"index_ids_{name}", text, ("index_select",), of_call(function), source=source, **named)


V32, GLM = "DeepSeek-V3.2, arXiv:2512.02556", "transformers: Glm5NextTextIndexer"
SCORES = ("index_scores",)

FAULTS = (
    _pool("mean", "tokens of a pool have one weight: a mean, no softmax", pooled(lambda g, a: np.full(
        g.shape, 1 / g.shape[1]))),
    _pool("largest", "the token with the largest gate is taken, in each channel", pooled(lambda g, a: (
        np.arange(g.shape[1])[:, None] == (g + a).argmax(1)[:, None]).astype(np.float64))),
    _pool("over_channels", "the softmax is over channels, not over the tokens of a pool",
          pooled(lambda g, a: softmax(g + a, axis=2))),
    _pool("of_sums", "a token has one weight: the softmax of its gate's mean over channels", pooled(
        lambda g, a: np.broadcast_to(softmax((g + a).mean(2, keepdims=True)), g.shape)), V32),
    _pool("ape_missing", "ape is left out", pooled(lambda g, a: softmax(g))),
    _pool("ape_reversed", "ape is read from the last place to the first", pooled(lambda g, a: softmax(g + a[::-1]))),
    _pool("ape_alone", "the gate is left out: weights are the softmax of ape", pooled(
        lambda g, a: softmax(g * 0 + a))),
    _pool("ape_on_keys", "ape is added to the keys, not to the gate", ape_on_keys),
    _pool("swapped", "gate and k are swapped", lambda c: c.run(k=c["gate"], gate=c["k"])),
    _pool("sigmoid", "sigmoids for the softmax: weights do not add up to 1",
          pooled(lambda g, a: reference.sigmoid(g + a))),
    _pool("unnormalised", "exponentials are not divided by their sum", pooled(lambda g, a: np.exp(g + a))),
    _pool("unnormalised_of_largest", "exponentials are not divided by their sum, the largest of a pool is 1", pooled(
        lambda g, a: np.exp(g + a - (g + a).max(1, keepdims=True, initial=-np.inf)))),
    _pool("no_maximum", "exp overflows float32: the largest logit is not taken off first", pooled(without_maximum),
          use=CALL),
    _pool("scaled", "gates are scaled by D^-1/2", pooled(lambda g, a: softmax((g + a) * g.shape[2] ** -0.5))),
    _pool("offsets_ignored", "pools are counted from the call's first token, not the sequence's",
          pooled(right, of_the_call), scenario=SEVERAL),
    _pool("from_the_end", "pools are counted from the last token: the first ones are left out",
          pooled(right, from_the_end), looks_ahead=True),
    _pool("strided", "a pool has tokens that are apart, as of an array [P, pools]", pooled(right, strided),
          looks_ahead=True),
    _score("relu_missing", "scores are summed without relu", by_scores(
        lambda dots, w: np.einsum("lh,lhn->ln", w, dots)), V32),
    _score("relu_after_weights", "relu is of a head's weighted score, not of its dot", by_scores(
        lambda dots, w: np.maximum(w[:, :, None] * dots, 0.0).sum(1)), V32),
    _score("relu_of_sum", "relu is of the sum over heads", by_scores(
        lambda dots, w: np.maximum(np.einsum("lh,lhn->ln", w, dots), 0.0))),
    _score("size", "the size of a dot is taken for its relu", by_scores(lambda dots, w: weighed(np.abs(dots), w))),
    _score("squared", "relu is squared", by_scores(lambda dots, w: np.einsum(
        "lh,lhn->ln", w, np.maximum(dots, 0.0) ** 2))),
    _score("largest_head", "the largest weighted head is taken for the sum over heads", by_scores(
        lambda dots, w: (w[:, :, None] * np.maximum(dots, 0.0)).max(1))),
    _score("weights_missing", "heads are summed without their weights", by_scores(
        lambda dots, w: weighed(dots, np.ones_like(w)))),
    _score("weights_sigmoid", "weights of heads are put through a sigmoid", by_scores(
        lambda dots, w: weighed(dots, reference.sigmoid(w)))),
    _score("weights_softmax", "weights of heads are put through a softmax", by_scores(
        lambda dots, w: weighed(dots, reference.softmax(w)))),
    _score("heads_reversed", "heads meet each other's weights", by_scores(
        lambda dots, w: weighed(dots, w[:, ::-1]))),
    _score("averaged", "heads are averaged, not summed", by_scores(
        lambda dots, w: weighed(dots, w) / w.shape[1]), ops=SCORES),
    _score("heads_twice", "weights have H^-1/2 twice", by_scores(
        lambda dots, w: weighed(dots, w) * w.shape[1] ** -0.5), ops=SCORES),
    _score("scale_missing", "scores are not scaled", by_scores(scale=lambda c: 1.0), ops=SCORES),
    _score("scale_twice", "scores are scaled twice", by_scores(scale=lambda c: c["scale"] ** 2), ops=SCORES),
    _score("scale_of_width", "scores are scaled by D^-1/2, whatever the scale is", by_scores(
        scale=lambda c: c["q"].shape[-1] ** -0.5), ops=SCORES),
    _score("one_early", "a pool can be chosen one token before it is complete", by_scores(early=1), GLM),
    _score("one_late", "a pool can be chosen one token after it is complete", by_scores(early=-1), GLM),
    _score("begun", "a pool can be chosen when its first position is seen", lambda c: by_scores(
        early=c["pool"] - 1)(c) if c["pool"] > 2 else None, GLM),  # of two, index_one_early is the same
    _score("mask_missing", "all pools of a sequence can be chosen, those behind the query, too", by_scores(
        seen=all_of_it), looks_ahead=True),
    _score("from_the_left", "query t is at position t, whatever was cached before it", by_scores(
        seen=as_if_uncached), use=CALL),
    _score("first_keys", "every sequence meets the keys of the first", by_scores(keys=first_keys),
           scenario=SEVERAL),
    _ids("least", "the pools with the least scores are chosen", by_ids(order=least_first)),
    _ids("newest", "the newest pools are chosen, whatever their scores", by_ids(order=newest_first)),
    _ids("first", "the first pools are chosen, whatever their scores", by_ids(order=in_order)),
    _ids("higher_of_equals", "of equal scores the higher pool is chosen", by_ids(order=higher_first),
         scenario=TIES),
    _ids("topk_in_pools", "topk is counted in pools, not in positions", by_ids(k=lambda c: c["topk"])),
    _ids("one_less", "one pool less is chosen", by_ids(k=lambda c: c["topk"] // c["pool"] - 1)),
    _ids("tail_counted", "the incomplete pool takes the place of a chosen one", by_ids(
        k=lambda c: c["topk"] // c["pool"] - (c["pool"] > 1)), use=CALL),
    _ids("tail_missing", "the positions of the incomplete pool are left out",
         by_ids(tail=lambda seen, pool: np.arange(0)), GLM + ": index_kpool_always_select_tail"),
    _ids("tail_whole", "the pool of the query's own position is always chosen, to its end", by_ids(tail=whole_tail),
         looks_ahead=True),
    _ids("own_missing", "the query's own position is left out", lambda c: by_ids(
        tail=lambda seen, pool: np.arange(seen // pool * pool, seen - 1))(c) if c["pool"] != 2 else None),
    _ids("of_pools", "ids are of pools, not of positions", by_ids(positions=lambda best, r: best)),
    _ids("first_of_pools", "of a chosen pool the first position alone is taken", lambda c: by_ids(
        positions=lambda best, r: best * c["pool"])(c)),
    _ids("of_the_batch", "ids are counted from the call's first position, not the sequence's", of_the_batch,
         scenario=SEVERAL),
    _ids("in_front", "-1 stands in front of the positions", behind_nothing, use=CALL),
    _ids("by_score", "positions stand in the order of their scores, and do not rise", best_first_ids, V32,
         use=CALL),
    _ids("zeros_behind", "0 stands behind the last position, not -1", zeros_behind),
    Fault("index_projected_as_other", "keys of the indexer are projected by the gate's matrix, or the gate by theirs",
          ("linear",), projected_as_other, taps=("mla.index_k_raw", "mla.index_gate"), use=RUN),
)
