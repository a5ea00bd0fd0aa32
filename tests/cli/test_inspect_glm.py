"""What `kimi-linear inspect` says of GLM-5.3-Flash: streams, the indexer, the limit."""

import gguf_glm_files
import pytest
from conftest import DATA

import kimi_linear as kl
from kimi_linear.cli import inspect
from kimi_linear.config import Config
from kimi_linear.file_check import converter_of

ROWS = {
    "MLA": "2 layers: 3 heads of 12 + 0, values 8, latent 24, q by rank 20",
    "indexer": "9 heads of 8 choose 8 positions for MLA, in pools of 4; those behind the last whole pool are always "
               "there",
    "activation": "SwiGLU, gate up to 1.5, the other factor within it",
    "residuals": "4 streams, mixed by hyper-connections in 20 passes",
}


def rows(case):
    c = Config.from_file(DATA / "golden" / case / "config.json")
    return dict([*inspect._mixers(c), *inspect._feed_forward(c), *inspect._residuals(c)])


def test_each_part_has_a_row():
    shown = rows("glm-a")
    assert {name: shown.get(name) for name in ROWS} == ROWS
    assert rows("glm-b")["residuals"] == "3 streams, mixed by hyper-connections in 4 passes"


@pytest.mark.parametrize("architecture, keys, number", [
    ("glm5next", {}, 27754), ("glm5-next", {}, 27773),
    ("glm5next", {"attention.indexer.kpool": None, "attention.indexer.block_size": 4}, 27752),
])
def test_whose_names_a_file_has(tmp_path, architecture, keys, number):
    path = gguf_glm_files.write(tmp_path / "a.gguf", DATA / "golden" / "glm-a", architecture=architecture, keys=keys)
    assert converter_of(kl.Model.from_pretrained(path)) == f"llama.cpp, pull request {number}"
    kl.convert(DATA / "golden" / "glm-a", tmp_path / "ours.gguf")
    assert converter_of(kl.Model.from_pretrained(tmp_path / "ours.gguf")) == "kimi_linear"


def test_what_is_not_read_is_told_in_short():
    """A layer that predicts a second token has a tensor for each part of each expert."""
    expert = "model.language_model.layers.45.mlp.experts.{}.up_proj.weight"
    names = ["model.visual.merger.proj.weight", *map(expert.format, range(288))]
    assert inspect._in_short(names) == (
        "model.language_model.layers.*.mlp.experts.*.up_proj.weight (288), model.visual.merger.proj.weight")
    assert inspect._in_short([f"a{chr(97 + i)}.1.b" for i in range(14)], 12).endswith("al.1.b, and 2 more kinds")
    assert inspect._in_short(["rope_freqs.weight"]) == "rope_freqs.weight"


def test_other_models_have_none_of_them():
    assert not {"indexer", "activation", "residuals"} & rows("kimi-a").keys()
