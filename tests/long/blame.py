"""Every fault of the catalogue at random layers, over seeds and noises: how often `blame` names it, first and alone.

    python tests/long/blame.py [seeds] [--model tiny|kimi-a|kimi-b] [--dtypes float64,float32,bfloat16]

Also faults that are not in the catalogue, which must be unknown at their op, and clean runs, which must be ok.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "diff"))

import faulty_runs

import kimi_linear as kl
from kimi_linear import faults

ROOT = Path(__file__).parents[2]
NEEDED = 0.95


def named(bench, seeds, dtypes):
    """Share of the visible ones that were named."""
    count = {"named": 0, "faint": 0}
    missed = 0
    for seed in range(seeds):
        for dtype in dtypes:
            for fault in faults.CATALOGUE.values():
                case = faulty_runs.case(bench, fault, dtype, seed)
                if case is None:
                    continue
                said = faulty_runs.verdict(case, 8)
                if said in count:
                    count[said] += 1
                else:
                    missed += 1
                    print(f"seed {seed}, {dtype}: {fault.name}{case.choice} at {case.tap}: {said}", flush=True)
    share = count["named"] / max(count["named"] + missed, 1)
    print(f"planted: {count['named']} named, {missed} not; {count['faint']} below 8 times the noise: {share:.2%}")
    return share


def unknown(bench, seeds, dtypes):
    """How many of the untold ones were not unknown at their op, alone."""
    cases = [(name, faulty_runs.untold_case(bench, name, dtype, seed))
             for name in faulty_runs.UNTOLD for dtype in dtypes for seed in range(seeds)]
    bad = [(name, c) for name, c in cases if [(r.tap, r.kind) for r in c.blame.wrong] != [(c.tap, "unknown")]]
    for name, c in bad:
        print(f"{name} at {c.tap}: {[(r.tap, r.kind, r.noise) for r in c.blame.wrong]}")
    print(f"untold: {len(cases) - len(bad)} of {len(cases)} unknown at their op")
    return len(bad) / len(cases)


def clean(bench, runs):
    """How many clean runs were blamed."""
    bad = 0
    scenarios = [faults.WHOLE, faults.SPLIT, faults.SEVERAL, faults.RESTORED]
    for seed in range(runs):
        dtype = list(faulty_runs.DTYPES)[seed % 3]
        model, traces = bench.run(scenarios[seed % 4], dtype, 1000 + seed)
        found = kl.diff.blame(model, traces)
        bad += not found
        if not found:
            print(f"clean run {seed}, {dtype}: {found.verdict}")
    print(f"clean: {runs - bad} of {runs} ok")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", type=int, nargs="?", default=20)
    parser.add_argument("--model", choices=("tiny", "kimi-a", "kimi-b"), default="kimi-a")
    parser.add_argument("--dtypes", default="float64,float32,bfloat16")
    args = parser.parse_args()
    dtypes = args.dtypes.split(",")
    folder = ROOT / "tests/data/golden" / args.model
    bench = faulty_runs.Bench(kl.Model.tiny() if args.model == "tiny" else kl.Model.from_pretrained(folder))
    bad = clean(bench, 5 * args.seeds)
    wrong = unknown(bench, max(args.seeds // 4, 1), dtypes)
    return 0 if named(bench, args.seeds, dtypes) >= NEEDED and not bad and wrong <= 1 - NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
