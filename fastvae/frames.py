"""Click logs in DataFrames of pandas and polars; neither is imported before a frame is there. recommend_frame.py gives frames.

events_from_frame(frame)  -> Events, by the rules of read_events; Dataset.from_frame splits them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .event_table import Table, has_text, import_polars, texts_of
from .events import Events, events_of

_KINDS = ("pandas", "polars")


def kind_of(frame: Any) -> str | None:
    """ "pandas" or "polars" where frame is a DataFrame (or a LazyFrame) of theirs, else None."""
    for base in type(frame).__mro__:
        library = base.__module__.partition(".")[0]
        if base.__name__ in ("DataFrame", "LazyFrame") and library in _KINDS:
            return library
    return None


def events_from_frame(
    frame: Any,
    user: str | None = None,
    item: str | None = None,
    rating: str | None = None,
    min_rating: float | None = None,
    *,
    counts: bool = False,
    time: str | bool | None = None,
) -> Events:
    """The events of a pandas or polars DataFrame, by the rules of read_events, with the same counts and messages.

    >>> import polars
    >>> frame = polars.DataFrame({"userId": [7, 7, 8, None], "movieId": ["b", "b", "a", "a"]})
    >>> log = events_from_frame(frame)
    >>> log.users.tolist(), log.items.tolist(), log.x.nnz, log.info["dropped"]["missing_user"]
    (['7', '8'], ['a', 'b'], 2, 1)

    frame  pandas.DataFrame, whose index does not matter, polars.DataFrame or polars.LazyFrame; columns of lists are no ids
    user, item, rating, min_rating, counts, time  as in read_events

    Ids become the text that read_events finds in a Parquet file of the frame: whole numbers lose their ".0", missing
    values are missing. polars does the work, also for pandas. Raises: as read_events; TypeError for other kinds of frame.
    """
    table = _FrameTable(Path("the DataFrame"), frame)
    return events_of(table, user, item, rating, min_rating, counts, time)


class _FrameTable(Table):
    """A table that is a frame; its path is a name for messages only."""

    def __init__(self, path: Path, frame: Any):
        kind = kind_of(frame)
        if kind is None:
            got = type(frame).__name__
            raise TypeError(f"events: frame must be a pandas or polars DataFrame, got {got}")
        columns = frame.collect_schema().names() if kind == "polars" else frame.columns
        super().__init__(path, [str(name) for name in columns])
        self.frame, self.kind = frame, kind

    def scalars(self) -> set[int]:
        pl, frame = import_polars(), self.frame
        if self.kind == "pandas":
            return {k for k in range(len(self.names)) if _holds_scalars(frame.iloc[:20, k])}
        dtypes = frame.collect_schema().dtypes()
        return {k for k, dtype in enumerate(dtypes) if has_text(pl, dtype)}

    def scan(self, columns: dict[str, int]) -> Any:
        pl = import_polars()
        if self.kind == "polars":
            return texts_of(self.frame.lazy(), {role: self.names[k] for role, k in columns.items()})
        series = {role: _series(pl, self.frame.iloc[:, k]) for role, k in columns.items()}
        return texts_of(pl.DataFrame(series).lazy(), {role: role for role in columns})


def _holds_scalars(column: Any) -> bool:
    is_duration = getattr(column.dtype, "kind", "O") == "m"
    return not is_duration and not any(
        isinstance(value, list | dict | tuple | set | bytes) for value in column
    )


def _series(pl: Any, column: Any) -> Any:
    """A pandas column as a polars Series; without pyarrow, which polars' own conversion needs."""
    if getattr(column.dtype, "tz", None) is not None:
        column = column.dt.tz_convert(None)
    if getattr(column.dtype, "kind", "O") in "iufbM" and hasattr(column.dtype, "itemsize"):
        if type(column.dtype).__module__.partition(".")[0] == "numpy":
            return pl.Series(column.to_numpy())
    missing = column.isna().to_numpy()
    values = [None if gone else value for value, gone in zip(column, missing, strict=True)]
    try:
        return pl.Series(values)
    except (TypeError, pl.exceptions.PolarsError):
        # ids of several kinds in one column
        return pl.Series([None if value is None else str(value) for value in values])
