"""docs/check-your-kernel.md: its C kernel and its Python run as they stand, and print what it shows."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import kimi_linear as kl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/check-your-kernel.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kernel.c").write_text(block("c"))
    cc = (sysconfig.get_config_var("CC") or "cc").split()[0]
    subprocess.run([cc, "-O2", "-shared", "-fPIC", "kernel.c", "-lm", "-o", "kernel.so"], cwd=tmp_path, check=True)
    return tmp_path


def test_the_kernel_in_c(folder):
    run = subprocess.run([sys.executable, "-c", block("python")], cwd=folder, capture_output=True, text=True,
                         env={"PYTHONPATH": str(ROOT)}, check=True)
    shown = PAGE.partition(block("python"))[2].split("```")[2].strip().splitlines()
    got = run.stdout.strip().splitlines()
    assert len(got) == len(shown) and got[-1].startswith("ok: all ")
    for a, b in zip(got, shown):  # the errors are the compiler's
        assert re.split(r"[\d.]+ u rms|with [\d.]+", a)[0] == re.split(r"[\d.]+ u rms|with [\d.]+", b)[0]


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
