"""Faults of SwiGLU's limit, in the op and in experts."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import CALL, Fault
from .site import Call, Site

EXPERTS = ("w_gate", "w_up", "w_down")


def silu_cut(gate, up, limit):
    return np.minimum(reference.silu(gate), limit) * np.clip(up, -limit, limit)


def oai(gate, up, limit):
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * reference.sigmoid(1.702 * gate) * (up + 1)


#: What is done for min(gate, limit) and clip(up, -limit, limit).
FORMS = {
    "gate is cut on both sides": lambda g, u, most: reference.swiglu(np.maximum(g, -most), u, limit=most),
    "up is cut above alone": lambda g, u, most: reference.silu(np.minimum(g, most)) * np.minimum(u, most),
    "up is cut below alone": lambda g, u, most: reference.silu(np.minimum(g, most)) * np.maximum(u, -most),
    "silu(gate) is cut, not gate": silu_cut,
    "the product is cut, not what it is of": lambda g, u, most: np.clip(reference.swiglu(g, u), -most, most),
    "gate is not cut": lambda g, u, most: reference.silu(g) * np.clip(u, -most, most),
    "up is not cut": lambda g, u, most: reference.silu(np.minimum(g, most)) * u,
    "nothing is cut": lambda g, u, most: reference.swiglu(g, u),
    "cut at 1 / limit": lambda g, u, most: reference.swiglu(g, u, limit=1 / most),
    "as in gpt-oss, gate sigmoid(1.702 gate) (up + 1)": oai,
}


def activated(call, form):
    """The op, or the experts, with another form of the activation."""
    if call.op == "swiglu":
        return form(call["gate"], call["up"], call["limit"])
    x, ids, weights = call["x"], np.asarray(call.args["ids"]), call["weights"]
    y = call.run(weights=0 * weights)  # what is added behind them
    for e in np.unique(ids):
        t, slot = np.nonzero(ids == e)
        w_gate, w_up, w_down = (call.args[n][e] for n in EXPERTS)
        h = form(reference.linear(x[t], w_gate), reference.linear(x[t], w_up), call["limit"])
        np.add.at(y, t, weights[t, slot][:, None] * reference.linear(h, w_down))
    return y


def has_limit(call):
    return call.args.get("limit") is not None


def other_form(call, form: str):
    return activated(call, FORMS[form]) if has_limit(call) else None


def other_limit(call, limit: float):
    """Where nothing reaches it a run does not tell which it is, or whether there is any."""
    if not has_limit(call) or limit == call["limit"]:
        return None
    y = call.run(limit=limit)
    return None if isinstance(call, Site) and np.array_equal(y, call.run(limit=None)) else y


def of_each_result(call):
    """An expert's result is cut, not what its activation takes."""
    if not has_limit(call):
        return None
    y, ids, limit = call.run(weights=0 * call["weights"]), np.asarray(call.args["ids"]), call["limit"]
    for slot in range(ids.shape[-1]):
        one = call.run(ids=ids[:, slot, None], weights=np.ones((len(ids), 1)), limit=None, shared=None,
                       shared_gate=None)
        y += call["weights"][:, slot, None] * np.clip(one, -limit, limit)
    return y


def of_routed_sum(call):
    """The sum of the experts is cut, not what their activations take."""
    if not has_limit(call):
        return None
    routed = call.run(limit=None, shared=None, shared_gate=None)
    return np.clip(routed, -call["limit"], call["limit"]) + call.run(weights=0 * call["weights"])


def clamped(call: Call, most: float):
    """A limit where there is none."""
    return None if has_limit(call) or not (np.abs(call["gate"]) > most).any() else call.run(limit=most)


SWIGLU, MOE, GLM = ("swiglu",), ("moe",), "transformers: models/glm5_next, models/deepseek_v4 (swiglu_limit)"

FAULTS = (
    Fault("swiglu_clamped", "inputs are clamped", SWIGLU, clamped, use=CALL, choices=((7.0,), (10.0,)),
          each="inputs are clamped at {:g}", source="gpt-oss clamps at 7"),
    Fault("swiglu_limit_form", "the limit is on other values", (*SWIGLU, *MOE), other_form,
          choices=tuple((form,) for form in FORMS), each="of the limit: {}",
          source=f"{GLM}; Step 3.5 cuts silu(gate): mlx-lm, mlx_lm/models/step3p5.py"),
    Fault("swiglu_limit_other", "another limit", (*SWIGLU, *MOE), other_limit, use=CALL, choices=((7.0,), (10.0,)),
          each="the limit is {:g}", source="7 in gpt-oss, 10 in DeepSeek-V4 and GLM-5.3-Flash"),
    Fault("experts_results_cut", "the limit is on the results of the experts, not within them", MOE, of_each_result),
    Fault("experts_sum_cut", "the limit is on the sum of the experts, not within them", MOE, of_routed_sum),
)
