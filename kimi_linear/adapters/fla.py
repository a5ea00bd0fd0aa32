"""Calls of flash-linear-attention's ops, recorded for `kimi_linear.diff.replay`.

    with fla.record("calls", limit=200):
        model(input_ids)
    print(kl.diff.replay("calls"))

`OPS` is the table of names; the conventions of each are in `kimi_linear.conventions`. What is off the table's road is
told by replay where it reads the call: gates and beta that the kernel makes itself (``use_gate_in_kernel``, with A_log
and dt_bias), states that lie [V, K], states in a pool (``ssm_state_indices``).

Names from flash-linear-attention: fla/ops/kda/__init__.py, fla/ops/gated_delta_rule/__init__.py, fla/layers/kda.py,
fla/layers/gated_deltanet.py.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

from .calls import record_calls

__all__ = ["OPS", "record"]

#: Function -> (op, conventions).
OPS = {
    "fla.ops.kda.chunk_kda": ("delta_rule", "fla"),
    "fla.ops.kda.fused_recurrent_kda": ("delta_rule", "fla"),
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule": ("delta_rule", "fla-gdn"),
    "fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule": ("delta_rule", "fla-gdn"),
}


@contextlib.contextmanager
def record(folder, functions=None, *, limit=None):
    """Record the calls of fla's delta rules wherever a loaded module has them under their names.

    Parameters
    ----------
    folder : str or path
    functions : list of str, optional
        Of `OPS`; by default all whose module is there.
    limit : int, optional
        For each function.

    Yields
    ------
    list of str
        The places that record.

    Raises
    ------
    ModuleNotFoundError
        If fla is not installed, or a module of `functions` is not in it.
    """
    chosen = list(OPS) if functions is None else list(functions)
    for name in chosen:
        if name not in OPS:
            raise ValueError(f"functions has {name!r}; it must be of {', '.join(OPS)}")
    places = []
    with contextlib.ExitStack() as stack:
        for name, there in _modules(chosen, functions is None):
            function = name.rpartition(".")[2]
            real = getattr(there, function, None)
            if real is None:
                continue
            op, conventions = OPS[name]
            recording = stack.enter_context(record_calls(real, folder, op=op, conventions=conventions, limit=limit))
            for place in [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(function) is real]:
                setattr(place, function, recording)
                stack.callback(setattr, place, function, real)
                places.append(f"{place.__name__}.{function}")
        yield places


def _modules(names, some):
    """(name, its module) of functions; with `some`, those whose module is there, if one is."""
    found, lacking = [], None
    for name in names:
        try:
            found.append((name, _imported(name.rpartition(".")[0])))
        except ModuleNotFoundError as error:
            lacking = error
            if not some:
                raise
    if not found and lacking is not None:
        raise lacking
    return found


def _imported(module):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ModuleNotFoundError(f"{module} is not there: flash-linear-attention must be installed in this "
                                      f"environment ({error})", name=error.name) from None
        raise
