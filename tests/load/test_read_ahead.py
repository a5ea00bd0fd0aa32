"""Reading a cold file before it is used: what is cold, when it is read, what of it, and Ctrl-C."""

import mmap
import os

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.load import mapped
from kimi_linear.load.mapped import MappedFile, read_ahead

PAGE = mmap.PAGESIZE
ROOM = 1 << 40


class Bar:
    """A tqdm that notes what it is told."""

    def __init__(self, total):
        self.total, self.updates, self.closed = total, [], False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def update(self, n):
        self.updates.append(n)


@pytest.fixture
def bars(monkeypatch):
    """Small pieces and small files count; the bars that were made."""
    monkeypatch.setattr(mapped, "PIECE", 16 * PAGE)
    monkeypatch.setattr(mapped, "LARGE", PAGE)
    made = []

    def bar(total):
        made.append(Bar(total))
        return made[-1]

    bar.made = made
    return bar


def file_of(tmp_path, n_bytes, name="file"):
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(np.random.default_rng(0).bytes(n_bytes))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return MappedFile(path, 1, "a file")


def test_a_file_that_was_read_is_warm(tmp_path, bars):
    file = file_of(tmp_path, 100 * PAGE + 5)
    assert np.frombuffer(file.mapping, np.uint8).sum()  # every byte is read
    pages = file.in_memory()
    assert pages is None or (len(pages) == 101 and pages.all())
    assert file.cold_pieces() == [] and read_ahead([file], ROOM, bars) == 0 and not bars.made


def test_a_cold_file_is_read_and_then_warm(tmp_path, bars, monkeypatch):
    """What the kernel keeps is its own affair, as on tmpfs: here it is said to keep nothing before the first bar."""
    file = file_of(tmp_path, 100 * PAGE + 5)
    monkeypatch.setattr(file, "in_memory", lambda: np.full(101, bool(bars.made)))
    assert len(file.cold_pieces()) == 7 and sum(n for _, n in file.cold_pieces()) == 100 * PAGE + 5
    assert read_ahead([file], ROOM, bars) == 100 * PAGE + 5
    assert bars.made[0].total == 100 * PAGE + 5 and bars.made[0].closed
    assert bars.made[0].updates == [16 * PAGE] * 6 + [4 * PAGE + 5]
    assert file.in_memory().all() and file.cold_pieces() == []
    assert read_ahead([file], ROOM, bars) == 0 and len(bars.made) == 1


def test_where_the_system_takes_no_advice(tmp_path, bars, monkeypatch):
    """macOS has no posix_fadvise."""
    file = file_of(tmp_path, 64 * PAGE)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(file, "in_memory", lambda: np.zeros(64, bool))
    assert read_ahead([file], ROOM, bars) == 64 * PAGE


def test_only_pieces_with_a_cold_page_are_read(tmp_path, bars, monkeypatch):
    file = file_of(tmp_path, 64 * PAGE)
    pages = np.ones(64, bool)
    pages[[0, 33, 50]] = False
    monkeypatch.setattr(file, "in_memory", lambda: pages)
    assert file.cold_pieces() == [(0, 16 * PAGE), (32 * PAGE, 16 * PAGE), (48 * PAGE, 16 * PAGE)]
    assert read_ahead([file], ROOM, bars) == 48 * PAGE


@pytest.mark.parametrize("room, large, cold", [
    (64 * PAGE - 1, PAGE, 64),   # would not fit
    (ROOM, 65 * PAGE, 64),       # small
    (ROOM, PAGE, 31),            # most of it is there
    (ROOM, PAGE, 0),
    (ROOM, PAGE, None),          # the system does not say
])
def test_when_nothing_is_read(tmp_path, bars, monkeypatch, room, large, cold):
    file = file_of(tmp_path, 64 * PAGE)
    monkeypatch.setattr(mapped, "PIECE", PAGE)
    monkeypatch.setattr(mapped, "LARGE", large)
    monkeypatch.setattr(file, "in_memory", lambda: None if cold is None else np.arange(64) >= cold)
    assert read_ahead([file], room, bars) == 0 and bars.made == []


def test_parts_share_one_bar_and_a_lost_file_is_left_to_its_use(tmp_path, bars, monkeypatch):
    files = [file_of(tmp_path, 20 * PAGE, name) for name in "ab"]
    for file in files:
        monkeypatch.setattr(file, "in_memory", lambda: np.zeros(20, bool))
    assert read_ahead(files, ROOM, bars) == 40 * PAGE
    assert bars.made[0].total == 40 * PAGE
    (tmp_path / "b").unlink()
    assert read_ahead(files, ROOM, bars) == 20 * PAGE and bars.made[1].closed
    assert read_ahead([], ROOM, bars) == 0


def test_ctrl_c_ends_it(tmp_path, bars, monkeypatch):
    file = file_of(tmp_path, 64 * PAGE)
    monkeypatch.setattr(file, "in_memory", lambda: np.zeros(64, bool))

    def interrupted(self, n):
        raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_ahead([file], ROOM, bars)
    assert bars.made[0].closed


def test_the_command_line_reads_and_can_be_told_not_to(monkeypatch, capfd):
    from kimi_linear.cli import main

    asked = []
    monkeypatch.setattr(mapped, "read_ahead", lambda files, room, bar: asked.append((files, room)))
    argv = ["generate", "--ids", "5,6", "--max-new-tokens", "1"]
    assert main(argv) == 0 and len(asked) == 1
    files, room = asked[0]
    assert [file.path.name for file in files] == ["model.safetensors"] and room > 0
    assert main([*argv, "--no-read-ahead"]) == 0 and len(asked) == 1
    assert kl.Model.from_config(kl.Model.tiny().config).files == ()
    capfd.readouterr()
