"""What setup.py reads from the environment, and what it compiles again, by a compiler that only writes down how it is
called, and of the files of csrc/ops that they read ops.h."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(tmp_path):
    """Runs ``setup.py lib`` on a copy of the sources; gives its stderr and the calls of its compiler."""
    tree, calls = tmp_path / "tree", tmp_path / "calls"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("hip", "build"))
    (tree / "kimi_linear").mkdir()
    for name in ("setup.py", "kimi_linear/_version.py"):
        shutil.copy(ROOT / name, tree / name)
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n'
                        'while [ $# -gt 1 ]; do case "$1" in -o) : > "$2";; -MF) read="$2";; -c) source="$2";; esac; '
                        'shift; done\n'
                        'case "$source" in csrc/ops/*) more=" \\\n csrc/ops/ops.h";; esac\n'
                        'if [ "$read" ]; then printf "it: $source$more\\n" > "$read"; fi\n')
    compiler.chmod(0o755)

    def run(**settings):
        calls.write_text("")
        environment = {name: text for name, text in os.environ.items()
                       if name not in ("CPPFLAGS", "CFLAGS", "LDFLAGS") and not name.startswith("KL_")}
        environment |= {"CC": str(compiler), "LD": str(compiler), "OBJCOPY": "true", "AR": "true", "KL_BLAS": "none"}
        done = subprocess.run([sys.executable, "setup.py", "-q", "lib"], cwd=tree, env=environment | settings,
                              capture_output=True, text=True)
        return done.stderr, [line.split() for line in calls.read_text().splitlines()]

    run.tree = tree
    return run


def test_flags_of_the_environment_come_first(build):
    said, calls = build(CPPFLAGS="-DMINE", CFLAGS="-O0 -ffast-math -flto -fstack-protector", LDFLAGS="-Wl,-z,now")
    assert not said
    (gemm,) = (call for call in calls if "csrc/cpu/gemm.c" in call)
    assert gemm[:5] == ["-DMINE", "-O0", "-ffast-math", "-flto", "-fstack-protector"]
    for ours in ("-O2", "-fno-fast-math", "-fno-lto", "-ffp-contract=off", "-fno-math-errno"):
        assert ours in gemm[5:]
    assert gemm.index("-fno-fast-math") < gemm.index("-fno-math-errno")  # which it would take back
    (link,) = (call for call in calls if "-shared" in call)
    assert link[0] == "-Wl,-z,now" and "-DMINE" not in link


@pytest.mark.parametrize(("name", "value", "says"), [
    ("CFLAGS", "'-O2", "CFLAGS is \"'-O2\", which is not words of a shell: No closing quotation."),
    ("KL_JOBS", "many", "KL_JOBS is 'many'; it must be a number, 0 for one a processor."),
    ("CC", "no-such-compiler", "CC is 'no-such-compiler', which is not a command; unset it or name a C compiler."),
])
def test_settings_that_are_none(build, name, value, says):
    said, calls = build(**{name: value})
    assert said == f"kimi_linear: {says}\n" and not [call for call in calls if "-c" in call]


def compiled(build, **settings):
    _, calls = build(**settings)
    return {call[call.index("-c") + 1] for call in calls if "-c" in call}


def test_what_reads_a_changed_file_is_compiled_again(build):
    everything = compiled(build)
    ops = {source for source in everything if source.startswith("csrc/ops/")}
    assert ops and ops < everything and not compiled(build)
    (build.tree / "csrc/ops/ops.h").touch()
    assert compiled(build) == ops and not compiled(build)
    (build.tree / "csrc/pool.c").touch()
    assert compiled(build) == {"csrc/pool.c"}
    assert compiled(build, CPPFLAGS="-DMINE") == everything and not compiled(build, CPPFLAGS="-DMINE")
    (build.tree / "csrc/ops/ops.h").unlink()
    assert compiled(build, CPPFLAGS="-DMINE") == ops
