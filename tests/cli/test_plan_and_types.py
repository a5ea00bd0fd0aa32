"""``kimi-linear plan`` of a GGUF, and the types that generate, chat and bench choose and print."""

import dataclasses
import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import gguf_files
import pytest

import kimi_linear as kl
from kimi_linear import _engine, bench, context
from kimi_linear._control_groups import processors_allowed
from kimi_linear.cli import _common, main
from kimi_linear.config import Config

MiB = 1 << 20
ROOT = Path(__file__).parents[2]
planning = importlib.import_module("kimi_linear.plan")  # kl.plan is its function


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_dir):
    folder = tmp_path_factory.mktemp("gguf")
    return {dtype: str(gguf_files.write(folder / f"{dtype}.gguf", tiny_dir, dtype)) for dtype in ("BF16", "Q8_0")}


def run(capfd, *argv):
    code = main(list(argv))
    return code, *capfd.readouterr()


def plan_of(capfd, *argv):
    code, out, _ = run(capfd, "plan", *argv, "--json")
    assert code == 0
    return json.loads(out)


# ---- plan ----

def test_bytes_of_a_step(files, capfd):
    p = plan_of(capfd, files["Q8_0"], "--context", "1000", "--cache", "float16")
    model = kl.Model.from_pretrained(files["Q8_0"])
    assert p["active"] == round(bench.active_bytes(model))
    assert p["step"] == p["active"] + 2 * p["state_page"] + 2 * p["state_fixed"]
    assert p["experts"] == sum(t.nbytes for name, t in model._tensors.items() if ".experts." in name)
    assert p["routed"] == 2 / 8 and p["weights"] > p["experts"] > 0
    assert p["tokens_per_second"] == pytest.approx(p["read_rate"] / p["step"])
    assert p["typed"]["Q8_0"] == p["weights"] < p["typed"]["BF16"]
    assert list(p["typed"].values()) == sorted(p["typed"].values(), reverse=True)


@pytest.mark.parametrize("cache", ["float32", "float16", "q8_0"])
def test_a_step_behind_an_indexer_reads_what_it_chooses(golden_dir, cache):
    """And the keys of pools; as many latents as there are where it chooses all."""
    config = Config.from_file(golden_dir / "glm-a" / "config.json")
    config = replace(config, index_topk=64, kv_rank=64, index_dim=32)
    layers = sum(layer.mixer == "mla" for layer in config.layers)
    value = {"float32": 4, "float16": 2, "q8_0": 34 / 32}[cache]
    pools = 32 // config.index_pool * (value if cache != "q8_0" else 2)  # a position's part, of no whole block
    chosen = 64 + config.index_pool - 1
    for n, rows in ((10, 512), (512, 512), (513, 1024), (100_000, 100_352)):
        p = kl.plan(config, context=n, cache=cache)
        read = p.step - p.active - 2 * p.state_fixed
        assert read == layers * (rows * pools + chosen * (64 * value + config.rope_dim * 2)), n
        assert p.unread == rows // 512 * p.state_page - read
    all_of_it = kl.plan(replace(config, index_topk=1024), context=512, cache=cache)
    assert all_of_it.unread == layers * 512 * 2 * 32 * value


def test_nothing_is_measured_where_not_wanted(files, capfd, monkeypatch):
    monkeypatch.setattr(planning, "read_rate", lambda: pytest.fail("measured"))
    p = plan_of(capfd, files["Q8_0"], "--no-measure")
    assert p["read_rate"] is None and p["tokens_per_second"] is None
    out = run(capfd, "plan", files["Q8_0"], "--no-measure")[1]
    assert "Decoding a token at 4,096 reads" in out and "tokens/s" not in out


def test_kl_plan_takes_a_file(files):
    by_model = kl.Model.from_pretrained(files["Q8_0"]).plan(context=700, sequences=2, cache="q8_0", keep=1)
    assert kl.plan(files["Q8_0"], context=700, sequences=2, cache="q8_0", keep=1) == by_model
    config = kl.Model.tiny().config
    assert kl.plan(config).typed == kl.plan(config, dtype="BF16").typed
    assert kl.plan(config, dtype="F32").active == 2 * kl.plan(config).active
    with pytest.raises(ValueError, match="dtype is 'F32'; it is for a config alone"):
        kl.plan(files["Q8_0"], dtype="F32")


def test_kl_plan_takes_a_config_in_any_form(tmp_path):
    config = kl.Model.tiny().config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert kl.plan(config.to_dict()) == kl.plan(str(path)) == kl.plan(path) == kl.plan(config)
    assert kl.plan(path, dtype="F32") == kl.plan(config, dtype="F32")
    for source, kind in ((None, "NoneType"), (3, "int"), ([], "list")):
        with pytest.raises(TypeError, match=f"source is a {kind}; it must be a path, a Config, or the content of a"):
            kl.plan(source)


def with_memory(monkeypatch, n_bytes):
    monkeypatch.setattr(planning, "available_memory", lambda: n_bytes)
    monkeypatch.setattr(planning, "read_rate", lambda: 10e9)


def test_free_memory_of_macos(monkeypatch):
    text = ("Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
            "Pages free:                               29096.\nPages active:                            340063.\n"
            "Pages inactive:                          337183.\nPages speculative:                         2013.\n")
    assert planning._free_by_vm_stat(text) == 16384 * (29096 + 337183 + 2013)
    for broken in ("", text.replace("16384 ", ""), text.replace("Pages inactive", "Pages idle")):
        assert planning._free_by_vm_stat(broken) is None
    monkeypatch.setattr(planning.sys, "platform", "darwin")
    assert planning.asked_of_macos("echo", "as there") == "as there"
    assert planning.asked_of_macos("no-such-command") == ""


def a_system(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  1000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
GROUPS = {
    "none": ({}, 1024000),
    "no limit": ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n", V2 + "memory.current": "5\n"}, 1024000),
    "version 2": ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "900\n", V2 + "memory.current": "500\n",
                   V2 + "memory.stat": "anon 7\ninactive_file 30\nactive_file 4\n"}, 430),
    "more than the machine has": ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "9000000\n",
                                   V2 + "memory.current": "5\n"}, 1024000),
    "beyond the limit": ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "5\n", V2 + "memory.current": "9\n"}, 0),
    "a group around": ({"proc/self/cgroup": "0::/a/b\n", V2 + "a/memory.max": "900\n", V2 + "a/memory.current": "5\n",
                        V2 + "a/b/memory.max": "max\n", V2 + "a/b/memory.current": "5\n"}, 895),
    "version 1": ({"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/ab\n0::/\n",
                   V1 + "memory.limit_in_bytes": "900\n", V1 + "memory.usage_in_bytes": "500\n",
                   V1 + "memory.stat": "inactive_file 1\ntotal_inactive_file 30\n"}, 430),
    "damaged": ({"proc/self/cgroup": "0::/\nx\n", V2 + "memory.max": "\n", V2 + "memory.current": "?"}, 1024000),
}


@pytest.mark.parametrize("name", GROUPS)
def test_free_memory_below_the_limits_of_a_container(tmp_path, name):
    files, wanted = GROUPS[name]
    assert planning.available_memory(a_system(tmp_path, files)) == wanted


C2, C1 = "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_"
QUOTAS = {
    "none": ({}, None),
    "no limit": ({"proc/self/cgroup": "0::/\n", C2: "max 100000\n"}, None),
    "version 2": ({"proc/self/cgroup": "0::/\n", C2: "250000 100000\n"}, 3),
    "less than one": ({"proc/self/cgroup": "0::/\n", C2: "1000 100000\n"}, 1),
    "a group around": ({"proc/self/cgroup": "0::/a/b\n", V2 + "a/cpu.max": "200000 100000\n",
                        V2 + "a/b/cpu.max": "800000 100000\n"}, 2),
    "version 1": ({"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n", C1 + "quota_us": "400000\n",
                   C1 + "period_us": "100000\n"}, 4),
    "version 1, no limit": ({"proc/self/cgroup": "5:cpu:/docker/ab\n", C1 + "quota_us": "-1\n",
                             C1 + "period_us": "100000\n"}, None),
    "damaged": ({"proc/self/cgroup": "0::/\nx\n", C2: "7 0\n"}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_processors_of_a_container(tmp_path, name):
    files, wanted = QUOTAS[name]
    assert processors_allowed(a_system(tmp_path, files)) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_threads_are_no_more_than_a_container_has_time_of(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    for allowed, wanted in ((None, 0), (3, 3), (8, 0), (9, 0)):
        monkeypatch.setattr(context, "processors_allowed", lambda n=allowed: n)
        assert context._default_threads() == wanted
    with kl.threads(5):
        assert context._default_threads() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert context._default_threads() == 6


def test_free_memory_that_nobody_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "asked_of_macos", lambda *command: "")
    assert planning.available_memory(tmp_path) is None


def test_a_folder_that_has_no_weights_yet(files, capfd, tmp_path):
    config = {**kl.Model.tiny().config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = []
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(path), "--no-measure", "--json", "--dtype", "F16"]) == 0
        printed.append(json.loads(capfd.readouterr().out))
    assert printed[0]["model"] == "config.json as F16" and printed[0]["weights"] == printed[1]["weights"]


def test_what_fits(files, capfd, monkeypatch):
    p = kl.Model.from_pretrained(files["BF16"], activations="auto").plan()  # as the command line computes
    with_memory(monkeypatch, p.total)
    facts = plan_of(capfd, files["BF16"])
    assert facts["larger_than_memory"] is False and facts["disk_bytes_per_token"] == 0
    assert facts["largest_context"] == 4096 and facts["tokens_per_second"] == pytest.approx(10e9 / p.step)
    out = run(capfd, "plan", files["BF16"])[1]
    assert "It fits" in out and "enough for 4,096 tokens" in out and "tokens/s at most (estimate)" in out


def test_a_file_larger_than_memory(files, capfd, monkeypatch):
    p = kl.Model.from_pretrained(files["BF16"], activations="auto").plan()
    free = p.total - p.experts // 2
    with_memory(monkeypatch, free)
    facts = plan_of(capfd, files["BF16"])
    assert facts["larger_than_memory"] is True and facts["tokens_per_second"] is None
    assert facts["disk_bytes_per_token"] == pytest.approx(p.routed * (p.experts // 2), abs=1)
    assert facts["largest_context"] == p.largest_context(free, p.weights - p.experts) > 4096
    assert facts["fitting_type"] == "Q8_0"
    out = run(capfd, "plan", files["BF16"])[1]
    assert "Experts are read from disk as they are used" in out and "(estimate)" in out
    assert "Weights in Q8_0 would fit" in out


def test_states_too_large_are_said_with_what_would_fit(capfd, monkeypatch):
    with_memory(monkeypatch, 100 * MiB)
    out = run(capfd, "plan", "tiny", "--context", "10000000")[1]
    model = kl.Model.from_pretrained("tiny", activations="auto")  # as the command takes it
    room = model.plan(context=10_000_000).largest_context(100 * MiB)
    assert f"there is room for {room:,} tokens a sequence" in " ".join(out.split()) and "No type would fit" not in out


def test_a_machine_too_small(files, capfd, monkeypatch):
    with_memory(monkeypatch, 7 * MiB)
    facts = plan_of(capfd, files["BF16"])
    assert facts["disk_bytes_per_token"] is None and facts["fitting_type"] is None
    out = run(capfd, "plan", files["BF16"])[1]
    assert "It does not fit" in out and "No type would fit" in out
    with_memory(monkeypatch, None)
    assert "does not say how much memory is free" in run(capfd, "plan", files["BF16"])[1]


def test_sizes_are_in_units_of_1024_and_rates_in_GB_a_second(files, capfd, monkeypatch):
    """In what the commands print, and in every text of the sources and the docs."""
    parts = ("kimi_linear/**/*.py", "benchmarks/*.py", "csrc/**/*.[ch]", "csrc/hip/*.hip", "docs/*.md", "*.md",
             "Makefile")
    for source in (path for part in parts for path in ROOT.glob(part)):
        text = source.read_text(encoding="utf-8")
        assert not re.findall(r"(?<![A-Za-z])(?!GB/s\b)(?:[kKMGT]B|[KMGT]iB/s)\b", text), source
    for free in (None, 7 * MiB, 1 << 40):
        with_memory(monkeypatch, free)
        out = run(capfd, "plan", files["BF16"])[1]
        assert re.search(r"Decoding a token at 4,096 reads \d[\d.]* MiB: weights ", out), out
        assert not re.search(r"\d (?!B\b|[KMGT]iB\b|GB/s)\w?B\b", out), out
    assert "Memory is read at 10.0 GB/s here" in out


def test_a_bar_of_bytes_has_no_rate(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with _common.progress(3 << 30, "to hip", unit="B") as bar:
        bar.update(1 << 30)
        bar.refresh()
    err = capsys.readouterr().err
    assert "1.00G/3.00GiB [" in err and "/s" not in err


def test_a_plan_without_experts_reads_nothing_from_disk():
    p = dataclasses.replace(kl.Model.tiny().plan(), experts=0, routed=0.0)
    assert p.from_disk(p.total) == 0 and p.from_disk(p.total - 1) is None


# ---- types ----

def test_choices_are_those_of_the_library():
    assert tuple(_engine.CACHE_TYPES) == _common.CACHES


def test_auto_is_the_fast_one_for_the_weights(files):
    assert kl.Model.from_pretrained(files["Q8_0"], activations="auto").activations == "int8"
    assert kl.Model.from_pretrained(files["BF16"], activations="auto").activations == "bfloat16"
    assert kl.Model.tiny(activations="auto").activations == "bfloat16"
    assert kl.Model.tiny().activations == "float32"
    assert kl.Model.from_pretrained(files["Q8_0"]).activations == "float32"


@pytest.mark.parametrize("dtype, options, types", [
    ("Q8_0", [], "activations int8, cache float16"),
    ("BF16", [], "activations bfloat16, cache float16"),
    ("BF16", ["--activations", "float32"], "activations float32, cache float16"),
    ("Q8_0", ["--activations", "float32", "--cache", "q8_0"], "activations float32, cache q8_0"),
    ("BF16", ["--activations", "int8", "--cache", "float32"], "activations int8, cache float32"),
])
def test_generate_and_bench_print_their_types(files, capfd, dtype, options, types):
    code, _, err = run(capfd, "generate", files[dtype], "--ids", "5,6,7", "--max-new-tokens", "2", *options)
    assert code == 0 and types in err
    small = ["--prefill", "4", "--decode", "2", "--depths", "0", "--repeat", "1"]
    code, out, _ = run(capfd, "bench", files[dtype], *small, *options)
    assert code == 0 and out.startswith(f"{dtype}.gguf: {types}\n")


def test_generate_computes_in_them(files, capfd):
    argv = ["generate", files["Q8_0"], "--ids", "5,6,7", "--max-new-tokens", "4", "--json"]
    facts = json.loads(run(capfd, *argv, "--cache", "q8_0")[1])
    assert (facts["activations"], facts["cache"]) == ("int8", "q8_0")
    model = kl.Model.from_pretrained(files["Q8_0"], activations="int8", cache="q8_0")
    want = model.generate([5, 6, 7], max_new_tokens=4, logprobs=1).run()
    assert facts["tokens"] == want.tokens and facts["logprobs"] == want.logprobs


def test_chat_says_its_types(capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "/quit")
    code, _, err = run(capfd, "chat", "--cache", "q8_0")
    assert code == 0 and "activations bfloat16, cache q8_0]" in err


def test_perplexity_is_exact_unless_told(files, capfd, tmp_path):
    (tmp_path / "text").write_text("And it came to pass, when he had made an end of speaking.", encoding="utf-8")
    argv = ["perplexity", files["Q8_0"], "--text", str(tmp_path / "text"), "--json"]
    exact, fast = (json.loads(run(capfd, *argv, *more)[1]) for more in ([], ["--activations", "int8"]))
    assert (exact["activations"], exact["cache"], fast["activations"]) == ("float32", "float32", "int8")
    assert 0 < abs(exact["nll_per_token"] - fast["nll_per_token"]) < 0.05
