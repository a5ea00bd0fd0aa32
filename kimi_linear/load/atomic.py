"""Files that take their names only when they are whole: one alone, or those of a folder together."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

NO_LINKS = {errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes its name only when it is whole and on the disk.

    It is written beside `path` under a name of its own; where `path` is a link, beside the file that the link leads to,
    which is then replaced. Leaving the block by an exception, Ctrl-C included, removes it and leaves what was under
    `path` as it was. A file that replaces another has its permissions.

    Raises
    ------
    IsADirectoryError
        If `path` is a folder.
    FileExistsError
        If it is a device, a pipe or a socket; or a file, and `overwrite` is False, also one that came meanwhile.
    OSError
        If it cannot be written.
    """
    given = Path(path)
    mode, path = _permissions(given, overwrite), Path(os.path.realpath(given))
    draft = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    except OSError as error:  # by the name that was asked for
        raise OSError(error.errno, error.strerror, str(given)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode not in (None, stat.S_IMODE(os.fstat(descriptor).st_mode)):
                os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        if overwrite:
            os.replace(draft, path)
        else:
            _publish(draft, path, given)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(draft)):
            raise OSError(error.errno, os.strerror(error.errno), str(given)) from error  # a write names no file
        raise
    sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Write a text in UTF-8, lines as they are, through `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", errors))


def _permissions(path: Path, overwrite: bool) -> int | None:
    """The permissions of the file that is there, None where there is none; an error where it cannot be replaced."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode) or not os.path.exists(os.path.realpath(path)):
        raise FileExistsError(f"{path} is no regular file, but a device, a pipe or a socket; give the name of a file")
    if not overwrite:
        raise _is_there(path)
    return stat.S_IMODE(mode)


def _is_there(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} is there; overwrite=True (--force) replaces it")


def _publish(draft: Path, path: Path, given: Path) -> None:
    """Give a file its name, unless another has taken it meanwhile."""
    try:
        os.link(draft, path)
        draft.unlink()
    except FileExistsError:
        raise _is_there(given) from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise _is_there(given) from None
        os.replace(draft, path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_files(folder: Path, last: str, replaced: Callable[[], list[Path]]) -> Iterator[Path]:
    """An empty folder to write files into, which are moved to `folder` together when the block ends.

    The files that `replaced` names are moved out of the way first, and removed when the new ones are in place; after an
    exception, Ctrl-C included, they are back, and the new ones are gone. Where they cannot be put back, nothing is
    removed: old and new lie in a hidden folder of `folder`, which the error names. A file that replaces another has its
    permissions.

    Parameters
    ----------
    folder : Path
        One that is there.
    last : str
        The name of the file that is moved last.
    replaced : callable
        Called when the block has ended; gives files of `folder`. One that is then gone is passed over.
    """
    hidden = folder / f".{secrets.token_hex(6)}.part"
    new, old = hidden / "new", hidden / "old"
    names: list[str] = []
    whole = False
    try:
        for path in (hidden, new, old):
            path.mkdir(0o700)
        yield new
        going = replaced()
        names = sorted((path.name for path in new.iterdir()), key=lambda name: (name == last, name))
        for path in going:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                mode = stat.S_IMODE(path.stat().st_mode)
                path.rename(old / path.name)
                if path.name in names:
                    (new / path.name).chmod(mode)
        for name in names:
            (new / name).rename(folder / name)
        whole = True
        sync_folder(folder)
    except BaseException as error:
        if not whole:
            _move_back(folder, new, old, names)
        if isinstance(error, OSError) and isinstance(error.filename, str) and str(hidden) in error.filename:
            inside = os.path.dirname(error.filename) == str(new)
            name = folder / os.path.basename(error.filename) if inside else folder
            raise OSError(error.errno, error.strerror, str(name)) from error
        raise
    finally:
        if whole or not old.is_dir() or not any(old.iterdir()):
            shutil.rmtree(hidden, ignore_errors=True)


def _move_back(folder: Path, new: Path, old: Path, names: list[str]) -> None:
    """Undo moves: what is no longer in `new` had been moved to `folder`, what is in `old` was there before."""
    moves = [(folder / name, new / name) for name in names if not (new / name).exists()]
    moves += [(path, folder / path.name) for path in (old.iterdir() if old.is_dir() else ())]
    failed = None
    for path, target in moves:
        try:
            path.rename(target)
        except OSError as error:
            failed = error
    if failed is not None and any(old.iterdir()):
        raise OSError(failed.errno, f"{failed.strerror}; what was there could not be put back and lies in {old}, what "
                                    f"was to take its place in {new}", str(folder)) from failed
