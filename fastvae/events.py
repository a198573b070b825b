"""Click logs: read events from CSV, TSV, .inter and Parquet, with every event accounted for.

Ids stay the text that is written; what is dropped is counted by reason.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._checks import check_number
from .clicks import Clicks
from .event_ids import (
    check_guessed,
    check_lines,
    kinds_of_events,
    n_quoted,
    n_rounded,
    n_spaced,
    no_ids,
    suspects,
)
from .event_table import Table, import_polars, open_table
from .event_times import check_times, parse_times

# why an event is not in the dataset, in the order of the questions: the first yes counts
DROPPED = {
    "missing_user": "no user id",
    "missing_item": "no item id",
    "missing_rating": "no rating",
    "unparsable_rating": "a rating that is not a number",
    "zero_rating": "a rating of 0",
    "below_min_rating": "a rating below min_rating",
    "duplicates": "the same user and item again",
    "rare_items": "an item with fewer than min_item_clicks",
    "short_users": "a user with fewer than min_user_clicks",
    "vad_unknown_items": "a validation user's item that no train user has",
    "test_unknown_items": "a test user's item that no train user has",
}
# and where times are read, or the users of a split share their clicks
DROPPED_BY_TIME = {
    "missing_time": "no time",
    "unparsable_time": "a time that cannot be read as the others are",
    "no_history": "a test user who has no earlier click",
}
REASONS = {**DROPPED, **DROPPED_BY_TIME}
_ROLES = ("user", "item")


@dataclass(eq=False)
class Events:
    """The distinct (user, item) pairs of a click log.

    x      Clicks [n_users, n_items]
    users  [n_users] object array of str: ids as written, in order of their code points
    items  [n_items] object array of str
    info   n_events, dropped (reason -> number of events) and source; fit for JSON
    times  [nnz] float64: when each click of x came first, in the unit of the log, dates in microseconds since 1970;
           None where no times were read
    """

    x: Clicks
    users: np.ndarray
    items: np.ndarray
    info: dict[str, Any]
    times: np.ndarray | None = None


def read_events(
    path: str | os.PathLike,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    min_rating: float | None = None,
    *,
    separator: str | None = None,
    header: bool | None = None,
    counts: bool = False,
    time: str | bool | None = None,
) -> Events:
    """Read a click log: CSV, TSV, RecBole's .inter, ``::``-separated text or Parquet; text may be gzipped.

    user, item, rating  column names; by default recognised (user_id, userId, uid, ...; item_id, movieId, ...).
        In a file without a header the columns are called 1, 2, 3, ... and the first three are user, item, rating.
    min_rating  keep ratings >= min_rating; a missing or unparsable rating then drops the event. Without it every
        event is a click, also one rated -1, save where a rating column is there and says 0: a stored zero in a
        matrix is no click.
        true and false are 1 and 0. A rating such as "4,5" is no number.
    separator   default: the one that splits the first line most (tab, ``::``, comma, semicolon, bar), else space.
        In files separated by tab or ``::`` double quotes are ordinary characters.
    header      default: yes where the first line has a known column name, no where it has a number
    counts      keep how often a pair comes as its value; by default a pair counts one
    time        column name, or True for one that is recognised (timestamp, time, date, ...); by default no times are
        read. Events without a time, or with one that is neither a number nor a date, are dropped then; so are those of
        time 0 or -1 where the others are since 1970. Seconds among milliseconds are refused

    Ids stay the text that is written ("007" is not "7"); numbers of a Parquet file become their shortest text. NA,
    NULL, None, nan and the like are no ids where all others of the column have digits. The order of the rows does
    not matter.

    info["source"] holds what may have been meant otherwise: perhaps_no_ids, labels_of_0 (columns such as is_click
    that were not asked for), kinds_of_events (columns of view, cart, purchase), quoted_ids, ids_with_spaces,
    rounded_ids (1.23E+11), line_ends_in_ids, kept_without_a_number. The command says these aloud.
    Raises: ValueError for a file that is no such log, and where one without a header has times, fractions or lists
    in a column that was taken for ids by its place; ImportError without polars.
    """
    named = time if isinstance(time, str) else None
    table = open_table(path, separator, header, (user, item, rating, named))
    return events_of(table, user, item, rating, min_rating, counts, time)


def events_of(
    table: Table,
    user: str | None,
    item: str | None,
    rating: str | None,
    min_rating: float | None,
    counts: bool,
    time: str | bool | None,
) -> Events:
    """The events of an open table, as read_events says."""
    pl = import_polars()
    if min_rating is not None:
        min_rating = check_number("events", "min_rating", min_rating)
    columns = {"user": table.find("user", user), "item": table.find("item", item)}
    if columns["user"] == columns["item"]:
        raise ValueError(
            f"events: item must name another column than user, got {table.names[columns['item']]!r} for both"
        )
    if rating is not None or min_rating is not None or table.shows("rating"):
        columns["rating"] = table.find("rating", rating)
    if time is not None and time is not False:
        columns["time"] = table.find("time", None if time is True else time)
    frame = table.collect(columns, lambda texts: _reason(pl, texts, min_rating))
    if not len(frame):
        raise ValueError(
            f"events: file must hold at least one event, got none in {table.path.name}"
        )
    odd_times: dict[str, Any] = {}
    if "time" in columns:
        frame, odd_times = _check_times(pl, table, columns["time"], frame)
    frame, kept, ids, words = _drop_words(pl, frame)
    for role, wanted in (("user", user), ("item", item)):
        if wanted is None:
            check_guessed(role, ids[role], table, columns[role], len(kept))
    if user is None and item is None:
        check_lines(table, kept["user"])
    reasons = {**DROPPED, **(DROPPED_BY_TIME if "time" in columns else {})}
    n_why = np.bincount(frame["why"].to_numpy(), minlength=len(REASONS) + 1).tolist()
    source = {
        "file": table.path.name,
        "columns": {role: table.names[k] for role, k in columns.items()},
        "header": table.header,
        "min_rating": min_rating,
        "counts": counts,
        **_line_ends(pl, table, frame),
        "kept_without_a_number": int(kept["odd"].sum()),
        "labels_of_0": _labels_of_0(pl, table, columns),
        "kinds_of_events": kinds_of_events(table, set(columns.values())),
        "quoted_ids": sum(n_quoted(ids[role]) for role in _ROLES),
        "ids_with_spaces": sum(n_spaced(ids[role]) for role in _ROLES),
        "rounded_ids": sum(n_rounded(ids[role]) for role in _ROLES),
    }
    if "time" in columns:
        source |= {"times_are_dates": bool(frame["dated"][0]), **odd_times}
    info = {
        "n_events": len(frame),
        "dropped": dict(zip(reasons, n_why[1:], strict=False)),
        "source": source,
    }
    times = kept["time"].to_numpy() if "time" in columns else None
    return _encode(pl, kept.select(_ROLES), ids, words, info, counts, times)


def _reason(pl: Any, texts: Any, min_rating: float | None) -> Any:
    """Lazy columns user, item; why: 0 to keep the event, else 1 + the place of its reason in DROPPED; and odd: kept
    though its rating is not a number."""

    def missing(role: str) -> Any:
        return pl.col(role).is_null() | (pl.col(role).str.strip_chars() == "")

    code = {why: k + 1 for k, why in enumerate(REASONS)}
    why = pl.when(missing("user")).then(code["missing_user"])
    why = why.when(missing("item")).then(code["missing_item"])
    odd = pl.lit(False)
    if "rating" in texts.collect_schema():
        texts = texts.with_columns(number=_number(pl, pl.col("rating").str.strip_chars()))
        number = pl.col("number")
        if min_rating is None:
            why = why.when(number == 0).then(code["zero_rating"])
            odd = ~missing("rating") & ~number.is_finite().fill_null(False)
        else:
            why = why.when(missing("rating")).then(code["missing_rating"])
            why = why.when(~number.is_finite().fill_null(False)).then(code["unparsable_rating"])
            why = why.when(number < min_rating).then(code["below_min_rating"])
    timed = {}
    if "time" in texts.collect_schema():
        timed["time"], timed["dated"] = parse_times(pl, pl.col("time"))
        why = why.when(missing("time")).then(code["missing_time"])
        why = why.when(timed["time"].is_null()).then(code["unparsable_time"])
    why = why.otherwise(0).cast(pl.UInt8)
    return texts.select("user", "item", why=why, odd=odd & (why == 0), **timed)


def _filled(pl: Any, texts: Any) -> Any:
    return texts.filter(pl.col("time").str.strip_chars() != "").head(1)


def _check_times(pl: Any, table: Table, column: int, frame: Any) -> tuple[Any, dict[str, Any]]:
    """The frame without the events whose time stands for none, and what is odd about the others.

    Raises: ValueError where no event has a time that can be read, or times are of several units.
    """
    code = {why: k + 1 for k, why in enumerate(REASONS)}
    why, where = pl.col("why"), f"column {table.names[column]!r} of {table.path.name}"
    is_kept = frame.select(why == 0).to_series().to_numpy()
    unread = int(frame.select((why == code["unparsable_time"]).sum()).item())
    if unread and not is_kept.any():
        texts = table.collect({"time": column}, lambda texts: _filled(pl, texts))
        raise ValueError(
            f"events: time must be a column of numbers or of dates such as 2020-01-31, got {texts['time'][0][:40]!r} in "
            f"{where}, and no other that can be read"
        )
    is_none, found = check_times(frame["time"].to_numpy(), is_kept, bool(frame["dated"][0]), where)
    if is_none.any():
        none = pl.Series(is_none)
        frame = frame.with_columns(
            why=pl.when(none).then(code["missing_time"]).otherwise(why).cast(pl.UInt8)
        )
    return frame, found


def _number(pl: Any, text: Any) -> Any:
    """The numbers in texts: null where there is none; true and false are 1 and 0."""
    number = text.cast(pl.Float64, strict=False)
    truth = text.str.to_lowercase().replace_strict(
        {"true": 1.0, "false": 0.0}, default=None, return_dtype=pl.Float64
    )
    return number.fill_null(truth)


def _drop_words(pl: Any, frame: Any) -> tuple[Any, Any, dict[str, Any], dict[str, list[str]]]:
    """The frame without the events of users and items called NA or the like, where all other ids have digits.

    Returns the frame, its kept events, their distinct ids by role, and the words that stay, since they may be names.
    """
    is_kept = pl.col("why") == 0
    kept = frame.filter(is_kept)
    ids = {role: kept[role].unique().sort() for role in _ROLES}
    words, plain = {}, {}
    for role in _ROLES:
        found, are_plain = no_ids(ids[role])
        plain[role], words[role] = (found, []) if are_plain else ([], found)
    if any(plain.values()):
        why = pl.col("why")
        for role in ("item", "user"):
            code = 1 + list(DROPPED).index(f"missing_{role}")
            found = pl.col(role).is_in(plain[role]) & ~pl.col("why").is_between(1, code)
            why = pl.when(found).then(code).otherwise(why)
        frame = frame.with_columns(why=why.cast(pl.UInt8))
        kept = frame.filter(is_kept)
        ids = {role: kept[role].unique().sort() for role in _ROLES}
    return frame, kept, ids, words


def _line_ends(pl: Any, table: Table, frame: Any) -> dict[str, int]:
    """Line ends inside double quotes: all, and those that are part of an id."""
    n_joined = max(table.n_lines - len(frame), 0)
    if not n_joined:
        return {"lines_joined_by_quotes": 0, "line_ends_in_ids": 0}
    counts = (pl.col(role).str.count_matches("\n", literal=True).sum() for role in _ROLES)
    n_in_ids = sum(frame.select(a=next(counts), b=next(counts)).row(0))
    return {"lines_joined_by_quotes": n_joined, "line_ends_in_ids": n_in_ids}


def _labels_of_0(pl: Any, table: Table, columns: dict[str, int]) -> list[dict[str, Any]]:
    """Columns such as is_click or quantity that were not asked for, and how many events they call no click."""
    found = []
    for k in table.scalars() - set(columns.values()):
        for role in ("label", "quantity"):
            if k in table.all_of(role):
                count = _count_labels if role == "label" else _count_quantities
                query = functools.partial(count, pl)
                n = table.collect({role: k}, query).row(0, named=True)
                if n["no"] and n["yes"] and n["no"] + n["yes"] == n["all"]:
                    found.append({"column": table.names[k], "events": n["no"]})
    return sorted(found, key=lambda label: label["column"])


def _count_labels(pl: Any, texts: Any) -> Any:
    label = pl.col("label").str.strip_chars().str.to_lowercase()
    yes, no = ("1", "1.0", "true", "yes", "y"), ("0", "0.0", "-1", "-1.0", "false", "no", "n")
    return texts.select(yes=label.is_in(yes).sum(), no=label.is_in(no).sum(), all=label.count())


def _count_quantities(pl: Any, texts: Any) -> Any:
    # shops write what was sent back as less than 0
    number = _number(pl, pl.col("quantity").str.strip_chars())
    return texts.select(yes=(number > 0).sum(), no=(number <= 0).sum(), all=number.count())


def _encode(
    pl: Any,
    frame: Any,
    known: dict[str, Any],
    words: dict[str, list[str]],
    info: dict[str, Any],
    counts: bool,
    times: np.ndarray | None,
) -> Events:
    """Ids to their ranks, and pairs of ranks to Clicks."""
    ids, codes = {}, {}
    info["source"]["perhaps_no_ids"] = []
    for role in _ROLES:
        ids[role] = np.array(known[role].to_list(), dtype=object)
        codes[role] = frame[role].cast(pl.Enum(known[role])).to_physical().to_numpy()
        n_events = np.bincount(codes[role], minlength=len(ids[role]))
        info["source"]["perhaps_no_ids"] += suspects(role, words[role], ids[role], n_events)
        frame = frame.drop(role)
    n_users, n_items = len(ids["user"]), len(ids["item"])
    # one sort finds the repeats and leaves the order of CSR; np.unique takes 80 times as long
    pairs = codes["user"].astype(np.int64) * n_items + codes["item"]
    del codes
    if times is None:
        pairs.sort()
    else:
        order = np.lexsort((times, pairs))
        pairs, times = pairs[order], times[order]
    first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])) if len(pairs) else pairs
    values = np.diff(np.append(first, len(pairs))) if counts else None
    info["dropped"]["duplicates"] = len(pairs) - len(first)
    users, items = np.divmod(pairs[first], max(n_items, 1))
    x = Clicks(indptr_of(users, n_users), items, values, n_items)
    # of a pair that comes again the first time counts
    return Events(x, ids["user"], ids["item"], info, None if times is None else times[first])


def indptr_of(users: np.ndarray, n_users: int) -> np.ndarray:
    return np.append(0, np.cumsum(np.bincount(users, minlength=n_users)))
