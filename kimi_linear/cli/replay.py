"""``kimi-linear replay``: recorded calls of an op, each judged by float64 on its own inputs."""

from ._common import add_json_argument, moving, positive, print_report, progress

HELP = "judge recorded calls of an op, each on its own inputs: which are wrong?"
EPILOG = """
kimi-linear replay calls --op delta_rule
kimi-linear replay calls --op delta_rule --conventions fla --top 20
kimi-linear replay calls/call-000137.safetensors --json

exit code 0: no call is wrong; 1: one is, or could not be judged; 2: bad usage or input
"""


def add_arguments(parser):
    parser.add_argument("path", metavar="DIR", nargs="+",
                        help="folder of calls as kimi_linear.adapters.record_calls writes them, or one call's file")
    parser.add_argument("--op", metavar="OP", help="the op, where the files do not say; calls of others are left out")
    parser.add_argument("--conventions", metavar="NAME",
                        help="whose names and layouts the calls have (default: as the file says, else ours)")
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"),
                        help="what they computed in (default: the coarsest of a call's arrays)")
    parser.add_argument("--top", type=positive, default=12, metavar="N", help="rows to print (default: %(default)s)")
    add_json_argument(parser)


def run(args):
    from ..diff import replay

    with progress(None, "replay", unit="call") as bar:
        found = replay(args.path, op=args.op, conventions=args.conventions, dtype=args.dtype, progress=moving(bar))
    return print_report(args, found, text=lambda report: report.table(args.top))
