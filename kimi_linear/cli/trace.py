"""``kimi-linear trace``: the intermediates of a run, in one file."""

import os

from ._common import (
    add_compute_arguments,
    add_json_argument,
    add_model_argument,
    add_output_argument,
    check_output,
    human_bytes,
    integers,
    is_trace,
    load_model,
    model_path,
    moving,
    print_json,
    progress,
    read_text,
    say,
)

HELP = "run tokens and keep their intermediates in a safetensors file"
EPILOG = """
kimi-linear trace --prompt "In the beginning" --taps "layers.3.*" -o ours.safetensors
kimi-linear trace ~/models/kimi --ids 1,17,42 --taps "*.out" --taps logits -o ours.safetensors --reference
kimi-linear trace kimi.gguf --ids 1,17,42 -o theirs.safetensors --engine llama.cpp
"""


def add_arguments(parser):
    add_model_argument(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to run")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file; - is stdin")
    prompt.add_argument("--ids", type=integers, metavar="ID,ID,...", help="token ids to run")
    parser.add_argument(
        "--taps",
        action="append",
        metavar="GLOB",
        help="taps to keep, such as 'layers.3.kda.*'; may be given again (default: all)",
    )
    parser.add_argument("--states", action="append", metavar="GLOB",
                        help="state arrays to keep, before and after, such as 'layers.3' (not with --reference)")
    add_output_argument(parser, "safetensors file to write", required=True)
    parser.add_argument(
        "--reference", action="store_true", help="of the float64 reference model, not of the engine"
    )
    parser.add_argument("--engine", choices=("ours", "llama.cpp"), default="ours",
                        help="what runs it: llama.cpp takes a GGUF, and needs llama-cpp-python (default: %(default)s)")
    add_compute_arguments(parser, cache="float32", activations="float32")
    add_json_argument(parser)


def run(args):
    _check(args)
    text = read_text(args.prompt_file) if args.prompt_file is not None else args.prompt
    model = load_model(args)
    tokens = args.ids if text is None else _encode(model, text)
    if not len(tokens):
        raise ValueError(f"{_source(args)} has no token; trace needs at least one")
    taps = args.taps or ["*"]
    if args.engine == "llama.cpp":
        trace = _llama_cpp(args, model, tokens, taps)
        trace.save(args.output)
    elif args.reference:
        trace = _reference(model, tokens, taps)
        trace.save(args.output)
    else:
        with progress(len(tokens), "trace") as bar:
            trace = model.trace(tokens, taps, to=args.output, states=args.states, progress=moving(bar))
    if args.json:
        shapes = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in trace.items()}
        print_json({"file": args.output, "tokens": len(tokens), "bytes": trace.nbytes, "taps": shapes})
    else:
        say(f"{args.output}: {len(trace)} taps of {len(tokens):,} tokens, {human_bytes(trace.nbytes)}")
    return 0


def _check(args):
    check_output(args.output, is_trace, "a trace")
    llama = args.engine == "llama.cpp"
    if llama and (args.reference or args.states):
        raise ValueError("--reference and --states are of our engine; leave out --engine llama.cpp")
    if args.reference and args.states:
        raise ValueError("--states is of the engine; --reference keeps none")
    other = "--engine llama.cpp" if llama else "--reference"
    for option, usual in {"device": "cpu", "activations": "float32"}.items():
        if (llama or args.reference) and getattr(args, option) != usual:
            raise ValueError(f"--{option} is of our engine; leave out {other}")


def _source(args):
    return "--ids" if args.ids is not None else "--prompt" if args.prompt is not None else args.prompt_file


def _encode(model, text):
    if model.tokenizer is None:
        raise ValueError(f"{model._has_no_tokenizer}; give --ids")
    return model.tokenizer.encode(text)


def _llama_cpp(args, model, tokens, taps):
    """The same trace by llama.cpp."""
    from ..adapters.llama_cpp import Engine

    path = model_path(args)
    if path is None or not os.path.isfile(os.path.expanduser(path)):
        raise ValueError(f"{model.name} is a folder; llama.cpp takes a GGUF file")
    try:
        engine = Engine(os.path.expanduser(path), model=model, threads=args.threads or 1)
    except ModuleNotFoundError as error:
        raise ValueError(f"--engine llama.cpp: {error}") from None
    with engine:
        return engine.trace(tokens, taps)


def _reference(model, tokens, taps):
    """The same trace by the float64 model."""
    import numpy as np

    from .._arrays import as_integers
    from ..dataflow import in_order
    from ..trace import Trace

    ids = as_integers(np.asarray(tokens), "ids", ("T",), low=0, high=model.config.vocab_size)
    kept = model.reference().forward(ids, taps=taps).taps
    meta = {
        "model": model.name,
        "tokens": ids.tolist(),
        "offsets": [0, len(ids)],
        "source": "kimi_linear.reference",
        "dtype": "float64",
    }
    return Trace({name: kept[name] for name in in_order(kept)}, meta)
