"""What every split does first: rare items and short users go, with a count; and clicks moved to other columns."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from .clicks import Clicks
from .dataset_folder import FORMAT, VERSION
from .events import DROPPED, REASONS, Events


def filter_events(
    events: Events, min_user_clicks: int, min_item_clicks: int
) -> tuple[Clicks, np.ndarray, dict[str, Any]]:
    """Clicks of frequent items, the users to keep, and the info with what was dropped so far."""
    item_clicks = np.bincount(events.x.indices, minlength=events.x.n_items)
    frequent = item_clicks >= min_item_clicks
    x = keep(events.x, frequent[events.x.indices.numpy()])
    lengths = x.row_lengths().numpy()
    long_enough = lengths >= max(min_user_clicks, 1)
    info = {
        "format": FORMAT,
        "version": VERSION,
        **events.info,
        "users": {"read": x.n_users, "short": int((~long_enough).sum())},
        "items": {"read": x.n_items, "rare": int((~frequent).sum()), "left": int(frequent.sum())},
    }
    info["dropped"] = {
        **dict.fromkeys(DROPPED, 0),
        **events.info["dropped"],
        "rare_items": int(item_clicks[~frequent].sum()),
        "short_users": int(lengths[~long_enough].sum()),
    }
    return x, np.flatnonzero(long_enough), info


def count_heldout(
    n_heldout: float, n_users: int, min_user_clicks: int, info: dict[str, Any]
) -> int:
    """Users for validation, and as many for test; ValueError where that leaves none to train on."""
    is_fraction = not isinstance(n_heldout, Integral)
    n = int(n_heldout * n_users) if is_fraction else int(n_heldout)
    least = max(min_user_clicks, 1)
    if n_users == 0:
        dropped = sorted(info["dropped"].items(), key=lambda reason: -reason[1])
        why = "; ".join(
            f"{n_events:,} with {REASONS[name]}" for name, n_events in dropped if n_events
        )
        raise ValueError(
            f"prepare: events must leave a user with at least {least} clicks, got none of {info['n_events']:,} events "
            f"(dropped {why}); lower the thresholds or add data"
        )
    if n_users - 2 * n < 1 or (is_fraction and n == 0):
        way = (
            "add data"
            if n_users < 3
            else f"{'raise' if n == 0 else 'lower'} n_heldout, or add data"
        )
        raise ValueError(
            f"prepare: n_heldout must leave users to train, validate and test on, got {n_heldout} of {n_users} "
            f"users with at least {least} clicks; {way}"
        )
    return n


def keep(x: Clicks, keep: np.ndarray) -> Clicks:
    """x with only the clicks where keep [nnz] is true; its shape stays."""
    if keep.all():
        return x
    indptr = np.append(0, np.cumsum(keep))[x.indptr.numpy()]
    values = None if x.values is None else x.values.numpy()[keep]
    return Clicks(indptr, x.indices.numpy()[keep], values, x.n_items)


def move_columns(
    x: Clicks, column: np.ndarray, n_items: int, strict_names: np.ndarray | None = None
) -> Clicks:
    """x with column i moved to column[i], or dropped where that is -1; an error with strict_names, x's item ids."""
    is_known = column[x.indices.numpy()] >= 0
    if strict_names is not None and not is_known.all():
        unknown = strict_names[np.unique(x.indices.numpy()[~is_known])]
        shown = ", ".join(repr(item[:40]) for item in unknown[:5])
        raise ValueError(
            f"prepare: items must be in the vocabulary, got {len(unknown)} unknown: {shown}; "
            "leave out strict to drop them"
        )
    x = keep(x, is_known)
    return Clicks(x.indptr, column[x.indices.numpy()], x.values, n_items)
