"""delta_rule: budget at every width and decay, heads, ragged batches, states, splits, checkpoints, errors."""

import numpy as np
import pytest
from delta_inputs import RIM_GATES, inputs, run_and_judge, same, scaled, state_for
from judge import judge

import kimi_linear as kl
from kimi_linear.diff.budgets import budget


@pytest.mark.parametrize("K, V", [(1, 1), (2, 3), (7, 16), (15, 17), (16, 15), (17, 33), (33, 1), (31, 40),
                                  (8, 100), (64, 64), (128, 128), (24, 257)])
@pytest.mark.parametrize("T", [1, 3])
def test_widths(T, K, V):
    x = inputs(T, 2, K, V)
    run_and_judge(x, initial_state=state_for(x))


@pytest.mark.parametrize("gate", ["channel", "head", None])
@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65, 130])
def test_lengths_and_gates(T, gate):
    x = inputs(T, gate=gate)
    run_and_judge(x, initial_state=state_for(x))
    run_and_judge(x)


def test_worked_example():
    """Three tokens of one head, K = V = 2, with values worked out to nine digits."""
    q = kl.ops.l2_norm(np.array([[[1, 2]], [[-1, 1]], [[3, -1]]], np.float32))
    k = kl.ops.l2_norm(np.array([[[2, 1]], [[0, 1]], [[1, -2]]], np.float32))
    v = np.array([[[1, -1]], [[0.5, 2]], [[-2, 1]]], np.float32)
    g = np.array([[[-2.342201332, -0.806372098]], [[-3.402826556, -0.948153968]],
                  [[-0.948153968, -3.402826556]]])
    beta = np.array([[0.5], [0.731058579], [0.268941421]], np.float32)
    o, state = kl.ops.delta_rule(q, k, v, g.astype(np.float32), beta)
    np.testing.assert_allclose(o[:, 0], [[0.282842656, -0.282842656], [0.186973346, 0.726849192],
                                         [-0.266757022, 0.126001403]], rtol=2e-6)
    np.testing.assert_allclose(state[0], [[-0.233700190, 0.119969000], [0.491873158, -0.203588432]],
                               rtol=2e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_every_decay_mixed(gate, seed):
    x = inputs(65, 3, 17, 19, gate=gate, seed=seed)
    rng = np.random.default_rng(seed)
    x["g"] = rng.choice(RIM_GATES, x["g"].shape)
    x["beta"] = rng.choice(np.array([0, 1e-40, 0.3, 1, 2], np.float32), x["beta"].shape)
    o, state = run_and_judge(x, initial_state=state_for(x))
    assert np.isfinite(o).all() and np.isfinite(state).all()


@pytest.mark.parametrize("gate", RIM_GATES)
def test_one_decay_everywhere(gate):
    x = inputs(40, 2, 16, 20)
    x["g"] = np.full_like(x["g"], gate)
    run_and_judge(x, initial_state=state_for(x))


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-20, 1e3, 1e8])
@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_zero_tiny_and_huge(name, scale):
    """Keys of any length, for one token in five: between them the state lives on."""
    run_and_judge(scaled(name, scale))


def test_forgetting_is_exact():
    """After g = -inf the past is gone, whatever it was, as long as it was finite."""
    x = inputs(9, 2, 16, 16)
    x["g"][5] = -np.inf
    o, state = kl.ops.delta_rule(**x, initial_state=1e30 * state_for(x))
    alone = kl.ops.delta_rule(**{n: a[5:] for n, a in x.items()})
    assert np.array_equal(o[5:], alone[0]) and np.array_equal(state, alone[1])


def test_subnormals_are_flushed_here_and_nowhere_else():
    x = inputs(1, 1, 16, 40)
    x["beta"][:], x["g"] = 0, np.full_like(x["g"], -0.0)
    tiny = np.full((1, 16, 40), 1e-39, np.float32)
    for ctx in (kl.Context(threads=1), kl.Context(threads=3)):
        assert not kl.ops.delta_rule(**x, initial_state=tiny, ctx=ctx)[1].any()
        assert (tiny * np.float32(1) == tiny).all()
        assert (kl.ops.add(tiny, tiny, ctx=ctx) == 2 * tiny).all()


def test_threads_that_flushed_subnormals_keep_them_afterwards():
    """The threads of a context go on to other ops: what a thread does there must not hang on what it did before."""
    ctx, x = kl.Context(threads=3), inputs(64, 12, 16, 16)
    channels, taps = np.ones((64, 4096), np.float32), np.ones((4096, 4), np.float32)
    tiny = np.full((512, 4096), 1e-39, np.float32)
    for _ in range(4):
        kl.ops.delta_rule(**x, ctx=ctx)
        assert (kl.ops.add(tiny, tiny, ctx=ctx) == 2 * tiny).all()
        kl.ops.short_conv(channels, taps, ctx=ctx)
        assert (kl.ops.add(tiny, tiny, ctx=ctx) == 2 * tiny).all()


def test_beta_0_is_pure_decay():
    x = inputs(10, 2, 16, 24)
    x["beta"][:] = 0
    x["g"] = np.full_like(x["g"], -0.0)
    start = state_for(x)
    o, state = run_and_judge(x, initial_state=start)
    assert state.tobytes() == start.tobytes()
    x["g"] = np.log(np.full_like(x["g"], 0.5)) - np.float32(0.25)
    _, state = run_and_judge(x, initial_state=start)
    np.testing.assert_allclose(state, start * np.exp(10 * np.float64(x["g"][0, 0, 0])), rtol=4e-6)


def test_beta_1_reads_back_what_it_wrote():
    """S^T k = v after writing v at a unit key with beta = 1; beta = 2 reflects: 2 v - what was there."""
    x = inputs(1, 2, 64, 32, gate=None)
    x["q"], start = x["k"], state_for(x)
    x["beta"][:] = 1
    np.testing.assert_allclose(kl.ops.delta_rule(**x, scale=1, initial_state=start)[0], x["v"], atol=2e-5)
    x["beta"][:] = 2
    before = np.einsum("hkv,thk->thv", start, x["k"])
    o, _ = kl.ops.delta_rule(**x, scale=1, initial_state=start)
    np.testing.assert_allclose(o, 2 * x["v"] - before, atol=4e-5)


@pytest.mark.parametrize("head_map", ["grouped", "tiled"])
@pytest.mark.parametrize("Hk, Hv", [(1, 4), (2, 4), (3, 12)])
def test_value_heads_share_key_heads(Hk, Hv, head_map):
    x = inputs(6, Hv, 9, 20, Hk=Hk)
    got = run_and_judge(x, head_map=head_map)
    heads = np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk
    wide = x | dict(q=x["q"][:, heads], k=x["k"][:, heads])
    assert same(got, kl.ops.delta_rule(**wide))


@pytest.mark.parametrize("keep", [True, False])
def test_ragged_equals_each_alone(keep):
    offsets = [0, 0, 1, 2, 2, 70, 83]
    x = inputs(83, 2, 17, 33)
    start = state_for(x, (6,)) if keep else None
    o, state = run_and_judge(x, initial_state=start, offsets=offsets)
    for n, (a, b) in enumerate(zip(offsets, offsets[1:])):
        part = {i: y[a:b] for i, y in x.items()}
        alone = kl.ops.delta_rule(**part, initial_state=start[n] if keep else None)
        assert same((o[a:b], state[n]), alone)
    wanted = start[0] if keep else np.zeros_like(state[0])
    assert state[0].tobytes() == wanted.tobytes()


def test_batch_axis_equals_each_alone():
    x = inputs(3 * 7, 2, 16, 20)
    start = state_for(x, (3,))
    batch = {n: a.reshape(3, 7, *a.shape[1:]) for n, a in x.items()}
    o, state = kl.ops.delta_rule(**batch, initial_state=start)
    for n in range(3):
        alone = kl.ops.delta_rule(**{i: a[n] for i, a in batch.items()}, initial_state=start[n])
        assert same((o[n], state[n]), alone)
    head = batch | dict(g=batch["g"][..., 0])
    wide = batch | dict(g=head["g"][..., None].repeat(16, -1))
    assert same(kl.ops.delta_rule(**head), kl.ops.delta_rule(**wide))


@pytest.mark.parametrize("mild", [True, False])
@pytest.mark.parametrize("cuts", [[1], [64], [1, 17, 64, 65], [10, 10, 100], list(range(1, 130))])
def test_any_split_of_the_recurrence_gives_the_same_bytes(cuts, mild):
    x = inputs(130, 2, 18, 40, decay=0.3)
    if not mild:  # states on both sides of the subnormals
        gates = np.array([-1e-3, -20, -60, -86, -100], np.float32)
        x["g"] = np.random.default_rng(1).choice(gates, x["g"].shape)
    start = state_for(x)
    whole = kl.ops.delta_rule(**x, initial_state=start, form="recurrent")
    pieces, state = [], start
    for a, b in zip([0, *cuts], [*cuts, 130]):
        o, state = kl.ops.delta_rule(**{n: y[a:b] for n, y in x.items()}, initial_state=state, form="recurrent")
        pieces.append(o)
    assert same((np.concatenate(pieces), state), whole)


def test_checkpoints_are_the_states_of_prefixes():
    x = inputs(70, 2, 9, 20)
    start = state_for(x)
    plain = kl.ops.delta_rule(**x, initial_state=start)
    counts = [0, 1, 5, 64, 70]
    *result, kept = kl.ops.delta_rule(**x, initial_state=start, checkpoints=counts)
    assert same(result, plain)
    for count, state in zip(counts, kept, strict=True):
        prefix = {n: y[:count] for n, y in x.items()}
        assert state.tobytes() == kl.ops.delta_rule(**prefix, initial_state=start)[1].tobytes()
    run_and_judge(x, checkpoints=16)
    ragged = [0, 20, 20, 70]
    *result, kept = run_and_judge(x, checkpoints=16, offsets=ragged)
    assert same(result, kl.ops.delta_rule(**x, offsets=ragged))
    lists = kl.ops.delta_rule(**x, offsets=ragged, checkpoints=[[16], [], [16, 32, 48]])[2]
    assert lists.tobytes() == kept.tobytes()
    assert kl.ops.delta_rule(**x, checkpoints=[])[2].shape == (0, 2, 9, 20)
    state = start.copy()
    in_place = kl.ops.delta_rule(**x, initial_state=state, final_state=state, checkpoints=counts)
    assert same(in_place[:2], plain) and in_place[1] is state


@pytest.mark.parametrize("V", [20, 64, 128])
@pytest.mark.parametrize("T", [0, 1, 70])
def test_state_and_output_in_place(T, V):
    x = inputs(T, 2, 16, V)
    state = state_for(x)
    wanted = kl.ops.delta_rule(**x, initial_state=state)
    for ctx in (kl.Context(threads=1), kl.Context(threads=3)):
        mine, v = state.copy(), x["v"].copy()
        got = kl.ops.delta_rule(**x | dict(v=v), initial_state=mine, final_state=mine, out=(v, None), ctx=ctx)
        assert got[0] is v and got[1] is mine and same(got, wanted)


def test_memory_that_overlaps_otherwise_is_copied_first():
    x = inputs(6, 2, 16, 16)
    wanted = kl.ops.delta_rule(**x)
    assert kl.ops.delta_rule(**x, out=(x["q"], None))[0].tobytes() == wanted[0].tobytes()
    pool = np.zeros((3, 2, 16, 16), np.float32)
    pool[:2] = state_for(inputs(6), (2,))
    offsets = [0, 2, 6]
    x = inputs(6, 2, 16, 16)
    wanted = kl.ops.delta_rule(**x, initial_state=pool[:2], offsets=offsets)
    assert same(kl.ops.delta_rule(**x, initial_state=pool[:2], offsets=offsets, final_state=pool[1:]), wanted)


def test_norm_inside_has_the_bytes_of_the_op():
    x = inputs(5, 2, 33, 16)
    x["q"], x["k"] = 3 * x["q"], 0.2 * x["k"]
    got = run_and_judge(x, l2_norm=True)
    normed = x | dict(q=kl.ops.l2_norm(x["q"]), k=kl.ops.l2_norm(x["k"]))
    assert same(got, kl.ops.delta_rule(**normed))


def test_scale_is_on_q():
    x = inputs(5, 2, 16, 16)
    o, state = run_and_judge(x, scale=1.0)
    assert same((o / 4, state), kl.ops.delta_rule(**x))  # 16 ** -0.5 is exact
    run_and_judge(x, scale=-3.7)


def test_nan_reaches_what_it_reaches_in_the_recurrence():
    x = inputs(8, 2, 16, 20)
    for name in x:
        bad = x | {name: x[name].copy()}
        bad[name][(4, 1, 3)[:x[name].ndim]] = np.nan
        got, ref = kl.ops.delta_rule(**bad), kl.reference.delta_rule(**bad)
        for a, b in zip(got, ref):
            assert np.array_equal(np.isnan(a), np.isnan(b)), name
        assert np.isfinite(got[0][:4]).all() and np.isfinite(got[0][:, 0]).all()


@pytest.mark.parametrize("form, factor", [("recurrent", 0.9), ("auto", 0.5)])
@pytest.mark.parametrize("T", [5, 65])
def test_the_budget_rejects_what_is_wrong(T, form, factor):
    """The gate that is off is -0.002 in the longer case: by 2e-4, by 1e-3."""
    x = inputs(T, 3, 16, 16)
    x["g"] = np.maximum(x["g"], -0.2)
    start = state_for(x)
    ref = kl.reference.delta_rule(**x, initial_state=start)
    heads = [1, 2, 0]

    def decay_after_update():
        S, o = np.float64(start), np.zeros(ref[0].shape)
        for t in range(T):
            d = x["beta"][t][:, None] * (x["v"][t] - np.einsum("hkv,hk->hv", S, x["k"][t]))
            S = np.exp(x["g"][t])[:, :, None] * (S + x["k"][t][:, :, None] * d[:, None])
            o[t] = np.einsum("hkv,hk->hv", S, x["q"][t]) / 4
        return o, S

    one_channel = x["g"].copy()
    one_channel[T // 2, 1, 3] *= factor
    short = (x["g"].view(np.uint32) & 0xFFFF0000).view(np.float32)
    bad = {
        "state transposed": (ref[0], ref[1].transpose(0, 2, 1)),
        "no scale": kl.reference.delta_rule(**x, initial_state=start, scale=1),
        "decay after the update": decay_after_update(),
        "no initial state": kl.reference.delta_rule(**x),
        "heads shifted": kl.reference.delta_rule(**x | dict(q=x["q"][:, heads]), initial_state=start),
        "one gate of one channel": kl.reference.delta_rule(**x | dict(g=one_channel), initial_state=start),
        "bfloat16 gates": kl.reference.delta_rule(**x | dict(g=short), initial_state=start),
    }
    for what, got in bad.items():
        with pytest.raises(AssertionError, match="times its budget"):
            judge("delta_rule", got, ref, **x, initial_state=start, form=form)
            pytest.fail(what)


@pytest.mark.parametrize("form, most", [("recurrent", 100), ("auto", 150)])
@pytest.mark.parametrize("T", [125, 250, 500])
def test_the_budget_stays_tight_over_long_sequences(T, form, most):
    """So many u a token: the bound adds up, it does not grow by powers."""
    x = inputs(T, 2, 32, 32, decay=0.1)
    ref = kl.reference.delta_rule(**x)
    for bound, value in zip(budget("delta_rule", ref, **x, form=form), ref):
        assert np.median(bound) < most * T * 2.0**-24 * np.sqrt((value**2).mean())


X = inputs(4, 4, 8, 6, Hk=2)


def call(**changes):
    return lambda: kl.ops.delta_rule(**X | changes)


@pytest.mark.parametrize("run, error, message", [
    (call(g=-X["g"]), ValueError, r"g\[0, 0, 0\] is .* must be <= 0: was exp\(g\) passed\?"),
    (call(beta=X["beta"] + 3), ValueError, r"beta\[0, 0\] is 3.* within 0\.\.2"),
    (call(beta=-X["beta"] - 1), ValueError, r"beta\[0, 0\] is -1"),
    (call(g=X["g"][:, :2]), ValueError, r"g has shape \[4, 2, 8\]; it must be \[4, 4\] or \[4, 4, 8\]"),
    (call(k=X["k"][..., :7]), ValueError, r"k has shape \[4, 2, 7\]; it must be \[4, 2, 8\]"),
    (call(q=X["q"][:, [0, 0, 0]], k=X["k"][:, [0, 0, 0]]), ValueError, "Hv must be a multiple of Hk"),
    (call(beta=X["beta"][:3]), ValueError, r"beta has shape \[3, 4\]; it must be \[4, 4\]"),
    (call(form="chunked", chunk=257), ValueError, "chunk is 257; it must be 1 to 256"),
    (call(l2_norm=True, l2_eps=-1), ValueError, "eps is -1"),
    (call(form="fast"), ValueError, "form is 'fast'; it must be one of 'auto', 'recurrent', 'chunked'"),
    (call(head_map="odd"), ValueError, "head_map is 'odd'"),
    (call(scale=np.inf), ValueError, "scale is inf"),
    (call(initial_state=np.zeros((4, 6, 8), np.float32)), ValueError, r"it must be \[4, 8, 6\]"),
    (call(final_state=np.zeros((4, 8, 6))), TypeError, "final_state is float64"),
    (call(offsets=[0, 2]), ValueError, "offsets ends at 2; it must end at T = 4"),
    (call(checkpoints=0), ValueError, "checkpoints is 0; it must be >= 1"),
    (call(checkpoints=[3, 3]), ValueError, r"checkpoints\[0\] is \[3, 3\]; it must rise within 0\.\.4"),
    (call(checkpoints=[5]), ValueError, r"checkpoints\[0\] is \[5\]"),
    (call(checkpoints=[[1], [2]]), ValueError, "checkpoints has 2 lists; there are 1"),
    (call(q=X["q"].astype(float)), TypeError, "q is float64"),
    (call(v=X["v"][0]), ValueError, r"v has shape \[4, 6\]"),
    (call(chunk=0), ValueError, "chunk is 0"),
    (call(out=X["v"]), TypeError, "out must be a tuple of 2"),
])
def test_errors_are_sentences(run, error, message):
    before = {n: a.copy() for n, a in X.items()}
    with pytest.raises(error, match=message):
        run()
    assert all(np.array_equal(before[n], X[n]) for n in X)
