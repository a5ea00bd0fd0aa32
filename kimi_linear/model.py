"""The model: weights, tokenizer and config of a checkpoint, and the forward pass over them."""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import _engine
from ._arrays import as_integers, as_offsets
from .config import Config
from .context import Context, current
from .plan import available_memory, of_core
from .state import State
from .trace import Trace, matches, tap_table

__all__ = ["Model"]


class Model:
    """A Kimi-Linear model over borrowed weights.

    Made by `from_pretrained`, `tiny` or `from_config`. Weights stay where they lie (a file is mapped, not read);
    two Python threads may share a model, each with its own states.

    Attributes
    ----------
    config : Config
    tokenizer : Tokenizer or None
        None for a folder without one: token ids still work.
    generation_config : dict
        As the checkpoint has it.
    activations : str
        ``"float32"``.
    cache : {"float32", "float16"}
        Type of the cache of new states.
    ctx : Context or None
        The context that calls run in; None is the calling thread's own.
    """

    def __init__(self, config, tensors, *, tokenizer=None, generation_config=None, checkpoint=None, name="model",
                 cache="float32", ctx=None):
        self.config = config
        self.tokenizer = tokenizer
        self.generation_config = dict(generation_config or {})
        self.name = name
        self.activations = "float32"
        self.cache = cache
        _engine.cache_type(cache)
        self.ctx = ctx
        self._tensors = tensors
        self._checkpoint = checkpoint
        self._core = _engine.core_model(current(ctx), config, tensors)
        self._taps = tap_table(self._core)

    # ---- from where ----

    @classmethod
    def from_pretrained(cls, path, *, device="cpu", activations="float32", cache="float32", latent_eps=None,
                        threads=None, ctx=None):
        """Open a checkpoint.

        Parameters
        ----------
        path : str or path
            A Hugging Face folder (config.json, safetensors in one file or shards), or a hub id that is in the local
            cache; nothing is downloaded.
        device : {"cpu"}
        activations : {"float32"}
        cache : {"float32", "float16"}
            Type of the latent cache of new states.
        latent_eps : float, optional
            Of the norm inside MLA; 1e-6, as in the training code. llama.cpp, vLLM and SGLang use 1e-5.
        threads : int, optional
            Threads of a context of this model's own; by default the calling thread's context serves it.
        ctx : Context, optional
            The context to run in, instead of `device` and `threads`.

        Raises
        ------
        FormatError
            With everything that is wrong with the files, by tensor name.
        FileNotFoundError
            If there is nothing at `path`.
        """
        import dataclasses

        from .load import open_folder
        from .tokenizer import Tokenizer

        if activations != "float32":
            raise ValueError(f"activations is {activations!r}; this build has 'float32'")
        if ctx is None and (threads is not None or device != "cpu"):
            ctx = Context(device, threads=threads)
        checkpoint = open_folder(path)
        config = checkpoint.config
        if latent_eps is not None:
            config = dataclasses.replace(config, latent_eps=float(latent_eps))
        try:
            tokenizer = Tokenizer.from_folder(checkpoint.path)
        except FileNotFoundError:
            tokenizer = None
        return cls(config, checkpoint.tensors, tokenizer=tokenizer, generation_config=checkpoint.generation_config,
                   checkpoint=checkpoint, name=Path(checkpoint.path).name, cache=cache, ctx=ctx)

    @classmethod
    def tiny(cls, **options):
        """The trained model in the package: 5.6 M parameters, six layers, Biblical English. Options as for
        `from_pretrained`."""
        folder = importlib.resources.files(__package__) / "data" / "tiny"
        return cls.from_pretrained(Path(str(folder)), **options)

    @classmethod
    def from_config(cls, config, seed=0, *, dtype="float32", cache="float32", ctx=None):
        """A random model of a config (a Config, or config.json's dict), for tests and benchmarks.

        Weights are of a size at which every part matters, gates from almost none to strong.
        """
        from .random_weights import random_weights

        config = config if isinstance(config, Config) else Config.from_dict(config)
        return cls(config, random_weights(config, seed, dtype), name=f"random-{seed}", cache=cache, ctx=ctx)

    # ---- what it is ----

    @property
    def weights(self):
        """Mapping from name to tensor, read when asked for."""
        return _Weights(self._tensors)

    @property
    def taps(self):
        """Names of all taps, in the order of the dataflow."""
        return [*self._taps, "logits"]

    def plan(self, *, context=4096, sequences=1, cache=None):
        """Bytes for weights, state and scratch, before anything is taken.

        Returns
        -------
        Plan
        """
        return of_core(self._core, current(self.ctx), context, sequences, cache or self.cache)

    def reference(self):
        """The same model in float64: a ReferenceModel over the same weights."""
        from .reference_model import ReferenceModel

        return ReferenceModel(self.config, self.weights)

    def new_state(self, n=None, *, context=None, cache=None):
        """An empty State, or a list of `n`.

        Parameters
        ----------
        context : int, optional
            Tokens it will hold: their memory is taken at once, and more are refused. By default the cache grows by
            512 positions as they come.
        cache : {"float32", "float16"}, optional
        """
        def one():
            return State(self, cache=cache or self.cache, context=context or 0, ctx=self.ctx)

        return one() if n is None else [one() for _ in range(n)]

    # ---- forward ----

    def forward(self, tokens, *, state=None, offsets=None, logits="all", taps=None, expert_ids=None, check=None):
        """Logits of the next token behind each token.

        Parameters
        ----------
        tokens : (T,) integers, (B, T) integers, or a list of sequences
            Several sequences are a ragged batch: no padding, and each gets the bytes it would get alone.
        state : State or list of State, optional
            One for each sequence; read on from and moved on. Without, each sequence starts empty.
        offsets : (N + 1,) integers, optional
            Where the sequences of a packed `tokens` [T] begin, and the end.
        logits : {"all", "last", "none"} or (n,) integers
            Which rows to compute: all tokens', the last of each sequence, none, or those rows of `tokens`.
        taps : str or list of str, optional
            Globs of intermediates to return as well.
        expert_ids : mapping from layer to (T, k) integers, optional
            Routing to use instead of the router's choice; weights are the router's for those experts.
        check : {"finite"}, optional
            Raise at the first intermediate that is not finite, naming tap, layer, token and channel.

        Returns
        -------
        logits : (T, vocab) float32
            For ``"last"`` (vocab,) a sequence; for ``"none"`` None; in the form of `tokens`: (B, ...) or a list.
        trace : Trace
            Only with `taps`.

        Raises
        ------
        ValueError
            A token id outside the vocabulary (which, where), offsets that fall, an empty sequence with
            ``logits="last"``, a state of another model, given twice, or made for fewer tokens; nothing has been
            read then.
        MemoryError
            If the logits would not fit; nothing has been computed then.
        """
        call = _Call(self, tokens, offsets, logits, state)
        names = [] if taps is None else matches(self.taps, taps)
        arrays = {n: np.empty((call.T, *self._taps[n][2]), self._taps[n][3]) for n in names if n != "logits"}
        out = call.run(arrays, expert_ids, check)
        if taps is None:
            return out
        if "logits" in names:
            arrays["logits"] = call.full_logits()
        return out, Trace(arrays, call.meta())

    __call__ = forward

    def trace(self, tokens, taps="*", *, state=None, offsets=None, expert_ids=None, check=None):
        """The intermediates of a forward pass.

        Parameters
        ----------
        tokens : as for `forward`, or text
        taps : str or list of str
            Globs, such as ``"layers.3.kda.*"``.

        Returns
        -------
        Trace
        """
        if isinstance(tokens, str):
            tokens = self._encode(tokens)
        wanted = matches(self.taps, taps)
        _, trace = self.forward(tokens, state=state, offsets=offsets, logits="all" if "logits" in wanted else "none",
                                taps=taps, expert_ids=expert_ids, check=check)
        return trace

    def generate(self, prompt, **options):
        """Continue a prompt; see `kimi_linear.Generation` for the options.

        Parameters
        ----------
        prompt : str, token ids, or a list of chat messages

        Returns
        -------
        Generation
            Iterating gives pieces of text; then ``.text .tokens .logprobs .finish_reason .stats .state``.
        """
        from .generate import Generation

        return Generation(self, prompt, **options)

    def _encode(self, text):
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer; give token ids")
        return self.tokenizer.encode(text)

    def __repr__(self):
        c = self.config
        kinds = "".join("K" if layer.mixer == "kda" else "M" for layer in c.layers)
        return f"Model({self.name!r}, {kinds}, hidden {c.hidden_size}, vocabulary {c.vocab_size})"


class _Weights(Mapping):
    """Name -> array; a tensor of a file is mapped when it is asked for."""

    def __init__(self, tensors):
        self._tensors = tensors

    def __getitem__(self, name):
        tensor = self._tensors[name]
        return tensor.array() if hasattr(tensor, "file") else np.asarray(tensor)

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


class _Call:
    """One forward call: its sequences in packed form, and the way back to the caller's form."""

    def __init__(self, model, tokens, offsets, logits, state):
        self.model = model
        self.vocab = model.config.vocab_size
        self.form, self.ids, self.offsets = self._pack(tokens, offsets)
        self.T, self.N = len(self.ids), len(self.offsets) - 1
        self.states = self._states(state)
        self.rows = self._rows(logits)
        self._refuse_too_many()

    def _pack(self, tokens, offsets):
        if isinstance(tokens, str):
            raise TypeError("tokens is text; give ids: model.tokenizer.encode(text)")
        nested = isinstance(tokens, (list, tuple)) and len(tokens) > 0 and np.ndim(tokens[0]) == 1
        if nested and offsets is None:
            parts = [as_integers(t, f"tokens[{i}]", ("T",), low=0, high=self.vocab) for i, t in enumerate(tokens)]
            ends = np.cumsum([0] + [len(p) for p in parts]).astype(np.int64)
            return "list", np.concatenate(parts).astype(np.int32), ends
        ids = as_integers(tokens, "tokens", ("T",), ("B", "T"), low=0, high=self.vocab)
        if ids.ndim == 2:
            if offsets is not None:
                raise ValueError("tokens is [B, T] and offsets are given; offsets need tokens [T]")
            B, T = ids.shape
            return "batch", ids.reshape(-1), np.arange(B + 1, dtype=np.int64) * T
        return ("single" if offsets is None else "packed"), ids, as_offsets(offsets, len(ids))

    def _states(self, state):
        if state is None:
            return [self.model.new_state() for _ in range(self.N)]
        states = list(state) if isinstance(state, (list, tuple)) else [state]
        if len(states) != self.N:
            raise ValueError(f"state has {len(states)} states; it must have one for each of {self.N} sequences")
        for i, s in enumerate(states):
            if not isinstance(s, State):
                raise TypeError(f"state[{i}] is a {type(s).__name__}; it must be a State")
        return states

    def _rows(self, logits):
        self.which = logits if isinstance(logits, str) else "rows"
        if self.which == "all":
            return np.arange(self.T, dtype=np.int64)
        if self.which == "none":
            return np.zeros(0, np.int64)
        if self.which == "last":
            empty = np.flatnonzero(np.diff(self.offsets) == 0)
            if empty.size:
                raise ValueError(f"tokens: sequence {empty[0]} is empty; logits='last' needs a token in each")
            return self.offsets[1:] - 1
        if isinstance(logits, str):
            raise ValueError(f"logits is {logits!r}; it must be 'all', 'last', 'none' or rows")
        rows = as_integers(logits, "logits", ("n",), dtype=np.int64, low=0, high=self.T)
        if (np.diff(rows) <= 0).any():
            raise ValueError("logits: rows must rise")
        return rows

    def _refuse_too_many(self):
        wanted, free = len(self.rows) * self.vocab * 4, available_memory()
        if free is not None and wanted > free:
            raise MemoryError(
                f"logits of {len(self.rows)} tokens x {self.vocab} are {wanted / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free; ask for logits='last' or rows"
            )

    def run(self, arrays, expert_ids, check):
        if check not in (None, "finite"):
            raise ValueError(f"check is {check!r}; it must be None or 'finite'")
        model = self.model
        if model._checkpoint is not None:
            model._checkpoint.check_unchanged()
        table = model._taps
        taps = [(table[n][0], table[n][1], a) for n, a in arrays.items()] or None
        self.done = np.zeros(self.N, np.int64)
        self.values = np.empty((len(self.rows), self.vocab), np.float32)
        ctx = current(model.ctx)
        model._core.forward(
            ctx._core, [s._core for s in self.states], self.ids, self.offsets, self.T, self.values, self.rows,
            len(self.rows), taps, self._experts(expert_ids), int(check == "finite"), 0, self.done,
        )
        return self._form(self.values)

    def _experts(self, expert_ids):
        if expert_ids is None:
            return None
        given = []
        c = self.model.config
        for layer, ids in expert_ids.items():
            if f"layers.{layer}.moe.ids" not in self.model._taps:
                raise ValueError(f"expert_ids: layer {layer} has no mixture of experts")
            _, tap, shape, _ = self.model._taps[f"layers.{layer}.moe.ids"]
            a = as_integers(ids, f"expert_ids[{layer}]", (self.T, *shape), low=0, high=c.n_experts)
            given.append((layer, tap, np.sort(a, axis=-1)))
        return given

    def _form(self, values):
        if self.which == "none":
            return None
        if self.which == "rows" or self.form == "packed":
            return values
        if self.which == "last":
            return values[0] if self.form == "single" else list(values) if self.form == "list" else values
        if self.form == "single":
            return values
        if self.form == "batch":
            return values.reshape(self.N, -1, self.vocab)
        return [values[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def full_logits(self):
        if self.which != "all":
            raise ValueError("taps: 'logits' needs logits='all'")
        return self.values

    def meta(self):
        return {
            "model": self.model.name, "tokens": self.ids.tolist(), "offsets": self.offsets.tolist(),
            "source": "kimi_linear", "dtype": "float32",
        }
