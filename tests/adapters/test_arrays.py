"""Traces from folders of .npy and .npz, by a mapping; what is refused, and in which words."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.adapters import arrays, load
from kimi_linear.diff import align, blame, traces

IDS = np.arange(5, 17)
BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def ours(model):
    return model.trace(IDS)


@pytest.fixture
def dump(tmp_path, ours):
    """A folder as somebody else's engine might leave it, and the mapping that explains it."""
    def save(name, x):
        np.save(tmp_path / name, x)

    for i in range(6):
        tap = f"layers.{i}.kda."
        if tap + "q" not in ours:
            continue
        save(f"blk{i + 1}_v.npy", ours[tap + "v_conv"].transpose(1, 0, 2)[None])
        save(f"blk{i + 1}_k.npy", ours[tap + "k"].reshape(1, len(IDS), -1))
        save(f"blk{i + 1}_g.npy", (ours[tap + "g"] / np.log(2)).astype(np.float32))
    joined = {i: np.concatenate([ours[f"layers.{i}.kda.{s}_proj"] for s in "qkv"], -1) for i in (0, 1)}
    qkv = {f"qkv_{i}": x.astype(BF16).view(np.uint16) for i, x in joined.items()}
    np.savez(tmp_path / "qkv.npz", **qkv)
    q = ours["layers.3.mla.q"]
    save("q_nope.npy", q[..., :32])
    save("q_pe.npy", q[..., 32:])
    save("ids.npy", IDS)
    taps = {"layers.{i}.kda.v_conv": {"file": "blk{i}_v.npy", "axes": "BHTK"},
            "layers.{i}.kda.k": "blk{i}_k.npy",
            "layers.{i}.kda.g": {"file": "blk{i}_g.npy", "scale": float(np.log(2))},
            "layers.3.mla.q": {"file": ["q_nope.npy", "q_pe.npy"]},
            "layers.0.kda.q_proj | layers.0.kda.k_proj | layers.0.kda.v_proj":
                {"file": "qkv.npz", "key": "qkv_0", "bits": "bfloat16"}}
    return tmp_path, {"layer_base": 1, "tokens": "ids.npy", "dtype": "float32", "taps": taps}


def test_mapping(dump, ours, model):
    folder, mapping = dump
    (folder / "mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    found = arrays.read(folder, model=model)
    assert found.tokens.tolist() == IDS.tolist() and found.meta["offsets"] == [0, len(IDS)]
    assert len(found) == 3 * 4 + 1 + 3, "four KDA layers, one split q, three joined projections"
    assert [n for n in ours if n in found] == list(found), "in the order of the dataflow"
    for name, x in found.items():
        assert x.shape == ours[name].shape and np.allclose(x.astype(np.float32), ours[name], rtol=8e-3, atol=1e-6), name
    assert traces(found, ours) and blame(model, found)
    assert load(folder, "arrays", model=model)[0].tokens.tolist() == IDS.tolist()


def test_parts_that_align_takes_out_are_no_steps(ours):
    names = [f"layers.0.kda.{part}" for part in "qk"]
    found = align(np.concatenate([ours[name] for name in names], 1), {name: ours[name] for name in names})
    assert [step.kind for step in found.steps] == ["parts"]
    with pytest.raises(ValueError, match="takes an array apart; name its taps in one entry, joined by '|', instead"):
        arrays.steps_of(found)


def test_what_align_finds_is_a_mapping(tmp_path, ours, model):
    theirs = np.ascontiguousarray(ours["layers.0.kda.q"][:, [2, 0, 3, 1]].transpose(2, 0, 1) * np.float32(-4))
    np.save(tmp_path / "x.npy", theirs)
    steps = arrays.steps_of(align(theirs, ours["layers.0.kda.q"]))
    mapping = json.loads(json.dumps({"taps": {"layers.0.kda.q": {"file": "x.npy", "steps": steps}}}))
    found = arrays.read(tmp_path, mapping, model=model)["layers.0.kda.q"]
    np.testing.assert_array_equal(found, ours["layers.0.kda.q"])


def test_our_own_names_need_no_mapping(tmp_path, ours, model):
    some = {"layers.1.mid": ours["layers.1.mid"], "logits": ours["logits"], "tokens": IDS, "extra": np.zeros(3)}
    np.savez(tmp_path / "dump.npz", **some)
    found = arrays.read(tmp_path / "dump.npz", model=model.config)
    assert list(found) == ["layers.1.mid", "logits"] and found.tokens.tolist() == IDS.tolist()
    for name, x in some.items():
        np.save(tmp_path / f"{name}.npy", x)
    assert list(arrays.read(tmp_path, model=model)) == ["layers.1.mid", "logits"]


def test_padded_batch_is_packed(tmp_path, model):
    lengths = [9, 4]
    sequences = [IDS[:9], IDS[:4]]
    want = model.trace(np.concatenate(sequences), "*.out", offsets=[0, 9, 13])
    ids = np.zeros((2, 9), int)
    for b, s in enumerate(sequences):
        ids[b, 9 - len(s):] = s
    np.save(tmp_path / "ids.npy", ids)
    for i in range(6):
        x = np.full((2, 9, 256), np.nan, np.float32)
        x[0], x[1, 5:] = want[f"layers.{i}.out"][:9], want[f"layers.{i}.out"][9:]
        np.save(tmp_path / f"out{i}.npy", x)
    mapping = {"lengths": lengths, "padding": "left", "tokens": "ids.npy", "taps": {"layers.{i}.out": "out{i}.npy"}}
    found = arrays.read(tmp_path, mapping, model=model)
    assert found.meta["offsets"] == [0, 9, 13] and found.tokens.tolist() == want.tokens.tolist()
    assert traces(found, want).rows[0].rms == 0 and traces(found, want).ok


def test_layers_without_a_file_are_told(dump, model):
    folder, mapping = dump
    (folder / "blk2_k.npy").unlink()
    found = arrays.read(folder, mapping, model=model)
    assert found.meta["left_out"] == ["layers.1.kda.k"] and "layers.0.kda.k" in found


def one(folder, entry, tap="layers.0.kda.k", **more):
    return folder, {"taps": {tap: entry}, **more}


@pytest.mark.parametrize("make, error, says", [
    (lambda f: one(f, "none.npy"), KeyError, r"none\.npy is not there"),
    (lambda f: one(f, {"file": "qkv.npz", "key": "qkv_7"}), KeyError, r"qkv\.npz has no 'qkv_7'; it has qkv_0, qkv_1"),
    (lambda f: one(f, "blk1_v.npy"), ValueError, r"blk1_v\.npy has shape \[1, 4, 12, 32\]; layers\.0\.kda\.k must be "
                                                 r"\[T, 4, 32\], or say its axes"),
    (lambda f: one(f, {"file": "blk1_v.npy", "axes": "BTHK"}), ValueError, r"as BTHK must be \[B, T, 4, 32\]"),
    (lambda f: one(f, "ids.npy"), TypeError, r"ids\.npy is int64; layers\.0\.kda\.k must be floats"),
    (lambda f: one(f, {"file": "blk1_k.npy", "axis": 1}), ValueError, "has 'axis'; it may have file, key, axes"),
    (lambda f: one(f, 7), ValueError, "is 7; it must be a file, or an object"),
    (lambda f: one(f, "blk1_k.npy", tap="layers.0.kda.kk"), ValueError,
     "'layers.0.kda.kk' is no tap of this model; near"),
    (lambda f: one(f, "blk{i}_k.npy", tap="layers.{i}.mlb.q"), ValueError, "'layers.0.mlb.q' is no tap"),
    (lambda f: one(f, "no{i}.npy", tap="layers.{i}.kda.k"), KeyError, r"no0\.npy is not there"),
    (lambda f: one(f, "blk1_k.npy", layer_base=2), ValueError, "layer_base is 2; it must be 0 or 1"),
    (lambda f: one(f, "blk1_k.npy", tokens=[1, 2]), ValueError, "tokens has 2 ids; the taps have 12 rows"),
    (lambda f: one(f, "blk1_k.npy", tokens=[0.5] * 12), TypeError, "tokens must be integers"),
    (lambda f: one(f, "blk1_k.npy", lengths=[12, 3]), ValueError,
     r"has 1 sequences of 12 tokens; lengths is \[12, 3\]"),
    (lambda f: one(f, "blk1_k.npy", lengths="12"), ValueError, "lengths is '12'; it must be a list of integers"),
    (lambda f: one(f, "blk1_k.npy", lengths=12), ValueError, "lengths is 12; it must be a list of integers"),
    (lambda f: one(f, "blk1_k.npy", tokens=[[1, 2], [3]]), ValueError, "tokens is a list that makes no array"),
    (lambda f: one(f, {"file": "blk1_k.npy", "scale": "ln 2"}), ValueError, "scale is 'ln 2'; it must be a number"),
    (lambda f: one(f, {"file": "blk1_k.npy", "axes": 3}), ValueError, "layers.0.kda.k: axes is 3; it must be letters"),
    (lambda f: one(f, {"file": ["blk1_k.npy", 3]}), ValueError, r"file is \['blk1_k.npy', 3\]; it must be a name"),
    (lambda f: one(f, "blk1_k.npy", tabs={}), ValueError, "mapping has 'tabs'; it may have taps, tokens"),
    (lambda f: (f, {"taps": []}), ValueError, "taps is .*; it must be an object"),
    (lambda f: (f, {"taps": {}}), ValueError, "the mapping names no tap"),
    (lambda f: one(f, {"file": ["q_nope.npy", "blk1_k.npy"]}), ValueError, "differ in the last axis alone"),
    (lambda f: one(f, {"file": "blk1_k.npy", "steps": [{"kind": "eval", "value": "1"}]}), ValueError,
     "a step is 'eval'"),
    (lambda f: one(f, {"file": "blk1_k.npy", "steps": [{"kind": "transpose", "value": [3, 1]}]}), ValueError,
     "the step transpose .* does not apply"),
    (lambda f: (f / "nothing", None), FileNotFoundError, "nothing is not there; it must be a folder"),
])
def test_mistakes(dump, model, make, error, says):
    path, mapping = make(dump[0])
    with pytest.raises(error, match=says):
        arrays.read(path, mapping, model=model)


def test_calls_of_other_lengths(dump, ours, model):
    folder, _ = dump
    np.save(folder / "short.npy", ours["layers.0.out"][:5])
    mapping = {"taps": {"layers.0.kda.k": "blk1_k.npy", "layers.0.out": "short.npy"}}
    with pytest.raises(ValueError, match=r"layers.0.kda.k has \[12\] tokens and layers.0.out \[5\]; "
                                         r"all must be of one call"):
        arrays.read(folder, mapping, model=model)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


def test_hostile_and_damaged_files(tmp_path, model):
    whole = tmp_path / "logits.npy"
    np.save(whole, np.zeros((4, 2048), np.float32))
    good = whole.read_bytes()

    def refused(data, says, name="logits.npy"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(kl.FormatError, match=says):
            arrays.read(tmp_path if name.endswith("npy") else tmp_path / name, model=model)

    np.save(tmp_path / "trap.npy", np.array([Trap()], object), allow_pickle=True)
    trap = (tmp_path / "trap.npy").read_bytes()
    (tmp_path / "trap.npy").unlink()
    refused(trap, r"logits\.npy: it holds Python objects \(pickle\), which are not read")
    refused(good[:-8], "it is cut short")
    refused(good[:20], "it cannot be read|cut short")
    refused(b"", "it is no .npy file")
    refused(b"PK\x03\x04 not this", "it is no .npy file")
    refused(good.replace(b"(4, 2048)", b"(9**9,2 )"), "it cannot be read")
    whole.unlink()
    np.savez(tmp_path / "x.npz", logits=np.zeros((4, 2048), np.float32))
    zipped = (tmp_path / "x.npz").read_bytes()
    refused(zipped[:-40], "it is no npz, or it is cut short", "x.npz")
    np.savez(tmp_path / "x.npz", logits=np.array([Trap()], object))
    refused((tmp_path / "x.npz").read_bytes(), r"x\.npz:logits: it holds Python objects", "x.npz")


def test_empty_folder_and_foreign_names(tmp_path, model):
    with pytest.raises(ValueError, match="has no .npy file; it must have some, or a mapping"):
        arrays.read(tmp_path, model=model)
    np.save(tmp_path / "blk.0.q.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no array has the name of a tap: there are blk.0.q; taps are embed, "):
        arrays.read(tmp_path, model=model)
    with pytest.raises(TypeError, match="model is a str; it must be a Model or a Config"):
        arrays.read(tmp_path, model="tiny")
    with pytest.raises(ValueError, match="kind is 'npy'; it must be one of hf, arrays, pt"):
        load(tmp_path, "npy", model=model)
    with pytest.raises(ValueError, match="arrays needs model="):
        load(tmp_path, "arrays")


def test_bad_mapping_files(tmp_path, model):
    for text, says in (("{", "it is not JSON"), ("[]", "it must hold an object"),
                       ('{"taps": {}, "taps": {}}', "twice")):
        (tmp_path / "mapping.json").write_text(text, encoding="utf-8")
        with pytest.raises(kl.FormatError, match=says):
            arrays.read(tmp_path, model=model)


def test_pt_without_torch_is_said(tmp_path, model, monkeypatch):
    import sys

    from kimi_linear.adapters import pt

    (tmp_path / "x.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"x\.pt is a file of torch, "
                                                   r"which is not installed here: pip install torch"):
        pt.read(tmp_path / "x.pt", model=model)


def test_one_token_of_each_sequence_is_told_from_tokens_of_one(tmp_path, model, ours):
    """[B, 1, H, K]: what is stated is taken; where nothing is, how it was read is said."""
    x = ours["layers.0.kda.k"][:5, None]
    np.save(tmp_path / "k.npy", x)
    says = (r"k\.npy has shape \[5, 1, 4, 32\] and is read as 5 tokens of one sequence; of 5 sequences of one token, "
            "the mapping must have lengths")
    with pytest.warns(UserWarning, match=says):
        found = arrays.read(*one(tmp_path, "k.npy"), model=model)
    assert found.meta["offsets"] == [0, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mapping in (one(tmp_path, "k.npy", lengths=[1] * 5)[1],
                        one(tmp_path, {"file": "k.npy", "axes": "BTHK"})[1]):
            assert arrays.read(tmp_path, mapping, model=model).meta["offsets"] == [0, 1, 2, 3, 4, 5]
        assert arrays.read(*one(tmp_path, {"file": "k.npy", "axes": "T1HK"}), model=model).meta["offsets"] == [0, 5]
        np.save(tmp_path / "k.npy", x[:, 0])
        arrays.read(*one(tmp_path, "k.npy"), model=model)
