"""Checks of arguments that every door shares: TypeError for a wrong type, ValueError for a wrong value.

Messages have one form: `<where>: <argument> must <expected>, got <actual>[; <what to do>]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .clicks import Clicks


def check_integer(where: str, name: str, value: Any, low: int = 0, high: int | None = 2**31) -> int:
    """value as an int of at least low, and below high where that is given."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where}: {name} must be a whole number, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number >= high):
        exponent = 0 if high is None else high.bit_length() - 1
        bound = f"2**{exponent}" if high == 2**exponent else high
        expected = f"be at least {low}" if number < low else f"lie below {bound}"
        raise ValueError(f"{where}: {name} must {expected}, got {value}")
    return number


def check_number(
    where: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:  # fmt: skip
    """value as a finite float in [low, high), or in (low, high) where above is true."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")
    number = float(value)
    fits = (low < number if above else low <= number) and number < high
    if not fits or not math.isfinite(number):
        expected = "be a finite number"
        if high < math.inf:
            expected = f"lie in {'(' if above else '['}{low:g}, {high:g})"
        elif low > -math.inf:
            expected += f" above {low:g}" if above else f" of at least {low:g}"
        raise ValueError(f"{where}: {name} must {expected}, got {value}")
    return number


def check_choice(where: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """value where it is one of the allowed words."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_clicks(where: str, name: str, value: Any) -> None:
    """TypeError unless value is Clicks."""
    if not isinstance(value, Clicks):
        got = type(value).__name__
        raise TypeError(f"{where}: {name} must be Clicks, got {got}; pass Clicks.from_matrix(x)")


def check_catalogue(where: str, name: str, clicks: Any, n_items: int) -> None:
    """TypeError unless clicks is Clicks, ValueError unless it has the model's items."""
    check_clicks(where, name, clicks)
    if clicks.n_items != n_items:
        raise ValueError(
            f"{where}: {name} must have the model's {n_items} items, got {clicks.n_items}"
        )
