"""The GPU's kernels beside what the device allows; `run.py hip` calls it.

Parts, each a table: ``delta_rule`` (its forms at 32 heads of 128 x 128, beside flash-linear-attention's Triton kernel
where that is installed and torch sees the GPU), ``linear`` (beside torch's cuBLAS or hipBLAS), ``ops`` (each at the
model's widths), ``model`` (prefill and decode of a model file).

Arrays lie on the device. A sample is a number of calls between two events of the device's clock, below the checks of
arguments that Python makes; medians of several. A call of less than some ten microseconds is mostly its launch. The
model is timed by the clock on the wall: each call waits for its logits. The roofs are measured by two kernels
(csrc/hip/roof.hip): a sum over a large array, and chains of fmaf, which no matrix instruction helps. Nothing here looks
at errors: the tests of tests/hip do.
"""

import itertools
import statistics
import time
from unittest import mock

import cases
import delta_rule
import numpy as np

import kimi_linear as kl
from kimi_linear import _core
from kimi_linear.bench import active_bytes, active_flops, spread
from kimi_linear.cli._common import human_bytes, human_rate, print_table

__all__ = ["PARTS", "run"]

FORMS = ("recurrent", "chunked 64", "auto")
#: Sizes on a GPU, and on the host build, where they only show that all of it runs.
FULL = {"roof": 1 << 30, "H": 32, "K": 128, "tokens": (512, 4096, 32768), "op_tokens": (1, 512), "cold": 256 << 20,
        "depth": 4096, "op_bytes": None, "linear": (1, 16, 512), "seconds": 0.01, "samples": 7, "prefill": 512,
        "decode": 64}
HOST = FULL | {"roof": 1 << 20, "H": 2, "tokens": (16, 64), "op_tokens": (1,), "cold": 0, "depth": 64, "linear": (1,),
               "seconds": 0.0, "samples": 1, "prefill": 16, "decode": 2}
QUICK_OPS = ("rms_norm", "swiglu", "route")
QUICK = HOST | {"H": 1, "K": 32, "tokens": (16,), "op_bytes": 1 << 20, "prefill": 4, "decode": 1}


class Settings:
    """A device, its context and roofs, sizes, and where results go.

    Attributes
    ----------
    cases : dict
        ``name T contender`` -> seconds, operations and bytes of a call, as run.py keeps them.
    row : Device
        What `kl.devices` says of it.
    tables : dict from part to list of rows
    """

    def __init__(self, device, *, quick=False, model=None, cases=None):
        self.ctx, self.model = kl.Context(device), model
        self.row = next(d for d in kl.devices() if d.name == ("hip:0" if device == "hip" else device))
        self.host = "host" in self.row.name + self.row.description
        self.size = QUICK if quick else HOST if self.host else FULL
        self.cases, self.tables = {} if cases is None else cases, {}
        self.torch, self.no_torch = _torch(device)
        data = kl.DeviceArray.from_numpy(np.ones(self.size["roof"], np.uint8), self.ctx)
        core, n = self.ctx._core, self.size["samples"]
        self.read = statistics.median(core.roof_read(data) for _ in range(n))
        self.fma = statistics.median(core.roof_fma() for _ in range(n))

    def add(self, part, name, T, contender, times, flops, n_bytes):
        """Keeps a result; cells of its row from T on."""
        s = spread(times)
        row = {"seconds": s, "flops": flops, "bytes": n_bytes}
        self.cases[f"hip {name} T={T} {contender}"] = row
        shares = flops / s["median"] / self.fma, n_bytes / s["median"] / self.read
        self.tables.setdefault(part, []).append(
            row | {"name": name, "tokens": T, "contender": contender, "of_fma": shares[0], "of_read": shares[1]})
        return (T, contender, f"{s['median'] * 1e6:,.1f}", f"{flops / s['median'] * 1e-9:,.1f}",
                f"{n_bytes / s['median'] * 1e-9:,.1f}", *(f"{share:.1%}" for share in shares))

    def seconds(self, call, ctx=None):
        """Of a call, by the clock of its context on the device: several samples of as many calls as fill one."""
        core = (ctx or self.ctx)._core
        call()
        core.tick()
        call()
        n = int(np.clip(self.size["seconds"] / max(core.tick(), 1e-9), 1, 1000))
        taken = []
        for _ in range(self.size["samples"]):
            core.tick()
            for _ in range(n):
                call()
            taken.append(core.tick() / n)
        return taken

    def torch_seconds(self, call):
        """The same by torch's events."""
        cuda = self.torch.cuda
        call()
        taken = []
        for _ in range(self.size["samples"]):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) * 1e-4)
        return taken


HEADER, ALIGN = ("T", "", "µs", "GFLOP/s", "GB/s", "of fma", "of read"), "><>>>>>"


def _torch(device):
    """(torch, None) where it sees the GPU, else (None, why)."""
    try:
        import torch
    except ImportError:
        return None, "torch is not installed here"
    if not torch.cuda.is_available():
        return None, "torch sees no GPU"
    torch.cuda.set_device(int(device.partition(":")[2] or 0))
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch, None


# ---- calls on the device ----

def on_device(value, name, op, ctx):
    """An argument of an op, where the op wants it: numbers on the device, control data in host memory."""
    if isinstance(value, kl.Quantized):
        return kl.Quantized(kl.DeviceArray.from_numpy(value.data, ctx), value.type, value.shape)
    if not isinstance(value, np.ndarray) or value.dtype == np.int64 or (name == "ids" and op != "moe"):
        return value
    return kl.DeviceArray.from_numpy(value, ctx)


def replay(op, arguments, ctx):
    """A call of ``kl.ops.<op>``, its arguments checked and on the device beforehand."""
    seen = []
    arguments = {name: on_device(value, name, op, ctx) for name, value in arguments.items()}
    with mock.patch.object(_core, op, lambda *given: seen.append(given)):
        getattr(kl.ops, op)(**arguments, ctx=ctx)
    function = getattr(_core, op)

    def call():
        for given in seen:
            function(*given)

    return call


def in_turns(calls):
    """One call after another of a list, forever."""
    turn = iter(range(1 << 62))
    return lambda: calls[next(turn) % len(calls)]()


# ---- parts ----

def part_delta_rule(settings):
    H, K, rows = settings.size["H"], settings.size["K"], []
    fla, why = _fla(settings)
    for T in settings.size["tokens"]:
        x = delta_rule.inputs.__wrapped__("channel", T, H, K)
        flops = delta_rule.operations(T, H, K)
        n_bytes = sum(a.nbytes for a in x.values()) + x["v"].nbytes + x["initial_state"].nbytes
        for form in FORMS:
            times = settings.seconds(replay("delta_rule", x | delta_rule.FORMS[form], settings.ctx))
            rows.append(settings.add("delta_rule", "delta_rule", T, form, times, flops, n_bytes))
        if fla is not None:
            times = settings.torch_seconds(_fla_call(settings.torch, fla, x))
            rows.append(settings.add("delta_rule", "delta_rule", T, "fla chunk_kda bfloat16", times, flops, n_bytes))
    print(f"\ndelta_rule, {H} heads, K = V = {K}, a gate each channel" + (f"; without fla: {why}" if why else ""))
    print_table(rows, HEADER, ALIGN)


def _fla(settings):
    """(fla's chunk_kda, None), or (None, why)."""
    if settings.torch is None:
        return None, settings.no_torch
    try:
        import triton  # noqa: F401
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        return None, f"{error.name} is not installed here"
    return chunk_kda, None


def _fla_call(torch, chunk_kda, x):
    """As fla's layers call it: q, k, v in bfloat16, gates and the state in float32."""
    tensors = {name: torch.from_numpy(a)[None].cuda() for name, a in x.items()}
    tensors |= {name: tensors[name].to(torch.bfloat16) for name in ("q", "k", "v", "beta")}

    def call():
        with torch.no_grad():
            chunk_kda(**tensors, output_final_state=True)

    return call


def part_linear(settings):
    """Each kind of weight, with float32 activations and with the narrow ones that it takes."""
    rows, rng = [], np.random.default_rng(0)
    shapes = [(cases.D, cases.C), (cases.C, cases.D)] if settings.size["op_bytes"] is None else [(64, 96)]
    narrow = {name: kl.Context(settings.ctx.device, activations=name) for name in ("int8", "bfloat16")}
    kinds = {np.float32: None, cases.BFLOAT16: "bfloat16", "Q4_K": "int8", "Q8_0": "int8"}
    for cols, width in shapes:
        for T, (kind, activations) in itertools.product(settings.size["linear"], kinds.items()):
            blocks = isinstance(kind, str)
            if blocks and cols % kl.storage_types[kind].values:
                continue
            sets = _sets(settings, (cases.linear_blocks if blocks else cases.linear)(cols, width, kind), T, rng)
            flops, n_bytes = cases.linear_work(T, sets[0])
            label = f"linear {cols}->{width} {kind if blocks else np.dtype(kind)}"
            ours = [("ours", settings.ctx)]
            if activations:
                ours.append((f"ours, {activations}", narrow[activations]))
            for name, ctx in ours:
                times = settings.seconds(in_turns([replay("linear", s, ctx) for s in sets]), ctx)
                rows.append((label, *settings.add("linear", label, T, name, times, flops, n_bytes)))
            if settings.torch is not None and not blocks:
                times = settings.torch_seconds(in_turns([_torch_linear(settings.torch, s) for s in sets]))
                rows.append((label, *settings.add("linear", label, T, "torch", times, flops, n_bytes)))
    print("\nlinear" + (f"; without torch: {settings.no_torch}" if settings.no_torch else
                        "; torch multiplies bfloat16 by bfloat16, ours float32 by bfloat16 where no other is said"))
    print_table(rows, ("", *HEADER), "<" + ALIGN)


def _torch_linear(torch, arguments):
    narrow = arguments["w"].dtype == cases.BFLOAT16
    x = torch.from_numpy(arguments["x"]).cuda()
    w = torch.from_numpy(arguments["w"].astype(np.float32)).cuda()
    x, w = (a.to(torch.bfloat16) for a in (x, w)) if narrow else (x, w)
    return lambda: torch.nn.functional.linear(x, w)


def _sets(settings, make, T, rng):
    """Sets of arguments of a case; on the host build small and few."""
    with mock.patch.multiple(cases, COLD=settings.size["cold"], DEPTH=settings.size["depth"]):
        sets = make(T, rng)
    return sets if settings.size["cold"] else sets[:1]


def part_ops(settings):
    rows, left_out, rng = [], [], np.random.default_rng(0)
    for case in cases.CASES:
        if case.op in ("linear", "delta_rule"):
            continue    # have parts of their own
        if settings.size["op_bytes"] is not None and case.op not in QUICK_OPS:
            continue
        for T in [T for T in settings.size["op_tokens"] if T in case.tokens] or case.tokens[:1]:
            sets = _sets(settings, case.make, T, rng)
            with mock.patch.object(cases, "DEPTH", settings.size["depth"]):
                flops, n_bytes = case.work(T, sets[0])
            try:
                times = settings.seconds(in_turns([replay(case.op, s, settings.ctx) for s in sets]))
            except NotImplementedError as reason:
                left_out.append(f"{case.name} ({reason})")
                break
            label = case.name if settings.size["depth"] == FULL["depth"] else case.name.replace(
                f"at {FULL['depth']}", f"at {settings.size['depth']}")
            rows.append((label, *settings.add("ops", label, T, "", times, flops, n_bytes)))
    print("\nOps at the model's widths")
    print_table(rows, ("", *HEADER), "<" + ALIGN)
    for sentence in left_out:
        print(f"left out: {sentence}")
    if settings.size["op_bytes"] is not None:
        print("--quick leaves out the other ops")


def part_model(settings):
    """Decode beside reading the weights, prefill beside the matrix products of torch, or else fma."""
    for activations in ("float32", "auto"):
        model = kl.Model.from_pretrained(settings.model or "tiny", ctx=settings.ctx, activations=activations)
        if activations == "float32" or model.activations != "float32":
            _time_model(settings, model)


def _time_model(settings, model):
    rng, prefill, decode = np.random.default_rng(0), settings.size["prefill"], settings.size["decode"]
    matrix, whose = _matrix_roof(settings)
    name = f"model {model.name}" + ("" if model.activations == "float32" else f", {model.activations}")

    def call(n, state):
        ids = rng.integers(0, model.config.vocab_size, n).astype(np.int32)
        begin = time.perf_counter()
        model.forward(ids, state=state, logits="last")
        return time.perf_counter() - begin

    calls = []
    for turn in range(1 + min(3, settings.size["samples"])):
        state = model.new_state(context=prefill + decode + 1)
        taken = call(prefill, state)
        if turn:
            calls.append(taken)
    call(1, state)
    steps = [call(1, state) for _ in range(decode)]
    flops = active_flops(model, head=False) * (prefill - 1) + active_flops(model)
    n_bytes = active_bytes(model)
    rows = [(f"prefill {prefill}", f"{prefill / statistics.median(calls):,.1f}",
             f"{flops / statistics.median(calls) * 1e-9:,.1f} GFLOP/s",
             f"{flops / statistics.median(calls) / matrix:.1%} of {whose}"),
            ("decode", f"{1 / statistics.median(steps):,.1f}", human_rate(n_bytes / statistics.median(steps)),
             f"{n_bytes / statistics.median(steps) / settings.read:.1%} of read")]
    settings.add("model", name, prefill, "prefill", calls, flops, 0)
    settings.add("model", name, 1, "decode", steps, 0, n_bytes)
    print(f"\n{name}, {human_bytes(sum(t.nbytes for t in model._tensors.values()))} of weights")
    print_table(rows, ("", "tokens/s", "rate", "of the roof"), "<>>>")


def _matrix_roof(settings):
    """(float32 operations a second of a large product, whose): torch's, else multiply-adds in registers."""
    if settings.torch is None:
        return settings.fma, "fma"
    n = 4096
    a = settings.torch.ones(n, n, device="cuda")
    return 2 * n**3 / statistics.median(settings.torch_seconds(lambda: a @ a)), "torch's product"


PARTS = {"delta_rule": part_delta_rule, "linear": part_linear, "ops": part_ops, "model": part_model}


def run(settings, parts=None):
    """Prints the tables of the parts named, all where None."""
    row = settings.row
    print(f"{row.name}: {row.description}, {human_bytes(row.memory)}; version {kl.__version__}")
    print(f"reads {human_rate(settings.read)} ({human_bytes(settings.size['roof'])}), "
          f"fma {settings.fma * 1e-9:,.1f} GFLOP/s")
    if settings.host:
        print("this is the host build, which runs the kernels on the processor at small sizes: its times mean nothing")
    for name in parts or PARTS:
        PARTS[name](settings)
    print()
    return settings
