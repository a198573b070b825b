"""Recommendations to a file with external ids: CSV, JSON lines or Parquet, block by block.

recommend_to_file(path, model, histories)  from a read log: what `fastvae recommend` does
write_recommendations(path, user_ids, recommendations)  what recommend or recommend_blocks gave
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ._checks import check_ids, check_integer
from ._files import replacing
from .data import map_items
from .events import Events
from .recommend import Recommendations, recommend_blocks

_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Written:
    """What recommend_to_file wrote, and of what it made no use.

    n_users    users in the file
    k          items asked for by user: never more than the model has
    n_clicks   clicks of the histories
    n_unknown  those on items that the model does not know; they are ignored
    n_new      users who have no other clicks; they get what the model gives an empty history
    n_empty    users without a recommendation: no item is left by the rules and their history
    """

    n_users: int
    k: int
    n_clicks: int
    n_unknown: int
    n_new: int
    n_empty: int


def recommend_to_file(
    path: str | os.PathLike[str],
    model: nn.Module,
    histories: Events,
    k: int = 10,
    *,
    items: Sequence[str] | None = None,
    keep_seen: bool = False,
    format: str | None = None,
    allowed: Iterable[Any] | None = None,
    exclude: Iterable[Any] | None = None,
    popularity_penalty: float = 0.0,
    popularity: Any = None,
    parallel: str | None = None,
    group: Any = None,
) -> Written:
    r"""Write the k best items of each user of a click log, with the log's user ids and the model's item ids.

    >>> import tempfile
    >>> from fastvae import Clicks
    >>> from fastvae.evaluate import Popularity
    >>> model = Popularity(Clicks.from_pairs([0, 0, 1], [0, 1, 1]))
    >>> log = Events(Clicks([0, 2], [0, 1], n_items=2), np.array(["Ann"]), np.array(["b", "z"]), {})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "top.jsonl")
    ...     recommend_to_file(path, model, log, items=["a", "b"]).n_unknown, path.read_text()
    (1, '{"user": "Ann", "items": ["a"], "scores": [1.0]}\n')

    model      as recommend takes it, with items, its external ids: load_model gives both
    histories  what read_events gives, or Dataset.histories; columns are matched with the model's items by id
    items      None means that the model has the items of histories, in their order
    k, keep_seen, allowed, exclude, popularity_penalty, popularity  as in recommend; ids are the model's
    parallel, group  as in recommend; process 0 alone writes, and what goes wrong there all processes raise
    path, format  as in write_recommendations

    Memory does not grow with the number of users. Raises: as recommend and write_recommendations.
    """
    vocabulary = check_ids("recommend", "items", histories.items if items is None else items)
    known, n_unknown = map_items(histories.x, histories.items, vocabulary)
    k = min(check_integer("recommend", "k", k, 1, None), max(len(vocabulary), 1))
    blocks = recommend_blocks(
        model, known, k, items=vocabulary, keep_seen=keep_seen, allowed=allowed, exclude=exclude,
        popularity_penalty=popularity_penalty, popularity=popularity, parallel=parallel, group=group,
    )  # fmt: skip
    n_empty: list[int] = []

    def write(blocks: Iterable[Recommendations]) -> None:
        write_recommendations(path, histories.users, blocks, format=format)

    blocks = _counting_empty(blocks, n_empty)
    if parallel is None:
        write(blocks)
    else:
        from ._parallel_scores import made_by_first
        from .parallel import Processes

        made_by_first(Processes("recommend", parallel, group), blocks, write)
    return Written(
        len(histories.users),
        k,
        n_clicks=histories.x.nnz,
        n_unknown=n_unknown,
        n_new=int((known.row_lengths() == 0).sum()),
        n_empty=sum(n_empty),
    )


def _counting_empty(
    blocks: Iterator[Recommendations], n_empty: list[int]
) -> Iterator[Recommendations]:
    """The blocks, with the number of users who got nothing added to n_empty for each."""
    for block in blocks:
        n_empty.append(int((block.items[:, 0] < 0).sum()))
        yield block


def write_recommendations(
    path: str | os.PathLike[str],
    user_ids: Sequence[Any] | np.ndarray,
    recommendations: Recommendations | Iterable[Recommendations],
    items: Sequence[str] | None = None,
    format: str | None = None,
) -> int:
    r"""Write recommendations as CSV, JSON lines or Parquet, block by block; returns the number of users.

        csv, parquet  columns user, rank (from 1), item, score: one row per recommended item
        jsonl         {"user": "u1", "items": ["b", "c"], "scores": [1.5, -0.25]}: one line per user

    >>> import tempfile, torch
    >>> found = Recommendations(torch.tensor([[1, -1]]), torch.tensor([[0.5, -torch.inf]]), ["a", "b"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "top.jsonl")
    ...     write_recommendations(path, ["Ann"], found), path.read_text()
    (1, '{"user": "Ann", "items": ["b"], "scores": [0.5]}\n')

    path             ends in .csv, .jsonl, .ndjson or .parquet where format is None
    user_ids         external id of each user, in the order of the recommendations; written as text
    recommendations  what recommend returns, or the blocks of recommend_blocks, written as they come
    items            external ids by item index; default: the recommendations' vocabulary, else the indices
    format           "csv", "jsonl" or "parquet" (polars, from the extra cli)

    UTF-8; CSV as in RFC 4180, lines end in CR LF. Scores are written so that they read back as the same fp32.
    The file appears when it is complete: until then an older one stays. Raises: ValueError for an unknown
    suffix or format, a missing folder, or a number of user_ids that differs; ImportError without polars.
    """
    path = Path(path)
    format = format or _SUFFIXES.get(path.suffix.lower(), "")
    writers = {"csv": _write_csv, "jsonl": _write_jsonl, "parquet": _write_parquet}
    if format not in writers:
        argument = (
            f"format must be csv, jsonl or parquet, got {format!r}"
            if format
            else f"path must end in .csv, .jsonl or .parquet, got {path.name!r}"
        )
        raise ValueError(f"write_recommendations: {argument}")
    if not path.parent.is_dir():
        raise ValueError(
            f"write_recommendations: path must lie in an existing folder, got {str(path)!r}; "
            "create the folder first"
        )
    if path.exists() and not path.is_file():
        raise ValueError(
            f"write_recommendations: path must be a file, got a folder or a device, {str(path)!r}"
        )
    blocks = recommendations
    if isinstance(blocks, Recommendations):
        # text takes ten times the memory of the tensors
        blocks = blocks._split(4096)
    user_ids = check_ids("write_recommendations", "user_ids", user_ids, distinct=False)
    users = np.array([*map(str, user_ids), ""], dtype=object)[:-1]
    with replacing(path) as temporary:
        writers[format](temporary, _named(blocks, users, items))
    return len(users)


class _Named(NamedTuple):
    """A block in external ids.

    users   [n_users]     str objects
    items   [n_users, k]  str objects; "" beyond n_left
    scores  [n_users, k]  fp32
    n_left  [n_users]     number of recommended items
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    n_left: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """One row per recommended item."""
        row, column = np.nonzero(np.arange(self.items.shape[1]) < self.n_left[:, None])
        item, score = self.items[row, column], self.scores[row, column]
        return {"user": self.users[row], "rank": column + 1, "item": item, "score": score}


def _named(
    blocks: Iterable[Recommendations], users: np.ndarray, items: Sequence[str] | None
) -> Iterator[_Named]:
    """Blocks with external ids; raises where they do not have len(users) users in all."""
    start, vocabulary, names = 0, None, np.array([""], dtype=object)
    for block in blocks:
        new = block.vocabulary if items is None else items
        if new is not vocabulary:
            vocabulary = new
            ids = [] if new is None else check_ids("write_recommendations", "items", new)
            names = np.array([*map(str, ids), ""], dtype=object)
        index = block.items.numpy()
        left = index >= 0
        # without a vocabulary the indices stand for the ids; padding is -1, the "" at the end of names
        text = np.where(left, index.astype(str), "") if vocabulary is None else names[index]
        stop = start + len(block)
        if stop <= len(users):
            yield _Named(users[start:stop], text, block.scores.numpy(), left.sum(1))
        start = stop
    if start != len(users):
        raise ValueError(
            f"write_recommendations: user_ids must have {start} ids, one per user, got {len(users)}"
        )


def _write_csv(path: Path, blocks: Iterable[_Named]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "rank", "item", "score"])
        for block in blocks:
            columns = block.columns()
            # the shortest text that is the same fp32
            columns["score"] = columns["score"].astype(str)
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _write_jsonl(path: Path, blocks: Iterable[_Named]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for block in blocks:
            scores = block.scores.astype(str).tolist()
            for u, n in enumerate(block.n_left):
                line = {"user": block.users[u], "items": block.items[u, :n].tolist()}
                text = json.dumps(line, ensure_ascii=False)
                file.write(f'{text[:-1]}, "scores": [{", ".join(scores[u][:n])}]}}\n')


def _write_parquet(path: Path, blocks: Iterable[_Named]) -> None:
    try:
        import polars as pl
        from polars.io.plugins import register_io_source
    except ImportError as error:
        raise ImportError(
            "write_recommendations: Parquet needs polars; run pip install 'fastvae-cf[cli]'"
        ) from error
    schema = {"user": pl.String, "rank": pl.Int32, "item": pl.String, "score": pl.Float32}

    def frames(*_: Any) -> Iterator[pl.DataFrame]:
        return (pl.DataFrame(block.columns(), schema=schema) for block in blocks)

    # a lazy source: polars writes each block and lets it go
    try:
        register_io_source(frames, schema=schema).sink_parquet(path)
    except pl.exceptions.PolarsError as error:
        # polars' many lines about a full disk
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
