"""A Trace of a model that runs in transformers: its modules' inputs and outputs under our tap names.

What lies between modules is seen where a function is given it, or gives it back: the chunked delta rule, and
attention. Not seen are the unit q and k of delta nets, and the shared expert behind its gate.
"""

import contextlib
import fnmatch
import sys
from types import SimpleNamespace

import numpy as np

from .. import golden
from ..config import Config
from ..config_glm import WRAPPER
from ..config_qwen import KINDS
from ..editing import rising
from ..trace import Trace
from .calls import memory_of

__all__ = ["config_of", "trace"]

#: Taps that are a module's input, by the kind of layer and the module's path below ``model.layers.<i>``.
INPUTS = {
    "layer": {"post_attention_layernorm": "mid"},
    "kda": {"self_attn.o_norm": "kda.o"},
    "mla": {"self_attn.o_proj": "mla.o"},
    "gdn": {"linear_attn.norm": "gdn.o"},
    "attn": {"self_attn.o_proj": "attn.gated"},
    "dense": {"mlp.down_proj": "mlp.act"},
    "moe": {"mlp.shared_experts.down_proj": "moe.shared_act", "mlp.shared_expert.down_proj": "moe.shared_act"},
}
#: The function that a mixer's forward pass calls, by the module's global name, and the taps that its arguments are.
DELTA_RULES = {
    "kda": ("chunk_kimi_delta_attention", {
        "query": "kda.q_conv", "key": "kda.k_conv", "value": "kda.v_conv", "beta": "kda.beta"}),
    "gdn": ("torch_chunk_gated_delta_rule", {
        "query": "gdn.q_conv", "key": "gdn.k_conv", "value": "gdn.v_conv", "g": "gdn.g", "beta": "gdn.beta"}),
}
ATTENTION = "ALL_ATTENTION_FUNCTIONS"
#: Attribute of a cache layer -> name in golden.py.
CACHES = {"conv_states": "conv", "recurrent_states": "state", "keys": "keys", "values": "values",
          "indexer_keys": "indexer"}
#: model_type -> what transformers calls such a model.
CLASSES = {"kimi_linear": "KimiLinearForCausalLM", **{kind: about.architecture for kind, about in KINDS.items()},
           WRAPPER: "Glm5NextForConditionalGeneration"}


def config_of(model):
    """The Config of a transformers model; ValueError if it is of no family of ours, or not a supported one."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in CLASSES or not hasattr(model, "lm_head"):
        raise ValueError(f"model is a {type(model).__name__}; it must be a {', a '.join(CLASSES.values())}")
    return Config.from_dict(model.config.to_dict())


def trace(model, tokens, taps="*", *, state=False):
    """Run one sequence through a transformers model and keep its intermediates.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One of `CLASSES`, on any device, of any float type; arrays are kept as float32.
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
        If `model` is none of `CLASSES`, `tokens` are not of one sequence, or a glob matches nothing.

    Warns
    -----
    UserWarning
        If two modules give one tap other values: which they are, and which is taken.
    """
    import torch

    config = config_of(model)
    patterns = [taps] if isinstance(taps, str) else list(taps)
    kept, modules = {}, {}

    def keep(arrays, module):
        wanted = {name: np.array(x) for name, x in arrays.items()
                  if any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)}
        golden.add(kept, wanted, module, modules)

    known, mixers = golden.names(config), {layer.mixer for layer in config.layers}
    ids = torch.as_tensor(np.asarray(tokens), device=model.device)
    if ids.ndim != 1:
        raise ValueError(f"tokens has shape {list(ids.shape)}; it must be [T], one sequence")
    ids = ids[None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # Without an attention layer no cache of transformers knows a length, which making masks would ask for.
    mask = None if mixers & {"mla", "attn"} else {"full_attention": None, "linear_attention": None}
    layout = {}
    named = [(path.replace(".language_model", "", 1), module) for path, module in model.named_modules()]
    hooks = [module.register_forward_hook(_hook(path, config, keep, layout)) for path, module in named
             if path in known or path + "/ids" in known]
    try:
        with torch.no_grad(), _between_modules(model, config, keep):
            result = model(ids, attention_mask=mask, position_ids=positions, use_cache=state)
    finally:
        for hook in hooks:
            hook.remove()
    for i, layer in enumerate(result.past_key_values.layers if state else []):
        keep(golden.to_taps(_caches(layer, i), config), "the cache")
    meta = {"model": model.config._name_or_path, "tokens": np.asarray(tokens).tolist(), "source": "transformers",
            "dtype": str(model.dtype).removeprefix("torch."), "layout": layout}
    return Trace(kept, meta).filter(patterns)


def _hook(path, config, keep, layout):
    """A forward hook that hands on the taps that a module's output and input hold, and how the output lay in memory."""
    layer, _, rest = path.removeprefix("model.layers.").partition(".")

    def hook(module, args, result):
        layout[path] = memory_of(result[0] if isinstance(result, tuple) else result)
        keep(input_taps(path, lambda: _numpy(args[0]), config), f"the input of {path}")
        if rest == "mlp.gate":
            logits, weights, ids = (_numpy(t) for t in result)
            keep({f"layers.{layer}.moe.logits": logits}, path)
            keep(golden.to_taps({f"{path}/ids": ids, f"{path}/weights": weights}, config), path)
        elif rest in ("attn_hc", "ffn_hc"):
            post, comb, collapsed = (_numpy(t) for t in result)
            comb = comb.reshape(*comb.shape[:-2], -1)
            keep(golden.to_taps({path: collapsed, f"{path}/post": post, f"{path}/comb": comb}, config), path)
        elif rest.endswith(".indexer"):
            keep(golden.to_taps({f"{path}/ids": rising(_numpy(result))}, config), path)
        else:
            keep(golden.to_taps({path: _numpy(result[0] if isinstance(result, tuple) else result)}, config), path)

    return hook


@contextlib.contextmanager
def _between_modules(model, config, keep):
    """Hands on what the functions of `DELTA_RULES` are given, and what attention is given and gives, while it lasts.

    They are globals of the model's own module, and called layer by layer. One that is not there is let be.
    """
    modeling = sys.modules[type(model).__module__]
    with contextlib.ExitStack() as stack:
        for mixer, (name, taps) in DELTA_RULES.items():
            layers = iter([i for i, spec in enumerate(config.layers) if spec.mixer == mixer])
            if hasattr(modeling, name):
                _replace(stack, modeling, name, _delta_rule(getattr(modeling, name), layers, taps, keep))
        if hasattr(modeling, ATTENTION) and any(spec.mixer == "attn" for spec in config.layers):
            real = getattr(modeling, ATTENTION).get_interface
            _replace(stack, modeling, ATTENTION,
                     SimpleNamespace(get_interface=lambda *args: _attention(real(*args), keep)))
        yield


def _replace(stack, module, name, value):
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _delta_rule(function, layers, taps, keep):
    def recording(query, key, value, **options):
        given, layer = dict(query=query, key=key, value=value, **options), next(layers)
        keep({f"layers.{layer}.{tap}": _numpy(given[name])[0] for name, tap in taps.items()}, "the delta rule")
        return function(query, key, value, **options)

    return recording


def _attention(function, keep):
    def recording(module, query, key, value, *args, **options):
        result = function(module, query, key, value, *args, **options)
        by_token = {"q": query.transpose(1, 2), "k": key.transpose(1, 2), "o": result[0]}
        keep({f"layers.{module.layer_idx}.attn.{name}": _numpy(x)[0] for name, x in by_token.items()}, "attention")
        return result

    return recording


def input_taps(path, get, config, inputs=INPUTS):
    """The tap that a module's first argument holds, by its path, as {tap: [T, ...]}; `get` gives the argument."""
    layer, _, rest = path.removeprefix("model.layers.").partition(".")
    if not layer.isdigit():
        return {}
    c, spec = config, config.layers[int(layer)]
    if c.streams:
        inputs = inputs | {"layer": {"ffn_hc": "mid"}}  # norms read a mixture of the streams
    tap = next((inputs[kind][rest] for kind in ("layer", spec.mixer, spec.ffn) if rest in inputs[kind]), None)
    if tap is None:
        return {}
    kda = c.kda_heads, c.kda_head_dim
    latents = c.mla_heads, c.v_head_dim
    heads = {"kda.o": kda, "kda.o_norm": kda, "mla.o": latents, "mla.gated": latents,
             "gdn.o": (c.gdn_v_heads, c.gdn_v_dim), "attn.gated": (c.attn_heads, c.attn_head_dim)}
    heads |= {"mid": (c.streams, c.hidden_size)} if c.streams else {}
    x = get()
    return {f"layers.{layer}.{tap}": x.reshape(-1, *heads.get(tap, x.shape[-1:]))}


def _caches(layer, i):
    """Arrays of one layer's cache, [1, ...], under golden's names."""
    found = {}
    for attribute, name in CACHES.items():
        x = getattr(layer, attribute, None)
        x = x[0] if isinstance(x, list | tuple) else x.get(0) if isinstance(x, dict) else x
        if x is not None and x.numel():
            found[f"cache/{i}/{name}"] = _numpy(x)[..., :-1] if name == "indexer" else _numpy(x)  # less who is padding
    return found


def _numpy(x):
    """A tensor of any device and float type as float32, integers as they are."""
    x = x.detach()
    return (x.float() if x.is_floating_point() else x).cpu().numpy()
