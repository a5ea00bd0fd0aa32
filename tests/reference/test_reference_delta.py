"""The delta rule in float64: worked examples, 50 digits beside it, forms and halves against each other, identities."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear import reference as ref

FORMS = ["recurrent", "chunked"]

# The worked example of docs/math.md#delta_rule: H = 1, K = V = 2, three tokens; raw q, k, gate and b.
Q = np.array([[1, 2], [-1, 1], [3, -1]], float)[:, None]
K = np.array([[2, 1], [0, 1], [1, -2]], float)[:, None]
V = np.array([[1, -1], [0.5, 2], [-2, 1]], float)[:, None]
F = np.array([[0.3, -0.2], [1, 0], [-1, 2]], float)[:, None]
B = np.array([[0], [1], [-1]], float)
O = [[0.282842656, -0.282842656], [0.186973346, 0.726849192], [-0.266757022, 0.126001403]]
S = [[[0.447213551, -0.447213551], [0.223606775, -0.223606775]],
     [[0.014882852, -0.014882852], [0.388829636, 1.438815896]],
     [[-0.233700190, 0.119969000], [0.491873158, -0.203588432]]]


def near(a, b, tol=6e-10):
    """Equal to nine printed decimals."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tol)


def case(rng, T=150, Hk=2, Hv=4, K=5, V=7, gate="channel"):
    """Unit keys, gates from none to -infinity mixed in one chunk."""
    q, k = ref.l2_norm(rng.normal(size=(2, T, Hk, K)))
    v, beta = rng.normal(size=(T, Hv, V)), rng.uniform(size=(T, Hv))
    shape = (T, Hv, K) if gate == "channel" else (T, Hv)
    strong = rng.choice([-0.0, -1e-30, -5, -100, -1e4, -np.inf], size=shape)
    g = np.where(rng.uniform(size=shape) < 0.15, strong, -rng.uniform(1e-3, 1, size=shape))
    return q, k, v, None if gate is None else g, beta


def halves(q, k, v, g, beta, initial_state=None, **kw):
    """o, state and d by intra, then inter."""
    _, P, _, W, U = ref.delta_rule_intra(q, k, v, g, beta, **kw)
    return ref.delta_rule_inter(q, k, g, P, W, U, initial_state=initial_state, **kw)


class TestWorkedExample:
    def gates(self):
        return ref.decay_gate(F, [2.0], np.array([[0.5, -0.5]])), ref.sigmoid(B)

    @pytest.mark.parametrize("form", ["auto", *FORMS, "pairwise"])
    def test_delta_rule(self, form):
        g, beta = self.gates()
        near(beta[:, 0], [0.5, 0.731058579, 0.268941421])
        o, state, kept = ref.delta_rule(Q, K, V, g, beta, l2_norm=True, form=form, checkpoints=1)
        near(o[:, 0], O)
        near(kept[:, 0], S)
        near(state[0], S[2])

    def test_chunk(self):
        q, k = ref.l2_norm(Q), ref.l2_norm(K)
        g, beta = self.gates()
        L, P, T, W, U = (x[:, 0] for x in ref.delta_rule_intra(q, k, V, g, beta, chunk=5))
        near([L[1, 0], L[2, 1]], [0.126674407, -0.008005227])
        near(L[2, 0], 0, 1e-6)
        near(P[:, :3], [[0.565685312, 0, 0], [0.071754832, 0.499999625, 0], [0.006447081, -0.007441423, 0.499999925]])
        near(T[:, :3], [[1, 0, 0], [-0.126674407, 1, 0], [-0.001014057, 0.008005227, 1]])
        near(W, [[0.042984298, 0.099834812], [-0.005445010, 0.113818666], [0.000105471, -0.000473674]])
        near(U, [[0.5, -0.5], [0.302192086, 1.525454361], [-0.535463727, 0.281153029]])
        assert not np.any([x[:, 3:] for x in (L, P, T)])
        o, state, d = ref.delta_rule_inter(q, k, g, P[:, None], W[:, None], U[:, None], chunk=5)
        near(o[:, 0], O)
        near(state[0], S[2])
        near(d[:, 0], U, 0)                  # from an empty state


# ---- 50 digits -----------------------------------------------------------------------------------

WEAK_AFTER_STRONG = [[-1e4, -1e-3], [-1e-3, -50], [-1e-3, -1e-3], [-2e-3, -0.25],
                     [-100, -1e-9], [-1e-3, -0.5], [-0.1, -3]]
FORGETTING = [[-0.0, -np.inf], [-1e-3, -0.1], [-np.inf, -1e4], [-0.3, -1e-30],
              [-np.inf, -np.inf], [-1e-3, -2], [-0.5, -0.0]]


def tiny(g):
    """One head, K = V = 2, seven tokens: two chunks of 4, the second a short one."""
    rng = np.random.default_rng(7)
    q, k = ref.l2_norm(rng.normal(size=(2, 7, 1, 2)))
    x = dict(q=q, k=k, v=rng.normal(size=(7, 1, 2)), g=np.array(g)[:, None], beta=rng.uniform(0.3, 2, (7, 1)))
    return x, rng.normal(size=(1, 2, 2))


def digits(x, S0, chunk=4):
    """o, S, d by the recurrence and L, P, T, W, U by their sums, in 50 digits, rounded once at the end."""
    with mpmath.workdps(50):
        q, k, v, g, beta = ([mpmath.matrix(row.ravel().tolist()) for row in x[n]] for n in ("q", "k", "v", "g", "beta"))
        K, n = len(k[0]), len(q)
        scale, S = 1 / mpmath.sqrt(K), mpmath.matrix(S0[0].tolist())
        o, d = [], []
        for t in range(n):
            S = mpmath.diag([mpmath.exp(y) for y in g[t]]) * S
            d.append(beta[t][0] * (v[t] - S.T * k[t]))
            S += k[t] * d[t].T
            o.append(scale * S.T * q[t])

        def dot(y, i, j):
            """sum_c y_ic E_ij,c k_jc; the gates in between are summed, which is exact."""
            return mpmath.fsum(y[i][c] * k[j][c] * mpmath.exp(mpmath.fsum(g[s][c] for s in range(j + 1, i + 1)))
                               for c in range(K))

        L, P, T = (np.zeros((n, chunk)) for _ in range(3))
        W, U = np.zeros((n, K)), np.zeros((n, len(v[0])))
        for t0 in range(0, n, chunk):
            rows = range(t0, min(t0 + chunk, n))
            lower = mpmath.eye(len(rows))
            for i in rows:
                for j in range(t0, i + 1):
                    P[i, j - t0] = scale * dot(q, i, j)
                for j in range(t0, i):
                    lower[i - t0, j - t0] = L[i, j - t0] = beta[i][0] * dot(k, i, j)
            inverse = lower ** -1
            for i in rows:
                M = [inverse[i - t0, j - t0] * beta[j][0] for j in rows]
                T[i, :len(rows)] = inverse[i - t0, :]
                W[i] = [mpmath.fsum(m * k[j][c] * mpmath.exp(mpmath.fsum(g[s][c] for s in range(t0, j + 1)))
                                    for m, j in zip(M, rows)) for c in range(K)]
                U[i] = [mpmath.fsum(m * v[j][c] for m, j in zip(M, rows)) for c in range(len(v[0]))]

        def rounded(rows):
            return np.array([[float(y) for y in row] for row in rows])

        return dict(o=rounded(o), S=np.array(S.tolist(), float), d=rounded(d), L=L, P=P, T=T, W=W, U=U)


class TestFiftyDigits:
    """Results are of size 1 to 3, sums have at most 8 terms: 2e-15 is 18 of 2^-53."""

    @pytest.mark.parametrize("g", [WEAK_AFTER_STRONG, FORGETTING], ids=["weak after strong", "forgetting"])
    def test_exact_forms(self, g):
        x, S0 = tiny(g)
        exact = digits(x, S0)
        for form in FORMS:
            o, S = ref.delta_rule(**x, initial_state=S0, form=form, chunk=4)
            near(o[:, 0], exact["o"], 2e-15)
            near(S[0], exact["S"], 2e-15)
        squares = ref.delta_rule_intra(**x, chunk=4)
        for name, got in zip("LPTWU", squares):
            near(got[:, 0], exact[name], 2e-15)
        o, S, d = halves(**x, initial_state=S0, chunk=4)
        for name, got in (("o", o[:, 0]), ("S", S[0]), ("d", d[:, 0])):
            near(got, exact[name], 2e-15)

    def test_subtracted_sums_lose_what_a_strong_gate_costs(self):
        """ulp(1e4) is 1.8e-12 in float64, and twice the half of it is what the difference after it is off by."""
        x, S0 = tiny(WEAK_AFTER_STRONG)
        off = abs(ref.delta_rule(**x, initial_state=S0, form="pairwise", chunk=4)[0][:, 0] - digits(x, S0)["o"]).max()
        assert 1e-14 < off < 4e-12

    def test_subtracted_infinities_are_nan(self):
        x, S0 = tiny(FORGETTING)
        with np.errstate(invalid="ignore"):
            assert np.isnan(ref.delta_rule(**x, initial_state=S0, form="pairwise", chunk=4)[0]).any()


# ---- forms and halves against each other -----------------------------------------------------------


class TestForms:
    @pytest.mark.parametrize("gate", ["channel", "head", None])
    @pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 150])
    def test_chunked_equals_recurrent(self, rng, T, gate):
        """Gates to -infinity. Both forms add some K + C products of size 1 to 10: 1e-13 is 900 of 2^-53."""
        x, S0 = case(rng, T, gate=gate), rng.normal(size=(4, 5, 7))
        a, A = ref.delta_rule(*x, initial_state=S0, form="recurrent")
        b, B = ref.delta_rule(*x, initial_state=S0, form="chunked")
        assert np.isfinite(b).all()
        near(b, a, 1e-13)
        near(B, A, 1e-13)

    @pytest.mark.parametrize("chunk", [1, 2, 15, 16, 17, 100])
    @pytest.mark.parametrize("heads, K, V", [((1, 1), 1, 3), ((1, 3), 16, 2), ((2, 2), 9, 17), ((2, 4), 32, 32)])
    def test_every_chunk_and_width(self, rng, chunk, heads, K, V):
        x, S0 = case(rng, 50, *heads, K, V), rng.normal(size=(heads[1], K, V))
        for a, b in zip(ref.delta_rule(*x, initial_state=S0),
                        ref.delta_rule(*x, initial_state=S0, form="chunked", chunk=chunk)):
            assert np.sqrt(((a - b) ** 2).mean()) <= 1e-13 * np.sqrt((a ** 2).mean())

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(T=st.integers(0, 40), K=st.integers(1, 12), V=st.integers(1, 12), Hk=st.integers(1, 3),
           per_key=st.integers(1, 3), chunk=st.integers(1, 50), gate=st.sampled_from(["channel", "head", None]),
           head_map=st.sampled_from(["grouped", "tiled"]), cuts=st.lists(st.integers(0, 40), max_size=4),
           seed=st.integers(0, 2**32))
    def test_any_shape(self, T, K, V, Hk, per_key, chunk, gate, head_map, cuts, seed):
        """Forms and halves agree, packed sequences of any lengths, empty ones too."""
        rng = np.random.default_rng(seed)
        offsets = [0, *sorted(min(c, T) for c in cuts), T]
        x = case(rng, T, Hk, Hk * per_key, K, V, gate)
        kw = dict(initial_state=rng.normal(size=(len(offsets) - 1, Hk * per_key, K, V)), offsets=offsets,
                  head_map=head_map)
        o, S = ref.delta_rule(*x, **kw)
        for got in (ref.delta_rule(*x, **kw, form="chunked", chunk=chunk), halves(*x, **kw, chunk=chunk)[:2]):
            for a, b in zip((o, S), got):
                assert a.size == 0 or np.sqrt(((a - b) ** 2).mean()) <= 1e-12 * np.sqrt((a ** 2).mean())

    @pytest.mark.parametrize("beta", [1.0, 2.0])
    @pytest.mark.parametrize("keys", ["equal", "orthogonal"])
    def test_keys_that_are_all_or_nothing_to_each_other(self, rng, keys, beta):
        q, k, v, g, _ = case(rng, 70, 1, 1, 8, 8)
        k = np.eye(8)[np.arange(70) % (1 if keys == "equal" else 8)][:, None]
        for gates in (g, None):
            a, b = (ref.delta_rule(q, k, v, gates, np.full((70, 1), beta), form=form)[0] for form in FORMS)
            near(a, b, 1e-12)

    def test_auto_is_the_recurrence(self, rng):
        x = case(rng, 40)
        for a, b in zip(ref.delta_rule(*x), ref.delta_rule(*x, form="recurrent")):
            assert (a == b).all()

    def test_pairwise_equals_recurrent_for_mild_gates_only(self, rng):
        q, k, v, g, beta = case(rng, 100)
        mild = np.maximum(g, -1.0)
        a = ref.delta_rule(q, k, v, mild, beta)[0]
        near(ref.delta_rule(q, k, v, mild, beta, form="pairwise")[0], a, 1e-12)
        with np.errstate(invalid="ignore"):
            assert np.isnan(ref.delta_rule(q, k, v, g, beta, form="pairwise")[0]).any()

    @pytest.mark.parametrize("gate", ["channel", "head", None])
    @pytest.mark.parametrize("T, chunk", [(0, 4), (1, 4), (64, 64), (65, 16), (50, 64)])
    def test_halves_are_the_chunked_form(self, rng, T, chunk, gate):
        x, S0 = case(rng, T, gate=gate), rng.normal(size=(4, 5, 7))
        o, S, d = halves(*x, initial_state=S0, chunk=chunk)
        a, A = ref.delta_rule(*x, initial_state=S0, form="chunked", chunk=chunk)
        near(o, a, 1e-14)
        near(S, A, 1e-14)

    def test_d_are_the_corrections_of_the_recurrence(self, rng):
        q, k, v, g, beta = case(rng, 30)
        _, _, d = halves(q, k, v, g, beta, chunk=8)
        *_, S = ref.delta_rule(q, k, v, g, beta, checkpoints=list(range(31)))
        heads = [0, 0, 1, 1]
        faded = np.exp(g)[..., None] * S[:-1]
        near(d, beta[..., None] * (v - np.einsum("thkv,thk->thv", faded, k[:, heads])), 1e-13)
        near(S[1:], faded + k[:, heads][..., None] * d[:, :, None], 1e-13)

    def test_what_the_triangles_are(self, rng):
        q, k, v, g, beta = case(rng, 23, 1, 1)
        L, P, T, W, U = (x[:, 0] for x in ref.delta_rule_intra(q, k, v, g, beta, chunk=8, scale=1.0))
        for t0 in (0, 8, 16):
            n = min(8, 23 - t0)
            r = slice(t0, t0 + n)
            assert not np.triu(L[r, :n]).any() and not np.triu(P[r, :n], 1).any()
            assert not L[r, n:].any() and not P[r, n:].any() and not T[r, n:].any()
            near((np.eye(n) + L[r, :n]) @ T[r, :n], np.eye(n), 1e-15)
            near(np.diag(P[r, :n]), (q[r] * k[r]).sum(-1)[:, 0], 1e-15)
            near(U[r], T[r, :n] @ (beta[r] * v[r, 0]), 1e-14)
            near(W[r], T[r, :n] @ (beta[r] * np.exp(np.cumsum(g[r, 0], 0)) * k[r, 0]), 1e-14)


class TestSequences:
    @pytest.mark.parametrize("form", FORMS)
    def test_splits_equal_the_whole(self, rng, form):
        q, k, v, g, beta = case(rng)
        whole, end = ref.delta_rule(q, k, v, g, beta, form=form)
        state, parts = None, []
        for r in (slice(0, 1), slice(1, 40), slice(40, 150)):
            o, state = ref.delta_rule(q[r], k[r], v[r], g[r], beta[r], initial_state=state, form=form)
            parts.append(o)
        near(np.concatenate(parts), whole, 1e-13)
        near(state, end, 1e-13)

    @pytest.mark.parametrize("form", FORMS)
    def test_offsets_equal_separate(self, rng, form):
        x, S0 = case(rng), rng.normal(size=(3, 4, 5, 7))
        o, states = ref.delta_rule(*x, initial_state=S0, offsets=[0, 70, 70, 150], form=form)
        for n, r in enumerate([slice(0, 70), slice(70, 70), slice(70, 150)]):
            one, end = ref.delta_rule(*(a[r] for a in x), initial_state=S0[n], form=form)
            assert (o[r] == one).all() and (states[n] == end).all()
        assert (states[1] == S0[1]).all()

    def test_offsets_of_the_halves(self, rng):
        x, S0 = case(rng), rng.normal(size=(4, 4, 5, 7))
        offsets = [0, 0, 70, 70, 150]
        intra = ref.delta_rule_intra(*x, offsets=offsets, chunk=32)
        o, states, d = halves(*x, initial_state=S0, offsets=offsets, chunk=32)
        for n, r in enumerate(slice(a, b) for a, b in zip(offsets, offsets[1:])):
            alone = ref.delta_rule_intra(*(a[r] for a in x), chunk=32)
            assert all((a[r] == b).all() for a, b in zip(intra, alone))
            one, end, corrections = halves(*(a[r] for a in x), initial_state=S0[n], chunk=32)
            assert (o[r] == one).all() and (states[n] == end).all() and (d[r] == corrections).all()
        assert (states[[0, 2]] == S0[[0, 2]]).all()

    @pytest.mark.parametrize("form", FORMS)
    def test_heads(self, rng, form):
        q, k, v, g, beta = case(rng)
        for head_map, heads in (("grouped", [0, 0, 1, 1]), ("tiled", [0, 1, 0, 1])):
            a = ref.delta_rule(q, k, v, g, beta, head_map=head_map, form=form)[0]
            b = ref.delta_rule(q[:, heads], k[:, heads], v, g, beta, form=form)[0]
            assert (a == b).all()
            for a, b in zip(halves(q, k, v, g, beta, head_map=head_map, chunk=16),
                            halves(q[:, heads], k[:, heads], v, g, beta, chunk=16)):
                assert (a == b).all()

    def test_scale_is_in_p_and_in_the_read_of_the_state(self, rng):
        x, S0 = case(rng, 20), rng.normal(size=(4, 5, 7))
        one, S, d = halves(*x, initial_state=S0, scale=1.0, chunk=8)
        two, S2, d2 = halves(*x, initial_state=S0, scale=2.0, chunk=8)
        assert (two == 2 * one).all() and (S == S2).all() and (d == d2).all()


class TestCheckpoints:
    @pytest.mark.parametrize("form", [*FORMS, "pairwise"])
    def test_are_the_states_of_runs_that_end_there(self, rng, form):
        q, k, v, g, beta = case(rng, gate="head")
        g = np.maximum(g, -1)
        options = dict(form=form, chunk=64, offsets=[0, 140, 140, 150])
        plain = ref.delta_rule(q, k, v, g, beta, **options)
        for asked, lists in ((50, [[50, 100], [], []]), ([[0, 3, 64, 65, 140], [0], [9]],) * 2):
            *result, kept = ref.delta_rule(q, k, v, g, beta, checkpoints=asked, **options)
            assert all((a == b).all() for a, b in zip(result, plain))
            ends = [(begin, begin + n) for begin, counts in zip((0, 140, 140), lists) for n in counts]
            assert len(kept) == len(ends)
            for (a, b), state in zip(ends, kept):
                alone = ref.delta_rule(*(x[a:b] for x in (q, k, v, g, beta)), form=form, chunk=64)[1]
                assert (state == alone).all()
        assert ref.delta_rule(q, k, v, g, beta, checkpoints=[])[2].shape == (0, 4, 5, 7)

    @pytest.mark.parametrize("checkpoints, message", [
        (0, "checkpoints is 0; it must be >= 1"),
        ([3, 3], r"checkpoints\[0\] is \[3, 3\]; it must rise within 0..4"),
        ([5], r"checkpoints\[0\] is \[5\]"),
        ([[1], [2]], "checkpoints has 2 lists; there are 1 sequences"),
    ])
    def test_errors(self, rng, checkpoints, message):
        with pytest.raises(ValueError, match=message):
            ref.delta_rule(*case(rng, 4), checkpoints=checkpoints)


class TestIdentities:
    @pytest.mark.parametrize("form", FORMS)
    def test_beta_zero_is_pure_decay(self, rng, form):
        q, k, v, g, beta = case(rng, 10)
        S0 = rng.normal(size=(4, 5, 7))
        _, S = ref.delta_rule(q, k, v, g, 0 * beta, initial_state=S0, form=form)
        near(S, np.exp(g.sum(0))[:, :, None] * S0, 1e-14)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_unit_key_with_beta_one_is_stored(self, rng, form):
        """beta = 1 and |k| = 1 replace what k reads: S^T k = v afterwards."""
        q, k, v, g, beta = case(rng, 10)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        _, S = ref.delta_rule(q, k, v, g, 0 * beta + 1, form=form)
        near(np.einsum("hkv,hk->hv", S, k[-1][[0, 0, 1, 1]]), v[-1], 1e-13)

    @pytest.mark.parametrize("form", FORMS)
    def test_forgetting_is_exact(self, rng, form):
        q, k, v, g, beta = case(rng, 30)
        g[20] = -np.inf
        o, S = ref.delta_rule(q, k, v, g, beta, initial_state=1e300 * rng.normal(size=(4, 5, 7)), form=form, chunk=8)
        alone, end = ref.delta_rule(*(x[20:] for x in (q, k, v, g, beta)), form=form, chunk=8)
        near(o[20:], alone, 1e-13)
        near(S, end, 1e-13)

    def test_final_state_in_place(self, rng):
        x = case(rng, 9)
        state = rng.normal(size=(4, 5, 7))
        _, end = ref.delta_rule(*x, initial_state=state.copy())
        q, k, v, g, beta = x
        _, P, _, W, U = ref.delta_rule_intra(q, k, v, g, beta)
        _, wanted, _ = ref.delta_rule_inter(q, k, g, P, W, U, initial_state=state)
        mine = state.copy()
        ref.delta_rule_inter(q, k, g, P, W, U, initial_state=mine, final_state=mine)
        assert (mine == wanted).all()
        ref.delta_rule(*x, initial_state=state, final_state=state)
        assert (state == end).all()

    def test_cumsum(self, rng):
        g = -rng.uniform(size=(10, 2))
        near(ref.decay_cumsum(g, chunk=4)[5], g[4] + g[5], 1e-15)
        near(ref.decay_cumsum(g, chunk=None, offsets=[0, 3, 10])[9], g[3:].sum(0), 1e-14)


class TestNaN:
    @pytest.mark.parametrize("form", FORMS)
    def test_reaches_no_earlier_token_and_no_other_head(self, rng, form):
        q, k, v, g, beta = case(rng, 80)
        v[40, 1, 3] = np.nan
        o, S = ref.delta_rule(q, k, v, g, beta, form=form)
        bad = np.argwhere(np.isnan(o))
        assert bad[:, 0].min() == 40 and set(bad[:, 1]) == {1} and set(bad[:, 2]) == {3}
        assert np.isnan(S[1, :, 3]).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
    def test_lands_where_the_recurrence_has_it(self, rng, name, value):
        x = dict(zip(("q", "k", "v", "g", "beta"), case(rng, 40)), initial_state=rng.normal(size=(4, 5, 7)))
        x[name][(21, 1, 3)[:x[name].ndim] if name != "initial_state" else (1, 2, 3)] = -value if name == "g" else value
        with np.errstate(invalid="ignore"):
            pairs = [ref.delta_rule(**x, form=form, chunk=16) for form in FORMS]
        for a, b in zip(*pairs):
            test = np.isnan if name not in ("v", "initial_state") else lambda y: ~np.isfinite(y)
            assert (test(a) == test(b)).all()
            known = np.isfinite(a)
            near(b[known], a[known], 1e-12)
        assert np.isfinite(pairs[1][0][:, 0]).all()

    def test_triangles_that_overflow_are_left_to_the_recurrence(self, rng):
        q, k, v, g, beta = case(rng, 20, 1, 2)
        k[[4, 6]] *= 1e160                   # L is infinite; beta and the state keep the recurrence finite
        beta[[4, 6], 1] = 0
        g[7, 1] = -np.inf
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (ref.delta_rule(q, k, v, g, beta, form=form, chunk=16) for form in FORMS)
            assert not np.isfinite(ref.delta_rule_intra(q, k, v, g, beta, chunk=16)[0]).all()
        assert np.isfinite(a[0][8:, 1]).all()
        assert all(np.array_equal(np.isnan(x), np.isnan(y)) for x, y in zip(a, b))
        near(b[0][8:, 1], a[0][8:, 1], 1e-12)


def test_errors_are_sentences(rng):
    q, k, v, g, beta = case(rng, 4)
    with pytest.raises(ValueError, match="g has a value .* > 0; .* was exp"):
        ref.delta_rule(q, k, v, np.exp(g), beta)
    with pytest.raises(ValueError, match="form is 'fast'"):
        ref.delta_rule(q, k, v, g, beta, form="fast")
    with pytest.raises(ValueError, match="offsets is .0, 5, 4."):
        ref.delta_rule(q, k, v, g, beta, offsets=[0, 5, 4])
    with pytest.raises(ValueError, match="4 value and 3 key heads"):
        ref.delta_rule(np.ones((4, 3, 5)), np.ones((4, 3, 5)), v, g, beta)
    with pytest.raises(ValueError, match="chunk is 0; it must be >= 1"):
        ref.delta_rule_intra(q, k, v, g, beta, chunk=0)


@pytest.mark.parametrize("name, changed, words", [
    ("initial_state", lambda x: x.swapaxes(-1, -2).copy(), r"initial_state has shape \[2, 7, 5\]; it must be"),
    ("initial_state", lambda x: np.stack([x, x]), r"initial_state has shape \[2, 2, 5, 7\]"),
    ("q", lambda x: x[:3], "q has shape"), ("k", lambda x: np.concatenate([x, x]), "k has shape"),
    ("g", lambda x: x[:, :1], "g has shape"), ("beta", lambda x: x[:, :1], "beta has shape"),
    ("v", lambda x: x[:0], "beta has shape"),
])
def test_arrays_of_another_shape_are_refused(rng, name, changed, words):
    """Not read as if as many values lay in other places, nor repeated."""
    x = dict(q=rng.random((4, 2, 5)), k=rng.random((4, 2, 5)), v=rng.random((4, 2, 7)), g=-rng.random((4, 2, 5)),
             beta=rng.random((4, 2)), initial_state=rng.random((2, 5, 7)))
    with pytest.raises(ValueError, match=words):
        ref.delta_rule(**x | {name: changed(x[name])})


def test_a_state_of_one_sequence_may_lack_its_axis(rng):
    q, k, v, g, beta = case(rng, 4)
    S = rng.random((4, 5, 7))
    given = dict(q=q, k=k, v=v, g=g, beta=beta, offsets=[0, 4])
    one, other = (ref.delta_rule(**given, initial_state=state)[1] for state in (S, S[None]))
    assert np.array_equal(one, other)
