"""Every form of delta_rule beside the float64 recurrence: 65,536 tokens, the rim, overflow, memory."""

import functools

import numpy as np
import pytest
from delta_inputs import FORMS, RIM_GATES, inputs, rim, run_and_judge, same, state_for
from judge import everywhere, guarded, judge

import kimi_linear as kl

U = 2.0**-24
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f['form']}{f.get('chunk', '')}")
GATES = ["channel", "head", None]


def recurrence(q, k, v, g, beta):
    """The formula of docs/math.md#delta_rule in float64, for all heads at once; g [T, H, K]."""
    a, q, k, v, beta = np.exp(np.float64(g))[..., None], np.float64(q), np.float64(k), np.float64(v), np.float64(beta)
    S, o = np.zeros((*q.shape[1:], v.shape[2])), np.empty(v.shape)
    for t in range(len(q)):
        S *= a[t]
        d = beta[t][:, None, None] * (v[t][:, None] - k[t][:, None] @ S)
        S += k[t][..., None] * d
        o[t] = (q[t][:, None] @ S)[:, 0]
    return o * q.shape[2]**-0.5, S


def relative(got, ref):
    """Root mean square error, and the largest, as shares of the reference's root mean square."""
    error, size = np.abs(got - ref), np.sqrt((ref**2).mean()) + np.finfo(np.float32).tiny
    return np.sqrt((error**2).mean()) / size, error.max() / size


# ---- long ----

@functools.cache
def long_case(T=65_536, K=16, V=8):
    """One head for each gate, on the model's range (3) and on the rim (3), and what float64 makes of them."""
    parts = [inputs(T, 1, K, V, gate=gate, seed=i) for i, gate in enumerate(GATES)]
    parts += [rim(T, 1, K, V, gate=gate, seed=3 + i) for i, gate in enumerate(GATES)]
    wide = {n: np.concatenate([p[n] for p in parts], axis=1) for n in ("q", "k", "v", "beta")}
    gates = [np.zeros((T, 1, K)) if p["g"] is None else np.broadcast_to(p["g"].reshape(T, 1, -1), (T, 1, K))
             for p in parts]
    o, S = recurrence(**wide, g=np.concatenate(gates, axis=1))
    return parts, [(o[:, h:h + 1], S[h:h + 1]) for h in range(len(parts))]


@EACH_FORM
def test_65536_tokens(form):
    parts, wanted = long_case()
    for i, (x, ref) in enumerate(zip(parts, wanted, strict=True)):
        for value, exact in zip(kl.ops.delta_rule(**x, **form), ref, strict=True):
            rms, largest = relative(value, exact)
            if i < len(GATES):
                assert rms <= 1e-6 and largest <= 2e-5, (i, rms, largest)
            else:
                assert rms <= 4 * np.sqrt(len(x["q"])) * U, (i, rms)


@EACH_FORM
@pytest.mark.parametrize("K, V, gate", [(128, 32, "channel"), (64, 40, "head"), (128, 16, None), (33, 17, "channel")])
def test_wide_heads(K, V, gate, form):
    x = inputs(700, 2, K, V, gate=gate)
    g = np.zeros(x["q"].shape) if gate is None else x["g"].reshape(*x["beta"].shape, -1)
    for value, exact in zip(kl.ops.delta_rule(**x, **form), recurrence(**x | dict(g=g)), strict=True):
        rms, largest = relative(value, exact)
        assert rms <= 1e-6 and largest <= 2e-5, (rms, largest)


# ---- the rim ----

@functools.cache
def rim_case(keys, gate):
    x = rim(290, 2, 20, 18, keys=keys, gate=gate)
    return x | dict(initial_state=state_for(x)), kl.reference.delta_rule(**x, initial_state=state_for(x))


@EACH_FORM
@pytest.mark.parametrize("keys, gate", [("mixed", "channel"), ("mixed", "head"), ("mixed", None), ("zero", "channel"),
                                        ("equal", "channel"), ("equal", None), ("orthogonal", "head"),
                                        ("reflect", "channel"), ("reflect", None)])
def test_the_rim(keys, gate, form):
    x, ref = rim_case(keys, gate)
    T = len(x["q"])

    def run(ctx):
        outputs, checks = zip(*(guarded(r.shape) for r in ref))
        got = kl.ops.delta_rule(**x, **form, out=outputs, ctx=ctx)
        assert all(check() is None for check in checks)
        return got

    got = everywhere(run)
    judge("delta_rule", got, ref, **x, **form)
    for value, exact in zip(got, ref, strict=True):
        rms, _ = relative(value, exact)
        assert rms <= 4 * np.sqrt(T) * U, rms


@EACH_FORM
@pytest.mark.parametrize("K, T, decay, period", [(64, 4096, 0, 1), (128, 1024, -1e-3, 1), (20, 4096, -1e-3, 1),
                                                 (128, 256, -1e-3, 1), (64, 1024, 0, 2), (64, 1024, 0, 4)])
def test_keys_that_reflect_again_and_again(K, T, decay, period, form):
    """A chunk rounds one <k, k> alike in all pairs of its rows: errors that would add up in step, to 20 times this bar,
    if it did not leave such keys to the recurrence."""
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((period, 1, K))
    keys /= np.sqrt((keys**2).sum(-1, keepdims=True))
    q, v = (rng.standard_normal((T, 1, n), dtype=np.float32) for n in (K, 16))
    x = dict(q=kl.ops.l2_norm(q), k=np.resize(keys, (T, 1, K)).astype(np.float32), v=v,
             g=np.full((T, 1, K), decay, np.float32), beta=np.full((T, 1), 2, np.float32))
    ref = kl.reference.delta_rule(**x)
    got = kl.ops.delta_rule(**x, **form)
    for value, exact in zip(got, ref, strict=True):
        rms, _ = relative(value, exact)
        assert rms <= 4 * np.sqrt(T) * U, rms / (4 * np.sqrt(T) * U)
    cut = T - 64 + 17  # the choice is a chunk's own: the same bytes before a later cut
    assert same(kl.ops.delta_rule(**{n: a[:cut] for n, a in x.items()}, **form)[0][: T - 64], got[0][: T - 64])


@functools.cache
def orthogonal_case(T=65_536, K=32):
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.standard_normal((K, K)))[0][np.arange(T) % K, None]
    q, v = (rng.standard_normal((T, 1, K), dtype=np.float32) for _ in range(2))
    x = dict(q=kl.ops.l2_norm(q), k=keys.astype(np.float32), v=v, g=None, beta=np.full((T, 1), 2, np.float32))
    return x | dict(initial_state=state_for(x)), kl.reference.delta_rule(**x, initial_state=state_for(x))


@EACH_FORM
@pytest.mark.parametrize("gate", [None, "channel", "head"])
def test_orthogonal_keys_that_come_again(gate, form):
    """No key meets itself in a chunk, and none is forgotten: what is rounded of <k, k'>, 0 but for the rounding of k,
    adds up in step from period to period."""
    x, ref = orthogonal_case()
    if gate is not None:
        x = x | dict(g=np.full(x["k"].shape if gate == "channel" else x["beta"].shape, -0.0, np.float32))
    for value, exact in zip(kl.ops.delta_rule(**x, **form), ref, strict=True):
        rms, _ = relative(value, exact)
        assert rms <= 4 * np.sqrt(len(x["q"])) * U, rms / (4 * np.sqrt(len(x["q"])) * U)


@EACH_FORM
def test_one_decay_everywhere(form):
    for gate in RIM_GATES:
        x = inputs(40, 2, 16, 20)
        x["g"] = np.full_like(x["g"], gate)
        x["initial_state"] = state_for(x)
        judge("delta_rule", kl.ops.delta_rule(**x, **form), kl.reference.delta_rule(**x), **x, **form)


@EACH_FORM
def test_keys_of_any_length_before_the_norm(form):
    """The sum of squares overflows, is subnormal, or 0."""
    x = rim(40, 2, 24, 18, keys="random")
    for name in "qk":
        length = np.random.default_rng(3).choice([0, 1e-44, 1e-40, 1e-25, 1e-3, 1, 1e20, 1e37, 3e38], (40, 2, 1))
        unit = x[name] / np.abs(x[name]).max(-1, keepdims=True)
        x[name] = (unit * length).astype(np.float32)
    got = run_and_judge(x, **form, l2_norm=True)
    assert all(np.isfinite(a).all() for a in got)
    normed = x | {n: kl.ops.l2_norm(x[n]) for n in "qk"}
    assert same(got, kl.ops.delta_rule(**normed, **form))


# ---- what overflows in a chunk, and not in the recurrence ----

def sparse(T, K, **values):
    """Zeros [T, 1, ..] but for some places; beta is 1."""
    x = {n: np.zeros((T, 1, w), np.float32) for n, w in dict(q=K, k=K, v=40, g=K).items()}
    x["beta"] = np.ones((T, 1), np.float32)
    for name, places in values.items():
        for at, value in places.items():
            x[name][at] = value
    return x


OVERFLOWS = {
    "old value of a long key": (sparse(20, 1, k={0: 1, 1: 2.0**30}, beta={1: 2.0**-60}), 2.0**99),
    "overwritten write under a long query": (
        sparse(20, 2, k={(0, 0, 0): 1, (1, 0, 0): 1}, v={0: 2.0**90}, q={(1, 0, 0): 2.0**60}), 0),
    "products of long keys": (sparse(20, 2, k={(3, 0, 0): 2.0**70, (4, 0, 0): 2.0**70}, beta={3: 0, 4: 0}), 1),
    "a long key long ago": (sparse(20, 2, k={(0, 0, 1): 2.0**70, (9, 0, 1): 2.0**70}, beta={0: 0, 9: 0},
                                   g={(5, 0, 1): -200}), 1),
}


@EACH_FORM
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", OVERFLOWS)
def test_overflow_is_left_to_the_recurrence(case, gate, form):
    x, first = OVERFLOWS[case]
    x = x | dict(g={"channel": x["g"], "head": x["g"][..., -1], None: None}[gate])
    x["initial_state"] = np.full((1, x["q"].shape[2], 40), first, np.float32)
    got = run_and_judge(x, **form, scale=1)
    assert all(np.isfinite(a).all() for a in got)


def test_one_strip_of_columns_overflows():
    """The others keep the bytes of the chunk, o written over v all the same."""
    x = inputs(32, 1, 8, 100)
    plain = x | dict(initial_state=state_for(x))
    big = plain | dict(v=x["v"].copy(), q=x["q"].copy(), k=x["k"].copy(), beta=x["beta"].copy())
    big["k"][16:18], big["beta"][16:18] = 0, 1
    big["k"][16:18, 0, 0] = 1
    big["q"][17, 0, 0] = 2.0**60
    big["v"][17, 0, 40] = 0
    other = big | dict(v=big["v"].copy())
    big["v"][16, 0, 40] = 2.0**90
    ref = kl.reference.delta_rule(**big)
    for ctx in (kl.Context(threads=1), kl.Context(threads=4)):
        v = big["v"].copy()
        got = kl.ops.delta_rule(**big | dict(v=v), out=(v, None), ctx=ctx)
        judge("delta_rule", got, ref, **big)
        for a, b in zip(got, kl.ops.delta_rule(**other), strict=True):
            apart = (a != b).reshape(-1, 100).any(axis=0)
            assert apart[40] and not np.delete(apart, slice(32, 64)).any()


# ---- memory ----

@EACH_FORM
@pytest.mark.parametrize("T, V", [(0, 20), (1, 33), (40, 20), (77, 70)])
def test_state_and_output_in_place(T, V, form):
    x = inputs(T, 2, 16, V)
    start = state_for(x)
    wanted = kl.ops.delta_rule(**x, initial_state=start, **form)

    def run(ctx):
        (state, check_state), (v, check_v) = guarded(start.shape), guarded(x["v"].shape)
        state[...], v[...] = start, x["v"]
        got = kl.ops.delta_rule(**x | dict(v=v), initial_state=state, final_state=state, out=(v, None), **form, ctx=ctx)
        assert got[0] is v and got[1] is state
        check_state()
        check_v()
        return got

    assert same(everywhere(run), wanted)


@EACH_FORM
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_strided_and_read_only_inputs(gate, form):
    x = inputs(50, 2, 9, 21, gate=gate)
    x["initial_state"] = state_for(x)
    wanted = kl.ops.delta_rule(**x, **form)
    spread = {}
    for name, a in x.items():
        wide = np.full((2 * a.shape[0], *a.shape[1:-1], 3 * a.shape[-1]), np.nan, np.float32)
        spread[name] = wide[::-2, ..., 1::3]
        spread[name][...] = a
        spread[name].flags.writeable = False
    assert same(kl.ops.delta_rule(**spread, **form), wanted)


# ---- the form of a context ----

def test_a_context_says_what_auto_is():
    x = inputs(90, 2, 16, 20)
    x["initial_state"] = state_for(x)
    own = {form: kl.ops.delta_rule(**x, form=form) for form in ("auto", "recurrent", "chunked")}
    assert len({o.tobytes() for o, _ in own.values()}) == 3
    for form, wanted in own.items():
        ctx = kl.Context(delta_rule=form)
        assert ctx.delta_rule == form and f"delta_rule={form!r}" in repr(ctx)
        assert same(kl.ops.delta_rule(**x, ctx=ctx), wanted)
        for called in ("recurrent", "chunked"):
            assert same(kl.ops.delta_rule(**x, form=called, ctx=ctx), own[called])
    chunked = kl.ops.delta_rule(**x, form="chunked", chunk=7)
    assert not same(chunked, own["chunked"])
    assert same(kl.ops.delta_rule(**x, chunk=7, ctx=kl.Context(delta_rule="chunked")), chunked)


@pytest.mark.parametrize("T", [15, 16, 17, 32, 53])
def test_auto_is_chunks_of_16_and_the_recurrence_behind_them(T):
    x = inputs(T, 2, 16, 20)
    wanted, state, whole = [], None, T // 16 * 16
    for first, last, form in ((0, whole, dict(form="chunked", chunk=16)), (whole, T, dict(form="recurrent"))):
        part = {n: a[first:last] for n, a in x.items()}
        o, state = kl.ops.delta_rule(**part, initial_state=state, **form)
        wanted.append(o)
    assert same(kl.ops.delta_rule(**x), (np.concatenate(wanted), state))


@pytest.mark.parametrize("make, message", [
    (lambda: kl.Context(delta_rule="fast"), "delta_rule is 'fast'; it must be one of 'auto', 'recurrent', 'chunked'"),
    (lambda: kl.Context(delta_rule=None), "delta_rule is None"),
    (lambda: kl._core.Context(1, None, 0, 3), "delta_rule is 3; it must be auto, recurrent or chunked"),
    (lambda: kl._core.Context(1, None, 0, -1), "delta_rule is -1"),
])
def test_other_forms_of_a_context_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- errors ----

X = inputs(4, 4, 8, 6, Hk=2)


@pytest.mark.parametrize("changes, message", [
    (dict(chunk=0), "chunk is 0; it must be 1 to 256"),
    (dict(chunk=257), "chunk is 257"),
    (dict(form="chunk"), "form is 'chunk'"),
    (dict(k=X["k"][:3]), r"k has shape \[3, 2, 8\]"),
    (dict(v=X["v"][:, :3]), "Hv must be a multiple of Hk"),
    (dict(g=X["g"][:3]), r"g has shape \[3, 4, 8\]"),
    (dict(beta=X["beta"][:, :2]), r"beta has shape \[4, 2\]"),
    (dict(initial_state=np.zeros((3, 8, 6), np.float32)), r"initial_state has shape \[3, 8, 6\]"),
    (dict(initial_state=np.zeros((1, 4, 8, 6), np.float32)), r"initial_state has shape"),
    (dict(offsets=[0, 3, 2, 4]), r"offsets"),
    (dict(offsets=[1, 4]), r"offsets"),
    (dict(offsets=[0, 5]), r"offsets ends at 5"),
    (dict(offsets=[0, 2, 4], checkpoints=[[1], [3]]), r"checkpoints\[1\] is \[3\]"),
    (dict(checkpoints=[2, 1]), r"checkpoints\[0\] is \[2, 1\]"),
    (dict(scale=np.nan), "scale is nan"),
    (dict(l2_norm=True, l2_eps=np.nan), "eps is nan"),
])
@pytest.mark.parametrize("form", ["auto", "chunked", "recurrent"])
def test_nothing_is_written_by_a_call_that_fails(changes, message, form):
    o, state = np.full(X["v"].shape, 7, np.float32), np.full((4, 8, 6), 7, np.float32)
    if "offsets" in changes:
        state = np.full((len(changes["offsets"]) - 1, 4, 8, 6), 7, np.float32)
    if changes.get("v") is not None:
        o = np.full(changes["v"].shape, 7, np.float32)
    with pytest.raises(ValueError, match=message):
        kl.ops.delta_rule(**X | dict(form=form) | changes, out=(o, state))
    assert (o == 7).all() and (state == 7).all()


def raw(T=4, H=2, K=8, V=6, **changes):
    """The call below the Python checks."""
    x = inputs(T, H, K, V)
    given = dict(offsets=np.array([0, T]), N=1, T=T, Hk=H, Hv=H, K=K, V=V, scale=1.0, gate=2, form=0, head_map=0,
                 chunk=64, l2_norm=False, eps=1e-6, marks=None, ends=None, kept=None, n_kept=0) | changes
    x["g"] = x["g"] if given["gate"] == 2 else x["g"][..., 0].copy()
    out = np.full(x["v"].shape, 7, np.float32), np.full((H, K, V), 7, np.float32)
    core = kl.Context()._core
    return lambda: kl._core.delta_rule(core, *out, x["q"], x["k"], x["v"], x["g"], x["beta"], None,
                                       *given.values()), out


@pytest.mark.parametrize("changes, message", [
    (dict(chunk=257), "delta_rule: chunk is 257; it must be 1 to 256"),
    (dict(chunk=-1), "chunk is -1"),
    (dict(form=2, chunk=300), "chunk is 300"),
    (dict(form=3), "form is 3; it must be auto, recurrent or chunked"),
    (dict(form=-1), "form is -1"),
    (dict(gate=7), "gate is 7"),
    (dict(head_map=2), "head_map is 2"),
    (dict(scale=np.inf), "scale is inf"),
    (dict(offsets=np.array([0, 3])), "offsets"),
    (dict(offsets=np.array([1, 4])), "offsets"),
    (dict(l2_norm=True, eps=-1.0), "l2_eps is -1"),
])
def test_errors_below_the_checks_of_python(changes, message):
    call, out = raw(**changes)
    with pytest.raises(ValueError, match=message):
        call()
    assert all((a == 7).all() for a in out)
