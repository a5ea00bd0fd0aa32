"""From logits to a token: penalty, processor, draw, log-probabilities; and stop strings in streamed text."""

import math

import numpy as np

from . import _core, ops
from ._arrays import as_array
from ._scalars import as_real, as_whole, of_json
from .context import current
from .errors import FormatError

__all__ = ["Sampler", "StopStrings", "logprobs_of", "settings"]


def settings(defaults, *, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """What was asked for, else what generation_config.json says, else greedy over everything.

    Returns
    -------
    dict
        temperature, top_k, top_p, min_p as `ops.sample` takes them, and repetition_penalty.

    Raises
    ------
    TypeError, ValueError
        If one is no number or out of its range, or if top_k, top_p or min_p is asked for where nothing is drawn: no
        temperature is asked for, and the default is 0.
    FormatError
        If that is so of one of `defaults`; 50.0 is an int there, as JSON has it.
    """
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
             "repetition_penalty": repetition_penalty}
    kept = {name: value for name, value in defaults.items() if name in asked and value is not None}
    if not defaults.get("do_sample"):
        kept["temperature"] = 0.0
    chosen = {name: _checked(name, value) if value is not None else
              _kept(name, kept[name]) if name in kept else _NEUTRAL[name] for name, value in asked.items()}
    for name in ("top_k", "top_p", "min_p"):
        if temperature is None and chosen["temperature"] == 0 and asked[name] not in (None, _NEUTRAL[name]):
            raise ValueError(f"{name} is {asked[name]}, and without a temperature the likeliest token is taken; give "
                             "temperature, too")
    return chosen


PENALTIES = 1e-30, 1e30  # smaller or larger, a logit of some size would be infinite in float32
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def _checked(name, value):
    """A setting's value, of its type and, as the float32 that it will be, in its range."""
    value = as_whole(value, name) if name == "top_k" else as_real(value, name)
    shown = str(value).removesuffix(".0")
    if name == "repetition_penalty":
        if not PENALTIES[0] <= value <= PENALTIES[1]:
            raise ValueError(f"{name} is {shown}; it must be from {PENALTIES[0]:g} to {PENALTIES[1]:g}")
        return value
    with np.errstate(over="ignore"):
        single = np.float32(value)
    try:
        ops.sample(np.zeros(2, np.float32), **{name: value if name == "top_k" else single})
    except ValueError as error:
        rule = str(error).partition("; ")[2]
        lost = np.isfinite(value) and (np.isinf(single) or (single == 0) != (value == 0))
        raise ValueError(f"{name} is {shown}; {rule}{' in float32' if lost else ''}") from None
    return value


def _kept(name, value):
    """The same of a value that a generation_config has, whose numbers are JSON's."""
    try:
        return _checked(name, of_json(value))
    except (TypeError, ValueError) as error:
        raise FormatError(f"generation_config: {error}") from None


class Sampler:
    """Draws the tokens of one sequence.

    Parameters
    ----------
    chosen : dict
        Of `settings`.
    seed, sequence : int
        With the position they are the counter of the draw (`ops.sample`): nothing else, so a sequence draws the same
        alone and in a batch.
    processor : callable, optional
        ``processor(ids, logits)``, with all ids so far and a float32 copy [vocab]: returns the logits to draw from,
        -inf masking a token, or None where it changed the copy in place.
    ids : (T,) integers
        The prompt.
    """

    def __init__(self, chosen, seed, sequence, processor, ids, vocab_size, ctx=None):
        self.penalty = chosen["repetition_penalty"]
        self.reals = [np.array([chosen[name]], np.float32) for name in ("temperature", "top_p", "min_p")]
        self.words = [np.array([word], np.uint64).view(np.int64) for word in (chosen["top_k"], seed, sequence)]
        self.position, self.id = np.empty(1, np.int64), np.empty(1, np.int32)
        self.processor = processor
        self.ctx = None if ctx is not None and ctx.device != "cpu" else ctx  # logits lie on the host: they stay there
        self.ids = ids.tolist() if processor is not None else None
        self.seen = None
        if self.penalty != 1.0:
            self.seen, self.penalised = _Ids(ids, vocab_size), np.empty(vocab_size, np.float32)

    def __call__(self, logits, position):
        """The token at `position`, from the logits [vocab] of the tokens before it.

        Raises
        ------
        ValueError
            If a logit is NaN or +inf, or all are masked; the position is named.
        """
        adjusted = self._processed(self._penalised(logits), position)
        try:
            token = self._drawn(np.ascontiguousarray(adjusted), position)
        except ValueError as error:
            raise ValueError(f"the token at position {position} cannot be drawn: {error}") from None
        if self.seen is not None:
            self.seen.add(token)
        if self.ids is not None:
            self.ids.append(token)
        return token

    def _drawn(self, logits, position):
        """`ops.sample` of one row, without making its arguments anew for each token."""
        temperature, top_p, min_p = self.reals
        top_k, seed, sequence = self.words
        self.position[0] = position
        _core.sample(current(self.ctx)._core, self.id, logits, temperature, top_k, top_p, min_p, seed, sequence,
                     self.position, 1, len(logits))
        return int(self.id[0])

    def _penalised(self, logits):
        """Logits of tokens seen: l / penalty where l > 0, l * penalty elsewhere (Keskar et al., arXiv:1909.05858)."""
        if self.seen is None:
            return logits
        seen, penalty = self.seen.ids, np.float32(self.penalty)
        np.copyto(self.penalised, logits)
        of_seen = logits[seen]
        self.penalised[seen] = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
        return self.penalised

    def _processed(self, logits, position):
        if self.processor is None:
            return logits
        given = logits.copy()
        out = self.processor(list(self.ids), given)
        out = given if out is None else as_array(out, "what logits_processor gave")
        if out.shape != logits.shape or out.dtype.kind != "f":
            raise ValueError(f"logits_processor gave {out.dtype} {list(out.shape)}; it must be float32 "
                             f"{list(logits.shape)}, or None")
        if out.max() == -np.inf:
            raise ValueError(f"logits_processor masked all {out.size} tokens at position {position}; one must be left")
        return out.astype(np.float32, copy=False)


class _Ids:
    """A set of ids as an array, in the order in which they came."""

    def __init__(self, ids, vocab_size):
        self.has = np.zeros(vocab_size, bool)
        self.has[ids] = True
        first = np.flatnonzero(self.has)
        self.n, self.room = len(first), np.empty(len(first) + 256, np.int64)
        self.room[: self.n] = first

    @property
    def ids(self):
        return self.room[: self.n]

    def add(self, id):
        if self.has[id]:
            return
        if self.n == len(self.room):
            self.room = np.concatenate([self.room, np.empty_like(self.room)])
        self.has[id], self.room[self.n] = True, id
        self.n += 1


_GROUP = 64


def logprobs_of(logits, token, k):
    """Log-probability of a token under float32 logits [vocab], and of the `k` likeliest: (float, [(id, float)]).

    The sum is of float32 exponentials: log-probabilities are within 1e-6.
    """
    top = logits.max()
    total = float(top) + math.log(float(np.exp(logits - top).sum()))
    return float(logits[token]) - total, [(int(i), float(logits[i]) - total) for i in _largest(logits, k)]


def _largest(x, k):
    """Indices of the k largest of x, by x descending, then index ascending."""
    n = len(x) // _GROUP
    candidates = np.arange(len(x))
    if k <= n:  # k groups reach the k-th largest of their largest
        groups = x[: n * _GROUP].reshape(_GROUP, n).max(0)
        candidates = np.flatnonzero(x >= np.partition(groups, n - k)[n - k])
    return candidates[np.argsort(-x[candidates], kind="stable")[:k]]


class StopStrings:
    """Lets text through up to the first stop string; what may be the beginning of one waits for the rest.

    Parameters
    ----------
    stop : tuple of str
    """

    def __init__(self, stop):
        self.stop = stop
        self.held = ""
        self.met = False

    def push(self, piece):
        """The text that can be shown now."""
        text = self.held + piece
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.met, self.held = True, ""
            return text[:min(found)]
        n = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - n:]
        return text[:len(text) - n]

    def finish(self):
        """What was held back, when no more comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text, stop):
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
