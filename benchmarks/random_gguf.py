"""Write a GGUF file of a config with random weights: names, sizes and metadata are those of `kl.convert`.

A matrix is made of blocks that are drawn from a pool of its type and deviation, so a file of 16 GiB takes a minute and
no memory. No two rows are the same in practice. Norms, convolutions, routers, gates and biases are float32, as the
converter keeps them, and random one by one.
"""

import importlib.resources
import itertools
import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from random_blocks import TYPES, block_of, random_blocks, type_for

from kimi_linear.load import gguf_metadata, gguf_write
from kimi_linear.load.byte_alphabet import spelled
from kimi_linear.load.gguf_config import architecture_of
from kimi_linear.load.gguf_scores import score_of
from kimi_linear.load.gguf_tensors import of_folder
from kimi_linear.random_weights import random_tensor

__all__ = ["Tensor", "plan_types", "tensors_of", "vocabulary", "write_gguf"]

POOL = 1 << 22      # bytes of a pool of blocks: it stays in a processor's cache
PIECE = 1 << 24     # bytes, about, that are drawn at once
GAIN = 1.2          # of a matrix, as in kimi_linear.random_weights
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
KIMI = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
        7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
        12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
        15: "<|tool_call_end|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
QWEN = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
GLM = {0: "<|endoftext|>", 1: "[MASK]", 2: "[gMASK]", 3: "[sMASK]", 4: "<sop>", 5: "<eop>", 6: "<|system|>",
       7: "<|user|>", 8: "<|assistant|>", 9: "<|observation|>"}


@dataclass(frozen=True)
class Words:
    """A family's way with text: the splitter's name, special tokens by their distance from the first one, which of
    them are bos, eos and padding, and whether bos begins a text."""

    pre: str
    specials: dict
    ids: dict
    template: str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


WORDS = {
    "kimi-linear": Words("kimi-k2", KIMI, {"bos": 0, "eos": 1, "padding": 255}, ""),
    "kimi-k3": Words("kimi-k2", KIMI, {"bos": 0, "eos": 1, "padding": 255}, ""),
    "qwen3next": Words("qwen2", QWEN, {"eos": 2, "padding": 0}),
    "qwen35": Words("qwen35", QWEN, {"eos": 2, "padding": 0}),
    "qwen35moe": Words("qwen35", QWEN, {"eos": 2, "padding": 0}),
    "glm5next": Words("glm4", GLM, {"eos": 0, "eot": 7, "eom": 9, "padding": 0},
                      "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"),
}


@dataclass
class Tensor:
    """A tensor of the file: its name there and in a checkpoint, its shape row-major, its storage type."""

    name: str
    source: str
    shape: tuple[int, ...]
    std: float             # of a matrix
    matrix: bool           # whether it may be of another type than F32
    named: bool            # whether only where a pattern names it: files differ in hc_*_fn
    type: str = "F32"

    @property
    def nbytes(self):
        values, n_bytes = block_of(self.type)
        return math.prod(self.shape) * n_bytes // values


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint as `of_folder` asks for it, but for its values."""

    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def nbytes(self):
        return 4 * math.prod(self.shape)


def tensors_of(config):
    """Every tensor of a file, F32, in the order of their use."""
    found = []
    for source, shape in config.weight_shapes().items():
        expert = source.rpartition(".experts.")[2].partition(".")[0] if ".experts." in source else ""
        score = score_of(source)  # one vector of the file, of a norm and a projection
        if expert in ("", "0") and not (score and source == score.norm):
            parts = {name: Source(shape[-1:]) for name in score[:2]} if score else {source: Source(shape)}
            table = "embed_tokens" in source and not config.tie_embeddings  # it is no head, too
            std = 1.0 if table else GAIN / shape[-1]**0.5
            for t in of_folder(config, parts):
                named = fnmatchcase(t.name, "*.hc_*_fn.weight")
                found.append(Tensor(t.name, source, (config.n_experts, *shape) if expert else t.shape, std,
                                    t.fixed is None or named, named))
    return found


def plan_types(tensors, default, mapping=()):
    """Give each matrix its type: of the first (pattern, type) whose pattern fits its name, or the default. What is
    another for a pattern alone stays F32.

    Returns
    -------
    list of str
        A sentence for each type that does not divide some rows, with what they got.
    """
    for name in (default, *(kind for _, kind in mapping)):
        if name not in TYPES:
            raise ValueError(f"the type is {name!r}; it must be one of {', '.join(TYPES)}")
    unused = [pattern for pattern, _ in mapping if not any(fnmatchcase(t.name, pattern) for t in tensors if t.matrix)]
    if unused:
        raise ValueError(f"no matrix is named like {', '.join(unused)}")
    fallen = {}
    for t in tensors:
        if t.matrix:
            otherwise = "F32" if t.named else default
            asked = next((kind for pattern, kind in mapping if fnmatchcase(t.name, pattern)), otherwise)
            t.type = type_for(asked, t.shape[-1])
            if t.type != asked:
                fallen.setdefault((asked, t.type, t.shape[-1]), []).append(t.name)
    return [f"{asked} does not divide rows of {columns}: {len(names)} tensors are {got}, such as {names[0]}"
            for (asked, got, columns), names in fallen.items()]


# ---- the file ----

def write_gguf(path, config, tensors, *, name, seed=0, progress=lambda n: None):
    """Write the file, under another name until it is whole.

    Parameters
    ----------
    path : Path
    config : Config
    tensors : list of Tensor
    name : str
        Of the model, in the metadata.
    seed : int
    progress : callable
        Called with bytes as they are written.
    """
    pools = {}
    outgoing = [gguf_write.Outgoing(t.name, t.type, t.shape, lambda t=t: pieces(t, seed, pools)) for t in tensors]
    gguf_write.write_gguf(path, metadata_of(config, name), outgoing, lambda n, _: progress(n))


def pieces(tensor, seed, pools):
    """The tensor's bytes, `PIECE` at a time; `pools` keeps what other tensors can use."""
    rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if not tensor.matrix:
        a = random_tensor(tensor.source, tensor.shape, rng)
        yield memoryview(-np.exp(a) if tensor.source.endswith("A_log") else a).cast("B")
        return
    key = tensor.type, tensor.std
    if key not in pools:
        pools[key] = random_blocks(*key, POOL // block_of(tensor.type)[1], np.random.default_rng(seed))
    pool = pools[key]
    most = PIECE // pool.shape[1] * pool.shape[1]
    for begin in range(0, tensor.nbytes, most):
        n_bytes = min(most, tensor.nbytes - begin)
        chosen = rng.integers(0, len(pool), -(-n_bytes // pool.shape[1]))
        yield memoryview(pool.take(chosen, axis=0)).cast("B")[:n_bytes]


# ---- metadata ----

def metadata_of(config, name):
    """What `kl.convert` writes of a config, and a made-up tokenizer."""
    kind = architecture_of(config).name
    keys = gguf_metadata.keys_of(config, {})
    found = {"general.architecture": kind, "general.name": name,
             "general.quantization_version": gguf_metadata.QUANTIZATION_VERSION}
    found |= {f"{kind}.{key}": value for key, value in keys.items()} | tokenizer_keys(config, WORDS[kind])
    return {key: gguf_write.Values(key, *value) if isinstance(value, tuple) else value
            for key, value in found.items()}


def tokenizer_keys(config, words):
    """Tokens, types, merges, special ids and a template; an array is (kind, items)."""
    ids = (config.bos_token_id, *config.eos_token_ids, config.pad_token_id)
    first = min(i for i in ids if i is not None)
    tokens, types, merges = vocabulary(config.vocab_size, first, words.specials)
    keys = {"model": "gpt2", "pre": words.pre, "tokens": ("string", tokens), "token_type": ("int32", types),
            "merges": ("string", merges)}
    keys |= {f"{key}_token_id": first + i for key, i in words.ids.items()}
    keys |= {} if "bos" in words.ids else {"add_bos_token": False}
    tiny = importlib.resources.files("kimi_linear") / "data" / "tiny" / "chat_template.jinja"
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {
        "tokenizer.chat_template": words.template or tiny.read_text()}


def vocabulary(n, first, specials):
    """Tokens, types and merges of a made-up vocabulary of n, whose special tokens begin at `first`.

    The bytes come first, then words of two letters, of three, and so on: each merges a shorter word with a letter.
    """
    if not 256 <= first < n:
        raise ValueError(f"the vocabulary is {n}; it must have 512 tokens or more: 256 bytes and 256 special ones")
    alphabet = [spelled(bytes([b])) for b in range(256)]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    starts = [*letters, alphabet[32]]  # a space may begin a word
    words = ("".join(w) for size in itertools.count(2) for w in itertools.product(starts, *[letters] * (size - 1)))
    words = list(itertools.islice(words, first - 256))
    tokens, types = [*alphabet, *words], [NORMAL] * first
    for i in range(n - first):
        name = specials.get(i)
        tokens.append(name or f"[PAD{first + i}]")
        types.append(UNUSED if name is None else USER if "tool_" in name else CONTROL)
    return tokens, types, [f"{word[:-1]} {word[-1]}" for word in words]
