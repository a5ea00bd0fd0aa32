"""mhc_pre, mhc_post: budgets for one to many streams, tokens of any size, in place, same bytes everywhere."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from block_data import BLOCK_TYPES, drawn
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl
from kimi_linear.diff.budgets._mhc import _balanced


def streams(T, n, D, scale=1.0, steep=1.0, spread=1.0, norm_eps=1e-5, **more):
    """`steep`: how far logits of two tokens lie apart; `spread`: what base adds to that."""
    return dict(x=normal(T, n, D, scale=scale), fn=normal((2 + n) * n, n * D, seed=1, scale=steep * (n * D) ** -0.5),
                base=normal((2 + n) * n, seed=2, scale=spread), scale=np.float32([1.0, 0.7, 1.5]),
                norm_eps=norm_eps) | more


def guarded_run(op, given, *shapes):
    def run(ctx):
        outs, checks = zip(*map(guarded, shapes), strict=True)
        getattr(kl.ops, op)(**given, out=outs if len(outs) > 1 else outs[0], ctx=ctx)
        for untouched in checks:
            untouched()
        return tuple(out.copy() for out in outs)

    before = {name: np.copy(value) for name, value in given.items()}
    got = everywhere(run)
    assert all(np.array_equal(before[name], value, equal_nan=True) for name, value in given.items())
    return got


def check(given):
    """Of both ops, the second on what the first gives; mhc_pre's results."""
    x = given["x"]
    T, n, D = x.shape
    with np.errstate(all="ignore"):
        ref = kl.reference.mhc_pre(**given)
    got = guarded_run("mhc_pre", given, (T, D), (T, n), (T, n, n))
    judge("mhc_pre", got, ref, **given)
    check_post(dict(y=got[0], x=x, post=got[1], comb=got[2]))
    return got


def check_post(given):
    with np.errstate(all="ignore"):
        ref = kl.reference.mhc_post(**given)
    got = guarded_run("mhc_post", given, given["x"].shape)
    judge("mhc_post", got, ref, **given)
    over = given["x"].copy()
    assert kl.ops.mhc_post(**given | dict(x=over), out=over) is over and over.tobytes() == got.tobytes()
    return got


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("n, D", [(1, 1), (1, 16), (2, 15), (3, 16), (4, 17), (4, 33), (7, 20), (16, 33), (17, 3)])
def test_within_budget_and_in_place(n, D, T):
    check(streams(T, n, D))


def test_the_real_width():
    check(streams(2, 4, 4096))


def test_as_many_streams_as_there_may_be():
    check(streams(1, 64, 2, iters=2))


def test_rows_shared_by_threads():
    check(streams(305, 4, 48))


@pytest.mark.parametrize("iters", [1, 2, 3, 100])
def test_normalisations(iters):
    check(streams(4, 4, 48, iters=iters))


@pytest.mark.parametrize("steep, spread", [(0.0, 0.0), (0.0, 30.0), (10.0, 10.0), (30.0, 0.0), (1e4, 0.0)])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_logits_that_are_equal_and_far_apart(steep, spread, eps):
    check(streams(6, 4, 48, steep=steep, spread=spread, eps=eps))


def test_streams_that_mix_slowly():
    """Where comb is nearly a permutation what its entries are off by does not grow with the number of passes."""
    given = streams(6, 4, 48, steep=0.1)
    for turned in (np.eye(4), np.eye(4)[[1, 0, 3, 2]], np.kron(np.eye(2), np.ones((2, 2)))):
        given["base"][8:] = 12 * turned.ravel()
        check(given)


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_how_far_errors_of_logits_go(size, spread):
    """The bound of comb's logarithms is that of the worst signs of errors of one size, whatever their second order is;
    of two streams all signs are tried, of four some."""
    for n in (2, 4):
        logits = spread * np.random.default_rng(1).standard_normal((6, n, n))
        bound = _balanced(logits, np.full(logits.shape, size), 1e-6, 20, 0.0)
        right, share = _comb(logits), 0.0
        tried = itertools.product([-1, 1], repeat=4) if n == 2 else np.random.default_rng(0).choice([-1, 1], (200, 16))
        for signs in tried:
            off = np.abs(_comb(logits + size * np.reshape(signs, (n, n))) / right - 1)
            share = max(share, (off / bound).max())
        assert (0.7 if size < 1e-3 else 0.1) < share < 1


def _comb(logits):
    """Of logits [N, n, n], in float64."""
    n = logits.shape[-1]
    given = dict(x=np.ones((n, 1)), fn=np.zeros(((2 + n) * n, n)), scale=np.ones(3), norm_eps=0.0)
    return np.stack([kl.reference.mhc_pre(base=np.append(np.zeros(2 * n), one), **given)[2] for one in logits])


@pytest.mark.parametrize("norm_eps, scale", [(1e-6, 1e-42), (1e-6, 1e-4), (1e-6, 1e19), (1e-6, 3e38), (0, 1e-45),
                                             (0, 1e-20), (0, 1e30)])
@pytest.mark.parametrize("n, D", [(3, 11), (4, 600)])
def test_tiny_and_huge_tokens(n, D, norm_eps, scale):
    """Beside ordinary ones; with one ordinary value in each."""
    given = streams(3, n, D, norm_eps=norm_eps)
    x = given["x"]
    x[1:] = np.sign(x[1:]) * np.float32(scale)
    x[2, -1, -1] = 1
    if scale > 1e38:
        x[1:] /= n  # whose sum is finite
    check(given)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_weights_and_inputs_are_their_widening(dtype):
    given = streams(70, 4, 40)
    narrow = {name: a.astype(dtype) if isinstance(a, np.ndarray) else a for name, a in given.items()}
    wide = {name: a.astype(np.float32) if isinstance(a, np.ndarray) else a for name, a in narrow.items()}
    for T in (1, 5, 70):
        got = kl.ops.mhc_pre(**narrow | dict(x=narrow["x"][:T]))
        wanted = check(wide | dict(x=wide["x"][:T]))
        assert [a.tobytes() for a in got] == [a.tobytes() for a in wanted]
    overflowing = wide | dict(x=wide["x"][:3] * np.float32(1e30), fn=narrow["fn"])
    check(overflowing)


def in_blocks(given, type):
    """`given` with fn in a storage type, and with what that widens to."""
    fn = drawn(type, *given["fn"].shape, scale=given["fn"].std())
    return given | dict(fn=fn), given | dict(fn=kl.ops.dequantize(fn))


@pytest.mark.parametrize("type", [t.name for t in BLOCK_TYPES])
@pytest.mark.parametrize("T", [1, 5, 64])
def test_blocks_are_their_widening(type, T):
    """One token, a few, and a task of sixty with four behind it; two of the few leave float32 and come back."""
    given = streams(T, 4, 128)
    given["x"][1:3] *= np.float32([1e30, 1e-30])[:len(given["x"][1:3]), None, None]
    narrow, wide = in_blocks(given, type)
    kept = narrow["fn"].data.copy()
    got = everywhere(lambda ctx: kl.ops.mhc_pre(**narrow, ctx=ctx))
    assert [a.tobytes() for a in got] == [a.tobytes() for a in kl.ops.mhc_pre(**wide)]
    assert np.array_equal(narrow["fn"].data, kept)
    judge("mhc_pre", got, kl.reference.mhc_pre(**wide), **wide)


@pytest.mark.parametrize("n, D", [(1, 32), (2, 16), (3, 32), (16, 2), (64, 1)])
def test_blocks_that_cross_streams(n, D):
    """A block is of a row of n D values, however short a stream is."""
    narrow, wide = in_blocks(streams(3, n, D, iters=2), "Q8_0")
    got = everywhere(lambda ctx: kl.ops.mhc_pre(**narrow, ctx=ctx))
    judge("mhc_pre", got, kl.reference.mhc_pre(**wide), **wide)


@pytest.mark.parametrize("type", ["bfloat16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("activations", ["int8", "bfloat16"])
def test_the_product_is_in_float32_whatever_the_activations(activations, type):
    given = streams(5, 4, 64)
    given["x"][3] *= np.float32(1e30)
    given = in_blocks(given, type)[0] if type.startswith("Q") else given | dict(fn=given["fn"].astype(type))
    got = kl.ops.mhc_pre(**given, ctx=kl.Context(activations=activations))
    assert [a.tobytes() for a in got] == [a.tobytes() for a in kl.ops.mhc_pre(**given)]


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
def test_with_blas_within_the_budget(type):
    if kl._core.blas_name() == "none":
        pytest.skip("built without BLAS")
    given = streams(70, 4, 64)
    given, wide = (given, given) if type == "F32" else in_blocks(given, type)
    judge("mhc_pre", kl.ops.mhc_pre(**given, ctx=kl.Context(gemm="blas")), kl.reference.mhc_pre(**wide), **wide)


def test_tokens_of_zeros():
    given = streams(3, 4, 20)
    given["x"][1] = 0
    y, post, comb = check(given)
    assert not y[1].any()
    y, post, comb = check(given | dict(norm_eps=0.0))
    assert np.isnan(post[1]).all() and np.isfinite(post[[0, 2]]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_nan_and_no_other(value):
    given = streams(4, 4, 20)
    given["x"][2, 1, 7] = value
    for a in check(given):
        assert np.isnan(a[2]).all() and np.isfinite(np.delete(a, 2, axis=0)).all()


@pytest.mark.parametrize("name, at, spoilt", [("y", (1, 3), np.s_[1, :, 3]), ("x", (1, 2, 3), np.s_[1, :, 3]),
                                              ("post", (1, 2), np.s_[1, 2]), ("comb", (1, 0, 2), np.s_[1, 2])])
def test_where_a_nan_of_mhc_post_goes(name, at, spoilt):
    given = dict(y=normal(2, 20), x=normal(2, 4, 20), post=normal(2, 4), comb=normal(2, 4, 4))
    given[name][at] = np.nan
    got = check_post(given)
    assert np.isnan(got[spoilt]).all() and np.isnan(got).sum() == np.isnan(got[spoilt]).size


# ---- what must be equal ----


def test_columns_sum_to_one_and_rows_nearly():
    """To within eps; rows the better, the more passes there are."""
    _, post, comb = kl.ops.mhc_pre(**streams(50, 4, 48, iters=500))
    assert np.abs(comb.sum(-2) - 1).max() < 2e-6 and np.abs(comb.sum(-1) - 1).max() < 1e-5
    assert (comb > 0).all() and (post > 0).all() and (post < 2).all()


def test_one_stream():
    """Without eps comb is 1, and what mhc_post gives is an ordinary residual."""
    given = streams(3, 1, 8, eps=0.0)
    y, _, comb = check(given)
    assert (comb == 1).all()
    after = kl.ops.mhc_post(y, given["x"], np.ones((3, 1), np.float32), comb)
    assert after[:, 0].tobytes() == (y + given["x"][:, 0]).tobytes()


def test_without_fn_all_tokens_are_alike():
    given = streams(5, 4, 20)
    given["fn"][...] = 0
    _, post, comb = check(given)
    assert (post == post[0]).all() and (comb == comb[0]).all()


@pytest.mark.parametrize("power", [-30, 20, 90])
def test_tokens_times_a_power_of_two(power):
    """Without norm_eps weights do not change, and y is as much larger, whichever tokens are rescaled on the way."""
    given, factor = streams(3, 4, 20, norm_eps=0.0), np.float32(2.0**power)
    y, post, comb = kl.ops.mhc_pre(**given)
    more = kl.ops.mhc_pre(**given | dict(x=given["x"] * factor))
    assert [a.tobytes() for a in more] == [(y * factor).tobytes(), post.tobytes(), comb.tobytes()]


def test_identity_and_permutation_of_streams():
    """With post 0 mhc_post moves streams: row i of comb is where stream i goes."""
    x = normal(2, 3, 5)
    given = dict(y=normal(2, 5), x=x, post=np.zeros((2, 3), np.float32))
    assert np.array_equal(kl.ops.mhc_post(**given, comb=np.stack([np.eye(3, dtype=np.float32)] * 2)), x)
    turn = np.zeros((2, 3, 3), np.float32)
    turn[:, 0, 1] = turn[:, 1, 2] = turn[:, 2, 0] = 1
    assert np.array_equal(kl.ops.mhc_post(**given, comb=turn), x[:, [2, 0, 1]])


def test_a_token_alone_has_the_bytes_that_it_has_among_others():
    given = streams(130, 4, 100)
    whole = kl.ops.mhc_pre(**given)
    after = kl.ops.mhc_post(whole[0], given["x"], *whole[1:])
    for t in (0, 59, 60, 129):
        part = slice(t, t + 1)
        alone = kl.ops.mhc_pre(**given | dict(x=given["x"][part]))
        assert [a.tobytes() for a in alone] == [a[part].tobytes() for a in whole]
        assert kl.ops.mhc_post(alone[0], given["x"][part], *alone[1:]).tobytes() == after[part].tobytes()


def test_more_axes():
    given = streams(6, 4, 20)
    whole = kl.ops.mhc_pre(**given)
    batch = given | dict(x=given["x"].reshape(2, 3, 4, 20))
    for op in (kl.ops.mhc_pre, kl.reference.mhc_pre):
        y, post, comb = op(**batch)
        assert y.shape == (2, 3, 20) and post.shape == (2, 3, 4) and comb.shape == (2, 3, 4, 4)
    assert [a.tobytes() for a in kl.ops.mhc_pre(**batch)] == [a.tobytes() for a in whole]
    after = kl.ops.mhc_post(*[a.reshape(2, 3, *a.shape[1:]) for a in (whole[0], given["x"], *whole[1:])])
    assert after.tobytes() == kl.ops.mhc_post(whole[0], given["x"], *whole[1:]).tobytes()
    judge("mhc_pre", kl.ops.mhc_pre(**batch), kl.reference.mhc_pre(**batch), **batch)


# ---- errors ----

F = np.float32


@pytest.mark.parametrize("change, error, message", [
    (dict(x=np.zeros((3, 4, 24))), TypeError, "x is float64; it must be float32"),
    (dict(x=np.zeros(24, F)), ValueError, r"x has shape \[24\]; it must be \[..., n, D\] with n and D >= 1"),
    (dict(x=np.zeros((3, 0, 24), F)), ValueError, r"x has shape \[3, 0, 24\]"),
    (dict(x=np.zeros((1, 65, 1), F), fn=np.zeros((67 * 65, 65), F), base=np.zeros(67 * 65, F)), ValueError,
     "mhc_pre: x has 65 streams; it must have 1 to 64"),
    (dict(fn=np.zeros((24, 95), F)), ValueError, r"fn has shape \[24, 95\]; it must be \[24, 96\], \(2 \+ n\) n rows"),
    (dict(fn=np.zeros((24, 96))), TypeError, "fn is float64"),
    (dict(fn=kl.ops.quantize(np.zeros((24, 64), F), "Q8_0")), ValueError,
     r"fn has shape \[24, 64\]; it must be \[24, 96\], \(2 \+ n\) n rows for 4 streams of 24"),
    (dict(fn=kl.ops.quantize(np.zeros((1, 24, 96), F), "Q8_0")), ValueError,
     r"fn has shape \[1, 24, 96\]; it must be \[rows, cols\]"),
    (dict(base=np.zeros(23, F)), ValueError, r"base has shape \[23\]; it must be \[24\]"),
    (dict(scale=np.zeros(4, F)), ValueError, r"scale has shape \[4\]; it must be \[3\]"),
    (dict(norm_eps=-1), ValueError, "norm_eps is -1.0; it must be >= 0"),
    (dict(eps=np.nan), ValueError, "eps is nan; it must be >= 0"),
    (dict(iters=0), ValueError, "mhc_pre: iters is 0; it must be 1 to 1000"),
    (dict(iters=1001), ValueError, "mhc_pre: iters is 1001"),
    (dict(iters=2.5), TypeError, "iters is 2.5; it must be an int"),
    (dict(out=np.zeros((3, 24), F)), TypeError, "out must be a tuple of 3 arrays"),
    (dict(out=(None, None, np.zeros((3, 4), F))), ValueError, r"out\[2\] has shape \[3, 4\]; it must be \[3, 4, 4\]"),
])
def test_errors_of_mhc_pre_are_sentences(change, error, message):
    with pytest.raises(error, match=message):
        kl.ops.mhc_pre(**(streams(3, 4, 24) | change))


def test_results_of_mhc_pre_are_no_inputs_and_not_each_other():
    given, y = streams(3, 4, 24), np.zeros((3, 24), F)
    with pytest.raises(ValueError, match="out shares memory with x"):
        kl.ops.mhc_pre(**given, out=(given["x"].reshape(-1)[:72].reshape(3, 24), None, None))
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with out\[0\]"):
        kl.ops.mhc_pre(**given, out=(y, y.reshape(-1)[:12].reshape(3, 4), None))


@pytest.mark.parametrize("change, error, message", [
    (dict(y=np.zeros((2, 4), F)), ValueError, r"y has shape \[2, 4\]; it must be \[2, 5\]"),
    (dict(x=np.zeros((2, 3, 5))), TypeError, "x is float64"),
    (dict(post=np.zeros((2, 3, 1), F)), ValueError, r"post has shape \[2, 3, 1\]; it must be \[2, 3\]"),
    (dict(comb=np.zeros((2, 3), F)), ValueError, r"comb has shape \[2, 3\]; it must be \[2, 3, 3\]"),
    (dict(out=np.zeros((2, 5), F)), ValueError, r"out has shape \[2, 5\]"),
])
def test_errors_of_mhc_post_are_sentences(change, error, message):
    given = dict(y=np.zeros((2, 5), F), x=np.zeros((2, 3, 5), F), post=np.zeros((2, 3), F),
                 comb=np.zeros((2, 3, 3), F))
    with pytest.raises(error, match=message):
        kl.ops.mhc_post(**(given | change))


def test_core_refuses_nonsense():
    core, x = kl.Context()._core, np.zeros((1, 2, 4), F)
    fn, few = (np.zeros((8, 8), F), 0, 1, 8, 8), [np.zeros(n, F) for n in (4, 2, 4)]
    rest = np.zeros(8, F), np.zeros(3, F)
    with pytest.raises(ValueError, match="out has 4 values; the sizes of the call say 3"):
        kl._core.mhc_pre(core, *few, x, fn, *rest, 1, 2, 3, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="out has 4 values; the sizes of the call say 0"):
        kl._core.mhc_pre(core, *few, x, fn, *rest, 0, 2**62, 4, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="mhc_pre: eps is nan; it must be >= 0"):
        kl._core.mhc_pre(core, *few, x, fn, *rest, 1, 2, 4, 0.0, np.nan, 1)
    with pytest.raises(ValueError, match="mhc_pre: norm_eps is nan; it must be >= 0"):
        kl._core.mhc_pre(core, *few, x, fn, *rest, 1, 2, 4, np.nan, 0.0, 1)
    with pytest.raises(ValueError, match=r"mhc_pre: fn is 1 of \[8, 4\]; it must be 1 of \[8, 8\]"):
        kl._core.mhc_pre(core, *few, x, (np.zeros((8, 4), F), 0, 1, 8, 4), *rest, 1, 2, 4, 0.0, 0.0, 1)
    with pytest.raises(TypeError, match="fn has storage type 8 and rows of 8 values; it must be a known type and who"):
        kl._core.mhc_pre(core, *few, x, (np.zeros(0, np.uint8), 8, 1, 8, 8), *rest, 1, 2, 4, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="mhc_post: x has 0 streams; it must have 1 to 64"):
        kl._core.mhc_post(core, *[np.zeros(0, F)] * 2, np.zeros(0, F), *[np.zeros(0, F)] * 2, 0, 0, 4)


# ---- the streams' ends ----

@pytest.mark.parametrize("D", [1, 15, 16, 17, 33, 4096])
@pytest.mark.parametrize("T, n", [(0, 4), (1, 1), (3, 4), (40, 3), (2, 64)])
def test_the_ends(T, n, D):
    x = normal(T, n, D, scale=3)
    mean = guarded_run("mhc_collapse", dict(x=x), (T, D))
    judge("mhc_collapse", mean, kl.reference.mhc_collapse(x), x=x)
    many = guarded_run("mhc_expand", dict(x=mean, n=n), (T, n, D))
    judge("mhc_expand", many, kl.reference.mhc_expand(mean, n=n), x=mean, n=n)
    assert all(many[:, i].tobytes() == mean.tobytes() for i in range(n))
    if n == 1:
        assert kl.ops.mhc_collapse(many).tobytes() == mean.tobytes()


def test_the_ends_at_the_rim():
    x = np.float32([[[3e38], [3e38]], [[1e-45], [0]], [[np.inf], [1]], [[np.nan], [1]], [[-0.0], [-0.0]]])
    mean = kl.ops.mhc_collapse(x)[:, 0]
    assert np.isposinf(mean[0]) and np.isposinf(mean[2]) and np.isnan(mean[3])  # a sum that overflows is infinite
    assert np.signbit(mean[4]) and mean[4] == 0
    assert np.array_equal(kl.ops.mhc_expand(x[:, 0], n=2)[:, 1], x[:, 0], equal_nan=True)


def test_the_ends_refuse():
    x = normal(3, 4, 8)
    with pytest.raises(ValueError, match=r"x has shape \[8\]; it must be \[..., n, D\]"):
        kl.ops.mhc_collapse(x[0, 0])
    with pytest.raises(ValueError, match="n is 0; it must be"):
        kl.ops.mhc_expand(x[:, 0], n=0)
    with pytest.raises(ValueError, match="mhc_expand: x has 65 streams; it must have 1 to 64"):
        kl.ops.mhc_expand(x[:, 0], n=65)
    with pytest.raises(ValueError, match="mhc_collapse: x has 65 streams"):
        kl.ops.mhc_collapse(normal(1, 65, 2))
    with pytest.raises(ValueError, match="out has shape"):
        kl.ops.mhc_expand(x[:, 0], n=4, out=np.empty((3, 3, 8), np.float32))
    whole = normal(12, 8)
    with pytest.raises(ValueError, match="overlap|share"):
        kl.ops.mhc_collapse(whole.reshape(3, 4, 8), out=whole[:3])
