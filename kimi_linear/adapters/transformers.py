"""A Trace of a Kimi-Linear model that runs in transformers: its modules' inputs and outputs under our tap names.

Not seen are the taps that transformers makes between modules: the convolutions, the unit q and k, and beta.
"""

import fnmatch

import numpy as np

from .. import golden
from ..config import Config
from ..trace import Trace
from .calls import memory_of

__all__ = ["config_of", "trace"]

#: Taps that are a module's input, by its path below ``model.layers.<i>``.
INPUTS = {
    "post_attention_layernorm": "mid", "self_attn.o_norm": "kda.o", "self_attn.o_proj": "mla.o",
    "mlp.down_proj": "mlp.act", "mlp.shared_experts.down_proj": "moe.shared_act",
}
#: Attribute of a cache layer -> name in golden.py.
CACHES = {"conv_states": "conv", "recurrent_states": "state", "keys": "keys", "values": "values"}


def config_of(model):
    """The Config of a transformers model; ValueError if it is no Kimi-Linear model, or not a supported one."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "kimi_linear" or not hasattr(model, "lm_head"):
        raise ValueError(f"model is a {type(model).__name__}; it must be a KimiLinearForCausalLM")
    return Config.from_dict(model.config.to_dict())


def trace(model, tokens, taps="*", *, state=False):
    """Run one sequence through a transformers model and keep its intermediates.

    Parameters
    ----------
    model : transformers.KimiLinearForCausalLM
        On any device, of any float type; arrays are kept as float32.
    tokens : (T,) integers
    taps : str or list of str
        Globs of what to keep, such as ``"layers.3.kda.*"``.
    state : bool
        Also keep what the caches hold at the end, under a State's names.

    Returns
    -------
    Trace
        Arrays [T, ...] of our taps, float32; ``moe.ids`` int32, ascending in each row. ``meta["layout"]`` says of each
        module's result what it was in memory: shape, strides, offset, dtype, device.

    Raises
    ------
    ValueError
        If `model` is no KimiLinearForCausalLM, or a glob matches nothing.
    """
    import torch

    config = config_of(model)
    patterns = [taps] if isinstance(taps, str) else list(taps)
    kept = {}

    def keep(arrays):
        for name, x in arrays.items():
            if any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns):
                kept[name] = np.array(x)

    known, mixers = golden.names(config), [layer.mixer for layer in config.layers]
    ids = torch.as_tensor(np.asarray(tokens), device=model.device)[None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # Without an attention layer no cache of transformers knows a length, which making masks would ask for.
    mask = None if "mla" in mixers else {"full_attention": None, "linear_attention": None}
    layout = {}
    hooks = [module.register_forward_hook(_hook(path, config, keep, layout)) for path, module in model.named_modules()
             if path in known or path + "/ids" in known]
    try:
        with torch.no_grad():
            result = model(ids, attention_mask=mask, position_ids=positions, use_cache=state)
    finally:
        for hook in hooks:
            hook.remove()
    for i, layer in enumerate(result.past_key_values.layers if state else []):
        keep(golden.to_taps(_caches(layer, i), config))
    meta = {"model": model.config._name_or_path, "tokens": np.asarray(tokens).tolist(), "source": "transformers",
            "dtype": str(model.dtype).removeprefix("torch."), "layout": layout}
    return Trace(kept, meta).filter(patterns)


def _hook(path, config, keep, layout):
    """A forward hook that hands on the taps that a module's output and input hold, and how the output lay in memory."""
    layer, _, rest = path.removeprefix("model.layers.").partition(".")

    def hook(module, args, result):
        layout[path] = memory_of(result[0] if isinstance(result, tuple) else result)
        keep(input_taps(path, lambda: _numpy(args[0]), config))
        if rest == "mlp.gate":
            logits, weights, ids = (_numpy(t) for t in result)
            keep({f"layers.{layer}.moe.logits": logits})
            keep(golden.to_taps({f"{path}/ids": ids, f"{path}/weights": weights}, config))
        else:
            keep(golden.to_taps({path: _numpy(result[0] if isinstance(result, tuple) else result)}, config))

    return hook


def input_taps(path, get, config):
    """The tap that a module's first argument holds, by its path, as {tap: [T, ...]}; `get` gives the argument."""
    layer, _, rest = path.removeprefix("model.layers.").partition(".")
    tap = INPUTS.get(rest)
    if tap is None or not layer.isdigit() or tap == "mla.o" and config.layers[int(layer)].mixer == "kda":
        return {}
    heads = {"kda.o": (config.kda_heads, config.kda_head_dim), "mla.o": (config.mla_heads, config.v_head_dim)}
    x = get()
    return {f"layers.{layer}.{tap}": x.reshape(-1, *heads.get(tap, x.shape[-1:]))}


def _caches(layer, i):
    """Arrays of one layer's cache, [1, ...], under golden's names."""
    found = {}
    for attribute, name in CACHES.items():
        x = getattr(layer, attribute, None)
        x = x[0] if isinstance(x, list | tuple) else x.get(0) if isinstance(x, dict) else x
        if x is not None and x.numel():
            found[f"cache/{i}/{name}"] = _numpy(x)
    return found


def _numpy(x):
    """A tensor of any device and float type as float32, integers as they are."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
