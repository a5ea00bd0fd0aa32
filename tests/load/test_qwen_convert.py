"""``kl.convert`` of Qwen3-Next and Qwen3.5: llama.cpp's layout, and back without a loss."""

import dataclasses
import json

import numpy as np
import pytest
import qwen_files
from conftest import canonical_weights

import kimi_linear as kl
from kimi_linear.load import GGUFFile, MetaArray, gguf_heads, gguf_kept, open_checkpoint
from kimi_linear.load.gguf_config import stored_form
from kimi_linear.load.gguf_metadata import _layer_kinds, _sections


@pytest.fixture(scope="module", params=qwen_files.NAMES)
def folder(request, golden_dir):
    return golden_dir / request.param


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def check_same(folder, back):
    a, b = (canonical_weights(path / "model.safetensors") for path in (folder, back))
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("type", [None, "F32"])
def test_a_folder_comes_back(tmp_path, folder, type):
    kl.convert(folder, tmp_path / "x.gguf", type=type)
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    check_same(folder, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "back" / name) == read(folder / name)
    configs = [open_checkpoint(path).config for path in (folder, tmp_path / "x.gguf", tmp_path / "back")]
    assert configs[0] == configs[2] and configs[1] == stored_form(configs[0]) != configs[0]
    shapes = [{n: t.shape for n, t in open_checkpoint(path).files[0].items()} for path in (folder, tmp_path / "back")]
    assert shapes[0] == shapes[1]


def test_again_is_the_same(tmp_path, folder):
    """A second time nothing is rounded: norms that were 1 + w are."""
    kl.convert(folder, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    kl.convert(tmp_path / "back", tmp_path / "y.gguf")
    first, second = GGUFFile(tmp_path / "x.gguf"), GGUFFile(tmp_path / "y.gguf")
    assert list(first) == list(second)
    for name, view in first.items():
        assert view.array().tobytes() == second[name].array().tobytes(), name


def test_the_layout_is_the_converters(tmp_path, folder):
    kl.convert(folder, tmp_path / "ours.gguf", type="F32")
    qwen_files.write(tmp_path / "theirs.gguf", folder)
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for name, view in theirs.items():
        assert ours[name].dtype == "F32" and ours[name].array().tobytes() == view.array().tobytes(), name

    def plain(value):
        return [int(x) for x in value.values()] if isinstance(value, MetaArray) else value

    assert {key: plain(ours.metadata[key]) for key in theirs.metadata} == {
        key: plain(value) for key, value in theirs.metadata.items()}


@pytest.mark.parametrize("type", ["BF16", "Q8_0", "Q4_0"])
def test_what_stays_float32(tmp_path, golden_dir, type):
    made = kl.convert(golden_dir / "qwen35-moe", tmp_path / "x.gguf", type=type)
    stored = {name: view.dtype for name, view in GGUFFile(tmp_path / "x.gguf").items()}
    float32 = {name.split(".", 2)[-1] if name.startswith("blk") else name for name, dtype in stored.items()
               if dtype == "F32"}
    assert float32 == {"attn_norm.weight", "post_attention_norm.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias",
                       "ssm_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "attn_q_norm.weight",
                       "attn_k_norm.weight", "output_norm.weight"}
    assert stored["blk.0.attn_qkv.weight"] == stored["blk.0.ssm_out.weight"] == type
    assert made.types[type][0] == sum(dtype == type for dtype in stored.values())
    assert open_checkpoint(tmp_path / "x.gguf").in_blocks == (type != "BF16")


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_blocks_are_those_of_the_moved_rows(tmp_path, golden_dir, type):
    """Quantised behind the move: as quantising the file in float32, whose rows and columns have moved."""
    for name in ("qwen-a", "qwen35-moe"):
        kl.convert(golden_dir / name, tmp_path / f"{name}-f32.gguf", type="F32")
        kl.convert(tmp_path / f"{name}-f32.gguf", tmp_path / f"{name}-a.gguf", type=type)
        kl.convert(golden_dir / name, tmp_path / f"{name}-b.gguf", type=type)
        assert (tmp_path / f"{name}-a.gguf").read_bytes() == (tmp_path / f"{name}-b.gguf").read_bytes()


def test_fused_and_inner_names(tmp_path, golden_dir):
    """A folder of fused experts gives the same file; one of a model that sees, its text model's."""
    source = golden_dir / "qwen35-moe"
    kl.convert(source, tmp_path / "x.gguf")
    fused = qwen_files.write_folder(tmp_path / "fused", source, qwen_files.fused_weights)
    kl.convert(fused, tmp_path / "fused.gguf")
    sees = qwen_files.write_folder(tmp_path / "sees", source, lambda weights: {
        n.replace("model.", "model.language_model.", 1): x for n, x in weights.items()} | {
        "model.visual.x": np.ones(3, np.float32)})
    (sees / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "vision_config": {},
                                                  "text_config": read(source / "config.json")}))
    kl.convert(sees, tmp_path / "sees.gguf")
    first = GGUFFile(tmp_path / "x.gguf")
    for name in ("fused.gguf", "sees.gguf"):
        other = GGUFFile(tmp_path / name)
        assert {n: v.array().tobytes() for n, v in other.items()} == {n: v.array().tobytes() for n, v in first.items()}
    kl.convert(tmp_path / "sees.gguf", tmp_path / "text")
    assert open_checkpoint(tmp_path / "text").config == open_checkpoint(source).config
    assert "text_config" not in read(tmp_path / "text" / "config.json")
    check_same(source, tmp_path / "text")


def test_a_log_that_its_rate_does_not_give_back(tmp_path, golden_dir):
    near = np.float32([1e-5, -3e-4, 2e-6, 5e-5])
    folder = qwen_files.write_folder(tmp_path / "x", golden_dir / "qwen35-moe", lambda w: {
        n: near if n.endswith("A_log") else x for n, x in w.items()})
    kl.convert(folder, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    check_same(folder, tmp_path / "back")
    tensor = open_checkpoint(tmp_path / "x.gguf").tensors["model.layers.0.linear_attn.A_log"]
    assert tensor.array().astype(np.float32).tolist() == near[[0, 2, 1, 3]].tolist()


@pytest.mark.parametrize("config", [
    {"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    {"l2_eps": 1e-5}, {"eos_token_id": [2, 5]}, {"eos_token_id": None},
], ids=str)
def test_keys_of_a_config(tmp_path, golden_dir, config):
    source = golden_dir / "qwen35-a"

    def change(weights):
        if "layer_types" not in config:
            return weights
        out = {n: x for n, x in weights.items() if ".layers." not in n or not n.split(".")[3].endswith("attn")}
        donors = {"full_attention": 3, "linear_attention": 0}
        for i, kind in enumerate(config["layer_types"]):
            at = f"model.layers.{donors[kind]}."
            out |= {n.replace(at, f"model.layers.{i}."): x for n, x in weights.items()
                    if n.startswith((at + "self_attn", at + "linear_attn"))}
        return out

    folder = qwen_files.write_folder(tmp_path / "x", source, change, **config)
    kl.convert(folder, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert read(tmp_path / "back" / "config.json") == read(folder / "config.json")
    assert open_checkpoint(tmp_path / "x.gguf").config == stored_form(open_checkpoint(folder).config)
    check_same(folder, tmp_path / "back")


def test_a_foreign_file_becomes_a_folder(tmp_path, folder):
    """Of keys and tensors alone: the config's fields, and weights whose norms lack the 1 again."""
    qwen_files.write(tmp_path / "x.gguf", folder, fused=True)
    kl.convert(tmp_path / "x.gguf", tmp_path / "back", dtype="float32")
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(folder).config
    wanted, found = (canonical_weights(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x.astype(np.float32), rtol=3e-7, atol=1.2e-7, err_msg=name)
    content = read(tmp_path / "back" / "config.json")
    if folder.name != "qwen-a" and "rope_parameters" in content:
        assert content["rope_parameters"]["mrope_section"] == [2, 1, 1]


def test_norms_are_kept_where_the_sum_rounds(tmp_path, folder):
    """In bfloat16 1 + w is exact but for the smallest w; a norm of the file that was changed since is obeyed."""
    kl.convert(folder, tmp_path / "x.gguf")
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert (gguf_kept.NORMS in checkpoint.files[0].metadata) == (folder.name != "qwen35-a") == bool(checkpoint.norms)
    kept = np.float32([1e-9, -0.0, 0.25])
    stored = gguf_heads.plus_one(kept)
    assert gguf_heads.minus_one(stored).tolist() == [0, 0, 0.25]
    assert gguf_heads.minus_one(stored, kept).tobytes() == kept.tobytes()
    assert gguf_heads.minus_one(np.float32([1, 3, 1.25]), kept).tolist() == np.float32([1e-9, 2, 0.25]).tolist()


@pytest.mark.parametrize("which", ["file", "folder"])
def test_saving_a_model_of_a_file(tmp_path, folder, which):
    """`Model.save_pretrained` of a GGUF's weights is a folder of the same model; of a folder's, the folder."""
    kl.convert(folder, tmp_path / "x.gguf")
    kl.Model.from_pretrained(tmp_path / "x.gguf" if which == "file" else folder).save_pretrained(tmp_path / "saved")
    back, wanted = (open_checkpoint(path) for path in (tmp_path / "saved", folder))
    assert back.config == wanted.config
    for name, t in wanted.tensors.items():
        x, y = (np.asarray(a.array(), np.float64) for a in (t, back.tensors[name]))
        assert x.tobytes() == y.tobytes(), name


def test_value_heads_are_tiled():
    c = dataclasses.replace(kl.Model.tiny().config, gdn_k_heads=2, gdn_v_heads=6, gdn_k_dim=1, gdn_v_dim=2)
    assert gguf_heads.tiled(c).tolist() == [0, 3, 1, 4, 2, 5]  # k0 v0, k1 v0, k0 v1, ...
    assert [int(gguf_heads.tiled(c)[p]) // 3 for p in range(6)] == [p % 2 for p in range(6)]
    assert gguf_heads.tiled(c)[gguf_heads.grouped(c)].tolist() == list(range(6))
    assert gguf_heads.rows(c, "linear_attn.in_proj_qkv.weight", gguf_heads.tiled(c))[:3] == [(0, 4), (4, 2), (10, 2)]
    assert gguf_heads.rows(c, "linear_attn.norm.weight", gguf_heads.tiled(c)) is None
    assert gguf_heads.take_columns(c, np.arange(12)[None], gguf_heads.tiled(c)).tolist() == [
        [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]]


def test_layers_by_interval_or_one_by_one():
    assert _layer_kinds([True, True, True, False, True]) == {"full_attention_interval": 4}
    assert _layer_kinds([True, True]) == {"full_attention_interval": 3}
    assert _layer_kinds([False, True]) == {"attention.recurrent_layers": ("bool", [False, True])}
    assert _layer_kinds([False, False]) == {"full_attention_interval": 1}


def test_sections_of_the_rotary_embedding():
    assert _sections({}, 32) == [11, 11, 10, 0] and _sections({}, 4) == [2, 1, 1, 0]
    assert _sections({"rope_parameters": {"mrope_section": [24, 20, 20]}}, 64) == [24, 20, 20, 0]


def test_a_dense_layer_among_sparse_ones_has_no_key(golden_dir):
    from kimi_linear.config import LayerSpec
    from kimi_linear.load.gguf_metadata import qwen_keys

    c = open_checkpoint(golden_dir / "qwen-a").config
    c = dataclasses.replace(c, layers=(LayerSpec("gdn", "dense"), *c.layers[1:]))
    with pytest.raises(ValueError, match="layer 0 is dense, and a GGUF of architecture qwen3next has experts in every"):
        qwen_keys(c, {})
