"""The GGUF reader: what it reads, and that hostile files are refused by key or tensor, and byte."""

import os
import struct
import time

import ggml_types
import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_linear.errors import FormatError
from kimi_linear.load import GGUFFile, MetaArray, is_gguf
from kimi_linear.load import gguf as reader

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(s):
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def array(kind, count, payload):
    return struct.pack("<IQ", kind, count) + payload


def info(name, ne=(4,), kind=0, offset=0, n_dims=None):
    sizes = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def raw_file(keys=(), infos=(), data=b"", *, version=3, n_keys=None, n_infos=None, alignment=32):
    counts = (len(infos) if n_infos is None else n_infos, len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gguf"


def open_raw(path, *args, **kwargs):
    path.write_bytes(raw_file(*args, **kwargs))
    return GGUFFile(path)


def problems_of(path, content):
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        values = GGUFFile(path).metadata.values()
        [v.values() for v in values if isinstance(v, MetaArray)]
    assert caught.value.where == str(path)
    return list(caught.value.problems)


# ---- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_values_of_every_type(path, version):
    keys = [key("i8", 1, b"\xff"), key("u16", 2, struct.pack("<H", 65535)), key("f32", F32, struct.pack("<f", 0.5)),
            key("yes", BOOL, b"\1"), key("s", STRING, text("wörd")), key("f64", 12, struct.pack("<d", -1.5)),
            key("u64", U64, struct.pack("<Q", 2**63)), key("i64", 11, struct.pack("<q", -7)),
            key("bools", ARRAY, array(BOOL, 2, b"\0\1")), key("words", ARRAY, array(STRING, 2, text("a") + text(""))),
            key("ints", ARRAY, array(I32, 3, struct.pack("<3i", 1, -2, 3))),
            key("deep", ARRAY, array(ARRAY, 2, array(U32, 1, struct.pack("<I", 9)) + array(STRING, 0, b"")))]
    data = np.arange(8, dtype=np.float32).tobytes()
    file = open_raw(path, keys, [info("a", (4, 2)), ], data, version=version)
    m = file.metadata
    assert (m["i8"], m["u16"], m["f32"], m["yes"], m["s"], m["f64"]) == (-1, 65535, 0.5, True, "wörd", -1.5)
    assert (m["u64"], m["i64"]) == (2**63, -7) and m["yes"] is True
    assert m["bools"].values().tolist() == [False, True] and m["words"].values() == ["a", ""]
    assert m["ints"].values().tolist() == [1, -2, 3] and m["ints"].kind == "int32"
    deep = m["deep"].values()
    assert deep[0].tolist() == [9] and deep[1] == []
    assert file["a"].shape == (2, 4) and file["a"].dtype == "F32"
    assert file["a"].array().tolist() == np.arange(8).reshape(2, 4).tolist()
    assert file.version == version and file.data_offset % 32 == 0


def test_it_agrees_with_the_gguf_package(path, rng):
    """A file that the `gguf` package wrote, with an alignment of its own and every storage type."""
    writer = gguf.GGUFWriter(str(path), "kimi-linear")
    writer.add_custom_alignment(128)
    writer.add_token_list(["a", "bc", ""])
    writer.add_array("some.ints", [1, 2, 3])
    for kind, (n_values, n_bytes) in gguf.GGML_QUANT_SIZES.items():
        if kind.value in reader.TYPES:
            writer.add_tensor(kind.name, rng.integers(0, 255, (3, 2 * n_bytes), np.uint8), raw_dtype=kind)
            assert reader.TYPES[kind.value] == (kind.name, n_values, n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.alignment == 128 and list(ours) == [t.name for t in theirs.tensors] and len(ours) > 25
    for t in theirs.tensors:
        view = ours[t.name]
        assert (view.offset, view.nbytes, view.shape[::-1]) == (t.data_offset, t.n_bytes, tuple(t.shape))
    assert ours.metadata["tokenizer.ggml.tokens"].values() == ["a", "bc", ""]
    assert ours.metadata["some.ints"].values().tolist() == [1, 2, 3]


def test_known_by_its_first_bytes(tmp_path, path):
    path.write_bytes(raw_file())
    blob = tmp_path / "sha256-0123"
    os.link(path, blob)
    (tmp_path / "link").symlink_to(blob)
    assert is_gguf(path) and is_gguf(blob) and is_gguf(tmp_path / "link")
    assert not is_gguf(tmp_path / "none") and not is_gguf(tmp_path)
    (tmp_path / "short.gguf").write_bytes(b"GGU")
    assert not is_gguf(tmp_path / "short.gguf")


def test_a_vocabulary_costs_little_to_open(path):
    """163,840 tokens and as many merges: far below a second, and the strings are made when asked for."""
    words = b"".join(text(f"token{i}") for i in range(163840))
    path.write_bytes(raw_file([key("tokens", ARRAY, array(STRING, 163840, words)),
                               key("merges", ARRAY, array(STRING, 163840, words))]))
    begin = time.process_time()
    file = GGUFFile(path)
    assert time.process_time() - begin < 0.5  # 0.05 s where nothing else runs
    tokens = file.metadata["tokens"]
    assert len(tokens) == 163840 and tokens.values()[163839] == "token163839"


# ---- hostile files ---------------------------------------------------------------------------------

ONE = np.zeros(4, np.float32).tobytes()
HOSTILE = {
    "empty": (b"", "it has 0 bytes; a GGUF file has at least 24"),
    "other magic": (b"GGML" + b"\0" * 40, "it begins with b'GGML'; a GGUF file begins with b'GGUF'"),
    "version 1": (raw_file(version=1), "its version is 1; versions 2 and 3 are read"),
    "future version": (raw_file(version=4), "its version is 4; versions 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian (version 3)"),
    "many tensors": (raw_file(n_infos=2**60), "promises 1152921504606846976 tensors at byte 8"),
    "many keys": (raw_file(n_keys=2**64 - 1), "promises 18446744073709551615 metadata keys at byte 16"),
    "no second key": (raw_file([key("a", U32, b"\0\0\0\0")], n_keys=2, data=ONE * 8), "key 1 at byte 41 is empty"),
    "long key": (raw_file([text(b"a" * 70000) + b"\0" * 8]), "key 0 at byte 24 has 70000 bytes; at most 65535"),
    "endless key": (raw_file([struct.pack("<Q", 2**63)], data=ONE), "key 0 at byte 24 has 9223372036854775808 bytes"),
    "key past the end": (raw_file([struct.pack("<Q", 99) + b"a"]), "metadata key 0 at byte 32 needs 99 bytes, but"),
    "key not UTF-8": (raw_file([key(b"a\xff", U32, b"\0\0\0\0")]), "metadata key 0 is not UTF-8 at byte 33"),
    "value not UTF-8": (raw_file([key("a", STRING, text(b"\xff"))]), "the value of 'a' is not UTF-8 at byte 45"),
    "unknown value type": (raw_file([key("a", 13, b"\0" * 8)]), "'a' has the type 13 at byte 33, which is not known"),
    "bool of 2": (raw_file([key("a", BOOL, b"\2")]), "'a' has a bool of 2 at byte 37; it must be 0 or 1"),
    "cut value": (raw_file([key("a", STRING, text("bcd"))])[:44], "the length of the value of 'a' at byte 37 needs 8"),
    "unknown element": (raw_file([key("a", ARRAY, array(99, 1, b"\0" * 9))]), "'a' is an array of type 99"),
    "huge array": (raw_file([key("a", ARRAY, array(U32, 2**62, b""))]), "'a' promises 4611686018427387904 elements of"),
    "huge strings": (raw_file([key("a", ARRAY, array(STRING, 2**61, b""))]), "'a' promises 2305843009213693952 elem"),
    "string past the end": (raw_file([key("a", ARRAY, array(STRING, 2, struct.pack("<Q", 2**62)))], data=ONE),
                            "string 1 of 'a' at byte 4611686018427387961 passes the end"),
    "last string past": (raw_file([key("a", ARRAY, array(STRING, 1, struct.pack("<Q", 2**64 - 1)))], data=ONE),
                         "the strings of 'a' pass the end"),
    "nested": (raw_file([key("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(
        U32, 0, b""))))))], data=ONE * 4), "'a' nests arrays deeper than 4"),
    "endless nest": (raw_file([key("a", ARRAY, array(ARRAY, 1, b"") * 100)], data=ONE * 99), "deeper than 4"),
    "keys beyond the limit": (raw_file([key(f"{i}", 0, b"\0") for i in range(2**16 + 1)]),
                              "it has 65537 metadata keys, by its byte 16; at most 65536 are read"),
    "tensors beyond the limit": (raw_file(n_infos=2**16 + 1, data=b"\0" * 2**22), "it has 65537 tensors, by its byte"),
    "arrays beyond the limit": (raw_file([key("a", ARRAY, array(ARRAY, 2**16 + 1, array(U32, 0, b"") * (2**16 + 1)))]),
                                "'a' has 65537 arrays in an array at byte 49; at most 65536 are read of a file"),
    "arrays of two keys": (raw_file([key(x, ARRAY, array(ARRAY, 40000, array(U32, 0, b"") * 40000)) for x in "ab"]),
                           "'b' has 40000 arrays in an array"),
    "same key": (raw_file([key("a", U32, b"\0\0\0\0")] * 2), "the key 'a' is there twice, the second time at byte 41"),
    "alignment type": (raw_file([key("general.alignment", STRING, text("32"))]), "alignment' is '32'; it must"),
    "alignment 0": (raw_file([key("general.alignment", U32, struct.pack("<I", 0))]), "'general.alignment' is 0; it"),
    "alignment 48": (raw_file([key("general.alignment", U32, struct.pack("<I", 48))]), "'general.alignment' is 48;"),
    "long name": (raw_file(infos=[info("a" * 65)], data=ONE), "at byte 24 has 65 bytes; at most 64"),
    "no axes": (raw_file(infos=[info("a", n_dims=0)], data=ONE), "'a' (its info is at byte 24) has 0 axes; it must"),
    "five axes": (raw_file(infos=[info("a", (1,) * 5)], data=ONE), "has 5 axes; it must have 1 to 4"),
    "zero size": (raw_file(infos=[info("a", (4, 0))], data=ONE), "has sizes [4, 0]; none may be 0"),
    "overflow": (raw_file(infos=[info("a", (2**32, 2**32))], data=ONE), "whose product overflows 64 bits"),
    "byte overflow": (raw_file(infos=[info("a", (2**62,))], data=ONE), "bytes, which overflows 64 bits"),
    "unknown type": (raw_file(infos=[info("a", kind=4)], data=ONE), "has the storage type 4, which is not known"),
    "part of a block": (raw_file(infos=[info("a", (33,), 8)], data=ONE * 9), "Q8_0 with rows of 33 values; Q8_0 has"),
    "misaligned": (raw_file(infos=[info("a", offset=16)], data=ONE * 4), "has the offset 16; it must be a multiple of"),
    "past the end": (raw_file(infos=[info("a", (8,))], data=ONE), "the file: it has 80 bytes and should have 96"),
    "far past the end": (raw_file(infos=[info("a", offset=2**63)], data=ONE), "it has 80 bytes and should have"),
    "same name": (raw_file(infos=[info("a"), info("a", offset=32)], data=ONE * 4), "'a' is there twice, the second"),
    "overlap": (raw_file(infos=[info("a", (16,)), info("b", offset=32)], data=ONE * 4), "'a' and 'b' overlap by 16 b"),
    "inside": (raw_file(infos=[info("a", (32,)), info("b", offset=32), info("c", offset=64)], data=ONE * 8),
               "'a' and 'c' overlap by 16 b"),
    "same place": (raw_file(infos=[info("a"), info("b")], data=ONE), "'a' and 'b' overlap by 16 bytes from byte"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(path, case):
    content, message = HOSTILE[case]
    assert any(message in problem for problem in problems_of(path, content)), problems_of(path, content)


def q2_0_file(bytes_a_row, *more):
    """Two matrices of 16 rows of 128 values in the type 42, a vector between them; `more` infos behind."""
    step = 16 * bytes_a_row  # 544 or 576: both are aligned
    infos = [info("a", (128, 16), 42), info("b", offset=step), info("c", (128, 16), 42, step + 32), *more]
    return raw_file(infos=infos, data=b"\0" * (2 * step + 32))


def test_a_fork_packs_q2_0_by_128(path):
    """PrismML's blocks have 34 bytes for 128 values, under ggml's number: told in one sentence, wherever it shows."""
    path.write_bytes(q2_0_file(36))
    assert GGUFFile(path)["c"].dtype == "Q2_0" and GGUFFile(path)["c"].nbytes == 576
    sentence = ("the tensors of Q2_0, 2 with 'a', lie as PrismML's fork of llama.cpp packs them, 34 bytes for 128 "
                "values; read is ggml's Q2_0, 18 bytes for 64")
    assert problems_of(path, q2_0_file(34)) == [sentence]
    alone = raw_file(infos=[info("a", (128, 16), 42)], data=b"\0" * 544)
    assert problems_of(path, alone) == [sentence.replace("2 with", "1 with")]


def test_what_no_fork_explains_is_told_as_it_is(path):
    """A file cut short, tensors that overlap by any count, and rows that are no blocks of 128."""
    rows = [info("a", (64, 32), 42), info("b", offset=544)]
    for content, *parts in ((q2_0_file(34)[:-1], "it is cut short or damaged", "'a' and 'b' overlap by 16 bytes"),
                            (q2_0_file(34, info("d", offset=544)), "'a' and 'b' overlap", "'a' and 'd' overlap"),
                            (raw_file(infos=rows, data=b"\0" * 576), "'a' and 'b' overlap by 16 bytes")):
        problems = problems_of(path, content)
        assert not any("PrismML" in problem for problem in problems)
        assert all(any(part in problem for problem in problems) for part in parts), problems


def test_every_tensor_that_is_wrong_is_told(path):
    infos = [info("a", (4, 0)), info("b", kind=77), info("c", offset=8), info("d", (2**40,))]
    problems = problems_of(path, raw_file(infos=infos, data=ONE))
    assert [p.split("'")[1] for p in problems] == ["a", "b", "c", "d"]
    assert "at byte 24" in problems[0]


def test_every_cut_is_refused(path):
    keys = [key("a", STRING, text("b")), key("c", ARRAY, array(STRING, 2, text("d") + text("e")))]
    whole = raw_file(keys, [info("t", (8,))], ONE * 2)
    path.write_bytes(whole)
    assert len(GGUFFile(path)) == 1
    for n in range(len(whole)):
        problems_of(path, whole[:n])


def test_a_header_has_a_limit(path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_HEADER", 100)
    (problem,) = problems_of(path, raw_file([key("a", STRING, text("b" * 200))]))
    assert "left of its header, of at most 100 bytes" in problem


WHOLE = raw_file([key("general.alignment", U32, struct.pack("<I", 32)), key("s", STRING, text("word")),
                  key("n", ARRAY, array(STRING, 3, text("a") + text("bc") + text(""))),
                  key("d", ARRAY, array(ARRAY, 1, array(I32, 2, b"\0" * 8)))],
                 [info("a", (4, 2)), info("b", (32,), 8, 32)], ONE * 6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.sampled_from([0, 1, 4, 8, 9, 13, 127, 128, 255])),
                min_size=1, max_size=4), st.integers(0, len(WHOLE)))
def test_any_bytes_open_or_are_refused(path, changes, cut):
    content = bytearray(WHOLE)
    for at, byte in changes:
        content[at] = byte
    path.write_bytes(content[:cut] if cut % 3 == 0 else content)
    try:
        file = GGUFFile(path)
        for value in file.metadata.values():
            if isinstance(value, MetaArray):
                value.values()
    except FormatError as error:
        assert error.problems and all(error.problems)
        return
    for view in file.values():
        assert file.data_offset <= view.offset and view.offset + view.nbytes <= len(content)


# ---- block types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reader.BLOCK_TYPES)
def test_values_of_blocks(path, rng, name):
    """Random bytes, as ggml reads them; any NaN is like another."""
    n_values, n_bytes = ggml_types.size_of(name)
    raw = rng.integers(0, 256, (5, 3 * n_bytes), np.uint8)
    file = open_raw(path, infos=[info("a", (3 * n_values, 5), ggml_types.id_of(name))], data=raw.tobytes())
    values = file["a"].array()
    assert values.shape == (5, 3 * n_values) and not values.flags.writeable
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(values, ggml_types.dequantize(raw, name))


def test_a_download_that_ended_early_is_one_sentence(tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw_file(infos=[info("a"), info("b", offset=32), info("c", offset=64)], data=ONE))
    with pytest.raises(FormatError) as caught:
        GGUFFile(path)
    (problem,) = caught.value.problems
    assert problem.startswith("2 of 3 tensors, the first 'b'") and "it is cut short or damaged" in problem
