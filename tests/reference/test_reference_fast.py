"""The forms that `blame` and its like run, beside the formula of `kimi_linear.reference`."""

import numpy as np
import pytest

from kimi_linear import _reference_fast, reference

EQUAL = dict(rtol=0, atol=1e-13, equal_nan=True)


def attention(rng, T, S, H=3):
    shapes = dict(q=(T, H, 12), latent=(S, 16), k_shared=(S, 4), w_uk=(H, 8, 16), w_uv=(H, 5, 16))
    return {name: 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()} | {"scale": 0.3}


def both(op, **args):
    with np.errstate(all="ignore"):
        found = [getattr(module, op)(**args) for module in (_reference_fast, reference)]
    return [x if isinstance(x, tuple) else (x,) for x in found]


def check(op, **args):
    for ours, formula in zip(*both(op, **args), strict=True):
        np.testing.assert_allclose(ours, formula, **EQUAL)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 200), (63, 63), (64, 64), (65, 130), (200, 200)])
def test_attention_is_the_formula(T, S):
    check("latent_attention", **attention(np.random.default_rng(T), T, S))


def test_attention_of_sequences():
    rng = np.random.default_rng(0)
    check("latent_attention", **attention(rng, 150, 150), offsets=[0, 70, 70, 150])
    check("latent_attention", **attention(rng, 20, 100), offsets=[0, 9, 20], kv_offsets=[0, 60, 100])
    check("latent_attention", **attention(rng, 20, 20), form="absorbed")
    check("latent_attention", **attention(rng, 9, 20), select=np.arange(9)[:, None] + [0, 4, 7])
    with pytest.raises(ValueError, match="latent has 3 positions for 4 queries"):
        _reference_fast.latent_attention(**attention(rng, 4, 3))


@pytest.mark.parametrize("name", ["q", "latent", "k_shared"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attention_has_what_is_not_finite_where_the_formula_has_it(name, value):
    args = attention(np.random.default_rng(1), 100, 100)
    args[name][70] = value
    check("latent_attention", **args)
    with np.errstate(invalid="ignore"):
        assert np.isfinite(_reference_fast.latent_attention(**args)[:70]).all()


def grouped(rng, T, S, H=6, groups=2):
    shapes = dict(q=(T, H, 12), k=(S, groups, 12), v=(S, groups, 7))
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"scale": 0.3}


@pytest.mark.parametrize("T, S", [(0, 3), (1, 1), (1, 200), (64, 64), (65, 130)])
def test_grouped_attention_is_the_formula(T, S):
    check("attention", **grouped(np.random.default_rng(T), T, S))


def test_grouped_attention_of_sequences():
    rng = np.random.default_rng(3)
    check("attention", **grouped(rng, 150, 150), offsets=[0, 70, 70, 150])
    check("attention", **grouped(rng, 20, 100), offsets=[0, 9, 20], kv_offsets=[0, 60, 100])
    with pytest.raises(ValueError, match="k has 3 positions for 4 queries"):
        _reference_fast.attention(**grouped(rng, 4, 3))
    with pytest.raises(ValueError, match="q has 6 heads and k 4"):
        _reference_fast.attention(**grouped(rng, 4, 4, groups=4))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_grouped_attention_has_nan_where_the_formula_has_it(name):
    args = grouped(np.random.default_rng(4), 100, 100)
    args[name][70] = np.nan
    check("attention", **args)


def delta(rng, T, H=3, K=8, V=6):
    x = {name: rng.standard_normal((T, H, n)) for name, n in (("q", K), ("k", K), ("v", V))}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    return x | {"g": -np.exp(rng.uniform(-6, 3, (T, H, K))), "beta": rng.random((T, H))}


@pytest.mark.parametrize("T", [0, 1, 100])
def test_delta_rule_is_the_formula(T):
    rng = np.random.default_rng(T)
    check("delta_rule", **delta(rng, T))
    check("delta_rule", **delta(rng, T), initial_state=rng.standard_normal((3, 8, 6)), scale=0.7)


def test_delta_rule_of_sequences_and_heads():
    rng = np.random.default_rng(0)
    check("delta_rule", **delta(rng, 60), offsets=[0, 20, 20, 60])
    x = delta(rng, 30, H=4) | {"g": None}
    x |= {"q": x["q"][:, :2], "k": x["k"][:, :2]}
    check("delta_rule", **x, head_map="tiled")
    check("delta_rule", **delta(rng, 30), l2_norm=True)
    check("delta_rule", **delta(rng, 30), checkpoints=7)


@pytest.mark.parametrize("name, value", [("v", np.nan), ("k", np.inf), ("g", -np.inf), ("beta", np.nan)])
def test_delta_rule_has_what_is_not_finite_where_the_formula_has_it(name, value):
    x = delta(np.random.default_rng(2), 40)
    x[name][25, 1] = value
    check("delta_rule", **x)
