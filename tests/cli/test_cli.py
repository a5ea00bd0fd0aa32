"""The commands as a shell meets them: help, errors, exit codes, Ctrl-C, closed pipes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import kimi_linear as kl
from kimi_linear.cli import COMMANDS, main
from kimi_linear.cli._common import read_text

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "tiny"
PARAMETERS = 5_644_304 + 5 * 8  # as its trainer counted them, and the routers' selection biases
PROGRAM = [sys.executable, "-m", "kimi_linear"]


def run(capfd, *argv):
    """(exit code, stdout, stderr) of a command in this process."""
    try:
        code = main(list(argv))
    except SystemExit as stop:  # argparse's own: help and usage
        code = stop.code
    out, err = capfd.readouterr()
    return code, out, err


def started(*argv):
    return subprocess.Popen([*PROGRAM, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- help and usage ----

@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(capfd, command):
    code, out, err = run(capfd, command, "--help")
    assert (code, err) == (0, "")
    assert f"kimi-linear {command}" in out.partition("example:")[2]


def test_overview_names_every_command(capfd):
    code, out, _ = run(capfd, "--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert run(capfd)[0] == 2


def test_version(capfd):
    import kimi_linear

    assert run(capfd, "--version")[:2] == (0, f"kimi-linear {kimi_linear.__version__}\n")


@pytest.mark.parametrize("argv, words", [
    (["genrate"], ["'genrate'", "did you mean generate?"]),
    (["generate"], ["--prompt", "is required"]),
    (["generate", "--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens", "'0'", ">= 1"]),
    (["generate", "--prompt", "a", "--nonsense"], ["--nonsense is not an option (see "]),
    (["generate", "--modle", "x"], ["--modle is not an option; did you mean --model? (see "]),
    (["generate", "--temp=0.5"], ["--temp is not an option; did you mean --temperature? (see "]),
    (["generate", "--prompt", "--nonsense"], ["--nonsense is not an option; if it is a value, --prompt=--nonsense"]),
    (["generate", "--json", "--nonsense"], ["--nonsense is not an option (see "]),
    (["golden", "-q", "--output"], ["-q is not an option (see "]),
    (["generate", "--prompt", "", "--max-new-tokens", "1"], ["prompt is empty"]),
    (["generate", "--prompt", "a", "--temperature", "-1"], [": temperature is -1; it must be finite and >= 0"]),
    (["trace", "--prompt", "", "-o", "never"], ["--prompt has no token; trace needs at least one"]),
    (["trace", "--ids", "", "-o", "never"], ["--ids has no token"]),
    (["trace", "--prompt-file", os.devnull, "-o", "never"], [f"{os.devnull} has no token"]),
    (["generate", "--ids", "1,2048"], ["2048"]),
    (["generate", "--ids", "1,x"], ["--ids", "'x'"]),
    (["generate", "--ids", "1,,2"], ["--ids: it is ''; it must be an integer"]),
    (["generate", "--ids", "1", "--chat"], ["--chat", "--ids"]),
    (["generate", "--prompt-file", "no such file"], ["no such file"]),
    (["generate", "no/such/model", "--prompt", "a"], ["no/such/model"]),
    (["generate", "a", "--model", "b", "--prompt", "a"], ["named twice"]),
    (["inspect", "--tensors", "nothing*"], ["nothing*", "matches none"]),
    (["plan", "--context", "many"], ["--context", "'many'"]),
    (["plan", "--dtype", "F32"], ["--dtype", "config.json"]),
    (["plan", "no-such-config.json"], ["no-such-config.json"]),
    (["plan", "--no-measure", "--context", str(2**42)], ["kimi-linear plan: context is 4398046511104"]),
    (["perplexity"], ["--text"]),
    (["perplexity", "--text", str(DATA / "golden64.safetensors")], ["is not UTF-8: byte ", "; it must be UTF-8 text"]),
    (["perplexity", "--text", os.devnull], [f"{os.devnull} has 0 tokens; it must have 2 or more"]),
    (["perplexity", "--text", str(DATA / "heldout.txt"), "--window", "1"], ["window is 1"]),
    (["bench", "--depths", "0,-1"], ["--depths", "'-1'"]),
    (["bench", "--device", "gpu"], ["device is 'gpu'"]),
    (["trace", "--ids", "1", "-o", "x", "--device", "hip-host", "--reference"], ["--device", "leave out --reference"]),
    (["laws", "--device", "hp"], ["device is 'hp'; it must be 'cpu', 'hip', 'hip:N' or 'hip-host'"]),
    (["replay", "calls", "--top", "0"], ["--top", "'0'"]),
    (["inspect", "nothing.gguf"], ["no folder or GGUF file nothing.gguf", "'tiny'"]),
    (["convert", str(DATA / "heldout.txt"), "folder"], ["heldout.txt is a file that begins with", "'GGUF'"]),
    (["golden", "softmax", "-o", str(DATA)], [f"{DATA}: Is a directory"]),
    (["golden", "softmax", "-o", "no/such/x.npz"], [" no/such/x.npz: No such file"]),
    (["diff", *[str(DATA / "heldout.txt")] * 2], ["heldout.txt: it is cut short, or no safetensors"]),
])
def test_a_wrong_argument_is_one_sentence_and_exit_2(capfd, argv, words):
    code, out, err = run(capfd, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("kimi-linear") and err.count("\n") == 1 and "Traceback" not in err
    assert all(word in err for word in words), err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_named_before_what_is_missing(capfd, command):
    code, out, err = run(capfd, command, "--hlep")
    assert (code, out) == (2, "")
    assert err == f"kimi-linear {command}: --hlep is not an option; did you mean --help? (see kimi-linear {command} " \
                  "--help)\n"


@pytest.mark.parametrize("argv", [
    ["plan", "--", "--no-such-model"], ["generate", "--prompt", "-- a", "--max-new-tokens", "x"],
    ["generate", "--prompt", "a", "--temperature", "-1e-3"], ["generate", "--ids", "1", "-n0"],
])
def test_what_begins_with_a_dash_and_is_no_option(capfd, argv):
    assert "is not an option" not in run(capfd, *argv)[2]


def test_chat_with_a_folder_for_its_state(capfd, tmp_path):
    code, out, err = run(capfd, "chat", "--state", str(tmp_path))
    assert (code, out) == (2, "") and f"--state is {tmp_path}, a folder; it must be a file" in err


def test_a_device(capfd):
    """The host build where it is there; where not, the sentence says which library lacks."""
    code, out, err = run(capfd, "generate", "--prompt", "In", "--max-new-tokens", "1", "--device", "hip-host")
    plain = run(capfd, "generate", "--prompt", "In", "--max-new-tokens", "1")[1]
    here = next(d for d in kl.devices() if d.name == "hip-host")
    assert (code, out) == (0, plain) if here.available else (code == 2 and "_hip_host.so" in err)
    code, _, err = run(capfd, "verify", "--device", "gpu")
    assert code == 2 and "device is 'gpu'; it must be 'cpu', 'hip'" in err


def test_commands_that_run_a_model_in_the_engine_take_the_same_device(capfd):
    words = {command: re.search(r"\n  --device NAME.*?(?=\n  --)", run(capfd, command, "--help")[1], re.DOTALL)
             for command in COMMANDS}
    assert {c for c, found in words.items() if found} == {"generate", "chat", "verify", "laws", "trace", "perplexity",
                                                             "bench"}
    assert len({" ".join(found[0].split()) for found in words.values() if found}) == 1


def test_the_packaged_model_has_a_name(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capfd, "convert", "tiny", "x.gguf")[0] == 0
    code, out, _ = run(capfd, "verify", "tiny", "x.gguf", "--tokens", "8")
    assert code == 0 and "top-1         100.00 % equal" in out
    assert run(capfd, "inspect", "tiny")[1] == run(capfd, "inspect")[1]


# ---- generate ----

def test_generate_is_reproducible_by_seed(capfd):
    def text(seed, *more):
        code, out, _ = run(capfd, "generate", "--prompt", "In the beginning", "--max-new-tokens", "24",
                           "--temperature", "0.8", "--top-p", "0.95", "--seed", seed, *more)
        assert code == 0
        return out

    assert text("7") == text("7", "--threads", "1") != text("8")


def test_generate_streams_text_to_stdout_and_its_cost_to_stderr(capfd):
    code, out, err = run(capfd, "generate", "--prompt", "In the beginning", "--max-new-tokens", "12")
    expected = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))["greedy"][0]
    assert code == 0
    assert out.endswith("\n") and expected["text"].startswith(out[:-1]) and len(out) > 12
    assert "12 written" in err and "cache float16" in err and "ended by length" in err


def test_a_prompt_of_text_is_shown_on_stderr_however_it_is_given(capfd, tmp_path, monkeypatch):
    prompt, few = "In the beginning", ["--max-new-tokens", "2"]
    (tmp_path / "p").write_text(prompt)
    read = {}
    for form in (["--prompt", prompt], ["--prompt-file", str(tmp_path / "p")], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
        code, out, err = run(capfd, "generate", *form, *few)
        assert code == 0 and err.startswith(prompt) and prompt not in out
        read[out] = form
        assert prompt not in run(capfd, "generate", *form, *few, "--chat")[2]
    assert len(read) == 1


def test_stdin_that_is_not_utf_8_is_told_what_it_must_be(capfd, monkeypatch, tmp_path):
    for argv in (["generate", "--prompt-file", "-"], ["trace", "--prompt-file", "-", "-o", str(tmp_path / "t")],
                 ["perplexity", "--text", "-"], ["verify", "--text", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"In the \xff beginning")))
        assert run(capfd, *argv) == (2, "", f"kimi-linear {argv[0]}: stdin is not UTF-8: byte 7 is 0xff; it must be "
                                            "UTF-8 text\n")
    for mode in ("0", "1"):  # as a POSIX locale has it, and another
        talk = subprocess.run([*PROGRAM, "chat", "--max-new-tokens", "2"], input=b"Who?\n\xff\nAnd who?\n",
                              capture_output=True, env={**os.environ, "PYTHONUTF8": mode, "LC_ALL": "C.UTF-8"})
        assert talk.returncode == 0 and talk.stdout.count(b"\n") == 2, "the conversation goes on"
        assert b"the line '\\udcff' has bytes that are not UTF-8; it must be UTF-8 text" in talk.stderr


def test_ends_of_lines_are_one_in_every_input(tmp_path):
    (tmp_path / "t").write_bytes(b"a\r\nb\rc\n")
    assert read_text(str(tmp_path / "t")) == "a\nb\nc\n"


def test_the_mark_of_an_encoding_is_no_text(tmp_path):
    (tmp_path / "t").write_text("a\ufeffb", encoding="utf-8-sig")
    assert read_text(str(tmp_path / "t")) == "a\ufeffb"


def test_a_package_that_is_not_there_is_bad_input(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    run(capfd, "trace", "--ids", "1", "-o", str(tmp_path / "t"))
    (tmp_path / "x.pt").write_bytes(b"PK")
    (tmp_path / "m.json").write_text("{}")
    code, out, err = run(capfd, "diff", str(tmp_path / "t"), str(tmp_path / "x.pt"), "--names", "pt", "--config",
                         str(ROOT / "kimi_linear" / "data" / "tiny"), "--mapping", str(tmp_path / "m.json"))
    assert (code, out) == (2, "") and "torch, which is not installed here" in err and err.count("\n") == 1, err
    folder = tmp_path / "m"
    folder.mkdir()
    _copy_of_tiny(folder)
    (folder / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}')
    code, out, err = run(capfd, "inspect", str(folder))
    assert (code, out) == (2, "") and "needs the package tokenizers" in err and err.count("\n") == 1


def test_generate_json_and_ids_agree_with_the_prompt(capfd):
    expected = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))["greedy"][1]
    argv = ["--max-new-tokens", "8", "--cache", "float32", "--json"]
    _, by_text, _ = run(capfd, "generate", "--prompt", expected["prompt"], *argv)
    _, by_ids, _ = run(capfd, "generate", "--ids", ",".join(map(str, expected["prompt_ids"])), *argv)
    by_text, by_ids = json.loads(by_text), json.loads(by_ids)
    assert by_text["tokens"] == by_ids["tokens"] == expected["ids"][:8]
    assert by_text["prompt_tokens"] == expected["prompt_ids"]
    assert len(by_text["logprobs"]) == 8 and max(by_text["logprobs"]) <= 0


def test_generate_chat_goes_through_the_template(capfd):
    import kimi_linear as kl

    _, out, _ = run(capfd, "generate", "--chat", "--prompt", "Hello", "--max-new-tokens", "4", "--json")
    tokenizer = kl.Model.tiny().tokenizer
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert json.loads(out)["prompt_tokens"] == tokenizer.encode(rendered)


# ---- inspect, plan, perplexity ----

def test_inspect_counts_parameters(capfd):
    _, out, _ = run(capfd, "inspect", "--json")
    facts = json.loads(out)
    assert facts["parameters"] == PARAMETERS
    assert facts["active_parameters"] == PARAMETERS - 5 * (8 - 2) * 3 * 96 * 256
    assert facts["layers"] == "kKKMKM" and facts["notes"] == []
    assert sum(facts["stored_bytes"].values()) == facts["plan"]["weights"]
    code, out, _ = run(capfd, "inspect")
    assert code == 0 and "kKKMKM" in out and "5.64 M" in out


def test_inspect_lists_tensors_and_unknown_keys(capfd, tmp_path):
    _, out, _ = run(capfd, "inspect", "--tensors", "*.layers.3.*.weight", "--json")
    tensors = {t["name"]: t for t in json.loads(out)["tensors"]}
    latent = tensors["model.layers.3.self_attn.kv_a_layernorm.weight"]
    assert (latent["shape"], latent["dtype"], latent["bytes"]) == ([64], "BF16", 128)
    folder = _copy_of_tiny(tmp_path, new_key=1)
    assert "unknown keys" in run(capfd, "inspect", str(folder))[1]
    assert "new_key" in run(capfd, "inspect", "--model", str(folder), "--json")[1]


def _copy_of_tiny(folder, **changes):
    """The packaged model with changes to its config, its weights linked."""
    import importlib.resources

    tiny = Path(str(importlib.resources.files("kimi_linear") / "data" / "tiny"))
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").symlink_to(tiny / "model.safetensors")
    return folder


def test_a_folder_without_a_tokenizer_works_with_ids(capfd, tmp_path):
    folder = str(_copy_of_tiny(tmp_path))
    code, out, _ = run(capfd, "generate", folder, "--ids", "799 258 1743 1218", "--max-new-tokens", "3")
    assert (code, out) == (0, "268 258 450\n")
    code, _, err = run(capfd, "generate", folder, "--prompt", "a")
    assert code == 2 and "has no tokenizer" in err


def test_plan_is_consistent(capfd):
    def plan(*argv):
        code, out, _ = run(capfd, "plan", *argv, "--json")
        assert code == 0
        return json.loads(out)

    one = plan("--context", "1000")
    assert one["total"] == one["weights"] + one["anonymous"]
    assert one["anonymous"] == one["vectors"] + one["state"] + one["scratch"]
    assert one["state"] == one["state_fixed"] + 2 * one["state_page"]
    three = plan("--context", "1000", "--sequences", "3")
    assert three["state"] == 3 * one["state"]
    half = plan("--context", "1000", "--cache", "float16")
    assert 2 * half["state_page"] == one["state_page"]
    import kimi_linear as kl

    assert one["state"] == kl.Model.tiny().plan(context=1000).state


def test_plan_of_a_config_alone(capfd, tmp_path):
    path = _copy_of_tiny(tmp_path) / "config.json"
    wide = json.loads(run(capfd, "plan", str(path), "--dtype", "F32", "--json")[1])
    narrow = json.loads(run(capfd, "plan", str(path), "--json")[1])
    assert wide["weights"] == 4 * PARAMETERS
    assert narrow["weights"] == 2 * PARAMETERS
    code, out, _ = run(capfd, "plan", str(path))
    assert code == 0 and "weights" in out and "scratch" in out


def test_perplexity_says_what_the_library_says(capfd, tmp_path):
    from kimi_linear import Model
    from kimi_linear.perplexity import perplexity

    path = tmp_path / "text.txt"
    path.write_text("And the LORD said unto Moses, Stretch forth thine hand.", encoding="utf-8")
    code, out, _ = run(capfd, "perplexity", "--text", str(path), "--json")
    model = Model.tiny()
    ids = model.tokenizer.encode(path.read_text(encoding="utf-8"))
    assert code == 0
    assert json.loads(out)["perplexity"] == perplexity(model, ids).perplexity
    _, out, _ = run(capfd, "perplexity", "--text", str(path), "--whole", "10", "--json")
    assert json.loads(out)["scored"] == 9


# ---- bench and demo ----

def test_bench_reports_every_part(capfd):
    code, out, _ = run(capfd, "bench", "--prefill", "16", "--decode", "4", "--depths", "0,32",
                       "--repeat", "1", "--json")
    result = json.loads(out)
    assert code == 0
    assert [(r["kind"], r["depth"]) for r in result["rates"]] == [
        ("prefill", 0), ("decode", 0), ("prefill", 32), ("decode", 32)]
    assert all(r["tokens_per_second"] > 0 and r["of_roof"] > 0 for r in result["rates"])
    timed = {row["op"] for row in result["ops"]["decode"]}
    assert {"linear", "moe", "delta_rule", "latent_attention"} <= timed
    assert result["memory"]["held"] <= result["memory"]["planned"]


def test_bench_on_a_device(capfd):
    """Its roofs are its own; the process's growth, NumPy's products and BLAS are none of it."""
    if not next(d for d in kl.devices() if d.name == "hip-host").available:
        pytest.skip("make hip-host has not been run")
    argv = ["bench", str(ROOT / "tests" / "data" / "golden" / "kimi-a"), "--prefill", "2", "--decode", "1",
            "--depths", "0", "--repeat", "1", "--device", "hip-host"]
    code, out, _ = run(capfd, *argv, "--json")
    result = json.loads(out)
    assert code == 0 and result["machine"]["device"].startswith("hip-host: host build")
    assert [(r["kind"], r["bound"]) for r in result["rates"]] == [("prefill", "fma"), ("decode", "read")]
    assert all(r["tokens_per_second"] > 0 and r["of_roof"] > 0 for r in result["rates"])
    assert set(result["roof"]) == {"read", "fma", "read_bytes"} and result["roof"]["fma"] > 0
    assert {"linear", "delta_rule", "latent_attention"} <= {row["op"] for row in result["ops"]["decode"]}
    memory = result["memory"]
    assert 0 < memory["held"] <= memory["planned"] and memory["measured"] is None
    code, out, _ = run(capfd, *argv)
    assert code == 0 and "its times mean nothing" in out and "sgemm" not in out and "grew" not in out


def test_demo_writes_and_judges_itself(capfd):
    code, out, _ = run(capfd, "demo", "--max-new-tokens", "16")
    assert code == 0
    assert "In the beginning" in out and "tokens at" in out and "planned" in out
    assert all(f"  {i} " in out for i in range(6)) and "rms error" in out
    assert "its copy  FAILS 17 of 18 cases: the final state equals ours with K and V swapped" in out


# ---- signals and pipes ----

ENDLESS = ("generate", "--ids", "799,258,1743,1218", "--max-new-tokens", "1000000", "--temperature", "1")


def test_ctrl_c_ends_generate_with_130_and_keeps_what_was_printed():
    process = started(*ENDLESS)
    first = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 10  # a hang, not a speed, is what this would find
    assert len(first) == 40 and (first + rest).endswith(b"\n")
    assert b"ended by interruption" in err and b"interrupted" in err and b"Traceback" not in err


@pytest.mark.parametrize("handler, code, says", [
    ("default_int_handler", 130, b"\nkimi-linear: interrupted\n"),
    ("SIG_IGN", 0, b""),  # as a shell's background has it
])
def test_ctrl_c_while_it_is_imported(tmp_path, handler, code, says):
    """NumPy, the first that it imports, is one that says so and then takes its time."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, function = project["project"]["scripts"]["kimi-linear"].split(":")
    assert module in project["tool"]["setuptools"]["py-modules"]
    (tmp_path / "numpy.py").write_text("import os, time\nprint('here', flush=True)\ntime.sleep(1)\nos._exit(0)")
    script = f"import signal, sys; signal.signal(signal.SIGINT, signal.{handler}); " \
             f"from {module} import {function} as main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", script, "--version"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60), process.returncode) == ((b"", says), code)


def test_a_closed_pipe_is_quiet():
    process = started(*ENDLESS)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.parametrize("arguments, codes", [
    (["--help"], (141,)),
    (["--version"], (141,)),
    (["trace", "--help"], (0, 141)),  # argparse drops what it cannot write
])
def test_help_into_a_closed_pipe_is_quiet(arguments, codes):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert done.returncode in codes and done.stderr.decode() == ""
