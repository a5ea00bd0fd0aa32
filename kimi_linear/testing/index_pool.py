"""What `check_op` knows of `index_pool`."""

import numpy as np

from .plain import drawn, filled, halved, maker, nans, plain
from .spec import Law

__all__ = ["SPEC"]


def inputs(rng, T, P=4, D=16, spread=1.0, lengths=None):
    """k, gate [T, D], ape [P, D]."""
    return dict(k=rng.standard_normal((T, D)), gate=spread * rng.standard_normal((T, D)),
                ape=0.5 * rng.standard_normal((P, D)), offsets=None if lengths is None else np.cumsum([0, *lengths]))


case = maker("index_pool", inputs)


def _left_out(x, rng):
    """The second token of each pool."""
    x["gate"][1::4] = -np.inf


def _below_normal(x, rng):
    x["k"] *= np.float32(1e-39)


def cases():
    """All."""
    yield case("plain", "lengths", 24, usual=True, says="6 pools of 4 tokens")
    for T in (1, 3, 4, 5, 67):
        yield case(f"length-{T}", "lengths", T, usual=T > 3, says="the last pool is not complete" if T % 4 else "")
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for P, D in ((1, 16), (2, 6), (16, 32), (64, 64), (4, 128), (16, 128)):
        yield case(f"pool-{P}-{D}", "widths", 2 * P + 1, P, D, usual=P > 1, says="tokens of a pool, and channels")
    yield case("ragged", "ragged", 32, lengths=(3, 0, 9, 5, 15), needs={"offsets"}, usual=True,
               says="sequences of 3, 0, 9, 5 and 15 tokens: pools begin with each")
    yield case("ragged-even", "ragged", 24, lengths=(8, 4, 12), needs={"offsets"}, usual=True)
    yield case("sharp", "rim", 24, spread=30.0, says="one token has almost all the weight")
    yield case("large-gates", "rim", 24, spread=1e4, says="exp of a gate overflows")
    yield case("equal-gates", "rim", 24, change=filled("gate", 0), says="ape alone")
    yield case("no-ape", "rim", 24, change=filled("ape", 0))
    yield case("mixed", "rim", 24, change=drawn("gate", [-1e4, -90, -1, 0, 1, 90]), says="gates from -1e4 to 90")
    yield case("left-out", "rim", 24, change=_left_out, needs={"-inf"}, says="gates of -inf: a token without weight")
    yield case("subnormal", "rim", 24, change=_below_normal, needs={"subnormals"}, says="keys of 1e-39")
    yield from nans(case, 24, k=(5, 3), gate=(6, 2), ape=(1, 3))


def _pools_apart(x, call):
    """Half of the last pool's k, and of its gate."""
    a, b = call(x)[0], call(halved(x, ("k", "gate"), slice(-len(x["ape"]), None)))[0]
    if a[:-1].tobytes() != b[:-1].tobytes():
        return f"one pool changes the keys of others, in {int((a[:-1] != b[:-1]).sum())} values"
    return None


POOLS_APART = Law("pools-apart", "a pool changes no byte of another's key", _pools_apart)

SPEC = plain("index_pool", ("keys",), cases(), (POOLS_APART,), narrow=("k", "gate"))
