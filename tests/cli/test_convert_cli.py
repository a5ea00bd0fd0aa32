"""``kimi-linear convert`` and ``quantize``, and ``verify`` of two files."""

import json

import pytest

import kimi_linear as kl
from kimi_linear.cli import main


def run(capfd, *argv):
    code = main([str(a) for a in argv])
    return code, *capfd.readouterr()


def test_convert_and_back(tmp_path, capfd, tiny_dir):
    code, out, err = run(capfd, "convert", tiny_dir, tmp_path / "x.gguf", "--type", "Q4_K", "--map", "output.*=Q6_K",
                         "--map", "blk.0.*=Q8_0")
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0].startswith(f"{tmp_path / 'x.gguf'}: 130 tensors, ")
    assert "Q6_K 1 " in lines[1] and lines[2] == "fallback Q4_K -> Q5_0: 25 tensors have rows that Q4_K does not divide"
    code, out, _ = run(capfd, "convert", tmp_path / "x.gguf", tmp_path / "back", "--dtype", "float32", "--json")
    assert code == 0 and json.loads(out)["types"] == {"F32": {"tensors": 233, "bytes": 22577376}}
    assert kl.Model.from_pretrained(tmp_path / "back").config == kl.Model.tiny().config


def test_what_is_in_the_folder_is_replaced_with_force_alone(tmp_path, capfd, tiny_dir, golden_dir):
    assert run(capfd, "convert", golden_dir / "kimi-a", tmp_path / "x.gguf")[0] == 0
    kl.Model.from_pretrained(tiny_dir).save_pretrained(tmp_path / "old")
    code, out, err = run(capfd, "convert", tmp_path / "x.gguf", tmp_path / "old")
    assert (code, out) == (2, "") and "(config.json); overwrite=True (--force) replaces it" in err
    assert kl.Model.from_pretrained(tmp_path / "old").tokenizer is not None
    code, out, err = run(capfd, "convert", tmp_path / "x.gguf", tmp_path / "new", "--type", "Q8_0")
    assert (code, out) == (2, "") and "`type` or `types` (--type, --map) are given" in err and "(--dtype)" in err
    assert run(capfd, "convert", tmp_path / "x.gguf", tmp_path / "old", "--force")[0] == 0
    assert kl.Model.from_pretrained(tmp_path / "old").tokenizer is None


def test_quantize(tmp_path, capfd, tiny_dir):
    assert run(capfd, "quantize", tiny_dir, tmp_path / "a.gguf", "--type", "Q8_0")[0] == 0
    code, out, _ = run(capfd, "quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", "--type", "Q4_0")
    assert code == 0 and "note: 81 tensors were in blocks of another type before: errors add up" in out
    code, out, err = run(capfd, "quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", "--type", "Q4_0")
    assert (code, out) == (2, "") and "b.gguf is there; overwrite=True (--force) replaces it" in err
    assert run(capfd, "quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", "--type", "Q5_0", "--force")[0] == 0
    code, out, _ = run(capfd, "inspect", "--check", tmp_path / "b.gguf", "--json")
    assert code == 0 and json.loads(out)["converter"] == "kimi_linear"


@pytest.mark.parametrize("argv, words", [
    (["quantize", "a", "b.gguf"], "no type is given"), (["quantize", "a", "b", "--type", "Q4_0"], "ends in .gguf"),
    (["convert", "a", "b.gguf", "--type", "Q4_K_M"], "type is 'Q4_K_M'; it must be one of F32"),
    (["convert", "a", "b.gguf", "--dtype", "float32"], "its types are `type` and `types` (--type, --map)"),
    (["convert", "none", "b.gguf"], "none"), (["verify", "a", "b", "--own-experts"], "two files are compared"),
    (["verify", "a", "b", "--model", "c"], "two files are compared"),
])
def test_bad_usage(capfd, argv, words):
    code, out, err = run(capfd, *argv)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_verify_of_two_files(tmp_path, capfd, tiny_dir):
    run(capfd, "quantize", tiny_dir, tmp_path / "a.gguf", "--type", "Q8_0")
    code, out, err = run(capfd, "verify", tiny_dir, tmp_path / "a.gguf", "--tokens", "50")
    assert (code, err) == (0, "") and "B: a.gguf" in out and "text          50 tokens" in out and "KL(A || B)" in out
    code, out, _ = run(capfd, "verify", tiny_dir, tmp_path / "a.gguf", "--tokens", "50", "--json")
    found = json.loads(out)
    assert code == 0 and 0 < found["kl"] < 1e-2 and found["tensors"][0]["rms"] < 0.01 and found["tokens"] == 50
    assert "A_log" in run(capfd, "verify", tiny_dir, tmp_path / "a.gguf", "--tokens", "2", "--all")[1]
