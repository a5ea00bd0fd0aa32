"""Fingerprints of an array's slices, by which `align` pairs them."""

from __future__ import annotations

import numpy as np

__all__ = ["Prints", "norm"]

WIDTH = 32      # values of a slice's fingerprint


def norm(x) -> float:
    """The 2-norm of all values."""
    return float(np.linalg.norm(x.ravel()))


class Prints:
    """Fingerprints of one array, each made once.

    ``prints(axis)`` is [slices along the axis, WIDTH or fewer], random projections of the slices;
    ``prints(axis, free)`` projections of what lies along the axis `free`, sorted, so that its order does not matter.
    """

    def __init__(self, x):
        self.x, self.kept = x, {}

    def __call__(self, axis, free=None):
        if (axis, free) not in self.kept:
            self.kept[axis, free] = self._made(axis, free)
        return self.kept[axis, free]

    def _made(self, axis, free):
        rng = np.random.default_rng(0)  # the same projections for every array
        if free is None:
            flat = np.moveaxis(self.x, axis, 0).reshape(self.x.shape[axis], -1)
        else:
            cube = np.moveaxis(self.x, (axis, free), (0, 1))
            flat = _projected(cube.reshape(*cube.shape[:2], -1), 4, rng)
            flat = np.sort(flat, 1).reshape(len(flat), -1)
        return _projected(flat, WIDTH, rng)


def _projected(a, width, rng):
    m = a.shape[-1]
    width = min(width, max(4, (1 << 20) // m))  # of few long slices a few projections tell enough
    return a if m <= width else a @ (rng.standard_normal((m, width)) / np.sqrt(width))
