"""Arrays that lie on a device: ops take and give them without a copy, and memory lives as long as what was made of it.
Large uploads go through pinned memory, and a model's say how far they are."""

import gc
import subprocess
import threading

import ml_dtypes
import numpy as np
import pytest
from basic_inputs import OPS, op_inputs
from conftest import DATA
from device_arrays import KINDS, PIECE, Foreign, Told, delta_inputs, put, same
from hip_build import DEVICE, ON_HOST, context, host_build_only, host_library
from judge import normal

import kimi_linear as kl
from kimi_linear import _core

BFLOAT16 = ml_dtypes.bfloat16


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


# ---- large uploads, weights, time ----


@host_build_only
@pytest.mark.parametrize("n", [4, PIECE, PIECE + 1, 3 * PIECE])
def test_hip_an_upload_waits_once(n):
    x, count = np.zeros(n, np.uint8), host_library().kl_host_waits
    before = count()
    held = put(x)
    assert count() == before + 1 and same(held, x)


def append(ctx, cache, x, offsets, start, kv_offsets):
    """`cache_append` of sequences whose rows of the cache, one value each, lie behind each other."""
    _core.cache_append(ctx._core, cache, 0, x, offsets, start, kv_offsets, len(start), len(x), 1, len(cache))


@host_build_only
@pytest.mark.parametrize("n, first, again", [(1, 3, 0), (2047, 3, 0), (2048, 3, 1), (2049, 4, 4)])
def test_hip_tables_of_a_batch_are_put_once(n, first, again):
    """Offsets, positions and pages, a copy each up to 16 KiB; what is larger again at each call."""
    ctx, counts, copies = kl.Context(device=DEVICE), [], host_library().kl_host_copies
    held = np.zeros((n, 1), np.float32), np.ones((n, 1), np.float32)
    for _ in range(3):
        before = copies()
        append(ctx, *held, np.arange(n + 1), np.zeros(n, np.int64), np.arange(n + 1))
        counts.append(copies() - before)
    assert counts == [first, again, again]


@host_build_only
def test_hip_decoded_token_copies_two_numbers():
    """Its id and its position: the other tables are the same for each layer, and were there for the token before."""
    model = kl.Model.tiny(device=DEVICE)
    state, copies, counts = kl.State(model), host_library().kl_host_copies, []
    for id in (3, 4, 5, 6):
        before = copies()
        model.forward([id], state=state)
        counts.append(copies() - before)
    assert counts[0] > counts[1] and counts[1:] == [2, 2, 2]


@host_build_only
def test_hip_decoded_token_launches():
    """Four mixers of KDA, two of MLA, a dense feed-forward, five of experts; embedding, norm, last rows and head."""
    model = kl.Model.tiny(device=DEVICE)
    state, launches = kl.State(model), host_library().kl_host_launches
    for id in (3, 4):
        before = launches()
        model.forward([id], state=state)
        assert launches() - before == 4 * 15 + 2 * 11 + 5 + 5 * 11 + 4


def test_hip_tables_that_are_replaced_are_read_before():
    """More tables than are kept, a new one a call: the oldest, which all calls read, stays while the new one is put."""
    n, width, caches = 1500, 600, []
    starts = np.random.default_rng(3).integers(0, width - 40, (n, 2))
    for ctx in (kl.Context(device=DEVICE), kl.Context()):
        caches.append(np.zeros((2 * width, 1), np.float32))
        for i, start in enumerate(starts):
            append(ctx, caches[-1], normal(40, 1, seed=i), np.array([0, 13, 40]), start, width * np.arange(3))
    assert caches[0].tobytes() == caches[1].tobytes()


@host_build_only
def test_hip_sample_of_few_rows_waits_once():
    logits, args = put(normal(3, 50)), dict(temperature=[0.5, 1.0, 2.0], seed=4)
    count = host_library().kl_host_waits
    before = count()
    ids = kl.ops.sample(logits, **args, ctx=context())
    assert count() == before + 1 and ids.tolist() == kl.ops.sample(logits.numpy(), **args).tolist()


@host_build_only
def test_hip_error_that_another_library_has_left_is_not_an_ops():
    """The runtime keeps a thread's first error until somebody reads it, whoever made it."""
    x, out = put(normal(3, 4)), put(normal(3, 4))
    host_library().kl_host_leave_error()
    kl.ops.sigmoid(x, out=out, ctx=context())
    assert same(out, kl.ops.sigmoid(x.numpy(), ctx=context()))


@host_build_only
def test_hip_control_data_wait_for_nothing():
    """Offsets and tables are copied from pinned memory: a device's copies from other memory wait."""
    x, w, library = put(normal(9, 5)), put(normal(5, 4)), host_library()
    given = dict(offsets=[0, 4, 9], history=put(np.zeros((2, 3, 5), np.float32)), ctx=context())
    out = tuple(put(np.zeros(shape, np.float32)) for shape in ((9, 5), (2, 3, 5)))
    counts = (library.kl_host_waits, library.kl_host_pageable)
    before = [count() for count in counts]
    kl.ops.short_conv(x, w, out=out, **given)
    assert [count() for count in counts] == before
    assert same(out[0], kl.ops.short_conv(x.numpy(), w.numpy(), offsets=given["offsets"], ctx=context())[0])


def test_hip_more_control_data_than_the_pinned_memory_keep_every_byte(monkeypatch):
    """The pages of 100,000 sequences: the pinned memory is used anew before there is a launch."""
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    n, caches = 100_000, []
    at = [np.arange(n + 1), np.zeros(n, np.int64), np.arange(n + 1)]
    for ctx in (context(), kl.Context()):
        caches.append(np.zeros((n, 1), np.float32))
        append(ctx, caches[-1], np.arange(n, dtype=np.float32)[:, None], *at)
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


@host_build_only
def test_hip_tensors_of_a_model_go_through_pinned_memory():
    """Also those that are smaller than a buffer: a device's copies from other memory are waited for one by one."""
    large = [w for w in kl.Model.tiny().weights.values() if w.nbytes > 256 << 10]
    count = host_library().kl_host_copies
    before = count()
    kl.Model.tiny(device=DEVICE)
    assert count() - before >= len(large) > 1


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
def test_hip_library_without_code_for_the_device_is_named():
    library = host_library()
    library.kl_host_codeless(1)
    try:
        with pytest.raises(kl.DeviceError, match=r"no kernels for host build, wave of \d+, which is a host \(invalid "
                                                 r"device function\); make hip-host HOST_ARCHS=host builds them"):
            kl.Context(device=DEVICE)
    finally:
        library.kl_host_codeless(0)
    kl.ops.sigmoid(put(normal(3)), ctx=kl.Context(device=DEVICE))


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
