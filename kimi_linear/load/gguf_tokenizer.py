"""The tokenizer inside a GGUF: here Kimi's, by ranks; by merges in gguf_tokenizer_json.py.

The file spells a token's bytes in the alphabet of GPT-2, and lists merges that lose some of the published ranks.
A base token's id is its rank, so the ranks come from the tokens alone, and text is split as published: ids are those
of the Hugging Face folder. Where that cannot be, the error says why.
"""

from collections.abc import Mapping

from ..errors import FormatError
from ..tokenizer import N_SPECIAL, Tokenizer
from . import gguf_tokenizer_json as by_merges
from .byte_alphabet import bytes_of
from .gguf_keys import CONTROL, NORMAL, TOKENIZER, UNUSED, USER, specials_of, string_array, template_of, token_types
from .strict_json import show

RANKS = "kimi-k2"
SHOWN_CONTROLS = ("<|tool_call",)  # published as not special: decoding keeps them


def read_tokenizer(metadata: Mapping, where: str) -> Tokenizer:
    """The tokenizer of a file's metadata, a `JsonTokenizer` where it is one of merges.

    Raises
    ------
    FormatError
        If the file's tokenizer is another, or its tokens do not give the ranks back, with the first token at fault.
    """
    problems: list[str] = []
    for key, read in (("model", ["gpt2"]), ("pre", [RANKS, *by_merges.PATTERNS])):
        if metadata.get(TOKENIZER + key) not in read:
            rule = f"only {read[0]!r} is read" if len(read) == 1 else f"read are {', '.join(map(repr, read))}"
            problems.append(f"{TOKENIZER}{key} is {show(metadata.get(TOKENIZER + key))}; {rule}")
    if not problems and metadata[TOKENIZER + "pre"] != RANKS:
        return by_merges.read(metadata, where)
    tokens = string_array(metadata, "tokens", problems)
    types = token_types(metadata, tokens, problems)
    if not problems:
        ranks, special, skipped = _vocabulary(tokens, types, problems)
    template = template_of(metadata, problems)
    if problems:
        raise FormatError(problems, where)
    names = {i: name for name, i in special.items()}
    return Tokenizer(ranks, special, skipped=skipped, chat_template=template, **specials_of(metadata, names))


def _vocabulary(tokens: list[str], types: list[int], problems: list[str]):
    """(ranks, specials, ids that skipping leaves out) of tokens that begin with the base ones."""
    n = next((i for i, kind in enumerate(types) if kind != NORMAL), len(types))
    ranks: dict[bytes, int] = {}
    for i, token in enumerate(tokens[:n]):
        spelled = bytes_of(token)
        if token and not spelled:
            problems.append(f"token {i} is {show(token)}, which is not spelled in the alphabet of bytes, so its rank "
                            f"cannot be recovered")
            break
        if not spelled or spelled in ranks:
            like = f"spelled as token {ranks[spelled]} is" if spelled else "empty"
            problems.append(f"token {i} is {like}, so the ranks cannot be recovered")
            break
        ranks[spelled] = i
    if not problems:
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            problems.append(f"among its {n} base tokens {len(missing)} single bytes are missing, the first "
                            f"{missing[0]:#04x}: ids of text cannot be exact")
    special: dict[str, int] = {}
    skipped = set()
    for i, (token, kind) in enumerate(zip(tokens[n:], types[n:]), n):
        if kind not in (CONTROL, USER, UNUSED):
            problems.append(f"token {i}, {show(token)}, has the type {kind} behind the first special token, {n}: it "
                            f"has no rank that could be recovered")
            break
        if i >= n + N_SPECIAL and kind == UNUSED and token == f"[PAD{i}]":
            continue  # a row of the embedding behind the tokenizer's slots
        name = f"<|reserved_token_{i}|>" if kind == UNUSED and token == f"[PAD{i}]" else token
        if not name or special.setdefault(name, i) != i:
            like = f"the name of {special[name]}, too" if name else "empty"
            problems.append(f"token {i} is {show(token)}, {like}; special tokens must have names of their own")
            break
        if kind != USER and not name.startswith(SHOWN_CONTROLS):
            skipped.add(i)
    return ranks, special, skipped
