"""`linear` beside NumPy's OpenBLAS, and one row of it beside the machine's read roof.

    python benchmarks/bench_linear.py [--threads 2] [--repeat 9] [--isa avx512] [--quick]

Contenders take turns and medians are compared: only the ratios within one run mean something. NumPy's BLAS is
given the same number of threads (its own variables are set before it is loaded). The roof is a sum over 1 GiB
by as many threads, measured between the contenders.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

READER = r"""
#include <stdint.h>
#include <stddef.h>
uint64_t read_all(const uint64_t *p, size_t n)
{
    uint64_t s[32] = { 0 };
    for (size_t i = 0; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; j++)
            s[j] += p[i + j];
    for (int j = 1; j < 32; j++)
        s[0] += s[j];
    return s[0];
}
"""


# rows of x, columns, rows of w
MANY = [(512, 2304, 4096), (512, 4096, 2304), (512, 2304, 9216), (512, 1024, 2304), (128, 2304, 1024),
        (16, 2304, 1024)]
FEW = [(1, 2304, 4096), (1, 4096, 2304), (1, 2304, 256), (4, 2304, 4096)]


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--isa", help="one of kl.isa_list(); by default the best here")
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    return parser.parse_args()


ARGS = arguments()
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

import kimi_linear as kl  # noqa: E402


def medians(contenders, repeat):
    """Seconds of each, taken in turns."""
    times = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeat):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


class Roof:
    """Reads 1 GiB with every thread at once."""

    n_bytes = 1 << 30

    def __init__(self, threads):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "reader.c"), Path(folder, "reader.so")
            source.write_text(READER)
            flags = ["-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
            self.read = ctypes.CDLL(str(library)).read_all
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.data = np.ones(self.n_bytes // 8, np.uint64)
        self.parts = np.array_split(self.data, threads)

    def __call__(self):
        threads = [threading.Thread(target=self.read, args=(p.ctypes.data, p.size)) for p in self.parts]
        for t in threads:
            t.start()
        for t in threads:
            t.join()


def many_rows(ctx, T, D, M, rng):
    """GFLOP/s of float32, bfloat16 and NumPy's sgemm."""
    x = rng.standard_normal((T, D), np.float32)
    w = rng.standard_normal((M, D), np.float32)
    half = w.astype(ml_dtypes.bfloat16)
    y = np.empty((T, M), np.float32)
    contenders = {
        "own f32": lambda: kl.ops.linear(x, w, out=y, ctx=ctx),
        "sgemm": lambda: np.matmul(x, w.T, out=y),
        "own bf16": lambda: kl.ops.linear(x, half, out=y, ctx=ctx),
    }
    if kl._core.blas_name() != "none":
        blas = kl.Context(threads=ARGS.threads, gemm="blas")
        contenders["gemm=blas"] = lambda: kl.ops.linear(x, w, out=y, ctx=blas)
    t = medians(contenders, ARGS.repeat)
    rate = {name: 2e-9 * T * D * M / s for name, s in t.items()}
    ratios = t["sgemm"] / t["own f32"], t["own f32"] / t["own bf16"]
    print(f"T={T:<5} {D:>5} -> {M:<6}" + "".join(f"  {n} {r:7.1f}" for n, r in rate.items())
          + "  GFLOP/s   f32 / sgemm {:.2f}   bf16 / f32 {:.2f}".format(*ratios))


def few_rows(ctx, roof, T, D, M, rng):
    """GB/s of weights read, over matrices that together are far larger than the caches."""
    n = max(2, (1 << 28) // (M * D * 4))
    w = rng.standard_normal((n, M, D), np.float32)
    half = w.astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((T, D), np.float32)
    y = np.empty((T, M), np.float32)

    def all_of(weights):
        for each in weights:
            kl.ops.linear(x, each, out=y, ctx=ctx)

    t = medians({"f32": lambda: all_of(w), "roof": roof, "bf16": lambda: all_of(half)}, ARGS.repeat)
    rate = {"f32": w.nbytes / t["f32"], "bf16": half.nbytes / t["bf16"], "roof": roof.n_bytes / t["roof"]}
    shares = rate["f32"] / rate["roof"], rate["bf16"] / rate["roof"]
    print(f"T={T:<5} {D:>5} -> {M:<6}" + "".join(f"  {n} {r * 1e-9:6.1f}" for n, r in rate.items())
          + "  GB/s   of the roof: f32 {:.2f}   bf16 {:.2f}".format(*shares))


def main():
    ctx = kl.Context(threads=ARGS.threads, isa=ARGS.isa)
    rng = np.random.default_rng(0)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    print(f"{ctx!r}; NumPy's {blas.get('name')} {blas.get('version')}; "
          f"gemm=blas is {kl._core.blas_name()}; medians of {ARGS.repeat}")
    for T, D, M in MANY[:1] if ARGS.quick else MANY:
        many_rows(ctx, T, D, M, rng)
    roof = Roof(ARGS.threads)
    for T, D, M in FEW[:1] if ARGS.quick else FEW:
        few_rows(ctx, roof, T, D, M, rng)


if __name__ == "__main__":
    main()
