"""The table of conventions: complete, checked values, and sources that can be found."""

import re

import pytest

import kimi_linear as kl
from kimi_linear.conventions import Convention, DeltaRule, convention

CHOICES = {
    "arrays": {"numpy", "torch", "mlx"}, "axes": {"THK", "BTHK", "BHTK"}, "state": {"KV", "VK"},
    "gate": {"log", "log2", "exp"}, "scale": {"argument", "inside", "caller"}, "no_state": {"omit", "none", "zeros"},
    "returns": {"o, state", "packed"},
}


@pytest.mark.parametrize("project", kl.conventions)
def test_an_entry(project):
    how = kl.conventions[project]["delta_rule"]
    assert isinstance(how, DeltaRule) and how.project == project
    for field, values in CHOICES.items():
        assert getattr(how, field) in values
        assert field in type(how).__doc__ + Convention.__doc__
    assert set(how.gates) <= {"channel", "head", None} and set(how.heads) <= {"equal", "grouped", "tiled"}
    assert {"q", "k", "v", "g", "beta", "initial_state"} <= set(how.names)
    for source in how.source:
        assert project == "ours" or re.match(r"[\w-]+/[\w.-]+: \S+\.(py|cpp|h)\b", source), source


def test_what_they_disagree_on():
    """The rows by which ports go wrong."""
    table = {name: entry["delta_rule"] for name, entry in kl.conventions.items()}
    assert {n for n, c in table.items() if c.state == "VK"} == {"ggml", "mlx", "vllm", "vllm-gdn"}
    assert {n for n, c in table.items() if c.gate == "exp"} == {"mlx"}
    assert {n for n, c in table.items() if "tiled" in c.heads} == {"ours", "ggml"}
    assert {n for n, c in table.items() if c.scale == "argument"} == {"ours", "fla", "fla-gdn", "vllm", "vllm-gdn"}


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        kl.conventions["mine"] = {}
    with pytest.raises(TypeError):
        kl.conventions["fla"]["delta_rule"].names["q"] = "query"


def test_convention():
    mine = DeltaRule(project="mine")
    assert convention(mine, "delta_rule") is mine
    assert convention("fla", "delta_rule") is kl.conventions["fla"]["delta_rule"]
    with pytest.raises(ValueError, match="fla has no conventions of 'moe'; it has delta_rule"):
        convention("fla", "moe")
