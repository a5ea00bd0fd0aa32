"""The live llama.cpp adapter without llama.cpp: its tables. `tests/bench/test_llama_cpp_live.py` runs it."""

import dataclasses
import importlib.util

import pytest

import kimi_linear as kl
from kimi_linear import dataflow
from kimi_linear.adapters import llama_cpp


@pytest.fixture(scope="module")
def config():
    return kl.Model.tiny().config


@pytest.mark.parametrize("changes", [{}, {"q_rank": 48}])
def test_every_tap_of_a_model_has_a_node(config, changes):
    config = dataclasses.replace(config, **changes)
    found = {tap for taps in llama_cpp._spread(config).values() for tap in taps}
    nodes = [n for n in dataflow.nodes(config) if n.op != "cache_append"]  # its cache has other rows
    assert not {n.tap for n in nodes} - found
    assert not {n.state for n in nodes if n.state} - found


@pytest.mark.parametrize("name, known", [
    (b"attn_norm-11", ("attn_norm", 11)), (b"g1 f_b(f_a(cur))-0", ("g1 f_b(f_a(cur))", 0)),
    (b"result_output", ("result_output", None)), (b"blk.3.attn_k_b.weight", ("attn_k_b.weight", 3)),
    (b"blk.0.ssm_a", ("ssm_a", 0)), (b"CPU#attn_norm-2#0", ("attn_norm", 2)),
    (b"attn_norm-2 (reshaped)", None), (b"blk.0.ssm_a (reshaped)", None), (b" (view)", None), (b"", None),
    (b"node_48", None), (b"norm-3", None), (b"norm", None),
])
def test_names_that_the_graph_and_ggml_give(name, known):
    tensor = llama_cpp._Tensor()
    tensor.name = name
    assert llama_cpp._own_name(tensor) == known


def test_what_is_missing_is_said(config, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        with pytest.raises(ModuleNotFoundError, match="llama-cpp-python must be installed"):
            llama_cpp.Engine(tmp_path / "none.gguf", model=config)
    with pytest.raises(ValueError, match="n_ubatch is 0 and threads is 1; both must be >= 1"):
        llama_cpp.Engine(tmp_path / "none.gguf", model=config, n_ubatch=0)
