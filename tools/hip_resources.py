"""Registers, spills and shared memory of each HIP kernel, beside csrc/hip/resources.txt.

    tools/hip_resources.py              compile for what is installed, compare, fail on a spill or a regression
    tools/hip_resources.py --write      write the table anew

A regression is a kernel that takes more vector registers or shared memory than the table says, or that spills; the
first version of a ladder may spill: it is the oracle. AMD's numbers come from hipcc
(-Rpass-analysis=kernel-resource-usage), NVIDIA's from ptxas (-Xptxas -v). An architecture whose compiler is not here
is left as the table has it, and named.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc" / "hip"
TABLE = FOLDER / "resources.txt"
AMD = ("gfx90a", "gfx1030")
NVIDIA = ("sm_80", "sm_90")
COLUMNS = ("arch", "kernel", "registers", "spills", "shared")
HEAD = """# Of each kernel: vector registers a thread, spilled registers (NVIDIA: bytes), bytes of static shared memory.
# Made by tools/hip_resources.py --write; a kernel that spills or takes more than this fails it.
"""


def demangled(names):
    """{mangled: name with its template arguments, without namespaces and parameters}"""
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout if names else ""
    short = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        line = re.sub(r"\(anonymous namespace\)::", "", line.replace("void ", "", 1))
        line = re.sub(r"_GLOBAL__N__\w+::", "", line)
        short[name] = re.sub(r"\((?!kl_type\)).*", "", line).replace("(kl_type)", "").replace(" ", "")
    return short


def amd(arch, source):
    """Rows of one file, from hipcc's remarks."""
    command = ["hipcc", "-std=c++17", "-O3", "-ffp-contract=off", f"--offload-arch={arch}", "--cuda-device-only", "-c",
               "-Rpass-analysis=kernel-resource-usage", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HIP_PLATFORM": "amd"})
    if done.returncode:
        sys.exit(done.stderr)
    rows, now = [], {}
    for key, value in re.findall(r"remark: +([A-Za-z ]+?)(?: \[[^]]*\])?: +(\S+)", done.stderr):
        if key in ("Function Name", "Name"):
            now = {"name": value}
            rows.append(now)
        now[key] = value
    return [(r["name"], int(r["VGPRs"]) + int(r.get("AGPRs", 0)), int(r["VGPRs Spill"]) + int(r["SGPRs Spill"]),
             int(r["LDS Size"])) for r in rows]


def nvidia(arch, source):
    """Rows of one file, from ptxas."""
    command = ["nvcc", "-x", "cu", "-std=c++17", "-O3", "--fmad=false", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
               str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    rows = []
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?Used .*?)\n", done.stderr, re.S):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        shared = re.search(r"(\d+) bytes smem", text)
        rows.append((name, int(re.search(r"Used (\d+) registers", text)[1]), spills, int(shared[1]) if shared else 0))
    return rows


def measured():
    """{(arch, kernel): (registers, spills, shared)} of every architecture whose compiler is here; those left out."""
    compilers = [("hipcc", amd, AMD), ("nvcc", nvidia, NVIDIA)]
    jobs = [(measure, arch, source) for tool, measure, archs in compilers if shutil.which(tool) for arch in archs
            for source in sorted(FOLDER.glob("*.hip"))]
    missing = [arch for tool, _, archs in compilers if not shutil.which(tool) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(lambda job: job[0](*job[1:]), jobs))
    names = demangled(sorted({row[0] for rows in answers for row in rows}))
    found = {(job[1], names[row[0]]): row[1:] for job, rows in zip(jobs, answers, strict=True) for row in rows}
    return found, missing


def read_table():
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = [line.split() for line in lines if line and line[0] != "#" and not line.startswith("arch ")]
    return {(arch, kernel): tuple(map(int, numbers)) for arch, kernel, *numbers in rows}


def table_text(rows):
    width = max((len(kernel) for _, kernel in rows), default=6)
    lines = [f"{'arch':8} {'kernel':{width}} {'registers':>9} {'spills':>6} {'shared':>6}"]
    lines += [f"{arch:8} {kernel:{width}} {r:9} {s:6} {m:6}" for (arch, kernel), (r, s, m) in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def problems(found, table):
    """A sentence for each kernel that spills, takes more than the table says, or is not in it."""
    for (arch, kernel), (registers, spills, shared) in sorted(found.items()):
        known = table.get((arch, kernel))
        if spills and "_v1" not in kernel:
            yield f"{kernel} on {arch} spills {spills}"
        if known is None:
            yield f"{kernel} on {arch} is not in {TABLE.name}: tools/hip_resources.py --write"
        elif registers > known[0] or shared > known[2]:
            yield (f"{kernel} on {arch} takes {registers} registers and {shared} bytes of shared memory; "
                   f"{TABLE.name} has {known[0]} and {known[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write csrc/hip/resources.txt")
    options = parser.parse_args()
    found, missing = measured()
    table = read_table()
    kept = {key: row for key, row in table.items() if key[0] in missing}
    print(table_text(found), end="")
    if missing:
        print(f"not compiled here, for want of a compiler: {', '.join(missing)}")
    if options.write:
        TABLE.write_text(HEAD + table_text(found | kept))
        table = found | kept
    wrong = list(problems(found, table))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
