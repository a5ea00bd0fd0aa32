"""What `check_op` knows of `moe`."""

import numpy as np

from .plain import DROPPED, Form, alone, faint, maker, nans, plain, rows_apart

__all__ = ["SPEC"]


def inputs(rng, T, D=16, F=8, E=6, k=2, shared=True, shared_gate=False, ids=None, situ=None,
           limit=None):
    """x [T, D], ids and weights [T, k], matrices of E experts, the shared expert's output [T, D], betas of SiTU, or
    SwiGLU's limit."""
    if ids is None:
        ids = np.sort(np.argsort(rng.random((T, E)), axis=-1)[:, :k], axis=-1)
    weights = rng.random(np.shape(ids)) + 0.1
    weights *= 2.446 / np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    return dict(x=rng.standard_normal((T, D)), ids=np.asarray(ids, np.int32), weights=weights,
                w_gate=rng.standard_normal((E, F, D)) / D**0.5, w_up=rng.standard_normal((E, F, D)) / D**0.5,
                w_down=rng.standard_normal((E, D, F)) / F**0.5,
                shared=rng.standard_normal((T, D)) if shared else None,
                shared_gate=rng.standard_normal((1, D)) / D**0.5 if shared_gate else None, situ=situ,
                limit=limit)


case = maker("moe", inputs)


def _zero_weights(x, rng):
    x["weights"][:, 0] = 0


def _shut(x, rng):
    """Gates from -5 to -1, where the exponential is all there is of a SiLU."""
    x["x"][...] = rng.uniform(1, 5, x["x"].shape)
    x["w_gate"][...] = -1


def _far(x, rng):
    """Products past both betas of K3."""
    x["w_gate"] *= np.float32(5)
    x["w_up"] *= np.float32(20)


def cases():
    """All."""
    yield case("plain", "lengths", 9, shared=False, usual=True, says="2 of 6 experts, no shared one")
    for T in (1, 2, 33):
        yield case(f"length-{T}", "lengths", T, shared=False, usual=True)
    yield case("length-0", "lengths", 0, shared=False, needs={"T = 0"})
    yield case("shared", "shared", 9, usual=True, needs={"shared"}, says="the shared expert's output is added")
    yield case("shared-gate", "shared", 9, shared_gate=True, usual=True, needs={"shared", "shared gate"},
               says="and scaled by a sigmoid")
    yield case("situ", "situ", 9, shared=False, situ=(4.0, 25.0), change=_far, usual=True, needs={"situ"},
               says="experts of Kimi K3: SiTU for SwiGLU")
    yield case("situ-gate", "situ", 9, shared=False, situ=(1.7, None), usual=True, needs={"situ"},
               says="its up is not bounded")
    yield case("situ-shared", "situ", 3, 33, 17, situ=(4.0, 25.0), needs={"situ", "shared"})
    yield case("limit", "limit", 9, shared=False, limit=10.0, change=_far, usual=True, needs={"limit"},
               says="experts of GLM-5.3-Flash: gate is cut above, up on both sides")
    yield case("limit-low", "limit", 9, limit=0.75, usual=True, needs={"limit", "shared"}, says="most values are cut")
    yield case("limit-shared", "limit", 3, 33, 17, limit=7.0, change=_far, needs={"limit", "shared"})
    for D, F in ((1, 1), (15, 17), (16, 16), (33, 1), (64, 40)):
        yield case(f"width-{D}-{F}", "widths", 4, D, F, shared=False, says="model width, inner width")
    yield case("model", "widths", 2, 2304, 16, 3, shared=False, says="2,304 wide")
    for E, k in ((1, 1), (3, 3), (64, 8)):
        yield case(f"experts-{E}-{k}", "experts", 7, 16, 8, E, k, shared=False)
    yield case("one-expert", "experts", 7, shared=False, ids=[[3]] * 7, says="all tokens go to one")
    yield case("last-expert", "experts", 3, shared=False, ids=[[4, 5]] * 3)
    yield case("no-token", "experts", 2, shared=False, ids=[[0, 5], [0, 5]], says="four experts have no token")
    yield case("subnormal", "rim", 5, shared=False, change=faint("weights"), needs={"subnormals"},
               says="every other row has weights of 1e-39")
    yield case("shut", "rim", 40, 1, 1, 1, 1, shared=False, change=_shut, usual=True,
               says="products of one term, gates from -5 to -1: SiLU's own error shows")
    yield case("zero-weights", "rim", 5, shared=False, change=_zero_weights)
    yield from nans(case, 5, shared=False, x=(2, 3))


def _joined(x):
    return {"w_gate": np.concatenate([x["w_gate"], x["w_up"]], 1), "w_up": DROPPED}


def _turn(name):
    return lambda x: {name: np.ascontiguousarray(np.swapaxes(x[name], 1, 2))}


FORMS = {
    "w_gate and w_up in one, [E, 2 F, D]": Form(_joined),
    "w_up and w_gate in one, [E, 2 F, D]": Form(
        lambda x: {"w_gate": np.concatenate([x["w_up"], x["w_gate"]], 1), "w_up": DROPPED}),
    "w_down [E, F, D]": Form(_turn("w_down")),
    "w_gate [E, D, F]": Form(_turn("w_gate")),
    "w_up [E, D, F]": Form(_turn("w_up")),
    "ids int64": Form(lambda x: {"ids": x["ids"].astype(np.int64)}),
}

SPEC = plain("moe", ("y",), cases(), (rows_apart("x", "weights"), alone("moe", "x", "ids", "weights")), FORMS,
             narrow=("x", "w_gate", "w_up", "w_down", "shared", "shared_gate"), narrow_rms=2.56)
