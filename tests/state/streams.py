"""A long sequence through one State, in calls of several lengths."""

import itertools

import numpy as np

#: Lengths of the calls, repeated: all multiples of 64, so each has the bytes of the others.
SPLITS = {"calls of 4096": (4096,), "calls of 64 to 1984": (64, 1984, 320, 704, 1024)}
#: Calls that end anywhere: within the budget of the others.
ANYWHERE = {"calls of 1 to 3001": (1000, 1, 2047, 63, 65, 17, 3001, 130)}
LAST = 64  # tokens of the last call, whose logits are compared


def tokens_of(model, n_tokens):
    return np.random.default_rng(131072).integers(0, model.config.vocab_size, n_tokens).astype(np.int32)


def stream(model, n_tokens, lengths, routes=None):
    """Logits [64, vocab] of the last of n_tokens seeded tokens, and the state; with the experts of `routes_of`."""
    tokens, state = tokens_of(model, n_tokens), model.new_state(context=n_tokens)
    for begin, end in calls(n_tokens, lengths):
        experts = routes and {layer: ids[begin:end] for layer, ids in routes.items()}
        logits = model.forward(tokens[begin:end], state=state, logits="all" if end == n_tokens else "none",
                               expert_ids=experts)
    return logits, state


def calls(n_tokens, lengths):
    """(begin, end) of each call: the lengths in turn, and at the end one of `LAST` tokens."""
    begin, rest = 0, n_tokens - LAST
    for n in itertools.cycle(lengths):
        if begin >= rest:
            break
        yield begin, min(begin + n, rest)
        begin += n
    yield rest, n_tokens


def routes_of(model, n_tokens):
    """Layer -> expert ids (T, k): two runs within the budget are compared with the same routing."""
    tokens, state, parts = tokens_of(model, n_tokens), model.new_state(context=n_tokens), []
    for begin, end in calls(n_tokens, (4096,)):
        _, trace = model.forward(tokens[begin:end], state=state, logits="none", taps="layers.*.moe.ids")
        parts.append(trace)
    return {int(name.split(".")[1]): np.concatenate([part[name] for part in parts]) for name in parts[0]}


def distance(a, b):
    """Root of the mean square of the difference, in that of `a`: of all rows, and of the worst."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = np.sqrt(np.mean(a**2))
    rows = np.sqrt(np.mean((a - b) ** 2, axis=-1)) / scale
    return np.sqrt(np.mean(rows**2)), rows.max()


def anonymous_bytes():
    """Memory of this process's own."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))
