"""attention: budget, page borders, any split, ragged batches, NaN, float16 and Q8_0 caches, same bytes everywhere."""

import numpy as np
import pytest
from judge import CONTEXTS, everywhere, guarded, judge

import kimi_linear as kl

FAST = [ctx for ctx in CONTEXTS if ctx.isa != "scalar"] or CONTEXTS
SMALL = dict(H=4, Hkv=2, K=12, V=20)


def inputs(T, S, H, Hkv, K, V, dtype=np.float32, seed=0, size=1.0):
    rng = np.random.default_rng([seed, T, S, H])

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return dict(q=normal(T, H, K, scale=size), k=normal(S, Hkv, K).astype(dtype), v=normal(S, Hkv, V).astype(dtype),
                scale=K**-0.5)


def run(given, ctx=None, **options):
    return kl.ops.attention(**given, **options, ctx=ctx)


def check(given, **options):
    """Within budget, same bytes everywhere, nothing written outside, inputs unchanged."""
    before = {name: np.copy(value) for name, value in given.items()}
    ref = kl.reference.attention(**given, **options)

    def guarded_run(ctx):
        out, untouched = guarded(ref.shape)
        assert run(given, ctx, out=out, **options) is out
        untouched()
        return out.copy()

    got = everywhere(guarded_run)
    judge("attention", got, ref, **given, **options)
    for name, value in before.items():
        assert np.array_equal(value, given[name]), f"attention changed {name}"
    return got


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 63), (2, 64), (1, 65), (5, 5), (16, 70), (17, 17), (64, 64), (65, 130)])
def test_within_budget(T, S, dtype):
    check(inputs(T, S, **SMALL, dtype=dtype))


@pytest.mark.parametrize("S", [511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_page_borders(S, dtype):
    check(inputs(3, S, **SMALL, dtype=dtype))


@pytest.mark.parametrize("H, Hkv, K, V", [
    (1, 1, 1, 1), (2, 2, 16, 16), (3, 1, 15, 33), (4, 1, 17, 31), (6, 1, 33, 16), (7, 7, 8, 40), (8, 1, 8, 130),
    (16, 2, 4, 272), (15, 1, 4, 80), (9, 1, 1023, 5), (9, 1, 1030, 5),
])
@pytest.mark.parametrize("T", [1, 19])
def test_widths_and_heads(T, H, Hkv, K, V):
    check(inputs(T, 90, H, Hkv, K, V))


@pytest.mark.parametrize("H", [8, 16])
@pytest.mark.parametrize("T, S", [(1, 1200), (5, 600), (40, 90)])
def test_real_widths(H, T, S):
    given = inputs(T, S, H, 2, 256, 256)
    outs = [run(given, ctx) for ctx in FAST]
    assert len({o.tobytes() for o in outs}) == 1
    judge("attention", outs[0], kl.reference.attention(**given), **given)


@pytest.mark.parametrize("size", [0.0, 1e-30, 8.0, 60.0])
def test_flat_and_sharp_softmax(size):
    check(inputs(20, 150, **SMALL, size=size))


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_scales(scale):
    check(inputs(4, 100, **SMALL) | dict(scale=scale))


@pytest.mark.parametrize("rise", [1, -1])
def test_running_maximum_that_moves_in_every_block(rise):
    given = inputs(2, 700, **SMALL)
    given["q"][:] = 1
    given["k"][:] = rise * np.linspace(-20, 20, 700, dtype=np.float32)[:, None, None]
    check(given)


def test_half_cache_is_its_widening():
    given = inputs(70, 600, **SMALL, dtype=np.float16)
    wide = given | {name: given[name].astype(np.float32) for name in "kv"}
    assert run(given).tobytes() == run(wide).tobytes()


@pytest.mark.parametrize("T", [1, 4, 30])
@pytest.mark.parametrize("narrow", ["k", "v"])
def test_keys_and_values_of_two_types(narrow, T):
    """Few rows read float16 as it lies, but not beside float32."""
    given = inputs(T, 600, **SMALL)
    given[narrow] = given[narrow].astype(np.float16)
    assert check(given).tobytes() == run(given | {narrow: given[narrow].astype(np.float32)}).tobytes()


def test_q8_0_cache_is_its_widening():
    """Blocks that cache_append stores, against the values that they hold."""
    T, S, H, Hkv, K, V = 5, 600, 4, 2, 64, 32
    given = inputs(T, S, H, Hkv, K, V)
    stored = {name: kl.ops.quantize(given[name].reshape(S, -1), "Q8_0") for name in "kv"}
    wide = {name: kl.ops.dequantize(q).reshape(given[name].shape) for name, q in stored.items()}
    blocks = {name: np.ascontiguousarray(q.data).view(np.uint8).reshape(S, -1) for name, q in stored.items()}
    offsets, kv_offsets, sizes = np.array([0, T]), np.array([0, S]), (1, T, S, H, Hkv, K, V)

    def of_blocks(ctx):
        out = np.empty((T, H, V), np.float32)
        kl._core.attention(ctx._core, out, given["q"], blocks["k"], 8, blocks["v"], 8, offsets, kv_offsets, sizes,
                           given["scale"])
        return out

    assert everywhere(of_blocks).tobytes() == run(given | wide).tobytes()
    with pytest.raises(ValueError, match="k.* has heads of 16 values; Q8_0 needs a multiple of 32"):
        out = np.empty((T, H, 16), np.float32)
        half = blocks["k"].reshape(-1)[: S * 34]
        kl._core.attention(CONTEXTS[0]._core, out, given["q"][..., :16].copy(), half, 8, half, 8, offsets, kv_offsets,
                           (1, T, S, H, Hkv, 16, 16), 1.0)


# ---- laws ----


def test_heads_of_a_group_share_keys():
    """As many key heads as query heads, each a copy of its group's: the same bytes."""
    given = inputs(9, 530, 6, 2, 16, 24)
    copied = given | {name: np.repeat(given[name], 3, axis=1) for name in "kv"}
    assert run(given).tobytes() == run(copied).tobytes()


def test_ragged_batch_is_each_alone():
    lengths = [(1, 1), (0, 0), (70, 70), (3, 600), (0, 9), (20, 30), (1, 1100), (64, 513), (129, 140)]
    parts = [inputs(T, S, **SMALL, seed=i) for i, (T, S) in enumerate(lengths)]
    given = parts[0] | {name: np.concatenate([p[name] for p in parts]) for name in "qkv"}
    offsets, kv_offsets = (np.cumsum([0] + [len(p[name]) for p in parts]) for name in "qk")
    got = check(given, offsets=offsets, kv_offsets=kv_offsets)
    for part, o in zip(parts, kl.unpack(got, offsets), strict=True):
        assert o.tobytes() == run(part).tobytes()


@pytest.mark.parametrize("depth", [0, 37, 500, 1000])
@pytest.mark.parametrize("cuts", [[1], [7, 8, 150], [64], [199], [20, 40, 60, 80]])
@pytest.mark.parametrize("H, Hkv", [(4, 2), (3, 3)])
def test_any_split_keeps_bytes(depth, cuts, H, Hkv):
    T = 200
    given = inputs(T, depth + T, H, Hkv, 12, 20)
    whole = run(given)
    for first, last in zip([0, *cuts], [*cuts, T], strict=True):
        part = given | dict(q=given["q"][first:last], k=given["k"][: depth + last], v=given["v"][: depth + last])
        assert run(part).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize("threads", [2, 5])
def test_segments_as_tasks_give_the_bytes_of_one_task(threads):
    """Many pages, few queries: one thread takes a chunk whole, several share its pages in several waves."""
    given = inputs(2, 80 * 512 + 3, 2, 1, 4, 4)
    one, many = (run(given, kl.Context(threads=n)) for n in (1, threads))
    assert one.tobytes() == many.tobytes()
    judge("attention", one, kl.reference.attention(**given), **given)


def test_more_queries_than_a_chunk():
    given = inputs(700, 1100, 2, 1, 4, 4)
    outs = [run(given, ctx) for ctx in FAST]
    assert all(o.tobytes() == outs[0].tobytes() for o in outs)
    judge("attention", outs[0], kl.reference.attention(**given), **given)


def test_negative_zero_is_not_touched_by_pages_that_others_see():
    given = inputs(40, 530, **SMALL)
    given["v"][:] = -0.0
    whole = run(given)
    assert whole[:20].tobytes() == run(given | dict(q=given["q"][:20], k=given["k"][:510],
                                                    v=given["v"][:510])).tobytes()


def test_batch_axis():
    given = inputs(2 * 20, 2 * 70, **SMALL)
    batch = given | dict(q=given["q"].reshape(2, 20, 4, 12), k=given["k"].reshape(2, 70, 2, 12),
                         v=given["v"].reshape(2, 70, 2, 20))
    flat = run(given, offsets=[0, 20, 40], kv_offsets=[0, 70, 140])
    got = run(batch)
    assert got.shape == (2, 20, 4, 20) and got.tobytes() == flat.tobytes()


def test_no_tokens():
    for S in (0, 5):
        assert run(inputs(0, S, **SMALL)).shape == (0, 4, 20)


def test_one_position_gives_its_value():
    given = inputs(1, 1, **SMALL)
    assert np.array_equal(run(given)[0], np.repeat(given["v"][0], 2, axis=0))


def test_equal_scores_give_the_mean():
    given = inputs(1, 700, **SMALL)
    given["q"][:] = 0
    wanted = np.repeat(given["v"].astype(np.float64).mean(0), 2, axis=0)
    np.testing.assert_allclose(run(given)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_reaches_only_those_who_see_it(where, value):
    given = inputs(90, 700, **SMALL)
    given["q"][..., 2] = np.abs(given["q"][..., 2])  # an infinite key has the score +inf: inf - inf
    clean = run(given)
    spoilt = 700 - 30
    given[where][spoilt, 1, 2] = value
    got = everywhere(lambda ctx: run(given, ctx))
    sees = np.arange(90) + 700 - 90 >= spoilt
    assert got[~sees].tobytes() == clean[~sees].tobytes()
    assert got[:, :2].tobytes() == clean[:, :2].tobytes()  # the other key head's
    spread = got[sees][:, 2:] if where == "k" else got[sees][:, 2:, 2]
    assert (np.isnan(spread) if where == "k" or np.isnan(value) else np.isinf(spread)).all()


def test_nan_of_a_query_stays_in_its_head():
    given = inputs(20, 80, **SMALL)
    clean = run(given)
    given["q"][7, 1, 3] = np.nan
    got = run(given)
    assert np.isnan(got[7, 1]).all()
    got[7, 1] = clean[7, 1]
    assert got.tobytes() == clean.tobytes()


@pytest.mark.parametrize("S, masked", [(700, 600), (1300, 1100)])
def test_positions_masked_by_minus_infinity(S, masked):
    """A page, or two, of scores of -infinity leave the others as they were; nothing but them gives NaN."""
    given = inputs(1, S, **SMALL)
    given["q"][:] = 1
    given["k"][:masked] = -np.inf
    with np.errstate(invalid="ignore"):
        ref = kl.reference.attention(**given)
    assert np.isfinite(ref).all()
    np.testing.assert_allclose(everywhere(lambda ctx: run(given, ctx)), ref, rtol=1e-4, atol=1e-6)
    given["k"][:] = -np.inf
    assert np.isnan(run(given)).all()


# ---- the budget can fail, and so can the arguments ----


def test_budget_catches_wrong_scale_mask_and_heads():
    given = inputs(8, 300, 4, 2, 256, 256)
    ref = kl.reference.attention(**given)
    wrong = [run(given | dict(scale=64**-0.5)), run(given | {name: given[name][:-1] for name in "kv"}),
             run(given | {name: np.ascontiguousarray(given[name][:, ::-1]) for name in "kv"})]
    for got in wrong:
        with pytest.raises(AssertionError, match="times its budget"):
            judge("attention", got, ref, **given)


G = inputs(4, 10, **SMALL)


@pytest.mark.parametrize("change, error, message", [
    (dict(q=G["q"][:, :3]), ValueError, "the heads of k must divide those of q"),
    (dict(q=G["q"][0]), ValueError, r"q has shape \[4, 12\]; it must be \[T, H, K\]"),
    (dict(q=G["q"].astype(float)), TypeError, "q is float64"),
    (dict(k=G["k"][..., :5]), ValueError, r"k has shape \[10, 2, 5\]; it must be \[S, Hkv, 12\]"),
    (dict(k=G["k"].astype(int)), TypeError, "k is int64"),
    (dict(v=G["v"][:9]), ValueError, r"v has shape \[9, 2, 20\]; it must be \[10, 2, V\]"),
    (dict(v=G["v"][:, :1]), ValueError, r"v has shape \[10, 1, 20\]; it must be \[10, 2, V\]"),
    (dict(v=G["v"][..., :0]), ValueError, "no axis but the first may be empty"),
    (dict(k=G["k"][:3], v=G["v"][:3]), ValueError, "sequence 0 has 3 positions for 4 queries"),
    (dict(scale=np.nan), ValueError, "scale is nan"),
    (dict(offsets=[0, 2]), ValueError, "offsets ends at 2; it must end at T = 4"),
    (dict(offsets=[0, 2, 4]), ValueError, "kv_offsets has 2 values and offsets 3"),
    (dict(offsets=[0, 2, 4], kv_offsets=[0, 1, 10]), ValueError, "sequence 0 has 1 positions for 2 queries"),
    (dict(out=np.zeros((4, 4, 19), np.float32)), ValueError, r"out has shape \[4, 4, 19\]"),
    (dict(v=G["q"].reshape(-1)[:160].reshape(10, 2, 8), out=G["q"][:, :, :8]), ValueError, "out is strided"),
    (dict(v=np.ones((10, 2, 12), np.float32), out=G["q"]), ValueError, "out shares memory with q"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.attention(**(G | change))


def test_core_refuses_nonsense():
    core = kl.Context()._core
    given = inputs(4, 10, **SMALL)

    def call(offsets=(0, 4), kv_offsets=(0, 10), sizes=(1, 4, 10, 4, 2, 12, 20), kind=0):
        out = np.empty((4, 4, 20), np.float32)
        kl._core.attention(core, out, given["q"], given["k"], kind, given["v"], 0, np.array(offsets),
                           np.array(kv_offsets), sizes, 1.0)
        return out

    assert np.isfinite(call()).all()
    for bad, error, message in [
        (dict(kv_offsets=(0, 3)), ValueError, "kv_offsets must rise from 0 to 10"),
        (dict(offsets=(1, 4)), ValueError, "offsets must rise"),
        (dict(sizes=(1, 4, 10, 4, 2, 12, 19)), ValueError, "out has 320 values"),
        (dict(sizes=(1, 4, 10, 4, 3, 12, 20)), ValueError, "k has 240 values"),
        (dict(sizes=(1, 4, 10, 4, -2, 12, 20)), ValueError, "size"),
        (dict(sizes=(1, 4, 20, 4, 1, 12, 20), kv_offsets=(0, 20)), None, ""),
        (dict(kind=30), TypeError, "k has storage type 30"),
        (dict(kind=1), TypeError, "k has items of format 'f'"),
        (dict(offsets=(0, 4), kv_offsets=(0, 10), sizes=(1, 4, 10, 0, 2, 12, 20)), ValueError, "out has 320 values"),
    ]:
        if error is None:
            assert np.isfinite(call(**bad)).all()
            continue
        with pytest.raises(error, match=message):
            call(**bad)
