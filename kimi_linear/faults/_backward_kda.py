"""Faults of gradients: what backward kernels of the convolution and the decay gate get wrong."""

from __future__ import annotations

import numpy as np

from .. import reference
from ..reference_backward import sigmoid_slope, silu_slope
from ._backward import CONV, FIRST, FLA, GATE, SECOND, changed, fault, first_alone, second_alone

# ---- convolution ---------------------------------------------------------------------------------------


def _sum(call):
    """The sum before the activation; None where there is no activation."""
    if call.args.get("activation", "silu") is None:
        return None
    forward = {n: call.args.get(n) for n in ("x", "w", "history", "offsets")}
    return reference.short_conv(**forward, activation=None)[0]


def _of_sum(call):
    """The gradient of that sum."""
    c = _sum(call)
    return call["dy"] if c is None else call["dy"] * silu_slope(c)


def _adjoint(call, w=None, **changes):
    """Results of a convolution without an activation, of the right gradient of the sum, but for changes."""
    given = {n: call.args.get(n) for n in ("x", "history", "offsets", "dfinal")} | changes
    return reference.short_conv_backward(_of_sum(call), w=call["w"] if w is None else w, activation=None, **given)


def other_slope(slope):
    """Results by another derivative of the activation, a function of the sum."""
    def function(call):
        c = _sum(call)
        return None if c is None else call.results(dy=call["dy"] * slope(c), activation=None)

    return function


def reversed_taps(call, where):
    if where == "dx":
        dx, _, dhistory = _adjoint(call, call["w"][:, ::-1])
        return dx, call.results()[1], dhistory
    dx, dw, dhistory = call.results() if where == "dw" else call.results(w=call["w"][:, ::-1])
    return dx, dw[:, ::-1], dhistory


def looking_back(call):
    """dx as the convolution of dc itself, with the taps of the forward pass."""
    right = call.results()
    back = reference.short_conv(_of_sum(call), call["w"], offsets=call.args.get("offsets"), activation=None)[0]
    return back, *right[1:]


def off_by_one(call, by):
    """dx one token early (1) or late (-1), zeros where there is none."""
    dx, *rest = call.results()
    moved = np.zeros_like(dx)
    for r in reference.sequences(len(dx), call.args.get("offsets")):
        own, n = dx[r], r.stop - r.start
        moved[r][max(-by, 0):n - max(by, 0)] = own[max(by, 0):n - max(-by, 0)]
    return moved, *rest


def packed(call, what):
    """Gradients of a sequence's outputs reach the inputs of the one before; or all is one sequence."""
    offsets = call.args.get("offsets")
    if offsets is None:
        return None
    dx, dw, dhistory = call.results()
    if what == "dx":
        return _adjoint(call, offsets=None, history=None)[0], dw, dhistory
    history = call.args.get("history")
    dx, dw, first = call.results(offsets=None, history=None if history is None else np.asarray(history)[0])
    return dx, dw, np.concatenate([first[None], np.zeros_like(dhistory[1:])])


def cut_in_blocks(call, n):
    """dx of each block of n tokens lacks what the outputs of the next give it."""
    rows = reference.sequences(len(call["x"]), call.args.get("offsets"))
    if max(r.stop - r.start for r in rows) <= n:
        return None
    cuts = sorted({cut for r in rows for cut in (*range(r.start, r.stop, n), r.stop)})
    return _adjoint(call, offsets=cuts, history=None)[0], *call.results()[1:]


def dropped_history(call):
    dx, dw, dhistory = call.results()
    return dx, dw, np.zeros_like(dhistory)


def turned_history(call):
    dx, dw, dhistory = call.results()
    return dx, dw, dhistory[..., ::-1, :]


def without_history(call, where):
    """The history counts for zeros: everywhere, or in the taps' gradient alone."""
    if call.args.get("history") is None:
        return None
    if where == "everywhere":
        return call.results(history=None)
    dx, _, dhistory = call.results()
    return dx, _adjoint(call, history=None)[1], dhistory


def final_dropped(call):
    """The gradient of the history that is handed on counts for zeros."""
    return None if call.args.get("dfinal") is None else call.results(dfinal=None)


def final_of_short_sequences(call, moved, dropped):
    """Of sequences of T < W - 1 tokens: token t gets row t of the history that is handed on, not W - 1 - T + t; what is
    left of the old one in it gets nothing."""
    rows, W = reference.sequences(len(call["x"]), call.args.get("offsets")), call["w"].shape[1]
    given = call.args.get("dfinal")
    if given is None or min((r.stop - r.start for r in rows), default=W) >= W - 1:
        return None
    right = np.float64(given).reshape(len(rows), W - 1, -1)
    wrong = right.copy()
    for n, r in enumerate(rows):
        left = W - 1 - (r.stop - r.start)
        if left > 0 and moved:
            wrong[n, left:] = right[n, :W - 1 - left]
        if left > 0 and dropped:
            wrong[n, :left] = 0
    return call.results(dfinal=wrong.reshape(np.shape(given)))


def turned_dw(call):
    """dw lies as [W, C]."""
    dx, dw, dhistory = call.results()
    return dx, np.ascontiguousarray(dw.T).reshape(dw.shape), dhistory


# ---- decay gate ----------------------------------------------------------------------------------------


def scaled(*factors):
    """Results times factors; the right ones behind the last."""
    def function(call):
        return tuple(f * a for f, a in zip(factors, call.results()))

    return function


def gated(df, of_rate=None, bounded=False):
    """The gate's gradient by another df and another term of drate, functions of dg, x, the rates and the bound; of a
    gate with a bound or without. ddt_bias is the sum of that df."""
    def function(call, *choice):
        bound = call.args.get("lower_bound")
        if (bound is not None) != bounded:
            return None
        dg, bias = call["dg"], call["dt_bias"]
        axes = bias.ndim
        rates, x = call["rate"].reshape(-1, *[1] * (axes - 1)), call["f"] + bias
        own = df(dg, x, rates, bound, *choice) if df else None
        right = call.results()
        terms = of_rate(dg, x, rates, bound, *choice) if of_rate else None
        return (right[0] if df is None else own,
                right[1] if terms is None else (terms.sum(-1) if axes == 2 else terms).sum(0),
                right[2] if df is None else own.sum(0))

    return function


def to_threshold(x, most):
    return np.where(x > most, x, reference.softplus(x))


def overflowing_softplus(x):
    return np.where(x > 88.72, np.inf, reference.softplus(x))


def in_steps(x):
    """log(1 + exp(x)), the sum rounded to float32."""
    return np.where(x > 80, x, np.log((1 + np.exp(np.minimum(x, 80))).astype(np.float32).astype(np.float64)))


def of_lower(y):
    """sigmoid', which is 0 where exp(-y) overflows float32."""
    return np.where(y < -88.72, 0.0, sigmoid_slope(y))


def times_rate(power):
    """drate times a power of the rate."""
    def function(call):
        df, drate, ddt = call.results()
        return df, drate * call["rate"]**power, ddt

    return function


def bias_without_rate(call):
    df, drate, ddt = call.results()
    return df, drate, ddt / call["rate"].reshape(-1, *[1] * (ddt.ndim - 1))


def of_sum_of_df(call):
    """drate as the sum of df."""
    df, _, ddt = call.results()
    return df, (df.sum(-1) if ddt.ndim == 2 else df).sum(0), ddt


def other_bound(call):
    """The gate with a bound for that without, or the reverse."""
    return call.results(lower_bound=-5.0 if call.args.get("lower_bound") is None else None)


FAULTS = (
    fault("conv_gradient_reversed", "taps are turned round", CONV, reversed_taps, (("dw",), ("dx",), ("both",)),
           each="taps are turned round, newest first, in {}"),
    fault("conv_gradient_looks_back", "dx reads the gradients of tokens before it, not of those behind", CONV,
           looking_back, source="the forward kernel, run on dy"),
    fault("conv_gradient_off_by_one", "dx is one token off", CONV, off_by_one, ((1,), (-1,)),
           each="dx is one token off ({:+d})", source="a padding of W in place of W - 1"),
    fault("conv_gradient_offsets_ignored", "offsets are ignored: sequences run into each other", CONV, packed,
           (("everything",), ("dx",)), each="offsets are ignored: sequences run into each other, in {}"),
    fault("conv_gradient_in_blocks", "dx of a block lacks what the next block's outputs give it", CONV, cut_in_blocks,
           ((8,), (16,), (32,), (64,), (128,)), each="dx of each block of {} tokens lacks what the next gives it"),
    fault("conv_dhistory_dropped", "the history gets no gradient", CONV, dropped_history),
    fault("conv_dhistory_turned", "the history's gradient has the newest row first", CONV, turned_history),
    fault("conv_dfinal_dropped", "the gradient of the history that is handed on is ignored", CONV, final_dropped),
    *(fault(f"conv_dfinal_{name}", f"in sequences of fewer than W - 1 tokens, {text}", CONV,
            lambda call, moved=moved, dropped=dropped: final_of_short_sequences(call, moved, dropped),
            source="fla-org/flash-linear-attention, issue 1140")
      for name, moved, dropped, text in (
          ("moved", True, False, "the gradient of the history that is handed on goes to the wrong ones"),
          ("of_left", False, True, "what is left of the history in the one that is handed on gets no gradient"),
          ("moved_and_left", True, True, "the gradient of the history that is handed on goes to the wrong ones, and "
                                         "what is left of the old one gets none"))),
    fault("conv_gradient_without_history", "the history counts for zeros", CONV, without_history,
           (("everywhere",), ("in dw",)), each="the history counts for zeros {}"),
    fault("conv_dw_transposed", "dw lies as [W, C]", CONV, turned_dw),
    fault("conv_gradient_of_linear", "SiLU's derivative is left out", CONV, other_slope(np.ones_like)),
    fault("conv_silu_first_term", FIRST, CONV, other_slope(first_alone)),
    fault("conv_silu_second_term", SECOND, CONV, other_slope(second_alone)),
    fault("conv_slope_of_output", "SiLU's derivative is taken of the output, not of the sum before it", CONV,
           other_slope(lambda c: silu_slope(reference.silu(c)))),
    fault("conv_slope_of_silu", "SiLU itself stands for its derivative", CONV, other_slope(reference.silu)),
    fault("gate_df_without_slope", "df = -rate dg: softplus' derivative, sigmoid, is missing", GATE,
           gated(lambda dg, x, rate, bound: -rate * dg)),
    fault("gate_df_of_softplus", "df has softplus itself for its derivative", GATE,
           gated(lambda dg, x, rate, bound: -rate * dg * reference.softplus(x))),
    fault("gate_df_of_sigmoid_slope", "df has s (1 - s) for softplus' derivative s", GATE,
           gated(lambda dg, x, rate, bound: -rate * dg * sigmoid_slope(x))),
    fault("gate_df_without_rate", "df lacks the rate", GATE,
           gated(lambda dg, x, rate, bound: -dg * reference.sigmoid(x))),
    fault("gate_gradient_sign", "the minus of -rate softplus(x) is missing", GATE,
           lambda s: None if s.args.get("lower_bound") is not None else scaled(-1, -1, -1)(s)),
    fault("drate_as_of_a_log", "drate is the gradient of A_log: it is multiplied by rate", GATE, times_rate(1),
           source=f"{FLA}: A_log is the parameter there"),
    fault("drate_over_rate", "drate is divided by rate: taken for a gradient of A_log", GATE, times_rate(-1)),
    fault("rate_gradient_of_a_log", "A_log is used in place of rate = exp(A_log)", GATE,
           changed(rate=lambda s: np.log(s["rate"]))),
    fault("rate_gradient_exponentiated", "exp is taken of rate, which is exp(A_log) already", GATE,
           changed(rate=lambda s: np.exp(s["rate"]))),
    fault("drate_without_softplus", "drate = -sum(dg): softplus is missing", GATE,
           gated(None, lambda dg, x, rate, bound: -dg)),
    fault("drate_of_slope", "drate has sigmoid(x) for softplus(x)", GATE,
           gated(None, lambda dg, x, rate, bound: -dg * reference.sigmoid(x))),
    fault("drate_of_df", "drate is the sum of df", GATE, of_sum_of_df),
    fault("gate_gradient_threshold", "softplus(x) is x above a threshold", GATE,
           gated(lambda dg, x, rate, bound, most: -rate * dg * np.where(x > most, 1, reference.sigmoid(x)),
                 lambda dg, x, rate, bound, most: -dg * to_threshold(x, most)), ((10.0,), (5.0,), (1.0,)),
           each="softplus(x) is x above a threshold of {:g}", source="torch's is 20, which float32 does not see"),
    fault("gate_gradient_overflow", "log(1 + exp(x)) overflows float32", GATE,
           gated(None, lambda dg, x, rate, bound: -dg * overflowing_softplus(x))),
    fault("gate_gradient_in_steps", "softplus as log(1 + exp(x)) in float32: digits are lost where x is far below 0",
           GATE, gated(None, lambda dg, x, rate, bound: -dg * in_steps(x))),
    fault("gate_gradient_bias", "dt_bias is not added, or twice", GATE,
           lambda s, times: s.results(dt_bias=times * s["dt_bias"]), ((0,), (2,)), each="dt_bias is added {} times"),
    fault("dt_bias_without_rate", "ddt_bias lacks the rate", GATE, bias_without_rate),
    fault("gate_gradient_other_bound", "the gate with a bound for that without, or the other way round", GATE,
           other_bound),
    fault("bounded_gradient_sigmoid", "of the bounded gate s stands for s (1 - s)", GATE,
           gated(lambda dg, x, rate, b: rate * b * dg * reference.sigmoid(rate * x),
                 lambda dg, x, rate, b: x * b * dg * reference.sigmoid(rate * x), True)),
    fault("bounded_gradient_without_rate", "df of the bounded gate lacks the rate", GATE,
           gated(lambda dg, x, rate, b: b * dg * sigmoid_slope(rate * x), None, True)),
    fault("bounded_gradient_of_x", "the bounded gate's derivative is taken at x, not at rate x", GATE,
           gated(lambda dg, x, rate, b: rate * b * dg * sigmoid_slope(x),
                 lambda dg, x, rate, b: x * b * dg * sigmoid_slope(x), True)),
    fault("bounded_drate_without_x", "drate of the bounded gate lacks x", GATE,
           gated(None, lambda dg, x, rate, b: b * dg * sigmoid_slope(rate * x), True)),
    fault("bounded_gradient_without_bound", "lower_bound is left out of the bounded gate's gradient", GATE,
           lambda s: None if s.args.get("lower_bound") is None else scaled(*[1 / s["lower_bound"]] * 3)(s)),
    fault("bounded_gradient_underflow", "1 / (1 + exp(-x)) in float32: a sigmoid of 0 below -88.7", GATE,
          gated(lambda dg, x, rate, b: rate * b * dg * of_lower(rate * x),
                lambda dg, x, rate, b: x * b * dg * of_lower(rate * x), True)),
    fault("gate_gradient_heads_rolled", "each head has the rate of the next", GATE,
           changed(rate=lambda s: np.roll(s["rate"], -1))),
    fault("gate_gradient_in_log2", "dg is taken for the gradient of a gate in log2", GATE,
           lambda s, factor: scaled(*[factor] * 3)(s), ((1 / np.log(2),), (np.log(2),)),
           each="dg is taken for the gradient of a gate in log2: all is {:.4g} times as large",
           source=f"{FLA}: chunk kernels work in log2"),
)
