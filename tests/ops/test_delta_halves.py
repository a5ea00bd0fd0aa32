"""delta_rule_intra and delta_rule_inter: each within its budget at every decay, together the chunked delta rule."""

import numpy as np
import pytest
from delta_inputs import RIM_GATES, inputs, same, state_for
from judge import everywhere, guarded, judge

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

RAGGED = [0, 0, 1, 2, 2, 70, 83]


def guards(*shapes):
    """Outputs full of NaN, and what checks their guards."""
    made = [guarded(shape) for shape in shapes]
    return tuple(out for out, _ in made), lambda: [check() for _, check in made]


def unchanged(given):
    """A check that these arrays are as they were."""
    before = {name: np.copy(a) for name, a in given.items() if isinstance(a, np.ndarray)}

    def check():
        for name, a in before.items():
            assert a.tobytes() == given[name].tobytes(), f"{name} was changed"

    return check


def intra(x, chunk=64, **kw):
    """L, P, T, W, U from everywhere, judged."""
    heads, check_inputs = x["v"].shape[:2], unchanged(x)
    squares, W = (*heads, chunk), (*heads, x["q"].shape[-1])

    def run(ctx):
        out, check = guards(squares, squares, squares, W, x["v"].shape)
        got = kl.ops.delta_rule_intra(**x, chunk=chunk, **kw, out=out, ctx=ctx)
        check()
        assert all(a is b for a, b in zip(got, out, strict=True))
        return got

    got = everywhere(run)
    judge("delta_rule_intra", got, kl.reference.delta_rule_intra(**x, chunk=chunk, **kw), **x, chunk=chunk, **kw)
    check_inputs()
    return got


def of_inter(x, halves):
    """Arguments of delta_rule_inter for those of delta_rule_intra and its results."""
    return dict(q=x["q"], k=x["k"], g=x["g"], P=halves[1], W=halves[3], U=halves[4])


def inter(y, **kw):
    """o, state, d from everywhere, judged."""
    (T, H, V), K = y["U"].shape, y["q"].shape[-1]
    n = () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,)
    check_inputs = unchanged(y | kw)

    def run(ctx):
        out, check = guards((T, H, V), (*n, H, K, V), (T, H, V))
        got = kl.ops.delta_rule_inter(**y, **kw, out=out, ctx=ctx)
        check()
        assert all(a is b for a, b in zip(got, out, strict=True))
        return got

    got = everywhere(run)
    judge("delta_rule_inter", got, kl.reference.delta_rule_inter(**y, **kw), **y, **kw)
    check_inputs()
    return got


def both(x, initial_state=None, **kw):
    """intra, inter, and both together as the chunked delta rule: all judged."""
    halves = intra(x, **kw)
    o, state, d = inter(of_inter(x, halves), initial_state=initial_state, **kw)
    whole = dict(**x, initial_state=initial_state, **kw, form="chunked")
    judge("delta_rule", (o, state), kl.reference.delta_rule(**whole), **whole)
    return halves, (o, state, d)


@pytest.mark.parametrize("K, V", [(1, 1), (2, 3), (7, 16), (15, 17), (16, 15), (17, 33), (33, 1), (128, 128),
                                  (24, 257)])
@pytest.mark.parametrize("T", [1, 19])
def test_widths(T, K, V):
    x = inputs(T, 2, K, V)
    both(x, state_for(x), chunk=16)


@pytest.mark.parametrize("gate", ["channel", "head", None])
@pytest.mark.parametrize("T, chunk", [(0, 64), (1, 64), (64, 64), (65, 64), (20, 1), (20, 3), (35, 17), (90, 256)])
def test_lengths_chunks_and_gates(T, chunk, gate):
    x = inputs(T, gate=gate)
    both(x, state_for(x), chunk=chunk)


@pytest.mark.parametrize("chunk", [16, 33, 64])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_every_decay_mixed(gate, chunk):
    x = inputs(70, 3, 17, 19, gate=gate)
    rng = np.random.default_rng(chunk)
    x["g"] = rng.choice(RIM_GATES, x["g"].shape)
    x["beta"] = rng.choice(np.array([0, 1e-40, 0.3, 1, 2], np.float32), x["beta"].shape)
    for result in both(x, state_for(x), chunk=chunk):
        assert all(np.isfinite(a).all() for a in result)


@pytest.mark.parametrize("gate", RIM_GATES)
def test_one_decay_everywhere(gate):
    x = inputs(40, 2, 16, 20)
    x["g"] = np.full_like(x["g"], gate)
    both(x, state_for(x), chunk=32)


@pytest.mark.parametrize("keys", ["equal", "orthogonal"])
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_keys_that_are_all_or_nothing_to_each_other(keys, beta):
    x = inputs(50, 2, 16, 16)
    x["k"] = np.repeat(x["k"][:1], 50, axis=0)
    if keys == "orthogonal":
        x["k"] = np.repeat(np.eye(16, dtype=np.float32)[np.arange(50) % 16][:, None], 2, axis=1)
    x["beta"][:] = beta
    both(x, state_for(x), chunk=32)


@pytest.mark.parametrize("head_map", ["grouped", "tiled"])
@pytest.mark.parametrize("Hk, Hv", [(1, 4), (2, 4), (3, 12)])
def test_value_heads_share_key_heads(Hk, Hv, head_map):
    x = inputs(20, Hv, 9, 20, Hk=Hk)
    halves, rest = both(x, chunk=16, head_map=head_map)
    heads = np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk
    wide = x | dict(q=x["q"][:, heads], k=x["k"][:, heads])
    assert same(halves, kl.ops.delta_rule_intra(**wide, chunk=16))
    assert same(rest, kl.ops.delta_rule_inter(**of_inter(wide, halves), chunk=16))


@pytest.mark.parametrize("keep", [True, False])
def test_ragged_equals_each_alone(keep):
    x = inputs(83, 2, 17, 33)
    start = state_for(x, (6,)) if keep else None
    halves, (o, state, d) = both(x, start, offsets=RAGGED, chunk=32)
    for n, (a, b) in enumerate(zip(RAGGED, RAGGED[1:])):
        part = {name: y[a:b] for name, y in x.items()}
        alone = kl.ops.delta_rule_intra(**part, chunk=32)
        assert same([y[a:b] for y in halves], alone)
        own = dict(initial_state=start[n] if keep else None, chunk=32)
        assert same((o[a:b], state[n], d[a:b]), kl.ops.delta_rule_inter(**of_inter(part, alone), **own))
    wanted = start[0] if keep else np.zeros_like(state[0])
    assert state[0].tobytes() == wanted.tobytes()


def test_batch_axis_equals_each_alone():
    x = inputs(3 * 7, 2, 16, 20)
    start = state_for(x, (3,))
    batch = {name: a.reshape(3, 7, *a.shape[1:]) for name, a in x.items()}
    halves = kl.ops.delta_rule_intra(**batch, chunk=4)
    rest = kl.ops.delta_rule_inter(**of_inter(batch, halves), initial_state=start, chunk=4)
    for n in range(3):
        one = {name: a[n] for name, a in batch.items()}
        alone = kl.ops.delta_rule_intra(**one, chunk=4)
        assert same([y[n] for y in halves], alone)
        got = kl.ops.delta_rule_inter(**of_inter(one, alone), initial_state=start[n], chunk=4)
        assert same([y[n] for y in rest], got)


def test_what_the_triangles_are():
    """Zeros above the diagonal and past a short chunk's end, ones on T's; (I + L) T = I."""
    x = inputs(21, 2, 16, 16)
    L, P, T, _, _ = kl.ops.delta_rule_intra(**x, chunk=16)
    for begin, n in [(0, 16), (16, 5)]:
        square = {name: a[begin:begin + n].transpose(1, 0, 2) for name, a in dict(L=L, P=P, T=T).items()}
        assert not any(a[..., n:].any() for a in square.values())
        low, strictly_low = np.tri(n, 16), np.tri(n, 16, -1)
        assert np.array_equal(square["L"] != 0, np.broadcast_to(strictly_low != 0, square["L"].shape))
        assert np.array_equal(square["P"] != 0, np.broadcast_to(low != 0, square["P"].shape))
        assert np.array_equal(square["T"] != 0, np.broadcast_to(low != 0, square["T"].shape))
        L_, T_ = np.float64(square["L"][..., :n]), np.float64(square["T"][..., :n])
        np.testing.assert_allclose((np.eye(n) + L_) @ T_, np.broadcast_to(np.eye(n), L_.shape), atol=1e-6)


def test_d_are_the_corrections_of_the_recurrence():
    """d = beta (v - S'^T k), from the states that delta_rule goes through."""
    x = inputs(40, 2, 16, 20)
    start = state_for(x)
    *_, kept = kl.reference.delta_rule(**x, initial_state=start, checkpoints=list(range(40)))
    faded = np.exp(np.float64(x["g"]))[..., None] * kept
    wanted = x["beta"][..., None] * (x["v"] - np.einsum("thkv,thk->thv", faded, x["k"]))
    _, (_, _, d) = both(x, start, chunk=16)
    np.testing.assert_allclose(d, wanted, rtol=1e-5, atol=1e-5)


def test_scale_is_in_p_and_in_the_read_of_the_state():
    x = inputs(20, 2, 16, 16)
    halves, rest = both(x, state_for(x), scale=1.0, chunk=16)
    plain = kl.ops.delta_rule_intra(**x, chunk=16)  # 16 ** -0.5 is exact
    assert same((halves[0], halves[1] / 4, *halves[2:]), plain)
    o, state, d = kl.ops.delta_rule_inter(**of_inter(x, plain), initial_state=state_for(x), chunk=16)
    assert same((rest[0] / 4, *rest[1:]), (o, state, d))


def test_forgetting_is_exact():
    """After g = -inf within a chunk the past is gone, as long as it was finite."""
    x = inputs(9, 2, 16, 16)
    x["g"][5] = -np.inf
    y = of_inter(x, kl.ops.delta_rule_intra(**x, chunk=16))
    wanted = kl.ops.delta_rule_inter(**y, chunk=16)
    y["U"][:5] *= np.float32(1e20)
    got = kl.ops.delta_rule_inter(**y, initial_state=1e30 * state_for(x), chunk=16)
    assert same((got[0][5:], got[1], got[2][5:]), (wanted[0][5:], wanted[1], wanted[2][5:]))


def test_subnormals_are_flushed_here_and_nowhere_else():
    x = inputs(1, 1, 16, 40)
    x["beta"][:], x["g"], x["v"][:] = 1, np.full_like(x["g"], -0.0), 1e-39
    tiny = np.full((1, 16, 40), 1e-39, np.float32)
    for ctx in (kl.Context(threads=1), kl.Context(threads=3)):
        halves = kl.ops.delta_rule_intra(**x, chunk=4, ctx=ctx)
        assert not halves[4].any()
        results = kl.ops.delta_rule_inter(**of_inter(x, halves), initial_state=tiny, chunk=4, ctx=ctx)
        assert not any(a.any() for a in results)
        assert (kl.ops.add(tiny, tiny, ctx=ctx) == 2 * tiny).all()
        nothing = {name: a[:0] for name, a in of_inter(x, halves).items()}
        kept = kl.ops.delta_rule_inter(**nothing, initial_state=tiny, chunk=4, ctx=ctx)[1]
        assert kept.tobytes() == tiny.tobytes()  # no token: handed on


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_nan_lands_where_the_formulas_have_it(gate):
    x = inputs(24, 2, 16, 20, gate=gate)
    y = of_inter(x, kl.ops.delta_rule_intra(**x, chunk=16))
    for op, given in [("delta_rule_intra", x), ("delta_rule_inter", y)]:
        for name in given:
            bad = given | {name: given[name].copy()}
            bad[name][(19, 1, 2)[:bad[name].ndim]] = np.nan  # row 3 of the second chunk
            got, ref = getattr(kl.ops, op)(**bad, chunk=16), getattr(kl.reference, op)(**bad, chunk=16)
            assert any(np.isnan(a).any() for a in got)
            for i, (a, b) in enumerate(zip(got, ref, strict=True)):
                assert np.array_equal(np.isnan(a), np.isnan(b)), f"{op}[{i}], NaN in {name}"


def test_nothing_is_read_above_the_triangle():
    x = inputs(20, 2, 16, 20)
    y = of_inter(x, kl.ops.delta_rule_intra(**x, chunk=16))
    wanted = kl.ops.delta_rule_inter(**y, chunk=16)
    y["P"][np.broadcast_to(np.arange(16) > (np.arange(20) % 16)[:, None, None], y["P"].shape)] = np.nan
    assert same(kl.ops.delta_rule_inter(**y, chunk=16), wanted)


def test_what_overflows_stays():
    """delta_rule runs such a chunk token by token; the halves show what the chunk made of it."""
    x = inputs(4, 1, 16, 16)
    x["k"][1:3] *= np.float32(1e25)
    got = kl.ops.delta_rule_intra(**x, chunk=4)
    assert not np.isfinite(got[0][2]).all() and np.isfinite(got[0][:2]).all() and np.isfinite(got[0][3, 0, 0])
    assert everywhere(lambda ctx: kl.ops.delta_rule_intra(**x, chunk=4, ctx=ctx))[0].shape == got[0].shape


def test_outputs_in_place_and_overlapping():
    x = inputs(20, 2, 16, 16)
    start = state_for(x)
    halves = kl.ops.delta_rule_intra(**x, chunk=16)
    y = of_inter(x, halves)
    wanted = kl.ops.delta_rule_inter(**y, initial_state=start, chunk=16)
    for ctx in (kl.Context(threads=1), kl.Context(threads=3)):
        state, U = start.copy(), y["U"].copy()
        got = kl.ops.delta_rule_inter(**y | dict(U=U), initial_state=state, chunk=16, final_state=state,
                                      out=(None, None, U), ctx=ctx)
        assert got[1] is state and got[2] is U and same(got, wanted)
        U, W = y["U"].copy(), y["W"].copy()
        got = kl.ops.delta_rule_inter(**y | dict(U=U, W=W), initial_state=start, chunk=16, out=(U, None, W), ctx=ctx)
        assert got[0] is U and got[2] is W and same(got, wanted)
        v, P = x["v"].copy(), np.empty_like(halves[1])
        got = kl.ops.delta_rule_intra(**x | dict(v=v), chunk=16, out=(None, P, None, None, v), ctx=ctx)
        assert got[1] is P and got[4] is v and same(got, halves)


def test_the_budgets_reject_what_is_wrong():
    x = inputs(40, 3, 16, 16)
    x["g"] = np.maximum(x["g"], -0.2)
    start = state_for(x)
    one_gate = x["g"].copy()
    one_gate[20, 1, 3] *= 0.9
    ref = kl.reference.delta_rule_intra(**x, chunk=16)
    bad = {
        "no scale": kl.reference.delta_rule_intra(**x, scale=1, chunk=16),
        "heads shifted": kl.reference.delta_rule_intra(**x | dict(k=x["k"][:, [1, 2, 0]]), chunk=16),
        "one gate of one channel": kl.reference.delta_rule_intra(**x | dict(g=one_gate), chunk=16),
        "another chunk": kl.reference.delta_rule_intra(**x, chunk=16, offsets=[0, 8, 40]),
        "T without its diagonal": (*ref[:2], ref[2] - (ref[2] == 1), *ref[3:]),
        "L with the other sign": (-ref[0], *ref[1:]),
    }
    for what, got in bad.items():
        with pytest.raises(AssertionError, match="times its budget"):
            judge("delta_rule_intra", got, ref, **x, chunk=16)
            pytest.fail(what)
    y = of_inter(x, [np.float32(a) for a in ref]) | dict(initial_state=start, chunk=16)
    ref = kl.reference.delta_rule_inter(**y)
    bad = {
        "no scale": kl.reference.delta_rule_inter(**y, scale=1),
        "no initial state": kl.reference.delta_rule_inter(**y | dict(initial_state=None)),
        "one gate of one channel": kl.reference.delta_rule_inter(**y | dict(g=one_gate)),
        "P transposed": kl.reference.delta_rule_inter(**y | dict(P=y["P"][..., ::-1])),
        "U for d": (*ref[:2], y["U"]),
    }
    for what, got in bad.items():
        with pytest.raises(AssertionError, match="times its budget"):
            judge("delta_rule_inter", got, ref, **y)
            pytest.fail(what)


def test_the_budgets_are_tight():
    """Median of the bounds, in u of the result's rms."""
    x = inputs(128, 2, 32, 32, decay=0.1)
    halves = kl.reference.delta_rule_intra(**x)
    y = of_inter(x, [np.float32(a) for a in halves])
    for op, given in [("delta_rule_intra", x), ("delta_rule_inter", y)]:
        ref = getattr(kl.reference, op)(**given)
        for bound, value in zip(budget(op, ref, **given), ref, strict=True):
            there = bound > 0
            assert np.median(bound[there]) < 500 * 2.0**-24 * np.sqrt((value[there]**2).mean())


X = inputs(4, 4, 8, 6, Hk=2)
Y = of_inter(X, kl.ops.delta_rule_intra(**X, chunk=2)) | dict(chunk=2)


def first(**changes):
    out = tuple(np.full(s, 7, np.float32) for s in [(4, 4, 2)] * 3 + [(4, 4, 8), (4, 4, 6)])
    return lambda: (out, lambda: kl.ops.delta_rule_intra(**dict(X, chunk=2, out=out) | changes))


def second(**changes):
    out = tuple(np.full(s, 7, np.float32) for s in [(4, 4, 6), (4, 8, 6), (4, 4, 6)])
    return lambda: (out, lambda: kl.ops.delta_rule_inter(**dict(Y, out=out) | changes))


@pytest.mark.parametrize("make, error, message", [
    (first(g=-X["g"]), ValueError, r"g\[0, 0, 0\] is .* must be <= 0: was exp\(g\) passed\?"),
    (first(g=X["g"][:, :2]), ValueError, r"g has shape \[4, 2, 8\]; it must be \[4, 4\] or \[4, 4, 8\]"),
    (first(beta=X["beta"] + 3), ValueError, r"beta\[0, 0\] is 3.* within 0\.\.2"),
    (first(beta=X["beta"][:3]), ValueError, r"beta has shape \[3, 4\]; it must be \[4, 4\]"),
    (first(k=X["k"][..., :7]), ValueError, r"k has shape \[4, 2, 7\]; it must be \[4, 2, 8\]"),
    (first(q=X["q"][:, [0, 0, 0]], k=X["k"][:, [0, 0, 0]]), ValueError, "Hv must be a multiple of Hk"),
    (first(v=X["v"][0]), ValueError, r"v has shape \[4, 6\]"),
    (first(v=X["v"][..., :0]), ValueError, "only T may be 0"),
    (first(q=X["q"].astype(float)), TypeError, "q is float64"),
    (first(chunk=0), ValueError, "chunk is 0; it must be 1 to 256"),
    (first(chunk=257), ValueError, "chunk is 257; it must be 1 to 256"),
    (first(chunk=3), ValueError, r"out\[0\] has shape \[4, 4, 2\]; it must be \[4, 4, 3\]"),
    (first(scale=np.nan), ValueError, "scale is nan; it must be finite"),
    (first(head_map="odd"), ValueError, "head_map is 'odd'"),
    (first(offsets=[0, 2]), ValueError, "offsets ends at 2; it must end at T = 4"),
    (first(out=X["v"]), TypeError, "out must be a tuple of 5"),
    (second(g=-X["g"]), ValueError, r"g\[0, 0, 0\] is .* must be <= 0"),
    (second(chunk=4), ValueError, r"P has shape \[4, 4, 2\]; it must be \[4, 4, 4\]"),
    (second(W=Y["W"][..., :7]), ValueError, r"W has shape \[4, 4, 7\]; it must be \[4, 4, 8\]"),
    (second(U=Y["U"][:3]), ValueError, r"q has shape \[4, 2, 8\]; it must be \[3, Hk, K\]"),
    (second(q=X["q"][:, [0, 0, 0]], k=X["k"][:, [0, 0, 0]]), ValueError, r"U \[4, 4, 6\]; Hv must be a multiple"),
    (second(U=Y["U"].astype(float)), TypeError, "U is float64"),
    (second(initial_state=np.zeros((4, 6, 8), np.float32)), ValueError, r"it must be \[4, 8, 6\]"),
    (second(final_state=np.zeros((4, 8, 6), np.float32)), ValueError, r"final_state and out\[1\] are two arrays"),
    (second(out=None, final_state=np.zeros((4, 8, 6))), TypeError, "final_state is float64"),
    (second(out=(None, None)), TypeError, "out must be a tuple of 3"),
    (second(offsets=[1, 4]), ValueError, "offsets must begin with 0"),
])
def test_errors_are_sentences(make, error, message):
    out, run = make()
    check = unchanged(X | {name: Y[name] for name in ("P", "W", "U")})
    with pytest.raises(error, match=message):
        run()
    check()
    assert all((a == 7).all() for a in out), "written before the error"
