"""Perplexity and divergence of a model in each block type: ours in float32 and int8, and llama.cpp's, on one file.

    .venv-peers/bin/python benchmarks/block_types.py                        the packaged model, the packaged text
    .venv-peers/bin/python benchmarks/block_types.py --file kimi-f32.gguf --text book.txt --types Q4_K

Each file is written by llama.cpp's own quantiser from the F32 file, all matrices of one type as far as it divides them.
Both engines read the same windows, each from an empty state, with llama.cpp's epsilons. KL is of a token's
distribution from that of the float64 reference on the same, dequantised, weights: mean and median over all tokens, and
the share of tokens at which ours is nearer. docs/block-types.md#perplexity says what it shows.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import kimi_linear as kl
from kimi_linear.adapters import llama_cpp
from kimi_linear.cli._common import progress
from kimi_linear.load import GGUFFile
from kimi_linear.perplexity import log_probs

#: Type -> what llama.cpp's quantiser calls a file of it.
FILE_TYPES = {"BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S",
              "Q2_K": "Q2_K", "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL",
              "IQ4_XS": "IQ4_XS", "IQ3_S": "IQ3_S", "MXFP4": "MXFP4_MOE"}
FOLDER = Path(kl.__file__).parent / "data" / "tiny"
ENGINES = ("float32", "int8", "llama.cpp")


def main():
    args = arguments()
    if importlib.util.find_spec("llama_cpp") is None:
        return ("block_types: llama-cpp-python is missing; `make peers` builds it into .venv-peers, and "
                ".venv-peers/bin/python runs this file with it")
    text = Path(args.text).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(args.file) if args.file else packaged(Path(scratch) / "tiny-F32.gguf")
        tokens = kl.Model.from_pretrained(source).tokenizer.encode(text, specials=False)[:args.tokens]
        windows = [tokens[i:i + args.window] for i in range(0, len(tokens), args.window)]
        windows = [w for w in windows if len(w) > 1]
        rows = []
        with progress(len(args.types), "types", "type") as bar:
            for name in args.types:
                path = source
                if name != "F32":
                    path = Path(scratch) / f"{name}.gguf"
                    quantize(source, path, name)
                rows.append({"type": name, "bits": bits(path), **measure(path, windows)})
                bar.update()
    show(rows, sum(map(len, windows)), args.window)
    if args.json:
        Path(args.json).write_text(json.dumps({"window": args.window, "types": rows}, indent=1) + "\n")
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", metavar="GGUF", help="in F32, with a tokenizer (default: the packaged model)")
    parser.add_argument("--text", metavar="FILE", default=FOLDER / "sample.txt", help="(default: the packaged text)")
    parser.add_argument("--tokens", type=int, metavar="N", help="its first N tokens (default: all)")
    parser.add_argument("--window", type=int, default=512, metavar="N",
                        help="tokens of a window, each from an empty state (default: %(default)s)")
    parser.add_argument("--types", type=lambda text: text.split(","), metavar="T,T", default=["F32", *FILE_TYPES],
                        help=f"of F32, {', '.join(FILE_TYPES)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    args = parser.parse_args()
    if unknown := set(args.types) - {"F32", *FILE_TYPES}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are F32, {', '.join(FILE_TYPES)}")
    return args


# ---- files ----

def packaged(path):
    """The packaged model as a GGUF in F32, by the writer that the tests have."""
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "load")]
    return importlib.import_module("gguf_files").write(path, FOLDER)


def quantize(source, path, name):
    """Write a file with all matrices in one type, by llama.cpp's quantiser.

    Raises
    ------
    RuntimeError
        If it refuses: IQ1 and IQ2 need an importance matrix.
    """
    api = importlib.import_module("llama_cpp")
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[name]}")
    params.nthread, params.pure = 1, True
    with llama_cpp.quiet(api) as said:
        if api.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp writes no {name}: {''.join(said).strip().splitlines()[-1]}")


def bits(path):
    """Bits a weight, over the matrices that have the file's type."""
    views = [v for n, v in GGUFFile(path).items() if len(v.shape) > 1 and n.endswith(".weight")
             and "conv1d" not in n and "ffn_gate_inp" not in n]
    return 8 * sum(v.nbytes for v in views) / sum(int(np.prod(v.shape)) for v in views)


# ---- the measure ----

def measure(path, windows):
    """Perplexity of each engine, and its divergence from float64, over all windows."""
    ours = {a: kl.Model.from_pretrained(path, activations=a, **llama_cpp.CONVENTIONS) for a in ENGINES[:2]}
    reference = ours["float32"].reference()
    losses, kls = {name: [] for name in ("float64", *ENGINES)}, {name: [] for name in ENGINES}
    with llama_cpp.Engine(path, model=ours["float32"]) as theirs:
        for ids in map(np.asarray, windows):
            exact = reference.forward(ids).logits
            losses["float64"].append(-log_probs(exact, ids[1:]))
            for name in ENGINES:
                logits = ours[name].forward(ids) if name in ours else theirs.logits(ids)
                losses[name].append(-log_probs(logits, ids[1:]))
                kls[name].append(divergence(exact, logits))
    kls = {name: np.concatenate(x) for name, x in kls.items()}
    return {"perplexity": {name: float(np.exp(np.concatenate(x).mean())) for name, x in losses.items()},
            "kl": {name: {"mean": float(x.mean()), "median": float(np.median(x))} for name, x in kls.items()},
            "nearer": float((kls["int8"] < kls["llama.cpp"]).mean())}


def divergence(exact, logits):
    """KL of each token's distribution from the exact one, in nats: [T] float64."""
    p, q = log_softmax(exact), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def show(rows, n_tokens, window):
    """The table, in Markdown."""
    print(f"{n_tokens:,} tokens in windows of {window}\n")
    print("| type | bits a weight | perplexity: float64 | float32 | int8 | llama.cpp "
          "| KL: int8 | llama.cpp | median: int8 | llama.cpp | nearer |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ppl = [f"{row['perplexity'][name]:.3f}" for name in ("float64", *ENGINES)]
        kls = [f"{row['kl'][name][of]:.1e}" for of in ("mean", "median") for name in ENGINES[1:]]
        print("| " + " | ".join([row["type"], f"{row['bits']:.3g}", *ppl, *kls, f"{100 * row['nearer']:.0f} %"]) + " |")


if __name__ == "__main__":
    sys.exit(main())
