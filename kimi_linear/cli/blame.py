"""``kimi-linear blame``: which ops of a foreign run are wrong in themselves, and by which known fault."""

from ._common import (
    MODEL_IS,
    add_json_argument,
    add_names_arguments,
    check_names,
    foreign_calls,
    print_json,
    print_report,
)

HELP = "run every op of a foreign trace again in float64 on its own inputs: which are wrong, and how?"
EPILOG = """
kimi-linear blame ~/models/kimi theirs.safetensors
kimi-linear blame ~/models/kimi theirs.safetensors --names hf --prefix short/ --dtype bfloat16
kimi-linear blame ~/models/kimi prompt.safetensors first-token.safetensors second-token.safetensors
kimi-linear blame ~/models/kimi calls --names vllm --slot 3
kimi-linear blame ~/models/kimi theirs.safetensors --weights ~/models/converted.gguf
kimi-linear blame --faults

exit code 0: no op is wrong in itself, and no weight differs; 1: one does; 2: bad usage or input
"""


def add_arguments(parser):
    parser.add_argument("model", metavar="MODEL", nargs="?",
                        help=f"the same checkpoint: {MODEL_IS}")
    parser.add_argument("theirs", metavar="THEIRS", nargs="*",
                        help="trace files, one for each of consecutive calls of the same sequences")
    add_names_arguments(parser, "THEIRS")
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"),
                        help="what they computed in (default: as the file says, or as most ops show)")
    parser.add_argument("--activations", choices=("float32", "int8", "bfloat16"),
                        help="to what they round the inputs of products (default: as the file says, or as most show)")
    parser.add_argument("--weights", metavar="MODEL",
                        help="the checkpoint that they ran: its weights are compared by name first")
    parser.add_argument("--faults", action="store_true", help="list the known faults, and do nothing else")
    add_json_argument(parser)


def run(args):
    if args.faults:
        return _list_faults(args)
    if args.model is None or not args.theirs:
        raise ValueError("it needs MODEL ('tiny' is the packaged one) and at least one THEIRS.safetensors")
    check_names(args, args.model, "MODEL")
    from ..diff import blame
    from ..model import Model

    model = Model.from_pretrained(args.model)
    calls = [call for path in args.theirs for call in foreign_calls(args, path, model.config)]
    weights = None if args.weights is None else Model.from_pretrained(args.weights)
    return print_report(args, blame(model, calls, dtype=args.dtype, weights=weights,
                                    activations=args.activations))


def _list_faults(args):
    from ..faults import CATALOGUE

    if args.json:
        print_json([{"name": f.name, "text": f.text, "ops": list(f.ops), "scenario": f.scenario, "source": f.source}
                    for f in CATALOGUE.values()])
        return 0
    for f in CATALOGUE.values():
        print(f"{f.name:<32}{'any op' if f.ops == ('*',) else ', '.join(f.ops)}: {f.text} ({f.scenario})")
    return 0
