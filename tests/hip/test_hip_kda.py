"""The KDA ops on the host build: short_conv, decay_gate, decay_cumsum, delta_rule in every form and version."""

import numpy as np
import pytest
from delta_inputs import RIM_GATES, inputs, rim, same, scaled, state_for
from hip_build import DEVICE, context, everywhere, versions
from judge import guarded, judge, normal

import kimi_linear as kl

FORMS = [dict(form="recurrent"), dict(form="auto"), *(dict(form="chunked", chunk=c) for c in (5, 20))]

version = versions("1", "2", "")


def on_device(run):
    """`run(ctx)`, a tuple of arrays, for both wave sizes and several orders of threads: the same bytes from all."""
    shapes = []

    def flat(ctx):
        got = run(ctx)
        shapes[:] = [a.shape for a in got]
        return np.concatenate([np.ravel(a) for a in got])

    parts = np.split(everywhere(flat), np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
    return tuple(p.reshape(s) for p, s in zip(parts, shapes, strict=True))


# ---- short_conv ----


def conv(x, w, **kw):
    n = () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,)

    def run(ctx):
        (y, check_y), (after, check_after) = guarded(x.shape), guarded((*n, w.shape[1] - 1, w.shape[0]))
        kl.ops.short_conv(x, w, **kw, out=(y, after), ctx=ctx)
        check_y()
        check_after()
        return y, after

    got = on_device(run)
    judge("short_conv", got, kl.reference.short_conv(x, w, **kw), x=x, w=w, **kw)
    return got


@pytest.mark.parametrize("W", range(1, 9))
@pytest.mark.parametrize("T", [0, 1, 2, 9, 33])
def test_hip_short_conv_has_the_bytes_of_the_cpu(T, W, version):
    x, w, history = normal(T, 40, scale=2), normal(40, W, seed=1), normal(W - 1, 40, seed=2)
    for kw in (dict(history=history), dict(activation=None), dict(history=history, activation=None)):
        assert same(conv(x, w, **kw), kl.ops.short_conv(x, w, **kw))


@pytest.mark.parametrize("history", [True, False])
def test_hip_short_conv_ragged_equals_each_alone(history, version):
    offsets, C = [0, 0, 1, 3, 3, 40, 41, 41], 37
    x, w = normal(41, C), normal(C, 4, seed=1)
    states = normal(7, 3, C, seed=2) if history else None
    y, after = conv(x, w, history=states, offsets=offsets)
    for n, (a, b) in enumerate(zip(offsets, offsets[1:])):
        alone = kl.ops.short_conv(x[a:b], w, history=None if states is None else states[n], ctx=context())
        assert same((y[a:b], after[n]), alone)
    if history:
        assert after[0].tobytes() == states[0].tobytes()
        assert after[1, :2].tobytes() == states[1, 1:].tobytes()


@pytest.mark.parametrize("T", [0, 1, 2, 3, 20])
def test_hip_short_conv_history_in_place_and_any_split(T, version):
    x, w, history = normal(T, 20), normal(20, 4, seed=1), normal(3, 20, seed=2)
    wanted = kl.ops.short_conv(x, w, history=history, ctx=context())
    pieces, mine = [], history.copy()
    for part in np.split(x, [1, 1, 5]):
        y, after = kl.ops.short_conv(part, w, history=mine, out=(None, mine), ctx=context())
        assert after is mine
        pieces.append(y)
    assert same((np.concatenate(pieces), mine), wanted)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e15])
def test_hip_short_conv_of_tiny_and_huge_inputs(scale, version):
    x = normal(9, 40, scale=scale)
    _, after = conv(x, normal(40, 4, seed=1))
    assert after.tobytes() == x[-3:].tobytes()


def test_hip_short_conv_nan_reaches_its_channel_for_W_tokens(version):
    x = normal(9, 20)
    x[2, 7] = np.nan
    y, _ = kl.ops.short_conv(x, normal(20, 4, seed=1), ctx=context())
    assert sorted(map(tuple, np.argwhere(np.isnan(y)))) == [(t, 7) for t in range(2, 6)]


# ---- gates ----


@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("H, K", [(1, 1), (3, 1), (2, 17), (3, 128)])
def test_hip_decay_gate_has_the_bytes_of_the_cpu(H, K, bound, version):
    rim_values = np.array([0, -0.0, 1e-45, -1e-40, 87, -87, -104, 1e4, -1e4, np.inf, -np.inf, np.nan], np.float32)
    for T in (0, 1, 5):
        f = normal(T, H, K, scale=6)
        f.reshape(-1)[: rim_values.size] = rim_values[: f.size]
        shape = (H, K) if K > 1 else (H,)
        f = f if K > 1 else f[..., 0]
        given = dict(f=f, rate=np.exp(normal(H)), dt_bias=normal(*shape, seed=1), lower_bound=bound)
        got = everywhere(lambda ctx, given=given: kl.ops.decay_gate(**given, ctx=ctx))
        assert np.array_equal(got, kl.ops.decay_gate(**given), equal_nan=True)
        with np.errstate(all="ignore"):
            finite = given | dict(f=np.nan_to_num(f, posinf=1e4, neginf=-1e4))
            judge("decay_gate", kl.ops.decay_gate(**finite, ctx=context()), kl.reference.decay_gate(**finite),
                  **finite)


@pytest.mark.parametrize("chunk", [None, 1, 3, 16, 1000])
@pytest.mark.parametrize("D", [1, 5, 300])
def test_hip_decay_cumsum_has_the_bytes_of_the_cpu(D, chunk, version):
    for offsets in (None, [0, 0, 1, 7, 7, 30, 31, 41], [0, 0, 41]):
        g = -np.abs(normal(41, D))
        g[5::9] = -np.inf
        g[2::7] = 0
        given = dict(chunk=chunk, offsets=offsets)
        got = everywhere(lambda ctx, g=g, given=given: kl.ops.decay_cumsum(g, **given, ctx=ctx))
        assert got.tobytes() == kl.ops.decay_cumsum(g, **given).tobytes()
        assert kl.ops.decay_cumsum(g, **given, out=g, ctx=context()) is g and g.tobytes() == got.tobytes()


# ---- delta_rule ----


def delta(x, **kw):
    n = () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,)
    shape = (*n, x["v"].shape[1], x["q"].shape[2], x["v"].shape[2])

    def run(ctx):
        (o, check_o), (state, check_state) = guarded(x["v"].shape), guarded(shape)
        got = kl.ops.delta_rule(**x, **kw, out=(o, state), ctx=ctx)
        check_o()
        check_state()
        return got

    got = on_device(run)
    judge("delta_rule", got, kl.reference.delta_rule(**x, **kw), **x, **kw)
    return got


@pytest.mark.parametrize("K, V", [(1, 1), (2, 3), (7, 16), (17, 33), (33, 1), (31, 70), (64, 64), (128, 128),
                                  (130, 20), (24, 257), (32, 64)])
def test_hip_delta_rule_widths(K, V, version):
    x = inputs(18 if K * V < 5000 else 3, 2, K, V)
    delta(x, initial_state=state_for(x))


@pytest.mark.parametrize("gate", ["channel", "head", None])
@pytest.mark.parametrize("T", [0, 1, 16, 39])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hip_delta_rule_forms_and_gates(T, gate, form):
    x = inputs(T, gate=gate)
    delta(x, initial_state=state_for(x), **form)
    delta(x, **form)


@pytest.mark.parametrize("gate", ["channel", "head", None])
def test_hip_delta_rule_oracle_has_the_bytes_of_the_cpu(gate, monkeypatch):
    monkeypatch.setenv("KL_GPU_VERSION", "1")
    x = inputs(20, 2, 17, 33, gate=gate)
    start = state_for(x)
    assert same(delta(x, initial_state=start), kl.ops.delta_rule(**x, initial_state=start, form="recurrent"))


@pytest.mark.parametrize("keys, gate", [("mixed", "channel"), ("reflect", "channel"), ("equal", "head")])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hip_delta_rule_every_decay_mixed(keys, gate, form):
    x = rim(40, 2, 17, 19, keys=keys, gate=gate)
    o, state = delta(x, initial_state=state_for(x), **form)
    assert np.isfinite(o).all() and np.isfinite(state).all()


@pytest.mark.parametrize("gate", RIM_GATES)
def test_hip_delta_rule_one_decay_everywhere(gate, version):
    x = inputs(35, 2, 16, 20)
    x["g"] = np.full_like(x["g"], gate)
    delta(x, initial_state=state_for(x))


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-20, 1e8])
@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_hip_delta_rule_zero_tiny_and_huge(name, scale, version):
    delta(scaled(name, scale))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hip_delta_rule_forgetting_is_exact(form):
    x = inputs(36, 2, 16, 16)
    x["g"][32] = -np.inf
    o, state = kl.ops.delta_rule(**x, initial_state=1e30 * state_for(x), **form, ctx=context())
    assert np.isfinite(o).all() and np.isfinite(state).all()
    judge("delta_rule", (o[32:], state), kl.reference.delta_rule(**{n: a[32:] for n, a in x.items()}),
          **{n: a[32:] for n, a in x.items()})


@pytest.mark.parametrize("head_map", ["grouped", "tiled"])
@pytest.mark.parametrize("Hk, Hv", [(1, 4), (3, 6)])
def test_hip_delta_rule_value_heads_share_key_heads(Hk, Hv, head_map, version):
    x = inputs(18, Hv, 9, 20, Hk=Hk)
    got = delta(x, head_map=head_map)
    heads = np.arange(Hv) // (Hv // Hk) if head_map == "grouped" else np.arange(Hv) % Hk
    wide = x | dict(q=x["q"][:, heads], k=x["k"][:, heads])
    assert same(got, kl.ops.delta_rule(**wide, ctx=context()))


@pytest.mark.parametrize("keep", [True, False])
def test_hip_delta_rule_ragged_equals_each_alone(keep, version):
    offsets = [0, 0, 1, 2, 2, 37, 50]
    x = inputs(50, 2, 17, 33)
    start = state_for(x, (6,)) if keep else None
    o, state = delta(x, initial_state=start, offsets=offsets)
    for n, (a, b) in enumerate(zip(offsets, offsets[1:])):
        part = {i: y[a:b] for i, y in x.items()}
        alone = kl.ops.delta_rule(**part, initial_state=start[n] if keep else None, ctx=context())
        assert same((o[a:b], state[n]), alone)
    assert state[0].tobytes() == (start[0] if keep else np.zeros_like(state[0])).tobytes()


def test_hip_delta_rule_many_heads_have_the_bytes_of_few():
    """From 256 heads on a block has 128 columns, else 32."""
    x = inputs(2, 256, 5, 40)
    few = {n: a[:, :3] for n, a in x.items()}
    whole, part = (kl.ops.delta_rule(**given, form="recurrent", ctx=context()) for given in (x, few))
    assert same((whole[0][:, :3], whole[1][:3]), part)


@pytest.mark.parametrize("form, step", [(dict(form="recurrent"), 1), (dict(form="auto"), 16),
                                        (dict(form="chunked", chunk=20), 20), (dict(form="chunked", chunk=3), 3)])
def test_hip_delta_rule_splits_and_checkpoints_keep_bytes(form, step, version):
    x = inputs(70, 2, 9, 20, decay=0.3)
    start = state_for(x)
    whole = kl.ops.delta_rule(**x, initial_state=start, **form, ctx=context())
    pieces, state = [], start
    for a, b in zip([0, step, 3 * step], [step, 3 * step, 70]):
        part = {n: y[a:b] for n, y in x.items()}
        o, state = kl.ops.delta_rule(**part, initial_state=state, **form, ctx=context())
        pieces.append(o)
    assert same((np.concatenate(pieces), state), whole)
    counts, mine = [0, 1, 5, 19, 64, 70], start.copy()
    *got, kept = kl.ops.delta_rule(**x, initial_state=mine, final_state=mine, checkpoints=counts, **form, ctx=context())
    assert same(got, whole) and got[1] is mine
    for count, state in zip(counts, kept, strict=True):
        prefix = {n: y[:count] for n, y in x.items()}
        wanted = kl.ops.delta_rule(**prefix, initial_state=start, **form, ctx=context())[1]
        assert state.tobytes() == wanted.tobytes(), count
    ragged = dict(offsets=[0, 20, 20, 70], **form)
    lists = kl.ops.delta_rule(**x, checkpoints=[[16], [], [16, 32, 48]], **ragged, ctx=context())
    assert same(lists[:2], kl.ops.delta_rule(**x, **ragged, ctx=context()))


def test_hip_delta_rule_output_over_values(version):
    x = inputs(37, 2, 16, 70)
    wanted = kl.ops.delta_rule(**x, ctx=context())

    def over(ctx):
        v = x["v"].copy()
        got = kl.ops.delta_rule(**x | dict(v=v), out=(v, None), ctx=ctx)
        assert got[0] is v
        return got

    assert same(on_device(over), wanted)


def test_hip_delta_rule_norm_inside_has_the_bytes_of_the_op(version):
    x = inputs(18, 2, 33, 16)
    x["q"], x["k"] = 3 * x["q"], 0.2 * x["k"]
    got = delta(x, l2_norm=True)
    normed = x | {n: kl.ops.l2_norm(x[n], ctx=context()) for n in "qk"}
    assert same(got, kl.ops.delta_rule(**normed, ctx=context()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hip_delta_rule_nan_and_overflow_reach_what_they_reach_in_the_recurrence(form):
    x = inputs(40, 2, 16, 20)
    for name in x:
        bad = x | {name: x[name].copy()}
        bad[name][(20, 1, 3)[:x[name].ndim]] = np.nan
        got, ref = kl.ops.delta_rule(**bad, **form, ctx=context()), kl.reference.delta_rule(**bad)
        for a, b in zip(got, ref):
            assert np.array_equal(np.isnan(a), np.isnan(b)), name
    x["k"][5:9] *= np.float32(1e18)  # L overflows where the recurrence, decayed, does not
    x["k"][30] *= np.float32(1e12)
    x["g"] = np.full_like(x["g"], -90)
    delta(x, **form)


def test_hip_delta_rule_context_has_its_own_form():
    x, asked = inputs(40), kl.Context(device=DEVICE, delta_rule="recurrent")
    recurrent = kl.ops.delta_rule(**x, form="recurrent", ctx=context())
    assert same(kl.ops.delta_rule(**x, ctx=asked), recurrent)
    assert not same(kl.ops.delta_rule(**x, ctx=context()), recurrent)


@pytest.mark.parametrize("change, message", [
    (dict(form="chunked", chunk=257), "chunk is 257; it must be 1 to 256"),
    (dict(scale=np.inf), "scale is inf"), (dict(checkpoints=[50]), r"checkpoints\[0\] is \[50\]"),
])
def test_hip_delta_rule_errors_are_sentences(change, message):
    with pytest.raises(ValueError, match=message):
        kl.ops.delta_rule(**inputs(4), **change, ctx=context())


# ---- its halves ----


def halves_of(x, **kw):
    """intra, then inter on its results, both judged."""
    split = on_device(lambda ctx: kl.ops.delta_rule_intra(**x, **kw, ctx=ctx))
    judge("delta_rule_intra", split, kl.reference.delta_rule_intra(**x, **kw), **x, **kw)
    y = dict(q=x["q"], k=x["k"], g=x["g"], P=split[1], W=split[3], U=split[4])
    start = state_for(x, () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,))
    got = on_device(lambda ctx: kl.ops.delta_rule_inter(**y, **kw, initial_state=start, ctx=ctx))
    judge("delta_rule_inter", got, kl.reference.delta_rule_inter(**y, **kw, initial_state=start), **y, **kw,
          initial_state=start)
    return split, got


@pytest.mark.parametrize("gate", ["channel", "head", None])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_hip_delta_halves_within_budget(chunk, gate):
    for K, V in ((1, 1), (17, 20)):
        halves_of(inputs(20, 2, K, V, gate=gate), chunk=chunk)
    halves_of(inputs(23, 4, 9, 5, Hk=2, gate=gate), chunk=chunk, offsets=[0, 0, 1, 2, 2, 20, 23], head_map="tiled")


@pytest.mark.parametrize("keys", ["mixed", "reflect"])
def test_hip_delta_halves_at_the_rim(keys):
    x = rim(33, 2, 16, 16, keys=keys)
    split, (o, state, d) = halves_of(x, chunk=16)
    assert all(np.isfinite(a).all() for a in (*split, o, state, d))
    y = dict(q=x["q"], k=x["k"], g=x["g"], P=split[1], W=split[3], chunk=16)
    U = split[4].copy()
    again = kl.ops.delta_rule_inter(**y, U=U, out=(None, None, U), initial_state=state_for(x), ctx=context())
    assert again[2] is U and same(again, (o, state, d))


def test_hip_delta_halves_of_no_tokens_hand_the_state_on():
    x = inputs(0)
    split = kl.ops.delta_rule_intra(**x, ctx=context())
    start = state_for(x)
    got = kl.ops.delta_rule_inter(x["q"], x["k"], x["g"], split[1], split[3], split[4], initial_state=start,
                                  ctx=context())
    assert got[1].tobytes() == start.tobytes()
