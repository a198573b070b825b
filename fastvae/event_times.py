"""Times of events: numbers as they are, or dates as microseconds since 1970 in UTC.

A column is of dates where more of its texts are dates than numbers. 2020-01-31, 2020-01-31 12:30, 2020-01-31T12:30:05.25Z and
2020-01-31 12:30:05+02:00 are dates, with / in place of - too; 31.01.2020, of which nobody knows the order, is none.
"""

from __future__ import annotations

import math
from datetime import date, datetime, timezone
from numbers import Real
from typing import Any

import numpy as np

from ._checks import shown

_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ZONED = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z")
# what a number of seconds, milliseconds, ... since 1970 is multiplied with to be microseconds: 1982 to 2039
_UNITS = ((4e8, 1e6), (4e11, 1e3), (4e14, 1.0), (4e17, 1e-3))
_LATEST = 5.5  # times those: 2039
_NAMES = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_MICROS = _NAMES.index("microseconds")
# share of a column's times that may lie elsewhere where it is taken to be since 1970
_FEW = 0.1


def parse_times(pl: Any, text: Any) -> tuple[Any, Any]:
    """Lazy time of each text, Float64, null where it is none, and whether the column is of dates."""
    plain = text.str.strip_chars().str.replace_all("/", "-", literal=True)
    # the zone first, whose T is not that between date and time
    plain = plain.str.replace(r"\s*(Z|UTC)$", "").str.replace("T", " ", literal=True)
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


def check_times(
    times: np.ndarray, is_kept: np.ndarray, is_dates: bool, column: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which events have a time that stands for none, bool [n]: 0 or -1 where the others are since 1970.

    times, is_kept  [n] float64, and bool: events that are dropped for other reasons do not count
    column          where they are, for the message
    returns         those, and for info["source"]: their number, number and first of the times far from the others, or the
                    time that all have

    Where most are not since 1970, or a tenth lies elsewhere, the numbers may be anything, and nothing is said of them.
    Raises: ValueError where times are of several units: seconds would come before all milliseconds, whenever they were.
    """
    kept = times[is_kept]
    if len(kept) > 1 and kept.min() == kept.max():
        return np.zeros(len(times), bool), {"time_of_all": _text(kept[0], is_dates)}
    unit = np.full(len(times), -1, np.int8)
    for k, (low, _) in enumerate(_UNITS):
        unit[(times >= low) & (times < _LATEST * low)] = k
    if is_dates:
        unit[unit != _MICROS] = -1
    is_none = is_kept & ((times == 0) | (times == (-1e6 if is_dates else -1)))
    others = np.flatnonzero(is_kept & ~is_none)
    n_of = np.bincount(unit[others] + 1, minlength=len(_UNITS) + 1)
    if n_of[0] >= _FEW * len(others):
        return np.zeros(len(times), bool), {}
    most = int(n_of[1:].argmax())
    mixed = others[(unit[others] >= 0) & (unit[others] != most)]
    if len(mixed):
        first = mixed[0]
        raise ValueError(
            f"events: time must be of one unit in all of {column}, got {times[first]:.0f}, {_NAMES[unit[first]]} since "
            f"1970, where most are {_NAMES[most]}, and {len(mixed):,} such of {len(others):,} times; convert them first"
        )
    far = others[unit[others] < 0]
    found: dict[str, Any] = {"times_for_none": int(is_none.sum()), "times_far_off": len(far)}
    if len(far):
        found["first_time_far_off"] = _text(times[far[0]], is_dates)
    return is_none, found


def _text(time: float, is_dates: bool) -> str:
    return str(np.datetime64(int(time), "us")) if is_dates else f"{time:.17g}"


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
        f"prepare: date must be a number on the scale of the times, up to {latest:.17g}, got {shown(value)}"
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
