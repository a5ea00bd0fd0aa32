"""make gpu-check: what it finds, its steps on the host build, its report; benchmarks/run.py hip."""

import importlib.util
import json
import os
import subprocess
import sys

import hip_build
import pytest

pytestmark = hip_build.host_build_only

TOOL = hip_build.ROOT / "tools" / "gpu_check.py"


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(path, text):
    """An executable that prints `text`."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)


def test_gpu_check_runs_all_of_its_steps_on_the_host_build(tmp_path):
    """The small version: build, open, a few tests, the benchmark, and what the report says of them."""
    hip_build.built()
    report = tmp_path / "gpu-check.txt"
    done = subprocess.run([sys.executable, TOOL, "--device", "hip-host", "--quick", "--report", report],
                          capture_output=True, text=True, timeout=500)
    text = report.read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert text in done.stdout and str(report) in done.stdout
    for line in (r"gpu-check of ", "device    hip-host: none: the host build", "compiler  ", "-- tests: done",
                 "this is the host build", "0 failed, 0 skipped", "result    all passed"):
        assert line in text, line
    for table in ("delta_rule, 1 heads", "linear 64->96 bfloat16", "swiglu 9216", "model tiny"):
        assert table in text, table


def test_gpu_check_says_what_failed(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "benchmark", lambda *given: 3)
    monkeypatch.setattr(gpu_check, "QUICK_TESTS", ["tests/hip/no_such_file.py"])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "hip-host", "--quick", "--report",
                                      str(tmp_path / "report")])
    assert gpu_check.main() == 1
    assert "result    FAILED: tests, speed" in capsys.readouterr().out


def test_gpu_check_without_a_gpu_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True,
                          env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu-check: there is no GPU here with its compiler: AMD needs hipcc and /dev/kfd, NV")


def test_gpu_check_finds_an_amd_gpu(gpu_check, tmp_path, monkeypatch):
    """By what the kernel driver says; node 0 is the processor."""
    command(tmp_path / "hipcc", "HIP version: 6.2.41133\nclang version 18")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_check.amd(0, tmp_path) is None  # no /dev/kfd
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    for node, (name, version) in enumerate([("", 0), ("aldebaran", 90010), ("navi21", 100300), ("", 90402)]):
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\nsimd_count 1\n")
    found = [gpu_check.amd(n, tmp_path) for n in range(3)]
    assert [gpu.arch for gpu in found] == ["gfx90a", "gfx1030", "gfx942"] and gpu_check.amd(3, tmp_path) is None
    assert found[0].name == "AMD aldebaran" and found[0].compiler == "HIP version: 6.2.41133"
    assert found[1].device == "hip:1" and "AMD_ARCHS=gfx1030" in found[1].options and found[1].target == "amd"


def test_gpu_check_finds_an_nvidia_gpu(gpu_check, tmp_path, monkeypatch):
    command(tmp_path / "nvcc", "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88")
    command(tmp_path / "nvidia-smi", "NVIDIA H100 80GB HBM3, 9.0, 580.65.06\nNVIDIA A100-SXM4-40GB, 8.0, 580.65.06")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu = gpu_check.nvidia(0)
    assert (gpu.name, gpu.arch, gpu.driver) == ("NVIDIA H100 80GB HBM3", "sm_90", "580.65.06")
    assert "release 13.0" in gpu.compiler and gpu.target == "nvidia" and "NVIDIA_ARCHS=90" in gpu.options
    assert gpu_check.nvidia(1).arch == "sm_80" and gpu_check.nvidia(2) is None


def test_gpu_check_of_a_name_that_is_none(gpu_check):
    with pytest.raises(SystemExit, match="DEVICE is 'cuda:0'; it must be hip, hip:N or hip-host"):
        gpu_check.find("cuda:0")


def test_device_tests_run_on_a_gpu_that_is_named(tmp_path):
    """As on a GPU, with the host build in the place of AMD's library: nothing of the host build's own is asked for, and
    what only it can do is one line."""
    os.symlink(hip_build.built()[0], tmp_path / "_hip_amd.so")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "in_place or sound_kernel",
         "tests/hip/test_hip_ops.py", "tests/hip/test_hip_arrays.py", "tests/hip/test_hip_faults.py"],
        cwd=hip_build.ROOT, capture_output=True, text=True, timeout=500,
        env={**os.environ, "KL_TEST_DEVICE": "hip:0", "KL_DEVICE_PATH": str(tmp_path),
             "PYTHONPATH": str(hip_build.ROOT)})
    assert done.returncode == 0, done.stdout
    assert "the host build alone can do it; KL_TEST_DEVICE is hip:0" in done.stdout
    assert done.stdout.count("SKIPPED") == 1 and " passed" in done.stdout


# ---- the benchmark ----


def test_hip_benchmark_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    import run

    hip_build.context()
    file = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "hip", "--device", "hip-host", "--quick", "--parts", "linear,ops",
                                      "--json", str(file)])
    assert not run.main()
    out, result = capsys.readouterr().out, json.loads(file.read_text())
    assert "its times mean nothing" in out and "delta_rule, " not in out
    assert result["hip"]["read"] > 0 and result["hip"]["fma"] > 0 and set(result["hip"]["tables"]) == {"linear", "ops"}
    assert {row["name"] for row in result["hip"]["tables"]["ops"]} == {"rms_norm 2304", "swiglu 9216", "route 8 of 256"}
    for row in result["hip"]["tables"]["linear"]:
        assert row["of_fma"] == pytest.approx(row["flops"] / row["seconds"]["median"] / result["hip"]["fma"])
    assert result["cases"]["hip rms_norm 2304 T=1 "]["seconds"]["median"] > 0


def test_hip_benchmark_of_a_device_that_is_not_there(monkeypatch, tmp_path):
    import run

    monkeypatch.setenv("KL_DEVICE_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", "hip", "--device", "hip:7"])
    with pytest.raises(SystemExit, match="run: device 'hip:7' is not there: "):
        run.main()
