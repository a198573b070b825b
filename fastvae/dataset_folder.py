"""The dataset folder: five CSR .npz, ids.npz and info.json, whole or not there, and never trusted when read.

    write_folder(folder, parts, ids, info)      what Dataset.save calls
    parts, ids, info = read_folder(folder)      what Dataset.load calls

parts  file name without .npz -> Clicks       ids  name of an id array -> object array of str
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._checks import listed
from ._files import locked, naming, sync
from .clicks import Clicks
from .events import DROPPED, REASONS

# what older versions read is written as they did: the second is for splits by click and for logs read with times
FORMAT, VERSION, VERSION_BY_CLICK = "fastvae-dataset", 1, 2

# place of a kept click in info["kept"] -> the part that it is in, and whose rows that has
PARTS = {
    "train": ("train", "users_train"),
    "vad_fold_in": ("vad_tr", "users_vad"),
    "vad_held_out": ("vad_te", "users_vad"),
    "test_fold_in": ("test_tr", "users_test"),
    "test_held_out": ("test_te", "users_test"),
}
IDS = ("users_train", "users_vad", "users_test", "items")
FILES = {"info.json", "ids.npz", *(f"{part}.npz" for part, _ in PARTS.values())}

# bytes of info.json; ours have two thousand
_MAX_JSON = 2**20


def write_folder(
    folder: str | os.PathLike,
    parts: Mapping[str, Clicks],
    ids: Mapping[str, np.ndarray],
    info: dict[str, Any],
) -> None:
    """Write the files under a hidden name beside the folder, sync them, and rename: all or nothing.

    Raises: ValueError as check_writable, and while another process writes this folder.
    """
    target = check_writable(folder)
    fresh, aside = _hidden(target, "new"), _hidden(target, "old")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(target):
        if aside.exists() and not target.exists():
            # an earlier save was killed between its two renames
            os.rename(aside, target)
        for leftover in (fresh, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with naming(target):
                _write_files(fresh, parts, ids, info)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if target.exists():
            os.rename(target, aside)
        os.rename(fresh, target)
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[None]:
    """Keep other writers of the folder out for the block, by a lock on a hidden file beside it."""
    path, held = _hidden(target, "lock"), None
    while held is None:
        path.touch()
        # another writer may have ended in between, and removed the file
        with contextlib.suppress(FileNotFoundError):
            try:
                held = locked(path)
            except BlockingIOError:
                raise ValueError(
                    f"dataset: folder must be one that no other process writes to, got {target}; "
                    "wait for that one to end, or choose another name"
                ) from None
    with held:
        try:
            yield
        finally:
            # while the lock is held: who has opened this file meanwhile finds that it is gone
            path.unlink(missing_ok=True)


def _write_files(folder: Path, parts, ids, info) -> None:
    folder.mkdir()
    for part, _ in PARTS.values():
        _write_npz(folder / f"{part}.npz", _clicks_arrays(parts[part]))
    packed = {}
    for name in IDS:
        packed[f"{name}_utf8"], packed[f"{name}_offsets"] = _pack_ids(ids[name])
    _write_npz(folder / "ids.npz", packed)
    text = json.dumps(info, indent=2, ensure_ascii=False, allow_nan=False)
    with open(folder / "info.json", "wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def check_writable(folder: str | os.PathLike) -> Path:
    """The real path of a folder that may be written: absent, empty, or a dataset and nothing else.

    Raises: ValueError for anything else, so that nothing is ever deleted that was not written here.
    """
    target = Path(os.path.realpath(folder))
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"dataset: folder must be a folder, got a file at {existing}")
    names = set(os.listdir(target)) if target.exists() else set()
    if names and (names - FILES or not is_dataset_folder(target)):
        others = listed(sorted(names - FILES or names))
        raise ValueError(
            f"dataset: folder must be new, empty or a dataset, got {others} in {folder}; choose another name"
        )
    return target


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder says that it is a dataset; its files may be damaged all the same."""
    path = folder / "info.json"
    try:
        return (
            path.stat().st_size <= _MAX_JSON and json.loads(path.read_bytes())["format"] == FORMAT
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _hidden(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{kind}"


def read_folder(
    folder: str | os.PathLike,
) -> tuple[dict[str, Clicks], dict[str, np.ndarray], dict[str, Any]]:
    """Parts, ids and info of a folder that write_folder wrote.

    No file is trusted: nothing is unpickled, and no array is made before the size that its header promises is
    found to be the size that is there. Files of one save are read, also while another process saves.
    Raises: ValueError for a missing, truncated or foreign folder.
    """
    while True:
        target = Path(os.path.realpath(folder))
        if not target.exists() and _hidden(target, "old").is_dir():
            # a save is, or was killed, between its two renames
            target = _hidden(target, "old")
        if not target.is_dir():
            got = "a file" if target.exists() else "nothing"
            raise ValueError(
                f"dataset: folder must be a dataset folder, got {got} at {folder}; write one with fastvae prepare"
            )
        if (target / "config.json").is_file() and not (target / "info.json").exists():
            raise ValueError(
                f"dataset: folder must be a dataset folder, got a run folder at {folder}; "
                "give the dataset that it was trained on"
            )
        before = _identity(target)
        try:
            content = _read_files(target)
        except ValueError:
            if before is not None and before == _identity(target):
                raise
        else:
            if before == _identity(target):
                return content


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What changes where a save puts another folder in place of this one."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _read_files(folder: Path) -> tuple[dict[str, Clicks], dict[str, np.ndarray], dict[str, Any]]:
    info = _checked(folder / "info.json", _read_info)
    parts = {part: _checked(folder / f"{part}.npz", _read_clicks) for part, _ in PARTS.values()}
    ids = _checked(folder / "ids.npz", _read_ids)
    for part, users in PARTS.values():
        shape = [len(ids[users]), len(ids["items"])]
        _agree(f"{part}.npz", shape, list(parts[part].shape))
    _agree("ids.npz", len(ids["items"]), len(set(ids["items"])))
    for name, counts in count_parts(parts, _shares_users(info)).items():
        _agree("info.json", counts, {key: info[name].get(key) for key in counts})
    return parts, ids, info


def count_parts(parts: Mapping[str, Clicks], shared: bool = False) -> dict[str, dict[str, int]]:
    """The part of the info that can be told from the clicks themselves.

    shared  whether train users are validation and test users too: a click is counted once, in the first part it is in
    """
    held_out = {"vad": parts["vad_te"], "test": parts["test_te"]}
    n_evaluated = {name: int((x.row_lengths() > 0).sum()) for name, x in held_out.items()}
    kept = {place: parts[part].nnz for place, (part, _) in PARTS.items()}
    if shared:
        kept["vad_fold_in"] -= kept["train"]
        kept["test_fold_in"] -= kept["train"] + kept["vad_held_out"]
    return {
        "kept": kept,
        "users": {"train": parts["train"].n_users, **{n: x.n_users for n, x in held_out.items()}},
        "items": {"vocabulary": parts["train"].n_items},
        "n_evaluated": n_evaluated,
        "n_skipped": {name: x.n_users - n_evaluated[name] for name, x in held_out.items()},
    }


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        if not path.is_file():
            raise ValueError("no such file")
        return read(path)
    except Exception as error:
        # whatever a foreign file provokes, it is refused in one sentence
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset: {path.name} must be a file of a dataset folder, got {text[:200]} at {path}; "
            "write the folder again"
        ) from error


def _agree(name: str, expected: Any, actual: Any) -> None:
    if expected != actual:
        raise ValueError(
            f"dataset: {name} must agree with the rest of the folder on {expected}, got {actual}; "
            "write the folder again"
        )


def _read_info(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path.stat().st_size} bytes")
    info = json.loads(path.read_bytes())
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError("JSON of something else")
    version = info.get("version")
    if version not in (VERSION, VERSION_BY_CLICK):
        raise ValueError(
            f"version {version!r}, while this fastvae reads {VERSION} and {VERSION_BY_CLICK}"
        )
    reasons, known = set(info["dropped"]), set(DROPPED if version == VERSION else REASONS)
    if not set(DROPPED) <= reasons <= known or set(info["kept"]) != set(PARTS):
        raise ValueError("other counts")
    if not all(isinstance(info[name], dict) for name in ("n_evaluated", "n_skipped", "source")):
        raise ValueError("counts of something else")
    users, items = info["users"], info["items"]
    n_others = 0 if _shares_users(info) else users["train"] + users["vad"]
    adds_up = (
        info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values()),
        users["read"] == users["short"] + n_others + users["test"],
        items["read"] == items["rare"] + items["not_in_train"] + items["vocabulary"],
    )
    if not all(adds_up):
        raise ValueError("counts that do not add up")
    return info


def _shares_users(info: dict[str, Any]) -> bool:
    return info["version"] == VERSION_BY_CLICK and info["settings"].get("by", "users") != "users"


def _clicks_arrays(x: Clicks) -> dict[str, np.ndarray]:
    x = x.to("cpu").compact()
    arrays = {
        "indptr": x.indptr.numpy(),
        "indices": x.indices.numpy(),
        "shape": np.array(x.shape, np.int64),
    }
    return arrays if x.values is None else {**arrays, "values": x.values.numpy()}


def _read_clicks(path: Path) -> Clicks:
    dtypes = {"indptr": np.int64, "indices": np.int32, "shape": np.int64, "values": np.float32}
    arrays = _read_npz(path, dtypes, optional="values")
    if len(arrays["shape"]) != 2 or arrays["shape"][0] != len(arrays["indptr"]) - 1:
        raise ValueError(
            f"shape {arrays['shape'][:2].tolist()} with {len(arrays['indptr'])} offsets"
        )
    n_items = int(arrays["shape"][1])
    return Clicks(arrays["indptr"], arrays["indices"], arrays.get("values"), n_items)


def _read_ids(path: Path) -> dict[str, np.ndarray]:
    dtypes: dict[str, Any] = {}
    for name in IDS:
        dtypes |= {f"{name}_utf8": np.uint8, f"{name}_offsets": np.int64}
    arrays = _read_npz(path, dtypes)
    return {name: _unpack_ids(arrays[f"{name}_utf8"], arrays[f"{name}_offsets"]) for name in IDS}


def _pack_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes one after the other, and where each id starts [n + 1] int64."""
    try:
        encoded = [text.encode() for text in ids]
    except UnicodeEncodeError as error:
        raise ValueError(f"dataset: ids must be Unicode text, got {error.object[:40]!a}") from error
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=starts[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), starts


def _unpack_ids(utf8: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Ids as str objects from what _pack_ids gave; ValueError where the two do not fit."""
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(utf8) or (np.diff(starts) < 0).any():
        raise ValueError("offsets that do not fit the text")
    text, bounds = utf8.tobytes(), starts.tolist()
    ids = np.empty(len(bounds) - 1, dtype=object)
    ids[:] = [text[begin:end].decode() for begin, end in itertools.pairwise(bounds)]
    return ids


# .npz that need not be trusted


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an uncompressed .npz and wait for the disk."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def _read_npz(path: Path, dtypes: dict[str, Any], optional: str = "") -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz that holds exactly these names, of one dimension and these dtypes."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if not set(dtypes) - {optional} <= set(members) <= set(dtypes) or len(members) != len(
            archive.infolist()
        ):
            raise ValueError(f"members {', '.join(map(repr, sorted(members)))[:200]}")
        for member in members.values():
            is_stored = member.compress_type == zipfile.ZIP_STORED
            if not (is_stored and member.file_size == member.compress_size <= path.stat().st_size):
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
