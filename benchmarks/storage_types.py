"""What each storage type costs: `linear` with weights of the type beside float32 weights, and `dequantize`.

    python benchmarks/run.py types                    every type, both activations
    python benchmarks/run.py types --tokens 1 --threads 1

The blocks are random (random_blocks.py). One token reads a matrix of COLUMNS wide rows that no cache holds; 512 tokens
share one of ROWS. The contenders of a type take turns: float32 weights, the type with float32 activations, with int8
ones; for bfloat16 weights, bfloat16 activations.
"""

import statistics

import numpy as np

import kimi_linear as kl
from kimi_linear.bench import sample

__all__ = ["HEADER", "row", "run"]

ROWS = COLUMNS = 4096
AT_LEAST = 192 << 20  # bytes of weights that one token reads
TURNS = 5
HEADER = ("type", "tokens", "F32 weights", "float32", "int8, bf16", "float32/F32", "int8/F32", "dequantize")


def run(types=None, tokens=(1, 512), threads=None, isa=None, turns=TURNS, rows=ROWS, at_least=AT_LEAST):
    """Rates of each type and T.

    Parameters
    ----------
    types : iterable of str, optional
        Names of `kimi_linear.storage_types`; all.
    tokens : iterable of int
    threads, isa : optional
        Of the contexts.
    turns : int
    rows : int
        Of the matrix that more than one token share.
    at_least : int
        Bytes that one token reads.

    Yields
    ------
    dict
        ``type``, ``tokens``; seconds of a call, medians, ``f32_weights``, ``float32`` and, where the type has such
        products, ``narrow``; ``values`` of the matrix, ``bytes`` of it; ``dequantize``, seconds of ``rows`` rows.
    """
    from random_blocks import block_of, random_blocks

    rng = np.random.default_rng(0)
    exact = kl.Context(threads=threads, isa=isa)
    plain = rng.standard_normal((rows, COLUMNS)).astype(np.float32)
    cold = np.tile(plain, (max(1, at_least // plain.nbytes), 1))
    for name in types or kl.storage_types:
        raw = random_blocks(name, 1.0, rows * COLUMNS // block_of(name)[0], rng).reshape(rows, -1)
        narrow = kl.Context(threads=threads, isa=isa, activations="bfloat16" if name == "BF16" else "int8")
        one = weights(raw, name)
        has_narrow = not np.array_equal(kl.ops.linear(plain[:1], one, ctx=narrow),
                                        kl.ops.linear(plain[:1], one, ctx=exact))
        blocks = isinstance(one, kl.Quantized)
        values = np.empty((rows, COLUMNS), np.float32)  # of new memory the pages would take longer than the values
        read = seconds(lambda w=one, out=values: kl.ops.dequantize(w, out=out, ctx=exact), turns) if blocks else None
        for T in tokens:
            copies = max(1, -(-at_least // raw.nbytes)) if T == 1 else 1
            w = weights(np.tile(raw, (copies, 1)), name)
            f32 = cold if T == 1 else plain
            x = rng.standard_normal((T, COLUMNS)).astype(np.float32)
            calls = {"f32_weights": (f32, exact), "float32": (w, exact), "narrow": (w, narrow)}
            if not has_narrow:
                del calls["narrow"]
            found = sample({n: lambda x=x, w=w, ctx=ctx: kl.ops.linear(x, w, ctx=ctx) for n, (w, ctx) in calls.items()},
                           turns)
            times = {n: statistics.median(s) for n, s in found.items()}
            times["f32_weights"] *= copies * rows / len(f32)  # of as many values
            yield {"type": name, "tokens": T, "values": copies * rows * COLUMNS, "bytes": copies * raw.nbytes,
                   "dequantize": read, "dequantized": rows * COLUMNS, **times}


def seconds(call, turns):
    """Median seconds of a call."""
    return statistics.median(sample({"": call}, turns)[""])


def weights(raw, name):
    """Raw rows of blocks as what `linear` takes."""
    plain = {"F32": np.float32, "F16": np.float16}
    if name in plain:
        return raw.view(plain[name])
    if name == "BF16":
        import ml_dtypes

        return raw.view(ml_dtypes.bfloat16)
    return kl.Quantized(raw, name, (len(raw), COLUMNS))


def row(r):
    """A line of the table: GB/s of one token, GFLOP/s of more, and times the speed of float32 weights."""
    def rate(key):
        if key not in r:
            return ""
        scale = r["bytes"] if r["tokens"] == 1 else 2 * r["tokens"] * r["values"]
        if key == "f32_weights" and r["tokens"] == 1:
            scale = 4 * r["values"]
        return f"{scale / r[key] * 1e-9:.1f}"

    def times(key):
        return f"{r['f32_weights'] / r[key]:.2f}x" if key in r else ""

    read = f"{r['dequantized'] / r['dequantize'] * 1e-9:.2f}" if r["dequantize"] else ""
    return (r["type"], f"{r['tokens']}", rate("f32_weights"), rate("float32"), rate("narrow"), times("float32"),
            times("narrow"), read)
