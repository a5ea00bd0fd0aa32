"""The budgets of the chunked delta rule, against the same algorithm in simulated float32: they hold at every element
and every decay, they are not loose without measure, and they reject what is wrong."""

import numpy as np
import pytest
from delta_float32 import Float32

from kimi_linear import reference as ref
from kimi_linear.diff.budgets import U, budget

RIM_GATES = [-0.0, -1e-30, -1e-3, -5, -100, -1e4, -np.inf]
FORMS = [("auto", 64), ("chunked", 16), ("chunked", 17), ("chunked", 64)]


def f32(x):
    return np.float32(x).astype(np.float64)


def model_like(T, H=2, K=16, V=16, *, decay=1.0, seed=0):
    """Unit keys and queries, gates of many sizes, write rates in [0, 1)."""
    rng = np.random.default_rng([seed, T, H, K, V])
    q, k = f32(ref.l2_norm(rng.standard_normal((2, T, H, K))))
    g = f32(-decay * np.exp(2 * rng.standard_normal((T, H, K)) - 2))
    return dict(q=q, k=k, v=f32(rng.standard_normal((T, H, V))), g=g, beta=f32(rng.random((T, H))))


def rim(T, H=2, K=16, V=16, *, keys="random", seed=0):
    """Every decay there is, mixed in one chunk and channel; write rates 0, 1 and 2."""
    x, rng = model_like(T, H, K, V, seed=seed), np.random.default_rng([seed, T])
    x["g"] = f32(rng.choice(RIM_GATES, (T, H, K)))
    x["beta"] = f32(rng.choice([0, 1, 2, 0.3], (T, H)))
    if keys == "equal":
        x["k"] = np.repeat(x["k"][:1], T, axis=0)
    if keys == "orthogonal":
        x["k"] = np.repeat(np.eye(K)[np.arange(T) % K][:, None], H, axis=1)
    return x


def state_for(x, seed=5):
    (_, H, V), K = x["v"].shape, x["k"].shape[-1]
    return f32(np.random.default_rng(seed).standard_normal((H, K, V)))


def share(got, want, bounds):
    """The largest part of its budget that an error takes."""
    worst = 0.0
    for g, r, bound in zip(got, want, bounds, strict=True):
        assert g.shape == r.shape == bound.shape and np.isfinite(bound).all() and (bound >= 0).all()
        off = abs(g - r)
        assert (off[bound == 0] == 0).all()
        worst = max(worst, (off / np.where(bound == 0, 1, bound)).max(initial=0))
    return worst


def judge(x, form, chunk, **kw):
    want = ref.delta_rule(**x, **kw)
    got = Float32().delta_rule(**x, **kw, form=form, chunk=chunk)
    assert share(got, want, budget("delta_rule", want, **x, **kw, form=form, chunk=chunk)) <= 1


@pytest.mark.parametrize("form, chunk", FORMS)
class TestDeltaRuleHolds:
    @pytest.mark.parametrize("T, K, V", [(1, 1, 1), (15, 3, 2), (16, 7, 5), (33, 17, 9), (130, 16, 20), (300, 64, 64)])
    @pytest.mark.parametrize("decay", [0.01, 1.0])
    def test_model_like(self, form, chunk, T, K, V, decay):
        x = model_like(T, 2, K, V, decay=decay)
        judge(x, form, chunk, initial_state=state_for(x))
        judge(x, form, chunk)

    @pytest.mark.parametrize("keys", ["random", "equal", "orthogonal"])
    @pytest.mark.parametrize("T, K, V", [(20, 2, 3), (150, 16, 16), (300, 64, 64)])
    def test_rim(self, form, chunk, T, K, V, keys):
        for seed in range(3 if T < 300 else 1):
            x = rim(T, 2, K, V, keys=keys, seed=seed)
            judge(x, form, chunk, initial_state=state_for(x))

    @pytest.mark.parametrize("gate", RIM_GATES)
    def test_one_decay_everywhere(self, form, chunk, gate):
        x = model_like(70)
        x["g"] = np.full_like(x["g"], gate)
        judge(x, form, chunk, initial_state=state_for(x))

    @pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-20, 1e8])
    @pytest.mark.parametrize("name", ["q", "v", "initial_state"])
    def test_zero_tiny_and_huge(self, form, chunk, name, scale):
        x = model_like(40, K=12, V=18)
        x["initial_state"] = state_for(x)
        x[name] = f32(x[name] * scale)
        judge(x, form, chunk)

    def test_states_around_the_subnormals(self, form, chunk):
        x = model_like(64)
        x["g"] = f32(np.random.default_rng(1).choice([-1e-3, -20, -60, -86, -100], x["g"].shape))
        judge(x, form, chunk, initial_state=1e10 * state_for(x))


@pytest.mark.parametrize("T, K, V, chunk", [(70, 16, 20, 16), (130, 17, 9, 64), (130, 64, 64, 64), (5, 1, 1, 3)])
@pytest.mark.parametrize("make", [model_like, rim], ids=["model-like", "rim"])
class TestHalvesHold:
    def test_intra(self, make, T, K, V, chunk):
        for kw in ({}, dict(keys="equal"), dict(keys="orthogonal")) if make is rim else ({}, dict(decay=0.01)):
            x = make(T, 2, K, V, **kw)
            want = ref.delta_rule_intra(**x, chunk=chunk)
            bounds = budget("delta_rule_intra", want, **x, chunk=chunk)
            assert share(Float32().intra(**x, chunk=chunk), want, bounds) <= 1

    def test_inter(self, make, T, K, V, chunk):
        x = make(T, 2, K, V)
        _, P, _, W, U_ = map(f32, ref.delta_rule_intra(**x, chunk=chunk))
        args = dict(q=x["q"], k=x["k"], g=x["g"], P=P, W=W, U=U_, initial_state=state_for(x), chunk=chunk)
        want = ref.delta_rule_inter(**args)
        assert share(Float32().inter(**args), want, budget("delta_rule_inter", want, **args)) <= 1

    def test_inter_of_any_inputs(self, make, T, K, V, chunk):
        """P, W and U that no intra has made."""
        x, rng = make(T, 2, K, V), np.random.default_rng(3)
        P, W, U_ = (f32(0.3 * rng.standard_normal((T, 2, n))) for n in (chunk, K, V))
        args = dict(q=x["q"], k=x["k"], g=x["g"], P=P, W=W, U=U_, initial_state=state_for(x), chunk=chunk)
        want = ref.delta_rule_inter(**args)
        assert share(Float32().inter(**args), want, budget("delta_rule_inter", want, **args)) <= 1


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_cumsum_holds(chunk):
    g = f32(-np.exp(2 * np.random.default_rng(0).standard_normal((300, 3)))).astype(np.float32)
    g[5] = -np.inf
    c = np.concatenate([np.cumsum(g[t:t + (chunk or 300)], axis=0) for t in range(0, 300, chunk or 300)])
    want = ref.decay_cumsum(g, chunk=chunk)
    bound = budget("decay_cumsum", want, g=g, chunk=chunk)
    known = np.isfinite(want)
    assert (c[~known] == want[~known]).all()
    off = np.where(known, abs(np.where(known, c, 0).astype(np.float64) - np.where(known, want, 0)), 0)
    assert (off <= bound).all()
    assert (bound[::chunk or 300] == 0).all() and (chunk == 1 or off.max() > bound.max() / 100)


@pytest.mark.parametrize("form, chunk, most", [("recurrent", 64, 100), ("auto", 64, 200), ("chunked", 64, 300)])
@pytest.mark.parametrize("T, K", [(125, 32), (500, 32), (250, 64)])
def test_the_bound_adds_up_and_does_not_grow_by_powers(T, K, form, chunk, most):
    """Its median, in u of the result's rms for each token of a long memory."""
    x = model_like(T, 2, K, K, decay=0.1)
    want = ref.delta_rule(**x)
    for bound, value in zip(budget("delta_rule", want, **x, form=form, chunk=chunk), want):
        assert np.median(bound) < most * T * U * np.sqrt((value ** 2).mean())


def test_auto_is_at_least_either_form():
    x = rim(70)
    want = ref.delta_rule(**x)
    auto, token = (budget("delta_rule", want, **x, form=form) for form in ("auto", "recurrent"))
    assert all((a >= b).all() for a, b in zip(auto, token))
    whole = {n: a[:64] for n, a in x.items()}
    want = ref.delta_rule(**whole)
    for a, b in zip(budget("delta_rule", want, **whole), budget("delta_rule", want, **whole, form="chunked", chunk=16)):
        assert (a == b).all()


@pytest.mark.parametrize("form", ["auto", "chunked"])
def test_checkpoints_have_the_bound_of_a_run_that_ends_there(form):
    x, offsets = model_like(90), [0, 70, 70, 90]
    lists = [[0, 5, 16, 64, 70], [0], [20]]
    want = ref.delta_rule(**x, offsets=offsets, checkpoints=lists)
    *plain, kept = budget("delta_rule", want, **x, offsets=offsets, form=form, chunk=32, checkpoints=lists)
    for a, b in zip(plain, budget("delta_rule", want[:2], **x, offsets=offsets, form=form, chunk=32)):
        assert (a == b).all()
    slots = iter(kept)
    for begin, counts in zip(offsets, lists):
        for count in counts:
            part = {n: a[begin:begin + count] for n, a in x.items()}
            end = budget("delta_rule", ref.delta_rule(**part), **part, form=form, chunk=32)[1]
            assert (next(slots) >= end).all()        # a copy of the initial state has no error, a kept one room


class TestRejects:
    def over(self, x, got, **kw):
        want = ref.delta_rule(**x, **kw)
        return share(got, want, budget("delta_rule", want, **x, **kw, form="chunked", chunk=64))

    def test_subtracted_sums(self):
        """The textbook chunk, its c and c_i - c_j in float32: fine for mild gates, far off with -1e4 among them."""
        def textbook(x):
            T, H, K = x["q"].shape
            o, S = np.zeros(x["v"].shape), np.zeros((H, K, x["v"].shape[-1]))
            for t in range(0, T, 64):
                q, k, v, g, beta = (x[n][t:t + 64] for n in ("q", "k", "v", "g", "beta"))
                c = np.cumsum(g.astype(np.float32), axis=0, dtype=np.float32)
                n = len(c)
                L, P = np.zeros((2, H, n, n))
                for i in range(n):
                    E = np.exp((c[i] - c[:i + 1]).astype(np.float64))
                    L[:, i, :i] = beta[i][:, None] * np.einsum("hk,jhk->hj", k[i], E[:i] * k[:i])
                    P[:, i, :i + 1] = K**-0.5 * np.einsum("hk,jhk->hj", q[i], E * k[:i + 1])
                start, end = np.exp(c.astype(np.float64)), np.exp((c[-1] - c).astype(np.float64))
                d = beta[..., None] * (v - np.einsum("ihk,hkv->ihv", start * k, S))
                for i in range(1, n):
                    d[i] -= np.einsum("hj,jhv->hv", L[:, i, :i], d[:i])
                o[t:t + n] = K**-0.5 * np.einsum("ihk,hkv->ihv", start * q, S) + np.einsum("hij,jhv->ihv", P, d)
                S = start[-1][..., None] * S + np.einsum("jhk,jhv->hkv", end * k, d)
            return o, S

        x = model_like(128, decay=0.1)
        assert self.over(x, textbook(x)) < 1
        x["g"][::20] = -1e4
        assert self.over(x, textbook(x)) > 10

    @pytest.mark.parametrize("what", ["a factor left out", "a diagonal too many", "bfloat16 gates", "one gate",
                                      "no scale"])
    def test_wrong(self, what):
        x = model_like(100, 3)
        x["g"] = np.maximum(x["g"], -0.2)
        S0 = state_for(x)
        wrong = {n: a.copy() for n, a in x.items()}
        kw = dict(initial_state=S0)
        if what == "a factor left out":      # rows of the second chunk start one token late
            wrong["g"][64] = 0
        elif what == "a diagonal too many":  # L with its diagonal: d / (1 + beta |k|^2)
            wrong["beta"] = x["beta"] / (1 + x["beta"])
        elif what == "bfloat16 gates":
            wrong["g"] = (x["g"].astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        elif what == "one gate":
            wrong["g"][50, 1, 3] *= 0.9
        else:
            kw["scale"] = 1.0
        assert self.over(x, ref.delta_rule(**wrong, **kw), initial_state=S0) > 1
