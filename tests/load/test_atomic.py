"""Files that take their names only when they are whole: what is refused, what is kept, who came meanwhile."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

import kimi_linear as kl
from kimi_linear.load.atomic import atomic_file, atomic_files, write_text


def listing(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ---- one file --------------------------------------------------------------------------------------


def a_socket(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)  # which must be short


@pytest.mark.parametrize("make", [os.mkfifo, a_socket, lambda path: path.symlink_to("/dev/null")],
                         ids=["pipe", "socket", "link to a device"])
def test_what_is_no_file_stays(tmp_path, make):
    path = tmp_path / "x"
    make(path)
    before = os.lstat(path)
    with pytest.raises(FileExistsError, match="x is no regular file, but a device, a pipe or a socket"):
        write_text(path, "new")
    after = os.lstat(path)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino) and listing(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="this system has no /dev/fd")
def test_an_open_pipe_by_its_number(tmp_path):
    """As /dev/stdout is where another program reads it."""
    reader, writer = os.pipe()
    try:
        with pytest.raises(FileExistsError, match="no regular file"):
            write_text(f"/dev/fd/{writer}", "new")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_are_those_of_what_was_there(tmp_path, mode):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(mode)
    with atomic_file(path) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
        file.write(b"new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode
    write_text(tmp_path / "y", "new")
    usual = os.umask(0)
    os.umask(usual)
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o666 & ~usual


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, there):
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "real"
    if there:
        real.write_text("old")
    link = tmp_path / "link"
    link.symlink_to("far/real")
    with atomic_file(link) as file:
        assert len(list((tmp_path / "far").glob(".*"))) == 1 and not list(tmp_path.glob(".*"))
        file.write(b"new")
    assert link.is_symlink() and real.read_text() == "new" and listing(tmp_path) == ["far", "link", "real"]


def test_the_longest_name(tmp_path):
    path = tmp_path / ("a" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write_text(path, "new")
    assert path.read_text() == "new"


def refuse_links(*args):
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    path = tmp_path / "x"
    with atomic_file(path, overwrite=False) as file:
        file.write(b"first")
    assert path.read_text() == "first" and listing(tmp_path) == ["x"]
    with pytest.raises(FileExistsError, match=r"x is there; overwrite=True \(--force\) replaces it"):
        with atomic_file(path, overwrite=False):
            pytest.fail("it begins")
    with pytest.raises(FileExistsError, match=r"y is there; overwrite=True \(--force\) replaces it"):
        with atomic_file(tmp_path / "y", overwrite=False) as file:
            file.write(b"ours")
            (tmp_path / "y").write_text("theirs")
    assert (tmp_path / "y").read_text() == "theirs" and listing(tmp_path) == ["x", "y"]


def fails_half_way(monkeypatch):
    """Every new file is full after some bytes."""
    def opened(descriptor, mode):
        class Full:
            def __init__(self):
                self.file = real(descriptor, mode)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", opened)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, overwrite):
    """And its name is before the call ends: bytes first, then the folder."""
    path, told, real = tmp_path / "file", [], os.fsync

    def synced(descriptor):
        told.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(b"x")
    assert told == [(False, False), (True, True)]


def test_pages_and_tokenizers_are_whole_or_not_at_all(tmp_path, monkeypatch, tiny_dir):
    from kimi_linear.tokenizer_json import JsonTokenizer

    spec = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}}
    report = kl.diff.traces(*[kl.Model.tiny().trace([1, 2], taps="layers.0.*")] * 2)
    tokenizers = [kl.Tokenizer.from_folder(tiny_dir), JsonTokenizer(spec)]
    names = ["page.html", "tiktoken.model", "tokenizer.json"]
    for name in names:
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as m:
        fails_half_way(m)
        for name, save in zip(names, [lambda folder: report.html(folder / names[0]), *(t.save for t in tokenizers)]):
            with pytest.raises(OSError) as caught:
                save(tmp_path)
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / name))
    assert [(tmp_path / name).read_text() for name in names] == ["old"] * 3 and listing(tmp_path) == sorted(names)
    report.html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().lower().startswith("<!doctype html")


# ---- files together --------------------------------------------------------------------------------

OLD = {"a": "old a", "b": "old b", "config": "old config"}
NEW = {"a": "new a", "z": "new z", "config": "new config"}


@pytest.fixture
def folder(tmp_path):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "foreign").write_text("foreign")
    return tmp_path


def exchange(folder):
    with atomic_files(folder, "config", lambda: [folder / name for name in OLD if (folder / name).exists()]) as new:
        for name, text in NEW.items():
            (new / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_new_files_take_the_place_of_old_ones(folder, monkeypatch):
    (folder / "a").chmod(0o600)
    order, real = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: order.append(self.name) or real(self, to))
    exchange(folder)
    assert order == ["a", "b", "config", "a", "z", "config"]
    assert content(folder) == NEW | {"foreign": "foreign"} and listing(folder) == sorted([*NEW, "foreign"])
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("n", range(6))
def test_an_exception_at_any_move_leaves_what_was_there(folder, monkeypatch, error, when, n):
    """Of the six moves the n-th; before it, or behind it, where nothing has heard of it yet."""
    real, moves = Path.rename, []

    def rename(self, to):
        moves.append(self)
        if len(moves) == n + 1 and when == "before":
            raise error
        moved = real(self, to)
        if len(moves) == n + 1:
            raise error
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(error):
        exchange(folder)
    assert content(folder) == OLD | {"foreign": "foreign"} and listing(folder) == sorted([*OLD, "foreign"])


def test_an_old_file_that_another_process_removes(folder):
    def replaced():
        old = [folder / name for name in OLD]
        (folder / "b").unlink()
        return old

    with atomic_files(folder, "config", replaced) as new:
        for name, text in NEW.items():
            (new / name).write_text(text)
    assert content(folder) == NEW | {"foreign": "foreign"}


def test_a_new_file_that_stays_does_not_keep_the_old_away(folder, monkeypatch):
    real = Path.rename

    def rename(self, to):
        if self.name == "config" and self.parent.name == "new" or self.name == "z" and self.parent == folder:
            raise OSError(errno.EIO, "broken", str(self))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="broken") as caught:
        exchange(folder)
    assert caught.value.filename == str(folder / "config") and not list(folder.glob(".*"))
    assert content(folder) == OLD | {"foreign": "foreign", "z": "new z"}


def test_nothing_is_removed_where_the_old_cannot_be_put_back(folder, monkeypatch):
    real = Path.rename

    def rename(self, to):
        if self.parent.name == "old" or self.name == "z":
            raise OSError(errno.EIO, "broken", str(self))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="could not be put back and lies in .*/old, what was to take its place in"):
        exchange(folder)
    (hidden,) = folder.glob(".*.part")
    assert content(hidden / "old") == OLD and content(hidden / "new") == NEW


def test_an_error_names_the_file_that_was_asked_for(folder):
    with pytest.raises(FileNotFoundError) as caught:
        with atomic_files(folder, "config", list) as new:
            (new / "z").read_text()
    assert caught.value.filename == str(folder / "z")
    assert content(folder) == OLD | {"foreign": "foreign"}
