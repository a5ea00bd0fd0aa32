"""Build the kernels for the GPU that is here, test them on it, time them, and write all of it into one file.

    make gpu-check                       the first GPU: AMD by hipcc and /dev/kfd, or NVIDIA by nvcc and nvidia-smi
    make gpu-check DEVICE=hip:1          another one
    make gpu-check DEVICE=hip-host       without a GPU: the same steps on the host build
    make gpu-check ARGS="--quick"        a few tests and small sizes; ARGS="--model FILE.gguf" times that model

The report, build/gpu-check.txt, is made to be attached to an issue. Exit code 0: all passed; 1: something did not; 2:
there is no GPU with its compiler.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
QUICK_TESTS = ["-k", "in_place or embedding_is_exact", "tests/hip/test_hip_ops.py"]
COMPILERS = {"hipcc": "/opt/rocm/bin", "nvcc": "/usr/local/cuda/bin"}  # where each is when it is not on the PATH
HOST_ONLY = "not run on a GPU: wave sizes, orders of threads and planted faults, which only the host build has"


class Gpu(NamedTuple):
    """A device and how its library is made."""

    device: str      # for kl.Context
    name: str
    arch: str
    driver: str
    compiler: str
    target: str      # of csrc/hip/Makefile
    options: tuple   # of make
    library: str


# ---- what is here ----


def text_of(*command):
    """What a command prints, or '' where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def first_line(text, word=""):
    return next((line.strip() for line in text.splitlines() if word in line and line.strip()), "unknown")


def compiler_of(name):
    """The path of a compiler: on the PATH, or in the folder that its makers install it into and leave off the PATH."""
    return shutil.which(name) or shutil.which(name, path=COMPILERS[name])


class Seen(NamedTuple):
    """A GPU that a driver tells of."""

    row: tuple
    names: tuple  # by which an environment variable may call it, or a part of it


def visible(gpus, listed):
    """Of GPUs those that an environment variable lists, in its order: by number, or by the begin of a name. None: all.

    As the runtimes read it, the first entry that is no GPU ends the list.
    """
    if listed is None:
        return gpus
    chosen = []
    for entry in map(str.strip, listed.split(",")):
        gpu = next((gpu for number, gpu in enumerate(gpus) if entry == str(number)
                    or entry and any(name.startswith(entry) for name in gpu.names)), None)
        if gpu is None:
            break
        chosen.append(gpu)
    return chosen


def amd_gpus(root=Path("/")):
    """(architecture, name) of each AMD GPU that the runtime sees: the kernel driver tells them."""
    found = []
    if not (root / "dev/kfd").exists():
        return found
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*"), key=lambda p: int(p.name)):
        try:
            properties, name = (node / "properties").read_text(), (node / "name").read_text().strip()
        except OSError:  # a GPU that a container does not have
            continue
        told = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", properties, re.M)}
        v = told.get("gfx_target_version", 0)
        if v:
            arch = f"gfx{v // 10000}{v // 100 % 100:x}{v % 100:x}"
            found.append(Seen((arch, name), (f"GPU-{told.get('unique_id', 0):016x}",)))
    found = visible(found, os.environ.get("ROCR_VISIBLE_DEVICES"))
    listed = os.environ.get("HIP_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES") or None
    return [gpu.row for gpu in visible(found, listed)]


def amd(number, root=Path("/")):
    """The AMD GPU of a number, or None."""
    found, hipcc = amd_gpus(root), compiler_of("hipcc")
    if number >= len(found) or hipcc is None:
        return None
    arch, name = found[number]
    module = root / "sys/module/amdgpu/version"
    driver = module.read_text().strip() if module.exists() else f"of Linux {platform.release()}"
    return Gpu(f"hip:{number}", f"AMD {name or arch}", arch, f"amdgpu {driver}",
               first_line(text_of("env", "HIP_PLATFORM=amd", hipcc, "--version"), "HIP version"), "amd",
               (f"AMD_ARCHS={arch}", f"OUT=../../build/hip/{arch}", f"HIPCC={hipcc}"), "_hip_amd.so")


def nvidia_gpus():
    """(name, compute capability, driver) of each NVIDIA GPU that the runtime sees, in the order of their slots: by that
    `Report.run` has it count them.
    """
    rows = text_of("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader").splitlines()
    # a paragraph for each GPU: its name, and the names of the parts that it is divided into
    told = re.split(r"^GPU ", text_of("nvidia-smi", "-L"), flags=re.M)[1:]
    names = [tuple(re.findall(r"UUID: ([^)]+)", text)) for text in told] or [()] * len(rows)
    found = [Seen(tuple(cell.strip() for cell in row.split(",")), of) for row, of in zip(rows, names, strict=False)]
    return [gpu.row for gpu in visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def nvidia(number, before=0):
    """The NVIDIA GPU of a number, or None; the core counts it behind `before` others."""
    nvcc = compiler_of("nvcc")
    found = nvidia_gpus() if nvcc is not None else []
    if number >= len(found):
        return None
    name, capability, driver = found[number]
    arch = capability.replace(".", "")
    compiler = first_line(text_of(nvcc, "--version"), "release")
    return Gpu(f"hip:{before + number}", name, f"sm_{arch}", driver, compiler, "nvidia",
               (f"NVIDIA_ARCHS={arch}", f"OUT=../../build/hip/sm_{arch}", f"NVCC={nvcc}"), "_hip_nvidia.so")


def host():
    """The host build, which needs no GPU."""
    compiler = first_line(text_of(os.environ.get("CXX", "g++"), "--version"))
    return Gpu("hip-host", "none: the host build", platform.machine(), "none", compiler, "host", (), "_hip_host.so")


def find(device, root=Path("/")):
    """The device that is asked for, the first GPU with its compiler where None; None where it is not here."""
    if device == "hip-host":
        return host()
    number = re.fullmatch(r"hip(?::(\d+))?", device or "hip")
    if number is None:
        raise SystemExit(f"gpu-check: DEVICE is {device!r}; it must be hip, hip:N or hip-host")
    n_amd, built = len(amd_gpus(root)), (ROOT / "kimi_linear/_hip_amd.so").exists()
    before = n_amd if built else 0  # the core counts AMD's GPUs where their library is there
    if number[1] is None:
        return amd(0, root) or nvidia(0, before)
    n, counted = int(number[1]), n_amd if built or compiler_of("hipcc") else 0
    return amd(n, root) if n < counted else nvidia(n - counted, before)


# ---- the steps ----


class Report:
    """Lines for the terminal and for the file."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")

    def say(self, line=""):
        print(line, flush=True)
        print(line, file=self.file, flush=True)

    def run(self, title, command, **env):
        """Runs a command, its output in the report; its exit code."""
        self.say(f"\n== {title}")
        begin = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **env}
        with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", env=env) as process:
            for line in process.stdout:
                self.say(line.rstrip())
        self.say(f"-- {title}: {'done' if process.returncode == 0 else f'FAILED with {process.returncode}'}, "
                 f"{time.perf_counter() - begin:.0f} s")
        return process.returncode


def build(report, gpu):
    """The library, linked anew: an older one may be for other architectures."""
    if gpu.target != "host":
        (ROOT / "kimi_linear" / gpu.library).unlink(missing_ok=True)
    jobs = len(os.sched_getaffinity(0))
    return report.run(f"build for {gpu.arch}", ["make", "-s", f"-j{jobs}", "-C", "csrc/hip", gpu.target, *gpu.options])


def opened(report, gpu):
    """0 where a context of the device can be made; the library's version must be the core's."""
    code = ("import sys, kimi_linear as kl\n"
            "print(f'kimi_linear {kl.__version__}, which the library must be of, too')\n"
            "print(*kl.devices(), sep='\\n')\n"
            f"kl.Context(device={gpu.device!r})")
    return report.run(f"open {gpu.device}", [sys.executable, "-c", code])


def tests(report, gpu, quick, counts):
    """The tests of tests/hip on the device; passed and failed go to `counts`."""
    results = ROOT / "build" / f"gpu-check-tests-{os.getpid()}.xml"
    chosen = QUICK_TESTS if quick else ["tests/hip"]
    if gpu.device != "hip-host":
        report.say(f"\n{HOST_ONLY}")
    code = report.run("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
                                f"--junitxml={results}", *chosen], KL_TEST_DEVICE=gpu.device)
    if results.exists():
        suite = ElementTree.parse(results).getroot().find("testsuite")
        counts.update((name, int(suite.get(name))) for name in ("tests", "failures", "errors", "skipped"))
        counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
        results.unlink()
    return code


def benchmark(report, gpu, quick, model):
    command = [sys.executable, "benchmarks/run.py", "hip", "--device", gpu.device]
    command += ["--quick"] if quick else []
    command += ["--model", model] if model else []
    checks = {"KL_GPU_CHECKS": "0"} if gpu.device == "hip-host" else {}
    return report.run("speed", command, **checks)


def check(report, gpu, quick=False, model=None):
    """All steps; the names of those that failed."""
    commit = text_of("git", "-C", str(ROOT), "describe", "--always", "--dirty=+") or "unknown"
    report.say(f"gpu-check of {commit}, {time.strftime('%Y-%m-%d %H:%M %Z')}{', quick' if quick else ''}")
    for what, value in (("device", f"{gpu.device}: {gpu.name}, {gpu.arch}"), ("driver", gpu.driver),
                        ("compiler", gpu.compiler), ("system", f"{platform.platform()}, Python "
                                                               f"{platform.python_version()}")):
        report.say(f"{what:9} {value}")
    if build(report, gpu):
        return ["build"]
    if opened(report, gpu):
        return ["open"]
    counts = {}
    failed = [name for name, code in (("tests", tests(report, gpu, quick, counts)),
                                      ("speed", benchmark(report, gpu, quick, model))) if code]
    report.say(f"\ntests     {counts.get('passed', 0)} passed, {counts.get('failures', 0) + counts.get('errors', 0)} "
               f"failed, {counts.get('skipped', 0)} skipped")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", metavar="NAME", help="hip, hip:N or hip-host (default: the first GPU)")
    parser.add_argument("--quick", action="store_true", help="a few tests, small sizes: to see that the steps run")
    parser.add_argument("--model", metavar="PATH", help="the model to time (default: the packaged one)")
    parser.add_argument("--report", metavar="FILE", type=Path, default=ROOT / "build" / "gpu-check.txt")
    args = parser.parse_args()
    gpu = find(args.device)
    if gpu is None:
        print("gpu-check: there is no GPU here with its compiler: AMD needs /dev/kfd and hipcc (on the PATH or in "
              f"{COMPILERS['hipcc']}), NVIDIA nvidia-smi and nvcc (or in {COMPILERS['nvcc']}); DEVICE=hip-host runs "
              "the same steps without one", file=sys.stderr)
        return 2
    report = Report(args.report)
    failed = check(report, gpu, args.quick, args.model)
    report.say(f"result    {'FAILED: ' + ', '.join(failed) if failed else 'all passed'}")
    print(f"\nThe report is {args.report}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
