"""``kimi-linear convert``: a Hugging Face folder to a GGUF, and back."""

from ._common import MODEL_IS, add_json_argument, moving, print_json, progress, say

HELP = "a Hugging Face folder to a GGUF that llama.cpp runs too, or a GGUF to a folder"
EPILOG = """
kimi-linear convert ~/models/kimi kimi-bf16.gguf
kimi-linear convert ~/models/kimi kimi.gguf --type Q4_K --map 'output.weight=Q6_K' --map 'blk.*.ffn_down*=Q5_K'
kimi-linear convert kimi-bf16.gguf ~/models/kimi-again

A target that ends in .gguf is a GGUF, any other a folder. There and back gives the same bytes, where nothing is
quantised, and an equal config.
"""


def add_arguments(parser):
    parser.add_argument("source", metavar="SRC", help=MODEL_IS)
    parser.add_argument("target", metavar="DST", help="FILE.gguf; or, of a GGUF, a folder")
    add_type_arguments(parser)
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
                        help="of a folder's tensors (default: as the file's folder had them, else a float type as it "
                             "is and blocks as bfloat16)")
    add_output_arguments(parser)


def add_type_arguments(parser):
    """``--type`` and ``--map``."""
    parser.add_argument("--type", metavar="TYPE",
                        help="of all matrices of a GGUF, as Q4_K (default: each keeps its own)")
    parser.add_argument("--map", metavar="PATTERN=TYPE", action="append", default=[],
                        help="of tensors whose GGUF name matches, before --type; may be given again, the first match "
                             "wins")


def add_output_arguments(parser):
    """``--no-tokenizer``, ``--force`` and ``--json``."""
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false",
                        help="leave the tokenizer out, also where the source has only some of its files")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    add_json_argument(parser)


def run(args):
    return convert_as(args, args.dtype)


def convert_as(args, dtype="auto", label="convert"):
    """Do what the arguments say, with a bar; what was written, on stdout."""
    from ..convert import convert

    with progress(0, label, unit="B") as bar:
        result = convert(args.source, args.target, type=args.type, types=args.map, dtype=dtype,
                         tokenizer=args.tokenizer, overwrite=args.force, progress=moving(bar))
    if result.warning:
        say(f"warning: {result.warning}")
    if args.json:
        print_json(result.to_dict())
    else:
        print(result)
    return 0
