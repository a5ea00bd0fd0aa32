"""The indexer: keys of pools in every type of cache, scores and what is chosen by them, on every instruction set."""

import numpy as np
import pytest
from judge import CONTEXTS, everywhere, guarded, judge, normal

import kimi_linear as kl

FAST = [ctx for ctx in CONTEXTS if ctx.isa != "scalar"] or CONTEXTS


def pooling(T, D, P, **more):
    return dict(k=normal(T, D), gate=normal(T, D, seed=1), ape=normal(P, D, seed=2), **more)


def scoring(L, S, H=3, D=16, pool=4, seed=0, lengths=None):
    """Arguments of both ops: L queries, the last of S positions; `lengths`: (L, S) of each sequence, for both."""
    queries, positions = (L, S) if lengths is None else map(list, zip(*lengths))
    T, pools = np.sum(queries), np.sum(np.array(positions) // pool, dtype=int)
    given = dict(q=normal(T, H, D, seed=seed), keys=normal(pools, D, seed=seed + 1),
                 weights=normal(T, H, seed=seed + 2), pool=pool, positions=positions)
    return given if lengths is None else given | dict(offsets=np.cumsum([0, *queries]))


def run(op, given, contexts=CONTEXTS):
    """The op's result, the same bytes everywhere; nothing beside it is written."""
    with np.errstate(all="ignore"):
        ref = getattr(kl.reference, op)(**given)

    def one(ctx):
        is_ids = op == "index_select"
        out, untouched = guarded(ref.shape, *((np.int32, 99) if is_ids else ()))
        assert getattr(kl.ops, op)(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    return everywhere(one, contexts), ref


def check(op, given, contexts=CONTEXTS):
    got, ref = run(op, given, contexts)
    judge(op, got, ref, **given)
    return got


# ---- keys of pools ----


@pytest.mark.parametrize("D, P", [(1, 1), (16, 4), (15, 1), (34, 2), (48, 16), (64, 64), (128, 4), (128, 16)])
def test_keys_of_pools(D, P):
    for T in (0, 1, P - 1, P, 2 * P + 1, 5 * P + P // 2):
        check("index_pool", pooling(T, D, P))


def test_pools_across_pages():
    check("index_pool", pooling(1500, 32, 16), FAST)
    check("index_pool", pooling(1030, 512, 512), FAST)


def test_pools_of_one_token_are_its_key():
    given = pooling(9, 20, 1)
    assert kl.ops.index_pool(**given).tobytes() == given["k"].tobytes()


def test_pools_begin_with_their_sequence():
    given, lengths = pooling(29, 16, 4), (3, 0, 9, 4, 13)
    offsets = np.cumsum([0, *lengths])
    got = check("index_pool", given | dict(offsets=offsets))
    each = [kl.ops.index_pool(given["k"][a:b], given["gate"][a:b], given["ape"])
            for a, b in zip(offsets, offsets[1:])]
    assert got.tobytes() == np.concatenate(each).tobytes() and len(got) == 0 + 0 + 2 + 1 + 3


def test_pools_of_a_batch():
    given = dict(k=normal(3, 10, 16), gate=normal(3, 10, 16, seed=1), ape=normal(4, 16))
    got = check("index_pool", given)
    assert got.shape == (3, 2, 16)
    for b in range(3):
        alone = kl.ops.index_pool(given["k"][b], given["gate"][b], given["ape"])
        assert got[b].tobytes() == alone.tobytes()
    for empty in ((2, 0, 16), (2, 3, 16)):
        zeros = np.zeros(empty, np.float32)
        check("index_pool", dict(k=zeros, gate=zeros, ape=given["ape"]))
    none = np.zeros((0, 10, 16), np.float32)
    assert kl.ops.index_pool(none, none, given["ape"]).shape == (0, 2, 16)


def test_gates_of_any_size():
    for scale in (1e-42, 30.0, 1e4, 3e37):
        given = pooling(12, 16, 4)
        given["gate"] *= np.float32(scale)
        check("index_pool", given)
    given["gate"][:] = 0
    given["k"] *= np.float32(2.5e38 / np.abs(given["k"]).max())
    check("index_pool", given)  # a mean of what is almost too large


@pytest.mark.parametrize("name", ["k", "gate", "ape"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_channel_and_pool(name, value):
    given = pooling(12, 20, 4)
    given[name][1, 7] = value
    got = check("index_pool", given)
    wrong = ~np.isfinite(got)
    assert wrong[:, 7].tolist() == ([True, True, True] if name == "ape" else [True, False, False])
    assert not np.delete(wrong, 7, axis=1).any()


def test_a_gate_of_minus_infinity_leaves_its_token_out():
    given = pooling(4, 20, 4)
    given["gate"][2] = -np.inf
    got = check("index_pool", given)
    part = {n: np.delete(given[n], 2, axis=0) for n in ("k", "gate", "ape")}
    e = np.exp(np.float64(part["gate"] + part["ape"]))
    np.testing.assert_allclose(got[0], (e / e.sum(0) * part["k"]).sum(0), rtol=1e-5, atol=1e-6)


# ---- keys in caches, as a model has them ----

F32, F16, Q8_0 = 0, 1, 8


def cache(kind, values):
    """An empty cache of so many values, every byte of it 7."""
    n_bytes = {F32: 4 * values, F16: 2 * values, Q8_0: values // 32 * 34}[kind]
    return np.full(n_bytes, 7, np.uint8).view({F32: np.float32, F16: np.uint16, Q8_0: np.uint8}[kind])


def append(ctx, pooled, rows, given, starts, lengths, room):
    """`lengths` further tokens of each sequence, from starts on, to caches of `room` positions a sequence."""
    (pooled, pooled_type), (rows, rows_type), (P, D) = pooled, rows, given["ape"].shape
    at = [slice(n * room + a, n * room + a + length) for n, (a, length) in enumerate(zip(starts, lengths))]
    k, gate = (np.concatenate([given[name][r] for r in at]) for name in ("k", "gate"))
    N, T = len(lengths), int(np.sum(lengths))
    kl._core.index_pool(ctx._core, pooled, pooled_type, rows, rows_type, k, gate, given["ape"],
                        np.cumsum([0, *lengths]), np.array(starts), np.arange(N + 1) * room, (N, T, N * room, D, P))


@pytest.mark.parametrize("rows_type", [F32, F16, Q8_0])
@pytest.mark.parametrize("pooled_type", [F32, F16, Q8_0])
def test_a_split_gives_the_same_bytes_and_leaves_the_rest(pooled_type, rows_type):
    D, P, room = 128, 4, 1100
    given = pooling(2 * room, D, P)

    def one(ctx, cuts):
        pooled, rows = cache(pooled_type, 2 * room // P * D), cache(rows_type, 2 * room * 2 * D)
        for a, b in zip(cuts, cuts[1:]):
            append(ctx, (pooled, pooled_type), (rows, rows_type), given, a, np.subtract(b, a), room)
        return pooled

    whole = everywhere(lambda ctx: one(ctx, [(0, 0), (1034, 530)]), FAST)
    for cuts in ([(1, 0), (3, 2), (4, 2), (511, 513), (1033, 513)], [(513, 529)]):
        assert one(FAST[0], [(0, 0), *cuts, (1034, 530)]).tobytes() == whole.tobytes()
    each = np.split(whole, 2)
    a_pool = len(each[0]) // (room // P)
    for part, tokens in zip(each, (1034, 530)):
        assert (part[tokens // P * a_pool:].view(np.uint8) == 7).all()
    if rows_type == pooled_type == F32:
        wanted = kl.ops.index_pool(given["k"][:1034], given["gate"][:1034], given["ape"])
        assert each[0][:wanted.size].tobytes() == wanted.tobytes()
    if rows_type == F32 and pooled_type == F16:
        wanted = kl.ops.index_pool(given["k"][:1034], given["gate"][:1034], given["ape"]).astype(np.float16)
        assert each[0][:wanted.size].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind, value", [(F16, 7e4), (Q8_0, 1e7)])
def test_a_key_that_its_cache_cannot_hold(kind, value):
    given, ctx = pooling(8, 128, 4), kl.Context()
    given["k"][5] = value
    pooled, rows = cache(kind, 2 * 128), cache(F32, 8 * 256)
    given["gate"][5] = 100
    with pytest.raises(ValueError, match=r"index_pool: keys\[1, 0\] is .*, too large for a .* cache"):
        append(ctx, (pooled, kind), (rows, F32), given, [0], [8], 8)
    assert (pooled.view(np.uint8) == 7).all()


def test_scores_of_float16_keys_are_those_of_their_values():
    given = scoring(3, 400, D=32)
    given["keys"] = given["keys"].astype(np.float16)
    wide = given | dict(keys=given["keys"].astype(np.float32))
    for op, more in (("index_scores", dict(scale=0.3)), ("index_select", dict(topk=32))):
        assert check(op, given | more).tobytes() == check(op, wide | more).tobytes()


# ---- scores ----


@pytest.mark.parametrize("H, D, pool", [(1, 1, 1), (3, 17, 1), (2, 15, 1), (5, 48, 16), (32, 128, 4), (1, 64, 64)])
def test_scores_within_budget(H, D, pool):
    for L, S in ((0, 0), (1, 1), (2, pool), (3, 5 * pool + 1), (pool + 2, 70 * pool)):
        if S >= L:
            check("index_scores", scoring(L, S, H, D, pool) | dict(scale=D**-0.5), FAST if S > 100 else CONTEXTS)


def test_scores_across_pages():
    for pool, S in ((1, 1300), (4, 1031), (512, 1600)):
        check("index_scores", scoring(3, S, 2, 512, pool) | dict(scale=0.1), FAST)


def test_scores_of_sequences_and_of_a_batch():
    given = scoring(0, 0, lengths=[(3, 20), (0, 9), (5, 5), (2, 33)]) | dict(scale=0.5)
    got = check("index_scores", given)
    assert got.shape == (10, 8)
    keys = np.cumsum([0, 5, 2, 1, 8])
    for n, (a, b) in enumerate(zip(given["offsets"], given["offsets"][1:])):
        alone = kl.ops.index_scores(given["q"][a:b], given["keys"][keys[n]:keys[n + 1]], given["weights"][a:b],
                                    scale=0.5, pool=4, positions=given["positions"][n])
        assert got[a:b, :alone.shape[1]].tobytes() == alone.tobytes()
        assert (got[a:b, alone.shape[1]:] == -np.inf).all()
    batch = dict(q=normal(2, 3, 4, 16), keys=normal(2, 6, 16), weights=normal(2, 3, 4), pool=2, positions=13)
    for op, more in (("index_scores", dict(scale=1.0)), ("index_select", dict(topk=4))):
        got = check(op, batch | more)
        for b in range(2):
            part = batch | {n: batch[n][b] for n in ("q", "keys", "weights")} | more
            assert got[b].tobytes() == getattr(kl.ops, op)(**part).tobytes()


def test_what_is_no_number_goes_through():
    given = scoring(6, 40) | dict(scale=0.5)
    given["keys"][2, 3], given["weights"][1, 0], given["q"][4, 1, 0] = np.nan, np.inf, np.nan
    got = check("index_scores", given)
    assert np.isnan(got[:, 2]).all() and np.isnan(got[4, :9]).all() and np.isfinite(got[[0, 2, 3], :2]).all()


def test_scores_are_float32_whatever_the_activations_are():
    given = scoring(3, 40, D=32) | dict(scale=0.5)
    wanted = kl.ops.index_scores(**given)
    for kind in ("int8", "bfloat16"):
        assert kl.ops.index_scores(**given, ctx=kl.Context(activations=kind)).tobytes() == wanted.tobytes()


# ---- choice ----


def chosen(scores, topk, pool, position):
    """The ids by the definition, from scores as the machine has them."""
    complete = (position + 1) // pool
    rank = sorted(range(complete), key=lambda p: (not np.isnan(scores[p]), -np.nan_to_num(scores[p], nan=0), p))
    ids = [p * pool + j for p in sorted(rank[:topk // pool]) for j in range(pool)]
    ids += range(complete * pool, position + 1)
    return ids + [-1] * (topk + pool - 1 - len(ids))


def is_top(given, topk):
    """That what is chosen is exactly the top of the scores."""
    got, _ = run("index_select", given | dict(topk=topk), FAST)
    scores = kl.ops.index_scores(**given, scale=1.0)
    first = given["positions"] - len(given["q"])
    for t in range(len(got)):
        assert got[t].tolist() == chosen(scores[t].tolist(), topk, given["pool"], first + t), t
    return got


@pytest.mark.parametrize("pool, topk", [(1, 1), (1, 7), (4, 4), (4, 40), (16, 64), (2, 510)])
def test_ids_are_the_top_of_the_scores(pool, topk):
    for L, S in ((1, 1), (3, topk + pool - 1), (4, topk + pool), (9, 600), (2, 1500)):
        if S >= L:
            given = scoring(L, S, 2, 16, pool)
            is_top(given, topk)
            check("index_select", given | dict(topk=topk), FAST)


def test_ids_of_more_queries_than_a_batch_has():
    is_top(scoring(150, 150, 2, 16, 2), 8)


def test_every_byte_of_a_score_counts():
    """Thresholds that differ in the last byte alone, of both signs."""
    given = scoring(1, 300, 1, 1, 1)
    given["q"][:], given["weights"][:] = 1, 1
    bits = np.float32(1.5).view(np.int32) + np.random.default_rng(0).permutation(300).astype(np.int32)
    given["keys"][:, 0] = bits.view(np.float32)
    for sign in (1, -1):
        given["weights"][:] = sign
        for topk in (1, 127, 299):
            is_top(given, topk)


def test_equals_go_to_the_lower_pool():
    given = scoring(3, 90, 2, 16, 4)
    given["keys"][:] = given["keys"][0]
    assert is_top(given, 8)[:, :8].tolist() == [list(range(8))] * 3
    given["weights"][:] = 0
    given["keys"] = normal(22, 16)
    given["weights"][1] = -0.0
    assert is_top(given, 8)[:, :8].tolist() == [list(range(8))] * 3


def test_nan_counts_as_the_largest_and_shows():
    given = scoring(2, 90, 2, 16, 4)
    given["keys"][[5, 11, 17]] = np.nan
    got = is_top(given, 8)
    assert got[:, :8].tolist() == [[20, 21, 22, 23, 44, 45, 46, 47]] * 2
    given["weights"][:] = np.inf
    given["weights"][0, 0] = -np.inf  # infinities of both signs, and their NaN
    is_top(given, 8)


def test_few_positions_are_all_chosen_and_nothing_is_scored():
    given = scoring(11, 11, pool=4) | dict(topk=8)
    given["q"][:] = np.nan
    got = check("index_select", given)
    for t in range(11):
        assert got[t].tolist() == [*range(t + 1), *[-1] * (10 - t)]


def test_a_scale_changes_no_choice():
    given = scoring(5, 200)
    is_top(given, 16)
    scores = kl.ops.index_scores(**given, scale=2.0**-5)
    ids = kl.ops.index_select(**given, topk=16)
    for t in range(5):
        assert ids[t].tolist() == chosen(scores[t].tolist(), 16, 4, 195 + t)


def test_ids_of_sequences():
    given = scoring(0, 0, lengths=[(3, 20), (0, 9), (5, 5), (2, 33)]) | dict(topk=8)
    got, keys = check("index_select", given), np.cumsum([0, 5, 2, 1, 8])
    for n, (a, b) in enumerate(zip(given["offsets"], given["offsets"][1:])):
        alone = kl.ops.index_select(given["q"][a:b], given["keys"][keys[n]:keys[n + 1]], given["weights"][a:b],
                                    topk=8, pool=4, positions=given["positions"][n])
        assert got[a:b].tobytes() == alone.tobytes()


def test_of_the_models_shape():
    """Scores of keys that are pooled before them, in one process as in a model."""
    given = pooling(9001, 128, 4)
    keys = kl.ops.index_pool(**given)
    judge("index_pool", keys, kl.reference.index_pool(**given), **given)
    given = scoring(2, 9001, 32, 128, 4) | dict(keys=keys)
    about = given | dict(scale=128**-0.5)
    judge("index_scores", kl.ops.index_scores(**about), kl.reference.index_scores(**about), **about)
    about = given | dict(topk=2048)
    judge("index_select", is_top(given, 2048), kl.reference.index_select(**about), **about)


# ---- errors ----


@pytest.mark.parametrize("change, error, message", [
    (dict(gate=np.zeros((8, 15), np.float32)), ValueError, r"gate has shape \[8, 15\]; it must be \[8, 16\]"),
    (dict(k=np.zeros((8, 16))), TypeError, "k is float64; it must be float32"),
    (dict(ape=np.zeros((3, 16), np.float32)), ValueError,
     r"ape has shape \[3, 16\]; its rows, the pool, must divide 512"),
    (dict(ape=np.zeros((32, 16), np.float32)), ValueError, "must divide 512 and D = 16"),
    (dict(ape=np.zeros((0, 16), np.float32)), ValueError, "its rows, the pool"),
    (dict(offsets=[0, 9]), ValueError, "offsets ends at 9; it must end at T = 8"),
    (dict(out=np.zeros((3, 16), np.float32)), ValueError, r"out has shape \[3, 16\]; it must be \[2, 16\]"),
])
def test_errors_of_pools_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.index_pool(**(pooling(8, 16, 4) | change))


@pytest.mark.parametrize("change, error, message", [
    (dict(q=np.zeros((3, 16), np.float32)), ValueError, r"q has shape \[3, 16\]"),
    (dict(weights=np.zeros((3, 2), np.float32)), ValueError, r"weights has shape \[3, 2\]; it must be \[3, 3\]"),
    (dict(keys=np.zeros((9, 16), np.float32)), ValueError, r"keys has shape \[9, 16\]; it must be \[10, 16\]"),
    (dict(keys=np.zeros((10, 16))), TypeError, "keys is float64"),
    (dict(pool=3), ValueError, "pool is 3; it must divide 512 and D = 16"),
    (dict(pool=0), ValueError, "pool is 0"),
    (dict(pool=4.0), TypeError, "pool is 4.0"),
    (dict(positions=2), ValueError, "sequence 0 has 2 positions for 3 queries; the queries' own must be among them"),
    (dict(positions=[20, 20]), ValueError, r"positions has shape \[2\]; it must be \[1\]"),
    (dict(positions="x"), (TypeError, ValueError), "positions"),
    (dict(offsets=[0, 4]), ValueError, "offsets ends at 4"),
])
def test_errors_are_sentences(change, error, message):
    for op, more in ((kl.ops.index_scores, dict(scale=1.0)), (kl.ops.index_select, dict(topk=48))):
        with pytest.raises(error, match=message):
            op(**(scoring(3, 40) | more | change))


@pytest.mark.parametrize("topk, message", [
    (6, "topk is 6; it must be a multiple of pool = 4"), (0, "topk is 0"), (2**31, "topk is 2147483648")])
def test_errors_of_topk(topk, message):
    with pytest.raises(ValueError, match=message):
        kl.ops.index_select(**scoring(3, 40), topk=topk)


def test_errors_of_scale_and_of_offsets_with_a_batch():
    with pytest.raises(ValueError, match="scale is nan; it must be finite"):
        kl.ops.index_scores(**scoring(3, 40), scale=np.nan)
    batch = dict(q=normal(2, 3, 4, 16), keys=normal(2, 6, 16), weights=normal(2, 3, 4), pool=2)
    with pytest.raises(ValueError, match="q has a batch axis"):
        kl.ops.index_select(**batch, topk=4, offsets=[0, 6], positions=13)
    with pytest.raises(ValueError, match="positions differ"):
        kl.ops.index_select(**batch, topk=4, positions=[13, 12])


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((2, 8), np.float32)
    ids, one = np.full((2, 5), 9, np.int32), np.array([0, 2])
    def select(keys=x, positions=(4,), sizes=(1, 2, 1, 8, 2), topk=4):
        kl._core.index_select(core, ids, x, keys, 0, x[:, 0].copy(), one, np.array(positions), sizes, topk)
    select()
    ids[:] = 9
    for wrong, message in ((dict(positions=(1,)), "keys has 16 values|positions"), (dict(positions=(-1,)), "positions"),
                           (dict(positions=(2**41,)), "positions"), (dict(sizes=(1, 2, 1, 8, 0)), "pool is 0"),
                           (dict(sizes=(1, 2, 1, 8, -2)), "pool"), (dict(topk=-1), "out"), (dict(topk=2**62), "out"),
                           (dict(sizes=(1, 2, 1, 8, 3)), "keys has|pool is 3|out has")):
        with pytest.raises(ValueError, match=message):
            select(**wrong)
    assert (ids == 9).all()
