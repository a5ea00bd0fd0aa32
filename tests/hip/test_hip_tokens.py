"""sample, rope and sigmoid_gate on the host build of the HIP kernels: the CPU's ids and bytes from every version of a
ladder, for waves of 32 and 64 and any order of threads; errors."""

import numpy as np
import pytest
from hip_build import context, everywhere, versions
from judge import normal

import kimi_linear as kl

TEMPERATURES = (1e-40, 1e-30, 0.125, 0.75, 1.0, 1.0, 2.0, 1e30)
TOP_K = (0, 0, 0, 1, 5, 50, 300, 10**6)
TOP_P = (1.0, 1.0, 0.125, 0.5, 0.875, 0.95, 0.999)
MIN_P = (0.0, 0.0, 0.0, 0.0625, 0.5, 1.0)

version = versions("1", "")


# ---- sample ----


def any_logits(rng, T, V):
    """Rows that are bell-shaped, rounded, flat, masked, with a few that stand out, far below, huge."""
    x = rng.standard_normal((T, V)) * rng.choice([1e-6, 0.3, 1, 3, 10, 100], (T, 1))
    for t in range(T):
        kind = t % 7
        if kind == 1:
            x[t] = np.round(2 * x[t]) / 2
        elif kind == 2:
            x[t] = 0.0
        elif kind == 3:
            x[t, rng.random(V) < 0.75] = -np.inf
        elif kind == 4:
            x[t, rng.integers(0, V, max(1, V // 1000))] += 20
        elif kind == 5:
            x[t, rng.random(V) < 0.5] = -1e9
        elif kind == 6:
            x[t] = rng.choice([-3e38, 0, -0.0, 3e38], V)
        x[t, rng.integers(V)] = 0.0
    return x.astype(np.float32)


def any_settings(rng, T):
    return dict(temperature=rng.choice(TEMPERATURES, T), top_k=rng.choice(TOP_K, T), top_p=rng.choice(TOP_P, T),
                min_p=rng.choice(MIN_P, T), seed=rng.integers(2**63, size=T), sequence=5, position=np.arange(T))


@pytest.mark.parametrize("V", [1, 16, 33, 70])
def test_hip_sample_has_the_ids_of_the_cpu(V, version):
    rng = np.random.default_rng(V)
    x, settings = any_logits(rng, 28, V), any_settings(rng, 28)
    settings["temperature"][:7] = 0.0
    got = everywhere(lambda ctx: kl.ops.sample(x, **settings, ctx=ctx))
    assert got.tolist() == kl.ops.sample(x, **settings).tolist()


@pytest.mark.parametrize("V, T", [(1000, 40), (163_840, 4)])
def test_hip_sample_of_wide_rows(V, T):
    rng = np.random.default_rng(V)
    x, settings = any_logits(rng, T, V), any_settings(rng, T)
    assert kl.ops.sample(x, **settings, ctx=context()).tolist() == kl.ops.sample(x, **settings).tolist()


def test_hip_sample_meets_a_share_of_equals_exactly(version):
    x = np.zeros((40, 64), np.float32)
    for top_p in (0.5, float(np.nextafter(np.float32(0.5), 1)), 1 / 64):
        given = dict(top_p=top_p, position=np.arange(40))
        assert kl.ops.sample(x, **given, ctx=context()).tolist() == kl.ops.sample(x, **given).tolist()


def test_hip_sample_says_which_logit_is_wrong(version):
    x = normal(70, 20)
    x[66, 3], x[69, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"logits\[66, 3\] is nan; logits must be finite, or -inf for some"):
        kl.ops.sample(x, ctx=context())
    x[66] = -np.inf
    with pytest.raises(ValueError, match=r"logits\[66, 0\] is -inf"):
        kl.ops.sample(x, ctx=context())
    assert kl.ops.sample(x[:0], ctx=context()).shape == (0,)


# ---- rope, sigmoid_gate ----


@pytest.mark.parametrize("K, rotary", [(1, 0), (2, 2), (15, 14), (17, 2), (34, 34), (66, 64), (600, 600)])
def test_hip_rope_has_the_bytes_of_the_cpu(K, rotary, version):
    """On the host build, whose cosines are the CPU's."""
    for T, far in ((0, 1), (1, 2**31), (7, 10)):
        x, positions = normal(T, 3, K), np.random.default_rng(K).integers(0, far, T)
        given = dict(positions=positions, base=1e4, rotary=rotary)
        wanted = kl.ops.rope(x, **given)
        assert everywhere(lambda ctx, x=x, given=given: kl.ops.rope(x, **given, ctx=ctx)).tobytes() == wanted.tobytes()
        assert kl.ops.rope(x, **given, out=x, ctx=context()).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("D, G", [(1, 1), (40, 1), (40, 8), (33, 33), (700, 7)])
def test_hip_sigmoid_gate_has_the_bytes_of_the_cpu(D, G, version):
    for T in (0, 1, 11):
        x, gate = normal(T, D), normal(T, G, seed=1, scale=30)
        wanted = kl.ops.sigmoid_gate(x, gate)
        assert everywhere(lambda ctx, x=x, g=gate: kl.ops.sigmoid_gate(x, g, ctx=ctx)).tobytes() == wanted.tobytes()
        assert kl.ops.sigmoid_gate(x, gate, out=x, ctx=context()).tobytes() == wanted.tobytes()


def test_hip_rope_checks_its_arguments_as_on_the_cpu():
    with pytest.raises(ValueError, match=r"positions\[1\] is -2"):
        kl.ops.rope(normal(2, 1, 4), [1, -2], base=1e4, rotary=4, ctx=context())
