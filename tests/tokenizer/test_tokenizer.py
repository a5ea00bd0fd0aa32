"""Ids against expected.json and an oracle without regex or tiktoken; decoding, streaming, and bad files."""

import base64
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizer_oracle as oracle

from kimi_linear.errors import FormatError
from kimi_linear.tokenizer import MAX_PIECE, MAX_RUN, Tokenizer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "kimi_linear" / "data" / "tiny"
DATA = ROOT / "tests" / "data" / "tiny"
EXPECTED = json.loads((DATA / "expected.json").read_text())
N_BASE = 1792


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def judge(tokenizer):
    lines = (TINY / "tiktoken.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    return oracle.Oracle(ranks, tokenizer.special_ids)


# Alphabets of the random strings: characters so old that every Unicode table has them in the same class.
RANGES = {
    "ascii": (0x20, 0x7E), "latin": (0xC0, 0x24F), "marks": (0x300, 0x36F), "greek": (0x391, 0x3A1),
    "cyrillic": (0x410, 0x44F), "hebrew": (0x5D0, 0x5EA), "arabic": (0x620, 0x64A),
    "digits": (0x660, 0x669),
    "devanagari": (0x905, 0x94D), "thai": (0xE01, 0xE3A), "hangul": (0xAC00, 0xD7A3),
    "kana": (0x3041, 0x30FE), "radicals": (0x2E80, 0x2E99), "han": (0x4E00, 0x9FA5),
    "han_b": (0x20000, 0x2A6D6), "hangzhou": (0x3021, 0x3029), "fractions": (0x2153, 0x2188),
    "punctuation": (0x2010, 0x2027), "arrows": (0x2190, 0x21FF), "emoji": (0x1F600, 0x1F64F),
    "skins": (0x1F3FB, 0x1F3FF), "private": (0xE000, 0xF8FF), "tags": (0xE0061, 0xE007A),
    "titlecase": (0x1F88, 0x1F8F), "modifiers": (0x2B0, 0x2C1), "fullwidth": (0xFF10, 0xFF5A),
}  # fmt: skip
CHOSEN = [
    *"aaabbcdefgTHXYZ", *"0123456789", *" " * 8, *"\n\n\r\t\v\f\x00\x1c",
    *"\u0085\u00a0\u2028\u3000\u1680\u200b\u200d\ufe0f", *"''''", *"sStTrReEvVmMlLdDſ", *"々〇〡あアーｱ",
    *".,!?-_/#*\"<|>[]{}", "\u0301", "\ufeff", "\u2060", "ǅ", "ª", "👩\u200d👩\u200d👧",
    "🏳\ufe0f\u200d🌈", "é", "e\u0301", "'ll", "'RE", "'ſ", " the", "lord", "HTTPServer", "\r\n", "  ", "   ",
]  # fmt: skip
SPECIALS = ["<|im_end|>", "<|im_user|>", "[BOS]", "[PAD]", "<|reserved_token_1797|>", "<|tool_call_begin|>"]
SPECIALS += ["<|im_", "<|im_end|", "[EO", "|>"]


REPRESENTATIVES = {chr(c) for ends in RANGES.values() for c in ends} | {c for c in CHOSEN if len(c) == 1}
REPRESENTATIVES = sorted(REPRESENTATIVES)


def dense_ranks():
    """A vocabulary in which any two representatives merge, in shuffled order, so that ids show every split.

    In a vocabulary learned from text next to no token lies across two pre-tokens, so that most errors of a
    splitter leave the ids as they are.
    """
    tokens = {bytes([b]): None for b in range(256)}
    for c in REPRESENTATIVES:
        data = c.encode("utf-8")
        tokens |= dict.fromkeys(data[:n] for n in range(2, len(data) + 1))
    pairs = [(a + b).encode("utf-8") for a in REPRESENTATIVES for b in REPRESENTATIVES]
    random.Random(23).shuffle(pairs)
    return {token: rank for rank, token in enumerate(tokens | dict.fromkeys(pairs))}


def random_text(rng, length):
    parts = []
    for _ in range(length):
        kind = rng.random()
        if kind < 0.60:
            parts.append(rng.choice(CHOSEN))
        elif kind < 0.82:
            parts.append(rng.choice(REPRESENTATIVES))
        elif kind < 0.97:
            parts.append(chr(rng.randint(*rng.choice(list(RANGES.values())))))
        else:
            parts.append(rng.choice(SPECIALS))
    return "".join(parts)


def test_held_out_text_and_prompts(tokenizer, judge):
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) == EXPECTED["heldout"]["tokens"]
    assert ids[:16] == EXPECTED["heldout"]["first_ids"]
    assert ids == judge.encode_plain(text)
    assert tokenizer.decode(ids) == text
    for case in EXPECTED["greedy"]:
        prompt = case["prompt"]
        if prompt.startswith("chat: "):
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt[6:]}])
        assert tokenizer.encode(prompt) == case["prompt_ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_examples_of_the_splitter():
    assert oracle.split("HTTPServer helloWorld") == ["HTTPServer", " hello", "World"]
    assert oracle.split("あA we'll  go\n\n 1234 中国ab") == [
        "あ", "A", " we'll", " ", " go", "\n\n", " ", "123", "4", " ", "中国", "ab",
    ]  # fmt: skip


def test_100_000_random_strings_equal_the_oracle(tokenizer, judge):
    ranks = dense_ranks()
    specials = {name: len(ranks) + k for k, name in enumerate(tokenizer.special_ids)}
    dense, dense_judge = Tokenizer(ranks, specials), oracle.Oracle(ranks, specials)
    rng = random.Random(20)
    for n in range(100_000):
        text = random_text(rng, rng.randint(0, 12))
        ids = dense.encode(text)
        assert ids == dense_judge.encode(text), f"string {n}: {text!r}"
        assert dense.decode(ids) == text, f"string {n}: {text!r}"
        if n % 4 == 0:
            plain = tokenizer.encode(text, specials=False)
            assert tokenizer.encode(text) == judge.encode(text), f"string {n}: {text!r}"
            assert plain == judge.encode_plain(text), f"string {n}: {text!r}"
            assert all(i < N_BASE for i in plain)


def streamed(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    return [stream.push(i) for i in ids], stream.finish()


def test_2000_streams_cut_at_every_place(tokenizer):
    """Ids cut anywhere: what has been shown so far is the start of the whole, and never half a character."""
    rng = random.Random(21)
    for _ in range(2000):
        text = random_text(rng, rng.randint(1, 10))
        ids = tokenizer.encode(text)
        for cut in range(len(ids) + 1):
            shown, rest = streamed(tokenizer, ids[:cut])
            assert "".join(shown) + rest == tokenizer.decode(ids[:cut])
            assert text.startswith("".join(shown))
        assert rest == ""


def test_streams_of_broken_utf8(tokenizer):
    """Random bytes, mostly no UTF-8, as single-byte tokens: streaming equals Python's decoding at once."""
    rng = random.Random(22)
    by_byte = {tokenizer.id_to_bytes(i): i for i in range(N_BASE)}
    parts = ["😀".encode(), "é中".encode(), b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe4\xb8"]
    likely = [b"\x80", b"\xe4", b"\xf0", b"a"]
    for _ in range(5000):
        data = b"".join(
            rng.choice(parts) if rng.random() < 0.5 else rng.choice([rng.randbytes(1), *likely])
            for _ in range(rng.randint(0, 8))
        )
        ids = [by_byte[bytes([b])] for b in data]
        assert tokenizer.decode_bytes(ids) == data
        shown, rest = streamed(tokenizer, ids)
        assert "".join(shown) + rest == tokenizer.decode(ids) == data.decode("utf-8", "replace")
        for errors in ("ignore", "backslashreplace"):
            shown, rest = streamed(tokenizer, ids, errors=errors)
            assert "".join(shown) + rest == data.decode("utf-8", errors)


def test_strict_decoding_raises(tokenizer):
    half = tokenizer.encode("é")[:1]
    assert tokenizer.id_to_bytes(half[0]) == b"\xc3"
    assert tokenizer.decode(half) == "\ufffd" == tokenizer.token(half[0])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(half, errors="strict")
    stream = tokenizer.stream(errors="strict")
    assert stream.push(half[0]) == ""
    with pytest.raises(UnicodeDecodeError):
        stream.finish()


def test_special_tokens(tokenizer):
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.n_base) == (2048, 2048, N_BASE)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1792, (1793, 1794), 2047)
    assert tokenizer.token(1794) == "<|im_end|>" and tokenizer.token(1797) == "<|reserved_token_1797|>"
    assert tokenizer.encode("a<|im_end|>") == [*tokenizer.encode("a"), 1794]
    assert max(tokenizer.encode("<|im_end|>", specials=False)) < N_BASE
    ids = [1796, 32, 1806, 33, 1797, 1794]
    assert tokenizer.decode(ids) == (
        "<|im_assistant|>A<|tool_call_argument_begin|>B<|reserved_token_1797|><|im_end|>"
    )
    assert tokenizer.decode(ids, skip_special=True) == "A<|tool_call_argument_begin|>B"
    shown, rest = streamed(tokenizer, ids, skip_special=True)
    assert "".join(shown) + rest == "A<|tool_call_argument_begin|>B"


def test_every_token_decodes_and_ids_may_be_numpy(tokenizer):
    ids = np.arange(tokenizer.vocab_size, dtype=np.int32)
    assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.id_to_bytes(int(i)) for i in ids)
    assert len({tokenizer.id_to_bytes(int(i)) for i in ids}) == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([1, 2048], ValueError, r"ids\[1\] is 2048; a token id must be in 0\.\.2047"),
        ([-1], ValueError, r"ids\[0\] is -1; a token id must be in 0\.\.2047"),
        ([3, 1.0], TypeError, r"ids\[1\] is 1\.0; it must be an integer"),
        (np.zeros((2, 3), np.int64), TypeError, r"ids\[0\] is array"),
        (["a"], TypeError, r"ids\[0\] is 'a'"),
    ],
)
def test_bad_ids(tokenizer, ids, kind, message):
    for call in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(kind, match=message):
            call(ids)


def test_bad_single_ids(tokenizer):
    for call in (tokenizer.token, tokenizer.id_to_bytes, tokenizer.stream().push):
        with pytest.raises(ValueError, match=r"id is 9999; a token id must be in 0\.\.2047"):
            call(9999)


def test_bad_text(tokenizer):
    with pytest.raises(TypeError, match="text is a bytes; it must be a str"):
        tokenizer.encode(b"a")
    with pytest.raises(ValueError, match=r"text\[2\] is U\+D83D, half of a surrogate pair"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\u0301", "字", "aB", "é "])
def test_long_texts_are_cut(tokenizer, judge, unit):
    """Cut by the definition: counters over the characters, one at a time, instead of runs."""
    text = ("x" + unit * (MAX_RUN * 3 // len(unit)) + "y ") * 3
    text = text * (1 + (MAX_PIECE + 1000) // len(text)) if unit in ("a", "é ") else text
    pieces = []
    for start in range(0, len(text), MAX_PIECE):
        part, begin, length = text[start : start + MAX_PIECE], 0, 0
        for i, c in enumerate(part):
            length = length + 1 if i and c.isspace() == part[i - 1].isspace() else 1
            if length > MAX_RUN:
                pieces.append(part[begin:i])
                begin, length = i, 1
        pieces.append(part[begin:])
    expected = [i for piece in pieces for i in tokenizer._encoding.encode_ordinary(piece)]
    assert len(pieces) > 1
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


def test_a_special_token_across_a_cut_is_text(tokenizer):
    name = "<|im_end|>"
    whole = "a " * (MAX_PIECE // 2 - 5)
    assert 1794 in tokenizer.encode(whole + name)
    assert 1794 not in tokenizer.encode(whole + "a" + name)


def folder_with(tmp_path, name, content):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / file, folder / file)
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_a_ranks_file_has_a_largest_size(monkeypatch):
    monkeypatch.setattr("kimi_linear.tokenizer.MAX_RANKS_FILE", 10)
    with pytest.raises(FormatError, match="bytes; at most 10 are read"):
        Tokenizer.from_folder(TINY)


RANKS = (TINY / "tiktoken.model").read_bytes()


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (RANKS + b"?? 1792\nAAAA\nAAAA x\n", ["line 1793 is b'?? 1792'", "line 1794", "line 1795"]),
        (RANKS + b"IQ== 1792\n", ["line 1793 gives the token b'!' a second rank"]),
        (RANKS + b"AAAAAA== 1793\n", ["its 1793 ranks must be 0..1792, each once"]),
        (RANKS + b"AAAAAA== -1\n", ["its 1793 ranks must be 0..1792, each once"]),
        (b"YWI= 0\n", ["it lacks the single bytes [0, 1, 2"]),
        (b"", ["it lacks the single bytes [0, 1, 2"]),
        (b"\x00\xff\xfe" * 10, ["it must be base64, a space, and a rank"]),
        (RANKS.replace(b"IQ== 0\n", b"IA== 0\n", 1), ["a second rank"]),
    ],
)
def test_bad_ranks(tmp_path, content, messages):
    folder = folder_with(tmp_path, "tiktoken.model", content)
    with pytest.raises(FormatError) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder / "tiktoken.model") in str(caught.value)
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages):
        assert message in problem


@pytest.mark.parametrize(
    ("config", "messages"),
    [
        ({"added_tokens_decoder": []}, ["added_tokens_decoder is []; it must map ids to tokens"]),
        ({"added_tokens_decoder": {"5": {"content": "x"}}}, ["'5'; an id of a special token is in"]),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, ["has the id 'x'"]),
        ({"added_tokens_decoder": {"1792": {"content": ""}}}, ["the content of 1792 is ''; it must be text"]),
        ({"added_tokens_decoder": {"1792": 3}}, ["the content of 1792 is None"]),
        (
            {
                "added_tokens_decoder": {"1800": {"content": "a"}, "1801": {"content": "a"}},
                "eos_token": "b",
                "chat_template": 3,
            },
            ["'a' is the name of both 1800 and 1801", "eos_token is 'b'; it must be the name of"],
        ),
    ],
)
def test_bad_tokenizer_config(tmp_path, config, messages):
    folder = folder_with(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(FormatError) as caught:
        Tokenizer.from_folder(folder)
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages):
        assert message in problem


def test_folders_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tiktoken\.model, so no tokenizer; token ids"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(RANKS)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_names_given_as_objects(tmp_path):
    config = {"bos_token": {"content": "<|reserved_token_1800|>"}}
    folder = folder_with(tmp_path, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1800, (), None)
