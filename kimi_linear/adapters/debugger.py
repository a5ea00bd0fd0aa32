"""A Trace from what transformers' ``model_addition_debugger_context`` wrote, with ``use_repr=False``.

    with model_addition_debugger_context(model, debug_path="debug", do_prune_layers=False, use_repr=False):
        model(input_ids)
    theirs = debugger.read("debug", model=kl.Model.from_pretrained(...))

The folder has ``<Class>_debug_tree_FULL_TENSORS.json``, a tree of modules, and a safetensors file for each tensor that
a module was given or that a module without children made. With ``use_repr=True`` tensors are printed, with most of
their values left out: then shapes, means and extremes can be compared (`figures`), and nothing else.

Format from huggingface/transformers: src/transformers/model_debugging_utils.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from .. import golden
from ..dataflow import in_order
from ..diff.metrics import TYPES
from ..errors import FormatError
from ..load import strict_json
from ..load.safetensors import SafetensorsFile
from ..trace import Trace
from ._layout import places
from ._mapped import config_of
from .transformers import input_taps

__all__ = ["figures", "read"]

TREE = "_debug_tree_FULL_TENSORS.json"
_PRINTED = ("its tensors are printed and not kept: record with use_repr=False; `figures` gives the shapes, means and "
            "extremes that are there")


def read(path, *, model):
    """A Trace of the folder.

    Parameters
    ----------
    path : str or path
        The ``debug_path``, or the tree's file.
    model : Model or Config

    Returns
    -------
    Trace
        ``meta["left_out"]`` names the layers that were pruned from the tree.

    Raises
    ------
    FileNotFoundError
        If the tree, or a tensor's file, is not there.
    FormatError
        If the tree is no such JSON, or its tensors are printed and not kept.
    """
    tree, folder = _tree(path)
    config, printed = config_of(model), 0
    known = places(config)
    outputs, taps, dtypes = {}, {}, []
    for module, side, keys, tensor in _tensors(tree):
        if not str(tensor["value"]).startswith("./") or isinstance(tensor["value"], list):
            printed += 1
            continue
        if side == "outputs":
            found = _output(module, keys, tensor, folder, config)
            outputs.update(found)
            dtypes += [str(tensor["dtype"]).removeprefix("torch.")] * len(found)
        elif keys == ("args", 0):
            taps |= input_taps(module, lambda tensor=tensor: _array(tensor, folder), config)
    tokens = _tokens(tree, folder)
    taps |= golden.to_taps(outputs, config)
    if not taps:
        raise FormatError(_PRINTED if printed else "it has no tensor of a module that has a tap", str(path))
    for tap, x in taps.items():
        if (place := known[tap]).sizes != x.shape[1:]:
            raise ValueError(f"{tap} has shape {list(x.shape)}; of this model it must be "
                             f"{['T', *place.sizes]}: is it another?")
    meta = {"source": "transformers' model-addition debugger", "model": str(tree.get("module_path", "?"))}
    dtypes = [dtype for dtype in dtypes if dtype in TYPES]
    meta |= {"dtype": max(set(dtypes), key=dtypes.count)} if dtypes else {}
    offsets = golden.offsets_of(outputs, config)
    meta |= {"offsets": offsets} if offsets else {}
    meta |= {"tokens": tokens.tolist()} if tokens is not None else {}
    pruned = [i for i in range(config.n_layers) if not any(t.startswith(f"layers.{i}.") for t in taps)]
    if pruned:
        meta["left_out"] = [f"layers {', '.join(map(str, pruned))}: pruned from the tree "
                            "(do_prune_layers=False keeps them)"]
    return Trace({t: taps[t] for t in in_order(taps)}, meta)


def figures(path):
    """What the tree says of each tensor, with or without values: module path and side -> shape, mean, std, min, max.

    Raises
    ------
    FileNotFoundError, FormatError
        As for `read`.
    """
    found = {}
    for module, side, keys, tensor in _tensors(_tree(path)[0]):
        shape = [int(n) for n in re.findall(r"\d+", str(tensor.get("shape", "")))]
        numbers = {k: _number(tensor[k]) for k in ("mean", "std", "min", "max") if k in tensor}
        found["/".join(map(str, (module, side, *keys)))] = {"shape": shape, **numbers}
    return found


def _tree(path):
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob(f"*{TREE}"))
        if len(files) != 1:
            raise FileNotFoundError(f"{path} has {len(files)} files *{TREE}; it must have one")
        path = files[0]
    tree = strict_json.load_object(path)
    if not isinstance(tree.get("children"), list):
        raise FormatError("it has no children; it must be a tree of modules", str(path))
    return tree, path.parent


def _tensors(node, depth=0):
    """(module path without the class, "inputs" or "outputs", keys, tensor) of every tensor in a tree."""
    if not isinstance(node, dict) or depth > 200:
        return
    module = str(node.get("module_path", "")).partition(".")[2]
    for side in ("inputs", "outputs"):
        for keys, tensor in _leaves(node.get(side)):
            yield module, side, keys, tensor
    children = node.get("children")
    for child in children if isinstance(children, list) else ():
        yield from _tensors(child, depth + 1)


def _leaves(value, keys=()):
    if isinstance(value, dict) and "shape" in value and "dtype" in value:
        yield keys, {"value": "", **value}
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*keys, key))


def _output(module, keys, tensor, folder, config):
    """A module's output under golden's names."""
    if module.endswith("mlp.gate"):
        name = {0: "", 1: "/weights", 2: "/ids"}.get(keys[0] if keys else 0)
        return {} if not name else {module + name: _array(tensor, folder)}
    known = golden.tap_of(module, config) is not None and keys in ((), (0,))
    return {module: _array(tensor, folder)} if known else {}


def _array(tensor, folder):
    name = tensor["value"].removeprefix("./")
    if "/" in name or "\\" in name or name in ("", "..", "."):
        raise FormatError(f"it names the file {strict_json.show(tensor['value'])}; it must be one in the same folder",
                          str(folder))
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder / name} is not there; the tree names it")
    file = SafetensorsFile(folder / name)
    if "data" not in file:
        raise FormatError(f"it has {', '.join(file) or 'no array'}; it must have 'data'", str(folder / name))
    x = file["data"].array()
    return x if x.dtype.kind in "iu" else x.astype(np.float32)


def _tokens(tree, folder):
    given = (tree.get("inputs") or {})
    ids = (given.get("kwargs") or {}).get("input_ids") if isinstance(given, dict) else None
    ids = ids or next(iter(given.get("args") or ()), None) if isinstance(given, dict) else None
    if not isinstance(ids, dict) or not str(ids.get("value", "")).startswith("./"):
        return None
    x = _array(ids, folder)
    return x.reshape(-1) if x.dtype.kind in "iu" else None


def _number(text):
    found = re.search(r"tensor\(([-+.\deinfa]+)", str(text))
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None
