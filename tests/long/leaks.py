"""Many calls of each op, of forward, of a generation's steps and of the verbs of a state: nothing may stay behind.

    python tests/long/leaks.py [CALLS]        10,000 by default; exit code 1 when something leaks

Three counters beside each other: bytes that malloc has handed out (exact, of the C library and NumPy), blocks of
Python objects (exact), and the process's anonymous memory (what it costs; it moves by pages).
"""

import ctypes
import functools
import gc
import sys
import tempfile
from pathlib import Path

import numpy as np

import kimi_linear as kl

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from small_calls import calls_of_every_op  # noqa: E402

# A leak of the smallest block, 32 bytes a call, is over these at 10,000 calls; so is one of 128 at 300.
MALLOC_SLACK, BLOCK_SLACK, RSS_SLACK = 32 << 10, 250, 256 << 10
BYTES_A_CALL, BLOCKS_A_CALL = 16, 0.1


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc: ten sizes; the fifth is mapped bytes, the eighth bytes in use."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def malloc_bytes():
    """Bytes handed out by malloc in all arenas; 0 where the C library does not say."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = _Mallinfo
    info = function()
    return info.field4 + info.field7


def rss_anon():
    """Bytes of the process's anonymous memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def op_calls():
    """Name -> a small call of each op."""
    return {op: functools.partial(getattr(kl.ops, op), **given) for op, given in calls_of_every_op().items()}


def model_calls(model, folder):
    """Name -> a call of the model or of a state, as a person makes it."""
    vocab, k = model.config.vocab_size, model.config.experts_per_token
    tokens = (np.arange(70) * 7 % vocab).astype(np.int32)
    state, held = model.new_state(), model.new_state()
    model.forward(tokens, state=held, logits="none")
    snapshot = held.snapshot()

    def forward():
        model.forward(tokens[:20], logits="last")

    def taps():
        model.forward(tokens[:2], taps="layers.0.*")

    def batch():
        model.forward([tokens[:3], tokens[:1]])

    def edited():
        model.forward(tokens[:2], logits="none", edit={"layers.0.mid": lambda x: x})

    def chosen():
        model.forward(tokens[:2], logits="none", expert_ids={1: np.tile(np.arange(k, dtype=np.int32), (2, 1))})

    def made():
        kl.Model(model.config, model._tensors, ctx=model.ctx).new_state()

    def step():
        if state.position >= 500:
            state.reset()
        model.forward(tokens[:1], state=state, logits="last")

    def refused():
        try:
            model.forward([vocab])
        except ValueError:
            pass

    def cancelled():
        model.ctx._core.cancel_at(5)
        try:
            model.forward(tokens[:2], logits="none")
        except KeyboardInterrupt:
            pass

    def save_and_load():
        held.save(folder / "state")
        model.load_state(folder / "state")

    def checkpoints():
        own = model.new_state(checkpoints_every=64, keep=1)
        model.forward(tokens, state=own, logits="none")
        own.truncate(64)

    return {
        "forward": forward, "forward, taps": taps, "forward, batch": batch, "forward, edited": edited,
        "forward, chosen experts": chosen, "a model and a state": made, "generate": generation(model), "step": step,
        "a refused call": refused, "a cancelled call": cancelled, "fork": lambda: held.fork(),
        "snapshot": lambda: held.snapshot(), "restore": lambda: held.restore(snapshot),
        "save and load": save_and_load, "checkpoints": checkpoints,
    }


def generation(model):
    """Steps of generations, each of 50 tokens."""
    under_way = [iter(())]

    def step():
        try:
            next(under_way[0])
        except StopIteration:
            under_way[0] = iter(model.generate([5, 6, 7], max_new_tokens=50, temperature=0, stop_at_eos=False))
            next(under_way[0])

    return step


def growth(call, calls):
    """Bytes of malloc, blocks of Python and anonymous bytes that so many calls leave behind."""
    for _ in range(max(60, calls // 10)):
        call()
    gc.collect()
    before = malloc_bytes(), sys.getallocatedblocks(), rss_anon()
    for _ in range(calls):
        call()
    gc.collect()
    after = malloc_bytes(), sys.getallocatedblocks(), rss_anon()
    return [b - a for a, b in zip(before, after, strict=True)]


def leaks_by(found, calls, with_rss):
    """Whether a growth is more than what counters move by themselves."""
    malloc, blocks, rss = found
    return (malloc > MALLOC_SLACK + BYTES_A_CALL * calls or blocks > BLOCK_SLACK + BLOCKS_A_CALL * calls
            or (with_rss and rss > RSS_SLACK + BYTES_A_CALL * calls))


def main(calls=10_000, with_rss=True):
    """Prints a line for each; the number of those that leak."""
    ctx = kl.Context(threads=2)
    model = kl.Model.from_pretrained(Path(__file__).parents[1] / "data" / "golden" / "kimi-a", ctx=ctx)
    leaks = 0
    with tempfile.TemporaryDirectory() as folder:
        everything = op_calls() | model_calls(model, Path(folder))
        print(f"{'growth by ' + format(calls, ',') + ' calls':<24} {'malloc':>9} {'blocks':>7} {'RssAnon':>9}")
        for name, call in everything.items():
            found = growth(call, calls)
            if leaks_by(found, calls, with_rss):
                found = growth(call, calls)  # caches that were still filling are full now; a leak goes on
            bad = leaks_by(found, calls, with_rss)
            leaks += bad
            malloc, blocks, rss = found
            print(f"{name:<24} {malloc:>9,} {blocks:>7,} {rss:>9,}{'  LEAKS' if bad else ''}", flush=True)
    print("ok: nothing stays behind" if not leaks else f"{leaks} leak")
    return leaks


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
