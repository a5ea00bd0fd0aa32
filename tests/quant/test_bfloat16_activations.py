"""Products with bfloat16 activations (docs/math.md#bfloat16): the definition, one result everywhere, what it costs."""

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl

U = 2.0**-24
BF16 = ml_dtypes.bfloat16


def bfloat16(**context):
    return kl.Context(activations="bfloat16", **context)


def random(T, rows, D, seed):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((n, D)).astype(np.float32) for n in (T, rows))
    return x, w.astype(BF16)


def flushed(a):
    return np.where(np.abs(a) < 2.0**-126, np.copysign(0, a), a)


def rounded(x):
    """What the products see of x, in float64."""
    with np.errstate(over="ignore"):
        return flushed(x.astype(BF16).astype(np.float64))


def fma(x, w, lane):
    """x w + lane, rounded once to float32: the product of two bfloat16 is exact in 16 bits. Their sum is exact in the
    64 bits of longdouble wherever exponents are within 40 of each other, as the data of the test below are."""
    return flushed((x.astype(np.longdouble) * w + lane).astype(np.float32).astype(np.float64))


def by_definition(x, w):
    """Lane after lane, the odd value of a pair first; then the halving tree."""
    D = x.shape[1]
    pad = [(0, 0), (0, -D % 32)]
    v = np.pad(rounded(x), pad)[:, None]
    w = np.pad(flushed(w.astype(np.float64)), pad)[None]
    lane = np.zeros((len(x), w.shape[1], 16))
    for k in range(0, v.shape[-1], 32):
        for odd in (1, 0):
            lane = fma(v[..., k + odd : k + 32 : 2], w[..., k + odd : k + 32 : 2], lane)
    lane = lane.astype(np.float32)
    for half in (8, 4, 2, 1):
        lane = flushed(lane[..., :half] + lane[..., half : 2 * half]).astype(np.float32)
    return lane[..., 0]


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("D", [1, 2, 31, 33, 100, 256])
def test_the_definition_to_the_last_bit(T, D):
    x, w = random(T, 9, D, D)
    assert np.array_equal(kl.ops.linear(x, w, ctx=bfloat16()), by_definition(x, w))


@pytest.mark.parametrize("bits", [0x7f800001, 0x7fffffff, 0xff800001, 0xffffffff])
@pytest.mark.parametrize("T", [1, 9])
def test_any_nan_stays_one(T, bits):
    """Also one whose upper half alone is an infinity, and one that rounding up would turn into a zero."""
    x, w = random(T, 9, 64, 3)
    x.view(np.uint32)[0, 5] = bits
    for isa in kl.isa_list():
        y = kl.ops.linear(x, w, ctx=bfloat16(isa=isa))
        assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


@pytest.mark.parametrize("D", [1, 15, 16, 17, 31, 32, 33, 96, 1535, 1536, 1537, 2304])
@pytest.mark.parametrize("T", [0, 1, 3, 6, 7, 13])
def test_one_result_everywhere_within_the_budget(T, D):
    x, w = random(T, 37, D, T)
    y = kl.ops.linear(x, w, ctx=bfloat16())
    for isa in kl.isa_list():
        for threads in (1, 3):
            assert kl.ops.linear(x, w, ctx=bfloat16(isa=isa, threads=threads)).tobytes() == y.tobytes()
    v, exact, w = rounded(x), x.astype(np.float64), w.astype(np.float64)
    budget = (2 * -(-D // 32) + 5) * U * (np.abs(v) @ np.abs(w).T) + (D + 48) * 2.0**-126
    assert np.all(np.abs(y - v @ w.T) <= budget)
    assert np.all(np.abs(y - exact @ w.T) <= budget + 2.0**-8 * (np.abs(exact) @ np.abs(w).T))


def test_a_row_alone_is_the_row_of_a_batch():
    x, w = random(130, 50, 2304, 1)
    y = kl.ops.linear(x, w, ctx=bfloat16())
    for t in (0, 64, 129):
        for n in (1, 3, 6, 7):
            part = x[t : t + n]
            assert kl.ops.linear(part, w, ctx=bfloat16()).tobytes() == y[t : t + n].tobytes()


@pytest.mark.parametrize("T", [6, 12])
def test_not_finite_subnormal_and_huge(T):
    x, w = random(T, 20, 70, 5)
    w[3] = BF16(1e-39)  # subnormal: zero
    x[0, 69] = np.nan
    x[1, 7] = np.inf
    x[2] = 1e-39
    x[3] = 3.4e38  # rounds to infinity
    x[4, :] = 0
    x[4, 0] = np.float32(2.0**-126)
    w[:, 0] = BF16(0.5)
    y = kl.ops.linear(x, w, ctx=bfloat16())
    assert np.isnan(y[0]).all() and not np.isfinite(y[1]).any() and not np.isfinite(y[3]).any()
    assert np.array_equal(y[2], np.zeros(20, np.float32)), "subnormal activations count as zero"
    assert np.array_equal(y[4], np.zeros(20, np.float32)), "2^-127 is flushed"
    assert np.isfinite(y[5:]).all() and y[5, 3] == x[5, 0].astype(BF16).astype(np.float32) / 2
    for isa in kl.isa_list():
        for row in (slice(0, T), slice(0, 1), slice(4, 6)):
            got = kl.ops.linear(x[row], w, ctx=bfloat16(isa=isa))
            assert np.array_equal(got, y[row], equal_nan=True)
            assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(y[row][~np.isnan(y[row])]))


def test_values_are_rounded_to_nearest_even():
    x = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, np.nextafter(np.float32(2), 0)])
    w = np.ones((1, 1), BF16)
    assert kl.ops.linear(x[:, None], w, ctx=bfloat16())[:, 0].tolist() == [1, 1 + 2**-6, -1, 1 + 2**-7, 2]


def test_the_error_is_that_of_rounding():
    rng = np.random.default_rng(7)
    x = np.exp2(rng.uniform(0, 4, (40, 4096))).astype(np.float32) * rng.choice(np.float32([-1, 1]), (40, 4096))
    w = rng.standard_normal((64, 4096)).astype(np.float32).astype(BF16)
    exact, wide = x.astype(np.float64), w.astype(np.float64)
    error = kl.ops.linear(x, w, ctx=bfloat16()) - exact @ wide.T
    expected = 2.0**-14 / (32 * np.log(2)) * (exact**2 @ (wide**2).T)
    assert 0.9 < np.sqrt((error**2).mean() / expected.mean()) < 1.1


def test_other_weights_take_float32():
    x, w = random(9, 30, 96, 3)
    for other in (w.astype(np.float32), w.astype(np.float16), kl.ops.quantize(w.astype(np.float32), "Q8_0")):
        assert np.array_equal(kl.ops.linear(x, other, ctx=bfloat16()), kl.ops.linear(x, other, ctx=kl.Context()))
    assert not np.array_equal(kl.ops.linear(x, w, ctx=bfloat16()), kl.ops.linear(x, w, ctx=kl.Context()))


def test_moe_is_made_of_these_products():
    """An expert's tokens of x and of h, whose blocks of 256 end inside a row of 300."""
    rng = np.random.default_rng(11)
    T, D, F, E = 21, 80, 300, 3
    x = rng.standard_normal((T, D)).astype(np.float32)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    gate, up, down = (rng.standard_normal(s).astype(np.float32).astype(BF16) / BF16(8) for s in shapes)
    ids = np.tile(np.int32([[1]]), (T, 1))
    ctx = bfloat16()
    h = kl.ops.swiglu(kl.ops.linear(x, gate[1], ctx=ctx), kl.ops.linear(x, up[1], ctx=ctx))
    want = kl.ops.linear(h, down[1], ctx=ctx)
    for isa in kl.isa_list():
        got = kl.ops.moe(x, ids, np.ones((T, 1), np.float32), gate, up, down, ctx=bfloat16(isa=isa))
        assert got.tobytes() == want.tobytes()


# ---- models ----

@pytest.fixture(scope="module", params=["tiny", "kimi-b"])
def folder(request, tiny_dir, golden_dir):
    return tiny_dir if request.param == "tiny" else golden_dir / request.param


@pytest.fixture(scope="module")
def model(folder):
    return kl.Model.from_pretrained(folder, activations="bfloat16")


def tokens_of(model, n):
    return np.random.default_rng(2).integers(0, model.config.vocab_size, n).tolist()


def test_a_model_keeps_the_laws(folder, model, tmp_path):
    tokens = tokens_of(model, 150)
    whole = model.forward(tokens)
    for isa, threads in ((kl.isa_list()[0], 3), (kl.isa_list()[-1], 1)):
        again = kl.Model.from_pretrained(folder, activations="bfloat16", ctx=kl.Context(isa=isa, threads=threads))
        assert again.forward(tokens).tobytes() == whole.tobytes()
    state = model.new_state()
    first = model.forward(tokens[:64], state=state)
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    assert np.concatenate([first, model.forward(tokens[64:], state=loaded)]).tobytes() == whole.tobytes()


def test_a_model_is_near_its_float32_self(folder, model):
    """At most tokens: kimi-b's random router sends some to other experts for as little (0.14 over all of them)."""
    tokens = tokens_of(model, 60)
    a, b = (m.forward(tokens).astype(np.float64) for m in (kl.Model.from_pretrained(folder), model))
    error = np.sqrt(((a - b) ** 2).mean(-1) / a.var(-1))
    assert 1e-3 < np.median(error) < 0.05


def test_unknown_numbers_are_refused():
    with pytest.raises(ValueError, match="activations is 'bf16'; it must be one of 'float32', 'int8', 'bfloat16'"):
        kl.Model.tiny(activations="bf16")
    with pytest.raises(ValueError, match="activations is 3; it must be float32, int8 or bfloat16"):
        kl._core.Context(1, None, 0, 0, 3)
