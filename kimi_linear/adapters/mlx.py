"""A Trace of a model that runs in mlx-lm: its modules' inputs and outputs under our tap names.

Paths of its modules are those of transformers, so that `kimi_linear.golden` names them; what lies between modules is
seen where a function is given it, or gives it back: the unit q and k, the delta rule, attention, the router, attention
residuals. Not seen are log-decays, of which mlx-lm keeps exp(g) (a logarithm of that would have lost a weak gate's
digits), the router's weights of Qwen3-Next, and its shared expert behind its gate.
"""

import contextlib
import dataclasses
import fnmatch
import sys

import numpy as np

from .. import golden
from ..config import Config
from ..trace import Trace
from .transformers import INPUTS, input_taps

__all__ = ["config_of", "trace"]

KINDS = ("kimi_linear", "qwen3_next", "kimi_k3")
#: Modules whose output is no tap, though transformers' of that path is.
OTHERWISE = {"kda": ("self_attn.o_norm",)}


def config_of(model):
    """The Config of an mlx-lm model; ValueError if it is of no family of ours, or not a supported one."""
    kind = getattr(model, "model_type", None)
    if kind not in KINDS or not dataclasses.is_dataclass(getattr(model, "args", None)):
        raise ValueError(f"model is a {type(model).__name__} of {type(model).__module__}; it must be a Model of "
                         f"mlx_lm.models.{' or mlx_lm.models.'.join(KINDS)}")
    return Config.from_dict(dataclasses.asdict(model.args))


def inputs_of(config):
    """Taps that are a module's input, as transformers' table has them, for the modules of mlx-lm."""
    moe = dict(INPUTS["moe"])
    if config.expert_latent:
        moe["mlp.routed_expert_norm" if config.expert_latent_norm else "mlp.routed_expert_up_proj"] = "moe.routed"
    return INPUTS | {
        "layer": {} if config.attn_res_block else INPUTS["layer"],      # the norm's input is a mixture there
        "kda": {"self_attn.o_norm": "kda.o", "self_attn.o_proj": "kda.o_norm"},     # the gate is behind the norm
        "mla": {"self_attn.o_proj": "mla.gated" if config.mla_gated else "mla.o"},
        "moe": moe,
    }


def trace(model, tokens, taps="*", *, state=False):
    """Run one sequence through an mlx-lm model and keep its intermediates.

    While it runs, calls of the classes of its modules are recorded, of this model alone; another thread must not run
    it at the same time.

    Parameters
    ----------
    model : mlx_lm.models.kimi_linear.Model, mlx_lm.models.qwen3_next.Model or mlx_lm.models.kimi_k3.Model
        Of any float type, quantised or not; arrays are kept as float32.
    tokens : (T,) integers
    taps : str or list of str
        Globs of what to keep, such as ``"layers.3.kda.*"``.
    state : bool
        Also keep what the caches hold at the end, under a State's names.

    Returns
    -------
    Trace
        Arrays [T, ...] of our taps, float32; ``moe.ids`` int32, ascending in each row.

    Raises
    ------
    ValueError
        If `model` is of another kind, `tokens` are not of one sequence, or a glob matches nothing.
    """
    config = config_of(model)
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(f"tokens has shape {list(ids.shape)}; it must be [T], one sequence")
    import mlx.core as mx

    patterns = [taps] if isinstance(taps, str) else list(taps)
    kept, modules = {}, {}

    def keep(arrays, module):
        wanted = {name: x for name, x in arrays.items()
                  if any(fnmatch.fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)}
        golden.add(kept, wanted, module, modules)

    cache = model.make_cache() if state else None
    with _recorded(model, config, keep):
        logits = model(mx.array(ids[None].astype(np.int32)), cache=cache)
    keep(golden.to_taps({"logits": _numpy(logits)}, config), "the model")
    for i, layer in enumerate(cache or []):
        keep(_state_of(layer, i, config), "the cache")
    meta = {"tokens": ids.tolist(), "source": "mlx-lm",
            "dtype": str(model.model.norm.weight.dtype).removeprefix("mlx.core.")}
    return Trace(kept, meta).filter(patterns)


@contextlib.contextmanager
def _recorded(model, config, keep):
    """Hands on the taps of modules and functions while it lasts."""
    from mlx_lm.models import gated_delta

    paths = {id(module): path.removeprefix("language_model.") for path, module in model.named_modules()}
    inside, inputs = [], inputs_of(config)
    modeling = sys.modules[type(model).__module__]
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "_decode_core"):         # one token on Metal: compiled, and nothing of it can be seen
                _replace(stack, module, "_step", lambda _, module=module: module._decode_core)
        for kind in {type(module) for module in model.modules()}:
            _replace(stack, kind, "__call__", lambda call: _module(call, paths, inside, inputs, config, keep))
        for place, name, taps in ((modeling, "normalize_qk", _unit), (gated_delta, "gated_delta_ops", _delta_rule),
                                  (gated_delta, "gated_delta_kernel", _delta_rule),
                                  (modeling, "scaled_dot_product_attention", _attention),
                                  (modeling, "_group_expert_select", _router),
                                  (modeling, "_attn_res_mix", _residuals(config))):
            if hasattr(place, name):
                _replace(stack, place, name, lambda call, taps=taps: _function(call, taps, inside, config, keep))
        yield


def _replace(stack, place, name, wrapped):
    real = getattr(place, name)
    stack.callback(setattr, place, name, real)
    setattr(place, name, wrapped(real))


def _module(call, paths, inside, inputs, config, keep):
    def recording(module, *args, **options):
        path = paths.get(id(module))
        if path is None:                                        # of another model
            return call(module, *args, **options)
        inside.append(path)
        try:
            result = call(module, *args, **options)
        finally:
            inside.pop()
        keep(input_taps(path, lambda: _numpy(args[0])[0], config, inputs), f"the input of {path}")
        keep(_output_taps(path, args, result[0] if isinstance(result, tuple) else result, config), path)
        return result

    return recording


def _output_taps(path, args, result, config):
    layer, _, rest = path.removeprefix("model.layers.").partition(".")
    if rest == "mlp.gate":
        return {f"layers.{layer}.moe.logits": _numpy(result)[0]}
    if rest == "mlp.switch_mlp":
        return golden.to_taps({f"model.layers.{layer}.mlp.gate/ids": _numpy(args[1])}, config)
    if rest == "self_attn.qkv_proj":
        parts = np.split(_numpy(result)[0], 3, axis=-1)
        return {f"layers.{layer}.kda.{name}_proj": x for name, x in zip("qkv", parts)}
    if rest == "self_attn.unembed_out":                         # values; of a single token, what attention gives
        return _heads({"o": result}, f"layers.{layer}.mla.") if result.shape[2] == 1 else {}
    if layer.isdigit() and rest in OTHERWISE.get(config.layers[int(layer)].mixer, ()):
        return {}
    name = path.replace("self_attn.f_", "self_attn.forget_gate.f_")
    return golden.to_taps({name: _numpy(result)}, config) if golden.tap_of(name, config) else {}


def _function(call, taps, inside, config, keep):
    def recording(*args, **options):
        result = call(*args, **options)
        layer = int(inside[-1].split(".")[2]) if "." in inside[-1] else None            # behind them all
        keep(taps(args, result, layer, config), f"a function of {inside[-1]}")
        return result

    return recording


def _unit(args, result, layer, config):
    """The scale K^-0.5 is in their q."""
    at = f"layers.{layer}.{config.layers[layer].mixer}."
    q, k = (_numpy(x)[0] for x in result)
    given = {at + name: _numpy(x)[0] for name, x in zip(("q_conv", "k_conv"), args)}
    return given | {at + "q": q * np.float32(q.shape[-1] ** 0.5), at + "k": k}


def _delta_rule(args, result, layer, config):
    at = f"layers.{layer}.{config.layers[layer].mixer}."
    return {at + "v_conv": _numpy(args[2])[0], at + "beta": _numpy(args[4])[0]}


def _attention(args, result, layer, config):
    """Of MLA q and k are parts of ours, and the result of a single token is a latent still."""
    if config.layers[layer].mixer == "attn":
        return _heads({"q": args[0], "k": args[1], "o": result}, f"layers.{layer}.attn.")
    return _heads({"o": result}, f"layers.{layer}.mla.") if result.shape[2] > 1 else {}


def _heads(arrays, at):
    """Taps of arrays [1, H, T, n]."""
    return {at + name: _numpy(x)[0].swapaxes(0, 1) for name, x in arrays.items()}


def _residuals(config):
    """The mixtures in the order of their calls, and what is added up before a layer's second one."""
    names = iter([f"layers.{i}.{name}" for i in range(config.n_layers) for name in ("attn_res", "ffn_res")]
                 + ["output_res"])

    def taps(args, result, layer, config):
        name = next(names)
        found = {name: _numpy(result)[0]}
        if name.endswith("ffn_res") and layer % config.attn_res_block:         # in a block's first, the mixer's result
            found[f"layers.{layer}.mid"] = _numpy(args[1])[0]
        return found

    return taps


def _router(args, result, layer, config):
    at = f"model.layers.{layer}.mlp.gate/"
    return golden.to_taps({at + name: _numpy(x)[0] for name, x in zip(("ids", "weights"), result)}, config)


def _state_of(cache, i, config):
    """A layer's cache under a State's names; states are [1, H, V, K] there."""
    at = f"layers.{i}.{config.layers[i].mixer}."
    if config.layers[i].mixer in ("mla", "attn"):
        held = {f"cache/{i}/keys": cache.keys, f"cache/{i}/values": cache.values}
        return golden.to_taps({name: _numpy(x)[:, :, :cache.offset] for name, x in held.items()}, config)
    *histories, last = (_numpy(x)[0] for x in cache.cache)
    if len(histories) == 1:                                     # q, k and v side by side
        return golden.to_taps({f"cache/{i}/conv": histories[0].T}, config) | {at + "state": last.swapaxes(-1, -2)}
    return {at + f"{part}_history": x for part, x in zip("qkv", histories)} | {at + "state": last.swapaxes(-1, -2)}


def _numpy(x):
    """An mlx array of any float type as float32, integers as int32."""
    import mlx.core as mx

    return np.array(x.astype(mx.float32 if mx.issubdtype(x.dtype, mx.floating) else mx.int32))
