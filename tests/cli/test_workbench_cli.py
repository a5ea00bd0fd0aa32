"""verify, trace and diff from the command line: what they print, their exit codes, what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DATA, read_safetensors

import kimi_linear as kl
from kimi_linear.adapters import KINDS
from kimi_linear.cli import _common, main

KIMI_A = str(DATA / "golden" / "kimi-a")


@pytest.fixture
def cli(capsys):
    """Runs a command; (exit code, stdout, stderr)."""

    def run(*words):
        try:
            code = main([str(w) for w in words])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.mark.parametrize("command", ["verify", "trace", "diff"])
def test_help_shows_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and "example:" in out and f"kimi-linear {command} " in out


# ---- foreign traces ----


def test_diff_and_blame_of_a_folder_of_arrays(cli, tmp_path):
    model = kl.Model.tiny()
    trace = model.trace(np.arange(3, 12))
    trace.save(tmp_path / "ours.safetensors")
    dump = tmp_path / "dump"
    dump.mkdir()
    for name in ("layers.0.kda.f", "layers.0.kda.g"):
        np.save(dump / f"{name}.npy", trace[name].transpose(1, 0, 2) * np.float32(1 + name.endswith("g") / 100))
    mapping = tmp_path / "m.json"
    mapping.write_text(json.dumps({"taps": {n: {"file": f"{n}.npy", "axes": "HTK"}
                                            for n in ("layers.0.kda.f", "layers.0.kda.g")}}), encoding="utf-8")
    config = kl.__path__[0] + "/data/tiny"
    code, out, err = cli("diff", tmp_path / "ours.safetensors", dump, "--names", "arrays", "--mapping", mapping,
                         "--config", config)
    assert code == 1 and "DIVERGES at layers.0.kda.g" in out, err
    arrays = {n: x * np.float32(1.01) if n == "layers.0.kda.g" else x for n, x in trace.items()}
    np.savez(tmp_path / "all.npz", **arrays, tokens=np.arange(3, 12))
    code, out, err = cli("blame", "tiny", tmp_path / "all.npz", "--names", "arrays")
    assert code == 1 and "WRONG: layers.0.kda.g (decay_gate)" in out, err
    code, _, err = cli("blame", "tiny", dump, "--mapping", mapping)
    assert code == 2 and "--mapping is for --names arrays and --names pt" in err
    code, _, err = cli("diff", tmp_path / "ours.safetensors", dump, "--names", "vllm", "--config", config)
    assert code == 2 and "holds no call-*.safetensors" in err


def test_trace_keeps_states(cli, tmp_path):
    out = tmp_path / "x.safetensors"
    assert cli("trace", "--ids", "5,6,7", "--taps", "layers.1", "--states", "layers.1", "-o", out)[0] == 0
    assert {"before.layers.1.kda.state", "layers.1.kda.state"} <= set(read_safetensors(out))
    code, _, err = cli("trace", "--ids", "5,6,7", "--states", "layers.1", "--reference", "-o", out)
    assert code == 2 and "--states is of the engine" in err


# ---- verify ----


def test_verify(cli):
    code, out, err = cli("verify", "--tokens", 24)
    assert code == 0 and err == ""
    assert out.startswith("tiny: 24 tokens through 6 layers kKKMKM")
    assert out.rstrip().splitlines()[-1].startswith("ok: all 175 taps, every op inside its own budget")
    assert "\033" not in out
    code, every, _ = cli("verify", "--tokens", 8, "--all", "--no-free-run")
    assert code == 0 and all(tap in every for tap in kl.Model.tiny().taps)
    assert "free run" not in every


def test_verify_json(cli, tmp_path):
    (tmp_path / "some.txt").write_text("In the beginning", encoding="utf-8")
    code, out, _ = cli("verify", "--text", tmp_path / "some.txt", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["tokens"] == 4 and found["flips"] == []
    assert {op["name"] for op in found["ops"]} >= {"delta_rule", "latent_attention", "moe", "linear", "route"}


def test_verify_without_a_tokenizer(cli):
    code, out, err = cli("verify", KIMI_A, "--tokens", 9, "--seed", 3)
    assert code == 0 and "9 tokens" in out and "kimi-a has no tokenizer: random ids, seed 3" in err
    code, out, err = cli("verify", "--model", KIMI_A, "--ids", "5,6,7")
    assert code == 0 and "3 tokens" in out and err == ""


def test_verify_over_budget_is_exit_code_1(cli, monkeypatch):
    from kimi_linear import reference

    right = reference.swiglu
    monkeypatch.setattr(reference, "swiglu", lambda gate, up, limit=None: right(gate, up, limit=limit) * (1 + 1e-5))
    code, out, _ = cli("verify", KIMI_A, "--tokens", 5)
    assert code == 1 and "FAILED: " in out and "swiglu" in out.rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "0"), "'0'; it must be an integer >= 1"),
        (("--ids", "1", "--text", "x"), "not allowed with argument"),
        (("--ids", "400"), "400; it must be 0 <= tokens < 320"),
        (("--text", __file__), "kimi-a has no tokenizer"),
        (("--text", "nowhere.txt"), "nowhere.txt: No such file"),
    ],
)
def test_verify_bad_usage(cli, words, message):
    code, out, err = cli("verify", KIMI_A, *words)
    assert code == 2 and out == "" and message in err
    assert err.count("\n") <= 2, "one sentence"


# ---- trace and diff ----


def test_trace_and_diff(cli, tmp_path):
    ours, exact = tmp_path / "ours.safetensors", tmp_path / "exact.safetensors"
    assert cli("trace", "--prompt", "In the beginning", "-o", ours)[0] == 0
    code, out, _ = cli("trace", "--prompt", "In the beginning", "-o", exact, "--reference", "--json")
    assert code == 0 and json.loads(out)["taps"]["logits"] == {"shape": [4, 2048], "dtype": "float64"}
    model = kl.Model.tiny()
    assert list(kl.Trace.load(exact)) == list(kl.Trace.load(ours)) == model.taps
    scores = tmp_path / "scores.safetensors"
    assert cli("trace", "--ids", "5,6", "--reference", "--taps", "*", "--taps", "*.scores", "-o", scores)[0] == 0
    assert list(kl.Trace.load(scores)) == list(model.trace([5, 6], ["*", "*.scores"]))
    assert (kl.Trace.load(ours)["logits"] == model.forward(model.tokenizer.encode("In the beginning"))).all()
    code, out, _ = cli("diff", ours, exact)
    assert code == 0 and out.rstrip().splitlines()[-1].startswith("ok: no divergence in 155 taps")


def test_diff_finds_the_first_divergence(cli, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    taps = [word for tap in ("layers.2.*", "layers.2.moe.scores", "logits") for word in ("--taps", tap)]
    assert cli("trace", KIMI_A, "--ids", "3,1,4,1,5", *taps, "-o", a)[0] == 0
    trace = kl.Trace.load(a)
    assert list(trace)[-1] == "logits" and all(n.startswith("layers.2.") for n in list(trace)[:-1])
    arrays = {n: np.array(x) for n, x in trace.items()}
    arrays["layers.2.kda.beta"][3] += 0.01
    kl.Trace(arrays, trace.meta).save(b)
    code, out, _ = cli("diff", a, b)
    assert code == 1 and "DIVERGES at layers.2.kda.beta, token 3" in out
    code, out, _ = cli("diff", a, b, "--json")
    assert code == 1 and json.loads(out)["first"]["token"] == 3
    for asked, differs in (("layers.2.mid", 0), ("layers.2", 1)):
        code, out, _ = cli("diff", a, b, "--taps", asked)
        assert code == differs and "only in" not in out
    assert "layers.2.moe.scores" in out
    assert cli("diff", a, b, "--threshold", "1")[0] == 0


def test_diff_against_transformers(cli, tmp_path):
    a, golden = tmp_path / "a.safetensors", DATA / "golden" / "kimi-a" / "golden.safetensors"
    ids = ",".join(map(str, read_safetensors(golden)["short/tokens"]))
    assert cli("trace", KIMI_A, "--ids", ids, "-o", a)[0] == 0
    code, out, _ = cli("diff", a, golden, "--names", "hf", "--config", KIMI_A, "--prefix", "short/")
    assert code == 0 and "layers.4.kda.o_norm" in out and "only in a: " in out
    code, _, err = cli("diff", a, golden, "--names", "hf", "--config", KIMI_A, "--prefix", "long/")
    assert code == 2 and "a is a trace of 21 tokens and b of 70" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("diff", "a", "b"), "a: No such file"),
        (("diff", "a", "b", "--names", "hf"), "--names hf needs --config DIR"),
        (("diff", "a", "b", "--config", "."), "--config is for --names"),
        (("diff", "a", "b", "--threshold", "-1"), "'-1'; it must be a number >= 0"),
        (("diff", "a"), "required: B"),
        (("trace", "-o", "x"), "one of the arguments"),
        (("trace", KIMI_A, "--prompt", "x", "-o", "never"), "kimi-a has no tokenizer"),
        (("trace", KIMI_A, "--ids", "1", "--taps", "layer.3", "-o", "never"), "'layer.3' matches no tap"),
        (("trace", KIMI_A, "--ids", "1,999", "-o", "never"), "999"),
        (("trace", KIMI_A, "--ids", "1", "-o", "no/such/folder/x"), "no/such/folder"),
    ],
)
def test_bad_usage(cli, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert code == 2 and out == "" and message in err
    assert os.listdir(tmp_path) == []


def test_interrupted_trace_leaves_nothing(tmp_path):
    """Ctrl-C in the middle of a long float64 run: exit code 130, no file, and what was there before stays."""
    target = tmp_path / "trace.safetensors"
    kl.Model.tiny().trace([7, 8], "embed").save(target)
    before = target.read_bytes()
    ids = ",".join(["7"] * 12000)
    run = subprocess.Popen(
        [sys.executable, "-m", "kimi_linear", "trace", KIMI_A, "--ids", ids, "--reference", "-o", target],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_work(run)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert target.read_bytes() == before and os.listdir(tmp_path) == [target.name]


def wait_for_work(run):
    """Until the process has spent a second and a half of its own: past its imports, inside the model."""
    if not os.path.exists("/proc/self/stat"):
        time.sleep(5)  # macOS
        return
    ticks = os.sysconf("SC_CLK_TCK")
    while run.poll() is None:
        with open(f"/proc/{run.pid}/stat", encoding="ascii", errors="replace") as stat:
            spent = int(stat.read().rsplit(")", 1)[1].split()[11]) / ticks
        if spent > 1.5:
            return
        time.sleep(0.02)


# ---- blame ----


def test_blame(cli, tmp_path):
    model = kl.Model.from_pretrained(KIMI_A)
    calls = kl.faults.run(model, [[[1, 2, 3, 4, 5, 6]], [[7, 8, 9]]], plant={"layers.1.kda.g": "dt_bias_twice"})
    paths = [tmp_path / f"call{i}.safetensors" for i in range(2)]
    for path, trace in zip(paths, calls):
        trace.save(path)
    code, out, err = cli("blame", KIMI_A, *paths)
    assert code == 1 and err == "" and "dt_bias_twice: dt_bias is added twice" in out
    assert out.splitlines()[-1].startswith("WRONG: layers.1.kda.g (decay_gate), ")
    model.trace([1, 2, 3]).save(paths[0])
    code, out, _ = cli("blame", KIMI_A, paths[0], "--json")
    assert code == 0 and json.loads(out)["ok"]
    golden = DATA / "golden" / "kimi-a" / "golden.safetensors"
    assert cli("blame", KIMI_A, golden, "--names", "hf", "--prefix", "short/")[0] == 0


def test_blame_compares_weights_first(cli, tmp_path):
    model, name = kl.Model.from_pretrained(KIMI_A), "model.layers.1.self_attn.b_proj.weight"
    model.weights[name] = 2 * model.weights[name]
    model.save_pretrained(tmp_path / "theirs")
    model.trace([1, 2, 3]).save(tmp_path / "trace.safetensors")
    code, out, _ = cli("blame", KIMI_A, tmp_path / "trace.safetensors", "--weights", tmp_path / "theirs")
    assert code == 1 and out.splitlines()[-1].startswith(f"WRONG: weight {name} differs: max abs ")
    code, out, _ = cli("blame", KIMI_A, tmp_path / "trace.safetensors", "--weights", KIMI_A, "--json")
    assert code == 1 and json.loads(out)["weights"] == []


def test_blame_lists_faults_and_asks_for_files(cli):
    code, out, _ = cli("blame", "--faults")
    assert code == 0 and "decay_after_update" in out and len(out.splitlines()) == len(kl.faults.CATALOGUE)
    assert len(json.loads(cli("blame", "--faults", "--json")[1])) == len(kl.faults.CATALOGUE)
    code, _, err = cli("blame", KIMI_A)
    assert code == 2 and err == (
        "kimi-linear blame: it needs MODEL ('tiny' is the packaged one) and at least one THEIRS.safetensors\n")


# ---- report ----


def test_report_of_two_traces(cli, tmp_path):
    model, page = kl.Model.from_pretrained(KIMI_A), tmp_path / "page.html"
    [right] = kl.faults.run(model, [1, 2, 3, 4, 5])
    [wrong] = kl.faults.run(model, [1, 2, 3, 4, 5], plant={"layers.1.kda.g": "dt_bias_twice"})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    wrong.save(a), right.save(b)
    code, out, err = cli("report", a, b, "-o", page)
    assert code == 1 and out.startswith("DIVERGES at layers.1.kda.g, token 0") and err.startswith(f"{page}: ")
    assert "inherited" not in page.read_text(encoding="utf-8")
    code, out, _ = cli("report", a, b, "--model", KIMI_A, "-o", page)
    assert code == 1 and "added by this op" in out and "inherited" in page.read_text(encoding="utf-8")
    assert cli("report", b, b, "-o", page)[:2] == (0, "ok: no divergence in 155 taps; the largest rms error is "
                                                      "0.00e+00, at embed\n")
    assert json.loads(cli("report", a, b, "-o", page, "--json")[1])["first"]["tap"] == "layers.1.kda.g"


def test_report_of_calls_and_of_transformers(cli, tmp_path):
    model, page = kl.Model.from_pretrained(KIMI_A), tmp_path / "page.html"
    calls = kl.faults.run(model, [[[1, 2, 3, 4, 5, 6]], [[7, 8, 9]]], plant={"layers.1.kda.g": "dt_bias_twice"})
    paths = [tmp_path / f"call{i}.safetensors" for i in range(2)]
    for path, trace in zip(paths, calls):
        trace.save(path)
    code, out, _ = cli("report", *paths, "--calls", "--model", KIMI_A, "-o", page)
    assert code == 1 and "dt_bias_twice" in out and "call 1, token 2" in page.read_text(encoding="utf-8")
    golden = DATA / "golden" / "kimi-a" / "golden.safetensors"
    theirs = ("--names", "hf", "--prefix", "short/", "--model", KIMI_A)
    code, out, _ = cli("report", golden, *theirs, "-o", page)
    assert code == 0 and out.startswith("ok: none of ")
    model.trace(read_safetensors(golden)["short/tokens"]).save(paths[0])
    code, out, _ = cli("report", paths[0], golden, *theirs, "-o", page)
    assert code == 0 and out.startswith("ok: no divergence in "), "of two files only theirs has their names"


def test_report_of_any_kind_of_names(cli, tmp_path):
    """A folder of arrays that is judged, and laid beside a trace of ours; calls of another engine, one too many."""
    trace, page = kl.Model.tiny().trace(np.arange(3, 12)), tmp_path / "page.html"
    trace.save(tmp_path / "ours.safetensors")
    wrong = {n: x * np.float32(1.01) if n == "layers.0.kda.g" else x for n, x in trace.items()}
    np.savez(tmp_path / "all.npz", **wrong, tokens=np.arange(3, 12))
    theirs = ("--names", "arrays", "--model", "tiny", "-o", page)
    code, out, err = cli("report", tmp_path / "all.npz", *theirs)
    assert code == 1 and "WRONG: layers.0.kda.g (decay_gate)" in out, err
    code, out, err = cli("report", tmp_path / "all.npz", tmp_path / "ours.safetensors", *theirs)
    assert code == 1 and out.startswith("DIVERGES at layers.0.kda.g"), err
    mapping = tmp_path / "m.json"
    mapping.write_text('{"taps": {"layers.0.kda.gg": {"key": "layers.0.kda.g"}}}', encoding="utf-8")
    code, _, err = cli("report", tmp_path / "all.npz", *theirs, "--mapping", mapping)
    assert code == 2 and "'layers.0.kda.gg' is no tap of this model; near it are layers.0.kda.g" in err
    code, _, err = cli("report", tmp_path, "--names", "vllm", "--model", "tiny", "-o", page)
    assert code == 2 and "holds no call-*.safetensors" in err


COMPARING = {"diff": ("a", "b"), "blame": ("tiny", "a"), "report": ("a", "--model", "tiny", "-o", "x")}


@pytest.mark.parametrize("command", COMPARING)
def test_the_kinds_of_names_are_those_of_the_adapters(cli, command):
    """In help, in what is taken, and in what is said of another."""
    _, out, _ = cli(command, "--help")
    help = " ".join(out.split())
    for kind, (_, text) in KINDS.items():
        assert f"{kind}, {text}" in help
    code, _, err = cli(command, *COMPARING[command], "--names", "vlm")
    assert code == 2 and "--names: invalid choice: 'vlm'" in err and all(kind in err for kind in KINDS)
    assert cli(command, *COMPARING[command], "--mapping", "m.json")[2] == \
        f"kimi-linear {command}: --mapping is for --names arrays and --names pt\n"


@pytest.mark.parametrize("command", ["diff", "report"])
def test_several_calls_are_not_compared_as_one(cli, tmp_path, monkeypatch, command):
    model = kl.Model.tiny()
    trace = model.trace([3, 4, 5])
    trace.save(tmp_path / "a.safetensors")
    monkeypatch.setattr("kimi_linear.adapters.vllm.read", lambda path, *, model: [trace, trace])
    tiny = f"{kl.__path__[0]}/data/tiny"
    rest = ("--config", tiny) if command == "diff" else ("--model", tiny, "-o", tmp_path / "page.html")
    code, _, err = cli(command, tmp_path / "a.safetensors", tmp_path, "--names", "vllm", *rest)
    assert code == 2 and f"{tmp_path} has 2 calls" in err and "kimi-linear blame takes them all" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "b", "c"), "there are 3 traces; name two, or say --calls"),
        (("a",), "name the checkpoint, --model MODEL"),
        (("a", "b", "--calls"), "name the checkpoint, --model MODEL"),
        (("a", "--model", "tiny", "--threshold", "1"), "--threshold is for two traces"),
        (("a", "b", "--dtype", "float32"), "--dtype is for one trace"),
        (("a", "b", "--names", "hf"), "--names hf needs --model MODEL"),
        (("a", "b", "--names", "sglang"), "--names sglang needs --model MODEL"),
        (("a", "b"), "a: No such file"),
    ],
)
def test_report_of_what_it_cannot(cli, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("report", *words, "-o", "page.html")
    assert code == 2 and out == "" and message in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [("trace", "tiny", "--ids", "1,2"), ("golden", "rms_norm", "--cases", "plain")])
def test_a_file_of_another_kind_is_not_overwritten(cli, tmp_path, command):
    other, own = tmp_path / "model.gguf", str(tmp_path / "out.npz")
    other.write_bytes(b"GGUF and all that")
    code, _, err = cli(*command, "-o", other)
    assert code == 2 and "it would be lost" in err
    assert other.read_bytes() == b"GGUF and all that"
    for _ in range(2):  # its own kind is
        assert cli(*command, "-o", own)[0] == 0


def test_a_prefix_of_a_trace_of_ours_is_refused(cli, tmp_path):
    trace = str(tmp_path / "t.safetensors")
    cli("trace", "tiny", "--ids", "1,2", "-o", trace)
    for words in (("diff", trace, trace), ("blame", "tiny", trace),
                  ("report", trace, "--model", "tiny", "-o", tmp_path / "r.html")):
        code, out, err = cli(*words, "--prefix", "foo")
        assert code == 2 and out == "" and f"--prefix is 'foo', and {trace} is a trace of ours" in err
    golden = str(DATA / "golden" / "kimi-a" / "golden.safetensors")
    cli("trace", KIMI_A, "--ids", ",".join(map(str, read_safetensors(golden)["short/tokens"])), "-o", trace)
    code, out, err = cli("report", golden, trace, "--names", "hf", "--prefix", "short/", "--model", KIMI_A, "-o",
                         tmp_path / "r.html")
    assert code == 0, err


def test_a_page_is_not_written_over_the_trace_that_it_reads(cli, tmp_path):
    trace = str(tmp_path / "t.safetensors")
    cli("trace", "tiny", "--ids", "1,2", "-o", trace)
    code, _, err = cli("report", trace, "--model", "tiny", "-o", trace)
    assert code == 2 and "not a page" in err
    assert cli("diff", trace, trace)[0] == 0


def test_cases_are_not_taken_for_results(cli, tmp_path):
    cases = str(tmp_path / "cases.npz")
    cli("golden", "rms_norm", "-o", cases)
    code, _, err = cli("golden", "rms_norm", "--judge", cases)
    assert code == 2 and "is the file of cases itself" in err


def test_llama_cpp_that_is_not_installed_is_one_sentence(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    gguf = str(tmp_path / "tiny.gguf")
    cli("convert", "tiny", gguf, "--type", "F32")
    code, _, err = cli("trace", gguf, "--ids", "1,2", "-o", tmp_path / "t", "--engine", "llama.cpp")
    assert code == 2 and "trace: --engine llama.cpp: llama-cpp-python must be installed" in err


def test_an_empty_file_is_no_loss(tmp_path):
    path = tmp_path / "page.html"
    _common.check_output(path, lambda path: False, "a page")
    path.write_bytes(b"")  # as mktemp leaves one
    _common.check_output(path, lambda path: False, "a page")
    path.write_bytes(b"x")
    _common.check_output(path, lambda path: True, "a page")
    with pytest.raises(ValueError, match="is there and is not a page; it would be lost"):
        _common.check_output(path, lambda path: False, "a page")
