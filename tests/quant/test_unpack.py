"""Blocks unpacked to float32: the values of ggml, and the same bytes on every instruction set."""

import ggml_types
import numpy as np
import pytest
from block_bytes import values_of

import kimi_linear as kl
from kimi_linear import _core

SMALL = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
LARGE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
         "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0"]  # fmt: skip


def unpacked(data, name, K, isa):
    """All rows of a table of blocks: an embedding widens them."""
    ids = np.arange(len(data), dtype=np.int32)
    y = np.full((len(data), K), 7, np.float32)
    table = (data.reshape(-1), ggml_types.id_of(name), 1, len(data), K)
    _core.embedding(kl.Context(isa=isa)._core, y, ids, table, len(data))
    return y


def random_rows(name, n_blocks, rng):
    values, size = ggml_types.size_of(name)
    return rng.integers(0, 256, (40, n_blocks * size), dtype=np.uint8), n_blocks * values


def assert_same_bytes(a, b):
    """Signs of zeros, too; NaN are alike whatever their bits."""
    numbers = ~np.isnan(b)
    assert np.array_equal(np.isnan(a), ~numbers)
    assert np.array_equal(a.view(np.uint32)[numbers], b.view(np.uint32)[numbers])


@pytest.mark.parametrize("name", SMALL + LARGE)
@pytest.mark.parametrize("n_blocks", [1, 2, 8, 9, 19])
def test_the_same_bytes_on_every_instruction_set(name, n_blocks):
    """Any bytes are a block. Kernels take 256 values at a time; 19 blocks of 32 are 608."""
    data, K = random_rows(name, n_blocks, np.random.default_rng(n_blocks))
    plain = unpacked(data, name, K, "scalar")
    with np.errstate(all="ignore"):
        assert_same_bytes(plain, values_of(data, name))
    assert np.isfinite(plain).mean() > 0.5
    for isa in kl.isa_list():
        assert_same_bytes(unpacked(data, name, K, isa), plain)
