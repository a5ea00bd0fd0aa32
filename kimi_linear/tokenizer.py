"""Kimi's tokenizer: rank-BPE of tiktoken.model, special tokens, streaming decode, chat template.

Ids 0..n-1 are the ranks of tiktoken.model, n..n+255 the special slots. Source: spec of the published files
(tiktoken.model, tokenizer_config.json, chat_template.jinja); the merging itself is the `tiktoken` package's.
"""

import base64
import codecs
import json
import operator
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tiktoken

from .chat_template import read_template, render_chat
from .errors import FormatError
from .load.atomic import write_text
from .load.strict_json import is_there, load_object, show

N_SPECIAL = 256  # slots after the base vocabulary
MAX_PIECE = 400_000  # characters encoded at once
MAX_RUN = 25_000  # characters of white space, or of none, in a row
MAX_RANKS_FILE = 100_000_000  # bytes of tiktoken.model

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"  # letters that can stand in a capitalised run
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"\p{Han}+",
        _PREFIX + _UPPER + "*" + _LOWER + "+" + _CONTRACTION,
        _PREFIX + _UPPER + "+" + _LOWER + "*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    ranks : dict of bytes to int
        The base vocabulary: ranks 0..n-1, with all 256 single bytes among them.
    special : dict of str to int
        The 256 special tokens, ids n..n+255.
    skipped : iterable of int, optional
        Special ids that ``decode(skip_special=True)`` leaves out; all of them by default. The published files
        keep the markers of tool calls.
    bos, eos, pad : str, optional
        Names of special tokens.
    chat_template : str, optional
        A jinja2 template.

    Attributes
    ----------
    vocab_size : int
    n_base : int
        The first special id.
    special_ids : dict of str to int
    bos_id, pad_id : int or None
    eos_ids : tuple of int
        Where a generation may stop: `eos` and ``<|im_end|>``, ascending.
    chat_template : str or None
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special: Mapping[str, int],
        *,
        skipped: Iterable[int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ):
        self._set_specials(special, special.values() if skipped is None else skipped, bos, eos, pad, chat_template)
        self.n_base = len(ranks)
        self.vocab_size = self.n_base + len(self.special_ids)
        self._bytes = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        for name, i in self.special_ids.items():
            self._bytes[i] = name.encode("utf-8")
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens=self.special_ids
        )

    def _set_specials(self, special, skipped, bos, eos, pad, chat_template):
        self.special_ids = dict(special)
        self.bos_id, self.pad_id = self.special_ids.get(bos), self.special_ids.get(pad)
        self.eos_ids = tuple(sorted({special[name] for name in (eos, "<|im_end|>") if name in special}))
        self.chat_template = chat_template
        self._skipped = frozenset(skipped)
        self._names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> "Tokenizer":
        """The tokenizer of a model folder: of tiktoken.model, or a `JsonTokenizer` where it has tokenizer.json instead.

        Raises
        ------
        FileNotFoundError
            If neither is there, or tokenizer_config.json is not there.
        FormatError
            With every problem of the file that is wrong.
        ModuleNotFoundError
            If it is tokenizer.json, and the package `tokenizers` is not installed.
        """
        folder = Path(path)
        if is_there(folder / "tokenizer.json") and not is_there(folder / "tiktoken.model"):
            from .tokenizer_json import JsonTokenizer

            return JsonTokenizer.from_folder(folder)
        for name in ("tiktoken.model", "tokenizer_config.json"):
            if not is_there(folder / name):
                raise FileNotFoundError(f"{folder} has no {name}, so no tokenizer; token ids still work.")
        ranks = _read_ranks(folder / "tiktoken.model")
        config_path = folder / "tokenizer_config.json"
        config = load_object(config_path)
        problems: list[str] = []
        special, skipped = _special_tokens(config, len(ranks), problems)
        names = {x: token_name(config, f"{x}_token", special, problems) for x in ("bos", "eos", "pad")}
        template = read_template(folder, config, problems)
        if problems:
            raise FormatError(problems, str(config_path))
        return cls(ranks, special, skipped=skipped, chat_template=template, **names)

    def save(self, path: str | os.PathLike) -> None:
        """Write tiktoken.model, tokenizer_config.json and chat_template.jinja, which `from_folder` reads.

        Parameters
        ----------
        path : str or path
            A folder that is there.

        Raises
        ------
        ValueError
            If there are not 256 special tokens, as the published files have.
        """
        if len(self.special_ids) != N_SPECIAL:
            raise ValueError(f"The tokenizer has {len(self.special_ids)} special tokens; its files hold {N_SPECIAL}.")
        folder = Path(path)
        lines = (f"{base64.b64encode(self._bytes[i]).decode()} {i}\n" for i in range(self.n_base))
        added = {
            str(i): {"content": name, "special": i in self._skipped}
            for name, i in self.special_ids.items() if name != f"<|reserved_token_{i}|>"
        }
        names = {key: name for key, name in self._names.items() if name is not None}
        config = json.dumps({"added_tokens_decoder": added, **names}, indent=2, ensure_ascii=False)
        write_text(folder / "tiktoken.model", "".join(lines))
        write_text(folder / "tokenizer_config.json", config + "\n")
        if self.chat_template is not None:
            write_text(folder / "chat_template.jinja", self.chat_template)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.n_base} tokens and {len(self.special_ids)} specials)"

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Token ids of a text; no token is added.

        Parameters
        ----------
        text : str
            Long texts are first cut every 400,000 characters, and in any run of more than 25,000 characters
            of white space, or of none, as the published tokenizer does; no token crosses a cut.
        specials : bool, optional
            Whether the names of special tokens in the text become these tokens (as in the published
            tokenizer), or stay plain text (for text from strangers).

        Raises
        ------
        TypeError
            If `text` is not a str.
        ValueError
            If it holds half of a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}; it must be a str.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            what = f"U+{code:04X}, half of a surrogate pair; text must be whole characters"
            raise ValueError(f"text[{error.start}] is {what}.") from None
        return self._encode(text, specials)

    def _encode(self, text: str, specials: bool) -> list[int]:
        allowed = "all" if specials else set()
        ids: list[int] = []
        for piece in _cut(text):
            ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, errors: str = "replace") -> str:
        """Text of token ids: their bytes, joined, read as UTF-8.

        Parameters
        ----------
        ids : iterable of int
        skip_special : bool, optional
            Leave out special tokens, except those that tokenizer_config.json marks as not special (tool
            calls).
        errors : str, optional
            What becomes of bytes that are not UTF-8, as in `bytes.decode`: U+FFFD by default.

        Raises
        ------
        ValueError
            If an id is out of range; the message says which and where.
        TypeError
            If one is not an integer.
        """
        return self._join(ids, skip_special).decode("utf-8", errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids, joined; specials are their names in UTF-8. Raises as `decode`."""
        return self._join(ids, False)

    def stream(self, *, skip_special: bool = False, errors: str = "replace") -> "TextStream":
        """A decoder for one id at a time, which gives in pieces what `decode` gives at once."""
        return TextStream(self, skip_special, errors)

    def id_to_bytes(self, id: int) -> bytes:
        """The bytes of one token. Raises as `decode`."""
        return self._bytes[self._checked(id, "id")]

    def token(self, id: int) -> str:
        """One token for people to read: its name or text, with U+FFFD for parts of characters."""
        return self.id_to_bytes(id).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
        template_options: Mapping | None = None,
    ) -> str:
        """The text of a conversation in the model's own chat format, to be given to `encode`.

        The name of a special token in a message, as ``<|im_end|>``, becomes that token in `encode`, as with other
        engines: take such names out of messages from strangers.

        Parameters
        ----------
        messages : sequence of dict
            Each with "role", which is "system", "developer", "user", "assistant" or "tool" (what the template does
            with it is the template's), and "content": text, a list of parts such as
            ``{"type": "text", "text": ...}``, or None beside "tool_calls". Further keys reach the template.
        tools : sequence of dict, optional
            Descriptions of functions, as JSON.
        add_generation_prompt : bool, optional
            Whether to end with the opening of the assistant's turn.
        template_options : mapping, optional
            Further variables for the template, such as ``{"enable_thinking": False}``.

        Raises
        ------
        TypeError, ValueError
            If messages, tools or options are not as above; if there is no template; if the template fails or refuses,
            with its line.
        """
        if self.chat_template is None:
            raise ValueError("This tokenizer has no chat template (chat_template.jinja); give text or ids.")
        names = {key: name for key, name in self._names.items() if name is not None}
        return render_chat(self.chat_template, messages, tools, add_generation_prompt, template_options, names)

    def _join(self, ids: Iterable[int], skip_special: bool) -> bytes:
        checked = (self._checked(i, "ids", n) for n, i in enumerate(ids))
        return b"".join(self._shown(i, skip_special) for i in checked)

    def _shown(self, id: int, skip_special: bool) -> bytes:
        return b"" if skip_special and id in self._skipped else self._bytes[id]

    def _checked(self, id: object, argument: str, position: int | None = None) -> int:
        where = argument if position is None else f"{argument}[{position}]"
        try:
            index = operator.index(id)
        except TypeError:
            raise TypeError(f"{where} is {show(id)}; it must be an integer.") from None
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"{where} is {index}; a token id must be in 0..{self.vocab_size - 1}.")
        return index


class TextStream:
    """Token ids in, whole characters out: the pieces joined are what `Tokenizer.decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, errors: str):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, id: int) -> str:
        """The characters that this token completes, often none. Raises as `Tokenizer.decode`."""
        index = self._tokenizer._checked(id, "id")
        return self._decoder.decode(self._tokenizer._shown(index, self._skip_special))

    def finish(self) -> str:
        """What is left when no more ids come: nothing, or a replacement for an unfinished character."""
        return self._decoder.decode(b"", True)


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_PIECE characters, in them runs of at most MAX_RUN of white space, or of none."""
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        begin = 0
        if len(piece) > MAX_RUN:
            for run in re.finditer(r"\s+|\S+", piece):
                for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                    yield piece[begin:end]
                    begin = end
        yield piece[begin:]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken.model: on each line a token's bytes in base64, a space, its rank."""
    size = path.stat().st_size
    if size > MAX_RANKS_FILE:
        raise FormatError(f"it has {size} bytes; at most {MAX_RANKS_FILE} are read", str(path))
    ranks: dict[bytes, int] = {}
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError:
            problems.append(f"line {number} is {show(line)}; it must be base64, a space, and a rank")
            continue
        if token in ranks:
            problems.append(f"line {number} gives the token {token!r} a second rank")
        ranks[token] = rank
    if not problems:
        problems = _rank_problems(ranks)
    if problems:
        raise FormatError(problems, str(path))
    return ranks


def _rank_problems(ranks: Mapping[bytes, int]) -> list[str]:
    problems = []
    if sorted(ranks.values()) != list(range(len(ranks))):
        problems.append(f"its {len(ranks)} ranks must be 0..{len(ranks) - 1}, each once")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        problems.append(f"it lacks the single bytes {show(missing)}; all 256 must be tokens")
    if b"" in ranks:
        problems.append("it holds an empty token")
    return problems


def _special_tokens(config: Mapping, n_base: int, problems: list[str]) -> tuple[dict[str, int], set[int]]:
    """Name -> id of the 256 slots after the base, and the ids that skipping leaves out."""
    names = {i: f"<|reserved_token_{i}|>" for i in range(n_base, n_base + N_SPECIAL)}
    skipped = set(names)
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        problems.append(f"added_tokens_decoder is {show(added)}; it must map ids to tokens")
        added = {}
    for key, entry in added.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) in names):
            rule = f"an id of a special token is in {n_base}..{n_base + N_SPECIAL - 1}"
            problems.append(f"added_tokens_decoder has the id {show(key)}; {rule}")
        elif not isinstance(name, str) or not name:
            problems.append(f"added_tokens_decoder: the content of {key} is {show(name)}; it must be text")
        else:
            names[int(key)] = name
            if not entry.get("special", True):
                skipped.discard(int(key))
    special = {name: i for i, name in names.items()}
    for i, name in names.items():
        if special[name] != i:
            problems.append(f"added_tokens_decoder: {name!r} is the name of both {i} and {special[name]}")
    return special, skipped


def token_name(config: Mapping, key: str, special: Container[str], problems: list[str]) -> str | None:
    """The special token that tokenizer_config.json names under a key."""
    name = config.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    if name is None or (isinstance(name, str) and name in special):
        return name
    problems.append(f"{key} is {show(name)}; it must be the name of a special token")
    return None
