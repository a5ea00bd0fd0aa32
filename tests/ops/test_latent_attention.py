"""latent_attention: budget in both forms, page borders, splits, ragged batches, NaN, same bytes."""

import numpy as np
import pytest
from judge import CONTEXTS, everywhere, guarded, judge
from ml_dtypes import bfloat16

import kimi_linear as kl

FAST = [ctx for ctx in CONTEXTS if ctx.isa != "scalar"] or CONTEXTS
FORMS = ["auto", "absorbed", "expanded"]
SMALL = dict(H=3, K=12, P=8, V=20, R=24)
WIDE = dict(H=2, K=32, P=16, V=32, R=48)


def inputs(T, S, H, K, P, V, R, dtype=np.float32, seed=0, size=1.0):
    rng = np.random.default_rng([seed, T, S, H])

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    return dict(q=normal(T, H, K + P, scale=size), latent=normal(S, R).astype(dtype),
                k_shared=normal(S, P).astype(dtype), w_uk=normal(H, K, R, scale=R**-0.5),
                w_uv=normal(H, V, R, scale=R**-0.5), scale=(K + P) ** -0.5)


def run(given, ctx=None, **options):
    return kl.ops.latent_attention(**given, **options, ctx=ctx)


def check(given, **options):
    """Within budget in every form, same bytes everywhere, nothing written outside, inputs unchanged."""
    before = {k: np.copy(v) for k, v in given.items()}
    ref = kl.reference.latent_attention(**given, **{k: v for k, v in options.items() if k != "form"})
    for form in [options.pop("form")] if "form" in options else FORMS:
        def guarded_run(ctx, form=form):
            out, untouched = guarded(ref.shape)
            assert run(given, ctx, form=form, out=out, **options) is out
            untouched()
            return out.copy()

        judge("latent_attention", everywhere(guarded_run), ref, **given, **options)
    for name, value in before.items():
        assert np.array_equal(value, given[name]), f"latent_attention changed {name}"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 63), (2, 64), (1, 65), (5, 5), (16, 70), (17, 17), (64, 64),
                                  (65, 130)])
def test_within_budget(T, S, dtype):
    check(inputs(T, S, **SMALL, dtype=dtype))


@pytest.mark.parametrize("S", [511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_page_borders(S, dtype):
    check(inputs(3, S, **SMALL, dtype=dtype))


@pytest.mark.parametrize("H, K, P, V, R", [
    (1, 1, 1, 1, 1), (2, 16, 0, 16, 16), (4, 15, 17, 31, 33), (5, 33, 1, 16, 15), (9, 4, 4, 4, 8),
    (17, 8, 8, 8, 16), (9, 4, 20, 4, 1010),
])
def test_widths_and_heads(H, K, P, V, R):
    check(inputs(19, 90, H, K, P, V, R))


def test_real_widths():
    given = inputs(3, 600, 2, 128, 64, 128, 512)
    ref = kl.reference.latent_attention(**given)
    for form in ("absorbed", "expanded"):
        best = [run(given, ctx, form=form) for ctx in FAST]
        assert len({o.tobytes() for o in best}) == 1
        judge("latent_attention", best[0], ref, **given)


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
    given["k_shared"][:] = rise * np.linspace(-20, 20, 700, dtype=np.float32)[:, None]
    check(given)


@pytest.mark.parametrize("kind", [np.float16, bfloat16])
def test_weights_of_narrow_types_are_their_widening(kind):
    given = inputs(70, 90, **SMALL)
    narrow = given | dict(w_uk=given["w_uk"].astype(kind), w_uv=given["w_uv"].astype(kind))
    wide = narrow | dict(w_uk=narrow["w_uk"].astype(np.float32), w_uv=narrow["w_uv"].astype(np.float32))
    for form in FORMS:
        assert run(narrow, form=form).tobytes() == run(wide, form=form).tobytes()
    check(narrow, form="auto")


def test_half_cache_is_its_widening():
    given = inputs(70, 600, **SMALL, dtype=np.float16)
    wide = given | {name: given[name].astype(np.float32) for name in ("latent", "k_shared")}
    for form in FORMS:
        assert run(given, form=form).tobytes() == run(wide, form=form).tobytes()


# ---- laws ----


def packed(parts):
    """Several sequences as one ragged call."""
    joined = {name: np.concatenate([p[name] for p in parts]) for name in ("q", "latent", "k_shared")}
    offsets, kv_offsets = (np.cumsum([0] + [len(p[name]) for p in parts]) for name in ("q", "latent"))
    return parts[0] | joined, dict(offsets=offsets, kv_offsets=kv_offsets)


def ragged(contexts, form):
    """A ragged call whose sequences are equal to themselves alone, with contexts[-1]: the call's arguments, result."""
    lengths = [(1, 1), (0, 0), (70, 70), (3, 600), (0, 9), (20, 30), (64, 513), (16, 16), (129, 140)]
    parts = [inputs(T, S, **SMALL, seed=i) for i, (T, S) in enumerate(lengths)]
    for part in parts:
        part |= {name: parts[0][name] for name in ("w_uk", "w_uv")}
    given, offsets = packed(parts)
    got = everywhere(lambda ctx: run(given, ctx, form=form, **offsets), contexts)
    for part, o in zip(parts, kl.unpack(got, offsets["offsets"]), strict=True):
        assert o.tobytes() == run(part, contexts[-1], form=form).tobytes()
    return given, offsets, got


@pytest.mark.parametrize("form", FORMS)
def test_ragged_batch_is_each_alone(form):
    given, offsets, got = ragged(CONTEXTS, form)
    ref = kl.reference.latent_attention(**given, **offsets)
    judge("latent_attention", got, ref, **given, **offsets)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [0, 37, 500])
@pytest.mark.parametrize("cuts", [[64], [128], [64, 128, 192], [192]])
def test_split_at_multiples_of_64_keeps_bytes(form, depth, cuts):
    T = 200
    given = inputs(T, depth + T, **SMALL)
    whole = run(given, form=form)
    for first, last in zip([0, *cuts], [*cuts, T], strict=True):
        part = given | dict(q=given["q"][first:last], latent=given["latent"][: depth + last],
                            k_shared=given["k_shared"][: depth + last])
        assert run(part, form=form).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize("T, leading", [(1, 0), (16, 0), (17, 17), (64, 64), (80, 64), (81, 81), (128, 128)])
def test_auto_decides_by_the_piece(T, leading):
    given = inputs(T, T + 20, **WIDE)
    auto, absorbed, expanded = (run(given, form=form) for form in FORMS)
    assert auto[:leading].tobytes() == expanded[:leading].tobytes()
    assert auto[leading:].tobytes() == absorbed[leading:].tobytes()
    assert absorbed.tobytes() != expanded.tobytes()


def test_more_queries_than_a_batch_or_a_chunk():
    given = inputs(1100, 1100, 1, 4, 2, 4, 8)
    ref = kl.reference.latent_attention(**given)
    for form in FORMS:
        outs = [run(given, ctx, form=form) for ctx in FAST]
        assert all(o.tobytes() == outs[0].tobytes() for o in outs)
        judge("latent_attention", outs[0], ref, **given)


def test_many_segments_in_several_waves():
    given = inputs(2, 40 * 512 + 3, 1, 4, 2, 4, 8)
    ref = kl.reference.latent_attention(**given)
    judge("latent_attention", everywhere(lambda ctx: run(given, ctx, form="absorbed")), ref, **given)


def test_batch_axis():
    given = inputs(2 * 20, 2 * 70, **SMALL)
    batch = given | dict(q=given["q"].reshape(2, 20, 3, 20), latent=given["latent"].reshape(2, 70, 24),
                         k_shared=given["k_shared"].reshape(2, 70, 8))
    flat = run(given, offsets=[0, 20, 40], kv_offsets=[0, 70, 140])
    got = run(batch)
    assert got.shape == (2, 20, 3, 20) and got.tobytes() == flat.tobytes()


def test_no_tokens():
    for S in (0, 5):
        assert run(inputs(0, S, **SMALL)).shape == (0, 3, 20)


def test_one_position_gives_its_value():
    given = inputs(1, 1, **WIDE)
    wanted = np.einsum("hvr,sr->shv", given["w_uv"].astype(np.float64), given["latent"])
    for form in FORMS:
        np.testing.assert_allclose(run(given, form=form), wanted, rtol=1e-5, atol=1e-6)


def test_equal_scores_give_the_mean():
    given = inputs(1, 100, **WIDE)
    given["q"][:] = 0
    mean = given["latent"].astype(np.float64).mean(0)
    wanted = np.einsum("hvr,r->hv", given["w_uv"].astype(np.float64), mean)
    for form in FORMS:
        np.testing.assert_allclose(run(given, form=form)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["latent", "k_shared"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_reaches_only_those_who_see_it(form, where, value):
    given = inputs(90, 700, **SMALL)
    given["q"][..., 12 + 2] = np.abs(given["q"][..., 12 + 2])  # an infinite key has the score +inf: inf - inf
    clean = run(given, form=form)
    spoilt = 700 - 30
    given[where][spoilt, 2] = value
    got = everywhere(lambda ctx: run(given, ctx, form=form))
    sees = np.arange(90) + 700 - 90 >= spoilt
    assert got[~sees].tobytes() == clean[~sees].tobytes()
    assert np.isnan(got[sees]).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_of_a_query_stays_in_its_head(form):
    given = inputs(20, 80, **SMALL)
    clean = run(given, form=form)
    given["q"][7, 1, 3] = np.nan
    got = run(given, form=form)
    assert np.isnan(got[7, 1]).all()
    got[7, 1] = clean[7, 1]
    assert got.tobytes() == clean.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("S, masked", [(200, 130), (1300, 1100)])
def test_masked_positions_by_minus_infinity(S, masked, form):
    """Whole blocks, and pages, of scores of -infinity leave the others as they were; nothing but them gives NaN."""
    given = inputs(1, S, **SMALL)
    given["q"][..., 12:] = 1
    given["k_shared"][:masked] = -np.inf
    with np.errstate(invalid="ignore"):
        ref = kl.reference.latent_attention(**given)
    assert np.isfinite(ref).all()
    np.testing.assert_allclose(everywhere(lambda ctx: run(given, ctx, form=form)), ref, rtol=1e-4, atol=1e-6)
    given["k_shared"][:] = -np.inf
    assert np.isnan(run(given, form=form)).all()


# ---- the budget can fail, and so can the arguments ----


def test_budget_catches_wrong_scale_and_wrong_mask():
    given = inputs(8, 300, 2, 128, 64, 128, 512)
    ref = kl.reference.latent_attention(**given)
    wrong = [run(given | dict(scale=576**-0.5)), run(given | dict(scale=128**-0.5))]
    short = given | {name: given[name][:-1] for name in ("latent", "k_shared")}
    wrong.append(run(short))
    for got in wrong:
        with pytest.raises(AssertionError, match="times its budget"):
            judge("latent_attention", got, ref, **given)


G = inputs(4, 10, **SMALL)


@pytest.mark.parametrize("change, error, message", [
    (dict(q=G["q"][:, :2]), ValueError, r"q has shape \[4, 2, 20\]; it must be \[T, 3, 20\]"),
    (dict(q=G["q"].astype(float)), TypeError, "q is float64"),
    (dict(latent=G["latent"][:, :5]), ValueError, r"latent has shape \[10, 5\]; it must be \[S, 24\]"),
    (dict(latent=G["latent"].astype(int)), TypeError, "latent is int64"),
    (dict(k_shared=G["k_shared"][:9]), ValueError, r"k_shared has shape \[9, 8\]; it must be \[10, 8\]"),
    (dict(w_uk=G["w_uk"][0]), ValueError, "w_uk has shape"),
    (dict(w_uv=G["w_uv"][:2]), ValueError, r"w_uv has shape \[2, 20, 24\]; it must be \[3, V, 24\]"),
    (dict(latent=G["latent"][:3], k_shared=G["k_shared"][:3]), ValueError, "sequence 0 has 3 positions"),
    (dict(form="recurrent"), ValueError, "form is 'recurrent'"),
    (dict(scale=np.nan), ValueError, "scale is nan"),
    (dict(offsets=[0, 2]), ValueError, "offsets ends at 2; it must end at T = 4"),
    (dict(offsets=[0, 2, 4]), ValueError, "kv_offsets has 2 values and offsets 3"),
    (dict(offsets=[0, 2, 4], kv_offsets=[0, 1, 10]), ValueError, "sequence 0 has 1 positions for 2 queries"),
    (dict(out=np.zeros((4, 3, 19), np.float32)), ValueError, r"out has shape \[4, 3, 19\]"),
    (dict(out=G["q"]), ValueError, "out shares memory with q"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.latent_attention(**(G | change))


def test_core_refuses_nonsense():
    core = kl.Context()._core
    given = inputs(4, 10, **SMALL)
    weights = [(given[n], 0, *given[n].shape) for n in ("w_uk", "w_uv")]
    offsets, kv_offsets = np.array([0, 4]), np.array([0, 10])
    sizes = (1, 4, 10, 3, 12, 8, 20, 24, 0, 0)

    def call(offsets=offsets, kv_offsets=kv_offsets, sizes=sizes, kind=0, form=0):
        out = np.empty((4, 3, 20), np.float32)
        kl._core.latent_attention(core, out, given["q"], given["latent"], kind, given["k_shared"], 0,
                                  *weights, offsets, kv_offsets, None, sizes, 1.0, form)
        return out

    assert np.isfinite(call()).all()
    for bad, error, message in [
        (dict(kv_offsets=np.array([0, 3])), ValueError, "kv_offsets must rise from 0 to 10"),
        (dict(kv_offsets=np.array([0, 10, 10])), ValueError, "kv_offsets has 3 values"),
        (dict(offsets=np.array([1, 4])), ValueError, "offsets must rise"),
        (dict(sizes=(1, 4, 10, 3, 12, 8, 20, 23, 0, 0)), ValueError, "latent has 240 values.*say 230"),
        (dict(sizes=(1, 4, 10, 3, 10, 10, 20, 24, 0, 0)), ValueError, "k_shared has 80 values"),
        (dict(sizes=(1, 4, 10, 3, 12, -8, 20, 24, 0, 0)), ValueError, "size"),
        (dict(kind=30), TypeError, "latent has storage type 30"),
        (dict(kind=1), TypeError, "latent has items of format 'f'"),
        (dict(form=1), ValueError, "form is 1"),
    ]:
        with pytest.raises(error, match=message):
            call(**bad)
