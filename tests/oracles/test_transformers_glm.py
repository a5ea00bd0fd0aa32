"""transformers and this engine on GLM-5.3-Flash: every module within the noise of float32, logits, caches, decoding."""

import copy

import live
import numpy as np
import pytest
import torch
from conftest import GLM_CASES
from oracle import ours, theirs, tokens

from kimi_linear.adapters import transformers as adapter
from kimi_linear.diff import blame, traces

pytestmark = pytest.mark.parametrize("case", GLM_CASES)
KNOWN = {"chunk_decays_subtracted"}         # of their chunked delta rule, in float32


@pytest.mark.parametrize("length", [1, 3, 40, 150])
def test_every_module_and_cache(case, length):
    live.every_module_and_cache(case, length)


def test_free_run(case):
    live.free_run(case)


def test_step_by_step(case):
    live.step_by_step(case)


def test_ragged_batch_is_their_padded_batch(case):
    live.ragged_batch(case)


def test_config(case):
    assert adapter.config_of(theirs(case)) == ours(case).config


@pytest.mark.parametrize("length", [40, 150])
def test_every_op_is_within_its_noise(case, length):
    """Each on its own inputs, the choice of positions, too."""
    ids = tokens(case, length)
    right = adapter.trace(theirs(case), ids)
    found, mine = blame(ours(case), right), ours(case).trace(ids)
    assert {r.op for r in found.wrong} <= {"delta_rule"} and {r.kind for r in found.wrong} <= KNOWN, str(found)
    assert [r.kind for r in found.rows if r.op == "index_select"] == ["right"] * 2
    assert len(found.rows) > 120 and traces(mine, right, model=ours(case)).ok
    for tap in (n for n in mine if n.endswith("mla.select")):
        np.testing.assert_array_equal(right[tap], mine[tap])


def test_a_tensor_of_theirs_that_is_another_is_found(case):
    ids, other = tokens(case, 40), copy.deepcopy(theirs(case))
    layer = next(i for i, spec in enumerate(ours(case).config.layers) if spec.mixer == "mla")
    text = other.model.language_model.layers[layer]
    with torch.no_grad():
        text.self_attn.indexer.k_norm.bias += 0.05
        text.ffn_hc.base[0] += 0.01
    found = blame(ours(case), adapter.trace(other, ids))
    wrong = {r.tap: r.kind for r in found.wrong if r.op != "delta_rule"}
    assert wrong == {f"layers.{layer}.mla.index_k": "unknown", f"layers.{layer}.ffn_hc": "unknown"}, str(found)
