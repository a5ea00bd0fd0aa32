"""decay_cumsum: budget in every chunk and width, ragged, in place, subnormals, infinities, errors."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge

import kimi_linear as kl


def gates(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return -np.exp(3 * rng.standard_normal(shape)).astype(np.float32)


def run_and_judge(g, **kw):
    before = g.copy()

    def run(ctx):
        out, check = guarded(g.shape)
        kl.ops.decay_cumsum(g, **kw, out=out, ctx=ctx)
        check()
        return out.copy()

    got = everywhere(run)
    judge("decay_cumsum", got, kl.reference.decay_cumsum(g, **kw), g=g, **kw)
    assert before.tobytes() == g.tobytes()
    return got


@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 257, 600])
@pytest.mark.parametrize("T", [0, 1, 2, 9])
def test_widths(T, width):
    run_and_judge(gates(T, width), chunk=4)


@pytest.mark.parametrize("chunk", [1, 2, 63, 64, 65, 10**30, None])
@pytest.mark.parametrize("T", [64, 130])
def test_chunks(T, chunk):
    run_and_judge(gates(T, 2, 5), chunk=chunk)


def test_is_the_sum_in_rising_order():
    g = gates(70, 3, 7)
    wanted = np.concatenate([np.add.accumulate(g[t:t + 16], axis=0) for t in range(0, 70, 16)])
    assert kl.ops.decay_cumsum(g, chunk=16).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("shape", [(9,), (9, 2), (9, 2, 3), (9, 1, 2, 3)])
def test_any_axes_behind_the_tokens(shape):
    g = gates(*shape)
    assert run_and_judge(g, chunk=4).tobytes() == kl.ops.decay_cumsum(g.reshape(9, -1), chunk=4).tobytes()


@pytest.mark.parametrize("chunk", [4, None])
def test_ragged_equals_each_alone(chunk):
    offsets = [0, 0, 1, 6, 6, 13]
    g = gates(13, 2, 20)
    got = run_and_judge(g, offsets=offsets, chunk=chunk)
    for a, b in zip(offsets, offsets[1:]):
        assert got[a:b].tobytes() == kl.ops.decay_cumsum(g[a:b], chunk=chunk).tobytes()


def test_in_place_and_overlapping():
    g = gates(20, 40)
    wanted = kl.ops.decay_cumsum(g, chunk=8)
    mine = g.copy()
    assert kl.ops.decay_cumsum(mine, chunk=8, out=mine) is mine and mine.tobytes() == wanted.tobytes()
    pool = np.concatenate([g, g[:1]])
    assert kl.ops.decay_cumsum(pool[:20], chunk=8, out=pool[1:]).tobytes() == wanted.tobytes()


def test_rim():
    g = np.array([-0.0, -1e-45, -1e-39, -1e38, -1e38, -np.inf, -1.0, -0.0, -np.nan, -1.0], np.float32)
    c = run_and_judge(g, chunk=None)
    assert np.array_equal(c[1:3], [g[1], g[1] + g[2]]) and g[1] < 0  # subnormals are kept
    assert (c[5:8] == -np.inf).all() and np.isnan(c[8:]).all()
    assert np.isfinite(run_and_judge(g, chunk=9)[9:]).all()  # a chunk begins afresh


def test_the_budget_rejects_what_is_wrong():
    g = gates(40, 6)
    ref = kl.reference.decay_cumsum(g, chunk=16)
    off = g.copy()
    off[20, 3] *= np.float32(1.0001)
    bad = {
        "no chunks": kl.ops.decay_cumsum(g, chunk=None),
        "exclusive": kl.ops.decay_cumsum(g, chunk=16) - g,
        "one gate": kl.ops.decay_cumsum(off, chunk=16),
    }
    for what, got in bad.items():
        with pytest.raises(AssertionError, match="times its budget"):
            judge("decay_cumsum", got, ref, g=g, chunk=16)
            pytest.fail(what)


G = gates(6, 2, 3)


@pytest.mark.parametrize("run, error, message", [
    (lambda out: kl.ops.decay_cumsum(-G, out=out), ValueError, r"g\[0, 0, 0\] is .* must be <= 0: was exp\(g\)"),
    (lambda out: kl.ops.decay_cumsum(G, chunk=0, out=out), ValueError, "chunk is 0; it must be >= 1, or None"),
    (lambda out: kl.ops.decay_cumsum(G, offsets=[0, 5], out=out), ValueError, "offsets ends at 5; it must end at T"),
    (lambda out: kl.ops.decay_cumsum(G, offsets=[0, 4, 3, 6], out=out), ValueError, r"offsets\[2\] is 3 after 4"),
    (lambda out: kl.ops.decay_cumsum(G.astype(float), out=out), TypeError, "g is float64"),
    (lambda out: kl.ops.decay_cumsum(G[..., :0], out=out), ValueError, r"g has shape \[6, 2, 0\]; .* only T may be 0"),
    (lambda out: kl.ops.decay_cumsum(G[0, 0, 0], out=out), ValueError, r"g has shape \[\]"),
    (lambda out: kl.ops.decay_cumsum(G[:5], out=out), ValueError, r"out has shape \[6, 2, 3\]; it must be \[5, 2, 3\]"),
])
def test_errors_are_sentences(run, error, message):
    out = np.full(G.shape, 7, np.float32)
    with pytest.raises(error, match=message):
        run(out)
    assert (out == 7).all()
