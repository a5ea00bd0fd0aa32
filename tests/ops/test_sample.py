"""sample: the reference's ids, the filters, ties, Philox's published vectors, errors."""

import numpy as np
import pytest
from judge import CONTEXTS, everywhere

import kimi_linear as kl

SETTINGS = [
    dict(), dict(temperature=0.0), dict(temperature=0.25), dict(temperature=4.0), dict(temperature=1e-30),
    dict(temperature=1e30), dict(top_k=1), dict(top_k=5), dict(top_k=10**6), dict(top_p=0.5),
    dict(top_p=0.9375), dict(top_p=1e-6), dict(min_p=0.125), dict(min_p=1.0),
    dict(temperature=0.5, top_k=40, top_p=0.75, min_p=0.0625),
]


def logits_of(T, V, seed=0, scale=3.0):
    return (scale * np.random.default_rng([seed, T, V]).standard_normal((T, V))).astype(np.float32)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("V", [1, 2, 17, 1000])
def test_ids_are_the_reference_s(setting, V):
    x = logits_of(20, V)
    place = dict(seed=3, sequence=1)
    wanted = [kl.reference.sample(row, **setting, **place, position=t) for t, row in enumerate(x)]
    got = everywhere(lambda ctx: kl.ops.sample(x, **setting, **place, position=np.arange(20), ctx=ctx))
    assert got.dtype == np.int32 and got.tolist() == wanted
    one = kl.ops.sample(x[4], **setting, seed=3, sequence=1, position=4)
    assert type(one) is int and one == wanted[4]


def test_real_vocabulary():
    x = logits_of(3, 163840)
    for setting in (dict(), dict(top_k=50, top_p=0.9), dict(temperature=0.0), dict(top_p=0.95), dict(min_p=0.01)):
        wanted = [kl.reference.sample(row, **setting, seed=9) for row in x]
        assert kl.ops.sample(x, **setting, seed=9).tolist() == wanted


def test_shares_of_equal_logits_are_those_of_a_float32_top_p():
    """0.1 in float32 is more than 0.1: a prefix of 15 of 150 equal weights does not reach it."""
    x = np.zeros(300, np.float32)
    for k in (10, 20, 150):
        setting = dict(top_k=k, top_p=0.1)
        assert [kl.ops.sample(x, **setting, seed=i) for i in range(40)] == [
            kl.reference.sample(x, **setting, seed=i) for i in range(40)]


TEMPERATURES = (1e-40, 1e-30, 0.125, 0.75, 1.0, 1.0, 2.0, 1e30)
TOP_K = (0, 0, 0, 1, 5, 50, 300, 700, 3000, 10**6)
TOP_P = (1.0, 1.0, 0.125, 0.25, 0.5, 0.875, 0.95, 0.999)
MIN_P = (0.0, 0.0, 0.0, 0.0625, 0.5, 1.0)


def any_logits(rng, V):
    """Bell-shaped and skew, wide and flat, with ties, masks, huge values, few that stand out, or all equal."""
    x = rng.standard_normal(V) * rng.choice([1e-6, 0.01, 0.3, 1, 3, 10, 100])
    kind = rng.integers(9)
    if kind == 1:
        x = np.round(2 * x) / 2
    elif kind == 2:
        x = np.round(x)  # also -0
    elif kind == 3:
        x = np.zeros(V)
    elif kind == 4:
        x[rng.random(V) < 0.75] = -np.inf
    elif kind == 5:
        x[rng.integers(0, V, max(1, V // 1000))] += 20
    elif kind == 6:
        x = -rng.exponential(5, V)
    elif kind == 7:
        x[rng.random(V) < 0.5] = -1e9
    elif kind == 8:
        x = rng.choice([-3e38, 0, 3e38], V)
    x[rng.integers(V)] = x.max() if np.isfinite(x.max()) else 0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("widths, n", [((1, 2, 15, 16, 17, 33, 100), 900), ((1000, 1279, 2047, 2049), 1200),
                                       ((5000, 20_000), 300), ((163_840,), 25)])
def test_any_case_is_the_reference_s(widths, n):
    """Every way to the token (the head, passes, equals) at every instruction set: the very ids of the definition."""
    rng = np.random.default_rng(len(widths))
    for case in range(n):
        x = any_logits(rng, int(rng.choice(widths)))
        setting = dict(temperature=float(rng.choice(TEMPERATURES)), top_k=int(rng.choice(TOP_K)),
                       top_p=float(rng.choice(TOP_P)), min_p=float(rng.choice(MIN_P)))
        place = dict(seed=int(rng.integers(2**63)), position=case)
        wanted = kl.reference.sample(x, **setting, **place)
        got = [kl.ops.sample(x, **setting, **place, ctx=ctx) for ctx in CONTEXTS[case % 2::2]]
        assert set(got) == {wanted}, (case, x.shape, setting, place, got, wanted)


def test_weights_are_those_of_a_softmax():
    """The reference's float32 weights: within the bound of docs/math.md#sample of float64's."""
    rng = np.random.default_rng(0)
    for scale, temperature in ((3, 1.0), (30, 0.7), (0.01, 2.0), (300, 5.0)):
        x = (scale * rng.standard_normal(20_000)).astype(np.float32)
        t, w = kl.reference.sample_weight(x, temperature)
        exact = (x.astype(np.float64) - x.max()) / temperature
        seen = w > 0
        error = np.abs(w[seen] / np.exp(exact[seen]) - 1) * 2**24
        assert w.dtype == t.dtype == np.float32 and w.max() == 1
        assert (error <= 1.6 + 3 * np.abs(exact[seen])).all() and (exact[~seen] < -87).all()


def test_a_share_that_is_met_exactly_is_enough():
    """Equal logits have exact sums: top_p = 1/2 of 4096 tokens is 2048 of them, and a hair more is one more."""
    for width in (8, 4096, 65_536):
        x = np.zeros(width, np.float32)
        for top_p, kept in ((0.5, width // 2), (float(np.nextafter(np.float32(0.5), 1)), width // 2 + 1),
                            (1 / width, 1)):
            for position in range(40):
                got = kl.ops.sample(x, top_p=top_p, position=position)
                assert got == int(kl.reference.uniform(0, 0, position) * kept)


def test_published_philox_vectors():
    """Known answers of Random123 (kat_vectors, philox4x32 10), seen through `uniform`."""
    ones = 2**64 - 1
    cases = [((0, 0, 0), (0x6627E8D5, 0xE169C58D)), ((ones, ones, ones), (0x408F276D, 0x41C83B0E)),
             ((0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88), (0xD16CFE09, 0x94FDCCEB))]
    for (seed, sequence, position), (low, high) in cases:
        wanted = ((low << 21) + (high >> 11)) * 2.0**-53
        assert kl.reference.uniform(seed, sequence, position) == wanted
        width = 4096  # a flat distribution reads the number off
        got = kl.ops.sample(np.zeros(width, np.float32), seed=seed, sequence=sequence, position=position)
        assert got == int(wanted * width)


def test_frequencies_are_the_probabilities():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    n = 40_000
    ids = kl.ops.sample(np.tile(np.log(p).astype(np.float32), (n, 1)), seed=1, position=np.arange(n))
    counts = np.bincount(ids, minlength=4)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 16.3  # 0.1 % of the chi-squared distribution with 3 degrees of freedom


def test_ties_go_to_the_lowest_id():
    x = np.zeros(50, np.float32)
    assert kl.ops.sample(x, temperature=0.0) == 0
    x[[7, 30, 49]] = 2
    assert kl.ops.sample(x, temperature=0.0) == 7
    drawn = {kl.ops.sample(x, top_k=2, position=i) for i in range(60)}
    assert drawn == {7, 30}


def test_masked_tokens_are_never_drawn():
    x = np.full((500, 30), -np.inf, np.float32)
    x[:, [3, 11]] = [0.0, -80.0]
    x[:, 20] = -3e38
    ids = kl.ops.sample(x, temperature=50.0, position=np.arange(500))
    assert set(ids.tolist()) == {3, 11}
    assert set(kl.ops.sample(x, temperature=0.0).tolist()) == {3}


def test_every_row_has_its_own_arguments():
    x = logits_of(6, 100)
    settings = [dict(temperature=t, top_k=k, top_p=p, min_p=m, seed=s, sequence=s + 1, position=s + 2)
                for t, k, p, m, s in [(0.0, 0, 1.0, 0.0, 0), (1.0, 3, 1.0, 0.0, 2**64 - 3),
                                      (0.5, 0, 0.5, 0.0, 5), (2.0, 0, 1.0, 0.25, 7),
                                      (1.0, 9, 0.75, 0.125, 2**63), (1.0, 0, 1.0, 0.0, 1)]]
    joined = {name: [s[name] for s in settings] for name in settings[0]}
    alone = [kl.ops.sample(row, **setting) for row, setting in zip(x, settings, strict=True)]
    assert kl.ops.sample(x, **joined).tolist() == alone


def test_rows_of_a_batch_are_each_alone():
    x = logits_of(9, 300)
    for ctx in CONTEXTS:
        assert kl.ops.sample(x, seed=4, ctx=ctx).tolist() == [kl.ops.sample(r, seed=4) for r in x]
    assert kl.ops.sample(x[:0]).shape == (0,)


X = logits_of(3, 8)


def spoilt(value, at=(1, 5)):
    x = X.copy()
    x[at] = value
    return x


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.sample(spoilt(np.nan)), ValueError, r"logits\[1, 5\] is -?nan; logits must be finite"),
    (lambda: kl.ops.sample(spoilt(np.inf), temperature=0), ValueError, r"logits\[1, 5\] is inf"),
    (lambda: kl.ops.sample(spoilt(-np.inf, 2)), ValueError, r"logits\[2, 0\] is -inf"),
    (lambda: kl.ops.sample(X, temperature=-1), ValueError, "temperature of row 0 is -1; it must be finite"),
    (lambda: kl.ops.sample(X, temperature=[0, np.nan, 1]), ValueError, "temperature of row 1 is nan"),
    (lambda: kl.ops.sample(X, temperature=np.inf), ValueError, "temperature of row 0 is inf"),
    (lambda: kl.ops.sample(X, top_p=0), ValueError, r"top_p of row 0 is 0; it must be in \(0, 1\]"),
    (lambda: kl.ops.sample(X, top_p=1.5), ValueError, "top_p of row 0 is 1.5"),
    (lambda: kl.ops.sample(X, min_p=-0.5), ValueError, r"min_p of row 0 is -0.5; it must be in \[0, 1\]"),
    (lambda: kl.ops.sample(X, top_k=-1), ValueError, "top_k is -1"),
    (lambda: kl.ops.sample(X, seed=-1), ValueError, r"seed is -1; it must be 0 <= seed < 2\*\*64"),
    (lambda: kl.ops.sample(X, seed=2**64), ValueError, "seed is 18446744073709551616"),
    (lambda: kl.ops.sample(X, position=1.0), TypeError, "position is 1.0; it must be an integer"),
    (lambda: kl.ops.sample(X, temperature="hot"), TypeError, "temperature is <U3"),
    (lambda: kl.ops.sample(X, position=[1, 2]), ValueError, r"position has shape \[2\]; it must be \[3\]"),
    (lambda: kl.ops.sample(X[None]), ValueError, "logits has shape"),
    (lambda: kl.ops.sample(X[:, :0]), ValueError, "V must be >= 1"),
    (lambda: kl.ops.sample(X.astype(float)), TypeError, "logits is float64"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
