"""The file of an op's cases: whole, the same at every call, readable without the package, and right."""

import io
import json
import zipfile

import numpy as np
import pytest
from conftest import read_safetensors

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.testing import spec, specs, write_golden
from kimi_linear.testing.check import FACTOR


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


NOT_IN_THE_MODEL = ("decay_cumsum", "softmax", "rope", "attention", "sigmoid_gate")  # the packaged one


@pytest.mark.parametrize("op", [op for op in specs() if op != "delta_rule"])
def test_every_op_has_a_file_and_is_within_it(op, tmp_path):
    write_golden(op, tmp_path / "cases.npz")
    found = np.load(tmp_path / "cases.npz")
    index = json.loads(found["index.json"])
    assert {c["name"] for c in index["cases"]} >= {c.name for c in spec(op).cases if c.steps is None}
    assert (op in NOT_IN_THE_MODEL) != any(c["name"].startswith("model-") for c in index["cases"])
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
