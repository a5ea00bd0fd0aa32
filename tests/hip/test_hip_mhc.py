"""Hyper-connections on a device: against float64 within the CPU's budget, rims, in place; v1 of mhc_pre has the CPU's
bytes, and the others in every version."""

import os

import ml_dtypes
import numpy as np
import pytest
from block_data import BLOCK_TYPES, drawn
from hip_build import DEVICE, context, everywhere, versions
from judge import guarded, judge, normal

import kimi_linear as kl

version = versions("1", "")


def streams(T, n, D, scale=1.0, steep=1.0, spread=1.0, norm_eps=1e-5, **more):
    return dict(x=normal(T, n, D, scale=scale), fn=normal((2 + n) * n, n * D, seed=1, scale=steep * (n * D) ** -0.5),
                base=normal((2 + n) * n, seed=2, scale=spread), scale=np.float32([1.0, 0.7, 1.5]),
                norm_eps=norm_eps) | more


def run(op, given, *shapes):
    """The op's results, or its one."""
    def one(ctx):
        outs, checks = zip(*map(guarded, shapes), strict=True)
        getattr(kl.ops, op)(**given, out=outs if len(outs) > 1 else outs[0], ctx=ctx)
        for untouched in checks:
            untouched()
        return np.concatenate([out.ravel() for out in outs])

    sizes = [int(np.prod(shape)) for shape in shapes]
    parts = np.split(everywhere(one), np.cumsum(sizes)[:-1])
    results = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    return results if len(results) > 1 else results[0]


def pre(given):
    T, n, D = given["x"].shape
    return run("mhc_pre", given, (T, D), (T, n), (T, n, n))


def check(given):
    with np.errstate(all="ignore"):
        ref = kl.reference.mhc_pre(**given)
    got = pre(given)
    judge("mhc_pre", got, ref, **given)
    after = dict(y=got[0], x=given["x"], post=got[1], comb=got[2])
    assert run("mhc_post", after, given["x"].shape).tobytes() == kl.ops.mhc_post(**after).tobytes()
    return got


@pytest.mark.parametrize("n, D", [(1, 1), (2, 17), (3, 16), (4, 33), (4, 300), (16, 5), (17, 3)])
def test_hip_mhc_within_budget(n, D, version):
    for T in (0, 1, 11):
        check(streams(T, n, D))


def test_hip_mhc_of_the_real_width():
    check(streams(2, 4, 4096))


def test_hip_mhc_of_as_many_streams_as_there_may_be(version):
    check(streams(1, 64, 2, iters=2))


@pytest.mark.parametrize("given", [streams(5, 4, 33), streams(5, 17, 20, iters=3), streams(70, 4, 9, spread=30.0)],
                         ids=["4", "17", "steep"])
def test_hip_mhc_pre_oracle_has_the_bytes_of_the_cpu(given, monkeypatch):
    """The first version sums in the CPU's order."""
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    given["x"][1:3] *= np.float32([1e30, 1e-30])[:, None, None]
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for norm_eps in (1e-5, 0.0):
            given = given | dict(fn=given["fn"].astype(dtype), norm_eps=norm_eps)
            assert [a.tobytes() for a in pre(given)] == [a.tobytes() for a in kl.ops.mhc_pre(**given)]


@pytest.mark.parametrize("norm_eps, scale", [(1e-6, 1e-42), (1e-6, 1e19), (1e-6, 1e38), (0, 0), (0, 1e-45), (0, 1e-20)])
def test_hip_mhc_of_tiny_and_huge_tokens(norm_eps, scale, version):
    given = streams(3, 3, 100, norm_eps=norm_eps)
    given["x"][1:] = np.sign(given["x"][1:]) * np.float32(scale)
    given["x"][2, 2, 99] = 1
    check(given)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_hip_mhc_of_narrow_weights(dtype, version):
    given = streams(40, 4, 33)
    given["fn"] = given["fn"].astype(dtype)
    given["x"][7] *= np.float32(1e30)
    wanted = pre(given | dict(fn=given["fn"].astype(np.float32)))
    assert [a.tobytes() for a in check(given)] == [a.tobytes() for a in wanted]


@pytest.mark.parametrize("type", [t.name for t in BLOCK_TYPES])
@pytest.mark.parametrize("T", [1, 40])
def test_hip_mhc_of_blocks(type, T, version):
    """As of what they widen to; v1 has the CPU's bytes. One token of 40 has its product again, out of float32."""
    given = streams(T, 4, 64)
    given["x"][7:8] *= np.float32(1e30)
    narrow = given | dict(fn=drawn(type, 24, 256, scale=1 / 16))
    wide = given | dict(fn=kl.ops.dequantize(narrow["fn"]))
    got = pre(narrow)
    judge("mhc_pre", got, kl.reference.mhc_pre(**wide), **wide)
    assert [a.tobytes() for a in got] == [a.tobytes() for a in pre(wide)]
    if os.environ["KL_GPU_VERSION"] == "1":
        assert [a.tobytes() for a in got] == [a.tobytes() for a in kl.ops.mhc_pre(**narrow)]


@pytest.mark.parametrize("activations", ["int8", "bfloat16"])
def test_hip_mhc_in_float32_whatever_the_activations(activations):
    given = streams(3, 4, 64)
    narrow = given | dict(fn=drawn("Q8_0", 24, 256, scale=1 / 16))
    got = kl.ops.mhc_pre(**narrow, ctx=kl.Context(device=DEVICE, activations=activations))
    assert [a.tobytes() for a in got] == [a.tobytes() for a in kl.ops.mhc_pre(**narrow, ctx=context())]


@pytest.mark.parametrize("n", [3, 4])
def test_hip_mhc_post_in_place(n, version):
    given = dict(y=normal(5, 33), x=normal(5, n, 33), post=normal(5, n), comb=normal(5, n, n))
    wanted = kl.ops.mhc_post(**given)
    got = kl.ops.mhc_post(**given, out=given["x"], ctx=context())
    assert got is given["x"] and got.tobytes() == wanted.tobytes()


def test_hip_mhc_hands_on_what_is_not_finite(version):
    given = streams(4, 4, 40)
    given["x"][2, 1, 7], given["x"][3, 0, 0] = np.nan, np.inf
    for a in check(given):
        assert np.isnan(a[2:]).all() and np.isfinite(a[:2]).all()


@pytest.mark.parametrize("n, D", [(1, 1), (3, 17), (4, 300), (64, 5)])
def test_hip_mhc_ends_have_the_bytes_of_the_cpu(n, D):
    for T in (0, 1, 11):
        x = normal(T, n, D)
        x[3:4], x[4:5, -1], x[5:6, 0] = 3e38, np.inf, np.nan
        mean = run("mhc_collapse", dict(x=x), (T, D))
        assert np.array_equal(mean, kl.ops.mhc_collapse(x), equal_nan=True)
        judge("mhc_collapse", mean[:3], kl.reference.mhc_collapse(x[:3]), x=x[:3])
        many = run("mhc_expand", dict(x=mean, n=n), (T, n, D))
        assert many.tobytes() == np.repeat(mean[:, None], n, axis=1).tobytes()
