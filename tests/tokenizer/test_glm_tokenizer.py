"""GLM's tokenizer.json and the same of a GGUF: no normaliser, digits by three, pieces that are tokens not merged."""

import json

import pytest
import qwen_tokenizer
import tokenizers

from kimi_linear.load import gguf_metadata
from kimi_linear.load.gguf_tokenizer import read_tokenizer
from kimi_linear.load.gguf_write import Values
from kimi_linear.tokenizer_json import JsonTokenizer

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # as the published file has it
TEXTS = ["", "Hello world, 12345678 it'S", "cafe\u0301 caf\u00e9 \u0939\u093f", " \u4e2d\u6587 x\r\n\n  y",
         "unhappy the", "<|im_start|>user\nhi<|im_end|><think>x</think>"]


@pytest.fixture(scope="module")
def spec():
    """A trained one, in which the token " the" cannot be reached by merges any more."""
    spec = qwen_tokenizer.spec("qwen2")
    spec["normalizer"] = None
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": PATTERN}
    model = spec["model"]
    model["ignore_merges"] = True
    model["merges"] = [m for m in model["merges"] if "".join(m) not in ("\u0120the", "\u0120th", "the", "he")]
    assert "\u0120the" in model["vocab"]
    return spec


def metadata_of(tokenizer):
    keys = gguf_metadata.vocabulary_keys(tokenizer, 600)
    return {key: Values(key, *value) if isinstance(value, tuple) else value for key, value in keys.items()}


@pytest.mark.parametrize("pre", ["glm4", "glm5"])
def test_ids_are_the_packages_through_a_gguf(spec, pre):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    metadata = metadata_of(JsonTokenizer(spec, eos="<|im_end|>"))
    assert metadata["tokenizer.ggml.pre"] == "glm4"
    ours = read_tokenizer(metadata | {"tokenizer.ggml.pre": pre}, "x")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ids) == text
    assert len(ours.encode("unhappy the")) == len(ours.encode("unhappy")) + 1
    assert ours.spec["model"]["merges"] == [list(m) for m in spec["model"]["merges"]]


@pytest.mark.parametrize("change", [
    lambda s: s | {"normalizer": {"type": "NFC"}}, lambda s: s | {"model": s["model"] | {"ignore_merges": False}}])
def test_half_of_it_has_no_name(spec, change):
    with pytest.raises(ValueError, match="a GGUF has no name for its way to treat text"):
        metadata_of(JsonTokenizer(change(spec)))
