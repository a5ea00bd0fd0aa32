"""``kimi-linear verify``: every op of a model beside float64 and its budget, or one file of a model beside another."""

import argparse
import os
import sys

from ._common import (
    add_compute_arguments,
    add_json_argument,
    add_model_argument,
    integers,
    load_model,
    moving,
    non_negative,
    positive,
    print_json,
    print_report,
    progress,
    read_text,
    say,
)

HELP = "every op of a model beside the float64 reference and its budget; or two files of one model"
EPILOG = """
kimi-linear verify
kimi-linear verify ~/models/kimi --tokens 200 --text book.txt --all
kimi-linear verify kimi-bf16.gguf kimi-q4_k.gguf

exit code 0: every op inside its budget; 1: one is over it; 2: bad usage or input
Two files: the error of each tensor's values, the worst first, then KL(A || B), top-1 and perplexities on the text.
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("other", metavar="MODEL_B", nargs="?", help="another file of the model, to compare with it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to run; - is stdin (default: a text in the package)"
    )
    source.add_argument("--ids", type=integers, metavar="ID,ID,...", help="token ids to run")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=256,
        metavar="N",
        help="tokens of it at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=non_negative,
        default=0,
        metavar="N",
        help="of random ids, for a model without a tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--own-experts",
        action="store_true",
        help="judge the run with the engine's own expert ids, not the reference's",
    )
    parser.add_argument(
        "--no-free-run", action="store_true",
        help="leave out the run that lists routing flips; route is then judged with --own-experts alone"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="a line for every tap, not only for every op; of two files, for every tensor",
    )
    add_compute_arguments(parser)
    add_json_argument(parser)


def run(args):
    from ..verify import verify

    text = read_text(args.text) if args.text is not None else None
    if args.other is not None:
        return _compare(args, text)
    model = load_model(args)
    tokens = _tokens(model, args, text)
    with progress(1, "verify", unit="tap") as bar:
        report = verify(
            model, tokens, forced=not args.own_experts, free_run=not args.no_free_run, progress=moving(bar)
        )

    def text(report):
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        return report.render(all_taps=args.all, colour=colour, ascii_only=not _draws_blocks())

    return print_report(args, report, text)


def _compare(args, text):
    """Two files of one model."""
    from ..compare_models import compare_models

    if args.model is not None or args.own_experts or args.no_free_run:
        raise ValueError("two files are compared; --model, --own-experts and --no-free-run are for one model")
    first = load_model(args)
    second = load_model(argparse.Namespace(**{**vars(args), "model_positional": args.other}))
    tokens = _tokens(first, args, text)
    with progress(1, "verify", unit="step") as bar:
        report = compare_models(first, second, tokens, progress=moving(bar))
    if args.json:
        print_json(report.to_dict())
    else:
        print(report.render(all_tensors=args.all))
    return 0


def _tokens(model, args, text):
    """Ids to run, at most ``--tokens`` of them."""
    import numpy as np

    from ..file_check import packaged_text

    if args.ids is not None:
        tokens = np.asarray(args.ids, np.int64)
    elif model.tokenizer is not None:
        tokens = model.tokenizer.encode(packaged_text() if text is None else text, specials=False)
    elif text is not None:
        raise ValueError(f"{model._has_no_tokenizer}, so it cannot read {args.text}; give --ids")
    else:
        say(f"{model._has_no_tokenizer}: random ids, seed {args.seed}")
        tokens = np.random.default_rng(args.seed).integers(
            0, model.config.vocab_size, args.tokens, dtype=np.int32
        )
    if not len(tokens):
        raise ValueError(f"{args.text or '--ids'} has no token; verify needs at least one")
    return tokens[: args.tokens]


def _draws_blocks():
    try:
        "█▏·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
