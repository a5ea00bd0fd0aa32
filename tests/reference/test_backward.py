"""The float64 gradients: against differences of the float64 ops, worked examples by hand, and identities."""

import inspect

import numpy as np
import pytest

from kimi_linear import reference as ref
from kimi_linear.reference_backward import __all__ as GRADIENTS


def rng_of(*seed):
    return np.random.default_rng(list(seed))


def calls():
    """(name, op, inputs, results that have a gradient) of random shapes: the first result of each is enough."""
    def normal(rng, *shape):
        return rng.standard_normal(shape)

    for i, lead in enumerate([(3,), (2, 4), (2, 2, 3)]):
        rng = rng_of(1, i)
        x, z, D = normal(rng, *lead, 5), 2 * normal(rng, *lead, 5), 5
        yield f"rms_norm-{i}", "rms_norm", dict(x=x, w=normal(rng, D), eps=0.1)
        yield f"l2_norm-{i}", "l2_norm", dict(x=x, eps=0.1)
        yield f"swiglu-{i}", "swiglu", dict(gate=z, up=x)
        for activation in ("sigmoid", "silu"):
            yield (f"gated_rms_norm-{activation}-{i}", "gated_rms_norm",
                   dict(x=x, z=z, w=normal(rng, D), eps=1e-3, activation=activation))
    sequences = {"one": None, "three": [0, 1, 6, 6, 8]}
    for name, offsets in sequences.items():
        for W in (1, 2, 4):
            for activation in ("silu", None):
                rng = rng_of(2, W)
                lead = () if offsets is None else (4,)
                yield (f"short_conv-{name}-{W}-{activation}", "short_conv",
                       dict(x=normal(rng, 8, 3), w=normal(rng, 3, W), history=normal(rng, *lead, W - 1, 3),
                            offsets=offsets, activation=activation))
    yield "short_conv-batch", "short_conv", dict(x=normal(rng, 2, 5, 3), w=normal(rng, 3, 3),
                                                 history=normal(rng, 2, 2, 3))
    for bound in (None, -3.0):
        for name, tail in {"channel": (2, 4), "head": (2,)}.items():
            rng = rng_of(3)
            yield (f"decay_gate-{name}-{bound}", "decay_gate",
                   dict(f=2 * normal(rng, 5, *tail), rate=np.exp(normal(rng, 2)), dt_bias=normal(rng, *tail),
                        lower_bound=bound))


CALLS = {name: (op, inputs) for name, op, inputs in calls()}


def gradients(op, dy, inputs):
    """d<argument> of each array by name, as the docstrings promise: in the order of the arguments."""
    found = getattr(ref, f"{op}_backward")(dy, **inputs)
    names = [n for n in inspect.signature(getattr(ref, op)).parameters if isinstance(inputs.get(n), np.ndarray)]
    return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))


def first(op, inputs):
    y = getattr(ref, op)(**inputs)
    return y[0] if isinstance(y, tuple) else y


def by_differences(op, dy, inputs, name, h=2.0**-9):
    """d/dx of <dy, y>, element by element, by the nine points whose error is h^8."""
    x, d = inputs[name], np.zeros_like(inputs[name])
    factors = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
    for at in np.ndindex(x.shape):
        for step, factor in factors.items():
            for sign in (1, -1):
                moved = x.copy()
                moved[at] += sign * step * h
                d[at] += sign * factor / h * np.sum(dy * first(op, inputs | {name: moved}))
    return d


@pytest.mark.parametrize("name", CALLS)
def test_every_gradient_is_that_of_differences(name):
    op, inputs = CALLS[name]
    dy = rng_of(9).standard_normal(first(op, inputs).shape)
    found = gradients(op, dy, inputs)
    assert found
    for argument, d in found.items():
        assert d.shape == inputs[argument].shape and d.dtype == np.float64
        wanted = by_differences(op, dy, inputs, argument)
        np.testing.assert_allclose(d, wanted, rtol=1e-9, atol=1e-10 * np.abs(wanted).max(initial=0))


def test_every_gradient_is_tried_and_named_as_its_op():
    assert {f"{op}_backward" for op, _ in CALLS.values()} == set(GRADIENTS)
    for name in GRADIENTS:
        op = list(inspect.signature(getattr(ref, name.removesuffix("_backward"))).parameters.values())
        first, *rest = inspect.signature(getattr(ref, name)).parameters.values()
        assert first.name in ("dy", "dg") and [(p.name, p.kind, p.default) for p in rest if p.name != "dfinal"] == \
            [(p.name, p.kind, p.default) for p in op if p.name != "limit"]  # swiglu's, which its gradient has not


@pytest.mark.parametrize("offsets", [[0, 8], [0, 1, 6, 6, 8]])
def test_the_history_that_is_handed_on_has_a_gradient(offsets):
    """It is linear in the inputs: what dfinal adds to a gradient is <dfinal, what a step of an input does to it>."""
    rng, W = rng_of(5), 4
    x = dict(x=rng.standard_normal((8, 3)), w=rng.standard_normal((3, W)),
             history=rng.standard_normal((len(offsets) - 1, W - 1, 3)), offsets=offsets)
    dy, dfinal = rng.standard_normal((8, 3)), rng.standard_normal(x["history"].shape)
    with_it, without = (ref.short_conv_backward(dy, **x, dfinal=d) for d in (dfinal, None))
    assert (with_it[1] == without[1]).all()
    for name, a, b in zip(("x", "history"), with_it[::2], without[::2]):
        for at in np.ndindex(a.shape):
            step = np.zeros(a.shape)
            step[at] = 1
            moved = ref.short_conv(**x | {name: x[name] + step})[1] - ref.short_conv(**x)[1]
            np.testing.assert_allclose(a[at] - b[at], (dfinal * moved).sum(), atol=1e-12)


# ---- by hand -------------------------------------------------------------------------------------------


def test_a_norm_of_two_values():
    """x = (3, 4): mean of squares 12.5; dx is dy without its part along x, over the length."""
    r = 12.5**-0.5
    dx, dw = ref.rms_norm_backward([[1.0, 0]], [[3.0, 4]], [1.0, 2], eps=0.0)
    np.testing.assert_allclose(dx, [[r * (1 - 9 / 25), -r * 12 / 25]])
    np.testing.assert_allclose(dw, [3 * r, 0])
    np.testing.assert_allclose(ref.l2_norm_backward([[1.0, 0]], [[3.0, 4]], eps=0.0), [[16 / 125, -12 / 125]])


def test_a_convolution_of_three_tokens():
    """dx looks ahead, dw is a correlation, and the history's gradient what is left of the first tokens'."""
    w, dy = np.array([[10.0, 1]]), np.array([[1.0], [2], [3]])
    dx, dw, dhistory = ref.short_conv_backward(dy, [[5.0], [6], [7]], w, history=[[4.0]], activation=None)
    assert dx[:, 0].tolist() == [1 + 20, 2 + 30, 3] and dhistory.tolist() == [[10]]
    assert dw.tolist() == [[1 * 4 + 2 * 5 + 3 * 6, 1 * 5 + 2 * 6 + 3 * 7]]
    assert ref.short_conv_backward(dy, [[5.0], [6], [7]], w, activation=None)[2].tolist() == [[10]]
    packed = ref.short_conv_backward(dy, [[5.0], [6], [7]], w, offsets=[0, 1, 3], activation=None)
    assert packed[0][:, 0].tolist() == [1, 2 + 30, 3] and packed[2].tolist() == [[[10]], [[20]]]


def test_gates_at_zero():
    df, drate, ddt = ref.decay_gate_backward(np.ones((3, 1, 2)), np.zeros((3, 1, 2)), [2.0], np.zeros((1, 2)))
    assert (df == -1).all() and ddt.tolist() == [[-3, -3]]
    np.testing.assert_allclose(drate, [-6 * np.log(2)])
    df, drate, _ = ref.decay_gate_backward(np.ones((3, 1)), np.ones((3, 1)), [0.0], [0.0], lower_bound=-4.0)
    assert (df == 0).all() and drate.tolist() == [-3]
    dgate, dup = ref.swiglu_backward([1.0], [0.0], [6.0])
    assert dgate == 3 and dup == 0


# ---- identities ----------------------------------------------------------------------------------------


def test_a_gradient_is_orthogonal_to_what_the_norm_does_not_see():
    """Without eps a norm does not see the length of x, so that dx has no part along it."""
    rng = rng_of(4)
    dy, x, w = rng.standard_normal((3, 6, 8))
    assert np.abs((ref.rms_norm_backward(dy, x, w[0], eps=0.0)[0] * x).sum(-1)).max() < 1e-14
    assert np.abs((ref.l2_norm_backward(dy, x, eps=0.0) * x).sum(-1)).max() < 1e-14


def test_a_gradient_in_two_calls_is_that_of_one():
    """The second call has the first's inputs for its history, and its dhistory joins the first's last rows."""
    rng = rng_of(5)
    dy, x, w, h = rng.standard_normal((9, 3)), rng.standard_normal((9, 3)), rng.standard_normal((3, 4)), np.ones((3, 3))
    dx, dw, dh = ref.short_conv_backward(dy, x, w, history=h)
    a = ref.short_conv_backward(dy[:5], x[:5], w, history=h)
    b = ref.short_conv_backward(dy[5:], x[5:], w, history=x[2:5])
    a[0][2:5] += b[2]
    for whole, parts in ((dx, np.concatenate([a[0], b[0]])), (dw, a[1] + b[1]), (dh, a[2])):
        np.testing.assert_allclose(whole, parts, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("z", [-800.0, -40.0, -1.0, 0.0, 37.0, 800.0])
def test_slopes_keep_their_digits(z):
    """s (1 - s) would be 0 at 37, and exp(800) is no double."""
    e = np.exp(-abs(z))
    got = ref.swiglu_backward(1.0, z, 1.0)[0]
    np.testing.assert_allclose(got, (1 + e + z * e) / (1 + e) ** 2 if z > 0 else e * (1 + e + z) / (1 + e) ** 2)
    shut = ref.gated_rms_norm_backward(np.ones((1, 1)), np.ones((1, 1)), [[z]], [1.0], eps=0.0)[1]
    np.testing.assert_allclose(shut, [[e / (1 + e) ** 2]], rtol=1e-14)


def test_other_shapes_are_refused():
    x, w = np.ones((3, 4)), np.ones(4)
    with pytest.raises(ValueError, match=r"dy has shape \[3, 3\]; it must be \[3, 4\]"):
        ref.rms_norm_backward(x[:, :3], x, w, eps=0)
    with pytest.raises(ValueError, match=r"z has shape \[2, 4\]; it must be \[3, 4\]"):
        ref.gated_rms_norm_backward(x, x, x[:2], w, eps=0)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        ref.gated_rms_norm_backward(x, x, x, w, eps=0, activation="gelu")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        ref.short_conv_backward(x, x, np.ones((4, 2)), activation="gelu")
    with pytest.raises(ValueError, match=r"history has shape \[2, 4\]"):
        ref.short_conv_backward(x, x, np.ones((4, 2)), history=np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"up has shape"):
        ref.swiglu_backward(x, x, x[:2])


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_tokens_give_zeros(name):
    x, w = np.ones((0, 4)), np.ones(4)
    given = {"rms_norm": (x, w), "gated_rms_norm": (x, x, w), "l2_norm": (x,), "short_conv": (x, np.ones((4, 3))),
             "decay_gate": (x, w, w), "swiglu": (x, x)}[name.removesuffix("_backward")]
    found = getattr(ref, name)(x, *given, **({"eps": 1e-6} if "rms" in name else {}))
    found = found if isinstance(found, tuple) else (found,)
    assert found[0].shape == (0, 4) and all((d == 0).all() for d in found)
