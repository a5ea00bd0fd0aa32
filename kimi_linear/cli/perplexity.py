"""``kimi-linear perplexity``: how surprised a model is by a text."""

import time
from dataclasses import asdict

from ._common import (
    add_compute_arguments,
    add_json_argument,
    add_model_argument,
    human_bytes,
    load_model,
    positive,
    print_json,
    print_table,
    progress,
    read_text,
    say,
    types_of,
)

HELP = "perplexity of a text, in windows or in one piece"
EPILOG = """
kimi-linear perplexity --text book.txt
kimi-linear perplexity ~/models/kimi --text book.txt --window 2048 --whole 8192
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text to read; - is stdin")
    parser.add_argument("--window", type=positive, default=1024, metavar="N",
                        help="tokens of a window, each from an empty state (default: %(default)s)")
    parser.add_argument("--whole", type=positive, metavar="N",
                        help="the first N tokens in one piece, instead of the whole text in windows")
    add_compute_arguments(parser, cache="float32", activations="float32")
    add_json_argument(parser)


def run(args):
    from ..perplexity import perplexity

    text = read_text(args.text)
    model = load_model(args)
    if model.tokenizer is None:
        raise ValueError(f"{model._has_no_tokenizer}, so it cannot read {args.text}")
    tokens = model.tokenizer.encode(text, specials=False)[: args.whole]
    if len(tokens) < 2:
        raise ValueError(f"{args.text} has {len(tokens)} tokens; it must have 2 or more")
    begin = time.perf_counter()
    with progress(len(tokens), "perplexity") as bar:
        result = perplexity(model, tokens, None if args.whole else args.window, bar.update)
    seconds = time.perf_counter() - begin
    n_bytes = len(text.encode()) if args.whole is None else len(model.tokenizer.decode_bytes(tokens))
    facts = {"model": model.name, "text": args.text, "bytes": n_bytes, "tokens": len(tokens),
             "window": None if args.whole else args.window,
             "activations": model.activations, "cache": model.cache, **asdict(result)}
    if args.json:
        print_json(facts | {"seconds": seconds, "tokens_per_second": len(tokens) / seconds})
        return 0
    how = f"windows of {args.window:,}" if args.whole is None else "one piece"
    print_table([
        ("text", f"{args.text}: {human_bytes(n_bytes)}, {len(tokens):,} tokens, in {how}"),
        ("scored", f"{result.scored:,} tokens"),
        ("loss", f"{result.nll_per_token:.6f} nats a token"),
        ("perplexity", f"{result.perplexity:.5f}"),
        ("bits a byte", f"{result.bits_per_byte:.6f}"),
        ("types", types_of(model)),
    ])
    say(f"{len(tokens):,} tokens in {seconds:.1f} s: {len(tokens) / seconds:,.0f} tokens/s")
    return 0
