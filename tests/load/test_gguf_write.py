"""The writer of GGUF files: what it writes is read back, and what is not whole gets no name."""

import numpy as np
import pytest

from kimi_linear.load import GGUFFile
from kimi_linear.load.gguf_write import Outgoing, Values, write_gguf

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def tensor(*parts, name="a", dtype="F32", shape=(2, 3)):
    return Outgoing(name, dtype, shape, lambda: parts)


@pytest.mark.parametrize("value, bits", [
    (0, 32), (2**32 - 1, 32), (2**32, 64), (2**64 - 1, 64), (-1, 64), (-2**63, 64), (True, 8), (0.5, 32), ("ü", None),
])
def test_values_by_their_size(tmp_path, value, bits):
    path = tmp_path / "file.gguf"
    write_gguf(path, {"key": value}, [])
    file = GGUFFile(path)
    assert file.metadata == {"key": value} and type(file.metadata["key"]) is type(value)
    begin, end = file.pairs["key"]
    assert bits is None or end - begin == 8 + len("key") + 4 + bits // 8


def test_arrays_and_tensors_come_back(tmp_path):
    path = tmp_path / "file.gguf"
    metadata = {"words": Values("words", "string", ["a", "ü"]), "numbers": Values("numbers", "int32", [1, -2])}
    n_bytes = write_gguf(path, metadata, [tensor(ROWS[:1], ROWS[1:]), tensor(ROWS, name="b")])
    file = GGUFFile(path)
    assert file.metadata["words"].values() == ["a", "ü"] and file.metadata["numbers"].values().tolist() == [1, -2]
    assert all(np.array_equal(file[name].array(), ROWS) for name in "ab") and path.stat().st_size == n_bytes
    assert all(view.offset % 32 == 0 for view in file.values())


@pytest.mark.parametrize("parts, n", [((ROWS[:1],), 12), ((ROWS, ROWS), 48), ((), 0)])
def test_parts_of_another_size_leave_no_file(tmp_path, parts, n):
    with pytest.raises(ValueError, match=rf"a: its parts have {n} bytes; F32 \[2, 3\] has 24"):
        write_gguf(tmp_path / "file.gguf", {}, [tensor(*parts)])
    assert not any(tmp_path.iterdir())


def test_a_name_has_fewer_than_64_bytes(tmp_path):
    write_gguf(tmp_path / "file.gguf", {}, [tensor(ROWS, name="a" * 63)])
    assert list(GGUFFile(tmp_path / "file.gguf")) == ["a" * 63]
    with pytest.raises(ValueError, match="has 64 bytes; it must have fewer than 64"):
        write_gguf(tmp_path / "file.gguf", {}, [tensor(ROWS, name="ü" * 32)])


def test_what_the_check_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(b"before")

    def check():
        raise ValueError("the source has changed")

    with pytest.raises(ValueError, match="the source has changed"):
        write_gguf(path, {}, [tensor(ROWS)], check=check)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
