"""Ops on a device: against float64 within the CPU's budgets, the same bytes for waves of 32
and 64 and any order of threads, every version of a ladder, rims, guards, in place, errors."""

import ml_dtypes
import numpy as np
import pytest
from basic_inputs import OPS, op_inputs, rim
from hip_build import DEVICE, context, everywhere, versions
from judge import guarded, judge, normal

import kimi_linear as kl

BFLOAT16 = ml_dtypes.bfloat16
WIDTHS = [1, 2, 15, 16, 17, 33, 128, 700]

version = versions("1", "2", "")


def run(op, inputs):
    def one(ctx):
        out, check = guarded(next(iter(inputs.values())).shape)
        assert getattr(kl.ops, op)(**inputs, out=out, ctx=ctx) is out
        check()
        return out.copy()

    return everywhere(one)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", WIDTHS)
def test_hip_op_within_budget(op, D, version):
    for T in (0, 1, 11):
        inputs = op_inputs(op, T, D, scale=4.0)
        before = {name: np.copy(value) for name, value in inputs.items()}
        judge(op, run(op, inputs), getattr(kl.reference, op)(**inputs), **inputs)
        assert all(np.array_equal(before[name], value) for name, value in inputs.items())


@pytest.mark.parametrize("op", ["sigmoid", "swiglu", "situ", "add", "softmax"])
def test_hip_rim_of_float32(op, version):
    inputs, ref = rim(op)
    judge(op, run(op, inputs), ref, **inputs)


@pytest.mark.parametrize("op", ["add", "sigmoid", "swiglu", "situ"])
def test_hip_elementwise_has_the_bytes_of_the_cpu(op):
    inputs = op_inputs(op, 40, 333, scale=8.0)
    assert run(op, inputs).tobytes() == getattr(kl.ops, op)(**inputs).tobytes()


@pytest.mark.parametrize("limit", [10.0, 7.1])
def test_hip_swiglu_with_a_limit_has_the_bytes_of_the_cpu_over_all_exponents(limit, version):
    bits = np.arange(0, 0x7F900000, 1 << 16, np.uint32)  # to NaN
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    inputs = dict(gate=x, up=np.roll(x, 7), limit=limit)
    got, wanted = run("swiglu", inputs), kl.ops.swiglu(**inputs)
    assert np.array_equal(got, wanted, equal_nan=True)
    there = ~np.isnan(got)
    assert (~there[np.isnan(x) | np.isnan(inputs["up"])]).all()
    assert np.array_equal(np.signbit(got[there]), np.signbit(wanted[there]))


@pytest.mark.parametrize("beta, linear_beta", [(4, 25), (1.7, None)])
def test_hip_situ_has_the_bytes_of_the_cpu_over_all_exponents(beta, linear_beta, version):
    bits = np.arange(0, 0x7F900000, 1 << 16, np.uint32)  # to NaN
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    inputs = dict(gate=x, up=np.roll(x, 7), beta=beta, linear_beta=linear_beta)
    got, wanted = run("situ", inputs), kl.ops.situ(**inputs)
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(got)]))


@pytest.mark.parametrize("op", ["softmax", "rms_norm", "layer_norm", "gated_rms_norm", "l2_norm"])
def test_hip_oracle_has_the_bytes_of_the_cpu(op, monkeypatch):
    """The first version of each ladder sums in the CPU's order."""
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    inputs = op_inputs(op, 5, 333)
    assert run(op, inputs).tobytes() == getattr(kl.ops, op)(**inputs).tobytes()


@pytest.mark.parametrize("eps, scale", [(1e-6, 1e-42), (1e-6, 1e19), (1e-6, 3e38), (0, 0), (0, 1e-45), (0, 1e-20)])
@pytest.mark.parametrize("D", [100, 600])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "l2_norm", "gated_rms_norm"])
def test_hip_norms_of_tiny_and_huge_rows(op, D, eps, scale):
    inputs = op_inputs(op, 3, D) | dict(eps=eps)
    inputs["x"] = (np.sign(inputs["x"]) * np.float32(scale)).astype(np.float32)
    inputs["x"][1] = normal(D)  # neighbours in a block take different ways
    with np.errstate(invalid="ignore", divide="ignore"):
        ref = getattr(kl.reference, op)(**inputs)
    judge(op, run(op, inputs), ref, **inputs)


@pytest.mark.parametrize("mean", [3, 1e4, 1e6])
@pytest.mark.parametrize("D", [17, 128, 600])
def test_hip_layer_norm_of_a_mean_far_above_the_deviation(D, mean, version):
    inputs = op_inputs("layer_norm", 5, D)
    inputs["x"] += np.float32(mean)
    inputs["x"][3] = 2.0**127  # whose sum overflows, and of which nothing is left
    judge("layer_norm", run("layer_norm", inputs), kl.reference.layer_norm(**inputs), **inputs)


@pytest.mark.parametrize("op, first", [("rms_norm", "x"), ("layer_norm", "x"), ("l2_norm", "x"), ("softmax", "x"),
                                       ("sigmoid", "x"),
                                       ("swiglu", "up"), ("situ", "up"), ("add", "b"), ("gated_rms_norm", "z")])
def test_hip_in_place(op, first):
    inputs = op_inputs(op, 5, 33)
    wanted = run(op, inputs)
    got = getattr(kl.ops, op)(**inputs, out=inputs[first], ctx=context())
    assert got is inputs[first] and got.tobytes() == wanted.tobytes()


def test_hip_nan_stays_in_its_row():
    x = normal(4, 40)
    x[2, 7] = np.nan
    one = np.ones(40, np.float32)
    for y in (run("softmax", dict(x=x)), run("l2_norm", dict(x=x)), run("layer_norm", dict(x=x, w=one, b=one, eps=0))):
        assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, axis=0)).all()


def test_hip_more_rows_than_blocks_of_a_grid(monkeypatch):
    """65,535 blocks at most: the kernels walk over what is more."""
    monkeypatch.setenv("KL_GPU_VERSION", "2")  # a block a row
    ids = (np.arange(65_541) * 7919 % 1000).astype(np.int32)
    table = normal(1000, 1)
    assert kl.ops.embedding(ids, table, ctx=context()).tobytes() == table[ids].tobytes()


# ---- weights ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_hip_embedding_is_exact(dtype, version):
    table = normal(50, 33, scale=100).astype(dtype)
    table.reshape(-1)[:4] = [0.0, 6e-8, np.inf, -2e-5]  # subnormals of float16, infinity
    ids = np.array([49, 0, 0, 7, 31], np.int32)
    got = everywhere(lambda ctx: kl.ops.embedding(ids, table, ctx=ctx))
    assert got.tobytes() == table[ids].astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("T, M, D", [(1, 1, 1), (1, 70, 257), (5, 3, 33), (8, 17, 16), (9, 65, 17), (20, 130, 100)])
def test_hip_linear_within_budget(T, M, D, dtype, version):
    inputs = dict(x=normal(T, D), w=normal(M, D, seed=1).astype(dtype), bias=normal(M, seed=2))
    ref = kl.reference.linear(**inputs)
    for w in (inputs["w"], np.ascontiguousarray(inputs["w"].T).T):
        got = everywhere(lambda ctx, w=w: kl.ops.linear(inputs["x"], w, bias=inputs["bias"], ctx=ctx))
        judge("linear", got, ref, **inputs)


def test_hip_linear_of_several_weights_and_of_no_tokens():
    x, weights = normal(12, 40), [normal(10, 40, seed=1), normal(70, 40, seed=2)]
    for y, w in zip(kl.ops.linear(x, weights, ctx=context()), weights, strict=True):
        assert y.tobytes() == kl.ops.linear(x, w, ctx=context()).tobytes()
    assert kl.ops.linear(x[:0], weights[0], ctx=context()).shape == (0, 10)


def test_hip_a_token_has_the_same_bytes_in_any_batch_of_one_kernel():
    x, w = normal(200, 100), normal(70, 100, seed=1)
    whole = kl.ops.linear(x, w, ctx=context())
    assert kl.ops.linear(x[50:120], w, ctx=context()).tobytes() == whole[50:120].tobytes()


# ---- errors, memory, threads ----


def test_hip_arguments_are_checked_as_on_the_cpu():
    with pytest.raises(ValueError, match=r"ids.* 50"):
        kl.ops.embedding(np.array([50]), normal(50, 4), ctx=context())
    with pytest.raises(ValueError, match="eps is -1.0"):
        kl.ops.l2_norm(normal(2, 2), eps=-1, ctx=context())


def test_hip_out_of_memory_says_how_much_and_leaves_nothing():
    ctx, x = kl.Context(device=DEVICE), normal(4, 100)
    wanted = kl.ops.sigmoid(x, ctx=ctx)
    for nth in (1, 2):
        out = np.full_like(x, 3)
        ctx._core.fail_at(nth)
        with pytest.raises(MemoryError, match=r"out of device memory: 1600 bytes were wanted, \d+ of \d+ are free"):
            kl.ops.sigmoid(x, out=out, ctx=ctx)
        assert (out == 3).all()
    ctx._core.fail_at(0)
    assert kl.ops.sigmoid(x, ctx=ctx).tobytes() == wanted.tobytes()


def test_hip_devices_are_listed_with_the_reason():
    found = {d.name: d for d in kl.devices()}
    assert found["cpu"].available and found[DEVICE].available and not found[DEVICE].reason
    assert all(d.available or d.reason for d in found.values())
    assert DEVICE in repr(context())


def test_hip_device_that_is_not_there_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("KL_DEVICE_PATH", str(tmp_path))
    with pytest.raises(kl.DeviceError, match="device 'hip:0' is not there: _hip_amd.so is not there .make hip builds"):
        kl.Context(device="hip:0")
    (tmp_path / "_hip_host.so").write_text("no library")
    with pytest.raises(kl.DeviceError, match="_hip_host.so cannot be opened"):
        kl.Context(device="hip-host")
    with pytest.raises(ValueError, match="device is 'cuda'; it must be 'cpu', 'hip', 'hip:N' or 'hip-host'"):
        kl.Context(device="cuda")


def test_hip_two_threads_wait_for_each_other():
    from concurrent.futures import ThreadPoolExecutor

    x = normal(20, 300)
    wanted = kl.ops.softmax(x, ctx=context()).tobytes()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: kl.ops.softmax(x, ctx=context()).tobytes(), range(12)):
            assert got == wanted
