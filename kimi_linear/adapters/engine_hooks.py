"""Record what a Kimi-Linear model computes inside vLLM or SGLang. One file to copy there: it needs torch and
safetensors.

    import engine_hooks
    recorder = engine_hooks.attach(model, "calls")
    ...                                                 # run prompts
    recorder.close()                                    # or the end of the process

    llm.apply_model(lambda m: __import__("engine_hooks").attach(m, "calls") and None)      # in vLLM

Every forward call of the model becomes one file, ``call-000003.safetensors``, numbered in order, prefill and decode
alike. A tensor is named by its module: ``model.layers.2.self_attn.q_proj/out.0``, ``.../o_norm/in.0``. The metadata
have the batch (``tokens``, ``position``, ``offsets``, ``slots`` of the requests, ``kind``) and under ``layout`` what
each tensor was in memory before it was copied: shape, strides, offset, dtype, device. A bug can vanish in a copy.

Hooks see only what Python runs: eager mode (vLLM ``enforce_eager=True``, SGLang ``--disable-cuda-graph``), one rank.
`kimi_linear.adapters.vllm` and `.sglang` read the files.
"""

import atexit
import fnmatch
import functools
import importlib
import inspect
import json
import os
import sys

import torch
from safetensors.torch import save_file

FORMAT = "kimi_linear engine call 1"
CALL = "kimi_linear call 1"

#: Modules whose results are kept.
OUTPUTS = ("model.embed_tokens", "model.norm", "logits_processor", "model.layers.*")
#: Modules of these names are too large, or hold nothing of their own.
SKIPPED = ("*.experts", "*.experts.*", "*.attn_mqa", "*.attn_mha", "*.kv_b_proj", "*.rotary_emb", "*.mla_attn")
#: Modules whose first arguments are kept as well.
INPUTS = ("*.o_norm", "*.linear_attn.norm", "*.o_proj", "*.attn")
#: Where vLLM says which rows of a pool of states are those of the batch's requests.
SLOTS = ("non_spec_state_indices_tensor", "state_indices_tensor")
#: Arguments of a recorded function of which only some rows are kept: argument -> that of the rows.
ROWS = {"initial_state": "ssm_state_indices"}


def attach(model, folder, outputs=OUTPUTS, inputs=INPUTS, skipped=SKIPPED, root="model", limit=None):
    """Hook a model; gives a Recorder, whose ``close()`` writes the last call and takes the hooks away.

    `folder` is made where it is not, and must have no calls of another run. `outputs`, `inputs`, `skipped` are globs of
    module names; `root` is the module one run of which is one call; after `limit` calls nothing more is kept.
    """
    return Recorder(model, folder, outputs, inputs, skipped, root, limit)


def sglang_hook(config):
    """A ``hook_factory`` for SGLang's ``forward_hooks``, for ``target_modules: ["model"]`` and ``config: {"folder":
    ..}``.

    It hooks the model at its first run, which is a warm-up and is not recorded. Logits are outside ``model``.
    """
    recorder = []

    def hook(module, args, output):
        if not recorder:
            recorder.append(Recorder(module, config["folder"], OUTPUTS, INPUTS, SKIPPED, "model", config.get("limit"),
                                     prefix="model"))

    return hook


class Recorder:
    """Hooks of one model, and the call that they are filling."""

    def __init__(self, model, folder, outputs, inputs, skipped, root, limit, prefix=""):
        self.folder, self.limit, self.number = folder, limit, 0
        self.tensors, self.layout, self.about, self.batch = {}, {}, None, {}
        os.makedirs(folder, exist_ok=True)
        named = {_join(prefix, name): module for name, module in model.named_modules()}
        if root not in named:
            raise ValueError(f"the model has no module {root!r}; it has {', '.join(list(named)[:5])}")
        if any(f.startswith("call-") for f in os.listdir(folder)):
            raise ValueError(f"{folder} has the calls of another run; give a folder of its own, or remove them")
        self.handles = [_Before(named[root], self.begin)]
        for name, module in named.items():
            if any(fnmatch.fnmatchcase(name, p) for p in skipped):
                continue
            wants = [any(fnmatch.fnmatchcase(name, p) for p in globs) for globs in (inputs, outputs)]
            if wants[0]:
                self.handles.append(module.register_forward_pre_hook(
                    functools.partial(self.given, name), with_kwargs=True))
            if wants[1]:
                self.handles.append(module.register_forward_hook(functools.partial(self.made, name)))
            if hasattr(module, "kv_cache") and hasattr(module, "A_log"):
                self.handles.append(module.register_forward_pre_hook(functools.partial(self.state, name, "before")))
                self.handles.append(module.register_forward_hook(functools.partial(self.state, name, "after")))
        atexit.register(self.close)

    # ---- hooks ----

    def begin(self, module, args, kwargs):
        """The model is about to run: a new call."""
        self.flush()
        if self.limit is not None and self.number >= self.limit:
            return
        given = _named(module.forward, args, kwargs)
        self.batch = _batch(given)
        if self.batch is None:  # a profile run
            return
        self.about = {"format": FORMAT, "call": str(self.number), "model": type(module).__name__, **_world()}
        ids, positions = (given.get(n) for n in ("input_ids", "positions"))
        for name, value in (("tokens", ids), ("positions", positions)):
            if isinstance(value, torch.Tensor):
                self.about[name] = json.dumps(value.flatten().tolist())

    def given(self, path, module, args, kwargs):
        """A module's arguments."""
        for name, value in (*enumerate(args), *kwargs.items()):
            self.keep(f"{path}/in.{name}", value)

    def made(self, path, module, args, output):
        """A module's result."""
        if isinstance(output, (tuple, list)):
            for i, value in enumerate(output):
                self.keep(f"{path}/out.{i}", value)
                if getattr(output, "_fields", None):
                    self.keep(f"{path}/out.{output._fields[i]}", value)
        elif hasattr(output, "next_token_logits"):
            self.keep(f"{path}/out", output.next_token_logits)
        else:
            self.keep(f"{path}/out", output)
        if path == "logits_processor":
            self.flush()

    def state(self, path, when, module, *_):
        """The rows of a delta net's recurrent state that the batch owns."""
        slots, cache = _slots_of(module, path, (self.batch or {}).get("slots")), module.kv_cache
        while isinstance(cache, (tuple, list)) and len(cache):
            cache = cache[-1]  # the recurrent state lies behind those of the convolutions
        if self.about is not None and slots and isinstance(cache, torch.Tensor) and cache.dim() == 4:
            self.keep(f"{path}/state.{when}", cache[torch.as_tensor(slots, device=cache.device)])

    # ---- files ----

    def keep(self, name, value):
        """A tensor as it is now."""
        if self.about is not None and isinstance(value, torch.Tensor):
            self.layout[name] = _memory(value)
            self.tensors[name] = value.detach().to("cpu", copy=True).contiguous()

    def flush(self):
        """Write the call that has been filled."""
        if self.about is not None and self.tensors:
            batch = {k: json.dumps(v) for k, v in self.batch.items() if v is not None}
            about = {**self.about, **batch, "layout": json.dumps(self.layout)}
            _write(os.path.join(self.folder, f"call-{self.number:06d}.safetensors"), self.tensors, about)
            self.number += 1
        self.tensors, self.layout, self.about = {}, {}, None

    def close(self):
        """Write the last call and take the hooks away."""
        self.flush()
        for handle in self.handles:
            handle.remove()
        self.handles = []


class _Before:
    """Calls `tell` before a module's forward, until it is removed.

    No forward hook: vLLM's classes with @support_torch_compile call forward by themselves in eager mode, and hooks not.
    """

    def __init__(self, module, tell):
        self.module, self.own, real = module, vars(module).get("forward"), module.forward

        @functools.wraps(real)
        def forward(*args, **kwargs):
            tell(module, args, kwargs)
            return real(*args, **kwargs)

        module.forward = self.forward = forward

    def remove(self):
        """Put the module's forward back."""
        if vars(self.module).get("forward") is not self.forward:
            return
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own


# ---- functions -----------------------------------------------------------------------------------------


def record_function(dotted, folder, op="delta_rule", conventions="vllm", limit=None):
    """Record the calls of a function that is no module, as ``"vllm.model_executor.layers.kda.chunk_kda"``.

    Name the module that uses it. Each call is a file for `kimi-linear replay`. Gives a function that puts the real one
    back.
    """
    module, _, name = dotted.rpartition(".")
    module = importlib.import_module(module)
    real = getattr(module, name)
    os.makedirs(folder, exist_ok=True)
    number = [len([f for f in os.listdir(folder) if f.startswith("call-")])]
    last = None if limit is None else number[0] + limit

    @functools.wraps(real)
    def recording(*args, **kwargs):
        if last is not None and number[0] >= last:
            return real(*args, **kwargs)
        given = _named(real, args, kwargs)
        tensors, layout, options, rows = {}, {}, {}, {}
        for argument, value in given.items():
            if argument in ROWS and value is not None and given.get(ROWS[argument]) is not None:
                rows[value.data_ptr()] = given[ROWS[argument]].long()
                value = value[rows[value.data_ptr()]]
            if argument in ROWS.values():
                continue
            if isinstance(value, torch.Tensor):
                layout[f"in/{argument}"] = _memory(given[argument])
                tensors[f"in/{argument}"] = value.detach().to("cpu", copy=True).contiguous()
            elif value is None or isinstance(value, (bool, int, float, str)):
                options[argument] = value
        result = real(*args, **kwargs)
        for i, value in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(value, torch.Tensor):
                layout[f"out/{i}"] = _memory(value)
                value = value[rows[value.data_ptr()]] if value.data_ptr() in rows else value
                tensors[f"out/{i}"] = value.detach().to("cpu", copy=True).contiguous()
        about = {"format": CALL, "op": op, "conventions": conventions, "function": dotted, "call": str(number[0]),
                 "options": json.dumps(options), "layout": json.dumps(layout)}
        _write(os.path.join(folder, f"call-{number[0]:06d}.safetensors"), tensors, about)
        number[0] += 1
        return result

    setattr(module, name, recording)
    return lambda: setattr(module, name, real)


# ---- what a call is ------------------------------------------------------------------------------------


def _batch(given):
    """offsets, slots and number of real tokens of a batch, as the engine says; None of a run without a batch."""
    for value in given.values():
        if hasattr(value, "forward_mode"):
            return _batch_of_sglang(value)
    metadata = _metadata_of_vllm()
    if not metadata:
        return metadata
    of_layers = metadata.values() if isinstance(metadata, dict) else [metadata]
    found = {"offsets": _first(of_layers, ("non_spec_query_start_loc", "query_start_loc")),
             "slots": _first(of_layers, SLOTS), "rows": _first(of_layers, ("num_actual_tokens",))}
    if found["slots"] and found["offsets"]:
        found["slots"] = found["slots"][:len(found["offsets"]) - 1]  # the rest is padding
    return found


def _metadata_of_vllm():
    """Of every layer of the run, by its prefix, or of all; None of a profile run, and {} of no run of vLLM."""
    try:
        return sys.modules["vllm.forward_context"].get_forward_context().attn_metadata
    except (AssertionError, AttributeError, KeyError):
        return {}


def _slots_of(module, path, slots):
    """Those of the batch in a layer's own pool: each KV cache group of vLLM has its own; else `slots`."""
    metadata = _metadata_of_vllm()
    own = metadata.get(getattr(module, "prefix", path)) if isinstance(metadata, dict) else None
    own = _first([own], SLOTS)
    return own[:len(slots)] if own and slots else slots


def _first(objects, attributes):
    """The first of the attributes that one of the objects has, as a list or a number; else None."""
    values = (getattr(x, a, None) for a in attributes for x in objects)
    return _plain(next((v for v in values if v is not None), None))


def _batch_of_sglang(batch):
    slots, lengths = (_plain(getattr(batch, n, None)) for n in ("req_pool_indices", "extend_seq_lens"))
    if batch.forward_mode.is_decode() or lengths is None:
        lengths = [1] * len(slots or [])
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] + n)
    return {"offsets": offsets if lengths else None, "slots": slots, "rows": offsets[-1] or None}


def _plain(value):
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else value


def _named(function, args, kwargs):
    """Arguments by name, those that were left to their defaults too."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    except (TypeError, ValueError):
        return {**dict(enumerate(args)), **kwargs}


def _memory(x):
    return {"shape": list(x.shape), "strides": list(x.stride()), "offset": x.storage_offset(),
            "dtype": str(x.dtype).replace("torch.", ""), "device": str(x.device)}


def _world():
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return {"rank": str(distributed.get_rank()), "world": str(distributed.get_world_size())}
    return {}


def _join(prefix, name):
    return ".".join(filter(None, (prefix, name)))


def _write(path, tensors, about):
    """A file that takes its name when it is whole."""
    save_file(tensors, path + ".part", about)
    os.replace(path + ".part", path)
