"""What `check_op` knows of gradients: those of the norms, the convolution, the decay gate and swiglu."""

import numpy as np

from .. import reference
from .check import FACTOR
from .decay_gate import a_log, mixed, opened, small_rates
from .plain import DROPPED, Form, allowances, drawn, filled, gates, lone_rows, maker, nans, plain
from .rms_norm import norm_cases
from .spec import Law, NotOffered, Spec

__all__ = ["SPECS"]

#: In u of a narrow type, the rms error of gradients behind a gate: of products whose operands are products.
BEHIND = 2 * Spec.narrow_rms


# ---- laws ------------------------------------------------------------------------------------------


def added_up(op, parts, *summed, needs=()):
    """What a weight gets of two halves of the tokens, each in a call of its own, is what it gets of all."""
    def check(x, call):
        halves = parts(x)
        whole, found = call(x), [call(h) for h in halves]
        allowed = [allowances(op, y) for y in (x, *halves)]
        for i in summed:
            off = np.abs(np.float64(whole[i]) - sum(np.float64(r[i]) for r in found))
            if (off > FACTOR * sum(bounds[i] for bounds in allowed)).any():
                return f"what two halves of the tokens give {spec_of(op).results[i]} does not add up to what all give"
        return None

    return Law("sums", "a weight's gradient over all tokens is the sum of those over some", check, frozenset(needs))


def spec_of(op):
    """The Spec of a gradient."""
    return SPECS[op]


def halves_of(*names):
    """The first rows, and the rest."""
    def parts(x):
        t = len(x[names[0]]) // 2
        return [x | {n: np.ascontiguousarray(x[n][part]) for n in names} for part in np.s_[:t, t:]]

    return parts


# ---- what cases share ------------------------------------------------------------------------------


def _every_other(name, value):
    def change(x, rng):
        x[name][1::2] = value

    return change


def _times(factor, *names):
    def change(x, rng):
        for name in names:
            x[name] *= np.float32(factor)

    return change


def of_dy(case, *sizes, name="dy"):
    """Cases about the gradient that comes."""
    yield case(f"{name}-zero", "rim", *sizes, change=_every_other(name, 0), says="every other row has no gradient")
    yield case(f"{name}-large", "rim", *sizes, change=_times(1e15, name))
    yield case(f"{name}-tiny", "rim", *sizes, change=_times(1e-25, name))
    yield case(f"{name}-subnormal", "rim", *sizes, change=_times(1e-40, name), needs={"subnormals"})


# ---- norms -----------------------------------------------------------------------------------------


def rows_of(rng, T, D, scale, spread, H):
    """dy and x, [T, D] or [T, H, D]."""
    lead = (T,) if H is None else (T, H)
    x = scale * rng.standard_normal((*lead, D)) * np.exp(spread * rng.standard_normal((*lead, 1)))
    return rng.standard_normal(x.shape), x


def norm_inputs(rng, T, D=48, scale=1.0, eps=1e-5, spread=1.0, H=None):
    """dy, x [T, D] or [T, H, D], w [D] around 1."""
    dy, x = rows_of(rng, T, D, scale, spread, H)
    return dict(dy=dy, x=x, w=1 + 0.3 * rng.standard_normal(D), eps=eps)


def l2_inputs(rng, T, D=48, scale=1.0, eps=1e-6, spread=1.0, H=None):
    """The same without a weight."""
    dy, x = rows_of(rng, T, D, scale, spread, H)
    return dict(dy=dy, x=x, eps=eps)


def gated_inputs(rng, T, D=48, scale=1.0, eps=1e-5, spread=1.0, H=None, activation="sigmoid"):
    """dy, x, z [T, D] or [T, H, D], w [D]."""
    given = norm_inputs(rng, T, D, scale, eps, spread, H)
    return given | dict(z=3 * rng.standard_normal(given["x"].shape), activation=activation)


def _along(x, rng):
    x["dy"][...] = x["x"] / x["w"] if "w" in x else x["x"]


def of_norms(case, eps=(1e-6, 1e-5), size=1.0, weight=True, rest=()):
    """Cases of a norm's gradient: the norm's own, and those of dy and of long sums."""
    yield from norm_cases(case, eps, size, rest)
    if weight:
        yield case("length-1000", "lengths", 1000, 16, usual=1000, says="a weight's gradient of 1,000 tokens")
    yield case("along", "values", 5, change=_along, says="a gradient along x: next to nothing is left of dx")
    yield from of_dy(case, 4)
    yield from nans(case, 5, dy=(3, 1), **({"w": (7,)} if weight else {}))


def of_gate(case):
    """What a gate adds."""
    yield case("heads-of-a-model", "heads", 2, 128, 1.0, 1e-5, 1.0, 32)
    for activation, highest in {"sigmoid": 1e4, "silu": 200}.items():
        needs = {activation}
        yield case(activation, "activation", 6, activation=activation, usual=True, needs=needs)
        yield case(f"saturated-{activation}", "rim", 6, activation=activation, needs=needs,
                   change=drawn("z", [-70, -20, -1.2784645, 0, 1e-20, 9, 20, 100, highest]),
                   says="gates next to 0 and 1, and where silu' is 0")
        yield case(f"closed-{activation}", "rim", 6, activation=activation, needs=needs | {"subnormals"},
                   change=drawn("z", [-1e4, -100, -90, -88]), says="gates of -88 and below")
    yield case("shut", "rim", 6, change=_every_other("z", -np.inf), needs={"sigmoid"}, says="gates of -infinity")
    yield from nans(case, 5, z=(2, 5))


def norms():
    """Specs of the three norms."""
    op = "rms_norm_backward"
    yield plain(op, ("dx", "dw"), of_norms(maker(op, norm_inputs)),
                (*lone_rows(op, "dy", "x", first=1), added_up(op, halves_of("dy", "x"), 1)), narrow=("dy", "x", "w"))
    op = "l2_norm_backward"
    yield plain(op, ("dx",), of_norms(maker(op, l2_inputs), (1e-6, 1e-5), 48**-0.5, False),
                lone_rows(op, "dy", "x"), narrow=("dy", "x"))
    op = "gated_rms_norm_backward"
    case = maker(op, gated_inputs)
    yield plain(op, ("dx", "dz", "dw"), of_norms(case, rest=of_gate(case)),
                (*lone_rows(op, "dy", "x", "z", first=2), added_up(op, halves_of("dy", "x", "z"), 2)),
                narrow=("dy", "x", "z", "w"), narrow_rms=BEHIND)


# ---- convolution -------------------------------------------------------------------------------------


def conv_inputs(rng, T, C=12, W=4, history=False, lengths=None, activation="silu", final=False):
    """dy, x [T, C], w [C, W], history [W-1, C]; with `lengths`, of sequences, [N, W-1, C] and offsets; dfinal as it."""
    N = () if lengths is None else (len(lengths),)
    return dict(dy=rng.standard_normal((T, C)), x=rng.standard_normal((T, C)), w=rng.standard_normal((C, W)) / W**0.5,
                history=rng.standard_normal((*N, W - 1, C)) if history else None,
                dfinal=rng.standard_normal((*N, W - 1, C)) if final else None,
                offsets=None if lengths is None else np.cumsum([0, *lengths]), activation=activation)


def parts_of(x, *cuts):
    """Arguments of calls that end at `cuts`, each with the inputs before it for its history."""
    W, T = x["w"].shape[1], len(x["x"])
    seen = np.concatenate([x.get("history", np.zeros((W - 1, x["x"].shape[1]), x["x"].dtype)), x["x"]])
    for a, b in zip((0, *cuts), (*cuts, T), strict=True):
        rows = {n: np.ascontiguousarray(x[n][a:b]) for n in ("dy", "x")}
        yield x | rows | {"history": np.ascontiguousarray(seen[a:a + W - 1])}


def split(*cuts):
    """Calls that end at `cuts`: what each gives its history joins the inputs before, and the taps' are added up."""
    def steps(x, call):
        W = x["w"].shape[1]
        dseen, dw = np.zeros((W - 1 + len(x["x"]), x["x"].shape[1])), 0.0
        for a, part in zip((0, *cuts), parts_of(x, *cuts), strict=True):
            dx, of_part, dhistory = call(part)
            dseen[a:a + W - 1 + len(dx)] += np.concatenate([dhistory, dx])
            dw = dw + np.float64(of_part)
        return dseen[W - 1:], dw, dseen[:W - 1]

    return steps


def _behind(x, call):
    """The gradient of what came before reaches no input from here on."""
    t = len(x["dy"]) // 2
    earlier = x | {"dy": np.concatenate([x["dy"][:t] * np.float32(0.5), x["dy"][t:]]).astype(x["dy"].dtype)}
    a, b = call(x)[0][t:], call(earlier)[0][t:]
    if a.tobytes() != b.tobytes():
        return f"gradients of outputs reach inputs behind them, in {int((a != b).sum())} values"
    return None


def conv_cases(case):
    """All of the convolution's gradient."""
    yield case("plain", "lengths", 9, usual=True, says="9 tokens, 12 channels, 4 taps, no history")
    for T in (1, 2, 3, 4, 5, 64, 65, 130):
        yield case(f"length-{T}", "lengths", T, usual=T > 3)
    yield case("length-1000", "lengths", 1000, 4, usual=1000, says="taps' gradients of 1,000 tokens")
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for T in (1, 2, 3, 7, 65):
        yield case(f"carried-{T}", "history", T, history=True, usual=True, needs={"history"}, says="from a history")
    yield case("carried-0", "history", 0, history=True, needs={"history", "T = 0"}, says="no token: no gradient")
    for cuts in ((1,), (5,), (1, 2, 3, 11)):
        yield case("split-" + "-".join(map(str, cuts)), "history", 20, steps=split(*cuts), needs={"history"},
                   says="in calls that end at these tokens, whose dhistory joins the inputs before")
    for history in (False, True):
        yield case("ragged-carried" if history else "ragged", "ragged", 26, history=history, lengths=(0, 1, 2, 0, 17,
                                                                                                      6),
                   needs={"offsets"} | ({"history"} if history else set()), usual=True,
                   says="sequences of 0, 1, 2, 0, 17 and 6 tokens")
    handed_on = dict(history=True, final=True, usual=True)
    for T in (1, 2, 3, 9):
        yield case(f"handed-on-{T}", "handed on", T, needs={"history", "dfinal"}, **handed_on,
                   says="the history that is handed on has a gradient")
    yield case("handed-on-0", "handed on", 0, needs={"history", "dfinal", "T = 0"}, **handed_on,
               says="no token: dfinal is the history's gradient")
    yield case("handed-on-ragged", "handed on", 26, lengths=(0, 1, 2, 0, 17, 6), needs={"history", "dfinal", "offsets"},
               **handed_on)
    for C in (1, 15, 16, 17, 33, 4096):
        yield case(f"width-{C}", "widths", 5, C, history=True, needs={"history"})
    for W in (1, 2, 3, 5):
        yield case(f"taps-{W}", "widths", 7, 8, W, history=True, needs={"history", "other taps than 4"})
    yield case("silu", "activation", 9, activation="silu", usual=True, needs={"silu"})
    yield case("linear", "activation", 9, activation=None, usual=True, needs={"no activation"})
    yield case("zeros", "rim", 9, change=_every_other("x", 0))
    yield case("steep", "rim", 9, change=_times(30, "x"), says="sums next to 0 and 1 of silu's sigmoid")
    yield case("large", "rim", 9, history=True, change=_times(1e20, "x", "history"), needs={"history"})
    yield case("tiny", "rim", 9, history=True, change=_times(1e-20, "x", "history"), needs={"history"})
    yield from of_dy(case, 9)
    yield from nans(case, 9, dy=(4, 3), x=(4, 3), w=(2, 1))


def _of_zeros(x):
    if "history" in x:
        raise NotOffered("history")
    return {}


CONV_FORMS = {
    "without dhistory": Form(_of_zeros, lambda found, x: found | {
        "dhistory": reference.short_conv_backward(**x)[2].astype(np.float32)}),
}


def conv():
    """The Spec of the convolution's gradient."""
    op = "short_conv_backward"
    laws = (Law("looks-ahead", "the gradient of an output changes no byte of later inputs'", _behind),
            added_up(op, lambda x: list(parts_of(x, len(x["x"]) // 2)), 1, needs={"history"}))
    return plain(op, ("dx", "dw", "dhistory"), conv_cases(maker(op, conv_inputs)), laws, CONV_FORMS,
                 narrow=("dy", "x", "w", "history"), narrow_rms=BEHIND)


# ---- gates -------------------------------------------------------------------------------------------


def gate_inputs(rng, T, H=3, K=16, kind="channel", scale=2.0, lower_bound=None):
    """dg, f [T, H, K], rate [H] = exp(A_log) of 1 to 16, dt_bias [H, K], as training begins; a gate a head has no K."""
    tail = (H, K) if kind == "channel" else (H,)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), tail))
    return dict(dg=rng.standard_normal((T, *tail)), f=scale * rng.standard_normal((T, *tail)),
                rate=np.exp(rng.uniform(0, np.log(16), H)), dt_bias=dt + np.log(-np.expm1(-dt)),
                lower_bound=lower_bound)


def _high(value):
    def change(x, rng):
        x["f"][:, :2] = value

    return change


def gate_cases(case):
    """All of the decay gate's gradient."""
    yield case("plain", "lengths", 9, usual=9 * 16, says="9 tokens, 3 heads, a gate per channel of 16")
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=16 * T)
    yield case("length-1000", "lengths", 1000, 2, 4, usual=4000, says="gradients of rate and dt_bias of 1,000 tokens")
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for K in (1, 15, 16, 17, 33, 128):
        yield case(f"width-{K}", "widths", 4, 2, K)
    yield case("heads", "widths", 2, 32, 128, says="32 heads of 128 channels")
    yield case("per-head", "kinds", 9, 5, kind="head", usual=True, needs={"gate per head"})
    for bound in (-5.0, -1.0):
        yield case(f"bounded{bound:g}", "bounded", 9, lower_bound=bound, change=opened, usual=9 * 16,
                   needs={"lower_bound"})
    yield case("bounded-per-head", "bounded", 9, 5, kind="head", lower_bound=-5.0, change=opened,
               needs={"lower_bound", "gate per head"})
    yield case("bounded-mixed", "bounded", 9, lower_bound=-5.0, change=mixed, needs={"lower_bound", "subnormals"})
    for value in (-20.0, 0.0, 12.0, 20.0):
        yield case(f"f{value:g}", "rim", 4, change=filled("f", value))
    for value in (100.0, 1e4):
        yield case(f"f{value:g}", "rim", 4, change=_high(value), says="of two heads of three")
    yield case("vanishing", "rim", 4, change=_every_other("f", -100), needs={"subnormals"},
               says="every other row has a softplus below 2^-126")
    yield case("shut", "rim", 4, change=_every_other("f", -np.inf), says="every other row is -infinity: no gradient")
    yield case("mixed", "rim", 9, change=mixed, needs={"subnormals"}, says="from -1e4 to 1e4")
    yield case("rates", "rim", 9, change=small_rates, says="rates of 1e-6, 1e-3 and 50")
    yield case("steep", "rim", 9, scale=30.0, needs={"subnormals"})
    yield from of_dy(case, 4, name="dg")
    yield from nans(case, 5, dg=(2, 1, 3), f=(2, 1, 3), dt_bias=(1, 3))


GATE_FORMS = {
    "rate as A_log": Form(
        lambda x: {"rate": a_log(x)},
        lambda found, x: found | {"drate": np.float64(found["drate"]) / np.exp(a_log(x).astype(np.float64))},
        lambda x: {"rate": np.exp(a_log(x).astype(np.float64))}),
}


def gate():
    """The Spec of the decay gate's gradient."""
    op = "decay_gate_backward"
    laws = (*lone_rows(op, "dg", "f", first=1), added_up(op, halves_of("dg", "f"), 1, 2))
    return plain(op, ("df", "drate", "ddt_bias"), gate_cases(maker(op, gate_inputs)), laws, GATE_FORMS,
                 narrow=("f",), narrow_results=())


def swiglu_inputs(rng, T, F=48, scale=2.0):
    """dy, gate, up [T, F]."""
    return dict(dy=rng.standard_normal((T, F)), gate=scale * rng.standard_normal((T, F)),
                up=rng.standard_normal((T, F)))


def swiglu_cases(case):
    """All of swiglu's gradient."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 7, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for F in (1, 15, 16, 17, 33, 1024, 9216):
        yield case(f"width-{F}", "widths", 2, F)
    yield case("large", "rim", 6, 48, 30.0, needs={"subnormals"}, says="past the clamps of some")
    yield from gates(case, "gate")
    yield case("zero", "rim", 3, change=filled("gate", 0.0), says="silu' is a half")
    yield case("lowest", "rim", 3, change=filled("gate", -1.2784645), says="where silu' is 0")
    yield case("negative", "rim", 3, change=filled("gate", -60.0), says="silu of -60 is next to nothing")
    yield case("tiny", "rim", 3, 48, 1e-30)
    yield from of_dy(case, 4)
    yield from nans(case, 5, dy=(1, 4), gate=(2, 3), up=(3, 1))


SWIGLU_FORMS = {
    "gate and up in one, [gate | up]": Form(
        lambda x: {"gate": np.concatenate([x["gate"], x["up"]], -1), "up": DROPPED},
        lambda found, x: dict(zip(("dgate", "dup"), np.split(found["dgate"], 2, -1)))),
}


def swiglu():
    """The Spec of swiglu's gradient."""
    op = "swiglu_backward"
    return plain(op, ("dgate", "dup"), swiglu_cases(maker(op, swiglu_inputs)), lone_rows(op, "dy", "gate", "up"),
                 SWIGLU_FORMS, narrow=("dy", "gate", "up"))


SPECS = {the.op: the for the in (*norms(), conv(), gate(), swiglu())}
