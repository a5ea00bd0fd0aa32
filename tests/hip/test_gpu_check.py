"""make gpu-check: what it finds, its steps on the host build, its report; benchmarks/run.py hip."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    assert done.stderr.startswith("gpu-check: there is no GPU here with its compiler: AMD needs /dev/kfd and hipcc (on")


NODES = [("", 0), ("aldebaran", 90010), ("navi21", 100300), ("", 90402)]
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch):
    for variable in VISIBLE:
        monkeypatch.delenv(variable, raising=False)


def amd_machine(root, nodes=NODES):
    """What the kernel driver says of a machine; node 0 is the processor."""
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    for node, (name, version) in enumerate(nodes):
        folder = root / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\nunique_id {node}\n")


def test_gpu_check_finds_an_amd_gpu(gpu_check, tmp_path, monkeypatch):
    command(tmp_path / "hipcc", "HIP version: 6.2.41133\nclang version 18")
    monkeypatch.setenv("PATH", f"{tmp_path}:{system(tmp_path)}")
    assert gpu_check.amd(0, tmp_path) is None  # no /dev/kfd
    amd_machine(tmp_path)
    found = [gpu_check.amd(n, tmp_path) for n in range(3)]
    assert [gpu.arch for gpu in found] == ["gfx90a", "gfx1030", "gfx942"] and gpu_check.amd(3, tmp_path) is None
    assert found[0].name == "AMD aldebaran" and found[0].compiler == "HIP version: 6.2.41133"
    assert found[1].device == "hip:1" and "AMD_ARCHS=gfx1030" in found[1].options and found[1].target == "amd"


def test_gpu_check_finds_an_nvidia_gpu(gpu_check, tmp_path, monkeypatch):
    command(tmp_path / "nvcc", "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88")
    command(tmp_path / "nvidia-smi", "NVIDIA H100 80GB HBM3, 9.0, 580.65.06\nNVIDIA A100-SXM4-40GB, 8.0, 580.65.06")
    monkeypatch.setenv("PATH", f"{tmp_path}:{system(tmp_path)}")
    gpu = gpu_check.nvidia(0)
    assert (gpu.name, gpu.arch, gpu.driver) == ("NVIDIA H100 80GB HBM3", "sm_90", "580.65.06")
    assert "release 13.0" in gpu.compiler and gpu.target == "nvidia" and "NVIDIA_ARCHS=90" in gpu.options
    assert gpu_check.nvidia(1).arch == "sm_80" and gpu_check.nvidia(2) is None


def test_gpu_check_passes_over_gpus_that_a_container_does_not_have(gpu_check, tmp_path, monkeypatch):
    """The kernel driver lists all, and reading one of another container's is not permitted."""
    amd_machine(tmp_path)
    read = Path.read_text

    def refuse(path, *options):
        if path.parts[-2:] == ("1", "properties"):
            raise PermissionError(1, "Operation not permitted", str(path))
        return read(path, *options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert [arch for arch, _ in gpu_check.amd_gpus(tmp_path)] == ["gfx1030", "gfx942"]


@pytest.mark.parametrize("settings, archs", [
    ({"HIP_VISIBLE_DEVICES": "2,0"}, ["gfx942", "gfx90a"]),
    ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, ["gfx942"]),
    ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000003,0"}, ["gfx942", "gfx90a"]),
    ({"CUDA_VISIBLE_DEVICES": "1"}, ["gfx1030"]),
    ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["gfx90a"]),
    ({"HIP_VISIBLE_DEVICES": "1,-1,0"}, ["gfx1030"]),
    ({"ROCR_VISIBLE_DEVICES": ""}, []),
])
def test_gpu_check_sees_the_amd_gpus_that_the_runtime_sees(gpu_check, tmp_path, monkeypatch, settings, archs):
    amd_machine(tmp_path)
    for variable, listed in settings.items():
        monkeypatch.setenv(variable, listed)
    assert [arch for arch, _ in gpu_check.amd_gpus(tmp_path)] == archs


def system(folder):
    """A folder with what a shell script needs of this machine, and none of its compilers."""
    (folder / "system").mkdir(exist_ok=True)
    for name in ("env", "sh", "cat", "echo", "printf"):
        if not (folder / "system" / name).exists():
            (folder / "system" / name).symlink_to(shutil.which(name))
    return folder / "system"


def nvidia_machine(folder):
    """A small GPU in the first slot and a large one in two parts behind it; the runtime would begin with the large."""
    (folder / "nvidia-smi").write_text(
        "#!/bin/sh\n"
        "if [ \"$1\" = -L ]; then\n"
        "echo 'GPU 0: NVIDIA T4 (UUID: GPU-aa01)'\n"
        "echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb02)'\n"
        "echo '  MIG 3g.40gb     Device  0: (UUID: MIG-cc03)'\n"
        "else\n"
        "echo 'NVIDIA T4, 7.5, 580.65.06'\n"
        "echo 'NVIDIA H100 80GB HBM3, 9.0, 580.65.06'\n"
        "fi\n")
    (folder / "nvidia-smi").chmod(0o755)
    command(folder / "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")


@pytest.mark.parametrize("listed, archs", [
    (None, ["7.5", "9.0"]), ("1,0", ["9.0", "7.5"]), ("1", ["9.0"]), ("GPU-b,0", ["9.0", "7.5"]), ("MIG-cc03", ["9.0"]),
    ("0,7,1", ["7.5"]), ("", []), ("-1", []),
])
def test_gpu_check_sees_the_nvidia_gpus_that_the_runtime_sees(gpu_check, tmp_path, monkeypatch, listed, archs):
    nvidia_machine(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{system(tmp_path)}")
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert [capability for _, capability, _ in gpu_check.nvidia_gpus()] == archs


def test_gpu_check_has_the_runtime_count_by_slots(gpu_check, tmp_path):
    """As nvidia-smi does; its own way is the fastest first."""
    report = gpu_check.Report(tmp_path / "report")
    assert report.run("order", [sys.executable, "-c", "import os; print(os.environ['CUDA_DEVICE_ORDER'])"]) == 0
    assert "PCI_BUS_ID" in (tmp_path / "report").read_text()


@pytest.mark.parametrize("hipcc, built, wanted", [
    # by the number that is asked for: architecture, and the number that the core has for it
    (True, False, {None: ("gfx90a", 0), "hip:0": ("gfx90a", 0), "hip:2": ("gfx942", 2), "hip:3": ("sm_75", 0),
                   "hip:4": ("sm_90", 1)}),
    (True, True, {None: ("gfx90a", 0), "hip:3": ("sm_75", 3), "hip:4": ("sm_90", 4)}),
    (False, True, {None: ("sm_75", 3), "hip:4": ("sm_90", 4)}),
    (False, False, {None: ("sm_75", 0), "hip:0": ("sm_75", 0), "hip:1": ("sm_90", 1)}),
])
def test_gpu_check_counts_amds_gpus_before_nvidias(gpu_check, tmp_path, monkeypatch, hipcc, built, wanted):
    amd_machine(tmp_path)
    nvidia_machine(tmp_path)
    if hipcc:
        command(tmp_path / "hipcc", "HIP version: 6.2.41133")
    (tmp_path / "kimi_linear").mkdir()
    if built:
        (tmp_path / "kimi_linear/_hip_amd.so").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{system(tmp_path)}")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setitem(gpu_check.COMPILERS, "hipcc", str(tmp_path / "none"))
    for name, (arch, number) in wanted.items():
        gpu = gpu_check.find(name, tmp_path)
        assert (gpu.arch, gpu.device) == (arch, f"hip:{number}"), name
    assert gpu_check.find("hip:5", tmp_path) is None


def test_gpu_check_finds_compilers_that_are_not_on_the_path(gpu_check, tmp_path, monkeypatch):
    """Where their makers install them; make is told."""
    for folder in ("bin", "cuda", "rocm"):
        (tmp_path / folder).mkdir()
    amd_machine(tmp_path)
    nvidia_machine(tmp_path / "bin")
    (tmp_path / "bin/nvcc").rename(tmp_path / "cuda/nvcc")
    command(tmp_path / "rocm/hipcc", "HIP version: 6.2.41133")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{system(tmp_path)}")
    for name, folder in (("hipcc", "rocm"), ("nvcc", "cuda")):
        monkeypatch.setitem(gpu_check.COMPILERS, name, str(tmp_path / folder))
    assert f"HIPCC={tmp_path}/rocm/hipcc" in gpu_check.amd(0, tmp_path).options
    assert f"NVCC={tmp_path}/cuda/nvcc" in gpu_check.nvidia(0).options
    assert gpu_check.nvidia(0).compiler == "Cuda compilation tools, release 13.0, V13.0.88"


def test_gpu_check_looks_for_gxx():
    """nvcc and hipcc need its headers."""
    done = subprocess.run(["make", "-n", "gpu-check"], cwd=hip_build.ROOT, capture_output=True, text=True)
    assert "setup-system.sh g++" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("knows", [True, False])
def test_new_gpus_are_hipccs_where_it_knows_them(tmp_path, knows):
    """Debian's does not, ROCm's does; then clang-19 and Debian's device libraries are not asked for."""
    hipcc = tmp_path / "hipcc"
    hipcc.write_text('#!/bin/sh\ncase "$*" in *gfx942*) exit ' + ("0" if knows else "1") + ";; esac\n")
    hipcc.chmod(0o755)
    done = subprocess.run(["make", "-n", "-C", "csrc/hip", "amd", "AMD_ARCHS=gfx942", f"HIPCC={hipcc}",
                           f"OUT={tmp_path}/out", f"TO={tmp_path}"], cwd=hip_build.ROOT, capture_output=True, text=True,
                          check=True)
    lines = [line for line in done.stdout.splitlines() if " -c roof.hip" in line or " -shared" in line]
    assert len(lines) == 2 and "--offload-arch=gfx942" in lines[0], done.stdout
    assert all((str(hipcc) in line) == knows and ("clang-19" in line) != knows for line in lines), lines
    assert ("--device-libraries" in done.stdout) != knows


def test_gpu_check_of_a_name_that_is_none(gpu_check):
    with pytest.raises(SystemExit, match="DEVICE is 'cuda:0'; it must be hip, hip:N or hip-host"):
        gpu_check.find("cuda:0")


def test_device_tests_run_on_a_gpu_that_is_named(tmp_path):
    """As on a GPU, with the host build in the place of AMD's library: nothing of the host build's own is asked for, and
    what only it can do is one line."""
    os.symlink(hip_build.built()[0], tmp_path / "_hip_amd.so")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-k", "in_place or sound_kernel or stays_that",
         *(f"tests/hip/test_hip_{family}.py" for family in ("ops", "arrays", "narrow", "faults"))],
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
    assert {row["contender"] for row in result["hip"]["tables"]["linear"]} == {"ours", "ours, int8", "ours, bfloat16"}
    for row in result["hip"]["tables"]["linear"]:
        assert row["of_fma"] == pytest.approx(row["flops"] / row["seconds"]["median"] / result["hip"]["fma"])
    assert result["cases"]["hip rms_norm 2304 T=1 "]["seconds"]["median"] > 0


def test_hip_benchmark_of_a_device_that_is_not_there(monkeypatch, tmp_path):
    import run

    monkeypatch.setenv("KL_DEVICE_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", "hip", "--device", "hip:7"])
    with pytest.raises(SystemExit, match="run: device 'hip:7' is not there: "):
        run.main()
