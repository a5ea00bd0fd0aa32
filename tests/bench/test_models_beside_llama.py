"""benchmarks/run.py model: engines in processes of their own take turns, and llama.cpp is one where it is installed."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import kimi_linear as kl

run, models, engines, make_model = map(importlib.import_module, ("run", "models", "engines", "make_model"))

TINY = Path(kl.__file__).parent / "data" / "tiny"
READS_GGUF = importlib.util.find_spec("kimi_linear.load.gguf")
SMALL = dict(threads=1, activations=("float32",), depths=(0, 8), prefill=8, decode=3, samples=2)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A file of two layers that both engines run."""
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    argv, sys.argv = sys.argv, ["make_model.py", "--shape", "small", "--type", "Q8_0", "-o", str(path)]
    try:
        assert make_model.main() == 0
    finally:
        sys.argv = argv
    return path


def check_rates(found, engines, settings):
    keys = [(row["kind"], row["depth"], row["engine"]) for row in found["rates"]]
    assert keys == [(kind, depth, name) for depth in settings.depths for kind in ("prefill", "decode")
                    for name in engines]
    for row in found["rates"]:
        assert row["tokens_per_second"] > 0 and row["seconds"]["n"] == settings.samples
        assert all(row[of] > 0 for of in (("of_read",) if row["kind"] == "decode" else ("of_fma", "of_int8")))


# ---- ours ----

@pytest.mark.parametrize("apart", [False, True])
def test_ours_alone(capfd, apart):
    settings = models.Settings(**SMALL, peer=False, apart=apart, profile=True)
    found = models.run(TINY, settings)
    check_rates(found, ["ours"], settings)
    (engine,) = found["engines"]
    assert len(engine["opening"]) == len(engine["first"]) == (settings.samples if apart else 1)
    assert 0 < engine["opening"][0] < engine["first"][0]
    assert {"linear", "moe", "delta_rule", "(rest)"} <= {row["op"] for row in engine["ops"]["decode"]}
    calls = {kind: next(row["calls"] for row in rows if row["op"] == "delta_rule")
             for kind, rows in engine["ops"].items()}
    assert calls == {"prefill": 4, "decode": 4}
    out = capfd.readouterr().out
    assert "of read" in out and "of int8" in out and "ours, prefill:" in out
    assert ("one after the other" if apart else "together") in out


def test_several_of_ours_take_turns():
    isas = tuple(kl.isa_list()[:2])
    settings = models.Settings(**SMALL | {"samples": 1, "depths": (0,)}, isas=isas, peer=False)
    check_rates(models.run(TINY, settings), [f"ours {isa} float32" for isa in isas], settings)


def test_a_state_that_is_brought_back_gives_the_same_logits():
    with engines.Process("ours") as ours:
        ours.call("open", path=str(TINY), threads=1, context=64, activations="float32")
        ours.call("run", tokens=[1, 2, 3], step=3)
        assert ours.call("keep", name="3") > 0
        found = []
        for _ in range(2):
            ours.call("restore", name="3")
            assert len(ours.call("run", tokens=[4, 5], step=1)) == 2
            found.append(ours.logits())
        ours.call("empty")
        ours.call("run", tokens=[1, 2, 3, 4, 5], step=5)
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], ours.logits())


def test_the_command(monkeypatch, capfd, tmp_path, gguf_file):
    file, seen = tmp_path / "a.json", []
    monkeypatch.setattr(models, "run", lambda path, settings: seen.append((path, settings)) or {
        "file": "small.gguf", "rates": [{"kind": "decode", "depth": 0, "engine": "ours", "seconds": {"median": 1.0}}]})
    monkeypatch.setattr(run, "roof", lambda: {"read": 1e9, "fma": 1e9})
    monkeypatch.setattr(sys, "argv", ["run.py", "model", "--model", str(gguf_file), "--depths", "16,0", "--threads",
                                      "1", "--activations", "int8,float32", "--apart", "--json", str(file)])
    assert run.main() == 0
    ((path, settings),) = seen
    assert path == str(gguf_file) and settings.depths == (0, 16) and settings.apart and settings.peer
    assert settings.activations == ("int8", "float32") and settings.threads == 1
    assert list(json.loads(file.read_text())["cases"]) == ["model small.gguf decode at 0 ours 1"]


# ---- what goes wrong ----

def test_what_fails_in_an_engine_is_said(tmp_path):
    with engines.Process("ours") as ours:
        with pytest.raises(engines.EngineError, match="ours: open: .*nowhere"):
            ours.call("open", path=str(tmp_path / "nowhere"), threads=1, context=8)
        ours.process.kill()
        with pytest.raises(engines.EngineError, match="its process ended with -9 in about"):
            ours.call("about")


def test_another_model_is_not_timed():
    session = models.Session.__new__(models.Session)
    session.settings, session.off = models.Settings(), {}
    theirs = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    session.judge(0, {"ours": 0.9 * theirs, models.LLAMA: theirs})
    assert abs(session.off["ours at 0"] - 0.1) < 0.01
    for other in (theirs[::-1], theirs * np.nan):
        with pytest.raises(SystemExit, match="not of the same model"):
            session.judge(0, {"ours": other, models.LLAMA: theirs})


def test_a_peer_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(models, "llama_python", lambda: None)
    assert [c.name for c in models.contenders(models.Settings(threads=1))] == ["ours"]
    assert "`make peers` makes an environment" in capsys.readouterr().out


def test_when_there_is_no_room_for_both(monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    both = models.contenders(models.Settings(threads=1, python="somewhere"))
    assert [c.name for c in both] == ["ours", models.LLAMA]
    for free, apart in ((2100, True), (2300, False), (None, False)):
        monkeypatch.setattr(models, "available_memory", lambda free=free: free)
        assert models.crowded(path, both) is apart and not models.crowded(path, both[:1])


# ---- llama.cpp ----

if engines.llama_python():

    def test_llama_brings_its_state_back(gguf_file):
        with engines.Process("llama", engines.llama_python()) as llama:
            assert 0 < llama.call("open", path=str(gguf_file), threads=1, context=300)
            assert "llama-cpp-python" in llama.call("about")
            llama.call("run", tokens=list(range(40)), step=512)
            assert llama.call("keep", name="40") > 2 * 128 * 128 * 4
            found = []
            for _ in range(2):
                llama.call("restore", name="40")
                llama.call("run", tokens=[7, 8], step=1)
                found.append(llama.logits())
            assert found[0].shape == (1024,) and np.isfinite(found[0]).all() and 0.5 < found[0].std() < 5
            assert np.array_equal(found[0], found[1])
            assert llama.call("memory")["measured"] > 0
            with pytest.raises(engines.EngineError, match="does not open"):
                llama.call("open", path="nowhere", threads=1, context=300)


if engines.llama_python() and READS_GGUF:

    @pytest.mark.parametrize("apart", [False, True])
    def test_ours_beside_llama(gguf_file, capfd, apart):
        settings = models.Settings(**SMALL, apart=apart)
        found = models.run(gguf_file, settings)
        check_rates(found, ["ours", models.LLAMA], settings)
        assert all(row["ratio"] > 0 for row in found["rates"] if row["engine"] == "ours")
        assert set(found["off"]) == {"ours at 0", "ours at 8"} and max(found["off"].values()) < 0.1
