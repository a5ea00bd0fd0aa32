"""``kimi-linear inspect`` and ``inspect --check`` on GGUF files."""

import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest

from kimi_linear.cli import main


@pytest.fixture
def write(tmp_path, tiny_dir):
    def one(change=lambda name, a: a, **options):
        def tensors(stored):
            return {name: np.ascontiguousarray(change(name, a)) for name, a in stored.items()}

        return str(gguf_files.write(tmp_path / "x.gguf", tiny_dir, "BF16", tensors=tensors, **options))

    return one


def check(capsys, *args):
    code = main(["inspect", "--check", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_the_file_is(write, capsys):
    path = write(keys={"attention.value_length": 24}, conv_axes=3)
    assert main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "file        GGUF version 3, 130 tensors; llama.cpp, February 2026 (value_length is 24" in out
    assert "tokenizer   2,048 tokens" in out and "layers      6: kKKMKM" in out
    assert main(["inspect", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["gguf"]["parts"] == 1 and facts["gguf"]["alignment"] == 32
    assert main(["inspect", path, "--tensors", "*.1.block_sparse_moe.experts.3.*"]) == 0
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight  256x96  BF16" in capsys.readouterr().out
    assert main(["inspect", path, "--tensors", "blk.1.ffn_*_exps.*"]) == 0  # by the names of the file
    out = capsys.readouterr().out
    assert "blk.1.ffn_down_exps.weight  8x256x96  BF16" in out and "experts.3" not in out
    assert main(["inspect", path, "--tensors", "blk.9.*"]) == 2
    assert "matches none of 233 tensors; try '*' or, with the file's own names, '" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "name"), [
    ({"legacy_kv_b": True}, "before February 2026 (attn_kv_b is whole)"),
    ({"fused": True}, "llama.cpp, after February 2026 (q, k and v are fused)"),
])
def test_which_converter(write, capsys, options, name):
    code, report = check(capsys, write(**options))
    assert (code, report["converter"]) == (0, name)


def test_a_good_file(write, capsys):
    path = write()
    code, report = check(capsys, path)
    assert code == 0 and report["ok"] and report["faults"] == []
    assert report["stops"] == [1793, 1794] and 10 < report["perplexity"] < 30 and report["scored"] == 511
    assert report["notes"] == ["the file's eos is 1793; a turn ends with 1794, which is a stop here, too"]
    assert main(["inspect", "--check", path]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\ngood\n") and " of 511 tokens of the text in the package\n" in out


def test_a_good_folder(capsys):
    code, report = check(capsys)
    assert code == 0 and report["faults"] == report["notes"] == [] and report["converter"] is None


def nan_in_an_expert(name, a):
    if name == "blk.2.ffn_up_exps.weight":
        a = a.copy()
        a[3, 5, 7] = np.nan
    return a


def dead_expert(name, a):
    if name == "blk.4.ffn_down_exps.weight":
        a = a.copy()
        a[6] = 0
    return a


def all_zero(name, a):
    return a * (name != "output.weight")


def dead_norm(name, a):
    return a * (name != "blk.1.ssm_norm.weight")


@pytest.mark.parametrize(("change", "fault"), [
    (nan_in_an_expert, "model.layers.2.block_sparse_moe.experts.3.w3.weight, at byte "),
    (nan_in_an_expert, "stored as BF16: 1 values are not finite, the first at index 1287"),
    (dead_expert, "model.layers.4.block_sparse_moe.experts.6.w2.weight, at byte "),
    (dead_expert, "is dead: all its values are 0"),
    (all_zero, "lm_head.weight, at byte "),
    (all_zero, "the perplexity of the text in the package is 2048: no better than a guess among 2048 tokens"),
    (dead_norm, "model.layers.1.self_attn.o_norm.weight, at byte "),
])
def test_faults_of_values(write, capsys, change, fault):
    code, report = check(capsys, write(change))
    assert code == 1 and any(fault in f for f in report["faults"]), report["faults"]


def test_a_turn_may_end_where_the_next_begins(write, capsys, monkeypatch):
    """As in GLM's template: an answer ends with <|user|> or <|observation|>, which are stops there."""
    tokens, types, bos, eos, pad, _ = gguf_files.tokenizer_keys(
        Path(gguf_files.__file__).parents[2] / "kimi_linear/data/tiny")
    template = "{% for m in messages %}<|im_NAME|>{{ m.content }}{% endfor %}"
    for name, code, words in (("end", 0, "a turn ends with 1794, which is a stop here, too"),
                              ("user", 1, "a turn ends with token 88, 'y', which is not among the stops [1793, 1794]")):
        keys = (tokens, types, bos, eos, pad, template.replace("NAME", name))
        monkeypatch.setattr(gguf_files, "tokenizer_keys", lambda folder, keys=keys: keys)
        found, report = check(capsys, write())
        assert found == code and any(words in line for line in report["faults" if code else "notes"]), report


def test_zero_scales_of_blocks(tmp_path, tiny_dir, capsys):
    def change(stored):
        return stored | {"blk.0.ffn_up.weight": stored["blk.0.ffn_up.weight"] * (np.arange(256) >= 64)}

    _, before = check(capsys, str(gguf_files.write(tmp_path / "a.gguf", tiny_dir, "Q8_0")))
    code, after = check(capsys, str(gguf_files.write(tmp_path / "b.gguf", tiny_dir, "Q8_0", tensors=change)))
    assert code == 0 and after["zero_blocks"] == before["zero_blocks"] + 512 * 2 and "Q8_0" in after["types"]


def test_faults_of_the_tokenizer(write, capsys, monkeypatch):
    tokens, types, bos, eos, pad, template = gguf_files.tokenizer_keys(
        Path(gguf_files.__file__).parents[2] / "kimi_linear/data/tiny")

    def with_parts(*parts):
        monkeypatch.setattr(gguf_files, "tokenizer_keys", lambda folder: parts)
        return check(capsys, write())

    code, report = with_parts(tokens, types, bos, eos, pad, template.replace("<|im_end|>", "<|im_middle|>"))
    assert code == 1 and "a turn ends with token" in report["faults"][0] and "among the stops" in report["faults"][0]
    code, report = with_parts(tokens, types, bos, eos, pad, "{{ nonsense(")
    assert code == 1 and "the chat template fails: " in report["faults"][0]
    code, report = with_parts([*tokens[:300], *tokens[299:-1]], types, bos, eos, pad, template)
    assert code == 1 and report["faults"] == ["tokenizer: token 300 is spelled as token 299 is, so the ranks cannot be "
                                              "recovered"]
    assert main(["inspect", write()]) == 0
    assert "tokenizer: token 300 is spelled as token 299 is" in capsys.readouterr().out


def test_a_file_that_cannot_be_opened_is_not_good(write, capsys, tmp_path):
    path = write()
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    code, report = check(capsys, path)
    assert code == 1 and not report["ok"] and "it is cut short or damaged" in report["faults"][0]
    assert main(["inspect", "--check", path]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("bad: ")
    assert main(["inspect", path]) == 2
    assert main(["inspect", "--check", str(tmp_path / "none.gguf")]) == 2
    assert main(["inspect", "--check", "--tensors", "*", path]) == 2
