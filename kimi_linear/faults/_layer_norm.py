"""Faults of the layer norm."""

from __future__ import annotations

import numpy as np

from .. import reference
from ._fault import BOTH, CALL, FAINT, Fault, changed, of_call

FLOAT32_MAX = float(np.finfo(np.float32).max)


def parts(call):
    """What is left of x without its mean, the mean of its squares, and eps."""
    x = call["x"]
    c = x - x.mean(-1, keepdims=True)
    return c, (c * c).mean(-1, keepdims=True), call["eps"]


def over(length):
    """The norm with another length: a function of the variance, eps, the width and the choice."""
    def function(call, *choice):
        c, var, eps = parts(call)
        return call["w"] * c / length(var, eps, c.shape[-1], *choice) + call["b"]

    return function


def of_rms(call):
    """The mean stays in what is divided and in what is squared."""
    return reference.rms_norm(call["x"], call["w"], eps=call["eps"]) + call["b"]


def over_rms(call):
    """The mean is taken off x, but the squares are of x with it."""
    c, _, eps = parts(call)
    return call["w"] * c / np.sqrt((call["x"] ** 2).mean(-1, keepdims=True) + eps) + call["b"]


def uncentred(call):
    """The mean is taken off before the squares alone."""
    _, var, eps = parts(call)
    return call["w"] * call["x"] / np.sqrt(var + eps) + call["b"]


def biased_first(call):
    """w (n + b): the bias before the weight."""
    c, var, eps = parts(call)
    return call["w"] * (c / np.sqrt(var + eps) + call["b"])


def of_token(call):
    """One norm for a token, over all heads."""
    x = call["x"]
    if x.ndim < 3:
        return None
    c = x - x.mean((-2, -1), keepdims=True)
    return call["w"] * c / np.sqrt((c * c).mean((-2, -1), keepdims=True) + call["eps"]) + call["b"]


def unbiased(var, eps, D):
    return np.sqrt(var * D / (D - 1) + eps) if D > 1 else np.full_like(var, np.nan)


def overflowing(var, eps, D):
    return np.where(var * D > FLOAT32_MAX, np.inf, np.sqrt(var + eps))


def other_eps(call, eps: float):
    return call.run(eps=eps) if eps != call["eps"] else None


def _fault(name, text, function, source="", choices=((),), use=BOTH, **named):
    return Fault(f"layer_norm_{name}", text, ("layer_norm",), of_call(function), FAINT, choices=choices, source=source,
                 use=use, **named)


TORCH = "pytorch: torch.nn.LayerNorm"

FAULTS = (
    _fault("of_rms", "an RMS norm: the mean is not taken off", of_rms, "RMSNorm for LayerNorm"),
    _fault("rms_norm", "an RMS norm: neither is the mean taken off nor the bias added",
           lambda s: reference.rms_norm(s["x"], s["w"], eps=s["eps"]), "norms of most models"),
    _fault("missing", "there is no norm", lambda s: s["x"]),
    _fault("over_rms", "the mean is taken off x, but not off what is squared", over_rms),
    _fault("uncentred", "the mean is taken off what is squared, but not off x", uncentred),
    _fault("bias_missing", "the bias is left out", changed(b=lambda s: 0 * s["b"]),
           "checkpoints of RMS norms have none"),
    _fault("bias_twice", "the bias is added twice", changed(b=lambda s: 2 * s["b"])),
    _fault("bias_first", "the bias is added before the weight: w (n + b)", biased_first),
    _fault("weight_missing", "the layer norm has no weight", changed(w=lambda s: np.ones_like(s["w"]))),
    _fault("weight_plus_one", "the layer norm's weight is taken as 1 + w", changed(w=lambda s: 1 + s["w"]),
           "kernels of norms whose checkpoints store w - 1"),
    _fault("swapped", "weight and bias are swapped", lambda s: s.run(w=s["b"], b=s["w"])),
    _fault("unbiased", "the variance is divided by D - 1", over(unbiased), "torch.var, whose default it is"),
    _fault("eps_other", "another eps under the layer norm's root", other_eps, f"{TORCH} has 1e-5, the indexers "
           "of DeepSeek-V3.2 and GLM 1e-6", ((1e-6,), (1e-5,), (1e-12,)), each="eps is {:g}"),
    _fault("eps_outside", "eps is outside of the root, on the deviation: c / (sqrt(variance) + eps)",
           over(lambda var, eps, D: np.sqrt(var) + eps)),
    _fault("eps_on_sum", "eps is on the sum of squares, not on their mean",
           over(lambda var, eps, D: np.sqrt(var + eps / D))),
    _fault("eps_missing", "no eps", over(lambda var, eps, D: np.sqrt(var)), use=CALL),
    _fault("of_sum", "the sum of squares in place of their mean", over(lambda var, eps, D: np.sqrt(var * D + eps))),
    _fault("overflow", "the sum of squares overflows float32", over(overflowing), use=CALL),
    _fault("without_root", "over the variance, without the root", over(lambda var, eps, D: var + eps)),
    _fault("of_token", "one norm for a token, over all heads", of_token, "the norm before the split into heads",
           use=CALL),
)
