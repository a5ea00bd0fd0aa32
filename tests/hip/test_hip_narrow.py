"""Products whose activations are narrow, on the host build of the HIP kernels: in int8 the CPU's bytes, for waves of 32
and 64 and any order of threads; in bfloat16 those of float32 products of what was rounded."""

import functools
import os
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from block_data import raw_blocks, same_floats
from conftest import DATA
from device_arrays import Told, put
from hip_build import DEVICE, ON_HOST, ROOT, SETTINGS, host_build_only, host_library, set_up, versions
from hip_weights import stored
from judge import normal

import kimi_linear as kl
from kimi_linear.device_array import from_device
from kimi_linear.diff.budgets import budget

TYPES = ["Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q1_0",
         "Q2_0"]
BF16 = ml_dtypes.bfloat16

version = versions("1", "")


@functools.cache
def device(activations):
    host_library()
    return kl.Context(device=DEVICE, activations=activations)


@functools.cache
def cpu(activations):
    return kl.Context(activations=activations)


def joined(got):
    return b"".join(np.asarray(part).tobytes() for part in (got if isinstance(got, tuple | list) else [got]))


def same_as_the_cpu(run, settings=((32, 0),)):
    wanted = joined(run(cpu("int8")))
    try:
        for wave, seed in settings if ON_HOST else [(32, 0)]:
            set_up(host_library(), wave, seed)
            assert joined(run(device("int8"))) == wanted, f"a wave of {wave}, order {seed}"
    finally:
        set_up(host_library())


def uneven(T, D, largest=3e38):
    """Rows with a block of zeros, of the smallest and the largest numbers, and ties of rounding."""
    x = normal(T, D)
    x[:, :32] = 0
    x[::3, -16:] *= np.float32(1e-38)
    x[1::3, 5] = largest
    x[2::3, :32] = np.arange(-16, 16) / 2
    x[2::3, 31] = 127
    return x


@pytest.mark.parametrize("T", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("type", TYPES)
def test_hip_int8_linear_has_the_bytes_of_the_cpu(type, T):
    """Whole groups of 256 and, of shorter blocks, what is left of one; rows that fill no tile."""
    block = kl.storage_types[type].values
    for D in (768,) if block == 256 else (block, 13 * block, 768):
        x, w, bias = uneven(T, D), stored(normal(45, D, seed=1), type), normal(45, seed=2)
        same_as_the_cpu(lambda ctx, x=x, w=w, bias=bias: kl.ops.linear(x, w, bias=bias, ctx=ctx),
                        SETTINGS if type in ("Q4_K", "Q2_K") and T in (2, 40) else [(64, 7)])


@pytest.mark.parametrize("type", TYPES)
def test_hip_int8_linear_of_any_bytes(type):
    """Every byte and every special scale at every place: the CPU's values, NaN where it has NaN."""
    kind = kl.storage_types[type]
    data = raw_blocks(kind)
    each = 256 // kind.values
    data = np.ascontiguousarray(data[: len(data) // each * each]).reshape(-1, each * kind.bytes)
    w = kl.Quantized(data, type, (len(data), 256))
    for T in (1, 10):
        x = normal(T, 256)
        got, wanted = (kl.ops.linear(x, w, ctx=f("int8")) for f in (device, cpu))
        assert np.isfinite(wanted).any() and not np.isfinite(wanted).all()
        assert same_floats(got, wanted)


@pytest.mark.parametrize("T", [1, 8, 9])
@pytest.mark.parametrize("D", [256, 288, 480])
def test_hip_int8_linear_of_products_that_underflow(D, T):
    """Lanes of -0: the zero blocks that fill up the last group make them +0, with few rows as with many."""
    w = kl.Quantized(np.tile(np.array([0] + [0x99] * 16, np.uint8), (3, D // 32)), "MXFP4", (3, D))
    x = np.full((T, D), 2.0**-99, np.float32)
    assert np.signbit(kl.ops.linear(x, w, ctx=cpu("int8"))).all() == (D == 256)
    same_as_the_cpu(lambda ctx: kl.ops.linear(x, w, ctx=ctx), SETTINGS)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("T", [1, 10])
def test_hip_int8_linear_of_blocks_on_any_address_they_may_have(T, type, rows):
    """An array that begins between two words, and rows that do: of MXFP4 on odd addresses."""
    align = {"Q2_K": 4, "IQ4_XS": 8, "Q4_K": 16, "Q5_K": 16}.get(type, 2)
    D = kl.storage_types[type].values
    x, w = normal(T, D), stored(normal(rows, D, seed=1), type)
    for at in (align, 2 * align, 3 * align):
        room = put(np.concatenate([np.zeros(at, np.uint8), np.asarray(w.data).reshape(-1)]))
        told = Told(data=(room._memory.address + at, False), shape=w.data.shape, typestr="|u1")
        there = kl.Quantized(from_device(told, "w"), type, w.shape)
        y = kl.ops.linear(put(x), there, ctx=device("int8"))
        assert y.numpy().tobytes() == kl.ops.linear(x, w, ctx=cpu("int8")).tobytes()


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
@pytest.mark.parametrize("T", [1, 20])
def test_hip_int8_what_is_not_finite_makes_its_row_nan(T, wrong):
    x, w = normal(T, 96), stored(normal(20, 96, seed=1), "Q8_0")
    x[-1, 40] = wrong
    y = kl.ops.linear(x, w, ctx=device("int8"))
    assert np.isnan(y[-1]).all() and np.isfinite(y[:-1]).all()


#: Of one type up to six go together; of those whose kernels for float32 are shared each alone; others take float32.
SEVERAL = [(19, "Q4_K"), (1, "Q4_K"), (33, "Q4_K"), (64, "Q4_K"), (16, "Q4_K"), (70, "Q4_K"), (5, "Q4_K"), (17, "Q8_0"),
           (32, "MXFP4"), (9, "MXFP4"), (20, "F32"), (7, "IQ2_XS"), (18, "BF16"), (40, "Q6_K")]


@pytest.mark.parametrize("T", [1, 8, 9, 40])
def test_hip_int8_linear_of_several_weights(T, version):
    x, w = normal(T, 512), [stored(normal(rows, 512, seed=i), type) for i, (rows, type) in enumerate(SEVERAL)]
    biases = [normal(len(m), seed=90) if i % 2 else None for i, m in enumerate(w)]
    same_as_the_cpu(lambda ctx: kl.ops.linear(x, w, bias=biases, ctx=ctx), [(32, 1)])


@host_build_only
@pytest.mark.parametrize("T", [1, 9])
def test_hip_int8_linear_of_several_weights_launches(T):
    """Seven weights a call: x made int8, six and one of Q4_K; x again, Q8_0, twice MXFP4, F32, IQ2_XS, BF16, Q6_K."""
    x, w = normal(T, 512), [stored(normal(rows, 512, seed=i), type) for i, (rows, type) in enumerate(SEVERAL)]
    count = host_library().kl_host_launches
    before = count()
    kl.ops.linear(x, w, ctx=device("int8"))
    assert count() - before == 3 + 8


def experts(T, E=6, D=256, F=256, k=3, types=("Q4_K", "Q4_K", "Q6_K")):
    rng = np.random.default_rng([T, E, k])
    ids = np.array([np.sort(rng.choice(E, k, replace=False)) for _ in range(T)], np.int32).reshape(T, k)
    shapes = {"w_gate": (E, F, D), "w_up": (E, F, D), "w_down": (E, D, F)}
    return dict(x=normal(T, D), ids=ids, weights=rng.uniform(0, 1, (T, k)).astype(np.float32),
                shared=normal(T, D, seed=9),
                **{name: stored(normal(*shape, seed=i, scale=shape[-1]**-0.5), type)
                   for i, ((name, shape), type) in enumerate(zip(shapes.items(), types, strict=True))})


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K", "Q6_K"), ("Q2_K", "Q2_K", "Q3_K"), ("Q8_0", "Q4_0", "F32"),
                                   ("MXFP4", "MXFP4", "MXFP4"), ("F32", "F32", "Q4_K")], ids=" ".join)
@pytest.mark.parametrize("T", [0, 1, 8, 9, 90])
def test_hip_int8_moe_has_the_bytes_of_the_cpu(T, types, version):
    inputs = experts(T, types=types)
    same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), [(64, 7)])


@pytest.mark.parametrize("types", [("MXFP4", "MXFP4", "MXFP4"), ("Q8_0", "Q4_0", "F32")], ids=" ".join)
@pytest.mark.parametrize("T", [1, 8, 9, 90])
def test_hip_int8_moe_with_situ_has_the_bytes_of_the_cpu(T, types, version):
    inputs = experts(T, types=types) | dict(situ=(4.0, 25.0))
    same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), [(64, 7)])


@pytest.mark.parametrize("types", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q4_0", "F32")], ids=" ".join)
@pytest.mark.parametrize("T", [1, 8, 9, 90])
def test_hip_int8_moe_with_a_limit_has_the_bytes_of_the_cpu(T, types, version):
    inputs = experts(T, types=types) | dict(limit=0.5)
    same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx), [(64, 7)])
    assert not np.array_equal(*(kl.ops.moe(**inputs | dict(limit=n), ctx=device("int8")) for n in (0.5, None)))


def test_hip_int8_moe_of_more_tokens_than_a_pass():
    inputs = experts(1100, E=4, D=32, F=64, k=2, types=("Q8_0", "Q8_0", "Q4_0"))
    same_as_the_cpu(lambda ctx: kl.ops.moe(**inputs, ctx=ctx))


def test_hip_int8_of_blocks_that_lie_across_words():
    """On a device blocks are read in words: an array at another address is refused, and nothing is written."""
    w, x = stored(normal(3, 256, seed=1), "Q4_K"), normal(2, 256)
    for at in (0, 2, 8, 16):
        room = put(np.concatenate([np.zeros(at, np.uint8), w.data.reshape(-1)]))
        told = Told(data=(room._memory.address + at, False), shape=w.data.shape, typestr="|u1")
        there = kl.Quantized(from_device(told, "w"), "Q4_K", w.shape)
        y = put(np.full((2, 3), 7, np.float32))
        if at % 16 == 0:
            kl.ops.linear(put(x), there, out=y, ctx=device("int8"))
            assert y.numpy().tobytes() == kl.ops.linear(x, w, ctx=cpu("int8")).tobytes()
            continue
        with pytest.raises(ValueError, match="linear: w is at no multiple of 16 bytes; for int8 activations on a "
                                             "device blocks of its type must be"):
            kl.ops.linear(put(x), there, out=y, ctx=device("int8"))
        assert (y.numpy() == 7).all()
        with pytest.raises(ValueError, match="linear: w is at no multiple of 16 bytes"):
            others = [put(np.empty((2, 3), np.float32)) for _ in range(2)]
            kl.ops.linear(put(x), [w, normal(3, 256), there], out=[y, *others], ctx=device("int8"))
        assert (y.numpy() == 7).all()


@pytest.mark.skipif(shutil.which("hipcc") is None, reason="there is no hipcc (make hip-system installs one)")
@pytest.mark.parametrize("arch", ["gfx900", "gfx1010"])
def test_hip_int8_compiles_for_gpus_without_an_instruction_for_four_products(arch, tmp_path):
    command = ["hipcc", "-std=c++17", "-O1", "-ffp-contract=off", f"--offload-arch={arch}", "--cuda-device-only", "-S",
               ROOT / "csrc/hip/int8.hip", "-o", tmp_path / "int8.s"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HIP_PLATFORM": "amd"})
    assert done.returncode == 0, done.stderr
    assert "int8_many" in (tmp_path / "int8.s").read_text()


# ---- bfloat16 ----


@pytest.mark.parametrize("T", [1, 3, 9, 40])
def test_hip_bfloat16_linear_is_the_float32_product_of_what_is_rounded(T, version):
    x, w, other = uneven(T, 96, 1e37), normal(37, 96, seed=1).astype(BF16), normal(5, 96, seed=2)
    x[0, 40:44] = 1 + np.float32(2.0**-8) * np.arange(4)  # halfway, between even and odd
    x[-1, 3] = -1e-39
    rounded = x.astype(BF16).astype(np.float32)
    rounded[np.abs(rounded) < 2.0**-126] = 0
    y, plain = kl.ops.linear(x, [w, other], ctx=device("bfloat16"))
    assert y.tobytes() == kl.ops.linear(rounded, w).tobytes()
    assert plain.tobytes() == kl.ops.linear(x, other).tobytes()
    ref, on_cpu = kl.reference.linear(rounded, w), kl.ops.linear(x, w, ctx=cpu("bfloat16"))
    bound = budget("linear", ref, x=rounded, w=np.asarray(w, np.float32))
    assert (np.abs(y - ref) <= bound).all() and (np.abs(y - on_cpu) <= 2 * bound).all()


def test_hip_bfloat16_rounds_first_and_what_is_subnormal_then_is_zero():
    x = np.zeros((1, 32), np.float32)
    x.view(np.uint32)[0, :5] = 0x007F7FFF, 0x007F8000, 0x807FFFFF, 0x00800000, 0x80000001
    for of in (device, cpu):
        y = kl.ops.linear(x, np.eye(32, dtype=BF16), ctx=of("bfloat16"))
        assert (y[0, :5] == np.ldexp([0, 1, -1, 1, 0], -126)).all() and not y[0, 5:].any()


def test_hip_bfloat16_what_is_not_finite_stays_that():
    x, w = normal(3, 64), normal(5, 64, seed=1).astype(BF16)
    x.view(np.uint32)[0, 5] = 0x7F800001  # NaN, whose upper half is an infinity's
    x[1, 7] = np.inf
    y = kl.ops.linear(x, w, ctx=device("bfloat16"))
    assert np.isnan(y[0]).all() and np.isinf(y[1]).all() and np.isfinite(y[2]).all()


def test_hip_bfloat16_moe(version):
    inputs = experts(9, types=("BF16", "BF16", "F32"))
    y, wanted = (kl.ops.moe(**inputs, ctx=f("bfloat16")) for f in (device, cpu))
    exact = kl.ops.moe(**inputs)
    assert np.abs(y - wanted).max() < 1e-6 * np.abs(exact).max() < np.abs(y - exact).max()
    cut, wanted = (kl.ops.moe(**inputs, limit=0.5, ctx=f("bfloat16")) for f in (device, cpu))
    assert np.abs(cut - wanted).max() < 1e-6 * np.abs(cut).max() < np.abs(cut - y).max()


# ---- the model ----


@pytest.mark.parametrize("activations, type", [("int8", "Q8_0"), ("int8", "Q4_K"), ("bfloat16", "BF16")])
def test_hip_model_with_narrow_activations(activations, type, tmp_path):
    """Each op right on its own inputs, as on the CPU; the logits as far from float32's as the CPU's are."""
    path = tmp_path / "tiny.gguf"
    kl.convert("tiny", path, type=type)
    models = [kl.Model.from_pretrained(path, activations="auto", **where) for where in ({}, {"device": DEVICE})]
    assert [m.activations for m in models] == [activations, activations]
    ids = models[0].tokenizer.encode((DATA / "tiny/heldout.txt").read_text())[:40]
    ours, theirs = (m.trace(ids, taps="*") for m in models)
    assert kl.diff.blame(models[0], theirs).ok
    exact = kl.Model.from_pretrained(path).forward(ids, logits="all")
    of_cpu, of_device = (np.abs(logits - exact).mean() for logits in (ours["logits"], theirs["logits"]))
    assert 0 < of_device < 1.5 * of_cpu
