"""JSON that comes from outside: no NaN, no repeated keys, no depth and no size that exhaust memory."""

import json
import os
from pathlib import Path

from ..errors import FormatError

MAX_FILE = 100_000_000  # bytes; the largest index of a published checkpoint is about 10 MiB


class Object(dict):
    """A JSON object that remembers which of its keys were written more than once."""

    __slots__ = ("repeated",)


def _object(pairs: list[tuple[str, object]]) -> Object:
    result = Object(pairs)
    seen: set[str] = set()
    result.repeated = ()
    if len(result) != len(pairs):
        result.repeated = tuple(dict.fromkeys(k for k, _ in pairs if k in seen or seen.add(k)))
    return result


def _refuse_constant(text: str):
    raise ValueError(f"it holds {text}, which JSON does not have")


def parse(data: bytes) -> object:
    """Value of a JSON text in UTF-8; its objects are `Object`.

    Raises
    ------
    ValueError
        One clause that says why it is not JSON, made to follow a name and a colon.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def show(value: object, width: int = 80) -> str:
    """A value for an error message: its repr, cut to `width` characters, whatever its depth."""
    try:
        text = repr(value)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= width else text[: width - 3] + "..."


def quote(name: str) -> str:
    """A name of a file's, for an error message."""
    return show(name, 200)


def is_there(path: str | os.PathLike) -> bool:
    """Whether there is a file of that name.

    Raises
    ------
    FormatError
        If something else has the name: a folder, a pipe, a link that leads nowhere.
    OSError
        If the folder may not be looked into.
    """
    if os.path.isfile(path):
        return True
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name with a zero byte
        return False
    what = "a folder" if os.path.isdir(path) else "no regular file" if os.path.exists(path) else \
        f"a link to {os.readlink(path)}, where nothing is"
    raise FormatError(f"it is {what}; it must be a file", str(path))


def read_limited(path: str | os.PathLike) -> bytes:
    """The bytes of a small file; those of a device or of /proc are counted as they come.

    Raises
    ------
    FileNotFoundError
        If there is none.
    FormatError
        If it is no regular file, or larger than `MAX_FILE`.
    """
    is_there(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(MAX_FILE + 1) if size <= MAX_FILE else b""
    size = max(size, len(data))
    if size > MAX_FILE:
        raise FormatError(f"it has {size} bytes; at most {MAX_FILE} are read", str(path))
    return data


def load_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises
    ------
    FormatError
        If the file is larger than `MAX_FILE`, is not JSON, is not an object, or writes a key twice.
    """
    data = read_limited(path)
    try:
        value = parse(data)
    except ValueError as error:
        raise FormatError(str(error), str(path)) from None
    if not isinstance(value, Object):
        raise FormatError(f"it holds a JSON {type(value).__name__}; it must hold an object", str(path))
    try:
        repeated = sorted(set(_repeated_keys(value)))
    except RecursionError:  # where the parser goes deeper than Python does
        raise FormatError("its JSON is nested too deep", str(path)) from None
    if repeated:
        raise FormatError([f"the key {key!r} is there twice" for key in repeated], str(path))
    return value


def _repeated_keys(value: object):
    if isinstance(value, Object):
        yield from value.repeated
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _repeated_keys(item)
