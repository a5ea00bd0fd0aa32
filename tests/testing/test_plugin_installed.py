"""The plugin as it is installed: a project with a virtual environment of its own, found by pytest through its entry
point, used on the project's ops; what a failing test prints is what the README shows."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import kimi_linear as kl

ROOT = Path(__file__).parents[2]

MINE = '''
import numpy as np


def delta_rule(q, k, v, g, beta, scale=None, initial_state=None):
    if g is None or g.ndim == 2 or q.shape[1] != v.shape[1]:
        raise NotImplementedError("a gate per channel, and as many key heads as value heads")
    (T, H, K), V = q.shape, v.shape[2]
    o = np.empty_like(v)
    S = np.zeros((H, K, V), np.float32) if initial_state is None else initial_state.copy()
    for t in range(T):
        S = np.exp(g[t])[:, :, None] * S
        d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * d[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", S, q[t] * np.float32(K**-0.5 if scale is None else scale))
    return o, np.ascontiguousarray(S.swapaxes(1, 2))


def rms_norm(input, weight, epsilon, place="inside"):
    square = (input * input).mean(-1, keepdims=True)
    epsilon = np.float32(epsilon)
    length = np.sqrt(square + epsilon) if place == "inside" else np.sqrt(square) + epsilon
    return input / length * weight
'''

NORMS = '''
import functools

import pytest
from mine import rms_norm


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.kl_op("rms_norm", conventions="vllm", arrays="numpy", cases=["lengths", "eps", "laws"])
def test_norm(place):
    return functools.partial(rms_norm, place=place)


def test_where_it_is_from(kl_reference):
    import kimi_linear, sys

    assert kimi_linear.__file__.startswith(sys.prefix), kimi_linear.__file__
    assert sys.modules["pytest_kimi_linear"].__file__.startswith(sys.prefix)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with mine.py and .venv, in which the package is what a wheel of this tree would hold. The extension
    module is copied and not built again; NumPy and pytest are those of this environment."""
    folder = tmp_path_factory.mktemp("project")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    prefix = folder / ".venv"
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(prefix), "platbase": str(prefix)}))
    for command in (["build_py", "--build-lib"], ["dist_info", "--output-dir"]):
        subprocess.run([sys.executable, "setup.py", "-q", *command, str(packages)], cwd=ROOT, check=True,
                       capture_output=True)
    built = Path(kl._core.__file__)
    shutil.copy(built, packages / "kimi_linear")
    if (built.parent / "_openblas").exists():
        os.symlink(built.parent / "_openblas", packages / "kimi_linear/_openblas")
    (packages / "others.pth").write_text("\n".join({str(Path(m.__file__).parents[1]) for m in (np, pytest)}))
    (folder / "mine.py").write_text(MINE)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\n")
    return folder


def run(project, text, *options):
    """pytest of the project on a test file."""
    (project / "test_mine.py").write_text(text)
    env = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    return subprocess.run([project / ".venv/bin/python", "-m", "pytest", "test_mine.py", *options], cwd=project,
                          env=env | {"COLUMNS": "120"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def of_the_readme(project):
    """What pytest prints on the README's test file."""
    done = run(project, readme()[0])
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def readme():
    """(test file, message) of the README's section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In your own tests")[2]
    return re.findall(r"^```\w*\n(.*?)^```", section.partition("\n## ")[0], re.M | re.S)


def message(out, test):
    """The lines that a failing test printed, its title left out."""
    lines = re.search(rf"_ {test} _+\n(.*?)(?=\n=+ short test|\n_{{5,}})", out, re.S)[1].splitlines()
    return lines[:next((i for i, x in enumerate(lines) if x.startswith("- generated")), len(lines))]


def test_the_message_of_the_readme(of_the_readme):
    """Line by line, in order; "..." stands for any lines, and errors in u are this NumPy's."""
    got = message(of_the_readme, "test_delta_rule")
    assert len(got) <= 24 and max(map(len, got)) <= 120, of_the_readme
    at = 0
    for line in readme()[1].splitlines():
        if line.strip() == "...":
            at = None
            continue
        start = re.split(r"  \d[\d.e]* u rms", line)[0]
        where = [i for i, x in enumerate(got) if x.startswith(start)]
        assert where and (at is None or at in where), f"{line}\n---\n" + "\n".join(got)
        at = where[0] + 1
    assert got[-1].strip() == "docs/check-your-kernel.md of kimi_linear    what a case must do"


def test_what_it_says_next_runs(project, of_the_readme):
    test, *options = re.search(r"^next: pytest (.*?)    ", of_the_readme, re.M)[1].split()
    assert test == "test_mine.py::test_delta_rule"
    again = run(project, readme()[0], *options)
    assert "FAILS 1 of 1 cases" in again.stdout, again.stdout


def test_an_op_without_a_model(project):
    done = run(project, NORMS)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    got = message(done.stdout, r"test_norm\[outside\]")
    assert got[0].startswith("rms_norm, vllm conventions: FAILS ") and len(got) <= 16
    assert any("why: eps is outside of the root: x / (sqrt(mean) + eps)" in x for x in got), got


def test_the_entry_point_is_listed(project):
    done = run(project, "", "--trace-config", "--co")
    assert re.search(r"kimi_linear-\S+ at .*pytest_kimi_linear\.py", done.stdout), done.stdout
