"""Typed access to the metadata of a GGUF beside its tensors' sizes, whatever the architecture."""

from collections.abc import Mapping

import numpy as np

from ..config import MOST_LAYERS
from .gguf import MetaArray, described, place
from .safetensors import TensorView
from .strict_json import show


class Keys:
    """Keys below an architecture's name, and tensors' sizes; problems are collected."""

    def __init__(self, architecture: str, metadata: Mapping, tensors: Mapping[str, TensorView]):
        self.prefix = architecture + "."
        self.metadata, self.tensors = metadata, tensors
        self.problems: list[str] = []

    def wrong(self, key: str, value: object, rule: str) -> None:
        self.problems.append(f"{key} is {described(value)}; it must be {rule}")

    def integer(self, key: str, default: int | None = None) -> int | None:
        value = self.metadata.get(self.prefix + key)
        if value is None:
            return default
        if type(value) is int and 0 <= value < 2**63:
            return value
        self.wrong(self.prefix + key, value, "an integer >= 0")
        return default

    def needed(self, key: str) -> int:
        value = self.integer(key)
        if value is None and self.metadata.get(self.prefix + key) is None:
            self.problems.append(f"{self.prefix}{key} is missing; it must be an integer >= 0")
        return value or 0

    def typed(self, key: str, kind: type, default=None):
        """A float (or bool) of that key; an integer will do for a float.

        A float32 becomes the shortest decimal that it is the rounding of: 1e-05, as config.json has it.
        """
        value = self.metadata.get(self.prefix + key)
        if value is None:
            return default
        if kind is float and type(value) in (int, float):
            narrow = np.float32(value)
            return float(str(narrow)) if narrow == value else value
        if type(value) is kind:
            return value
        self.wrong(self.prefix + key, value, "a number" if kind is float else "a bool")
        return default

    def per_layer(self, key: str, n: int) -> list[int]:
        """An integer for each of n layers: an array of so many, or one that holds for all."""
        value = self.metadata.get(self.prefix + key)
        if isinstance(value, MetaArray) and value.count == n and value.kind.startswith(("int", "uint")):
            return [int(x) for x in value.values()]
        if type(value) is int:
            return [value] * n
        if value is None:
            self.problems.append(f"{self.prefix}{key} is missing; it must have an integer for each of {n} layers")
        elif isinstance(value, MetaArray):
            self.problems.append(f"{self.prefix}{key} is an array of {value.count} {value.kind}; it must have an "
                                 f"integer for each of {n} layers")
        else:
            self.wrong(self.prefix + key, value, f"an integer for each of {n} layers")
        return []

    def ne(self, tensor: str, axis: int) -> int | None:
        """A size of a tensor, the fastest axis 0; 1 of an axis that it lacks, None where there is no such tensor."""
        view = self.tensors.get(tensor)
        if view is None:
            return None
        sizes = view.shape[::-1]
        return sizes[axis] if axis < len(sizes) else 1

    def size(self, key: str, tensor: str, axis: int, value: int | None = None) -> int | None:
        """A size that a key (or `value`, which was read from it) and a tensor tell: they must agree."""
        told = self.integer(key) if value is None else value
        found = self.ne(tensor, axis)
        if told is not None and found is not None and told != found:
            self.contradiction(key, told, tensor, f"is {found} along axis {axis}")
        return told if told is not None else found

    def contradiction(self, key: str, told: object, tensor: str, found: str) -> None:
        view = self.tensors[tensor]
        self.problems.append(f"{self.prefix}{key} is {told}, but {tensor} {place(view)} {found} "
                             f"(its sizes are {list(view.shape[::-1])})")

    def layers(self) -> int:
        """The number of blocks; 0 after a problem."""
        n = self.needed("block_count")
        if 1 <= n <= MOST_LAYERS:
            return n
        if not self.problems:
            self.wrong(self.prefix + "block_count", n, f"an integer from 1 to {MOST_LAYERS}")
        return 0

    def layers_and_blocks(self) -> tuple[int, int]:
        """Layers, and blocks, among which are those behind that predict a second token; no layer after a problem."""
        blocks, behind = self.layers(), self.integer("nextn_predict_layers", 0)
        if blocks and behind >= blocks:
            self.wrong(self.prefix + "nextn_predict_layers", behind, f"below block_count, {blocks}, which counts them")
        return max(blocks - behind, 0), blocks

    def vocabulary(self) -> int | None:
        """From its key, the embedding and the list of tokens, as far as they are there."""
        size = self.size("vocab_size", "token_embd.weight", 1)
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, MetaArray) and size is not None and tokens.count != size:
            self.problems.append(f"tokenizer.ggml.tokens has {tokens.count} tokens, but the model's vocabulary has "
                                 f"{size}")
        return size

    def of_kind(self, heads: list[int], layers: list[int], key: str = "attention.head_count") -> int | None:
        """The head count of these layers, which must be the same."""
        found = {heads[i] for i in layers} if heads else set()
        if len(found) > 1:
            self.problems.append(f"{self.prefix}{key} differs among layers of one kind: {sorted(found)}")
        return found.pop() if found else None

    def specials(self) -> dict:
        """Ids of special tokens; a generation may end with eos, eot and eom."""
        found = {}
        for name in ("bos", "eos", "eot", "eom", "padding"):
            value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if value is not None and type(value) is not int:
                self.wrong(f"tokenizer.ggml.{name}_token_id", value, "an integer")
            elif value is not None:
                found[name] = value
        eos = list(dict.fromkeys(found[name] for name in ("eos", "eot", "eom") if name in found))
        return {"bos_token_id": found.get("bos"), "eos_token_id": eos, "pad_token_id": found.get("padding")}


# ---- the tokenizer ---------------------------------------------------------------------------------

TOKENIZER = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # types of tokens
_NAMED = {"bos": "bos", "eos": "eos", "pad": "padding"}  # Tokenizer's argument -> the beginning of the key


def template_of(metadata: Mapping, problems: list[str]) -> str | None:
    """The chat template; none after a problem."""
    template = metadata.get(TEMPLATE)
    if template is None or isinstance(template, str):
        return template
    problems.append(f"{TEMPLATE} is {show(template)}; it must be text")
    return None


def specials_of(metadata: Mapping, names: Mapping[int, str]) -> dict[str, str | None]:
    """bos, eos and pad, as a Tokenizer takes them; `names` are those of all special tokens by id."""
    return {x: names.get(metadata.get(f"{TOKENIZER}{key}_token_id")) for x, key in _NAMED.items()}


def with_specials(tokenizer, keys: dict) -> dict:
    """`keys` below ``tokenizer.ggml.``, with the ids of bos, eos and pad, and the template."""
    for x, key in _NAMED.items():
        name = tokenizer._names[f"{x}_token"]
        if name is not None:
            keys[f"{key}_token_id"] = tokenizer.special_ids[name]
    found = {TOKENIZER + key: value for key, value in keys.items()}
    return found if tokenizer.chat_template is None else found | {TEMPLATE: tokenizer.chat_template}


def string_array(metadata: Mapping, key: str, problems: list[str]) -> list[str]:
    """``tokenizer.ggml.key``, an array of string; none after a problem."""
    return _array(metadata, key, "string", problems)


def token_types(metadata: Mapping, tokens: list[str], problems: list[str]) -> list[int]:
    """``tokenizer.ggml.token_type``, one a token."""
    types = _array(metadata, "token_type", "int32", problems)
    if not problems and len(tokens) != len(types):
        problems.append(f"tokenizer.ggml.tokens has {len(tokens)} entries and tokenizer.ggml.token_type {len(types)}; "
                        f"both have one a token")
    return types


def _array(metadata: Mapping, key: str, kind: str, problems: list[str]) -> list:
    value = metadata.get(TOKENIZER + key)
    if isinstance(value, MetaArray) and value.kind == kind:
        values = value.values()
        return values if isinstance(values, list) else values.tolist()
    rule = "" if key == "merges" else ", one a token"
    problems.append(f"tokenizer.ggml.{key} is {described(value)}; it must be an array of {kind}{rule}")
    return []
