"""From a click log to a dataset folder: read events, filter, split by user, save and load.

    events (CSV, TSV, Parquet) -> codes -> Clicks -> split_dataset -> Dataset -> folder

Strong generalisation (Liang et al. 2018, section 4.1): users are split, not clicks. No event goes missing
silently: info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values()).
Source of the protocol: VAE_ML20M_WWW2018.ipynb of vae_cf.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ._files import pack_ids, read_npz, sync, unpack_ids, write_npz
from .clicks import Clicks
from .events import DROPPED, Events, listed

FORMAT, VERSION = "fastvae-dataset", 1

# place of a kept click in info["kept"] -> part of the dataset, and whose rows it has
_PARTS = {
    "train": ("train", "users_train"),
    "vad_fold_in": ("vad_tr", "users_vad"),
    "vad_held_out": ("vad_te", "users_vad"),
    "test_fold_in": ("test_tr", "users_test"),
    "test_held_out": ("test_te", "users_test"),
}
_IDS = ("users_train", "users_vad", "users_test", "items")
_FILES = {"info.json", "ids.npz", *(f"{part}.npz" for part, _ in _PARTS.values())}

_MAX_JSON = 2**20  # bytes of info.json; ours have two thousand


@dataclass(eq=False)
class Dataset:
    """Clicks split by user; row u of a ``*_tr`` and of its ``*_te`` is the user ``users_*[u]``.

    train             Clicks [n_train, n_items]; every item has at least one click here
    vad_tr, vad_te    Clicks [n_vad, n_items]: fold-in and held-out clicks of the validation users
    test_tr, test_te  Clicks [n_test, n_items]
    users_*, items    object arrays of str: external ids of the rows and of the columns
    info              settings and counts; fit for JSON

    A held-out user with nothing to predict keeps its rows, the held-out one empty: info["n_skipped"] counts it and
    it is not to be evaluated. A user with held-out clicks always has fold-in clicks.
    """

    train: Clicks
    vad_tr: Clicks
    vad_te: Clicks
    test_tr: Clicks
    test_te: Clicks
    users_train: np.ndarray
    users_vad: np.ndarray
    users_test: np.ndarray
    items: np.ndarray
    info: dict[str, Any] = field(repr=False)

    @classmethod
    def from_matrix(
        cls,
        x: Any,
        n_heldout: float = 0.1,
        seed: int = 0,
        *,
        users: Iterable | None = None,
        items: Iterable | None = None,
        counts: bool = False,
        **split: Any,
    ) -> Dataset:
        """Split a click matrix that is already there.

        >>> x = np.tile([1, 1, 1, 1, 1], (10, 1))
        >>> Dataset.from_matrix(x, n_heldout=2).info["kept"]["vad_held_out"]
        2

        x             [n_users, n_items], whatever Clicks.from_matrix takes
        users, items  distinct external ids, str or int; default "0", "1", ...
        counts        keep the values of x; by default every stored value counts one
        n_heldout, seed, **split  arguments of split_dataset

        Raises: ValueError as split_dataset, and where ids are too few, too many or repeated.
        """
        x = Clicks.from_matrix(x).to("cpu").compact()
        x = x if counts else x.binary()
        user_ids, item_ids = _ids("users", users, x.n_users), _ids("items", items, x.n_items)
        info = {"n_events": x.nnz, "dropped": {}, "source": {"counts": counts}}
        return split_dataset(Events(x, user_ids, item_ids, info), n_heldout, seed, **split)

    @property
    def n_items(self) -> int:
        """Size of the vocabulary."""
        return len(self.items)

    def report(self) -> list[tuple[str, int]]:
        """Lines (text, number) that say what became of every event; the first is the sum of the others."""
        dropped = [(f"dropped: {DROPPED[why]}", n) for why, n in self.info["dropped"].items() if n]
        kept = [(f"kept: {place.replace('_', ' ')}", n) for place, n in self.info["kept"].items()]
        return [("events read", self.info["n_events"]), *dropped, *kept]

    def save(self, folder: str | os.PathLike) -> None:
        """Write the dataset folder: five CSR .npz, ids.npz and info.json; equal datasets give equal bytes.

        Everything is written and synced under a hidden name beside the folder, then renamed: after a kill at any
        moment, `load` finds the old or the new dataset. Raises: ValueError as check_writable.
        """
        target = check_writable(folder)
        fresh, aside = _hidden(target, "new"), _hidden(target, "old")
        target.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists() and not target.exists():
            os.rename(aside, target)  # an earlier save was killed between its two renames
        for leftover in (fresh, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self._write(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if target.exists():
            os.rename(target, aside)
        os.rename(fresh, target)
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        for part, _ in _PARTS.values():
            write_npz(folder / f"{part}.npz", _clicks_arrays(getattr(self, part)))
        packed = {}
        for name in _IDS:
            packed[f"{name}_utf8"], packed[f"{name}_offsets"] = pack_ids(getattr(self, name))
        write_npz(folder / "ids.npz", packed)
        text = json.dumps(self.info, indent=2, ensure_ascii=False, allow_nan=False)
        with open(folder / "info.json", "wb") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Dataset:
        """Read a folder that `save` wrote.

        No file is trusted: nothing is unpickled, and no array is made before the size that its header promises is
        found to be the size that is there. Raises: ValueError for a missing, truncated or foreign folder.
        """
        target = Path(os.path.realpath(folder))
        if not target.exists() and _hidden(target, "old").is_dir():
            target = _hidden(target, "old")  # a save was killed between its two renames
        if not target.is_dir():
            got = "a file" if target.exists() else "nothing"
            raise ValueError(
                f"dataset: folder must be a dataset folder, got {got} at {folder}; write one with fastvae prepare"
            )
        info = _checked(target / "info.json", _read_info)
        parts = {
            part: _checked(target / f"{part}.npz", _read_clicks) for part, _ in _PARTS.values()
        }
        dataset = cls(**parts, **_checked(target / "ids.npz", _read_ids), info=info)
        dataset._check()
        return dataset

    def _check(self) -> None:
        parts = {part: getattr(self, part) for part, _ in _PARTS.values()}
        for part, users in _PARTS.values():
            shape = [len(getattr(self, users)), len(self.items)]
            _agree(f"{part}.npz", shape, list(parts[part].shape))
        _agree("ids.npz", len(self.items), len(set(self.items)))
        for name, counts in _count_parts(parts).items():
            _agree("info.json", counts, {key: self.info[name].get(key) for key in counts})


def split_dataset(
    events: Events,
    n_heldout: float = 0.1,
    seed: int = 0,
    *,
    min_user_clicks: int = 5,
    min_item_clicks: int = 0,
    held_out_fraction: float = 0.2,
    strict: bool = False,
) -> Dataset:
    """Filter and split events by user (strong generalisation).

    Items under min_item_clicks are dropped, then users under min_user_clicks (and those without clicks). Users are
    permuted; the last n_heldout are test, as many before them validation, the rest train. The vocabulary is the
    items of the train users. Of the n clicks that a held-out user has in it, int(held_out_fraction * n) drawn at
    random are held out, the rest fold in. The same events and seed give the same dataset.

    n_heldout  a count (int, 0 allowed), or a fraction of the users that are left (float, below 0.5)
    strict     raise where a held-out user has items outside the vocabulary, rather than drop and count them

    Raises: ValueError for settings out of range, or too few users left for the split.
    """
    settings = {
        "n_heldout": n_heldout,
        "seed": seed,
        "min_user_clicks": min_user_clicks,
        "min_item_clicks": min_item_clicks,
        "held_out_fraction": held_out_fraction,
        "strict": strict,
    }
    _check_settings(settings)
    x, kept_users, info = _filter(events, min_user_clicks, min_item_clicks)
    n = _count_heldout(n_heldout, len(kept_users), min_user_clicks, info)
    rng = np.random.default_rng(seed)
    order = rng.permutation(kept_users)
    cuts = [len(order) - 2 * n, len(order) - n]
    rows = dict(zip(("train", "vad", "test"), np.split(order, cuts), strict=True))

    parts, items = _split_clicks(x, rows, events.items, held_out_fraction, rng, strict)
    for name in ("vad", "test"):
        n_inside = parts[f"{name}_tr"].nnz + parts[f"{name}_te"].nnz
        info["dropped"][f"{name}_unknown_items"] = int(x.row_lengths()[rows[name]].sum()) - n_inside
    info["items"]["not_in_train"] = info["items"].pop("left") - len(items)
    for name, counts in _count_parts(parts).items():
        info[name] = {**info.get(name, {}), **counts}
    info["settings"] = settings
    users = {f"users_{name}": events.users[ids] for name, ids in rows.items()}
    return Dataset(**parts, **users, items=items, info=info)


def _split_clicks(x, rows, item_ids, held_out_fraction, rng, strict) -> tuple[dict[str, Any], Any]:
    """The clicks of each part by Dataset's names, and the vocabulary: the train users' items in the order of their columns."""
    train = x.rows(rows["train"]).compact()
    known = np.bincount(train.indices, minlength=x.n_items) > 0
    column = np.where(known, np.cumsum(known) - 1, -1)
    items = item_ids[known]
    parts: dict[str, Any] = {"train": _move_columns(train, column, len(items))}
    for name in ("vad", "test"):
        part = x.rows(rows[name]).compact()
        inside = _move_columns(part, column, len(items), item_ids if strict else None)
        held_out = _draw_held_out(inside, held_out_fraction, rng)
        parts[f"{name}_tr"], parts[f"{name}_te"] = _keep(inside, ~held_out), _keep(inside, held_out)
    return parts, items


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("seed", "min_user_clicks", "min_item_clicks"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise ValueError(f"prepare: {name} must be an integer of at least 0, got {value!r}")
        settings[name] = int(value)
    fraction = settings["held_out_fraction"]
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"prepare: held_out_fraction must lie in (0, 1), got {fraction!r}")
    n: Any = settings["n_heldout"]
    is_count = isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0
    if not is_count and not (isinstance(n, float) and 0 < n < 0.5):
        raise ValueError(
            f"prepare: n_heldout must be a number of users or a fraction in (0, 0.5), got {n!r}"
        )
    settings["n_heldout"] = int(n) if is_count else float(n)
    settings["held_out_fraction"], settings["strict"] = float(fraction), bool(settings["strict"])


def _filter(
    events: Events, min_user_clicks: int, min_item_clicks: int
) -> tuple[Clicks, np.ndarray, dict[str, Any]]:
    """Clicks of frequent items, the users to keep, and the info with what was dropped so far."""
    item_clicks = np.bincount(events.x.indices, minlength=events.x.n_items)
    frequent = item_clicks >= min_item_clicks
    x = _keep(events.x, frequent[events.x.indices.numpy()])
    lengths = x.row_lengths().numpy()
    long_enough = lengths >= max(min_user_clicks, 1)
    info = {
        "format": FORMAT,
        "version": VERSION,
        **events.info,
        "users": {"read": x.n_users, "short": int((~long_enough).sum())},
        "items": {"read": x.n_items, "rare": int((~frequent).sum()), "left": int(frequent.sum())},
    }
    info["dropped"] = {
        **dict.fromkeys(DROPPED, 0),
        **events.info["dropped"],
        "rare_items": int(item_clicks[~frequent].sum()),
        "short_users": int(lengths[~long_enough].sum()),
    }
    return x, np.flatnonzero(long_enough), info


def _count_heldout(
    n_heldout: float, n_users: int, min_user_clicks: int, info: dict[str, Any]
) -> int:
    is_fraction = not isinstance(n_heldout, Integral)
    n = int(n_heldout * n_users) if is_fraction else int(n_heldout)
    least = max(min_user_clicks, 1)
    if n_users == 0:
        dropped = sorted(info["dropped"].items(), key=lambda reason: -reason[1])
        why = "; ".join(
            f"{n_events:,} with {DROPPED[name]}" for name, n_events in dropped if n_events
        )
        raise ValueError(
            f"prepare: events must leave a user with at least {least} clicks, got none of {info['n_events']:,} events "
            f"(dropped {why}); lower the thresholds or add data"
        )
    if n_users - 2 * n < 1 or (is_fraction and n == 0):
        way = (
            "add data"
            if n_users < 3
            else f"{'raise' if n == 0 else 'lower'} n_heldout, or add data"
        )
        raise ValueError(
            f"prepare: n_heldout must leave users to train, validate and test on, got {n_heldout} of {n_users} "
            f"users with at least {least} clicks; {way}"
        )
    return n


def _keep(x: Clicks, keep: np.ndarray) -> Clicks:
    """x with only the clicks where keep [nnz] is true; its shape stays."""
    if keep.all():
        return x
    indptr = np.append(0, np.cumsum(keep))[x.indptr.numpy()]
    values = None if x.values is None else x.values.numpy()[keep]
    return Clicks(indptr, x.indices.numpy()[keep], values, x.n_items)


def _move_columns(
    x: Clicks, column: np.ndarray, n_items: int, strict_names: np.ndarray | None = None
) -> Clicks:
    """x with column i moved to column[i], or dropped where that is -1; an error with strict_names, x's item ids."""
    is_known = column[x.indices.numpy()] >= 0
    if strict_names is not None and not is_known.all():
        unknown = strict_names[np.unique(x.indices.numpy()[~is_known])]
        shown = ", ".join(repr(item[:40]) for item in unknown[:5])
        raise ValueError(
            f"prepare: items must be in the vocabulary, got {len(unknown)} unknown: {shown}; leave out strict to drop them"
        )
    x = _keep(x, is_known)
    return Clicks(x.indptr, column[x.indices.numpy()], x.values, n_items)


def _draw_held_out(x: Clicks, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which clicks are held out, bool [nnz]: int(fraction * n) of each user's n, at random."""
    lengths = x.row_lengths().numpy()
    users = np.repeat(np.arange(x.n_users), lengths)
    shuffled = np.lexsort((rng.random(x.nnz), users))
    rank = np.arange(x.nnz) - x.indptr.numpy()[users]
    held_out = np.zeros(x.nnz, bool)
    held_out[shuffled] = rank < (fraction * lengths).astype(np.int64)[users]
    return held_out


def _count_parts(parts: dict[str, Clicks]) -> dict[str, dict[str, int]]:
    """The part of the info that can be told from the clicks themselves."""
    held_out = {"vad": parts["vad_te"], "test": parts["test_te"]}
    n_evaluated = {name: int((x.row_lengths() > 0).sum()) for name, x in held_out.items()}
    return {
        "kept": {place: parts[part].nnz for place, (part, _) in _PARTS.items()},
        "users": {"train": parts["train"].n_users, **{n: x.n_users for n, x in held_out.items()}},
        "items": {"vocabulary": parts["train"].n_items},
        "n_evaluated": n_evaluated,
        "n_skipped": {name: x.n_users - n_evaluated[name] for name, x in held_out.items()},
    }


def map_items(
    x: Clicks, items: Iterable, vocabulary: Iterable, strict: bool = False
) -> tuple[Clicks, int]:
    """x with its columns, called items, moved to their places in another vocabulary, by id.

    >>> x, n_unknown = map_items(Clicks([0, 2], [0, 1], n_items=2), ["a", "d"], ["c", "b", "a"])
    >>> x.indices.tolist(), n_unknown
    ([2], 1)

    Returns the clicks [n_users, len(vocabulary)], and how many were dropped because their item is unknown.
    Raises: ValueError where strict and an item is unknown, or ids do not fit x.
    """
    x = x.to("cpu").compact()
    place = {item: k for k, item in enumerate(_ids("vocabulary", vocabulary, None))}
    names = _ids("items", items, x.n_items)
    column = np.array([place.get(item, -1) for item in names], dtype=np.int64)
    moved = _move_columns(x, column, len(place), names if strict else None)
    return moved, x.nnz - moved.nnz


def _ids(name: str, ids: Iterable | None, n: int | None) -> np.ndarray:
    """External ids as an object array of str: fixed-width unicode would give every id the length of the longest."""
    texts = list(range(n or 0)) if ids is None else list(ids)
    for text in texts:
        if not isinstance(text, str | Integral):
            raise ValueError(f"prepare: {name} must hold str or int ids, got {type(text).__name__}")
    texts = [str(text) for text in texts]
    if n is not None and len(texts) != n:
        raise ValueError(f"prepare: {name} must hold {n} ids, got {len(texts)}")
    if len(set(texts)) != len(texts):
        raise ValueError(
            f"prepare: {name} must hold distinct ids, got {len(texts) - len(set(texts))} repeated"
        )
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


# the dataset folder


def check_writable(folder: str | os.PathLike) -> Path:
    """The real path of a folder that Dataset.save may write: absent, empty, or a dataset and nothing else.

    Raises: ValueError for anything else, so that a save never deletes what it did not write.
    """
    target = Path(os.path.realpath(folder))
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"dataset: folder must be a folder, got a file at {existing}")
    names = set(os.listdir(target)) if target.exists() else set()
    if names and (names - _FILES or not _is_ours(target / "info.json")):
        others = listed(sorted(names - _FILES or names))
        raise ValueError(
            f"dataset: folder must be new, empty or a dataset, got {others} in {folder}; choose another name"
        )
    return target


def _is_ours(path: Path) -> bool:
    try:
        return (
            path.stat().st_size <= _MAX_JSON and json.loads(path.read_bytes())["format"] == FORMAT
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _hidden(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{kind}"


def _clicks_arrays(x: Clicks) -> dict[str, np.ndarray]:
    x = x.to("cpu").compact()
    arrays = {
        "indptr": x.indptr.numpy(),
        "indices": x.indices.numpy(),
        "shape": np.array(x.shape, np.int64),
    }
    return arrays if x.values is None else {**arrays, "values": x.values.numpy()}


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        if not path.is_file():
            raise ValueError("no such file")
        return read(path)
    except Exception as error:  # whatever a foreign file provokes, it is refused in one sentence
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"dataset: {path.name} must be a file of a dataset folder, got {text[:200]} at {path}; write the folder again"
        ) from error


def _agree(name: str, expected: Any, actual: Any) -> None:
    if expected != actual:
        raise ValueError(
            f"dataset: {name} must agree with the rest of the folder on {expected}, got {actual}; write the folder again"
        )


def _read_info(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path.stat().st_size} bytes")
    info = json.loads(path.read_bytes())
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError("JSON of something else")
    if info.get("version") != VERSION:
        raise ValueError(f"version {info.get('version')!r}, while this fastvae reads {VERSION}")
    if set(info["dropped"]) != set(DROPPED) or set(info["kept"]) != set(_PARTS):
        raise ValueError("other counts")
    if not all(isinstance(info[name], dict) for name in ("n_evaluated", "n_skipped", "source")):
        raise ValueError("counts of something else")
    users, items = info["users"], info["items"]
    adds_up = (
        info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values()),
        users["read"] == users["short"] + users["train"] + users["vad"] + users["test"],
        items["read"] == items["rare"] + items["not_in_train"] + items["vocabulary"],
    )
    if not all(adds_up):
        raise ValueError("counts that do not add up")
    return info


def _read_clicks(path: Path) -> Clicks:
    dtypes = {"indptr": np.int64, "indices": np.int32, "shape": np.int64, "values": np.float32}
    arrays = read_npz(path, dtypes, optional="values")
    if len(arrays["shape"]) != 2 or arrays["shape"][0] != len(arrays["indptr"]) - 1:
        raise ValueError(
            f"shape {arrays['shape'][:2].tolist()} with {len(arrays['indptr'])} offsets"
        )
    return Clicks(
        arrays["indptr"], arrays["indices"], arrays.get("values"), int(arrays["shape"][1])
    )


def _read_ids(path: Path) -> dict[str, np.ndarray]:
    dtypes = {f"{name}_{kind}": dtype for name in _IDS for kind, dtype in (("utf8", np.uint8), ("offsets", np.int64))}  # fmt: skip
    arrays = read_npz(path, dtypes)
    return {name: unpack_ids(arrays[f"{name}_utf8"], arrays[f"{name}_offsets"]) for name in _IDS}
