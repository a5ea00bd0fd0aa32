"""``kimi-linear diff``: two traces beside each other, down to the first divergence."""

from pathlib import Path

from ._common import add_json_argument, add_names_arguments, check_names, foreign_call, print_report

HELP = "compare two trace files tap by tap: where do they part first?"
EPILOG = """
kimi-linear trace --prompt "In the beginning" -o ours.safetensors
kimi-linear trace --prompt "In the beginning" -o exact.safetensors --reference
kimi-linear diff ours.safetensors exact.safetensors
kimi-linear diff ours.safetensors theirs.safetensors --names hf --config ~/models/kimi --prefix short/
kimi-linear diff ours.safetensors dumps --names arrays --mapping dumps.json --config ~/models/kimi

exit code 0: no tap diverges; 1: one does; 2: bad usage or input
"""

THRESHOLD_IS = "6.1e-05, or 16 units in the last place of a narrower type"


def add_arguments(parser):
    parser.add_argument("a", metavar="A", help="trace file")
    parser.add_argument("b", metavar="B", help="trace file that is the measure")
    add_names_arguments(parser, "B")
    parser.add_argument(
        "--config", metavar="DIR", help="folder of config.json (or the file), needed with --names"
    )
    parser.add_argument("--taps", action="append", metavar="GLOB", help="only these; may be given again")
    parser.add_argument(
        "--threshold",
        type=threshold,
        metavar="X",
        help=f"rms error of a token over the tap's rms from which they have parted (default: {THRESHOLD_IS})",
    )
    add_json_argument(parser)


def run(args):
    from ..diff import traces
    from ..trace import Trace, matches

    config = _config(args)
    a, b = Trace.load(args.a), foreign_call(args, args.b, config)
    if args.taps:
        a = a.filter(args.taps)
        asked = [name for name in matches([*a, *b], args.taps, made=True) if name in b]
        b = b.filter(asked) if asked else b
    return print_report(args, traces(a, b, threshold=args.threshold))


def threshold(text):
    """A number >= 0, for ``type=``."""
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a number >= 0")
    return value


def _config(args):
    from ..config import Config

    check_names(args, args.config, "--config DIR")
    if args.names is None:
        if args.config is not None:
            raise ValueError("--config is for --names; traces of ours have their shapes")
        return None
    path = Path(args.config)
    return Config.from_file(path / "config.json" if path.is_dir() else path)
