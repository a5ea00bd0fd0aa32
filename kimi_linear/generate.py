"""Generation: from a prompt to tokens and text, a piece at a time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import ops
from ._arrays import as_integers
from .context import current

__all__ = ["Generation", "Stats"]


@dataclass
class Stats:
    """What a generation cost.

    prompt_tokens : tokens read before the first new one
    new_tokens : tokens generated
    prefill_seconds, decode_seconds : wall time of each part
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self):
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self):
        """New tokens a second, after the first."""
        steps = self.new_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


class Generation:
    """A generation under way: iterate it for pieces of text, then read what became of it.

    Parameters
    ----------
    model : Model
    prompt : str, (T,) integers, or list of messages
        Text, token ids, or chat messages (``{"role": ..., "content": ...}``), which go through the chat template.
    max_new_tokens : int
    temperature : float, optional
        0 takes the likeliest token (greedy). By default the checkpoint's, else 0 where it says not to sample.
    top_k, top_p, min_p : optional
        Keep the k likeliest; the smallest set of at least this probability; those of at least this share of the
        likeliest.
    seed : int, optional
        Of the sampler; the same seed gives the same text. By default 0.
    state : State, optional
        Read on from here; it is moved on.
    stop_at_eos : bool
        End at an end token (the union of the config's, the generation config's and ``<|im_end|>``).

    Attributes
    ----------
    text : str
        All pieces so far; without a tokenizer, the ids.
    tokens : list of int
        New tokens, the end token included.
    logprobs : list of float
        Log-probability of each new token under the model (temperature 1).
    finish_reason : {None, "stop", "length"}
    stats : Stats
    state : State
    """

    def __init__(self, model, prompt, *, max_new_tokens=256, temperature=None, top_k=None, top_p=None, min_p=None,
                 seed=None, state=None, stop_at_eos=True):
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be an int >= 1")
        self.model = model
        self.prompt_ids = self._read_prompt(prompt)
        self.max_new_tokens = int(max_new_tokens)
        self.sampling = self._sampling(temperature, top_k, top_p, min_p)
        self.seed = 0 if seed is None else int(seed)
        self.state = model.new_state() if state is None else state
        self.stop_ids = _stop_ids(model) if stop_at_eos else frozenset()
        self.text, self.tokens, self.logprobs = "", [], []
        self.finish_reason = None
        self.stats = Stats(prompt_tokens=len(self.prompt_ids))
        self._pieces = self._run()

    def __iter__(self):
        return self._pieces

    def __next__(self):
        return next(self._pieces)

    def run(self):
        """Generate to the end and return self."""
        for _ in self:
            pass
        return self

    def _read_prompt(self, prompt):
        model = self.model
        if isinstance(prompt, str):
            ids = model._encode(prompt)
        elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            if model.tokenizer is None:
                raise ValueError(f"{model.name} has no tokenizer; give token ids, not messages")
            ids = model._encode(model.tokenizer.apply_chat_template(prompt))
        else:
            ids = prompt
        ids = as_integers(ids, "prompt", ("T",), low=0, high=model.config.vocab_size)
        if len(ids) == 0:
            raise ValueError("prompt is empty; it must have a token or more")
        return ids

    def _sampling(self, temperature, top_k, top_p, min_p):
        defaults = self.model.generation_config
        if temperature is None:
            temperature = defaults.get("temperature", 1.0) if defaults.get("do_sample") else 0.0
        chosen = {
            "temperature": float(temperature),
            "top_k": int(_first(top_k, defaults.get("top_k"), 0)),
            "top_p": float(_first(top_p, defaults.get("top_p"), 1.0)),
            "min_p": float(_first(min_p, defaults.get("min_p"), 0.0)),
        }
        ops.sample(np.zeros(2, np.float32), **chosen)  # its errors, before anything is read
        return chosen

    def _run(self):
        stream = self.model.tokenizer.stream(skip_special=True) if self.model.tokenizer else None
        logits = self._read(self.prompt_ids, "prefill_seconds")
        while True:
            token = self._sample(logits)
            self.tokens.append(token)
            self.stats.new_tokens += 1
            ended = token in self.stop_ids
            if not ended:
                ids = f" {token}" if self.text else str(token)
                yield from self._show(stream.push(token) if stream is not None else ids)
            if ended or len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "stop" if ended else "length"
                break
            logits = self._read([token], "decode_seconds")
        if stream is not None:
            yield from self._show(stream.finish())

    def _show(self, piece):
        self.text += piece
        if piece:
            yield piece

    def _read(self, ids, clock):
        begin = time.perf_counter()
        logits = self.model.forward(ids, state=self.state, logits="last")
        setattr(self.stats, clock, getattr(self.stats, clock) + time.perf_counter() - begin)
        return logits

    def _sample(self, logits):
        token = int(ops.sample(logits, **self.sampling, seed=self.seed, position=self.state.position,
                               ctx=current(self.model.ctx)))
        shifted = logits.astype(np.float64) - logits.max()
        self.logprobs.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
        return token


def _first(*values):
    return next(v for v in values if v is not None)


def _stop_ids(model):
    ids = set(model.config.eos_token_ids)
    given = model.generation_config.get("eos_token_id")
    ids.update(given if isinstance(given, list) else [] if given is None else [given])
    if model.tokenizer is not None:
        ids.update(model.tokenizer.eos_ids)
    return frozenset(ids)
