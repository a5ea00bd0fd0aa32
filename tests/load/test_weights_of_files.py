"""Weights as a file's owner meets them: a file that changes under them, and blocks in place of an array."""

import os
import shutil

import numpy as np
import pytest
from conftest import TINY

import kimi_linear as kl


def test_a_weight_of_a_file_that_was_cut_is_not_read(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    model = kl.Model.from_pretrained(tmp_path / "tiny")
    name = next(n for n in model.weights if n.endswith("q_proj.weight"))
    os.truncate(tmp_path / "tiny" / "model.safetensors", 100_000)
    with pytest.raises(kl.FormatError, match="changed after it was opened"):
        model.weights[name]


def test_blocks_do_not_silently_become_float32():
    model = kl.Model.tiny()
    name = next(n for n in model.weights if n.endswith("q_proj.weight"))
    before = model.weights[name]
    blocks = kl.ops.quantize(np.asarray(before, np.float32), "Q8_0")
    with pytest.raises(TypeError, match="q_proj.weight is a Quantized; a weight is replaced by an array"):
        model.weights[name] = blocks
    assert model.weights[name].tobytes() == before.tobytes()
