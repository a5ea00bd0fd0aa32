"""Runs with int8 or bfloat16 activations: what these round is noise of the products, and of nothing else."""

import json

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.cli import main

IDS = np.arange(5, 45)


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_dir):
    target = tmp_path_factory.mktemp("narrow") / "q8.gguf"
    kl.convert(tiny_dir, target, type="Q8_0")
    return target


@pytest.fixture(scope="module")
def model(path):
    return kl.Model.from_pretrained(path)


@pytest.fixture(scope="module")
def engine(path):
    return kl.Model.from_pretrained(path, activations="int8")


def untold(trace):
    """Without who computed it in what."""
    return kl.Trace(dict(trace), {"tokens": trace.meta["tokens"], "dtype": "float32"})


def test_int8_is_noise_of_the_products_where_the_trace_says_so(model, engine):
    found = kl.diff.blame(model, engine.trace(IDS))
    assert found.ok and not found.notes, str(found)
    exact = kl.diff.blame(model, engine.trace(IDS), activations="float32")
    assert not exact.ok and {r.op for r in exact.wrong} <= {"linear", "moe", "latent_attention"}


def test_int8_is_recognised_where_nobody_says_it(model, engine):
    found = kl.diff.blame(model, untold(engine.trace(IDS)))
    assert found.ok and any("activations in int8" in note for note in found.notes), str(found)
    assert not kl.diff.blame(model, untold(model.trace(IDS))).notes


def test_exact_products_are_held_to_float32(model):
    """The types of the weights alone make no product narrow."""
    change = {"layers.1.kda.out": lambda x: x * np.float32(1.001)}
    found = kl.diff.blame(model, untold(model.trace(IDS, edit=change)))
    assert [r.tap for r in found.wrong] == ["layers.1.kda.out"]


def test_routers_stay_exact(model, engine):
    """The router of a GGUF is float32: its products are not narrow, and 1 % of them is seen."""
    assert model.weights.storage_type("model.layers.1.block_sparse_moe.gate.weight") == "F32"
    change = {"layers.1.moe.logits": lambda x: x * np.float32(1.01)}
    found = kl.diff.blame(model, engine.trace(IDS, edit=change))
    assert "layers.1.moe.logits" in [r.tap for r in found.wrong]


@pytest.mark.parametrize("tap, change, kind", [
    ("layers.1.kda.beta", lambda x: 2 * x, "beta_doubled"),
    ("layers.2.kda.g", lambda x: np.maximum(x, -5), "decay_clamped"),
    ("layers.3.moe.weights", lambda x: x / np.float32(2.446), "router_scale_missing"),
    ("layers.5.moe.out", lambda x: x * np.float32(1.2), "unknown"),
    ("layers.4.kda.b", lambda x: x * np.float32(1.1), "unknown"),
])
def test_faults_of_an_int8_run_are_named(model, engine, tap, change, kind):
    trace = engine.trace(IDS, edit={tap: change})
    for theirs in (trace, untold(trace)):
        found = kl.diff.blame(model, theirs)
        assert [(r.tap, r.kind) for r in found.wrong] == [(tap, kind)], str(found)


def test_bfloat16():
    model, engine = (kl.Model.tiny(activations=a) for a in ("float32", "bfloat16"))
    trace = engine.trace(IDS)
    assert kl.diff.blame(model, trace).ok and kl.diff.blame(model, untold(trace)).ok
    change = {"layers.1.moe.shared_act": lambda x: x * np.float32(1.01)}
    found = kl.diff.blame(model, engine.trace(IDS, edit=change))
    assert [r.tap for r in found.wrong] == ["layers.1.moe.shared_act"]


def test_activations_that_are_none(model, engine):
    with pytest.raises(ValueError, match="activations is 'int4'; it must be"):
        kl.diff.blame(model, engine.trace(IDS), activations="int4")


def test_storage_types(model):
    assert kl.Model.tiny().weights.storage_type("model.norm.weight") == "BF16"
    assert model.weights.storage_type("model.layers.0.self_attn.q_proj.weight") == "Q8_0"
    with pytest.raises(KeyError, match="is no weight of this model"):
        model.weights.storage_type("model.norm.bias")


def test_on_the_command_line(path, tmp_path, capfd):
    trace = tmp_path / "int8.safetensors"
    assert main(["trace", str(path), "--ids", "5,6,7,8,9,10", "--activations", "int8", "-o", str(trace)]) == 0
    assert kl.Trace.load(trace).meta["activations"] == "int8"
    capfd.readouterr()
    assert main(["blame", str(path), str(trace), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["ok"]
    assert main(["blame", str(path), str(trace), "--activations", "float32"]) == 1
    assert main(["trace", str(path), "--ids", "5,6", "--activations", "int8", "--reference", "-o", str(trace)]) == 2
    assert "--activations is of our engine; leave out --reference" in capfd.readouterr().err
