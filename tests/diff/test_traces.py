"""Two runs beside each other: the first divergence, what is missing, and what cannot be compared."""

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.diff import traces
from kimi_linear.diff.traces import THRESHOLD, threshold_for


@pytest.fixture(scope="module")
def model(golden_dir):
    return kl.Model.from_pretrained(golden_dir / "kimi-a")


@pytest.fixture(scope="module")
def ours(model):
    return model.trace(np.arange(1, 20), "*")


@pytest.fixture(scope="module")
def exact(model):
    return model.reference().forward(np.arange(1, 20), taps="*")


def copy(trace):
    return kl.Trace({n: np.array(x) for n, x in trace.items()}, trace.meta)


def test_engine_and_reference_agree(model, ours, exact):
    report = traces(ours, exact)
    assert report and report.ok and report.first is None
    assert [r.tap for r in report.rows] == model.taps, "in the order of the dataflow"
    assert report.only_a == [] and all(".kda." in n or "cache" in n for n in report.only_b)
    by_hand = np.sqrt(np.mean((ours["logits"] - exact.logits) ** 2) / np.mean(exact.logits**2))
    np.testing.assert_allclose(report.rows[-1].rms, by_hand)
    assert report.verdict.startswith("ok: no divergence in 155 taps")


def test_first_divergence_by_tap_and_token(model, exact):
    def spoil(x):
        x = x.copy()
        x[7:, 1] *= 1 + 1e-2
        return x

    theirs = model.reference().forward(np.arange(1, 20), taps="*", edit={"layers.2.kda.g": spoil})
    report = traces(theirs, exact)
    assert not report
    assert (report.first.tap, report.first.layer, report.first.token) == ("layers.2.kda.g", 2, 7)
    assert report.first.sentence.startswith("DIVERGES at layers.2.kda.g, token 7: rms error ")
    before = report.rows[: [r.tap for r in report.rows].index("layers.2.kda.g")]
    assert all(r.ok and r.rms == 0 for r in before)
    assert f"the {len(before)} taps before it agree" in report.verdict
    assert next(r for r in report.rows if r.tap == "layers.2.kda.o").first == 7


def test_threshold(ours):
    theirs = copy(ours)
    theirs["layers.1.mid"][3] *= np.float32(1 + THRESHOLD / 8)
    assert traces(ours, theirs)
    assert traces(ours, theirs, threshold=THRESHOLD / 100).first.tap == "layers.1.mid"
    assert threshold_for(np.float32, ml_dtypes.bfloat16) == 16 * 2.0**-8
    assert threshold_for(np.float64, np.float16) == 16 * 2.0**-11
    half = {n: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for n, x in ours.items()}
    assert traces(half, ours)
    with pytest.raises(ValueError, match="threshold is -1"):
        traces(ours, ours, threshold=-1)


def test_expert_ids_are_sets(ours):
    theirs = copy(ours)
    ids = theirs["layers.3.moe.ids"]
    theirs["layers.3.moe.ids"][:] = ids[:, ::-1]
    assert traces(ours, theirs)
    other = (set(range(8)) - set(ids[5].tolist())).pop()
    lost = int(ids[5, 0])
    theirs["layers.3.moe.ids"][5, 0] = other
    report = traces(theirs, ours)
    assert (report.first.tap, report.first.token) == ("layers.3.moe.ids", 5)
    assert f"experts [{other}] in place of [{lost}]" in report.verdict


def test_not_finite(ours):
    theirs = copy(ours)
    theirs["layers.4.kda.o"][2, 1, 3] = np.nan
    report = traces(theirs, ours)
    assert (report.first.tap, report.first.token) == ("layers.4.kda.o", 2)
    assert "a is not finite there" in report.verdict


def test_missing_taps_are_listed(ours):
    some = kl.Trace({n: ours[n] for n in ("logits", "layers.2.out", "embed")})
    report = traces(ours, some)
    assert [r.tap for r in report.rows] == ["embed", "layers.2.out", "logits"]
    assert len(report.only_a) == len(ours) - 3 and report.only_b == []
    assert "only in a: layers.0.attn_norm" in str(report) and "more" in str(report)


def test_other_shapes_of_the_same_values(ours):
    flat = {n: x.reshape(len(x), -1) for n, x in ours.items()}
    report = traces(ours, flat)
    assert report and any("layers.0.kda.g" in note for note in report.notes)


def test_what_cannot_be_compared(model, ours):
    with pytest.raises(ValueError, match="a is a trace of 19 tokens and b of 18"):
        traces(ours, model.trace(np.arange(1, 19), "*"))
    with pytest.raises(ValueError, match="other tokens: token 4 is 5 in a and 300 in b"):
        traces(ours, model.trace([1, 2, 3, 4, 300, *range(6, 20)], "*"))
    with pytest.raises(
        ValueError, match=r"other sequences: offsets are \[0, 19\] in a and \[0, 7, 19\] in b"
    ):
        traces(ours, model.trace(np.arange(1, 20), "*", offsets=[0, 7, 19]))
    with pytest.raises(ValueError, match=r"embed has other tokens: \[19, 64\] in a and \[4, 64\] in b"):
        traces(dict(ours), {"embed": ours["embed"][:4]})
    with pytest.raises(ValueError, match=r"embed has another shape: \[19, 64\] in a and \[19, 63\] in b"):
        traces(dict(ours), {"embed": ours["embed"][:, 1:]})
    with pytest.raises(ValueError, match="no tap is in both traces: a has embed, .*; b has theirs"):
        traces(ours, {"theirs": np.zeros(3)})
    with pytest.raises(TypeError, match="a is a list"):
        traces([], ours)


def test_hostile_names_are_escaped(ours):
    name = "<script>alert(1)</script>"
    report = traces({name: np.zeros(3)}, {name: np.ones(3)})
    assert report.first.tap == name
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def test_plain_values(ours):
    import json

    plain = json.loads(json.dumps(traces(ours, ours).to_dict()))
    assert plain["ok"] and plain["first"] is None and len(plain["rows"]) == len(ours)


def test_added_and_inherited(model):
    """The op that is edited adds its error; those behind it inherit theirs."""
    [whole] = kl.faults.run(model, list(range(1, 20)))
    [other] = kl.faults.run(model, list(range(1, 20)), plant={"layers.2.kda.beta": "beta_doubled"})
    report = kl.diff.traces(other, whole, model=model)
    rows = {r.tap: r for r in report.rows}
    assert rows["layers.2.kda.beta"].added == pytest.approx(1) and rows["layers.2.kda.beta"].inherited < 1e-15
    assert rows["layers.2.kda.o"].added < 1e-15 and rows["layers.2.kda.o"].inherited > 0.05
    assert rows["layers.5.moe.ids"].added is None and rows["layers.1.out"].inherited == 0
    assert report.first.tap == "layers.2.kda.beta" and "1.00e+00 added by this op, 0.00e+00 inher" in report.verdict
    assert "inherited" in str(report).splitlines()[0] and "inherited" in report._repr_html_()
    assert "inherited" not in str(kl.diff.traces(other, whole))
