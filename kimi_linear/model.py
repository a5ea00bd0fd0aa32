"""The model: weights, tokenizer and config of a checkpoint, and the forward pass over them."""

import functools
import importlib.resources
import threading
import warnings
from pathlib import Path

import numpy as np

from . import _engine
from ._arrays import as_integers
from ._call import Call, tap_names
from ._scalars import at_least
from .config import Config, layer_pattern
from .context import Context, check_activations, current
from .errors import FormatError
from .perplexity import log_probs
from .plan import of_core
from .state import State
from .tokenizer import Tokenizer
from .trace import PASS, matches, on_request, stream, tap_table
from .weights import Weights

__all__ = ["Model"]


class Model:
    """A Kimi-Linear model over borrowed weights.

    Made by `from_pretrained`, `tiny` or `from_config`. Weights stay where they lie (a file is mapped, not read);
    two Python threads may share a model, each with its own states.

    Attributes
    ----------
    config : Config
    tokenizer : Tokenizer or None
        None for a checkpoint without one, or that lacks one of its files, which what needs it then names: token ids
        still work, as they do where asking for it raises. FormatError says what is wrong with its files, the template
        included, or why a GGUF's tokens do not give exact ids; a GGUF's is built when it is first asked for. A
        tokenizer.json needs the package `tokenizers`, and raises ModuleNotFoundError without it.
    generation_config : dict
        As the checkpoint has it.
    activations : {"float32", "int8", "bfloat16"}
    cache : {"float32", "float16", "q8_0"}
        Type of the cache of new states.
    ctx : Context or None
        The context that calls run in; None is the calling thread's own.
    """

    def __init__(self, config, tensors, *, tokenizer=None, generation_config=None, checkpoint=None, name="model",
                 cache="float32", activations="float32", ctx=None, progress=None):
        self.config = config
        self._tokenizer = tokenizer
        self._opened_tokenizer = tokenizer, getattr(tokenizer, "chat_template", None)
        self._missing_tokenizer_file = None
        self.generation_config = dict(generation_config or {})
        self.name = name
        check_activations(activations)
        self.activations = activations
        self.cache = cache
        _engine.cache_type(cache)
        self.ctx = ctx
        self._tensors, self._replaced = tensors, {}
        self._checkpoint = checkpoint
        self._building = threading.Lock()
        self._built = _engine.core_model(current(ctx), config, tensors, activations, progress)
        self._taps = tap_table(self._built)

    # ---- from where ----

    @classmethod
    def from_pretrained(cls, path, *, device="cpu", activations="float32", cache="float32", latent_eps=None,
                        l2_eps=None, threads=None, ctx=None, progress=None):
        """Open a checkpoint.

        Parameters
        ----------
        path : str or path
            A Hugging Face folder (config.json, safetensors in one file or shards), a hub id that is in the local
            cache, or a GGUF file of any name, one part of several included; nothing is downloaded.
        device : str
            As for `Context`. On another device than "cpu" the weights are uploaded once, here; a mapped file is read by
            that.
        activations : {"float32", "int8", "bfloat16", "auto"}
            What products make of their activations: nothing, which is exact; with weights in blocks, int8 with a scale
            for each 32 values (docs/math.md#int8); with weights in bfloat16, that (docs/math.md#bfloat16). Both are
            fast, and other weights take float32; attention is in 16-bit fixed point with both (docs/math.md#fixed), and
            in float32 on a device. "auto" is int8 where there are weights in blocks, bfloat16 where there are
            matrices in that, else float32.
        cache : {"float32", "float16", "q8_0"}
            Type of the latent cache of new states: docs/state.md#the-caches-type.
        latent_eps : float, optional
            Of the norm inside MLA; 1e-6, as in the training code. llama.cpp, vLLM and SGLang use 1e-5.
        l2_eps : float, optional
            Of the L2 norms of q and k inside KDA; 1e-6, as in the training code. llama.cpp uses 1e-5.
        threads : int, optional
            Threads of a context of this model's own; by default the calling thread's context serves it.
        ctx : Context, optional
            The context to run in, instead of `device` and `threads`.
        progress : callable, optional
            Called with the bytes that are on the device and the bytes of all, after the embedding and after each layer;
            not where weights stay in the host's memory. What it raises ends the loading.

        Raises
        ------
        FormatError
            With everything that is wrong with the files, by tensor name; with a tokenizer's when that is asked for.
        FileNotFoundError
            If there is nothing at `path`.
        ValueError
            If `ctx` is given beside `threads` or another `device`.
        """
        import dataclasses

        from .load import open_checkpoint
        from .load.checkpoint import missing_tokenizer_file

        if activations != "auto":
            check_activations(activations)
        if ctx is not None and threads is not None:
            raise ValueError(f"threads is {threads} and ctx is given; a context has its own threads: give one of them")
        if ctx is not None and device not in ("cpu", ctx.device):
            raise ValueError(f"device is {device!r} and ctx is of {ctx.device!r}; give one of them")
        if ctx is None and (threads is not None or device != "cpu"):
            ctx = Context(device, threads=threads)
        checkpoint = open_checkpoint(path)
        if activations == "auto":
            activations = checkpoint.fast_activations
        config = checkpoint.config
        given = {"latent_eps": latent_eps, "l2_eps": l2_eps}
        config = dataclasses.replace(config, **{k: float(v) for k, v in given.items() if v is not None})
        tokenizer, missing = checkpoint.tokenizer, None
        if checkpoint.path.is_dir():
            try:
                tokenizer = Tokenizer.from_folder(checkpoint.path)
            except FileNotFoundError:
                missing = missing_tokenizer_file(checkpoint.path)
            except (FormatError, ModuleNotFoundError):  # said again when the tokenizer is asked for
                tokenizer = functools.partial(Tokenizer.from_folder, checkpoint.path)
        model = cls(config, checkpoint.tensors, tokenizer=tokenizer, generation_config=checkpoint.generation_config,
                    checkpoint=checkpoint, name=checkpoint.name, cache=cache, activations=activations, ctx=ctx,
                    progress=progress)
        model._missing_tokenizer_file = missing
        return model

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
    def tokenizer(self):
        """The Tokenizer, or None; see the class."""
        if self._tokenizer is not None and not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = made = self._tokenizer()
            self._opened_tokenizer = made, made.chat_template
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value):
        self._tokenizer = value

    @property
    def files(self):
        """The mapped files that hold the weights; none for a model made from a config."""
        return self._checkpoint.files if self._checkpoint else ()

    @property
    def weights(self):
        """Mapping from name to tensor, read when asked for; ``model.weights[name] = array`` replaces one.

        The array is copied, and must have the tensor's shape; float32, float16 and bfloat16 will do, and all experts of
        a matrix of a layer must be of one type: ``array.astype(weights[name].dtype)`` for one alone. The next call
        uses it; ``del model.weights[name]`` puts back the first. States made before belong to the old weights: a call
        that gets one raises ValueError.
        """
        return Weights(self)

    @property
    def _core(self):
        """The model in C; made again after a weight was replaced."""
        with self._building:
            if self._built is None:
                self._built = _engine.core_model(current(self.ctx), self.config, self._tensors, self.activations)
            return self._built

    def _replace(self, name, array):
        with self._building:
            self._replaced.setdefault(name, self._tensors[name])
            self._tensors = {**self._tensors, name: array}
            self._built = None

    def _restore(self, name):
        with self._building:
            if name in self._replaced:
                self._tensors = {**self._tensors, name: self._replaced.pop(name)}
                self._built = None

    @property
    def taps(self):
        """Names of all taps, in the order of the dataflow; those on request (`trace`) are not among them."""
        return [*(name for name in self._taps if not on_request(name)), "logits"]

    def plan(self, *, context=4096, sequences=1, cache=None, keep=0):
        """Bytes for weights, state and scratch, before anything is taken, and those that a decoded token reads.

        Returns
        -------
        Plan
        """
        return of_core(self._core, current(self.ctx), context, sequences, cache or self.cache, keep=keep,
                       config=self.config, tensors=self._tensors)

    def reference(self):
        """The same model in float64: a ReferenceModel over the same weights."""
        from .reference_model import ReferenceModel

        return ReferenceModel(self.config, self.weights)

    def new_state(self, n=None, *, context=None, cache=None, checkpoints_every=None, keep=0):
        """An empty State, or a list of `n`.

        Parameters
        ----------
        context : int, optional
            Tokens it will hold: their memory is taken at once, and more are refused. By default the cache grows by
            512 positions as they come.
        cache : {"float32", "float16", "q8_0"}, optional
        checkpoints_every : int, optional
            Keep a copy of what does not grow at each so many tokens (the next end of 64 of a call's own tokens, or of
            the call), for ``state.truncate``. No other byte changes.
        keep : int
            How many of them: the newest; their memory is taken at once (``plan(keep=).checkpoints``). 0 with
            `checkpoints_every` is 4.
        """
        def one():
            return State(self, cache=cache or self.cache, context=context or 0, checkpoints_every=checkpoints_every,
                         keep=keep, ctx=self.ctx)

        if n is None:
            return one()
        return [one() for _ in range(at_least(n, 0, "n", "None, or an int"))]

    def load_state(self, path, **options):
        """A State from a file that ``state.save`` wrote; options as for `State.load`."""
        return State.load(path, self, **options)

    # ---- forward ----

    def forward(self, tokens=None, *, state=None, offsets=None, logits="all", taps=None, edit=None, embeds=None,
                start=None, stop=None, expert_ids=None, check=None):
        """Logits of the next token behind each token.

        Parameters
        ----------
        tokens : (T,) integers, (B, T) integers, or a list of sequences
            Several sequences are a ragged batch: no padding, and each gets the bytes it would get alone. May be left
            out where `embeds` are given.
        state : State or list of State, optional
            One for each sequence; read on from and moved on. Without, each sequence starts empty.
        offsets : (N + 1,) integers, optional
            Where the sequences of a packed `tokens` [T] begin, and the end.
        logits : {"all", "last", "none"} or (n,) integers
            Which rows to compute: all tokens', the last of each sequence, none, or those rows of `tokens`.
        taps : str or list of str, optional
            Globs of intermediates to return as well; see `trace`.
        edit : mapping from tap to array or function, optional
            Intermediates to replace, by glob (see `trace`): an array of exactly the tap's shape [T, ...], or a function
            from rows of it to rows of that shape. It is called once a pass (up to 512 tokens) and sequence with a copy
            of its rows [n, ...], which it may change in place but must return: None is refused. A function of two
            arguments gets their place, too: ``place.position`` [n] in their sequences, what a state has read before
            included, and ``place.sequence`` [n]; row 0 of a later pass is not token 0. Several changes of one
            tap are made in the order given. New ``moe.ids`` are weighed by the router's scores. The rest of the pass,
            taps and the state see the new values. ``"logits"`` are changed last, all rows in one call, when the states
            have moved on.
        embeds : (T, D), (B, T, D) or list of (T, D) float32, optional
            Rows to use instead of those of the embedding; with `start` above 0 the residual stream that enters it.
            Where `tokens` are given, too, a batch or a list is cut as they are.
        start, stop : int, optional
            Run layers start..stop-1 alone. Short of the last layer the value is the residual stream [T, D] that leaves
            layer stop-1, in place of logits. ``start=n_layers`` is the final norm and the head alone: the logits that
            any layer's stream would give. A part of the layers moves no state of the caller's. With attention residuals
            the stream between layers, given or returned, is [T, n + 1, D]: its n snapshots, oldest first, then what has
            been added up since the last.
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
            ``logits="last"``, a state of another model, given twice, or made for fewer tokens, an edit of a tap that
            is not there or of another shape; nothing has been read then.
        TypeError
            An edit or embeds of another type than the tap's.
        MemoryError
            If the logits would not fit; nothing has been computed then.
        Exception
            Whatever a function of `edit` raises: the states then stand at the end of the pass before (of "logits", at
            the end of the call).
        """
        call = Call(self, tokens, offsets=offsets, logits=logits, state=state, embeds=embeds, start=start, stop=stop)
        if taps is None:
            return call.run({}, edit, expert_ids, check)
        return call.trace(taps, edit, expert_ids, check)

    __call__ = forward

    def trace(self, tokens, taps="*", *, to=None, tokens_slice=None, states=None, state=None, offsets=None, edit=None,
              expert_ids=None, check=None, progress=None):
        """The intermediates of a forward pass, which ends with the last layer that makes one, unless it has a state to
        move on, or edits, expert ids or checks to be told about.

        Two are made only on request, by their whole name or a glob such as ``*.probs``: ``layers.3.moe.scores`` [T, E],
        the router's sigmoids or softmax before its bias (`ops.route` takes the logits), and ``layers.3.mla.probs`` or
        ``attn.probs`` [T, H, S], what each token of one sequence attends to (float64 from the taps, rounded once).

        Parameters
        ----------
        tokens : as for `forward`, or text
        taps : str or list of str
            Globs, such as ``"layers.3.kda.*"``. ``*`` crosses dots: ``layers.*.out`` is ``layers.3.kda.out``, too.
        to : str or path, optional
            Write the trace to this safetensors file as it is made: it may be larger than memory. The file's size is
            checked against the free disk before work starts, and it takes its name when it is whole. One sequence,
            without ``probs``.
        tokens_slice : slice, optional
            Keep only these rows of `tokens`, one sequence; the tokens before are read, those behind only for `state`.
        states : bool, or str or list of str, optional
            Keep state arrays, all or by globs of their names: ``before.layers.2.kda.state`` is what the first kept
            token found, ``layers.2.kda.state`` what the last left, for `kimi_linear.diff.step`. The kept tokens are
            then calls of their own. A KDA layer costs twice H K V + 3 (W - 1) H K values, 4.3 MiB at 32 heads of 128;
            an MLA layer 2 (R + P) a token that was read, 22 MiB at position 5,000. One sequence.
        edit, state, offsets, expert_ids, check : as for `forward`
        progress : callable, optional
            With `to`, `tokens_slice` or `states`: called with tokens read and tokens in all, after each 512.

        Returns
        -------
        Trace
            With `to`, read from the file when asked.

        Raises
        ------
        OSError
            If the file would not fit on its disk, or cannot be written; nothing is left under its name.
        """
        if isinstance(tokens, str):
            tokens = self._encode(tokens)
        options = dict(state=state, edit=edit, expert_ids=expert_ids, check=check)
        if states is False:
            states = None
        if to is not None or tokens_slice is not None or states is not None:
            if offsets is not None:
                raise ValueError("offsets are given; to, tokens_slice and states need one sequence")
            return stream(self, tokens, taps, to, tokens_slice, progress, states=states, **options)
        wanted = matches([*tap_names(self._taps), "logits"], taps)
        stop = None if any(value is not None for value in options.values()) else self._last_layer(wanted) + 1
        _, trace = self.forward(tokens, offsets=offsets, logits="all" if "logits" in wanted else "none", taps=wanted,
                                stop=stop, **options)
        return trace

    def _last_layer(self, names):
        """The last layer that makes one of these taps."""
        if "norm" in names or "logits" in names:
            return self.config.n_layers - 1
        return max((int(name.split(".")[1]) for name in names if name.startswith("layers.")), default=0)

    def logprobs(self, tokens):
        """Log-probability of each token but the first, given those before it; logits of 512 tokens at a time.

        Parameters
        ----------
        tokens : (T,) integers, or text

        Returns
        -------
        logprobs : (T - 1,) float64
            In nats: ``log_softmax(logits)[t, tokens[t + 1]]``, in float64 from float32 logits.

        Raises
        ------
        ValueError
            No token, an id outside the vocabulary, or logits that are not finite.
        """
        ids = self._encode(tokens) if isinstance(tokens, str) else tokens
        ids = as_integers(ids, "tokens", ("T",), low=0, high=self.config.vocab_size)
        if len(ids) == 0:
            raise ValueError("tokens is empty; it must have a token or more")
        state, parts = self.new_state(), [np.zeros(0)]
        for begin in range(0, len(ids) - 1, PASS):
            piece = ids[begin : min(begin + PASS, len(ids) - 1)]
            parts.append(log_probs(self.forward(piece, state=state), ids[begin + 1 : begin + 1 + len(piece)]))
        return np.concatenate(parts)

    def save_pretrained(self, folder, *, overwrite=False):
        """Write the model as a Hugging Face folder: config.json, safetensors (in shards of 5e9 bytes), the tokenizer's
        files and generation_config.json. `from_pretrained` gives the same config and the same bytes.

        What fails, Ctrl-C included, leaves what was in the folder.

        Parameters
        ----------
        folder : str or path
            Made if it is not there.
        overwrite : bool
            Whether a checkpoint that is there may be replaced: its files are removed, the tokenizer's too. Others
            stay.

        Raises
        ------
        FileExistsError
            If a file of a checkpoint is there and `overwrite` is False, or what is no file has the name of one.
        FormatError
            If a file of the model's has changed since it was opened.
        ValueError
            If a value of `generation_config` has no JSON.
        OSError
            If it would not fit on the disk, or cannot be written.
        """
        from .saving import save_pretrained

        save_pretrained(self, folder, overwrite)

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

    def _call(self, tokens):
        """A call that only asks what a pass over `tokens` makes."""
        return Call(self, tokens, logits="none")

    def _tokenizer_or_none(self, instead):
        """The tokenizer; where it cannot be made None, after a warning that says what is done instead."""
        try:
            return self.tokenizer
        except (FormatError, ModuleNotFoundError) as error:
            warnings.warn(f"{self.name} has no tokenizer, so {instead}: {error}", stacklevel=4)
            return None

    def _encode(self, text):
        if self.tokenizer is None:
            raise ValueError(f"{self._has_no_tokenizer}; give token ids")
        return self.tokenizer.encode(text)

    @property
    def _has_no_tokenizer(self):
        """A sentence's beginning, which says what its folder lacks."""
        missing = self._missing_tokenizer_file
        why = f": {missing} is missing in its folder, which has other files of one" if missing else ""
        return f"{self.name} has no tokenizer{why}"

    def _tokenizer_is_as_opened(self):
        """Whether the tokenizer is that of the checkpoint, with its chat template."""
        tokenizer, template = self._opened_tokenizer
        return self._tokenizer is tokenizer and getattr(tokenizer, "chat_template", None) == template

    def __copy__(self):
        """Another Model over the same weights; one that is replaced in either leaves the other as it is."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _building=threading.Lock(), generation_config=dict(self.generation_config))
        return twin

    def __deepcopy__(self, memo):
        return self.__copy__()

    def __reduce__(self):
        raise TypeError(f"{self.name} borrows its weights and is not pickled; open it with from_pretrained in each "
                        "process, or fork")

    def __repr__(self):
        c = self.config
        return f"Model({self.name!r}, {layer_pattern(c)}, hidden {c.hidden_size}, vocabulary {c.vocab_size})"
