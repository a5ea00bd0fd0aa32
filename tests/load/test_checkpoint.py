"""Folders in both spellings, whole and sharded, and every way in which one can be wrong."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kimi_linear.config import Config
from kimi_linear.errors import FormatError
from kimi_linear.load import SafetensorsFile, open_checkpoint, open_folder, resolve, strict_json, write_safetensors
from kimi_linear.load.names import canonical_name, canonical_shape, is_inert

ROOT = Path(__file__).parents[2]
TINY = ROOT / "kimi_linear" / "data" / "tiny"
GOLDEN = ROOT / "tests" / "data" / "golden"
INDEX = "model.safetensors.index.json"

CONFIG = {
    "model_type": "kimi_linear", "vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2,
    "intermediate_size": 12, "hidden_act": "silu", "rms_norm_eps": 1e-5, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4,
    "linear_attn_config": {"head_dim": 4, "num_heads": 2, "short_conv_kernel_size": 4, "kda_layers": [1],
                           "full_attn_layers": [2]},
    "q_lora_rank": None, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
    "mla_use_nope": True, "num_experts": 2, "num_experts_per_token": 1, "num_shared_experts": 1,
    "moe_intermediate_size": 6, "moe_router_activation_func": "sigmoid", "moe_renormalize": True,
    "routed_scaling_factor": 2.0, "num_expert_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
A_LOG = "model.layers.0.self_attn.A_log"
DT_BIAS = "model.layers.0.self_attn.dt_bias"
CONV = "model.layers.0.self_attn.q_conv1d.weight"


def random_weights(config=CONFIG):
    rng = np.random.default_rng(1)
    shapes = Config.from_dict(config).weight_shapes()
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_folder(folder, weights, config=CONFIG, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / name, weights)
    return folder


def make_shards(folder, weights, n=3):
    """The weights in n shards with their index; gives the index's map to change."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, index = list(weights), {}
    for i in range(n):
        shard = f"model-{i + 1:05}-of-{n:05}.safetensors"
        write_safetensors(folder / shard, {name: weights[name] for name in names[i::n]})
        index |= dict.fromkeys(names[i::n], shard)
    write_index(folder, index)
    return index


def write_index(folder, index):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


def problems_of(folder):
    with pytest.raises(FormatError) as caught:
        open_folder(folder)
    assert str(folder) in str(caught.value)
    return sorted(caught.value.problems)


@pytest.mark.parametrize("folder", [TINY, GOLDEN / "kimi-a", GOLDEN / "kimi-b"], ids=lambda p: p.name)
def test_published_and_transformers_folders(folder):
    """tiny is spelled as published, the golden ones as transformers 5.23 saves them."""
    checkpoint = open_folder(folder)
    assert {name: t.shape for name, t in checkpoint.tensors.items()} == checkpoint.config.weight_shapes()
    file = SafetensorsFile(folder / "model.safetensors")
    assert len(file) == len(checkpoint.tensors) and checkpoint.skipped == ()
    spelled = {canonical_name(name): view for name, view in file.items()}
    for name, view in checkpoint.tensors.items():
        assert view.array().tobytes() == spelled[name].array().tobytes()
    assert "eos_token_id" in checkpoint.generation_config
    checkpoint.check_unchanged()


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 1, 2, 1)])
def test_both_spellings_give_the_same_tensors(tmp_path, shape):
    weights = random_weights()
    other = {}
    for name, values in weights.items():
        if name.endswith("_conv1d.weight"):
            values = values[:, None, :]
        values = values.reshape(shape) if name == A_LOG else values
        other[name.replace("layers.0.mlp.", "layers.0.block_sparse_moe.").removeprefix("model.")] = values
    checkpoint = open_folder(make_folder(tmp_path / "m", other))
    assert list(checkpoint.tensors) == list(weights)
    for name, values in weights.items():
        assert np.array_equal(checkpoint.tensors[name].array(), values)


def test_names():
    layer = "model.layers.3."
    assert canonical_name(layer + "block_sparse_moe.up_proj.weight") == layer + "mlp.up_proj.weight"
    for part in ("block_sparse_moe.gate.weight", "block_sparse_moe.shared_experts.gate_proj.weight"):
        assert canonical_name(layer + part) == layer + part
    for same in ("lm_head.weight", "model.norm.weight", "normal.weight"):
        assert canonical_name(same) == same
    assert canonical_name("norm.weight") == "model.norm.weight"
    assert is_inert("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_inert("model.layers.3.self_attn.inv_freq")
    assert canonical_shape(CONV, (8, 1, 4)) == (8, 4)
    assert canonical_shape(CONV, (8, 2, 4)) == (8, 2, 4)
    assert canonical_shape(A_LOG, (1, 2, 3, 1)) == (1, 2, 3, 1)
    assert canonical_shape(A_LOG, (4, 2)) == (4, 2)
    assert canonical_shape("model.norm.weight", (2, 1)) == (2, 1)


def test_every_problem_at_once(tmp_path):
    weights = random_weights()
    del weights["model.norm.weight"], weights["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    weights["model.layers.7.extra"] = np.zeros(2, np.float32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float64)
    weights["lm_head.weight"] = np.zeros((8, 24), np.float32)
    weights[CONV] = np.zeros((8, 2, 4), np.float32)
    weights[A_LOG] = np.zeros(2, np.float64)
    weights["layers.0.self_attn.dt_bias"] = np.zeros(8, np.float32)
    assert problems_of(make_folder(tmp_path / "m", weights)) == sorted([
        "model.norm.weight [8] is missing",
        "model.layers.1.block_sparse_moe.experts.1.w2.weight [8, 6] is missing",
        "model.layers.7.extra is in model.safetensors, but by config.json there is no such tensor",
        "lm_head.weight has shape [8, 24]; by config.json it must be [24, 8]",
        f"{CONV} has shape [8, 2, 4]; by config.json it must be [8, 4]",
        f"{A_LOG} is stored as F64; it must be F32 or F16 or BF16",
        f"{DT_BIAS} is there twice: as {DT_BIAS} in model.safetensors"
        " and as layers.0.self_attn.dt_bias in model.safetensors",
    ])  # fmt: skip


def test_what_is_skipped(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    weights = random_weights(config)
    assert "lm_head.weight" not in weights
    assert open_folder(make_folder(tmp_path / "m", weights, config)).skipped == ()
    weights["lm_head.weight"] = np.zeros((24, 8), np.float32)
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)
    checkpoint = open_folder(make_folder(tmp_path / "m", weights, config))
    assert set(checkpoint.skipped) == {"lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"}
    assert "lm_head.weight" not in checkpoint.tensors


def test_shards(tmp_path):
    weights = random_weights()
    make_shards(tmp_path / "m", weights)
    checkpoint = open_folder(tmp_path / "m")
    assert len(checkpoint.files) == 3 and checkpoint.generation_config == {}
    for name, values in weights.items():
        assert np.array_equal(checkpoint.tensors[name].array(), values)
    (tmp_path / "m" / INDEX).unlink()
    assert open_folder(tmp_path / "m").tensors.keys() == weights.keys()
    damaged = tmp_path / "m" / "model-00002-of-00003.safetensors"
    damaged.write_bytes(b"")
    (problem,) = problems_of(tmp_path / "m")  # what it held is not told as missing: nobody knows what that was
    assert problem.startswith(f"{damaged.name}: it has 0 bytes")


def test_shards_that_are_wrong(tmp_path):
    weights = {"spare": np.zeros(1, np.float32)} | random_weights()  # dealt out in turn: spare, embed, ...
    folder = tmp_path / "m"
    index = make_shards(folder, weights)
    first, second, third = sorted(set(index.values()))
    assert (index["spare"], index["model.embed_tokens.weight"]) == (first, second)
    n_lost = sum(shard == third for shard in index.values())
    (folder / third).unlink()
    del index["spare"]
    index |= {"model.embed_tokens.weight": first, "ghost": first, "outside": "../x.safetensors", "number": 3}
    write_index(folder, index)
    assert problems_of(folder) == sorted([
        f"{third}: the file is not there, and {n_lost} tensors of the index with it",
        f"ghost is listed in {first} by {INDEX}, but no shard that could be read has it",
        f"model.embed_tokens.weight is listed in {first} by {INDEX}, but it is in {second}",
        f"{INDEX}: 'outside' is in '../x.safetensors'; it must be a *.safetensors beside it",
        f"{INDEX}: 'number' is in 3; it must be a *.safetensors beside it",
        f"spare is in {first}, but not in {INDEX}",
        f"spare is in {first}, but by config.json there is no such tensor",
    ])  # fmt: skip


def test_a_tensor_in_no_shard_and_a_tensor_in_two(tmp_path):
    weights = random_weights()
    folder = tmp_path / "m"
    index = make_shards(folder, weights)
    shard = index["model.norm.weight"]
    other = next(s for s in index.values() if s != shard)
    rest = {n: weights[n] for n in weights if index[n] == other}
    write_safetensors(folder / other, rest | {"model.norm.weight": weights["model.norm.weight"]})
    first, second = sorted([shard, other])
    assert problems_of(folder) == [
        f"model.norm.weight is there twice: as model.norm.weight in {first}"
        f" and as model.norm.weight in {second}"
    ]
    write_safetensors(folder / other, rest)
    del weights["model.norm.weight"], index["model.norm.weight"]
    write_safetensors(folder / shard, {n: weights[n] for n in weights if index[n] == shard})
    write_index(folder, index)
    assert problems_of(folder) == ["model.norm.weight [8] is missing"]


def test_damaged_shards_are_all_reported(tmp_path):
    index = make_shards(tmp_path / "m", random_weights())
    shards = sorted(set(index.values()))
    for shard in shards[:2]:
        data = (tmp_path / "m" / shard).read_bytes()
        (tmp_path / "m" / shard).write_bytes(data[:-4])
    found = problems_of(tmp_path / "m")
    assert len([p for p in found if p.startswith(shards[0]) and "cut short" in p]) == 1
    assert len([p for p in found if p.startswith(shards[1]) and "cut short" in p]) == 1
    assert not any("is missing" in p for p in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "it holds a JSON list; it must hold an object"),
        ("{", "it is not JSON"),
        ('{"a": NaN}', "it holds NaN, which JSON does not have"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "the key 'a' is there twice"),
        ('{"metadata": {}}', "weight_map is None; it must map names to files"),
        ('{"weight_map": []}', "weight_map is []; it must map names to files"),
        ("[" * 100_000, "its JSON is nested too deep"),
    ],
)
def test_bad_index(tmp_path, text, message):
    make_shards(tmp_path / "m", random_weights())
    (tmp_path / "m" / INDEX).write_text(text)
    (problem,) = problems_of(tmp_path / "m")
    assert message in problem


def test_a_shard_name_that_no_disk_takes(tmp_path):
    index = make_shards(tmp_path / "m", random_weights())
    for name in list(index)[:2]:
        index[name] = "a" * 300 + ".safetensors"
    write_index(tmp_path / "m", index)
    assert any("a.safetensors: the file is not there, and 2 tensors" in p for p in problems_of(tmp_path / "m"))


def test_the_packaged_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny").name == "tiny" and (resolve("tiny") / "model.safetensors").is_file()
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path("tiny")  # a folder goes before it


@pytest.mark.parametrize("path, kind", [(None, "NoneType"), (3, "int"), (b"tiny", "bytes")])
def test_what_is_no_path(path, kind):
    with pytest.raises(TypeError, match=f"path is a {kind}; it must be text or a path"):
        open_checkpoint(path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"There is no folder or GGUF file {tmp_path}/none"):
        open_folder(tmp_path / "none")
    for text, says in (("hello", "is a file that begins with b'hell'; the model is"), ("", "is a file of 0 bytes;")):
        (tmp_path / "a.gguf").write_text(text)
        with pytest.raises(NotADirectoryError, match=says):
            open_folder(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        open_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file that begins with .*; the model is the folder"):
        open_folder(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act"):
        open_folder(tmp_path)


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    def refuse(path, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*config.json"):
        open_folder(tmp_path)


def test_hub_ids_are_looked_up_locally(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="Hugging Face cache does not hold that model") as caught:
        resolve("org/some-model")
    repository = tmp_path / "hub" / "models--org--some-model"
    assert str(repository) in str(caught.value)

    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"Nothing is downloaded: .* give a folder\.$"):
        resolve("org/some-model")
    with pytest.raises(FileNotFoundError, match="or give a folder; did you mean 'org/some-model'"):
        resolve("org/some-modle")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    assert resolve("org/some-model") == snapshot
    (repository / "refs" / "main").write_text("../../..")
    with pytest.raises(FileNotFoundError):
        resolve("org/some-model")
    (tmp_path / "org" / "some-model").mkdir(parents=True)
    assert resolve("org/some-model") == Path("org/some-model")


@pytest.mark.parametrize("change", ["longer", "touched", "replaced", "gone"])
def test_a_file_that_changes_is_noticed(tmp_path, change):
    folder = make_folder(tmp_path / "m", random_weights())
    checkpoint = open_folder(folder)
    checkpoint.check_unchanged()
    path = folder / "model.safetensors"
    status = os.stat(path)
    if change == "longer":
        with open(path, "ab") as file:
            file.write(b"\0")
    elif change == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "replaced":
        shutil.copy2(path, folder / "copy")
        os.utime(folder / "copy", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(folder / "copy", path)
    else:
        path.unlink()
    words = {"longer": "size", "touched": "mtime_ns", "replaced": "inode", "gone": "can no longer be read"}
    with pytest.raises(FormatError, match=words[change]):
        checkpoint.check_unchanged()


def test_json_has_a_largest_size(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert strict_json.load_object(path) == {"a": 1}
    monkeypatch.setattr(strict_json, "MAX_FILE", 7)
    with pytest.raises(FormatError, match="it has 8 bytes; at most 7 are read"):
        strict_json.load_object(path)
