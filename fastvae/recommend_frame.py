"""Recommendations for the users of a DataFrame, as a DataFrame of the same library: pandas or polars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .recommend import recommended_frame


def recommend_to_frame(
    model: nn.Module,
    frame: Any,
    k: int = 10,
    *,
    items: Iterable[Any],
    user: str | None = None,
    item: str | None = None,
    **options: Any,
) -> Any:
    """The k best items of each user of a frame, as a frame of the same library.

    >>> import polars
    >>> from fastvae import Clicks
    >>> from fastvae.baselines import Popularity
    >>> model = Popularity(Clicks.from_pairs([0, 0, 1], [0, 1, 1], n_items=2))
    >>> frame = polars.DataFrame({"user": [7, 8], "item": [20, 10]})
    >>> recommend_to_frame(model, frame, items=["10", "20"]).rows()
    [('7', 1, '10', 1.0), ('8', 1, '20', 2.0)]

    frame      the users' clicks, a row each, as in events_from_frame
    items      the model's external item ids, as load_model gives them
    user, item  column names, by default recognised
    **options  of recommend: keep_seen, allowed, exclude, popularity_penalty, parallel, ...
    returns    columns user, rank (from 1), item, score: a row for each recommended item; users in the order of their ids,
               which are text here as everywhere

    recommend does the same where the columns have names that are recognised. Raises: as recommend and read_events.
    """
    return recommended_frame(model, frame, k, items, user, item, **options)
