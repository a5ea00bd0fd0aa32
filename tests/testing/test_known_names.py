"""Whoever gives a name that is not there is told which are, and which was meant."""

import re

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import adapters, laws, quantized


@pytest.mark.parametrize("table, key, words", [
    (lambda: kl.conventions, "flaa",
     "'flaa' is not a project of kimi_linear.conventions; there are ours, fla, .* mlx; did you mean 'fla'"),
    (lambda: kl.conventions, "zz", "there are ours, .* ggml, mlx\"$"),
    (lambda: kl.conventions, 3, "3 is not a project"),
    (lambda: kl.conventions["fla"], "delta_rul",
     r"an op of kimi_linear.conventions\['fla'\]; there are delta_rule, .*; did you mean 'delta_rule'"),
    (lambda: kl.faults.CATALOGUE, "decay_aftr", "'decay_aftr' is not a fault .* decay_after_.*, ...; did you mean"),
    (lambda: quantized.storage_types, "Q4_KK", "'Q4_KK' is not a storage type; .*; did you mean 'Q4_K'"),
    (lambda: laws.LAWS, "split_at_65", "'split_at_65' is not a law; there are batch_is_alone, .* mean 'split_at_64'"),
])
def test_a_name_that_is_not_there_is_a_sentence(table, key, words):
    with pytest.raises(KeyError, match=words):
        table()[key]
    assert key not in table() and table().get(key) is None


@pytest.mark.parametrize("table, words", [
    (kl.faults.CATALOGUE, r"^Named\(\d+, each a fault of the catalogue: state_read_transposed, .*, \.\.\.\)$"),
    (kl.conventions, r"each a project of kimi_linear.conventions: ours, fla, .*, mlx\)"),
    (kl.conventions["fla"], r"each an op of .*: delta_rule, "),
])
def test_a_table_is_shown_by_its_names(table, words):
    """And not with all that is in it, which is 100 KB."""
    assert re.search(words, repr(table)) and len(repr(table)) < 700


@pytest.mark.parametrize("call, words", [
    (lambda: kl.Context(gemm="bals"), "gemm is 'bals'; it must be one of 'own', 'blas'; did you mean 'blas'?"),
    (lambda: kl.Context(gemm=["own"]), "gemm is ['own']; it must be one of 'own', 'blas'"),
    (lambda: kl.Context(activations="int4"), "activations is 'int4'; it must be one of 'float32', 'int8', 'bfloat16'"),
    (lambda: kl.Model.tiny(cache="q8_1"), "cache is 'q8_1'; it must be one of 'float32', 'float16', 'q8_0'; did"),
    (lambda: adapters.load("x", "vlm"), "one of hf, arrays, pt, debugger, vllm, sglang; did you mean 'vllm'?"),
    (lambda: kl.testing.check_op("delta_rul", len), ", swiglu_backward; did you mean 'delta_rule'?"),
    (lambda: kl.testing.check_op("moe", len, conventions="vlm"), ", or a Convention; did you mean 'vllm'?"),
    (lambda: kl.testing.check_op("moe", len, conventions=["hf"]), "conventions is ['hf']; it must be one of ours, fla"),
    (lambda: kl.testing.check_op("delta_rule", len, cases="plan"), ", laws; did you mean 'plain'?"),
    (lambda: kl.ops.quantize(np.ones((1, 32), np.float32), "Q8_00"), "; did you mean 'Q8_0'?"),
    (lambda: kl.Model.tiny().trace([1], "layers.1.kda.G"), "matches no tap; near it are layers.1.kda.g, "),
    (lambda: kl.Context(gemm="BLAS"), "did you mean 'blas'?"),
    (lambda: laws.laws(kl.Model.tiny(), "split_at_65"), "names is 'split_at_65'; it must be one of 'batch_is_alone', "),
])
def test_a_choice_that_is_not_there_is_a_sentence(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
