"""Perplexity of a text under a model: how surprised it is by each token, given those before."""

import math
from dataclasses import dataclass

import numpy as np

from ._arrays import as_integers
from ._scalars import at_least

__all__ = ["PerplexityResult", "perplexity"]

_PASS = 512  # tokens of a forward call: no more logits than these are held


@dataclass(frozen=True)
class PerplexityResult:
    """Surprise of a model at a text.

    Attributes
    ----------
    nll_per_token : float
        Mean of -log p(token | those before it), in nats.
    perplexity : float
        Its exponential.
    scored : int
        Tokens with a probability; the first of each window has none.
    bits_per_byte : float or None
        The mean, taken for every token, over the bytes of the text, in bits; None without a tokenizer, or
        bytes.
    """

    nll_per_token: float
    perplexity: float
    scored: int
    bits_per_byte: float | None


def perplexity(model, tokens, window=1024, progress=None):
    """Perplexity of `tokens` in windows.

    Each window of `window` tokens starts from an empty state and its first token is not scored. Short windows
    are read together as a ragged batch, long ones in slices through one state; ``window=None`` is the whole
    in one. Log-probabilities are taken in float64 from float32 logits.

    Parameters
    ----------
    model : Model
    tokens : (T,) integers
    window : int or None
        At least 2.
    progress : callable, optional
        Called with the number of tokens read, after each call of the model.

    Returns
    -------
    PerplexityResult

    Raises
    ------
    TypeError, ValueError
        Fewer than two tokens, a window that is no int or below 2, or ids outside the vocabulary.
    """
    ids = as_integers(tokens, "tokens", ("T",), low=0, high=model.config.vocab_size)
    if len(ids) < 2:
        raise ValueError(f"tokens has {len(ids)} tokens; it must have 2 or more")
    size = len(ids) if window is None else at_least(window, 2, "window", "None for the whole, or an int")
    windows = _windows(ids, size)
    losses = []
    for batch in _batches(windows):
        losses += _batch_losses(model, batch, progress or (lambda n: None))
    mean = math.fsum(losses) / len(losses)
    return PerplexityResult(mean, _exp(mean), len(losses), _bits_per_byte(model, windows, mean))


def _windows(ids, size):
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    return windows if len(windows[-1]) > 1 else windows[:-1]  # a window of one token scores nothing


def _batches(windows):
    """Neighbours together, as many whole windows as fit a pass; a longer one alone."""
    batch = []
    for w in windows:
        if batch and sum(map(len, batch)) + len(w) > _PASS:
            yield batch
            batch = []
        batch.append(w)
    yield batch


def _batch_losses(model, windows, read):
    """-log p of all tokens but each window's first, a pass of logits at a time."""
    states = model.new_state(len(windows))
    losses = []
    for begin in range(0, max(map(len, windows)), _PASS):
        live = [i for i, w in enumerate(windows) if begin < len(w)]
        pieces = [windows[i][begin : begin + _PASS] for i in live]
        for i, logits in zip(live, model.forward(pieces, state=[states[i] for i in live]), strict=True):
            losses += (-log_probs(logits, windows[i][begin + 1 : begin + 1 + len(logits)])).tolist()
        read(sum(map(len, pieces)))
    return losses


def log_probs(logits, targets):
    """log softmax(logits)[target] of the rows that have a target: [n] float64, in nats."""
    losses = np.empty(len(targets))
    for i, target in enumerate(targets):  # a row at a time: all rows in float64 would be large
        x = logits[i].astype(np.float64)
        top = x.max()
        losses[i] = top + np.log(np.exp(x - top).sum()) - x[target]
    if not np.isfinite(losses).all():
        row = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise ValueError(f"the loss of token id {int(targets[row])} is {losses[row]}; logits must be finite")
    return -losses


def _bits_per_byte(model, windows, mean):
    tokenizer = model._tokenizer_or_none("bits a byte are not counted")
    if tokenizer is None:
        return None
    # rows of the model behind the tokenizer's are no text
    n_bytes = sum(len(tokenizer.decode_bytes(w[w < len(tokenizer)].tolist())) for w in windows)
    if n_bytes == 0:
        return None
    return mean / math.log(2) * sum(map(len, windows)) / n_bytes


def _exp(x):
    return math.exp(x) if x < 700 else math.inf
