"""SGLang's chunked delta rule for the CPU, built from a checkout: a gate each head, q, k, v and beta in bfloat16.

The checkout is where the environment's ``SGLANG_SOURCE`` says; nothing of it is part of this project. Its kernel is
``sgl-kernel/csrc/cpu/mamba/fla.cpp``: chunks of 64, products by oneDNN on bfloat16, sums and the state in float32. It
was met as of commit c35aa0238 (January 2026); it needs AVX-512.
"""

import functools
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

from . import Missing

__all__ = ["about", "contenders"]

SOURCES = ("mamba/fla.cpp", "norm.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-w", "-DCPU_CAPABILITY_AVX512",
         "-DCPU_CAPABILITY=AVX512")


@functools.cache
def _torch():
    """torch with the op loaded, and the folder of its library; half a minute of a C++ compiler, once a process."""
    source = os.environ.get("SGLANG_SOURCE")
    if not source:
        raise Missing("SGLang is missing: set SGLANG_SOURCE to a checkout of sgl-project/sglang; the benchmark builds "
                      "its kernel against torch")
    try:
        with warnings.catch_warnings(action="ignore"):
            import torch
    except ImportError as error:
        raise Missing(f"SGLang is missing: it needs torch ({error}); `make peers` installs it") from None
    keep, root = tempfile.TemporaryDirectory(prefix="kimi-linear-sglang-"), Path(torch.__file__).parent
    built, kernels = Path(keep.name) / "sglang.so", Path(source) / "sgl-kernel/csrc/cpu"
    files = [kernels / name for name in SOURCES] + [Path(__file__).with_name("sglang_bind.cpp")]
    folders = [root / "include", root / "include/torch/csrc/api/include", kernels]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *(f"-I{folder}" for folder in folders), *map(str, files),
               f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(built)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        torch.ops.load_library(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise Missing(f"SGLang is missing: its kernel of {source} did not build here ({why})") from None
    return torch, keep


def about():
    """Where it is from."""
    _torch()
    return f"SGLang's CPU kernel of {os.environ['SGLANG_SOURCE']}, {os.environ.get('CXX', 'g++')} {' '.join(FLAGS[:2])}"


class Call:
    """One sequence; the inputs are rounded to bfloat16 beforehand."""

    def __init__(self, arguments, threads):
        self.torch, self.threads = _torch()[0], threads
        q, k, v, beta, g, state = (self.torch.from_numpy(arguments[name].copy())[None]
                                   for name in ("q", "k", "v", "beta", "g", "initial_state"))
        offsets = self.torch.tensor([0, q.shape[1]], dtype=self.torch.int32)
        self.inputs = (q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta.bfloat16())
        self.state, self.offsets = state, offsets

    def __call__(self):
        if self.torch.get_num_threads() != self.threads:
            self.torch.set_num_threads(self.threads)
        with self.torch.no_grad():
            self.got = self.torch.ops.kimi_linear_peers.sglang_chunk(*self.inputs, self.state.clone(), self.offsets)

    def result(self):
        """o [T, H, V] and the state [H, K, V] of the last run."""
        o, state = self.got
        return o[0].float().numpy().copy(), state[0].numpy().copy()


def contenders(arguments, threads):
    """``sglang bfloat16`` where each head has a gate; nothing where each channel has one."""
    if arguments["g"].ndim == 3:
        return {}
    return {"sglang bfloat16": Call(arguments, threads)}
