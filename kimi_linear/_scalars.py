"""Numbers and names from anywhere; an error says which argument it is, what it was and what it must be."""

import operator

__all__ = ["as_finite", "as_real", "as_whole", "choice"]

_LARGEST = 3.4028234663852886e38  # of float32


def as_real(x, name, wanted="a number"):
    """`x` as a float; TypeError where it is no number."""
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} is {x!r:.40}; it must be {wanted}") from None


def as_finite(x, name, wanted="a number"):
    """`x` as a float; ValueError where it is NaN, or infinite in float32."""
    value = as_real(x, name, wanted)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name} is {value}; it must be finite in float32")
    return value


def as_whole(x, name, wanted="an int"):
    """`x` as an int; TypeError where it is none, 2.0 included: what was meant by a broken number is not guessed."""
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} is {x!r:.40}; it must be {wanted}") from None


def choice(x, name, choices):
    """`x`, one of `choices` (names, or None); ValueError lists them."""
    if not (x is None or isinstance(x, str)) or x not in choices:
        raise ValueError(f"{name} is {x!r:.40}; it must be one of {', '.join(map(repr, choices))}")
    return x
