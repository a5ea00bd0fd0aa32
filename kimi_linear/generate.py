"""Generation: from prompts to tokens and text, a piece at a time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import ops
from ._arrays import as_integers
from ._scalars import as_whole, at_least, of_json
from .editing import takes_place
from .errors import FormatError
from .sampling import Sampler, StopStrings, logprobs_of, settings
from .state import State

__all__ = ["Generation", "Stats"]

PIECE = 512  # tokens of a prompt between two words of progress: a multiple of 64, so the bytes are those of one call
SAMPLES = 1 << 16  # of a prompt at most


@dataclass
class Stats:
    """What a generation cost.

    prompt_tokens : tokens of the prompts that were read
    reused_tokens : tokens of the prompts that the states had read before
    new_tokens : tokens generated
    sequences : how many
    prefill_seconds, decode_seconds : wall time of each part
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    sequences: int = 1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self):
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self):
        """New tokens a second, after the first of each sequence."""
        steps = self.new_tokens - self.sequences
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


class Generation:
    """A generation under way: iterate it for pieces of text, then read what became of it.

    One prompt gives pieces of text; a batch, or ``n > 1``, gives (index, piece) pairs, and the attributes below
    become lists, prompt by prompt and in each sample by sample. Sequences leave the batch as they end; a step of all
    that are left is one ragged forward call, in which each gets the bytes that it would get alone.

    Parameters
    ----------
    model : Model
    prompt : str, (T,) integers, list of messages, or a list of those
        Text, token ids, or chat messages (``{"role": ..., "content": ...}``), which go through the chat template; a
        list of any of them is a batch.
    max_new_tokens : int
        Of each sequence. A state made for a context ends it earlier, where that is full.
    temperature : float, optional
        0 takes the likeliest token (greedy). By default the checkpoint's, else 0 where it says not to sample.
    top_k, top_p, min_p : optional
        Keep the k likeliest; the smallest set of at least this probability; those of at least this share of the
        likeliest. Not without a temperature above 0, given or the checkpoint's.
    repetition_penalty : float, optional
        Logits of tokens in the prompt and generated so far are divided by it where positive, else multiplied;
        before the temperature. 1 changes nothing; from 1e-30 to 1e30.
    seed : int or list of int, optional
        One for all prompts or one for each; by default 0. A token is drawn by (seed, sample, position in the
        sequence) alone, so the same seed gives the same text, alone or in a batch; equal prompts with one seed give
        equal texts, and samples of one prompt (`n`) differ.
    n : int
        Samples of each prompt, 65,536 at most. It is read once and its state forked; the first sample is that of
        ``n=1``.
    stop : str or sequence of str, optional
        End where one of these appears, also across tokens, or where it names a special token, at that token. It is not
        shown; what may be the beginning of one is held back. `tokens` has every token drawn.
    logprobs : int
        k >= 1 fills `logprobs` and the k likeliest into `top_logprobs`: of the model's own logits, before penalty,
        processor and temperature. 0 leaves both empty, and costs nothing.
    logits_processor : callable, optional
        ``processor(ids, logits)``, called for each token with all ids so far and a float32 copy of the logits
        [vocab], after the penalty: returns logits, -inf masking a token, or None where it changed the copy.
    edit : mapping from tap to function, optional
        Intermediates to change while prompt and new tokens are read, as for `Model.forward`: ``{"layers.3.out": lambda
        x: x + vector}`` steers. ``place.sequence`` is the index of the pieces; samples of one prompt share that of the
        first while it is read. What `state` has read before stays as it was read.
    tools : list of dict, optional
        Descriptions of functions, for messages alone.
    template_options : mapping, optional
        Variables for the chat template, for messages alone: ``{"enable_thinking": False}``.
    state : State or list of State, optional
        One for each prompt. The longest common prefix of what it has read and the prompt is reused; from there the
        prompt is read, and the state moved on. It goes back to its newest checkpoint inside that prefix (or is
        emptied); with ``keep`` it is given a checkpoint before the prompt is read, and behind it.
    prompt_logits : (vocab,) float32, optional
        The logits behind the prompt, as an earlier generation's `prompt_logits`: a state that can go back to the end
        of the prompt then reads nothing.
    progress : callable, optional
        ``progress(tokens, total)`` while prompts are read, from 0 tokens to all.
    stop_at_eos : bool
        End at an end token (the union of the config's, the generation config's and ``<|im_end|>``).

    Attributes
    ----------
    text : str
        All pieces so far; without a tokenizer, the ids. Where a model has more rows than its tokenizer has ids, these
        rows are padding, and none is drawn.
    tokens : list of int
        New tokens, the end token included. The last is not in the state yet.
    logprobs : list of float
    top_logprobs : list of lists of (id, float)
    finish_reason : {None, "stop", "length", "interrupted"}
    prompt_ids : (T,) int32
    prompt_logits : (vocab,) float32 or None
    state : State
    stats : Stats
        Of all sequences together.

    Raises
    ------
    TypeError, ValueError
        For arguments that are wrong, before anything is read; while it runs, for logits that are not finite or all
        masked, by the position of the token that cannot be drawn.
    FormatError, ModuleNotFoundError
        If the model's tokenizer cannot be made, and the prompt is not of ids alone: those go on without it, after a
        warning.
    """

    def __init__(self, model, prompt, *, max_new_tokens=256, temperature=None, top_k=None, top_p=None, min_p=None,
                 repetition_penalty=None, seed=None, n=1, stop=(), logprobs=0, logits_processor=None, edit=None,
                 tools=None, template_options=None, state=None, prompt_logits=None, progress=None,
                 stop_at_eos=True):
        self.model = model
        self.max_new_tokens = at_least(max_new_tokens, 1, "max_new_tokens")
        self.n = at_least(n, 1, "n", largest=SAMPLES)
        self.top = at_least(logprobs, 0, "logprobs")
        self.sampling = settings(model.generation_config, temperature=temperature, top_k=top_k, top_p=top_p,
                                 min_p=min_p, repetition_penalty=repetition_penalty)
        many = _is_batch(prompt)
        prompts = list(prompt) if many else [prompt]
        of_ids = not any(isinstance(p, str) or _is_messages(p) for p in prompts)
        self._tokenizer = model._tokenizer_or_none("ids are shown") if of_ids else model.tokenizer
        self.stop = _stop_strings(stop, model, self._tokenizer)
        if logits_processor is not None and not callable(logits_processor):
            raise TypeError(f"logits_processor is a {type(logits_processor).__name__}; it must be callable")
        self._edit = _functions(edit, model)
        self.stop_ids = _stop_ids(model, self._tokenizer) if stop_at_eos else frozenset()
        self.stop_ids |= {self._tokenizer.special_ids[s] for s in self.stop if s in self._tokenizer.special_ids}
        if not prompts:
            raise ValueError("prompt is a batch of none; it must have a prompt or more")
        self.is_batch = many or self.n > 1
        states = self._states(state, len(prompts), many)
        seeds = _seeds(seed, len(prompts))
        self.seed = seeds if many and np.iterable(seed) else seeds[0]
        self._progress = progress
        self._known = self._known_logits(prompt_logits)
        self.stats = Stats(sequences=len(prompts) * self.n)
        self._sequences = []
        chat = {"tools": tools, "template_options": template_options}
        for i, (p, own, s) in enumerate(zip(prompts, states, seeds, strict=True)):
            ids = self._ids(p, chat, own, f"prompt[{i}]" if many else "prompt")
            for sample in range(self.n):
                sampler = Sampler(self.sampling, s, sample, logits_processor, ids, model.config.vocab_size, model.ctx)
                state = own if sample == 0 else None
                self._sequences.append(_Sequence(len(self._sequences), model, self._tokenizer, ids, state, sampler,
                                                 self.stop))
        self._pieces = self._run()

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._pieces)

    def __repr__(self):
        written = self.text if not self.is_batch else f"{len(self._sequences)} sequences"
        if not self.stats.new_tokens:
            return "Generation(nothing is generated yet: iterate it for pieces, or .run().text)"
        return f"Generation({written!r}, {self.stats.new_tokens} tokens, finish_reason={self.finish_reason!r})"

    def run(self):
        """Generate to the end and return self: ``model.generate(prompt).run().text``."""
        for _ in self:
            pass
        return self

    def close(self):
        """End it here; what has not ended is ``"interrupted"``."""
        self._pieces.close()
        self._interrupt()

    # ---- what became of it ----

    def _each(self, name):
        values = [getattr(s, name) for s in self._sequences]
        return values if self.is_batch else values[0]

    text = property(lambda self: self._each("text"), doc="All pieces so far.")
    tokens = property(lambda self: self._each("tokens"), doc="New tokens.")
    logprobs = property(lambda self: self._each("logprobs"), doc="Log-probability of each new token.")
    top_logprobs = property(lambda self: self._each("top_logprobs"), doc="The likeliest at each new token.")
    finish_reason = property(lambda self: self._each("finish_reason"), doc="Why it ended, or None.")
    prompt_ids = property(lambda self: self._each("prompt_ids"), doc="The prompt's ids.")
    prompt_logits = property(lambda self: self._each("prompt_logits"), doc="Logits behind the prompt, once it is read.")
    state = property(lambda self: self._each("state"), doc="The state that is moved on.")

    # ---- arguments ----

    def _ids(self, prompt, chat, state, name):
        """The prompt's ids; `chat` are options of the template, for messages alone."""
        model = self.model
        if _is_messages(prompt):
            if self._tokenizer is None:
                raise ValueError(f"{model._has_no_tokenizer}; give token ids, not messages")
            text = self._tokenizer.apply_chat_template(prompt, **chat)
            ids = _encode_behind(self._tokenizer, text, [] if state is None else state.tokens)
        else:
            ids = model._encode(prompt) if isinstance(prompt, str) else prompt
            for option, value in chat.items():
                if value is not None:
                    what = "text" if isinstance(prompt, str) else "no list of messages"
                    raise ValueError(f"{option} is given and {name} is {what}; only messages go through the template")
        ids = as_integers(ids, name, ("T",), low=0, high=model.config.vocab_size)
        if len(ids) == 0:
            raise ValueError(f"{name} is empty; it must have a token or more")
        if state is not None and 0 < state._context < len(ids):
            raise ValueError(f"{name} has {len(ids)} tokens; its state was made for a context of {state._context}")
        return ids

    def _states(self, state, n_prompts, many):
        if state is None:
            return [None] * n_prompts
        states = list(state) if many and isinstance(state, (list, tuple)) else [state]
        if len(states) != n_prompts:
            raise ValueError(f"state has {len(states)} states; it must have one for each of {n_prompts} prompts")
        for i, s in enumerate(states):
            if not isinstance(s, State):
                raise TypeError(f"state[{i}] is a {type(s).__name__}; it must be a State")
            if s._owner is not self.model._core:
                raise ValueError(f"state[{i}] is of another model, or of weights that were replaced since")
            if any(s is other for other in states[:i]):
                raise ValueError(f"state[{i}] is given twice; each prompt needs its own")
        return states

    def _known_logits(self, logits):
        if logits is None:
            return None
        if self.is_batch:
            raise ValueError("prompt_logits are given; they are for one prompt and n=1")
        logits = np.asarray(logits)
        if logits.dtype != np.float32 or logits.shape != (self.model.config.vocab_size,):
            raise ValueError(f"prompt_logits is {logits.dtype} {list(logits.shape)}; it must be float32 "
                             f"[{self.model.config.vocab_size}]")
        return logits

    # ---- the run ----

    def _run(self):
        try:
            begin = time.perf_counter()
            logits = self._prefill()
            self.stats.prefill_seconds = time.perf_counter() - begin
            live = self._sequences
            while live:
                for sequence, row in zip(live, logits, strict=True):
                    yield from self._shown(sequence.index, self._advance(sequence, row))
                live = [sequence for sequence in live if sequence.finish_reason is None]
                if live:
                    logits = self._step(live)
        except KeyboardInterrupt:
            self._interrupt()
            raise

    def _interrupt(self):
        for sequence in self._sequences:
            sequence.finish_reason = sequence.finish_reason or "interrupted"

    def _shown(self, i, piece):
        if piece:
            yield (i, piece) if self.is_batch else piece

    def _prefill(self):
        """Reads the prompts, each once; the logits behind each sequence's prompt."""
        first = self._sequences[:: self.n]
        reused = [sequence.rewind(self._known is not None) for sequence in first]
        rests = [sequence.prompt_ids[at:] for sequence, at in zip(first, reused, strict=True)]
        if len(rests[0]):
            rows = self._read(first, rests)
        else:
            rows = [self._known]
        self.stats.reused_tokens = sum(reused)
        self.stats.prompt_tokens = sum(map(len, rests))
        for sequence in first:
            sequence.mark()
        for k, sequence in enumerate(self._sequences):
            sequence.prompt_logits = rows[k // self.n].copy()
            if k % self.n:
                sequence.state = first[k // self.n].state.fork()
        return [sequence.prompt_logits for sequence in self._sequences]

    def _read(self, sequences, rests):
        """The logits behind what is left of each prompt; in pieces where somebody watches."""
        longest, total, done = max(map(len, rests)), sum(map(len, rests)), 0
        tell = self._progress or (lambda tokens, total: None)
        piece = PIECE if self._progress else longest
        rows = [None] * len(rests)
        tell(0, total)
        for at in range(0, longest, piece):
            live = [i for i, rest in enumerate(rests) if len(rest) > at]
            pieces = [rests[i][at:at + piece] for i in live]
            found = self._forward(pieces, [sequences[i] for i in live])
            for i, row in zip(live, found, strict=True):
                rows[i] = row
            done += sum(map(len, pieces))
            tell(done, total)
        return rows

    def _step(self, live):
        """Reads the newest token of each; the logits behind it."""
        begin = time.perf_counter()
        tokens = np.array([[sequence.tokens[-1]] for sequence in live], np.int32)
        logits = self._forward(tokens, live)
        self.stats.decode_seconds += time.perf_counter() - begin
        return logits

    def _forward(self, tokens, sequences):
        """The logits behind new tokens of these sequences."""
        edit = {tap: _placed(f, sequences) for tap, f in self._edit.items()}
        return self.model.forward(tokens, state=[sequence.state for sequence in sequences], logits="last", edit=edit)

    def _advance(self, sequence, logits):
        """Draws a token; the text that it lets show."""
        token = sequence.draw(logits, self.top)
        self.stats.new_tokens += 1
        ended = token in self.stop_ids
        piece = "" if ended else sequence.push(token)
        if ended or sequence.stops.met:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) == self.max_new_tokens or sequence.is_full():
            sequence.finish_reason = "length"
        return piece if sequence.finish_reason is None else piece + sequence.finish()


class _Sequence:
    """One sequence of a generation: its state, and what it has written."""

    def __init__(self, index, model, tokenizer, ids, state, sampler, stop):
        self.index = index
        self.prompt_ids, self.prompt_logits = ids, None
        self.state = model.new_state() if state is None else state
        self.sampler = sampler
        self.known = model.config.vocab_size if tokenizer is None else len(tokenizer)
        self.stream = None if tokenizer is None else tokenizer.stream(skip_special=True)
        self.stops = StopStrings(stop)
        self.text, self.tokens, self.logprobs, self.top_logprobs = "", [], [], []
        self.finish_reason = None

    def rewind(self, logits_known):
        """Takes the state back into the common prefix of what it has read and the prompt; tokens that it keeps."""
        state, n = self.state, len(self.prompt_ids)
        common = min(_common(state.tokens, self.prompt_ids), n if logits_known else n - 1)
        if common < state.position:
            common = max((at for at in state.checkpoints if at <= common), default=0)
            state.truncate(common) if common else state.reset()
        if common < n and common:
            self.mark()
        return common

    def mark(self):
        """Keeps a checkpoint here, where the state keeps any and has none here."""
        if self.state.keep and self.state.position not in self.state.checkpoints[-1:]:
            self.state.checkpoint()

    def is_full(self):
        """Whether the state has no room to read the newest token."""
        return 0 < self.state._context <= self.state.position

    def draw(self, logits, top):
        token = self.sampler(_masked(logits, self.known), self.state.position)
        self.tokens.append(token)
        if top:
            own, likeliest = logprobs_of(logits, token, top)
            self.logprobs.append(own)
            self.top_logprobs.append(likeliest)
        return token

    def push(self, token):
        if self.stream is None:
            return self._write(f" {token}" if self.text else str(token))
        return self._write(self.stops.push(self.stream.push(token) if token < self.known else ""))

    def finish(self):
        """What was held back; nothing behind a stop string."""
        if self.stream is None or self.stops.met:
            return ""
        shown = self.stops.push(self.stream.finish())
        return self._write(shown + self.stops.finish())

    def _write(self, piece):
        self.text += piece
        return piece


def _functions(edit, model):
    """An ``edit=`` of functions alone, checked."""
    if edit is None:
        return {}
    for tap, f in edit.items() if hasattr(edit, "items") else ():
        if not callable(f):
            raise TypeError(f"edit[{tap!r}] is a {type(f).__name__}; in a generation it must be a function of rows")
    model._call([0]).edits(edit, 1)
    return dict(edit)


def _placed(function, sequences):
    """The function with its place's sequences counted as in the generation, not as in the call."""
    if not takes_place(function):
        return function
    indices = np.array([sequence.index for sequence in sequences])
    return lambda x, place: function(x, place._replace(sequence=indices[place.sequence]))


def _masked(logits, known):
    """Logits with those from id `known` on masked, which the tokenizer does not have; a copy where there are any."""
    if known >= len(logits):
        return logits
    return np.concatenate([logits[:known], np.full(len(logits) - known, -np.inf, np.float32)])


def _common(a, b):
    """Length of the longest common prefix of two sequences of ids."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if different.size else n


def _encode_behind(tokenizer, text, read):
    """Ids of a chat's text that begin with what was read of it.

    An answer's tokens are kept as they were drawn: encoding their text again may cut it otherwise. Where the text
    leaves what was read, the ids read are kept up to the last special token before that.
    """
    whole, ends = text.encode("utf-8"), [0]
    for id in read:
        token = None if id < 0 else tokenizer.id_to_bytes(id) if id < len(tokenizer) else b""
        if token is None or not whole.startswith(token, ends[-1]):
            break
        ends.append(ends[-1] + len(token))
    kept = len(ends) - 1
    if kept < len(read) or whole[ends[kept]:ends[kept] + 1] >= b"\x80" and whole[ends[kept]] < 0xC0:
        while kept and not tokenizer.n_base <= read[kept - 1] < len(tokenizer):
            kept -= 1
    return [*read[:kept], *tokenizer.encode(whole[ends[kept]:].decode("utf-8"))]


def _is_messages(prompt):
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_batch(prompt):
    """Whether it is a list of prompts: text, ids or messages each."""
    if hasattr(prompt, "ndim"):
        return prompt.ndim == 2
    several = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return several and isinstance(prompt[0], (str, list, tuple, np.ndarray))


def _seeds(seed, n_prompts):
    """One for each prompt."""
    if np.iterable(seed) and not isinstance(seed, str):
        seeds = list(seed)
    else:
        one = 0 if seed is None else as_whole(seed, "seed", "an int, or one for each prompt", (1 << 64) - 1)
        seeds = [one] * n_prompts
    if len(seeds) != n_prompts:
        raise ValueError(f"seed has {len(seeds)} values; it must be one, or one for each of {n_prompts} prompts")
    ops.sample(np.zeros((n_prompts, 2), np.float32), seed=seeds)  # raises what is wrong
    return [int(s) for s in seeds]


def _stop_strings(stop, model, tokenizer):
    if not (stop is None or np.iterable(stop)):
        raise TypeError(f"stop is {stop!r:.40}; it must be text, or a sequence of it")
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for i, s in enumerate(strings):
        if not isinstance(s, str):
            raise TypeError(f"stop[{i}] is {s!r:.40}; it must be text")
        if not s:
            raise ValueError(f"stop[{i}] is {s!r}; it must be text of a character or more")
    if strings and tokenizer is None:
        raise ValueError(f"{model._has_no_tokenizer}; stop strings need one")
    return strings


def _stop_ids(model, tokenizer):
    ids = set(model.config.eos_token_ids)
    given = model.generation_config.get("eos_token_id")
    try:
        ids.update(as_whole(of_json(id), "eos_token_id", "an int, or a list of them")
                   for id in (given if isinstance(given, list) else [] if given is None else [given]))
    except TypeError as error:
        raise FormatError(f"generation_config: {error}") from None
    if tokenizer is not None:
        ids.update(tokenizer.eos_ids)
    return frozenset(ids)
