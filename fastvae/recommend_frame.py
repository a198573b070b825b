"""Recommendations for the users of a DataFrame, as a DataFrame of the same library: pandas or polars."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ._checks import check_ids
from .data import map_items
from .frames import events_from_frame, kind_of
from .recommend import recommend


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
    **options  of recommend: keep_seen, allowed, exclude, popularity_penalty, ...
    returns    columns user, rank (from 1), item, score: a row for each recommended item; users in the order of their ids,
               which are text here as everywhere

    Raises: as recommend and read_events.
    """
    log = events_from_frame(frame, user, item)
    vocabulary = check_ids("recommend", "items", items)
    known, n_unknown = map_items(log.x, log.items, vocabulary)
    if n_unknown:
        warnings.warn(
            f"recommend: {n_unknown:,} of {log.x.nnz:,} clicks in frame are on items that the model does not know; "
            "they are ignored",
            stacklevel=2,
        )
    found = recommend(model, known, k, items=vocabulary, **options)
    row, place = (index.numpy() for index in torch.nonzero(found.items >= 0, as_tuple=True))
    names = np.array([*map(str, vocabulary), ""], dtype=object)
    columns = {
        "user": log.users[row].tolist(),
        "rank": place + 1,
        "item": names[found.items[row, place].numpy()].tolist(),
        "score": found.scores[row, place].numpy(),
    }
    # the library is there: a frame of it was given
    return importlib.import_module(kind_of(frame) or "").DataFrame(columns)
