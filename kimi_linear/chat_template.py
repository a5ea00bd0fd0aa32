"""Chat templates: a conversation as the text that a model was trained on, by the template that its files have.

A template is a text for jinja2, run in its sandbox, with the options, filter and functions that Hugging Face templates
are written for.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from .errors import FormatError
from .load.strict_json import is_there, read_limited, show

__all__ = ["ROLES", "read_template", "render_chat"]

ROLES = ("system", "developer", "user", "assistant", "tool")
GIVEN = ("messages", "tools", "add_generation_prompt")  # variables that no option may be


def read_template(folder: Path, config: Mapping, problems: list[str]) -> str | None:
    """chat_template.jinja, else the config's "chat_template": a text, or of a list the one named default."""
    path = folder / "chat_template.jinja"
    if is_there(path):
        try:
            return read_limited(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"it is not UTF-8 at byte {error.start}", str(path)) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        return _of_list(template, problems) if template else None
    if template is not None and not isinstance(template, str):
        problems.append(f"chat_template is {show(template)}; it must be text")
        return None
    return template


def _of_list(templates: list, problems: list[str]) -> str | None:
    """Of named templates the default, or the only one."""
    named: dict[str, str] = {}
    for i, entry in enumerate(templates):
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            problems.append(f"chat_template[{i}] is {show(entry)}; it must have a name and a template, which are text")
            return None
        named[name] = text
    if "default" not in named and len(named) > 1:
        problems.append(f"chat_template has templates named {', '.join(map(show, named))}; one must be named 'default'")
        return None
    return named.get("default", text)


def render_chat(template: str, messages: Sequence[Mapping], tools: Sequence[Mapping] | None,
                add_generation_prompt: bool, options: Mapping | None, names: Mapping[str, str]) -> str:
    """The text of a conversation; arguments are those of `Tokenizer.apply_chat_template`, `names` special tokens."""
    variables = {"messages": _checked_messages(messages), "tools": _checked_tools(tools),
                 "add_generation_prompt": bool(add_generation_prompt)}
    return _render(template, {**names, **_checked_options(options), **variables})


def _checked_options(options: Mapping | None) -> Mapping:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"template_options is {show(options)}; it must be a dict from variable to value.")
    for name in options:
        if not isinstance(name, str):
            raise TypeError(f"template_options has the key {show(name)}; it must be text, the name of a variable.")
        if name in GIVEN:
            raise ValueError(f"template_options has the key {name!r}; {', '.join(GIVEN)} are not options.")
    return options


def _checked_messages(messages: Sequence[Mapping]) -> list[dict]:
    """Copies of the messages, their content as one text."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages is {show(messages)}; it must be a list of dicts with role and content.")
    if not messages:
        raise ValueError("messages is empty; there must be at least one.")
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _checked_message(where: str, message: Mapping) -> dict:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} is {show(message)}; it must be a dict with role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}['role'] is {show(role)}; it must be one of {', '.join(ROLES)}.")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"{where}['content'] is missing; only a message with tool_calls may leave it out.")
    return {**message, "content": _content_text(f"{where}['content']", content)}


def _content_text(where: str, content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise TypeError(f"{where} is {show(content)}; it must be text or a list of text parts.")
    for i, part in enumerate(content):
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            rule = 'it must be {"type": "text", "text": ...}: this model reads text only'
            raise TypeError(f"{where}[{i}] is {show(part)}; {rule}.")
    return "".join(part["text"] for part in content)


def _checked_tools(tools: Sequence[Mapping] | None) -> list | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise TypeError(f"tools is {show(tools)}; it must be a list of dicts.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{i}] is {show(tool)}; it must be a dict.")
    try:
        return json.loads(json.dumps(list(tools), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"tools cannot be written as JSON: {error}.") from None


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter ``tojson`` that chat templates expect: JSON for a prompt, without escapes for HTML."""
    layout = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """The tags ``{% generation %}``, which mark an assistant's words for training: what is between them, as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Options, filter and functions that Hugging Face templates are written for, in jinja2's sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _render(template: str, variables: Mapping[str, object]) -> str:
    try:
        return _environment().from_string(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"The chat template is wrong at line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template can raise whatever its expressions do
        line = _template_line(error)
        where = "" if line is None else f" at line {line}"
        what = str(error) or type(error).__name__
        raise ValueError(f"The chat template failed{where}: {what}") from error


def _template_line(error: BaseException) -> int | None:
    """Line of the template in which the exception rose; jinja2 puts it into the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
