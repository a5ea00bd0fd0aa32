"""What the tests that look inside a model share: the models, token ids, names of taps."""

import numpy as np
from conftest import DATA, GOLDEN_CASES, TINY

import kimi_linear as kl

CASES = ["tiny", *GOLDEN_CASES]
MIXTURES = [case for case in CASES if case != "qwen35-a"]  # which has none
FOLDERS = {"tiny": TINY, **{case: DATA / "golden" / case for case in GOLDEN_CASES}}
_models = {}


def open_model(case):
    if case not in _models:
        _models[case] = kl.Model.from_pretrained(FOLDERS[case])
    return _models[case]


def ids(model, T, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, T).astype(np.int32)


def every_tap(model):
    """All taps, `moe.scores` too, without the logits."""
    scores = [f"layers.{i}.moe.scores" for i, layer in enumerate(model.config.layers) if layer.ffn == "moe"]
    return [*(name for name in model.taps if name != "logits"), *scores]


def arrays(state):
    return {name: value.tobytes() for name, value in state.items()}


def float32(x):
    return x if x.dtype == np.int32 else np.asarray(x, np.float32)
