"""A folder of GLM-5.3-Flash as it is published: names, the layer behind the others, and how these can be wrong."""

import json

import numpy as np
import pytest
from conftest import DATA, read_safetensors

from kimi_linear.config import ConfigError
from kimi_linear.errors import FormatError
from kimi_linear.load import open_folder, write_safetensors
from kimi_linear.load.names import canonical_name, layer_of, name_in_folder

CASES = ("glm-a", "glm-b")
AT = "model.language_model.layers."


def changed(folder, case="glm-a", tensors=lambda t: t, inside=None, around=None):
    """A copy of a golden folder; its tensors, by the file's names, and keys of both levels of its config changed."""
    found = read_safetensors(DATA / "golden" / case / "model.safetensors")
    content = json.loads((DATA / "golden" / case / "config.json").read_text())
    content["text_config"] |= inside or {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content | (around or {})))
    write_safetensors(folder / "model.safetensors", tensors(found))
    return folder


def behind(tensors, n=5, layers=1):
    """With the layer that predicts a second token: one of attention with a single stream, and what is its own."""
    own = {"eh_proj.weight": (48, 96), "enorm.weight": (48,), "hnorm.weight": (48,), "shared_head.norm.weight": (48,),
           "shared_head.head.weight": (320, 48), "embed_tokens.weight": (320, 48)}
    more = {}
    for i in range(n, n + layers):
        more |= {f"{AT}{i}.{name}": np.ones(shape, np.float32) for name, shape in own.items()}
        more |= {name.replace(f"{AT}4.", f"{AT}{i}."): x for name, x in tensors.items()
                 if name.startswith(f"{AT}4.") and ".hc_" not in name}
    return tensors | more


@pytest.mark.parametrize("case", CASES)
def test_every_tensor(case):
    """Bit for bit, by a reader that is not the loader; the vision tower is skipped and told."""
    checkpoint = open_folder(DATA / "golden" / case)
    files = read_safetensors(DATA / "golden" / case / "model.safetensors")
    assert sorted(checkpoint.skipped) == sorted(name for name in files if name.startswith("model.visual."))
    assert checkpoint.skipped
    for name, tensor in checkpoint.tensors.items():
        given = name.replace("model.", "model.language_model.", 1)
        wanted = files[given]
        assert tensor.array().tobytes() == wanted.tobytes() and tensor.array().size == wanted.size, name
    assert len(checkpoint.tensors) + len(checkpoint.skipped) == len(files)


def test_names():
    for given, wanted in {
        AT + "3.hc_attn_fn": "model.layers.3.hc_attn_fn", "layers.3.hc_ffn_base": "model.layers.3.hc_ffn_base",
        AT + "3.self_attn.indexer.k_norm.bias": "model.layers.3.self_attn.indexer.k_norm.bias",
        AT + "5.shared_head.norm.weight": "model.layers.5.shared_head.norm.weight", "lm_head.weight": "lm_head.weight",
    }.items():
        assert canonical_name(given) == wanted
    assert [layer_of(name) for name in ("model.layers.45.enorm.weight", "model.norm.weight", "lm_head.weight")] \
        == [45, -1, -1]
    glm, k3, text = {"model_type": "glm5_next", "text_config": {}}, {"model_type": "kimi_k3", "text_config": {}}, {}
    names = ("model.layers.0.hc_attn_fn", "lm_head.weight")
    assert [name_in_folder(name, glm) for name in names] == ["model.language_model.layers.0.hc_attn_fn", names[1]]
    assert [name_in_folder(name, k3) for name in names] == ["language_model." + name for name in names]
    assert [name_in_folder(name, text) for name in names] == [*names]


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_behind_are_skipped_and_told(tmp_path, layers):
    path = changed(tmp_path / "a", tensors=lambda t: behind(t, layers=layers),
                   inside={"num_nextn_predict_layers": layers})
    checkpoint = open_folder(path)
    told = [name for name in checkpoint.skipped if not name.startswith("model.visual.")]
    assert sorted({int(name.removeprefix(AT).split(".")[0]) for name in told}) == [5, 6][:layers]
    assert f"{AT}5.shared_head.norm.weight" in told and f"{AT}5.mlp.experts.9.down_proj.weight" in told
    assert checkpoint.config == open_folder(DATA / "golden" / "glm-a").config
    assert checkpoint.tensors.keys() == open_folder(DATA / "golden" / "glm-a").tensors.keys()


@pytest.mark.parametrize("told", [None, 0, True, "1", -1])
def test_layers_that_no_key_tells_are_an_error(tmp_path, told):
    """A layer too many is no second token where config.json does not say so; nor is one behind those."""
    path = changed(tmp_path / "a", tensors=behind, inside={"num_nextn_predict_layers": told})
    with pytest.raises(FormatError, match=r"layers\.5\.eh_proj\.weight is in model.safetensors, but by config.json"):
        open_folder(path)
    path = changed(tmp_path / "b", tensors=lambda t: behind(t, n=6), inside={"num_nextn_predict_layers": 1})
    with pytest.raises(FormatError, match=r"layers\.6\.eh_proj\.weight is in model.safetensors, but by config.json"):
        open_folder(path)


def test_a_rate_with_padding(tmp_path):
    """llama.cpp's converter takes the first values, one a head; so does the loader."""
    def change(tensors):
        return {name: np.concatenate([x, np.zeros(62, x.dtype)]) if name.endswith("A_log") else x
                for name, x in tensors.items()}

    padded, plain = open_folder(changed(tmp_path / "a", tensors=change)), open_folder(DATA / "golden" / "glm-a")
    for name, tensor in plain.tensors.items():
        if name.endswith("A_log"):
            assert (padded.tensors[name].array() == tensor.array()).all()


def test_fp8_files_say_what_to_do(tmp_path):
    path = changed(tmp_path / "a", around={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ConfigError, match="take the bfloat16 files, as GLM-5.3-Flash-BF16, or a GGUF"):
        open_folder(path)


WRONG = {
    "hc_attn_fn": (lambda x: x[:-1], r"0\.hc_attn_fn has shape \[23, 192\]; by config.json it must be \[24, 192\]"),
    "hc_ffn_scale": (None, r"model.layers.0.hc_ffn_scale \[3\] is missing"),
    "hc_ffn_base": (lambda x: x.astype(np.float64), r"0\.hc_ffn_base is stored as F64; it must be F32 or F16 or BF16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_wrong(tmp_path, name):
    change, words = WRONG[name]

    def of(tensors):
        key = f"{AT}0.{name}"
        return {k: x if k != key else change(x) for k, x in tensors.items() if k != key or change}

    with pytest.raises(FormatError, match=words):
        open_folder(changed(tmp_path / "a", tensors=of))
