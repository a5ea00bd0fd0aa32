"""Foreign traces that are not what they should be: a sentence each, and a comparison of what is left."""

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.diff import blame, traces
from kimi_linear.load import write_safetensors

IDS = np.arange(3, 12)


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def ours(model):
    return model.trace(IDS)


def changed(ours, tap, change):
    arrays = {n: np.array(x) for n, x in ours.items()}
    arrays[tap] = change(arrays[tap])
    return kl.Trace(arrays, ours.meta)


def test_what_cannot_be_compared(model, ours, golden_dir):
    other = kl.Model.from_pretrained(golden_dir / "kimi-a").trace(IDS)
    cases = [
        (other, r"embed has another shape: \[9, 64\] in a and \[9, 256\] in b",
         r"embed has shape \[9, 64\]; it must be"),
        (model.trace(IDS + 1), "of other tokens: token 0 is 4 in a and 3 in b", None),
        (model.trace(IDS[:4]), "a is a trace of 4 tokens and b of 9; they must be runs of the same tokens", None),
        (kl.Trace({}), "no tap is in both traces: a has none", "theirs has no tap of this model: it has none"),
        (changed(ours, "layers.2.out", lambda x: x[:3]), r"layers.2.out has other tokens: \[3, 256\] in a",
         "layers.2.out has 3 rows; the call has 9 tokens"),
    ]
    for theirs, of_traces, of_blame in cases:
        with pytest.raises(ValueError, match=of_traces):
            traces(theirs, ours)
        if of_blame:
            with pytest.raises(ValueError, match=of_blame):
                blame(model, theirs)


def test_a_batch_of_one_is_told_by_its_sizes(model):
    """A prompt and a step, each array with an axis in front; logits of the last token alone among them."""
    steps = model.new_state()
    calls = [model.trace(IDS[:8], state=steps), model.trace(IDS[8:], state=steps)]
    plain = [{tap: x for tap, x in call.items()} for call in calls]
    for logits in (slice(None), slice(-1, None)):
        theirs = [{tap: (x[logits] if tap == "logits" else x)[None] for tap, x in call.items()} for call in plain]
        found = blame(model, [kl.Trace(x, call.meta) for x, call in zip(theirs, calls)])
        assert found.ok and len(found.rows) == len(blame(model, calls).rows), str(found)
        assert "arrays are [1, T, ..]: the first axis is read as a batch of one sequence" in found.notes
    two = {tap: np.stack([x, x]) for tap, x in plain[0].items()}
    with pytest.raises(ValueError, match=r"\[2, 8, 256\]; it must be .*, the tokens first, without an axis for the"):
        blame(model, two)


def test_logits_of_the_last_token_alone_are_compared_alone(model, ours):
    theirs = changed(ours, "logits", lambda x: x[-1:])
    found = blame(model, theirs)
    assert found.ok and "logits has 1 row: those of last tokens, which are compared alone" in found.notes
    assert "logits" in [r.tap for r in found.rows] and len(found.rows) == len(blame(model, ours).rows)
    [row] = blame(model, changed(theirs, "logits", lambda x: 1.01 * x)).wrong
    assert (row.tap, row.kind, row.at) == ("logits", "unknown", blame(model, ours).columns[-1])
    flat = blame(model, changed(theirs, "logits", np.ravel))
    assert flat.ok and "logits" in [r.tap for r in flat.rows]
    assert '<svg' in found.html() and found.to_dict()["ok"]


def test_logits_of_the_last_token_without_what_they_are_made_of(model, ours):
    few = {tap: x for tap, x in ours.items() if tap.startswith("layers.0.")} | {"logits": ours["logits"][-1:]}
    found = blame(model, kl.Trace(few, ours.meta))
    [(tap, reason)] = [s for s in found.skipped if s[0] == "logits"]
    assert "rows of the last tokens alone, and the trace lacks" in reason


@pytest.mark.parametrize("some", [{}, {"embed", "norm", "logits"}])
def test_a_trace_of_unknown_names_is_refused(model, ours, some, tmp_path, capsys):
    theirs = {tap if tap in some else tap.replace("layers.", "layer_"): x for tap, x in ours.items()
              if tap in some or tap.startswith("layers.")}
    says = ("no tap of a layer of this model, and nothing can be judged: 152 of its 155 names are none of ours, as "
            "'layer_0.attn_norm'; ours are as 'layers.0.attn_norm'") if some else "theirs has no tap of this model"
    with pytest.raises(ValueError, match=says):
        blame(model, theirs)
    kl.Trace(theirs).save(tmp_path / "x.safetensors")
    assert main(["blame", "tiny", str(tmp_path / "x.safetensors")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("tap, dtype, must", [("layers.2.kda.g", np.int64, "floats"), ("layers.2.out", bool, "floats"),
                                              ("layers.2.moe.ids", np.float32, "integers")])
def test_arrays_of_the_wrong_type_are_left_out(model, ours, tap, dtype, must):
    theirs = changed(ours, tap, lambda x: x.astype(dtype))
    name, was = np.dtype(dtype).name, ours[tap].dtype.name
    report = traces(theirs, ours)
    assert report.ok and f"{tap}: {name} in a and {was} in b; left out" in report.notes
    assert len(report.rows) == len(ours) - 1
    found = blame(model, theirs)
    assert found.ok and (tap, f"it is {name}; it must be {must}") in found.skipped, str(found)
    with pytest.raises(ValueError, match=f"no tap can be compared: {tap}"):
        traces({tap: theirs[tap]}, ours)


def test_nan_extra_and_missing_taps(model, ours):
    theirs = changed(ours, "layers.2.kda.g", lambda x: x * np.nan)
    assert traces(theirs, ours).verdict.startswith("DIVERGES at layers.2.kda.g, token 0: a is not finite there")
    assert blame(model, theirs).wrong[0].tap == "layers.2.kda.g"
    extra = kl.Trace({**{n: ours[n] for n in ours if n != "norm"}, "layers.99.kda.q": np.zeros(3)}, ours.meta)
    report = traces(extra, ours)
    assert report.ok and report.only_a == ["layers.99.kda.q"] and report.only_b == ["norm"]
    assert blame(model, extra).ok


def test_what_is_no_trace_and_how_to_get_one(model, ours):
    for x, says in (("a.safetensors", r"Trace\.load\(path\)"), ([ours], "one of the list")):
        with pytest.raises(TypeError, match=says):
            traces(x, ours)
    with pytest.raises(TypeError, match=r"theirs has a str; .* kl\.Trace\.load\(path\) reads a file"):
        blame(model, "a.safetensors")


def test_names_of_another_kind_or_prefix(ours, model, tmp_path):
    file = tmp_path / "x.safetensors"
    kl.Trace({f"long/{name}": x for name, x in ours.items()}).save(file)
    with pytest.raises(ValueError, match=r"with prefix='' none of its 155 names is a module .* it holds long/embed, "):
        kl.Trace.load(file, names="hf", config=model.config)
    with pytest.raises(ValueError, match=r"none of its 155 names begins with prefix='short/'; it holds "):
        kl.Trace.load(file, prefix="short/")


def test_damaged_files(ours, tmp_path):
    file = tmp_path / "x.safetensors"
    ours.save(file)
    whole = file.read_bytes()
    for data, says in ((whole[:-100], "it is cut short or damaged"), (whole[:50], "promise a header"),
                       (b"", "it has 0 bytes; a safetensors file has at least 8"), (b"hello there", "promise a h")):
        file.write_bytes(data)
        with pytest.raises(kl.FormatError, match=says):
            kl.Trace.load(file)


@pytest.mark.parametrize("key, text, words", [
    ("order", "[1]", r"order is \[1\]; it must be a list of the file's names"),
    ("order", '[["a"]]', r"order is \[\['a'\]\]; it must be"), ("order", "5", "order is 5; it must be"),
    ("order", '["embed", "x"]', "order has the name 'x' and no array"),
    ("order", '["embed", "embed"]', "order has the name 'embed' twice"),
    ("tokens", '{"a": 1}', r"tokens is \{'a': 1\}; it must be a list of integers"),
    ("tokens", "[[1], [2, 3]]", "tokens is .*; it must be a list of integers"),
    ("position", "[]", "position has 0 numbers; it must have 1, one for each sequence"),
    ("position", "[1e400]", r"position is \[inf\]; it must be a list of integers"),
    ("position", f"[{2**70}]", "position is .*; it must be a list of integers"),
    ("offsets", "null", "offsets is None; it must be"), ("offsets", "[]", "offsets is .*; it must begin with 0"),
    ("offsets", "[1, 3]", "offsets is .*; it must begin with 0 and not fall"),
    ("offsets", "[0, 9, 3]", "offsets is .*; it must begin with 0 and not fall"),
])
def test_metadata_that_are_none(model, ours, tmp_path, key, text, words):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"embed": np.array(ours["embed"])}, {"format": "kimi_linear trace 1", key: text})
    with pytest.raises(kl.FormatError, match=words) as caught:
        kl.Trace.load(file)
    assert str(file) in str(caught.value)


def test_positions_of_other_sequences(model, ours):
    with pytest.raises(ValueError, match="call 0 has 0 positions; it must have 1, one for each sequence"):
        blame(model, kl.Trace(dict(ours), {**ours.meta, "position": []}))


def test_what_is_no_trace_is_named(model, ours):
    with pytest.raises(TypeError, match="arrays is a list; it must be a mapping from tap to array"):
        kl.Trace([1])
    with pytest.raises(TypeError, match="embed is a object; it must be an array of numbers"):
        kl.Trace({"embed": object()})
    assert kl.Trace({"embed": [[1.0, 2.0]]})["embed"].shape == (1, 2)
    with pytest.raises(TypeError, match="model is a Trace; it must be a Model or a ReferenceModel"):
        blame(ours, model)


def test_logits_alone_judge_nothing():
    model = kl.Model.tiny()
    ids = model.tokenizer.encode("In the beginning God created the heaven and the earth. And the earth was")
    (theirs,) = kl.faults.run(model, ids, plant={"layers.2.kda.o": "decay_after_update"})
    found = blame(model, kl.Trace({"logits": theirs["logits"]}, theirs.meta))
    assert not found and found.verdict.startswith("NOT JUDGED") and "more taps are needed" in str(found)


def test_our_names_are_not_read_as_those_of_transformers(tmp_path):
    model = kl.Model.tiny()
    model.trace([5, 6, 7]).save(tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="of its 155 names are our taps, 1 are modules of transformers"):
        kl.Trace.load(tmp_path / "ours.safetensors", names="hf", config=model.config)


def test_names_that_are_none_of_ours_are_told():
    model = kl.Model.tiny()
    trace = model.trace([5, 6, 7])
    found = blame(model, kl.Trace({k.replace("layers.1.", "model.layer1."): x for k, x in trace.items()}, trace.meta))
    assert "names of the trace are none of ours, as 'model.layer1.attn_norm'" in str(found)


def test_one_token_of_each_sequence_is_told_from_tokens_of_one(model, ours):
    """[B, 1, H, K] without offsets is read as B tokens, and `blame` says so; with offsets as they say."""
    theirs = {n: np.array(x)[:, None] for n, x in ours.items()}
    found = blame(model, theirs, tokens=IDS)
    says = [note for note in found.notes if "tokens of one sequence" in note]
    assert says == ["embed of call 0 has shape [9, 1, 256] and is read as 9 tokens of one sequence; of 9 sequences of "
                    "one token, the trace's metadata must have offsets, 0 to 9"], found.notes
    for meta in (ours.meta, ours.meta | {"offsets": list(range(10)), "position": [0] * 9}):
        assert not any("of one sequence" in note for note in blame(model, kl.Trace(theirs, meta)).notes)
