"""Registers, spills, stack and shared memory of each HIP kernel, beside csrc/hip/resources.txt.

    tools/hip_resources.py              compile for what is installed, compare, fail on a spill or on growth
    tools/hip_resources.py --write      write the table anew

It fails on a kernel that is not in the table or takes more of anything than it says, and on any spill where hipcc or
nvcc compiles; what clang-19 compiles may have the spills that the table says. AMD's numbers come from hipcc and, for
the architectures that it does not know, from clang-19 (-Rpass-analysis=kernel-resource-usage); NVIDIA's from ptxas
(-Xptxas -v). An architecture whose compiler is not here is left as the table has it, and named. Numbers are a
compiler's: where another version is installed than the table names, spills fail and growth is only told.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc" / "hip"
TABLE = FOLDER / "resources.txt"
COLUMNS = ("registers", "spills", "stack", "shared")
HEAD = """# Of each kernel: vector registers a thread, spilled registers (NVIDIA: bytes), bytes of stack a thread,
# bytes of static shared memory. Made by tools/hip_resources.py --write; a kernel that takes more fails it, and any
# spill but what clang-19 has here.
"""
BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")  # Debian's rocm-device-libs
ISA = {"gfx942": 9402, "gfx1100": 11000, "gfx1151": 11051}  # what they lack, as oclc_isa_version says it
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Wshadow"]
REMARKS = ["-ffp-contract=off", "-Rpass-analysis=kernel-resource-usage"]


def demangled(names):
    """{mangled: name with its template arguments, without namespaces and parameters}"""
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout if names else ""
    short = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        line = re.sub(r"\(anonymous namespace\)::", "", line.replace("void ", "", 1))
        line = re.sub(r"_GLOBAL__N__\w+::", "", line)
        short[name] = re.sub(r"\((?!kl_type\)).*", "", line).replace("(kl_type)", "").replace(" ", "")
    return short


def rows_of_remarks(command):
    """Rows of one file for an AMD GPU, from clang's remarks; a warning is an error."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HIP_PLATFORM": "amd"})
    if done.returncode or "warning: " in done.stderr.replace("-Wunused-command-line-argument", ""):
        sys.exit(done.stderr)
    rows, now = [], {}
    for key, value in re.findall(r"remark: +([A-Za-z ]+?)(?: \[[^]]*\])?: +(\S+)", done.stderr):
        if key in ("Function Name", "Name"):
            now = {"name": value}
            rows.append(now)
        now[key] = value
    return [(r["name"], int(r["VGPRs"]) + int(r.get("AGPRs", 0)), int(r["VGPRs Spill"]) + int(r["SGPRs Spill"]),
             int(r["ScratchSize"]), int(r["LDS Size"])) for r in rows]


def hipcc(arch, source, _):
    return rows_of_remarks(["hipcc", *FLAGS, *REMARKS, f"--offload-arch={arch}", "--cuda-device-only", "-c",
                            str(source), "-o", os.devnull])


def clang(arch, source, bitcode):
    return rows_of_remarks(["clang-19", "-x", "hip", *FLAGS, *REMARKS, f"--offload-arch={arch}",
                            "--offload-device-only", "--rocm-path=/usr", f"--rocm-device-lib-path={bitcode}",
                            "-mcode-object-version=4", "-S", str(source), "-o", os.devnull])


def device_libraries(folder):
    """Debian's device libraries in `folder`, with the one constant for each architecture that they do not know."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in BITCODE.glob("*.bc"):
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file)
    for arch, number in ISA.items():
        text = folder / f"{arch}.ll"
        text.write_text('target triple = "amdgcn-amd-amdhsa"\n@__oclc_ISA_version = linkonce_odr protected '
                        f"local_unnamed_addr addrspace(4) constant i32 {number}, align 4\n")
        made = folder / f"oclc_isa_version_{arch.removeprefix('gfx')}.bc"
        made.unlink(missing_ok=True)
        subprocess.run(["clang-19", "-x", "ir", "--target=amdgcn-amd-amdhsa", "-nogpulib", "-emit-llvm", "-c", text,
                        "-o", made], check=True)


def nvcc(arch, source, _):
    """Rows of one file, from ptxas."""
    command = ["nvcc", "-x", "cu", "-std=c++17", "-O3", "--fmad=false", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
               "-Werror", "all-warnings", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = []
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?Used .*?)\n", done.stderr, re.S):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        stack = re.search(r"(\d+) bytes cumulative stack", text)
        shared = re.search(r"(\d+) bytes smem", text)
        rows.append((name, int(re.search(r"Used (\d+) registers", text)[1]), spills, int(stack[1]) if stack else 0,
                     int(shared[1]) if shared else 0))
    return rows


# command, what compiles one file, architectures
COMPILERS = (("hipcc", hipcc, ("gfx90a", "gfx1030")), ("clang-19", clang, tuple(ISA)),
             ("nvcc", nvcc, ("sm_80", "sm_90")))


def is_here(tool):
    return shutil.which(tool) is not None and (tool != "clang-19" or (BITCODE / "ocml.bc").exists())


def version_of(tool):
    text = subprocess.run([tool, "--version"], capture_output=True, text=True,
                          env={**os.environ, "HIP_PLATFORM": "amd"}).stdout
    found = re.search(r"clang version (\S+)|release \S+, V(\S+)", text)
    return (found[1] or found[2]) if found else "unknown"


def measured(files):
    """{(arch, kernel): (registers, spills, stack, shared)} of every architecture whose compiler is here."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        if is_here("clang-19"):
            device_libraries(Path(folder))
        jobs = [(rows, arch, source) for tool, rows, archs in COMPILERS if is_here(tool) for source in files
                for arch in archs]
        answers = list(pool.map(lambda job: job[0](*job[1:], folder), jobs))
    names = demangled(sorted({row[0] for rows in answers for row in rows}))
    return {(job[1], names[row[0]]): row[1:] for job, rows in zip(jobs, answers, strict=True) for row in rows}


def read_table():
    """Rows, and the version of each compiler that made them."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [line.split() for line in lines if line and line[0] != "#" and not line.startswith("arch ")]
    versions = dict(line.split()[1:3] for line in lines if re.match(r"# (hipcc|clang-19|nvcc) \S+:", line))
    return ({(arch, kernel): tuple(map(int, numbers)) for arch, kernel, *numbers in rows},
            {tool: version.rstrip(":") for tool, version in versions.items()})


def table_text(rows):
    width = max((len(kernel) for _, kernel in rows), default=6)
    lines = [f"{'arch':8} {'kernel':{width}}" + "".join(f" {name:>9}" for name in COLUMNS)]
    lines += [f"{arch:8} {kernel:{width}}" + "".join(f" {n:9}" for n in row)
              for (arch, kernel), row in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def spilled(found):
    for (arch, kernel), (_, spills, *_) in sorted(found.items()):
        if spills and arch not in ISA:
            yield f"{kernel} on {arch} spills {spills}"


def grown(found, table):
    """A sentence for each kernel that takes more than the table says, or is not in it."""
    for (arch, kernel), row in sorted(found.items()):
        known = table.get((arch, kernel))
        if known is None:
            yield f"{kernel} on {arch} is not in {TABLE.name}: tools/hip_resources.py --write"
            continue
        for name, now, before in zip(COLUMNS, row, known, strict=True):
            if now > before:
                yield f"{kernel} on {arch}: {name} {now}; {TABLE.name} has {before}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write csrc/hip/resources.txt")
    parser.add_argument("--device-libraries", type=Path, metavar="FOLDER", help="make what clang-19 needs there, only")
    options = parser.parse_args()
    if options.device_libraries:
        return device_libraries(options.device_libraries)
    if not any(is_here(tool) for tool, *_ in COMPILERS):
        print("no kernel was compiled: hipcc, clang-19 with Debian's device libraries and nvcc are not here")
        return
    found = measured(sorted(FOLDER.glob("*.hip")))
    table, versions = read_table()
    here = {tool: version_of(tool) for tool, *_ in COMPILERS if is_here(tool)}
    for tool, _, archs in COMPILERS:
        if tool not in here:
            print(f"{', '.join(archs)}: not checked, {tool} or its device libraries are not here")
    if options.write:
        absent = {arch for tool, _, archs in COMPILERS if tool not in here for arch in archs}
        table = {key: row for key, row in table.items() if key[0] in absent} | found
        versions |= here
        made = "".join(f"# {tool} {versions[tool]}: {', '.join(archs)}\n" for tool, _, archs in COMPILERS
                       if tool in versions)
        TABLE.write_text(HEAD + made + table_text(table))
    wrong = list(spilled(found))
    for tool, _, archs in COMPILERS:
        more = list(grown({key: row for key, row in found.items() if key[0] in archs}, table))
        if tool in here and here[tool] != versions.get(tool, here[tool]):
            print(f"{tool} is {here[tool]}, the table's {versions[tool]}: {len(more)} that grew are not judged")
        else:
            wrong += more
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if not wrong:
        print(f"{len(found)} kernels on {', '.join(sorted({arch for arch, _ in found}))}: none grew")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
