"""The float64 ops: worked examples by hand, forms against each other, and identities of the mathematics."""

import ctypes
import platform
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

from kimi_linear import reference as ref

U64 = 2.0**-53

# The gates of the delta rule's worked example, and its outputs: H = 1, K = V = 2, three tokens.
F = np.array([[0.3, -0.2], [1, 0], [-1, 2]], float)[:, None]
DT = np.array([[0.5, -0.5]])
G = [[-2.342201332, -0.806372098], [-3.402826556, -0.948153968], [-0.948153968, -3.402826556]]
O = [[0.282842656, -0.282842656], [0.186973346, 0.726849192], [-0.266757022, 0.126001403]]


def near(a, b, tol=6e-10):
    """Equal to nine printed decimals."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tol)


class TestWorkedExamples:
    def test_short_conv(self):
        x, w = np.arange(1.0, 6)[:, None], np.array([[0.1, -0.2, 0.3, 0.4]])
        y, history = ref.short_conv(x, w, activation=None)
        near(y[:, 0], [0.4, 1.1, 1.6, 2.2, 2.8])
        near(history[:, 0], [3, 4, 5])
        y, _ = ref.short_conv(x, w)
        near(y[:, 0], [0.239475064, 0.825286116, 1.331229416, 1.980548924, 2.639492307])

    def test_decay_gate(self):
        near(ref.decay_gate(F, [2.0], DT), np.array(G)[:, None])
        near(ref.decay_gate(F[..., 0], [2.0], [0.5]), np.array(G)[:, :1])
        bound = [[-4.160091926, -0.989080557], [-4.762870634, -1.344707107], [-1.344707107, -4.762870634]]
        near(ref.decay_gate(F, [2.0], DT, lower_bound=-5.0), np.array(bound)[:, None])

    def test_gated_rms_norm(self):
        z = np.array([[0.2, -0.4], [1, 0], [0, -1]])
        y = ref.gated_rms_norm(np.array(O), z, [1, 0.5], eps=1e-5)
        near(y, [[0.549799636, -0.200643630], [0.257561724, 0.342400010], [-0.639296535, 0.081211880]], 2e-9)

    def test_attn_res(self):
        """Root mean squares 5, 13 and 1 of (7, 1), (-7, 17) and (1, 1): scores 3.2, 20/13, 4."""
        y = ref.attn_res([[[7.0, 1.0]], [[-7.0, 17.0]]], [[1.0, 1.0]], [2.0, 2.0], eps=0.0)
        e = np.exp([3.2 - 4, 20 / 13 - 4, 0])
        near(y, [[(7 * e[0] - 7 * e[1] + e[2]) / e.sum(), (e[0] + 17 * e[1] + e[2]) / e.sum()]])
        near(ref.attn_res([[[7.0, 1.0]], [[-7.0, 17.0]]], [[1.0, 1.0]], [0.0, 0.0], eps=1.0), [[1 / 3, 19 / 3]])
        assert ref.attn_res([], [[np.inf, -0.0]], [1.0, 1.0], eps=0.0).tolist() == [[np.inf, 0.0]]

    def test_mhc(self):
        """Streams (3, 1) and (1, 5) of root mean square 3; logits of pre are 0 and ln 3, of post ln 3 and 0, of comb's
        rows (0, ln 3) and (0, 0): softmax (1/4, 3/4) and (1/2, 1/2)."""
        fn = np.zeros((8, 4))
        fn[1, 0] = fn[2, 1] = 3.0
        fn[5, 3] = 1.5
        streams, scale = [[[3.0, 1.0], [1.0, 5.0]]], np.log(3) / np.array([3.0, 1.0, 2.5])
        y, post, comb = ref.mhc_pre(streams, fn, np.zeros(8), scale, norm_eps=0.0, eps=0.0, iters=1)
        near(y, [[3 / 2 + 3 / 4, 1 / 2 + 15 / 4]])
        near(post, [[3 / 2, 1]])
        near(comb, [[[1 / 3, 3 / 5], [2 / 3, 2 / 5]]])  # columns first
        again = ref.mhc_pre(streams, fn, np.zeros(8), scale, norm_eps=0.0, eps=0.0, iters=2)[2]
        near(again[0, :, 0], np.array([5 / 14, 5 / 8]) / (5 / 14 + 5 / 8))
        y, _, comb = ref.mhc_pre(streams, fn, np.full(8, -1e3), scale, norm_eps=0.0, eps=1.0, iters=1)
        near(y, [[4, 6]])  # pre is eps
        near(comb[0, 0], [1.25 / 3.75, 1.75 / 4.25])
        near(ref.mhc_post([[1.0, 2.0]], streams, [[2.0, 0.0]], [[[0.0, 1.0], [0.5, 0.0]]]), [[[2.5, 6.5], [3, 1]]])

    def test_index_pool(self):
        """Weights 1/4, 3/4 and 1/2, 1/2; the fifth token has no pool."""
        gate = np.log([[1, 2], [3, 1], [5, 5], [5, 10], [9, 9]])
        k = np.array([[8.0, 1], [4, 3], [1, 2], [3, 6], [9, 9]])
        ape = [[0, 0], [0, np.log(2)]]
        near(ref.index_pool(k, gate, ape), [[5, 2], [2, 5.2]])
        near(ref.index_pool(k, gate, ape, offsets=[0, 1, 4, 5]), [[17 / 8, 23 / 11]])

    def test_index_scores_and_choice(self):
        """Two heads, of which one is weighed by -1: dots 1, 2, -1 and 0, 3, 1, so that scores are 2 (2 d - d')."""
        q, keys = [[[1, 0], [0, 1]]] * 3, [[1.0, 0], [2, 3], [-1, 1]]
        w = [[2.0, -1]] * 3
        s = ref.index_scores(q, keys, w, scale=2.0, pool=2, positions=7)
        near(s, [[4, 2, -np.inf], [4, 2, -2], [4, 2, -2]])
        ids = ref.index_select(q, keys, w, topk=2, pool=2, positions=7)
        assert ids.tolist() == [[0, 1, 4], [0, 1, -1], [0, 1, 6]]
        assert ref.index_select(q, keys, w, topk=4, pool=2, positions=7).tolist() == [
            [0, 1, 2, 3, 4], [0, 1, 2, 3, -1], [0, 1, 2, 3, 6]]
        keys[2][0] = np.nan
        assert ref.index_select(q, keys, w, topk=2, pool=2, positions=7).tolist() == [[0, 1, 4], [4, 5, -1], [4, 5, 6]]

    def test_philox_vectors(self):
        """The known answers that Random123 publishes for Philox4x32-10."""
        ones = 0xFFFFFFFF
        assert ref.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
        assert ref.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
        pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
        assert ref.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)

    def test_uniform_has_the_words_where_they_belong(self):
        x0, x1, *_ = ref.philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
        u = ref.uniform(0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88)
        assert u == (x0 * 2**21 + x1 // 2**11) / 2**53


class TestElementwise:
    def test_sigmoid_and_softplus_at_the_rim(self):
        x = np.array([-1e308, -800, -40, 0, 40, 800, 1e308])
        assert ref.sigmoid(x).tolist() == [0, 0, np.exp(-40.0) / (1 + np.exp(-40.0)), 0.5, 1, 1, 1]
        assert ref.softplus(x)[[0, 1, 5, 6]].tolist() == [0, 0, 800, 1e308]
        near(ref.sigmoid(x) + ref.sigmoid(-x), 1, U64)

    def test_situ(self):
        gate, up = [1.0, -3.0, 10.0], [2.0, 10.0, 100.0]
        near(ref.situ(gate, up, beta=4, linear_beta=25), [1.429351131, -1.144501021, 98.590781554], 1e-9)
        near(ref.situ([1.0], [2.0], beta=0.5), [np.tanh(2) / (1 + np.exp(-1))], 1e-15)
        near(ref.situ([np.inf, -np.inf], [30.0, 30.0], beta=4, linear_beta=25), [100 * np.tanh(1.2), 0], 1e-15)

    def test_layer_norm(self):
        """Of (1, 3, 5, 7): mean 4, variance 5."""
        y = ref.layer_norm([[1.0, 3, 5, 7]], [1, 2, 1, 1], [0, 0, 0, 10], eps=0.0)
        near(y, [[-3 / 5**0.5, -2 / 5**0.5, 1 / 5**0.5, 10 + 3 / 5**0.5]])
        near(ref.layer_norm([[1.0, 3, 5, 7]], [1, 1, 1, 1], [0, 0, 0, 0], eps=4.0), [[-1, -1 / 3, 1 / 3, 1]])
        assert ref.layer_norm([[3.0, 3.0]], [5.0, 5.0], [0.5, -1.0], eps=1e-6).tolist() == [[0.5, -1.0]]

    def test_swiglu_limit(self):
        s = 10 / (1 + np.exp(-10))
        near(ref.swiglu([11.0, 10.0, 1.0, -11.0], [2.0, 12.0, -12.0, -3.0], limit=10),
             [2 * s, 10 * s, -10 / (1 + np.exp(-1)), 33 / (1 + np.exp(11))], 1e-13)
        assert np.isnan(ref.swiglu([np.nan, 1.0], [1.0, np.nan], limit=10)).all()

    def test_swiglu(self):
        near(ref.swiglu([1.0, -2.0], [3.0, 0.5]), [3 / (1 + np.exp(-1)), -1 / (1 + np.exp(2))], 1e-15)

    def test_norms(self, rng):
        x = rng.normal(size=(3, 17)) * 1e18            # squares of huge float32 values are small for float64
        y = ref.rms_norm(x, np.full(17, 2.0), eps=1e-5)
        near((y**2).mean(-1), 4, 1e-14)
        near((ref.l2_norm(x) ** 2).sum(-1), 1, 1e-14)
        assert (ref.rms_norm(np.zeros((1, 4)), np.ones(4), eps=1e-5) == 0).all()

    def test_softmax_moves_with_its_input(self, rng):
        x = rng.normal(size=(4, 9))
        near(ref.softmax(x + 1000), ref.softmax(x), 1e-13)
        near(ref.softmax(x).sum(-1), 1, 1e-15)
        assert ref.softmax([[0.0, -np.inf]]).tolist() == [[1, 0]]

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
    def test_inputs_widen_exactly(self, rng, dtype):
        x, w = rng.normal(size=(3, 4)).astype(dtype), rng.normal(size=(5, 4)).astype(dtype)
        y = ref.linear(x, w)
        assert y.dtype == np.float64
        assert (y == x.astype(np.float64) @ w.astype(np.float64).T).all()

    def test_linear_bias_and_embedding(self, rng):
        x, w, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 3)), rng.normal(size=4)
        near(ref.linear(x, w, b)[1, 2], (x[1] * w[2]).sum() + b[2], 1e-15)
        assert (ref.embedding([2, 0], w) == w[[2, 0]]).all()
        for ids in ([0, 4], [-1]):
            with pytest.raises(ValueError, match=r"ids\[\d\] is -?\d; it must be in 0..3"):
                ref.embedding(ids, w)


class TestShortConv:
    @pytest.mark.parametrize("W", range(1, 9))
    def test_splits_equal_the_whole(self, rng, W):
        x, w = rng.normal(size=(20, 3)), rng.normal(size=(3, W))
        whole, end = ref.short_conv(x, w)
        history, parts = None, []
        for part in np.split(x, [0, 1, 3, 11]):
            y, history = ref.short_conv(part, w, history=history)
            parts.append(y)
        assert (np.concatenate(parts) == whole).all() and (history == end).all()
        assert end.shape == (W - 1, 3)

    def test_offsets_equal_separate(self, rng):
        x, w, history = rng.normal(size=(9, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 3))
        y, after = ref.short_conv(x, w, history=history, offsets=[0, 2, 2, 9])
        for n, r in enumerate([slice(0, 2), slice(2, 2), slice(2, 9)]):
            one, end = ref.short_conv(x[r], w, history=history[n])
            assert (y[r] == one).all() and (after[n] == end).all()


class TestLatentAttention:
    def inputs(self, rng, T=6, S=11, H=3, nope=4, P=2, R=5, V=7):
        return (rng.normal(size=(T, H, nope + P)), rng.normal(size=(S, R)), rng.normal(size=(S, P)),
                rng.normal(size=(H, nope, R)), rng.normal(size=(H, V, R)))

    def test_absorbed_equals_expanded(self, rng):
        args = self.inputs(rng)
        a, b = (ref.latent_attention(*args, scale=0.3, form=f) for f in ("absorbed", "expanded"))
        near(a, b, 1e-13)

    def test_one_query_by_its_formula(self, rng):
        q, c, k, w_uk, w_uv = self.inputs(rng, T=2, S=4, H=1)
        s = np.array([q[0, 0, :4] @ (w_uk[0] @ c[j]) + q[0, 0, 4:] @ k[j] for j in range(3)]) * 0.3
        p = np.exp(s) / np.exp(s).sum()
        near(ref.latent_attention(q, c, k, w_uk, w_uv, scale=0.3)[0, 0], w_uv[0] @ (p @ c[:3]), 1e-13)

    @pytest.mark.parametrize("form", ["absorbed", "expanded"])
    def test_later_positions_are_left_out(self, rng, form):
        q, c, k, w_uk, w_uv = self.inputs(rng)
        before = ref.latent_attention(q, c, k, w_uk, w_uv, scale=0.3, form=form)
        c[9], k[10] = np.nan, np.nan
        with np.errstate(invalid="ignore"):
            after = ref.latent_attention(q, c, k, w_uk, w_uv, scale=0.3, form=form)
        # equal but for the order of sums, which a matrix product may choose by the number of rows
        near(after[:4], before[:4], 1e-13)
        assert np.isnan(after[4:]).all()

    @pytest.mark.parametrize("form", ["absorbed", "expanded"])
    def test_offsets_equal_separate(self, rng, form):
        q, c, k, *w = self.inputs(rng, T=6, S=14)
        rows, cached = [0, 2, 2, 6], [0, 5, 5, 14]
        o = ref.latent_attention(q, c, k, *w, scale=1, offsets=rows, kv_offsets=cached, form=form)
        near(o[:2], ref.latent_attention(q[:2], c[:5], k[:5], *w, scale=1, form=form), 1e-13)
        near(o[2:], ref.latent_attention(q[2:], c[5:], k[5:], *w, scale=1, form=form), 1e-13)

    @pytest.mark.parametrize("form", ["absorbed", "expanded"])
    def test_selected_positions_are_a_cache_of_their_own(self, rng, form):
        q, c, k, *w = self.inputs(rng)
        select = np.array([[0, 2, 5], [1, -1, -1], [-1, -1, -1], [3, 7, 8], [0, 9, -1], [10, -1, -1]])
        o = ref.latent_attention(q, c, k, *w, scale=0.3, select=select, form=form)
        for t, row in enumerate(select):
            row = row[row >= 0]
            if len(row):
                near(o[t], ref.latent_attention(q[t:t + 1], c[row], k[row], *w, scale=0.3, form=form)[0], 1e-13)
        assert not o[2].any()
        near(o[5], np.einsum("hvr,r->hv", w[1], c[10]), 1e-13)

    def test_a_selection_of_all_is_none(self, rng):
        args = self.inputs(rng)
        select = np.where(np.arange(11) <= np.arange(5, 11)[:, None], np.arange(11), -1)
        near(ref.latent_attention(*args, scale=0.3, select=select), ref.latent_attention(*args, scale=0.3), 1e-13)

    @pytest.mark.parametrize("row", [[0, 6], [3, 3], [2, 1], [-1, 0], [0, -2]])
    def test_rows_that_are_none(self, rng, row):
        with pytest.raises(ValueError, match=r"select\[0\] of a sequence is .* must rise within 0 to 5, its own"):
            ref.latent_attention(*self.inputs(rng), scale=1, select=[row] * 6)

    def test_more_queries_than_positions(self, rng):
        with pytest.raises(ValueError, match="latent has 3 positions for 6 queries"):
            ref.latent_attention(*self.inputs(rng, S=3), scale=1)


class TestRoute:
    def test_bias_chooses_and_does_not_weigh(self):
        scores = np.array([[0.0, 1.0, 2.0, -1.0]])
        ids, w = ref.route(scores, k=2, bias=[0, 0, -9, 9], renormalise=False, scale=2.0)
        assert ids.tolist() == [[1, 3]] and ids.dtype == np.int32
        near(w, 2 * ref.sigmoid([[1.0, -1.0]]), 1e-15)

    def test_vanishing_scores(self):
        """The sum is not 0 by 1e-20 alone: two scores of 1e-20 get a third each."""
        ids, w = ref.route(np.full((1, 2), np.log(1e-20)), k=2)
        near(w, 1 / 3, 1e-12)

    def test_renormalised_weights_sum_to_the_scale(self, rng):
        for function in ("sigmoid", "softmax"):
            _, w = ref.route(rng.normal(size=(7, 12)), k=3, function=function, scale=2.446)
            near(w.sum(-1), 2.446, 1e-14)

    def test_ties_take_the_lowest_index(self):
        ids, _ = ref.route(np.zeros((1, 8)), k=3, groups=4, top_groups=2)
        assert ids.tolist() == [[0, 1, 2]]
        ids, _ = ref.route(np.array([[0, 5, 1, 1, 1, 5.0]]), k=3)
        assert ids.tolist() == [[1, 2, 5]]

    def test_groups_by_their_two_best(self):
        # sums of the two best: 5, 8, 6; the best single expert, 4.5, is in the group that drops out
        bias = np.array([4.5, 0.5, 0, 4, 4, 0, 3, 3, 2])
        ids, _ = ref.route(np.zeros((1, 9)), k=4, bias=bias, groups=3, top_groups=2)
        assert ids.tolist() == [[3, 4, 6, 7]]

    def test_nan_is_loud(self):
        _, w = ref.route(np.array([[np.nan, 1, 2, 3], [0, 1, 2, 3]]), k=2)
        assert np.isnan(w[0]).all() and np.isfinite(w[1]).all()

    def test_too_few_experts_in_the_groups(self):
        with pytest.raises(ValueError, match="k is 3 with 8 experts, groups 4, top_groups 1"):
            ref.route(np.zeros((1, 8)), k=3, groups=4, top_groups=1)

    def test_moe_is_the_weighted_sum(self, rng):
        x, shared = rng.normal(size=(2, 5, 3))
        gate, up = rng.normal(size=(2, 4, 6, 3))
        down = rng.normal(size=(4, 3, 6))
        ids, w = ref.route(rng.normal(size=(5, 4)), k=2)
        y = ref.moe(x, ids, w, gate, up, down, shared=shared)
        for t in range(5):
            one = sum(p * down[e] @ ref.swiglu(gate[e] @ x[t], up[e] @ x[t]) for p, e in zip(w[t], ids[t]))
            near(y[t], one + shared[t], 1e-13)


class TestSample:
    LOGITS = np.log([0.1, 0.4, 0.4, 0.1])

    def draw(self, n=4000, **options):
        ids = [ref.sample(self.LOGITS, seed=7, position=i, **options) for i in range(n)]
        return np.bincount(ids, minlength=4) / n

    def test_frequencies(self):
        """Within 5 standard deviations, sqrt(p (1 - p) / n) each."""
        near(self.draw(), [0.1, 0.4, 0.4, 0.1], 5 * 0.5 / np.sqrt(4000))
        p = np.array([0.1, 0.4, 0.4, 0.1]) ** 2
        near(self.draw(temperature=0.5), p / p.sum(), 5 * 0.5 / np.sqrt(4000))

    def test_what_stays(self):
        assert (self.draw(n=300, top_k=2) > 0).tolist() == [False, True, True, False]
        assert (self.draw(n=300, top_k=3) > 0).tolist() == [True, True, True, False]
        assert (self.draw(n=300, min_p=0.5) > 0).tolist() == [False, True, True, False]
        assert (self.draw(n=300, min_p=1.0) > 0).tolist() == [False, True, True, False]
        assert (self.draw(n=300, top_p=0.45) > 0).tolist() == [False, True, True, False]
        assert (self.draw(n=300, top_p=0.3) > 0).tolist() == [False, True, False, False]
        # top_p counts the renormalised rest: of two tokens with half each, 0.45 leaves one
        assert (self.draw(n=300, top_p=0.45, top_k=2) > 0).tolist() == [False, True, False, False]

    def test_the_first_whose_sum_exceeds_u(self):
        """Against the definition: tokens in order 1, 2, 0, 3."""
        for i in range(200):
            u = ref.uniform(3, 5, i)
            expected = [1, 2, 0, 3][int(np.sum(np.array([0.4, 0.8, 0.9]) <= u))]
            assert ref.sample(self.LOGITS, seed=3, sequence=5, position=i) == expected

    def test_greedy_and_masks(self):
        assert ref.sample([1.0, 3.0, 3.0], temperature=0) == 1
        assert {ref.sample([-np.inf, 0.0, -np.inf], position=i) for i in range(20)} == {1}

    @pytest.mark.parametrize("logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
    def test_logits_must_be_finite(self, logits):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=r"logits\[\d\] is"):
                ref.sample(logits, temperature=temperature)

    @pytest.mark.parametrize("option", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(min_p=2)])
    def test_options(self, option):
        with pytest.raises(ValueError, match=next(iter(option))):
            ref.sample(self.LOGITS, **option)


def test_a_history_of_another_shape_is_refused(rng):
    """As causal_conv1d has it, [C, W - 1]: not read as if it lay as ours."""
    x, w, history = rng.random((6, 5)), rng.random((5, 4)), rng.random((5, 3))
    with pytest.raises(ValueError, match=r"history has shape \[5, 3\]; it must be \[1, 3, 5\] or \[3, 5\]"):
        ref.short_conv(x, w, history=history)


@pytest.mark.parametrize("x", [np.ones(3, complex), np.array(["1.5"]), "abc"])
def test_what_is_no_real_number_is_refused(x):
    with pytest.raises(TypeError, match="an input is .*; it must be real numbers"):
        ref.sigmoid(x)


@pytest.mark.skipif(sys.platform != "linux", reason="fenv_t is another on macOS")
def test_a_thread_that_flushes_subnormals_is_said():
    """Set as the start of a library does that was compiled with -ffast-math: bits of what fesetenv restores."""
    libm = ctypes.CDLL(None)
    word, bits = (7, 0x8040) if platform.machine() == "x86_64" else (0, 1 << 24)  # mxcsr; fpcr
    before, flushing = ((ctypes.c_uint32 * 8)() for _ in range(2))
    libm.fegetenv(before)
    libm.fegetenv(flushing)
    flushing[word] |= bits
    x = np.full(3, 1e-40, np.float32)
    libm.fesetenv(flushing)
    try:
        with pytest.warns(RuntimeWarning, match="takes float32 below 2\\^-126 as 0"):
            ref.softmax(x)
    finally:
        libm.fesetenv(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ref.add(x, x)[0] > 0
