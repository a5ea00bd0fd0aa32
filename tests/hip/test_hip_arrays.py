"""Arrays that lie on a device: ops take and give them without a copy, what is wrong with one is a sentence, memory
lives as long as what was made of it. Large uploads go through pinned memory, and a model's say how far they are."""

import contextlib
import ctypes
import gc
import subprocess
import threading

import ml_dtypes
import numpy as np
import pytest
from basic_inputs import OPS, op_inputs
from conftest import DATA
from hip_build import DEVICE, ON_HOST, context, host_build_only, host_library
from judge import normal

import kimi_linear as kl
from kimi_linear import _core

BFLOAT16 = ml_dtypes.bfloat16
PIECE = 8 << 20  # csrc/hip/backend.hip


def put(x):
    return kl.DeviceArray.from_numpy(x, context())


class Foreign:
    """Another library's array, by DLPack: nothing else of it can be seen."""

    def __init__(self, x):
        self.x = x

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)


class Interface:
    """Another library's array, by the CUDA array interface."""

    def __init__(self, x, **changes):
        self.x, self.changes = x, changes

    @property
    def __cuda_array_interface__(self):
        return self.x.__cuda_array_interface__ | self.changes


KINDS = [lambda x: x, Foreign, Interface]


# ---- no copy ----


@pytest.mark.parametrize("kind", KINDS, ids=["ours", "dlpack", "interface"])
@pytest.mark.parametrize("op", OPS)
def test_hip_op_on_device_arrays_has_the_bytes_of_numpys(op, kind):
    inputs = op_inputs(op, 5, 33)
    wanted = getattr(kl.ops, op)(**inputs, ctx=context())
    held = {name: put(x) for name, x in inputs.items() if isinstance(x, np.ndarray)}
    given = inputs | {name: kind(x) for name, x in held.items()}
    got = getattr(kl.ops, op)(**given, ctx=context())
    assert isinstance(got, kl.DeviceArray) and got.shape == wanted.shape and got.dtype == np.float32
    assert got.numpy().tobytes() == wanted.tobytes()
    out = put(np.full(wanted.shape, np.nan, np.float32))
    again = getattr(kl.ops, op)(**given, out=kind(out), ctx=context())
    assert again._memory.address == out._memory.address
    assert out.numpy().tobytes() == again.numpy().tobytes() == wanted.tobytes()
    assert all(held[name].numpy().tobytes() == inputs[name].tobytes() for name in held)


@pytest.mark.parametrize("op, first", [("softmax", "x"), ("swiglu", "up"), ("gated_rms_norm", "z")])
def test_hip_device_array_in_place(op, first):
    inputs = op_inputs(op, 5, 33)
    wanted = getattr(kl.ops, op)(**inputs, ctx=context())
    mine = put(inputs[first])
    assert getattr(kl.ops, op)(**inputs | {first: mine}, out=mine, ctx=context()) is mine
    assert mine.numpy().tobytes() == wanted.tobytes()


def test_hip_nothing_is_uploaded_or_downloaded(monkeypatch):
    """The op allocates its result and nothing else."""
    ctx = kl.Context(device=DEVICE)
    x, y = kl.DeviceArray.from_numpy(normal(4, 100), ctx), kl.DeviceArray.from_numpy(normal(4, 100), ctx)
    before = ctx._core.allocations
    kl.ops.sigmoid(x, out=y, ctx=ctx)
    assert ctx._core.allocations == before
    z = kl.ops.sigmoid(x, ctx=ctx)
    assert ctx._core.allocations == before + 1 and z.numpy().tobytes() == y.numpy().tobytes()


def delta_inputs():
    rng = np.random.default_rng(3)
    return dict(q=normal(20, 2, 16), k=normal(20, 2, 16, seed=1) / 4, v=normal(20, 4, 16, seed=2),
                g=-rng.random((20, 4, 16), np.float32), beta=rng.random((20, 4), np.float32))


def same(got, wanted):
    return got.numpy().tobytes() == wanted.tobytes()


def test_hip_ops_with_several_results_and_control_data():
    x = delta_inputs()
    on = {name: put(a) for name, a in x.items()}
    more = dict(offsets=[0, 7, 20], checkpoints=[[3], [4, 8]], ctx=context())
    assert all(map(same, kl.ops.delta_rule(**on, **more), kl.ops.delta_rule(**x, **more)))
    assert all(map(same, kl.ops.delta_rule_intra(**on, ctx=context()), kl.ops.delta_rule_intra(**x, ctx=context())))
    assert all(map(same, kl.ops.short_conv(put(normal(9, 5)), normal(5, 4), ctx=context()),
                   kl.ops.short_conv(normal(9, 5), normal(5, 4), ctx=context())))
    y = normal(3, 2, 8)
    assert same(kl.ops.rope(put(y), np.arange(3), base=1e4, rotary=4, ctx=context()),
                kl.ops.rope(y, np.arange(3), base=1e4, rotary=4, ctx=context()))
    logits = normal(4, 50)
    assert kl.ops.sample(put(logits), seed=3, ctx=context()).tolist() == kl.ops.sample(logits, seed=3).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hip_attention_on_device_arrays(dtype):
    """With a batch axis, and a cache in float16 that is used as it lies."""
    q, k, v = normal(2, 3, 4, 16), normal(2, 5, 2, 16, seed=1).astype(dtype), normal(2, 5, 2, 16, seed=2).astype(dtype)
    assert same(kl.ops.attention(put(q), put(k), put(v), scale=0.25, ctx=context()),
                kl.ops.attention(q, k, v, scale=0.25, ctx=context()))
    latent, shared = normal(5, 16).astype(dtype), normal(5, 4).astype(dtype)
    w_uk, w_uv, q = normal(2, 8, 16), normal(2, 8, 16), normal(3, 2, 12)
    given = dict(scale=0.3, kv_offsets=[0, 5], ctx=context())
    assert same(kl.ops.latent_attention(*map(put, (q, latent, shared, w_uk, w_uv)), **given),
                kl.ops.latent_attention(q, latent, shared, w_uk, w_uv, **given))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_hip_weights_on_the_device(dtype):
    x, w = normal(5, 64), normal(9, 64, seed=1).astype(dtype)
    assert same(kl.ops.linear(put(x), put(w), ctx=context()), kl.ops.linear(x, w, ctx=context()))
    assert same(kl.ops.linear(put(x), w, normal(9), ctx=context()), kl.ops.linear(x, w, normal(9), ctx=context()))
    onto_host = kl.ops.linear(x, put(w), ctx=context())
    assert isinstance(onto_host, np.ndarray) and onto_host.tobytes() == kl.ops.linear(x, w, ctx=context()).tobytes()
    assert same(kl.ops.embedding([3, 0, 8], put(w), ctx=context()), kl.ops.embedding([3, 0, 8], w, ctx=context()))


def test_hip_blocks_on_the_device():
    x = normal(4, 64)
    q, wanted = kl.ops.quantize(put(x), "Q8_0", ctx=context()), kl.ops.quantize(x, "Q8_0", ctx=context())
    assert isinstance(q.data, kl.DeviceArray) and same(q.data, wanted.data)
    assert same(kl.ops.dequantize(q, ctx=context()), kl.ops.dequantize(wanted, ctx=context()))
    assert same(kl.ops.linear(put(x), q, ctx=context()), kl.ops.linear(x, wanted, ctx=context()))


def test_hip_route_and_moe_stay_on_the_device():
    x, scores = normal(6, 32), normal(6, 8)
    weights = [normal(8, 16, 32, seed=1), normal(8, 16, 32, seed=2), normal(8, 32, 16, seed=3)]
    shared = tuple(w[0] for w in weights)
    more = dict(shared=shared, shared_gate=normal(1, 32), ctx=context())
    chosen = kl.ops.route(put(scores), k=2, ctx=context())
    got = kl.ops.moe(put(x), *chosen, *map(put, weights), **more)
    wanted = kl.ops.moe(x, *kl.ops.route(scores, k=2, ctx=context()), *weights, **more)
    assert chosen[0].dtype == np.int32 and same(got, wanted)


def test_hip_what_a_kernel_notes_is_raised_by_the_next_wait():
    scores = normal(4, 8)
    scores[2, 3] = np.nan
    ids, _ = kl.ops.route(put(scores), k=2, ctx=context())
    with pytest.raises(ValueError, match=r"route: scores\[2, 3\] .* is NaN"):
        ids.numpy()
    with pytest.raises(ValueError, match=r"route: scores\[2, 3\] .* is NaN"):
        kl.ops.route(Foreign(put(scores)), k=2, ctx=context())  # another's array: the call waits for its own end
    core = context()._core
    core.profile(True)
    try:
        with pytest.raises(ValueError, match=r"route: scores\[2, 3\] .* is NaN"):
            kl.ops.route(put(scores), k=2, ctx=context())  # an op is waited for while its time is taken
    finally:
        core.profile(False)
    assert [(op, calls) for op, calls, *_ in core.profile_result() if calls] == [("route", 1)]


def test_hip_no_tokens():
    y = kl.ops.sigmoid(put(np.empty((0, 7), np.float32)), ctx=context())
    assert y.shape == (0, 7) and y.numpy().shape == (0, 7)


# ---- what an array is ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16, np.int32, np.int64, np.uint8, np.uint16])
def test_hip_from_numpy_and_back(dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    a = put(x.transpose(2, 0, 1))
    assert (a.shape, a.dtype, a.ndim, a.size, len(a), a.nbytes) == ((4, 2, 3), x.dtype, 3, 24, 4, x.nbytes)
    assert a.numpy().tobytes() == x.transpose(2, 0, 1).tobytes()
    assert a.reshape(-1, 6).numpy().tobytes() == a.numpy().tobytes()
    code, bits = 4 if dtype is BFLOAT16 else "iuf".index(x.dtype.kind), 8 * x.itemsize
    memory, *told = _core.DeviceMemory.from_dlpack(a.__dlpack__(), "a")
    assert told == [code, bits, (4, 2, 3)] and memory.address == a._memory.address
    assert a.__dlpack_device__() == memory.device and (not ON_HOST or memory.device == (12, 0))


def test_hip_interface_says_that_nothing_is_left_to_wait_for():
    a = put(normal(3, 4))
    assert a.__cuda_array_interface__ == {"shape": (3, 4), "typestr": "<f4", "data": (a._memory.address, False),
                                          "strides": None, "stream": None, "version": 3}
    assert not hasattr(put(np.ones(3, BFLOAT16)), "__cuda_array_interface__")


def test_hip_numpy_computes_nothing_with_it():
    a = put(normal(3))
    with pytest.raises(TypeError, match=r"its numpy\(\) is a copy"):
        np.asarray(a)
    with pytest.raises(TypeError):
        a + a
    with pytest.raises(BufferError, match="copy must be None or False"):
        a.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"dl_device is \(1, 0\)"):
        a.__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match=r"shape is \[2, 2\]; the array has 3 values"):
        a.reshape(2, 2)
    with pytest.raises(TypeError, match="x is float64"):
        put(np.ones(3))
    with pytest.raises(ValueError, match="ctx computes on the CPU"):
        kl.DeviceArray.from_numpy(normal(3), kl.Context())


# ---- life ----


def test_hip_memory_lives_as_long_as_what_was_made_of_it():
    a = put(normal(3, 4))
    wanted, capsule = a.numpy(), a.__dlpack__()
    view = a.reshape(12)
    del a
    gc.collect()
    assert view.numpy().tobytes() == wanted.tobytes()
    del view
    gc.collect()
    memory, *_ = _core.DeviceMemory.from_dlpack(capsule, "a")
    borrowed = kl.DeviceArray(memory, (3, 4), np.float32)
    got = kl.ops.add(borrowed, borrowed, ctx=context())
    assert same(got, wanted + wanted) and same(borrowed, wanted)  # an op has told which context copies it
    with pytest.raises(TypeError, match="not a fresh capsule"):
        _core.DeviceMemory.from_dlpack(capsule, "a")


def test_hip_memory_that_was_freed_is_refused():
    """Of a caching allocator's memory (torch's) the runtime does not know that it is free."""
    a, out = put(normal(30, 4000)), put(normal(30, 4000))
    gone = Told(**a.__cuda_array_interface__)
    del a
    gc.collect()
    with pytest.raises(ValueError, match="x: the 480000 bytes from 0x.* are not memory of the device: they are the "
                                         "host's, or were freed"):
        kl.ops.sigmoid(gone, out=out, ctx=context())


@host_build_only
def test_hip_other_threads_go_on_while_memory_is_freed():
    """To free it waits for the device, which takes half a second here."""
    a, ticks, ended = put(normal(4)), [], threading.Event()

    def tick():
        while not ended.wait(0.01):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    host_library().kl_host_slow(500)
    try:
        before = len(ticks)
        del a
        passed = len(ticks) - before
    finally:
        host_library().kl_host_slow(0)
        ended.set()
        thread.join()
    assert passed >= 5


def test_hip_an_array_of_another_context():
    other = kl.Context(device=DEVICE)
    x = kl.DeviceArray.from_numpy(normal(3, 4), other)
    y = kl.ops.sigmoid(x, ctx=other)
    assert same(kl.ops.sigmoid(y, ctx=context()), kl.ops.sigmoid(y.numpy(), ctx=context()))
    del other
    gc.collect()
    assert same(y, kl.ops.sigmoid(x.numpy(), ctx=context()))  # an array holds its context


# ---- what is wrong with one ----


class Told:
    """Any memory, as the CUDA array interface tells of it."""

    def __init__(self, **told):
        self.__cuda_array_interface__ = {"version": 3, "shape": (4,), "typestr": "<f4", "strides": None} | told


def test_hip_pointer_of_the_host_is_refused():
    x = normal(4)
    with pytest.raises(ValueError, match="x: the 16 bytes from 0x.* are not memory of the device"):
        kl.ops.sigmoid(Told(data=(x.ctypes.data, False)), ctx=context())
    with pytest.raises(ValueError, match="out: the 16 bytes from 0x"):
        kl.ops.sigmoid(x, out=Told(data=(x.ctypes.data, False)), ctx=context())


def test_hip_memory_that_ends_too_early_is_refused():
    a = put(normal(4))
    given = Told(data=(a._memory.address, False), shape=(2**40,))  # more than the neighbours of `a` can have
    with pytest.raises(ValueError, match=f"^out: the {2**42} bytes"):
        kl.ops.sigmoid(given, out=given, ctx=context())


@host_build_only
def test_hip_memory_with_a_gap_is_refused():
    """First and last byte are of the device, and what lies between is not."""
    held = [put(np.zeros(100_000, np.float32)) for _ in range(8)]
    first, last = (pick(held, key=lambda a: a._memory.address)._memory for pick in (min, max))
    n = (last.address + last.nbytes - first.address) // 4
    with pytest.raises(ValueError, match=f"x: the {4 * n} bytes from 0x.* are not memory of the device"):
        kl.ops.sigmoid(Told(data=(first.address, False), shape=(n,)), out=put(np.zeros(n, np.float32)), ctx=context())


@pytest.mark.parametrize("dtype, aligned", [(np.float32, 4), (np.float16, 2), (BFLOAT16, 2)])
def test_hip_misaligned_values_are_refused(dtype, aligned):
    x, w = normal(3, 8), put(np.zeros((5, 9), dtype))
    for off in (aligned // 2, aligned):
        memory = _core.DeviceMemory.borrow(w._memory.address + off, 40 * aligned, False, None, w)
        given = kl.DeviceArray(memory, (5, 8), dtype)
        if off == aligned:
            assert not kl.ops.linear(x, given, ctx=context()).any()
            continue
        with pytest.raises(ValueError, match=f"^w begins at 0x.*; the address must be a multiple of {aligned}"):
            kl.ops.linear(x, given, ctx=context())


def test_hip_misaligned_blocks_are_refused():
    held = put(np.zeros(36, np.uint8))
    for off in (1, 2):
        memory = _core.DeviceMemory.borrow(held._memory.address + off, 34, False, None, held)
        q = kl.Quantized(kl.DeviceArray(memory, (1, 34), np.uint8), "Q8_0", (1, 32))
        if off == 2:
            assert not np.any(kl.ops.linear(normal(3, 32), q, ctx=context()))
            continue
        with pytest.raises(ValueError, match="^w begins at 0x.* on the device; the address must be a multiple of 2"):
            kl.ops.linear(normal(3, 32), q, ctx=context())


@host_build_only
def test_hip_error_of_an_earlier_launch_is_told_as_it_is():
    a = put(normal(4))
    given = Told(data=(a._memory.address, False))
    host_library().kl_host_break(1)
    try:
        with pytest.raises(kl.DeviceError, match="^x: an earlier launch has failed"):
            kl.ops.sigmoid(given, ctx=context())
    finally:
        host_library().kl_host_break(0)


def test_hip_other_devices_memory_is_refused():
    a = put(normal(4))
    for given, name in [((a, a), "an input"), ((normal(4), a), "b")]:
        with pytest.raises(ValueError, match=f"^{name} lies on a device and the context computes on the CPU"):
            kl.ops.add(*given)
    mine = a.__dlpack_device__()[0]
    other = relabelled(a.__dlpack__(), 2 if mine != 2 else 10)
    with pytest.raises(ValueError, match=rf"^a lies on a device of DLPack's type \d+; .* computes on type {mine}"):
        kl.ops.add(other, other, ctx=context())


def relabelled(capsule, device_type):
    """A DeviceArray over the tensor of a capsule whose device type was changed."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ctypes.c_int32.from_address(get(capsule, b"dltensor") + 8).value = device_type  # behind the data pointer
    memory, *_ = _core.DeviceMemory.from_dlpack(capsule, "x")
    return kl.DeviceArray(memory, (4,), np.float32)


@pytest.mark.parametrize("told, error, sentence", [
    (dict(typestr="<f8"), TypeError, "x is float64; it must be one of float32"),
    (dict(typestr="<f2"), TypeError, "x is float16 on a device; it must be float32 there"),
    (dict(strides=(8,)), ValueError, "x is strided; on a device it must be contiguous"),
    (dict(stream=0), TypeError, "x: its stream is 0; it must be None, 1, 2 or"),
])
def test_hip_array_that_does_not_fit(told, error, sentence):
    a = put(normal(4))
    with pytest.raises(error, match=sentence):
        kl.ops.sigmoid(Told(data=(a._memory.address, False), **told), ctx=context())


@pytest.mark.parametrize("stream", [None, 1, 2])
def test_hip_stream_of_the_producer_may_have_any_name(stream):
    a = put(normal(4))
    got = kl.ops.sigmoid(Told(data=(a._memory.address, False), stream=stream), ctx=context())
    assert same(got, kl.ops.sigmoid(normal(4), ctx=context()))


def on_its_way(x, by_default):
    """Device memory to which another library copies x on a stream of its own or the default one; and that stream."""
    a, produce = put(np.zeros_like(x)), host_library().kl_host_produce
    produce.restype = ctypes.c_void_p
    produce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return a, produce(a._memory.address, x.ctypes.data, x.nbytes, by_default)


@host_build_only
@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize("said", [False, True])
def test_hip_stream_of_the_producer_is_waited_for(by_default, said):
    """Where it is said; None means that the producer is done, and then the old values are read."""
    x = normal(4)
    a, stream = on_its_way(x, by_default)
    got = kl.ops.sigmoid(Told(data=(a._memory.address, False), stream=stream if said else None), ctx=context())
    assert same(got, kl.ops.sigmoid(x if said else np.zeros_like(x), ctx=context()))


@host_build_only
@pytest.mark.parametrize("kind", [Foreign, lambda a: Told(**a.__cuda_array_interface__ | {"version": 2, "stream": 1})],
                         ids=["dlpack", "interface"])
def test_hip_default_stream_is_waited_for(kind):
    x = normal(4)
    a, _ = on_its_way(x, by_default=True)
    assert same(kl.ops.sigmoid(kind(a), ctx=context()), kl.ops.sigmoid(x, ctx=context()))


class Producer:
    """Another library's array, on a device of one of DLPack's types as it says; it keeps what it was asked."""

    def __init__(self, x, device_type, knows_streams=True):
        self.x, self.device_type, self.knows_streams, self.asked = x, device_type, knows_streams, []

    def __dlpack_device__(self):
        return self.device_type, 0

    def __dlpack__(self, **options):
        if options and not self.knows_streams:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'stream'")
        self.asked.append(options)
        return self.x.__dlpack__()


@pytest.mark.parametrize("device_type, wanted", [(2, {"stream": 1}), (13, {"stream": 1}), (10, {"stream": 0}),
                                                 (12, {})])
def test_hip_producer_is_told_the_stream(device_type, wanted):
    """Where it is not told, torch lets no stream wait for its own."""
    x = Producer(put(normal(4)), device_type)
    assert same(kl.ops.sigmoid(x, ctx=context()), kl.ops.sigmoid(normal(4), ctx=context()))
    assert x.asked == [wanted]


def test_hip_producer_that_knows_no_streams():
    x = Producer(put(normal(4)), 2, knows_streams=False)
    assert same(kl.ops.sigmoid(x, ctx=context()), kl.ops.sigmoid(normal(4), ctx=context()))
    assert x.asked == [{}]


def test_hip_managed_memory_is_cudas():
    a = put(normal(4))
    memory = relabelled(a.__dlpack__(), 13)._memory
    assert memory.device == (2, a.__dlpack_device__()[1])


def test_hip_result_over_borrowed_memory_can_be_exported():
    """The CUDA array interface does not say of which vendor the memory is; the op that has used it knows."""
    a, x = put(normal(4)), normal(4, seed=1)
    got = kl.ops.sigmoid(x, out=Interface(a), ctx=context())
    assert got.__dlpack_device__() == a.__dlpack_device__()
    assert same(kl.ops.sigmoid(Foreign(got), ctx=context()), kl.ops.sigmoid(a.numpy(), ctx=context()))


@contextlib.contextmanager
def other_device():
    """The calling thread's device is another's meanwhile, and must still be after it."""
    device = host_library().kl_host_device
    before = device(1)
    try:
        yield
    finally:
        after = device(before)
    assert after == 1, "the thread's device was changed"


@host_build_only
def test_hip_thread_keeps_its_device():
    """And what is done with the context is done on the context's."""
    x, large = normal(4, 6), np.arange(PIECE + 5, dtype=np.uint8)
    with other_device():
        ctx = kl.Context(device=DEVICE)
        core = ctx._core
        a = kl.DeviceArray.from_numpy(x, ctx)
        got = [kl.ops.sigmoid(a, ctx=ctx).numpy(), kl.ops.sigmoid(Foreign(a), ctx=ctx).numpy()]
        assert same(kl.DeviceArray.from_numpy(large, ctx), large)
        kl.ops.route(kl.DeviceArray.from_numpy(x, ctx), k=2, ctx=ctx)[0].numpy()
        core.tick()
        assert core.tick() >= 0 and core.roof_fma() > 0 and core.roof_read(np.ones(64, np.uint8)) > 0
        with pytest.raises(NotImplementedError, match="quantize"):
            kl.ops.quantize(normal(1, 256), "Q6_K", ctx=ctx)
        del a, core, ctx
        gc.collect()
    assert got[0].tobytes() == got[1].tobytes() == kl.ops.sigmoid(x, ctx=context()).tobytes()


@host_build_only
def test_hip_model_keeps_the_threads_device():
    ids, wanted = [3, 1, 2], kl.Model.tiny(device=DEVICE)
    with other_device():
        model = kl.Model.tiny(device=DEVICE)
        got = model.forward(ids)
    assert got.tobytes() == wanted.forward(ids).tobytes()


def test_hip_out_that_does_not_fit():
    a, x = put(normal(4)), normal(4)
    for out, error, sentence in [
            (Told(data=(a._memory.address, True)), ValueError, "out is read-only"),
            (put(normal(5)), ValueError, r"out has shape \[5\]; it must be \[4\]"),
            (put(np.zeros(4, np.int32)), TypeError, "out is int32; it must be float32")]:
        with pytest.raises(error, match=sentence):
            kl.ops.sigmoid(x, out=out, ctx=context())
    inputs = {n: put(v) for n, v in delta_inputs().items()}
    with pytest.raises(ValueError, match=r"out shares memory with an input of shape \[20, 4, 16\]"):
        kl.ops.delta_rule(**inputs, out=(inputs["g"], None), ctx=context())
    with pytest.raises(ValueError, match="out shares memory with x"):
        kl.ops.linear(a.reshape(1, 4), put(normal(4, 4)), out=a.reshape(1, 4), ctx=context())


def test_hip_control_data_must_be_the_hosts():
    with pytest.raises(TypeError, match="^ids lies on a device; it must be in host memory"):
        kl.ops.embedding(put(np.zeros(2, np.int32)), normal(3, 4), ctx=context())
    with pytest.raises(TypeError, match="^ids is int64 on a device; it must be int32 there"):
        kl.ops.moe(normal(2, 4), put(np.zeros((2, 1), np.int64)), normal(2, 1), *[normal(3, 4, 4)] * 3, ctx=context())
    with pytest.raises(TypeError, match=r"^actual lies on a device; give actual.numpy\(\)"):
        kl.diff.compare(put(normal(3)), normal(3))


def test_hip_core_with_nonsense_raises():
    ctx, a = context()._core, put(normal(4))
    memory = a._memory
    for out, x, n in [(a, a, 5), (a, a, 1 << 62), (a, memory, 4), (memory, a, 4), (a, a.view(np.int32), 4)]:
        with pytest.raises((TypeError, ValueError)):
            _core.sigmoid(ctx, out, x, n)
    with pytest.raises(TypeError):
        _core.DeviceMemory()
    new = _core.DeviceMemory
    for call in [lambda: new.allocate(ctx, -1), lambda: new.borrow(1, -1, False, None, None),
                 lambda: new.borrow(1, 1, False, "s", None), lambda: memory.upload(b"123"),
                 lambda: memory.download(bytearray(3)), lambda: memory.to_dlpack(2, 32, ("a",)),
                 lambda: new.from_dlpack(3, "x"), lambda: new.borrow(1, 4, False, None, None).download(bytearray(4))]:
        with pytest.raises((TypeError, ValueError)):
            call()
    with pytest.raises(MemoryError):
        new.allocate(ctx, 1 << 60)


def test_hip_out_of_memory_leaves_the_array_without():
    ctx = kl.Context(device=DEVICE)
    x = kl.DeviceArray.from_numpy(normal(4), ctx)
    ctx._core.fail_at(1)
    with pytest.raises(MemoryError, match="out of device memory: 16 bytes were wanted"):
        kl.ops.sigmoid(x, ctx=ctx)
    assert kl.ops.sigmoid(x, ctx=ctx).shape == (4,)


# ---- large uploads, weights, time ----


@host_build_only
@pytest.mark.parametrize("n", [4, PIECE, PIECE + 1, 3 * PIECE])
def test_hip_an_upload_waits_once(n):
    x, count = np.zeros(n, np.uint8), host_library().kl_host_waits
    count.restype = ctypes.c_int64
    before = count()
    held = put(x)
    assert count() == before + 1 and same(held, x)


@host_build_only
def test_hip_control_data_wait_for_nothing():
    """Offsets and tables are copied from pinned memory: a device's copies from other memory wait."""
    x, w, library = put(normal(9, 5)), put(normal(5, 4)), host_library()
    given = dict(offsets=[0, 4, 9], history=put(np.zeros((2, 3, 5), np.float32)), ctx=context())
    out = tuple(put(np.zeros(shape, np.float32)) for shape in ((9, 5), (2, 3, 5)))
    counts = (library.kl_host_waits, library.kl_host_pageable)
    for count in counts:
        count.restype = ctypes.c_int64
    before = [count() for count in counts]
    kl.ops.short_conv(x, w, out=out, **given)
    assert [count() for count in counts] == before
    assert same(out[0], kl.ops.short_conv(x.numpy(), w.numpy(), offsets=given["offsets"], ctx=context())[0])


def test_hip_more_control_data_than_the_pinned_memory_keep_every_byte(monkeypatch):
    """The pages of 100,000 sequences, a copy each: the pinned memory is used anew before there is a launch."""
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    n, caches = 100_000, []
    at = [np.arange(n + 1), np.zeros(n, np.int64), np.arange(n + 1)]
    for ctx in (context(), kl.Context()):
        caches.append(np.zeros((n, 1), np.float32))
        _core.cache_append(ctx._core, caches[-1], 0, np.arange(n, dtype=np.float32)[:, None], *at, n, n, 1, n)
    assert caches[0].tobytes() == caches[1].tobytes() and caches[0][-1] == n - 1


@pytest.mark.parametrize("n_bytes", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 12345, 3 * PIECE])
def test_hip_large_uploads_keep_every_byte(n_bytes):
    x = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8)
    assert same(put(x), x)


def test_hip_without_pinned_memory_uploads_go_on():
    ctx, x = kl.Context(device=DEVICE), np.arange(PIECE, dtype=np.int32)
    memory = _core.DeviceMemory.allocate(ctx._core, x.nbytes)
    ctx._core.fail_at(1)  # the first staging buffer
    memory.upload(x.view(np.uint8))
    assert same(kl.DeviceArray(memory, x.shape, x.dtype), x)


def test_hip_upload_of_a_model_tells_how_far_it_is():
    seen = []
    folder = DATA / "golden" / "kimi-a"
    model = kl.Model.from_pretrained(folder, device=DEVICE, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 1 + model.config.n_layers and len({total for _, total in seen}) == 1
    done = [n for n, _ in seen]
    assert done == sorted(done) and done[-1] == seen[0][1] and done[0] > 0
    assert kl.Model.from_pretrained(folder, progress=pytest.fail).config.n_layers == model.config.n_layers


def test_hip_upload_of_a_model_can_be_stopped():
    def stop(done, total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        kl.Model.tiny(device=DEVICE, progress=stop)
    assert kl.Model.tiny(device=DEVICE).config.n_layers


def test_hip_roofs_and_clock():
    core = context()._core
    core.tick()
    assert core.tick() >= 0 and core.roof_fma() > 0
    assert core.roof_read(put(np.ones(1 << 16, np.uint8))) > 0 and core.roof_read(np.ones(1 << 16, np.uint8)) > 0
    with pytest.raises(ValueError, match="roof_read: 4 bytes"):
        core.roof_read(np.ones(4, np.uint8))
    with pytest.raises(ValueError, match="tick is of a device"):
        kl.Context()._core.tick()


@host_build_only
def test_hip_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """Its table of functions would be another: the size of it is looked at."""
    source = tmp_path / "other.c"
    source.write_text("static const struct { const char *version; unsigned long n; } it = "
                      f'{{ "{kl.__version__}", 8 }};'
                      "const void *kl_hip_library(void *core) { return core ? &it : 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "_hip_host.so")], check=True)
    monkeypatch.setenv("KL_DEVICE_PATH", str(tmp_path))
    with pytest.raises(kl.DeviceError, match="_hip_host.so was built with other sources of"):
        kl.Context(device="hip-host")
