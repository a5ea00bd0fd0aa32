"""The laws on a device: which are asked there, that they hold, and what the report says of the others."""

import json

import numpy as np
import pytest
from conftest import DATA
from hip_build import DEVICE, ON_HOST, context, host_library

import kimi_linear as kl
from kimi_linear import laws as module
from kimi_linear.cli import main
from kimi_linear.laws import LAWS, OF_THE_CPU, laws

KIMI_B = DATA / "golden" / "kimi-b"
SMALL = {  # kimi-b with a layer of each kind: the host build takes seconds for a law of the golden model
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "hidden_size": 16,
    "mlp_layer_types": ["dense", "sparse"], "num_experts": 4, "num_experts_per_token": 2, "num_expert_group": 1,
    "topk_group": 1, "vocab_size": 32,
}
QUICK = ("save_and_load_continue", "inputs_unchanged", "nothing_outside_outputs")  # test_hip_model.py has others


@pytest.fixture(scope="module")
def model():
    if not ON_HOST:
        return kl.Model.from_pretrained(KIMI_B, device=DEVICE)
    config = json.loads((KIMI_B / "config.json").read_text(encoding="utf-8")) | SMALL
    config["linear_attn_config"] |= {"kda_layers": [1], "full_attn_layers": [2]}
    return kl.Model.from_config(config, ctx=context())


@pytest.mark.parametrize("law", [law for law in LAWS if law not in OF_THE_CPU and (law in QUICK or not ON_HOST)])
def test_law(model, law):
    report = laws(model, law)
    assert report.ok and report.device == DEVICE, str(report)


def test_what_is_the_cpus_is_not_asked_and_said(model, monkeypatch):
    names = ("any_thread_count", "nothing_outside_outputs", "any_instruction_set")
    monkeypatch.setattr(module, "LAWS", {name: LAWS[name] for name in names})
    report = laws(model)
    assert report and [law.holds for law in report.rows] == [None, True, None]
    assert report.verdict == f"ok: all 1 laws hold on {model.name} ({DEVICE}); 2 are not asked of a device"
    lines = str(report).splitlines()
    assert lines[0] == "-       any_thread_count         not asked: threads are the CPU's"
    assert lines[1].startswith("holds   nothing_outside_outputs  two states")
    found = report.to_dict()
    assert found["device"] == DEVICE and [law["holds"] for law in found["laws"]] == [None, True, None]
    assert found["laws"][2]["unasked"] == "instruction sets are the CPU's" and not found["laws"][1]["unasked"]


@pytest.mark.parametrize("law", OF_THE_CPU)
def test_a_law_of_the_cpu_that_is_named_is_refused(model, law):
    """Nothing asked would be nothing broken."""
    with pytest.raises(ValueError, match=f"{law} is not asked of {DEVICE}: .* are the CPU's"):
        laws(model, [law])


def test_a_device_that_breaks_a_law_is_seen(model, monkeypatch):
    """A call that leaves a mark on the states before it."""
    own, states = model.forward, []

    def forward(tokens, *, state=None, **options):
        out = own(tokens, state=state, **options)
        if states:
            name = next(iter(states[0]))
            states[0][name] = states[0][name] + np.float32(1e-3)
        states.append(state)
        return out

    monkeypatch.setattr(model, "forward", forward)
    report = laws(model, "nothing_outside_outputs")
    assert not report and report.verdict == f"broken on {model.name} ({DEVICE}): nothing_outside_outputs"
    assert "state layers.0" in report.rows[0].difference


def test_command(capsys):
    host_library()
    assert main(["laws", str(KIMI_B), "--only", "nothing_outside_outputs", "--device", DEVICE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == DEVICE and [law["holds"] for law in found["laws"]] == [True]
    assert main(["laws", str(KIMI_B), "--only", "any_thread_count", "--device", DEVICE]) == 2
    assert f"any_thread_count is not asked of {DEVICE}: threads are the CPU's" in capsys.readouterr().err
