"""``kimi-linear golden``: an op's cases in a file, for kernels in any language."""

import os

from ..testing.spec import OPS
from ._common import add_json_argument, human_bytes, print_json, say

HELP = "an op's cases with float64 results and allowed errors, in a file for kernels in any language"
EPILOG = """
kimi-linear golden delta_rule -o cases.npz
kimi-linear golden delta_rule -o cases.safetensors --cases "rim gates" --cases "nan*"
kimi-linear golden rms_norm -o cases.npz
"""


def add_arguments(parser):
    parser.add_argument("op", metavar="OP", help=f"an op: {', '.join(OPS)}")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file to write")
    parser.add_argument("--format", choices=("npz", "safetensors"), help="(default: as the file's name ends, else npz)")
    parser.add_argument("--cases", action="append", metavar="GLOB",
                        help="names or groups; may be given again (default: all, and the packaged model's own)")
    add_json_argument(parser)


def run(args):
    from ..testing import write_golden

    index = write_golden(args.op, args.output, format=args.format, cases=args.cases or "all")
    if args.json:
        print_json(index)
    else:
        size = human_bytes(os.path.getsize(args.output))
        say(f"{args.output}: {len(index['cases'])} cases of {args.op}, {size}; README and index are in it")
    return 0
