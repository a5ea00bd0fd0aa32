"""short_conv: budget, widths and taps, history, ragged batches, splits, same bytes everywhere, errors."""

import numpy as np
import pytest
from judge import everywhere, guarded, judge, normal

import kimi_linear as kl


def run_and_judge(x, w, **kw):
    """Guarded, NaN-filled outputs on every instruction set and thread count; the result is judged."""
    n = () if kw.get("offsets") is None else (len(kw["offsets"]) - 1,)
    before = {name: np.copy(a) for name, a in dict(x=x, w=w, **kw).items()}

    def run(ctx):
        (y, check_y), (after, check_after) = guarded(x.shape), guarded((*n, w.shape[1] - 1, w.shape[0]))
        kl.ops.short_conv(x, w, **kw, out=(y, after), ctx=ctx)
        check_y()
        check_after()
        return y.copy(), after.copy()

    got = everywhere(run)
    judge("short_conv", got, kl.reference.short_conv(x, w, **kw), x=x, w=w, **kw)
    for name, a in dict(x=x, w=w, **kw).items():
        assert np.array_equal(before[name], a), f"short_conv changed its input {name}"
    return got


@pytest.mark.parametrize("C", [1, 15, 16, 17, 33, 300])
@pytest.mark.parametrize("T", [0, 1, 2, 5, 64])
def test_widths(T, C):
    run_and_judge(normal(T, C, scale=2), normal(C, 4, seed=1), history=normal(3, C, seed=2))


@pytest.mark.parametrize("W", range(1, 9))
def test_taps(W):
    x, w, history = normal(9, 40), normal(40, W, seed=1), normal(W - 1, 40, seed=2)
    for activation in ("silu", None):
        run_and_judge(x, w, history=history, activation=activation)
        run_and_judge(x, w, activation=activation)


def test_worked_values():
    """Taps (0.1, -0.2, 0.3, 0.4) on 1..5 from an empty history, computed by hand."""
    x, w = np.arange(1, 6, dtype=np.float32)[:, None], np.array([[0.1, -0.2, 0.3, 0.4]], np.float32)
    plain, history = kl.ops.short_conv(x, w, activation=None)
    np.testing.assert_allclose(plain[:, 0], [0.4, 1.1, 1.6, 2.2, 2.8], rtol=3e-7)
    np.testing.assert_allclose(kl.ops.short_conv(x, w)[0][:, 0],
                               [0.239475064, 0.825286116, 1.331229416, 1.980548924, 2.639492307], rtol=5e-7)
    assert history[:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("history", [True, False])
def test_ragged_equals_each_alone(history):
    offsets, C = [0, 0, 1, 3, 3, 12, 13], 37
    x, w = normal(13, C), normal(C, 4, seed=1)
    states = normal(6, 3, C, seed=2) if history else None
    y, after = run_and_judge(x, w, history=states, offsets=offsets)
    for n, (a, b) in enumerate(zip(offsets, offsets[1:])):
        alone = kl.ops.short_conv(x[a:b], w, history=None if states is None else states[n])
        assert y[a:b].tobytes() == alone[0].tobytes() and after[n].tobytes() == alone[1].tobytes()
    if history:
        assert after[0].tobytes() == states[0].tobytes()  # a sequence of no tokens keeps its history
        assert after[1, :2].tobytes() == states[1, 1:].tobytes()  # one of a single token shifts it


def test_batch_axis_equals_each_alone():
    x, w, history = normal(3, 7, 20), normal(20, 4, seed=1), normal(3, 3, 20, seed=2)
    y, after = kl.ops.short_conv(x, w, history=history)
    for n in range(3):
        alone = kl.ops.short_conv(x[n], w, history=history[n])
        assert y[n].tobytes() == alone[0].tobytes() and after[n].tobytes() == alone[1].tobytes()


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [5, 5, 64], list(range(1, 70))])
def test_any_split_gives_the_same_bytes(cuts):
    x, w = normal(70, 50), normal(50, 4, seed=1)
    whole, final = kl.ops.short_conv(x, w)
    pieces, history = [], None
    for part in np.split(x, cuts):
        y, history = kl.ops.short_conv(part, w, history=history)
        pieces.append(y)
    assert np.concatenate(pieces).tobytes() == whole.tobytes() and history.tobytes() == final.tobytes()


@pytest.mark.parametrize("T", [0, 1, 2, 3, 10])
def test_history_in_place_and_y_over_x(T):
    x, w, history = normal(T, 20), normal(20, 4, seed=1), normal(3, 20, seed=2)
    wanted = kl.ops.short_conv(x, w, history=history)
    got = kl.ops.short_conv(x, w, history=history, out=(x, history))
    assert got[0] is x and got[1] is history
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, wanted))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e15])
def test_tiny_and_huge_inputs(scale):
    x = normal(9, 40, scale=scale)
    for activation in ("silu", None):
        y, after = run_and_judge(x, normal(40, 4, seed=1), activation=activation)
        assert after.tobytes() == x[-3:].tobytes()  # copied, not flushed


def test_saturated_silu():
    x = np.array([[-1e4, -104, -88, -87, -20, 0.0, -0.0, 20, 87, 1e4]], np.float32)
    run_and_judge(x, np.ones((10, 1), np.float32))


def test_nan_reaches_its_channel_for_W_tokens():
    x = normal(9, 20)
    x[2, 7] = np.nan
    y, _ = kl.ops.short_conv(x, normal(20, 4, seed=1))
    assert sorted(map(tuple, np.argwhere(np.isnan(y)))) == [(t, 7) for t in range(2, 6)]


def test_the_budget_rejects_what_is_wrong():
    x, w = normal(20, 30), normal(30, 4, seed=1)
    ref = kl.reference.short_conv(x, w)
    bad = {
        "taps reversed": kl.ops.short_conv(x, w[:, ::-1]),
        "no activation": kl.ops.short_conv(x, w, activation=None),
        "history newest first": (ref[0], ref[1][::-1]),
        "one token late": (np.roll(ref[0], 1, axis=0), ref[1]),
    }
    for what, got in bad.items():
        with pytest.raises(AssertionError, match="times its budget"):
            judge("short_conv", got, ref, x=x, w=w)
            pytest.fail(what)


X, W4 = normal(4, 8), normal(8, 4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: kl.ops.short_conv(X, W4[:7]), ValueError, r"w has shape \[7, 4\]; it must be \[8, W\]"),
    (lambda: kl.ops.short_conv(X[0], W4), ValueError, r"x has shape \[8\]"),
    (lambda: kl.ops.short_conv(X, np.ones((8, 9), np.float32)), NotImplementedError, "w has 9 taps"),
    (lambda: kl.ops.short_conv(X, W4[:, :0]), ValueError, r"w has shape \[8, 0\]"),
    (lambda: kl.ops.short_conv(X, W4, history=X[:2]), ValueError, r"history has shape \[2, 8\]; it must"),
    (lambda: kl.ops.short_conv(X, W4, activation="relu"), ValueError, "activation is 'relu'"),
    (lambda: kl.ops.short_conv(X, W4, offsets=[0, 3]), ValueError, "offsets ends at 3; it must end at T = 4"),
    (lambda: kl.ops.short_conv(X, W4, offsets=[0, 3, 2, 4]), ValueError, r"offsets\[2\] is 2 after 3"),
    (lambda: kl.ops.short_conv(X[None], W4, offsets=[0, 4]), ValueError, "offsets is given, and x has"),
    (lambda: kl.ops.short_conv(X.astype(float), W4), TypeError, "x is float64"),
    (lambda: kl.ops.short_conv(X, W4, out=X), TypeError, "out must be a tuple of 2"),
])
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()
