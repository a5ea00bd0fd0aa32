"""``kimi-linear plan``: memory before it is taken."""

import warnings
from dataclasses import asdict
from pathlib import Path

from ._common import (
    add_json_argument,
    add_model_argument,
    human_bytes,
    layer_pattern,
    load_model,
    model_path,
    positive,
    print_json,
    print_table,
)

HELP = "memory of a model or of a config.json alone, and the largest context that fits"
EPILOG = """
kimi-linear plan --context 100000 --sequences 4
kimi-linear plan config.json --dtype BF16 --context 1000000 --cache float16
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--context", type=positive, default=4096, metavar="N",
                        help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--sequences", type=positive, default=1, metavar="N",
                        help="at a time (default: %(default)s)")
    parser.add_argument("--cache", choices=("float32", "float16"), default="float32",
                        help="type of the latent cache (default: %(default)s)")
    parser.add_argument("--dtype", choices=("BF16", "F16", "F32"),
                        help="storage of the weights, where only a config.json is given (default: BF16)")
    add_json_argument(parser)


def run(args):
    from ..plan import PAGE, available_memory

    name, config, p = _plan(args)
    free = available_memory()
    fits = None if free is None else p.largest_context(free)
    if args.json:
        print_json({"model": name, **asdict(p), "anonymous": p.anonymous, "total": p.total,
                    "available": free, "largest_context": fits})
        return 0
    many = f"{p.sequences} sequences" if p.sequences > 1 else "1 sequence"
    print(f"{name}, {config.n_layers} layers {layer_pattern(config)}; "
          f"{many} of {p.context:,} tokens, {p.cache} cache\n")
    print_table([
        ("weights", human_bytes(p.weights), "mapped from the files, shared, never copied"),
        ("vectors", human_bytes(p.vectors), "norms and convolution taps, as float32"),
        ("state", human_bytes(p.state), f"{human_bytes(p.state_fixed)} a sequence, and "
                                        f"{human_bytes(p.state_page)} for each {PAGE} tokens of it"),
        ("scratch", human_bytes(p.scratch), "of the largest pass"),
        ("own", human_bytes(p.anonymous), "vectors, state and scratch: the process's own memory"),
        ("in all", human_bytes(p.total), "with every weight resident"),
    ], ("", "memory", ""), "<><")
    print("\n" + _verdict(p, free, fits))
    return 0


def _plan(args):
    """(name, config, Plan), from a checkpoint or from a config.json without weights."""
    from ..config import Config
    from ..plan import plan

    path = model_path(args)
    sizes = {"context": args.context, "sequences": args.sequences, "cache": args.cache}
    if path is None or not path.endswith(".json"):
        if args.dtype is not None:
            raise ValueError("--dtype is for a config.json; a checkpoint's tensors have their types")
        model = load_model(args)
        return model.name, model.config, model.plan(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        config = Config.from_file(path)
    dtype = args.dtype or "BF16"
    return f"{Path(path).name} as {dtype}", config, plan(config, dtype=dtype, **sizes)


def _verdict(p, free, fits):
    if free is None:
        return "This machine does not say how much memory is free."
    if p.total <= free:
        return f"It fits: {human_bytes(free)} are free here, enough for {_tokens(fits)} a sequence."
    if p.anonymous <= free:
        return f"It runs, with weights read again from disk: {human_bytes(free)} are free here."
    return f"It does not fit: {human_bytes(free)} are free here, enough for {_tokens(fits)} a sequence."


def _tokens(n):
    return "any number of tokens" if n >= 1 << 40 else f"{n:,} tokens"
