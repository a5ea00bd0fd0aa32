"""The tokenizer inside a GGUF gives the ids of the folder that the file was made from, or says why it cannot."""

from pathlib import Path

import gguf_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kimi_linear as kl
from kimi_linear.errors import FormatError
from kimi_linear.generate import _stop_ids
from kimi_linear.load.byte_alphabet import BYTES_OF
from kimi_linear.load.gguf import MetaArray
from kimi_linear.load.gguf_tokenizer import read_tokenizer

CONTROL, UNUSED = 3, 5


class Array(MetaArray):
    """An array of the metadata that needs no file."""

    def __init__(self, kind, values):
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "count", len(values))
        object.__setattr__(self, "_values", values)

    def values(self):
        return self._values


def metadata(tokens, types):
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "kimi-k2",
            "tokenizer.ggml.tokens": Array("string", tokens),
            "tokenizer.ggml.token_type": Array("int32", np.array(types, np.int32))}


@pytest.fixture(scope="module")
def parts(tiny_dir):
    tokens, types, *rest = gguf_files.tokenizer_keys(tiny_dir)
    return list(tokens), [int(t) for t in types], rest


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_dir):
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_dir, "BF16")


@pytest.fixture(scope="module")
def ours(file):
    return kl.Model.from_pretrained(file).tokenizer


@pytest.fixture(scope="module")
def theirs(tiny_dir):
    return kl.Tokenizer.from_folder(tiny_dir)


def problems_of(tokens, types):
    with pytest.raises(FormatError) as caught:
        read_tokenizer(metadata(tokens, types), "x.gguf")
    return list(caught.value.problems)


def test_the_alphabet_is_a_bijection():
    from gguf_files import byte_alphabet

    assert {c: chr(b) for b, c in byte_alphabet().items()} == {chr(code): byte for code, byte in BYTES_OF.items()}
    assert len(set(BYTES_OF.values())) == 256


def test_every_token_is_the_same(ours, theirs):
    assert len(ours) == len(theirs) and ours.n_base == theirs.n_base
    assert [ours.id_to_bytes(i) for i in range(len(ours))] == [theirs.id_to_bytes(i) for i in range(len(theirs))]
    assert ours.special_ids == theirs.special_ids
    assert (ours.bos_id, ours.pad_id, ours.eos_ids) == (theirs.bos_id, theirs.pad_id, theirs.eos_ids)
    assert ours.chat_template == theirs.chat_template


def test_ids_of_texts(ours, theirs, tiny_dir):
    text = (tiny_dir / "sample.txt").read_text()
    for sample in (text, "HTTPServer's helloWorld\r\n\n  \t漢字かな 1234567 ñ 'ſ \U0001f600", "",
                   "<|im_end|>x<|reserved_token_1797|>", "[PAD1797]"):
        for specials in (True, False):
            assert ours.encode(sample, specials=specials) == theirs.encode(sample, specials=specials)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_ids_of_any_text(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


def test_what_skipping_leaves_out(ours, theirs):
    ids = list(range(ours.n_base - 3, len(ours)))
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special=True)


def test_chat(ours, theirs):
    turns = [{"role": "user", "content": "Tell me"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)


def test_stops_are_the_union(file, ours, tiny_dir, tmp_path):
    """The file says [EOS], a turn ends with <|im_end|>, and an eot may be a third."""
    model = kl.Model.from_pretrained(file)
    eos, end = ours.special_ids["[EOS]"], ours.special_ids["<|im_end|>"]
    assert model.config.eos_token_ids == (eos,) and _stop_ids(model, model.tokenizer) == {eos, end}
    path = gguf_files.write(tmp_path / "x.gguf", tiny_dir, more=lambda writer: writer.add_eot_token_id(1801))
    model = kl.Model.from_pretrained(path)
    assert model.config.eos_token_ids == (eos, 1801) and _stop_ids(model, model.tokenizer) == {eos, end, 1801}


def test_it_is_built_on_first_use(file):
    model = kl.Model.from_pretrained(file)
    assert not isinstance(model._tokenizer, kl.Tokenizer)
    model([1, 2])
    assert not isinstance(model._tokenizer, kl.Tokenizer)
    assert model.tokenizer is model.tokenizer


def test_it_is_saved_as_a_folder(file, ours, tmp_path, theirs):
    kl.Model.from_pretrained(file).save_pretrained(tmp_path / "folder")
    again = kl.Tokenizer.from_folder(tmp_path / "folder")
    assert again.special_ids == ours.special_ids and again.chat_template == ours.chat_template
    assert again._names == ours._names == theirs._names and again._skipped == theirs._skipped
    assert (tmp_path / "folder" / "tiktoken.model").read_bytes().split() == \
        (Path(kl.__file__).parent / "data/tiny/tiktoken.model").read_bytes().split()


def test_the_list_of_merges_is_not_read(parts):
    tokens, types, _ = parts
    given = metadata(tokens, types)
    plain = read_tokenizer(given, "x").encode("In the beginning")
    assert read_tokenizer(given | {"tokenizer.ggml.merges": "nonsense"}, "x").encode("In the beginning") == plain


def test_what_makes_exact_ids_impossible(parts):
    tokens, types, _ = parts
    n = types.index(CONTROL)

    def told(message, tokens=tokens, types=types):
        (problem,) = problems_of(tokens, types)
        assert message in problem, problem

    place = tokens.index("A")
    told("1 single bytes are missing, the first 0x41", [*tokens[:place], "AAAAAAAA", *tokens[place + 1 :]])
    told(f"token 300 is spelled as token {place} is", [*tokens[:300], "A", *tokens[301:]])
    told("token 300 is empty", [*tokens[:300], "", *tokens[301:]])
    told("token 300 is 'a b', which is not spelled in the alphabet", [*tokens[:300], "a b", *tokens[301:]])
    told(f"token {n + 5}, '[PAD{n + 5}]', has the type 1 behind the first special token, {n}", tokens,
         [*types[: n + 5], 1, *types[n + 6 :]])
    told(f"token {n + 1} is '[BOS]', the name of {n}, too", [*tokens[: n + 1], "[BOS]", *tokens[n + 2 :]])
    told(f"has {len(tokens)} entries and tokenizer.ggml.token_type {len(tokens) - 1}", tokens, types[1:])
    told("among its 0 base tokens 256 single bytes are missing", tokens, [CONTROL] * len(tokens))


@pytest.mark.parametrize(("key", "value", "message"), [
    ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model is 'llama'; only 'gpt2' is read"),
    ("tokenizer.ggml.pre", "llama-bpe", "tokenizer.ggml.pre is 'llama-bpe'; read are 'kimi-k2', 'qwen2', 'qwen35'"),
    ("tokenizer.ggml.tokens", "x", "tokenizer.ggml.tokens is 'x'; it must be an array of string"),
    ("tokenizer.ggml.token_type", None, "tokenizer.ggml.token_type is None; it must be an array of int32"),
    ("tokenizer.chat_template", 3, "tokenizer.chat_template is 3; it must be text"),
])
def test_other_tokenizers_are_named(parts, key, value, message):
    tokens, types, _ = parts
    with pytest.raises(FormatError, match="x.gguf") as caught:
        read_tokenizer(metadata(tokens, types) | {key: value}, "x.gguf")
    assert message in caught.value.problems[0]


def test_a_model_with_such_a_tokenizer_still_reads_ids(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.setattr(gguf_files, "byte_alphabet", lambda: {b: f" {b}" for b in range(256)})
    model = kl.Model.from_pretrained(gguf_files.write(tmp_path / "x.gguf", tiny_dir))
    assert model([1, 2]).shape == (2, 2048)
    with pytest.raises(FormatError, match="its rank cannot be recovered"):
        _ = model.tokenizer
