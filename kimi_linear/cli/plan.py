"""``kimi-linear plan``: memory before it is taken, and the tokens/s to expect."""

import os
import warnings
from dataclasses import asdict
from pathlib import Path

from ._common import (
    CACHES,
    add_json_argument,
    add_model_argument,
    human_bytes,
    human_rate,
    layer_pattern,
    model_path,
    positive,
    print_json,
    print_table,
)

HELP = "memory of a model or of a config.json alone, the largest context that fits, tokens/s to expect"
EPILOG = """
kimi-linear plan --context 100000 --sequences 4
kimi-linear plan kimi-q4_k.gguf --context 16384 --cache q8_0
kimi-linear plan path/to/config.json --dtype BF16 --context 1000000 --cache float16
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--context", type=positive, default=4096, metavar="N",
                        help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--sequences", type=positive, default=1, metavar="N",
                        help="sequences at a time (default: %(default)s)")
    parser.add_argument("--cache", choices=CACHES, default="float32",
                        help="type of the latent cache (default: %(default)s; generate, chat and bench take float16)")
    parser.add_argument("--dtype", choices=("BF16", "F16", "F32"),
                        help="storage of the weights, where only a config.json is given (default: BF16)")
    parser.add_argument("--no-measure", action="store_true",
                        help="do not measure how fast memory is read, so no tokens/s (it takes half a second)")
    add_json_argument(parser)


def run(args):
    from ..plan import PAGE, available_memory, read_rate

    name, config, p = _plan(args)
    facts = _forecast(p, available_memory(), None if args.no_measure else read_rate())
    if args.json:
        print_json({"model": name, **asdict(p), "anonymous": p.anonymous, "total": p.total, "step": p.step, **facts})
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
    print("\n" + "\n".join([*_speed(p, facts), *_verdict(p, facts)]))
    return 0


def _plan(args):
    """(name, config, Plan), from a checkpoint or from a config.json without weights."""
    from ..config import Config
    from ..plan import plan

    path = model_path(args)
    folder = None if path is None else Path(os.path.expanduser(path))
    if folder is not None and _is_config_alone(folder):
        path = str(folder / "config.json")
    sizes = {"context": args.context, "sequences": args.sequences, "cache": args.cache}
    if path is None or not path.endswith(".json"):
        if args.dtype is not None:
            raise ValueError("--dtype is for a config.json; a checkpoint's tensors have their types")
        from ..model import Model

        model = Model.tiny() if path is None else Model.from_pretrained(path, activations="auto")
        return model.name, model.config, model.plan(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        config = Config.from_file(path)
    dtype = args.dtype or "BF16"
    return f"{Path(path).name} as {dtype}", config, plan(config, dtype=dtype, **sizes)


def _is_config_alone(folder):
    """Whether a folder has a config.json and no weights yet."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*"))


def _forecast(p, free, rate):
    """What the plan means on a machine with `free` bytes of memory, which is read at `rate`; None where unknown."""
    larger = free is not None and p.total > free
    kept = p.weights - p.experts if larger else p.weights
    return {
        "available": free,
        "largest_context": None if free is None else p.largest_context(free, kept),
        "larger_than_memory": None if free is None else larger,
        "disk_bytes_per_token": None if free is None else p.from_disk(free),
        "fitting_type": None if free is None else p.fitting_type(free),
        "read_rate": rate,
        "tokens_per_second": rate / p.step if rate and not larger else None,
    }


def _speed(p, facts):
    """Lines on what a token costs."""
    cache = p.step - p.active - 2 * p.state_fixed
    lines = [f"Decoding a token at {p.context:,} reads {human_bytes(p.step)}: weights {human_bytes(p.active)}, "
             f"cache {human_bytes(cache)}, states {human_bytes(2 * p.state_fixed)}."]
    if facts["tokens_per_second"]:
        lines.append(f"Memory is read at {human_rate(facts['read_rate'])} here: "
                     f"{_rate(facts['tokens_per_second'])} tokens/s at most (estimate).")
    return lines


def _verdict(p, facts):
    """Lines on whether it fits."""
    free, fits = facts["available"], facts["largest_context"]
    if free is None:
        return ["This machine does not say how much memory is free."]
    here = f"{human_bytes(free)} are free here"
    if not facts["larger_than_memory"]:
        return [f"It fits: {here}, enough for {_tokens(fits)} a sequence."]
    disk, fitting = facts["disk_bytes_per_token"], facts["fitting_type"]
    room = p.largest_context(free)
    if 0 < room < p.context:
        return [f"It does not fit: {here}, and the states need {human_bytes(p.state)}; with all weights "
                f"there is room for {_tokens(room)} a sequence."]
    if disk is None:
        lines = [f"It does not fit: {here}, and all but the experts needs {human_bytes(p.total - p.experts)}."]
    else:
        lines = [f"It is larger than memory: {here}. Experts are read from disk as they are used, "
                 f"{human_bytes(disk)} a token: {_rate(1e9 / max(disk, 1))} tokens/s for each GB/s of the disk "
                 "(estimate).",
                 f"With so much on disk, there is room for {_tokens(fits)} a sequence."]
    if fitting:
        return [*lines, f"Weights in {fitting} would fit, {human_bytes(p.typed[fitting])}."]
    smallest = min(p.typed, key=p.typed.get)
    return [*lines, f"No type would fit: in {smallest} the weights are {human_bytes(p.typed[smallest])}."]


def _rate(x):
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


def _tokens(n):
    return "any number of tokens" if n >= 1 << 40 else f"{n:,} tokens"
