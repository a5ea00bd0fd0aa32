"""Hugging Face folders of Qwen3-Next and Qwen3.5: spellings of tensors become one, or are refused by name."""

import json

import numpy as np
import pytest
import qwen_files
from conftest import canonical_weights

from kimi_linear.errors import FormatError
from kimi_linear.load import open_checkpoint, write_safetensors
from kimi_linear.load.names import canonical_name, canonical_shape, fused_name, fused_parts, is_inert

EXPERTS = "model.layers.0.mlp.experts"


def values(checkpoint):
    return {name: (t.dtype, t.shape, t.array().tobytes()) for name, t in checkpoint.tensors.items()}


def problems_of(folder):
    with pytest.raises(FormatError) as caught:
        open_checkpoint(folder)
    return list(caught.value.problems)


@pytest.mark.parametrize("name", qwen_files.NAMES)
def test_golden_folders_open(golden_dir, name):
    checkpoint = open_checkpoint(golden_dir / name)
    config = checkpoint.config
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == config.weight_shapes() and not checkpoint.skipped
    weights = canonical_weights(golden_dir / name / "model.safetensors")
    assert values(checkpoint) == {n: (checkpoint.tensors[n].dtype, weights[n].shape, weights[n].tobytes())
                                  for n in config.weight_shapes()}
    assert config.norm_plus_one and not config.gdn_tiled
    assert {layer.mixer for layer in config.layers} == {"gdn", "attn"}


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_are_views_of_their_bytes(tmp_path, golden_dir, suffix):
    source = golden_dir / "qwen35-moe"

    def change(weights):
        fused = qwen_files.fused_weights(weights)
        return {n + suffix if n.endswith(("gate_up_proj", "experts.down_proj")) else n: x for n, x in fused.items()}

    folder = qwen_files.write_folder(tmp_path / "fused", source, change)
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == values(open_checkpoint(source))
    whole = checkpoint.files[0][f"{EXPERTS}.gate_up_proj{suffix}"]
    gate, up = (checkpoint.tensors[f"{EXPERTS}.5.{part}_proj.weight"] for part in ("gate", "up"))
    assert gate.file is whole.file and gate.offset - whole.offset == 5 * (gate.nbytes + up.nbytes)
    assert up.offset == gate.offset + gate.nbytes
    assert not up.array().flags.owndata


def test_a_model_that_sees(tmp_path, golden_dir):
    """Its text model under a prefix; vision tower and second-token layers are skipped, and told."""
    source = golden_dir / "qwen35-moe"
    others = {"model.visual.patch_embed.proj.weight": np.ones((2, 2), np.float32), "mtp.fc.weight": np.ones(3, "f4"),
              "mtp.layers.0.mlp.experts.gate_up_proj": np.ones((2, 2, 2), "f4"), "visual.x": np.ones(1, "f4")}

    def change(weights):
        moved = {n.replace("model.", "model.language_model.", 1): x
                 for n, x in qwen_files.fused_weights(weights).items()}
        return moved | others

    folder = qwen_files.write_folder(tmp_path / "sees", source, change)
    inner = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": inner,
                                                    "vision_config": {"depth": 2}}))
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == values(open_checkpoint(source))
    assert sorted(checkpoint.skipped) == sorted(others) and checkpoint.config == open_checkpoint(source).config


def test_shards_of_fused_experts(tmp_path, golden_dir):
    """A shard that is not there takes its fused tensors with it: no sentence a lost expert."""
    folder = qwen_files.write_folder(tmp_path / "x", golden_dir / "qwen35-moe", qwen_files.fused_weights)
    weights = qwen_files.fused_weights(canonical_weights(golden_dir / "qwen35-moe" / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    parts = {f"model-{i}.safetensors": {n: x for j, (n, x) in enumerate(weights.items()) if j % 2 == i} for i in (0, 1)}
    for file, tensors in parts.items():
        write_safetensors(folder / file, tensors)
    index = {n: file for file, tensors in parts.items() for n in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert values(open_checkpoint(folder)) == values(open_checkpoint(golden_dir / "qwen35-moe"))
    (folder / "model-1.safetensors").unlink()
    found = problems_of(folder)
    assert found == [f"model-1.safetensors: the file is not there, and {len(parts['model-1.safetensors'])} tensors of "
                     f"the index with it"]


def without(name):
    return lambda weights: {n: x for n, x in qwen_files.fused_weights(weights).items() if n != name}


def with_(name, x):
    return lambda weights: qwen_files.fused_weights(weights) | {name: x}


F4 = np.float32
BAD = {
    "missing": (without("model.layers.3.self_attn.q_norm.weight"),
                ["model.layers.3.self_attn.q_norm.weight [32] is missing"]),
    "unknown": (with_("model.layers.0.linear_attn.in_proj_qkvz.weight", np.zeros((2, 2), F4)),
                ["model.layers.0.linear_attn.in_proj_qkvz.weight is in model.safetensors, but by config.json there is "
                 "no such tensor"]),
    "wrong shape": (with_("model.layers.0.mlp.shared_expert_gate.weight", np.zeros((2, 64), F4)),
                    ["model.layers.0.mlp.shared_expert_gate.weight has shape [2, 64]; by config.json it must be "
                     "[1, 64]"]),
    "fused, wrong shape": (with_(f"{EXPERTS}.gate_up_proj", np.zeros((8, 32, 64), F4)),
                           [f"{EXPERTS}.gate_up_proj has shape [8, 32, 64]; by config.json it must be [8, 64, 64]"]),
    "fused, wrong type": (with_(f"{EXPERTS}.down_proj", np.zeros((8, 64, 32), np.int32)),
                          [f"{EXPERTS}.down_proj is stored as I32; it must be F32 or F16 or BF16"]),
    "both spellings": (with_(f"{EXPERTS}.3.up_proj.weight", np.zeros((32, 64), F4)),
                       [f"{EXPERTS}.gate_up_proj is there twice: {EXPERTS}.gate_up_proj in model.safetensors holds the "
                        f"experts together, and {EXPERTS}.3.up_proj.weight in model.safetensors holds one of 1 by "
                        f"themselves"]),
    "twice": (with_(f"{EXPERTS.replace('model.', 'model.language_model.')}.down_proj", np.zeros((8, 64, 32), F4)),
              [f"{EXPERTS}.down_proj is there twice: as {EXPERTS}.down_proj in model.safetensors and as "
               f"{EXPERTS.replace('model.', 'model.language_model.')}.down_proj in model.safetensors"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(tmp_path, golden_dir, name):
    change, wanted = BAD[name]
    assert problems_of(qwen_files.write_folder(tmp_path / "x", golden_dir / "qwen35-moe", change)) == wanted


def test_experts_of_a_dense_model_are_unknown(tmp_path, golden_dir):
    folder = qwen_files.write_folder(tmp_path / "x", golden_dir / "qwen35-a",
                                     lambda w: w | {f"{EXPERTS}.down_proj": np.zeros((8, 64, 32), F4)})
    assert problems_of(folder) == [f"{EXPERTS}.down_proj is in model.safetensors, but by config.json there is no such "
                                   f"tensor"]


def test_names():
    assert canonical_name("model.language_model.layers.3.self_attn.q_norm.weight") \
        == "model.layers.3.self_attn.q_norm.weight"
    assert canonical_name("model.language_model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert canonical_name(f"{EXPERTS}.gate_up_proj.weight") == f"{EXPERTS}.gate_up_proj"
    assert fused_parts(f"{EXPERTS}.down_proj") == (EXPERTS, ("down_proj",)) and fused_parts("lm_head.weight") is None
    assert fused_name(f"{EXPERTS}.12.up_proj.weight") == f"{EXPERTS}.gate_up_proj"
    assert fused_name(f"{EXPERTS}.12.down_proj.weight") == f"{EXPERTS}.down_proj"
    assert fused_name("model.layers.0.mlp.up_proj.weight") is None
    assert all(map(is_inert, ("mtp.fc.weight", "model.mtp.norm.weight", "visual.a", "model.visual.b.c")))
    assert not any(map(is_inert, ("model.visualise.weight", "lm_head.weight", "model.layers.0.mtp.weight")))
    assert canonical_shape("model.layers.0.linear_attn.conv1d.weight", (160, 1, 4)) == (160, 4)
