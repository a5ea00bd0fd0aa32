"""A folder of Kimi K3 as it is published: names, padding, experts in two halves, and how these can be wrong."""

import json
import shutil

import numpy as np
import pytest
from conftest import DATA, canonical_weights, mxfp4, read_safetensors

from kimi_linear.errors import FormatError
from kimi_linear.load import open_folder, write_safetensors
from kimi_linear.load.names import canonical_name, is_inert
from kimi_linear.load.packed import PackedMatrix
from kimi_linear.quantized import Quantized

CASES = ("k3-a", "k3-b")
EXPERT = "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight"


def changed(folder, case, change):
    """A copy of a golden folder whose tensors, by the file's names, `change` has changed."""
    tensors = read_safetensors(DATA / "golden" / case / "model.safetensors")
    change(tensors)
    folder.mkdir()
    shutil.copy(DATA / "golden" / case / "config.json", folder)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_tensor(case):
    """Bit for bit, by a reader that is not the loader."""
    checkpoint = open_folder(DATA / "golden" / case)
    wanted = canonical_weights(DATA / "golden" / case / "model.safetensors")
    assert checkpoint.tensors.keys() == wanted.keys()
    for name, tensor in checkpoint.tensors.items():
        got = tensor.array()
        assert got.shape == tensor.shape and np.array_equal(got, wanted[name].reshape(got.shape)), name


def test_the_order_of_the_codes():
    """Each of 32 columns has a code of its own place, and the rows other scales: no permutation goes unseen."""
    rng = np.random.default_rng(4)
    packed, scale = rng.integers(0, 256, (5, 48), np.uint8), rng.integers(100, 150, (5, 3), np.uint8)

    class Part:
        def __init__(self, values):
            self.values, self.nbytes = values, values.nbytes

        def array(self):
            return self.values

    blocks = PackedMatrix("w", (5, 96), Part(packed), Part(scale)).blocks()
    assert isinstance(blocks, Quantized) and blocks.shape == (5, 96) and blocks.data.shape == (5, 3 * 17)
    assert np.array_equal(np.asarray(blocks), mxfp4(packed, scale))


def test_experts_stay_in_blocks():
    checkpoint = open_folder(DATA / "golden" / "k3-a")
    expert = checkpoint.tensors["model.layers.1.block_sparse_moe.experts.0.w1.weight"]
    assert expert.dtype == "MXFP4" and expert.nbytes == 64 * 16 + 64 and checkpoint.in_blocks
    assert not open_folder(DATA / "golden" / "k3-b").in_blocks


def test_names():
    for given, wanted in {
        "language_model.lm_head.weight": "lm_head.weight",
        "language_model.model.layers.3.mlp_res_norm.weight": "model.layers.3.mlp_res_norm.weight",
        "model.layers.3.self_attention_res.proj_weight": "model.layers.3.self_attention_res_proj.weight",
        "layers.3.mlp_res.norm_weight": "model.layers.3.mlp_res_norm.weight",
        "output_attn_res.norm_weight": "model.output_attn_res_norm.weight",
    }.items():
        assert canonical_name(given) == wanted
    for name in ("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight",
                 "language_model.model.mtp.layers.0.eh_proj.weight"):
        assert is_inert(name)


def test_what_only_sees_is_skipped(tmp_path):
    extra = {"vision_tower.patch_embed.weight": np.ones((3, 4), np.float32)}
    checkpoint = open_folder(changed(tmp_path / "x", "k3-b", lambda t: t.update(extra)))
    assert checkpoint.skipped == tuple(extra)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(EXPERT + "_scale"),
     r"experts.0.w1.weight_scale \[64, 1\] is missing, and its other half is there"),
    (lambda t: (t.pop(EXPERT + "_scale"), t.pop(EXPERT + "_packed")), r"experts.0.w1.weight \[64, 32\] is missing"),
    (lambda t: t.update({EXPERT + "_packed": t[EXPERT + "_packed"][:, :8]}),
     r"w1.weight_packed is U8 \[64, 8\]; for the matrix \[64, 32\] it must be U8 \[64, 16\]"),
    (lambda t: t.update({EXPERT + "_scale": np.ones((64, 1), np.float32)}),
     r"w1.weight_scale is F32 \[64, 1\]; for the matrix \[64, 32\] it must be U8 \[64, 1\]"),
    (lambda t: t.update({EXPERT: np.ones((64, 32), np.float32)}), "experts.0.w1.weight is there twice"),
    (lambda t: t.update({"language_model.model.layers.0.self_attn.A_log": np.ones(1, np.float32)}),
     r"A_log has shape \[1\]; by config.json it must be \[2\]"),
    (lambda t: t.pop("language_model.model.output_attn_res_proj.weight"),
     r"model.output_attn_res_proj.weight \[1, 48\] is missing"),
])
def test_what_is_wrong_is_one_sentence(tmp_path, change, words):
    with pytest.raises(FormatError, match=words) as error:
        open_folder(changed(tmp_path / "x", "k3-a", change))
    assert len(error.value.problems) == 1


def test_a_half_in_a_shard_that_is_missing_is_told_with_the_shard(tmp_path):
    tensors = read_safetensors(DATA / "golden" / "k3-a" / "model.safetensors")
    halves = {name: tensors.pop(name) for name in [name for name in tensors if name.endswith("_scale")]}
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copy(DATA / "golden" / "k3-a" / "config.json", folder)
    shards = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": halves}
    index = {name: shard for shard, some in shards.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_safetensors(folder / "model-00001-of-00002.safetensors", tensors)
    with pytest.raises(FormatError, match="model-00002-of-00002.safetensors: the file is not there") as error:
        open_folder(folder)
    assert len(error.value.problems) == 1
