"""What the workbench costs: a trace beside the forward pass without taps, and `blame` of that trace.

    python benchmarks/run.py workbench                      2,000 tokens of the packaged model
    python benchmarks/run.py workbench --tokens 300,2000

Forward and trace take turns. A trace has the taps of all layers; `blame` judges it as it is, and again with a
fault planted in a float64 run with float32's noise.
"""

from __future__ import annotations

import time

import numpy as np

import kimi_linear as kl
from kimi_linear.bench import sample, spread

__all__ = ["FAULT", "run"]

FAULT = {"layers.2.kda.o": "decay_after_update"}
TURNS = 7     # of forward and trace
REPEATS = 3   # of a blame


def run(tokens: int, ctx=None, turns: int = TURNS, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds (median, low, high) of "forward", "trace", "blame" and "blame of a fault".

    Parameters
    ----------
    tokens : int
        Ids at random, one sequence.
    ctx : Context, optional
    turns, repeats : int

    Raises
    ------
    RuntimeError
        If the fault is not named.
    """
    model = kl.Model.tiny(ctx=ctx) if ctx else kl.Model.tiny()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, tokens)
    times = sample({"forward": lambda: model.forward(ids), "trace": lambda: model.trace(ids, "layers.*")}, turns)
    unit = 2.0**-24

    def rounded(tap, y):
        return y if y.dtype.kind in "iu" else (y * (1 + unit * rng.uniform(-1, 1, y.shape))).astype(np.float32)

    faulty, = kl.faults.run(model, ids.tolist(), plant=FAULT, after=rounded)
    found = kl.diff.blame(model, faulty)
    if [(r.tap, r.kind) for r in found.wrong] != list(FAULT.items()):
        raise RuntimeError(f"blame does not name {FAULT}: {found.verdict}")
    for name, theirs in (("blame", model.trace(ids)), ("blame of a fault", faulty)):
        times[name] = [seconds_of(model, theirs) for _ in range(repeats)]
    return {name: spread(seconds) for name, seconds in times.items()}


def seconds_of(model, theirs) -> float:
    """Of one `blame`."""
    begin = time.perf_counter()
    kl.diff.blame(model, theirs)
    return time.perf_counter() - begin
