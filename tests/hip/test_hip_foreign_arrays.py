"""Arrays of other libraries on the device: what is wrong with one is said, and its stream is waited for."""

import contextlib
import ctypes
import gc

import ml_dtypes
import numpy as np
import pytest
from device_arrays import PIECE, Foreign, Interface, Told, delta_inputs, put, same
from hip_build import DEVICE, context, host_build_only, host_library
from judge import normal

import kimi_linear as kl
from kimi_linear import _core

BFLOAT16 = ml_dtypes.bfloat16


# ---- what is wrong with one ----


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
        new.allocate(ctx, 1 << 49)


def test_hip_out_of_memory_leaves_the_array_without():
    ctx = kl.Context(device=DEVICE)
    x = kl.DeviceArray.from_numpy(normal(4), ctx)
    ctx._core.fail_at(1)
    with pytest.raises(MemoryError, match="out of device memory: 16 bytes were wanted"):
        kl.ops.sigmoid(x, ctx=ctx)
    assert kl.ops.sigmoid(x, ctx=ctx).shape == (4,)
