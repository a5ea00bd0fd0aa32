"""Names that a caller gives: one of those that are there, or a sentence that lists them and says which was meant."""

import difflib

__all__ = ["Named", "choice", "listed", "meant", "near"]


def near(name, names, n=3):
    """Up to `n` of `names` that are like `name`, the nearest first; the first `n` where none is."""
    names = [str(known) for known in names]
    return _like(str(name), names, n, 0.3) or names[:n]


def meant(name, names):
    """``; did you mean 'Q4_K'?``, or nothing where no name is near."""
    names = [known for known in names if isinstance(known, str)]
    found = _like(name, names, 1, 0.6) if isinstance(name, str) else ()
    return f"; did you mean {found[0]!r}?" if found else ""


def _like(name, names, n, cutoff):
    """Those of `names` that differ little from `name`, capitals aside."""
    folded = {}
    for known in names:
        folded.setdefault(known.casefold(), known)
    return [folded[found] for found in difflib.get_close_matches(name.casefold(), folded, n, cutoff)]


def listed(names, most=4):
    """``a, b, c, d and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choice(x, name, choices):
    """`x`, one of `choices` (names, or None); ValueError lists them."""
    if not (x is None or isinstance(x, str)) or x not in choices:
        hint = meant(x, choices) if len(choices) > 1 else ""
        raise ValueError(f"{name} is {x!r:.40}; it must be one of {', '.join(map(repr, choices))}{hint}")
    return x


class Named(dict):
    """A dict whose KeyError is a sentence.

    Parameters
    ----------
    what : str
        What a key names, in the singular, as "a project of kimi_linear.conventions".
    entries : mapping
    """

    def __init__(self, what, entries):
        super().__init__(entries)
        self._what = what

    def __repr__(self):
        names = ", ".join(map(str, self)) if len(self) <= 24 else ", ".join([*map(str, self)][:6]) + ", ..."
        return f"{type(self).__name__}({len(self)}, each {self._what}: {names})"

    def __missing__(self, key):
        names = [*self] if len(self) <= 24 else [*near(key, self), "..."]
        raise KeyError(f"{key!r:.60} is not {self._what}; there are {', '.join(names)}{meant(key, self)}")
