"""Contexts: which kernels, how many threads, which matrix product."""

import contextlib
import os
import threading
from typing import NamedTuple

from . import _core
from ._control_groups import processors_allowed
from ._names import choice
from ._scalars import as_whole

__all__ = ["Context", "Device", "current", "devices", "set_num_threads", "threads", "isa_list"]

_GEMM = {"own": 0, "blas": 1}
ACTIVATIONS = {"float32": 0, "int8": 1, "bfloat16": 2}
_DELTA_RULE = {"auto": 0, "recurrent": 1, "chunked": 2}


class Context:
    """Threads, scratch memory and kernels of a sequence of calls.

    A context serves one call at a time; calls from two Python threads wait for each other.

    Parameters
    ----------
    device : str
        ``"cpu"``; ``"hip"``, the first GPU, or ``"hip:1"``, ...; ``"hip-host"``, the GPU's kernels run on the CPU,
        slowly and with their faults found. NumPy's arrays are copied to the device and back, a `DeviceArray` or another
        library's array that lies there is used as it lies. `devices` lists them.
    threads : int, optional
        Threads to use; by default `OMP_NUM_THREADS`, else one for each processor this process may use, and no more
        than a container has time of. The number changes no byte of any result.
    isa : str, optional
        ``"scalar"``, ``"avx2"``, ``"avxvnni"``, ``"avx512"`` or ``"avx512bf16"``; on aarch64 ``"scalar"``,
        ``"neon"`` or ``"neon_dotprod"``. By default the best that runs here. It changes no byte either.
    gemm : {"own", "blas"}
        Who multiplies float32 matrices. ``"own"`` keeps one order of sums; ``"blas"`` (OpenBLAS) does not, so
        results with it are within the budget and not the same bytes.
    delta_rule : {"auto", "recurrent", "chunked"}
        The form that `ops.delta_rule` takes where a call says "auto", as every model's does: chunks of 16 tokens,
        token by token, or chunks of 64 (of `chunk` tokens, where the call names it). They agree within the budget;
        with "recurrent" any split of a sequence gives the same bytes of the op.

    activations : {"float32", "int8", "bfloat16"}
        What products make of x, in `ops.linear`, `ops.moe` and the absorbed `ops.latent_attention`: nothing, so that a
        result is that of the dequantised weight; or, which is faster and less exact, int8 with a scale for each 32
        values where a weight lies in blocks (docs/math.md#int8), or bfloat16 where it is of that type
        (docs/math.md#bfloat16). With either of these, `ops.latent_attention` and, of more than 16 new tokens,
        `ops.attention` multiply in 16-bit fixed point (docs/math.md#fixed). A model has its own setting.

    Raises
    ------
    ValueError
        Unknown device, gemm, delta_rule or activations, or a number of threads outside 0..1024.
    NotImplementedError
        An instruction set that this machine does not run, or a BLAS that this build does not have.
    DeviceError
        The device is not there; the message says why.
    """

    def __init__(self, device="cpu", *, threads=None, isa=None, gemm="own", delta_rule="auto", activations="float32"):
        if not isinstance(device, str):
            raise TypeError(f"device is {type(device).__name__}; it must be a str, as 'cpu' or 'hip'")
        if isa is not None and not isinstance(isa, str):
            raise TypeError(f"isa is {type(isa).__name__}; it must be a str, as 'avx2', or None")
        numbers = (_GEMM[choice(gemm, "gemm", _GEMM)], _DELTA_RULE[choice(delta_rule, "delta_rule", _DELTA_RULE)],
                   ACTIVATIONS[check_activations(activations)])
        threads = _default_threads() if threads is None else _checked(threads, "threads")
        self._core = _core.Context(threads, isa, *numbers, device)
        self.device = device
        self.gemm = gemm
        self.delta_rule = delta_rule
        self.activations = activations

    @property
    def isa(self):
        """Instruction set in use."""
        return self._core.isa

    @property
    def threads(self):
        """Threads in use."""
        return self._core.threads

    def set_threads(self, n):
        """Use `n` threads from the next call on (0: one for each processor)."""
        self._core.set_threads(_checked(as_whole(n, "n", largest=None)))

    def cancel(self):
        """Stop the call in flight in another thread: it raises KeyboardInterrupt there."""
        self._core.cancel()

    def __repr__(self):
        return (f"Context(device={self.device!r}, threads={self.threads}, isa={self.isa!r}, gemm={self.gemm!r}, "
                f"delta_rule={self.delta_rule!r}, activations={self.activations!r})")


def check_activations(activations):
    """`activations`, where they are some; ValueError lists them."""
    return choice(activations, "activations", ACTIVATIONS)


_local = threading.local()
_settings = {"threads": None}


def _wanted():
    """The threads asked for: by the innermost `threads` block of the calling thread, else by `set_num_threads`."""
    blocks = getattr(_local, "blocks", None)
    return blocks[-1] if blocks else _settings["threads"]


def _default_threads():
    if _wanted() is not None:
        return _wanted()
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    number = text.isascii() and text.isdigit()
    if number and int(text) > 1024:
        raise ValueError(f"the environment's OMP_NUM_THREADS is {text}; it must be at most 1024")
    if number:
        return int(text)
    allowed = processors_allowed()
    return allowed if allowed is not None and allowed < len(os.sched_getaffinity(0)) else 0


def current(ctx=None):
    """`ctx`, or the context of the calling thread, made on first use."""
    if ctx is not None:
        if not isinstance(ctx, Context):
            raise TypeError(f"ctx is {type(ctx).__name__}; it must be a kimi_linear.Context")
        return ctx
    wanted = _wanted()
    mine = getattr(_local, "context", None)
    if mine is None:
        mine = _local.context = Context()
        _local.threads = wanted
    elif _local.threads != wanted:
        mine.set_threads(_default_threads())
        _local.threads = wanted
    return mine


@contextlib.contextmanager
def nested(ctx):
    """`ctx` serves the calling thread inside the ``with`` block: for code that a call in flight calls back."""
    before = getattr(_local, "context", None), getattr(_local, "threads", None)
    _local.context, _local.threads = ctx, _wanted()
    try:
        yield
    finally:
        _local.context, _local.threads = before


def set_num_threads(n):
    """Threads of every context made by default, in every Python thread, from the next call on.

    Parameters
    ----------
    n : int or None
        0 is one for each processor; None goes back to the default.
    """
    _settings["threads"] = _checked(n)


@contextlib.contextmanager
def threads(n):
    """Use `n` threads inside the ``with`` block, in the calling Python thread alone.

    Parameters
    ----------
    n : int or None
        As for `set_num_threads`, which shows behind the block.
    """
    n = _checked(n)
    blocks = _local.blocks = getattr(_local, "blocks", [])
    blocks.append(n)
    try:
        yield
    finally:
        blocks.pop()


def _checked(n, name="n"):
    n = n if n is None else as_whole(n, name, "an int from 0 (all processors) to 1024, or None", None)
    if n is not None and not 0 <= n <= 1024:
        raise ValueError(f"{name} is {n}; it must be an int from 0 (all processors) to 1024, or None")
    return n


class Device(NamedTuple):
    """A device that a `Context` can be made for, or cannot, and why.

    Attributes
    ----------
    name : str
        For ``Context(device=...)``.
    available : bool
    description : str
    reason : str
        Why it is not available; empty where it is.
    memory : int
        Bytes of its own; 0 where it is the host's.
    """

    name: str
    available: bool
    description: str
    reason: str
    memory: int


def devices():
    """Devices of this machine, and those that are not there with the reason.

    Returns
    -------
    devices : list of Device
    """
    return [Device(*row) for row in _core.devices()]


def isa_list():
    """Instruction sets that run on this machine, best last."""
    return _core.isa_list()
