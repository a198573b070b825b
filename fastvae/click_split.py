"""Splits by click: every user's own clicks are cut into train, validation and test, so that users are in all three.

    by="time"            the last int(held_out_fraction * n) of a user's n clicks are test, as many before them validation;
                         with a date: all clicks from it on are test, and validation are the latest before it, as many
    by="leave-one-out"   the last click is test, the one before it validation; a random one each where there are no times

Clicks of one time are in random order, by the seed. split_dataset calls this; the split by user is in data.py.
Sources: Meng et al. 2020, Exploring data splitting strategies for the evaluation of recommendation models, section 2;
He et al. 2017, Neural collaborative filtering, section 4.1 (leave-one-out).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._filter import count_heldout, filter_events, keep, move_columns
from .clicks import Clicks
from .dataset_folder import VERSION_BY_CLICK, count_parts
from .event_times import time_of
from .events import DROPPED_BY_TIME, Events

BY_CLICK = ("time", "leave-one-out")


def split_by_click(
    events: Events, settings: dict[str, Any], by: str, date: Any
) -> tuple[dict[str, Clicks], dict[str, np.ndarray], dict[str, Any]]:
    """Parts, ids and info of a Dataset; settings are those of split_dataset, checked."""
    fraction = settings["held_out_fraction"]
    if by == "time" and date is None and fraction >= 0.5:
        raise ValueError(
            f"prepare: held_out_fraction must lie below 0.5 for a split by time, got {fraction}; it is held out twice"
        )
    least, rarest = settings["min_user_clicks"], settings["min_item_clicks"]
    x, kept_users, info = filter_events(events, least, rarest)
    count_heldout(0, len(kept_users), least, info)
    times = _times_of(events, kept_users, rarest)
    x = x.rows(kept_users).compact()
    is_dates = bool(info["source"].get("times_are_dates"))
    rng = np.random.default_rng(settings["seed"])
    stages = _stages(x, times, by, fraction, date, is_dates, rng)
    masks, known, train_rows, dropped = _split_clicks(x, stages)
    column = np.where(known, np.cumsum(known) - 1, -1)
    items = events.items[known]
    parts = {name: move_columns(keep(x, mask), column, len(items)) for name, mask in masks.items()}
    parts["train"] = parts["train"].rows(train_rows).compact()
    times_dropped = dict.fromkeys(DROPPED_BY_TIME, 0)
    info["dropped"] = {**times_dropped, **info["dropped"], **dropped}
    info["items"]["not_in_train"] = info["items"].pop("left") - len(items)
    for name, counts in count_parts(parts, shared=True).items():
        info[name] = {**info.get(name, {}), **counts}
    unused = ("n_heldout", "strict")
    kept_settings = {name: value for name, value in settings.items() if name not in unused}
    info["version"] = VERSION_BY_CLICK
    info["settings"] = {**kept_settings, "by": by, "date": None if date is None else str(date)}
    users = events.users[kept_users]
    ids = {"users_train": users[train_rows], "users_vad": users, "users_test": users}
    return parts, {**ids, "items": items}, info


def _times_of(events: Events, kept_users: np.ndarray, min_item_clicks: int) -> np.ndarray | None:
    """The times of the clicks that _filter keeps of these users."""
    if events.times is None:
        return None
    indices = events.x.indices.numpy()
    frequent = np.bincount(indices, minlength=events.x.n_items) >= min_item_clicks
    is_kept = np.zeros(events.x.n_users, bool)
    is_kept[kept_users] = True
    users = np.repeat(is_kept, events.x.row_lengths().numpy())
    return events.times[users & frequent[indices]]


def _stages(
    x: Clicks,
    times: np.ndarray | None,
    by: str,
    fraction: float,
    date: Any,
    is_dates: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Where each click of x goes, int8 [nnz]: 0 train, 1 validation, 2 test.

    Raises: ValueError where there are no times to go by, or the date leaves nothing on one of its sides.
    """
    if by == "time" and times is None:
        raise ValueError(
            "prepare: events must have times for a split by time, got none; read them with time=True or a column's name"
        )
    if date is not None:
        return _by_date(times, date, is_dates)
    lengths = x.row_lengths().numpy()
    users = np.repeat(np.arange(x.n_users), lengths)
    draws = rng.random(x.nnz)
    order = np.lexsort((draws, users) if times is None else (draws, times, users))
    n_after = np.empty(x.nnz, np.int64)
    n_after[order] = x.indptr.numpy()[users + 1] - 1 - np.arange(x.nnz)
    n_test = (fraction * lengths).astype(np.int64)
    n_last = 2 * n_test
    if by == "leave-one-out":
        # a user needs a click to fold in before one can be held out
        n_test, n_last = (lengths > 1).astype(np.int64), np.minimum(lengths - 1, 2).clip(0)
    return (n_after < n_last[users]).astype(np.int8) + (n_after < n_test[users])


def _by_date(times: Any, date: Any, is_dates: bool) -> np.ndarray:
    first, last = float(times.min()), float(times.max())
    start = time_of(date, is_dates, last)
    is_test = times >= start
    earlier = np.sort(times[~is_test])
    n_test = int(is_test.sum())
    if n_test == 0 or n_test >= len(earlier):
        raise ValueError(
            f"prepare: date must leave fewer clicks from it on than before it, and one at least, got {date} with "
            f"{n_test:,} of {len(times):,} from it on"
        )
    validation = earlier[-n_test]
    if validation == first:
        raise ValueError(
            f"prepare: date must leave clicks to train on, got {date} with all earlier clicks as validation"
        )
    return (times >= validation).astype(np.int8) + is_test


def _split_clicks(
    x: Clicks, stages: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, int]]:
    """Masks [nnz] of the clicks of each part, known items [n_items], users with train clicks, and what is dropped.

    The fold-in of a validation user is the user's train clicks; that of a test user those and the validation clicks.
    """
    items = x.indices.numpy()
    users = np.repeat(np.arange(x.n_users), x.row_lengths().numpy())
    known_items = np.bincount(items[stages == 0], minlength=x.n_items) > 0
    is_known = known_items[items]
    masks, has_history = {"train": stages == 0}, {}
    for name, stage in (("vad", 1), ("test", 2)):
        masks[f"{name}_tr"] = (stages < stage) & is_known
        has_history[name] = np.bincount(users[masks[f"{name}_tr"]], minlength=x.n_users) > 0
        masks[f"{name}_te"] = (stages == stage) & is_known & has_history[name][users]
    dropped = {
        "vad_unknown_items": int(((stages == 1) & ~is_known).sum()),
        "test_unknown_items": int(((stages == 2) & ~is_known).sum()),
        "no_history": int(((stages == 2) & is_known & ~has_history["test"][users]).sum()),
    }
    in_train = np.bincount(users[masks["train"]], minlength=x.n_users) > 0
    return masks, known_items, np.flatnonzero(in_train), dropped
