"""Two modules, or two entries of a mapping, that give one tap other values: it is said which, and which is taken."""

import json
import re
import warnings

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import golden
from kimi_linear.adapters import arrays, vllm
from kimi_linear.adapters._engine import FORMAT
from kimi_linear.load.safetensors import write_safetensors


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture
def x(rng, model):
    return rng.standard_normal((4, model.config.hidden_size)).astype(np.float32)


def test_modules_of_transformers(model, x, tmp_path):
    both = {"model.layers.0.self_attn": x, "model.layers.0.self_attn.o_proj": 2 * x}
    says = re.escape("layers.0.kda.out is given by model.layers.0.self_attn and by model.layers.0.self_attn.o_proj, "
                     "and their values differ; that of model.layers.0.self_attn.o_proj is taken")
    with pytest.warns(UserWarning, match=says):
        found = golden.to_taps(both, model.config)
    assert np.array_equal(found["layers.0.kda.out"], 2 * x)
    write_safetensors(tmp_path / "hf.safetensors", both)
    with pytest.warns(UserWarning, match=says):
        kl.Trace.load(tmp_path / "hf.safetensors", names="hf", config=model.config)


def test_modules_that_agree_say_nothing(model, x):
    x[1, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        golden.to_taps({"model.layers.0.self_attn": x, "model.layers.0.self_attn.o_proj": x.copy()}, model.config)


def test_modules_of_an_engine(model, x, tmp_path):
    (tmp_path / "calls").mkdir()
    write_safetensors(tmp_path / "calls" / "call-000000.safetensors",
                      {"model.layers.0.mlp.down_proj": x, "model.layers.0.mlp": x + 1},
                      {"format": FORMAT, "call": "0", "tokens": json.dumps([1, 2, 3, 4])})
    says = re.escape("layers.0.mlp.out is given by model.layers.0.mlp.down_proj and by model.layers.0.mlp, and their "
                     "values differ; that of model.layers.0.mlp is taken")
    with pytest.warns(UserWarning, match=says):
        vllm.read(tmp_path / "calls", model=model)


def test_entries_of_a_mapping(model, x, tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", x)
    mapping = {"taps": {"layers.{i}.mid": "a.npy", "layers.1.mid": "b.npy"}}
    assert len(arrays.read(tmp_path, mapping, model=model)) == model.config.n_layers
    np.save(tmp_path / "b.npy", -x)
    says = "layers.1.mid is given by a.npy and by b.npy, and their values differ; one entry must be left in taps"
    with pytest.raises(ValueError, match=re.escape(says)):
        arrays.read(tmp_path, mapping, model=model)
