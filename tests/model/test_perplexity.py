"""Perplexity and greedy continuations beside what transformers computed in float32 on the same files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear.perplexity import perplexity

DATA = Path(__file__).parents[1] / "data" / "tiny"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
RELATIVE = 1e-4  # float32 against float32, in other orders of sums: measured 1e-7


@pytest.fixture(scope="module")
def model():
    return kl.Model.tiny()


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenizer.encode((DATA / "heldout.txt").read_text(encoding="utf-8"), specials=False)


def test_windows_of_1024(model, tokens):
    expected = EXPECTED["heldout"]["windows_of_1024"]
    result = perplexity(model, tokens, window=1024)
    assert len(tokens) == EXPECTED["heldout"]["tokens"]
    assert result.scored == expected["scored"]
    assert result.nll_per_token == pytest.approx(expected["nll_per_token"], rel=RELATIVE)
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=RELATIVE)
    assert result.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=RELATIVE)


def test_in_one_piece(model, tokens):
    expected = EXPECTED["heldout"]["first_8192_in_one"]
    read = []
    result = perplexity(model, tokens[:8192], window=None, progress=read.append)
    assert result.scored == expected["scored"]
    assert result.nll_per_token == pytest.approx(expected["nll_per_token"], rel=RELATIVE)
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=RELATIVE)
    assert sum(read) == 8192 and max(read) <= 512  # no more logits at a time than a pass has


@pytest.mark.parametrize("case", EXPECTED["greedy"], ids=lambda case: case["prompt"])
def test_greedy_continuation(model, case):
    message = case["prompt"].removeprefix("chat: ")
    prompt = [{"role": "user", "content": message}] if message != case["prompt"] else message
    generation = model.generate(prompt, max_new_tokens=len(case["ids"]), temperature=0)
    text = "".join(generation)
    assert generation.prompt_ids.tolist() == case["prompt_ids"]
    assert generation.tokens == case["ids"]
    assert text == case["text"].removesuffix("<|im_end|>")


def test_short_windows_are_the_same_alone_and_together(model, tokens):
    """A ragged batch of windows gives each the bytes that it gets alone, so the mean is the same."""
    ids = tokens[: 5 * 48 + 7]
    together = perplexity(model, ids, window=48)
    alone = [perplexity(model, ids[i : i + 48]) for i in range(0, len(ids), 48)]
    assert together.scored == sum(a.scored for a in alone) == len(ids) - 6
    mean = math.fsum(a.nll_per_token * a.scored for a in alone) / together.scored
    assert together.nll_per_token == pytest.approx(mean, rel=1e-14)  # two roundings of float64 a term


def test_is_the_mean_of_log_softmax(model, tokens):
    ids = tokens[:40]
    logits = model.forward(ids).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.mean([log_p[t, ids[t + 1]] for t in range(39)])
    result = perplexity(model, ids)
    assert result.nll_per_token == pytest.approx(nll, rel=1e-13)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-13)


def test_a_last_window_of_one_token_scores_nothing(model, tokens):
    assert perplexity(model, tokens[:33], window=16).scored == 30


@pytest.mark.parametrize("ids, window, message", [
    ([5], 16, "tokens has 1 tokens"),
    ([], 16, "tokens has 0 tokens"),
    ([1, 2, 3], 1, "window is 1"),
    ([1, 2048], 16, "2048"),
])
def test_bad_input_is_named(model, ids, window, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, window)


def test_a_window_that_is_no_int(model):
    with pytest.raises(TypeError, match="window is 2.0; it must be None for the whole, or an int >= 2"):
        perplexity(model, [1, 2, 3], 2.0)
