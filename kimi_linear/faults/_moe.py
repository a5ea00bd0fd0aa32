"""Faults of routing, experts and feed-forward."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import CALL, RUN, TIES, Fault, changed
from .site import Site

OTHER = {"sigmoid": "softmax", "softmax": "sigmoid"}


def biased(site: Site):
    """The router's bias counts in the weights, too."""
    score = getattr(reference, site["function"], None)
    if score is None or site.args.get("bias") is None:
        return None
    return site.run(scores=score(site["scores"]) + site["bias"].reshape(-1), function="none")


def other_function(site: Site):
    if site.op == "route" and site.args.get("bias") is None and site.args.get("groups", 1) == 1:
        return None     # either of them rises with the logits
    return site.run(function=OTHER[site["function"]]) if site["function"] in OTHER else None


def flipped(argument):
    return lambda site: site.run(**{argument: not site[argument]})


def scaled(power):
    return lambda site: site.run(scale=site["scale"] ** power) if site["scale"] != 1 else None


def unbiased(site: Site):
    return site.run(bias=None) if site.args.get("bias") is not None else None


def in_order_of_score(site: Site):
    """Weights by falling score beside ids that rise."""
    return -np.sort(-site.run(), axis=-1)


def highest_among_equals(site: Site):
    """The choice with the last of equal experts, not the first."""
    E = site["scores"].shape[-1]
    bias = site["bias"].reshape(-1)[::-1] if site.args.get("bias") is not None else None
    return np.sort(E - 1 - site.run(scores=site["scores"][:, ::-1], bias=bias), axis=-1).astype(np.int32)


def shared_times(site: Site, scale: float):
    """The shared expert's output times `scale`; routed_scaling_factor is the sum of renormalised weights."""
    shared = site.args.get("shared")
    if not isinstance(shared, np.ndarray) or abs(scale - 1) < 1e-3:
        return None
    return site.run(shared=scale * site["shared"])


def sum_of_experts(routed: float, shared: float):
    """The sum behind an expert latent, its parts so many times."""
    return lambda site: routed * site["a"] + shared * site["b"]


def scaled_in_sum(site: Site, part: str):
    """routed_scaling_factor, which the weights have, on a part of the sum behind an expert latent."""
    weights = site.table.get(site.node.tap.replace("moe.out", "moe.weights"))
    if weights is None or weights.options["scale"] == 1:
        return None
    return site.run(**{part: weights.options["scale"] * site[part]})


def weights_on_input(site: Site):
    """Each expert works on its weight times x."""
    x, ids, weights = site["x"], site.args["ids"], site["weights"]
    y = site.run(weights=0 * weights)
    for slot in range(ids.shape[-1]):
        one = np.ones((len(x), 1))
        y += site.run(x=x * weights[:, slot, None], ids=ids[:, slot, None], weights=one, shared=None, shared_gate=None)
    return y


def experts_off_by_one(site: Site):
    return site.run(ids=(site.args["ids"] + 1) % len(site.args["w_gate"]))


def sibling_matrix(site: Site):
    """gate_proj where up_proj belongs, or the other way round."""
    name = site.node.weights["w"].name
    a, b = ("gate_proj", "up_proj")
    other = name.replace(a, b) if a in name else name.replace(b, a)
    return site.with_weights(w=site.node.weights["w"]._replace(name=other))


def among_groups(rate, rest):
    """The choice among the groups that `rate` (of [T, groups, experts]) finds best; other groups' scores are `rest`."""
    def choose(call):
        groups, top = call.args.get("groups", 1), call.args.get("top_groups", 1)
        if groups == top:
            return None
        s = getattr(reference, call["function"])(call["scores"])
        s = s if call.args.get("bias") is None else s + call["bias"].reshape(-1)
        rated = rate(s.reshape(len(s), groups, -1))
        kept = np.zeros(rated.shape, bool)
        np.put_along_axis(kept, np.argsort(-rated, axis=-1, kind="stable")[:, :top], True, axis=-1)
        chosen = np.where(np.repeat(kept, s.shape[1] // groups, axis=1), s, rest)
        return np.sort(np.argsort(-chosen, axis=-1, kind="stable")[:, :call["k"]], axis=-1)
    return choose


def best_two(scores):
    return np.sort(scores, axis=-1)[..., -2:].sum(-1)


def bias_on_logits(call):
    """The choice by logits + bias, not by their scores + bias."""
    return call.run(scores=call["scores"] + call["bias"].reshape(-1), bias=None) if call.args.get("bias") is not None \
        else None


def lowest(call):
    """The k smallest."""
    bias = call.args.get("bias")
    s = getattr(reference, call["function"])(call["scores"])
    s = s if bias is None else s + call["bias"].reshape(-1)
    return np.sort(np.argsort(s, axis=-1, kind="stable")[:, :call["k"]], axis=-1)


def less_bias(call):
    """(s + bias) - bias in float32, where s of the chosen belongs."""
    if call.args.get("bias") is None:
        return None
    s, bias = (a.astype(np.float32) for a in (getattr(reference, call["function"])(call["scores"]), call["bias"]))
    return call.run(scores=((s + bias) - bias).astype(np.float64), function="none")


def softmax_of_chosen(call):
    """The softmax of the chosen logits alone."""
    x = np.take_along_axis(call["scores"], np.asarray(call.args["ids"]).astype(np.int64), axis=-1)
    return reference.softmax(x) * call["scale"]


def rolled_weights(call):
    """Each slot has the weight of the next."""
    return call.run(weights=np.roll(call["weights"], -1, axis=-1)) if call["weights"].shape[-1] > 1 else None


def turned_experts(argument):
    """An expert's matrix [m, n] read from memory that holds [n, m]."""
    def function(call):
        w = np.asarray(call.args[argument])
        return call.run(**{argument: w.reshape(len(w), w.shape[2], w.shape[1]).swapaxes(1, 2)})

    return function


def other_situ(change):
    """SiTU's betas, changed; None where the experts have SwiGLU, or the change is none."""
    def function(call):
        betas = call.args.get("situ")
        wrong = None if betas is None else change(*betas)
        return None if betas is None or wrong == tuple(betas) else call.run(situ=wrong)

    return function


def raw_shared_gate(call):
    gate, shared = call.args.get("shared_gate"), call.args.get("shared")
    if gate is None or isinstance(shared, tuple):
        return None
    return call.run(shared_gate=None, shared=reference.linear(call["x"], gate) * call["shared"])


def gated_as_a_whole(site: Site):
    gate, shared = site.sibling("moe.shared_g"), site.args.get("shared")
    if gate is None or not isinstance(shared, np.ndarray):
        return None
    return site.run(shared=0 * shared) * reference.sigmoid(gate) + shared


ROUTE, WEIGHTS, MOE, V3 = ("route",), ("route_weights",), ("moe",), "arXiv:2412.19437, section 2.1.2"
GATE_UP = ("mlp.gate", "mlp.up", "moe.shared_gate", "moe.shared_up")

FAULTS = (
    Fault("router_bias_in_weights", "the bias, which is for the choice alone, is in the weights", WEIGHTS, biased,
          source=V3),
    Fault("router_bias_missing", "experts are chosen without the bias", ROUTE, unbiased, source=V3),
    Fault("router_function_other", "softmax for sigmoid (or the other way round)", (*ROUTE, *WEIGHTS), other_function,
          source="moe_router_activation_func; DeepSeek-V2 has softmax, arXiv:2405.04434"),
    Fault("router_renormalise_other", "weights are not divided by their sum (or are, and should not be)", WEIGHTS,
          flipped("renormalise"), source="moe_renormalize, norm_topk_prob; a softmax of the chosen logits alone is "
          "the same as one of all, divided"),
    Fault("router_scale_missing", "routed_scaling_factor is forgotten", WEIGHTS, scaled(0),
          source="llama.cpp skips it where its key is 0"),
    Fault("router_scale_twice", "routed_scaling_factor is applied twice", WEIGHTS, scaled(2),
          source="vLLM scales the sum, SGLang the weights or the output"),
    Fault("router_weights_by_score", "weights fall by score, beside ids that rise", WEIGHTS, in_order_of_score,
          source="top-k gives both by score; ids were sorted alone"),
    Fault("router_ties_to_last", "among equal scores the last expert wins, not the first", ROUTE, highest_among_equals,
          TIES, source="top-k kernels differ; the sources leave it open"),
    Fault("shared_expert_scaled", "the shared expert is scaled like the routed ones", MOE,
          lambda s: shared_times(s, s["weights"].sum(-1).mean()),
          source="routed_scaling_factor is of the routed sum alone", looks_ahead=True),
    Fault("shared_expert_missing", "the shared expert is left out", MOE, lambda s: shared_times(s, 0.0), source=V3),
    Fault("shared_expert_twice", "the shared expert is added twice", MOE, lambda s: shared_times(s, 2.0), source=V3),
    Fault("shared_not_added", "behind the expert latent the shared expert is left out", ("add",),
          sum_of_experts(1.0, 0.0), taps=("moe.out",), use=RUN, source=V3),
    Fault("shared_added_twice", "behind the expert latent the shared expert is added twice", ("add",),
          sum_of_experts(1.0, 2.0), taps=("moe.out",), use=RUN, source=V3),
    Fault("scaled_in_sum", "routed_scaling_factor is on a part of the sum behind the expert latent; the router's "
          "weights have it", ("add",), scaled_in_sum, taps=("moe.out",), use=RUN, choices=(("a",), ("b",)),
          each="routed_scaling_factor is on part {} of the sum (a: routed, b: shared), besides the router's weights",
          source="vLLM scales the sum of the experts"),
    Fault("routed_not_added", "behind the expert latent the routed experts are left out", ("add",),
          sum_of_experts(0.0, 1.0), taps=("moe.out",), use=RUN),
    Fault("w1_w3_swapped", "SiLU is on w3 x (up), not on w1 x (gate)", (*MOE, "swiglu"),
          lambda s: s.run(**({"w_gate": s.args["w_up"], "w_up": s.args["w_gate"]} if s.op == "moe" else
                             {"gate": s["up"], "up": s["gate"]})), source="names of Mixtral's experts: w1, w3, w2"),
    Fault("gate_up_matrices_swapped", "one of gate_proj and up_proj is where the other belongs", ("linear",),
          sibling_matrix, taps=GATE_UP, use=RUN, source="fused gate_up tensors differ in their order"),
    Fault("expert_weights_on_input", "x is multiplied by the weight before the expert", MOE, weights_on_input,
          source="Llama 4 does so"),
    Fault("expert_weights_missing", "experts are summed with weight 1", MOE,
          changed(weights=lambda s: np.ones_like(s["weights"])), source=V3),
    Fault("experts_off_by_one", "expert e + 1 works in place of e", MOE, experts_off_by_one,
          source="stacked tensors that begin at the shared expert"),
    Fault("router_groups_ignored", "experts are chosen among all groups", ROUTE,
          changed(groups=lambda s: 1, top_groups=lambda s: 1), use=CALL, source=V3),
    Fault("router_groups_by_largest", "groups are chosen by their best expert, not by the sum of their best two", ROUTE,
          among_groups(lambda s: s.max(-1), -np.inf), use=CALL, source="DeepSeek-V2: arXiv:2405.04434"),
    Fault("router_groups_zeroed", "scores of groups that are out are 0, not -inf: above biased scores below 0", ROUTE,
          among_groups(best_two, 0.0), use=CALL, source="transformers: models/deepseek_v3"),
    Fault("router_bias_on_logits", "the bias is added to the logits, not to their sigmoid or softmax", ROUTE,
          bias_on_logits, use=CALL, source=V3),
    Fault("router_lowest", "the lowest scores are chosen", ROUTE, lowest, use=CALL),
    Fault("router_weights_less_bias", "weights are (s + bias) - bias: what float32 rounds off beside the bias is lost",
          WEIGHTS, less_bias, use=CALL, source="flashinfer, pull request 3875"),
    Fault("router_softmax_of_chosen", "weights are the softmax of the chosen logits", WEIGHTS, softmax_of_chosen,
          use=CALL, source="Mixtral"),
    Fault("expert_weights_rolled", "each slot has the weight of the next", MOE, rolled_weights, use=CALL),
    Fault("w_down_transposed", "w_down is read as [F, D]", MOE, turned_experts("w_down"), use=CALL),
    Fault("expert_weights_renormalised", "each token's weights are divided by their sum (again)", MOE,
          changed(weights=lambda s: s["weights"] / s["weights"].sum(-1, keepdims=True)), use=CALL,
          source="vLLM's and SGLang's kernels take them as they are"),
    Fault("w_up_transposed", "w_up is read as [D, F]", MOE, turned_experts("w_up"), use=CALL),
    Fault("w_gate_transposed", "w_gate is read as [D, F]", MOE, turned_experts("w_gate"), use=CALL),
    Fault("shared_gate_on_all", "the shared expert's gate multiplies the routed experts, too", MOE, gated_as_a_whole,
          source="Qwen3-Next: sigmoid(w_s x) is of the shared expert alone", use=RUN),
    Fault("shared_gate_missing", "the shared expert's gate is left out", MOE,
          lambda s: s.run(shared_gate=None) if s.args.get("shared_gate") is not None else None, use=CALL),
    Fault("experts_swiglu", "experts have SwiGLU, where SiTU belongs", MOE, other_situ(lambda beta, linear: None),
          source="Kimi-Linear's experts have"),
    Fault("experts_up_unbounded", "SiTU of the experts does not bound up", MOE,
          other_situ(lambda beta, linear: (beta, None))),
    Fault("experts_betas_swapped", "SiTU's betas are swapped", MOE,
          other_situ(lambda beta, linear: (beta, linear) if linear is None else (linear, beta))),
    Fault("shared_gate_raw", "the shared expert's gate is not put through a sigmoid", MOE, raw_shared_gate, use=CALL),
)
