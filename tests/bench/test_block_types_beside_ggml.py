"""Our searches for scales lose no more than ggml's own quantiser, where llama-cpp-python's library is."""

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import kimi_linear as kl

TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ALLOWED = 1.02


def library():
    """ggml's base library inside llama-cpp-python, or None."""
    spec = importlib.util.find_spec("llama_cpp")
    path = spec and Path(spec.origin).parent / "lib" / "libggml-base.so"
    return ctypes.CDLL(str(path)) if path and path.exists() else None


GGML = library()


def known(kind):
    """Whether the library has the type."""
    return hasattr(GGML, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")


def by_ggml(x, name):
    """Blocks by ggml's quantiser, without an importance matrix."""
    kind = kl.storage_types[name]
    function = getattr(GGML, "quantize_" + name.lower().replace("_k", "_K"))
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    data = np.empty((len(x), kind.row_bytes(x.shape[1])), np.uint8)
    assert function(x.ctypes.data, data.ctypes.data, *x.shape, None) == data.nbytes
    return kl.Quantized(data, name, x.shape)


def read_by_ggml(w):
    """float32 values by ggml's own reader."""
    name = w.type.lower().replace("_k", "_K")
    function = getattr(GGML, "dequantize_row_" + name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.empty(w.shape, np.float32)
    function(w.data.ctypes.data, values.ctypes.data, values.size)
    return values


def samples():
    rng = np.random.default_rng(11)
    yield "normal", rng.standard_normal((32, 2048)).astype(np.float32) * np.float32(0.02)
    yield "Student t", rng.standard_t(4, (32, 2048)).astype(np.float32)
    yield "uniform", rng.uniform(-1, 1, (32, 2048)).astype(np.float32)
    model = kl.Model.tiny()
    matrices = [np.asarray(w, np.float32).ravel() for w in map(model.weights.get, model.weights) if w.ndim > 1]
    values = np.concatenate(matrices)
    yield "tiny", values[:len(values) // 256 * 256].reshape(-1, 256)[::16]


def lost(w, x):
    return ((np.asarray(w, np.float64) - x) ** 2).sum()


def test_the_library_that_was_asked_for_is_here():
    assert GGML is not None or "ggml" not in os.environ.get("KL_PEERS", "")


if GGML is not None:

    @pytest.mark.parametrize("name", TYPES)
    def test_writing_loses_no_more_than_ggml(name):
        for what, x in samples():
            ratio = lost(kl.ops.quantize(x, name), x) / lost(by_ggml(x, name), x)
            assert ratio < ALLOWED, f"{name}, {what}: {ratio:.4f}"

    @pytest.mark.parametrize("kind", [t for t in kl.storage_types.values() if t.values > 1], ids=lambda t: t.name)
    def test_ggml_reads_the_same_values(kind):
        """Of sound blocks: ggml may fuse a product and a sum, so the last bit is its own."""
        if not known(kind) and kind.name in ("Q1_0", "Q2_0"):
            pytest.skip(f"this ggml is older than {kind.name}")
        raw = np.random.default_rng(kind.id).integers(0, 256, (200, kind.bytes), dtype=np.uint8)
        if kind.writable:
            rng = np.random.default_rng(kind.id)
            raw = kl.ops.quantize(rng.standard_normal((200, kind.values), np.float32), kind.name).data
        w = kl.Quantized(raw, kind.name, (len(raw), kind.values))
        ours, theirs = np.asarray(w), read_by_ggml(w)
        sound = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
        assert sound.sum() > 100
        scale = np.abs(ours).max(1, keepdims=True)
        assert (np.abs(ours - theirs) <= 2.0**-22 * scale)[sound].all()
