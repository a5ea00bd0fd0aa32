"""The pytest plugin, in a project of its own: a right kernel passes, a wrong one fails with its card."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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
    return o, S


def transposed(**arguments):
    o, S = delta_rule(**arguments)
    return o, np.ascontiguousarray(S.swapaxes(1, 2))
'''


@pytest.fixture
def run(tmp_path):
    """Runs pytest on the text of a test file beside mine.py; the outcome, its output and its lines."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\n")

    def run(text, *options, plugin=True, ini=""):
        (tmp_path / "test_mine.py").write_text("import pytest\n" + "import mine\n" * ("mine." in text) + text)
        with (tmp_path / "pytest.ini").open("a") as f:
            f.write(ini)
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "120"}
        env.pop("PYTEST_ADDOPTS", None)
        given = ["-p", "pytest_kimi_linear"] if plugin else []
        return subprocess.run([sys.executable, "-W", "error", "-m", "pytest", *given, *options], cwd=tmp_path, env=env,
                              capture_output=True, text=True)

    return run


MARKED = '''
@pytest.mark.kl_op("delta_rule")
def test_right():
    return mine.delta_rule


@pytest.mark.kl_op("delta_rule", conventions="ours")
def test_wrong():
    return mine.transposed
'''


def test_a_right_and_a_wrong_kernel(run):
    done = run(MARKED, "--junitxml=seen.xml")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    message = re.search(r"_ test_wrong _+\n(.*?)\n=+ short test", done.stdout, re.S)[1]
    lines = message.splitlines()
    lines = lines[:next((i for i, x in enumerate(lines) if x.startswith("- generated")), len(lines))]
    assert len(lines) <= 24 and max(map(len, lines)) <= 120, message
    assert lines[0].startswith("delta_rule, ours conventions: FAILS 63 of 68 cases; 18 not offered: the final state")
    assert lines[0][:60] in done.stdout.partition("short test summary")[2]
    assert any(re.match(r"  carried +\d of 9 FAIL", x) for x in lines)
    assert any("why: the final state equals ours with K and V swapped (explains" in x for x in lines)
    assert any(x.startswith("next: pytest test_mine.py::test_wrong --kl-cases ") for x in lines)
    assert "Traceback" not in message and "pytest_kimi_linear.py" not in message


def test_the_readme_shows_it(run):
    """The example of the README gives the message below it, but for lines left out at "..."."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## In your own tests")[2].partition("\n## ")[0]
    code, shown = re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S)
    done = run(code.replace("from mine import delta_rule", "from mine import transposed as delta_rule"))
    got = iter(done.stdout.splitlines())
    for line in shown.splitlines():
        if line.strip() != "...":
            start = line.partition("  2.")[0]  # the errors are NumPy's
            assert any(x.startswith(start) for x in got), f"{line}\n{done.stdout}"


def test_what_it_says_next_works(run):
    done = run(MARKED, "test_mine.py::test_wrong", "--kl-cases", "length-7")
    assert "FAILS 1 of 1 cases: the final state equals ours with K and V swapped" in done.stdout
    assert run(MARKED, "--kl-cases", "scale*, beta", "-k", "right").returncode == 0
    done = run(MARKED, "--kl-cases", "nonsense", "-k", "right")
    assert "check_op: cases has 'nonsense', which matches no case; the groups are" in done.stdout


def test_cases_of_the_ini_file_and_of_the_test(run):
    text = '''
SEEN = []

def count(**arguments):
    SEEN.append(len(arguments["q"]))
    return mine.delta_rule(**arguments)

@pytest.mark.kl_op("delta_rule")
def test_by_the_file():
    return count

def test_that():
    assert 1 < len(SEEN) < 30
    SEEN.clear()

@pytest.mark.kl_op("delta_rule", cases="length-7")
def test_by_itself():
    return count

def test_this():
    assert set(SEEN) == {7}
'''
    done = run(text, ini="kl_cases = lengths\n")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


FIXTURES = '''
import numpy as np

@pytest.mark.parametrize("scale", [None])
@pytest.mark.kl_op("delta_rule", cases=["plain", "length-7"])
def test_with_fixtures_and_parameters(scale, tmp_path, kl_reference):
    assert tmp_path.exists() and scale is None
    return mine.delta_rule

class TestMine:
    @pytest.mark.kl_op("delta_rule", cases="plain")
    def test_method(self):
        return mine.delta_rule

def test_check(kl_check_op):
    card = kl_check_op("delta_rule", mine.delta_rule, cases=["plain"])
    assert card and card.op == "delta_rule"

def test_check_fails(kl_check_op):
    kl_check_op("delta_rule", mine.transposed, cases=["length-7"])

def test_close(kl_assert_close, kl_reference):
    x = np.float32([[3, 4]])
    kl_assert_close(x / 5, kl_reference.l2_norm(x), op="l2_norm", inputs=dict(x=x))

def test_not_close(kl_assert_close, kl_reference):
    x = np.float32([[3, 4]])
    kl_assert_close(x / 4, kl_reference.l2_norm(x), op="l2_norm", inputs=dict(x=x))

def test_tiny(kl_tiny):
    assert kl_tiny.forward([1, 2, 3]).shape[0] == 3
'''


def test_fixtures(run):
    done = run(FIXTURES)
    assert "2 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    assert "K and V swapped" in done.stdout and "OVER BUDGET: l2_norm at token 0" in done.stdout
    assert "_assert.py" not in done.stdout.partition("short test summary")[0]


MISTAKES = '''
@pytest.mark.kl_op("delta_rule")
def test_none():
    pass

@pytest.mark.kl_op()
def test_no_op():
    return mine.delta_rule

@pytest.mark.kl_op("flash")
def test_other_op():
    return mine.delta_rule

@pytest.mark.kl_op("delta_rule", conventions="flash")
def test_other_conventions():
    return mine.delta_rule

@pytest.mark.kl_op("delta_rule", convention="fla")
def test_option():
    return mine.delta_rule

@pytest.mark.kl_op("delta_rule")
def test_arguments():
    return lambda q: q
'''


def test_mistakes_in_the_tests(run):
    done = run(MISTAKES)
    assert "6 failed" in done.stdout, done.stdout + done.stderr
    for words in ("test_none is marked kl_op and returned None; it must return the callable to check",
                  "kl_op has the arguments (); it must have the name of an op",
                  "check_op: op is 'flash'; check_op knows delta_rule",
                  "check_op: conventions is 'flash'; it must be one of",
                  "unexpected keyword argument 'convention'",
                  "NOT RUN: the plain case is not offered"):
        assert words in done.stdout, done.stdout
    assert "pytest_kimi_linear.py:" not in done.stdout and "another exception" not in done.stdout


def test_it_costs_nothing_where_it_is_not_used(run):
    done = run('''
import sys
import tomllib

def test_what_was_imported():
    assert "pytest_kimi_linear" in sys.modules
    assert not {"kimi_linear", "numpy", "ml_dtypes"} & sys.modules.keys()
''')
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_and_markers_name_it(run):
    assert "--kl-cases=PATTERNS" in run("", "--help").stdout
    assert "@pytest.mark.kl_op(op, conventions='ours'" in run("", "--markers").stdout


def test_the_entry_point_has_the_name_of_the_module():
    """pytest then takes ``-p pytest_kimi_linear`` and the entry point for one plugin."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert table["project"]["entry-points"]["pytest11"] == {
        "pytest_kimi_linear": "pytest_kimi_linear"
    }
    assert "pytest_kimi_linear" in table["tool"]["setuptools"]["py-modules"]
