"""A file mapped read-only, which remembers what it was when it was opened."""

import mmap
import os
import stat
from pathlib import Path

from ..errors import FormatError


class MappedFile:
    """The base of the formats' files.

    Parameters
    ----------
    path : str or path
    least : int
        Bytes that a file of the format has at least.
    kind : str
        The format's name with its article, for messages.

    Attributes
    ----------
    path : Path
    mapping : mmap
        The whole file, read-only. It is unmapped when the last array on it is gone.
    """

    def __init__(self, path: str | os.PathLike, least: int, kind: str):
        self.path = Path(path)
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise FormatError("it is not a regular file", str(self.path))
        with open(self.path, "rb") as file:
            self._stamp = _stamp(os.fstat(file.fileno()))
            if self._stamp[0] < least:
                raise FormatError(f"it has {self._stamp[0]} bytes; {kind} has at least {least}", str(self.path))
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def changes(self) -> str | None:
        """What differs on disk from the file that was mapped, as a sentence; None if nothing does."""
        try:
            now = _stamp(os.stat(self.path))
        except OSError as error:
            return f"{self.path} can no longer be read: {error.strerror}."
        for what, before, after in zip(("size", "mtime_ns", "inode"), self._stamp, now, strict=True):
            if before != after:
                return f"{self.path} changed after it was opened: its {what} was {before} and is now {after}."
        return None


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def overlaps(tensors) -> list[str]:
    """A sentence for each tensor that begins before those in front of it end.

    Parameters
    ----------
    tensors : iterable of TensorView
        Of one file.
    """
    problems = []
    reached, last = 0, ""
    for t in sorted((t for t in tensors if t.nbytes), key=lambda t: (t.offset, t.nbytes)):
        if t.offset < reached:
            n_shared = min(reached, t.offset + t.nbytes) - t.offset
            problems.append(f"{last!r} and {t.name!r} overlap by {n_shared} bytes from byte {t.offset}")
        if t.offset + t.nbytes > reached:
            reached, last = t.offset + t.nbytes, t.name
    return problems
