"""How fast a model reads and writes here, and what the machine allows: times, rates and roofs of one run.

Machines drift, so everything that is compared is measured in one run: contenders take turns, medians are
compared, and the spread stands beside them.
"""

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import re
import statistics
import time

import numpy as np

from . import _core
from ._scalars import at_least
from .context import current, devices
from .device_array import DeviceArray
from .plan import active, asked_of_macos

__all__ = [
    "Roofs", "active_bytes", "active_flops", "anonymous_bytes", "bench", "blas_threads", "machine", "sample",
    "spread", "tokens_of",
]

_READ_BYTES = 8 << 30  # of a model's files that are read for the roof
_SETTLE = 3            # decode steps before the first that counts
_ASLEEP = 0.12         # seconds for which threads of OpenBLAS spin after a product, 2**28 cycles, and some more


# ---- taking times ----

def sample(contenders, repeat, untimed=1):
    """Seconds of each contender, taken in turns after some untimed ones.

    Parameters
    ----------
    contenders : mapping from name to callable
    repeat, untimed : int
        Turns that count, and turns before them.

    Returns
    -------
    dict from name to list of float
    """
    times = {name: [] for name in contenders}
    for turn in range(untimed + repeat):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if turn >= untimed:
                times[name].append(time.perf_counter() - begin)
    return times


def spread(values):
    """Median, and the 10th and 90th percentile, as a dict: ``median, low, high, n``."""
    low, high = np.percentile(values, [10, 90])
    return {"median": statistics.median(values), "low": float(low), "high": float(high), "n": len(values)}


# ---- the machine ----

def machine(ctx=None):
    """What the numbers were measured with: CPU, device, kernels, threads, compiler, BLAS, NumPy's BLAS."""
    ctx = current(ctx)
    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _cpu(), "device": _device(ctx), "isa": ctx.isa, "threads": ctx.threads, "gemm": ctx.gemm,
        "compiler": _compiler(), "blas": _core.blas_name(),
        "numpy_blas": f"{numpy_blas.get('name')} {numpy_blas.get('version')}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _device(ctx):
    """``cpu``, or a device's name and what it is."""
    name = "hip:0" if ctx.device == "hip" else ctx.device
    if name == "cpu":
        return name
    return next((f"{d.name}: {d.description}" for d in devices() if d.name == name), name)


def _cpu():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                return f"{name}, {len(os.sched_getaffinity(0))} processors"
    if name := asked_of_macos("sysctl", "-n", "machdep.cpu.brand_string"):  # macOS
        return f"{name}, {os.cpu_count()} processors"
    return platform.processor() or "unknown"


def _compiler():
    """As the compiler signed the extension module."""
    with open(_core.__file__, "rb") as file:
        found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", file.read())
    return found[0].decode() if found else "unknown"


@contextlib.contextmanager
def blas_threads(n):
    """NumPy's OpenBLAS at `n` threads inside the block; as it was where NumPy has another BLAS."""
    setter = _numpy_blas("set_num_threads", ctypes.c_int)
    getter = _numpy_blas("get_num_threads")
    before = getter() if getter else None
    if setter:
        setter(n)
    try:
        yield
    finally:
        if setter and before:
            setter(before)


@functools.cache
def _numpy_blas(what, *argtypes):
    """A function of the OpenBLAS that NumPy has loaded, or None; looked for once, which takes half a millisecond."""
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as file:  # names of files need not be UTF-8
        for path in sorted({line.split(maxsplit=5)[-1] for line in file if b"numpy" in line and b"openblas" in line}):
            library = ctypes.CDLL(os.fsdecode(path.rstrip(b"\n")))
            for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
                name = f"{prefix}openblas_{what}{suffix}"
                if function := getattr(library, name, None):
                    function.argtypes = argtypes
                    return function
    return None


class Roofs:
    """What the machine gives at most, with a context's threads; sampled between the calls that are measured.

    Parameters
    ----------
    model : Model, optional
        Whose mapped weights are read for the read roof; without one, and on a device, 1 GiB of memory is.
    ctx : Context, optional

    Attributes
    ----------
    samples : dict from name to list
        ``read`` in bytes/s and ``fma`` (on registers) in float32 operations/s. Of the CPU also ``sgemm`` (NumPy's
        OpenBLAS) and ``linear`` (our own product), at T=512, 2304 -> 4096.
    products : str
        The one that bounds a product of matrices: ``sgemm``, on a device ``fma``.
    """

    T, D, M = 512, 2304, 4096

    def __init__(self, model=None, ctx=None):
        self.ctx = current(ctx)
        if self.ctx.device == "cpu":
            self.buffers = (_weight_buffers(model) if model else []) or [np.ones(1 << 30, np.uint8)]
            rng = np.random.default_rng(0)
            self.x = rng.standard_normal((self.T, self.D), np.float32)
            self.w = rng.standard_normal((self.M, self.D), np.float32)
            self.y = np.empty((self.T, self.M), np.float32)
            names, self.products = ("read", "fma", "sgemm", "linear"), "sgemm"
        else:
            n_bytes = 1 << 20 if self.ctx.device == "hip-host" else 1 << 30  # a kernel that the host runs is slow
            self.buffers = [DeviceArray.from_numpy(np.ones(n_bytes, np.uint8), self.ctx)]
            names, self.products = ("read", "fma"), "fma"
        self.read_bytes = sum(b.nbytes for b in self.buffers)
        self.samples = {name: [] for name in names}
        for name in self.samples:  # pages, threads and clocks
            self.sample(name)
            self.samples[name].clear()

    def sample(self, name, n=1):
        """Adds n samples of a roof and returns their median; behind sgemm its threads are given time to fall asleep."""
        taken = [getattr(self, f"_{name}")() for _ in range(n)]
        if name == "sgemm":
            time.sleep(_ASLEEP)
        self.samples[name] += taken
        return statistics.median(taken)

    def summary(self):
        """Median of all samples of each, and the bytes that the read roof read."""
        return {name: statistics.median(taken) for name, taken in self.samples.items() if taken} | {
            "read_bytes": self.read_bytes}

    def _read(self):
        return self.read_bytes / sum(b.nbytes / self.ctx._core.roof_read(b) for b in self.buffers)

    def _fma(self):
        return self.ctx._core.roof_fma()

    def _sgemm(self):
        with blas_threads(self.ctx.threads):
            return self._rate(lambda: np.matmul(self.x, self.w.T, out=self.y))

    def _linear(self):
        from . import ops

        return self._rate(lambda: ops.linear(self.x, self.w, out=self.y, ctx=self.ctx))

    def _rate(self, product):
        begin = time.perf_counter()
        product()
        return 2 * self.T * self.D * self.M / (time.perf_counter() - begin)


def _weight_buffers(model):
    """The mapped files of a model as byte arrays: of all, as much as `_READ_BYTES`."""
    files = {id(t.file): t.file for t in model._tensors.values() if hasattr(t, "file")}
    buffers, left = [], _READ_BYTES
    for file in files.values():
        a = np.frombuffer(file.mapping, np.uint8, min(left, len(file.mapping)))
        left -= a.nbytes
        if a.nbytes >= 1 << 20:
            buffers.append(a)
    return buffers


def anonymous_bytes():
    """Bytes of the process's own resident memory, without mapped files; None where the system does not say.

    What has been freed is given back to the system first: two readings tell what was taken in between.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:  # its name may be cut in a character
        for line in file:
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return None


# ---- what a token needs ----

def active_bytes(model):
    """Bytes of weights that decoding one token reads: no unused experts, no other rows of the embedding."""
    return sum(share * t.nbytes for _, t, share in active(model.config, model._tensors))


def active_flops(model, *, head=True):
    """Operations of the matrix products with weights for one token (the head's only with `head`)."""
    c = model.config
    return sum(2 * share * math.prod(t.shape) for name, t, share in active(model.config, model._tensors)
               if len(t.shape) == 2 and "conv1d" not in name and (head or name not in _head(c)))


def _head(c):
    return ("model.embed_tokens.weight",) if c.tie_embeddings else ("lm_head.weight",)


# ---- the model ----

def bench(model, *, prefill=512, decode=64, depths=(0, 4096), repeat=3, cache=None, progress=None):
    """Prefill and decode at several depths, where the time goes, the machine's roofs, memory.

    At each depth the state is prepared once; then `decode` single tokens are timed one by one, then `repeat`
    calls of `prefill` tokens. At depth 0 each prefill begins in an empty state; deeper, each goes on where
    the one before ended. The roof that bounds each (reading the weights; sgemm, on a device fma) is sampled
    between the same calls. Time by op is taken in further calls, so that taking it costs the others nothing: on a
    device each op is then waited for.

    Parameters
    ----------
    model : Model
    prefill, decode, repeat : int
    depths : sequence of int
    cache : {"float32", "float16", "q8_0"}, optional
    progress : callable, optional
        Called with the number of tokens read, after each call of the model.

    Returns
    -------
    dict
        ``machine``, ``rates`` (a list), ``ops`` (``prefill`` and ``decode`` at the first depth), ``roof``,
        ``memory``; plain numbers, ready for JSON. Seconds, bytes, operations. A rate's ``bound`` names its
        ``roof``. What the process grew by is not measured on a device.
    """
    for name, value in (("prefill", prefill), ("decode", decode), ("repeat", repeat)):
        at_least(value, 1, name)
    run = _Run(model, prefill, decode, repeat, sorted(set(depths)), cache, progress or (lambda n: None))
    rates = [row for depth in run.depths for row in run.at(depth)]
    ops, memory = run.ops(), run.memory()
    run.roofs.sample("fma", 3)
    return {"model": model.name, "activations": model.activations, "cache": run.state.cache,
            "machine": machine(run.ctx), "rates": rates, "ops": ops, "roof": run.roofs.summary(),
            "memory": memory}


def tokens_of(prefill, decode, depths, repeat=3):
    """Tokens that `bench` reads, for a progress bar."""
    return sum(_tokens_at(prefill, decode, depth, repeat) for depth in set(depths)) + prefill + decode


def _tokens_at(prefill, decode, depth, repeat):
    return depth + decode + _SETTLE + repeat * prefill + (prefill if depth == 0 else 0)


class _Run:
    """One state and what is done with it."""

    def __init__(self, model, prefill, decode, repeat, depths, cache, read):
        if not depths or min(depths) < 0:
            raise ValueError(f"depths are {depths}; they must be one integer or more, each >= 0")
        self.model, self.prefill, self.decode, self.repeat = model, prefill, decode, repeat
        self.depths, self.read, self.ctx = depths, read, current(model.ctx)
        self.rng = np.random.default_rng(0)
        self.context = max(_tokens_at(prefill, decode, depth, repeat) for depth in depths)
        self.roofs = Roofs(model, self.ctx)  # it reads the weights, so that they lie in memory
        model.forward(self.ids(2), logits="last")  # what a first call takes: threads, the allocator's own
        self.ctx._core.trim()
        self.before = self.grown()
        self.state = model.new_state(context=self.context, cache=cache)

    def ids(self, n):
        return self.rng.integers(0, self.model.config.vocab_size, n).astype(np.int32)

    def call(self, n):
        """Seconds of reading n tokens."""
        ids = self.ids(n)
        begin = time.perf_counter()
        self.model.forward(ids, state=self.state, logits="last")
        seconds = time.perf_counter() - begin
        self.read(n)
        return seconds

    def at(self, depth):
        """Prefill and decode at a depth: times, rates, share of the roof."""
        self.state.reset()
        if depth:
            self.call(depth)
        for _ in range(_SETTLE):
            self.call(1)
        half = self.decode // 2
        steps = [self.call(1) for _ in range(half)]
        read = self.roofs.sample("read", 3)
        steps += [self.call(1) for _ in range(self.decode - half)]
        calls, roof = [], []
        if depth == 0:
            self.from_empty()  # pays for pages
        for _ in range(self.repeat):
            calls.append(self.from_empty() if depth == 0 else self.call(self.prefill))
            roof.append(self.roofs.sample(self.roofs.products, 3))
            if "linear" in self.roofs.samples:
                self.roofs.sample("linear")
        return [self.prefill_row(depth, calls, statistics.median(roof)), self.decode_row(depth, steps, read)]

    def from_empty(self):
        self.state.reset()
        return self.call(self.prefill)

    def prefill_row(self, depth, calls, roof):
        seconds = statistics.median(calls)
        layers, head = active_flops(self.model, head=False), active_flops(self.model)
        rate = (layers * (self.prefill - 1) + head) / seconds  # one row of logits is asked for
        return {"kind": "prefill", "depth": depth, "tokens": self.prefill, "seconds": spread(calls),
                "tokens_per_second": self.prefill / seconds, "flops_per_second": rate, "bound": self.roofs.products,
                "roof": roof, "of_roof": rate / roof}

    def decode_row(self, depth, steps, read):
        seconds = statistics.median(steps)
        rate = active_bytes(self.model) / seconds
        return {"kind": "decode", "depth": depth, "tokens": 1, "seconds": spread(steps),
                "tokens_per_second": 1 / seconds, "bytes_per_second": rate, "bound": "read",
                "roof": read, "of_roof": rate / read}

    def grown(self):
        """`anonymous_bytes`; None where the model's memory is a device's."""
        return anonymous_bytes() if self.ctx.device == "cpu" else None

    def memory(self):
        """Planned beside what the library holds and what the process grew by, in bytes."""
        plan = self.model.plan(context=self.context, cache=self.state.cache)
        now = self.grown()
        return {"context": self.context, "planned_state": plan.state, "planned_scratch": plan.scratch,
                "planned": plan.state + plan.scratch,
                "held": self.state.nbytes + self.ctx._core.scratch_bytes,
                "measured": None if now is None or self.before is None else now - self.before}

    def ops(self):
        """Calls, seconds, flops and bytes of each op, of one prefill and of one decoded token."""
        self.state.reset()
        whole = self.profiled(lambda: self.call(self.prefill), 1)
        return {"prefill": whole, "decode": self.profiled(lambda: self.call(1), self.decode)}

    def profiled(self, work, n):
        core = self.ctx._core
        core.profile(True)
        try:
            seconds = sum(work() for _ in range(n)) / n
        finally:
            core.profile(False)
        rows = [{"op": op, "calls": calls / n, "seconds": s / n, "flops": flops / n, "bytes": n_bytes / n}
                for op, calls, s, flops, n_bytes in core.profile_result()]
        rows.sort(key=lambda row: -row["seconds"])
        rest = seconds - sum(row["seconds"] for row in rows)
        return rows + [{"op": "(rest)", "calls": 0, "seconds": max(0.0, rest), "flops": 0.0, "bytes": 0.0}]
