"""Files that are whole or not there (a temporary name, fsync, rename), and .npz that need not be trusted."""

from __future__ import annotations

import contextlib
import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it takes path's place if the block ends well, and goes if it does not.

    Where path is a link, the file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an uncompressed .npz and wait for the disk."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def pack_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes one after the other, and where each id starts [n + 1] int64."""
    try:
        encoded = [text.encode() for text in ids]
    except UnicodeEncodeError as error:
        raise ValueError(f"dataset: ids must be Unicode text, got {error.object[:40]!a}") from error
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=starts[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), starts


def unpack_ids(utf8: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Ids as str objects from what pack_ids gave; ValueError where the two do not fit."""
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(utf8) or (np.diff(starts) < 0).any():
        raise ValueError("offsets that do not fit the text")
    text, bounds = utf8.tobytes(), starts.tolist()
    ids = np.empty(len(bounds) - 1, dtype=object)
    ids[:] = [text[begin:end].decode() for begin, end in itertools.pairwise(bounds)]
    return ids


def read_npz(path: Path, dtypes: dict[str, Any], optional: str = "") -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz that holds exactly these names, of one dimension and these dtypes."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if not set(dtypes) - {optional} <= set(members) <= set(dtypes) or len(members) != len(
            archive.infolist()
        ):
            raise ValueError(f"members {', '.join(map(repr, sorted(members)))[:200]}")
        for member in members.values():
            size = member.file_size
            if (
                member.compress_type != zipfile.ZIP_STORED
                or not size == member.compress_size <= path.stat().st_size
            ):
                raise ValueError(f"a compressed or truncated member {member.filename!r}")
        return {
            name: _read_npy(archive, member, np.dtype(dtypes[name]))
            for name, member in members.items()
        }


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, dtype: np.dtype) -> np.ndarray:
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another .npy version")
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 1 or found != dtype:
            raise ValueError(f"{member.filename} of shape {list(shape)} and {found}")
        if file.tell() + shape[0] * dtype.itemsize != member.file_size:
            raise ValueError(
                f"{member.filename} that promises {shape[0]} values in {member.file_size} bytes"
            )
        return np.frombuffer(file.read(), dtype)
