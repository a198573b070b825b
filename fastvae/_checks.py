"""Checks of arguments that every door shares: TypeError for a wrong type, ValueError for a wrong value.

Messages have one form: `<where>: <argument> must <expected>, got <actual>[; <what to do>]`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import numpy as np

from .clicks import Clicks

NORMALIZE = ("none", "clicks")  # older words for per_click, which config.json keeps


def check_integer(where: str, name: str, value: Any, low: int = 0, high: int | None = 2**31) -> int:
    """value as an int of at least low, and below high where that is given."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where}: {name} must be a whole number, got {shown(value)}")
    number = int(value)
    if number < low:
        raise ValueError(f"{where}: {name} must be at least {low}, got {shown(number)}")
    if high is not None and number >= high:
        exponent = high.bit_length() - 1
        bound = f"2**{exponent}" if high == 2**exponent else high
        raise ValueError(f"{where}: {name} must lie below {bound}, got {shown(number)}")
    return number


def check_number(
    where: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:  # fmt: skip
    """value as a finite float in [low, high), or in (low, high) where above is true."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float
        number = math.inf
    fits = (low < number if above else low <= number) and number < high
    if not fits or not math.isfinite(number):
        expected = "be a finite number"
        if high < math.inf:
            expected = f"lie in {'(' if above else '['}{low:g}, {high:g})"
        elif low > -math.inf:
            expected += f" above {low:g}" if above else f" of at least {low:g}"
        raise ValueError(f"{where}: {name} must {expected}, got {shown(value)}")
    return number


def check_choice(where: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """value where it is one of the allowed words."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: {name} must be one of {', '.join(allowed)}, got {shown(value)}")
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {shown(value)}")
    return value


def check_flag(where: str, name: str, value: Any) -> bool:
    """value where it is True or False; nothing else counts as one: "no" would be true."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{where}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def check_per_click(where: str, per_click: Any, normalize: Any, stacklevel: int = 3) -> bool:
    """per_click, or what the older option normalize="none"|"clicks" says, with a DeprecationWarning.

    A text in per_click's place is normalize given by position.
    """
    if normalize is None and isinstance(per_click, str):
        per_click, normalize = False, per_click
    if normalize is None:
        return check_flag(where, "per_click", per_click)
    by_clicks = check_choice(where, "normalize", normalize, NORMALIZE) == "clicks"
    warnings.warn(
        f"{where}: normalize must become per_click=True or per_click=False, got {normalize!r}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
    return by_clicks


def shown(value: Any) -> str:
    """repr of a value, cut to what a sentence can hold; whole numbers too long for Python's own text included."""
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return "a whole number of more than 40 digits"
    text = str(value) if isinstance(value, Real) else repr(value)  # np.float32(2) is 2.0
    return text if len(text) <= 80 else f"{text[:77]}..."


def digest(content: bytes) -> str:
    """A text that no other content will have."""
    return hashlib.sha256(content).hexdigest()[:32]


def check_clicks(where: str, name: str, value: Any) -> None:
    """TypeError unless value is Clicks."""
    if not isinstance(value, Clicks):
        got = type(value).__name__
        raise TypeError(f"{where}: {name} must be Clicks, got {got}; pass Clicks.from_matrix(x)")


def check_pair(where: str, name: str, pair: Any, n_items: int) -> tuple[Clicks, Clicks]:
    """(fold_in, held_out) where it is two Clicks of the same users and of the model's items."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = type(pair).__name__
        got += f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        raise TypeError(f"{where}: {name} must be two Clicks (fold_in, held_out), got {got}")
    fold_in, held_out = pair
    check_catalogue(where, "fold_in", fold_in, n_items)
    check_catalogue(where, "held_out", held_out, n_items)
    if fold_in.n_users != held_out.n_users:
        raise ValueError(
            f"{where}: held_out must have the {fold_in.n_users} users of fold_in, got {held_out.n_users}"
        )
    return fold_in, held_out


def check_catalogue(where: str, name: str, clicks: Any, n_items: int) -> None:
    """TypeError unless clicks is Clicks, ValueError unless it has the model's items."""
    check_clicks(where, name, clicks)
    if clicks.n_items != n_items:
        raise ValueError(
            f"{where}: {name} must have the model's {n_items} items, got {clicks.n_items}"
        )


def listed(names: Sequence[str]) -> str:
    """Names for a message: each cut to 40 characters, the first 20 of them."""
    more = ", ..." if len(names) > 20 else ""
    return ", ".join(repr(name[:40]) for name in names[:20]) + more


def first_of(ids: Iterable[Any], most: int = 3) -> str:
    """The first ids for a message, as they are written, each cut to 40 characters."""
    return ", ".join(repr(str(item)[:40]) for item in itertools.islice(ids, most))


def check_ids(
    where: str, name: str, ids: Any, n: int | None = None, *, distinct: bool = True
) -> list[Any]:
    """External ids by their position, whatever holds them; n of them where n is given, distinct as texts by default.

    TypeError for what has no order (a set, a dict), is no sequence of ids (a text, a table), or holds other things than
    str and int: a float or None has lost the id that it was.
    """
    has_order = isinstance(ids, Iterable) and not isinstance(ids, str | bytes | Mapping)
    has_order = has_order and (not isinstance(ids, Set) or isinstance(ids, KeysView))
    if not has_order or getattr(ids, "ndim", 1) != 1:
        got = type(ids).__name__
        raise TypeError(f"{where}: {name} must be ids in their order, got {got}; pass a list")
    # numpy's and torch's own lists hold plain numbers; a pandas.Series is asked for its labels by index only
    found = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    kinds = set(map(type, found))
    wrong = {kind for kind in kinds if kind is bool or not issubclass(kind, str | Integral)}
    if wrong:
        position = next(n for n, item in enumerate(found) if type(item) in wrong)
        got = type(found[position]).__name__
        raise TypeError(
            f"{where}: {name} must hold ids that are str or int, got {got} at position {position}"
        )
    blank = next(
        (k for k, item in enumerate(found) if type(item) is str and not item.strip()), None
    )
    if blank is not None:
        raise ValueError(
            f"{where}: {name} must hold ids that are not empty, got {found[blank]!r} at position {blank}"
        )
    if n is not None and len(found) != n:
        raise ValueError(f"{where}: {name} must hold {n} ids, got {len(found)}")
    if distinct and len(set(map(str, found))) < len(found):
        again = next(text for text, times in Counter(map(str, found)).items() if times > 1)
        raise ValueError(f"{where}: {name} must be distinct, got {again!r} twice")
    return found
