"""Sizes that only arrays without values can have, and bytes that a caller keeps: each once crashed."""

import subprocess
import sys

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import _core

SETUP = """
import numpy as np
import kimi_linear as kl
from kimi_linear import _core
c, e = kl.Context(threads=1)._core, np.zeros(0, np.float32)
ids = lambda *x: np.array(x, np.int64)
"""

REFUSED = {
    "2^61 experts without rows": """
w = np.zeros((2**61, 0, 1), np.float16)
x = np.ones((1, 1), np.float32)
kl.ops.moe(x, np.zeros((1, 1), np.int32), x, w, w, np.zeros((2**61, 1, 0), np.float16))
""",
    "a table of 2^62 angles for no token": "_core.rope(c, e, e, ids(), 0, 1, 2**62, 2**62 - 2, 1e4)",
    "2^63 - 1 positions of width 0": """
_core.cache_append(c, e, 0, e, ids(0, 0), ids(0), ids(0, 2**63 - 1), 1, 0, 0, 2**63 - 1)
""",
    "no row of 2^60 values": "kl.ops.softmax(np.zeros((0, 2**60), np.float32))",
    "no row of 2^60 experts": "kl.ops.route(np.zeros((0, 2**60), np.float32), k=1, ctx=kl.Context(threads=16))",
    "no matrix of 2^80 values": "_core.embedding(c, e, np.zeros(0, np.int32), (e, 0, 0, 2**40, 2**40), 0)",
    "2^28 matrices without rows": """
x, i = np.zeros((1, 4), np.float32), np.zeros((1, 1), np.int32)
w = (e, 0, 2**28, 0, 4)
_core.linear(c, [x], x, [w], [None], [0], 1, 4)
""",
}


@pytest.mark.parametrize("what", REFUSED)
def test_sizes_that_no_memory_holds_are_refused(what):
    program = f"{SETUP}\ntry:\n    {REFUSED[what].strip().replace(chr(10), chr(10) + '    ')}\n" + (
        "except (MemoryError, ValueError) as error:\n    print('refused:', error)\n")
    got = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr or got.returncode
    assert got.stdout.startswith("refused:"), got.stdout


def test_marks_outside_their_array_are_not_read(monkeypatch):
    """The first sequence's end lies behind the three marks; that offsets fall is said before a mark is read."""
    calls = []

    class Spy:
        @staticmethod
        def delta_rule(*arguments):
            calls.append(arguments)
            return _core.delta_rule(*arguments)

    x = np.ones((60, 1, 1), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_linear.ops._delta._core", Spy)
        kl.ops.delta_rule(x, x, x, -x, x[..., 0], offsets=[0, 30, 60], checkpoints=[[1], [2, 3]])
    falling = [np.array([0, 60, 3]) if isinstance(a, np.ndarray) and a.tolist() == [0, 1, 3] else a for a in calls[0]]
    with pytest.raises(ValueError, match=r"checkpoint_offsets\[2\] is 3; it must not be below 60"):
        _core.delta_rule(*falling)


def test_bytes_of_an_edit_may_be_kept(monkeypatch):
    model, kept = kl.Model.tiny(), []

    def keep(view):
        kept.append(view)
        return bytes(view)

    monkeypatch.setattr("kimi_linear.editing.bytes", keep, raising=False)
    ids = list(range(3, 515))
    model.forward(ids, edit={"layers.0.kda.k": lambda x: x})
    assert b"".join(map(bytes, kept)) == model.trace(ids, ["layers.0.kda.k"])["layers.0.kda.k"].tobytes()
