"""The tokenizer once more, in plain Python: no regex, no tiktoken. The judge of `kimi_linear.tokenizer`.

The splitter goes from left to right without backtracking; the merging is rank-BPE by its definition.
Unicode classes come from `unicodedata`, except the Script property Han, which it lacks.
"""

import unicodedata
from functools import cache

# Script=Han in Scripts.txt of the Unicode Character Database, assigned ranges up to version 15.
HAN = [
    (0x2E80, 0x2E99), (0x2E9B, 0x2EF3), (0x2F00, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007),
    (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFA6D),
    (0xFA70, 0xFAD9), (0x16FE2, 0x16FE3), (0x16FF0, 0x16FF1), (0x20000, 0x2A6DF), (0x2A700, 0x2B738),
    (0x2B740, 0x2B81D), (0x2B820, 0x2CEA1), (0x2CEB0, 0x2EBE0), (0x2F800, 0x2FA1D), (0x30000, 0x3134A),
    (0x31350, 0x323AF),
]  # fmt: skip
WHITE_SPACE = frozenset(
    [*range(0x9, 0xE), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]
    + [0x205F, 0x3000]
)
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")


@cache
def classes(c):
    """Classes of a character: a set of han, U, L, letter, number, space, newline."""
    category, code = unicodedata.category(c), ord(c)
    result = set()
    if any(a <= code <= b for a, b in HAN):
        result.add("han")
    else:
        both = category in ("Lm", "Lo") or category[0] == "M"
        if both or category in ("Lu", "Lt"):
            result.add("U")
        if both or category == "Ll":
            result.add("L")
    if category[0] == "L":
        result.add("letter")
    if category[0] == "N":
        result.add("number")
    if code in WHITE_SPACE:
        result.add("space")
    if c in "\r\n":
        result.add("newline")
    return frozenset(result)


def run(text, i, accepted):
    """End of the longest run from i of characters that `accepted` accepts."""
    while i < len(text) and accepted(classes(text[i])):
        i += 1
    return i


def capitals_then_small(text, s):
    """End of U* L+ from s, or None: the last L of the U-run may be taken back for L+."""
    m = run(text, s, lambda c: "U" in c)
    for k in range(min(m, len(text) - 1), s - 1, -1):
        if "L" in classes(text[k]):
            return run(text, k, lambda c: "L" in c)
    return None


def capitals(text, s):
    """End of U+ L* from s, or None."""
    m = run(text, s, lambda c: "U" in c)
    return None if m == s else run(text, m, lambda c: "L" in c)


def contraction(text, i):
    """End of a contraction at i, or i; the long s (U+017F) folds to s."""
    if text[i : i + 1] == "'":
        rest = text[i + 1 : i + 3].lower().replace("ſ", "s")
        for tail in CONTRACTIONS:
            if rest.startswith(tail):
                return i + 1 + len(tail)
    return i


def word(text, i):
    first = classes(text[i])
    starts = [i] if first & {"newline", "letter", "number"} else [i + 1, i]
    for attempt in (capitals_then_small, capitals):
        for s in starts:
            end = attempt(text, s)
            if end is not None:
                return contraction(text, end)
    return None


def symbols(text, i):
    """One optional space, symbols, line ends; or None."""
    s = i + (text[i] == " ")
    end = run(text, s, lambda c: not c & {"space", "letter", "number"})
    return None if end == s else run(text, end, lambda c: "newline" in c)


def space(text, i):
    end = run(text, i, lambda c: "space" in c)
    newlines = [k for k in range(i, end) if text[k] in "\r\n"]
    if newlines:
        return newlines[-1] + 1
    return end if end - i == 1 or end == len(text) else end - 1


def piece_end(text, i):
    if "han" in classes(text[i]):
        return run(text, i, lambda c: "han" in c)
    if (end := word(text, i)) is not None:
        return end
    if "number" in classes(text[i]):
        return min(i + 3, run(text, i, lambda c: "number" in c))
    end = symbols(text, i)
    return space(text, i) if end is None else end


def split(text):
    pieces, i = [], 0
    while i < len(text):
        end = piece_end(text, i)
        pieces.append(text[i:end])
        i = end
    return pieces


class Oracle:
    """ranks: bytes -> id; specials: name -> id."""

    def __init__(self, ranks, specials):
        self.ranks, self.specials = ranks, specials
        self.merged = cache(self._merge)

    def _merge(self, piece):
        """Ids of one pre-token: merge the adjacent pair of lowest rank, leftmost first, to the end."""
        parts = [bytes([b]) for b in piece]
        while True:
            joined = [a + b for a, b in zip(parts, parts[1:])]
            pairs = [(self.ranks[pair], k) for k, pair in enumerate(joined) if pair in self.ranks]
            if not pairs:
                return [self.ranks[part] for part in parts]
            k = min(pairs)[1]
            parts[k : k + 2] = [joined[k]]

    def encode_plain(self, text):
        return [i for piece in split(text) for i in self.merged(piece.encode("utf-8"))]

    def encode(self, text):
        """With special tokens: the leftmost name first. No name begins another, so there are no ties."""
        ids, begin = [], 0
        while True:
            found = [(at, name) for name in self.specials if (at := text.find(name, begin)) >= 0]
            if not found:
                return ids + self.encode_plain(text[begin:])
            at, name = min(found)
            ids += [*self.encode_plain(text[begin:at]), self.specials[name]]
            begin = at + len(name)
