"""``kimi-linear generate``: a prompt goes on, streamed."""

import argparse
import sys

from ..load.strict_json import parse
from ._common import (
    add_compute_arguments,
    add_json_argument,
    add_model_argument,
    integers,
    load_model,
    non_negative,
    positive,
    print_json,
    read_text,
    reading,
    say,
    seed,
    types_of,
)

HELP = "continue a prompt, streamed to stdout"
EPILOG = """
kimi-linear generate --prompt "In the beginning" --temperature 0.8 --top-p 0.95 --seed 7
kimi-linear generate ~/models/kimi --chat --prompt "Why is the sky blue?"
"""


def add_arguments(parser):
    add_model_argument(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; stderr shows it before what follows")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file; - is stdin")
    prompt.add_argument("--ids", type=integers, metavar="ID,ID,...", help="token ids; no tokenizer is needed")
    parser.add_argument("--chat", action="store_true", help="send the prompt as one user message")
    add_generation_arguments(parser)
    parser.add_argument("--logprobs", type=non_negative, default=0, metavar="K",
                        help="with --json: the K likeliest of each token, with log-probabilities")
    parser.add_argument("-n", "--samples", type=positive, default=1, metavar="N",
                        help="so many continuations; the prompt is read once (default: %(default)s)")
    add_compute_arguments(parser, cache="float16", activations="auto", read_ahead=True)
    add_json_argument(parser)


def add_generation_arguments(parser):
    """How tokens are drawn and where they end; `generation_options` gives them to ``model.generate``."""
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N",
                        help="tokens to write at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="X",
                        help="0 takes the likeliest token (default: the checkpoint's, else 0)")
    parser.add_argument("--top-k", type=non_negative, metavar="K",
                        help="among the K likeliest; 0 is all (default: the checkpoint's, else 0)")
    parser.add_argument("--top-p", type=float, metavar="P",
                        help="among the likeliest that together have probability P (default: the checkpoint's, else 1)")
    parser.add_argument("--min-p", type=float, metavar="P",
                        help="among those at least P times as likely as the likeliest (default: the checkpoint's, "
                             "else 0)")
    parser.add_argument("--repetition-penalty", type=float, metavar="X",
                        help="divide positive logits of tokens seen by X, multiply negative ones (default: the "
                             "checkpoint's, else 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text; may be given again")
    parser.add_argument("--template-option", type=_option, action="append", metavar="NAME=VALUE",
                        help="a variable for the chat template, its value in JSON, as enable_thinking=false; may be "
                             "given again")
    parser.add_argument("--seed", type=seed, default=0, metavar="N",
                        help="the same seed gives the same text (default: %(default)s)")


def generation_options(args):
    """The options of ``model.generate`` that `add_generation_arguments` asked for."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    options = {name: getattr(args, name) for name in names}
    given = args.template_option
    return options if given is None else {**options, "template_options": dict(given)}


def _option(text):
    """NAME=VALUE, for ``type=``; the value is JSON."""
    name, equals, value = text.partition("=")
    try:
        if not name or not equals:
            raise ValueError
        return name, parse(value.encode())
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be NAME=VALUE with a value in JSON, as "
                                         "enable_thinking=false or mode='\"fast\"'") from None


def run(args):
    if args.chat and args.ids is not None:
        raise ValueError("--chat needs text; give --prompt or --prompt-file, not --ids")
    if args.template_option and not args.chat:
        raise ValueError("--template-option needs --chat; only messages go through the template")
    if args.logprobs and not args.json:
        raise ValueError("--logprobs needs --json, which shows them")
    prompt = _prompt(args)
    model = load_model(args)
    generation = model.generate(prompt, n=args.samples, logprobs=max(1, args.logprobs) if args.json else 0,
                                progress=reading(), **generation_options(args))
    if args.json:
        generation.run()
        print_json(_facts(model, generation))
        return 0
    if args.samples > 1:
        _print_samples(generation.run())
        say(_cost(model, generation))
        return 0
    if isinstance(prompt, str):
        say(prompt, end="")
    try:
        _stream(generation)
    except KeyboardInterrupt:
        _finish(model, generation)
        raise
    except Exception:
        print(flush=True)  # what is said of it begins a line
        raise
    _finish(model, generation)
    return 0


def _prompt(args):
    if args.ids is not None:
        return args.ids
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file)
    return [{"role": "user", "content": text}] if args.chat else text


def _stream(generation):
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _print_samples(generation):
    for i, text in enumerate(generation.text):
        print(f"--- {i + 1} of {generation.n}\n{text}")


def _finish(model, generation):
    print(flush=True)
    say(_cost(model, generation))


def _cost(model, generation):
    s, heat = generation.stats, generation.sampling["temperature"]
    how = "greedy" if heat == 0 else f"temperature {heat:g}, seed {generation.seed}"
    return (f"[{s.prompt_tokens} tokens read at {s.prefill_rate:,.0f}/s, {s.new_tokens} written at "
            f"{s.decode_rate:,.0f}/s; {how}; {types_of(model)}; "
            f"ended by {_reasons(generation)}]")


def _reasons(generation):
    reasons = generation.finish_reason if generation.is_batch else [generation.finish_reason]
    names = {None: "interruption", "interrupted": "interruption"}
    return ", ".join(dict.fromkeys(names.get(reason, reason) for reason in reasons))


def _facts(model, generation):
    s = generation.stats
    prompt_ids = generation.prompt_ids[0] if generation.is_batch else generation.prompt_ids
    return {
        "model": model.name, "text": generation.text, "prompt_tokens": prompt_ids.tolist(),
        "tokens": generation.tokens, "logprobs": generation.logprobs, "top_logprobs": generation.top_logprobs,
        "finish_reason": generation.finish_reason,
        "sampling": {**generation.sampling, "seed": generation.seed},
        "activations": model.activations, "cache": model.cache,
        "stats": {"prefill_seconds": s.prefill_seconds, "decode_seconds": s.decode_seconds,
                  "prefill_tokens_per_second": s.prefill_rate, "decode_tokens_per_second": s.decode_rate},
    }
