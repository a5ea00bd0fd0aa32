"""What products make of their inputs where activations are narrow, and values jittered by that and by rounding."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import numpy as np

from ..context import check_activations
from ..quantized import storage_types
from ..weights import Weights
from . import metrics

__all__ = ["Jittered", "Narrow"]

BLOCK = 32  # values that share a scale
LEVELS = 127  # of int8, to either side
INSIDE = 2  # an expert rounds what it makes of x, too: so much more than x alone would be
#: Inputs that are rounded: of products like the weight, of attention's others as a cache may store them.
PRODUCTS = {"linear": ("x",), "moe": ("x",), "latent_attention": ("q", "latent")}
CACHED = {"attention": ("q", "k", "v"), "latent_attention": ("k_shared",)}


class Narrow:
    """Activations of a run, and the types of its weights, which say where they hold.

    Parameters
    ----------
    activations : {"float32", "int8", "bfloat16"}
    weights : mapping from canonical name to array
        Where it is a model's, a product is narrow if its weight is in blocks, or in bfloat16; else if its op is one.
    """

    def __init__(self, activations, weights):
        self.activations = check_activations(activations)
        self._type_of = weights.storage_type if isinstance(weights, Weights) else None

    @property
    def knows_types(self):
        """Whether the weights tell in what they lie, so that `takes` tells narrow products from others."""
        return self._type_of is not None

    def of(self, node) -> dict[str, tuple[str, int]]:
        """Tap -> (the type to which the op rounds it, how many times that counts)."""
        if self.activations == "float32":
            return {}
        kinds = {a: "float16" for a in CACHED.get(node.op, ())}
        if self.takes(node):
            kinds |= dict.fromkeys(PRODUCTS[node.op], self.activations)
        times = INSIDE if node.op == "moe" else 1
        return {node.inputs[a]: (kind, times) for a, kind in kinds.items() if a in node.inputs}

    def takes(self, node) -> bool:
        """Whether it is a product of narrow activations."""
        if self.activations == "float32" or node.op not in PRODUCTS:
            return False
        if self._type_of is None:
            return True
        names = [w.name.format(0) if w.count else w.name for w in node.weights.values()]
        types = {t for name in names for t in self._type_of(name).split("/")}
        if self.activations == "bfloat16":
            return "BF16" in types
        return any(storage_types[t].values > 1 for t in types)


class Jittered(Mapping):
    """Values with random relative errors of at most `unit`, and those of narrow types; the same for the same tap.

    Parameters
    ----------
    exact : mapping from tap to array
    unit : float
    draw : int
    narrow : mapping from tap to (type, times), optional
        As `Narrow.of` gives it.
    """

    def __init__(self, exact, unit, draw=0, narrow=None):
        self.exact, self.unit, self.draw, self.narrow = exact, unit, draw, narrow or {}

    def __getitem__(self, tap):
        x = self.exact[tap]
        if x.dtype.kind in "iu":
            return x
        rng = np.random.default_rng([self.draw, crc32(tap.encode())])
        y = x * (1 + self.unit * rng.uniform(-1, 1, x.shape))
        if tap not in self.narrow:
            return y
        kind, times = self.narrow[tap]
        return y + times * half_steps(x, kind) * rng.uniform(-1, 1, x.shape)

    def __contains__(self, tap):
        return tap in self.exact

    def __iter__(self):
        return iter(self.exact)

    def __len__(self):
        return len(self.exact)


def half_steps(x, kind):
    """By how much rounding to a type moves each element of rows [T, ...]: at most, and for a float type about halfway
    between two powers of two."""
    if kind != "int8":
        return metrics.unit_of(kind) / 2 * np.abs(x)
    rows = np.abs(x.reshape(len(x), -1))
    blocks = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)
    steps = np.repeat(blocks.max(-1) / (2 * LEVELS), BLOCK, axis=1)
    return steps[:, : rows.shape[1]].reshape(x.shape)
