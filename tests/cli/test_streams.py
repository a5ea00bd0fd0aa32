"""What the commands write where a stream is closed or not UTF-8, and that --json is JSON."""

import ctypes
import json
import math
import mmap
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import TINY

import kimi_linear as kl
from kimi_linear import bench
from kimi_linear.cli import main
from kimi_linear.cli._common import print_json

GREEK = "\u03b1\U0001f600"


def shell(command, **variables):
    """(exit code, stdout, stderr) of a command line, in which KL is the program."""
    line = command.replace("KL", f"'{sys.executable}' -m kimi_linear")
    done = subprocess.run(["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
                          env=os.environ | variables)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize("command, code, words", [
    ("KL chat <&-", 0, "[tiny: "), ("KL generate --prompt-file - <&-", 2, "prompt is empty"),
    ("KL plan --no-measure >&-", 0, ""), ("KL plan --no-measure --json >&-", 0, ""), ("KL --help >&-", 0, ""),
    ("KL plan --no-measure 2>&-", 0, ""), ("KL plan --no-measure <&- >&- 2>&-", 0, ""),
])
def test_streams_that_are_closed(command, code, words):
    found, _, err = shell(command)
    assert found == code and "Traceback" not in err and words in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_stdout_that_is_full():
    code, _, err = shell("KL plan --no-measure >/dev/full")
    assert code == 2 and err == "kimi-linear plan: No space left on device\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_stdout_that_lacks_the_character(encoding, tmp_path):
    """It is in the model's name."""
    named = tmp_path / GREEK
    shutil.copytree(TINY, named)
    code, out, err = shell(f"KL inspect '{named}' --json", PYTHONIOENCODING=f"{encoding}:strict")
    assert code == 0, err
    assert json.loads(out.encode("latin-1").decode(encoding))["model"] == GREEK
    code, out, err = shell(f"KL inspect '{named}'", PYTHONIOENCODING=f"{encoding}:strict")
    shown = GREEK if encoding == "utf-8" else r"\u03b1\U0001f600"
    assert code == 0 and shown in out.encode("latin-1").decode(encoding), err


def test_generated_text_goes_on():
    script = ("import sys; from kimi_linear.cli import main; from kimi_linear import Generation\n"
              f"Generation.__next__ = lambda self, it=iter([{GREEK!r}, ' and on']): next(it)\n"
              "sys.exit(main(['generate', '--prompt', 'a']))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60,
                          env=os.environ | {"PYTHONIOENCODING": "latin-1:strict"})
    assert done.returncode == 0 and done.stdout == rb"\u03b1\U0001f600 and on" + b"\n"


def test_an_error_behind_some_text_begins_a_line():
    script = ("import sys; from kimi_linear.cli import main; from kimi_linear import Generation\n"
              "Generation.__next__ = lambda self, it=iter(['a ', 'b', 0]): next(it) or int('x')\n"
              "sys.exit(main(['generate', '--prompt', 'a']))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == b"a b\n" and b"kimi-linear generate: " in done.stderr


# ---- JSON ----

def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_numbers_that_are_not_finite_are_null(capsys):
    print_json({"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN"})
    assert strict(capsys.readouterr().out) == {"a": [1.0, None, [None, {"b": None}]], "c": "NaN"}


@pytest.mark.parametrize("command", ["diff", "report"])
def test_a_trace_with_nan(tmp_path, capfd, command):
    trace = kl.Model.tiny().trace([1, 2, 3], "layers.0.*")
    trace.save(tmp_path / "ours.safetensors")
    arrays = {name: np.array(x) for name, x in trace.items()}
    arrays["layers.0.out"][1] = np.nan
    arrays["layers.0.kda.g"][2] = np.inf
    kl.Trace(arrays, trace.meta).save(tmp_path / "theirs.safetensors")
    files = [str(tmp_path / name) for name in ("theirs.safetensors", "ours.safetensors")]
    page = ["-o", str(tmp_path / "page.html")] if command == "report" else []
    assert main([command, *files, *page, "--json"]) == 1
    assert strict(capfd.readouterr().out)


# ---- arguments ----

@pytest.mark.parametrize("argv", [
    ["plan", "--context"], ["plan", "--sequences"], ["generate", "--prompt", "a", "--threads"], ["bench", "--prefill"],
    ["bench", "--decode"], ["bench", "--repeat"], ["bench", "--depths"], ["chat", "--checkpoints"],
    ["generate", "--prompt", "a", "-n"], ["generate", "--ids"], ["verify", "--ids"], ["trace", "-o", "x", "--ids"],
    ["generate", "--prompt", "a", "--seed"],
])
@pytest.mark.parametrize("number", [10**26, 10**18])
def test_an_integer_that_is_too_large(argv, number, capfd):
    if argv[-1] == "--seed" and number < 2**64:
        return
    try:
        code = main([*argv, str(number)])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    *before, last = err.splitlines()
    assert (code, out) == (2, "") and last.startswith("kimi-linear") and len(before) <= 1
    assert str(number) in last or "context is" in last


def test_an_id_past_32_bits_is_named(capfd):
    assert main(["verify", "--ids", "1,99999999999"]) == 2
    assert "tokens[1] is 99999999999; it must be 0 <= tokens < 2048" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["plan", "inspect", "generate --prompt a"])
def test_a_user_that_is_not_there(command, capfd):
    name, *rest = command.split()
    assert main([name, "~nouser-of-this-name/x", *rest]) == 2
    assert "There is no user nouser-of-this-name, in whose home" in capfd.readouterr().err


def test_outputs_in_the_home_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["trace", "--ids", "1,2", "--taps", "embed", "--output=~/a.safetensors"]) == 0
    assert main(["golden", "softmax", "--cases", "plain", "--output=~/b.npz"]) == 0
    file = str(tmp_path / "a.safetensors")
    assert main(["report", file, file, "--output=~/c.html"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "b.npz", "c.html"}


def test_memory_that_python_lacks(monkeypatch, capfd):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("kimi_linear.cli.inspect.run", fail)
    assert main(["inspect"]) == 2
    assert capfd.readouterr().err == "kimi-linear inspect: there is not enough memory\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_names_in_proc_need_not_be_utf8(tmp_path):
    """A process is called as its script is, cut after 15 bytes; maps has the names of all files that are mapped."""
    name = os.fsencode(tmp_path) + b"/b ad\xff"
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.create_string_buffer(16)
    libc.prctl(16, before)
    with open(name, "wb+") as file:
        file.write(b"x")
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            libc.prctl(15, "\u03b1".encode() * 7 + b"\xce")
            try:
                assert bench.anonymous_bytes() > 0
                bench._numpy_blas.__wrapped__("get_num_threads")
            finally:
                libc.prctl(15, before)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_numpys_blas_in_a_folder_with_a_blank(tmp_path):
    folder = tmp_path / "a b" / "numpy"
    folder.mkdir(parents=True)
    source = "int openblas_get_num_threads(void) { return 7; }"
    library = folder / "libopenblas.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=source,
                   text=True, check=True)
    code = (f"import ctypes; library = ctypes.CDLL({str(library)!r})\n"
            "import io, kimi_linear.bench as bench\n"
            "maps = [line for line in open('/proc/self/maps', 'rb') if b'a b/numpy' in line]\n"
            "bench.open = lambda *_, **__: io.BytesIO(b''.join(maps))\n"
            "print(bench._numpy_blas('get_num_threads')())")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "7\n"
