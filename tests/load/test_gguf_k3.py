"""Kimi K3 in GGUF: there and back without a loss, another converter's file, contradictions, MXFP4 bit for bit."""

import importlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import gguf
import gguf_files
import gguf_k3_files as k3
import ml_dtypes
import numpy as np
import pytest
from conftest import read_safetensors

import kimi_linear as kl
from kimi_linear import _engine, file_check
from kimi_linear.config import Config
from kimi_linear.errors import FormatError
from kimi_linear.load import (
    GGUFFile,
    MetaArray,
    gguf_kept,
    gguf_scores,
    gguf_tensors,
    open_checkpoint,
    write_safetensors,
)
from kimi_linear.load.gguf_config import architecture_of
from kimi_linear.load.packed import PackedMatrix, half_of
from kimi_linear.load.safetensors import SafetensorsFile, array_of, stored_as
from kimi_linear.reference_model import ReferenceModel

compare_models = importlib.import_module("kimi_linear.compare_models")  # the package has a function of that name
IDS = np.arange(1, 40) * 7 % 320
EXPERT = "model.layers.1.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture(scope="module", params=k3.CASES)
def folder(request, golden_dir):
    return golden_dir / request.param


@pytest.fixture(scope="module")
def k3_a(golden_dir):
    return golden_dir / "k3-a"


@pytest.fixture(scope="module")
def ours(tmp_path_factory, k3_a):
    path = tmp_path_factory.mktemp("k3") / "ours.gguf"
    kl.convert(k3_a, path)
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, k3_a):
    return k3.write(tmp_path_factory.mktemp("k3") / "theirs.gguf", k3_a)


def read(path):
    return json.loads((path / "config.json").read_text())


def logits(path):
    checkpoint = open_checkpoint(path)
    weights = {name: array_of(tensor).astype(np.float32) for name, tensor in checkpoint.tensors.items()}
    return ReferenceModel(checkpoint.config, weights).forward(IDS).logits


def assert_same_folder(a, b):
    """The same tensors by name, their bytes and types, and the same config.json; but for what pads A_log."""
    assert read(a) == read(b)
    x, y = (read_safetensors(path / "model.safetensors") for path in (a, b))
    assert x.keys() == y.keys()
    heads = Config.from_file(a / "config.json").kda_heads
    for name in x:
        mine, back = x[name], y[name]
        if name.endswith("A_log"):
            mine = mine.reshape(-1)[:heads].reshape(1, 1, -1, 1)
        assert (mine.dtype, mine.shape) == (back.dtype, back.shape), name
        assert mine.tobytes() == back.tobytes(), name


def problems_of(path):
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    return caught.value.problems


# ---- there and back --------------------------------------------------------------------------------


def test_there_and_back(tmp_path, folder):
    made = kl.convert(folder, tmp_path / "x.gguf")
    assert not made.fallbacks and not made.requantised
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(folder, tmp_path / "back")
    a, b, c = (open_checkpoint(path) for path in (folder, tmp_path / "x.gguf", tmp_path / "back"))
    assert a.config == b.config == c.config and a.config.model_type == "kimi_k3"
    assert a.in_blocks == b.in_blocks == c.in_blocks == (folder.name == "k3-a")
    assert a.fast_activations == b.fast_activations == ("int8" if a.in_blocks else "bfloat16")
    kl.convert(tmp_path / "back", tmp_path / "again.gguf")
    files = [GGUFFile(tmp_path / name) for name in ("x.gguf", "again.gguf")]
    a, b = ({name: view.array().tobytes() for name, view in file.items()} for file in files)
    assert a == b


@pytest.mark.parametrize("type", ["F32", "BF16", None])
def test_a_file_computes_what_the_folder_does(tmp_path, folder, type):
    """Of weights in float32, to which the logarithm of a rate is rounded; every other type goes into it exactly."""
    kl.convert(folder, tmp_path / "x.gguf", type=type)
    types = {view.dtype for view in GGUFFile(tmp_path / "x.gguf").values()}
    assert types == ({"F32", type} if type else {"F32", "BF16"} | ({"MXFP4"} if folder.name == "k3-a" else set()))
    assert (logits(tmp_path / "x.gguf") == logits(folder)).all()


@pytest.mark.parametrize("type, left", [("F32", "F32"), ("Q8_0", "BF16")])
def test_experts_that_are_no_longer_packed(tmp_path, k3_a, type, left):
    """Their folder has them in a float type, and its config no longer says that they are packed; all else is kept."""
    kl.convert(k3_a, tmp_path / "x.gguf", types={"*_exps.weight": type})
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    tensors = read_safetensors(tmp_path / "back" / "model.safetensors")
    (dtype,) = {a.dtype for name, a in tensors.items() if ".experts." in name}
    assert dtype == {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[left]
    config, wanted = read(tmp_path / "back"), read(k3_a)
    del wanted["text_config"]["quantization_config"]
    assert config == wanted
    if type == "F32":
        assert np.abs(logits(tmp_path / "back") - logits(k3_a)).max() == 0


def test_dtype_unpacks(tmp_path, ours, k3_a):
    """Every value of MXFP4 is one of bfloat16."""
    kl.convert(ours, tmp_path / "back", dtype="bfloat16")
    config = read(tmp_path / "back")
    assert "quantization_config" not in config["text_config"]
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    tensor = open_checkpoint(tmp_path / "back").tensors[EXPERT]
    assert tensor.dtype == "BF16"
    assert (tensor.array().astype(np.float32) == k3.values(k3.weights_of(k3_a)[1][EXPERT])).all()


def test_what_is_around_the_text_model(tmp_path, k3_a):
    """Keys of both levels come back where they were, and the GGUF's are obeyed; a vision tower is left behind."""
    def config(content):
        text = content["text_config"]
        del text["bos_token_id"], text["tie_word_embeddings"]
        text["pad_token_id"] = None
        content["vision_config"] = {"hidden_size": 8}
        return content

    def change(tensors):
        return tensors | {"vision_tower.a.weight": np.zeros(4, np.float32)}

    source = k3.changed_folder(tmp_path / "a", k3_a, change, config)
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert read(tmp_path / "back") == read(source)
    names = {name.split(".")[0] for name in SafetensorsFile(tmp_path / "back" / "model.safetensors")}
    assert names == {"language_model"} and open_checkpoint(source).skipped == ("vision_tower.a.weight",)
    raw = (tmp_path / "x.gguf").read_bytes()
    at = raw.index(b"tokenizer.ggml.bos_token_id") + len("tokenizer.ggml.bos_token_id") + 4
    (tmp_path / "y.gguf").write_bytes(raw[:at] + b"\7" + raw[at + 1 :])
    kl.convert(tmp_path / "y.gguf", tmp_path / "other")
    assert read(tmp_path / "other") == read(source) | {"bos_token_id": 7}
    assert open_checkpoint(tmp_path / "y.gguf").config.bos_token_id == 7


def test_a_key_that_would_be_lost_is_named(tmp_path, k3_a, monkeypatch):
    monkeypatch.setattr(gguf_kept, "differences", lambda given, wanted: {})
    with pytest.raises(ValueError, match=r"a GGUF cannot keep .*text_config\.quantization_config"):
        kl.convert(k3_a, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def flat(content, **keys):
    """The text model's config.json by itself; a value of None takes a key away."""
    text = content["text_config"] | {"tie_word_embeddings": content["tie_word_embeddings"]} | keys
    return {key: value for key, value in text.items() if value is not None}


def random_folder(path, content, seed=5):
    """A folder of that config.json: norms near 1, the rest small; in bfloat16, A_log in float32."""
    config, rng = Config.from_dict(content), np.random.default_rng(seed)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(content))
    tensors = {}
    for name, shape in config.weight_shapes().items():
        near = 1 if "norm" in name else 0
        if name.endswith("A_log"):
            shape = (1, 1, *shape, 1)
        elif name.endswith("conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        a = near + rng.normal(0, 0.1, shape)
        tensors[name] = a.astype(np.float32 if name.endswith("A_log") else ml_dtypes.bfloat16)
    write_safetensors(path / "model.safetensors", tensors)
    return path


NONE_OF_K3 = {"hidden_act": "silu", "activation_situ_beta": None, "activation_situ_linear_beta": None,
              "attn_res_block_size": None, "routed_expert_hidden_size": None, "latent_moe_use_norm": None,
              "mla_use_output_gate": None, "quantization_config": None}
PARTS = {
    "SiTU": {"hidden_act": "situ", "activation_situ_beta": 1.7},
    "SiTU of two": {"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.1},
    "residuals": {"attn_res_block_size": 2}, "latent": {"routed_expert_hidden_size": 24},
    "latent, normed": {"routed_expert_hidden_size": 24, "latent_moe_use_norm": True},
    "gated MLA": {"mla_use_output_gate": True}, "full rank": {"full": True},
    "none": {},
}


@pytest.mark.parametrize("model_type", ["kimi_linear", "kimi_k3"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_by_itself(tmp_path, k3_a, part, model_type):
    """Any of K3's parts makes a file of its architecture; without one it is Kimi-Linear's. The kind comes back."""
    keys = dict(PARTS[part])
    linear = dict(read(k3_a)["text_config"]["linear_attn_config"]) | {"use_full_rank_gate": keys.pop("full", False)}
    content = flat(read(k3_a), **NONE_OF_K3 | keys | {"linear_attn_config": linear, "model_type": model_type})
    source = random_folder(tmp_path / "a", content)
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    name = "kimi-linear" if part == "none" else "kimi-k3"
    assert GGUFFile(tmp_path / "x.gguf").metadata["general.architecture"] == name
    assert_same_folder(source, tmp_path / "back")
    assert open_checkpoint(tmp_path / "x.gguf").config == open_checkpoint(source).config
    assert open_checkpoint(source).config.model_type == model_type
    foreign = k3.write(tmp_path / "y.gguf", source)
    if part != "none":
        assert open_checkpoint(foreign).config == replace(open_checkpoint(source).config, model_type="kimi_k3")


def test_all_layers_of_one_kind(tmp_path, k3_a):
    """A part that no layer has, as the gate of MLA without MLA, has no tensor: its key is kept."""
    linear = dict(read(k3_a)["text_config"]["linear_attn_config"]) | {
        "kda_layers": [1, 2, 3], "full_attn_layers": []}
    source = random_folder(tmp_path / "a", flat(
        read(k3_a), num_hidden_layers=3, linear_attn_config=linear, quantization_config=None, num_experts=0,
        first_k_dense_replace=3))
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")
    assert open_checkpoint(tmp_path / "x.gguf").config == open_checkpoint(source).config


# ---- the layout ------------------------------------------------------------------------------------


def test_the_layout_is_the_converters(tmp_path, folder):
    """Every tensor and every key as the rules give them, written a second time in gguf_k3_files.py."""
    kl.convert(folder, tmp_path / "ours.gguf")
    k3.write(tmp_path / "theirs.gguf", folder)
    mine, other = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert {n: (v.shape, v.dtype) for n, v in mine.items()} == {n: (v.shape, v.dtype) for n, v in other.items()}
    for name, view in other.items():
        a = mine.mapping[mine[name].offset : mine[name].offset + mine[name].nbytes]
        assert a == other.mapping[view.offset : view.offset + view.nbytes], name

    def plain(value):
        return list(value.values()) if isinstance(value, MetaArray) else value

    assert {key for key in mine.metadata if key.startswith("kimi-k3.")} \
        == {key for key in other.metadata if key.startswith("kimi-k3.")}
    for key, value in other.metadata.items():
        assert plain(mine.metadata[key]) == plain(value), key


def test_order_of_tensors(ours):
    names = list(GGUFFile(ours))
    assert names[:3] == ["token_embd.weight", "blk.0.attn_res_score.weight", "blk.0.attn_norm.weight"]
    assert names[-3:] == ["output_res_score.weight", "output_norm.weight", "output.weight"]
    assert [int(n.split(".")[1]) for n in names if n.startswith("blk.")] \
        == sorted(int(n.split(".")[1]) for n in names if n.startswith("blk."))


def test_what_stays_float32(ours):
    file = GGUFFile(ours)
    single = {name.split(".", 2)[-1] for name, view in file.items() if view.dtype == "F32"}
    assert {"attn_res_score.weight", "ffn_res_score.weight", "ffn_routed_norm.weight", "ssm_a", "ssm_dt.bias",
            "attn_q_a_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias"} <= single
    assert not single & {"attn_gate.weight", "ssm_g.weight", "ffn_routed_up.weight", "ffn_routed_down.weight"}
    assert file["blk.1.ssm_g.weight"].dtype == file["blk.2.attn_gate.weight"].dtype == "BF16"
    assert file["blk.0.ssm_a"].shape == (2,)


def test_experts_as_another_reader_sees_them(ours, k3_a):
    """By the `gguf` package, value for value."""
    _, weights = k3.weights_of(k3_a)
    for tensor in gguf.GGUFReader(str(ours)).tensors:
        found = re.fullmatch(r"blk\.(\d+)\.(ffn_(?:gate|up|down)_exps\.weight)", tensor.name)
        if found is None:
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
        part = {stored: w for w, stored in gguf_files.EXPERTS.items()}[found[2]]
        stack = [weights[f"model.layers.{found[1]}.block_sparse_moe.experts.{e}.{part}.weight"] for e in range(10)]
        assert (gguf.quants.dequantize(tensor.data, tensor.tensor_type) == np.stack(list(map(k3.values, stack)))).all()


def packed_matrix(tmp_path, codes, scales):
    """A PackedMatrix of codes [rows, columns] and scales [rows, columns / 32]."""
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    write_safetensors(tmp_path / "m.safetensors", {"w_packed": packed, "w_scale": scales})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    return PackedMatrix("w", codes.shape, file["w_packed"], file["w_scale"])


def test_order_of_nibbles(tmp_path):
    """Two rows whose codes together number the columns: each value comes from its own place, and goes back."""
    column = np.arange(64)
    codes = np.stack([column % 16, column // 16 + 1]).astype(np.uint8)
    scales = np.array([[127, 130], [120, 128]], np.uint8)
    matrix = packed_matrix(tmp_path, codes, scales)
    data = matrix.blocks().data
    assert data[0, 0] == 127 and data[0, 17] == 130
    assert [x & 15 for x in data[1, 1:17]] == 16 * [1] and [x >> 4 for x in data[1, 1:17]] == 16 * [2]
    assert [x & 15 for x in data[0, 1:17]] == list(range(16))
    seen = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    assert (seen == k3.values((codes, scales))).all() and (matrix.array() == seen).all()
    for part, view in enumerate((matrix.packed, matrix.scale)):
        assert half_of(data, part).tobytes() == view.array().tobytes()


def test_some_rows_at_a_time(tmp_path, monkeypatch, rng):
    matrix = packed_matrix(tmp_path, rng.integers(0, 16, (9, 64), np.uint8), rng.integers(100, 140, (9, 2), np.uint8))
    whole = matrix.blocks().data.tobytes()
    monkeypatch.setattr(gguf_tensors, "VALUES", 128)
    parts = list(gguf_tensors.rows_of(matrix))
    assert [part.shape for part in parts] == 4 * [(2, 64)] + [(1, 64)]
    assert b"".join(bytes(gguf_tensors.encoded(part, "MXFP4", 64)) for part in parts) == whole
    assert (np.concatenate([part.array() for part in parts]) == matrix.array()).all()


def test_every_scale_and_code(tmp_path, k3_a):
    """All 256 scales come back bit for bit; in bfloat16 their values are exact, and what is past float32 is told."""
    names = [f"language_model.{EXPERT}_{part}" for part in ("packed", "scale")]

    def change(tensors):
        packed, scale = (np.array(tensors[name]) for name in names)
        for e in range(4):
            name = [n.replace("experts.0", f"experts.{e}") for n in names]
            codes = (np.arange(16) | np.arange(16)[::-1] << 4).astype(np.uint8)
            tensors |= {name[0]: np.broadcast_to(codes, packed.shape).copy(),
                        name[1]: np.arange(64 * e, 64 * (e + 1)).astype(np.uint8).reshape(scale.shape)}
        return tensors

    source = k3.changed_folder(tmp_path / "a", k3_a, change)
    kl.convert(source, tmp_path / "x.gguf")
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")
    made = kl.convert(tmp_path / "x.gguf", tmp_path / "wide", dtype="bfloat16")
    assert made.not_finite == {f"language_model.{EXPERT.replace('experts.0', 'experts.3')}": (2 + 4 + 6) * 4}
    _, weights = k3.weights_of(source)
    wide = read_safetensors(tmp_path / "wide" / "model.safetensors")
    for e in range(4):
        name = EXPERT.replace("experts.0", f"experts.{e}")
        with np.errstate(over="ignore"):
            wanted = k3.values(weights[name])
        assert (wide["language_model." + name].astype(np.float32) == wanted).all()


# ---- scores ----------------------------------------------------------------------------------------


def test_both_factors_of_a_score_are_one_tensor(ours, theirs, k3_a):
    tensors = open_checkpoint(ours).tensors
    folder = open_checkpoint(k3_a).tensors
    for at, stored in (("model.layers.3.mlp_res", "blk.3.ffn_res_score.weight"),
                       ("model.layers.0.self_attention_res", "blk.0.attn_res_score.weight"),
                       ("model.output_attn_res", "output_res_score.weight")):
        norm, proj = tensors[f"{at}_norm.weight"], tensors[f"{at}_proj.weight"]
        assert norm.stored == {} and list(proj.stored) == [f"{at}.weight"]
        view = proj.stored[f"{at}.weight"]
        assert view.array().tobytes() == GGUFFile(ours)[stored].array().tobytes() and view.shape == (48,)
        assert norm.nbytes + proj.nbytes == view.nbytes and norm.partner == proj.name and proj.partner == norm.name
        for tensor in (norm, proj):
            assert (tensor.array() == folder[tensor.name].array().astype(np.float32)).all()
            assert tensor.array().shape == folder[tensor.name].shape
        others = open_checkpoint(theirs).tensors
        assert (others[norm.name].array() == 1).all()
        assert (others[proj.name].array() == view.array()).all() and others[proj.name].shape == (1, 48)


def test_factors_whose_product_was_changed_are_not_used(ours):
    proj = open_checkpoint(ours).tensors["model.output_attn_res_proj.weight"]
    norm, kept = proj.kept[0].copy(), proj.array()
    norm[5] *= 2
    other = replace(proj, kept=(norm, proj.kept[1])).array()
    assert other[0, 5] == proj.view.array()[5] and (np.delete(other, 5) == np.delete(kept, 5)).all()
    ones = replace(proj, name="model.output_attn_res_norm.weight", shape=(48,), kept=(norm, proj.kept[1])).array()
    assert ones[5] == 1 and (np.delete(ones, 5) == np.delete(norm, 5)).all()


def test_what_the_engine_takes(ours):
    """The product; where one factor was replaced, both, each by itself."""
    tensors = dict(open_checkpoint(ours).tensors)
    names = [name for name, _ in _engine._as_stored(tensors)]
    assert "model.layers.1.mlp_res.weight" in names and not [n for n in names if gguf_scores.score_of(n)]
    for name in ("model.layers.1.mlp_res_norm.weight", "model.layers.1.mlp_res_proj.weight"):
        changed = dict(_engine._as_stored(tensors | {name: np.full(tensors[name].shape, 2, np.float32)}))
        assert "model.layers.1.mlp_res.weight" not in changed and "model.layers.2.mlp_res.weight" in changed
        assert (changed[name] == 2).all()
        other = tensors[name].partner
        assert (changed[other] == tensors[other].array()).all()


def test_factors_are_kept_where_a_norm_is_not_1(tmp_path, k3_a):
    def change(tensors):
        return {name: np.ones_like(a) if name.endswith("_res_norm.weight") else a for name, a in tensors.items()}

    source = k3.changed_folder(tmp_path / "a", k3_a, change)
    kl.convert(source, tmp_path / "x.gguf")
    assert gguf_scores.KEY not in GGUFFile(tmp_path / "x.gguf").metadata
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")


# ---- files of others -------------------------------------------------------------------------------


def test_a_file_of_another_converter(tmp_path, folder):
    path = k3.write(tmp_path / "x.gguf", folder)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == open_checkpoint(folder).config and not checkpoint.skipped
    exact = logits(folder)
    assert np.abs(logits(path) - exact).max() <= 1e-6 * np.abs(exact).max()  # ssm_a is a float32
    kl.convert(path, tmp_path / "back")
    config = read(tmp_path / "back")
    assert config["model_type"] == "kimi_k3" and "text_config" not in config and "quantization_config" not in config
    tensors = open_checkpoint(tmp_path / "back").tensors
    expert = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    assert tensors[expert].dtype == "BF16"
    assert (tensors[expert].array().astype(np.float32) == k3.values(k3.weights_of(folder)[1][expert])).all()
    kl.convert(path, tmp_path / "same.gguf")
    assert {n: v.array().tobytes() for n, v in GGUFFile(tmp_path / "same.gguf").items()} \
        == {n: v.array().tobytes() for n, v in GGUFFile(path).items()}


@pytest.mark.parametrize("keys", [
    {"expert_latent_length": None}, {"attention.q_lora_rank": None, "attention.key_length": None},
    {"expert_weights_norm": None, "expert_gating_func": None}, {"expert_shared_count": None},
], ids=str)
def test_keys_that_tensors_tell(tmp_path, k3_a, keys):
    assert open_checkpoint(k3.write(tmp_path / "x.gguf", k3_a, keys=keys)).config == open_checkpoint(k3_a).config


def test_a_linear_beta_of_0_is_none(tmp_path, k3_a):
    path = k3.write(tmp_path / "x.gguf", k3_a, keys={"activation.situ_linear_beta": 0.0})
    assert open_checkpoint(path).config.situ_linear_beta is None


def test_keys_of_k3_are_unknown_to_kimi_linear(tmp_path, golden_dir):
    with pytest.warns(UserWarning, match="unknown keys, ignored: kimi-linear.activation.situ_beta"):
        open_checkpoint(gguf_files.write(tmp_path / "x.gguf", golden_dir / "kimi-b",
                                         keys={"activation.situ_beta": 1.0}))


CONTRADICTIONS = {
    "activation.situ_beta": (None, "kimi-k3.activation.situ_linear_beta is 25.0, but activation.situ_beta, withou"),
    "activation.situ_beta ": (-1.0, "kimi-k3.activation.situ_beta is -1.0; it must be a finite number > 0"),
    "activation.situ_beta  ": ("x", "kimi-k3.activation.situ_beta is 'x'; it must be a number"),
    "attn_res.block_size": (None, "attn_res.block_size is missing, but output_res_score.weight at byte"),
    "attn_res.block_size ": (0, "attn_res.block_size is 0, but output_res_score.weight at byte"),
    "attn_res.block_size  ": (5000, "kimi-k3.attn_res.block_size is 5000; it must be an integer from 0 to 4096"),
    "expert_latent_length": (33, "expert_latent_length is 33, but blk.1.ffn_routed_down.weight at byte"),
    "expert_latent_length ": (0, "expert_latent_length is 0, but blk.1.ffn_routed_down.weight at byte"),
    "attention.q_lora_rank": (29, "attention.q_lora_rank is 29, but blk.2.attn_q_a.weight at byte"),
    "kda.gate_lower_bound": (1.0, "kimi-k3.kda.gate_lower_bound is 1.0; it must be a finite number < 0"),
    "attention.head_count_kv": ([0, 0, 1, 0, 0, 0, 0], "head_count_kv[6] is 0, which marks KDA, but blk.6.attn_kv"),
    "expert_shared_count": (1, "expert_shared_count is 1 of width 64, but blk.1.ffn_gate_shexp.weight at byte"),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_metadata_that_contradicts(tmp_path, k3_a, key):
    value, message = CONTRADICTIONS[key]
    problems = problems_of(k3.write(tmp_path / "x.gguf", k3_a, keys={key.strip(): value}))
    assert any(message in problem for problem in problems), problems
    assert len(problems) <= 2  # one sentence, not one a tensor


def without(*ends):
    return lambda tensors: {name: a for name, a in tensors.items() if not name.endswith(ends)}


def also(name, *shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


TENSORS = {
    "gate of one KDA layer": (without("3.ssm_g.weight"), "blk.3.ssm_g.weight is missing; blk.0.ssm_g.weight at byte"),
    "gate of one MLA layer": (without("6.attn_gate.weight"), "blk.6.attn_gate.weight is missing; blk.2.attn_g"),
    "norm of one layer": (without("2.ffn_routed_norm.weight"), "blk.2.ffn_routed_norm.weight is missing; blk.1.f"),
    "one score": (without("4.ffn_res_score.weight"), "blk.4.ffn_res_score.weight is missing; it must have the siz"),
    "first score": (without("0.attn_res_score.weight"), "blk.0.attn_res_score.weight is missing; it must have the"),
    "score of the output": (without("output_res_score.weight"), "output_res_score.weight is missing; it must have"),
    "all scores": (without("_res_score.weight"), "attn_res.block_size is 3, but no tensor scores residuals"),
    "down": (without("ffn_routed_down.weight"), "expert_latent_length is 32, but blk.1.ffn_routed_down.weight is mi"),
    "one down": (without("5.ffn_routed_down.weight"), "blk.5.ffn_routed_down.weight is missing; it must have the si"),
    "one up": (without("5.ffn_routed_up.weight"), "blk.5.ffn_routed_up.weight is missing; it must have the si"),
    "low rank beside": (also("blk.0.ssm_g_a.weight", 20, 48), "'blk.0.ssm_g_a.weight' is in the file, and 'blk.0.ss"),
    "score of other sizes": (also("blk.1.attn_res_score.weight", 47), "has the sizes [47]; by the metadata"),
    "experts": (without("3.ffn_up_exps.weight"), "blk.3.ffn_up_exps.weight is missing; it must have the sizes ["),
    "gate of other sizes": (also("blk.2.attn_gate.weight", 31, 48), "blk.2.attn_gate.weight at byte"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_wrong(tmp_path, k3_a, name):
    change, message = TENSORS[name]
    (problem,) = problems_of(k3.write(tmp_path / "x.gguf", k3_a, tensors=change))
    assert message in problem


def test_a_norm_without_a_latent(tmp_path, golden_dir):
    (problem,) = problems_of(k3.write(
        tmp_path / "x.gguf", golden_dir / "k3-b", keys={"expert_latent_length": None},
        tensors=lambda t: without("ffn_routed_down.weight", "ffn_routed_up.weight", "_exps.weight")(t) | {
            f"blk.{i}.ffn_{part}_exps.weight": np.zeros((12, *shape), np.float32) for i in (2, 3)
            for part, shape in (("gate", (18, 40)), ("up", (18, 40)), ("down", (40, 18)))} | {
            "blk.2.ffn_routed_norm.weight": np.ones(28, np.float32)}))
    assert problem.startswith("blk.3.ffn_routed_norm.weight is missing; blk.2.ffn_routed_norm.weight at byte")


@pytest.mark.parametrize("key, value, words", [
    (gguf_scores.KEY, [1.0, 2.0], r"kimi_linear.scores is an array of float32; it must be an array of 1440 float"),
    (gguf_scores.KEY, 3, "kimi_linear.scores is 3; it must be an array of 1440 float32, norm and projection of each"),
    ("kimi_linear.config.around", "[1]", "kimi_linear.config.around is a JSON list; it must be an object"),
    ("kimi_linear.config.around", "{}", "kimi_linear.config.around: text_config is None; it must be a list of tie"),
    ("kimi_linear.config.around", '{"text_config": ["x"]}', r"around: text_config is \[.x.\]; it must be a list of"),
    ("kimi_linear.dtypes", '{"a": "Q4_0"}', "'a' is 'Q4_0'; it must be F32, F16 or BF16, or MXFP4 of a matrix in two"),
])
def test_kept_keys_of_a_strange_file(tmp_path, k3_a, key, value, words):
    def more(writer):
        {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)](key, value)

    with pytest.raises(FormatError, match=words):
        open_checkpoint(k3.write(tmp_path / "x.gguf", k3_a, more=more))


def test_types_that_only_a_matrix_in_blocks_can_have(tmp_path, k3_a):
    """A file that says MXFP4 of a tensor that is none: it keeps its own type."""
    types = {"model.norm.weight": "MXFP4", "model.layers.*.self_attn.kv_b_proj.weight": "MXFP4"}
    path = k3.write(tmp_path / "x.gguf", k3_a, "F32",
                    more=lambda w: w.add_string("kimi_linear.dtypes", json.dumps(types)))
    kl.convert(path, tmp_path / "back")
    tensors = open_checkpoint(tmp_path / "back").tensors
    assert {tensors[n].dtype for n in ("model.norm.weight", "model.layers.2.self_attn.kv_b_proj.weight")} == {"F32"}


def test_no_architecture_for_another_family(k3_a):
    assert architecture_of(open_checkpoint(k3_a).config).name == "kimi-k3"
    with pytest.raises(ValueError, match="a GGUF can hold kimi_linear, .*, kimi_k3"):
        architecture_of(replace(open_checkpoint(k3_a).config, model_type="another"))


# ---- what reads files ------------------------------------------------------------------------------


def model_of(path):
    """What the tools need of a Model: its config and its tensors."""
    checkpoint = open_checkpoint(path)
    return SimpleNamespace(config=checkpoint.config, _tensors=dict(checkpoint.tensors), name=str(path))


@pytest.mark.parametrize("source", ["folder", "ours", "theirs"])
def test_every_value_is_looked_at(source, k3_a, ours, theirs):
    """Of a matrix in two parts some rows at a time; scores once."""
    model = model_of({"folder": k3_a, "ours": ours, "theirs": theirs}[source])
    report = file_check.FileReport([], [], {})
    for name, tensor in model._tensors.items():
        for view in getattr(tensor, "stored", {"": tensor}).values():
            file_check._check_values(report, name, tensor, view)
            assert stored_as(view) in ("BF16", "F32", "MXFP4")
    assert report.ok and not report.notes
    n_scores = 15 if source == "folder" else 0
    shapes = model.config.weight_shapes()
    assert report.values == sum(int(np.prod(s)) for s in shapes.values()) - (15 - n_scores) * 48


def test_faults_of_packed_matrices_and_scores(tmp_path, rng):
    dead = packed_matrix(tmp_path, np.zeros((4, 64), np.uint8), np.full((4, 2), 127, np.uint8))
    report = file_check.FileReport([], [], {})
    file_check._check_values(report, EXPERT, dead, dead)
    assert report.zero_blocks == 8
    assert report.faults == [f"{EXPERT}, at byte {dead.packed.offset}, is dead: all its values are 0"]
    zero = np.zeros((1, 48), np.float32)  # the first layer's is never used, nor trained
    file_check._check_values(report, "model.layers.0.self_attention_res_proj.weight", zero, zero)
    assert len(report.faults) == 1 and "self_attention_res_proj" in report.notes[0]


def test_verify_compares_what_files_mean(k3_a, ours, theirs, tmp_path):
    """Equal, whatever factors a file has; a product that differs is found; a file may be called otherwise."""
    models = [model_of(path) for path in (k3_a, ours, theirs)]
    for a, b in ((0, 1), (0, 2), (2, 1), (2, 0)):
        a, b = models[a], models[b]
        compare_models._check_same(a, SimpleNamespace(config=replace(b.config, model_type="kimi_linear"), name="b"))
        of_a, of_b = compare_models._tensors_of(a, b), compare_models._tensors_of(b, a)
        for name, names in compare_models._groups(a).items():
            found = compare_models._distance(name, [(of_a(n), of_b(n)) for n in names])
            assert found.rms <= (1e-7 if name.endswith("A_log") else 0), name
            if name == EXPERT.replace(".0.", ".*."):
                assert found.types == ("MXFP4", "MXFP4")
    other = model_of(k3.write(tmp_path / "x.gguf", k3_a, tensors=lambda t: {
        name: 1.5 * a if name == "output_res_score.weight" else a for name, a in t.items()}))
    name = "model.output_attn_res_proj.weight"
    pair = compare_models._tensors_of(models[0], other)(name), compare_models._tensors_of(other, models[0])(name)
    assert compare_models._distance(name, [pair]).rms == pytest.approx(0.5)
