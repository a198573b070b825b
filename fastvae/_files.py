"""Files that are whole or not there: a temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows: two writers of one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]


_NUMBERS = itertools.count()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it takes path's place if the block ends well, and goes if it does not.

    Where path is a link, the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    # threads of a process may write one file too
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_NUMBERS)}.tmp")
    try:
        with naming(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files of processes that were killed while they wrote files of these names into a folder."""
    for name in names:
        for leftover in folder.glob(f".{name}.*.tmp"):
            if leftover.name.split(".")[-2].isdigit():
                leftover.unlink(missing_ok=True)


def locked(path: Path) -> contextlib.ExitStack:
    """The lock of a file or folder, held until the context ends; the system takes it back from a process that dies.

    Raises: BlockingIOError where another holds it, FileNotFoundError where path has gone or been replaced meanwhile.
    """
    held = contextlib.ExitStack()
    if fcntl is None:
        return held
    descriptor = os.open(path, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # a file system without locks
            return held
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(path)
    except OSError:
        held.close()
        raise
    return held


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":
        # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
