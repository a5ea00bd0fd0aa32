"""The float64 gradients of the delta rule against differences of the rule itself, and their running bound."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear import reference
from kimi_linear.diff.budgets import budget

sys.path.insert(0, str(Path(__file__).parents[1] / "testing"))
import backward_kernels  # noqa: E402

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def drawn(rng, T=9, Hk=2, Hv=4, K=3, V=5, *, head=False, offsets=None, strongest=1.6, dtype=np.float64):
    unit = rng.standard_normal((2, T, Hk, K))
    unit /= np.sqrt((unit**2).sum(-1, keepdims=True)) + 1e-30
    g = -np.exp(rng.uniform(np.log(1e-3), np.log(strongest), (T, Hv, K)))
    state = (Hv, K, V) if offsets is None else (len(offsets) - 1, Hv, K, V)
    x = dict(do=rng.standard_normal((T, Hv, V)), q=unit[0], k=unit[1], v=rng.standard_normal((T, Hv, V)),
             g=g[..., 0] if head else g, beta=rng.random((T, Hv)), initial_state=rng.standard_normal(state),
             dstate=rng.standard_normal(state))
    x = {n: a.astype(dtype) for n, a in x.items()}
    return x if offsets is None else x | {"offsets": offsets}


def loss(do, dstate, **x):
    o, state = reference.delta_rule(**x)
    return (o * do).sum() + (state * dstate).sum()


@pytest.mark.parametrize("more", [
    {}, {"head": True}, {"offsets": [0, 4, 4, 9]}, {"l2_norm": True, "head_map": "tiled", "scale": 0.3},
    {"l2_norm": True, "l2_eps": 0.5, "offsets": [0, 1, 9]}], ids=str)
def test_every_gradient_is_that_of_the_rule(more, rng):
    x = drawn(rng, **{n: more[n] for n in ("head", "offsets") if n in more})
    x |= {n: a for n, a in more.items() if n not in ("head", "offsets")}
    got = dict(zip(NAMES, reference.delta_rule_backward(**x), strict=True))
    for name, d in got.items():
        step, differences = 1e-6, np.zeros(x[name].shape)
        for at in np.ndindex(d.shape):
            up, down = (x | {name: x[name].copy()} for _ in range(2))
            up[name][at] += step
            down[name][at] -= step
            differences[at] = (loss(**up) - loss(**down)) / (2 * step)
        assert d.shape == x[name].shape
        assert np.abs(d - differences).max() < 3e-8 * np.abs(d).max(), name


def test_longer_than_a_block_of_kept_states(rng):
    """A call of 150 tokens is three calls whose states and gradients are handed on."""
    x = drawn(rng, 150)
    whole, cuts, starts = reference.delta_rule_backward(**x), (0, 37, 101, 150), [x["initial_state"]]
    rows = [{n: x[n][a:b] for n in ("do", "q", "k", "v", "g", "beta")} for a, b in zip(cuts, cuts[1:])]
    for part in rows[:-1]:
        forward = {n: a for n, a in part.items() if n != "do"}
        starts.append(reference.delta_rule(**forward, initial_state=starts[-1])[1])
    dstate, parts = x["dstate"], []
    for part, start in zip(reversed(rows), reversed(starts)):
        parts.insert(0, reference.delta_rule_backward(**part, initial_state=start, dstate=dstate))
        dstate = parts[0][5]
    for i in range(5):
        np.testing.assert_allclose(np.concatenate([p[i] for p in parts]), whole[i], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dstate, whole[5], rtol=1e-12, atol=1e-13)


def test_a_batch_axis_is_sequences_of_one_length(rng):
    x = drawn(rng, 12, offsets=[0, 6, 12])
    flat = reference.delta_rule_backward(**x)
    of_tokens = {n: x[n].reshape(2, 6, *x[n].shape[1:]) for n in ("do", "q", "k", "v", "g", "beta")}
    batch = reference.delta_rule_backward(**of_tokens, initial_state=x["initial_state"], dstate=x["dstate"])
    for a, b in zip(flat, batch, strict=True):
        assert a.tobytes() == b.tobytes()


def test_gates_of_minus_infinity_forget(rng):
    x = drawn(rng)
    x["g"][4] = -np.inf
    whole = reference.delta_rule_backward(**x)
    rows = [{n: x[n][r] for n in ("do", "q", "k", "v", "g", "beta")} for r in (slice(4), slice(4, None))]
    early = reference.delta_rule_backward(**rows[0], initial_state=x["initial_state"])
    late = reference.delta_rule_backward(**rows[1], dstate=x["dstate"])
    for all_of_it, *parts in zip(whole[:5], early[:5], late[:5], strict=True):
        np.testing.assert_array_equal(all_of_it, np.concatenate(parts))
    np.testing.assert_array_equal(whole[5], early[5])
    assert not late[5].any() and not whole[3][4].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 90), st.integers(1, 2), st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.booleans(),
       st.sampled_from([0.1, 1.6, 30.0]), st.integers(0, 2**32 - 1))
def test_float32_kernels_are_within_the_bound(T, Hk, group, K, V, head, strongest, seed):
    x = drawn(np.random.default_rng(seed), T, Hk, Hk * group, K, V, head=head, strongest=strongest, dtype=np.float32)
    ref = reference.delta_rule_backward(**x)
    for fn in (backward_kernels.recurrent, backward_kernels.chunked):
        bounds = budget("delta_rule_backward", ref, **x, form=fn.__name__)
        with np.errstate(all="ignore"):
            for a, r, bound in zip(fn(**x), ref, bounds, strict=True):
                assert (np.abs(np.float64(a) - r) <= bound).all()
