"""A short run of tests/long/leaks.py, by the two counters that are exact."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "long"
IMPORT = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import leaks;"


def test_300_calls_of_everything_leave_nothing_behind():
    code = f"{IMPORT} sys.exit(leaks.main(300, with_rss=False))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok: nothing stays behind\n")


def test_a_leak_is_seen():
    code = (f"{IMPORT} kept = []\n"
            "print(*leaks.growth(lambda: kept.append(bytearray(256)), 300)[:2])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    malloc, blocks = map(int, out.split())
    assert malloc > 32 * 1024 + 16 * 300 or blocks > 250 + 30
