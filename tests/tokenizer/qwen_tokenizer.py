"""A small tokenizer.json as Qwen's are, trained here by the `tokenizers` package, and a folder that has it."""

import json
import shutil

import tokenizers
from conftest import DATA, TINY
from tokenizers import models, normalizers, pre_tokenizers, trainers

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ADDED = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}
_END = r"|\p{N}| ?[^\s\p{L}%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # as the published files have them
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+" + _END % "",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+" + _END % r"\p{M}",
}


def spec(pre, texts=None, size=300):
    """The content of a tokenizer.json of `size` tokens and the added ones."""
    t = tokenizers.Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pre]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    t.decoder = tokenizers.decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    t.train_from_iterator(texts or (TINY / "sample.txt").read_text().splitlines(keepends=True), trainer)
    for special in (True, False):
        names = [name for name, kind in ADDED.items() if kind == special]
        tokens = [tokenizers.AddedToken(name, normalized=False, special=special) for name in names]
        (t.add_special_tokens if special else t.add_tokens)(tokens)
    return json.loads(t.to_str())


def write_folder(path, pre="qwen35"):
    """The small dense model, with a tokenizer."""
    shutil.copytree(DATA / "golden" / "qwen35-a", path, ignore=shutil.ignore_patterns("golden*"))
    (path / "tokenizer.json").write_text(json.dumps(spec(pre)))
    (path / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path
