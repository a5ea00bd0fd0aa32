"""From logits to a token."""

import numpy as np

from .. import _core
from .._arrays import as_array, as_float32, check_shape
from .._masks import unmasked
from ..context import current


def sample(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sequence=0, position=0,
           ctx=None):
    """Draw a token id: the same seed, sequence and position give the same id on any machine.

    With ``p = softmax(logits / temperature)`` in the order of p descending and id ascending, the first
    `top_k` stay, of these those with ``p >= min_p * max(p)``, and of these, renormalised, the shortest prefix
    whose sum reaches `top_p`. Drawn is the first whose running sum, renormalised, exceeds a uniform number of
    53 bits.

    Source: Philox4x32-10 of Salmon et al., SC 2011; key `seed`, counter (`position`, `sequence`), low words
    first. Derivation: docs/math.md#sample.

    Parameters
    ----------
    logits : (V,) or (T, V) float32
        -inf masks a token.
    temperature : float
        >= 0; 0 takes the largest logit, the lowest id among equals. Rounded to float32, as `top_p` and
        `min_p` are.
    top_k : int
        0 keeps all.
    top_p : float
        In (0, 1].
    min_p : float
        In [0, 1].
    seed, sequence, position : int
        0 <= value < 2**64.
    ctx : Context, optional

    Every argument may be an array of T values, one for each row.

    Returns
    -------
    id : int, or (T,) int32 for rows of logits

    Raises
    ------
    TypeError, ValueError
        If a type does not fit, a logit is NaN or +inf, all of a row are -inf, or an argument is out of its range.
    """
    logits = as_float32(logits, "logits", ("V",), ("T", "V"))
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; V must be >= 1")
    rows = logits.reshape(-1, logits.shape[-1])
    T, V = rows.shape
    ids = np.empty(T, np.int32)
    _core.sample(current(ctx)._core, ids, rows, _reals(temperature, "temperature", T),
                 _words(top_k, "top_k", T, bits=63), _reals(top_p, "top_p", T), _reals(min_p, "min_p", T),
                 _words(seed, "seed", T), _words(sequence, "sequence", T), _words(position, "position", T),
                 T, V)
    return int(ids[0]) if logits.ndim == 1 else ids


def _reals(x, name, T):
    """`x` for each row, float32."""
    a = as_array(x, name)
    if a.dtype.kind not in "fiu":
        raise TypeError(f"{name} is {a.dtype}; it must be a number")
    if a.ndim:
        check_shape(a, name, (T,))
    return np.ascontiguousarray(np.broadcast_to(a.astype(np.float32), (T,)))


def _words(x, name, T, bits=64):
    """`x` for each row as 64-bit words, in an int64 array."""
    a = np.asarray(unmasked(x, name), dtype=object)
    if a.ndim:
        check_shape(a, name, (T,))
    for value in a.flat:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}; it must be 0 <= {name} < 2**{bits}")
    words = np.array([int(value) for value in a.flat], np.uint64).reshape(a.shape)
    return np.ascontiguousarray(np.broadcast_to(words, (T,))).view(np.int64)
