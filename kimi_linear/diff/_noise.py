"""One call of an op beside float64: how far its results lie, in units of the noise that rounding makes there."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np

from .._arrays import BFLOAT16
from .._float64 import sequences
from . import metrics
from ._ratios import ratios, score
from .blame import WRONG
from .budgets._basic import finite

__all__ = ["ATTENDS", "draws_of", "jittered", "judged", "long_sums", "seen_by", "tied", "unit_of_arrays"]

ATTENDS = ("latent_attention", "attention")  # ops that sum over all rows before a token
LANES = 8  # at least, of a sum in float32
DRAWS = 2  # of a jitter, for the noise
VALUES = 16  # of all draws of a row, at least: a narrow one needs more draws for its rms to be one
TRIES = 4  # of a jitter as large as a verdict, for ids


def unit_of_arrays(arrays) -> float:
    """u of the coarsest float type among arrays."""
    units = [metrics.unit_of(a.dtype) for a in arrays if isinstance(a, np.ndarray) and _is_float(a)]
    return max(units, default=metrics.U)


def _is_float(a):
    return a.dtype.kind == "f" or a.dtype == BFLOAT16


def jittered(args, unit, draw):
    """Arguments with random relative errors of at most `unit`, the same for the same name and draw."""
    def moved(name, x):
        if isinstance(x, tuple):
            return tuple(moved(f"{name}.{i}", a) for i, a in enumerate(x))
        if not isinstance(x, np.ndarray) or not _is_float(x):
            return x
        rng = np.random.default_rng([draw, crc32(name.encode())])
        return x.astype(np.float64) * (1 + unit * rng.uniform(-1, 1, x.shape))

    return {name: moved(name, x) for name, x in args.items()}


def draws_of(shape) -> int:
    """How many draws of a jitter tell the noise of each row of an array."""
    return max(DRAWS, VALUES // max(int(np.prod(shape[1:])), 1))


def long_sums(n: np.ndarray, unit: float, ndim: int) -> np.ndarray:
    """By what to multiply the squares of what a jitter of `unit` moves, row by row of an array, for float32 sums over
    n [T] rows of attention.

    A lane that adds n / LANES values of random sign moves by u / sqrt(6) sqrt(n / LANES) times their size; a jitter
    of u moves them by u / sqrt(3).
    """
    return (1 + (metrics.U / unit) ** 2 * n / (2 * LANES)).reshape(-1, *[1] * (ndim - 1))


def seen_by(args) -> np.ndarray:
    """[T]: how many rows each query of a call of attention sees, or selects."""
    if args.get("select") is not None:
        return (np.asarray(args["select"]) >= 0).sum(-1)
    T, S = len(args["q"]), len(args["latent" if "latent" in args else "k"])
    rows = sequences(T, args.get("offsets"))
    kv_offsets = args.get("kv_offsets")
    cached = sequences(S, kv_offsets if kv_offsets is not None else args.get("offsets"))
    n = np.zeros(T, int)
    for r, c in zip(rows, cached):
        n[r] = c.stop - c.start - (r.stop - r.start) + 1 + np.arange(r.stop - r.start)
    return np.maximum(n, 0)


def judged(run: Callable[[dict], tuple], args, got, unit, units, seen=None):
    """Each result of a call: (times its noise, rms error over the rms, where it is worst, what float64 makes).

    Parameters
    ----------
    run : callable(args) -> tuple of arrays
        In float64.
    args : dict
    got : sequence of array or None
        Their results; None is not judged.
    unit : float
        The rounding of their inputs.
    units : sequence of float
        And of each result.
    seen : (T,) integers, optional
        Of a call of attention: `seen_by`.

    Raises
    ------
    ValueError
        If a result has another shape than float64's.
    """
    def sorted_run(given):
        return metrics.by_expert(tuple(map(np.asarray, run(given))))

    exact = sorted_run(args)
    if all(x is not None for x in got):
        got = metrics.by_expert(tuple(got))
    draws = max(draws_of(y.shape) for y in exact)
    moved = [sorted_run(jittered(args, unit, i)) for i in range(draws)]
    found = []
    for i, (x, y) in enumerate(zip(got, exact, strict=False)):
        if x is None:
            continue
        y = np.asarray(y)
        x = x.reshape(y.shape) if x.size == y.size == 1 else x
        if x.shape != y.shape:
            raise ValueError(f"result {i} has shape {list(x.shape)}; it must be {list(y.shape)}")
        if y.dtype.kind in "iu":
            width = y.shape[-1] if y.ndim > 1 or y.ndim and len(exact) > 1 else 1  # of a router's row, or of a sample
            found.append((*_sets(x, y, width, tied(run, args, unit, i, width)), y))
            continue
        with np.errstate(invalid="ignore"):
            change = sum(finite(m[i] - y) ** 2 for m in moved) / draws
        if seen is not None:
            change = change * long_sums(seen, unit, y.ndim)
        noise = np.sqrt((units[i] * finite(y)) ** 2 / 3 + change)
        found.append((*_ratio(np.asarray(x, np.float64), y, noise), y))
    return found


def _ratio(x, y, noise):
    """(times the noise, rms error over the rms, worst element)."""
    if not x.size:
        return 0.0, 0.0, ()
    rows = len(x) if x.ndim > 1 else 1
    times = score(*ratios(*(z.reshape(rows, -1) for z in (x, y, noise))))
    worst = np.unravel_index(int(np.argmax(metrics.distance(x, y)[0])), x.shape)
    return times, metrics.rms_relative(x, y), tuple(int(i) for i in worst)


def tied(run, args, unit, i, width):
    """Rows of ids that an error of a verdict's size would change: nobody can say which is right."""
    exact = _rows(run(args)[i], width)
    apart = np.zeros(len(exact), bool)
    for draw in range(TRIES):
        apart |= (_rows(run(jittered(args, WRONG * unit, 100 + draw))[i], width) != exact).any(-1)
    return apart


def _rows(x, width):
    return np.sort(metrics.in_rows(np.asarray(x), width), -1)


def _sets(x, y, width, ties):
    """Ids as sets of so many: rows that differ and are no ties count."""
    other = (_rows(x, width) != _rows(y, width)).any(-1) & ~ties
    return (float("inf") if other.any() else 0.0), float(other.mean()) if len(other) else 0.0, \
        (int(other.argmax()),) if other.any() else ()
