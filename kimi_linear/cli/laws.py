"""``kimi-linear laws``: every law of the engine, checked on a model and this machine."""

from .._names import meant
from ._common import (
    add_device_argument,
    add_json_argument,
    add_model_argument,
    load_model,
    moving,
    non_negative,
    print_report,
    progress,
)

HELP = "what must give the same bytes, or stay within the budget: checked on a model, on this CPU or a GPU"
EPILOG = """
kimi-linear laws
kimi-linear laws ~/models/kimi --only batch_is_alone --only any_thread_count
kimi-linear laws ~/models/kimi --device hip

exit code 0: every law holds; 1: one does not; 2: bad usage or input
"""


def add_arguments(parser):
    from ..laws import LAWS

    add_model_argument(parser)
    parser.add_argument("--only", action="append", metavar="LAW",
                        help=f"this law; may be given again (default: all: {', '.join(LAWS)})")
    add_device_argument(parser)
    parser.add_argument("--seed", type=non_negative, default=0, metavar="N",
                        help="of the random token ids (default: %(default)s)")
    add_json_argument(parser)


def run(args):
    from ..laws import LAWS, laws

    for name in args.only or ():
        if name not in LAWS:
            raise ValueError(f"--only is {name!r}; the laws are {', '.join(LAWS)}{meant(name, LAWS)}")
    model = load_model(args)
    with progress(1, "laws", unit="law") as bar:
        report = laws(model, args.only, seed=args.seed, progress=moving(bar))
    return print_report(args, report)
