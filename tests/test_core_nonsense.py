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
owner = {"Model": model._core, "State": model.new_state()._core, "ctx": context}
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


@pytest.mark.parametrize("name", sorted(set(functions()) - {"ctx.set_threads", "ctx.roof_fma", "ctx.cancel"}))
def test_nonsense_raises(name):
    arity = _arity(name)
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, name, str(CALLS_OF_EACH), str(arity)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{name}: exit {done.returncode}\n{done.stderr[-3000:]}"


def _arity(name):
    """How many arguments the C function takes, from the error it gives for none."""
    model = kl.Model.tiny()
    target = {"ctx": kl.Context()._core, "Model": model._core, "State": model.new_state()._core}
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


def test_a_tensor_outside_its_buffer_is_refused():
    context = kl.Context()._core
    good = _engine.config_numbers(kl.Model.tiny().config)
    buffer = np.zeros(8, np.float32)
    for entry in [("a", 0, 4, 0, (8,)), ("a", 0, -4, 0, (1,)), ("a", 1, 0, 0, (1,)), ("a", 0, 2, 0, (1,)),
                  ("a", 0, 0, 0, (2**40, 2**40)), ("a", 0, 0, 3, (1,)), ("a", 0, 0, 0, ()), ("a", 0, 0, 0, (-1,)), "a"]:
        with pytest.raises((TypeError, ValueError)):
            _core.Model(context, good, [buffer], [entry])
