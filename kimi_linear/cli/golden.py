"""``kimi-linear golden``: an op's cases in a file, for kernels in any language, and their results judged."""

import os

from ..testing.spec import specs
from ._common import add_json_argument, add_output_argument, check_output, human_bytes, print_json, say

HELP = "an op's cases with float64 results and allowed errors, for kernels in any language; and the way back"
EPILOG = """
kimi-linear golden delta_rule -o cases.npz
kimi-linear golden delta_rule -o cases.safetensors --cases "rim gates" --cases "nan*"
kimi-linear golden rms_norm -o cases.npz
kimi-linear golden delta_rule --judge results.npz --without "initial state"
kimi-linear golden attention --dtype bfloat16 -o cases.npz

RESULTS is npz or safetensors: CASE/out/NAME, your results under the names and in the shapes of those in the cases.

exit code 0: written, or every case holds; 1: a case is over its budget; 2: bad usage or input
"""


def add_arguments(parser):
    parser.add_argument("op", metavar="OP", help=f"an op: {', '.join(specs())}")
    way = parser.add_mutually_exclusive_group(required=True)
    add_output_argument(way, "file of cases to write")
    way.add_argument("--judge", metavar="RESULTS", help="file of a kernel's results to judge, as check_op does")
    parser.add_argument("--format", choices=("npz", "safetensors"),
                        help="(default: as the file's name ends; without a suffix npz)")
    parser.add_argument("--cases", action="append", metavar="GLOB",
                        help="names or groups; may be given again (default: all, and the packaged model's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="what the kernel computes in: arguments are values of it, and what it rounds is allowed "
                             "(default: %(default)s)")
    parser.add_argument("--without", action="append", metavar="WORDS",
                        help="with --judge: what the kernel does not have, as a case's `needs` in the index spells it; "
                             "may be given again")
    add_json_argument(parser)


def run(args):
    from ..testing import judge_golden, write_golden
    from ..testing.golden import is_golden

    cases = args.cases or "all"
    if args.judge is not None:
        if args.format is not None:
            raise ValueError("--format is for the file to write; RESULTS is known by what it begins with")
        card = judge_golden(args.op, args.judge, cases=cases, without=args.without or (), dtype=args.dtype)
        if args.json:
            print_json(card.to_dict())
        else:
            print(card)
        return 0 if card else 1
    if args.without is not None:
        raise ValueError("--without is for --judge; what a case needs is in the index")
    check_output(args.output, is_golden, "a file of cases")
    index = write_golden(args.op, args.output, format=args.format, cases=cases, dtype=args.dtype)
    if args.json:
        print_json(index)
    else:
        size = human_bytes(os.path.getsize(args.output))
        say(f"{args.output}: {len(index['cases'])} cases of {args.op}, {size}; README and index are in it")
    return 0
