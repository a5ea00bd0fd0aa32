"""Every kind of tensor and every key of Qwen3-Next and Qwen3.5, gone or wrong: folder or file is refused by name."""

import dataclasses
import re

import numpy as np
import pytest
import qwen_files
from conftest import canonical_weights

from kimi_linear.errors import FormatError
from kimi_linear.load import open_checkpoint
from kimi_linear.load.gguf_config import stored_form

SHOWN = ("layers.0.", "layers.3.", "blk.0.", "blk.3.")      # a delta net and an attention layer


def kinds(names):
    """One name of each kind: outside of the layers, and of those that are shown."""
    outside = [n for n in names if "layers." not in n and not n.startswith("blk.")]
    found = {re.sub(r"\d+", "N", n): n for n in names if any(x in n for x in SHOWN)}
    return [*outside, *found.values()]


def problems_of(path):
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    return caught.value.problems


def wider(x):
    """One value more along the last axis."""
    return np.concatenate([x, x[..., -1:]], axis=-1)


@pytest.fixture(scope="module", params=qwen_files.NAMES)
def source(request, golden_dir):
    return golden_dir / request.param


@pytest.mark.parametrize("says, change", [
    ("is missing", None), ("has shape", wider), ("is stored as I32", lambda x: x.astype(np.int32))])
def test_tensors_of_a_folder(tmp_path, source, says, change):
    """All of them at once, a sentence each."""
    wrong = kinds(canonical_weights(source / "model.safetensors"))

    def changed(weights):
        kept = {n: x for n, x in weights.items() if n not in wrong}
        return kept if change is None else kept | {n: change(weights[n]) for n in wrong}

    found = problems_of(qwen_files.write_folder(tmp_path / "x", source, changed))
    assert sorted(p.split()[0] for p in found) == sorted(wrong) and all(says in p for p in found), found


def test_tensors_of_a_file(tmp_path, source):
    """One after another: what the config reads off a tensor is told first."""
    names = qwen_files.converted(qwen_files.config_of(source), canonical_weights(source / "model.safetensors"))
    for i, name in enumerate(kinds(names)):
        path = qwen_files.write(tmp_path / f"{i}.gguf", source, tensors=lambda t, n=name: t | {n: wider(t[n])})
        found = problems_of(path)
        assert any(name in p for p in found), (name, found)
        path = qwen_files.write(tmp_path / f"{i}.gguf", source, drop=(name,))
        if name == "output.weight":
            assert open_checkpoint(path).config.tie_embeddings
            continue
        found = problems_of(path)
        told_by = "vocab_size" if name == "token_embd.weight" else name     # nothing else tells its size
        assert any(told_by in p for p in found), (name, found)


def test_keys_of_a_file(tmp_path, source):
    """Of another type: refused. Missing: refused, or read off the tensors, or what llama.cpp takes then."""
    config = stored_form(qwen_files.config_of(source))
    for key in qwen_files.metadata(config):
        found = problems_of(qwen_files.write(tmp_path / "x.gguf", source, keys={key: "many"}))
        assert any(f"{key} is 'many'; it must be " in p for p in found), (key, found)
        path = qwen_files.write(tmp_path / "x.gguf", source, keys={key: None})
        try:
            opened = open_checkpoint(path).config
        except FormatError as error:
            assert any(f"{key} is missing; it must " in p for p in error.problems), (key, error.problems)
            continue
        unsaid = {"context_length": "max_length", "feed_forward_length": "ffn_size", "rope.freq_base": "rope_base",
                  "rope.dimension_count": "rotary_dim"}
        free = {unsaid[key]: getattr(config, unsaid[key])} if key in unsaid else {}
        assert dataclasses.replace(opened, **free) == config, key
