"""GPT-2's letters for bytes, in which vocabularies of byte-level BPE are spelled."""


def _alphabet() -> dict[int, str]:
    """Character -> byte (as a character below 256).

    Printable bytes stand for themselves, the 68 others, in order, for U+0100 onwards. Source: gpt-2, encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {0x100 + i: chr(b) for i, b in enumerate(others)}


class _Alphabet(dict):
    """For str.translate: a character that is no letter of the alphabet becomes one that latin-1 lacks."""

    def __missing__(self, code: int) -> str:
        return "\uffff"


BYTES_OF = _Alphabet(_alphabet())
LETTERS = {ord(byte): chr(letter) for letter, byte in _alphabet().items()}  # the other way, for str.translate


def bytes_of(token: str) -> bytes:
    """The bytes of a token in the alphabet; none where it is not spelled in it."""
    try:
        return token.translate(BYTES_OF).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def spelled(token: bytes) -> str:
    """A token in the alphabet."""
    return token.decode("latin-1").translate(LETTERS)
