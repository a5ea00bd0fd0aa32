"""Numbers from anywhere; an error says which argument it is, what it was and what it must be."""

import math
import operator

import numpy as np

__all__ = ["LARGEST_INT", "as_finite", "as_flag", "as_real", "as_whole", "at_least", "of_json", "to_json"]

LARGEST_INT = (1 << 63) - 1  # of the integers that C takes

_LARGEST = 3.4028234663852886e38  # of float32
_NO_NUMBERS = (str, bytes, bytearray, bool, np.bool_)  # though float() or index() takes them


def as_real(x, name, wanted="a number"):
    """`x` as a float; TypeError where it is no number, as text and a bool are none."""
    try:
        if isinstance(x, _NO_NUMBERS):
            raise TypeError
        return float(x)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} is {x!r:.40}; it must be {wanted}") from None


def as_finite(x, name, wanted="a number"):
    """`x` as a float; ValueError where it is NaN, or infinite in float32."""
    value = as_real(x, name, wanted)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{name} is {value}; it must be finite in float32")
    return value


def as_flag(x, name):
    """`x` as a bool; TypeError where it is neither that nor 0 or 1: text and arrays are not asked whether they are
    true."""
    if isinstance(x, bool | np.bool_) or type(x) is int and x in (0, 1):
        return bool(x)
    raise TypeError(f"{name} is {x!r:.40}; it must be True or False")


def as_whole(x, name, wanted="an int", largest=LARGEST_INT):
    """`x` as an int; TypeError where it is none, as 2.0 and a bool are none: what was meant by them is not guessed.

    ValueError where it is above `largest`, or so far below 0 that C does not take it; with None neither is looked at.
    """
    try:
        if isinstance(x, _NO_NUMBERS):
            raise TypeError
        value = operator.index(x)
    except TypeError:
        raise TypeError(f"{name} is {x!r:.40}; it must be {wanted}") from None
    if largest is not None and not -LARGEST_INT <= value <= largest:
        bound = f"at most {largest}" if value > 0 else f"at least {-LARGEST_INT}"
        raise ValueError(f"{name} is {value}; it must be {wanted}, {bound}")
    return value


def at_least(x, low, name, wanted="an int", largest=LARGEST_INT):
    """`x` as an int; TypeError where it is none, ValueError where it is below `low` or above `largest`."""
    value = as_whole(x, name, f"{wanted} >= {low}", largest)
    if value < low:
        raise ValueError(f"{name} is {value}; it must be {wanted} >= {low}")
    return value


def of_json(x):
    """A number of a JSON file, which has one kind of them: 50.0 is 50."""
    return int(x) if isinstance(x, float) and x.is_integer() else x


def to_json(x):
    """`x` with None for each number in it that is not finite: JSON has none of these."""
    if isinstance(x, dict):
        return {key: to_json(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [to_json(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
