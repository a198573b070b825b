"""Click logs: read events from CSV, TSV, .inter and Parquet, with every event accounted for.

Ids stay the text that is written; what is dropped is counted by reason.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .clicks import Clicks

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
# column names that are recognised, best first, compared in lower case and without punctuation
_GUESSES = {
    "user": "user userid uid visitorid customerid reviewerid memberid accountid profileid username u",
    "item": "item itemid iid movieid productid parentasin asin bookid isbn songid trackid artistid albumid "
    "animeid gameid newsid articleid videoid businessid locationid venueid courseid sku sid i",
    "rating": "rating ratings score stars overall bookrating reviewscore playcount plays",
    "title": "title movietitle itemtitle name itemname trackname",
}
_SEPARATORS = ("\t", "::", ",", ";", "|")
_TYPE_SUFFIX = re.compile(r":(token|float)(_seq)?$")  # RecBole writes user_id:token
_UNUSED = "\x1f"  # a separator that no text has: whole lines
_MAX_LINE = 2**16  # bytes of a first line; longer is no table of events


@dataclass(eq=False)
class Events:
    """The distinct (user, item) pairs of a click log.

    x      Clicks [n_users, n_items]
    users  [n_users] object array of str: ids as written, in order of their code points
    items  [n_items] object array of str
    info   n_events, dropped (reason -> number of events) and source; fit for JSON
    """

    x: Clicks
    users: np.ndarray
    items: np.ndarray
    info: dict[str, Any]


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
) -> Events:
    """Read a click log: CSV, TSV, RecBole's .inter, ``::``-separated text or Parquet; text may be gzipped.

    user, item, rating  column names; by default recognised (user_id, userId, uid, ...; item_id, movieId, ...).
        In a file without a header the columns are called 1, 2, 3, ... and the first three are user, item, rating.
    min_rating  keep ratings >= min_rating; a missing or unparsable rating then drops the event. Without it every
        event is a click, also one rated -1, save where a rating column is there and says 0: a stored zero in a
        matrix is no click.
        info["source"]["kept_without_a_number"] counts those whose rating is a text such as "4,5".
    separator   default: the one that splits the first line most (tab, ``::``, comma, semicolon, bar), else space.
        In files separated by tab or ``::`` double quotes are ordinary characters.
    header      default: yes where the first line has a known column name, no where it has a number
    counts      keep how often a pair comes as its value; by default a pair counts one

    Ids stay the text that is written ("007" is not "7"); integers of a Parquet file become their decimal text.
    The order of the rows does not matter. Raises: ValueError for a file that is no such log; ImportError without polars.
    """
    pl = _polars()
    if min_rating is not None and not (isinstance(min_rating, Real) and math.isfinite(min_rating)):
        raise ValueError(f"events: min_rating must be a finite number, got {min_rating!r}")
    table = _open_table(path, separator, header, (user, item, rating))
    columns = {"user": table.find("user", user), "item": table.find("item", item)}
    if columns["user"] == columns["item"]:
        raise ValueError(
            f"events: item must name another column than user, got {table.names[columns['item']]!r} for both"
        )
    if rating is not None or min_rating is not None or table.shows("rating"):
        columns["rating"] = table.find("rating", rating)
    frame = table.collect(columns, lambda texts: _reason(pl, texts, min_rating))
    if not len(frame):
        raise ValueError(
            f"events: file must hold at least one event, got none in {table.path.name}"
        )
    n_why = np.bincount(frame["why"].to_numpy(), minlength=len(DROPPED) + 1).tolist()
    source = {
        "file": table.path.name,
        "columns": {role: table.names[k] for role, k in columns.items()},
        "min_rating": None if min_rating is None else float(min_rating),
        "counts": counts,
        "lines_joined_by_quotes": max(table.n_lines - len(frame), 0),
        "kept_without_a_number": int(frame["odd"].sum()),
    }
    info = {
        "n_events": len(frame),
        "dropped": dict(zip(DROPPED, n_why[1:], strict=True)),
        "source": source,
    }
    return _encode(pl, frame.filter(pl.col("why") == 0).drop("why", "odd"), info, counts)


def _reason(pl: Any, texts: Any, min_rating: float | None) -> Any:
    """Lazy columns user, item; why: 0 to keep the event, else 1 + the place of its reason in DROPPED; and odd: kept
    though its rating is not a number."""

    def missing(role: str) -> Any:
        return pl.col(role).is_null() | (pl.col(role).str.strip_chars() == "")

    code = {why: k + 1 for k, why in enumerate(DROPPED)}
    why = pl.when(missing("user")).then(code["missing_user"])
    why = why.when(missing("item")).then(code["missing_item"])
    odd = pl.lit(False)
    if "rating" in texts.collect_schema():
        number = pl.col("rating").str.strip_chars().cast(pl.Float64, strict=False)
        if min_rating is None:
            why = why.when(number == 0).then(code["zero_rating"])
            odd = ~missing("rating") & ~number.is_finite().fill_null(False)
        else:
            why = why.when(missing("rating")).then(code["missing_rating"])
            why = why.when(~number.is_finite().fill_null(False)).then(code["unparsable_rating"])
            why = why.when(number < min_rating).then(code["below_min_rating"])
    why = why.otherwise(0).cast(pl.UInt8)
    return texts.select("user", "item", why=why, odd=odd & (why == 0))


def _encode(pl: Any, frame: Any, info: dict[str, Any], counts: bool) -> Events:
    """Ids to their ranks, and pairs of ranks to Clicks."""
    ids, codes = [], []
    for role in ("user", "item"):
        known = frame[role].unique().sort()
        ids.append(np.array(known.to_list(), dtype=object))
        codes.append(frame[role].cast(pl.Enum(known)).to_physical().to_numpy())
        frame = frame.drop(role)
    n_users, n_items = len(ids[0]), len(ids[1])
    # one sort finds the repeats and leaves the order of CSR; np.unique takes 80 times as long
    pairs = codes[0].astype(np.int64) * n_items + codes[1]
    del codes
    pairs.sort()
    first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])) if len(pairs) else pairs
    values = np.diff(np.append(first, len(pairs))) if counts else None
    info["dropped"]["duplicates"] = len(pairs) - len(first)
    users, items = np.divmod(pairs[first], max(n_items, 1))
    x = Clicks(indptr_of(users, n_users), items, values, n_items)
    return Events(x, users=ids[0], items=ids[1], info=info)


def indptr_of(users: np.ndarray, n_users: int) -> np.ndarray:
    return np.append(0, np.cumsum(np.bincount(users, minlength=n_users)))


@dataclass
class _Table:
    """Columns of a file; n_lines counts the data lines of a text file, to compare with the rows that were read."""

    path: Path
    names: list[str]
    separator: str | None = None  # None: Parquet
    header: bool = True
    quotes: bool = False
    n_lines: int = 0

    def shows(self, role: str) -> bool:
        """Whether a header names a column that looks like the role."""
        return self.header and any(_plain(name) in _GUESSES[role].split() for name in self.names)

    def find(self, role: str, wanted: str | None) -> int:
        """Position of the column that is called wanted, or that looks like the role."""
        if wanted is not None:
            matches = [k for k, name in enumerate(self.names) if wanted in (name, _stem(name))]
        elif self.header:
            plain = [_plain(name) for name in self.names]
            matches = [plain.index(guess) for guess in _GUESSES[role].split() if guess in plain]
        else:
            matches = [("user", "item", "rating").index(role)]
        if not matches or matches[0] >= len(self.names):
            got = "no column with a usual name" if wanted is None else repr(wanted)
            raise ValueError(
                f"events: {role} must name a column of {self.path.name}, got {got}; the columns are {listed(self.names)}"
            )
        name = self.names[matches[0]]
        if self.names.count(name) > 1:
            raise ValueError(
                f"events: {role} must name one column of {self.path.name}, got {name!r}, which several are called; "
                "rename the others"
            )
        return matches[0]

    def scan(self, columns: dict[str, int]) -> Any:
        """A polars LazyFrame of these columns as text."""
        pl = _polars()
        if self.separator is None:
            frame = pl.scan_parquet(self.path, glob=False)
            dtypes = frame.collect_schema()
            return frame.select(**{role: _text(pl, self.names[k], dtypes[self.names[k]]) for role, k in columns.items()})  # fmt: skip
        frame = pl.scan_csv(
            self.path,
            has_header=False,
            separator=_UNUSED if self.separator == "::" else self.separator,
            quote_char='"' if self.quotes else None,
            infer_schema=False,
            glob=False,
        )
        if self.separator == "::":
            frame = self._split(pl, frame)
        names = frame.collect_schema().names()
        if len(names) != len(self.names):
            raise OSError(f"a first line of {len(names)} fields with a quote that spans lines")
        return frame.slice(int(self.header)).select(
            **{role: names[k] for role, k in columns.items()}
        )

    def _split(self, pl: Any, lines: Any) -> Any:
        """Columns of whole lines; polars splits at single bytes only."""
        line, n = pl.col(lines.collect_schema().names()[0]), len(self.names)
        if lines.select((line.str.count_matches("::", literal=True) >= n).any()).collect().item():
            raise OSError("more fields")
        fields = line.str.split_exact("::", n - 1).struct
        return lines.select(fields.field(f"field_{k}").alias(str(k)) for k in range(n))

    def collect(
        self, columns: dict[str, int], query: Callable[[Any], Any] = lambda texts: texts
    ) -> Any:
        """The polars DataFrame of a query on these columns. Raises: ValueError for whatever polars does not like."""
        pl = _polars()
        try:
            # polars finds a line with too many fields only where it reads every column
            flags = pl.QueryOptFlags(projection_pushdown=self.separator is None)
            return query(self.scan(columns)).collect(engine="streaming", optimizations=flags)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise _unreadable(self.path, error) from error


def _text(pl: Any, name: str, dtype: Any) -> Any:
    column = pl.col(name)
    if dtype.is_nested():
        raise OSError(f"{name!r} of lists or structures, which are no ids")
    if not dtype.is_float():
        return column.cast(pl.String)
    # integers with a missing value are floats in pandas: whole numbers lose their ".0"
    column = column.fill_nan(None)
    whole = ((column == column.floor()) & (column.abs() < 2**53)).all()
    return pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(column.cast(pl.String))  # fmt: skip


def _open_table(
    path: str | os.PathLike,
    separator: str | None,
    header: bool | None,
    wanted: tuple[str | None, ...],
) -> _Table:
    pl, path = _polars(), Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "a special file" if path.exists() else "nothing"
        raise ValueError(f"events: path must be a file, got {got} at {path}")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            return _Table(path, pl.scan_parquet(path, glob=False).collect_schema().names())
        line, n_quotes, n_lines = _survey(path, magic.startswith(b"\x1f\x8b"))
        separator = _separator(line, separator)
        names = _fields(line, separator)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, EOFError, zlib.error, csv.Error, UnicodeError) as error:  # fmt: skip
        raise _unreadable(path, error) from error
    if not line.strip():
        raise ValueError(
            f"events: file must start with a header or an event, got an empty first line in {path.name}"
        )
    table = _Table(path, names, separator, True, bool(n_quotes) and separator not in ("\t", "::"))
    if table.quotes and n_quotes % 2:
        raise ValueError(
            f"events: file must close every double quote, got {n_quotes} of them in {path.name}; write a quote inside a field twice"
        )
    if not (_has_header(table, wanted) if header is None else header):
        table.header, table.names = False, [str(k + 1) for k in range(len(names))]
    table.n_lines = n_lines - table.header
    return table


def _survey(path: Path, gzipped: bool) -> tuple[str, int, int]:
    """First line of a text file, its number of double quotes, its number of lines."""
    with gzip.open(path) if gzipped else open(path, "rb") as file:
        first = chunk = file.readline(_MAX_LINE)
        n_quotes, n_lines, end = 0, 0, b"\n"
        while chunk:
            if b"\0" in chunk:
                raise UnicodeError("a byte 0: UTF-16 without a mark, or no text")
            n_quotes += chunk.count(b'"')
            n_lines += chunk.count(b"\n")
            end = chunk[-1:]
            chunk = file.read(2**20)
    if len(first) == _MAX_LINE:
        raise OSError(f"a first line of more than {_MAX_LINE} bytes")
    line = first.decode("utf-8-sig").rstrip("\r\n")
    if "\r" in line:
        raise OSError("lines that end in CR alone; convert the line ends to LF")
    return line, n_quotes, n_lines + (end != b"\n")


def _separator(line: str, separator: str | None) -> str:
    if separator is None:
        best = max(_SEPARATORS, key=lambda candidate: len(_fields(line, candidate)))
        return best if best in line else " "
    if separator != "::" and (
        len(separator) != 1 or not separator.isascii() or separator in '"\r\n'
    ):
        raise ValueError(
            f"events: separator must be one ASCII character or '::', got {separator!r}"
        )
    return separator


def _fields(line: str, separator: str) -> list[str]:
    if separator in ("\t", "::") or not line:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator))


def _has_header(table: _Table, wanted: tuple[str | None, ...]) -> bool:
    if any(table.shows(role) for role in ("user", "item", "title")):
        return True
    known = {*table.names, *map(_stem, table.names)}
    if any(name in known for name in wanted if name and not name.isdigit()):
        return True
    if any(re.fullmatch(r"\s*-?[0-9]+(\.[0-9]*)?\s*", name) for name in table.names):
        return False
    raise ValueError(
        f"events: file must start with a line of column names, got {listed(table.names)} in {table.path.name}; "
        + (
            "name its user and item columns, or say that it has no header"
            if len(table.names) > 1 and all(table.names)
            else "remove what stands above them"
        )
    )


def _stem(name: str) -> str:
    return _TYPE_SUFFIX.sub("", name)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", _stem(name)).lower()


def listed(names: list[str]) -> str:
    more = ", ..." if len(names) > 20 else ""
    return ", ".join(repr(name[:40]) for name in names[:20]) + more


def _unreadable(path: Path, error: BaseException) -> ValueError:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnicodeError) or re.search("utf-?8", text):
        return ValueError(
            f"events: file must be UTF-8 text or Parquet, got other bytes in {path.name}; convert the file first"
        )
    if "more fields" in text:
        return ValueError(
            f"events: file must have no more fields on a line than on the first, got such a line in {path.name}"
        )
    advice = "; look for a stray double quote" if "malformed" in text else ""
    return ValueError(
        f"events: file must be a well-formed table, got {path.name}: {text[:200]}{advice}"
    )


def _polars() -> Any:
    try:
        import polars
    except ImportError as error:
        raise ImportError(
            "events: reading a click log needs polars, which is missing; run pip install 'fastvae-cf[cli]'"
        ) from error
    return polars


# MovieLens-100K


def movielens_100k(cache: str | os.PathLike | None = None) -> tuple[Path, Path]:
    """Paths of MovieLens-100K's events (ml-100k.inter) and films (ml-100k.item); fetched once, then from the cache.

    cache  folder; default fastvae in $XDG_CACHE_HOME or ~/.cache

    The data may be used for research, not redistributed (GroupLens), so it is not part of this package: it is taken
    out of the recbole 1.2.1 wheel, which pip downloads. Raises: RuntimeError where that fails.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae"
    cache = Path(cache)
    paths = cache / "ml-100k.inter", cache / "ml-100k.item"
    if all(path.is_file() for path in paths):
        return paths
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download_wheel("recbole==1.2.1", folder)
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                for path in paths:
                    part = Path(folder, path.name)
                    part.write_bytes(archive.read(f"recbole/dataset_example/ml-100k/{path.name}"))
                    os.replace(part, path)
    except (
        OSError,
        subprocess.SubprocessError,
        zipfile.BadZipFile,
        KeyError,
        StopIteration,
    ) as error:
        raise RuntimeError(
            f"movielens_100k: pip could not fetch the data into {cache} ({type(error).__name__}); check the network, or use events of your own"
        ) from error
    return paths


def _download_wheel(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", folder, requirement]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


def read_titles(
    path: str | os.PathLike, item: str | None = None, title: str | None = None
) -> dict[str, str]:
    """Item id -> title from a table that `read_events` could read, such as ml-100k.item; later rows win."""
    table = _open_table(path, None, None, (item, title))
    frame = table.collect({"item": table.find("item", item), "title": table.find("title", title)})
    return dict(frame.drop_nulls().iter_rows())
