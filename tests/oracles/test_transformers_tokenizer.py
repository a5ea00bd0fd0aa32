"""transformers' tokenizer of the packaged folder: merges made anew from the ranks, run by another library."""

import json

import numpy as np
import pytest
from conftest import DATA, TINY
from oracle import ours
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from kimi_linear.tokenizer import PATTERN

pytestmark = pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")    # in published configs


@pytest.fixture(scope="module")
def theirs():
    """As loaded, but cut by the published pattern: transformers has one pattern for every tiktoken.model."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def random_texts(n):
    """Words, cases, digits, spaces, Han and other scripts, marks, emoji and specials, in any order."""
    rng = np.random.default_rng(5)
    pieces = ["the", "Lord", "LORD", "camelCase", "don't", "WE'LL", "'S", " ", "  ", "\n", "\r\n", "\t", "7", "2024",
              "中文", "漢字", "の", "한국", "é", "e\u0301", "Ñ", "ǅ", "ß", "ı", "😀", "👩\u200d👧", "…", "—", "(", "_x",
              "<|im_end|>", "<|im_user|>", "[BOS]", "<|im_", "\u00a0", "\u3000", "٣", "ⅷ", "़", "שלום", "مرحبا"]
    return ["".join(rng.choice(pieces, rng.integers(1, 20))) for _ in range(n)]


def test_ids_of_random_texts(theirs):
    tokenizer = ours("tiny").tokenizer
    for text in random_texts(3000):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert tokenizer.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_ids_of_the_heldout_text(theirs):
    text = (DATA / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours("tiny").tokenizer.encode(text) == ids
    assert len(ids) == json.loads((DATA / "tiny" / "expected.json").read_text())["heldout"]["tokens"]
    plain = AutoTokenizer.from_pretrained(TINY)                 # their own pattern: the same for plain English
    assert plain.encode(text[:20000], add_special_tokens=False) == ours("tiny").tokenizer.encode(text[:20000])


def test_special_tokens(theirs):
    tokenizer = ours("tiny").tokenizer
    assert len(theirs) == tokenizer.vocab_size
    named = {theirs.convert_ids_to_tokens(i): i for i in theirs.added_tokens_decoder}
    assert all(tokenizer.special_ids[name] == i for name, i in named.items()) and len(named) >= 10
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
    assert theirs.eos_token_id in tokenizer.eos_ids


CALL = {"id": "functions.find:0", "type": "function",
        "function": {"name": "find", "arguments": '{"word": "größe <b> & \'x\'"}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Füge <i> & 'q' \"z\"", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}]
CHATS = {
    "one": [{"role": "user", "content": "Who made the heaven?"}],
    "turns": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  hi\n"},
              {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "中文 <|im_end|>"}],
    "tools": [{"role": "user", "content": "find it"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
              {"role": "tool", "name": "find", "tool_call_id": "functions.find:0", "content": "42 & more"},
              {"role": "assistant", "content": "It is there."}],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "with tools"])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_template(theirs, chat, prompt, tools):
    tokenizer = ours("tiny").tokenizer
    text = tokenizer.apply_chat_template(CHATS[chat], tools=tools, add_generation_prompt=prompt)
    rendered, _ = render_jinja_template([CHATS[chat]], tools=tools, chat_template=tokenizer.chat_template,
                                        add_generation_prompt=prompt, **theirs.special_tokens_map)
    assert text == rendered[0]
    whole = theirs.apply_chat_template(CHATS[chat], tools=tools, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.encode(text) == whole
