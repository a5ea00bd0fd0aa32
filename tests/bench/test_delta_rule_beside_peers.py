"""benchmarks/run.py delta_rule: its parts run, and each peer that is installed computes the same rule."""

import importlib
import json
import os
import sys
import time

import numpy as np
import pytest

import kimi_linear as kl

run, delta_rule, delta_accuracy, peers = map(importlib.import_module, ("run", "delta_rule", "delta_accuracy", "peers"))


def benchmark(monkeypatch, *argv):
    """Exit code of ``run.py argv``."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, argv)])
    return run.main()


#: Peers that are installed here: the tests below are of these. `make peers` says which it must find.
HERE = [name for name in peers.PEERS if not peers.contenders(delta_rule.inputs("head", 1, 2, 16), 1, [name])[1]]


def peer(name, arguments, threads):
    calls, missing = peers.contenders(arguments, threads, [name])
    assert not missing
    return calls


# ---- the benchmark ----

def test_every_part_runs_with_our_forms_alone(monkeypatch, capfd, tmp_path):
    file = tmp_path / "result.json"
    argv = ["delta_rule", "--quick", "--peers", "none", "--threads", "1,2", "--json", file]
    assert not benchmark(monkeypatch, *argv)
    out, result = capfd.readouterr().out, json.loads(file.read_text())
    for title in ("T = 64, a gate each head", "One token, ", "256 tokens beside 64", "Half of the state subnormal",
                  "each channel beside a gate each head", "Chunks of 16 rows"):
        assert title in out
    table = result["delta_rule"]["peers"]
    assert {(row["gate"], row["tokens"], row["threads"]) for row in table} == {
        (gate, T, n) for gate in delta_rule.GATES for T in (1, 16, 64) for n in (1, 2)}
    assert all(0 < row["error"] < 5e-7 for row in table if row["error"] is not None)
    assert all(row["to_auto"] == 1 for row in table if row["name"] == "auto")
    assert all(0 < case["seconds"]["median"] for case in result["cases"].values())
    assert all(row["scratch"][0] <= row["scratch"][1] for row in result["delta_rule"]["long"])


def test_a_form_that_this_build_has_not_is_left_out_and_named(monkeypatch):
    def refuse(*args, form, **named):
        if form == "chunked":
            raise NotImplementedError("delta_rule: chunked form: not in this build")
        return known(*args, form=form, **named)

    known, said = kl.ops.delta_rule, []
    monkeypatch.setattr(kl.ops, "delta_rule", refuse)
    calls = delta_rule.ours(delta_rule.inputs("head", 3, 2, 16), kl.Context(threads=1), say=said.append)
    assert list(calls) == ["recurrent", "auto"]
    assert said[0] == "chunked 16 is left out: delta_rule: chunked form: not in this build"


@pytest.mark.parametrize("argv, sentence", [
    (["delta_rule", "--parts", "peers,nonsense"], "there is no nonsense; there are peers, decode"),
    (["delta_rule", "--peers", "nobody"], "there is no nobody; there are ggml"),
    (["linear", "--quick"], "name that op alone"),
])
def test_what_is_not_there_is_refused(monkeypatch, capfd, argv, sentence):
    with pytest.raises(SystemExit) as ended:
        benchmark(monkeypatch, *argv)
    assert ended.value.code == 2 and sentence in capfd.readouterr().err


def test_a_contender_of_another_rule_is_not_timed():
    class Wrong:
        def result(self):
            return right.result()[0] * 1.01, right.result()[1]

    class NoState(Wrong):
        def result(self):
            return right.result()[0], right.result()[1] * np.nan

    arguments = delta_rule.inputs("channel", 5, 2, 16)
    right = delta_rule.ours(arguments, kl.Context(threads=1), ["auto"])["auto"]
    assert delta_rule.judge({"auto": right}, arguments)["auto"] < 5e-7
    with pytest.raises(SystemExit, match="other is off by 1.0e-02"):
        delta_rule.judge({"auto": right, "other": Wrong()}, arguments)
    with pytest.raises(SystemExit, match="other is off by nan"):
        delta_rule.judge({"auto": right, "other": NoState()}, arguments)


def test_a_part_that_cannot_be_is_left_out_and_the_rest_runs(monkeypatch, capfd, tmp_path):
    """The rate of the memory is measured by a C program: without a compiler there is no decode."""
    def missing():
        raise peers.Missing("naive chunk is missing: set CC to a C compiler")

    file = tmp_path / "result.json"
    monkeypatch.setattr(peers.naive_chunk, "library", missing)
    argv = ["delta_rule", "--quick", "--peers", "none", "--threads", "1", "--parts", "decode,chunks", "--json", file]
    assert not benchmark(monkeypatch, *argv)
    assert "decode is left out: naive chunk is missing: set CC to a C compiler" in capfd.readouterr().out
    assert set(json.loads(file.read_text())["delta_rule"]) == {"chunks"}


def test_accuracy(monkeypatch, capfd, tmp_path):
    """Ours is as good at every gate; differences of sums lose digits to strong gates, and all of them at -inf."""
    file = tmp_path / "accuracy.json"
    assert not benchmark(monkeypatch, "delta_rule", "--accuracy", "--peers", "naive_chunk", "--json", file)
    rows = json.loads(file.read_text())["accuracy"]
    assert "10 % in -10 .. -1e4" in capfd.readouterr().out
    for row in rows:
        if row["name"] in delta_rule.FORMS:
            assert row["rms"] < 5e-7 and row["largest"] < 1e-5, row
        elif row["mix"] == "2 % -inf":
            assert np.isnan(row["rms"])
        else:
            assert row["rms"] < (1e-6 if row["mix"] == "-0.01 .. -1" else 1e-3)


# ---- the peers ----

def test_the_peers_that_were_asked_for_are_here():
    assert set(os.environ.get("KL_PEERS", "naive_chunk").split(",")) <= set(HERE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("gate", delta_rule.GATES)
@pytest.mark.parametrize("name", HERE)
def test_a_peer_computes_the_rule(name, gate, T, threads):
    """Twice: a call leaves its inputs as they were."""
    arguments = delta_rule.inputs(gate, T, 3, 64)
    want = kl.reference.delta_rule(**arguments)
    for label, call in peer(name, arguments, threads).items():
        bound = 2e-2 if label == "sglang bfloat16" else 1e-6
        for _ in range(2):
            call()
            for got, right in zip(call.result(), want, strict=True):
                assert got.shape == right.shape and delta_rule.relative_rms(got, right) < bound, label


SPINNING = [name for name in HERE if name in ("ggml", "torch_delta")]  # while they wait for work

if SPINNING:

    @pytest.mark.parametrize("name", SPINNING)
    def test_the_threads_of_a_peer_sleep_before_the_next_contender(name):
        """What the process computes while it rests, at the best of five."""
        for label, call in peer(name, delta_rule.inputs("head", 64, 8, 64), 2).items():
            spun = []
            for _ in range(5):
                call()
                time.sleep(delta_rule.REST)
                begin = time.process_time()
                time.sleep(0.02)
                spun.append(time.process_time() - begin)
            assert min(spun) < 0.002, label


if "torch_delta" in HERE:

    def test_long_sequences_go_to_torch_in_pieces(monkeypatch):
        arguments = delta_rule.inputs("channel", 150, 2, 16)
        monkeypatch.setattr(peers.torch_delta, "PIECE", 64)
        call = peer("torch_delta", arguments, 1)["torch chunked"]
        call()
        for got, right in zip(call.result(), kl.reference.delta_rule(**arguments), strict=True):
            assert delta_rule.relative_rms(got, right) < 1e-6


if "ggml" in HERE:

    def test_ggml_copies_its_state_back_where_asked():
        arguments = delta_rule.inputs("channel", 1, 3, 64)
        state = peers.aligned((3, 64, 64))
        state[...] = arguments["initial_state"].transpose(0, 2, 1)
        call = peers.ggml.Call(arguments, 1, state=state, keep=True)
        for _ in range(2):
            want = kl.reference.delta_rule(**arguments | {"initial_state": state.transpose(0, 2, 1)})
            call()
            assert delta_rule.relative_rms(call.result()[0], want[0]) < 1e-6
            assert delta_rule.relative_rms(state.transpose(0, 2, 1), want[1]) < 1e-6


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    ggml = importlib.import_module("peers.ggml")
    ggml._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    calls, missing = peers.contenders(delta_rule.inputs("head", 1, 2, 16), 1, ["ggml"])
    ggml._library.cache_clear()
    assert not calls and "`make peers` builds it" in missing[0]


def test_memory_is_read_and_written_where_it_lies():
    naive = importlib.import_module("peers.naive_chunk")
    x = np.arange(1003, dtype=np.float32)
    naive.read_write(x, 3)
    assert np.array_equal(x, np.arange(1003))
    assert peers.aligned((3, 5)).ctypes.data % 64 == 0
