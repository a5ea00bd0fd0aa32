"""attn_res on a device: against float64 within the CPU's budget, rims, in place; v1 has the CPU's bytes."""

import numpy as np
import pytest
from hip_build import context, everywhere, versions
from judge import guarded, judge, normal

import kimi_linear as kl

version = versions("1", "")


def inputs(n, T, D, scale=1.0, eps=1e-5):
    return dict(snapshots=normal(n, T, D, scale=scale), x=normal(T, D, seed=1, scale=scale),
                w=normal(D, seed=2, scale=2 * D**-0.5), eps=eps)


def run(given):
    def one(ctx):
        out, untouched = guarded(given["x"].shape)
        assert kl.ops.attn_res(**given, out=out, ctx=ctx) is out
        untouched()
        return out.copy()

    return everywhere(one)


def check(given):
    with np.errstate(all="ignore"):
        ref = kl.reference.attn_res(**given)
    got = run(given)
    judge("attn_res", got, ref, **given)
    return got


@pytest.mark.parametrize("n, D", [(0, 17), (1, 1), (3, 16), (8, 17), (16, 33), (40, 20), (2, 700)])
def test_hip_attn_res_within_budget(n, D, version):
    for T in (0, 1, 11):
        check(inputs(n, T, D))


def test_hip_attn_res_of_the_real_width():
    check(inputs(8, 2, 7168))


def test_hip_more_candidates_than_threads_of_a_block(version):
    check(inputs(300, 2, 5))


@pytest.mark.parametrize("n", [1, 8, 40])
def test_hip_attn_res_oracle_has_the_bytes_of_the_cpu(n, monkeypatch):
    """The first version sums in the CPU's order."""
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    given = inputs(n, 5, 333)
    assert run(given).tobytes() == kl.ops.attn_res(**given).tobytes()


@pytest.mark.parametrize("eps, scale", [(1e-6, 1e-42), (1e-6, 1e19), (1e-6, 3e38), (0, 0), (0, 1e-45), (0, 1e-20)])
def test_hip_attn_res_of_tiny_and_huge_rows(eps, scale, version):
    given = inputs(4, 3, 100, eps=eps)
    for rows in (given["snapshots"][::2], given["x"][None, 1:]):
        rows[:, 1:] = np.sign(rows[:, 1:]) * np.float32(scale)
    check(given)


def test_hip_attn_res_in_place(version):
    for n in (0, 3):
        given = inputs(n, 5, 33)
        wanted = run(given)
        got = kl.ops.attn_res(**given, out=given["x"], ctx=context())
        assert got is given["x"] and got.tobytes() == wanted.tobytes()


def test_hip_attn_res_hands_on_what_is_not_finite(version):
    given = inputs(2, 4, 40)
    given["x"][2, 7], given["snapshots"][1, 3, 0] = np.nan, np.inf
    got = check(given)
    assert np.isnan(got[2:]).all() and np.isfinite(got[:2]).all()
    alone = inputs(0, 2, 6)
    alone["x"][:] = [-0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38]
    assert run(alone).tobytes() == alone["x"].tobytes()
