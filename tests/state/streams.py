"""A long sequence through one State, in calls of several lengths."""

import itertools

import numpy as np

#: Lengths of the calls, repeated: all multiples of 64.
SPLITS = {"calls of 4096": (4096,), "calls of 64 to 1984": (64, 1984, 320, 704, 1024)}


def stream(model, n_tokens, lengths):
    """Logits [vocab] behind the last of n_tokens seeded tokens, and the state."""
    tokens = np.random.default_rng(131072).integers(0, model.config.vocab_size, n_tokens).astype(np.int32)
    state, begin = model.new_state(context=n_tokens), 0
    for n in itertools.cycle(lengths):
        end = min(begin + n, n_tokens)
        logits = model.forward(tokens[begin:end], state=state, logits="last" if end == n_tokens else "none")
        begin = end
        if end == n_tokens:
            return logits, state


def anonymous_bytes():
    """Memory of this process's own."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))
