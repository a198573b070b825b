"""Ids that are none: what a column holds where it was taken for users or items by mistake, and words for "no id".

Columns of a file without a header are taken by their place, so their content has to look like ids at least.
"""

from __future__ import annotations

from typing import Any

from .event_table import Table, import_polars

# words that programs write where there is no id, in lower case
_NO_ID = (
    "na", "n/a", "#n/a", "<na>", "nan", "nat", "nil", "null", "(null)", "none", "(none)", "undefined", "\\n", "-", "--",
    "?", ".", "unknown", "missing", "(not set)", "not set", "#ref!", "#value!",
)  # fmt: skip
_DATE = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}"
    r"|(19|20)\d{2}-?(0[1-9]|1[0-2])-?(0[1-9]|[12]\d|3[01])|(19|20)\d{2}-(0[1-9]|1[0-2])"
)
_CLOCK = r"\d{1,2}:\d{2}(:\d{2}.*)?"
_DAY = r"(mon|tue|wed|thu|fri|sat|sun)[a-z]*,? .*\d.*"
# kind -> what a text of it looks like
_KINDS = {
    "times": rf"^(?i)(({_DATE})([T ].*)?|{_CLOCK}|{_DAY})$",
    "lists": r"^[\[({]?\s*[a-zA-Z]?\d+([\s,;|]+[a-zA-Z]?\d+)+\s*[\])}]?$",
    "pairs of an id and a value": r"^\d+:-?\d+(\.\d+)?$",
}
# those of them that are several ids in one field
_SEVERAL_IDS = ("lists", "pairs of an id and a value")
_NUMBER = r"^-?\d+(\.\d*)?([eE][-+]?\d+)?$"
_FRACTION = r"\.\d*[1-9]"
# what columns of events say, in lower case; also of Taobao's and OTTO's logs
_KINDS_OF_EVENTS = (
    "view", "views", "pageview", "pv", "ipv", "impression", "show", "click", "clicks", "clk", "cart", "carts",
    "addtocart", "addcart", "addtobasket", "basket", "removefromcart", "wishlist", "addtowishlist", "fav", "favorite",
    "favourite", "collect", "buy", "order", "orders", "purchase", "purchases", "transaction", "checkout", "like",
    "dislike", "share", "comment", "play", "skip", "watch", "download", "install", "rating", "review", "reading",
)  # fmt: skip
# more are no kinds
_MOST_KINDS = 20
# a user with so many of all events is worth a note, where there are at least that many users
_LARGE_SHARE, _MANY_USERS = 0.1, 50


def check_guessed(role: str, ids: Any, table: Table, column: int, n_events: int) -> None:
    """ValueError where a column that nobody named holds lists, or without a header times or fractions.

    ids  distinct texts of the column, a polars Series
    """
    kind = _kind(ids, n_events)
    if kind is None or (table.header and kind not in _SEVERAL_IDS):
        return
    shown = f"{kind} such as {ids[0][:40]!r} in column {table.names[column]}"
    if table.header:
        raise ValueError(
            f"events: {role} must be a column of ids, got {shown} of {table.path.name}; "
            "write a line for each user and item, or name the column"
        )
    raise ValueError(
        f"events: {role} must be a column of ids where {table.path.name} has no header, got {shown}; "
        "name the columns of user and item by their numbers"
    )


def _kind(ids: Any, n_events: int) -> str | None:
    """What most of the ids are instead, or None."""
    if not len(ids):
        return None
    for kind, pattern in _KINDS.items():
        if ids.str.contains(pattern).mean() > 0.9:
            return kind
    if ids.str.contains(_NUMBER).all():
        if ids.str.contains(_FRACTION).any():
            return "fractions"
        numbers = ids.cast(import_polars().Float64, strict=False)
        seconds = numbers.is_between(4e8, 2.2e9) | numbers.is_between(4e11, 2.2e12)
        # since 1970, from 1982 to 2039; hardly one comes twice
        if seconds.all() and len(ids) > max(20, n_events / 2):
            return "times"
    return None


def check_lines(table: Table, users: Any) -> None:
    """ValueError where the lines of a file whose columns nobody named look like lists of items, or like a matrix's rows.

    Lists of one length look like a table, save that no user comes twice. Where there are many lines, what comes once on
    each is no user anyway.

    users  of the events, a polars Series of text
    """
    pl, n = import_polars(), len(table.names)
    if table.header or n < 3 or len(users) < 2:
        return
    fields = {str(k): k for k in range(n)}
    numbers = table.collect(fields, lambda texts: texts.head(1000).cast(pl.Int64, strict=False))
    highest = numbers.select(pl.all().max()).row(0)
    n_missing = numbers.null_count().row(0)
    if not any(n_missing) and max(highest) <= 1 and min(numbers.select(pl.all().min()).row(0)) >= 0:
        got, advice = "nothing but 0 and 1", "write a matrix as pairs"
    elif users.n_unique() < len(users):
        return
    elif len(users) >= _MANY_USERS or (not any(n_missing[1:]) and _are_items(*highest[1:])):
        got, advice = "no user twice", "write lists as pairs"
    else:
        return
    raise ValueError(
        f"events: file must have a line for each user and item where it has no header, got {n} fields on each line and "
        f"{got} in {table.path.name}; {advice}, or name the columns of user and item by their numbers"
    )


def _are_items(first: int, second: int, *others: int) -> bool:
    """Whether columns with these largest numbers may all hold items: not a rating, nor seconds since 1970."""
    return not (second <= 10 < first or max(first, second, *others) > 4e8)


def kinds_of_events(table: Table, taken: set[int]) -> list[dict[str, Any]]:
    """Columns that say what an event is (view, cart, purchase) and were not asked for, with the events of each kind.

    taken  positions of the columns that are read
    """
    pl, found = import_polars(), []
    others = {str(k): k for k in sorted(table.scalars() - taken)}
    if not others:
        return []
    first = table.collect(others, lambda texts: texts.head(1000))
    named = table.all_of("kind")
    for name, k in others.items():
        words = first[name].str.to_lowercase().str.replace_all(r"[\W_]", "").unique()
        if words.is_in(_KINDS_OF_EVENTS).sum() < 2 and k not in named:
            continue
        counts = table.collect({"kind": k}, lambda texts: _counted(pl, texts))
        kinds = dict(counts.drop_nulls().iter_rows())
        if 2 <= len(kinds) <= _MOST_KINDS:
            found.append({"column": table.names[k], "events": kinds})
    return found


def _counted(pl: Any, texts: Any) -> Any:
    counts = texts.group_by("kind").agg(pl.len()).sort("len", "kind", descending=[True, False])
    return counts.head(_MOST_KINDS + 1)


def no_ids(ids: Any) -> tuple[list[str], bool]:
    """Those of the ids that are words for "no id", and whether all others show that they are: they have digits.

    ids  distinct texts of a column, a polars Series
    """
    ids = ids.filter(ids.str.strip_chars() != "")
    is_word = ids.str.strip_chars().str.to_lowercase().is_in(_NO_ID)
    others = ids.filter(~is_word)
    return ids.filter(is_word).to_list(), bool(len(others) and others.str.contains(r"\d").all())


def suspects(role: str, words: list[str], ids: Any, n_events_of: Any) -> list[dict[str, Any]]:
    """Ids that may be none, with their events: words for "no id", and a user who has a large share of a log.

    ids          object array of str, sorted
    n_events_of  number of events of each id
    """
    place = dict(zip(ids, n_events_of, strict=True)) if words else {}
    found = {word: int(place[word]) for word in words if word in place}
    if role == "user" and len(ids) >= _MANY_USERS:
        most = int(n_events_of.argmax())
        if n_events_of[most] >= _LARGE_SHARE * n_events_of.sum():
            found[str(ids[most])] = int(n_events_of[most])
    return [{"role": role, "id": text, "events": n} for text, n in found.items()]


def n_quoted(ids: Any) -> int:
    """How many of the ids stand in quotes that belong to them."""
    return int(ids.str.contains(r"""^(".*"|'.*')$""").sum())


def n_spaced(ids: Any) -> int:
    """How many of the ids begin or end with white space that belongs to them."""
    return int((ids.str.strip_chars() != ids).sum())


def n_rounded(ids: Any) -> int:
    """How many of the ids are numbers as spreadsheets shorten them, 1.23E+11: others may have become the same."""
    return int(ids.str.contains(r"^\s*\d+(\.\d+)?[eE]\+\d+\s*$").sum())
