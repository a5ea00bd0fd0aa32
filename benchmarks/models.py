"""A model's file, run by us and by llama.cpp in turns; `run.py model --model FILE.gguf` calls it.

Each engine is a process of its own that lasts. At each depth the state is prepared once and brought back before each
sample: a prefill of 512 tokens, or 64 tokens one by one after 3 that do not count. Engines take turns, and the one that
begins changes from turn to turn; the roofs are sampled between them, reading the file's own mapped bytes, and a share
of the read roof is of the sample next to it: the bandwidth of a machine that others use jumps. The first
turn does not count. A ratio is the median, over turns, of the two times of one. Where memory has no room for both,
they take longer turns: each is opened, measured at every depth and closed, so many times as there are samples.

docs/performance.md says what the columns mean.
"""

import contextlib
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from engines import Process, llama_python

import kimi_linear as kl
from kimi_linear.bench import Roofs, active_bytes, active_flops, spread
from kimi_linear.cli._common import human_bytes, human_rate, print_table
from kimi_linear.cli.bench import show_ops
from kimi_linear.plan import available_memory

__all__ = ["Settings", "run"]

SETTLE = 3           # tokens of a decode before the first that counts
REST = 0.02          # seconds before a sample, for another engine's threads to fall asleep
INT8_PER_FMA = 4     # operations of vpdpbusd for one of a float32 fma of the same width
WRONG = 1.0          # rms of the difference of two engines' logits, by their deviation: unrelated ones have 1.4
BUSY = 0.5           # processes that ran before, by the system's average of a minute, that spoil times
LLAMA = "llama.cpp"


@dataclass
class Settings:
    """What the command line asked for."""

    threads: int = 0
    isas: tuple = ()                  # of ours; the best where there is none
    activations: tuple = ("int8",)    # of ours
    cache: str = "float16"
    peer: bool = True
    python: str | None = None         # the peer's interpreter
    depths: tuple = (0, 4096)
    prefill: int = 512
    decode: int = 64
    samples: int = 5
    apart: bool | None = None         # None: where memory has no room for both
    profile: bool = False

    @property
    def context(self):
        return max(self.depths) + max(self.prefill, self.decode + SETTLE) + 1


@dataclass
class Contender:
    """An engine: how it is started, and what was measured of it."""

    name: str
    script: str
    options: dict
    python: str | None = None
    about: str = ""
    opening: list = field(default_factory=list)
    first: list = field(default_factory=list)
    memory: dict = field(default_factory=dict)
    times: dict = field(default_factory=dict)   # (kind, depth) -> {turn: seconds a token}
    ops: dict = field(default_factory=dict)

    @contextlib.contextmanager
    def opened(self, path, settings):
        """Its process, with the file open and one token read."""
        with Process(self.script, *filter(None, [self.python])) as process:
            self.opening.append(process.call("open", path=str(path), context=settings.context, **self.options))
            self.first.append(self.opening[-1] + process.call("run", tokens=[0], step=1)[0])
            self.about = process.call("about")
            process.call("empty")
            yield process

    def add(self, kind, depth, turn, seconds):
        if turn >= 0:
            self.times.setdefault((kind, depth), {})[turn] = seconds


def contenders(settings):
    """Ours by kernels and activations, and llama.cpp; a sentence where that is missing."""
    threads = settings.threads or kl.Context().threads
    isas, several = settings.isas or (kl.isa_list()[-1],), len(settings.isas) * len(settings.activations) > 1
    found = [Contender(f"ours {isa} {kind}" if several else "ours", "ours",
                       {"threads": threads, "isa": isa, "activations": kind, "cache": settings.cache})
             for isa in isas for kind in settings.activations]
    python = settings.python or llama_python()
    if settings.peer and python:
        found.append(Contender(LLAMA, "llama", {"threads": threads}, python))
    elif settings.peer:
        print("llama.cpp is missing: `make peers` makes an environment that has it")
    return found


def run(path, settings):
    """Measure, print tables.

    Parameters
    ----------
    path : str or path
        A GGUF file; without the peer, a folder, too.
    settings : Settings

    Returns
    -------
    dict
        ``rates``, ``engines`` and ``roof``: what is printed, as plain numbers.
    """
    path, found, load = Path(path), contenders(settings), os.getloadavg()[0]
    if load > BUSY:
        print(f"{load:.1f} processes want to run already: no number below is to be trusted")
    ctx = kl.Context(threads=settings.threads)
    model = kl.Model.from_pretrained(path, cache=settings.cache, ctx=ctx)
    read_once(path)
    session = Session(path, settings, found, Roofs(model, ctx), model.config.vocab_size)
    apart = settings.apart if settings.apart is not None else crowded(path, found)
    (session.apart if apart else session.together)()
    rates = [row for depth in settings.depths for kind in ("prefill", "decode")
             for row in rows(session, model, kind, depth)]
    result = {"file": path.name, "load": load, "bytes": size_of(path), "together": not apart, "rates": rates,
              "roof": session.roofs.summary(), "off": session.off,
              "engines": [{"name": c.name, "about": c.about, "opening": c.opening, "first": c.first,
                           "memory": c.memory, "ops": c.ops} for c in found]}
    show(result)
    return result


class Session:
    """The turns."""

    def __init__(self, path, settings, found, roofs, vocab):
        self.path, self.settings, self.found, self.roofs = path, settings, found, roofs
        longest = max(settings.depths) + max(settings.prefill, settings.decode + SETTLE)
        self.ids = np.random.default_rng(0).integers(0, vocab, longest).tolist()
        self.read = {}  # (kind, depth) -> {(engine, turn): bytes/s, read next to that sample}
        self.off = {}   # depth -> how far logits are from llama.cpp's

    def together(self):
        """All engines open at the same time."""
        with contextlib.ExitStack() as stack:
            processes = {c.name: stack.enter_context(c.opened(self.path, self.settings)) for c in self.found}
            for depth in self.settings.depths:
                for process in processes.values():
                    self.prepare(process, depth)
                for kind in ("prefill", "decode"):
                    for turn in range(-1, self.settings.samples):
                        order = self.found if turn % 2 == 0 else self.found[::-1]
                        for c in order:
                            self.sample(c, processes[c.name], kind, depth, turn)
                        if turn < 0 and kind == "prefill":
                            self.judge(depth, {name: p.logits() for name, p in processes.items()})
            for c in self.found:
                self.finish(c, processes[c.name])

    def apart(self):
        """One engine at a time."""
        for turn in range(self.settings.samples):
            logits = {}
            for c in self.found:
                read_once(self.path)
                with c.opened(self.path, self.settings) as process:
                    process.call("run", tokens=self.ids[: self.settings.prefill], step=self.settings.prefill)
                    for depth in self.settings.depths:
                        self.prepare(process, depth)
                        for kind in ("prefill", "decode"):
                            self.sample(c, process, kind, depth, turn, roofs=c.script == "ours")
                            if kind == "prefill":
                                logits.setdefault(depth, {})[c.name] = process.logits()
                    if turn == self.settings.samples - 1:
                        self.finish(c, process)
            if turn == 0:
                for depth, of in logits.items():
                    self.judge(depth, of)

    def prepare(self, process, depth):
        process.call("empty")
        if depth:
            process.call("run", tokens=self.ids[:depth], step=512)
            process.call("keep", name=str(depth))

    def restore(self, process, depth):
        if depth:
            process.call("restore", name=str(depth))
        else:
            process.call("empty")

    def sample(self, c, process, kind, depth, turn, roofs=True):
        """One sample of an engine, and with `roofs`, where the file has room in memory, one of each roof."""
        s = self.settings
        self.restore(process, depth)
        if turn >= 0 and roofs:
            self.read.setdefault((kind, depth), {})[c.name, turn] = self.roofs.sample("read")
            self.roofs.sample("fma")
        time.sleep(REST)
        if kind == "prefill":
            seconds = process.call("run", tokens=self.ids[depth : depth + s.prefill], step=s.prefill)[0] / s.prefill
        else:
            tokens = self.ids[depth : depth + SETTLE + s.decode]
            seconds = statistics.mean(process.call("run", tokens=tokens, step=1)[SETTLE:])
        c.add(kind, depth, turn, seconds)

    def judge(self, depth, logits):
        """What is another model is not timed."""
        if LLAMA in logits:
            theirs = logits[LLAMA].astype(np.float64)
            for name, a in logits.items():
                off = float(np.sqrt(np.mean((a - theirs) ** 2)) / theirs.std())
                if name != LLAMA:
                    self.off[f"{name} at {depth}"] = off
                if not off < WRONG:
                    raise SystemExit(f"run: logits of {name} and {LLAMA} differ by {off:.2f} of their deviation after "
                                     f"{depth + self.settings.prefill} tokens: they are not of the same model")

    def finish(self, c, process):
        c.memory = process.call("memory")
        if self.settings.profile and c.script == "ours":
            for kind, step in (("prefill", self.settings.prefill), ("decode", 1)):
                self.restore(process, self.settings.depths[0])
                n = self.settings.prefill if kind == "prefill" else self.settings.decode
                begin = self.settings.depths[0]
                profile = process.call("profile", tokens=self.ids[begin : begin + n], step=step)
                c.ops[kind] = per_call(profile, n // step)


def per_call(profile, n):
    """Rows as `kimi_linear.bench` makes them, of one call."""
    rows = [{"op": op, "calls": calls / n, "seconds": s / n, "flops": flops / n, "bytes": n_bytes / n}
            for op, calls, s, flops, n_bytes in profile["ops"]]
    rows.sort(key=lambda row: -row["seconds"])
    rest = profile["seconds"] / n - sum(row["seconds"] for row in rows)
    return rows + [{"op": "(rest)", "calls": 0, "seconds": max(0.0, rest), "flops": 0.0, "bytes": 0.0}]


# ---- what was found ----

def rows(session, model, kind, depth):
    """Of each engine: seconds a token, tokens/s, the ratio to llama.cpp, shares of the roofs."""
    settings, key = session.settings, (kind, depth)
    theirs = next((c.times[key] for c in session.found if c.name == LLAMA), {})
    plan = model.plan(context=depth + settings.decode)
    beside = session.read[key]
    read, fma = statistics.median(beside.values()), statistics.median(session.roofs.samples["fma"])
    for c in session.found:
        times = c.times[key]
        seconds = statistics.median(times.values())
        row = {"kind": kind, "depth": depth, "engine": c.name, "seconds": spread(list(times.values())),
               "tokens_per_second": 1 / seconds, "read": read, "fma": fma}
        if theirs and c.name != LLAMA:
            row["ratio"] = statistics.median(theirs[turn] / times[turn] for turn in times if turn in theirs)
        if kind == "decode":
            n_bytes = active_bytes(model) + plan.state
            row["of_read"] = statistics.median(n_bytes / t / beside.get((c.name, turn), read)
                                               for turn, t in times.items())
        else:
            layers, n = active_flops(model, head=False), settings.prefill
            flops = layers + (active_flops(model) - layers) / n  # one row of logits is asked for
            row["of_fma"], row["of_int8"] = flops / seconds / fma, flops / seconds / (INT8_PER_FMA * fma)
        yield row


def show(result):
    """The tables, for a person."""
    roof = result["roof"]
    print(f"{result['file']}, {human_bytes(result['bytes'])}; read roof {human_rate(roof['read'])} "
          f"(of {human_bytes(roof['read_bytes'])} of the file), fma {roof['fma'] * 1e-9:.0f} GFLOP/s; engines were "
          f"open {'together' if result['together'] else 'one after the other'}")
    for engine in result["engines"]:
        print(f"{engine['name']}: {engine['about']}")
    for name, off in result["off"].items():
        print(f"logits of {name} are {off:.1%} of their deviation off {LLAMA}'s")
    print()
    print_table([cells(row) for row in result["rates"]],
                ("", "depth", "engine", "tokens/s", "10 % .. 90 %", f"to {LLAMA}", "of the roof"), "<><>>><")
    print()
    print_table([memory_cells(engine) for engine in result["engines"]],
                ("engine", "opening s", "to first token s", "own memory", "planned"), "<>>>>")
    for engine in result["engines"]:
        for kind, ops in engine["ops"].items():
            print(f"\n{engine['name']}, {kind}:")
            show_ops(ops, roof)


def cells(row):
    s = row["seconds"]
    shares = [f"{row[of]:.0%} {of.replace('_', ' ')}" for of in ("of_read", "of_fma", "of_int8") if of in row]
    ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
    return (row["kind"], f"{row['depth']:,}", row["engine"], f"{row['tokens_per_second']:,.1f}",
            f"{1 / s['high']:,.1f} .. {1 / s['low']:,.1f}", ratio, ", ".join(shares))


def memory_cells(engine):
    planned = engine["memory"].get("planned")
    return (engine["name"], f"{statistics.median(engine['opening']):.2f}", f"{statistics.median(engine['first']):.2f}",
            human_bytes(engine["memory"]["measured"]), human_bytes(planned) if planned else "")


# ---- the file ----

def parts(path):
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def size_of(path):
    return sum(p.stat().st_size for p in parts(path))


def read_once(path):
    """So that it lies in the page cache, as far as that has room."""
    buffer = bytearray(16 << 20)
    for part in parts(path):
        with open(part, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def crowded(path, found):
    """Whether a mapped file and the copy that llama.cpp makes of it have no room in memory together."""
    free = available_memory()
    return free is not None and any(c.name == LLAMA for c in found) and 2.2 * size_of(path) > free
