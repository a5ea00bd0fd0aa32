"""Exceptions of the package that are not Python's own. A message is a sentence that names what is wrong."""

from collections.abc import Iterable

_SHOWN = 20  # problems printed in the message; `problems` always holds all of them


class FormatError(ValueError):
    """A file or folder does not hold what its format asks for; every problem found is listed.

    Parameters
    ----------
    problems : str or iterable of str
        One sentence each.
    where : str, optional
        The file or folder that all of them concern; it opens the message.

    Attributes
    ----------
    problems : tuple of str
    where : str
    """

    def __init__(self, problems: str | Iterable[str], where: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        self.where = str(where)
        super().__init__(self.problems, self.where)

    def __str__(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        if len(self.problems) == 1:
            return prefix + self.problems[0]
        lines = [f"{prefix}{len(self.problems)} problems"]
        lines += [f"  - {p}" for p in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  - and {len(self.problems) - _SHOWN} more, in the exception's `problems`")
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, 160 characters of it at most."""
    return (str(error).strip().splitlines() or [""])[0][:160]


class DeviceError(RuntimeError):
    """A device refused or failed: a kernel launch, a copy, an allocation on it."""
