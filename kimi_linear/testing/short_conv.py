"""What `check_op` knows of `short_conv`."""

import numpy as np

from .plain import DROPPED, Form, causal, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, C=12, W=4, history=False, lengths=None, activation="silu"):
    """x [T, C], w [C, W], history [W-1, C]; with `lengths`, of sequences, [N, W-1, C] and offsets."""
    N = () if lengths is None else (len(lengths),)
    return dict(x=rng.standard_normal((T, C)), w=rng.standard_normal((C, W)) / W**0.5,
                history=rng.standard_normal((*N, W - 1, C)) if history else None,
                offsets=None if lengths is None else np.cumsum([0, *lengths]), activation=activation)


case = maker("short_conv", inputs)


def split(*cuts):
    """Calls that end at `cuts`, each taking up the history of the one before."""
    def steps(x, call):
        parts, history = [], x.get("history")
        for a, b in zip((0, *cuts), (*cuts, len(x["x"])), strict=True):
            given = {} if history is None else {"history": np.ascontiguousarray(history, np.float32)}
            y, history = call(x | {"x": np.ascontiguousarray(x["x"][a:b])} | given)
            parts.append(y)
        return np.concatenate(parts), history

    return steps


def _zeros(x, rng):
    x["x"][1::2] = 0


def _times(factor):
    def change(x, rng):
        for name in ("x", "history"):
            x[name] *= np.float32(factor)
    return change


def cases():
    """All."""
    yield case("plain", "lengths", 9, usual=True, says="9 tokens, 12 channels, 4 taps, no history")
    for T in (1, 2, 3, 4, 5, 64, 65):
        yield case(f"length-{T}", "lengths", T, usual=T > 3)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for T in (1, 2, 3, 7, 65):
        yield case(f"carried-{T}", "history", T, history=True, usual=True, needs={"history"}, says="from a history")
    yield case("carried-0", "history", 0, history=True, needs={"history", "T = 0"}, says="no token: it is handed on")
    for cuts in ((1,), (5,), (1, 2, 3, 11)):
        yield case("split-" + "-".join(map(str, cuts)), "history", 20, steps=split(*cuts), needs={"history"},
                   usual=True,
                   says="in calls that end at these tokens, the history carried")
    for history in (False, True):
        yield case("ragged-carried" if history else "ragged", "ragged", 26, history=history, lengths=(0, 1, 2, 0, 17,
                                                                                                      6),
                   needs={"offsets"} | ({"history"} if history else set()), usual=True,
                   says="sequences of 0, 1, 2, 0, 17 and 6 tokens")
    for C in (1, 15, 16, 17, 33, 4096):
        yield case(f"width-{C}", "widths", 5, C, history=True, needs={"history"})
    for W in (1, 2, 3, 5):
        yield case(f"taps-{W}", "widths", 7, 8, W, history=True, needs={"history", "other taps than 4"})
    yield case("silu", "activation", 9, activation="silu", usual=True, needs={"silu"})
    yield case("linear", "activation", 9, activation=None, usual=True, needs={"no activation"})
    yield case("zeros", "rim", 9, history=True, change=_zeros, needs={"history"})
    yield case("large", "rim", 9, history=True, change=_times(1e20), needs={"history"})
    yield case("tiny", "rim", 9, history=True, change=_times(1e-20), needs={"history"})
    yield from nans(case, 9, x=(4, 3), w=(2, 1))


def _turn(a):
    return np.ascontiguousarray(np.swapaxes(a, -1, -2))


def _in_front(turn):
    """x behind its history, in one array; the history behind it is the caller's."""
    def to(x):
        W, C = x["w"].shape[1], x["w"].shape[0]
        if "offsets" in x:
            return {}
        history = x.get("history", np.zeros((W - 1, C), np.float32))
        whole = np.concatenate([history.reshape(W - 1, C), x["x"]])
        return {"x": np.ascontiguousarray(whole.T if turn else whole)[None], "history": DROPPED}

    def back(found, x):
        W, C = x["w"].shape[1], x["w"].shape[0]
        whole = np.concatenate([x.get("history", np.zeros((W - 1, C), np.float32)).reshape(W - 1, C), x["x"]])
        return {"y": found["y"].reshape(len(x["x"]), C), "history": whole[len(whole) - W + 1:]}

    return Form(to, back)


def _history(columns):
    """[N, C, W - 1], or [N, C, W] with the newest column last and a first that is not read."""
    def to(x):
        W, C = x["w"].shape[1], x["w"].shape[0]
        if "history" not in x:
            return {}
        a = _turn(x["history"].reshape(len(x["offsets"]) - 1 if "offsets" in x else 1, W - 1, C))
        return {"history": np.concatenate([np.zeros_like(a[..., :1]), a], -1) if columns == "W" else a}

    def back(found, x):
        W = x["w"].shape[1]
        a = _turn(found["history"][..., found["history"].shape[-1] - W + 1:])
        return found | {"history": a if "offsets" in x else a[0]}

    return Form(to, back)


FORMS = {
    "x [1, T, C]": Form(lambda x: {"x": x["x"][None]}, lambda found, x: found | {"y": found["y"][0]}),
    "x [1, C, T]": Form(lambda x: {"x": _turn(x["x"])[None]}, lambda found, x: found | {"y": _turn(found["y"][0])}),
    "w [W, C]": Form(lambda x: {"w": _turn(x["w"])}),
    "w [C, 1, W]": Form(lambda x: {"w": x["w"][:, None]}),
    "w [C, W, 1]": Form(lambda x: {"w": x["w"][:, :, None]}),
    "w newest first": Form(lambda x: {"w": np.ascontiguousarray(x["w"][:, ::-1])}),
    "history [N, C, W-1]": _history("W-1"),
    "history [N, C, W]": _history("W"),
    "history in x, [1, W-1+T, C]": _in_front(False),
    "history in x, [1, C, W-1+T]": _in_front(True),
}

SPEC = plain("short_conv", ("y", "history"), cases(), (causal("x"),), FORMS,
             narrow=("x", "w", "history"))
