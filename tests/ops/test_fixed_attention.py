"""Attention in 16-bit fixed point (activations other than float32): the definition of docs/math.md#fixed in NumPy, its
bound, the laws, and rows that float32's range is too small for."""

import functools

import judge
import numpy as np
import pytest
from judge import guarded
from test_latent_attention import FORMS, SMALL, WIDE, inputs, ragged, run

import kimi_linear as kl

ONE = 32700.0
CONTEXTS = [kl.Context(isa=isa, threads=n, activations="int8") for isa in kl.isa_list() for n in (1, 3)]
REAL = dict(H=2, K=128, P=64, V=128, R=512)
everywhere = functools.partial(judge.everywhere, contexts=CONTEXTS)


def fixed(x):
    """Integers and units of rows."""
    unit = np.linalg.norm(x, axis=-1, keepdims=True) / ONE
    return np.rint(np.divide(x, unit, out=np.zeros_like(x), where=unit > 0)), unit


def attend(q, k, v, v_unit, sees):
    """q, k and v in integers with their units; one head, scores already scaled. Page by page is one sum here."""
    (Q, q_unit), (X, k_unit) = q, k
    z = np.where(sees, Q @ X.T * (q_unit * k_unit.T), -np.inf)
    m, l, acc = np.full((len(Q), 1), -np.inf), 0.0, 0.0
    for s in range(0, len(X), 64):
        block = slice(s, s + 64)
        now = np.maximum(m, z[:, block].max(1, keepdims=True))
        shift = np.where(np.isfinite(now), now, 0.0)
        keep, p = np.exp(m - shift), np.exp(z[:, block] - shift)
        w = p * v_unit[block].T
        total = w.sum(1, keepdims=True)
        W = np.rint(np.divide(w * ONE, total, out=np.zeros_like(w), where=total > 0))
        m, l, acc = now, l * keep + p.sum(1, keepdims=True), acc * keep + W @ v[block] * (total / ONE)
    return acc / l


def twin(q, latent, k_shared, w_uk, w_uv, scale, form):
    """The definition, in float64 but for the integers."""
    q, latent, k_shared, w_uk, w_uv = (np.asarray(x, np.float64) for x in (q, latent, k_shared, w_uk, w_uv))
    T, S, K = len(q), len(latent), w_uk.shape[1]
    sees = np.arange(S) < S - T + 1 + np.arange(T)[:, None]
    o = np.empty((T, *w_uv.shape[:2]))
    for h in range(w_uk.shape[0]):
        if form == "absorbed":
            X, unit = fixed(np.hstack([latent, k_shared]))
            query = np.hstack([q[:, h, :K] @ w_uk[h], q[:, h, K:]])
            Q, q_unit = fixed(query)
            V = X[:, :latent.shape[1]]
            o[:, h] = attend((Q, q_unit * scale), (X, unit), V, unit, sees) @ w_uv[h].T
        else:
            (C, c_unit), (Uk, k_unit), (Uv, v_unit) = fixed(latent), fixed(w_uk[h]), fixed(w_uv[h])
            key = np.hstack([C @ Uk.T * c_unit * k_unit.T, k_shared])
            V, unit = fixed(C @ Uv.T * c_unit * v_unit.T)
            Q, q_unit = fixed(q[:, h])
            o[:, h] = attend((Q, q_unit * scale), fixed(key), V, unit, sees)
    return o


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def assert_is(wanted, got, ref):
    """float32 turns a few halves the other way: one step in a hundred or less, far from what a step costs."""
    assert rms(got - wanted) <= 0.6 * rms(wanted - ref) + 1e-6 * rms(ref)


def bound(q, latent, k_shared, w_uk, w_uv, scale, form):
    """docs/math.md#fixed: the largest error of each element, to first order; float32's own is a thousandth of it."""
    q, latent, k_shared, w_uk, w_uv = (np.asarray(x, np.float64) for x in (q, latent, k_shared, w_uk, w_uv))
    T, S, (H, K, _) = len(q), len(latent), w_uk.shape
    sees = np.arange(S) < S - T + 1 + np.arange(T)[:, None]

    def off(x, y):  # of every product of rows of x and rows of y
        step = [0.51 * np.linalg.norm(a, axis=-1) / ONE for a in (x, y)]
        return (step[0][:, None] * np.abs(y).sum(-1) + np.abs(x).sum(-1)[:, None] * step[1]
                + x.shape[-1] * step[0][:, None] * step[1])

    o = np.empty((T, H, w_uv.shape[1]))
    for h in range(H):
        value = latent @ w_uv[h].T
        key = np.hstack([latent @ w_uk[h].T, k_shared])
        z = np.where(sees, scale * q[:, h] @ key.T, -np.inf)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        if form == "absorbed":
            query, row = np.hstack([q[:, h, :K] @ w_uk[h], q[:, h, K:]]), np.hstack([latent, k_shared])
            e, content, unit = off(query, row), latent, np.linalg.norm(row, axis=1) / ONE
            of_values = np.broadcast_to(0.51 * unit[:, None], latent.shape)
        else:
            e = off(q[:, h], key) + np.abs(q[:, h, :K]) @ off(latent, w_uk[h]).T
            content, unit = value, np.linalg.norm(value, axis=1) / ONE
            of_values = off(latent, w_uv[h]) + 0.51 * unit[:, None]
        out = p @ content
        error = np.zeros_like(out)
        for t in range(T):
            error[t] = (p[t] * np.abs(scale) * e[t]) @ np.abs(content - out[t]) + p[t] @ of_values
            for s in range(0, S, 64):
                at = slice(s, s + 64)
                seen = np.abs(content[at]) / np.where(unit[at] > 0, unit[at], 1)[:, None] * sees[t, at][:, None]
                error[t] += 0.51 / ONE * (p[t, at] @ unit[at]) * seen.sum(0)
        o[:, h] = error @ np.abs(w_uv[h]).T if form == "absorbed" else error
    return o


SHAPES = [(1, 1), (1, 65), (5, 5), (17, 17), (64, 64), (70, 130), (3, 600)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", SHAPES)
def test_is_its_definition_and_within_its_bound(T, S, dtype):
    for shape in (SMALL, dict(H=17, K=15, P=17, V=31, R=33), dict(H=2, K=16, P=0, V=16, R=16)):
        given = inputs(T, S, **shape, dtype=dtype)
        ref = kl.reference.latent_attention(**given)
        before = {name: np.copy(value) for name, value in given.items()}
        for form in FORMS[1:]:
            def guarded_run(ctx, form=form, given=given, ref=ref):
                out, untouched = guarded(ref.shape)
                run(given, ctx, form=form, out=out)
                untouched()
                return out.copy()

            got = everywhere(guarded_run)
            assert_is(twin(**given, form=form), got, ref)
            assert (np.abs(got - ref) <= 1.02 * bound(**given, form=form) + 1e-5 * rms(ref)).all()
        assert all(np.array_equal(value, given[name]) for name, value in before.items())


@pytest.mark.parametrize("form", FORMS[1:])
def test_real_widths(form):
    given = inputs(20, 300, **REAL, dtype=np.float16)
    got, ref = run(given, CONTEXTS[-1], form=form), kl.reference.latent_attention(**given)
    assert_is(twin(**given, form=form), got, ref)
    assert 1e-5 * rms(ref) < rms(got - ref) < 1e-3 * rms(ref)
    assert (np.abs(got - ref) <= 1.02 * bound(**given, form=form)).all()


def test_float32_activations_stay_float32():
    given = inputs(20, 300, **WIDE)
    for form in FORMS:
        exact, narrow = run(given, form=form), run(given, CONTEXTS[-1], form=form)
        assert exact.tobytes() != narrow.tobytes()
        assert narrow.tobytes() == run(given, kl.Context(activations="bfloat16"), form=form).tobytes()


# ---- the laws of the other kind hold ----


@pytest.mark.parametrize("form", FORMS)
def test_ragged_batch_is_each_alone(form):
    ragged(CONTEXTS, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [0, 37, 500])
def test_split_at_multiples_of_64_keeps_bytes(form, depth):
    given = inputs(200, depth + 200, **SMALL)
    whole = run(given, CONTEXTS[-1], form=form)
    for first, last in ((0, 64), (64, 192), (192, 200)):
        part = given | dict(q=given["q"][first:last], latent=given["latent"][: depth + last],
                            k_shared=given["k_shared"][: depth + last])
        assert run(part, CONTEXTS[-1], form=form).tobytes() == whole[first:last].tobytes()


def test_many_segments_in_several_waves():
    given = inputs(2, 40 * 512 + 3, 1, 4, 2, 4, 8)
    got = everywhere(lambda ctx: run(given, ctx, form="absorbed"))
    ref = kl.reference.latent_attention(**given)
    assert (np.abs(got - ref) <= 1.02 * bound(**given, form="absorbed") + 1e-5 * rms(ref)).all()


# ---- the rim ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["latent", "k_shared"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_for_those_who_see_it(form, where, value):
    given = inputs(90, 700, **SMALL)
    clean = run(given, CONTEXTS[-1], form=form)
    given[where][670, 2] = value
    got = everywhere(lambda ctx: run(given, ctx, form=form))
    sees = np.arange(90) + 700 - 90 >= 670
    assert got[~sees].tobytes() == clean[~sees].tobytes()
    assert np.isnan(got[sees]).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_what_is_not_seen_changes_nothing(form):
    given = inputs(90, 700, **SMALL)
    clean = run(given, CONTEXTS[-1], form=form)
    given["latent"][670:] *= 1e4
    assert run(given, CONTEXTS[-1], form=form)[: 670 - 610].tobytes() == clean[: 670 - 610].tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_nan_of_a_query_stays_in_its_head(form):
    given = inputs(20, 80, **SMALL)
    clean = run(given, CONTEXTS[-1], form=form)
    given["q"][7, 1, 3] = np.nan
    got = run(given, CONTEXTS[-1], form=form)
    assert np.isnan(got[7, 1]).all()
    got[7, 1] = clean[7, 1]
    assert got.tobytes() == clean.tobytes()


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("size", [1e-33, 1e-28, 1e-18, 1e12, 1e18])
def test_sizes_whose_squares_leave_float32(form, size):
    """Queries are as small as keys are large: the scores are ordinary."""
    given = inputs(20, 150, **SMALL)
    for name in ("latent", "k_shared"):
        given[name] *= np.float32(size)
    given["q"] /= np.float32(size)
    got, ref = everywhere(lambda ctx: run(given, ctx, form=form)), kl.reference.latent_attention(**given)
    assert rms(got / size - ref / size) < 1e-3 * rms(ref / size)


@pytest.mark.parametrize("form", FORMS[1:])
def test_rows_of_unlike_sizes_and_of_zeros(form):
    given = inputs(20, 200, **SMALL)
    given["latent"] *= np.logspace(-12, 3, 200, dtype=np.float32)[:, None]
    given["latent"][30:40] = 0
    given["k_shared"][35:45] = 0
    given["q"][3] = 0
    got, ref = everywhere(lambda ctx: run(given, ctx, form=form)), kl.reference.latent_attention(**given)
    assert (np.abs(got - ref) <= 1.02 * bound(**given, form=form) + 1e-5 * rms(ref)).all()


def test_one_value_that_towers_over_its_row():
    """A norm leaves the others what a largest value would: no more than half a 32,700th of it."""
    given = inputs(20, 200, **SMALL)
    given["latent"][:, 5] = 1e3
    given["w_uk"][:, :, 5] *= 1e-3
    given["w_uv"][:, :, 5] *= 1e-3
    for form in FORMS[1:]:
        got, ref = run(given, CONTEXTS[-1], form=form), kl.reference.latent_attention(**given)
        assert (np.abs(got - ref) <= 1.02 * bound(**given, form=form) + 1e-5 * rms(ref)).all()


@pytest.mark.parametrize("size", [0.0, 8.0, 60.0])
def test_flat_and_sharp_softmax(size):
    given = inputs(20, 150, **SMALL, size=size)
    for form in FORMS[1:]:
        got, ref = everywhere(lambda ctx, form=form: run(given, ctx, form=form)), kl.reference.latent_attention(**given)
        assert (np.abs(got - ref) <= 1.02 * bound(**given, form=form) + 1e-5 * rms(ref)).all()


# ---- grouped queries ----

GROUPS = [dict(H=4, Hkv=2, K=12, V=20), dict(H=8, Hkv=1, K=16, V=16), dict(H=40, Hkv=2, K=33, V=31),
          dict(H=3, Hkv=3, K=7, V=130)]


def grouped(T, S, dtype, H, Hkv, K, V, seed=0):
    rng = np.random.default_rng([seed, T, S, H])
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((T, H, K), (S, Hkv, K), (S, Hkv, V)))
    return dict(q=q, k=k.astype(dtype), v=v.astype(dtype), scale=K**-0.5)


def grouped_twin(q, k, v, scale):
    """The first tokens, of pieces longer than 16, in fixed point; the others in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (T, H, _), S = q.shape, len(k)
    fixed_tokens = T if T % 64 > 16 else T - T % 64
    sees = np.arange(S) < S - T + 1 + np.arange(T)[:, None]
    o = kl.reference.attention(q, k, v, scale=scale)
    for h in range(H):
        c = h // (H // k.shape[1])
        Q, q_unit = fixed(q[:, h])
        V, unit = fixed(v[:, c])
        o[:fixed_tokens, h] = attend((Q, q_unit * scale), fixed(k[:, c]), V, unit, sees)[:fixed_tokens]
    return o


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 70), (16, 40), (17, 17), (64, 64), (70, 130), (100, 1100), (300, 300)])
def test_grouped_queries_are_the_definition(T, S, dtype):
    for shape in GROUPS:
        given = grouped(T, S, dtype, **shape)
        ref = kl.reference.attention(**given)
        got = everywhere(lambda ctx, given=given: kl.ops.attention(**given, ctx=ctx))
        assert_is(grouped_twin(**given), got, ref)
        assert rms(got - ref) < 1e-3 * rms(ref)


def test_short_pieces_of_grouped_queries_stay_float32():
    for T in (1, 16):
        given = grouped(T, 90, np.float16, **GROUPS[0])
        assert kl.ops.attention(**given, ctx=CONTEXTS[-1]).tobytes() == kl.ops.attention(**given).tobytes()


@pytest.mark.parametrize("shape", GROUPS)
def test_grouped_queries_split_and_batched(shape):
    given = grouped(200, 237, np.float32, **shape)
    whole = kl.ops.attention(**given, ctx=CONTEXTS[-1])
    for first, last in ((0, 64), (64, 192), (192, 200)):
        part = given | dict(q=given["q"][first:last], k=given["k"][: 37 + last], v=given["v"][: 37 + last])
        assert kl.ops.attention(**part, ctx=CONTEXTS[-1]).tobytes() == whole[first:last].tobytes()
    lengths = [(70, 70), (1, 9), (0, 4), (20, 700)]
    parts = [grouped(T, S, np.float32, **shape, seed=i) for i, (T, S) in enumerate(lengths)]
    joined = {name: np.concatenate([p[name] for p in parts]) for name in "qkv"} | dict(scale=given["scale"])
    offsets, kv_offsets = (np.cumsum([0] + [len(p[name]) for p in parts]) for name in "qk")
    got = everywhere(lambda ctx: kl.ops.attention(**joined, offsets=offsets, kv_offsets=kv_offsets, ctx=ctx))
    for part, o in zip(parts, kl.unpack(got, offsets), strict=True):
        assert o.tobytes() == kl.ops.attention(**part, ctx=CONTEXTS[-1]).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_grouped_queries_leave_what_they_do_not_see(value):
    given = grouped(90, 700, np.float32, **GROUPS[0])
    clean = kl.ops.attention(**given, ctx=CONTEXTS[-1])
    for name in "kv":
        spoilt = given | {name: given[name].copy()}
        spoilt[name][670, 1, 2] = value
        got = everywhere(lambda ctx, spoilt=spoilt: kl.ops.attention(**spoilt, ctx=ctx))
        sees = np.arange(90) + 700 - 90 >= 670
        assert got[~sees].tobytes() == clean[~sees].tobytes() and got[:, :2].tobytes() == clean[:, :2].tobytes()
        assert np.isnan(got[sees][:, 2:]).all()
