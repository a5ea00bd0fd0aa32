"""cache_append, attention and latent_attention on the host build: pages, ragged batches, cache types, segments."""

import numpy as np
import pytest
from hip_build import context, everywhere, host_library, set_up, versions
from judge import guarded, judge, normal
from ml_dtypes import bfloat16

import kimi_linear as kl

GROUPED = dict(H=4, Hkv=2, K=12, V=20)
LATENT = dict(H=3, K=12, P=8, V=20, R=24)
Q8_0 = 8

version = versions("1", "")


# ---- cache_append ----


def append(cache, x, start, ctx, offsets=None, kv_offsets=None):
    """`x` [T, D] behind the first start[n] rows of each sequence of a copy of `cache` [S, D]; uint8 is Q8_0."""
    kind = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint8): Q8_0}[cache.dtype]
    cache = cache.copy()
    offsets = np.array([0, len(x)] if offsets is None else offsets, np.int64)
    kv_offsets = np.array([0, len(cache)] if kv_offsets is None else kv_offsets, np.int64)
    stored = cache.view(np.uint16) if kind == 1 else cache
    kl._core.cache_append(ctx._core, stored, kind, x, offsets, np.atleast_1d(np.asarray(start, np.int64)), kv_offsets,
                          len(offsets) - 1, *x.shape, len(cache))
    return cache


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("T, D, start", [(0, 32, 2), (1, 32, 0), (5, 64, 509), (3, 320, 1029)])
def test_hip_cache_append_has_the_bytes_of_the_cpu(T, D, start, dtype, version):
    x = normal(T, D, scale=3)
    cache = np.full((start + T + 2, D // 32 * 34 if dtype == np.uint8 else D), 7, dtype)
    got = everywhere(lambda ctx: append(cache, x, start, ctx))
    assert got.tobytes() == append(cache, x, start, kl.Context()).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hip_cache_append_each_sequence_behind_its_own(dtype, version):
    given = dict(x=normal(9, 5), start=[2, 0, 6], offsets=[0, 4, 4, 9], kv_offsets=[0, 7, 8, 20])
    cache = np.zeros((20, 5), dtype)
    got = everywhere(lambda ctx: append(cache, ctx=ctx, **given))
    assert got.tobytes() == append(cache, ctx=kl.Context(), **given).tobytes()


def test_hip_float16_is_to_nearest_even_for_every_float16_and_its_neighbours(version):
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact[:-1] + exact[1:]) / 2
    beside = [np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9e9))]
    x = np.concatenate([exact, middle, *beside, [65519.9, 1e-45, np.inf]])
    x = np.concatenate([x, -x, [np.nan]]).astype(np.float32)[None]
    got = append(np.zeros(x.shape, np.float16), x, 0, context())
    assert np.array_equal(got.view(np.uint16)[:, :-1], x.astype(np.float16).view(np.uint16)[:, :-1])
    assert np.isnan(got[0, -1])


def test_hip_q8_0_rims_have_the_bytes_of_the_cpu(version):
    x = np.zeros((8, 32), np.float32)
    x[0, :5] = [127, 0.5, -0.5, 2.5, -2.5]
    x[1, 3] = -0.0
    x[2, 0] = np.nextafter(np.float32(127 * 65520), np.float32(0))
    x[3] = -1e-6
    x[4] = 1e-40
    x[5, 2], x[6, 2], x[7, 2] = np.nan, np.inf, -np.inf
    cache = np.full((8, 34), 7, np.uint8)
    assert append(cache, x, 0, context()).tobytes() == append(cache, x, 0, kl.Context()).tobytes()


@pytest.mark.parametrize("dtype, word, largest", [(np.float16, "float16", 65520), (np.uint8, "q8_0", 8.4e6)])
def test_hip_what_a_cache_cannot_hold_is_refused_and_nothing_written(dtype, word, largest):
    x = normal(700, 64)
    x[650, 7], x[690, 2] = largest, -1e30
    kind = 1 if dtype == np.float16 else Q8_0
    cache = np.zeros((700, 64 if kind == 1 else 68), np.uint16 if kind == 1 else np.uint8)
    at = [np.array(a, np.int64) for a in ([0, 700], [0], [0, 700])]
    with pytest.raises(ValueError, match=rf"x\[650, 7\] is .*, too large for a {word} cache"):
        kl._core.cache_append(context()._core, cache, kind, x, *at, 1, 700, 64, 700)
    assert not cache.any()


# ---- attention ----


def grouped(T, S, H, Hkv, K, V, dtype=np.float32, seed=0, size=1.0):
    return dict(q=normal(T, H, K, scale=size, seed=seed), k=normal(S, Hkv, K, seed=seed + 1).astype(dtype),
                v=normal(S, Hkv, V, seed=seed + 2).astype(dtype), scale=K**-0.5)


def latent(T, S, H, K, P, V, R, dtype=np.float32, seed=0, size=1.0, weights=np.float32):
    return dict(q=normal(T, H, K + P, scale=size, seed=seed), latent=normal(S, R, seed=seed + 1).astype(dtype),
                k_shared=normal(S, P, seed=seed + 2).astype(dtype), scale=(K + P) ** -0.5,
                w_uk=normal(H, K, R, scale=R**-0.5, seed=seed + 3).astype(weights),
                w_uv=normal(H, V, R, scale=R**-0.5, seed=seed + 4).astype(weights))


def check(op, given, **options):
    """Within budget, same bytes everywhere, nothing written outside."""
    ref = getattr(kl.reference, op)(**given, **options)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert getattr(kl.ops, op)(**given, **options, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge(op, got, ref, **given, **options)
    return got


def both(T, S, **options):
    """The op's name and inputs, of small heads."""
    return [("attention", grouped(T, S, **GROUPED, **options)), ("latent_attention", latent(T, S, **LATENT, **options))]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 65), (5, 5), (17, 17), (3, 130)])
def test_hip_attention_within_budget(T, S, dtype, version):
    for op, given in both(T, S, dtype=dtype):
        check(op, given)


@pytest.mark.parametrize("S", [512, 513, 1030])
def test_hip_attention_page_borders(S, version):
    check("attention", grouped(3, S, 2, 1, 4, 6))
    check("latent_attention", latent(3, S, 2, 4, 2, 4, 6))


@pytest.mark.parametrize("H, Hkv, K, V", [(1, 1, 1, 1), (3, 1, 15, 33), (7, 7, 8, 40), (8, 1, 8, 300), (34, 2, 4, 16),
                                          (2, 1, 4, 520)])
def test_hip_attention_widths_and_heads(H, Hkv, K, V, version):
    check("attention", grouped(3, 70, H, Hkv, K, V))


@pytest.mark.parametrize("H, K, P, V, R", [(1, 1, 0, 1, 1), (2, 17, 5, 33, 40), (20, 8, 16, 8, 32),
                                           (1, 16, 0, 16, 300)])
def test_hip_latent_attention_widths_and_heads(H, K, P, V, R, version):
    check("latent_attention", latent(3, 70, H, K, P, V, R))


@pytest.mark.parametrize("weights", [np.float16, bfloat16])
def test_hip_latent_attention_of_narrow_weights(weights, version):
    given = latent(10, 40, **LATENT, weights=weights)
    check("latent_attention", given)


def test_hip_latent_attention_batches():
    """300 absorbed tokens are two batches."""
    given = latent(300, 310, 1, 4, 2, 4, 8)
    judge("latent_attention", kl.ops.latent_attention(**given, form="absorbed", ctx=context()),
          kl.reference.latent_attention(**given), **given)


@pytest.mark.parametrize("size", [0.0, 8.0, 60.0])
def test_hip_attention_flat_and_sharp(size, version):
    for op, given in both(9, 150, size=size):
        check(op, given)


@pytest.mark.parametrize("rise", [1, -1])
def test_hip_attention_running_maximum_that_moves_in_every_block(rise, version):
    given = grouped(2, 700, 2, 1, 4, 4)
    given["q"][:] = 1
    given["k"][:] = rise * np.linspace(-20, 20, 700, dtype=np.float32)[:, None, None]
    check("attention", given)


def test_hip_half_cache_is_its_widening(version):
    for op, given in both(20, 130, dtype=np.float16):
        wide = given | {n: a.astype(np.float32) for n, a in given.items() if getattr(a, "dtype", 0) == np.float16}
        assert (getattr(kl.ops, op)(**given, ctx=context()).tobytes()
                == getattr(kl.ops, op)(**wide, ctx=context()).tobytes())


def test_hip_q8_0_cache_is_its_widening(version):
    T, S, H, Hkv, K, V = 5, 80, 4, 2, 64, 32
    given = grouped(T, S, H, Hkv, K, V)
    stored = {n: kl.ops.quantize(given[n].reshape(S, -1), "Q8_0") for n in "kv"}
    wide = {n: kl.ops.dequantize(q).reshape(given[n].shape) for n, q in stored.items()}
    blocks = {n: np.ascontiguousarray(q.data).view(np.uint8).reshape(S, -1) for n, q in stored.items()}

    def of_blocks(ctx):
        out = np.empty((T, H, V), np.float32)
        kl._core.attention(ctx._core, out, given["q"], blocks["k"], Q8_0, blocks["v"], Q8_0, np.array([0, T]),
                           np.array([0, S]), (1, T, S, H, Hkv, K, V), given["scale"])
        return out

    assert everywhere(of_blocks).tobytes() == kl.ops.attention(**given | wide, ctx=context()).tobytes()


def test_hip_attention_ragged_batch_is_each_alone(version):
    lengths = [(1, 1), (0, 0), (7, 7), (3, 600), (0, 9), (20, 30), (1, 530)]
    offsets, kv_offsets = (np.cumsum([0] + [pair[i] for pair in lengths]) for i in (0, 1))
    for op, of in (("attention", lambda T, S, i: grouped(T, S, 2, 1, 4, 6, seed=i)),
                   ("latent_attention", lambda T, S, i: latent(T, S, 2, 4, 2, 4, 6, seed=10 * i))):
        parts = [of(T, S, i) for i, (T, S) in enumerate(lengths)]
        names = "qkv" if op == "attention" else ("q", "latent", "k_shared")
        weights = {n: parts[0][n] for n in ("w_uk", "w_uv") if n in parts[0]}
        given = parts[0] | {n: np.concatenate([p[n] for p in parts]) for n in names}
        got = check(op, given, offsets=offsets, kv_offsets=kv_offsets)
        for part, o in zip(parts, kl.unpack(got, offsets), strict=True):
            assert o.tobytes() == getattr(kl.ops, op)(**part | weights, ctx=context()).tobytes()


@pytest.mark.parametrize("depth", [0, 500])
@pytest.mark.parametrize("cuts", [[1], [7, 8, 30], [20]])
def test_hip_attention_any_split_keeps_bytes(depth, cuts):
    T = 40
    for op, given in (("attention", grouped(T, depth + T, 4, 2, 4, 6)),
                      ("latent_attention", latent(T, depth + T, 2, 4, 2, 4, 6) | dict(form="absorbed"))):
        whole = getattr(kl.ops, op)(**given, ctx=context())
        cached = "kv" if op == "attention" else ("latent", "k_shared")
        for first, last in zip([0, *cuts], [*cuts, T], strict=True):
            part = given | {n: given[n][: depth + last] for n in cached} | dict(q=given["q"][first:last])
            assert getattr(kl.ops, op)(**part, ctx=context()).tobytes() == whole[first:last].tobytes()


def test_hip_segments_as_tasks_give_the_bytes_of_one_task():
    """256 tiles of one task each, against one whose two segments are tasks."""
    given = grouped(256, 520, 16, 1, 2, 2)
    set_up(host_library(), checks=False)
    try:
        whole = kl.ops.attention(**given, ctx=context())
    finally:
        set_up(host_library())
    last = kl.ops.attention(**given | dict(q=given["q"][-1:]), ctx=context())
    assert last.tobytes() == whole[-1:].tobytes()
    judge("attention", whole, kl.reference.attention(**given), **given)


def test_hip_negative_zero_is_not_touched_by_pages_that_others_see():
    given = grouped(40, 530, 2, 1, 4, 6)
    given["v"][:] = -0.0
    whole = kl.ops.attention(**given, ctx=context())
    part = given | dict(q=given["q"][:20], k=given["k"][:510], v=given["v"][:510])
    assert whole[:20].tobytes() == kl.ops.attention(**part, ctx=context()).tobytes()


def test_hip_attention_of_no_tokens(version):
    for S in (0, 5):
        for op, given in both(0, S):
            assert getattr(kl.ops, op)(**given, ctx=context()).size == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hip_nan_reaches_only_those_who_see_it(value, version):
    for op, given in both(8, 540):
        given["q"][..., -6] = np.abs(given["q"][..., -6])
        clean = getattr(kl.ops, op)(**given, ctx=context())
        where = given["k"][:, :, -6] if op == "attention" else given["k_shared"][:, None, -6]
        where[536] = value
        got = everywhere(lambda ctx, op=op, given=given: getattr(kl.ops, op)(**given, ctx=ctx))
        assert got[:4].tobytes() == clean[:4].tobytes() and np.isnan(got[4:]).all()


def test_hip_positions_masked_by_minus_infinity(version):
    given = grouped(1, 600, 2, 1, 4, 6)
    given["q"][:] = 1
    given["k"][:560] = -np.inf
    with np.errstate(invalid="ignore"):
        ref = kl.reference.attention(**given)
    np.testing.assert_allclose(everywhere(lambda ctx: kl.ops.attention(**given, ctx=ctx)), ref, rtol=1e-4, atol=1e-6)
    given["k"][:] = -np.inf
    assert np.isnan(kl.ops.attention(**given, ctx=context())).all()


@pytest.mark.parametrize("change, message", [
    (dict(scale=np.nan), "scale is nan"), (dict(offsets=[0, 2]), "offsets ends at 2; it must end at T = 4"),
])
def test_hip_attention_errors_are_sentences(change, message):
    for op, given in both(4, 10):
        with pytest.raises(ValueError, match=message):
            getattr(kl.ops, op)(**given | change, ctx=context())
