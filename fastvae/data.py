"""Click data split by user: Dataset, split_dataset, and moving clicks from one vocabulary to another.

    read_events (events.py) -> Events -> split_dataset -> Dataset -> a folder (dataset_folder.py)

Strong generalisation (Liang et al. 2018, section 4.1): users are split, not clicks. No event goes missing
silently: info["n_events"] == sum(info["dropped"].values()) + sum(info["kept"].values()).
Source of the protocol: VAE_ML20M_WWW2018.ipynb of vae_cf.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import scipy.sparse as sp

from ._checks import check_choice, check_ids, check_integer, check_number
from ._filter import count_heldout, filter_events, keep, move_columns
from .click_split import BY_CLICK, split_by_click
from .clicks import Clicks
from .dataset_folder import (
    IDS,
    PARTS,
    VERSION_BY_CLICK,
    count_parts,
    read_folder,
    write_folder,
)
from .events import DROPPED, REASONS, Events


@dataclass(eq=False)
class Dataset:
    """Clicks split by user, as fit(model, data.train, data.validation) and evaluate(model, *data.test) take them.

    train             Clicks [n_train, n_items]; every item has at least one click here
    validation, test  (fold_in, held_out), Clicks [n_vad, n_items] and [n_test, n_items] each: what the model sees
                      of these users, and what it is to find
    users_*, items    object arrays of str: external ids of the rows and of the columns
    info              settings and counts; fit for JSON

    Row u of fold_in and of held_out is the same user, users_vad[u] or users_test[u]. One with nothing to predict
    keeps its rows, the held-out one empty: info["n_skipped"] counts it and it is not to be evaluated. A user with
    held-out clicks always has fold-in clicks. The files' names vad_tr, vad_te, test_tr, test_te are readable too.
    """

    train: Clicks
    validation: tuple[Clicks, Clicks]
    test: tuple[Clicks, Clicks]
    users_train: np.ndarray
    users_vad: np.ndarray
    users_test: np.ndarray
    items: np.ndarray
    info: dict[str, Any] = field(repr=False)

    @property
    def vad_tr(self) -> Clicks:
        """Fold-in clicks of the validation users: validation[0]."""
        return self.validation[0]

    @property
    def vad_te(self) -> Clicks:
        """Held-out clicks of the validation users: validation[1]."""
        return self.validation[1]

    @property
    def test_tr(self) -> Clicks:
        """Fold-in clicks of the test users: test[0]."""
        return self.test[0]

    @property
    def test_te(self) -> Clicks:
        """Held-out clicks of the test users: test[1]."""
        return self.test[1]

    @classmethod
    def from_matrix(
        cls,
        x: Any,
        n_heldout: float | None = None,
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

        Raises: as split_dataset; ValueError where ids are too few, too many or repeated, TypeError for other kinds.
        """
        x = Clicks.from_matrix(x).to("cpu").compact()
        x = x if counts else x.binary()
        user_ids, item_ids = _ids("users", users, x.n_users), _ids("items", items, x.n_items)
        info = {"n_events": x.nnz, "dropped": {}, "source": {"counts": counts}}
        return split_dataset(Events(x, user_ids, item_ids, info), n_heldout, seed, **split)

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        n_heldout: float | None = None,
        seed: int = 0,
        *,
        user: str | None = None,
        item: str | None = None,
        rating: str | None = None,
        min_rating: float | None = None,
        counts: bool = False,
        time: str | bool | None = None,
        **split: Any,
    ) -> Dataset:
        """Split the click log in a pandas or polars DataFrame.

        user, item, rating, min_rating, counts, time  as in read_events, whose rules, counts and messages these are
        n_heldout, seed, **split  arguments of split_dataset

        Raises: as read_events and split_dataset; TypeError for other kinds of frame; ImportError without polars.
        """
        from .frames import events_from_frame

        log = events_from_frame(frame, user, item, rating, min_rating, counts=counts, time=time)
        return split_dataset(log, n_heldout, seed, **split)

    @property
    def shares_users(self) -> bool:
        """Whether the users of train are those of validation and test too: a split by click, not by user."""
        return self.info.get("settings", {}).get("by", "users") != "users"

    def more_held_out(self) -> str:
        """What to do where no user has a held-out click, in the command's words."""
        return f"prepare it with a larger {'--held-out-fraction' if self.shares_users else '--heldout'}"

    @property
    def n_items(self) -> int:
        """Size of the vocabulary."""
        return len(self.items)

    def report(self) -> list[tuple[str, int]]:
        """Lines (text, number) that say what became of every event; the first is the sum of the others."""
        dropped = [(f"dropped: {REASONS[why]}", n) for why, n in self.info["dropped"].items() if n]
        places = self.info["kept"].items()
        # the fold-in of users who are in train is counted there
        kept = [
            (f"kept: {place.replace('_', ' ')}", n)
            for place, n in places
            if n or not (self.shares_users and place.endswith("fold_in"))
        ]
        return [("events read", self.info["n_events"]), *dropped, *kept]

    def histories(self, users: str = "all") -> Events:
        """The fold-in clicks of some users with their external ids, as recommend_to_file takes them.

        users    "train" (all their clicks), "vad", "test" or "all", in this order; where the parts share their users, all
                 is test: every user with all clicks but the held-out ones of test
        returns  Events whose x is [n_users, n_items]

        Raises: ValueError for other users.
        """
        parts = {
            "train": (self.train, self.users_train),
            "vad": (self.vad_tr, self.users_vad),
            "test": (self.test_tr, self.users_test),
        }
        check_choice("histories", "users", users, [*parts, "all"])
        if users == "all" and self.shares_users:
            users = "test"
        chosen = list(parts.values()) if users == "all" else [parts[users]]
        x = sp.vstack([clicks.to_scipy() for clicks, _ in chosen], format="csr")
        ids = np.concatenate([ids for _, ids in chosen])
        info = {"n_events": x.nnz, "dropped": {}, "source": {"users": users}}
        return Events(Clicks.from_matrix(x), ids, self.items, info)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the dataset folder: five CSR .npz, ids.npz and info.json; equal datasets give equal bytes.

        Everything is written and synced under a hidden name beside the folder, then renamed: after a kill at any
        moment, `load` finds the old or the new dataset. Raises: ValueError where the folder holds anything else.
        """
        parts = {part: getattr(self, part) for part, _ in PARTS.values()}
        ids = {name: getattr(self, name) for name in IDS}
        write_folder(folder, parts, ids, self.info)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Dataset:
        """Read a folder that `save` wrote; no file in it is trusted.

        Raises: ValueError for a missing, truncated or foreign folder.
        """
        return _assemble(*read_folder(folder))


def _assemble(
    parts: dict[str, Clicks], ids: dict[str, np.ndarray], info: dict[str, Any]
) -> Dataset:
    validation, test = ((parts[f"{name}_tr"], parts[f"{name}_te"]) for name in ("vad", "test"))
    return Dataset(parts["train"], validation, test, **ids, info=info)


def split_dataset(
    events: Events,
    n_heldout: float | None = None,
    seed: int = 0,
    *,
    min_user_clicks: int = 5,
    min_item_clicks: int = 0,
    held_out_fraction: float | None = None,
    strict: bool = False,
    by: str = "users",
    date: Any = None,
) -> Dataset:
    """Filter and split events: by user (strong generalisation), or each user's clicks by time, or all but the last.

    Items under min_item_clicks are dropped, then users under min_user_clicks (and those without clicks). Users are
    permuted; the last n_heldout are test, as many before them validation, the rest train. The vocabulary is the
    items of the train users. Of the n clicks that a held-out user has in it, int(held_out_fraction * n) drawn at
    random are held out, the rest fold in. The same events and seed give the same dataset.

    by         "users" as above; "time" or "leave-one-out" cut every user's clicks as click_split.py says: all users are
               train, validation and test users then, and the fold-in is what comes before the held-out clicks
    date       for by="time": test is from here on, whoever clicked; ISO text, datetime, or a number as the times are
    n_heldout  a count (int, 0 allowed), or a fraction of the users that are left (float, below 0.5); for by="users", where
               None is 0.1
    held_out_fraction  for by="users", and by="time" without a date, where None is 0.2
    strict     raise where a held-out user has items outside the vocabulary, rather than drop and count them; for by="users"

    Raises: ValueError for settings out of range or of another split, or too few users left for the split; TypeError for
    other kinds.
    """
    check_choice("prepare", "by", by, ["users", *BY_CLICK])
    _refuse_unused(by, date, n_heldout, held_out_fraction, strict)
    n_heldout = 0.1 if n_heldout is None else n_heldout
    held_out_fraction = 0.2 if held_out_fraction is None else held_out_fraction
    settings = {
        "n_heldout": n_heldout,
        "seed": seed,
        "min_user_clicks": min_user_clicks,
        "min_item_clicks": min_item_clicks,
        "held_out_fraction": held_out_fraction,
        "strict": strict,
    }
    settings = _check_settings(settings)
    if by != "users":
        return _assemble(*split_by_click(events, settings, by, date))
    x, kept_users, info = filter_events(events, min_user_clicks, min_item_clicks)
    n = count_heldout(n_heldout, len(kept_users), min_user_clicks, info)
    rng = np.random.default_rng(seed)
    order = rng.permutation(kept_users)
    cuts = [len(order) - 2 * n, len(order) - n]
    rows = dict(zip(("train", "vad", "test"), np.split(order, cuts), strict=True))

    parts, items = _split_clicks(x, rows, events.items, held_out_fraction, rng, strict)
    for name in ("vad", "test"):
        n_inside = parts[f"{name}_tr"].nnz + parts[f"{name}_te"].nnz
        info["dropped"][f"{name}_unknown_items"] = int(x.row_lengths()[rows[name]].sum()) - n_inside
    info["items"]["not_in_train"] = info["items"].pop("left") - len(items)
    for name, counts in count_parts(parts).items():
        info[name] = {**info.get(name, {}), **counts}
    info["settings"] = settings
    if set(info["dropped"]) - set(DROPPED):
        # reasons that older versions do not know
        info["version"] = VERSION_BY_CLICK
    ids = {f"users_{name}": events.users[row_ids] for name, row_ids in rows.items()}
    return _assemble(parts, {**ids, "items": items}, info)


def _split_clicks(x, rows, item_ids, held_out_fraction, rng, strict) -> tuple[dict[str, Any], Any]:
    """The clicks of each part by its file's name, and the vocabulary: the train users' items in column order."""
    train = x.rows(rows["train"]).compact()
    known = np.bincount(train.indices, minlength=x.n_items) > 0
    column = np.where(known, np.cumsum(known) - 1, -1)
    items = item_ids[known]
    parts: dict[str, Any] = {"train": move_columns(train, column, len(items))}
    for name in ("vad", "test"):
        part = x.rows(rows[name]).compact()
        inside = move_columns(part, column, len(items), item_ids if strict else None)
        held_out = _draw_held_out(inside, held_out_fraction, rng)
        parts[f"{name}_tr"], parts[f"{name}_te"] = keep(inside, ~held_out), keep(inside, held_out)
    return parts, items


def _refuse_unused(by: str, date: Any, n_heldout: Any, held_out_fraction: Any, strict: Any) -> None:
    """ValueError for an option that the split would not look at: who gives it expects that it does something."""
    given = {
        "n_heldout": (n_heldout, "users"),
        "strict": (strict or None, "users"),
        "date": (date, "time"),
    }
    for name, (value, use) in given.items():
        if value is not None and by != use:
            raise ValueError(
                f"prepare: {name} must be left out of a split by {by}, got {value!r}; it is for a split by {use}"
            )
    if held_out_fraction is not None and (by == "leave-one-out" or date is not None):
        kind = "leave-one-out" if date is None else "a date"
        raise ValueError(
            f"prepare: held_out_fraction must be left out of a split by {kind}, got {held_out_fraction!r}; it is for a "
            "split by users, or by time without a date"
        )


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of split_dataset as plain numbers, fit for JSON."""
    n: Any = settings["n_heldout"]
    if isinstance(n, bool) or not isinstance(n, Real):
        raise TypeError(f"prepare: n_heldout must be a number of users or a fraction, got {n!r}")
    number = int(n) if isinstance(n, Integral) else float(n)
    if not (number >= 0 if isinstance(number, int) else 0 < number < 0.5):
        raise ValueError(
            f"prepare: n_heldout must be a number of users or a fraction in (0, 0.5), got {n}"
        )
    checked: dict[str, Any] = {"n_heldout": number}
    for name in ("seed", "min_user_clicks", "min_item_clicks"):
        checked[name] = check_integer("prepare", name, settings[name], 0, None)
    fraction = settings["held_out_fraction"]
    fraction = check_number("prepare", "held_out_fraction", fraction, 0, 1, above=True)
    return {**checked, "held_out_fraction": fraction, "strict": bool(settings["strict"])}


def _draw_held_out(x: Clicks, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which clicks are held out, bool [nnz]: int(fraction * n) of each user's n, at random."""
    lengths = x.row_lengths().numpy()
    users = np.repeat(np.arange(x.n_users), lengths)
    shuffled = np.lexsort((rng.random(x.nnz), users))
    rank = np.arange(x.nnz) - x.indptr.numpy()[users]
    held_out = np.zeros(x.nnz, bool)
    held_out[shuffled] = rank < (fraction * lengths).astype(np.int64)[users]
    return held_out


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
    moved = move_columns(x, column, len(place), names if strict else None)
    return moved, x.nnz - moved.nnz


def _ids(name: str, ids: Iterable | None, n: int | None) -> np.ndarray:
    """External ids as an object array of str: fixed-width unicode would give every id the length of the longest."""
    found = range(n or 0) if ids is None else check_ids("prepare", name, ids, n)
    texts = [str(item) for item in found]
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array
