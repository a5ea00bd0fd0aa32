"""latent_attention(select=) on the host build: lists that stand for the cache, empty ones, wrong ones, select_from."""

import numpy as np
import pytest
from device_arrays import put, same
from hip_build import context, everywhere, versions
from judge import guarded, judge, normal
from test_hip_mla import LATENT, Q8_0, latent

import kimi_linear as kl

version = versions("1", "")


def rows(T, S, W, seed=0, least=0):
    """For each of T queries, the last of S positions, from `least` to W of those that it sees: [T, W]."""
    rng, select = np.random.default_rng([seed, T, S, W]), np.full((T, W), -1, np.int32)
    for t in range(T):
        seen = S - T + t + 1
        chosen = rng.permutation(seen)[:rng.integers(min(least, seen), min(W, seen) + 1)]
        select[t, :len(chosen)] = np.sort(chosen)
    return select


def check(given, **options):
    """Within budget, same bytes everywhere, nothing written outside."""
    ref = kl.reference.latent_attention(**given, **options)

    def run(ctx):
        out, untouched = guarded(ref.shape)
        assert kl.ops.latent_attention(**given, **options, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(run)
    judge("latent_attention", got, ref, **given, **options)
    return got


def run(given, **options):
    return kl.ops.latent_attention(**given, **options, ctx=context())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S, W", [(1, 1, 1), (1, 65, 64), (16, 70, 17), (3, 1030, 16), (2, 1300, 600)])
def test_hip_select_within_budget(T, S, W, dtype, version):
    check(latent(T, S, **LATENT, dtype=dtype) | dict(select=rows(T, S, W)))


@pytest.mark.parametrize("H, K, P, V, R", [(1, 1, 0, 1, 1), (2, 17, 5, 33, 40), (20, 8, 16, 8, 32), (33, 4, 0, 4, 8),
                                           (1, 16, 0, 16, 300)])
def test_hip_select_widths_and_heads(H, K, P, V, R, version):
    check(latent(3, 90, H, K, P, V, R) | dict(select=rows(3, 90, 70, least=66)))


def test_hip_select_wide_rows_and_two_cache_types():
    """What the first version alone takes: values of more than 512, caches of two types."""
    check(latent(2, 70, 2, 4, 4, 8, 520) | dict(select=rows(2, 70, 30)))
    given = latent(2, 70, **LATENT) | dict(select=rows(2, 70, 30))
    check(given | dict(latent=given["latent"].astype(np.float16)))


def test_hip_select_more_tokens_than_a_batch():
    given = latent(300, 310, 1, 4, 2, 4, 8) | dict(select=rows(300, 310, 20))
    judge("latent_attention", run(given), kl.reference.latent_attention(**given), **given)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (3, 600)])
def test_hip_a_list_of_all_positions_has_the_bytes_of_none(T, S, dtype, version):
    given, seen = latent(T, S, **LATENT, dtype=dtype), np.arange(S - T, S)[:, None]
    select = np.where(np.arange(S + 3) <= seen, np.arange(S + 3), -1).astype(np.int32)
    assert run(given, select=select).tobytes() == run(given, form="absorbed").tobytes()


def test_hip_select_of_segments_as_tasks_has_the_bytes_of_one_task():
    """Two segments of a token are tasks of their own; of 256 tokens they are not."""
    given = latent(256, 1100, 1, 4, 2, 4, 8) | dict(select=rows(256, 1100, 520, least=514))
    whole = run(given)
    last = given | {n: given[n][-1:] for n in ("q", "select")}
    assert run(last).tobytes() == whole[-1:].tobytes()


def test_hip_select_counts_within_a_sequence(version):
    lengths = [(1, 1), (0, 0), (20, 20), (3, 600), (0, 9), (5, 530)]
    offsets, kv_offsets = (np.cumsum([0] + [pair[i] for pair in lengths]) for i in (0, 1))
    parts = [latent(T, S, 2, 4, 2, 4, 6, seed=10 * i) | dict(select=rows(T, S, 33)) for i, (T, S) in enumerate(lengths)]
    weights = {n: parts[0][n] for n in ("w_uk", "w_uv")}
    given = parts[0] | {n: np.concatenate([p[n] for p in parts]) for n in ("q", "latent", "k_shared", "select")}
    got = check(given, offsets=offsets, kv_offsets=kv_offsets)
    for part, o in zip(parts, kl.unpack(got, offsets), strict=True):
        assert o.tobytes() == run(part | weights).tobytes()


def test_hip_what_is_not_chosen_is_not_read(version):
    given, select = latent(20, 640, **LATENT), rows(20, 640, 25)
    clean, unread = run(given, select=select), np.setdiff1d(np.arange(640), select)
    given["latent"][unread], given["k_shared"][unread] = np.nan, np.inf
    assert len(unread) and run(given, select=select).tobytes() == clean.tobytes()


def test_hip_of_no_position_comes_zero(version):
    given, select = latent(5, 600, **LATENT), rows(5, 600, 530, least=1)
    given["w_uv"][0, 0, 0] = np.inf
    select[[0, 3]] = -1
    got = everywhere(lambda ctx: kl.ops.latent_attention(**given, select=select, ctx=ctx))
    assert not got[[0, 3]].any() and not np.signbit(got[[0, 3]]).any() and got[[1, 2, 4], 1:].all()


@pytest.mark.parametrize("at, value", [((1, 2), 9), ((2, 1), -2), ((0, 1), 0), ((3, 2), 4), ((3, 0), 2**31 - 1)])
def test_hip_a_wrong_row_is_named(at, value, version):
    given, select = latent(4, 11, **LATENT), np.array([[0, 3, 7], [1, 2, 8], [0, 5, -1], [-1, -1, -1]], np.int32)
    select[at] = value
    words = "it must be a position that the query sees, after the one before it, or -1 behind the last"
    with pytest.raises(ValueError, match=rf"select\[{at[0]}, {at[1]}\] \(query, entry\) is {value}; {words}"):
        run(given, select=select)
    select[at] = -1
    run(given | dict(select=select[:, :1]))  # the note is forgotten


def test_hip_select_on_the_device_and_its_type():
    given, select = latent(6, 90, **LATENT), rows(6, 90, 30)
    wanted = run(given, select=select)
    assert run(given, select=put(select)).tobytes() == wanted.tobytes()
    held = {n: put(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}
    assert same(run(held, select=put(select)), wanted)
    with pytest.raises(TypeError, match="select is int64 on a device; it must be int32 there"):
        run(given, select=put(select.astype(np.int64)))


@pytest.mark.parametrize("kind", [0, Q8_0])
@pytest.mark.parametrize("T, S, first", [(100, 100, 40), (17, 90, 200), (5, 70, 68), (70, 600, 535)])
def test_hip_queries_that_see_no_more_attend_to_all_in_their_own_form(T, S, first, kind):
    H, K, P, V, R = 3, 12, 32, 20, 64
    given, select, dense = latent(T, S, H, K, P, V, R), rows(T, S, 33), max(0, min(T, first - (S - T)))
    caches = [given[n] if kind == 0 else kl.ops.quantize(given[n], "Q8_0").data for n in ("latent", "k_shared")]

    def core(select, first):
        out = np.full((T, H, V), np.nan, np.float32)
        kl._core.latent_attention(context()._core, out, given["q"], *(x for c in caches for x in (c, kind)),
                                  *((given[n], 0, *given[n].shape) for n in ("w_uk", "w_uv")), np.array([0, T]),
                                  np.array([0, S]), select,
                                  (1, T, S, H, K, P, V, R, 0 if select is None else 33, first), given["scale"], 0)
        return out

    unread = select.copy()
    unread[:dense] = 99999
    got = core(unread, first)
    assert got[:dense].tobytes() == core(None, 0)[:dense].tobytes()
    assert got[dense:].tobytes() == core(select, 0)[dense:].tobytes()


def test_hip_select_far_rows():
    """Rows of select whose place in all of them passes 2^16, in a wide table."""
    given, select = latent(40, 60, 1, 4, 2, 4, 8), np.full((40, 5000), -1, np.int32)
    select[:, :3] = np.sort(normal(40, 60).argsort(axis=1)[:, :3] % 20, axis=1) + np.arange(3)
    check(given | dict(select=select))
