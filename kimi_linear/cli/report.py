"""``kimi-linear report``: what `diff` or `blame` finds, as one HTML page."""

from pathlib import Path

from ._common import (
    MODEL_IS,
    add_json_argument,
    add_names_arguments,
    add_output_argument,
    begins,
    check_names,
    check_output,
    foreign_call,
    foreign_calls,
    human_bytes,
    print_report,
    say,
)
from .diff import THRESHOLD_IS, threshold

HELP = "one HTML page to look at: two traces beside each other, or the ops of one judged by float64"
EPILOG = """
kimi-linear report theirs.safetensors ours.safetensors -o report.html
kimi-linear report theirs.safetensors ours.safetensors --model ~/models/kimi -o report.html
kimi-linear report theirs.safetensors --model ~/models/kimi --names hf -o report.html
kimi-linear report calls --model ~/models/kimi --names vllm -o report.html
kimi-linear report prompt.safetensors step1.safetensors --calls --model ~/models/kimi -o report.html

Two files: diff, B being the measure; with a model, what each op of A adds.
One file, or --calls: blame, each op on its own inputs; this needs the model.

exit code 0: nothing found; 1: something is wrong or diverges; 2: bad usage or input
"""


def add_arguments(parser):
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="A B: traces to lay beside each other; or one alone")
    add_output_argument(parser, "the page to write", required=True)
    parser.add_argument("--model", metavar="MODEL", help=f"the same checkpoint: {MODEL_IS}")
    parser.add_argument("--calls", action="store_true",
                        help="the files are consecutive calls of one run, from its beginning")
    add_names_arguments(parser, "a TRACE")
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"),
                        help="of one trace: what they computed in (default: as the file says, or as most ops show)")
    parser.add_argument("--threshold", type=threshold, metavar="X",
                        help="of two: rms error of a token over the tap's rms from which they have parted "
                             f"(default: {THRESHOLD_IS})")
    add_json_argument(parser)


def run(args):
    from ..diff import blame, traces
    from ..model import Model

    check_output(args.output, lambda path: begins(path, b"<!doctype html", b"<!DOCTYPE html"), "a page")
    alone = args.calls or len(args.traces) == 1
    _check(args, alone)
    model = None if args.model is None else Model.from_pretrained(args.model)
    config = None if model is None else model.config
    if alone:
        calls = [call for path in args.traces for call in foreign_calls(args, path, config)]
        found = blame(model, calls, dtype=args.dtype)
    else:
        a, b = (foreign_call(args, path, config) for path in args.traces)
        found = traces(a, b, threshold=args.threshold, model=model)
    found.html(args.output)
    say(f"{args.output}: {human_bytes(Path(args.output).stat().st_size)}")
    return print_report(args, found, lambda report: report.verdict)


def _check(args, alone):
    if not alone and len(args.traces) > 2:
        raise ValueError(f"there are {len(args.traces)} traces; name two, or say --calls if they are calls of one run")
    if alone and args.model is None:
        raise ValueError("one trace is judged by running its ops again: name the checkpoint, --model MODEL")
    if alone and args.threshold is not None:
        raise ValueError("--threshold is for two traces; an op is judged by its own noise")
    if not alone and args.dtype is not None:
        raise ValueError("--dtype is for one trace; two are compared as they are")
    check_names(args, args.model, "--model MODEL")
