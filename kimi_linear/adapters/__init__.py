"""Traces of other engines under our names: one module an engine, each imported by name when it is wanted.

`load` reads what any of them left behind; `record_calls` keeps the calls of one op, for `kimi_linear.diff.replay`.
"""

from importlib import import_module

from .._names import meant
from .calls import record_calls

__all__ = ["KINDS", "load", "record_calls"]

#: What `load` reads: name -> (module, what it is).
KINDS = {
    "hf": ("", "a safetensors file named by transformers' module paths"),
    "arrays": ("arrays", "a folder of .npy and .npz, or one npz, with a mapping"),
    "pt": ("pt", "a .pt file or a folder of them, with a mapping"),
    "debugger": ("debugger", "what transformers' model_addition_debugger_context wrote"),
    "vllm": ("vllm", "calls that engine_hooks.py recorded in vLLM"),
    "sglang": ("sglang", "calls that engine_hooks.py recorded in SGLang"),
}


def load(path, kind=None, *, model=None, prefix="", mapping=None):
    """The traces of a foreign run, one for each of its calls.

    Parameters
    ----------
    path : str or path
    kind : str, optional
        A key of `KINDS`; by default a safetensors file under our names.
    model : Model or Config, needed with `kind`
    prefix : str
        Of names in a safetensors file.
    mapping : optional
        As `kimi_linear.adapters.arrays.read` takes it.

    Returns
    -------
    list of Trace
    """
    from ..trace import Trace

    if kind is None:
        return [Trace.load(path, prefix=prefix)]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r:.40}; it must be one of {', '.join(KINDS)}{meant(kind, KINDS)}")
    if model is None:
        raise ValueError(f"{kind} needs model=: shapes of heads are not in the file")
    if kind == "hf":
        return [Trace.load(path, names="hf", config=getattr(model, "config", model), prefix=prefix)]
    module = import_module(f".{KINDS[kind][0]}", __name__)
    options = {"mapping": mapping} if kind in ("arrays", "pt") else {}
    found = module.read(path, model=model, **options)
    return found if isinstance(found, list) else [found]
