"""The rules of a recommendation: which items may come, and what popularity costs them.

candidates   = allowed, or all items, without exclude
scores[u, i] = logits[u, i] - popularity_penalty * log(max(popularity[i], 1))
"""

from __future__ import annotations

import warnings
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_catalogue, check_ids, check_number, digest, first_of
from .clicks import Clicks


@dataclass(frozen=True, eq=False)
class Rules:
    """What BlockScorer obeys.

    columns  [n_left] int64, ascending: the candidates; None where all items are
    penalty  [n_items] fp32 to take from the logits; None where nothing is
    """

    columns: Tensor | None = None
    penalty: Tensor | None = None

    def within(self, own: slice) -> Rules:
        """The same rules for a range of the items, numbered from 0."""
        columns = self.columns
        if columns is not None:
            columns = columns[(columns >= own.start) & (columns < own.stop)] - own.start
            # an empty range has no item that could stand for the others
            columns = None if len(columns) == own.stop - own.start else columns
        return Rules(columns, None if self.penalty is None else self.penalty[own])

    def told(self) -> dict[str, Any]:
        """What tells the rules of one process from those of another, by the names of recommend's arguments."""
        told = {"allowed or exclude": self.columns, "popularity": self.penalty}
        return {
            name: None if t is None else digest(t.numpy().tobytes()) for name, t in told.items()
        }

    def to(self, device: torch.device) -> Rules:
        """The same rules on a device."""
        moved = (t if t is None else t.to(device) for t in (self.columns, self.penalty))
        return Rules(*moved)


def rules_of(
    n_items: int,
    vocabulary: list[Any] | None,
    *,
    allowed: Any,
    exclude: Any,
    popularity_penalty: Any,
    popularity: Any,
) -> Rules:
    """Rules from the arguments of recommend, on the CPU; vocabulary: external ids by position, or None.

    Warns, where the call of recommend stands, of ids that the model does not know, and where no item is left.
    """
    places = None
    if vocabulary is not None and (allowed is not None or exclude is not None):
        places = {str(item): position for position, item in enumerate(vocabulary)}
    columns = None
    if allowed is not None or exclude is not None:
        left = np.ones(n_items, bool)
        if allowed is not None:
            left[:] = False
            left[_positions("allowed", allowed, n_items, places)] = True
        if exclude is not None:
            left[_positions("exclude", exclude, n_items, places)] = False
        columns = torch.from_numpy(np.flatnonzero(left))
        if not len(columns):
            warnings.warn(
                "recommend: allowed and exclude leave no item, so that every list is empty",
                stacklevel=4,
            )
    return Rules(columns, _penalty(popularity_penalty, popularity, n_items, vocabulary))


def _positions(name: str, ids: Any, n_items: int, places: dict[str, int] | None) -> np.ndarray:
    """Positions of ids, int64; those that the model does not know are left out, with a warning.

    Raises: ValueError where it knows none of allowed, which then would allow nothing.
    """
    found = check_ids("recommend", name, list(ids) if isinstance(ids, Set) else ids, distinct=False)
    if places is None:
        for position in found:
            if isinstance(position, str) or not 0 <= position < n_items:
                raise ValueError(
                    f"recommend: {name} must hold positions in [0, {n_items}) where items is None, got {position!r}"
                )
        return np.array(found, np.int64)
    known = [places[text] for text in map(str, found) if text in places]
    if len(known) < len(found):
        # a space, a quote or the name of a column is seen where the id is shown
        unknown = first_of(text for text in map(str, found) if text not in places)
        if name == "allowed" and not known:
            raise ValueError(
                f"recommend: allowed must hold ids of the model's items, such as {first_of(places)}, got none among "
                f"{len(found):,}, such as {unknown}"
            )
        warnings.warn(
            f"recommend: {len(found) - len(known):,} of {len(found):,} ids in {name} are of items that the "
            f"model does not know, such as {unknown}; they are ignored",
            stacklevel=5,
        )
    return np.array(known, np.int64)


def _penalty(
    strength: Any, popularity: Any, n_items: int, vocabulary: list[Any] | None
) -> Tensor | None:
    strength = check_number("recommend", "popularity_penalty", strength, 0)
    if strength == 0:
        return None
    if popularity is None:
        raise ValueError(
            "recommend: popularity must be the training clicks, or a count for each item, where popularity_penalty "
            "is given, got None"
        )
    _check_order(popularity, vocabulary)
    # an item that nobody clicked costs what one that one user clicked costs: nothing
    return (strength * _counts(popularity, n_items).clamp_min(1).log()).float()


def _check_order(popularity: Any, vocabulary: list[Any] | None) -> None:
    """ValueError for a pandas.Series whose labels say that it is in another order than the items."""
    index = getattr(popularity, "index", None)
    if isinstance(popularity, Clicks) or index is None or callable(index):
        return
    labels = list(map(str, index))
    orders = [range(len(labels)), *([] if vocabulary is None else [vocabulary])]
    if not any(labels == list(map(str, order)) for order in orders):
        raise ValueError(
            f"recommend: popularity must be in the order of the items, got labels {first_of(labels)}; pass "
            "popularity.reindex(items, fill_value=0)"
        )


def _counts(popularity: Any, n_items: int) -> Tensor:
    """Clicks of each item, float64 [n_items] on the CPU."""
    if isinstance(popularity, Clicks):
        check_catalogue("recommend", "popularity", popularity, n_items)
        clicks = popularity.compact().to("cpu")
        return torch.bincount(clicks.indices, minlength=n_items).double()
    try:
        plain = popularity.tolist() if hasattr(popularity, "tolist") else list(popularity)
        counts = np.array(plain, dtype=np.float64)
    except (TypeError, ValueError):
        got = type(popularity).__name__
        raise TypeError(
            f"recommend: popularity must be Clicks or a count for each item, got {got}"
        ) from None
    if counts.shape != (n_items,):
        raise ValueError(
            f"recommend: popularity must have shape [{n_items}], a count for each of the model's items, "
            f"got {list(counts.shape)}"
        )
    if not (np.isfinite(counts) & (counts >= 0)).all():
        bad = int((~(np.isfinite(counts) & (counts >= 0))).argmax())
        raise ValueError(
            f"recommend: popularity must hold finite counts of at least 0, got {counts[bad]} at position {bad}"
        )
    return torch.from_numpy(counts)
