"""Time every op, on every instruction set, beside what the machine allows.

    python benchmarks/run.py                                 every op, the best kernels, all processors
    python benchmarks/run.py linear moe --isa all --threads 1,2 --json new.json
    python benchmarks/run.py linear --against old.json       time, then compare
    python benchmarks/run.py --compare old.json new.json     compare two files
    python benchmarks/run.py model --model DIR               a model's tokens/s, by several kernels, all in float32
    python benchmarks/run.py model --model FILE.gguf         in turns with llama.cpp on the same file (models.py)
    python benchmarks/run.py types                           what each storage type costs (storage_types.py)
    python benchmarks/run.py workbench                       a trace beside a forward pass, and blame (workbench.py)
    python benchmarks/run.py delta_rule                      its forms beside other engines, too (delta_rule.py)
    python benchmarks/run.py delta_rule --accuracy           their errors instead, by kinds of gate
    python benchmarks/run.py hip --device hip:0              the kernels on a GPU beside its roofs (hip.py)

Other engines are in the environment that `make peers` makes: .venv-peers/bin/python benchmarks/run.py delta_rule.

Contenders of a case (instruction sets, numbers of threads, NumPy's sgemm) take turns; medians and the 10th
and 90th percentile are of the same turns. A case is timed only after its result at the smallest T was inside
its budget.
"""

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import blas_sleeps  # noqa: F401  before NumPy
import delta_accuracy
import delta_rule
import hip
import models
import numpy as np
import storage_types
import workbench
from cases import CASES, OPS
from delta_rule import PARTS
from engines import EngineError
from peers import PEERS

import kimi_linear as kl
from kimi_linear.bench import Roofs, bench, blas_threads, machine, sample, spread, tokens_of
from kimi_linear.cli._common import integers, positive, print_table, progress
from kimi_linear.diff.budgets import budget

OTHERS = ("hip", "model", "types", "workbench")  # what is no op
SECONDS = 2.0      # that the turns of one case may take, all contenders together
TURNS = (3, 50)    # at least, at most
SLOW = 1.0         # seconds of a call that is not repeated: the scalar kernels, at many tokens


def main():
    args = arguments()
    if args.compare:
        return compare(*args.compare)
    unknown = set(args.ops) - set(OPS) - set(OTHERS)
    if unknown:
        return f"run: there is no case {', '.join(sorted(unknown))}; there are {', '.join((*OPS, *OTHERS))}"
    if args.accuracy:
        return run_accuracy(args)
    no_roof = args.quick or args.ops == ["hip"]     # a GPU has its own
    result = {"machine": machine(), "revision": revision(), "roof": {} if no_roof else roof(), "cases": {}}
    say_machine(result)
    for case in CASES:
        if not args.ops or (case.op in args.ops and not (args.parts or args.quick)):
            run_case(case, args, result["cases"])
    if "delta_rule" in args.ops:
        run_delta_rule(args, result)
    if "hip" in args.ops:
        run_hip(args, result)
    if "model" in args.ops and "hip" not in args.ops:
        run_model(args, result)
    if "types" in args.ops:
        run_types(args, result)
    if "workbench" in args.ops:
        run_workbench(args, result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return compare(args.against, result) if args.against else 0


def arguments():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("ops", nargs="*", metavar="op", help=", ".join((*OPS, *OTHERS)))
    parser.add_argument("--isa", default="best", help="best, all, or names with commas (default: best)")
    parser.add_argument("--threads", type=integers, metavar="N,N",
                        help="(default: 0, all; 1 and all for delta_rule beside its peers)")
    parser.add_argument("--tokens", type=integers, metavar="T,T",
                        help="only these T (default: 1,16,64,512; delta_rule beside its peers 4096, too; types 1,512; "
                             "workbench 2000)")
    parser.add_argument("--model", metavar="PATH", help="for the case model (default: the packaged one)")
    parser.add_argument("--parts", type=names, metavar="P,P",
                        help=f"only: of delta_rule {', '.join(PARTS)}; of hip {', '.join(hip.PARTS)}; "
                             f"of types their names")
    parser.add_argument("--peers", type=names, default=list(PEERS), metavar="P,P",
                        help=f"beside delta_rule: {', '.join(PEERS)}, or none (default: those that are here)")
    parser.add_argument("--quick", action="store_true", help="parts of delta_rule and hip small, to see that they run")
    parser.add_argument("--device", default="hip", metavar="NAME", help="of hip: hip:N or hip-host (default: hip)")
    parser.add_argument("--accuracy", action="store_true", help="errors of delta_rule's forms, nothing timed")
    of_any = parser.add_argument_group("a model")
    of_any.add_argument("--depths", type=integers, default=[0, 4096], metavar="N,N", help="(default: 0,4096)")
    of_any.add_argument("--prefill", type=positive, default=512, metavar="N", help="(default: 512)")
    of_any.add_argument("--decode", type=positive, default=64, metavar="N", help="(default: 64)")
    of_model = parser.add_argument_group("a GGUF file beside llama.cpp (--peers none: ours alone)")
    of_model.add_argument("--activations", type=names, default=["int8"], metavar="A,A",
                          help="of ours: int8, bfloat16, float32, or several (default: int8)")
    of_model.add_argument("--samples", type=positive, default=5, metavar="N", help="turns (default: 5)")
    of_model.add_argument("--apart", action=argparse.BooleanOptionalAction,
                          help="open one engine at a time (default: where memory has no room for both)")
    of_model.add_argument("--profile", action="store_true", help="time of each op of ours, too, at the first depth")
    of_model.add_argument("--llama-python", metavar="PATH",
                          help="interpreter that has llama_cpp (default: this one, or .venv-peers/bin/python)")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--against", type=saved, metavar="FILE", help="compare with the results in a file")
    parser.add_argument("--compare", type=saved, nargs=2, metavar=("OLD", "NEW"),
                        help="compare two files, time nothing")
    args = parser.parse_args()
    allowed = {"parts": ("delta_rule", "hip", "types"), "quick": ("delta_rule", "hip"), "accuracy": ("delta_rule",)}
    for option, alone in allowed.items():
        if getattr(args, option) and (len(args.ops) != 1 or args.ops[0] not in alone):
            parser.error(f"--{option} is of {' or '.join(alone)}: name that op alone")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json is {args.json}: there is no such folder")
    if args.llama_python and shutil.which(args.llama_python) is None:
        parser.error(f"--llama-python is {args.llama_python}: there is no such program")
    if "types" in args.ops and (len(args.threads or [0]) > 1 or len(isas_of(args)) > 1):
        parser.error("types are timed with one number of threads and one instruction set")
    args.peers = [] if args.peers == ["none"] else args.peers
    parts = {"hip": hip.PARTS, "types": kl.storage_types}.get("".join(args.ops), PARTS)
    for given, known in ((args.peers, PEERS), (args.parts or [], parts), (isas_of(args), kl.isa_list())):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return args


def names(text):
    return text.replace(",", " ").split()


def saved(path):
    """What --json wrote, for ``type=``: a wrong name is told before anything is timed."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    if not isinstance(found, dict) or "cases" not in found:
        raise argparse.ArgumentTypeError(f"{path} has no cases; it must be a file that --json wrote")
    return found


def revision():
    """The commit, with a + where the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def roof():
    """The machine's, with all processors."""
    roofs = Roofs()
    for name in ("read", "fma"):
        roofs.sample(name, 5)
    return roofs.summary()


def say_machine(result):
    m, best = result["machine"], result["roof"]
    print(f"{m['cpu']}; {m['compiler']}; BLAS {m['blas']}; sgemm is NumPy's {m['numpy_blas']}")
    roofs = (f"; {m['threads']} threads read {best['read'] * 1e-9:.1f} GB/s, fma {best['fma'] * 1e-9:.0f} GFLOP/s"
             if best else "")
    print(f"revision {result['revision']}{roofs}\n")


# ---- ops ----

def contexts(args):
    """Contexts by their name in the results."""
    made = [kl.Context(threads=n, isa=isa) for isa in isas_of(args) for n in args.threads or [0]]
    return {f"{ctx.isa} {ctx.threads}": ctx for ctx in made}


def isas_of(args):
    return {"best": kl.isa_list()[-1:], "all": kl.isa_list()}.get(args.isa, args.isa.split(","))


def run_case(case, args, results):
    """Adds ``name T contender`` -> seconds, operations and bytes of a call; prints them."""
    rng, found = np.random.default_rng(0), contexts(args)
    within_budget(case, case.make(case.tokens[0], rng)[0], found)
    rows = []
    for T in args.tokens or case.tokens:
        sets = case.make(T, rng)
        calls = {name: partial(caller, case, ctx) for name, ctx in found.items()}
        if case.sgemm:
            counts = sorted({ctx.threads for ctx in found.values()})
            calls |= {f"sgemm {n}": partial(numpy_caller, n) for n in counts}
        contenders = {name: call(begun_at(sets, i / len(calls))) for i, (name, call) in enumerate(calls.items())}
        flops, n_bytes = case.work(T, sets[0])
        for name, times in take_turns(contenders).items():
            row = {"seconds": spread(times), "flops": flops, "bytes": n_bytes}
            results[f"{case.name} T={T} {name}"] = row
            rows.append((f"T={T}", name, *cells(row)))
    print(case.name)
    print_table(rows, ("", "kernels, threads", "µs", "10 % .. 90 %", "GFLOP/s", "GB/s"), "<<>>>>")
    print(flush=True)


def within_budget(case, arguments, found):
    """Raises where a result is further from float64 than the op's budget allows."""
    if case.op in ("quantize", "sample"):
        return  # bytes and ids: their tests compare them, and they have no error to bound
    desired = getattr(kl.reference, case.op)(**arguments)
    bounds = np.zeros_like(desired) if case.op == "dequantize" else budget(case.op, desired, **arguments)
    for name, ctx in found.items():
        actual = getattr(kl.ops, case.op)(**arguments, ctx=ctx)
        for a, d, bound in zip(*map(as_tuple, (actual, desired, bounds)), strict=True):
            error = np.abs(np.asarray(a, np.float64) - d)
            if not (error <= bound).all():  # of NaN neither holds
                raise SystemExit(f"run: {case.name} with {name} is over its budget; its test says where")


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def begun_at(sets, share):
    """The sets from some place on, and then those before: what one contender has read is not hot for the next."""
    first = int(share * len(sets))
    return sets[first:] + sets[:first]


def caller(case, ctx, sets):
    """A call with the next set of arguments."""
    op, turn = getattr(kl.ops, case.op), iter_forever(sets)
    return lambda: op(**next(turn), ctx=ctx)


def numpy_caller(threads, sets):
    turn = iter_forever(sets)

    def call():
        arguments = next(turn)
        with blas_threads(threads):  # a microsecond
            np.matmul(arguments["x"], arguments["w"].T)

    return call


def iter_forever(sets):
    while True:
        yield from sets


def take_turns(contenders):
    """Seconds of each: as many turns as fit `SECONDS`; of a slow one, of its one warm-up call only."""
    first = {name: times[0] for name, times in sample(contenders, 1, untimed=0).items()}
    quick = {name: run for name, run in contenders.items() if first[name] < SLOW}
    n = int(np.clip(SECONDS / max(sum(first[name] for name in quick), 1e-9), *TURNS))
    return {name: [seconds] for name, seconds in first.items()} | sample(quick, n)


def cells(row):
    s = row["seconds"]
    rates = (f"{row[what] / s['median'] * 1e-9:.1f}" if row[what] else "" for what in ("flops", "bytes"))
    return f"{s['median'] * 1e6:,.1f}", f"{s['low'] * 1e6:,.1f} .. {s['high'] * 1e6:,.1f}", *rates


# ---- the delta rule beside its peers ----

def run_delta_rule(args, result):
    threads = args.threads or sorted({1, kl.Context().threads})
    settings = delta_rule.Settings(threads=threads, tokens=args.tokens, quick=args.quick, peers=args.peers,
                                   cases=result["cases"])
    result["delta_rule"] = delta_rule.run(args.parts, settings).tables


def run_accuracy(args):
    rows = delta_accuracy.run(names=args.peers)
    if args.json:
        Path(args.json).write_text(json.dumps({"revision": revision(), "accuracy": rows}, indent=1) + "\n")


# ---- a GPU ----

def run_hip(args, result):
    try:
        settings = hip.Settings(args.device, quick=args.quick, model=args.model, cases=result["cases"])
    except kl.DeviceError as reason:
        raise SystemExit(f"run: {reason}") from None
    hip.run(settings, args.parts)
    result["hip"] = {"device": args.device, "read": settings.read, "fma": settings.fma, "tables": settings.tables}


# ---- a model ----

def run_model(args, result):
    from kimi_linear.cli.bench import show

    if args.model and Path(args.model).is_file():
        return run_file(args, result)
    for name, ctx in contexts(args).items():
        model = kl.Model.from_pretrained(args.model, ctx=ctx) if args.model else kl.Model.tiny(ctx=ctx)
        size = {"prefill": args.prefill, "decode": args.decode, "depths": args.depths}
        with progress(tokens_of(**size), f"{model.name} {name}") as bar:
            found = bench(model, **size, progress=bar.update)
        show(found)
        result.setdefault("models", {})[f"{model.name} {name}"] = found
        for row in found["rates"]:
            key = f"model {model.name} {row['kind']} at {row['depth']} {name}"
            result["cases"][key] = {"seconds": row["seconds"], "flops": 0, "bytes": 0}


def run_file(args, result):
    """A GGUF file, ours in turns with llama.cpp."""
    for n in args.threads or [0]:
        settings = models.Settings(
            threads=n, isas=tuple(isas_of(args)), activations=tuple(args.activations), peer=bool(args.peers),
            python=args.llama_python, depths=tuple(sorted(set(args.depths))), prefill=args.prefill, decode=args.decode,
            samples=args.samples, apart=args.apart, profile=args.profile)
        try:
            found = models.run(args.model, settings)
        except EngineError as error:
            raise SystemExit(f"run: {error}") from None
        result.setdefault("files", []).append(found)
        for row in found["rates"]:
            key = f"model {found['file']} {row['kind']} at {row['depth']} {row['engine']} {n or 'all'}"
            result["cases"][key] = {"seconds": row["seconds"], "flops": 0, "bytes": 0}


# ---- storage types ----

def run_types(args, result):
    threads, isa = (args.threads or [0])[0], isas_of(args)[0]
    rows, tokens = [], args.tokens or (1, 512)
    bar = progress(len(tokens) * len(args.parts or kl.storage_types), "types", "row")
    for found in storage_types.run(args.parts, tokens, threads or None, isa):
        rows.append(storage_types.row(found))
        bar.update(1)
        for how in ("f32_weights", "float32", "narrow"):
            if how in found:
                key = f"types {found['type']} T={found['tokens']} {how}"
                result["cases"][key] = {"seconds": spread([found[how]]), "flops": 2 * found["tokens"] * found["values"],
                                        "bytes": found["bytes"]}
    bar.close()
    print("One token: GB/s of the stored weights; more: GFLOP/s. To F32: times the speed of float32 weights.\n"
          "float32, int8: activations. dequantize: Gvalues/s.")
    print_table(rows, storage_types.HEADER, "<>>>>>>>")


# ---- the workbench ----

def run_workbench(args, result):
    rows = []
    for name, ctx in contexts(args).items():
        for T in args.tokens or (2000,):
            found = workbench.run(T, ctx)
            for what, s in found.items():
                result["cases"][f"workbench {what} T={T} {name}"] = {"seconds": s, "flops": 0, "bytes": 0}
                ratio = f"{s['median'] / found['forward']['median']:.2f}"
                rows.append((what, f"T={T}", name, f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}", ratio))
    print_table(rows, ("", "", "kernels, threads", "s", "10 % .. 90 %", "of forward"), "<<<>>>")


# ---- two results ----

def compare(old, new):
    """Cases of both, the largest change first; marked where the spreads do not meet."""
    both = [name for name in new["cases"] if name in old["cases"]]
    if not both:
        return "run: the two results have no case in common"
    rows = []
    for name in both:
        a, b = (r["cases"][name]["seconds"] for r in (old, new))
        apart = a["low"] > b["high"] or b["low"] > a["high"]
        rows.append((b["median"] / a["median"], name, a["median"], b["median"], apart))
    for name, result in (("old", old), ("new", new)):
        print(f"{name}: {result['revision']} on {result['machine']['cpu']}")
    print()
    cells = [(name, f"{a * 1e6:,.1f}", f"{b * 1e6:,.1f}", f"{a / b:.2f}x", "*" if apart else "")
             for _, name, a, b, apart in sorted(rows)]
    print_table(cells, ("case", "old µs", "new µs", "speed", ""), "<>>><")
    print("\n* the 10 % .. 90 % ranges do not meet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
