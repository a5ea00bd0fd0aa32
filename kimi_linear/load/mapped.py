"""A file mapped read-only, which remembers what it was when it was opened."""

import contextlib
import ctypes
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from ..errors import FormatError

PIECE = 32 << 20     # bytes read at once: Ctrl-C ends between two
LARGE = 256 << 20    # bytes missing that are worth reading before they are asked for


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
        self.path = Path(path).absolute()  # the working folder may become another
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

    def in_memory(self) -> np.ndarray | None:
        """Which pages of the file lie in memory, as bools, by mincore; None where the system does not say."""
        n_bytes = len(self.mapping)
        flags = np.empty(-(-n_bytes // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(self.mapping, np.uint8).ctypes.data
        try:
            failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes),
                                               flags.ctypes.data_as(ctypes.c_void_p))
        except (OSError, AttributeError):
            return None
        return None if failed else (flags & 1).astype(bool)

    def cold_pieces(self) -> list[tuple[int, int]]:
        """(offset, bytes) of the pieces of `PIECE` bytes with a page that does not lie in memory."""
        pages = self.in_memory()
        if pages is None or pages.all():
            return []
        step = PIECE // mmap.PAGESIZE
        return [(at * mmap.PAGESIZE, min(PIECE, len(self.mapping) - at * mmap.PAGESIZE))
                for at in range(0, len(pages), step) if not pages[at : at + step].all()]


def read_ahead(files, room, bar) -> int:
    """Read what large files lack in memory in one go, piece after piece, instead of a page at a time as it is used.

    Nothing is read where less than `LARGE` bytes are missing, or less than half of the files, or where the files do
    not fit `room` bytes: what came first would be gone again when it is used. Errors are left to the use.

    Parameters
    ----------
    files : sequence of MappedFile
    room : int
        Bytes of memory that the files may take.
    bar : callable
        Given the bytes to read, a context with ``update(n_bytes)``, as a tqdm.

    Returns
    -------
    int
        Bytes that were read.
    """
    size = sum(len(file.mapping) for file in files)
    if size < LARGE or size > room:
        return 0
    todo = [(file, piece) for file in files for piece in file.cold_pieces()]
    missing = sum(n for _, (_, n) in todo)
    if missing < max(LARGE, size / 2):
        return 0
    done = 0
    with contextlib.suppress(OSError), bar(missing) as shown:
        for file in files:
            for n in _read(file.path, [piece for its, piece in todo if its is file]):
                shown.update(n)
                done += n
    return done


def _read(path, pieces):
    """Reads pieces of a file, the next one already asked for; gives the bytes of each."""
    buffer = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        for (at, n), (following, n_following) in zip(pieces, [*pieces[1:], (0, 0)], strict=True):
            if n_following and hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(file.fileno(), following, n_following, os.POSIX_FADV_WILLNEED)
            os.preadv(file.fileno(), [memoryview(buffer)[:n]], at)
            yield n


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def cut_short(ends: dict[str, int], n_tensors: int, size: int) -> list[str]:
    """One sentence about the tensors that end beyond the file; `ends` has the byte at which each would."""
    if not ends:
        return []
    first, last = next(iter(ends)), max(ends.values())
    who = f"{first} ends" if len(ends) == 1 else f"{len(ends):,} of {n_tensors:,} tensors, the first {first}, end"
    return [f"{who} beyond the file: it has {size:,} bytes and should have {last:,}; it is cut short or damaged"]


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
