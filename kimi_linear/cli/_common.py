"""What the commands share: the model argument, words to stderr, tables, sizes."""

import codecs
import contextlib
import io
import json
import os
import sys
from pathlib import Path

from .._scalars import LARGEST_INT, to_json
from ..config import layer_pattern

__all__ = [
    "CACHES", "MODEL_IS", "add_compute_arguments", "add_device_argument", "add_json_argument", "add_model_argument",
    "add_names_arguments", "add_output_argument", "begins", "check_names", "check_output", "foreign_call",
    "foreign_calls", "human_bytes", "human_count", "human_rate", "integers", "is_trace", "layer_pattern", "load_model",
    "model_path", "moving", "non_negative", "positive", "print_json", "print_report", "print_table", "progress",
    "read_text", "say", "seed", "types_of",
]


CACHES = ("float32", "float16", "q8_0")
MODEL_IS = 'Hugging Face folder, GGUF file, hub id in the local cache, or "tiny", the packaged model'


# ---- arguments ----

def add_model_argument(parser):
    """``[MODEL]`` or ``--model MODEL``: a folder, a GGUF, or a hub id in the local cache; else the packaged model."""
    parser.add_argument("model_positional", metavar="MODEL", nargs="?", help=f"{MODEL_IS} (default: tiny)")
    parser.add_argument("--model", metavar="MODEL", help="the same, by name")


def add_compute_arguments(parser, *, cache=None, activations=None, read_ahead=False):
    """``--threads``, ``--isa``, ``--device``; where asked for ``--cache``, ``--activations``, ``--no-read-ahead``."""
    parser.add_argument("--threads", type=positive, metavar="N",
                        help="threads to use (default: OMP_NUM_THREADS, else one for each processor, and no more than "
                             "a container has time of)")
    parser.add_argument("--isa", choices=("scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "neon", "neon_dotprod"),
                        help="the CPU's kernels (default: the best here)")
    add_device_argument(parser)
    if cache is not None:
        parser.add_argument("--cache", choices=CACHES, default=cache,
                            help="type of the latent cache (default: %(default)s)")
    if activations is not None:
        fast = "int8 where weights are in blocks, bfloat16 where they are in that"
        words = fast if activations == "auto" else "%(default)s"
        parser.add_argument("--activations", choices=("float32", "int8", "bfloat16"), default=activations,
                            help=f"what products compute with (default: {words})")
    if read_ahead:
        parser.add_argument("--no-read-ahead", dest="read_ahead", action="store_false",
                            help="do not read a cold file whole before the first token")


def add_device_argument(parser):
    """``--device``."""
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="cpu, hip (the first GPU), hip:N, or hip-host, its kernels run by the CPU (default: "
                             "%(default)s)")


def add_output_argument(parser, words, **options):
    """``-o FILE``; ``~`` is home, though no shell has read it."""
    parser.add_argument("-o", "--output", metavar="FILE", type=os.path.expanduser, help=words, **options)


def add_json_argument(parser):
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_names_arguments(parser, file):
    """``--names``, ``--mapping``, ``--prefix``, ``--slot``: what a foreign trace is, as `adapters.KINDS` has it."""
    from ..adapters import KINDS

    parser.add_argument("--names", choices=tuple(KINDS), metavar="KIND",
                        help=f"what {file} is, where `kimi-linear trace` did not write it: "
                             f"{'; '.join(f'{k}, {text}' for k, (_, text) in KINDS.items())}")
    parser.add_argument("--mapping", metavar="FILE",
                        help="JSON, for arrays and pt (default: mapping.json in the folder)")
    parser.add_argument("--prefix", default="", metavar="TEXT", help=f"of the names in {file} to take (default: all)")
    parser.add_argument("--slot", type=non_negative, metavar="N",
                        help="of what vLLM or SGLang recorded, the request in this slot of its pool (default: all of "
                             "them, the same ones in every call)")


def check_names(args, given, option):
    """ValueError where --names lacks `option`, which has the shapes of heads, or --mapping or --slot is for nothing."""
    if args.mapping is not None and args.names not in ("arrays", "pt"):
        raise ValueError("--mapping is for --names arrays and --names pt")
    if args.slot is not None and args.names not in ("vllm", "sglang"):
        raise ValueError("--slot is for --names vllm and --names sglang")
    if args.names is not None and given is None:
        raise ValueError(f"--names {args.names} needs {option}: shapes of heads are not in the file")


def foreign_calls(args, path, config):
    """The traces of `path`, one a call, as the arguments say; what `kimi-linear trace` wrote is taken as it is."""
    from ..adapters import load

    ours = _of_ours(path)
    if ours and args.prefix and args.names is None:
        raise ValueError(f"--prefix is {args.prefix!r}, and {path} is a trace of ours, whose names have none; it is "
                         "for files of another kind")
    if ours:
        return [ours]
    calls = load(path, args.names, model=config, prefix=args.prefix, mapping=args.mapping)
    if args.slot is None:
        return calls
    from ..adapters.vllm import of_slot

    return of_slot(calls, args.slot)


def foreign_call(args, path, config):
    """The same of a file that must be of one call."""
    calls = foreign_calls(args, path, config)
    if len(calls) != 1:
        raise ValueError(f"{path} has {len(calls)} calls, and two traces are compared call by call; kimi-linear blame "
                         "takes them all")
    return calls[0]


def check_output(path, ours, kind):
    """ValueError where a file is at `path` of which `ours(path)` is false: it is not `kind`, and would be lost."""
    if os.path.isfile(path) and os.path.getsize(path) > 0 and not ours(path):
        raise ValueError(f"{path} is there and is not {kind}; it would be lost: give another name, or remove it")


def begins(path, *starts):
    """Whether a file begins with one of some bytes."""
    with open(path, "rb") as file:
        return file.read(max(map(len, starts))).startswith(starts)


def is_trace(path):
    """Whether `kimi-linear trace` wrote the file."""
    return _of_ours(path) is not None


def _of_ours(path):
    """The trace that `kimi-linear trace` wrote; None of another kind of file."""
    from ..errors import FormatError
    from ..trace import FORMAT, Trace

    try:
        trace = Trace.load(path)
    except (FormatError, OSError):
        return None  # a folder, or another kind of file: who reads it says what is wrong
    return trace if trace.meta.get("format") == FORMAT else None


def positive(text):
    """An int >= 1, for ``type=``."""
    return _at_least(text, 1)


def non_negative(text):
    """An int >= 0, for ``type=``."""
    return _at_least(text, 0)


def seed(text):
    """An int of 64 bits, for ``type=``."""
    return _at_least(text, 0, (1 << 64) - 1)


def _at_least(text, low, largest=LARGEST_INT):
    import argparse

    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < low:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer >= {low}")
    if value > largest:
        raise argparse.ArgumentTypeError(f"it is {text!r:.60}; it must be at most {largest}")
    return value


def integers(text):
    """Integers >= 0 separated by commas or blanks, for ``type=``; between two commas there must be one."""
    fields = text.split(",") if text else []
    return [non_negative(part) for field in fields for part in field.split() or [field]]


def model_path(args):
    """The model that the arguments name; None for the packaged one."""
    by_place, by_name = getattr(args, "model_positional", None), getattr(args, "model", None)
    if by_place is not None and by_name is not None:
        raise ValueError(f"the model is named twice, {by_place!r} and --model {by_name!r}; name it once")
    return by_name if by_place is None else by_place


def load_model(args):
    """The model that the arguments name, in the threads, kernels and types that they ask for; a cold file is read."""
    from ..context import Context
    from ..model import Model

    path = model_path(args)
    options = {name: getattr(args, name) for name in ("cache", "activations") if getattr(args, name, None)}
    threads, isa, device = (getattr(args, name, None) for name in ("threads", "isa", "device"))
    on_device = device not in (None, "cpu")
    if threads is not None or isa is not None or on_device:
        options["ctx"] = Context(device or "cpu", threads=threads, isa=isa)
    with progress(None, f"to {device}", unit="B") if on_device else contextlib.nullcontext() as bar:
        if on_device:
            options["progress"] = moving(bar)
        model = Model.tiny(**options) if path is None else Model.from_pretrained(path, **options)
    if getattr(args, "read_ahead", False) and not on_device:
        _read_ahead(model)
    return model


def _read_ahead(model):
    """Brings the files of a model from disk, with a bar, where they are large, cold, and fit beside its state."""
    from ..load.mapped import read_ahead
    from ..plan import available_memory

    free = available_memory()
    if free is not None:
        room = free - model.plan(context=1).anonymous
        read_ahead(model.files, room, lambda n: progress(n, "reading from disk", unit="B"))


def types_of(model):
    """``activations int8, cache float16``: what a model computes with."""
    return f"activations {model.activations}, cache {model.cache}"


def read_text(path):
    """A UTF-8 file's text, without the mark of its encoding that Windows puts first; ``-`` is stdin."""
    if path == "-":
        raw, name = sys.stdin.buffer.read(), "stdin"
    else:
        raw, name = Path(path).read_bytes(), path
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        return io.StringIO(text, newline=None).read()  # every end of a line as \n
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; it must be UTF-8 "
                         "text") from None


# ---- output ----

_BYTES = "{l_bar}{bar}| {n_fmt}/{total_fmt}iB [{elapsed}<{remaining}{postfix}]"  # tqdm's own, but for its rate


def say(*words, end="\n"):
    """To stderr: what a person wants to know and a pipe does not."""
    print(*words, file=sys.stderr, end=end, flush=True)


def progress(total, label, unit="token"):
    """A bar on stderr, to ``update(n)`` and use as a context; nothing where stderr is no terminal."""
    from tqdm import tqdm

    how = {"unit_divisor": 1024, "bar_format": _BYTES} if unit == "B" else {"unit": f" {unit}s"}
    return tqdm(total=total, desc=label, file=sys.stderr, leave=False, unit_scale=True, disable=not sys.stderr.isatty(),
                **how)


def moving(bar):
    """A function for ``progress=``: moves a bar to `done` of `total`, and names what is done, where that is told."""
    def moved(done, total, name=None):
        bar.total = total
        if name is not None:
            bar.set_postfix_str(name, refresh=False)
        bar.update(done - bar.n)

    return moved


def reading():
    """A function for ``progress=`` of a generation: a bar while a prompt of several pieces is read."""
    from ..generate import PIECE

    bars = []

    def show(tokens, total):
        if not bars and total > PIECE:
            bars.append(progress(total, "reading"))
        for bar in bars:
            bar.update(tokens - bar.n)
            if tokens == total:
                bar.close()

    return show


def print_json(value):
    """One JSON object on stdout; null for a number that is not finite, escapes where stdout is not UTF-8."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print(json.dumps(to_json(value), indent=2, ensure_ascii=not is_utf8, allow_nan=False))


def print_report(args, report, text=str):
    """A report as JSON or as text; the exit code of its verdict."""
    if args.json:
        print_json(report.to_dict())
    else:
        print(text(report))
    return 0 if report.ok else 1


def human_bytes(n):
    """``1.4 GiB``, ``12 KiB``, ``96 B``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" or abs(n) >= 100 else f"{n:.1f} {unit}"
        n /= 1024


def human_rate(bytes_per_second):
    """``11.2 GB/s``, 1e9 bytes a second: rates are counted so, sizes are not."""
    rate = bytes_per_second * 1e-9
    return f"{rate:,.1f} GB/s" if rate >= 1 else f"{rate:.3f} GB/s"


def human_count(n):
    """``5.64 M``, ``49.1 B``, ``812``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def print_table(rows, header=None, align=""):
    """Rows of cells in aligned columns.

    Parameters
    ----------
    rows : list of sequences
        Cells become text by ``str``.
    header : sequence of str, optional
    align : str
        A letter a column, ``<`` or ``>``; columns without one are ``<``.
    """
    lines = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = align.ljust(len(widths), "<")
    for i, line in enumerate(lines):
        cells = (f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths, strict=True))
        print("  ".join(cells).rstrip())
        if header and i == 0:
            print("  ".join("-" * w for w in widths).rstrip())
