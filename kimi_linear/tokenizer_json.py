"""The tokenizer of a tokenizer.json: byte-level BPE by merges, as Qwen's, run by the `tokenizers` package.

The file holds a normaliser, a pattern that splits text, a vocabulary in GPT-2's alphabet of bytes, merges in their
order, and added tokens. What it says of text to ids is the package's; ids to bytes, streams and chat are `Tokenizer`'s.
Source: the file format of huggingface/tokenizers.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .chat_template import read_template
from .errors import FormatError
from .load.atomic import write_text
from .load.byte_alphabet import bytes_of
from .load.strict_json import is_there, load_object, show
from .tokenizer import Tokenizer, token_name

FILE = "tokenizer.json"
MAX_ID = 10**7


class JsonTokenizer(Tokenizer):
    """Text to token ids and back, by the content of a tokenizer.json.

    Parameters
    ----------
    spec : dict
        The content of the file: ``model`` of type BPE over bytes, ``added_tokens`` and the rest.
    bos, eos, pad : str, optional
        Names of added tokens.
    chat_template : str, optional
        A jinja2 template.

    Raises
    ------
    FormatError
        With all that is wrong with the content.
    ModuleNotFoundError
        If the package `tokenizers` is not installed.

    Notes
    -----
    Attributes are those of `Tokenizer`; `special_ids` has all added tokens, and ``decode(skip_special=True)`` leaves
    out those that the file marks as special.
    """

    def __init__(self, spec: Mapping, *, bos: str | None = None, eos: str | None = None, pad: str | None = None,
                 chat_template: str | None = None):
        problems: list[str] = []
        vocabulary = _vocabulary(spec, problems)
        added = _added(spec, vocabulary, problems)
        _check_bytes(spec, problems)
        if not problems:
            _check_merges(spec, vocabulary, problems)
        if problems:
            raise FormatError(problems, FILE)
        self.spec = spec
        self._encoding, self._without_added = _build(spec), None
        special = {token["content"]: token["id"] for token in added}
        self._set_specials(special, {token["id"] for token in added if token.get("special")}, bos, eos, pad,
                           chat_template)
        self.n_base = min(special.values(), default=len(vocabulary))
        self.vocab_size = 1 + max([*vocabulary.values(), *special.values()])
        self._bytes = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            self._bytes[i] = bytes_of(token)
        for name, i in special.items():
            self._bytes[i] = name.encode("utf-8")

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> "JsonTokenizer":
        """The tokenizer of a model folder: tokenizer.json, beside it tokenizer_config.json and chat_template.jinja.

        Raises
        ------
        FileNotFoundError
            If there is no tokenizer.json.
        FormatError
            With every problem of the file that is wrong.
        ModuleNotFoundError
            If the package `tokenizers` is not installed.
        """
        folder = Path(path)
        if not is_there(folder / FILE):
            raise FileNotFoundError(f"{folder} has no {FILE}, so no tokenizer; token ids still work.")
        try:
            tokenizer = cls(load_object(folder / FILE))
        except FormatError as error:
            raise FormatError(error.problems, str(folder / FILE)) from None
        config_path = folder / "tokenizer_config.json"
        config = load_object(config_path) if is_there(config_path) else {}
        problems: list[str] = []
        named = (token_name(config, f"{x}_token", tokenizer.special_ids, problems) for x in ("bos", "eos", "pad"))
        tokenizer._set_specials(tokenizer.special_ids, tokenizer._skipped, *named,
                                read_template(folder, config, problems))
        if problems:
            raise FormatError(problems, str(config_path))
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which `from_folder` reads.

        Parameters
        ----------
        path : str or path
            A folder that is there.
        """
        folder = Path(path)
        names = {key: name for key, name in self._names.items() if name is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        for name, content in ((FILE, self.spec), ("tokenizer_config.json", config)):
            write_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            write_text(folder / "chat_template.jinja", self.chat_template)

    def _encode(self, text: str, specials: bool) -> list[int]:
        if specials:
            return self._encoding.encode(text, add_special_tokens=False).ids
        if self._without_added is None:
            self._without_added = _build({**self.spec, "added_tokens": []})
        return self._without_added.encode(text, add_special_tokens=False).ids


def _package():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("This model's tokenizer is a tokenizer.json, which needs the package tokenizers: "
                                  "pip install tokenizers. Token ids work without it.", name=error.name) from None
    return tokenizers


def _build(spec: Mapping):
    """The package's tokenizer; merges and the like were checked."""
    text = json.dumps({**spec, "truncation": None, "padding": None})
    try:
        return _package().Tokenizer.from_str(text)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise FormatError(f"the package tokenizers does not read it: {error}", FILE) from None


def _vocabulary(spec: Mapping, problems: list[str]) -> dict[str, int]:
    """Token -> id of a model that is BPE over bytes."""
    model = spec.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        problems.append(f"its model is {show(kind)}; it must be of the type BPE")
        return {}
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping) or not vocabulary:
        problems.append(f"model.vocab is {show(vocabulary)}; it must map tokens to ids")
        return {}
    holders: dict[int, str] = {}
    for token, i in vocabulary.items():
        if type(i) is not int or not 0 <= i < MAX_ID:
            problems.append(f"model.vocab has {show(token)} as {show(i)}; an id must be an integer below {MAX_ID}")
        elif i in holders:
            problems.append(f"model.vocab has {show(holders[i])} and {show(token)} as {i}; ids must differ")
        elif not bytes_of(token):
            problems.append(f"token {i} is {show(token)}, which is not spelled in the alphabet of bytes")
        if len(problems) > 8:
            break
        if type(i) is int:
            holders[i] = token
    return dict(vocabulary)


def _check_bytes(spec: Mapping, problems: list[str]) -> None:
    """Text is spelled in the alphabet of bytes before merging, or behind it: else spaces would be lost."""
    parts = []
    for key, inside in (("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"), ("normalizer", "normalizers")):
        part = spec.get(key)
        steps = part.get(inside) if isinstance(part, Mapping) else None
        parts += [part, *(steps if isinstance(steps, list) else [])]
    if not any(isinstance(part, Mapping) and part.get("type") == "ByteLevel" for part in parts):
        problems.append("neither its pre_tokenizer nor its decoder is of the type ByteLevel; only BPE over bytes is "
                        "read")


def _added(spec: Mapping, vocabulary: Mapping[str, int], problems: list[str]) -> list[Mapping]:
    """The added tokens, whose ids follow those of the vocabulary."""
    added = spec.get("added_tokens") or []
    n = 1 + max((i for i in vocabulary.values() if type(i) is int), default=-1)
    if not isinstance(added, list):
        problems.append(f"added_tokens is {show(added)}; it must be a list")
        return []
    seen: dict[object, object] = {}
    for position, token in enumerate(added):
        i, name = (token.get("id"), token.get("content")) if isinstance(token, Mapping) else (None, None)
        if type(i) is not int or not isinstance(name, str) or not name:
            problems.append(f"added_tokens[{position}] is {show(token)}; it must have an id and a content")
            continue
        if not n <= i < MAX_ID:
            problems.append(f"added_tokens[{position}], {show(name)}, has the id {i}; added tokens follow the {n} of "
                            f"the vocabulary")
        elif i in seen or name in seen:
            problems.append(f"added_tokens[{position}], {show(name)}, has the id {i}; name and id must be its own")
        seen |= {i: name, name: i}
    return added


def _check_merges(spec: Mapping, vocabulary: Mapping[str, int], problems: list[str]) -> None:
    """Each merge is two tokens whose concatenation is one; the first that is not is told."""
    merges = spec["model"].get("merges")
    if not isinstance(merges, list):
        problems.append(f"model.merges is {show(merges)}; it must be a list")
        return
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(x, str) for x in parts):
            problems.append(f"model.merges[{i}] is {show(merge)}; it must be two tokens")
            return
        for token in (*parts, "".join(parts)):
            if token not in vocabulary:
                problems.append(f"model.merges[{i}] is {show(merge)}, and {show(token)} is not in model.vocab")
                return
