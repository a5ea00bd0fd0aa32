"""`align`: each kind of difference is found, named and undone; two at once, under noise; and nothing is made up."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.diff import align

T, H, K, V = 10, 4, 64, 16
EVEN_ODD = np.arange(K).reshape(2, K // 2).T.ravel()  # first half on the even places
ORDER = [2, 0, 3, 1]
TILED = np.arange(H * 6).reshape(H, 6).T.ravel()


@pytest.fixture(params=range(2))
def rng(request):
    return np.random.default_rng(request.param)


@pytest.fixture
def q(rng):
    return rng.standard_normal((T, H, K), np.float32)


def padded(x, before, after, axis=0, fill=0.0):
    """`x` with rows of `fill` around it."""
    width = [(0, 0)] * x.ndim
    width[axis] = before, after
    return np.pad(x, width, constant_values=fill)


SINGLE = {  # name -> (theirs of ours [T, H, K], words, kinds of steps)
    "same": (lambda q: q.copy(), "theirs is ours, exactly", []),
    "transposed": (lambda q: q.transpose(1, 2, 0), "ours transposed: [H, K, T]", ["transpose"]),
    "swapped": (lambda q: q.swapaxes(1, 2), "ours transposed: [T, K, H]", ["transpose"]),
    "merged": (lambda q: q.reshape(T, H * K), "merged: [T, H*K]", ["reshape"]),
    "merged, K first": (lambda q: q.swapaxes(1, 2).reshape(T, -1), "transposed: [T, K*H]", ["reshape", "transpose"]),
    "split": (lambda q: q.reshape(T, H, 2, K // 2), "split: [T, H, K.0, K.1]", ["reshape"]),
    "batch": (lambda q: q[None], "a batch axis of 1: [1, T, H, K]", ["reshape"]),
    "heads": (lambda q: q[:, ORDER], "along axis H theirs 0..3 are ours 2, 0, 3, 1", ["take"]),
    "reversed": (lambda q: q[::-1], "along axis T theirs is reversed", ["take"]),
    "rolled": (lambda q: np.roll(q, -3, 0), "along axis T theirs is ours rolled: it begins with our slice 3", ["take"]),
    "even and odd": (lambda q: q[..., EVEN_ODD], "along axis K theirs is interleaved", ["take"]),
    "halves": (lambda q: q[..., np.argsort(EVEN_ODD)], "along axis K theirs is in halves", ["take"]),
    "K**0.5": (lambda q: q * np.float32(K**0.5), "times 8 = K**0.5", ["scale"]),
    "K**-0.5": (lambda q: q * np.float32(K**-0.5), "times 0.125 = K**-0.5", ["scale"]),
    "log2(e)": (lambda q: q * np.float32(np.log2(np.e)), "times 1.4427 = log2(e)", ["scale"]),
    "ln 2": (lambda q: q * np.float32(np.log(2)), "times 0.693147 = ln 2", ["scale"]),
    "2, or H**0.5": (lambda q: 2 * q, "times 2 = 2, or H**0.5", ["scale"]),
    "sign": (lambda q: -q, "with its sign changed", ["scale"]),
    "some factor": (lambda q: q * np.float32(0.37), "times 0.37, to", ["scale"]),
    "padded after": (lambda q: padded(q, 0, 6), "padded along axis T, 6 after", ["slice"]),
    "padded before": (lambda q: padded(q, 3, 0, fill=7), "padded along axis T, 3 before", ["slice"]),
    "padded around": (lambda q: padded(q, 3, 2, axis=2), "padded along axis K, 3 before and 2 after", ["slice"]),
}

PAIRS = {
    "transposed and heads": (lambda q: q[:, ORDER].transpose(1, 2, 0), ["[H, K, T]", "0..3 are ours 2, 0, 3, 1"]),
    "transposed and scaled": (lambda q: q.swapaxes(0, 1) * 8, ["[H, T, K]", "times 8 = K**0.5"]),
    "transposed, sign": (lambda q: -q.swapaxes(0, 2), ["[K, H, T]", "sign changed"]),
    "heads and scaled": (lambda q: q[:, ORDER] / 8, ["ours 2, 0, 3, 1", "times 0.125 = K**-0.5"]),
    "heads, sign": (lambda q: -q[:, ORDER], ["ours 2, 0, 3, 1", "sign changed"]),
    "heads, even and odd": (lambda q: q[:, ORDER][..., EVEN_ODD], ["ours 2, 0, 3, 1", "K theirs is interleaved"]),
    "batch and transposed": (lambda q: q.swapaxes(0, 1)[None], ["transposed, with an axis of 1: [1, H, T, K]"]),
    "batch and padded": (lambda q: padded(q, 0, 5)[None], ["batch axis of 1: [1, T, H, K]", "axis T, 5 after"]),
    "padded and transposed": (lambda q: padded(q, 2, 5).swapaxes(0, 1), ["[H, T, K]", "2 before and 5 after"]),
    "padded and heads": (lambda q: padded(q, 0, 5)[:, ORDER], ["5 after", "ours 2, 0, 3, 1"]),
    "padded around and heads": (lambda q: padded(q, 2, 5)[:, ORDER], ["2 before and 5 after", "ours 2, 0, 3, 1"]),
    "padded and scaled": (lambda q: padded(q, 1, 5) * 8, ["1 before and 5 after", "times 8 = K**0.5"]),
    "merged and heads": (lambda q: q[:, ORDER].reshape(T, -1), ["[T, H*K]", "ours 2, 0, 3, 1"]),
    "reshaped": (lambda q: q.reshape(8, 5, 64), ["theirs is ours reshaped to [8, 5, 64]"]),
}


@pytest.mark.parametrize("axis, name, n", [(0, "T", T), (1, "H", H), (2, "K", K)])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_factor_for_each_slice(q, rng, axis, name, n, kind):
    """As where a norm's weights were multiplied in, or a scale a head: with the axes in another order, too."""
    factors = np.exp2(rng.integers(-3, 4, n)) * rng.choice([-1, 1, 1.5], n)
    factors[0] = 4
    theirs = (q * factors.reshape(-1, *[1] * (2 - axis))).transpose(1, 2, 0).astype(kind)
    found = align(theirs, q, axes=("T", "H", "K"))
    assert found and [step.kind for step in found.steps][-1] == "factors", found
    assert f"along axis {name} theirs is ours times" in found.verdict and " 4, " in found.verdict
    assert np.allclose(found.apply(theirs), q, rtol=2e-3 if kind == np.float16 else 1e-6, atol=1e-3)
    assert found.steps[-1].axis == axis and found.residual < 1e-3


def test_factors_are_not_made_up(rng):
    """Of two values a slice a factor each brings half of anything near; unrelated values stay so."""
    for shape in ((200, 2), (64, 48), (3, 5), (7, 2, 9)):
        x, y = rng.standard_normal((2, *shape))
        found = align(x, y)
        assert not found and "nothing that was tried comes near; the least residual is" in found.verdict, found


@pytest.mark.parametrize("name", SINGLE)
def test_one_difference(name, q):
    change, words, kinds = SINGLE[name]
    theirs = change(q)
    found = align(theirs, q, axes="THK")
    assert found and words in found.verdict, found
    assert [step.kind for step in found.steps] == kinds
    assert found.residual < 1e-7 and not found.ambiguous
    np.testing.assert_allclose(found.apply(theirs), q, rtol=3e-7)
    assert found.apply(theirs).dtype == np.float32 and found.verdict in str(found)


@pytest.mark.parametrize("name", PAIRS)
def test_two_differences(name, q):
    change, words = PAIRS[name]
    theirs = change(q)
    found = align(theirs, q, axes="THK")
    assert found and all(w in found.verdict for w in words), found
    np.testing.assert_allclose(found.apply(theirs), q, rtol=3e-7)


@pytest.mark.parametrize("noise", ["float32", "bfloat16", "1e-3"])
@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_under_noise(name, noise, q):
    """The same words with the rounding of a type, or with noise that no type explains."""
    change, words, *_ = (SINGLE | PAIRS)[name]
    theirs = change(q)
    if noise == "bfloat16":
        theirs = theirs.astype(ml_dtypes.bfloat16)
    else:
        size = 1e-6 if noise == "float32" else 1e-3
        theirs = theirs + size * q.std() * np.random.default_rng(9).standard_normal(theirs.shape).astype(np.float32)
    found = align(theirs, q, axes="THK")
    assert found, found
    words = [words] if isinstance(words, str) else words
    assert all(w.partition(", exactly")[0] in found.verdict for w in words), found
    assert found.residual < {"float32": 1e-5, "bfloat16": 4e-3, "1e-3": 1e-2}[noise]
    assert abs(found.apply(theirs).astype(np.float64) - q).max() < 0.1


def test_the_type_of_what_apply_gives(q):
    theirs = (q * 8).astype(ml_dtypes.bfloat16)
    assert align(theirs, q).apply(theirs).dtype == np.float32
    wide = q.astype(np.float64) * 8
    assert align(wide, q).apply(wide).dtype == np.float64


def test_a_state_of_another_project(rng):
    """What brings people here: [H, V, K] beside [H, K, V], square or not."""
    for width in K, V:
        ours = rng.standard_normal((H, K, width), np.float32)
        assert "theirs is ours transposed: [H, V, K]" in align(ours.swapaxes(1, 2), ours, axes="HKV").verdict


def test_a_factor_has_the_digits_that_the_noise_leaves(rng):
    ours = rng.standard_normal((40, 50))
    assert "times 3, to" in align((ours * 3).astype(ml_dtypes.bfloat16), ours).verdict
    assert "times 3.1415, " in align(ours * 3.1415, ours).verdict


def test_one_token_of_several(q):
    found = align(q, q[4:5], axes="THK")
    assert "padded along axis T, 4 before and 5 after" in found.verdict
    np.testing.assert_array_equal(found.apply(q), q[4:5])


def test_tiled_heads(rng):
    ours = rng.standard_normal((5, H * 6, 8), np.float32)
    found = align(ours[:, TILED], ours)
    assert found and "every 6th of ours in turn (6 by 4: tiled against grouped)" in found.verdict


def test_many_slices(rng):
    ours = rng.standard_normal((600, 40), np.float32)
    order = rng.permutation(600)
    found = align(ours[order].T * 3, ours)
    assert found and (found.steps[1].value == np.argsort(order)).all() and "600 in all" in found.verdict


# ---- parts of one array ------------------------------------------------------------------------------


@pytest.fixture
def parts(rng):
    return {n: rng.standard_normal((T, H, K), np.float32) for n in "qkv"}


def joined(*arrays, axis=-1):
    return np.concatenate(arrays, axis)


JOINED = {
    "on K": (lambda q, k, v: joined(k, q, v), "theirs holds k | q | v along axis K (ours: q | k | v)"),
    "on H": (lambda q, k, v: joined(q, v, k, axis=1), "theirs holds q | v | k along axis H (ours: q | k | v)"),
    "in our order": (lambda q, k, v: joined(q, k, v, axis=1), "theirs holds q | k | v along axis H, exactly"),
    "merged": (lambda q, k, v: joined(*(x.reshape(T, -1) for x in (v, k, q))), "theirs holds v | k | q along axis H*K"),
    "stacked": (lambda q, k, v: np.stack([k, q, v], 1), "theirs holds k | q | v along axis part"),
    "by heads": (lambda q, k, v: np.stack([q, k, v], 2).reshape(T, -1), "64 of q, 64 of k, 64 of v in turn along"),
    "one by one": (lambda q, k, v: np.stack([q, k, v], -1).reshape(T, H, -1), "1 of q, 1 of k, 1 of v in turn along"),
    "head by head": (lambda q, k, v: np.stack([k, q, v], 2).reshape(T, -1, K), "1 of k, 1 of q, 1 of v in turn along"),
    "and a batch": (lambda q, k, v: joined(k, q, v)[None], "batch axis of 1: [1, T, H, K]; theirs holds k | q | v"),
    "and transposed": (lambda q, k, v: joined(k, q, v).swapaxes(0, 1), "[H, T, K]; theirs holds k | q | v"),
    "and scaled": (lambda q, k, v: 3 * joined(k, q, v), "k | q | v along axis K (ours: q | k | v); theirs is ours"),
}


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_parts(name, dtype, parts):
    join, words = JOINED[name]
    theirs = join(**parts).astype(dtype)
    found = align(theirs, parts, axes="THK")
    assert found and (words if dtype is np.float32 else words.partition(", exactly")[0]) in found.verdict, found
    got = found.apply(theirs)
    assert list(got) == list(parts)
    for n, x in got.items():
        assert x.shape == parts[n].shape
        np.testing.assert_allclose(x, parts[n], rtol=1e-6 if dtype is np.float32 else 8e-3)


def test_parts_of_different_widths(rng):
    parts = {"q": rng.standard_normal((T, 32)), "k": rng.standard_normal((T, 32)), "v": rng.standard_normal((T, 48))}
    found = align(np.concatenate([parts["v"], parts["q"], parts["k"]], 1), parts, axes=["token", "channel"])
    assert "theirs holds v | q | k along axis channel (ours: q | k | v)" in found.verdict


# ---- nothing made up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1000,), (7, 9), (16, 16), (4, 16, 16), (2, 3, 4, 5)])
def test_other_values_are_not_found(shape, rng):
    found = align(rng.standard_normal(shape), rng.standard_normal(shape))
    assert not found and found.verdict.startswith("none found") and not found.steps
    with pytest.raises(ValueError, match="nothing to apply: none found"):
        found.apply(np.zeros(shape))


def test_near_is_not_enough(q, rng):
    assert not align(q + 0.2 * rng.standard_normal(q.shape), q)
    half = q.copy()
    half[:, :2] = rng.standard_normal((T, 2, K))
    assert not align(half, q)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spread", [0.003, 0.01])
def test_arrays_that_hardly_vary_are_not_found_by_their_mean(dtype, spread, rng):
    """As the weights of norms: what is left after the mean must fit."""
    theirs, ours = ((1 + spread * rng.standard_normal(256)).astype(dtype) for _ in range(2))
    found = align(theirs, ours)
    assert not found and "ours varies by only 0.0" in found.verdict, found
    order = rng.permutation(256)
    permuted = align(ours[order], ours)
    assert (permuted and permuted.steps[0].kind == "take") if dtype is not ml_dtypes.bfloat16 else not permuted
    assert align(ours, ours).verdict.startswith("theirs is ours, exactly")
    parts = {"q": ours[:128], "k": 5 * ours[128:]}
    assert not align(np.concatenate([theirs[:128], 5 * theirs[128:]]), parts), "one mean each"


def test_a_norm_s_weight_rounded_to_bfloat16_is_found(rng):
    ours = (1 + 0.01 * rng.standard_normal(256)).astype(np.float32)
    found = align(ours.astype(ml_dtypes.bfloat16), ours)
    assert found and found.verdict == "theirs is ours, to 0.002"


def test_two_numbers_prove_nothing():
    assert "no better than chance" in align(np.float32([3.0]), np.float32([2.0])).verdict


def test_noise_is_not_explained_by_a_permutation(rng):
    """Sorting brings 1,000 values with noise nearer to ours than they are in their places."""
    ours = rng.standard_normal(1000)
    assert align(ours + 1e-2 * rng.standard_normal(1000), ours).steps == ()
    order = rng.permutation(1000)
    assert align(ours[order], ours).steps[0].kind == "take"


def test_a_large_mean_does_not_hide_a_permutation(rng):
    """100 with noise of 1: the wrong order has a residual of 0.014."""
    ours = 100 + rng.standard_normal((6, 8))
    found = align(ours[[1, 0, 2, 3, 5, 4]], ours)
    assert "theirs 0..5 are ours 1, 0, 2, 3, 5, 4" in found.verdict and 0.001 < found.other < 0.05


def test_what_is_ambiguous(rng):
    a = rng.standard_normal((8, 8))
    assert "AMBIGUOUS: ours is symmetric in axes 0 and 1" in align(a + a.T, a + a.T).verdict
    assert "AMBIGUOUS: ours is antisymmetric" in align(a - a.T, a - a.T).verdict
    same = rng.standard_normal((5, 8))
    same[3] = same[1]
    found = align(same[[4, 3, 2, 1, 0]], same)
    assert found and "slices 1 and 3 of ours along axis 0 are the same" in found.verdict
    flat = np.repeat(rng.standard_normal((1, 8)), 5, 0)
    assert "ours does not change along axis 0" in align(flat, flat).verdict
    for level in 0, 3:
        found = align(np.full((3, 4), 3.0), np.full((3, 4), float(level)))
        assert not found and found.verdict.startswith("AMBIGUOUS: ours is") and "everywhere" in found.verdict
    assert "theirs is zero everywhere" in align(np.zeros((5, 8)), same).verdict


@pytest.mark.parametrize("theirs, ours, error, words", [
    (np.arange(4), np.ones(4), TypeError, "theirs is int64; it must be floats"),
    (np.ones(4), [1, 2], TypeError, "ours is int64; it must be floats"),
    (np.ones(4, complex), np.ones(4), TypeError, "theirs is complex128; it must be float64, float32"),
    (np.ones((0, 4)), np.ones(4), ValueError, r"theirs has shape \[0, 4\]; it must not be empty"),
    (np.array([1, np.nan, np.inf]), np.ones(3), ValueError, r"2 values that are not finite, the first at \[1\]"),
    (np.ones((3, 4)), np.arange(10.0).reshape(5, 2), ValueError, r"\[3, 4\], 12 values, and ours \[5, 2\], 10"),
    (np.arange(3.0), np.arange(4.0), ValueError, "no order of the axes, merging, or padding"),
    (np.arange(4.0), {}, ValueError, "ours is an empty mapping"),
    (np.arange(4.0), {"q": np.arange(3.0)[None], "k": np.arange(3.0)}, ValueError, r"q \[1, 3\], k \[3\], 6"),
    (np.arange(3.0), {"q": np.array([np.nan])}, ValueError, r"ours\['q'\] has 1 values that are not finite"),
])
def test_errors(theirs, ours, error, words):
    with pytest.raises(error, match=words):
        align(theirs, ours)


def test_errors_of_axes_and_apply(q):
    with pytest.raises(ValueError, match="axes are H, K; the array has 3 axes"):
        align(q, q, axes="HK")
    with pytest.raises(ValueError, match=r"theirs has shape \[3\]; it must be \[10, 4, 64\]"):
        align(q, q).apply(np.zeros(3))


def test_the_page_shows_it(rng):
    page = (Path(__file__).parents[2] / "docs/check-your-kernel.md").read_text(encoding="utf-8")
    shown = page.partition("found = kl.diff.align(theirs, ours")[2].split("```")[2].strip().splitlines()
    ours = rng.standard_normal((4, 16, 16), np.float32)
    got = str(align(8 * ours[ORDER].swapaxes(1, 2), ours, axes="HKV")).splitlines()
    assert [x for x in got if "next best" not in x] == [x for x in shown if "next best" not in x]


def test_how_it_prints(q):
    found = align(q[:, ORDER], q)
    assert str(found).splitlines()[0].split() == ["take", "[1,", "3,", "0,", "2],", "axis", "1"]
    assert "next best" in str(found) and "<table>" in found._repr_html_()
    assert kl.diff.Alignment is type(found) and found.steps[0].axis == 1
