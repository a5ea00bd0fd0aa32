"""``kimi-linear quantize``: a GGUF or a Hugging Face folder to a GGUF of other types."""

from ._common import MODEL_IS
from .convert import add_output_arguments, add_type_arguments, convert_as

HELP = "a GGUF or a Hugging Face folder to a GGUF of other types"
EPILOG = """
kimi-linear quantize kimi-bf16.gguf kimi-q4_k.gguf --type Q4_K
kimi-linear quantize kimi-bf16.gguf kimi-mix.gguf --type Q4_K --map '*_exps.weight=Q2_K' --map 'output.weight=Q6_K'

Vectors, norms, routers and convolutions stay as they are.
What it costs: kimi-linear verify kimi-bf16.gguf kimi-q4_k.gguf
"""


def add_arguments(parser):
    parser.add_argument("source", metavar="SRC", help=MODEL_IS)
    parser.add_argument("target", metavar="DST.gguf", help="the file to write")
    add_type_arguments(parser)
    add_output_arguments(parser)


def run(args):
    if args.type is None and not args.map:
        raise ValueError("no type is given; --type TYPE or --map PATTERN=TYPE must say what to write")
    if not args.target.lower().endswith(".gguf"):
        raise ValueError(f"DST is {args.target!r}; it must be a file that ends in .gguf")
    return convert_as(args, label="quantize")
