"""Error budgets: how far an op's float32 result may be from float64, element by element.

A budget is a function named as its op. It takes the reference's result and the op's inputs by name and gives the
largest absolute error allowed at each element, derived in docs/math.md; u = 2**-24 is half an ulp of 1. A result
is judged by its largest ratio ``|got - ref| / budget``: above 1 is a finding, never a reason to raise the budget.
"""

import inspect

import numpy as np

from ..._arrays import as_array
from ..._batches import packed, packed_results, unpacked
from ..._float64 import f64
from ...quantized import Quantized
from . import _attention, _backward, _basic, _delta, _delta_backward, _dense, _index, _kda, _mhc, _mla
from ._basic import U

__all__ = ["U", "budget", "names"]

_TABLE = {
    name: getattr(module, name)
    for module in (_attention, _backward, _basic, _delta, _delta_backward, _dense, _index, _kda, _mhc, _mla)
    for name in module.__all__
}


#: Ops that form values on their way which a narrower type may hold.
_STORING = {op for op, function in _TABLE.items() if "stored" in inspect.signature(function).parameters}


def names():
    """Ops that have a budget."""
    return sorted(_TABLE)


def budget(op, ref, *, stored=0.0, **inputs):
    """Largest absolute error allowed at each element of `ref`.

    Parameters
    ----------
    op : str
    ref : array or tuple of arrays
        What :mod:`kimi_linear.reference` gives on the same inputs.
    stored : float
        u of a type narrower than float32 in which values may lie between the steps of the formula: operands of
        products, results of sums, each rounded to it once (docs/math.md#narrow). 0: none is.
    **inputs
        The op's arguments by name.

    Returns
    -------
    bound : float64 array, or a tuple of them where the op has several results
    """
    if op not in _TABLE:
        raise KeyError(f"{op!r} has no budget; these have: {', '.join(names())}")
    ref = tuple(_array(r) for r in ref) if isinstance(ref, tuple) else _array(ref)
    given, lead = packed(op, {name: _array(x) for name, x in inputs.items()})
    if stored and op in _STORING:
        given["stored"] = stored
    if lead is None:
        return _TABLE[op](ref, **given)
    return unpacked(op, _TABLE[op](packed_results(op, ref, lead), **given), lead)


def _array(x):
    """An argument as the formulas take it: arrays of any library as NumPy's, blocks as their values."""
    if isinstance(x, tuple):
        return tuple(_array(a) for a in x)
    if isinstance(x, Quantized):
        return f64(x)
    return as_array(x, "an input") if hasattr(x, "dtype") and not isinstance(x, np.generic) else x
