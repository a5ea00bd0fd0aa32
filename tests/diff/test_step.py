"""A trace that keeps the states before and after: one step of one layer, deep in a sequence, judged alone."""

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.diff import metrics, step

DEEP = 5000


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def ids(model):
    return np.random.default_rng(4).integers(3, 1700, DEEP + 1)


@pytest.fixture(scope="module")
def deep(model, ids):
    """Layers 2 (KDA) and 3 (MLA) at token 5,000, and what enters them."""
    layers = ["layers.2", "layers.3"]
    return model.trace(ids, [*layers, "layers.1.out"], states=layers, tokens_slice=slice(DEEP, DEEP + 1))


def altered(trace, name, change):
    arrays = {n: np.array(x) for n, x in trace.items()}
    arrays[name] = change(arrays[name])
    return kl.Trace(arrays, trace.meta)


def test_a_decode_step_at_position_5000(model, deep):
    assert deep.meta["position"] == [DEEP] and len(deep["layers.2.kda.o"]) == 1
    assert deep["before.layers.3.mla.latent_cache"].shape == (DEEP, 64)
    for layer, state in ((2, "layers.2.kda.state"), (3, None)):
        report = step(model, deep, layer)
        assert report.ok and not report.skipped, str(report)
        judged = {r.tap for r in report.rows}
        assert judged >= {n for n in deep if n.startswith(f"layers.{layer}.") and "_cache" not in n}
        assert state is None or {state, "layers.2.kda.q_history"} <= judged
    assert deep.nbytes < 4 << 20


@pytest.mark.parametrize("name, change, wrong", [
    ("layers.2.kda.state", lambda x: x * np.float32(1 + 1e-5), {"layers.2.kda.state"}),
    ("layers.2.kda.o", lambda x: -x, {"layers.2.kda.o", "layers.2.kda.o_norm"}),
    ("before.layers.2.kda.state", np.zeros_like, {"layers.2.kda.o", "layers.2.kda.state"}),
    ("before.layers.2.kda.k_history", lambda x: np.roll(x, 1, 0), {"layers.2.kda.k_conv", "layers.2.kda.k_history"}),
])
def test_what_is_wrong_there_is_found(model, deep, name, change, wrong):
    report = step(model, altered(deep, name, change), 2)
    assert {r.tap for r in report.wrong} == wrong, str(report)
    assert step(model, altered(deep, name, change), 3).ok


def test_a_stale_cache_is_found(model, deep):
    """The rows of another sequence before the token."""
    name = "before.layers.3.mla.latent_cache"
    report = step(model, altered(deep, name, lambda x: x[::-1]), 3)
    assert [r.tap for r in report.wrong] == ["layers.3.mla.o"], str(report)


def test_states_are_what_a_state_holds(model, ids, tmp_path):
    state = model.new_state()
    model.forward(ids[:100], state=state, logits="none")
    before = dict(state.items())
    trace = model.trace(ids[100:170], "logits", states=True, state=state, tokens_slice=slice(0, 70))
    assert trace.meta["position"] == [100] and state.position == 170
    assert list(trace)[0] == "logits" and set(trace) == {"logits", *before, *(f"before.{n}" for n in before)}
    for name, x in before.items():
        assert trace[f"before.{name}"].tobytes() == x.tobytes(), name
        assert trace[name].tobytes() == state[name].tobytes(), name
    whole = model.trace(ids[:170], "logits", tokens_slice=slice(100, 170))
    np.testing.assert_allclose(whole["logits"], trace["logits"], rtol=1e-3, atol=1e-4)
    saved = model.trace(ids[:170], "logits", states="*.kda.state", to=tmp_path / "x.safetensors",
                        tokens_slice=slice(100, 170))
    states = {f"{p}layers.{i}.kda.state" for p in ("", "before.") for i in (0, 1, 2, 4)}
    assert set(saved) == {"logits", *states}
    np.testing.assert_array_equal(saved["layers.1.kda.state"], trace["layers.1.kda.state"])


def test_the_whole_of_a_sequence(model, ids):
    """From the beginning: the states before are zeros or have no row, and nothing else has changed."""
    trace, plain = model.trace(ids[:600], "layers.2", states="layers.2"), model.trace(ids[:600], "layers.2")
    assert not trace["before.layers.2.kda.state"].any()
    assert all(np.array_equal(plain[n], trace[n]) for n in plain)
    assert model.trace(ids[:9], "*", states=True)["before.layers.5.mla.latent_cache"].shape == (0, 64)
    assert set(model.trace(ids[:9], "*", states=False)) == set(model.taps)


@pytest.mark.parametrize("a, b", [(0, 0), (30, 30), (0, 70), (64, 70), (70, 70)])
@pytest.mark.parametrize("begun", [False, True])
def test_slices_at_the_edges(model, ids, a, b, begun):
    """The states at both ends of a slice, empty ones too, and where the whole text has been read."""
    state, want, at = (model.new_state() if begun else None), model.new_state(), {}
    for n in (0, *sorted({a, b} - {0})):
        model.forward(ids[want.position:n], state=want, logits="none") if n else None
        at[n] = dict(want.items())
    trace = model.trace(ids[:70], "layers.1.out", states="*.state", state=state, tokens_slice=slice(a, b))
    assert len(trace["layers.1.out"]) == b - a and trace.meta["position"] == [a]
    assert state is None or state.position == 70
    for i in (0, 1, 2, 4):
        name = f"layers.{i}.kda.state"
        np.testing.assert_allclose(trace[f"before.{name}"], at[a][name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(trace[name], at[b][name], rtol=1e-4, atol=1e-5)


def test_another_engine_s_types(model, deep):
    """A trace in bfloat16 is judged by what bfloat16 can be."""
    import ml_dtypes

    rounded = {n: np.asarray(x) if x.dtype.kind in "iu" else np.asarray(x).astype(ml_dtypes.bfloat16)
               for n, x in deep.items()}
    report = step(model, kl.Trace(rounded, {"position": [DEEP]}), 2)
    assert report.ok and report.unit == metrics.unit_of(ml_dtypes.bfloat16), str(report)


def test_mistakes(model, deep, ids):
    with pytest.raises(ValueError, match="layer is 9; the model has 0..5"):
        step(model, deep, 9)
    with pytest.raises(ValueError, match="the trace has no tap of layer 4: it has layers.1.out"):
        step(model, deep, 4)
    with pytest.raises(ValueError, match="dtype is 'int3'; it must be a float type"):
        step(model, deep, 2, dtype="int3")
    without = kl.Trace({n: x for n, x in deep.items() if not n.startswith("before.layers.2.kda.state")}, deep.meta)
    report = step(model, without, 2)
    why = "the trace lacks before.layers.2.kda.state, and the call begins at position 5000"
    assert ("layers.2.kda.o", why) in report.skipped
    short = altered(deep, "layers.2.kda.g", lambda x: x[:, :1])
    with pytest.raises(ValueError, match=r"layers.2.kda.g has shape \[1, 1, 32\]; it must be \[1, 4, 32\]"):
        step(model, short, 2)
    with pytest.raises(ValueError, match="the trace has 2 sequences; it must have one"):
        step(model, kl.Trace(dict(deep), deep.meta | {"offsets": [0, 1, 2]}), 2)
    with pytest.raises(ValueError, match="states: 'layers.9' matches no tap"):
        model.trace(ids[:5], states="layers.9")
    with pytest.raises(ValueError, match="to, tokens_slice and states need one sequence"):
        model.trace(ids[:5], states=True, offsets=[0, 2, 5])
    with pytest.raises(ValueError, match="to, tokens_slice and states need one sequence"):
        model.trace([ids[:5], ids[:3]], states=True)


def test_a_call_behind_a_state_without_the_states_before_it(model, ids):
    """It says where it begins, so that nothing is judged as if it were a sequence's beginning."""
    state = model.new_state()
    model.forward(ids[:9], state=state, logits="none")
    trace = model.trace(ids[9:12], "layers.2", state=state)
    report = step(model, trace, 2)
    assert not report.wrong and trace.meta["position"] == [9]
    assert {tap for tap, why in report.skipped if "the call begins at position 9" in why} >= {"layers.2.kda.o"}


def test_no_tokens(model, ids):
    report = step(model, model.trace(ids[:9], "layers.2", states="layers.2", tokens_slice=slice(4, 4)), 2)
    assert not report and report.verdict == "NOT JUDGED: the trace has no tokens"
