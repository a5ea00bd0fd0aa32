"""``Model.save_pretrained``: what it replaces, what it leaves, what it refuses; and how a model is called."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.load import SafetensorsFile, open_checkpoint
from kimi_linear.load.checkpoint import INDEX


@pytest.fixture(scope="module")
def tiny():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def small(golden_dir):
    return kl.Model.from_pretrained(golden_dir / "kimi-a")


@pytest.fixture
def copy(tmp_path, tiny_dir):
    shutil.copytree(tiny_dir, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- what is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "model.safetensors",
                                  "model-00001-of-00002.safetensors", INDEX])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/no/where", path)],
                         ids=["folder", "pipe", "link"])
def test_what_is_no_file_is_refused_before_anything_is_written(small, tiny, tmp_path, name, make):
    tiny.save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    before, names = content(tmp_path), sorted(os.listdir(tmp_path))
    for overwrite in (True, False):
        with pytest.raises(FileExistsError, match=f"holds {name}, which is no regular file"):
            small.save_pretrained(tmp_path, overwrite=overwrite)
    assert content(tmp_path) == before and sorted(os.listdir(tmp_path)) == names


def test_foreign_files_stay(small, tiny, tmp_path):
    """The reader ignores them beside model.safetensors or an index; a folder of such a name, too."""
    tiny.save_pretrained(tmp_path)
    tiny.trace([1, 2], taps="layers.0.*").save(tmp_path / "my_trace.safetensors")
    state = tiny.new_state()
    tiny([1, 2], state=state)
    state.save(tmp_path / "my_state.safetensors")
    (tmp_path / "old.safetensors").mkdir()
    mine = {name: data for name, data in content(tmp_path).items() if name.startswith("my_")}
    small.save_pretrained(tmp_path, overwrite=True)
    assert mine.items() <= content(tmp_path).items() and len(mine) == 2 and (tmp_path / "old.safetensors").is_dir()
    assert kl.Model.from_pretrained(tmp_path).config == small.config


def test_shards_that_the_index_names_go(small, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_linear.saving.SHARD", 5_000_000)
    tiny.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    first = min(index["weight_map"].values())
    (tmp_path / first).rename(tmp_path / "part.safetensors")
    index["weight_map"] = {name: "part.safetensors" if file == first else file
                           for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"left by a broken download")
    kl.Model.from_pretrained(tmp_path)
    small.save_pretrained(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../x", "b": 3}}'])
def test_an_index_that_is_damaged(small, tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    small.save_pretrained(tmp_path, overwrite=True)
    assert kl.Model.from_pretrained(tmp_path).config == small.config


def test_a_failed_move_leaves_the_old_checkpoint(small, tiny, tmp_path, monkeypatch):
    """Ctrl-C when the old weights are away and the new ones not there yet."""
    import pathlib

    tiny.save_pretrained(tmp_path)
    before, real = content(tmp_path), pathlib.Path.rename

    def rename(self, to):
        if self.name == "model.safetensors" and self.parent.name == "new":
            raise KeyboardInterrupt
        return real(self, to)

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        small.save_pretrained(tmp_path, overwrite=True)
    assert content(tmp_path) == before and len(os.listdir(tmp_path)) == len(before)


def test_a_checkpoint_that_came_meanwhile(small, tiny, tmp_path, monkeypatch):
    from kimi_linear import saving

    real = saving._write_tensors

    def slow(*args):
        real(*args)
        monkeypatch.setattr(saving, "_write_tensors", real)
        tiny.save_pretrained(tmp_path / "x")

    monkeypatch.setattr(saving, "_write_tensors", slow)
    with pytest.raises(FileExistsError, match=r"holds a checkpoint \(config.json\); overwrite=True"):
        small.save_pretrained(tmp_path / "x")
    assert kl.Model.from_pretrained(tmp_path / "x").config == tiny.config
    assert not list((tmp_path / "x").glob(".*"))


def test_an_error_names_the_target(small, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("kimi_linear.saving.write_safetensors", full)
    with pytest.raises(OSError) as caught:
        small.save_pretrained(tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x" / "model.safetensors") and not (tmp_path / "x").exists()


# ---- what is written -------------------------------------------------------------------------------


def test_a_source_that_was_rewritten_is_refused(copy, tmp_path):
    model = kl.Model.from_pretrained(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    os.utime(copy / "model.safetensors", (1, 1))
    with pytest.raises(kl.FormatError, match="changed after it was opened"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {"a": [float("-inf")]}, {1, 2}, "\ud800"], ids=str)
def test_a_value_that_json_lacks_is_named(copy, tmp_path, value):
    model = kl.Model.from_pretrained(copy)
    model.generation_config["temperature"] = value
    with pytest.raises(ValueError, match=r"generation_config\['temperature'\] is .*; it cannot be written as JSON"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_tokenizer_that_the_model_has_is_saved(copy, tmp_path):
    model = kl.Model.from_pretrained(copy)
    model.tokenizer.chat_template = "{{ messages[0].content }}!"
    model.save_pretrained(tmp_path / "template")
    saved = kl.Model.from_pretrained(tmp_path / "template").tokenizer
    assert saved.chat_template == "{{ messages[0].content }}!" and saved.encode("In") == model.tokenizer.encode("In")
    model.tokenizer = None
    model.save_pretrained(tmp_path / "none")
    assert kl.Model.from_pretrained(tmp_path / "none").tokenizer is None
    assert sorted(os.listdir(tmp_path / "none")) == ["config.json", "generation_config.json", "model.safetensors"]
    as_opened = kl.Model.from_pretrained(copy)
    as_opened.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (copy / "tokenizer_config.json").read_bytes()


# ---- where it is, and how it is called -------------------------------------------------------------


def test_another_working_folder(copy, tmp_path, monkeypatch):
    kl.convert(copy, tmp_path / "x.gguf")
    monkeypatch.chdir(tmp_path)
    models = [kl.Model.from_pretrained(name) for name in ("copy", "x.gguf")]
    wanted = [model([1, 2]).tobytes() for model in models]
    monkeypatch.chdir("/")
    for model, logits in zip(models, wanted):
        assert model([1, 2]).tobytes() == logits and all(file.path.is_absolute() for file in model.files)
        model.save_pretrained(tmp_path / "saved" / model.name)
        assert kl.Model.from_pretrained(tmp_path / "saved" / model.name).tokenizer.encode("In") \
            == model.tokenizer.encode("In")


def test_names(copy, tmp_path, monkeypatch):
    kl.convert(copy, tmp_path / "x.gguf")
    (tmp_path / "link.gguf").symlink_to("x.gguf")
    monkeypatch.chdir(copy)
    assert kl.Model.from_pretrained(".").name == "copy" == kl.Model.from_pretrained("../copy/.").name
    assert kl.Model.from_pretrained("../link.gguf").name == "link.gguf"
    snapshot = tmp_path / "hub" / "models--Org--Some-Model" / "snapshots" / "abc123def"
    shutil.copytree(copy, snapshot)
    assert kl.Model.from_pretrained(snapshot).name == "Some-Model"
    kl.convert(snapshot, tmp_path / "y.gguf")
    assert open_checkpoint(tmp_path / "y.gguf").files[0].metadata["general.name"] == "Some-Model"


def test_a_folder_whose_name_is_no_text(copy, tmp_path):
    strange = os.fsdecode(os.fsencode(copy) + b"-\xff")
    os.rename(copy, strange)
    model = kl.Model.from_pretrained(strange)
    assert model.name == "copy-\ufffd"
    made = kl.convert(strange, strange + ".gguf")
    assert str(made).startswith(f"{tmp_path}/copy-\ufffd.gguf: ") and made.to_dict()["target"].endswith("\ufffd.gguf")
    os.rename(strange + ".gguf", tmp_path / "x.gguf")
    assert open_checkpoint(tmp_path / "x.gguf").files[0].metadata["general.name"] == "copy-\ufffd"
    model.trace([1, 2], taps="layers.0.*").save(tmp_path / "a")
    model.trace([1, 2], taps="layers.0.*", to=tmp_path / "b")
    a, b = (SafetensorsFile(tmp_path / name) for name in "ab")
    assert all(np.array_equal(a[name].array(), b[name].array()) for name in a)


@pytest.mark.parametrize("there, missing", [
    (["tiktoken.model"], "tokenizer_config.json"), (["tokenizer_config.json"], "tiktoken.model or tokenizer.json"),
    (["vocab.json", "merges.txt"], "tokenizer.json"), (["tokenizer_config.json", "vocab.json"], "tokenizer.json"),
    ([], None)], ids=str)
def test_a_file_of_the_tokenizer_that_is_missing(tiny_dir, tmp_path, there, missing):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", *(name for name in there if name.startswith("t"))):
        shutil.copy(tiny_dir / name, folder)
    for name in there:
        (folder / name).touch()
    model = kl.Model.from_pretrained(folder)
    says = "m has no tokenizer" + (f": {missing} is missing in its folder" if missing else "; ")
    for call in (model.logprobs, lambda text: model.generate(text), lambda text: model.generate([1], stop=text),
                 lambda text: model.generate([{"role": "user", "content": text}])):
        with pytest.raises(ValueError, match=says):
            call("text")
    assert model([1, 2]).shape[0] == 2 and len(model.generate([1], max_new_tokens=1).run().tokens) == 1
    if missing is None:
        kl.convert(folder, tmp_path / "x.gguf")
        return
    with pytest.raises(FileNotFoundError, match=rf"{missing} is missing; .*tokenizer=False \(--no-tokenizer\)"):
        kl.convert(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    kl.convert(folder, tmp_path / "x.gguf", tokenizer=False)
    assert kl.Model.from_pretrained(tmp_path / "x.gguf").tokenizer is None
