"""The catalogue of faults: data that is complete, functions that do what they say, scenes that carry states."""

import faulty_runs
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import faults, reference
from kimi_linear.faults import Scene, _kda, scene


@pytest.fixture(scope="module")
def benches(golden_dir):
    """Of Kimi-Linear, of Qwen3-Next, whose values are wider than its keys, of Kimi K3 and of GLM-5.3-Flash."""
    return [faulty_runs.Bench(kl.Model.from_pretrained(golden_dir / case)) for case in CASES]


@pytest.fixture(scope="module")
def bench(benches):
    return benches[0]


CASES = ("kimi-a", "qwen-a", "k3-a", "k3-b", "glm-a", "glm-b")
ALL = list(faults.CATALOGUE.values())
OPS = {"add", "attention", "attn_res", "decay_gate", "delta_rule", "embedding", "gated_rms_norm", "index_pool",
       "index_select", "l2_norm", "latent_attention", "layer_norm", "linear", "mhc_collapse", "mhc_expand", "mhc_post",
       "mhc_pre", "mhc_pre_comb", "mhc_pre_post", "moe", "rms_norm", "rope", "route", "route_weights", "short_conv",
       "sigmoid", "sigmoid_gate", "situ", "swiglu"}


def test_every_fault_is_data():
    assert len(ALL) >= 30
    for f in ALL:
        assert f.text and f.ops and f.choices and f.name == f.name.lower(), f.name
        assert set(f.ops) <= OPS | {"index_scores", "*"}, f.name
    assert len({f.text for f in ALL}) == len(ALL)


def test_faults_of_an_op():
    names = [f.name for f in faults.for_op("delta_rule")]
    assert {"decay_after_update", "state_read_transposed", "bfloat16_result"} <= set(names)
    assert "rotary_applied" not in names and names.index("decay_missing") < names.index("bfloat16_result")
    for op in OPS:
        assert len(faults.for_op(op)) > 3
    with pytest.raises(ValueError, match="'decay_aftr' is no fault of the catalogue; near it are decay_after"):
        faults.by_name("decay_aftr")


@pytest.mark.parametrize("fault", ALL, ids=lambda f: f.name)
def test_every_fault_changes_its_op_in_its_scenario(benches, fault):
    """In one of the models, at some place, by some choice, in calls of its scenario; where it can be, by all means."""
    seen = {case: effect_in(bench, fault) for case, bench in zip(CASES, benches, strict=True)}
    found = [x for x in seen.values() if x is not None]
    assert found and all(found), f"{fault.name} changes nothing in: {fault.scenario}: {seen}"


def effect_in(bench, fault):
    """The largest change of the first tap that it changes; None where it can be at none."""
    model, traces = clean(bench, fault.scenario)
    seen = None
    for tap in bench.places(fault):
        site = faulty_runs.site_of(model, traces, tap)
        right = site.shaped(site.run())
        for choice in fault.choices:
            y = fault.result(site, choice)
            if y is not None:
                assert y.shape == right.shape
                change = float(np.nanmax(np.abs(np.nan_to_num(y, posinf=1e9, nan=1e9) - right)))
                seen = max(seen or 0.0, change)
        if seen:
            break
    return seen


_CLEAN = {}


def clean(bench, scenario):
    key = id(bench), scenario
    if key not in _CLEAN:
        _CLEAN[key] = bench.run(scenario, "float64", 0)
    return _CLEAN[key]


def test_run_is_the_reference_model(bench):
    """Packed sequences, and one split in calls, give what the reference gives for each."""
    rng = np.random.default_rng(3)
    a, b = ([int(t) for t in rng.integers(0, bench.config.vocab_size, n)] for n in (9, 6))
    model = bench.model(faults.WHOLE)
    exact = kl.ReferenceModel(bench.config, model.weights)
    alone = [exact.forward(ids, taps="*").taps for ids in (a, b)]
    packed = faults.run(model, [a, b])[0]
    first, second = faults.run(model, [[a[:5]], [a[5:]]])
    for tap, x in alone[0].items():
        if tap in packed:
            np.testing.assert_allclose(packed[tap], np.concatenate([x, alone[1][tap]]), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(np.concatenate([first[tap], second[tap]]), x, rtol=1e-9, atol=1e-12)
    assert packed.meta["offsets"] == [0, 9, 15]


def test_run_goes_back(bench):
    """A call at an earlier position gives what the tokens alone would give."""
    model = bench.model(faults.WHOLE)
    whole = faults.run(model, [1, 2, 3, 4, 5, 6])[0]["logits"]
    parts = faults.run(model, [[[1, 2, 3, 4, 9, 9, 9]], [[5, 6]]], positions=[None, [4]])
    np.testing.assert_allclose(parts[1]["logits"], whole[4:], rtol=1e-9)
    assert parts[1].meta["position"] == [4]


def test_what_cannot_be_planted(bench):
    model = bench.model(faults.WHOLE)
    with pytest.raises(ValueError, match=r"decay_missing cannot be at norm \(rms_norm\)"):
        faults.run(model, [1, 2], plant={"norm": "decay_missing"})
    with pytest.raises(ValueError, match="plant names layers.9.out; this model has no such tap"):
        faults.run(model, [1, 2], plant={"layers.9.out": "residual_missing"})
    with pytest.raises(ValueError, match="call 1 begins at position 5 of sequence 0, of which the calls before"):
        faults.run(model, [[[1, 2]], [[3]]], positions=[None, [5]])


def test_sequences_of_no_token(bench):
    model = bench.model(faults.WHOLE)
    whole = faults.run(model, [1, 2])[0]
    for tokens in ([[], [1, 2]], [[1, 2], []], [[[], [1, 2]]]):
        found, = faults.run(model, tokens)
        assert all(np.array_equal(found[tap], whole[tap]) for tap in whole) and len(found.meta["offsets"]) == 3
    for tokens, message in [([], "has no token"), ([[], []], "has no token"), (3, "has no token"),
                            ([[[[1]]]], "is 4 deep")]:
        with pytest.raises(ValueError, match=f"tokens {message}; it must be ids, a list of sequences"):
            faults.run(model, tokens)


def test_recurrence_is_the_reference(rng):
    q, k, v = rng.standard_normal((3, 12, 2, 4))
    g, beta = -rng.random((12, 2, 4)), rng.random((12, 2))
    exact, _ = reference.delta_rule(q, k, v, g, beta, offsets=[0, 5, 12])
    np.testing.assert_allclose(_kda.recurrence(q, k, v, g, beta, offsets=[0, 5, 12]), exact, rtol=1e-12)


def test_chunks_without_a_strong_decay_are_the_reference(bench, rng):
    """The wrong chunked forms are wrong by overflow and rounding alone."""
    model, traces = clean(bench, faults.WHOLE)
    site = faulty_runs.site_of(model, traces, "layers.0.kda.o")
    g = np.maximum(site["g"], -0.01)
    calm = faults.Site(site.node, {**site.args, "g": g}, site.scene, site.values, site.weights)
    np.testing.assert_allclose(_kda.subtracted_chunks(calm, 16), calm.run(), rtol=1e-5, atol=1e-7)
    strong = faults.Site(site.node, {**site.args, "g": np.full_like(g, -6.0)}, site.scene, site.values, site.weights)
    assert not np.isfinite(faults.by_name("chunk_overflow").result(strong, (32,))).all()


def test_chunks_of_one_gate_a_head(benches):
    """Key heads of several value heads, one gate a head: the factored chunk is the reference where nothing overflows.
    """
    model, traces = clean(benches[1], faults.WHOLE)
    site = faulty_runs.site_of(model, traces, "layers.0.gdn.o")
    assert site["g"].ndim == 2 and site["q"].shape[1] < site["v"].shape[1]
    g = np.maximum(site["g"], -5.6)
    mild = faults.Site(site.node, {**site.args, "g": g}, site.scene, site.values, site.weights)
    assert g.min() < -88 / 16
    np.testing.assert_allclose(_kda.factored_chunks(mild, 16), mild.run(), rtol=1e-3, atol=1e-4)


def rows(branches):
    return [(b.past.tolist(), b.own.tolist()) for b in branches]


def test_rules_of_a_scene():
    two = Scene([[0, 2, 3], [0, 1, 2]])  # rows 0 1 | 2 of the first sequence, 3 | 4 of the second
    assert rows(two.branches()) == [([], [0, 1, 2]), ([], [3, 4])]
    assert rows(two.branches(scene.lost)) == [([], [0, 1]), ([], [2]), ([], [3]), ([], [4])]
    assert rows(two.branches(scene.leaked)) == [([], [0, 1, 2]), ([0, 1], [3, 4])]
    assert two.is_split and two.has_several and not two.is_restored
    assert [x.tolist() for x in two.split(two.lay([np.array([1, 2, 3]), np.array([4, 5])]))] == [[1, 2, 3], [4, 5]]
    assert two.place(4) == "call 1, sequence 1, token 0"
    back = Scene([[0, 4], [0, 2]], [None, 1])
    assert rows(back.branches()) == [([], [0, 1, 2, 3]), ([0], [4, 5])]
    assert rows(back.branches(scene.stale_row)) == [([], [0, 1, 2, 3]), ([0, 1], [4, 5])]
    assert rows(back.branches(scene.not_rolled_back)) == [([], [0, 1, 2, 3, 4, 5])]
    assert rows(back.branches(scene.empty_after_restore)) == [([], [0, 1, 2, 3]), ([], [4, 5])]
    assert back.is_restored and not back.is_split
