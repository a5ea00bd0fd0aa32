"""What the type of the latent cache costs: KL and top-1 agreement with a float32 cache on a text, and bytes.

    python benchmarks/cache_types.py tests/data/tiny/heldout.txt
    python benchmarks/cache_types.py book.txt --model ~/models/kimi --tokens 8192

The text is read in windows of 1,024 tokens, each from an empty state, once with each type; the distributions of all
next tokens are compared in float64. KL is sum p log(p / q), p with the float32 cache, in nats. Prints the table of
docs/state.md. A model whose shared key is no whole blocks keeps it in float16 beside q8_0 latents; a last row then has
it in a block as well, by editing what goes into a float32 cache.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

import kimi_linear as kl
from kimi_linear.cli._common import CACHES, print_table

WINDOW = 1024


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def in_blocks(rows):
    """Rows [n, D] as Q8_0 blocks hold them, of 32 values or of the whole row where it is shorter."""
    x = rows.reshape(len(rows), -1, min(32, rows.shape[-1]))
    d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    q = x * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    return (d.astype(np.float16).astype(np.float32) * np.trunc(q + np.copysign(np.float32(0.5), q))).reshape(rows.shape)


def runs(model):
    """(name, bytes a token, type of the state's cache, edit) of each type."""
    for cache in CACHES:
        yield cache, model.plan(cache=cache).state_page / 512, cache, None
    if 0 < model.config.rope_dim < 32:
        yield "q8_0, shared key too", None, "float32", {"*.mla.latent": in_blocks, "*.mla.k_shared": in_blocks}


def measure(model, tokens, progress=lambda n: None):
    """A dict for each type: ``cache``, ``bytes_per_token``, ``kl_mean``, ``kl_max``, ``top1``, ``perplexity``.

    Parameters
    ----------
    model : Model
    tokens : (T,) integers
    progress : callable, optional
        Called with tokens read.
    """
    kinds = list(runs(model))
    sums = {name: {"kl": [], "same": [], "nll": []} for name, *_ in kinds}
    for begin in range(0, len(tokens) - 1, WINDOW):
        window = np.asarray(tokens[begin : begin + WINDOW])
        exact = None
        for name, _, cache, edit in kinds:
            log_q = log_softmax(model.forward(window, state=model.new_state(cache=cache), edit=edit))
            exact = log_q if exact is None else exact
            into = sums[name]
            into["kl"].append((np.exp(exact) * (exact - log_q)).sum(-1))
            into["same"].append(log_q.argmax(-1) == exact.argmax(-1))
            into["nll"].append(-log_q[np.arange(len(window) - 1), window[1:]])
            progress(len(window))
    joined = {name: {k: np.concatenate(v) for k, v in s.items()} for name, s in sums.items()}
    return [{"cache": name, "bytes_per_token": n_bytes, "kl_mean": float(s["kl"].mean()),
             "kl_max": float(s["kl"].max()), "top1": float(s["same"].mean()), "perplexity": math.exp(s["nll"].mean())}
            for (name, n_bytes, *_), s in zip(kinds, joined.values(), strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", help="default: the packaged")
    parser.add_argument("--tokens", type=int, help="so many of the text (default: all)")
    args = parser.parse_args()
    model = kl.Model.from_pretrained(args.model) if args.model else kl.Model.tiny()
    tokens = model.tokenizer.encode(args.text.read_text(encoding="utf-8"), specials=False)[: args.tokens]
    with tqdm(total=len(tokens) * len(list(runs(model))), unit=" tokens") as bar:
        rows = measure(model, tokens, bar.update)
    print(f"{model.name}, {len(tokens):,} tokens of {args.text.name}\n")
    print_table([(r["cache"], f"{r['bytes_per_token']:,.0f}" if r["bytes_per_token"] else "", f"{r['kl_mean']:.2e}",
                  f"{r['kl_max']:.2e}", f"{r['top1']:.2%}", f"{r['perplexity']:.5f}") for r in rows],
                ("cache", "bytes a token", "KL, mean", "KL, largest", "top-1 the same", "perplexity"), "<>>>>>")


if __name__ == "__main__":
    main()
