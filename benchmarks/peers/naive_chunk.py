"""The chunked delta rule as a first C program has it (naive_chunk.c), built where the benchmark runs."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from . import Missing

__all__ = ["about", "contenders", "library", "read_write"]

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def library():
    """naive_chunk.c, compiled into a folder that lasts as long as the process."""
    keep = tempfile.TemporaryDirectory(prefix="kimi-linear-naive-")
    built, compiler = Path(keep.name) / "naive_chunk.so", os.environ.get("CC", "cc")
    try:
        subprocess.run([compiler, *FLAGS, str(Path(__file__).with_suffix(".c")), "-o", str(built), "-lm"],
                       check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        raise Missing(f"naive chunk is missing: {compiler} did not build it ({why}); set CC to a C compiler") from None
    lib = ctypes.CDLL(str(built))
    lib.keep = keep
    lib.naive_chunk.argtypes = [_P] * 8 + [_I64] * 4 + [_INT] * 2
    lib.read_write.argtypes = [_P, _I64, ctypes.c_float, _INT]
    return lib


def about():
    """How it was built."""
    library()
    return f"naive chunk: {os.environ.get('CC', 'cc')} {' '.join(FLAGS[:2])}"


class Call:
    """One sequence, from its initial state each time."""

    def __init__(self, arguments, threads):
        q, v, g = arguments["q"], arguments["v"], arguments["g"]
        (T, H, K), V = q.shape, v.shape[2]
        self.function, self.o, self.state = library().naive_chunk, np.zeros_like(v), np.zeros((H, K, V), np.float32)
        names = ("q", "k", "v", "g", "beta", "initial_state")
        self.inputs = [np.ascontiguousarray(arguments[name]) for name in names]
        self.arguments = [a.ctypes.data for a in (self.o, self.state, *self.inputs)]
        self.arguments += [T, H, K, V, int(g.ndim == 3), threads]

    def __call__(self):
        if self.function(*self.arguments) != 0:
            raise RuntimeError("naive_chunk: widths are at most 256, threads at most 64")

    def result(self):
        """o [T, H, V] and the state [H, K, V] of the last run."""
        return self.o.copy(), self.state.copy()


def read_write(x, threads):
    """Reads and writes every value of a float32 array where it lies, once."""
    if library().read_write(x.ctypes.data, x.size, 1.0, threads) != 0:
        raise RuntimeError("read_write: threads must be 1 to 64")


def contenders(arguments, threads):
    """``naive chunk of 64``."""
    return {"naive chunk of 64": Call(arguments, threads)}
