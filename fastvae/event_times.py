"""Times of events: numbers as they are, or dates as microseconds since 1970 in UTC.

A column is of dates where more of its texts are dates than numbers. 2020-01-31, 2020-01-31 12:30, 2020-01-31T12:30:05.25Z and
2020-01-31 12:30:05+02:00 are dates, with / in place of - too; 31.01.2020, of which nobody knows the order, is none.
"""

from __future__ import annotations

import math
from datetime import date, datetime, timezone
from numbers import Real
from typing import Any

from ._checks import shown

_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ZONED = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z")
# what a number of seconds, milliseconds, ... since 1970 is multiplied with to be microseconds: 1982 to 2039
_UNITS = ((4e8, 1e6), (4e11, 1e3), (4e14, 1.0), (4e17, 1e-3))


def parse_times(pl: Any, text: Any) -> tuple[Any, Any]:
    """Lazy time of each text, Float64, null where it is none, and whether the column is of dates."""
    plain = text.str.strip_chars().str.replace_all("/", "-", literal=True)
    plain = plain.str.replace("T", " ", literal=True).str.replace(r"\s*(Z|UTC)$", "")
    dates = [plain.str.to_datetime(way, strict=False, time_unit="us") for way in _FORMATS]
    dates += [
        plain.str.to_datetime(way, strict=False, time_unit="us").dt.replace_time_zone(None)
        for way in _ZONED
    ]
    micros = pl.coalesce(dates).dt.timestamp("us").cast(pl.Float64)
    number = plain.cast(pl.Float64, strict=False)
    number = pl.when(number.is_finite()).then(number)
    is_dates = micros.is_not_null().sum() > number.is_not_null().sum()
    return pl.when(is_dates).then(micros).otherwise(number), is_dates


def time_of(value: Any, is_dates: bool, latest: float) -> float:
    """A point in time that a user gives, on the scale of a column's times.

    value     a date (ISO text or datetime, UTC where it names no zone) or a number
    is_dates  whether the column is of dates; its times are microseconds then
    latest    of the column, which shows the unit of numbers since 1970
    Raises: ValueError for another text, and for a date where the times are numbers that are not since 1970.
    """
    moment = _moment(value)
    if isinstance(moment, float):
        if is_dates:
            raise ValueError(
                f"prepare: date must be a date such as 2020-01-31 where the times are dates, got {shown(value)}"
            )
        return moment
    micros = moment.timestamp() * 1e6
    if is_dates:
        return micros
    for low, micros_per_unit in _UNITS:
        if low <= latest < 6 * low:
            return micros / micros_per_unit
    raise ValueError(
        f"prepare: date must be a number on the scale of the times, up to {latest:g}, got {shown(value)}"
    )


def _moment(value: Any) -> datetime | float:
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    try:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                value = datetime.fromisoformat(
                    value.strip().replace("/", "-").replace("Z", "+00:00")
                )
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=timezone.utc)
    except ValueError:
        pass
    raise ValueError(
        f"prepare: date must be a date such as 2020-01-31 or a number, got {shown(value)}"
    )
