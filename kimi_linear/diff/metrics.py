"""How far an array is from another: largest and rms error, NMSE, cosine, worst element, non-finite ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .._arrays import as_array

__all__ = [
    "AXES",
    "Errors",
    "Gates",
    "U",
    "axis_names",
    "coordinates",
    "gates",
    "measure",
    "over",
    "share_of",
    "shares_of",
    "unit_of",
]

U = 2.0**-24
TYPES = ("float64", "float32", "float16", "bfloat16")  # that engines compute in

#: Names of the axes where none are given, by their number.
AXES = {
    0: (),
    1: ("channel",),
    2: ("token", "channel"),
    3: ("token", "head", "channel"),
    4: ("sequence", "token", "head", "channel"),
}

GGML_NMSE = 1e-7  # ggml's test-backend-ops
FLA_RATIO = 0.005  # flash-linear-attention's assert_close: rms error over rms
TRANSFORMERS_TOLERANCE = 1e-4  # atol and rtol of most model tests of transformers


@dataclass(frozen=True)
class Errors:
    """Figures of one comparison.

    Attributes
    ----------
    count : int
        Elements.
    size : float
        rms of the desired array, over its finite elements.
    largest, rms : float
        Of the error, absolute. Infinite where one array is finite and the other is not.
    nmse : float
        Sum of squared errors over sum of squared desired values, as ggml has it.
    cosine : float
        Of the angle between the arrays; NaN where one is zero.
    worst : tuple of int
        Where the largest error is; empty for an empty array.
    actual_nonfinite, desired_nonfinite : int
        Elements that are NaN or infinite.
    nonfinite_apart : int
        Elements of which one is not finite and the other differs: NaN equals NaN here, and inf equals inf.
    """

    count: int
    size: float
    largest: float
    rms: float
    nmse: float
    cosine: float
    worst: tuple[int, ...]
    actual_nonfinite: int
    desired_nonfinite: int
    nonfinite_apart: int

    @property
    def largest_relative(self) -> float:
        """Largest error over the rms of the desired array."""
        return float(over(self.largest, self.size))

    @property
    def rms_relative(self) -> float:
        """rms error over the rms of the desired array."""
        return float(over(self.rms, self.size))

    @property
    def largest_u(self) -> float:
        """`largest_relative` in u = 2**-24."""
        return self.largest_relative / U

    @property
    def rms_u(self) -> float:
        """`rms_relative` in u = 2**-24."""
        return self.rms_relative / U

    @property
    def exact(self) -> bool:
        """True where every element is the same, NaN beside NaN included."""
        return self.largest == 0


def over(a, b):
    """a / b; of nothing, 0 for no error and infinity for any."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(b == 0, np.where(a == 0, 0.0, np.inf), np.divide(a, b))


def measure(actual, desired) -> Errors:
    """Compare two arrays of one shape in float64.

    Parameters
    ----------
    actual, desired : array
        Of any float or integer type; `desired` is the measure.

    Raises
    ------
    ValueError
        If the shapes differ; the message gives both.
    """
    a, d = as_float64(actual, "actual"), as_float64(desired, "desired")
    check_same_shape(a, d)
    error, apart = distance(a, d)
    finite = np.isfinite(d)
    both = finite & np.isfinite(a)
    size = _rms(d[finite])
    with np.errstate(invalid="ignore"):
        rms = _rms(error.ravel())
    relative = float(over(rms, size))
    return Errors(
        count=a.size,
        size=size,
        largest=float(error.max(initial=0.0)),
        rms=rms,
        nmse=relative * relative,  # infinite where ** would raise
        cosine=_cosine(a[both], d[both]),
        worst=tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape)) if error.size else (),
        actual_nonfinite=int(a.size - np.isfinite(a).sum()),
        desired_nonfinite=int(a.size - finite.sum()),
        nonfinite_apart=int(apart),
    )


def rms_relative(actual: np.ndarray, desired: np.ndarray) -> float:
    """That of `measure`, alone, of two float64 arrays of one shape."""
    error, _ = distance(actual, desired)
    return float(over(_rms(error), _rms(desired[np.isfinite(desired)])))


def as_float64(x, name: str) -> np.ndarray:
    """`x`, from NumPy, torch or ml_dtypes, as float64."""
    a = as_array(x, name)
    if a.dtype.kind not in "fiubV" and a.dtype != ml_dtypes.bfloat16:
        raise TypeError(f"{name} is {a.dtype}; it must be an array of floats or integers")
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return a.astype(np.float64)


def check_same_shape(a: np.ndarray, d: np.ndarray) -> None:
    """ValueError where the shapes differ."""
    if a.shape != d.shape:
        raise ValueError(
            f"actual has shape {list(a.shape)} and desired {list(d.shape)}; they must be the same"
        )


def distance(a: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, int]:
    """|a - d| of each element, 0 for equal infinities and two NaN, infinite where only one is finite; and how
    many of those are."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.asarray(np.abs(a - d))
    if np.isfinite(error).all():
        return error, 0
    alike = (a == d) | (np.isnan(a) & np.isnan(d))
    error[alike] = 0.0
    apart = ~alike & ~(np.isfinite(a) & np.isfinite(d))
    error[apart] = np.inf
    return error, int(apart.sum())


def _rms(x: np.ndarray) -> float:
    """Root of the mean square, without overflow; 0 of nothing."""
    top = float(np.abs(x).max(initial=0.0))
    if top == 0 or not np.isfinite(top):
        return top
    return top * float(np.sqrt(np.mean((x / top) ** 2)))


def _cosine(a: np.ndarray, d: np.ndarray) -> float:
    scale = np.abs(a).max(initial=0.0), np.abs(d).max(initial=0.0)
    if not all(scale):
        return float("nan")
    a, d = a / scale[0], d / scale[1]
    return float((a * d).sum() / np.sqrt((a * a).sum() * (d * d).sum()))


def shares_of(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Of each element: 0 where there is no error, infinite where there is one and the budget is 0, or NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isnan(ratio), np.inf, ratio)


def share_of(actual, desired, bound) -> tuple[float, tuple[int, ...]]:
    """Largest ratio of error to budget, and where; 0 where there is no error, infinite where the budget is 0
    and there is one."""
    a, d = as_float64(actual, "actual"), as_float64(desired, "desired")
    check_same_shape(a, d)
    ratio = shares_of(distance(a, d)[0], np.broadcast_to(np.asarray(bound, np.float64), d.shape))
    if not ratio.size:
        return 0.0, ()
    return float(ratio.max()), tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))


# ---- expert ids ------------------------------------------------------------------------------------


def in_order_of(ids: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`x` [..., k], the ids themselves or what belongs to them, in the order of rising ids [..., k]."""
    return np.take_along_axis(x, np.argsort(ids, axis=-1, kind="stable"), axis=-1)


def by_expert(results: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """The results of an op, those of a router (ids and weights [..., k]) in the order of the ids, which is free."""
    if len(results) != 2:
        return results
    ids, weights = results
    if ids.dtype.kind not in "iu" or weights.dtype.kind in "iu" or not ids.ndim or ids.shape != weights.shape:
        return results
    return in_order_of(ids, ids), in_order_of(ids, weights)


def in_rows(x: np.ndarray, width: int) -> np.ndarray:
    """`x` as [rows, width], also where it is empty."""
    return x.reshape(x.size // width if width else int(np.prod(x.shape[:-1])), width)


def exchanged(a: np.ndarray, d: np.ndarray) -> tuple[list[int], list[int]]:
    """(what a row has that the other lacks, what it lacks), each as often as it does."""
    a, d = (Counter(x.ravel().tolist()) for x in (a, d))
    return sorted((a - d).elements()), sorted((d - a).elements())


@dataclass(frozen=True)
class Gates:
    """Whether the usual gates of other projects would let a result pass."""

    ggml: bool  # NMSE below 1e-7
    fla: bool  # rms error below 0.005 of the rms
    transformers: bool  # |error| <= 1e-4 + 1e-4 |desired|, everywhere

    @property
    def all(self) -> bool:
        """True where every gate passes."""
        return self.ggml and self.fla and self.transformers


def gates(actual, desired, errors: Errors | None = None) -> Gates:
    """The gates of ggml, flash-linear-attention and transformers on one result."""
    e = errors or measure(actual, desired)
    return Gates(
        ggml=e.nmse <= GGML_NMSE and not e.nonfinite_apart,
        fla=e.rms_relative < FLA_RATIO and not e.nonfinite_apart,
        transformers=smallest_tolerance(actual, desired) <= TRANSFORMERS_TOLERANCE,
    )


def smallest_tolerance(actual, desired) -> float:
    """The least t with |actual - desired| <= t + t |desired| everywhere: `atol` and `rtol` of allclose."""
    a, d = as_float64(actual, "actual"), as_float64(desired, "desired")
    error, _ = distance(a, d)
    with np.errstate(invalid="ignore"):
        t = np.where(error == 0, 0.0, error / (1.0 + np.abs(d)))
    return float(np.where(np.isnan(t), np.inf, t).max(initial=0.0))


def axis_names(shape: Sequence[int], axes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the axes of an array.

    Raises
    ------
    ValueError
        If `axes` are not as many as the array has.
    """
    n = len(shape)
    if axes is None:
        return AXES.get(n) or tuple(f"axis {i}" for i in range(n))
    if len(axes) != n:
        raise ValueError(f"axes are {', '.join(axes)}; the array has {n} axes, {list(shape)}")
    return tuple(axes)


def coordinates(at: Sequence[int], axes: Sequence[str]) -> str:
    """``token 17, head 2, channel 5``."""
    return ", ".join(f"{name} {i}" for name, i in zip(axes, at, strict=True))


def unit_of(dtype: Any) -> float:
    """u of a float type: half the spacing at 1 (2**-24, 2**-11, 2**-8)."""
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def type_of_unit(unit: float) -> str:
    """The name of the type whose u is nearest."""
    return min(TYPES, key=lambda name: abs(np.log(unit / unit_of(name))))


def stated_unit(dtype: Any) -> float:
    """u of a type as callers and metadata say it, torch's names too; ValueError where it is no float type."""
    try:
        return unit_of(str(dtype).removeprefix("torch.") if isinstance(dtype, str) else dtype)
    except (TypeError, ValueError):
        raise ValueError(f"dtype is {dtype!r}; it must be a float type, as 'bfloat16'") from None


def is_float(dtype: Any) -> bool:
    """Whether a type is of floats, those of ml_dtypes among them."""
    try:
        ml_dtypes.finfo(np.dtype(dtype))
    except ValueError:
        return False
    return True
