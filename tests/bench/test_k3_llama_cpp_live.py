"""Kimi K3 in llama.cpp, live on files of ours: random weights of all its parts.

Tests are here where llama-cpp-python is: `make peers`.
"""

import importlib
import importlib.util
import sys

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.adapters import llama_cpp

HERE = all(map(importlib.util.find_spec, ("llama_cpp", "gguf")))

RMS = 2e-5  # of the difference of logits, over their rms
TOKENS = np.random.default_rng(0).integers(0, 700, 90)  # two chunks of 64


def relative(a, b):
    return float(np.sqrt(((a - b) ** 2).mean() / (b ** 2).mean()))


@pytest.fixture
def write(monkeypatch, tmp_path):
    def make(*argv):
        path = tmp_path / "k3.gguf"
        monkeypatch.setattr(sys, "argv", ["make_model.py", "--shape", "k3-small", "-o", str(path), *argv])
        assert importlib.import_module("make_model").main() == 0
        return path

    return make


def both(path):
    """Logits of float64 by llama.cpp's conventions, of llama.cpp, and of ours in float32 and int8."""
    models = [kl.Model.from_pretrained(path, threads=1, activations=x, **llama_cpp.CONVENTIONS)
              for x in ("float32", "int8")]
    with llama_cpp.Engine(path, model=models[0]) as engine:
        theirs = engine.logits(TOKENS)
    return models[0].reference().forward(TOKENS).logits, theirs, *(m.forward(TOKENS) for m in models)


if HERE:

    def test_float32(write):
        exact, theirs, ours, _ = both(write("--type", "float32"))
        assert relative(theirs, exact) < RMS and relative(ours, exact) < RMS

    def test_experts_in_mxfp4(write):
        """Theirs rounds activations to int8, as ours does where it is asked to: ours is no further from float64."""
        exact, theirs, ours, int8 = both(write("--type", "float32", "--map", "*_exps*=MXFP4"))
        assert relative(ours, exact) < RMS
        assert relative(int8, exact) < 1.2 * relative(theirs, exact) and relative(theirs, exact) < 0.1
