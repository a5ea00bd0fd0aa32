"""What `check_op` knows of `decay_gate`."""

import numpy as np

from .plain import Form, drawn, filled, lone_rows, maker, nans, plain

__all__ = ["SPEC", "a_log", "mixed", "opened", "small_rates"]


def inputs(rng, T, H=3, K=16, kind="channel", scale=2.0, lower_bound=None):
    """f [T, H, K], rate [H] = exp(A_log) of 1 to 16, dt_bias [H, K], as training begins; a gate a head has no K."""
    tail = (H, K) if kind == "channel" else (H,)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), tail))
    return dict(f=scale * rng.standard_normal((T, *tail)), rate=np.exp(rng.uniform(0, np.log(16), H)),
                dt_bias=dt + np.log(-np.expm1(-dt)), lower_bound=lower_bound)


case = maker("decay_gate", inputs)


mixed = drawn("f", [-1e4, -100, -20, -1e-20, 0, 1e-20, 10.5, 21, 80, 90, 1e4])


def opened(x, rng):
    """Where the bounded gate moves: not next to 0 or to its bound."""
    x["f"] += np.float32(4)
    x["rate"] /= np.float32(3)


def _vanishing(x, rng):
    x["f"][1::2] = -88


def small_rates(x, rng):
    x["rate"][...] = np.float32([1e-6, 1e-3, 50])


def cases():
    """All."""
    yield case("plain", "lengths", 9, usual=True, says="9 tokens, 3 heads, a gate per channel of 16")
    for T in (1, 2, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for K in (1, 15, 16, 17, 33, 128):
        yield case(f"width-{K}", "widths", 4, 2, K)
    yield case("heads", "widths", 2, 32, 128, says="32 heads of 128 channels")
    yield case("per-head", "kinds", 9, 5, kind="head", usual=True, needs={"gate per head"})
    for bound in (-5.0, -1.0):
        yield case(f"bounded{bound:g}", "bounded", 9, lower_bound=bound, change=opened, usual=True,
                   needs={"lower_bound"})
    yield case("bounded-mixed", "bounded", 9, lower_bound=-5.0, change=mixed, needs={"lower_bound", "subnormals"})
    for value in (-100.0, -20.0, 0.0, 20.0, 100.0, 1e4):
        yield case(f"f{value:g}", "rim", 4, change=filled("f", value))
    yield case("vanishing", "rim", 4, change=_vanishing, needs={"subnormals"},
               says="every other row has a softplus below 2^-126")
    yield case("mixed", "rim", 9, change=mixed, says="from -1e4 to 1e4")
    yield case("rates", "rim", 9, change=small_rates, says="rates of 1e-6, 1e-3 and 50")
    yield case("steep", "rim", 9, scale=30.0)
    yield from nans(case, 5, f=(2, 1, 3), dt_bias=(1, 3))


def a_log(x):
    return np.log(x["rate"].astype(np.float64)).astype(np.float32)


FORMS = {
    "f [1, T, H, K]": Form(lambda x: {"f": x["f"][None]}, lambda found, x: {"g": found["g"][0]}),
    "f [T, H K]": Form(lambda x: {"f": x["f"].reshape(len(x["f"]),
                                                      x["f"][0].size if len(x["f"]) else x["dt_bias"].size)},
                       lambda found, x: {"g": found["g"].reshape(x["f"].shape)}),
    "dt_bias [H K]": Form(lambda x: {"dt_bias": x["dt_bias"].reshape(-1)}),
    "rate as A_log": Form(lambda x: {"rate": a_log(x)},
                          exact=lambda x: {"rate": np.exp(a_log(x).astype(np.float64))}),
    "rate as -exp(A_log)": Form(lambda x: {"rate": -x["rate"]}),
    "g in log2": Form(back=lambda found, x: {"g": np.float64(found["g"]) * np.log(2)}),
}

SPEC = plain("decay_gate", ("g",), cases(), lone_rows("decay_gate", "f"), FORMS,
             narrow=("f",), narrow_results=())
