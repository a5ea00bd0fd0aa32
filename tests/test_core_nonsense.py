"""Calling ``_core`` with nonsense raises and never crashes, and writes nothing past an array."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import _core, _engine

CALLS_OF_EACH = 400

PROGRAM = r"""
import itertools, random, sys
import numpy as np
import kimi_linear as kl
from kimi_linear import _core

name, calls, arity = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(name)
context = kl.Context(threads=2)._core
model = kl.Model.tiny()
values = np.zeros(16, np.uint8)
memory = _core.DeviceMemory.borrow(values.ctypes.data, 16, False, None, values)
owner = {"Model": model._core, "State": model.new_state()._core, "ctx": context, "DeviceMemory": memory}
target = _core if "." not in name else owner[name.split(".")[0]]
function = getattr(target, name.split(".")[-1])

def guarded(n, dtype):
    whole = np.full(n + 32, 77, dtype)
    return whole, whole[16:16 + n]

def argument(arrays):
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice([0, 1, 2, 3, 4, 8, -1, -7, 2**31, 2**62, -2**63, 2**63 - 1, 2**64, 17, 64])
    if kind < 7:
        dtype = rng.choice(["f4", "f4", "f4", "i4", "i8", "u2", "f8"])
        whole, part = guarded(rng.choice([0, 1, 2, 4, 8, 12, 16, 64]), dtype)
        part[...] = [rng.choice([0, 1, 2, 3, 50] if dtype == "u2" else [0, 1, -1, 2, 3, 50]) for _ in part]
        arrays.append((whole, part.size))
        return part
    if kind == 7:
        n, rows, cols = rng.choice([0, 1, 2, -1]), rng.choice([0, 2, 4, 2**40]), rng.choice([2, 4, 0])
        return (argument(arrays), rng.choice([0, 1, 30, 7]), n, rows, cols)
    return rng.choice([None, "text", 1.5, float("nan"), float("inf"), -0.5, context, [], [None], (), {}, object(),
                       owner["Model"], [owner["State"]], b"bytes", True])

returned = 0
for call in range(calls):
    arrays = []
    arguments = [argument(arrays) for _ in range(arity)]
    if arity and "ctx" not in name and rng.random() < 0.9:
        arguments[0] = context
    try:
        function(*arguments)
        returned += 1
    except BaseException as error:
        assert not isinstance(error, (SystemExit, SystemError)), error
    for whole, n in arrays:
        assert (whole[:16] == 77).all() and (whole[16 + n:] == 77).all(), (name, arguments)
print(returned, "returned")
"""


def functions():
    import re
    from pathlib import Path

    stub = (Path(_core.__file__).parent / "_core.pyi").read_text()
    owner = None
    for line in stub.splitlines():
        if match := re.match(r"class (\w+)", line):
            owner = match[1]
        elif re.match(r"\S", line):
            owner = None
        if match := re.match(r"\s*def (\w+)\(", line):
            name = match[1]
            if owner is None:
                yield name
            elif not name.startswith("__"):
                yield f"{'ctx' if owner == 'Context' else owner}.{name}"


LEFT_OUT = {"ctx.set_threads", "ctx.roof_fma", "ctx.tick", "ctx.cancel"}


@pytest.mark.parametrize("name", sorted(set(functions()) - LEFT_OUT))
def test_nonsense_raises(name):
    arity = _arity(name)
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, name, str(CALLS_OF_EACH), str(arity)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{name}: exit {done.returncode}\n{done.stderr[-3000:]}"


def _arity(name):
    """How many arguments the C function takes, from the error it gives for none."""
    model = kl.Model.tiny()
    target = {"ctx": kl.Context()._core, "Model": model._core, "State": model.new_state()._core,
              "DeviceMemory": _core.DeviceMemory.borrow(0, 0, False, None, None)}
    function = getattr(_core if "." not in name else target[name.split(".")[0]], name.split(".")[-1])
    try:
        function()
    except TypeError as error:
        digits = [int(word) for word in str(error).replace("(", " ").split() if word.isdigit()]
        return digits[0] if digits else 1
    return 0


def test_types_refuse_nonsense():
    context = kl.Context()._core
    good = _engine.config_numbers(kl.Model.tiny().config)
    things = [None, 1, "x", [], {}, (), context, good, object()]
    for arguments in itertools.product(things, repeat=2):
        for make in (_core.Model, _core.State):
            with pytest.raises((TypeError, ValueError)):
                make(*arguments)
    for key, value in itertools.product(good, [None, -1, 2**70, "x", 0]):
        wrong = {**good, key: value}
        if wrong == good or (value == 0 and key not in ("vocab_size", "hidden_size", "layers")):
            continue
        with pytest.raises((TypeError, ValueError, OverflowError)):
            _core.Model(context, wrong, [], [("a", -1, 0, 0, (1,))], 1)


@pytest.mark.parametrize("key, value, rule", [
    ("rms_norm_eps", np.nan, "finite and >= 0"), ("latent_eps", -1e-6, "finite and >= 0"),
    ("l2_eps", 1e300, "finite and >= 0"),  # no float32
    ("gate_lower_bound", 5.0, "finite and < 0, or 0 for none"), ("routed_scale", np.inf, "finite"),
    ("rope_base", 0.0, "finite and > 0"), ("rope_base", np.nan, "finite and > 0"),
])
def test_a_model_refuses_numbers_that_its_ops_would(key, value, rule):
    """Kimi-Linear has layers of every number but the rotary base, which a layer of gated attention has."""
    good = _engine.config_numbers(kl.Model.tiny().config)
    if key == "rope_base":
        good |= dict(layers=[(3, 0)], attn_heads=2, attn_kv_heads=1, attn_head_dim=8, rotary_dim=4)
    with pytest.raises(ValueError, match=f"config: {key} is .*; it must be {rule}$"):
        _core.Model(kl.Context()._core, {**good, key: value}, [], [("a", -1, 0, 0, (1,))], 1)


def test_tap_buffers_cannot_be_resized_during_the_call():
    """As from another thread: the function of an edit runs in the middle of the pass."""
    model, context = kl.Model.tiny(), kl.Context()._core
    config, T, tried = model.config, 3, []
    names = {(layer, name): tap for layer, tap, name, *_ in model._core.taps()}
    layer = next(i for i, spec in enumerate(config.layers) if spec.ffn == "moe")
    written = bytearray(4 * T * config.hidden_size)
    chosen = bytearray(np.arange(T * config.experts_per_token, dtype=np.int32) % config.experts_per_token)

    def edit(*_):
        for array in (written, chosen):
            with pytest.raises(BufferError):
                array.extend(bytes(1 << 20))
        tried.append(True)

    def forward(taps):
        model._core.forward(context, [model.new_state()._core], np.zeros(T, np.int32), np.array([0, T]), T, None, None,
                            0, taps, [(layer, names[layer, "moe.ids"], chosen)], 0, 0, None, [(-1, names[-1, "embed"])],
                            edit)

    forward([(-1, names[-1, "embed"], written)])
    assert tried and np.frombuffer(written, np.float32).any()
    with pytest.raises(ValueError, match="the array has 8 bytes"):
        forward([(-1, names[-1, "embed"], written), (-1, names[-1, "embed"], bytearray(8))])
    written.clear()  # both calls gave them back
    chosen.clear()


EVIL = r"""
import sys
import kimi_linear as kl
from kimi_linear import _core, _engine

class Evil:
    def __init__(self, items, value):
        self.items, self.value = items, value
    def __index__(self):
        self.items.clear()
        self.other = [(i, i) for i in range(1000)]  # what was freed is written over
        return self.value

context, model = kl.Context()._core, kl.Model.tiny()
good = _engine.config_numbers(model.config)
items = []
if sys.argv[1] == "layers":
    items += [(Evil(items, 0), 0), (1, 0)]
    call = lambda: _core.Model(context, {**good, "layers": items}, [], [])
elif sys.argv[1] == "weights":
    import numpy as np
    x, out = np.ones((1, 4), np.float32), np.zeros((1, 2), np.float32)
    items += [(np.ones(8, np.float32), Evil(items, 0), 1, 2, 4)] * 2
    call = lambda: _core.linear(context, [out, out], x, items, [None, None], [False, False], 1, 4)
elif sys.argv[1] == "tensors":
    items += [("a", -1, Evil(items, 0), 0, (1,)), ("b", -1, 0, 0, (1,))]
    call = lambda: _core.Model(context, good, [], items, 1)
else:
    import numpy as np
    states, ids, offsets = [model.new_state()._core], np.zeros(1, np.int32), np.array([0, 1])
    taps, edits = ([items, None] if sys.argv[1] == "taps" else [None, items])
    items += [(Evil(items, -1), 0, np.zeros((1, 4), np.float32))[: 3 if taps is items else 2]] * 2
    call = lambda: model._core.forward(context, states, ids, offsets, 1, None, None, 0, taps, None, 0, 0, None,
                                       edits, print)
try:
    call()
except (TypeError, ValueError):
    pass
"""


@pytest.mark.parametrize("what", ["layers", "tensors", "weights", "taps", "edits"])
def test_a_list_that_changes_while_it_is_read(what):
    command = [sys.executable, "-X", "faulthandler", "-c", EVIL, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"


FORK = r"""
import os, signal, time
import numpy as np
import kimi_linear as kl

context = kl.Context(threads=3)
x = np.ones((512, 512), np.float32)
want = kl.ops.softmax(x, ctx=context)
time.sleep(0.2)  # the threads fall asleep: they are waiting when the process forks
for threads in (0, 1):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        if threads:
            context._core.set_threads(threads)
        assert (kl.ops.softmax(x, ctx=context) == want).all()
        del context
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child hung, or failed"
"""


def test_a_child_of_fork_computes_and_closes_its_context():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_checkpoints_that_are_not_given_are_not_written():
    context, size = kl.Context()._core, 16
    kept, marks = np.full(3 * size, 7, np.float32), np.array([1, 2, 3])
    x, beta, o = np.full((3, 1, 4), 0.1, np.float32), np.full((3, 1), 0.1, np.float32), np.zeros((3, 1, 4), np.float32)

    def call(of, to):
        _core.delta_rule(context, o, None, x, x, x, x, beta, None, np.array([0, 3]), 1, 3, 1, 1, 4, 4, 1.0, 2, 0, 0, 0,
                         False, 1e-6, marks[:1], of, to, 1)

    call(np.array([0, 1]), kept[:size])
    assert (kept[:size] != 7).all()
    for of, to, message in [(np.array([0, 3]), kept[:size], "end at 3; there are 1"),
                            (np.array([0, -1]), kept[:size], "must not be below 0"),
                            (None, kept[:size], "must be, too"), (np.array([0, 1]), None, "must be, too")]:
        with pytest.raises(ValueError, match=message):
            call(of, to)
    assert (kept[size:] == 7).all()


def test_a_tensor_outside_its_buffer_is_refused():
    context = kl.Context()._core
    good = _engine.config_numbers(kl.Model.tiny().config)
    buffer = np.zeros(8, np.float32)
    for entry in [("a", 0, 4, 0, (8,)), ("a", 0, -4, 0, (1,)), ("a", 1, 0, 0, (1,)), ("a", 0, 2, 0, (1,)),
                  ("a", 0, 0, 0, (2**40, 2**40)), ("a", 0, 0, 3, (1,)), ("a", 0, 0, 0, ()), ("a", 0, 0, 0, (-1,)), "a"]:
        with pytest.raises((TypeError, ValueError)):
            _core.Model(context, good, [buffer], [entry])
