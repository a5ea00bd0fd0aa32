"""``kimi-linear demo``: the packaged model writes, and shows what it cost and how exact it was."""

import sys

from ._common import human_bytes, human_count, layer_pattern, moving, non_negative, positive, print_table, progress

HELP = "the packaged model writes text, with its cost and its errors against float64"
EPILOG = """
kimi-linear demo
kimi-linear demo --seed 3 --max-new-tokens 60
"""

PROMPT = "In the beginning"
WIDTH = 78  # columns of the text


def add_arguments(parser):
    parser.add_argument("--prompt", metavar="TEXT", default=PROMPT, help="text to continue (default: %(default)s)")
    parser.add_argument("--seed", type=non_negative, default=12, metavar="N",
                        help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=120, metavar="N",
                        help="tokens to write at most (default: %(default)s)")


def run(args):
    from .. import __version__
    from ..context import current
    from ..model import Model
    from .inspect import parameters

    model = Model.tiny()
    total, active = parameters(model.config)
    print(f"kimi_linear {__version__}: a trained Kimi-Linear of {human_count(total)} parameters "
          f"({human_count(active)} a token),\nlayers {layer_pattern(model.config)}, writes on this CPU, and "
          "is held against itself in float64.\n")
    generation, grown = _write(model, args)
    _cost(model, generation, grown, current(model.ctx))
    report = _verify(model, [*generation.prompt_ids.tolist(), *generation.tokens])
    _exactness(model, report)
    named = _plant_a_bug()
    print('\nGo on with\n  kimi-linear generate --chat --prompt "Continue: And the LORD said"'
          "\n  kimi-linear verify      every op on its own inputs, beside its budget"
          "\n  kimi-linear bench       where the time goes, beside what this machine can do")
    return 0 if report.ok and named else 1


# ---- the text ----

def _write(model, args):
    """Streams the text; the generation, and the bytes that the process grew by."""
    from ..bench import anonymous_bytes
    from ..context import current

    options = {"temperature": 0.8, "top_p": 0.95, "seed": args.seed}
    model.generate(args.prompt, max_new_tokens=2, **options).run()  # takes what a first call does
    current(model.ctx)._core.trim()
    before = anonymous_bytes()
    generation = model.generate(args.prompt, max_new_tokens=args.max_new_tokens, **options)
    page = _Page()
    page.write(args.prompt)
    for piece in generation:
        page.write(piece)
    page.write("\n\n")
    now = anonymous_bytes()
    return generation, None if now is None or before is None else now - before


class _Page:
    """Streams text to stdout, indented and wrapped; a word is shown when it is whole."""

    def __init__(self):
        self.column, self.word = 0, ""

    def write(self, text):
        for character in text:
            if not character.isspace():
                self.word += character
                continue
            self._show_word()
            if character == "\n":
                self._end_line()
        sys.stdout.flush()

    def _show_word(self):
        if self.word and self.column + 1 + len(self.word) > WIDTH:
            self._end_line()
        if self.word:
            sys.stdout.write((" " if self.column else "  ") + self.word)
            self.column += 1 + len(self.word)
            self.word = ""

    def _end_line(self):
        sys.stdout.write("\n")
        self.column = 0


# ---- what it cost ----

def _cost(model, generation, grown, ctx):
    from ..bench import machine
    from ..plan import of_core

    s, m = generation.stats, machine(ctx)
    plan = of_core(model._core, ctx, generation.state.position, 1, model.cache, s.prompt_tokens)
    taken = human_bytes(generation.state.nbytes + ctx._core.scratch_bytes)
    touched = "" if grown is None else f", touched {human_bytes(grown)} (the process grew by that)"
    print("What it cost")
    print_table([
        ("  machine", f"{m['cpu']}; {m['isa']}, {m['threads']} threads"),
        ("  read", f"{s.prompt_tokens} tokens at {s.prefill_rate:,.0f}/s"),
        ("  written", f"{s.new_tokens} tokens at {s.decode_rate:,.0f}/s"),
        ("  memory", f"planned {human_bytes(plan.state + plan.scratch)}, taken {taken}{touched}"),
        ("", f"beside {human_bytes(plan.weights)} of weights, mapped"),
    ])


# ---- how exact it was ----

def _verify(model, tokens):
    from ..verify import verify

    with progress(1, "verify", unit="tap") as bar:
        return verify(model, tokens, progress=moving(bar))


def _exactness(model, report):
    """One line a layer: the tap furthest from float64, the op that comes nearest to its budget.

    A single rounding reaches its budget, so `add` says nothing and is left out.
    """
    print(f"\nHow far it was from float64, {report.tokens} tokens")
    rows = []
    for place, what in _places(model.config):
        taps = [t for t in report.taps if _is_at(t.name, place)]
        far = max(taps, key=lambda t: t.total_rms)
        near = max((t for t in taps if t.share is not None and t.op != "add"), key=lambda t: t.share)
        verdict = "" if all(t.ok for t in taps) else "over its budget"
        rows.append((f"  {what}", f"{far.total_rms:.1e}", _local(far.name, place), near.op,
                     _gauge(near.share), verdict))
    print_table(rows, ("  layer", "rms error", "of tap", "nearest its budget", "of it used", ""), "<><<><")
    print(f"\n  {report.verdict}")


def _gauge(share):
    """Ten places, and the number."""
    return f"{'#' * min(10, round(10 * share)):.<10} {share:4.0%}"


def _places(config):
    """(prefix of the taps, words) of the embedding, each layer, the head."""
    yield "embed", "embedding"
    for i, layer in enumerate(config.layers):
        yield f"layers.{i}.", f"{i} {layer.mixer.upper()}, {'experts' if layer.ffn == 'moe' else 'dense'}"
    yield "", "norm, logits"


def _is_at(tap, place):
    return tap.startswith(place) if place else tap in ("norm", "logits")


def _local(tap, place):
    return tap.removeprefix(place) if place.endswith(".") else tap


# ---- a bug, and its name ----

def _plant_a_bug():
    """A copy of delta_rule hands its state back with K and V swapped; True where the card says so."""
    from .. import ops
    from ..testing import check_op
    from ..testing.delta_rule.mistakes import SWAPPED

    def copy(*args, **named):
        o, state = ops.delta_rule(*args, **named)
        return o, state.swapaxes(-1, -2)  # [V, K], as ggml and MLX keep it

    right, wrong = (check_op("delta_rule", fn, cases=["lengths", "carried"]) for fn in (ops.delta_rule, copy))
    print("\nA bug that ports have: a copy of delta_rule hands its state back as [V, K] instead of [K, V].\n"
          "Whatever it reads first comes out right; what it reads next starts from a wrong memory.")
    print_table([("  the op", right.verdict), ("  its copy", wrong.verdict)])
    print(f"  named in {wrong.seconds:.1f} s, without a model: kimi_linear.testing.check_op takes any kernel")
    return bool(right) and not wrong and wrong.reasons[0][0] == SWAPPED
