"""The gated delta rule beside its peers and beside what the machine allows; `run.py delta_rule` calls it.

Parts, each a table: ``peers`` (every form and every peer, by T), ``decode`` (one token, states that no cache holds,
beside reading and writing that memory in place), ``long`` (65,536 tokens beside 4,096), ``subnormal`` (half of the
state), ``gates`` (a gate each channel beside one each head), ``chunks`` (of 16 rows and of 64: time, memory), ``isa``.

Contenders take turns in one process. Before each sample the others' threads are given time to fall asleep, and where
a call is short one that is not timed wakes its own; very short calls are repeated within a sample. Ours and ggml's
are timed below the checks of arguments that Python makes. A ratio is the median, over turns, of the two times of one.
"""

import functools
import os
import statistics
import time
from unittest import mock

import numpy as np
from peers import PEERS, Missing, aligned
from peers import about as about_peers
from peers import contenders as peer_contenders

import kimi_linear as kl
from kimi_linear import _core
from kimi_linear.bench import spread
from kimi_linear.cli._common import human_bytes, print_table

__all__ = ["FORMS", "PARTS", "inputs", "ours", "relative_rms", "run"]

FORMS = {
    "recurrent": {"form": "recurrent"}, "chunked 16": {"form": "chunked", "chunk": 16},
    "chunked 64": {"form": "chunked", "chunk": 64}, "auto": {"form": "auto"},
}
GATES = {"channel": "a gate each channel", "head": "a gate each head"}
TOKENS = (1, 16, 64, 512, 4096)
BARS = {"decode": 0.80, "long": 1.10}
PEAK = "FMA peak"      # sampled in turn with the others
JUDGED = 64            # first tokens whose o is compared with float64
WRONG = {"sglang bfloat16": 0.05}   # relative rms from which on a result is not the same rule; 1e-3 for the others
REST, SAMPLE = 0.02, 0.002         # seconds: before a sample (ggml's and torch's threads spin for 5 to 12 ms), of one
WARM, SLOW = 0.05, 1.0             # of a call that runs once untimed before its sample; of one that is timed once
FULL = {"H": 32, "K": 128, "seconds": 3.0, "cold": 512 << 20, "long": (4096, 16), "turns": (5, 40)}
QUICK = {"H": 4, "K": 32, "seconds": 0.02, "cold": 1 << 20, "long": (64, 4), "turns": (2, 3)}


class Settings:
    """What the command line asked for, sizes, and where results go.

    Attributes
    ----------
    cases : dict
        ``name T contender`` -> seconds, operations and bytes of a call, as run.py keeps them.
    tables : dict from part to list of rows
        What is printed, as plain numbers.
    """

    def __init__(self, *, threads, tokens=None, quick=False, peers=PEERS, cases=None):
        size = QUICK if quick else FULL
        self.H, self.K, self.seconds, self.turns = size["H"], size["K"], size["seconds"], size["turns"]
        self.cold, self.long = size["cold"], size["long"]
        self.tokens = tokens or (TOKENS[:3] if quick else TOKENS)
        self.contexts = {ctx.threads: ctx for ctx in (kl.Context(threads=n) for n in threads)}
        self.peers, self.said = peers, set()
        self.cases, self.tables = {} if cases is None else cases, {}

    def say_once(self, sentence):
        """Prints a sentence the first time."""
        if sentence not in self.said:
            self.said.add(sentence)
            print(sentence)

    def add(self, part, row, key=None, times=None, flops=0, n_bytes=0):
        """Keeps a row of a part's table, and times under the names of run.py's results."""
        self.tables.setdefault(part, []).append(row)
        if key:
            self.cases[f"delta_rule {key}"] = {"seconds": spread_of(times), "flops": flops, "bytes": n_bytes}


# ---- inputs ----

@functools.lru_cache(maxsize=2)
def inputs(gate, T, H, K, seed=0):
    """q, k, v, g, beta and an initial state as a layer has them: unit keys, decays from almost none to -2.7 nats."""
    rng = np.random.default_rng(seed)
    shape = (T, H, K) if gate == "channel" else (T, H)

    def unit():
        x = rng.standard_normal((T, H, K), np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    return {"q": unit(), "k": unit(), "v": rng.standard_normal((T, H, K), np.float32),
            "g": -np.exp(rng.uniform(-6, 1, shape)).astype(np.float32), "beta": rng.random((T, H), np.float32),
            "initial_state": 0.1 * rng.standard_normal((H, K, K), np.float32)}


def operations(T, H, K):
    """Of the recurrence, which every form is measured by: decay, two products with the state, one update."""
    return 7 * T * H * K * K


# ---- ours ----

class Ours:
    """A form of ``kl.ops.delta_rule``, its arguments checked beforehand and its results in fixed memory."""

    def __init__(self, arguments, ctx, form, *, in_place=False):
        v, initial = arguments["v"], arguments["initial_state"]
        self.o, self.state = np.zeros_like(v), initial if in_place else np.zeros_like(initial)
        seen = []
        with mock.patch.object(_core, "delta_rule", lambda *args, **named: seen.append((args, named))):
            kl.ops.delta_rule(**arguments, **form, out=(self.o, self.state), ctx=ctx)
        self.calls = seen

    def __call__(self):
        for args, named in self.calls:
            _core.delta_rule(*args, **named)

    def result(self):
        """o [T, H, V] and the state [H, K, V] of the last run."""
        return self.o.copy(), self.state.copy()


def ours(arguments, ctx, forms=FORMS, say=print):
    """Our forms that this build has, by name; a sentence for each that it has not."""
    calls = {}
    for name in forms:
        try:
            call = Ours(arguments, ctx, FORMS[name])
            call()
            calls[name] = call
        except NotImplementedError as error:
            say(f"{name} is left out: {error}")
    return calls


# ---- times ----

def take_turns(contenders, settings, check=None):
    """Seconds of a call by turn, {name: {turn: seconds}}.

    Each contender has the same share of the time, so a quick one comes up in more turns than a slow one, whose turns
    are spread evenly among them. Of one that takes longer than `SLOW`, the first call is all there is. `check` is
    called between the first calls and the turns: what fails it is not timed.
    """
    found = {name: {-1: first_call(run)} for name, run in contenders.items()}
    if check:
        check()
    quick = {name: first[-1] for name, first in found.items() if first[-1] < SLOW}
    counts = {name: max(1, int(SAMPLE / max(seconds, 1e-7))) for name, seconds in quick.items()}
    share = settings.seconds / max(1, len(quick))
    wanted = {name: int(np.clip(share / (REST + seconds * (counts[name] + 1)), *settings.turns))
              for name, seconds in quick.items()}
    found |= {name: {} for name in quick}
    turns = max(wanted.values(), default=0)
    for turn in range(turns):
        for name, n in wanted.items():
            if turn * n // turns != (turn - 1) * n // turns:
                found[name][turn] = sample(contenders[name], counts[name], warm=quick[name] < WARM)
    return found


def first_call(run):
    """Seconds of a call: of a short one the second, whose memory is there."""
    seconds = timed(run, 1)
    return min(seconds, timed(run, 1)) if seconds < WARM else seconds


def sample(run, n, *, warm):
    """Seconds of a call, the mean of n."""
    time.sleep(REST)
    if warm:
        run()
    return timed(run, n) / n


def timed(run, n):
    """Seconds of n calls."""
    begin = time.perf_counter()
    for _ in range(n):
        run()
    return time.perf_counter() - begin


def median(taken):
    """Of the times of all turns."""
    return statistics.median(taken.values())


def spread_of(taken):
    """Median, and the 10th and 90th percentile, of all turns."""
    return spread(list(taken.values()))


def ratio(a, b):
    """Median of a over b in the turns that both had; of their medians where there is none."""
    both = a.keys() & b.keys()
    return statistics.median(a[turn] / b[turn] for turn in both) if both else median(a) / median(b)


def relative_rms(got, want):
    """rms of the difference, over the rms of what is wanted."""
    difference = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.square(want, dtype=np.float64))))


def judge(calls, arguments):
    """Error of each call's first tokens against float64; SystemExit where one computes something else."""
    head = {name: a if name == "initial_state" else a[:JUDGED] for name, a in arguments.items()}
    want = kl.reference.delta_rule(**head)[0]
    base, errors = next(iter(calls.values())).result(), {}
    for name, call in calls.items():
        if not hasattr(call, "result"):
            continue
        o, state = call.result()
        errors[name] = relative_rms(o[:JUDGED], want)
        worst = np.max([errors[name], relative_rms(o, base[0]), relative_rms(state, base[1])])  # NaN where one is
        if not worst < WRONG.get(name, 1e-3):
            raise SystemExit(f"delta_rule: {name} is off by {worst:.1e}; it does not compute the same rule")
    return errors


# ---- parts ----

def part_peers(settings):
    """Every form and every peer: time, beside auto's; share of the FMA peak, of the recurrence's operations."""
    for T in settings.tokens:
        for gate in GATES:
            print_peers(T, gate, {n: beside_peers(settings, gate, T, n) for n in settings.contexts})


def beside_peers(settings, gate, T, threads):
    """Rows by name, and the peak of these turns in operations a second."""
    ctx, arguments = settings.contexts[threads], inputs(gate, T, settings.H, settings.K)
    flops, errors, rates, rows = operations(T, settings.H, settings.K), {}, [], {}
    calls = ours(arguments, ctx, say=settings.say_once)
    if T == 1:
        calls["auto, Python's checks"] = checked(arguments, ctx)
    calls |= peer_contenders(arguments, threads, settings.peers)[0]
    calls[PEAK] = lambda: rates.append(ctx._core.roof_fma())
    times = take_turns(calls, settings, check=lambda: errors.update(judge(calls, arguments)))
    del times[PEAK]
    peak = statistics.median(rates)
    for name, taken in times.items():
        rows[name] = {"gate": gate, "tokens": T, "threads": threads, "name": name, "seconds": spread_of(taken),
                      "to_auto": ratio(taken, times["auto"]), "of_peak": flops / median(taken) / peak,
                      "error": errors.get(name)}
        settings.add("peers", rows[name], f"{gate} T={T} {name} {threads}", taken, flops)
    return rows, peak


def print_peers(T, gate, found):
    """Of (rows, peak) by number of threads."""
    lines = []
    for name, first in next(iter(found.values()))[0].items():
        cells = [cell for rows, _ in found.values() for cell in peer_cells(rows[name], T)]
        lines.append((name, *cells, "" if first["error"] is None else f"{first['error']:.1e}"))
    heads = [head for n in found for head in (f"{n} thr: µs/token", "x auto", "of peak")]
    peaks = ", ".join(f"{peak * 1e-9:.0f}" for _, peak in found.values())
    print(f"\nT = {T}, {GATES[gate]}; FMA peak {peaks} GFLOP/s")
    print_table(lines, ("", *heads, "error"), "<" + ">" * (len(heads) + 1))


def peer_cells(row, T):
    return f"{row['seconds']['median'] * 1e6 / T:,.2f}", f"{row['to_auto']:.2f}", f"{row['of_peak']:.1%}"


def checked(arguments, ctx):
    """The op as a program calls it."""
    out = np.zeros_like(arguments["v"]), np.zeros_like(arguments["initial_state"])
    return lambda: kl.ops.delta_rule(**arguments, out=out, ctx=ctx)


def part_decode(settings):
    """One token on states that no cache holds, in turn: bytes read and written a second, beside the memory's own."""
    H, K = settings.H, settings.K
    slots = max(2, settings.cold // (4 * H * K * K))
    memory = aligned((slots, H, K, K))
    memory[...] = 0.1
    n_bytes, rows = 2 * memory.nbytes, []
    for gate in GATES:
        arguments = inputs(gate, 1, H, K)
        for n, ctx in settings.contexts.items():
            passes = decode_passes(settings, arguments, memory, ctx, n)
            times = take_turns(passes, settings)
            base = next(iter(times))
            for name, taken in times.items():
                share = ratio(times[base], taken)
                row = {"gate": gate, "threads": n, "name": name, "bytes_per_second": n_bytes / median(taken),
                       "of_memory": share, "us": median(taken) * 1e6 / slots}
                settings.add("decode", row, f"decode {gate} {name} {n}", taken, n_bytes=n_bytes)
                ok = verdict(share >= BARS["decode"]) if name in FORMS else ""
                rows.append((gate, n, name, f"{row['us']:.1f}", f"{row['bytes_per_second'] * 1e-9:.1f}",
                             f"{share:.1%}", ok))
    print(f"\nOne token, {slots} states in turn, {human_bytes(memory.nbytes)}; bar: {BARS['decode']:.0%} of the memory")
    print_table(rows, ("gate", "threads", "", "µs a state", "GB/s", "of memory", ""), "<><>>><")


def decode_passes(settings, arguments, memory, ctx, threads):
    """Passes over all slots: the memory alone, ours in place, ggml's op, and ggml's with the copy back."""
    from peers.naive_chunk import read_write

    read_write(memory, threads)
    passes = {"memory, read and written": lambda: read_write(memory, threads)}
    slots = [Ours(arguments | {"initial_state": slot}, ctx, FORMS["auto"], in_place=True) for slot in memory]
    passes["auto"] = lambda: each(slots)
    if "ggml" in settings.peers:
        try:
            from peers.ggml import Call

            result = aligned(arguments["v"].size + memory[0].size)
            for name, keep in (("ggml", False), ("ggml, state copied back", True)):
                calls = [Call(arguments, threads, state=slot, result=result, keep=keep) for slot in memory]
                passes[name] = functools.partial(each, calls)
        except Missing:
            pass    # said at the beginning
    return passes


def each(calls):
    for call in calls:
        call()


def part_long(settings):
    """One call over many tokens, and as many short calls over the same memory, in pairs; scratch of both."""
    short, times_longer = settings.long
    H, K, T = settings.H, settings.K, short * times_longer
    rows, room = [], available_bytes()
    if room is not None and room < 10 * T * H * K * 4:
        H = max(1, H // 4)
        print(f"long: {human_bytes(room)} of memory are free; with {H} heads instead of {settings.H}")
    one = inputs("channel", short, H, K)
    whole = {name: a if name == "initial_state" else np.tile(a, (times_longer,) + (1,) * (a.ndim - 1))
             for name, a in one.items()}
    for n in settings.contexts:
        for form in ("auto", "chunked 64"):
            contexts = kl.Context(threads=n), kl.Context(threads=n)
            long_calls = ours(whole, contexts[0], [form], settings.say_once)
            if not long_calls:
                continue
            pieces = [Ours({name: a if name == "initial_state" else a[i * short:(i + 1) * short]
                            for name, a in whole.items()}, contexts[1], FORMS[form]) for i in range(times_longer)]
            each(pieces)
            scratch = [c._core.scratch_bytes for c in contexts]
            pair = {"long": long_calls[form], "short": functools.partial(each, pieces)}
            taken = pairs(pair, settings)
            found = ratio(taken["long"], taken["short"])
            row = {"form": form, "threads": n, "heads": H, "ratio": found, "scratch": scratch,
                   "us": [median(taken[name]) * 1e6 / T for name in pair]}
            settings.add("long", row, f"long {form} {n}", taken["long"], operations(T, H, K))
            rows.append((form, n, *(f"{us:.2f}" for us in row["us"][::-1]), f"{found:.3f}",
                         verdict(found <= BARS["long"]), *map(human_bytes, scratch[::-1]),
                         verdict(scratch[0] <= scratch[1])))
    print(f"\n{T:,} tokens beside {short:,}, {H} heads, a gate each channel; bars: {BARS['long']:.2f}, no more memory")
    print_table(rows, ("", "threads", f"µs/token of {short:,}", f"of {T:,}", "ratio", "", f"scratch of {short:,}",
                       f"of {T:,}", ""), "<>>>><>><")


def pairs(contenders, settings):
    """As `take_turns`, for calls of seconds: always several turns."""
    found = {name: {} for name in contenders}
    for turn in range(settings.turns[0]):
        for name, run in contenders.items():
            found[name][turn] = sample(run, 1, warm=False)
    return found


def available_bytes():
    """Memory that a process may still take; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def part_subnormal(settings):
    """States of which half the rows are subnormal and stay so, beside states without: no write reaches those rows."""
    H, K = settings.H, settings.K
    rows = []
    for T in (1, 64):
        plain = inputs("channel", T, H, K)
        plain = plain | {"k": plain["k"].copy(), "g": np.maximum(plain["g"], np.float32(-0.01))}
        plain["k"][..., K // 2:] = 0
        small = plain | {"initial_state": plain["initial_state"].copy()}
        small["initial_state"][:, K // 2:] = 1e-39
        for n, ctx in settings.contexts.items():
            calls = {(name, kind): call for kind, arguments in (("none", plain), ("half", small))
                     for name, call in subnormal_calls(settings, arguments, ctx, n).items()}
            times = take_turns(calls, settings)
            for name in dict.fromkeys(name for name, _ in calls):
                none, half = times[name, "none"], times[name, "half"]
                row = {"tokens": T, "threads": n, "name": name, "ratio": ratio(half, none),
                       "us": [median(x) * 1e6 / T for x in (none, half)]}
                settings.add("subnormal", row, f"subnormal T={T} {name} half {n}", half)
                rows.append((T, n, name, *(f"{us:.2f}" for us in row["us"]), f"{row['ratio']:.2f}"))
    print("\nHalf of the state subnormal beside none")
    print_table(rows, ("T", "threads", "", "none: µs/token", "half", "ratio"), ">><>>>")


def subnormal_calls(settings, arguments, ctx, threads):
    calls = ours(arguments, ctx, ("recurrent", "auto"), settings.say_once)
    if "ggml" in settings.peers:
        calls |= peer_contenders(arguments, threads, ("ggml",))[0]
    return calls


def part_gates(settings):
    """A gate each channel beside one each head, form by form."""
    compare(settings, "gates", "A gate each channel beside a gate each head", ("each head", "each channel"),
            [T for T in (1, 16, 512, 4096) if T <= max(settings.tokens)],
            lambda T, ctx: {(name, label): call for gate, label in (("head", "each head"), ("channel", "each channel"))
                            for name, call in ours(inputs(gate, T, settings.H, settings.K), ctx,
                                                   say=settings.say_once).items()})


def part_isa(settings):
    """AVX2 beside AVX-512."""
    both = [isa for isa in ("avx512", "avx2") if isa in kl.isa_list()]
    if len(both) < 2:
        return print(f"\nisa: this machine runs {', '.join(kl.isa_list())}; there is nothing to compare")

    @functools.cache
    def context(isa, threads):
        return kl.Context(threads=threads, isa=isa)

    compare(settings, "isa", "AVX2 beside AVX-512, a gate each channel", both,
            [T for T in (1, 16, 512) if T <= max(settings.tokens)],
            lambda T, ctx: {(name, isa): call for isa in both for name, call in
                            ours(inputs("channel", T, settings.H, settings.K), context(isa, ctx.threads),
                                 say=settings.say_once).items()})
    return None


def compare(settings, part, title, kinds, tokens, calls_of):
    """A table of two kinds of call, by T, threads and form: (form, kind) -> call is what `calls_of` gives."""
    rows = []
    for T in tokens:
        for n, ctx in settings.contexts.items():
            times = take_turns(calls_of(T, ctx), settings)
            for name in dict.fromkeys(name for name, _ in times):
                first, second = (times[name, kind] for kind in kinds)
                row = {"tokens": T, "threads": n, "name": name, "ratio": ratio(second, first),
                       "us": [median(x) * 1e6 / T for x in (first, second)]}
                settings.add(part, row, f"{part} T={T} {name} {kinds[1]} {n}", second)
                rows.append((T, n, name, *(f"{us:.2f}" for us in row["us"]), f"{row['ratio']:.2f}"))
    print(f"\n{title}")
    print_table(rows, ("T", "threads", "", f"{kinds[0]}: µs/token", kinds[1], "ratio"), ">><>>>")


def part_chunks(settings):
    """Chunks of 16 rows beside chunks of 64: time and scratch."""
    H, K = settings.H, settings.K
    T, rows = min(4096, max(settings.tokens)), []
    for gate in GATES:
        for n in settings.contexts:
            contexts = {name: kl.Context(threads=n) for name in ("chunked 16", "chunked 64")}
            calls = {name: call for name, ctx in contexts.items()
                     for call in ours(inputs(gate, T, H, K), ctx, [name], settings.say_once).values()}
            if len(calls) < 2:
                continue
            scratch = {name: ctx._core.scratch_bytes for name, ctx in contexts.items()}
            times = take_turns(calls, settings)
            for name, taken in times.items():
                row = {"gate": gate, "threads": n, "name": name, "tokens": T, "scratch": scratch[name],
                       "us": median(taken) * 1e6 / T, "ratio": ratio(taken, times["chunked 16"])}
                settings.add("chunks", row, f"chunks {gate} T={T} {name} {n}", taken, operations(T, H, K))
                rows.append((gate, n, name, f"{row['us']:.2f}", f"{row['ratio']:.2f}", human_bytes(scratch[name])))
    print(f"\nChunks of 16 rows beside 64, T = {T}" + ("" if rows else ": this build has no chunked form"))
    if rows:
        print_table(rows, ("gate", "threads", "", "µs/token", "ratio", "scratch"), "<><>>>")


def verdict(held):
    return "" if held else "MISSED"


PARTS = {"peers": part_peers, "decode": part_decode, "long": part_long, "subnormal": part_subnormal,
         "gates": part_gates, "chunks": part_chunks, "isa": part_isa}


def run(parts, settings):
    """Runs the parts named, all where None; prints their tables."""
    load, processors = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"delta_rule: {settings.H} heads, K = V = {settings.K}; load of the machine before: {load:.1f}")
    if load > 0.5 * processors:
        print(f"others are at work on these {processors} processors: engines whose threads wait by spinning (ggml, "
              f"torch, SGLang) lose most by it; run this again when they are done")
    parts = parts or list(PARTS)
    for line in about_peers([name for name in settings.peers if "peers" in parts or name == "ggml"]):
        print(line)
    for name in parts:
        try:
            PARTS[name](settings)
        except Missing as reason:  # decode measures the memory by a C program
            print(f"\n{name} is left out: {reason}")
    print()
    return settings
