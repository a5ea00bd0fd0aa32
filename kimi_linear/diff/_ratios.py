"""Error over noise: of a whole result, and of each of its rows."""

from __future__ import annotations

import numpy as np

from . import metrics
from .metrics import over

__all__ = ["noise_of_fault", "ratios", "score", "sums_in"]

ELEMENTWISE = ("add", "sigmoid", "sigmoid_gate", "situ", "swiglu")  # no sum whose parts may leave the range one by one


def noise_of_fault(noise, y, y_f, unit):
    """The noise of a fault's result: the op's, as much larger as the result is."""
    times = max(1.0, _rms(y_f) / _rms(y)) if _rms(y) else 1.0
    return np.sqrt((times * noise) ** 2 + (unit * np.where(np.isfinite(y_f), y_f, 0)) ** 2 / 3)


def _rms(x):
    finite = np.asarray(x, np.float64)[np.isfinite(x)]
    return float(np.sqrt((finite ** 2).mean())) if finite.size else 0.0


def sums_in(group):
    """Whether a group of ops has a sum: of parts past the range NaN may come where float64 has an infinity."""
    return any(n.op not in ELEMENTWISE for n in group)


def ratios(x, y, noise, sums=False):
    """rms error over rms noise, of all and of each row. NaN agrees with NaN, an infinity with the same one, and with
    NaN where there are sums."""
    if not x.size:
        return 0.0, np.zeros(len(x))
    error, _ = metrics.distance(x, y)
    if sums:
        error[np.isnan(x) & np.isinf(y) | np.isinf(x) & np.isnan(y)] = 0.0
    noise = np.where(np.isfinite(noise), noise, 0)
    errors, noises = (np.sqrt((z.reshape(len(z), -1) ** 2).mean(1)) for z in (error, noise))
    whole = np.sqrt((noises ** 2).mean())
    total = over(np.sqrt((errors ** 2).mean()), whole)
    return total, over(errors, np.maximum(noises, 0.1 * whole))


def score(total, of_rows):
    """The worse of the whole, and half of the worst row."""
    return float(max(total, of_rows.max(initial=0) / 2))
