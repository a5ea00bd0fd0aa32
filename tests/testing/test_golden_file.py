"""The file of an op's cases: whole, the same at every call, readable without the package, and right."""

import io
import json
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import read_safetensors

import kimi_linear as kl
from kimi_linear import dataflow
from kimi_linear.cli import main
from kimi_linear.load.safetensors import write_safetensors
from kimi_linear.testing import check_op, golden, judge_golden, spec, write_golden
from kimi_linear.testing.check import FACTOR
from kimi_linear.testing.spec import OPS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for name in ("cases.npz", "cases.safetensors"):
        write_golden("delta_rule", folder / name)
    return folder


def test_npz_has_everything_for_a_reader_of_any_language(files):
    with zipfile.ZipFile(files / "cases.npz") as members:
        index = json.loads(members.read("index.json"))
        readme = members.read("README.txt").decode()
        arrays = {n[:-4]: np.load(io.BytesIO(members.read(n))) for n in members.namelist() if n.endswith(".npy")}
    assert "S <- Diag(a) S" in readme and "CASE/bound/NAME" in readme and max(map(len, readme.splitlines())) < 120
    names = {c["name"] for c in index["cases"]}
    assert names > {c.name for c in spec("delta_rule").cases if c.steps is None} and "model-layer-0" in names
    listed = {f"{c['name']}/{n}": a for c in index["cases"] for n, a in c["arrays"].items()}
    assert listed.keys() == arrays.keys()
    for name, about in listed.items():
        assert list(arrays[name].shape) == about["shape"] and str(arrays[name].dtype) == about["dtype"]
        assert about["dtype"] == ("float64" if "/in/" not in name else "int64" if "offsets" in name else "float32")


def test_what_is_in_it_is_right_and_our_op_within_it(files):
    found = np.load(files / "cases.npz")
    for case in json.loads(found["index.json"])["cases"]:
        given = {n.partition("/")[2]: found[f"{case['name']}/{n}"] for n in case["arrays"] if n.startswith("in/")}
        given = {"g": None} | given | case["options"]
        got = kl.ops.delta_rule(**given)
        for name, a in zip(("o", "state"), got, strict=True):
            out, bound = (found[f"{case['name']}/{part}/{name}"] for part in ("out", "bound"))
            assert np.array_equal(np.isnan(a), np.isnan(out))
            assert (np.abs(a - out)[np.isfinite(out)] <= bound[np.isfinite(out)]).all(), case["name"]


def test_model_cases_have_a_trained_layers_gates(files):
    found = np.load(files / "cases.npz")
    gates = np.concatenate([found[f"model-layer-{i}/in/g"].ravel() for i in (0, 1, 2, 4)])
    assert gates.min() < -20 and gates.max() > -1e-3 and (gates <= 0).all()
    norms = np.sqrt((found["model-layer-0/in/k"].astype(float) ** 2).sum(-1))
    assert np.allclose(norms, 1, atol=1e-3)


def test_safetensors_has_the_same(files):
    found, other = np.load(files / "cases.npz"), read_safetensors(files / "cases.safetensors")
    assert set(other) | {"README.txt", "index.json"} == set(found.files)
    assert all(np.array_equal(other[n], found[n], equal_nan=True) for n in other)
    raw = (files / "cases.safetensors").read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["index"])["op"] == "delta_rule"


def test_the_same_bytes_at_every_call(files, tmp_path):
    for name in ("cases.npz", "cases.safetensors"):
        write_golden("delta_rule", tmp_path / name)
        assert (tmp_path / name).read_bytes() == (files / name).read_bytes()


IN_THE_MODEL = {node.op for node in dataflow.nodes(kl.Model.tiny().config)}  # the packaged one


@pytest.mark.parametrize("op", [op for op in OPS if op != "delta_rule"])
def test_every_op_has_a_file_and_is_within_it(op, tmp_path):
    write_golden(op, tmp_path / "cases.npz")
    found = np.load(tmp_path / "cases.npz")
    index = json.loads(found["index.json"])
    assert {c["name"] for c in index["cases"]} >= {c.name for c in spec(op).cases if c.steps is None}
    assert (op in IN_THE_MODEL) == any(c["name"].startswith("model-") for c in index["cases"])
    for case in index["cases"]:
        given = {n.partition("/")[2]: found[f"{case['name']}/{n}"] for n in case["arrays"] if n.startswith("in/")}
        got = getattr(kl.ops, op)(**given | case["options"])
        for name, a in zip(index["results"], got if isinstance(got, tuple) else (got,), strict=True):
            out, bound = (found[f"{case['name']}/{part}/{name}"] for part in ("out", "bound"))
            with np.errstate(invalid="ignore"):
                off = np.abs(np.float64(a) - out)
            assert np.array_equal(np.isnan(a), np.isnan(out)), case["name"]
            assert (off[np.isfinite(out)] <= FACTOR * bound[np.isfinite(out)]).all(), case["name"]


def test_command(capsys, tmp_path):
    path = tmp_path / "few"
    assert main(["golden", "delta_rule", "-o", str(path), "--cases", "beta", "--cases", "nan-q*"]) == 0
    out = capsys.readouterr()
    assert out.out == "" and "5 cases of delta_rule" in out.err
    assert {n.partition("/")[0] for n in np.load(path).files if "/" in n} == {
        "beta-0", "beta-1", "beta-2", "beta-mixed", "nan-q-20"}
    assert main(["golden", "delta_rule", "-o", str(path), "--format", "safetensors", "--cases", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["name"] == "plain"
    assert set(read_safetensors(path)) >= {"plain/in/q", "plain/out/o"}
    for words, message in ((["rms"], "op is 'rms'; check_op knows delta_rule"),
                           (["delta_rule", "--cases", "x"], "'x', which matches no case")):
        assert main(["golden", *words, "-o", str(tmp_path / "never")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match='format is \'zip\'; it must be "npz" or "safetensors"'):
        write_golden("delta_rule", path, format="zip")


@pytest.mark.parametrize("name", ["cases.csv", "cases.npy", "cases.NPZ", "cases.npz.gz"])
def test_another_suffix_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch, name):
    path = tmp_path / name
    monkeypatch.setattr(golden, "_cases", None)  # nothing is computed
    assert main(["golden", "delta_rule", "-o", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{path} ends with {path.suffix!r}; it must end with .npz or .safetensors, or format" in err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert main(["golden", "softmax", "-o", str(path), "--format", "npz", "--cases", "plain"]) == 0
    assert main(["golden", "softmax", "-o", str(tmp_path / "cases"), "--cases", "plain"]) == 0


# ---- the way back ----

@pytest.fixture(scope="module")
def results(files):
    """Those of our delta rule on every case: name -> array."""
    found = np.load(files / "cases.npz")
    held = {}
    for case in json.loads(found["index.json"])["cases"]:
        given = {n.partition("/")[2]: found[f"{case['name']}/{n}"] for n in case["arrays"] if n.startswith("in/")}
        got = kl.ops.delta_rule(**{"g": None} | given | case["options"])
        held |= {f"{case['name']}/out/{n}": a for n, a in zip(("o", "state"), got, strict=True)}
    return held


@pytest.mark.parametrize("write", [
    lambda path, held: np.savez(path, **held), lambda path, held: write_safetensors(path, held),
], ids=["npz", "safetensors"])
def test_results_are_judged_as_check_op_does(results, tmp_path, write):
    path = tmp_path / "results.npz"
    write(path, results | {"plain/in/q": np.zeros(3)})  # a copy of the cases is not looked at
    card, whole = judge_golden("delta_rule", path), check_op("delta_rule", kl.ops.delta_rule)
    assert card and card["model-layer-0"].status == "holds"
    assert [vars(card[c.name]) for c in spec("delta_rule").cases if c.steps is None] == [
        vars(whole[c.name]) for c in spec("delta_rule").cases if c.steps is None]
    wrong = {n: a.swapaxes(-1, -2) if n.endswith("/state") and a.shape[-1] == a.shape[-2] else a
             for n, a in results.items()}
    write(path, wrong)
    card = judge_golden("delta_rule", path)
    assert not card and card.reasons[0][0] == "the final state equals ours with K and V swapped"
    write(path, {n: np.nan_to_num(a) if n.startswith("nan-") else a for n, a in results.items()})
    assert set(judge_golden("delta_rule", path).failing) == {r.name for r in card.rows if r.name.startswith("nan-")}


def test_command_judges(results, capsys, tmp_path):
    path = tmp_path / "mine"

    def judged(*words, **changed):
        with open(path, "wb") as file:
            np.savez(file, **{n: changed.get(n, a) for n, a in results.items() if changed.get(n, a) is not None})
        code = main(["golden", "delta_rule", "--judge", str(path), *words])
        return code, *capsys.readouterr()

    code, out, err = judged()
    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("ok: all ")
    half = {"plain/out/o": results["plain/out/o"] / 2}
    code, out, err = judged(**half)
    assert (code, err) == (1, "") and "FAILS 1 of " in out and "times the bound" in out
    code, out, _ = judged("--json", "--cases", "plain", **half)
    assert code == 1 and json.loads(out)["rows"][0]["status"] == "fails"
    code, out, _ = judged(**{"plain/out/o": results["plain/out/o"][:-1]})
    assert code == 1 and re.search(r"plain: o has shape \[\d+, .*\]; it must\s+be \[", out)

    code, out, err = judged(**{"plain/out/state": None, "beta-0/out/o": None})
    assert (code, out) == (2, "") and f"{path} lacks plain/out/state, beta-0/out/o; `cases`" in err
    assert judged("--cases", "nan-q*", **{"plain/out/state": None})[0] == 0
    needs = {n: None for c in spec("delta_rule").cases if "offsets" in c.needs for n in results
             if n.startswith(f"{c.name}/")}
    assert needs and judged(**needs)[0] == 2
    code, out, _ = judged("--without", "offsets", **needs)
    assert code == 0 and "not offered: offsets" in out
    assert "without has 'offset'; it must be of" in judged("--without", "offset")[2]
    assert "plain/out/o is bool; it must be an array of numbers" in judged(**{"plain/out/o": np.zeros(3, bool)})[1]


@pytest.mark.parametrize("op", ["delta_rule", "moe", "route"])
def test_a_narrow_type(op, tmp_path):
    """Inputs are values of the type, its rounding is in the bounds, and results are judged by it alone."""
    path, results = tmp_path / "cases.npz", tmp_path / "results.npz"
    index = write_golden(op, path, dtype="bfloat16")
    the, ours = spec(op), {c["name"]: c for c in index["cases"]}
    assert index["dtype"] == "bfloat16" and len(ours) >= len([c for c in the.cases if c.steps is None])
    cases, made = np.load(path), {}
    readme = zipfile.ZipFile(path).read("README.txt").decode()
    for name, case in ours.items():
        given = {n.partition("/")[2]: cases[f"{name}/{n}"] for n in case["arrays"] if n.startswith("in/")}
        for n in set(the.narrow) & given.keys():
            assert given[n].dtype == np.float32
            assert np.array_equal(given[n].astype(ml_dtypes.bfloat16).astype(np.float32), given[n], equal_nan=True)
        whole = {n: None for n in the.required} | given | case["options"]
        y = getattr(kl.ops, op)(**whole)
        for n, a in zip(the.results, y if isinstance(y, tuple) else (y,)):
            a = a.astype(ml_dtypes.bfloat16).astype(np.float32) if n in the.narrow_results else a
            made[f"{name}/out/{n}"] = a
            with np.errstate(invalid="ignore"):
                off = np.abs(np.float64(a) - cases[f"{name}/out/{n}"])
            assert not (off > cases[f"{name}/bound/{n}"]).any(), (name, n)
    np.savez(results, **made)
    assert judge_golden(op, results, dtype="bfloat16")
    assert bool(judge_golden(op, results)) is False  # other inputs
    assert "For a kernel in bfloat16: " in readme and f"golden {op} --dtype bfloat16 --judge" in readme
    assert max(map(len, readme.splitlines())) <= 120


def test_float16_leaves_out_what_it_cannot_hold(tmp_path):
    index = write_golden("rms_norm", tmp_path / "cases.npz", dtype="float16")
    names = {c["name"] for c in index["cases"]}
    assert "plain" in names and not {"huge", "overflow"} & names
    results = tmp_path / "results.npz"
    made = {}
    with np.load(tmp_path / "cases.npz") as cases:
        for c in index["cases"]:
            x = {n: cases[f"{c['name']}/in/{n}"] for n in ("x", "w")}
            made[f"{c['name']}/out/y"] = kl.ops.rms_norm(**x, **c["options"]).astype(np.float16)
    np.savez(results, **made)
    assert judge_golden("rms_norm", results, dtype="float16")


def test_command_of_a_narrow_type(tmp_path, capsys):
    path = str(tmp_path / "cases.npz")
    assert main(["golden", "swiglu", "--dtype", "bfloat16", "-o", path]) == 0
    assert main(["golden", "decay_cumsum", "--dtype", "bfloat16", "-o", path]) == 2
    assert "decay_cumsum is computed in float32 alone" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["softmax"], "one of the arguments -o/--output --judge is required"),
    (["softmax", "--judge", "x", "-o", "y"], "not allowed with argument"),
    (["softmax", "--judge", "no/such.npz"], "no/such.npz: No such file"),
    (["softmax", "--judge", "x", "--format", "npz"], "--format is for the file to write"),
    (["softmax", "-o", "x", "--without", "offsets"], "--without is for --judge"),
])
def test_bad_usage(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["golden", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "results"
    path.write_bytes(b"PK but no zip")
    with pytest.raises(kl.FormatError, match="it is no npz, or it is cut short"):
        judge_golden("softmax", path)
    path.write_bytes(b"neither")
    with pytest.raises(kl.FormatError):
        judge_golden("softmax", path)
    np.savez(tmp_path / "x.npz", **{"plian/out/y": np.zeros(3)})
    with pytest.raises(ValueError, match="has plian/out/y, which is no result of the cases; did you mean 'plain/out/"):
        judge_golden("softmax", tmp_path / "x.npz")
