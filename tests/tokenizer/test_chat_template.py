"""Chat templates: the packaged one, the published test vector's shape, what templates may use, and errors."""

import json
import shutil
from pathlib import Path

import pytest

from kimi_linear.errors import FormatError
from kimi_linear.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "kimi_linear" / "data" / "tiny"
USER = {"role": "user", "content": "Tell me about the french revolution."}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TINY)


def with_template(tokenizer, template):
    other = Tokenizer.from_folder(TINY)
    other.chat_template = template
    return other


def test_shape_of_the_published_vector(tokenizer):
    """im_user user im_middle content im_end im_assistant assistant im_middle: no BOS, no system prompt."""
    text = tokenizer.apply_chat_template([USER])
    base = tokenizer.n_base
    assert tokenizer.encode(text) == [
        base + 3, *tokenizer.encode("user"), base + 17, *tokenizer.encode(USER["content"]), base + 2,
        base + 4, *tokenizer.encode("assistant"), base + 17,
    ]  # fmt: skip
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=False) == (
        f"<|im_user|>user<|im_middle|>{USER['content']}<|im_end|>"
    )


def test_conversation_with_tools(tokenizer):
    tools = [{"type": "function", "function": {"name": "größe", "description": "<b> & 'it'"}}]
    call = {"id": "functions.f:0", "function": {"name": "f", "arguments": {}}}
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": [{"type": "text", "text": x} for x in "42"]},
        ],
        tools=tools,
        add_generation_prompt=False,
    )
    assert text == (
        '<|im_system|>tool_declare<|im_middle|>[{"type": "function", "function": {"name": "größe", '
        '"description": "<b> & \'it\'"}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        f"<|im_user|>user<|im_middle|>{USER['content']}<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|im_end|>"
        "<|im_system|>f<|im_middle|>42<|im_end|>"
    )


def test_what_templates_may_use(tokenizer):
    def render(template):
        return with_template(tokenizer, template).apply_chat_template([USER])

    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render('{{ {"b": "<é>", "a": 1} | tojson }}') == '{"b": "<é>", "a": 1}'
    assert render('{{ [1, 2] | tojson(indent=1, separators=(",", ":")) }}') == "[\n 1,\n 2\n]"
    assert render("{{ bos_token }}{{ eos_token }}{{ pad_token }}") == "[BOS][EOS][PAD]"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{{ tools is none }}{{ add_generation_prompt }}") == "TrueTrue"


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        ("a\n{% if %}", FormatError, "The chat template is wrong at line 2: "),
        ("\n\n{{ raise_exception('no system here') }}", ValueError, "failed at line 3: no system here"),
        ("\n{{ messages[0].x.y }}", ValueError, "failed at line 2: 'dict object' has no attribute 'x'"),
        ("{{ 1 / 0 }}", ValueError, "failed at line 1: division by zero"),
        ("\n{{ ''.__class__.__mro__ }}", ValueError, "failed at line 2: .*unsafe"),
        ("{{ messages.append(1) }}", ValueError, "failed at line 1: access to attribute .* is unsafe"),
        ("{{ messages[0].pop('role') }}", ValueError, "failed at line 1: access to attribute .* is unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", ValueError, "failed at line 1: .*[Rr]ange"),
        ("{% include '/etc/hostname' %}", ValueError, "failed at line 1"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ValueError, "recursion"),
    ],
)
def test_template_errors_name_the_line(tokenizer, template, kind, message):
    with pytest.raises(kind, match=message):
        with_template(tokenizer, template).apply_chat_template([USER])


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ("hello", TypeError, "messages is 'hello'; it must be a list of dicts with role and content"),
        ({"role": "user"}, TypeError, "messages is {'role': 'user'}; it must be a list"),
        ([], ValueError, "messages is empty"),
        ([USER, "hello"], TypeError, r"messages\[1\] is 'hello'; it must be a dict"),
        ([{"content": "x"}], ValueError, r"messages\[0\]\['role'\] is None; it must be one of"),
        ([{"role": "asistant", "content": "x"}], ValueError, r"\['role'\] is 'asistant'; it must be"),
        ([{"role": ["user"], "content": "x"}], ValueError, r"\['role'\] is \['user'\]"),
        ([{"role": "user"}], ValueError, r"messages\[0\]\['content'\] is missing; only a message"),
        ([{"role": "user", "content": 3}], TypeError, r"\['content'\] is 3; it must be text or a list"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], TypeError, "text only"),
        ([{"role": "user", "content": [{"type": "image"}]}], TypeError, r"\['content'\]\[0\] is .*text only"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], TypeError, r"\['content'\]\[0\] is"),
    ],
)
def test_bad_messages(tokenizer, messages, kind, message):
    with pytest.raises(kind, match=message):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("tools", "kind", "message"),
    [
        ({"a": 1}, TypeError, "tools is {'a': 1}; it must be a list of dicts"),
        (["f"], TypeError, r"tools\[0\] is 'f'; it must be a dict"),
        ([{"f": {1, 2}}], ValueError, "tools cannot be written as JSON"),
        ([{"f": float("nan")}], ValueError, "tools cannot be written as JSON"),
    ],
)
def test_bad_tools(tokenizer, tools, kind, message):
    with pytest.raises(kind, match=message):
        tokenizer.apply_chat_template([USER], tools=tools)


def test_options_reach_the_template(tokenizer):
    other = with_template(tokenizer, "{{ bos_token }}{{ enable_thinking | default('unset') }}{{ messages[0].role }}")
    bos = other._names["bos_token"]
    assert other.apply_chat_template([USER]) == f"{bos}unsetuser"
    assert other.apply_chat_template([USER], template_options={"enable_thinking": False}) == f"{bos}Falseuser"
    assert other.apply_chat_template([USER], template_options={"bos_token": "B"}) == "Bunsetuser"
    for options, kind, words in ((3, TypeError, "template_options is 3; it must be a dict"),
                                 ({3: 3}, TypeError, "template_options has the key 3; it must be text"),
                                 ({"tools": []}, ValueError, "template_options has the key 'tools'; .* are not opt")):
        with pytest.raises(kind, match=words):
            other.apply_chat_template([USER], template_options=options)


def test_tags_for_training_are_passed_over(tokenizer):
    template = ("{% for m in messages %}{% set x = 1 %}\n{% generation %}\n{{ m.role }}{% set x = 2 %}\n"
                "{%- endgeneration %}{{ x }}{% endfor %}")
    assert with_template(tokenizer, template).apply_chat_template([USER]) == "user1"
    with pytest.raises(FormatError, match="The chat template is wrong at line 1"):
        with_template(tokenizer, "{% generation %}").apply_chat_template([USER])


def test_the_template_decides_what_a_developer_is(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "developer", "content": "Be brief."}, USER])
    assert text.startswith("<|im_system|>developer<|im_middle|>Be brief.<|im_end|>")
    refusing = with_template(tokenizer, "{% if messages[0].role != 'user' %}{{ raise_exception('who?') }}{% endif %}")
    with pytest.raises(ValueError, match="The chat template failed at line 1: who?"):
        refusing.apply_chat_template([{"role": "developer", "content": "Be brief."}])


@pytest.mark.parametrize("templates, words", [
    ([{"name": ["x"], "template": "A"}], r"chat_template\[0\] is .*; it must have a name and a template, which are"),
    ([{"name": "default", "template": "A"}, 3], r"chat_template\[1\] is 3; it must have a name"),
    ([{"name": "a", "template": "A"}, {"name": "b", "template": "B"}],
     "chat_template has templates named 'a', 'b'; one must be named 'default'"),
])
def test_lists_of_templates_that_are_none(tmp_path, templates, words):
    for file in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, tmp_path / file)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(FormatError, match=words):
        Tokenizer.from_folder(tmp_path)


def test_where_the_template_comes_from(tmp_path):
    for file in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(TINY / file, tmp_path / file)
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([USER])
    for config in ('{"chat_template": "A"}', '{"chat_template": [{"name": "default", "template": "A"}]}',
                   '{"chat_template": [{"name": "only", "template": "A"}]}',
                   '{"chat_template": [{"name": "x", "template": "B"}, {"name": "default", "template": "A"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert Tokenizer.from_folder(tmp_path).apply_chat_template([USER]) == "A"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template([USER]) == "B"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: it is not UTF-8 at byte 0"):
        Tokenizer.from_folder(tmp_path)
