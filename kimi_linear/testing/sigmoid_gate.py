"""What `check_op` knows of `sigmoid_gate`."""


from .plain import filled, gates, lone_rows, maker, nans, plain

__all__ = ["SPEC"]


def inputs(rng, T, D=48, G=48, scale=2.0):
    """x [T, D], gate [T, G]."""
    return dict(x=rng.standard_normal((T, D)), gate=scale * rng.standard_normal((T, G)))


case = maker("sigmoid_gate", inputs)


def cases():
    """All."""
    yield case("plain", "lengths", 6, usual=True)
    for T in (1, 7, 65):
        yield case(f"length-{T}", "lengths", T, usual=True)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for D in (1, 15, 16, 17, 33, 4096):
        yield case(f"width-{D}", "widths", 2, D, D)
    for D, G in ((48, 1), (48, 3), (34, 17), (2048, 1), (4096, 16)):
        yield case(f"gates-{G}-of-{D}", "gates", 3, D, G, needs={"G < D"}, usual=True,
                   says="a gate for each of D / G values")
    yield from gates(case, "gate")
    yield case("zero", "rim", 3, change=filled("gate", 0.0), says="half of x")
    yield from nans(case, 5, x=(2, 3), gate=(3, 1))


SPEC = plain("sigmoid_gate", ("y",), cases(), lone_rows("sigmoid_gate", "x", "gate"),
             narrow=("x", "gate"))
