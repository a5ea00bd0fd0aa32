"""latent_attention(select=): budget, same bytes, lists of all positions, what is not chosen, errors."""

import numpy as np
import pytest
from judge import CONTEXTS, everywhere, guarded, judge
from test_latent_attention import FAST, SMALL, inputs, packed

import kimi_linear as kl


def rows(T, S, W, seed=0, least=0):
    """For each of T queries, the last of S positions, from `least` to W of those that it sees: [T, W]."""
    rng, select = np.random.default_rng([seed, T, S, W]), np.full((T, W), -1, np.int32)
    for t in range(T):
        seen = S - T + t + 1
        chosen = rng.permutation(seen)[:rng.integers(min(least, seen), min(W, seen) + 1)]
        select[t, :len(chosen)] = np.sort(chosen)
    return select


def every(T, S, W=None):
    """Rows of all positions that each query sees."""
    select = np.full((T, W or S), -1, np.int32)
    for t in range(T):
        select[t, :S - T + t + 1] = np.arange(S - T + t + 1)
    return select


def run(given, ctx=None, **options):
    return kl.ops.latent_attention(**given, **options, ctx=ctx)


def check(given, contexts=CONTEXTS, **options):
    """Within budget, same bytes everywhere, nothing written outside, inputs unchanged."""
    before, ref = {k: np.copy(v) for k, v in given.items()}, kl.reference.latent_attention(**given, **options)

    def guarded_run(ctx):
        out, untouched = guarded(ref.shape)
        assert run(given, ctx, out=out, **options) is out
        untouched()
        return out.copy()

    got = everywhere(guarded_run, contexts)
    judge("latent_attention", got, ref, **given, **options)
    for name, value in before.items():
        assert np.array_equal(value, given[name]), f"latent_attention changed {name}"
    return got


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S, W", [(1, 1, 1), (1, 65, 64), (2, 64, 65), (16, 70, 17), (65, 130, 33), (3, 1030, 16),
                                     (2, 1300, 513), (2, 1300, 1024)])
def test_within_budget(T, S, W, dtype):
    check(inputs(T, S, **SMALL, dtype=dtype) | dict(select=rows(T, S, W)))


@pytest.mark.parametrize("H, K, P, V, R", [(1, 1, 1, 1, 1), (2, 16, 0, 16, 16), (5, 33, 1, 16, 15), (17, 8, 8, 8, 16)])
def test_widths_and_heads(H, K, P, V, R):
    check(inputs(19, 90, H, K, P, V, R) | dict(select=rows(19, 90, 40)))


def test_real_widths():
    given = inputs(2, 900, 2, 256, 0, 256, 512) | dict(select=rows(2, 900, 520, least=515))
    check(given, FAST)


def test_caches_of_two_types():
    given = inputs(9, 100, **SMALL) | dict(select=rows(9, 100, 40))
    check(given | dict(latent=given["latent"].astype(np.float16)))


def test_neighbours_across_the_end_of_a_page():
    """Runs of positions that end before, at and behind a border of pages, which lie apart in a cache."""
    select = [[*range(500, 512), -1, -1], [*range(508, 520), 1023, -1], [*range(512, 524), 1023, 1024]]
    check(inputs(3, 1030, **SMALL) | dict(select=np.array(select, np.int32)))


def test_more_tokens_than_a_batch_and_more_segments_than_a_wave():
    check(inputs(130, 1400, 1, 4, 2, 4, 8) | dict(select=rows(130, 1400, 700)), FAST)


# ---- laws ----


@pytest.mark.parametrize("activations", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (20, 600), (3, 1030)])
def test_a_list_of_all_positions_has_the_bytes_of_none(T, S, dtype, activations):
    given = inputs(T, S, **SMALL, dtype=dtype)
    contexts = [kl.Context(isa=ctx.isa, threads=ctx.threads, activations=activations) for ctx in CONTEXTS]
    dense = run(given, contexts[0], form="absorbed")
    for W in (S, S + 70):
        got = everywhere(lambda ctx, W=W: run(given, ctx, select=every(T, S, W)), contexts)
        assert got.tobytes() == dense.tobytes()


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_query_has_the_bytes_of_a_cache_of_its_positions(dtype, activations):
    """Attention to a list is attention to a cache that holds these rows alone."""
    given, select = inputs(6, 700, **SMALL, dtype=dtype), rows(6, 700, 560, least=1)
    ctx = kl.Context(activations=activations)
    got = run(given, ctx, select=select)
    for t, row in enumerate(select):
        chosen = row[row >= 0]
        alone = given | dict(q=given["q"][t:t + 1], latent=given["latent"][chosen], k_shared=given["k_shared"][chosen])
        assert got[t:t + 1].tobytes() == run(alone, ctx, form="absorbed").tobytes()


@pytest.mark.parametrize("activations", ["float32", "int8", "bfloat16"])
def test_what_is_not_chosen_is_not_read(activations):
    given, select = inputs(20, 640, **SMALL), rows(20, 640, 90)
    ctx = kl.Context(activations=activations)
    clean, unread = run(given, ctx, select=select), np.setdiff1d(np.arange(640), select)
    for value in (np.nan, np.inf):
        spoilt = given | {name: given[name].copy() for name in ("latent", "k_shared")}
        spoilt["latent"][unread], spoilt["k_shared"][unread] = value, value
        assert len(unread) and run(spoilt, ctx, select=select).tobytes() == clean.tobytes()


def test_nan_reaches_those_alone_who_chose_it():
    given, select = inputs(30, 200, **SMALL), rows(30, 200, 60)
    clean = run(given, select=select)
    given["latent"][100, 3] = np.nan
    got, chose = everywhere(lambda ctx: run(given, ctx, select=select)), (select == 100).any(1)
    assert 0 < chose.sum() < 30 and np.isnan(got[chose]).all()
    assert got[~chose].tobytes() == clean[~chose].tobytes()


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_of_no_position_comes_zero(activations):
    given, select = inputs(5, 90, **SMALL), rows(5, 90, 8, least=1)
    given["w_uv"][0, 0, 0] = np.inf  # nothing times infinity is still nothing
    select[[0, 3]] = -1
    contexts = [kl.Context(isa=ctx.isa, threads=ctx.threads, activations=activations) for ctx in CONTEXTS]
    got = everywhere(lambda ctx: run(given, ctx, select=select), contexts)
    assert not got[[0, 3]].any() and not np.signbit(got[[0, 3]]).any()
    assert got[[1, 2, 4], 1:].all()
    assert not run(given, contexts[0], select=np.full((5, 8), -1, np.int32)).any()


def test_one_position_gives_its_value():
    given = inputs(4, 50, **SMALL)
    got = run(given, select=np.array([[7], [0], [48], [49]], np.int32))
    wanted = np.einsum("hvr,sr->shv", given["w_uv"].astype(np.float64), given["latent"][[7, 0, 48, 49]])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# ---- select_from, which the core has and the op has not ----


def core(given, first=0, offsets=None, kv_offsets=None, form=0, ctx=None):
    """The core's call, in which queries that see up to `first` positions attend to all of them."""
    (T, H, _), S, (_, K, R), V = given["q"].shape, len(given["latent"]), given["w_uk"].shape, given["w_uv"].shape[1]
    P, W, out = given["k_shared"].shape[1], given["select"].shape[1], np.full((T, H, V), np.nan, np.float32)
    offsets, kv_offsets = (np.array([0, n]) if o is None else np.asarray(o) for o, n in ((offsets, T), (kv_offsets, S)))
    weights = [(given[n], 0, *given[n].shape) for n in ("w_uk", "w_uv")]
    kl._core.latent_attention((ctx or CONTEXTS[0])._core, out, given["q"], given["latent"], 0, given["k_shared"], 0,
                              *weights, offsets, kv_offsets, given["select"],
                              (len(offsets) - 1, T, S, H, K, P, V, R, W, first), given["scale"], form)
    return out


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("T, S, first", [(100, 100, 40), (100, 100, 99), (100, 130, 64), (17, 90, 200), (5, 70, 68),
                                         (70, 90, 10), (70, 600, 535)])
def test_queries_that_see_no_more_attend_to_all_in_their_own_form(T, S, first, activations):
    """Their rows are not read; expanded are those that would be, but for the ones with a row."""
    contexts = [kl.Context(isa=ctx.isa, threads=ctx.threads, activations=activations) for ctx in CONTEXTS]
    given, dense = inputs(T, S, **SMALL) | dict(select=rows(T, S, 33)), max(0, min(T, first - (S - T)))
    given["select"][:dense] = 99999
    got = everywhere(lambda ctx: core(given, first, ctx=ctx), contexts)
    plain = {n: a for n, a in given.items() if n != "select"}
    assert got[:dense].tobytes() == run(plain, contexts[0])[:dense].tobytes()
    given["select"][:dense] = -1
    assert got[dense:].tobytes() == run(given, contexts[0])[dense:].tobytes()


def test_the_form_of_queries_without_rows_is_kept_in_every_sequence():
    """Sequences of short and long pieces, before, across and behind the position from which there are rows."""
    lengths = [(10, 10), (100, 100), (3, 90), (0, 9), (80, 300), (64, 128)]
    parts = [inputs(T, S, **SMALL, seed=i) | dict(select=rows(T, S, 20, seed=i)) for i, (T, S) in enumerate(lengths)]
    for part in parts:
        part |= {name: parts[0][name] for name in ("w_uk", "w_uv")}
    given, offsets = packed(parts)
    given |= dict(select=np.concatenate([p["select"] for p in parts]))
    for form in (0, 3):
        got = everywhere(lambda ctx, form=form: core(given, 70, **offsets, form=form, ctx=ctx))
        for part, o in zip(parts, kl.unpack(got, offsets["offsets"]), strict=True):
            assert o.tobytes() == core(part, 70, form=form).tobytes()
    with pytest.raises(ValueError, match=r"select\[81, 0\] .* is 99; the query sees positions 0 to 71"):
        core(given | dict(select=np.full_like(given["select"], 99)), 71, **offsets)


def ragged():
    """(the call of several sequences, its offsets, each of them alone)."""
    lengths = [(1, 1), (0, 0), (70, 70), (3, 600), (0, 9), (20, 30), (5, 513)]
    parts = [inputs(T, S, **SMALL, seed=i) | dict(select=rows(T, S, 40, seed=i)) for i, (T, S) in enumerate(lengths)]
    for part in parts:
        part |= {name: parts[0][name] for name in ("w_uk", "w_uv")}
    given, offsets = packed(parts)
    return given | dict(select=np.concatenate([p["select"] for p in parts])), offsets, parts


def test_positions_are_counted_within_a_sequence():
    given, offsets, parts = ragged()
    got = check(given, **offsets)
    for part, o in zip(parts, kl.unpack(got, offsets["offsets"]), strict=True):
        assert o.tobytes() == run(part).tobytes()


@pytest.mark.parametrize("cuts", [[1], [7, 64], [33, 34]])
def test_split_anywhere_keeps_bytes(cuts):
    given, select = inputs(100, 250, **SMALL), rows(100, 250, 70)
    whole = run(given, select=select)
    for first, last in zip([0, *cuts], [*cuts, 100], strict=True):
        part = given | dict(q=given["q"][first:last], latent=given["latent"][:150 + last],
                            k_shared=given["k_shared"][:150 + last])
        assert run(part, select=select[first:last]).tobytes() == whole[first:last].tobytes()


def test_batch_axis():
    given, select = inputs(2 * 20, 2 * 70, **SMALL), np.concatenate([rows(20, 70, 30, seed=i) for i in (0, 1)])
    batch = given | dict(q=given["q"].reshape(2, 20, 3, 20), latent=given["latent"].reshape(2, 70, 24),
                         k_shared=given["k_shared"].reshape(2, 70, 8), select=select.reshape(2, 20, 30))
    flat = run(given, select=select, offsets=[0, 20, 40], kv_offsets=[0, 70, 140])
    assert run(batch).tobytes() == flat.tobytes()
    np.testing.assert_array_equal(kl.reference.latent_attention(**batch).reshape(flat.shape),
                                  kl.reference.latent_attention(**given, select=select, offsets=[0, 20, 40],
                                                                kv_offsets=[0, 70, 140]))
    assert run(batch).shape == (2, 20, 3, 20)


def test_no_tokens_and_other_integers():
    assert run(inputs(0, 5, **SMALL), select=np.empty((0, 3), np.int32)).shape == (0, 3, 20)
    given, select = inputs(4, 50, **SMALL), rows(4, 50, 9)
    assert run(given, select=select.astype(np.int64)).tobytes() == run(given, select=select).tobytes()


# ---- the budget can fail, and so can the arguments ----


def test_budget_catches_a_selection_that_is_another():
    given, select = inputs(8, 300, **SMALL), rows(8, 300, 40, least=20)
    ref = kl.reference.latent_attention(**given, select=select)
    moved = select.copy()
    moved[:, 3] = select[:, 3] + (select[:, 4] > select[:, 3] + 1)
    one_less = np.concatenate([select[:, 1:], np.full((8, 1), -1, np.int32)], axis=1)
    for other in (None, moved, one_less, np.roll(select, 1, axis=0)):
        if other is not None:
            other = np.where(other > np.arange(292, 300)[:, None], -1, other).astype(np.int32)
        with pytest.raises(AssertionError, match="times its budget"):
            judge("latent_attention", run(given, select=other), ref, **given, select=select)


ROW = [[0, 3, 9], [1, 2, 8], [0, 5, -1], [-1, -1, -1]]


@pytest.mark.parametrize("at, value, message", [
    ((1, 2), 9, r"select\[1, 2\] \(query, entry\) is 9; the query sees positions 0 to 8$"),
    ((3, 0), 11, r"select\[3, 0\] \(query, entry\) is 11; the query sees positions 0 to 10$"),
    ((2, 1), -2, r"select\[2, 1\] \(query, entry\) is -2; it must be a position, or -1 behind the last$"),
    ((0, 1), 0, r"select\[0, 1\] \(query, entry\) is 0 after 0; the positions of a query must rise$"),
    ((1, 1), 0, r"select\[1, 1\] \(query, entry\) is 0 after 1; the positions of a query must rise$"),
    ((3, 2), 4, r"select\[3, 2\] \(query, entry\) is 4 after -1; behind the last position all must be -1$"),
])
def test_a_wrong_row_is_named_and_nothing_written(at, value, message):
    given, select = inputs(4, 11, **SMALL), np.array(ROW, np.int32)
    select[0, 2], select[at] = 7, value
    out = np.full((4, 3, 20), 7, np.float32)
    with pytest.raises(ValueError, match=message):
        run(given, select=select, out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="positions of a query must rise within"):
        kl.reference.latent_attention(**given, select=select)


@pytest.mark.parametrize("change, error, message", [
    (dict(select=np.zeros((3, 2), np.int32)), ValueError, r"select has shape \[3, 2\]; it must be \[4, W\]"),
    (dict(select=np.zeros(4, np.int32)), ValueError, r"select has shape \[4\]; it must be \[4, W\]"),
    (dict(select=np.zeros((4, 0), np.int32)), ValueError, r"select has shape \[4, 0\]; W must be >= 1"),
    (dict(select=np.zeros((4, 2), np.float32)), TypeError, "select is float32; it must be an array of integers"),
    (dict(select=np.full((4, 1), 2**31)), ValueError, r"select\[\(0, 0\)\] is 2147483648"),
    (dict(select=np.zeros((4, 1), np.int32), form="expanded"), ValueError,
     "form is expanded and select is given; it must be auto or absorbed"),
])
def test_errors_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        run(inputs(4, 10, **SMALL), **change)


def test_core_refuses_nonsense():
    given, out = inputs(4, 10, **SMALL), np.empty((4, 3, 20), np.float32)
    weights = [(given[n], 0, *given[n].shape) for n in ("w_uk", "w_uv")]

    def call(select, W, first=0):
        kl._core.latent_attention(kl.Context()._core, out, given["q"], given["latent"], 0, given["k_shared"], 0,
                                  *weights, np.array([0, 4]), np.array([0, 10]), select,
                                  (1, 4, 10, 3, 12, 8, 20, 24, W, first), 1.0, 0)

    call(np.zeros((4, 1), np.int32), 1)
    for select, W, message in [(np.zeros((4, 1), np.int32), 2, "select has 4 values"), (None, 2, "select is NULL"),
                               (np.zeros((4, 0), np.int32), 0, "W must be >= 1"), (None, -1, "size")]:
        with pytest.raises(ValueError, match=message):
            call(select, W)
    with pytest.raises(ValueError, match="select_from is -1; it must be >= 0"):
        call(np.zeros((4, 1), np.int32), 1, -1)
