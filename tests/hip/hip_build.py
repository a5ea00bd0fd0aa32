"""What the tests of the HIP kernels share: the device that they run on, and what only its host build can do.

``KL_TEST_DEVICE=hip:0`` names a GPU, whose library must be built; otherwise it is the host build, made where it is not.
On a GPU `everywhere` runs twice and compares; wave sizes, orders of threads and planted faults are the host build's.
"""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kimi_linear as kl

ROOT = Path(__file__).parents[2]
LIBRARY = Path(kl.__file__).parent / "_hip_host.so"

DEVICE = os.environ.get("KL_TEST_DEVICE") or "hip-host"
ON_HOST = DEVICE == "hip-host"
host_build_only = pytest.mark.skipif(not ON_HOST, reason=f"the host build alone can do it; KL_TEST_DEVICE is {DEVICE}")

# lanes of a wave, seed of the order of threads and blocks (0: rising)
SETTINGS = list(itertools.product((32, 64), (0, 1, 7)))


@functools.cache
def built():
    """Paths of the host build and of the planted faults; both are up to date with their sources."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler (make hip-host installs one)")
    subprocess.run(["make", "-s", "-j2", "-C", str(ROOT / "csrc/hip"), "host", "faults"], check=True, timeout=600)
    return LIBRARY, ROOT / "build/hip/faults.so"


def versions(*names):
    """A fixture: every test that takes it runs at these versions of the ladders; "" is the last."""

    @pytest.fixture(params=names, ids=[f"v{name}" if name else "last" for name in names])
    def version(request, monkeypatch):
        monkeypatch.setenv("KL_GPU_VERSION", request.param)

    return version


def set_up(library, wave=32, seed=0, checks=True):
    """Wave and order of threads of a library of the host build; nothing for a GPU's, which is None."""
    if library is None:
        return
    library.kl_host_set(wave, ctypes.c_uint64(seed), int(checks))


@functools.cache
def host_library():
    """The host build where that is the device, else None."""
    if not ON_HOST:
        return None
    library = ctypes.CDLL(str(built()[0]))
    for count in (library.kl_host_waits, library.kl_host_pageable, library.kl_host_copies, library.kl_host_launches):
        count.restype = ctypes.c_int64
    return library


@functools.cache
def context():
    """The context of the device."""
    host_library()
    return kl.Context(device=DEVICE)


def everywhere(run):
    """`run(ctx)` for both wave sizes and several orders of threads: one result, the same bytes from all."""
    first = None
    try:
        for wave, seed in SETTINGS if ON_HOST else [("the GPU", 0), ("the GPU", 1)]:
            set_up(host_library(), wave, seed)
            got = run(context())
            first = got if first is None else first
            assert got.tobytes() == first.tobytes(), f"a wave of {wave}, run {seed}, gives other bytes"
    finally:
        set_up(host_library())
    return first
