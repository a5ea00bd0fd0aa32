"""ggml's ``gated_delta_net`` on the CPU, from the libraries that llama-cpp-python carries.

The op takes q, k, v, g, beta and state as ggml tensors whose first axis is the fastest: q [K, H, T, 1], g [1 or K, H,
T, 1], state [K, V, H, 1] with k fastest: each head's state lies transposed, [V, K]. It scales q by K^-1/2, wants
K = V, and returns o and the new state in one tensor; graphs of llama.cpp then copy the state back to where it is kept.
Source: ggml.h and ggml-cpu/ops.cpp of llama.cpp, in the release that llama-cpp-python 0.3.36 carries.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

from . import Missing, aligned

__all__ = ["Call", "about", "contenders"]

F32 = 0                # ggml_type
NODES = 8              # that a graph has room for
_P, _SIZE, _INT, _I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


BASE = {
    "ggml_init": (_P, _InitParams), "ggml_free": (None, _P), "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead_custom": (_SIZE, _SIZE, ctypes.c_bool),
    "ggml_new_graph_custom": (_P, _P, _SIZE, ctypes.c_bool), "ggml_build_forward_expand": (None, _P, _P),
    "ggml_new_tensor_4d": (_P, _P, _INT, _I64, _I64, _I64, _I64),
    "ggml_view_1d": (_P, _P, _P, _I64, _SIZE), "ggml_cpy": (_P, _P, _P, _P),
    "ggml_gated_delta_net": (_P, _P, _P, _P, _P, _P, _P, _P, _I64),
    "ggml_nbytes": (_SIZE, _P), "ggml_backend_cpu_buffer_from_ptr": (_P, _P, _SIZE),
    "ggml_backend_tensor_alloc": (_INT, _P, _P, _P), "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_graph_compute": (_INT, _P, _P), "ggml_backend_free": (None, _P),
    "ggml_threadpool_params_init": (None, _P, _INT),
}
CPU = {
    "ggml_backend_cpu_init": (_P,), "ggml_backend_cpu_set_n_threads": (None, _P, _INT),
    "ggml_backend_cpu_set_threadpool": (None, _P, _P), "ggml_threadpool_new": (_P, _P),
    "ggml_cpu_has_avx2": (_INT,), "ggml_cpu_has_avx512": (_INT,),
}


@functools.cache
def _library():
    """Every function of `BASE` and `CPU` as an attribute."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None:
        raise Missing("ggml is missing: its library comes with llama-cpp-python; `make peers` builds it into "
                      ".venv-peers, and .venv-peers/bin/python runs this file with it")
    folder = Path(found.submodule_search_locations[0]) / "lib"
    try:
        base, cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu"))
        lib = type("ggml", (), {})()
        for library, functions in ((base, BASE), (cpu, CPU)):
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(lib, name, function)
    except (OSError, AttributeError) as error:
        raise Missing(f"ggml of {folder} is another than this benchmark knows ({error}); `make peers` builds that "
                      f"one") from None
    return lib


def about():
    """Release, and the instruction set that it was built for."""
    lib = _library()
    isa = "AVX-512" if lib.ggml_cpu_has_avx512() else "AVX2" if lib.ggml_cpu_has_avx2() else "neither AVX2 nor AVX-512"
    return f"ggml of llama-cpp-python {importlib.metadata.version('llama-cpp-python')}, built for {isa}"


@functools.cache
def _backend(threads):
    """ggml's CPU backend with threads of its own that last."""
    lib = _library()
    backend = lib.ggml_backend_cpu_init()
    params = (ctypes.c_char * 4096)()       # a ggml_threadpool_params, whose fields nobody here reads
    lib.ggml_threadpool_params_init(params, threads)
    lib.ggml_backend_cpu_set_threadpool(backend, lib.ggml_threadpool_new(params))
    lib.ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


class Call:
    """The op as a graph over copies of the arguments, built once.

    Parameters
    ----------
    arguments : dict
        Of ``kl.ops.delta_rule``.
    threads : int
    state : array [H, V, K], optional
        Aligned memory that holds the initial state, transposed; a copy is made where None.
    result : array, optional
        Aligned memory for what the op returns: calls that take turns may share it.
    keep : bool
        Copy the new state over the initial one, as llama.cpp does between two steps.
    """

    def __init__(self, arguments, threads, *, state=None, result=None, keep=False):
        lib, self.backend = _library(), _backend(threads)
        q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
        T, self.H, K = q.shape
        self.T, self.V = T, v.shape[2]
        if k.shape != q.shape or v.shape != q.shape or g is None:
            raise ValueError(f"q is {q.shape}, v {v.shape}; ggml's op here needs equal shapes and a gate")
        if state is None:
            state = _copy(arguments["initial_state"].transpose(0, 2, 1))
        gate = g.reshape(T, self.H, -1)
        n = T * v[0].size + state.size
        self.held = [_copy(q), _copy(k), _copy(v), _copy(gate), _copy(beta[..., None]), state,
                     aligned(n) if result is None else result]
        size = 16 * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(NODES, False)
        self.ctx, self.buffers = lib.ggml_init(_InitParams(size, None, True)), []
        inputs = [self._place(self._tensor(a), a) for a in self.held[:-1]]
        out = self._place(lib.ggml_gated_delta_net(self.ctx, *inputs, 1), self.held[-1])
        if keep:
            new = lib.ggml_view_1d(self.ctx, out, state.size, 4 * T * v[0].size)
            out = lib.ggml_cpy(self.ctx, new, lib.ggml_view_1d(self.ctx, inputs[-1], state.size, 0))
        self.graph = lib.ggml_new_graph_custom(self.ctx, NODES, False)
        lib.ggml_build_forward_expand(self.graph, out)
        self._compute = lib.ggml_backend_graph_compute

    def _tensor(self, a):
        """A tensor of the array's shape, its axes in ggml's order."""
        axes = a.shape[::-1] + (1,) * (4 - a.ndim)
        return _library().ggml_new_tensor_4d(self.ctx, F32, *axes)

    def _place(self, tensor, a):
        lib = _library()
        if lib.ggml_nbytes(tensor) > a.nbytes:
            raise ValueError(f"ggml wants {lib.ggml_nbytes(tensor)} bytes for an array of {a.nbytes}")
        self.buffers.append(lib.ggml_backend_cpu_buffer_from_ptr(a.ctypes.data, a.nbytes))
        if lib.ggml_backend_tensor_alloc(self.buffers[-1], tensor, a.ctypes.data) != 0:
            raise RuntimeError("ggml did not take the array's memory")
        return tensor

    def __call__(self):
        if self._compute(self.backend, self.graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    def result(self):
        """o [T, H, V] and the state [H, K, V] of the last run."""
        out, n = self.held[-1].ravel(), self.T * self.H * self.V
        state = out[n:n + self.held[-2].size].reshape(self.held[-2].shape)
        return out[:n].reshape(self.T, self.H, self.V).copy(), state.transpose(0, 2, 1).copy()

    def __del__(self):
        if getattr(self, "ctx", None):
            lib = _library()
            lib.ggml_free(self.ctx)
            for buffer in self.buffers:
                lib.ggml_backend_buffer_free(buffer)


def _copy(a):
    to = aligned(a.shape)
    to[...] = a
    return to


def contenders(arguments, threads):
    """``ggml``."""
    return {"ggml": Call(arguments, threads)}
