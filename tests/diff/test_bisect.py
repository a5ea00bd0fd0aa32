"""`bisect`: two engines that differ in one op, neither assumed right, come down to that op."""

import faulty_runs
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import faults

IDS = list(range(3, 15))


@pytest.fixture(scope="module")
def model(golden_dir):
    return kl.Model.from_pretrained(golden_dir / "kimi-a")


@pytest.fixture(scope="module")
def wide(model):
    """The same with weights in float64, for speed."""
    return faulty_runs.Bench(model).model(faults.WHOLE)


def engine(model, plant=None, count=None):
    """run(tokens, replace) of a float64 engine with a planted fault."""
    def run(tokens, replace):
        if count is not None:
            count.append(sorted(replace))
        return faults.run(model, tokens, plant=plant, after=lambda tap, y: np.asarray(replace.get(tap, y)))[0]

    return run


PLANTED = {
    "layers.3.mla.o": "mla_scale_of_latent", "layers.0.kda.beta": "beta_doubled", "layers.5.moe.out": "w1_w3_swapped",
    "layers.4.mid": "block_missing", "embed": "embedding_scaled", "norm": "norm_weight_missing",
    "logits": "bfloat16_result", "layers.2.attn_norm": "norm_missing",
}


@pytest.mark.parametrize("tap, fault", PLANTED.items())
def test_one_op_is_left(wide, tap, fault):
    count = []
    right, wrong = engine(wide), engine(wide, {tap: fault}, count)
    found = kl.diff.bisect(right, wrong, IDS)
    assert found.tap == tap and found.share > 0.99 and not found, str(found)
    assert found.own > 0 and f"DIFFERENT: {tap} makes 100 %" in str(found) and "<table>" in found._repr_html_()
    assert len(count) <= 11
    assert kl.diff.bisect(engine(wide, {tap: fault}), right, IDS).tap == tap, "whichever comes first"


def test_engines_that_agree(model):
    found = kl.diff.bisect(model, model.reference(), IDS)
    assert found and found.tap is None and found.verdict.startswith("ok: the runs differ by ")


def test_rounding_is_spread(model):
    found = kl.diff.bisect(model, model.reference(), IDS, threshold=0.0)
    assert not found and found.share < 0.9 and found.steps


def test_a_model_against_one_of_its_weights_changed(model, golden_dir):
    other = kl.Model.from_pretrained(golden_dir / "kimi-a")
    name = "model.layers.2.self_attn.g_b_proj.weight"
    other.weights[name] = other.weights[name][::-1]
    assert kl.diff.bisect(model, other, IDS).tap == "layers.2.kda.z"
    assert kl.diff.bisect(other, model, IDS).tap == "layers.2.kda.z"


def test_what_cannot_be_bisected(model):
    with pytest.raises(TypeError, match="run_a is a int; it must be a Model or a function run"):
        kl.diff.bisect(3, model, IDS)
    with pytest.raises(ValueError, match="no tap in common"):
        kl.diff.bisect(lambda tokens, replace: {"x": np.zeros(2)}, model, IDS)


def test_what_is_not_finite_is_told_from_where_on(wide):
    def spoil(site):
        y = site.shaped(site.run())
        y[5, 0] = np.nan
        return y

    found = kl.diff.bisect(engine(wide), engine(wide, {"layers.5.mid": spoil}), IDS)
    assert not found and found.tap == "layers.5.mid" and found.nonfinite == (0, 1) and not found.steps
    assert found.verdict == ("NOT FINITE from layers.5.mid on: the first run has 0 values there that are not finite, "
                             "the second 1")
    assert "NOT FINITE" in found.html() and found.share == 0
    both = kl.diff.bisect(engine(wide, {"norm": spoil}), engine(wide, {"norm": spoil}), IDS)
    assert both.ok


def test_a_share_that_is_no_number_is_no_cause():
    found = kl.diff.Bisection("norm", "logits", 0.5, before=np.inf, after=np.nan)
    assert found.verdict.startswith("SPREAD: ") and found.share == 0
