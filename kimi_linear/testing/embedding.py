"""What `check_op` knows of `embedding`."""

import numpy as np

from .plain import f32, lone_rows, maker, plain

__all__ = ["SPEC"]


def inputs(rng, T, vocab=50, D=24, ids=None):
    """ids [T] int64, table [vocab, D]."""
    return dict(ids=rng.integers(0, vocab, T) if ids is None else np.array(ids, np.int64),
                table=rng.standard_normal((vocab, D)))


case = maker("embedding", inputs)


def _wide(x, rng):
    """Rows that tell themselves, as float32 numbers of a large table would take long to draw."""
    x.update(f32(table=np.arange(163840.0)[:, None] * np.array([1.0, -0.5])))


def _rim(x, rng):
    x["table"][:4] = np.float32([[0.0], [1e-40], [3e38], [np.inf]])
    x["ids"][:4] = np.arange(4)


def cases():
    """All."""
    yield case("plain", "lengths", 12, usual=True)
    for T in (1, 7, 200):
        yield case(f"length-{T}", "lengths", T)
    yield case("length-0", "lengths", 0, needs={"T = 0"})
    for D in (1, 15, 16, 17, 33, 2304):
        yield case(f"width-{D}", "widths", 5, 20, D)
    yield case("edges", "ids", 5, 9, 4, ids=[0, 8, 0, 8, 4], says="the first and the last row")
    yield case("repeated", "ids", 6, 9, 4, ids=[3] * 6)
    yield case("one-row", "ids", 3, 1, 4, says="a vocabulary of one")
    yield case("vocabulary", "ids", 4, 1, 2, ids=[65535, 65536, 131072, 163839], change=_wide,
               says="163,840 ids, past 16 bits")
    yield case("rim", "rim", 8, change=_rim, needs={"subnormals"},
               says="subnormal, huge and infinite values are copied")


SPEC = plain("embedding", ("y",), cases(), lone_rows("embedding", "ids"),
             narrow=("table",))
