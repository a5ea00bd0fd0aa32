"""131,072 tokens through one State of the packaged model, in calls of several lengths: memory as planned; the last
logits the same bytes where calls end at multiples of 64, and within the budget where they end anywhere.

    python tests/long/stream.py [tokens]
"""

import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "state"))

from streams import ANYWHERE, SPLITS, anonymous_bytes, distance, routes_of, stream

import kimi_linear as kl
from kimi_linear.context import current
from kimi_linear.laws import BUDGET, TOKEN_BUDGET

# What a process grows by beside its plan. `State.tokens` is a list of ints: 8 bytes a token in the list, with up to an
# eighth of spare room, and 28 for the int; NumPy's arrays of a call and of the seeded tokens are 12 bytes a token,
# and malloc's pages and arenas some 2 MiB that do not depend on the length. At 131,072 tokens of this small model that
# is a twentieth of the plan; at full size a token's cache alone is 8,064 bytes or more, and these are 0.6 % of it.
A_TOKEN, ALWAYS = 8 * 9 / 8 + 28 + 12, 2 << 20


def grown(model, n_tokens, lengths, routes=None):
    """(logits, bytes of the state, bytes that the process grew by, seconds) of one stream."""
    gc.collect()
    current()._core.trim()
    before, began = anonymous_bytes(), time.perf_counter()
    logits, state = stream(model, n_tokens, lengths, routes)
    return logits, state.nbytes, anonymous_bytes() - before, time.perf_counter() - began


def main(n_tokens):
    model = kl.Model.tiny()
    model.forward([0] * 65)  # threads, tables and the interpreter's own memory are there
    plan = model.plan(context=n_tokens)
    room = plan.state + plan.scratch + A_TOKEN * n_tokens + ALWAYS
    print(f"{n_tokens:,} tokens; planned: state {plan.state:,} bytes, scratch {plan.scratch:,}")
    problems, first, routes = [], None, None
    for name, lengths in (SPLITS | ANYWHERE).items():
        if name in ANYWHERE:
            routes = routes_of(model, n_tokens)
        logits, nbytes, growth, seconds = grown(model, n_tokens, lengths, routes)
        total, worst = (0.0, 0.0) if first is None else distance(first, logits)
        print(f"{name}: {seconds:.1f} s, state {nbytes:,} bytes, process +{growth:,}; logits differ by {total:.1e} "
              f"of their size, by {worst:.1e} at a token")
        if nbytes != plan.state:
            problems.append(f"{name}: the state holds {nbytes:,} bytes; {plan.state:,} were planned")
        if growth > room:
            problems.append(f"{name}: the process grew by {growth:,} bytes; it must be {room:,.0f} at most")
        if not (total <= BUDGET and worst <= TOKEN_BUDGET):  # NaN is a problem, too
            problems.append(f"{name}: the logits differ by more than {BUDGET:.0e}, or {TOKEN_BUDGET:.0e} at a token")
        if first is None:
            first = logits
        elif name in SPLITS and logits.tobytes() != first.tobytes():
            problems.append(f"{name}: the logits are not the same bytes")
    print(*problems or ["as planned, the same bytes, and within the budget"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 131_072))
