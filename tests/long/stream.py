"""131,072 tokens through one State of the packaged model: memory as planned, the last logits' bytes whatever the split.

    python tests/long/stream.py [tokens]
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "state"))

from streams import SPLITS, anonymous_bytes, stream

import kimi_linear as kl


def main(n_tokens):
    model = kl.Model.tiny()
    plan = model.plan(context=n_tokens)
    print(f"{n_tokens:,} tokens; planned: state {plan.state:,} bytes, scratch {plan.scratch:,}")
    last = {}
    for name, lengths in SPLITS.items():
        before, began = anonymous_bytes(), time.perf_counter()
        logits, state = stream(model, n_tokens, lengths)
        grown = anonymous_bytes() - before
        print(f"{name}: {time.perf_counter() - began:.1f} s, state {state.nbytes:,} bytes, process +{grown:,}")
        if state.nbytes != plan.state:
            raise SystemExit(f"the state holds {state.nbytes:,} bytes; {plan.state:,} were planned")
        last[name] = logits
        del state
    same = len({x.tobytes() for x in last.values()}) == 1
    print("last logits:", "the same bytes" if same else "THEY DIFFER")
    return 0 if same and np.isfinite(logits).all() else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 131_072))
