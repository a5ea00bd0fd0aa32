"""Block types: every one is read bit for bit as ggml reads it (ggml_types.py), and written as well as it can be."""

import re
from pathlib import Path

import ggml_types
import gguf
import numpy as np
import pytest
from block_data import BLOCK_TYPES, READ_ONLY, WRITABLE, edge_values, raw_blocks, same_floats

import kimi_linear as kl
from kimi_linear import reference_quant

CONTEXTS = [kl.Context(isa=isa, threads=n) for isa in kl.isa_list() for n in (1, 3)]
CLOSED = list(reference_quant.WRITE)
SEARCHED = [name for name in WRITABLE if name not in CLOSED]
DOCS = (Path(__file__).parents[2] / "docs/block-types.md").read_text(encoding="utf-8")


# ---- the table -------------------------------------------------------------------------------------


def test_the_table_is_that_of_ggml():
    for t in kl.storage_types.values():
        assert (t.id, (t.values, t.bytes)) == (ggml_types.id_of(t.name), ggml_types.size_of(t.name))
        assert kl.storage_type(t.id) is t is kl.storage_type(t.name)
    theirs = {t.name for t in gguf.quants._type_traits} - {"BF16"} | set(ggml_types.BY_VALUE)
    assert {t.name for t in BLOCK_TYPES} == theirs


def test_what_gguf_says_of_the_types_that_it_cannot_read():
    """What is told here is told there, as far as that goes."""
    for name, (number, *size) in ggml_types.BY_VALUE.items():
        theirs = gguf.GGMLQuantizationType.__members__.get(name)
        assert theirs not in gguf.quants._type_traits, f"gguf reads {name} now: ggml_types.py need not"
        assert theirs is None or (theirs, gguf.GGML_QUANT_SIZES[theirs]) == (number, tuple(size))
    assert gguf.GGMLQuantizationType.Q1_0 == 41


# ---- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_dequantize_is_bit_equal_to_ggml_and_to_the_twin(kind):
    raw = raw_blocks(kind)
    wanted = ggml_types.dequantize(raw, kind.name)
    twin = kl.reference.dequantize(raw, kind.name)
    assert same_floats(twin.astype(np.float32), wanted)
    for ctx in CONTEXTS:
        assert same_floats(kl.ops.dequantize(raw, kind.name, ctx=ctx), wanted), ctx


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_rows_of_several_blocks_at_any_address(kind):
    raw = raw_blocks(kind, 12)[:12]
    memory = np.zeros(raw.size + 1, np.uint8)
    odd = memory[1:].reshape(4, -1)
    odd[...] = raw.reshape(4, -1)
    wanted = ggml_types.dequantize(raw.reshape(4, -1), kind.name)
    assert same_floats(kl.ops.dequantize(odd, kind.name), wanted)
    assert same_floats(np.asarray(kl.Quantized(odd, kind.name, (2, 2, 3 * kind.values))), wanted.reshape(2, 2, -1))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_types_are_read_at_any_address(name):
    kind = kl.storage_types[name]
    raw = np.random.default_rng(3).integers(0, 256, 34 * kind.bytes + 1, dtype=np.uint8)[1:].reshape(2, -1)
    wanted = ggml_types.dequantize(raw.copy(), name).reshape(2, 17)
    assert same_floats(kl.ops.dequantize(raw, name), wanted)
    assert same_floats(kl.reference.dequantize(raw, name).astype(np.float32), wanted)


# ---- writing ---------------------------------------------------------------------------------------


def settled(name, blocks):
    """Blocks without the sign of a zero minimum, which gguf takes from NumPy's order of comparing equals."""
    blocks = blocks.reshape(-1, kl.storage_types[name].bytes).copy()
    if name in ("Q4_1", "Q5_1"):
        m = blocks[:, 2:4].copy().view("<u2")
        blocks[:, 2:4] = np.where(m == 0x8000, np.uint16(0), m).view(np.uint8)
    return blocks


@pytest.mark.parametrize("what", edge_values(1))
@pytest.mark.parametrize("name", CLOSED)
def test_closed_formulas_give_the_bytes_of_ggml(name, what):
    x = edge_values()[what]
    ours = kl.ops.quantize(x, name)
    assert np.array_equal(settled(name, ours.data), settled(name, ggml_types.quantize(x, name)))
    assert ours == kl.reference.quantize(x, name)


def test_a_bit_is_a_sign():
    """Q1_0: of zeros of either sign the bit is set; d may be negative in a file, and is the mean as written."""
    x = np.tile(np.float32([0, -0.0, 3, -5, 2, -2, 1, -3]), 16)
    w = kl.ops.quantize(x, "Q1_0")
    assert w.data.tolist() == [0, 0x40, *[0b01010111] * 16]  # d = 16 / 8
    assert np.array_equal(np.asarray(w), np.tile(np.float32([2, 2, 2, -2, 2, -2, 2, -2]), 16))
    w.data[:2] = [0, 0xC0]
    assert np.array_equal(np.asarray(w), np.tile(np.float32([-2, -2, -2, 2, -2, 2, -2, 2]), 16))


def test_two_bits_are_four_levels_of_which_three_are_written():
    """Q2_0: the lowest bits are the first value, and 3, which no quantiser writes, is twice d."""
    raw = np.array([0, 0x38, 0b11100100, *[0b01010101] * 15], np.uint8)  # d = 0.5
    assert kl.ops.dequantize(raw, "Q2_0").tolist() == [-0.5, 0, 0.5, 1, *[0] * 60]
    x = np.tile(np.float32([4, -4, 2, -2, 1.75, -1.75, 0, -0.0]), 8)  # halves away from zero
    w = kl.ops.quantize(x, "Q2_0")
    assert w.data.tolist() == [0, 0x44, *[0b00100010, 0b01010101] * 8]
    noise = kl.ops.quantize(np.random.default_rng(0).standard_normal((9, 640), np.float32), "Q2_0").data
    codes = noise.reshape(-1, 18)[:, 2:, None] >> np.uint8([0, 2, 4, 6]) & 3
    assert np.unique(codes).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", WRITABLE)
def test_writing_gives_the_same_bytes_everywhere(name):
    x = np.concatenate(list(edge_values(6).values())).reshape(-1, 512)
    first = kl.ops.quantize(x, name, ctx=CONTEXTS[0])
    for ctx in CONTEXTS[1:]:
        assert kl.ops.quantize(x, name, ctx=ctx) == first, ctx
    assert kl.ops.quantize(x[7], name) == first[7]


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_never_loses_more_than_zeros_would(name):
    for what, x in edge_values().items():
        y = np.asarray(kl.ops.quantize(x, name), np.float64)
        assert np.isfinite(y).all(), what
        if np.abs(x).max() < 6e4:
            lost, power = ((y - x) ** 2).sum(1), (x.astype(np.float64) ** 2).sum(1)
            assert (lost <= 1.0001 * power + 1e-300).all(), what


@pytest.mark.parametrize("name", SEARCHED)
def test_values_on_the_levels_are_found(name):
    """What a block can hold is written so that it comes back close to itself."""
    kind = kl.storage_types[name]
    x = kl.ops.dequantize(kl.ops.quantize(np.random.default_rng(1).standard_normal((64, 256), np.float32), name))
    again = np.asarray(kl.ops.quantize(x, name))
    lost = np.linalg.norm(again - x) / np.linalg.norm(x)
    assert lost < 0.5 * float(documented()[kind.name]["error"])


def documented():
    """The table of docs/block-types.md: name -> bits, values, bytes, error."""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| (\d+) \| (\d+) \|.*\| ([\d.]+|read only) \|$", DOCS, re.M)
    return {name: dict(zip(("bits", "values", "bytes", "error"), rest)) for name, *rest in rows}


def test_documented_table():
    """Sizes are the core's; the error on normal values is what is measured here."""
    table = documented()
    assert list(table) == [t.name for t in BLOCK_TYPES]
    x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)
    for t in BLOCK_TYPES:
        row = table[t.name]
        assert (float(row["bits"]), int(row["values"]), int(row["bytes"])) == (t.bits, t.values, t.bytes)
        assert t.writable == (row["error"] != "read only")
        if t.writable:
            error = np.linalg.norm(np.asarray(kl.ops.quantize(x, t.name)) - x) / np.linalg.norm(x)
            assert abs(error - float(row["error"])) < 0.01 * error, f"{t.name}: {error:.5f}"


def test_what_cannot_be_written_is_said():
    for name in READ_ONLY:
        sentence = f"{name} is only read here; types to write are Q4_0 Q4_1 .*IQ4_XS"
        with pytest.raises(NotImplementedError, match=sentence):
            kl.ops.quantize(np.ones(256, np.float32), name)
        with pytest.raises(NotImplementedError, match="has no closed formula"):
            kl.reference.quantize(np.ones(256, np.float32), name)
