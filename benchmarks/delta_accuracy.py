"""Errors of the delta rule's forms, ours and the peers', against float64; `run.py delta_rule --accuracy` calls it.

256 tokens, 4 heads, K = V = 64, unit keys and queries, a state of standard deviation 0.1. Gates are drawn evenly in
their logarithm: `mild` ones within -0.01 .. -1 nats, and a share of others among them. Errors are of o: its rms, and
its largest, over the rms of float64's o.
"""

import functools

import numpy as np
from delta_rule import FORMS, GATES, inputs, ours, relative_rms
from peers import PEERS
from peers import about as about_peers
from peers import contenders as peer_contenders

import kimi_linear as kl
from kimi_linear.cli._common import print_table

__all__ = ["MIXES", "gates_of", "run"]

T, H, K = 256, 4, 64
MIXES = {  # share of others, and from where to where they go
    "-0.01 .. -1": (0.0, 1, 1),
    "10 % in -10 .. -100": (0.1, 10, 100),
    "10 % in -10 .. -1e4": (0.1, 10, 1e4),
    "2 % -inf": (0.02, np.inf, np.inf),
}


def gates_of(mix, shape, seed=1):
    """Log-decays of a mix."""
    rng = np.random.default_rng(seed)
    share, low, high = MIXES[mix]
    mild = np.exp(rng.uniform(np.log(0.01), 0, shape))
    strong = np.full(shape, np.inf) if np.isinf(low) else np.exp(rng.uniform(np.log(low), np.log(high), shape))
    return -np.where(rng.random(shape) < share, strong, mild).astype(np.float32)


def errors_of(gate, mix, ctx, names, say):
    """(name, rms, largest) of every contender."""
    arguments = inputs(gate, T, H, K)
    arguments = arguments | {"g": gates_of(mix, arguments["g"].shape)}
    want = kl.reference.delta_rule(**arguments)[0]
    size = np.sqrt(np.mean(want**2))
    for name, call in (ours(arguments, ctx, FORMS, say) | peer_contenders(arguments, 1, names)[0]).items():
        with np.errstate(all="ignore"):
            call()
            got = call.result()[0]
            yield name, relative_rms(got, want), float(np.abs(got - want).max() / size)


def run(say=print, names=PEERS, ctx=None):
    """Prints the table; gives its rows as plain numbers."""
    ctx, rows, say = ctx or kl.Context(threads=1), [], functools.cache(say)  # each sentence once
    for line in about_peers(names):
        say(line)
    for gate in GATES:
        for mix in MIXES:
            for name, rms, largest in errors_of(gate, mix, ctx, names, say):
                rows.append({"gate": gate, "mix": mix, "name": name, "rms": rms, "largest": largest})
    for gate, title in GATES.items():
        cells = {}
        for row in rows:
            if row["gate"] == gate:
                cells.setdefault(row["name"], []).append(f"{row['rms']:.1e} / {row['largest']:.1e}")
        print(f"\n{title}: rms / largest error of o, over its rms; {T} tokens, {H} heads, K = V = {K}")
        print_table([(name, *found) for name, found in cells.items()], ("", *MIXES))
    print()
    return rows
