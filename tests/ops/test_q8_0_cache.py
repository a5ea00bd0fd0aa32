"""cache_append and latent_attention on a cache of Q8_0 blocks: ggml's bytes, and attention to the values stored."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from judge import CONTEXTS, everywhere, judge

import kimi_linear as kl

Q8_0 = 8
KIND = GGMLQuantizationType.Q8_0
FORMS = {"auto": 0, "absorbed": 3, "expanded": 4}
CTX = CONTEXTS[-1]


def append(x, S=None, start=0, ctx=None):
    """The cache's bytes [S, .], 7 where nothing was written, after rows x [T, D] behind the first `start`."""
    T, D = x.shape
    S = start + T if S is None else S
    cache = np.full((S, D // 32 * 34), 7, np.uint8)
    kl._core.cache_append((ctx or CTX)._core, cache, Q8_0, x, np.array([0, T]), np.array([start]), np.array([0, S]), 1,
                          T, D, S)
    return cache


def rows(T, D, seed=0, spread=4.0):
    """Values whose blocks are of very different sizes."""
    rng = np.random.default_rng([seed, T, D])
    size = np.exp(spread * rng.standard_normal((T, D // 32, 1)))
    return (size * rng.standard_normal((T, D // 32, 32))).reshape(T, D).astype(np.float32)


@pytest.mark.parametrize("T, D, start", [(0, 32, 2), (1, 32, 0), (5, 64, 509), (600, 96, 300), (3, 576, 1029)])
def test_bytes_are_those_of_ggml_and_other_rows_stay(T, D, start):
    x = rows(T, D)
    wanted = np.full((start + T + 2, D // 32 * 34), 7, np.uint8)
    if T:
        wanted[start : start + T] = quants.quantize(x, KIND)
    assert everywhere(lambda ctx: append(x, start + T + 2, start, ctx)).tobytes() == wanted.tobytes()


def test_halves_zeros_and_the_largest_that_fits():
    x = np.zeros((4, 32), np.float32)
    x[0, :5] = [127, 0.5, -0.5, 2.5, -2.5]  # a scale of 1: halves go away from zero
    x[1, 3] = -0.0
    x[2, 0] = np.nextafter(np.float32(127 * 65520), np.float32(0))
    x[3] = -1e-6  # a scale that float16 rounds to zero
    got = everywhere(lambda ctx: append(x, ctx=ctx))
    assert got.tobytes() == quants.quantize(x, KIND).tobytes()
    assert got[0, 2:7].view(np.int8).tolist() == [127, 1, -1, 3, -3]
    assert not quants.dequantize(got, KIND)[[1, 3]].any()


def test_smallest_values_are_zeros():
    x = np.full((1, 64), 1e-40, np.float32)
    x[0, 0] = 1e-45
    assert not everywhere(lambda ctx: append(x, ctx=ctx)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_nan_of_its_block_alone(value):
    x = rows(3, 96)
    wanted = quants.dequantize(append(x), KIND)
    x[1, 40] = value
    got = quants.dequantize(everywhere(lambda ctx: append(x, ctx=ctx)), KIND)
    assert np.isnan(got[1, 32:64]).all()
    got[1, 32:64] = wanted[1, 32:64]
    assert got.tobytes() == wanted.tobytes()


def test_what_a_scale_cannot_hold_is_refused_and_nothing_written():
    x = rows(700, 32)
    x[650, 7] = 127 * 65520
    for threads in (1, 3):
        cache = np.full((700, 34), 7, np.uint8)
        with pytest.raises(ValueError, match=r"x\[650, 7\] is 8.321.*e\+06, too large for a q8_0 cache"):
            kl._core.cache_append(kl.Context(threads=threads)._core, cache, Q8_0, x, np.array([0, 700]), np.array([0]),
                                  np.array([0, 700]), 1, 700, 32, 700)
        assert (cache == 7).all()


def test_a_width_that_is_no_whole_blocks_is_named():
    with pytest.raises(ValueError, match="cache has rows of 48 values; Q8_0 needs a multiple of 32"):
        kl._core.cache_append(CTX._core, np.zeros(34, np.uint8), Q8_0, np.zeros((1, 48), np.float32), np.array([0, 1]),
                              np.array([0]), np.array([0, 1]), 1, 1, 48, 1)
    with pytest.raises(ValueError, match="k_shared has rows of 16 values; Q8_0 needs a multiple of 32"):
        run(inputs(1, 2) | dict(q=np.zeros((1, 3, 28), np.float32), P=16, k_shared=np.zeros((1, 34), np.uint8)))
    with pytest.raises(ValueError, match="latent has 102 values; the sizes of the call say 136"):
        run(inputs(1, 4, R=32) | dict(latent=np.zeros((3, 34), np.uint8), S=4))


# ---- attention ----


def inputs(T, S, H=3, K=12, P=32, V=20, R=64, seed=0):
    rng = np.random.default_rng([seed, T, S, H])

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return dict(q=normal(T, H, K + P), latent=append(normal(S, R)), k_shared=append(normal(S, P)) if P else None,
                w_uk=normal(H, K, R, scale=R**-0.5), w_uv=normal(H, V, R, scale=R**-0.5), P=P)


def widened(given):
    """The same call on the float32 values that the blocks hold."""
    latent = quants.dequantize(given["latent"], KIND)
    shared = quants.dequantize(given["k_shared"], KIND) if given["P"] else np.zeros((len(latent), 0), np.float32)
    K = given["w_uk"].shape[1]
    return {n: given[n] for n in ("q", "w_uk", "w_uv")} | dict(latent=latent, k_shared=shared,
                                                               scale=(K + given["P"]) ** -0.5)


def run(given, form="auto", ctx=None, offsets=None, kv_offsets=None, select=None):
    (T, H, _), (_, K, R), V, P = given["q"].shape, given["w_uk"].shape, given["w_uv"].shape[1], given["P"]
    S, out = given["latent"].size // 34 * 32 // R, np.full((T, H, V), np.nan, np.float32)
    S = given.get("S", S)
    offsets = np.array([0, T]) if offsets is None else offsets
    kv_offsets = np.array([0, S]) if kv_offsets is None else kv_offsets
    shared = given["k_shared"] if P else np.zeros(0, np.uint8)
    weights = [(given[n], 0, *given[n].shape) for n in ("w_uk", "w_uv")]
    sizes = (len(offsets) - 1, T, S, H, K, P, V, R, 0 if select is None else select.shape[1], 0)
    kl._core.latent_attention((ctx or CTX)._core, out, given["q"], given["latent"], Q8_0, shared, Q8_0, *weights,
                              offsets, kv_offsets, select, sizes, (K + P) ** -0.5, FORMS[form])
    return out


@pytest.mark.parametrize("T, S", [(1, 1), (2, 64), (5, 65), (17, 17), (20, 150), (65, 130), (3, 513), (70, 1030)])
def test_within_budget_of_the_values_stored(T, S):
    given = inputs(T, S)
    wide = widened(given)
    ref = kl.reference.latent_attention(**wide)
    for form in FORMS:
        got = everywhere(lambda ctx, form=form: run(given, form, ctx))
        judge("latent_attention", got, ref, **wide)
        assert got.tobytes() == kl.ops.latent_attention(**wide, form=form).tobytes()  # widening is exact


@pytest.mark.parametrize("T, S, W", [(1, 65, 40), (9, 600, 130), (20, 1030, 33)])
def test_selected_positions_of_the_values_stored(T, S, W):
    given, rng = inputs(T, S), np.random.default_rng(S)
    select = np.stack([np.sort(rng.permutation(S - T + 1)[:W]) for _ in range(T)]).astype(np.int32)
    got = everywhere(lambda ctx: run(given, ctx=ctx, select=select))
    wide = widened(given) | dict(select=select)
    judge("latent_attention", got, kl.reference.latent_attention(**wide), **wide)
    assert got.tobytes() == kl.ops.latent_attention(**wide).tobytes()


@pytest.mark.parametrize("R, P", [(32, 0), (512, 64), (544, 96)])
def test_widths(R, P):
    given = inputs(3, 600, 2, 32, P, 32, R)
    wide = widened(given)
    ref = kl.reference.latent_attention(**wide)
    for form in ("absorbed", "expanded"):
        best = [run(given, form, ctx) for ctx in CONTEXTS if ctx.isa != "scalar"]
        assert len({o.tobytes() for o in best}) <= 1
        judge("latent_attention", run(given, form), ref, **wide)


def test_every_scale_of_float16_is_widened_exactly():
    """Blocks of any bytes, subnormal, infinite and NaN scales too: one position's value, by unit weights."""
    scales = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    blocks = np.zeros((len(scales), 16, 34), np.uint8)
    blocks[:, :, :2] = scales[:, :, None].view(np.uint8)
    blocks[:, :, 2:] = np.random.default_rng(0).integers(0, 256, (len(scales), 16, 32))
    finite = np.isfinite(scales.view(np.float16)).all(1)
    blocks = blocks.reshape(len(scales), -1)[finite]
    want = quants.dequantize(blocks, KIND)
    R, n = 512, 64
    unit = np.eye(R, dtype=np.float32)[None]
    for begin in range(0, len(blocks) - n, 512):
        latent = blocks[begin : begin + n]
        given = dict(q=np.zeros((n, 1, 1), np.float32), latent=latent, k_shared=None, P=0, S=n,
                     w_uk=np.zeros((1, 1, R), np.float32), w_uv=unit)
        each = np.arange(n + 1)
        for ctx in CONTEXTS:
            got = run(given, "absorbed", ctx, each, each)[:, 0]
            assert np.array_equal(got, want[begin : begin + n]), ctx


@pytest.mark.parametrize("form", FORMS)
def test_ragged_batch_and_split_at_64_keep_bytes(form):
    whole = inputs(200, 237)
    out = run(whole, form)
    for first, last in ((0, 64), (64, 192), (192, 200)):
        part = whole | dict(q=whole["q"][first:last], latent=whole["latent"][: 37 + last],
                            k_shared=whole["k_shared"][: 37 + last])
        assert run(part, form).tobytes() == out[first:last].tobytes()
    parts = [inputs(T, S, seed=i) | {n: whole[n] for n in ("w_uk", "w_uv")}
             for i, (T, S) in enumerate([(1, 1), (70, 70), (3, 600), (64, 513)])]
    joined = whole | {n: np.concatenate([p[n] for p in parts]) for n in ("q", "latent", "k_shared")}
    offsets, kv_offsets = (np.cumsum([0] + [len(p[n]) for p in parts]) for n in ("q", "latent"))
    got = everywhere(lambda ctx: run(joined, form, ctx, offsets, kv_offsets))
    for part, o in zip(parts, kl.unpack(got, offsets), strict=True):
        assert o.tobytes() == run(part, form).tobytes()
