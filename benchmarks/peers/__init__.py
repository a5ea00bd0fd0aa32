"""Other implementations of the gated delta rule, called on the arrays that ours is called on.

A peer is a module with ``about()``, a line for people, and ``contenders(arguments, threads)``: calls by name, for the
arguments of ``kl.ops.delta_rule`` (q, k, v, g, beta, initial_state; one sequence, as many heads of q and k as of v). A
call runs once when it is called, with everything that can be made beforehand made; ``result()`` gives o [T, H, V] and
the state [H, K, V] of the last run. What is not here raises `Missing`, whose sentence says how to get it.
"""

import importlib

import numpy as np

__all__ = ["PEERS", "Missing", "about", "aligned", "contenders"]

PEERS = ("ggml", "torch_delta", "naive_chunk", "sglang")


class Missing(Exception):
    """A peer that cannot be called here: what lacks, and how to get it."""


def about(names=PEERS):
    """A line on each peer: what it is, or why it is not here."""
    lines = []
    for name in names:
        try:
            lines.append(importlib.import_module(f"{__name__}.{name}").about())
        except Missing as reason:
            lines.append(str(reason))
    return lines


def contenders(arguments, threads, names=PEERS):
    """Calls of every peer that is here, and a sentence for each that is not.

    Parameters
    ----------
    arguments : dict
        Of ``kl.ops.delta_rule``.
    threads : int
    names : sequence of str
        Of `PEERS`.

    Returns
    -------
    calls : dict from name to call
    missing : list of str
    """
    calls, missing = {}, []
    for name in names:
        try:
            calls |= importlib.import_module(f"{__name__}.{name}").contenders(arguments, threads)
        except Missing as reason:
            missing.append(str(reason))
    return calls, missing


def aligned(shape, dtype=np.float32, boundary=64):
    """An array of zeros whose first value lies at a multiple of `boundary` bytes."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(n_bytes + boundary, np.uint8)
    begin = -raw.ctypes.data % boundary
    return raw[begin:begin + n_bytes].view(dtype).reshape(shape)
