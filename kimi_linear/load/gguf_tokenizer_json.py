"""A tokenizer.json as the keys of a GGUF, and back: byte-level BPE by merges, under a name for its splitter.

A GGUF names the pattern that splits text, ``tokenizer.ggml.pre``, and lists tokens, their types and merges. The rest of
a tokenizer.json is the same in all of these models: text is normalised (NFC), split, and spelled in the alphabet of
bytes; but GLM's is not normalised, and a piece that is a token is that one, whatever its merges make of it. Source:
conversion/base.py and src/llama-vocab.cpp of ggml-org/llama.cpp, and of unslothai/llama.cpp on GLM's merges; the
patterns are those of the published tokenizer.json files, which llama.cpp quotes.
"""

import unicodedata
from collections.abc import Mapping

from ..errors import FormatError
from ..tokenizer_json import JsonTokenizer
from .gguf_keys import CONTROL, NORMAL, UNUSED, USER, specials_of, string_array, template_of, token_types, with_specials
from .strict_json import show

_TAIL = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#: tokenizer.ggml.pre -> the pattern that splits text.
PATTERNS = {
    "qwen2": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _TAIL,
    "qwen35": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _TAIL,
    "glm4": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _TAIL,
}
PATTERNS["glm5"] = PATTERNS["glm4"]  # two names of one
#: Of these text is not normalised, and pieces that are tokens are not merged.
PLAIN = ("glm4", "glm5")


def read(metadata: Mapping, where: str) -> JsonTokenizer:
    """The tokenizer of a file whose tokenizer.ggml.pre is one of `PATTERNS`.

    Raises
    ------
    FormatError
        With what is wrong with the keys.
    """
    problems: list[str] = []
    tokens = string_array(metadata, "tokens", problems)
    types = token_types(metadata, tokens, problems)
    merges = string_array(metadata, "merges", problems)
    template = template_of(metadata, problems)
    if problems:
        raise FormatError(problems, where)
    vocabulary: dict[str, int] = {}
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind == NORMAL and vocabulary.setdefault(token, i) != i:
            problems.append(f"token {i} is {show(token)}, as token {vocabulary[token]} is; tokens must differ")
        elif kind in (CONTROL, USER):
            added.append(_added(i, token, kind == CONTROL))
        elif kind not in (NORMAL, UNUSED):
            problems.append(f"token {i}, {show(token)}, has the type {kind}, which is not read here")
    if problems:
        raise FormatError(problems[:8], where)
    names = {token["id"]: token["content"] for token in added}
    spec = spec_of(vocabulary, [merge.split(" ") for merge in merges], added, metadata["tokenizer.ggml.pre"])
    try:
        return JsonTokenizer(spec, chat_template=template, **specials_of(metadata, names))
    except FormatError as error:
        raise FormatError(error.problems, where) from None


def spec_of(vocabulary: Mapping[str, int], merges: list, added: list, pre: str) -> dict:
    """The content of a tokenizer.json, by the name of its splitter."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
             "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre in PLAIN,
             "vocab": dict(vocabulary), "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None if pre in PLAIN else {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]}, "post_processor": bytes_,
            "decoder": bytes_, "model": model}


def _added(i: int, name: str, special: bool) -> dict:
    return {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}


def keys_of(tokenizer: JsonTokenizer, n: int) -> dict:
    """Tokens, types, merges, special ids and the template, for a vocabulary of n; an array is (kind, items).

    Raises
    ------
    ValueError
        If the tokenizer does to text what no key says.
    """
    tokens, types = [f"[PAD{i}]" for i in range(n)], [UNUSED] * n
    for token, i in tokenizer.spec["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for name, i in tokenizer.special_ids.items():
        tokens[i], types[i] = name, CONTROL if i in tokenizer._skipped else USER
    keys = {"model": "gpt2", "pre": _splitter(tokenizer.spec), "tokens": ("string", tokens),
            "token_type": ("int32", types), "merges": ("string", merges_of(tokenizer.spec)), "add_bos_token": False}
    return with_specials(tokenizer, keys)


def merges_of(spec: Mapping) -> list[str]:
    """The merges, each as its two parts with a space between."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]


def _splitter(spec: Mapping) -> str:
    """The name of what the tokenizer does to text before merging; ValueError where a GGUF has none."""
    found = [pre for pre in PATTERNS if _steps(spec) == _steps(spec_of({}, [], [], pre))]
    if not found:
        raise ValueError(f"tokenizer.json: a GGUF has no name for its way to treat text, {show(_steps(spec), 400)}; "
                         f"known are the patterns of {', '.join(PATTERNS)}, of the first two behind NFC")
    strange = [token["content"] for token in spec.get("added_tokens") or ()
               if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip"))]
    if strange:
        raise ValueError(f"tokenizer.json: a GGUF cannot keep that {show(strange[0])} takes the space beside it, or "
                         f"is a token as a whole word only")
    touched = [token["content"] for token in spec.get("added_tokens") or ()
               if found[0] not in PLAIN and token.get("normalized") and _is_touched(token["content"])]
    if touched:
        raise ValueError(f"tokenizer.json: a GGUF cannot keep that {show(touched[0])} is found in text behind NFC "
                         "(normalized): there added tokens are found before it")
    return found[0]


def _is_touched(name: str) -> bool:
    """Whether NFC makes a text of something else, or something else of it: other spellings of it, a mark before it."""
    return any(unicodedata.normalize(form, name) != name for form in ("NFC", "NFD")) \
        or unicodedata.combining(name[0]) > 0


def _steps(spec: Mapping) -> tuple:
    """What changes ids, of a tokenizer.json: the normaliser, the steps that split text, the options of merging."""
    before = spec.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    keys = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
    model = {key: value for key, value in spec["model"].items() if value and key not in ("vocab", "merges", "type")}
    return spec.get("normalizer"), [{k: step[k] for k in keys if k in step} for step in steps], model
