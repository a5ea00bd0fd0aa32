"""llama.cpp beside us, live: a GGUF run by llama-cpp-python, the tensors of its graph as a trace under our names.

    model = kl.Model.from_pretrained("kimi.gguf", **llama_cpp.CONVENTIONS)
    with llama_cpp.Engine("kimi.gguf") as theirs:
        trace = theirs.trace(tokens, states=True)
    print(kl.diff.blame(model, trace))

llama.cpp shows every node of its graph to a callback, as it is computed. A node is known by its name, as in a log
(`llama_log.NAMES`), or, where it has none, by what made it (`MADE`): its op and those before it, back to the first
tensor with a name, views left out. Values are copied as their strides say. A prompt is read in parts of `n_ubatch`
tokens; the rows of all parts follow each other, and of a state the last is kept.

What this needs of llama.cpp: the layout of a ``ggml_tensor``, which is checked, and llama-cpp-python's own bindings.
Names from ggml-org/llama.cpp: src/models/kimi-linear.cpp, qwen3next.cpp, qwen35.cpp, qwen35moe.cpp,
src/llama-graph.cpp; the struct from ggml/include/ggml.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import re
from pathlib import Path

import numpy as np

from .._arrays import as_integers
from ..dataflow import in_order
from ..golden import sort_experts
from ..load import open_checkpoint
from ..trace import Trace, matches
from ._layout import STATE as IS_STATE
from ._layout import Layout, bring, places
from ._mapped import config_of
from .llama_log import STATE, spread, taps_of

__all__ = ["CONVENTIONS", "MADE", "Engine", "quiet"]

#: What llama.cpp computes otherwise than the training code of Kimi-Linear, as `Model.from_pretrained` takes it:
#: rms_norm_eps of the published model stands for all three. Of Qwen's it is right for the norms of q and k.
CONVENTIONS = {"latent_eps": 1e-5, "l2_eps": 1e-5}

#: Ops from a node back to the first tensor with a name -> tap, or taps joined along the channels, by kind of layer.
MADE = {
    "kda": {
        **{f"MUL_MAT attn_{s}.weight": f"kda.{s}_proj" for s in "qkv"},
        "MUL_MAT attn_qkv.weight": "kda.q_proj | kda.k_proj | kda.v_proj",
        **{f"SILU SSM_CONV ssm_conv1d_{s}.weight": f"kda.{s}_conv" for s in "qkv"},
        **{f"{norm} SILU SSM_CONV ssm_conv1d_{s}.weight": f"kda.{s}" for s in "qk"
           for norm in ("SCALE RMS_NORM", "L2_NORM")},
        **{f"SSM_CONV ssm_conv1d_{s}.weight": f"kda.{s}_history" for s in "qkv"},  # the end of what it reads
        "MUL_MAT ssm_f_a.weight": "kda.f_a", "MUL_MAT ssm_g_a.weight": "kda.g_a", "SIGMOID kda_beta": "kda.beta",
        "MUL kda_normed": "kda.o_norm",
    },
    "mla": {
        "MUL_MAT attn_q.weight": "mla.q", "MUL_MAT attn_q_a.weight": "mla.q_a", "MUL_MAT attn_q_b.weight": "mla.q",
        "MUL RMS_NORM MUL_MAT attn_q_a.weight": "mla.q_a_norm",
        "MUL_MAT attn_kv_a_mqa.weight": "mla.latent_raw | mla.k_shared",
        "MUL RMS_NORM MUL_MAT attn_kv_a_mqa.weight": "mla.latent", "kqv_out": "mla.o",
    },
    "gdn": {
        "conv_output_raw": "gdn.q_history | gdn.k_history | gdn.v_history",  # the end of what it reads
        **{f"{norm} {s}_conv": f"gdn.{s}" for s in "qk" for norm in ("SCALE RMS_NORM", "L2_NORM")},
        "SIGMOID b": "gdn.beta",
    },
    "attn": {},
    "dense": {},
    "moe": {  # of the weights the last that the graph has: renormalised and scaled where the model is
        "ffn_moe_topk": "moe.ids", "ffn_moe_weights": "moe.weights",
        "ffn_moe_weights_norm": "moe.weights", "ffn_moe_weights_scaled": "moe.weights",
    },
}
_MADE_OF = {name for made in MADE.values() for name in made}
_VIEWS = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "CONT")
_WEIGHT_SECOND = ("SSM_CONV",)
_DTYPES = {0: np.float32, 1: np.float16, 26: np.int32}  # of ggml_type
_LAYER_OF_WEIGHT = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER_OF_NAME = re.compile(r"(.+)-(\d+)")
_COPY = re.compile(r"[^#]*#(.+)#\d+")  # the scheduler's, of a tensor of another device


class _Tensor(ctypes.Structure):
    """The fields of a ``ggml_tensor``."""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p),
    ]


class Engine:
    """A GGUF of architecture kimi-linear, qwen3next, qwen35 or qwen35moe, open in llama.cpp.

    Parameters
    ----------
    path : str or path
    model : Model or Config, optional
        Of the same file; by default the config is read from it.
    n_ubatch : int
        Tokens of one evaluation of its graph.
    threads : int

    Raises
    ------
    ModuleNotFoundError
        If llama-cpp-python is not installed.
    ValueError
        If llama.cpp does not open the file; with what it said.
    """

    def __init__(self, path, *, model=None, n_ubatch=512, threads=1):
        checkpoint = open_checkpoint(path) if model is None else None
        self.config = config_of(checkpoint or model)
        if n_ubatch < 1 or threads < 1:
            raise ValueError(f"n_ubatch is {n_ubatch} and threads is {threads}; both must be >= 1")
        self.path, self.n_ubatch, self.threads = Path(path), int(n_ubatch), int(threads)
        self._api, self._ggml = _libraries()
        self._names = _spread(self.config)
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        with quiet(self._api) as said:
            self._model = self._api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp does not open it: {_reason(said)}")
        self._activations = (checkpoint or open_checkpoint(path)).fast_activations

    def close(self):
        """Give the file back."""
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def logits(self, tokens):
        """Logits of every token of one sequence from its start: [T, vocab] float32. Its graph runs undisturbed."""
        return self._run(tokens, None)

    def trace(self, tokens, taps="*", *, states=False):
        """The intermediates of one sequence from its start.

        Parameters
        ----------
        tokens : (T,) integers
            At least one.
        taps : str or list of str
            Globs, as of `Model.trace`. What the graph does not have is not there.
        states : bool
            With the states of delta nets after the last token, and the histories of its convolutions.

        Returns
        -------
        Trace
            In float32. Experts are in ascending order, their weights with them.
        """
        known, ids = places(self.config), self._ids(tokens)
        ours = dict.fromkeys(t for found in self._names.values() for t in found)
        wanted = set(matches([t for t in ours if "T" in known[t].axes], taps))
        wanted |= {t for t in ours if states and "T" not in known[t].axes}
        needed = wanted | {t.replace("moe.weights", "moe.ids") for t in wanted}
        recorder = _Recorder(self._ggml, {n: found for n, found in self._names.items() if needed & {*found}}, known)
        self._run(ids, recorder)
        arrays = recorder.arrays(len(ids))
        sort_experts(arrays)
        meta = {"source": _about(), "model": self.path.name, "dtype": "float32", "tokens": ids.tolist(),
                "offsets": [0, len(ids)], "n_ubatch": self.n_ubatch, "activations": self._activations}
        return Trace({t: arrays[t] for t in in_order(arrays) if t in wanted}, meta)

    # ---- a run ----

    def _ids(self, tokens):
        ids = as_integers(tokens, "tokens", ("T",), low=0, high=self.config.vocab_size)
        if not len(ids):
            raise ValueError("tokens has no token; llama.cpp needs at least one")
        return ids

    def _run(self, tokens, recorder):
        if not self._model:
            raise ValueError("the engine is closed")
        api, ids = self._api, self._ids(tokens)
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = len(ids)
        params.n_ubatch = min(self.n_ubatch, len(ids))
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = 0  # float32
        params.flash_attn_type = 0
        if recorder is not None:
            params.cb_eval = recorder.callback
        with quiet(self._api) as said:
            context = api.llama_init_from_model(self._model, params)
            if not context:
                raise ValueError(f"{self.path}: llama.cpp makes no context of {len(ids)} tokens: {_reason(said)}")
            batch = _batch(api, ids)
            try:
                status = api.llama_decode(context, batch)
                if recorder is not None and recorder.error is not None:
                    raise recorder.error
                if status != 0:
                    raise RuntimeError(f"llama_decode returned {status}: {_reason(said)}")
                if recorder is not None:
                    return None
                found = api.llama_get_logits(context)
                return np.ctypeslib.as_array(found, (len(ids), self.config.vocab_size)).copy()
            finally:
                api.llama_batch_free(batch)
                api.llama_free(context)


class _Recorder:
    """The callback: which nodes are wanted, and their values as taps of ours."""

    def __init__(self, ggml, names, known):
        self.ggml, self.names, self.known, self.error = ggml, names, known, None
        self.parts = {}  # name -> arrays by tap of each evaluation, in the order of the graph
        kind = importlib.import_module("llama_cpp.llama_cpp").ggml_backend_sched_eval_callback
        self.callback = kind(self._seen)

    def arrays(self, n_tokens):
        """Tap -> values of all evaluations; where two nodes are one tap, of the later."""
        found = {}
        for (name, layer), evaluations in self.parts.items():
            for tap in self.names[name, layer]:
                values = [taps[tap] for taps in evaluations]
                if "T" not in self.known[tap].axes:
                    found[tap] = values[-1]
                    continue
                found[tap] = np.concatenate(values)
                if len(found[tap]) != n_tokens:
                    raise ValueError(f"{name} of layer {layer} has {len(found[tap])} rows in all; there are {n_tokens} "
                                     "tokens")
        return found

    def _seen(self, address, ask, _):
        """llama.cpp asks whether a node is wanted, and then says that it is there."""
        if self.error is None:
            try:
                return self._answer(address, ask)
            except BaseException as error:  # nothing may pass through the C above
                self.error = error
        return False

    def _answer(self, address, ask):
        x = _Tensor.from_address(address)
        if self.ggml.ggml_get_name(address) != x.name:
            raise RuntimeError("this llama-cpp-python has another ggml_tensor than the adapter knows (_Tensor in "
                               "kimi_linear/adapters/llama_cpp.py)")
        name = self._known_as(address, x)
        if name not in self.names:
            return not ask
        if not ask:
            self.parts.setdefault(name, []).append(self._values(address, x, name))
        return True

    def _known_as(self, address, x):
        """(name, layer) of a node: its own, or the ops that made it and the tensor where they begin."""
        own, ops = _own_name(x), []
        if own is not None:
            as_logged = f"{self.ggml.ggml_op_desc(address).decode()} {own[0]}"
            if as_logged not in _MADE_OF and (as_logged, own[1]) in self.names:
                return as_logged, own[1]
            if own in self.names:
                return own
        while x.op and len(ops) < 5:
            op = self.ggml.ggml_op_desc(address).decode()
            if op not in _VIEWS:
                ops.append(op)
            elif not ops:
                return None  # a view of a node is not the node
            address = x.src[op in _WEIGHT_SECOND]
            if not address:
                return None
            x = _Tensor.from_address(address)
            if (own := _own_name(x)) is not None:
                return " ".join([*ops, own[0]]), own[1]
        return None

    def _values(self, address, x, name):
        """Its values, by tap, in our axes."""
        taps = {t: self.known[t] for t in self.names[name]}
        tap, place = next(iter(taps.items()))
        where = f"{name[0]} of layer {name[1]}"
        if tap.endswith("_history"):
            read = self._array(x.src[0], where)  # histories and new columns, the newest last
            return bring(read[..., read.shape[-1] - place.sizes[0]:], taps, Layout("11CW"), where)[0]
        layout, read = Layout("NH" + STATE) if tap.endswith(IS_STATE) else Layout(), self._array(address, where)
        if len(place.sizes) == 1 and read.shape[-2] * read.shape[-1] == place.width:
            read = read.reshape(*read.shape[:-2], -1)  # one value a head, by key head
        return bring(read, taps, layout, where)[0]

    def _array(self, address, where):
        """A copy of a tensor, axes from the slowest to the fastest, whatever its strides."""
        x = _Tensor.from_address(address)
        if x.type not in _DTYPES:
            raise TypeError(f"{where} is of ggml's type {x.type}; it must be one of {', '.join(map(str, _DTYPES))}")
        raw = np.empty(self.ggml.ggml_nbytes(address), np.uint8)
        self.ggml.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
        dtype = np.dtype(_DTYPES[x.type])
        return np.ndarray(tuple(x.ne)[::-1], dtype, raw, strides=tuple(x.nb)[::-1]).copy()


# ---- names ---------------------------------------------------------------------------------------------


def _spread(config):
    """(name, layer) -> taps: the table of logs and `MADE`."""
    return taps_of(config) | spread(MADE, (), config)


def _own_name(x):
    """(name, layer) that the graph's author gave a tensor; None of one that ggml named, or that many share."""
    name = x.name.decode(errors="replace")
    name = (_COPY.fullmatch(name) or ["", name])[1]
    weight, node = _LAYER_OF_WEIGHT.fullmatch(name), _LAYER_OF_NAME.fullmatch(name)
    base = node[1] if node else name
    if base in ("", "norm") or base.startswith("node_") or name.endswith(")"):  # "(view)", "(reshaped)", ...
        return None
    if weight:
        return weight[2], int(weight[1])
    return base, int(node[2]) if node else None


# ---- llama-cpp-python ----------------------------------------------------------------------------------


def _libraries():
    """(llama_cpp, ggml): the bindings, and the library below them with what is called here."""
    try:
        api = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"llama-cpp-python must be installed in this environment ({error})",
                                  name=error.name) from None
    folder = Path(api.__file__).parent / "lib"
    found = [p for p in sorted(folder.glob("*ggml-base*")) if p.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise ModuleNotFoundError(f"{folder} has no library ggml-base, which llama-cpp-python carries")
    ggml, pointer, size = ctypes.CDLL(str(found[0])), ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
            ("ggml_get_name", ctypes.c_char_p, pointer), ("ggml_op_desc", ctypes.c_char_p, pointer),
            ("ggml_nbytes", size, pointer), ("ggml_backend_tensor_get", None, pointer, pointer, size, size)):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    api.llama_backend_init()
    return api, ggml


@contextlib.contextmanager
def quiet(api):
    """What llama.cpp says, kept in a list in place of being printed; then llama-cpp-python prints it again."""
    said = []

    @api.llama_log_callback
    def keep(level, text, _):
        said.append(text.decode(errors="replace"))

    api.llama_log_set(keep, None)
    try:
        yield said
    finally:
        api.llama_log_set(importlib.import_module("llama_cpp._logger").llama_log_callback, None)


def _batch(api, ids):
    """One sequence from position 0, with logits of every token."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    return batch


def _reason(said):
    """The first error that was said, or the last line."""
    lines = [line.strip() for line in "".join(said).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it gives no reason")


def _about():
    return f"llama.cpp of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
