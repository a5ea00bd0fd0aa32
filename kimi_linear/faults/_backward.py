"""Faults of gradients: what backward kernels of norms and swiglu get wrong, and all in the sums of weights' gradients.
Those of the convolution and the decay gate are in `_backward_kda`."""

from __future__ import annotations

import numpy as np

from .. import reference
from ..reference_backward import sigmoid_slope, silu_slope
from ._fault import CALL, Fault

RMS, GATED, L2 = "rms_norm_backward", "gated_rms_norm_backward", "l2_norm_backward"
CONV, GATE, SWIGLU = "short_conv_backward", "decay_gate_backward", "swiglu_backward"

FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Which results are of weights, summed over tokens.
SUMMED = {RMS: (1,), GATED: (2,), CONV: (1,), GATE: (1, 2)}


def changed(**changes):
    """All results of the right op on wrong arguments, each a function of the call."""
    return lambda call: call.results(**{name: change(call) for name, change in changes.items()})


# ---- norms -------------------------------------------------------------------------------------------


def _parts(call):
    """The gradient behind the gate, x, w and eps: the arguments of a plain norm."""
    x = call["x"]
    w = call["w"] if "w" in call.args else np.ones(x.shape[-1])
    g = call["dy"] * _gate(call)(call["z"]) if call.op == GATED else call["dy"]
    return g, x, w, call.args.get("eps", 1e-6)


def _gate(call):
    return reference.silu if _activation(call) == "silu" else reference.sigmoid


def _slope(call):
    return silu_slope if _activation(call) == "silu" else sigmoid_slope


def _activation(call):
    return call.args.get("activation", "sigmoid")


def _laid(call, dx, dw=None, dz=None):
    """Results in the order of the op's, the right ones for None."""
    found = {"dx": dx, "dw": dw, "dz": dz}
    names = {RMS: ("dx", "dw"), L2: ("dx",), GATED: ("dx", "dz", "dw")}[call.op]
    return tuple(right if found[n] is None else found[n] for n, right in zip(names, call.results()))


def _total(call):
    return np.sum if call.op == L2 else np.mean


def projected(change):
    """dx of another projection: ``change(n, p, c, call)`` is what stands in place of n c in r (p - n c)."""
    def function(call, *choice):
        g, x, w, eps = _parts(call)
        total = _total(call)
        r = 1 / np.sqrt(total(x * x, axis=-1, keepdims=True) + eps)
        n, p = x * r, w * g
        c = total(n * p, axis=-1, keepdims=True)
        return _laid(call, r * (p - change(n, c, r, call, *choice)))

    return function


def other_total(n, c, r, call):
    D = n.shape[-1]
    return n * c * (1 / D if call.op == L2 else D)


def without_weight(n, c, r, call):
    g = _parts(call)[0]
    return n * (n * g).mean(-1, keepdims=True)


def of_raw(n, c, r, call, power):
    """x where n belongs, once or twice."""
    return n * c / r**power


def of_length(length):
    """All results by another 1 / rms, of the total of squares, eps and the width."""
    def function(call, *choice):
        g, x, w, eps = _parts(call)
        total, D = _total(call), x.shape[-1]
        r = 1 / length(total(x * x, axis=-1, keepdims=True), eps, D, *choice)
        n, p = x * r, w * g
        dx = r * (p - n * total(n * p, axis=-1, keepdims=True))
        dz = call["dy"] * w * n * _slope(call)(call["z"]) if call.op == GATED else None
        return _laid(call, dx, (n * g).reshape(-1, D).sum(0), dz)

    return function


def without_length(call):
    _, x, _, eps = _parts(call)
    return _laid(call, call.run() * np.sqrt(_total(call)(x * x, axis=-1, keepdims=True) + eps))


def overflowing(total, eps, D):
    return np.where(total * D > FLOAT32_MAX, np.inf, np.sqrt(total + eps))


def overflowing_sum(total, eps, D):
    return np.where(total > FLOAT32_MAX, np.inf, np.sqrt(total + eps))


def centred(call):
    """LayerNorm's: the mean of w dy is taken off, too."""
    g, x, w, eps = _parts(call)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return _laid(call, call.run() - r * (w * g).mean(-1, keepdims=True))


def of_all_heads(call):
    """One norm for a token, over all heads."""
    g, x, w, eps = _parts(call)
    if x.ndim < 3:
        return None
    axes, total = (-2, -1), _total(call)
    r = 1 / np.sqrt(total(x * x, axis=axes, keepdims=True) + eps)
    n, p = x * r, w * g
    dz = call["dy"] * w * n * _slope(call)(call["z"]) if call.op == GATED else None
    dx = r * (p - n * total(n * p, axis=axes, keepdims=True))
    return _laid(call, dx, (n * g).reshape(-1, x.shape[-1]).sum(0), dz)


def of_weight(terms):
    """dw summed of other terms: of g, x, w and n."""
    def function(call):
        g, x, w, eps = _parts(call)
        n = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return _laid(call, call.run(), terms(call, g, x, w, n).reshape(-1, x.shape[-1]).sum(0))

    return function


def of_slope(slope):
    """dz by another derivative of the gate, a function of the call and z."""
    def function(call):
        m = reference.rms_norm(call["x"], call["w"], eps=call["eps"])
        return _laid(call, call.run(), dz=call["dy"] * m * slope(call, call["z"]))

    return function


def of_norm(norm):
    """dz by another m in dy m a'(z)."""
    def function(call):
        return _laid(call, call.run(), dz=call["dy"] * norm(call) * _slope(call)(call["z"]))

    return function


def only_of(activation, slope):
    """dz by another derivative of one of the activations."""
    def function(call):
        return of_slope(lambda call, z: slope(z))(call) if _activation(call) == activation else None

    return function


def ungated(call, which):
    """The gate is left out of dx or of dw."""
    dx, dw = reference.rms_norm_backward(call["dy"], call["x"], call["w"], eps=call["eps"])
    right = call.results()
    return (dx if which != "dw" else right[0]), right[1], (dw if which != "dx" else right[2])


def gate_first(call):
    """Of rms_norm(x a(z), w)."""
    a = _gate(call)(call["z"])
    d, dw = reference.rms_norm_backward(call["dy"], call["x"] * a, call["w"], eps=call["eps"])
    return d * a, d * call["x"] * _slope(call)(call["z"]), dw


# ---- sums over tokens ----------------------------------------------------------------------------------


def _gradient(call):
    """The name of the first argument."""
    return "dg" if call.op == GATE else "dy"


def _in_sums(call, change):
    """Results with those of weights changed."""
    return tuple(change(a) if i in SUMMED[call.op] else a for i, a in enumerate(call.results()))


def averaged(call):
    """Divided by the number of rows."""
    name = _gradient(call)
    axes = call["dt_bias"].ndim if call.op == GATE else 1
    rows = int(np.prod(call[name].shape[:-axes]))
    return _in_sums(call, lambda a: a / rows) if rows > 1 else None


def of_last_block(call, n):
    """Of the last block of n tokens alone: each writes over the one before."""
    name = _gradient(call)
    T = len(call[name])
    if T <= n:
        return None
    last = call[name] * (np.arange(T) >= (T - 1) // n * n).reshape(-1, *[1] * (call[name].ndim - 1))
    found = call.results(**{name: last})
    return tuple(found[i] if i in SUMMED[call.op] else a for i, a in enumerate(call.results()))


def without_sigmoids(call):
    """Where exp(-x) overflows float32 the sigmoid is 0, as far below."""
    name = "z" if call.op == GATED else "gate"
    below = call[name] < -88.72
    return call.results(**{name: np.where(below, -1e9, call[name])}) if below.any() else None


def of_results(change):
    """All results changed in one way; None where nothing is."""
    def function(call):
        right = call.results()
        found = tuple(change(a) for a in right)
        return found if any((a != b).any() for a, b in zip(found, right)) else None

    return function


def _flushed(a):
    return np.where(np.abs(a) < 2.0**-126, 0.0, a)


# ---- swiglu --------------------------------------------------------------------------------------------


def of_gate(slope):
    """dgate by another derivative."""
    return lambda call: (call["dy"] * call["up"] * slope(call["gate"]), call.results()[1])


def clamped(call, most):
    """Of gate at most and up within `most`, through which no gradient goes where it cuts."""
    gate, up = call["gate"], call["up"]
    dgate, dup = call.results(gate=np.minimum(gate, most), up=np.clip(up, -most, most))
    return np.where(gate > most, 0, dgate), np.where(np.abs(up) > most, 0, dup)


def exchanged(call):
    """SiLU is taken to be on up."""
    dup, dgate = call.results(gate=call["up"], up=call["gate"])
    return dgate, dup


def first_alone(x):
    return reference.sigmoid(x)


def second_alone(x):
    return x * sigmoid_slope(x)


def fault(name, text, ops, function, choices=((),), **named):
    return Fault(name, text, ops if isinstance(ops, tuple) else (ops,), function, choices=choices, use=CALL, **named)


NORMS, ALL = (RMS, GATED, L2), (RMS, CONV, L2, GATE, GATED, SWIGLU)
WEIGHTED = (RMS, GATED)
FLA = "flash-linear-attention"
FIRST, SECOND = "silu' = s alone: its second term, x s (1 - s), is missing", \
    "silu' = x s (1 - s): its first term, s, is missing"

FAULTS = (
    fault("norm_gradient_cubed", "r^3 underflows float32: the projection is lost, or its digits", NORMS,
          projected(lambda n, c, r, call: n * c * ((r**3).astype(np.float32) / r**3)),
          source="dx = r w dy - r^3 x mean(x w dy), of large rows"),
    fault("norm_projection_missing", "dx = r w dy: what x does to its own length is left out", NORMS,
           projected(lambda n, c, r, call: 0.0)),
    fault("norm_projection_added", "the projection is added, not taken off: r (w dy + n mean(n w dy))", NORMS,
           projected(lambda n, c, r, call: -n * c)),
    fault("norm_projection_halved", "the projection is half of what it is, or twice", NORMS,
           projected(lambda n, c, r, call, factor: factor * n * c), ((0.5,), (2.0,)),
           each="the projection is {:g} times what it is", source="the 2 of the slope of x^2, and that of the root"),
    fault("norm_projection_other_total", "the projection has a sum for its mean (of l2_norm a mean for its sum)",
           NORMS, projected(other_total)),
    fault("norm_projection_without_weight", "w is not in the projection: n mean(n dy)", WEIGHTED,
           projected(without_weight)),
    fault("norm_projection_of_raw_x", "the projection has x for the normalised x", NORMS, projected(of_raw),
           ((1,), (2,)), each="the projection has x for the normalised x in {} of its two places",
           source="r^3 in dx = r w dy - r^3 x mean(x w dy)"),
    fault("norm_gradient_eps_missing", "no eps", NORMS, of_length(lambda t, eps, D: np.sqrt(t))),
    fault("norm_gradient_eps_outside", "eps is outside of the root: r = 1 / (sqrt(mean) + eps)", NORMS,
           of_length(lambda t, eps, D: np.sqrt(t) + eps)),
    fault("norm_gradient_eps_on_sum", "eps is on the sum of squares, not on their mean", WEIGHTED,
           of_length(lambda t, eps, D: np.sqrt(t + eps / D))),
    fault("l2_gradient_eps_on_mean", "eps is on the mean of squares, not on their sum", L2,
           of_length(lambda t, eps, D: np.sqrt(t + eps * D))),
    fault("norm_gradient_eps_other", "another eps under the root", NORMS,
           of_length(lambda t, eps, D, other: np.sqrt(t + other)), ((1e-6,), (1e-5,), (1e-12,)), each="eps is {:g}"),
    fault("norm_gradient_overflow", "the sum of squares overflows float32", WEIGHTED, of_length(overflowing)),
    fault("l2_gradient_overflow", "the sum of squares overflows float32", L2, of_length(overflowing_sum)),
    fault("norm_gradient_without_length", "dx lacks its factor r: w dy - n mean(n w dy)", NORMS,
           without_length),
    fault("norm_gradient_centred", "LayerNorm's gradient: the mean of w dy is taken off", WEIGHTED, centred),
    fault("norm_gradient_over_heads", "one norm for a token, over all heads", NORMS, of_all_heads),
    fault("norm_gradient_weight_missing", "w is left out of the gradient behind it", WEIGHTED,
           changed(w=lambda s: np.ones_like(s["w"]))),
    fault("norm_gradient_weight_plus_one", "w is taken as 1 + w", WEIGHTED, changed(w=lambda s: 1 + s["w"]),
           source="Qwen3-Next's norms"),
    fault("dw_of_raw_x", "dw = sum(x dy), without the normalisation of x", WEIGHTED,
           of_weight(lambda call, g, x, w, n: g * x)),
    fault("dw_with_weight", "dw = sum(w n dy): w is in its own gradient", WEIGHTED,
           of_weight(lambda call, g, x, w, n: g * n * w)),
    fault("dw_of_dy", "dw = sum(dy), without x: the gradient of a bias", WEIGHTED,
           of_weight(lambda call, g, x, w, n: g)),
    fault("gate_gradient_other", "the gate is SiLU, not sigmoid (or the other way round)", GATED,
           lambda s: s.results(activation="sigmoid" if _activation(s) == "silu" else "silu"),
           source=f"{FLA}: the class default; Gated DeltaNet has SiLU"),
    fault("dz_of_other_gate", "dz has the derivative of SiLU for that of sigmoid (or the other way round)", GATED,
           of_slope(lambda call, z: (sigmoid_slope if _activation(call) == "silu" else silu_slope)(z))),
    fault("dz_silu_first_term", f"dz has {FIRST}", GATED, only_of("silu", first_alone)),
    fault("dz_silu_second_term", f"dz has {SECOND}", GATED, only_of("silu", second_alone)),
    fault("dz_sigmoid_alone", "dz has sigmoid' = s, without 1 - s", GATED, only_of("sigmoid", first_alone)),
    fault("dz_complement_alone", "dz has sigmoid' = 1 - s, without s", GATED,
           only_of("sigmoid", lambda z: reference.sigmoid(-z))),
    fault("dz_without_derivative", "dz = dy rms_norm(x), without the derivative of the gate", GATED,
           of_slope(lambda call, z: 1.0)),
    fault("dz_of_gate", "dz has the gate itself for its derivative", GATED, of_slope(lambda call, z: _gate(call)(z))),
    fault("dz_without_weight", "dz lacks w: dy n a'(z)", GATED,
           of_norm(lambda s: reference.rms_norm(s["x"], np.ones_like(s["w"]), eps=s["eps"]))),
    fault("dz_of_raw_x", "dz has x for the normalised x", GATED, of_norm(lambda s: s["w"] * s["x"])),
    fault("gate_gradient_missing", "the gate is left out", GATED, ungated, (("dx",), ("dw",), ("dx and dw",)),
           each="the gate is left out of {}"),
    fault("gate_gradient_before_norm", "the gradient of rms_norm(x a(z)): the gate before the norm", GATED,
           gate_first, source=f"{FLA}: norm_before_gate"),
    fault("weight_gradient_averaged", "weights' gradients are means over tokens, not sums", tuple(SUMMED), averaged),
    fault("weight_gradient_of_last", "weights' gradients are those of the last block alone", tuple(SUMMED),
           of_last_block, ((1,), (2,), (4,), (16,), (32,), (64,), (128,)),
           each="weights' gradients are those of the last block of {} tokens alone: each writes over the one before"),
    fault("swiglu_gradient_first_term", f"dgate has {FIRST}", SWIGLU, of_gate(first_alone)),
    fault("swiglu_gradient_second_term", f"dgate has {SECOND}", SWIGLU, of_gate(second_alone)),
    fault("swiglu_gradient_of_sigmoid", "dgate has the derivative of sigmoid for that of SiLU", SWIGLU,
           of_gate(sigmoid_slope)),
    fault("swiglu_gradient_of_silu", "dgate has SiLU itself for its derivative", SWIGLU, of_gate(reference.silu)),
    fault("swiglu_gradient_of_glu", "the gradient of sigmoid(gate) up: GLU, without the factor gate", SWIGLU,
           lambda s: (s["dy"] * s["up"] * sigmoid_slope(s["gate"]), s["dy"] * reference.sigmoid(s["gate"])),
           source="arXiv:2002.05202"),
    fault("swiglu_gradient_clamped", "gate and up are clamped", SWIGLU, clamped, ((7.0,), (10.0,)),
           each="gate and up are clamped at {:g}", source="gpt-oss clamps at 7"),
    fault("swiglu_gradient_exchanged", "SiLU is taken to be on up: gate and up are exchanged", SWIGLU, exchanged),
    fault("swiglu_results_exchanged", "dgate and dup are exchanged", SWIGLU, lambda s: s.results()[::-1]),
    fault("swiglu_dgate_without_up", "dgate lacks up", SWIGLU,
           lambda s: (s["dy"] * silu_slope(s["gate"]), s.results()[1])),
    fault("swiglu_dup_without_activation", "dup = dy gate, without the activation", SWIGLU,
           lambda s: (s.run(), s["dy"] * s["gate"])),
    fault("swiglu_dup_of_sigmoid", "dup = dy sigmoid(gate), without the factor gate", SWIGLU,
           lambda s: (s.run(), s["dy"] * reference.sigmoid(s["gate"]))),
    fault("gradient_underflow", "1 / (1 + exp(-x)) in float32: a sigmoid of 0 below -88.7", (GATED, SWIGLU),
          without_sigmoids),
    fault("gradient_flushed", "gradients below 2^-126 are 0", ALL, of_results(_flushed),
           source="processors that flush subnormals"),
)
