"""Two runs beside each other: the first divergence, what is missing, and what cannot be compared."""

import ml_dtypes
import numpy as np
import pytest
from tensors import Tensor

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


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
def test_the_type_of_a_run_counts_where_its_arrays_are_wider(ours, dtype):
    """As of transformers in bfloat16, whose arrays are kept as float32."""
    wide = {n: x.astype(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.float32 else x for n, x in ours.items()}
    assert not traces(wide, ours) and not traces(kl.Trace(wide, {"dtype": "q4"}), ours)
    for a, b in ((kl.Trace(wide, {"dtype": dtype}), ours), (ours, kl.Trace(wide, {"dtype": dtype}))):
        report = traces(a, b)
        assert report and {r.threshold for r in report.rows if r.kind == "float"} == {16 * 2.0**-8}, str(report)
    narrow = [n for n, x in wide.items() if x.dtype == np.float32 and not n.endswith("kda.g")]
    half = wide | {n: wide[n].astype(ml_dtypes.bfloat16) for n in narrow}
    assert traces(half, ours), "gates stay float32, and are made of what is not"
    wide["layers.2.kda.o"][3] *= 1.2
    assert traces(kl.Trace(wide, {"dtype": dtype}), ours).first.tap == "layers.2.kda.o"


def test_the_token_is_told_in_its_sequence(model):
    ours = model.trace(np.arange(1, 20), "*", offsets=[0, 7, 19])
    theirs = copy(ours)
    theirs["layers.1.mid"][8] *= 2
    report = traces(theirs, ours)
    assert report.first.token == 8 and "DIVERGES at layers.1.mid, sequence 1, token 1: rms" in report.verdict
    found = kl.diff.blame(model, theirs)
    assert {r.at for r in found.wrong} == {"sequence 1, token 1"} and report.columns[8] == "sequence 1, token 1"


def test_expert_ids_are_sets(ours):
    theirs = copy(ours)
    ids = theirs["layers.3.moe.ids"]
    theirs["layers.3.moe.ids"][:] = ids[:, ::-1]
    report = traces(theirs, ours)
    assert report.first.tap == "layers.3.moe.weights", "they belong to other experts now"
    theirs["layers.3.moe.weights"][:] = ours["layers.3.moe.weights"][:, ::-1]
    assert traces(theirs, ours) and traces(ours, theirs)
    assert all(r.rms == 0 for r in traces(theirs, ours).rows)
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
    with pytest.raises(ValueError, match=r"\[19, 64\] in a and \[1, 19, 64\] in b; kimi_linear.diff.align tells how"):
        traces(dict(ours), {"embed": ours["embed"][None]})
    with pytest.raises(ValueError, match="no tap is in both traces: a has embed, .*; b has theirs"):
        traces(ours, {"theirs": np.zeros(3)})
    with pytest.raises(TypeError, match="a is a list"):
        traces([], ours)


def test_hostile_names_are_escaped(ours):
    name = "<script>alert(1)</script>"
    report = traces({name: np.zeros(3)}, {name: np.ones(3)})
    assert report.first.tap == name
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def test_equal_traces_have_the_same_bytes(ours, tmp_path):
    ours.save(tmp_path / "t.safetensors")
    assert kl.Trace.load(tmp_path / "t.safetensors") == ours and ours != kl.Trace({}) and ours != 3
    near = {tap: np.array(x) for tap, x in ours.items()}
    assert kl.Trace(near) == ours  # meta does not count
    near["layers.1.out"][2, 3] = np.nextafter(near["layers.1.out"][2, 3], np.float32(9))
    assert kl.Trace(near) != ours
    x = np.zeros(2, np.float32)
    assert kl.Trace({"a": x}) != kl.Trace({"a": -x}) and kl.Trace({"a": x}) != kl.Trace({"a": x.astype(np.float64)})
    assert kl.Trace({"a": x * np.nan}) == kl.Trace({"a": x * np.nan}) != kl.Trace({"b": x * np.nan})


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


def test_experts_in_any_order_have_their_parts_and_are_opened(model, ours):
    """The error that the op adds, the page, and the first divergence are told in one order, too."""
    theirs = {n: np.array(x) for n, x in ours.items()}
    for last in ("ids", "weights"):
        theirs[f"layers.3.moe.{last}"] = theirs[f"layers.3.moe.{last}"][:, ::-1]
    rows = {r.tap: r for r in traces(theirs, ours, model=model).rows}
    assert rows["layers.3.moe.weights"].added < 1e-6 and rows["layers.3.moe.weights"].inherited < 1e-6
    theirs["layers.3.moe.weights"] = theirs["layers.3.moe.weights"] * np.float32(1.5)
    report = traces(theirs, ours)
    assert report.first.sentence.startswith("DIVERGES at layers.3.moe.weights, token 0: rms error 4.99e-01")
    assert dict(report.opened[0].facts)["cosine"] == "1"


def test_integers_of_one_axis_are_no_set():
    report = traces({"tokens.sampled": np.array([5, 9, 7])}, {"tokens.sampled": np.array([9, 5, 7])})
    assert report.first.token == 0 and report.rows[0].tokens == 2
    assert "integers [5] in place of [9]" in report.verdict


def test_what_is_not_finite_in_both_is_told(ours):
    theirs = copy(ours)
    for tap in ("layers.1.out", "layers.2.out"):
        theirs[tap][3, :5] = np.nan
    report = traces(theirs, theirs)
    assert report.ok and report.verdict.endswith("; 2 taps are not finite in both, the first layers.1.out")
    assert "same, 5 not finite" in str(report)
    other = copy(theirs)
    other["layers.3.out"][:] *= 2
    assert traces(other, theirs).verdict.startswith("DIVERGES at layers.3.out")
    assert traces(other, theirs).verdict.endswith("2 taps are not finite in both, the first layers.1.out")
    assert traces(theirs.filter("layers.2.out"), theirs).verdict.endswith("; layers.2.out is not finite in both")
    assert "not finite" not in traces(ours, ours).verdict


def test_tensors_that_numpy_cannot_read_by_itself(model, ours):
    theirs = {n: Tensor(x) for n, x in ours.items()}
    report = traces(theirs, ours)
    assert report.ok and len(report.rows) == len(ours) and report.opened
    assert traces(theirs, ours, model=model).has_parts
    spoiled = {**theirs, "layers.2.out": Tensor(ours["layers.2.out"] + 1)}
    assert traces(spoiled, ours).first.tap == "layers.2.out"


def test_no_tokens(model, ours):
    empty = model.trace(np.arange(1, 20), "*", tokens_slice=slice(0, 0))
    report = traces(empty, empty)
    assert report.ok and report.verdict == "ok: no divergence in 155 taps, in which there are no values"
    assert "layers.3.moe.ids" in report.html()


def test_errors_in_parts_need_the_rows_before(model):
    late = model.trace(np.arange(1, 20), "*", tokens_slice=slice(5, 10))
    report = traces(late, late, model=model)
    assert report.ok and not report.has_parts and "a begins at position 5: what its ops add hangs on" in report.notes[0]
