"""The safetensors reader on hostile files, and the writer against the reader and the safetensors package."""

import gc
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kimi_linear.errors import FormatError
from kimi_linear.load import SafetensorsFile, write_safetensors
from kimi_linear.load.safetensors import DTYPES


def raw_file(path, header, data=b"", n=None):
    """A file from its parts; `header` is JSON text or a value, `n` the length that it promises."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems_of(path):
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    return list(caught.value.problems)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes; a safetensors file has at least 8"),
        (b"1234567", "it has 7 bytes; a safetensors file has at least 8"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "promise a header of 18446744073709551615 bytes, but"),
        (struct.pack("<Q", 3) + b"{}", "promise a header of 3 bytes, but only 2 follow"),
        (struct.pack("<Q", 2) + b"[]", "its header is a JSON list; it must be an object"),
        (struct.pack("<Q", 0), "its header cannot be read: it is not JSON"),
        (struct.pack("<Q", 2) + b"{]", "its header cannot be read: it is not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "its header cannot be read: it is not UTF-8 at byte 0"),
    ],
)
def test_damaged_start(path, content, message):
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert message in problem


def test_header_beyond_the_limit(path, monkeypatch):
    monkeypatch.setattr("kimi_linear.load.safetensors.MAX_HEADER", 16)
    raw_file(path, b" " * 17)
    assert problems_of(path) == ["its header has 17 bytes; at most 16 are allowed"]


def test_deep_json(path):
    raw_file(path, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    assert problems_of(path) == ["its header cannot be read: its JSON is nested too deep"]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json(path, constant):
    raw_file(path, f'{{"a": {constant}}}'.encode())
    assert problems_of(path) == [f"its header cannot be read: it holds {constant}, which JSON does not have"]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([1], "'a' is described by [1]; it must be an object"),
        ({**entry(0, 8), "dtype": "F33"}, "'a' has the dtype 'F33'; it must be one of BOOL, U8"),
        ({**entry(0, 8), "dtype": ["F32"]}, "'a' has the dtype ['F32']"),
        ({**entry(0, 8), "dtype": None}, "'a' has the dtype None"),
        ({**entry(0, 8), "shape": [-2]}, "'a' has the shape [-2]; it must be a list of integers >= 0"),
        ({**entry(0, 8), "shape": [2.0]}, "'a' has the shape [2.0]"),
        ({**entry(0, 8), "shape": [True, 2]}, "'a' has the shape [True, 2]"),
        ({**entry(0, 8), "shape": "2"}, "'a' has the shape '2'"),
        ({**entry(0, 8), "shape": [2**64]}, "'a' has the shape [18446744073709551616]"),
        ({**entry(0, 8), "shape": [2**32, 2**32]}, "whose product overflows 64 bits"),
        ({**entry(0, 8), "shape": [0, 2**40, 2**40]}, "whose product overflows 64 bits"),
        ({**entry(0, 8), "shape": [2**62]}, "would have 18446744073709551616 bytes, which overflows 64 bits"),
        ({**entry(0, 8), "shape": [1] * 8 + [2]}, "'a' has 9 axes; at most 8 are allowed"),
        ({**entry(0, 8), "shape": [3]}, "'a' of F32 [3] has 12 bytes, but its range [0, 8] has 8"),
        ({**entry(0, 8), "shape": [1]}, "'a' of F32 [1] has 4 bytes, but its range [0, 8] has 8"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "'a' ends beyond the file: it has"),
        ({**entry(0, 12, [3])}, "'a' ends beyond the file: it has"),
        ({**entry(0, 8), "data_offsets": [8, 0]}, "'a' has the range [8, 0], which ends before it begins"),
        ({**entry(0, 8), "data_offsets": [-4, 4]}, "'a' has the data_offsets [-4, 4]; they must be two"),
        ({**entry(0, 8), "data_offsets": [0]}, "'a' has the data_offsets [0]"),
        ({**entry(0, 8), "data_offsets": None}, "'a' has the data_offsets None"),
        ({**entry(0, 8), "strides": [1]}, "'a' has the key 'strides', which the format does not have"),
    ],
)
def test_bad_entry(path, described, message):
    raw_file(path, {"a": described}, bytes(8))
    (problem,) = problems_of(path)
    assert message in problem


def test_deep_value_in_an_entry_is_a_sentence(path):
    deep = b"[" * 900 + b"]" * 900
    raw_file(path, b'{"a": {"dtype": "F32", "shape": ' + deep + b', "data_offsets": [0, 0]}}')
    (problem,) = problems_of(path)
    assert "shape" in problem or "nested too deep" in problem


def test_repeated_names_and_keys(path):
    a = b'{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw_file(path, b'{"a":' + a + b',"a":' + a + b"}", bytes(4))
    assert problems_of(path) == ["'a' is listed twice in the header", "'a' has the key 'dtype' twice"]


def test_overlaps_and_holes(path):
    raw_file(path, {"a": entry(0, 8), "b": entry(4, 12), "c": entry(0, 4)}, bytes(12))
    assert problems_of(path) == ["'c' and 'a' overlap by 4 bytes", "'a' and 'b' overlap by 4 bytes"]
    raw_file(path, {"a": entry(0, 16, [4]), "b": entry(4, 8), "c": entry(8, 12)}, bytes(16))  # two inside a third
    assert problems_of(path) == ["'a' and 'b' overlap by 4 bytes", "'a' and 'c' overlap by 4 bytes"]
    raw_file(path, {"a": entry(4, 8), "b": entry(12, 16)}, bytes(20))
    assert problems_of(path) == [
        "4 bytes before 'a' belong to no tensor",
        "4 bytes before 'b' belong to no tensor",
        "the last 4 bytes of the file belong to no tensor",
    ]


def test_bad_metadata(path):
    raw_file(path, {"__metadata__": {"format": 1}})
    assert problems_of(path) == ["'__metadata__': 'format' is 1; it must be a string"]
    raw_file(path, {"__metadata__": []})
    assert problems_of(path) == ["'__metadata__' is []; it must be an object of strings"]


def test_every_problem_at_once(path):
    header = {"a": entry(0, 8, [-1]), "b": entry(0, 8), "c": entry(4, 12), "d": entry(0, 4, [1], "Q9")}
    header["e"] = 5
    raw_file(path, header, bytes(10))
    found = problems_of(path)
    assert [p.split()[0] for p in found] == ["'a'", "'d'", "'e'", "'c'"]
    with pytest.raises(FormatError, match="4 problems\n  - 'a' has the shape"):
        SafetensorsFile(path)


def test_many_problems_are_cut_in_print_only(path):
    raw_file(path, {f"t{i}": 0 for i in range(1500)})
    with pytest.raises(FormatError, match="and 1480 more") as caught:
        SafetensorsFile(path)
    assert len(caught.value.problems) == 1500


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile(tmp_path / "fifo")


def test_random_damage_never_escapes(path):
    """Any byte of a valid file's header set to anything gives a file that reads, or a FormatError."""
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.int8)})
    good = path.read_bytes()
    n = 8 + struct.unpack("<Q", good[:8])[0]
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(n)] = rng.integers(256)
        path.write_bytes(bad[: rng.integers(len(bad))] if rng.random() < 0.2 else bad)
        try:
            for view in SafetensorsFile(path).values():
                view.array().sum()
        except FormatError as error:
            assert all(isinstance(p, str) and p for p in error.problems)
            refused += 1
    assert 1000 < refused < 2000


# Values of every type, with the shapes that go wrong easily.
ARRAYS = {
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 7), np.float16),
    "bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "transposed": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "big_endian": np.arange(5, dtype=">i4"),
    "odd": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "ü\n\"quoted\"": np.arange(4, dtype=np.int64),
}


def test_writer_and_reader_agree(path):
    write_safetensors(path, ARRAYS, {"format": "np", "who": "тест"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "np", "who": "тест"}
    assert set(file) == set(ARRAYS)
    for name, values in ARRAYS.items():
        got = file[name].array()
        assert got.shape == values.shape and got.dtype == values.dtype.newbyteorder("<")
        assert np.array_equal(got, values)
        assert not got.flags.writeable and got.flags.aligned


def test_other_implementations_read_ours_and_we_read_theirs(path, tmp_path):
    write_safetensors(path, ARRAYS)
    for name, values in safetensors.numpy.load_file(path).items():
        assert np.array_equal(values, ARRAYS[name])
    theirs = tmp_path / "theirs.safetensors"
    plain = {k: np.ascontiguousarray(v).astype(v.dtype.newbyteorder("<")) for k, v in ARRAYS.items()}
    safetensors.numpy.save_file(plain, theirs, {"a": "b"})
    file = SafetensorsFile(theirs)
    assert file.metadata == {"a": "b"}
    for name, values in plain.items():
        assert np.array_equal(file[name].array(), values)


def test_views_are_the_file_and_outlive_their_owner(path):
    write_safetensors(path, {"a": np.arange(4, dtype=np.float32)})
    file = SafetensorsFile(path)
    a = file["a"].array()
    start = np.frombuffer(file.mapping, np.uint8).ctypes.data
    assert a.ctypes.data == start + file["a"].offset
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 1
    os.remove(path)
    del file
    gc.collect()
    assert a.tolist() == [0, 1, 2, 3]


def test_a_tensor_at_an_odd_address_is_an_aligned_copy(path):
    header = {"u": entry(0, 1, [1], "U8"), "f": entry(1, 9)}
    raw_file(path, header, b"\x07" + np.array([1.5, -2], "<f4").tobytes())
    f = SafetensorsFile(path)["f"].array()
    assert f.tolist() == [1.5, -2] and f.flags.aligned and not f.flags.writeable


def test_every_dtype_round_trips(path):
    write_safetensors(path, {name: np.zeros(3, dtype) for name, dtype in DTYPES.items()})
    file = SafetensorsFile(path)
    assert {name: file[name].dtype for name in DTYPES} == {name: name for name in DTYPES}


class Lazy:
    """A tensor that is made when its turn comes."""

    def __init__(self, shape, make):
        self.shape, self.dtype, self.array = shape, np.dtype(np.float32), make


def test_lazy_tensors_and_views_are_written(path, tmp_path):
    write_safetensors(path, {"a": Lazy((2,), lambda: np.array([1, 2], np.float32))})
    view = SafetensorsFile(path)["a"]
    write_safetensors(tmp_path / "copy", {"b": view})
    assert SafetensorsFile(tmp_path / "copy")["b"].array().tolist() == [1, 2]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(path, tmp_path, error):
    def fail():
        raise error

    path.write_bytes(b"before")
    with pytest.raises(type(error)):
        write_safetensors(path, {"a": np.zeros(3, np.float32), "b": Lazy((2,), fail)})
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind", "message"),
    [
        ({"a": np.array(["x"])}, None, TypeError, "'a' has dtype <U1; safetensors can hold"),
        ({"a": [1.0]}, None, TypeError, "'a' is a list"),
        ({3: np.zeros(1)}, None, TypeError, "the name 3 is a int; it must be a str"),
        ({"__metadata__": np.zeros(1)}, None, ValueError, "is the format's own key"),
        ({"a": np.zeros(1)}, {"k": 1}, TypeError, "metadata: 'k' is 1; keys and values must be str"),
        ({"a": Lazy((2,), lambda: np.zeros(3, np.float32))}, None, ValueError, "declared as F32 .2. but"),
    ],
)
def test_writer_refuses(path, tmp_path, tensors, metadata, kind, message):
    with pytest.raises(kind, match=message):
        write_safetensors(path, tensors, metadata)
    assert os.listdir(tmp_path) == []
