"""Faults of the L2 norm; `_delta` tries them inside the delta rule, too."""

from __future__ import annotations

import numpy as np

from ._fault import CALL, FAINT, Fault

__all__ = ["BY_NAME", "FAULTS"]

FLOAT32_MAX = float(np.finfo(np.float32).max)


def over(length):
    """x over a function of its length, the call's eps and the choice."""
    def function(call, *choice):
        x = call["x"]
        return x / length(np.sqrt((x * x).sum(-1, keepdims=True)), call.args.get("eps", 1e-6), *choice)

    return function


def overflowing(n, eps):
    return np.where(n * n > FLOAT32_MAX, np.inf, np.sqrt(n * n + eps))


def of_token(call):
    """One norm for a token, over all heads."""
    x = call["x"]
    if x.ndim < 3:
        return None
    return x / np.sqrt((x * x).sum((-2, -1), keepdims=True) + call.args.get("eps", 1e-6))


def eps_on_mean(call):
    return call.run(eps=call.args.get("eps", 1e-6) * call["x"].shape[-1])


def _fault(name, text, function, source="", choices=((),), **named):
    return Fault(name, text, ("l2_norm",), function, FAINT, choices=choices, source=source, **named)


FLA, GGML = "flash-linear-attention", "llama.cpp"

FAULTS = (
    Fault("l2_missing", "the vector is not normalised", ("l2_norm",), lambda s: s["x"],
          source=f"{FLA}: use_qk_l2norm_in_kernel"),
    _fault("l2_eps_outside", "eps is outside of the root, x / (|x| + eps): added to the length, not to its square",
           over(lambda n, eps, other: n + other), FLA, ((1e-6,), (1e-5,)),
           each="eps outside of the root: x / (|x| + {:g})"),
    _fault("l2_eps_as_floor", "x / max(|x|, eps)", over(lambda n, eps, other: np.maximum(n, other)),
           f"{GGML}: ggml_l2_norm; torch's F.normalize", ((1e-5,), (1e-6,), (1e-12,)), each="x / max(|x|, {:g})"),
    _fault("l2_eps_as_floor_of_squares", "x / sqrt(max(sum, eps))",
           over(lambda n, eps: np.sqrt(np.maximum(n * n, eps))), use=CALL),
    _fault("l2_eps_on_mean", "eps on the mean of squares instead of their sum: an RMS norm rescaled", eps_on_mean,
           "MLX"),
    _fault("l2_eps_other", "another eps under the root of the sum", lambda s, eps: s.run(eps=eps),
           f"{GGML}: rms_norm_eps is passed for it", ((1e-5,), (1e-8,), (1e-12,)), more=((1e-6,),),
           each="eps {:g} under the root of the sum"),
    _fault("l2_eps_missing", "no eps", over(lambda n, eps: n), use=CALL),
    _fault("l2_overflow", "the sum of squares overflows float32", over(overflowing), use=CALL),
    Fault("l2_of_mean", "the mean of squares in place of their sum: sqrt(D) too large", ("l2_norm",),
          lambda s: s.run() * s["x"].shape[-1] ** 0.5, source="an RMS norm without a weight"),
    _fault("l2_of_token", "one norm for a token, over all heads", of_token, use=CALL,
           source="the norm before the split into heads"),
    _fault("l2_squared", "x over the sum of squares, without the root",
           over(lambda n, eps: n * n + eps), use=CALL),
)
BY_NAME = {f.name: f for f in FAULTS}
