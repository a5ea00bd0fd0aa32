"""``kimi-linear bench``: tokens/s, and every op beside the machine's roof."""

from ._common import (
    add_compute_arguments,
    add_json_argument,
    add_model_argument,
    human_bytes,
    human_rate,
    integers,
    load_model,
    positive,
    print_json,
    print_table,
    progress,
)

HELP = "tokens/s at several depths, time of each op, memory; beside the machine's roofs"
EPILOG = """
kimi-linear bench
kimi-linear bench ~/models/mini --prefill 512 --decode 64 --depths 0,4096 --threads 2
kimi-linear bench ~/models/mini --device hip
"""


def add_arguments(parser):
    add_model_argument(parser)
    parser.add_argument("--prefill", type=positive, default=512, metavar="N",
                        help="tokens of a prefill (default: %(default)s)")
    parser.add_argument("--decode", type=positive, default=64, metavar="N",
                        help="tokens decoded one by one (default: %(default)s)")
    parser.add_argument("--depths", type=integers, default=[0, 4096], metavar="N,N,...",
                        help="tokens already read (default: 0,4096)")
    parser.add_argument("--repeat", type=positive, default=3, metavar="N",
                        help="prefills at a depth (default: %(default)s)")
    add_compute_arguments(parser, cache="float16", activations="auto", read_ahead=True)
    add_json_argument(parser)


def run(args):
    from ..bench import bench, tokens_of

    model = load_model(args)
    with progress(tokens_of(args.prefill, args.decode, args.depths, args.repeat), "bench") as bar:
        result = bench(model, prefill=args.prefill, decode=args.decode, depths=args.depths,
                       repeat=args.repeat, progress=bar.update)
    if args.json:
        print_json(result)
    else:
        show(result)
    return 0


def show(result):
    """A result of `kimi_linear.bench.bench`, for a person."""
    m, roof = result["machine"], result["roof"]
    print(f"{result['model']}: activations {result['activations']}, cache {result['cache']}")
    print(f"{m['cpu']}; {m['isa']}, {m['threads']} threads; {m['compiler']}")
    on_cpu = m["device"] == "cpu"
    print(f"sgemm is NumPy's {m['numpy_blas']}\n" if on_cpu else f"{m['device']}{_caution(m['device'])}\n")
    print_table([_rate(row) for row in result["rates"]],
                ("", "depth", "tokens/s", "10 % .. 90 %", "rate", "of the roof"), "<>>>><")
    print(f"\nroof: reads {human_rate(roof['read'])} ({human_bytes(roof['read_bytes'])}), "
          f"fma {roof['fma'] * 1e-9:.0f} GFLOP/s")
    if on_cpu:
        print(f"      T=512 2304 -> 4096: sgemm {roof['sgemm'] * 1e-9:.0f}, ours {roof['linear'] * 1e-9:.0f} GFLOP/s")
    for kind, tokens in (("prefill", result["rates"][0]["tokens"]), ("decode", 1)):
        print(f"\n{kind}, a call of {tokens}, depth 0:")
        show_ops(result["ops"][kind], roof)
    show_memory(result["memory"])


def _caution(device):
    return "; its times mean nothing" if device.startswith("hip-host") else ""


def _rate(row):
    s = row["seconds"]
    span = f"{row['tokens'] / s['high']:,.1f} .. {row['tokens'] / s['low']:,.1f}"
    if row["kind"] == "decode":
        rate, roof = human_rate(row["bytes_per_second"]), human_rate(row["roof"])
    else:
        rate, roof = f"{row['flops_per_second'] * 1e-9:.1f} GFLOP/s", f"{row['roof'] * 1e-9:.0f}"
    return (row["kind"], f"{row['depth']:,}", f"{row['tokens_per_second']:,.1f}", span, rate,
            f"{row['of_roof']:.0%} of {row['bound']} {roof}")


def show_ops(rows, roof):
    """Time, share and rates of each op; a share of the roof is of the one that it comes nearer to."""
    whole = sum(row["seconds"] for row in rows) or 1.0
    print_table([
        (row["op"], f"{row['calls']:.0f}" if row["calls"] else "", f"{row['seconds'] * 1e3:.3f}",
         f"{row['seconds'] / whole:.1%}", _giga_per_second(row, "flops"), _giga_per_second(row, "bytes"),
         _nearer(row, roof))
        for row in rows
    ], ("op", "calls", "ms", "share", "GFLOP/s", "GB/s", "of the roof"), "<>>>>><")


def _giga_per_second(row, what):
    return f"{row[what] / row['seconds'] * 1e-9:.1f}" if row[what] and row["seconds"] else ""


def _nearer(row, roof):
    if not row["seconds"] or not (row["flops"] or row["bytes"]):
        return ""
    fma, read = (row[what] / row["seconds"] / roof[of] for what, of in (("flops", "fma"), ("bytes", "read")))
    return f"{fma:.0%} of fma" if fma > read else f"{read:.0%} of read"


def show_memory(memory):
    """Planned beside held and measured."""
    grew = "" if memory["measured"] is None else f", the process grew by {human_bytes(memory['measured'])}"
    print(f"\nmemory for {memory['context']:,} tokens: planned {human_bytes(memory['planned'])} "
          f"(state {human_bytes(memory['planned_state'])}, scratch "
          f"{human_bytes(memory['planned_scratch'])}), taken {human_bytes(memory['held'])}{grew}")
