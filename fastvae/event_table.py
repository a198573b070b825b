"""The table that a click log is: format, separator, header, quotes, and which of its columns are which.

    open_table(path, ...) -> Table -> find(role) -> collect(columns, query), a polars DataFrame of text

CSV, TSV, RecBole's .inter, ``::``-separated text and Parquet; text may be gzipped. What polars would read in
another way than it was meant is refused here.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._checks import listed

# column names that are recognised, best first, compared in lower case and without punctuation
_GUESSES = {
    "user": "user userid uid visitorid customerid reviewerid memberid accountid profileid username u",
    "item": "item itemid iid movieid productid parentasin asin bookid isbn songid trackid artistid albumid "
    "animeid gameid newsid articleid videoid businessid locationid venueid courseid sku sid i",
    "rating": "rating ratings score stars overall bookrating reviewscore playcount plays",
    "time": "timestamp time datetime date unixtime unixreviewtime eventtime visittime clicktime createdat ratedat ts",
    "label": "label isclick isclicked click clicked islike isliked like liked target isbuy isbought bought ispurchase "
    "purchased iswatched watched isconversion converted conversion isrelevant relevant isattributed islistened",
    "quantity": "quantity qty units count counts amount",
    "kind": "eventtype eventname behavior behaviour behaviortype action actiontype interaction interactiontype",
    "title": "title movietitle itemtitle name itemname trackname",
}
_SEPARATORS = ("\t", "::", ",", ";", "|")
# RecBole writes user_id:token
_TYPE_SUFFIX = re.compile(r":(token|float)(_seq)?$")
# a separator that no text has: whole lines
_UNUSED = "\x1f"
# bytes of a first line; longer is no table of events
_MAX_LINE = 2**16


# first bytes of what is no table of ours -> what it is, and what to do
_OTHER_FORMATS = (
    (rb"PK\x03\x04", "a zip archive or an Excel sheet", "unpack or export it"),
    (
        rb"BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!\x1a",
        "a packed file other than gzip",
        "unpack it",
    ),
    (rb"SQLite format 3\0", "a SQLite database", "export the table"),
    (
        rb"ARROW1\0|Obj\x01|\x89HDF|\x93NUMPY|MATLAB 5",
        "another binary format",
        "convert it to Parquet",
    ),
    (rb"(\xef\xbb\xbf)?\s*(\{\s*[\"'}]|\[\s*[\[{\"0-9])", "JSON", "convert it to CSV or Parquet"),
    (rb"(\xef\xbb\xbf)?\s*<", "HTML or XML", "download or convert the data"),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the data itself"),
    (
        rb"%%MatrixMarket",
        "a MatrixMarket matrix",
        "read it by scipy.io.mmread for Dataset.from_matrix",
    ),
    (
        rb"[0-9]+:\r?\n",
        "an item alone on the first line, as in the Netflix Prize",
        "write the item on each of its lines",
    ),
)


class NoSuchColumn(ValueError):
    """A table without a column for a role: user, item, rating or time."""

    def __init__(self, message: str, role: str):
        super().__init__(message)
        self.role = role


@dataclass
class Table:
    """Columns of a file.

    names      of the columns: "1", "2", ... where there is no header
    separator  None for Parquet
    quotes     whether double quotes enclose fields
    n_lines    data lines of a text file, to compare with the rows that were read
    """

    path: Path
    names: list[str]
    separator: str | None = None
    header: bool = True
    quotes: bool = False
    n_lines: int = 0

    def shows(self, role: str) -> bool:
        """Whether a header names a column that looks like the role."""
        return bool(self.all_of(role))

    def all_of(self, role: str) -> list[int]:
        """Positions of all columns that a header gives a name that looks like the role."""
        names = enumerate(map(_plain, self.names)) if self.header else ()
        return [k for k, name in names if name in _GUESSES[role].split()]

    def scalars(self) -> set[int]:
        """Positions of the columns that can be read as text: in Parquet there are lists, structures and bytes too."""
        if self.separator is not None:
            return set(range(len(self.names)))
        pl = import_polars()
        dtypes = pl.scan_parquet(self.path, glob=False).collect_schema().dtypes()
        return {k for k, dtype in enumerate(dtypes) if has_text(pl, dtype)}

    def find(self, role: str, wanted: str | None) -> int:
        """Position of the column that is called wanted, or that looks like the role."""
        if wanted is not None:
            matches = [k for k, name in enumerate(self.names) if wanted in (name, _stem(name))]
        elif self.header:
            plain = [_plain(name) for name in self.names]
            matches = [plain.index(guess) for guess in _GUESSES[role].split() if guess in plain]
        else:
            matches = [("user", "item", "rating", "time").index(role)]
        if not matches or matches[0] >= len(self.names):
            got = "no column with a usual name" if wanted is None else repr(wanted)
            raise NoSuchColumn(
                f"events: {role} must name a column of {self.path.name}, got {got}; "
                f"the columns are {listed(self.names)}",
                role,
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
        pl = import_polars()
        if self.separator is None:
            names = {role: self.names[k] for role, k in columns.items()}
            return texts_of(pl.scan_parquet(self.path, glob=False), names)
        if self.separator == "::":
            frame = self._split(pl, self._lines(pl))
        else:
            frame = pl.scan_csv(
                self.path,
                has_header=False,
                separator=self.separator,
                quote_char='"' if self.quotes else None,
                infer_schema=False,
                glob=False,
            )
        if not self.header:
            self._check_even(pl)
        names = frame.collect_schema().names()
        if len(names) != len(self.names):
            raise OSError(f"a first line of {len(names)} fields with a quote that spans lines")
        return frame.slice(int(self.header)).select(
            **{role: names[k] for role, k in columns.items()}
        )

    def _lines(self, pl: Any) -> Any:
        """A polars LazyFrame of one column: whole lines."""
        return pl.scan_csv(
            self.path,
            has_header=False,
            separator=_UNUSED,
            quote_char=None,
            infer_schema=False,
            glob=False,
        )

    def _check_even(self, pl: Any) -> None:
        """OSError where lines have fewer fields than the first: a list of items by user, say, of which two were read.

        Only without a header: with one, a last field may be left out.
        """
        lines = self._lines(pl)
        line = pl.col(lines.collect_schema().names()[0])
        n_separators = line.str.count_matches(self.separator, literal=True)
        is_short = (n_separators < len(self.names) - 1) & (line.str.strip_chars() != "")
        n_short = lines.select(is_short.sum()).collect(engine="streaming").item()
        if n_short:
            raise OSError(f"fewer fields on {n_short:,} lines")

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
        pl = import_polars()
        try:
            # polars finds a line with too many fields only where it reads every column
            flags = pl.QueryOptFlags(projection_pushdown=self.separator is None)
            return query(self.scan(columns)).collect(engine="streaming", optimizations=flags)
        except _read_errors(pl) as error:
            raise _unreadable(self.path, error) from error


def has_text(pl: Any, dtype: Any) -> bool:
    """Whether values of a polars dtype have a text that may be an id or a time."""
    return not dtype.is_nested() and dtype not in (pl.Binary, pl.Duration, pl.Object)


def texts_of(frame: Any, names: dict[str, str]) -> Any:
    """The columns of a polars LazyFrame as text, by new names -> old ones. Raises: OSError for lists and the like."""
    pl, dtypes = import_polars(), frame.collect_schema()
    return frame.select(
        **{new: _text(pl, frame, name, dtypes[name]) for new, name in names.items()}
    )


def _text(pl: Any, frame: Any, name: str, dtype: Any) -> Any:
    """The column as the text that a person would write: 7 for 7, 7.0 and 7.00."""
    column = pl.col(name)
    if dtype.is_nested():
        raise OSError(f"{name!r} of lists or structures, which are no ids")
    if dtype == pl.Binary:
        return _text_of_bytes(pl, frame, name)
    if not has_text(pl, dtype):
        raise OSError(f"{name!r} of {dtype}, which has no text to be an id or a time")
    if dtype.is_decimal():
        return column.cast(pl.String).str.replace(r"\.0*$|(\.\d*?[1-9])0+$", "${1}")
    if not dtype.is_float():
        return column.cast(pl.String)
    # integers with a missing value are floats in pandas: whole numbers lose their ".0"
    column = column.fill_nan(None)
    whole = ((column == column.floor()) & (column.abs() < 2**53)).all()
    integers = column.cast(pl.Int64, strict=False).cast(pl.String)
    return pl.when(whole).then(integers).otherwise(column.cast(pl.String))


def _text_of_bytes(pl: Any, frame: Any, name: str) -> Any:
    """Text where the bytes are some, else UUIDs where there are sixteen each: polars does not say which was meant."""
    column = pl.col(name)
    try:
        frame.select(column.cast(pl.String).count()).collect()
    except pl.exceptions.PolarsError:
        if not frame.select((column.bin.size() == 16).all()).collect().item():
            raise OSError(f"{name!r} of bytes that are neither text nor UUIDs") from None
        groups = r"^(.{8})(.{4})(.{4})(.{4})(.{12})$"
        return column.bin.encode("hex").str.replace(groups, "${1}-${2}-${3}-${4}-${5}")
    return column.cast(pl.String)


def open_table(
    path: str | os.PathLike,
    separator: str | None,
    header: bool | None,
    wanted: tuple[str | None, ...],
) -> Table:
    """The table in a file; separator and header are guessed where they are None.

    wanted  column names that the caller was given: a header is a line that holds one of them
    """
    pl, path = import_polars(), Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "a special file" if path.exists() else "nothing"
        raise ValueError(f"events: path must be a file, got {got} at {path}")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PAR1":
            return Table(path, pl.scan_parquet(path, glob=False).collect_schema().names())
        is_gzipped = magic.startswith(b"\x1f\x8b")
        _check_format(path, is_gzipped)
        line, n_quotes, n_lines = _survey(path, is_gzipped)
        separator = _separator(line, separator)
        names = _fields(line, separator)
    except _read_errors(pl) as error:
        raise _unreadable(path, error) from error
    if not line.strip():
        raise ValueError(
            f"events: file must start with a header or an event, got an empty first line in {path.name}"
        )
    table = Table(path, names, separator, True, bool(n_quotes) and separator not in ("\t", "::"))
    if table.quotes and n_quotes % 2:
        raise ValueError(
            f"events: file must close every double quote, got {n_quotes} of them in {path.name}; "
            "write a quote inside a field twice"
        )
    if not (_has_header(table, wanted) if header is None else header):
        table.header, table.names = False, [str(k + 1) for k in range(len(names))]
    table.n_lines = n_lines - table.header
    return table


def _check_format(path: Path, gzipped: bool) -> None:
    with gzip.open(path) if gzipped else open(path, "rb") as file:
        first = file.read(200)
    for pattern, kind, advice in _OTHER_FORMATS:
        if re.match(pattern, first):
            raise ValueError(
                f"events: file must be CSV, TSV, .inter or Parquet, got {kind} in {path.name}; {advice}"
            )


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


def _has_header(table: Table, wanted: tuple[str | None, ...]) -> bool:
    if any(table.shows(role) for role in ("user", "item", "title")):
        return True
    known = {*table.names, *map(_stem, table.names)}
    if any(name in known for name in wanted if name and not name.isdigit()):
        return True
    if any(re.fullmatch(r"\s*-?[0-9]+(\.[0-9]*)?\s*", name) for name in table.names):
        return False
    is_comment = table.names[0].lstrip().startswith(("#", "%", "//", "@"))
    is_table = len(table.names) > 1 and all(table.names) and not is_comment
    advice = "name its user and item columns, or say that it has no header"
    raise ValueError(
        f"events: file must start with a line of column names, got {listed(table.names)} in {table.path.name}; "
        + (advice if is_table else "remove what stands above them")
    )


def _stem(name: str) -> str:
    return _TYPE_SUFFIX.sub("", name)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", _stem(name)).lower()


def _unreadable(path: Path, error: BaseException) -> ValueError:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnicodeError) or re.search("utf-?8", text):
        return ValueError(
            f"events: file must be UTF-8 text or Parquet, got other bytes in {path.name}; convert the file first"
        )
    if "fewer fields" in text:
        return ValueError(
            f"events: file must have as many fields on each line as on the first where it has no header, got {text} "
            f"in {path.name}; write a line for each user and item"
        )
    if "more fields" in text:
        return ValueError(
            f"events: file must have no more fields on a line than on the first, got such a line in {path.name}"
        )
    advice = "; look for a stray double quote" if "malformed" in text else ""
    return ValueError(
        f"events: file must be a well-formed table, got {path.name}: {text[:200]}{advice}"
    )


def _read_errors(pl: Any) -> tuple[type[BaseException], ...]:
    polars = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
    return *polars, OSError, EOFError, zlib.error, csv.Error, UnicodeError


def import_polars() -> Any:
    """The polars module, which the extra cli brings."""
    try:
        import polars
    except ImportError as error:
        raise ImportError(
            "events: reading a click log needs polars, which is missing; run pip install 'fastvae-cf[cli]'"
        ) from error
    return polars
