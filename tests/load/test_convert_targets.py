"""``kl.convert`` and what is there, comes meanwhile or would not open: nothing is lost, nothing bad is left behind."""

import os
import shutil

import gguf_files
import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.load import GGUFFile, gguf_kept, open_checkpoint, write_safetensors


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "kimi-a"


@pytest.fixture(scope="module")
def file(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("file") / "a.gguf"
    kl.convert(folder, path)
    return path


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ---- the target ------------------------------------------------------------------------------------


def test_a_part_of_the_source_is_no_target(tmp_path, folder):
    parts = [gguf_files.write(tmp_path / f"x-{i + 1:05d}-of-00002.gguf", folder, split=(i, 2)) for i in range(2)]
    (tmp_path / "link.gguf").symlink_to(parts[1])
    before = [part.read_bytes() for part in parts]
    for target in (parts[1], tmp_path / "link.gguf"):
        with pytest.raises(FileExistsError, match="a file of the source; it must be another file"):
            kl.convert(parts[0], target, overwrite=True)
    assert [part.read_bytes() for part in parts] == before
    kl.Model.from_pretrained(parts[0])


def test_a_source_among_the_files_of_the_target_folder(tmp_path, file):
    """A GGUF of any name: here of one that the folder's own file is to have."""
    shutil.copy(file, tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match="holds model.safetensors, in which the tensors are"):
        kl.convert(tmp_path / "model.safetensors", tmp_path, overwrite=True)
    assert names(tmp_path) == ["model.safetensors"]
    kl.Model.from_pretrained(tmp_path / "model.safetensors")


def test_a_file_that_came_meanwhile_stays(tmp_path, file):
    target = tmp_path / "x.gguf"

    def other(done, total, name):
        target.write_bytes(b"theirs")

    with pytest.raises(FileExistsError, match=r"x.gguf is there; overwrite=True \(--force\) replaces it"):
        kl.convert(file, target, progress=other)
    assert target.read_bytes() == b"theirs" and names(tmp_path) == ["x.gguf"]
    kl.convert(file, target, progress=other, overwrite=True)
    kl.Model.from_pretrained(target)


def test_a_folder_that_came_meanwhile_stays(tmp_path, file):
    target = tmp_path / "x"

    def other(done, total, name):
        (target / "config.json").write_text("theirs")

    with pytest.raises(FileExistsError, match=r"x holds a checkpoint \(config.json\); overwrite=True"):
        kl.convert(file, target, progress=other)
    assert names(tmp_path) == ["config.json", "x"] and (target / "config.json").read_text() == "theirs"
    kl.convert(file, target, progress=other, overwrite=True)
    kl.Model.from_pretrained(target)


def test_a_pipe_is_told_at_once(tmp_path, file):
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(FileExistsError, match="x.gguf is a device, a pipe or a socket; it must be a file"):
        kl.convert(file, tmp_path / "x.gguf", overwrite=True, progress=lambda *_: pytest.fail("it begins"))


def test_the_longest_name(tmp_path, file):
    target = tmp_path / ("a" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 5) + ".gguf")
    kl.convert(file, target)
    assert target.read_bytes() == file.read_bytes()


def test_permissions_and_links_stay(tmp_path, file):
    (tmp_path / "real.gguf").write_bytes(b"old")
    (tmp_path / "real.gguf").chmod(0o600)
    (tmp_path / "x.gguf").symlink_to("real.gguf")
    kl.convert(file, tmp_path / "x.gguf", overwrite=True)
    assert (tmp_path / "x.gguf").is_symlink() and (tmp_path / "real.gguf").read_bytes() == file.read_bytes()
    assert (tmp_path / "real.gguf").stat().st_mode & 0o777 == 0o600


# ---- what could not be read back -------------------------------------------------------------------


@pytest.mark.parametrize("value", [100.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["kimi-a", "qwen35-moe"])
def test_a_rate_that_is_not_finite(tmp_path, golden_dir, name, value):
    checkpoint = open_checkpoint(golden_dir / name)
    weights = {n: np.array(t.array()) for n, t in checkpoint.tensors.items()}
    at = next(n for n in weights if n.endswith(".A_log"))
    weights[at][1] = value
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(golden_dir / name / "config.json", folder)
    write_safetensors(folder / "model.safetensors", weights)
    kl.Model.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{at} holds {value} at index 1; a GGUF holds -exp\(A_log\) in float32"):
        kl.convert(folder, tmp_path / "x.gguf")
    assert names(tmp_path) == ["config.json", "m", "model.safetensors"]
    weights[at][1] = -np.inf  # a rate of 0
    write_safetensors(folder / "model.safetensors", weights)
    kl.convert(folder, tmp_path / "x.gguf")
    kl.Model.from_pretrained(tmp_path / "x.gguf")


@pytest.mark.parametrize("value", [[1.0, 2.0], "x"])
def test_norms_of_a_strange_file(tmp_path, folder, value):
    add = "add_array" if isinstance(value, list) else "add_string"
    path = gguf_files.write(tmp_path / "x.gguf", folder, more=lambda w: getattr(w, add)(gguf_kept.NORMS, value))
    with pytest.raises(kl.FormatError, match=r"kimi_linear.norms is .*; it must be an array of \d+ float32, all norms"):
        kl.Model.from_pretrained(path)


# ---- the tokenizer ---------------------------------------------------------------------------------


def test_a_file_without_its_tokenizer(tmp_path, tiny_dir):
    kl.convert(tiny_dir, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "y.gguf", tokenizer=False)
    model = kl.Model.from_pretrained(tmp_path / "y.gguf")
    assert model.tokenizer is None and model.config == kl.Model.tiny().config
    assert model([1, 2]).tobytes() == kl.Model.tiny()([1, 2]).tobytes()
    kept = {key for key in GGUFFile(tmp_path / "y.gguf").metadata if key.startswith("tokenizer.")}
    assert kept == {f"tokenizer.ggml.{key}" for key in ("model", "bos_token_id", "eos_token_id", "padding_token_id")}
    kl.convert(tmp_path / "x.gguf", tmp_path / "folder", tokenizer=False)
    assert kl.Model.from_pretrained(tmp_path / "folder").tokenizer is None
    assert not (tmp_path / "folder" / "tokenizer_config.json").exists()


def test_the_option_of_the_command(tmp_path, tiny_dir, capfd):
    from kimi_linear.cli import main

    shutil.copytree(tiny_dir, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    argv = ["convert", str(tmp_path / "m"), str(tmp_path / "x.gguf")]
    assert main(argv) == 2
    assert "tokenizer_config.json is missing; get it, or convert with tokenizer=False (--no-tokenizer)" \
        in capfd.readouterr().err
    assert main([*argv, "--no-tokenizer"]) == 0
    assert kl.Model.from_pretrained(tmp_path / "x.gguf").tokenizer is None
    assert main(["generate", str(tmp_path / "m"), "--prompt", "x"]) == 2
    assert "m has no tokenizer: tokenizer_config.json is missing in its folder" in capfd.readouterr().err


# ---- rules of types --------------------------------------------------------------------------------


@pytest.mark.parametrize("types, error, words", [
    ([5], ValueError, "the rule 5 must be PATTERN=TYPE"), ([()], ValueError, r"the rule \(\) must be PATTERN=TYPE"),
    ([("a",)], ValueError, "must be PATTERN=TYPE"), ([("a", 3)], ValueError, "must be PATTERN=TYPE"),
    ({3: "Q8_0"}, ValueError, "must be PATTERN=TYPE"), ([None], ValueError, "the rule None must be"),
    (5, TypeError, "types is 5; it must be a mapping"), ("a=Q8_0", TypeError, "types is 'a=Q8_0'; it must be"),
])
def test_rules_that_are_none(tmp_path, file, types, error, words):
    with pytest.raises(error, match=words):
        kl.convert(file, tmp_path / "x.gguf", types=types)
    assert not names(tmp_path)


# ---- homes -----------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    kl.Model.tiny().save_pretrained("~/saved")
    kl.convert("~/saved", "~/saved.gguf")
    assert (tmp_path / "saved" / "config.json").is_file() and (tmp_path / "saved.gguf").is_file()
    assert not os.path.lexists("~")
    nowhere = "~nouser-of-this-name/x"
    for call in (lambda: kl.convert(nowhere, "y.gguf"), lambda: kl.convert(file, nowhere),
                 lambda: kl.Model.tiny().save_pretrained(nowhere)):
        with pytest.raises(FileNotFoundError, match="There is no user nouser-of-this-name, in whose home"):
            call()
