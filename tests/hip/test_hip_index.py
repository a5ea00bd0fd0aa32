"""The indexer on a device: the CPU's bytes and ids, in every version, from every type of cache."""

import numpy as np
import pytest
from hip_build import context, everywhere, versions
from judge import guarded, normal

import kimi_linear as kl

version = versions("1", "")


def pooling(T, D, P, **more):
    return dict(k=normal(T, D), gate=normal(T, D, seed=1), ape=normal(P, D, seed=2), **more)


def scoring(L, S, H=3, D=16, pool=4):
    return dict(q=normal(L, H, D), keys=normal(S // pool, D, seed=1), weights=normal(L, H, seed=2), pool=pool,
                positions=S)


def same(op, given):
    """The op's result, which has the CPU's bytes; nothing beside it is written."""
    wanted = getattr(kl.ops, op)(**given)

    def one(ctx):
        out, untouched = guarded(wanted.shape, *((np.int32, 99) if wanted.dtype == np.int32 else ()))
        assert getattr(kl.ops, op)(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    got = everywhere(one)
    assert got.tobytes() == wanted.tobytes() or np.array_equal(got, wanted, equal_nan=True)
    return got


@pytest.mark.parametrize("D, P", [(1, 1), (34, 2), (48, 16), (128, 4), (160, 32)])
def test_hip_keys_of_pools(D, P, version):
    for T in (0, 1, P, 5 * P + P // 2):
        same("index_pool", pooling(T, D, P))
    same("index_pool", pooling(29 + P, D, P, offsets=[0, 3, 3, 12, 12 + P, 29 + P]))


def test_hip_keys_of_a_page_and_more(version):
    same("index_pool", pooling(1100, 32, 4))


def test_hip_keys_that_are_no_numbers(version):
    given = pooling(12, 20, 4)
    given["k"][1, 7], given["gate"][5, 3], given["gate"][8:, 2] = np.nan, np.inf, -np.inf
    same("index_pool", given)


@pytest.mark.parametrize("H, D, pool", [(1, 1, 1), (2, 15, 1), (3, 48, 16), (8, 128, 4)])
def test_hip_scores_and_ids(H, D, pool, version):
    for L, S in ((1, 1), (3, 5 * pool + 1), (pool + 2, 70 * pool)):
        if S >= L:
            given = scoring(L, S, H, D, pool)
            same("index_scores", given | dict(scale=0.3))
            same("index_select", given | dict(topk=4 * pool))


def test_hip_ids_of_more_pools_than_threads(version):
    for pool in (1, 2):
        for topk in (2, 300, 512):
            same("index_select", scoring(2, 1203, 2, 16, pool) | dict(topk=topk))


def test_hip_ids_of_equals_zeros_and_nan(version):
    given = scoring(3, 700, 2, 16, 1) | dict(topk=260)
    given["keys"][::3] = given["keys"][0]
    same("index_select", given)
    given["weights"][1] = 0
    given["keys"][[5, 11, 600]] = np.nan
    got = same("index_select", given)
    assert all(5 in row and 11 in row and 600 in row for row in got)
    given["q"][:] = np.nan
    assert same("index_select", given)[0, :260].tolist() == list(range(260))


def test_hip_ids_of_sequences_and_of_a_batch(version):
    positions = np.array([20, 9, 5, 70])
    given = dict(q=normal(10, 3, 16), keys=normal(int((positions // 4).sum()), 16), weights=normal(10, 3), pool=4,
                 offsets=[0, 3, 3, 8, 10], positions=positions)
    same("index_scores", given | dict(scale=1.0))
    same("index_select", given | dict(topk=8))
    batch = dict(q=normal(2, 3, 4, 16), keys=normal(2, 6, 16), weights=normal(2, 3, 4), pool=2, positions=13)
    same("index_scores", batch | dict(scale=1.0))
    same("index_select", batch | dict(topk=4))


def test_hip_scores_of_float16_keys(version):
    given = scoring(3, 100, 2, 32, 4)
    given["keys"] = given["keys"].astype(np.float16)
    same("index_scores", given | dict(scale=1.0))
    same("index_select", given | dict(topk=16))


F32, F16, Q8_0 = 0, 1, 8
BYTES = {F32: lambda n: 4 * n, F16: lambda n: 2 * n, Q8_0: lambda n: n // 32 * 34}
VIEW = {F32: np.float32, F16: np.uint16, Q8_0: np.uint8}


def pooled(ctx, given, pooled_type, rows_type, cuts):
    (T, D), P = given["k"].shape, len(given["ape"])
    keys = np.full(BYTES[pooled_type](T // P * D), 7, np.uint8).view(VIEW[pooled_type])
    rows = np.full(BYTES[rows_type](T * 2 * D), 7, np.uint8).view(VIEW[rows_type])
    for a, b in zip(cuts, cuts[1:]):
        kl._core.index_pool(ctx._core, keys, pooled_type, rows, rows_type, given["k"][a:b].copy(),
                            given["gate"][a:b].copy(), given["ape"], np.array([0, b - a]), np.array([a]),
                            np.array([0, T]), (1, b - a, T, D, P))
    return keys


@pytest.mark.parametrize("rows_type", [F32, F16, Q8_0])
@pytest.mark.parametrize("pooled_type", [F32, F16, Q8_0])
def test_hip_keys_in_caches(pooled_type, rows_type, version):
    given = pooling(600, 128, 4)
    wanted = pooled(kl.Context(), given, pooled_type, rows_type, [0, 599])
    for cuts in ([0, 599], [0, 3, 5, 511, 514, 599]):
        got = everywhere(lambda ctx, cuts=cuts: pooled(ctx, given, pooled_type, rows_type, cuts))
        assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind, value", [(F16, 7e4), (Q8_0, 1e7)])
def test_hip_a_key_that_its_cache_cannot_hold(kind, value, version):
    given, said = pooling(8, 128, 4), []
    given["k"][5], given["gate"][5] = value, 100
    for ctx in (kl.Context(), context()):
        with pytest.raises(ValueError, match=r"index_pool: keys\[1, 0\] is .*, too large for a") as error:
            pooled(ctx, given, kind, F32, [0, 8])
        said.append(str(error.value))
    assert said[0] == said[1]
