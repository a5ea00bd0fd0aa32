"""What holds for delta_rule on any shape, width, form and split: bytes where the laws say bytes, budgets elsewhere."""

import numpy as np
from delta_inputs import inputs, rim, run_and_judge, same, state_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from judge import everywhere

import kimi_linear as kl
from kimi_linear.diff.budgets import budget

GATES = ["channel", "head", None]
WIDTHS = st.one_of(st.sampled_from([1, 15, 16, 17, 31, 32, 33, 64, 65, 128, 130]), st.integers(1, 130))


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True)


@st.composite
def forms(draw):
    form = draw(st.sampled_from(["recurrent", "auto", "chunked"]))
    return dict(form=form, chunk=draw(st.one_of(st.integers(1, 40), st.integers(1, 256)))) if form == "chunked" else \
        dict(form=form)


def step_of(form):
    """A split at its multiples keeps all bytes."""
    return {"recurrent": 1, "auto": 16}.get(form["form"], form.get("chunk"))


@st.composite
def calls(draw, most=70, work=300_000):
    """Arguments of a call (inputs, options) of some `work` multiplications at most; several sequences or one."""
    K, V = draw(WIDTHS), draw(WIDTHS)
    Hk, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    most = max(2, min(most, work // (Hk * groups * K * V)))
    lengths = draw(st.one_of(st.integers(0, most).map(lambda n: [n]),
                             st.lists(st.one_of(st.sampled_from([0, 1, 16, 17]), st.integers(0, most)), max_size=5)))
    ragged = len(lengths) != 1 or draw(st.booleans())
    T, gate, seed = sum(lengths), draw(st.sampled_from(GATES)), draw(st.integers(0, 2**32))
    if draw(st.booleans()):
        x = rim(T, Hk * groups, K, V, gate=gate, seed=seed)
    else:
        x = inputs(T, Hk * groups, K, V, gate=gate, seed=seed)
    x = x | dict(q=x["q"][:, :Hk].copy(), k=x["k"][:, :Hk].copy())
    options = draw(forms()) | dict(head_map=draw(st.sampled_from(["grouped", "tiled"])), l2_norm=draw(st.booleans()))
    if ragged:
        options["offsets"] = np.cumsum([0, *lengths])
    if draw(st.booleans()):
        options["initial_state"] = state_for(x, (len(lengths),) if ragged else ())
    return x, options


def sequences(x, options):
    """Each sequence's inputs and options."""
    offsets = options.get("offsets")
    ranges = [(0, len(x["q"]))] if offsets is None else list(zip(offsets, offsets[1:]))
    for n, (a, b) in enumerate(ranges):
        own = {name: value for name, value in options.items() if name != "offsets"}
        if offsets is not None and "initial_state" in own:
            own["initial_state"] = own["initial_state"][n]
        yield {name: value if value is None else value[a:b] for name, value in x.items()}, own


@examples(60)
@given(calls())
def test_the_budget_holds_and_threads_and_instruction_sets_change_no_byte(call):
    x, options = call
    run_and_judge(x, **options)


@examples(60)
@given(calls(), st.data())
def test_a_split(call, data):
    """At a multiple of the form's step: the same bytes. Elsewhere: each run within its budget."""
    x, options = call
    x, options = data.draw(st.sampled_from(list(sequences(x, options)) or [(x, options)]))
    assume("offsets" not in options)
    T = len(x["q"])
    whole = kl.ops.delta_rule(**x, **options)

    def run(cuts):
        state, parts = options.get("initial_state"), []
        for a, b in zip([0, *cuts], [*cuts, T]):
            part = {name: value if value is None else value[a:b] for name, value in x.items()}
            o, state = kl.ops.delta_rule(**part, **options | dict(initial_state=state))
            parts.append(o)
        return np.concatenate(parts), state

    step = step_of(options)
    cuts = sorted(step * i for i in data.draw(st.lists(st.integers(0, T // step), max_size=4)))
    assert same(run(cuts), whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    ref = kl.reference.delta_rule(**x, **options)
    for a, b, bound in zip(run(cuts), whole, budget("delta_rule", ref, **x, **options), strict=True):
        assert (np.abs(np.float64(a) - b) <= 2 * bound).all()


@examples(60)
@given(calls(most=100, work=1 << 21))
def test_a_batch_gives_each_sequence_the_bytes_it_gets_alone(call):
    x, options = call
    o, state = kl.ops.delta_rule(**x, **options)
    alone = [kl.ops.delta_rule(**part, **own) for part, own in sequences(x, options)]
    assert o.tobytes() == b"".join(a.tobytes() for a, _ in alone)
    assert state.tobytes() == b"".join(b.tobytes() for _, b in alone)


@examples(60)
@given(calls(most=100, work=1 << 20), st.data())
def test_checkpoints_are_the_final_states_of_runs_that_end_there(call, data):
    x, options = call
    parts = list(sequences(x, options))
    assume(parts)
    counts = [sorted(data.draw(st.sets(st.integers(0, len(part["q"])), max_size=6))) for part, _ in parts]
    plain = kl.ops.delta_rule(**x, **options)
    asked = options | dict(checkpoints=counts if "offsets" in options else counts[0])
    *result, kept = everywhere(lambda ctx: kl.ops.delta_rule(**x, **asked, ctx=ctx))
    assert same(result, plain)
    ends = [kl.ops.delta_rule(**{name: value if value is None else value[:n] for name, value in part.items()}, **own)[1]
            for (part, own), mine in zip(parts, counts, strict=True) for n in mine]
    assert same(kept, ends)


@examples(40)
@given(calls(most=100, work=1 << 20), st.sampled_from([0, 1e-20, 1e-6, 3.0]), st.floats(-40, 30))
def test_the_norm_inside_has_the_bytes_of_the_op(call, eps, power):
    x, options = call
    x = x | {name: x[name] * np.float32(10**power) for name in "qk"}
    if eps == 0:
        x = x | {name: x[name] + np.float32(1e-30) for name in "qk"}
    got = kl.ops.delta_rule(**x, **options | dict(l2_norm=True, l2_eps=eps))
    normed = x | {name: kl.ops.l2_norm(x[name], eps=eps) for name in "qk"}
    assert same(got, kl.ops.delta_rule(**normed, **options | dict(l2_norm=False)))


@examples(100)
@given(calls(most=80, work=1 << 19), st.data())
def test_what_is_not_finite_is_where_the_recurrence_has_it(call, data):
    """NaN of q, k, g and beta exactly; of v and the state, and infinities: the same elements are not finite."""
    x, options = call
    given = {name: a for name, a in (x | options).items() if name in {*x, "initial_state"} and a is not None and a.size}
    assume(given)
    name = data.draw(st.sampled_from(sorted(given)))
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf] if name in {"v", "initial_state"} else [np.nan]))
    bad = given[name].copy()
    for _ in range(data.draw(st.integers(1, 2))):
        bad[np.unravel_index(data.draw(st.integers(0, bad.size - 1)), bad.shape)] = value
    every = x | options | {name: bad}
    got = everywhere(lambda ctx: kl.ops.delta_rule(**every, ctx=ctx))
    with np.errstate(invalid="ignore"):
        ref = kl.reference.delta_rule(**every)
    exact = name not in {"v", "initial_state"}
    for a, b in zip(got, ref, strict=True):
        assert np.array_equal(np.isfinite(a), np.isfinite(b)), name
        assert not exact or np.array_equal(np.isnan(a), np.isnan(b)), name


@examples(60)
@given(T=st.integers(1, 60), K=st.integers(1, 40), V=st.integers(1, 70), gate=st.sampled_from(GATES),
       form=forms(), tied=st.booleans(), top=st.integers(0, 90), seed=st.integers(0, 2**32))
def test_long_keys_never_make_what_the_recurrence_does_not(T, K, V, gate, form, tied, top, seed):
    """Keys, queries and values of lengths to 2**90, writes that do not explode: finite, and within the budget, while
    no sum of the recurrence reaches 2**100."""
    x = rim(T, 1, K, V, gate=gate, seed=seed, keys="mixed" if tied else "random")
    rng = np.random.default_rng(seed)
    for name in "qkv":
        x[name] = np.ldexp(x[name], rng.integers(-top, top + 1, (T, 1, 1))).astype(np.float32)
    squares = np.maximum((np.float64(x["k"])**2).sum(-1), 1e-30)
    x["beta"] = np.minimum(x["beta"] * rng.random((T, 1)) / squares, 2).astype(np.float32)
    n = below(2.0**100, **x)
    x = {name: value if value is None else value[:n] for name, value in x.items()}
    got = run_and_judge(x, **form, scale=1)
    assert all(np.isfinite(a).all() for a in got)


def below(limit, q, k, v, g, beta):
    """Tokens before any sum of the recurrence of one head, its terms taken by size, reaches the limit."""
    S = np.zeros((q.shape[2], v.shape[2]))
    q, k, v, beta = (np.float64(a[:, 0]) for a in (q, k, v, beta))
    g = np.zeros((len(q), 1)) if g is None else np.float64(g[:, 0]).reshape(len(q), -1)
    for t in range(len(q)):
        S = np.exp(g[t])[:, None] * S
        asked = np.abs(k[t]) @ np.abs(S) + np.abs(v[t])
        S = S + np.outer(k[t], beta[t] * (v[t] - k[t] @ S))
        largest = max(asked.max(), np.abs(S).max(), (np.abs(q[t]) @ np.abs(S)).max())
        if not largest * max(1, beta[t]) < limit:
            return t
    return len(q)
