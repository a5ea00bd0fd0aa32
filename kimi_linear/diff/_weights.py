"""The weights of two sides by name: a wrong one looks like a wrong op, and no trace has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .._arrays import as_array
from ..config import Config
from ..config_kimi import K3
from ..dataflow import Node
from ..load.gguf_heads import have_one_form, in_common_form
from . import metrics

__all__ = ["WeightDifference", "compare_weights", "names_of"]


@dataclass(frozen=True)
class WeightDifference:
    """A weight that the two sides do not have alike.

    Attributes
    ----------
    name : str
    largest : float
        Of |theirs - ours|; infinite where the shapes differ, or one side alone is finite.
    relative : float
        The same over the rms of ours.
    text : str
        ``weight NAME differs: max abs 0.0125, 0.4 of its rms, at [3, 17]``.
    """

    name: str
    largest: float
    relative: float
    text: str


def compare_weights(ours, theirs) -> tuple[list[WeightDifference], set[str]]:
    """(what differs, furthest apart first; the names that both have).

    Parameters
    ----------
    ours, theirs : Model, ReferenceModel or mapping from name to array
        What differs by rounding to the type of one of the two is the same; so are shapes of one size but for axes of 1.
        Of two models, norms that one side stores as 1 + w and value heads in a GGUF's order are the same, too.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If no name is in both.
    """
    configs = [getattr(side, "config", None) for side in (ours, theirs)]
    padded = getattr(configs[0], "model_type", None) == K3
    if not all(isinstance(c, Config) for c in configs) or have_one_form(*configs):
        configs = [None, None]
    ours, theirs = (getattr(side, "weights", side) for side in (ours, theirs))
    if not isinstance(theirs, Mapping):
        raise TypeError(f"weights is a {type(theirs).__name__}; it must be a Model, or a mapping from name to array")
    names = [name for name in ours if name in theirs]
    if not names:
        raise ValueError(f"weights has no name of this model: it has {', '.join(list(theirs)[:3]) or 'none'}; "
                         f"the model has {', '.join(list(ours)[:3])}, ...")
    found = []
    for name in names:
        x, y = (_values(side[name], name, config) for side, config in zip((ours, theirs), configs))
        found.append(_difference(name, x, _of_heads(name, x, y) if padded else y))
    return sorted(filter(None, found), key=lambda d: -d.relative), set(names)


def names_of(node: Node) -> Iterator[str]:
    """The tensors that an op takes, those of all experts."""
    for weight in node.weights.values():
        whole = (weight.name, weight.other) if weight.other else (weight.name,)
        yield from (weight.name.format(e) for e in range(weight.count)) if weight.count else whole


def _values(x, name, config):
    """The values; with a Config, in a form that files of both kinds can have."""
    x = x.array() if hasattr(x, "file") else x
    y = x if config is None else in_common_form(config, name, x)
    return as_array(x if y is x else y.array(), f"weights[{name!r}]")


def _of_heads(name, x, y):
    """theirs without what files of Kimi K3 have behind A_log's heads."""
    return y[:x.size] if name.endswith("A_log") and y.ndim == 1 else y


def _difference(name, x, y):
    """What differs of ours and theirs; None where nothing does."""
    if [n for n in x.shape if n != 1] != [n for n in y.shape if n != 1]:
        return WeightDifference(name, np.inf, np.inf, f"weight {name} differs: it has shape {list(y.shape)}, and must "
                                                      f"have {list(x.shape)}")
    y = y.reshape(x.shape)
    if _rounded(x, y) or _rounded(y, x):
        return None
    e = metrics.measure(y, x)
    if e.exact:
        return None
    text = f"weight {name} differs: max abs {e.largest:.3g}, {e.largest_relative:.2g} of its rms, at {[*e.worst]}"
    return WeightDifference(name, e.largest, e.largest_relative, text)


def _rounded(x, y):
    """Whether y is x rounded to the float type of y, and all of it is in that range."""
    if not (metrics.is_float(x.dtype) and metrics.is_float(y.dtype)):
        return False
    with np.errstate(all="ignore"):
        z = x.astype(y.dtype)
        return bool(((z == y) | ((z != z) & (y != y))).all()) and bool((np.isfinite(x) == np.isfinite(y)).all())
