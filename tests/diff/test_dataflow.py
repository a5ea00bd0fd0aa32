"""The table of how taps are made: complete, in order, and each node gives the reference's own tap again."""

import dataclasses

import numpy as np
import pytest
from conftest import QWEN_CASES, canonical_weights

import kimi_linear as kl
from kimi_linear import dataflow
from kimi_linear.config import LayerSpec

VARIANTS = {
    "kimi-a": {},
    "kimi-b": {},
    "no shared part of the key": dict(rope_dim=0),
    "no shared expert": dict(n_shared_experts=0, shared_size=0),
    "tied, wide taps": dict(tie_embeddings=True, conv_width=8),
    "one tap": dict(conv_width=1),
    "bounded gate, softmax router": dict(gate_lower_bound=-5.0, router_function="softmax"),
    "two groups": dict(n_groups=4, top_groups=2),
    "attention and dense last": dict(layers=(LayerSpec("kda", "moe"), LayerSpec("mla", "dense")), n_layers=2),
}


#: Of qwen-a; weights are the checkpoint's, as far as it has them.
QWEN_VARIANTS = {
    "tiled heads": dict(gdn_tiled=True),
    "norms stored whole": dict(norm_plus_one=False),
    "no shared expert there": dict(n_shared_experts=0, shared_size=0, shared_gated=False),
    "shared expert without a gate": dict(shared_gated=False),
    "separate inputs": dict(gdn_inputs="split"),
    "every mixer": dict(layers=tuple(LayerSpec(mixer, ffn) for mixer, ffn in (
        ("kda", "moe"), ("gdn", "dense"), ("mla", "moe"), ("attn", "moe"))), n_layers=4, kda_heads=2, kda_head_dim=8,
        mla_heads=2, nope_dim=8, rope_dim=4, v_head_dim=8, kv_rank=12, router_bias=True),
}


def engine(name, golden_dir):
    if name.startswith("kimi"):
        return kl.Model.from_pretrained(golden_dir / name)
    config = kl.Config.from_file(golden_dir / "kimi-a" / "config.json")
    return kl.Model.from_config(dataclasses.replace(config, **VARIANTS[name]), seed=3)


@pytest.fixture(params=VARIANTS)
def model(request, golden_dir):
    return engine(request.param, golden_dir)


@pytest.fixture(params=[*VARIANTS, *QWEN_CASES, *QWEN_VARIANTS])
def reference_model(request, golden_dir):
    name = request.param
    if name in VARIANTS:
        return engine(name, golden_dir).reference()
    folder = golden_dir / (name if name in QWEN_CASES else "qwen-a")
    config = dataclasses.replace(kl.Config.from_file(folder / "config.json"), **QWEN_VARIANTS.get(name, {}))
    weights, rng = canonical_weights(folder / "model.safetensors"), np.random.default_rng(5)
    weights |= {n: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)
                for n, shape in config.weight_shapes().items() if n not in weights or weights[n].shape != shape}
    return kl.ReferenceModel(config, weights)


def test_every_tap_of_the_engine_has_its_node(model):
    nodes = dataflow.nodes(model.config)
    caches = {n for n in model.new_state() if n.endswith("_cache")}
    assert [n.tap for n in nodes if n.tap not in caches] == dataflow.in_order(model.taps)
    assert {n.tap for n in nodes} - set(model.taps) == caches
    assert {n.state for n in nodes if n.state} | caches == set(model.new_state())
    trace = model.trace([3, 1, 4], "*")
    for node in nodes:
        if node.tap in trace:
            assert trace[node.tap].shape == (3, *node.shape), node.tap


def test_every_tap_of_the_reference_has_its_node(reference_model):
    m = reference_model
    run = m.forward([3, 1, 4], taps="*")
    nodes = dataflow.nodes(m.config)
    caches = {n for n in run.state if n.endswith("_cache")}
    assert [n.tap for n in nodes if n.tap not in caches] == dataflow.in_order(run.taps)
    assert {n.tap for n in nodes} - set(run.taps) == caches
    assert {n.state for n in nodes if n.state} | caches == set(run.state)
    for node in nodes:
        assert (run.taps | run.state)[node.tap].shape == (3, *node.shape), node.tap


def test_inputs_are_made_before_they_are_used(reference_model):
    made = {"tokens"}
    for node in dataflow.nodes(reference_model.config):
        assert made >= set(node.inputs.values()), node.tap
        made.add(node.tap)


def test_each_node_gives_its_tap_again(reference_model):
    """On the reference's own values: 1e-12, but for the rate, which ops take rounded to float32: that moves g
    by u, and a bounded gate in its tail, where ln g is about the rate times x, by u |ln g|."""
    tokens, m = np.arange(2, 14), reference_model
    run = m.forward(tokens, taps="*")
    again(m.config, run, m.weights, tokens, None)
    first = m.forward(tokens[:5])
    rest = m.forward(tokens[5:], taps="*", state=first.state)
    again(m.config, rest, m.weights, tokens[5:], first.state)


def again(config, run, weights, tokens, state):
    values = run.taps | {"tokens": tokens}
    for node in dataflow.nodes(config):
        got, want = dataflow.run_node(node, values, weights, state), (run.taps | run.state)[node.tap]
        assert got.shape == want.shape, node.tap
        limit = 2.0**-24 * (2 + np.abs(np.log(np.abs(want)))) if node.op == "decay_gate" else 1e-12
        assert (np.abs(got - want) <= limit * np.abs(want) + 1e-12 * np.abs(want).max(initial=0)).all(), (
            node.tap
        )
        if node.state:
            results = dataflow.evaluate(node, dataflow.arguments(node, values, weights, state))
            np.testing.assert_allclose(
                results[1], run.state[node.state], rtol=1e-12, atol=1e-14, err_msg=node.state
            )


def test_a_missing_input_is_named():
    node = dataflow.table(kl.Model.tiny().config)["layers.2.kda.g"]
    with pytest.raises(
        KeyError, match=r"layers.2.kda.g = decay_gate\(layers.2.kda.f\): there is no layers.2.kda.f"
    ):
        dataflow.run_node(node, {}, {})


def test_order_of_names():
    names = [
        "logits",
        "layers.10.out",
        "odd",
        "layers.2.out",
        "layers.2.mine",
        "layers.2.kda.q",
        "norm",
        "embed",
    ]
    assert dataflow.in_order(names) == [
        "embed",
        "layers.2.kda.q",
        "layers.2.out",
        "layers.2.mine",
        "layers.10.out",
        "norm",
        "logits",
        "odd",
    ]
