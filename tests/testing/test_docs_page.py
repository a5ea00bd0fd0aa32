"""docs/check-your-kernel.md: its C kernel and its Python run as they stand, and print what it shows."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kimi_linear as kl
from kimi_linear.testing import spec, specs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/check-your-kernel.md").read_text(encoding="utf-8")


def block(language, about=""):
    return next(b for b in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S) if about in b)


def printed(code, folder):
    """(what a block prints, what the page shows below it), in lines."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True,
                         env={"PYTHONPATH": str(ROOT)}, check=True)
    return run.stdout.strip().splitlines(), PAGE.partition(code)[2].split("```")[2].strip().splitlines()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kernel.c").write_text(block("c"))
    cc = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run([cc, "-O2", "-shared", "-fPIC", "kernel.c", "-lm", "-o", "kernel.so"], cwd=tmp_path, check=True)
    return tmp_path


def test_the_kernel_in_c(folder):
    got, shown = printed(block("python", "ctypes"), folder)
    assert len(got) == len(shown) and got[-1].startswith("ok: all ")
    for a, b in zip(got, shown):  # the errors are the compiler's
        assert re.split(r"[\d.]+ u rms|with [\d.]+", a)[0] == re.split(r"[\d.]+ u rms|with [\d.]+", b)[0]


def test_the_norm(tmp_path):
    got, shown = printed(block("python", "def rms_norm"), tmp_path)
    assert len(got) == len(shown)
    for a, b in zip(got, shown):  # the errors are NumPy's
        assert re.split(r"[\d.,e+]+ u rms", a)[0] == re.split(r"[\d.,e+]+ u rms", b)[0]


def test_the_backward_kernel(tmp_path):
    got, shown = printed(block("python", "def swiglu_backward"), tmp_path)
    assert got == shown


def row(op):
    """What the page's table says of an op."""
    the = spec(op)
    groups = ", ".join(dict.fromkeys(c.group for c in the.cases))
    projects = ", ".join(f"`{p}`" for p in kl.conventions if op in kl.conventions[p])
    return (f"| `{op}` | {len(the.cases)}: {groups} | {', '.join(law.name for law in the.laws)} | {projects} "
            f"| {len(the.explanations)} |")


def test_the_table_is_that_of_the_ops():
    there = re.findall(r"^\| `\w+` \| \d+: .*$", PAGE, re.M)
    for op in specs():
        assert row(op) in there, f"docs/check-your-kernel.md lacks the row\n{row(op)}"
    assert there == [row(op) for op in specs()], "the rows are in the order of specs()"


def test_the_table_is_that_of_conventions():
    words = {"THK": "T H K", "BTHK": "B T H K", "KV": "K V", "VK": "V K", "caller": "caller's"}
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
    seen = set()
    for names, axes, state, gate, scale, heads, norm in rows:
        for name in re.findall(r"`([\w-]+)`", names):
            how = kl.conventions[name]["delta_rule"]
            seen.add(name)
            assert (axes, state, gate) == (words[how.axes], words[how.state], how.gate)
            assert scale == words.get(how.scale, how.scale)
            assert heads == (", ".join(h for h in how.heads if h != "equal") or "as many")
            assert norm == ("argument" if how.l2_norm else "caller's")
    assert seen == set(kl.conventions)
