"""What `check_op` knows of `situ`."""

from .plain import filled, gates, lone_rows, maker, nans, plain
from .swiglu import FORMS

__all__ = ["SPEC"]


def inputs(rng, T, F=48, scale=2.0, beta=4.0, linear_beta=25.0, of_up=1.0):
    """gate, up [T, F], and the betas of Kimi K3."""
    return dict(gate=scale * rng.standard_normal((T, F)), up=of_up * scale * rng.standard_normal((T, F)), beta=beta,
                linear_beta=linear_beta)


case = maker("situ", inputs)


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 7, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for F in (1, 15, 16, 17, 33, 3072, 6144):
        yield case(f"width-{F}", "widths", 2, F)
    yield case("gate-alone", "betas", 6, linear_beta=None, usual=True, says="up is not bounded")
    yield case("beta-1", "betas", 6, beta=1.0, linear_beta=None, says="what K3's code takes where the config has none")
    yield case("other-betas", "betas", 6, beta=1.7, linear_beta=3.3, usual=True)
    yield case("wide-betas", "betas", 6, beta=60.0, linear_beta=900.0, says="next to SwiGLU")
    yield case("large", "rim", 6, 48, 30.0, says="both factors level off")
    yield case("large-up", "rim", 6, 48, 2.0, of_up=1e3, says="up is a sign, times linear_beta")
    yield from gates(case, "gate")
    yield case("zero", "rim", 3, change=filled("gate", 0.0))
    yield case("negative", "rim", 3, change=filled("gate", -60.0), says="a gate that is next to nothing")
    yield case("tiny", "rim", 3, 48, 1e-18, says="tanh x is x: 1 - 2 / (e^2x + 1) has no digit of it")
    yield from nans(case, 5, gate=(2, 3), up=(3, 1))


SPEC = plain("situ", ("y",), cases(), lone_rows("situ", "gate", "up"), FORMS,
             narrow=("gate", "up"))
