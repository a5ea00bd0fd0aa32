"""benchmarks/run.py: what it asks before it times, what it judges, and what it counts."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import bench
from kimi_linear.diff import budgets

run, cases, models, engines = map(importlib.import_module, ("run", "cases", "models", "engines"))

ROOT = Path(__file__).parents[2]
STREAMED = [case for case in cases.CASES
            if case.work.__qualname__.startswith("streamed.") or case.op in ("route", "sample")]


def benchmark(monkeypatch, *argv):
    """Exit code of ``run.py argv``."""
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, argv)])
    return run.main()


@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.name)
def test_no_byte_is_counted_twice(case):
    """At most what goes in and comes out: ids are written by route and sample, not as much as they read."""
    (arguments,) = case.make(16, np.random.default_rng(0))
    results = run.as_tuple(getattr(kl.ops, case.op)(**arguments))
    arrays = [a for a in (*arguments.values(), *results) if isinstance(a, np.ndarray)]
    assert 0.9 * cases.size(*arrays) <= case.work(16, arguments)[1] <= cases.size(*arrays)


@pytest.mark.parametrize("op", ["delta_rule_intra", "delta_rule_inter"])
def test_triangles_are_as_large_as_their_chunk(op):
    case, rng = next(c for c in cases.CASES if c.op == op), np.random.default_rng(0)
    one, whole, both = (case.work(T, case.make(T, rng)[0])[0] for T in (1, cases.CHUNK, cases.CHUNK + 1))
    assert both == whole + one
    triangles = {"delta_rule_intra": 3 * cases.K + cases.V, "delta_rule_inter": cases.V * (6 * cases.K + 1)}
    assert one == cases.H * triangles[op]


def test_blas_is_not_looked_for_while_it_is_timed(monkeypatch):
    def opened(*args):
        raise AssertionError("the library is looked for again")

    sets = [{"x": np.ones((2, 3), np.float32), "w": np.ones((4, 3), np.float32)}]
    call = run.numpy_caller(1, sets)
    call()
    monkeypatch.setattr(bench, "open", opened, raising=False)
    call()


def test_no_contender_finds_hot_what_another_has_read(monkeypatch):
    """Between two calls with the same weights lie others, of as many bytes as no cache holds."""
    seen, n = [], 16
    monkeypatch.setattr(cases, "COLD", n * 64 * 64 * 4)
    monkeypatch.setattr(run, "roof", lambda: {"read": 1e9, "fma": 1e9})
    monkeypatch.setattr(run, "within_budget", lambda *args: None)
    monkeypatch.setattr(run, "CASES", [cases.Case("linear", "here", cases.linear(64, 64, np.float32),
                                                  cases.linear_work, sgemm=True)])
    monkeypatch.setattr(kl.ops, "linear", lambda x, w, ctx: seen.append(w.ctypes.data))
    monkeypatch.setattr(run.np, "matmul", lambda x, w: seen.append(w.ctypes.data))
    assert not benchmark(monkeypatch, "linear", "--tokens", "1", "--threads", "1,2")
    assert len(set(seen)) == n and len(seen) > 4 * n
    assert all(seen[i] not in seen[max(i - n // 2, 0):i] for i in range(len(seen)))


def test_threads_of_blas_sleep_before_the_next_contender():
    """Of run.py, in a process whose NumPy it loads; of the roofs of `bench`, here."""
    program = ("import run, time, numpy as np\n"
               "x, spun = np.ones((512, 512), np.float32), []\n"
               "for _ in range(5):\n"
               "    x @ x\n"
               "    begin = time.process_time(); time.sleep(0.02); spun.append(time.process_time() - begin)\n"
               "assert min(spun) < 0.002, spun")
    folders = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment | {"PYTHONPATH": folders})
    roofs, spun = bench.Roofs(kl.Model.tiny()), []
    for _ in range(3):
        roofs.sample("sgemm")
        begin = time.process_time()
        time.sleep(0.02)
        spun.append(time.process_time() - begin)
    assert min(spun) < 0.002


def test_a_result_that_is_not_a_number_is_not_timed(monkeypatch):
    case = next(c for c in cases.CASES if c.op == "add")
    (arguments,), found = case.make(1, np.random.default_rng(0)), {"here": kl.Context(threads=1)}
    run.within_budget(case, arguments, found)
    monkeypatch.setattr(kl.ops, "add", lambda a, b, ctx: np.full_like(a, np.nan))
    with pytest.raises(SystemExit, match="add 2304 with here is over its budget"):
        run.within_budget(case, arguments, found)


@pytest.mark.parametrize("op", ["add", *sorted(set(cases.OPS) - set(budgets.names()))])
def test_an_op_without_a_budget_is_timed_too(monkeypatch, capfd, op):
    for name, value in {"D": 256, "VOCAB": 512}.items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(run, "roof", lambda: {"read": 1e9, "fma": 1e9})
    monkeypatch.setattr(run, "SECONDS", 0.0)
    assert not benchmark(monkeypatch, op, "--tokens", "3", "--threads", "1")
    out = capfd.readouterr().out
    assert out.count("T=3") == sum(case.op == op for case in cases.CASES)


def test_values_of_blocks_that_are_off_are_not_timed(monkeypatch):
    case = next(c for c in cases.CASES if c.op == "dequantize")
    monkeypatch.setattr(cases, "D", 256)
    (arguments,), found = case.make(1, np.random.default_rng(0)), {"here": kl.Context(threads=1)}
    right = kl.ops.dequantize(**arguments)
    monkeypatch.setattr(kl.ops, "dequantize", lambda q, ctx: np.nextafter(right, np.float32(9)))
    with pytest.raises(SystemExit, match="is over its budget"):
        run.within_budget(case, arguments, found)


@pytest.mark.parametrize("argv, sentence", [
    (["add", "--isa", "sse9"], "there is no sse9; there are scalar"),
    (["add", "--json", "nowhere/a.json"], "--json is nowhere/a.json: there is no such folder"),
    (["add", "--against", "nowhere.json"], "argument --against: nowhere.json: "),
    (["--compare", "nowhere.json", "nor_here.json"], "argument --compare: nowhere.json: "),
    (["model", "--llama-python", "nowhere/python"], "there is no such program"),
    (["types", "--threads", "1,2"], "one number of threads"),
])
def test_what_cannot_be_is_told_before_anything_is_timed(monkeypatch, capsys, argv, sentence):
    monkeypatch.setattr(run, "roof", lambda: pytest.fail("something was timed"))
    with pytest.raises(SystemExit) as ended:
        benchmark(monkeypatch, *argv)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_a_file_without_cases_is_not_compared(monkeypatch, capsys, tmp_path):
    file = tmp_path / "accuracy.json"
    file.write_text(json.dumps({"revision": "a", "accuracy": []}))
    with pytest.raises(SystemExit):
        benchmark(monkeypatch, "--compare", file, file)
    assert "it must be a file that --json wrote" in capsys.readouterr().err


def test_a_model_is_timed_at_the_sizes_asked_for(monkeypatch, capfd, tmp_path):
    file = tmp_path / "model.json"
    monkeypatch.setattr(run, "roof", lambda: {"read": 1e9, "fma": 1e9})
    argv = ["model", "--threads", "1", "--depths", "8", "--prefill", "16", "--decode", "2", "--json", file]
    assert not benchmark(monkeypatch, *argv)
    (found,) = json.loads(file.read_text())["models"].values()
    assert [(row["kind"], row["depth"], row["tokens"]) for row in found["rates"]] == [("prefill", 8, 16),
                                                                                     ("decode", 8, 1)]
    assert found["activations"] == "float32" and "activations float32, cache float32" in capfd.readouterr().out


def test_an_engine_that_fails_ends_the_run_with_its_sentence(monkeypatch, tmp_path):
    def failing(path, settings):
        raise engines.EngineError("llama: open: llama.cpp does not open it")

    file = tmp_path / "a.gguf"
    file.touch()
    monkeypatch.setattr(run, "roof", lambda: {"read": 1e9, "fma": 1e9})
    monkeypatch.setattr(models, "run", failing)
    with pytest.raises(SystemExit, match="run: llama: open: llama.cpp does not open it"):
        benchmark(monkeypatch, "model", "--model", file)


def test_block_types_without_llama_cpp_is_a_sentence(monkeypatch):
    block_types = importlib.import_module("block_types")
    monkeypatch.setattr(sys, "argv", ["block_types.py"])
    monkeypatch.setattr(block_types.importlib.util, "find_spec", lambda name: None)
    assert block_types.main().startswith("block_types: llama-cpp-python is missing; `make peers`")
