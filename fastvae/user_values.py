"""The metrics of each user to a file, CSV or Parquet: a row for each model and user."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._checks import check_ids
from ._files import replacing
from .evaluate import Evaluation


def write_user_values(
    path: str | os.PathLike[str],
    user_ids: Sequence[Any] | np.ndarray,
    results: Mapping[str, Evaluation],
) -> int:
    r"""Write columns model, user and one for each metric; returns the number of rows.

    >>> import tempfile
    >>> found = Evaluation({"hit@1": 0.5}, {"hit@1": 0.5}, 2, 1, np.array([0, 2]), {"hit@1": np.array([1.0, 0.0])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "users.csv")
    ...     write_user_values(path, ["Ann", "Bob", "Cem"], {"MultiVAE": found}), path.read_text()
    (2, 'model,user,hit@1\nMultiVAE,Ann,1.0\nMultiVAE,Cem,0.0\n')

    path      ends in .csv or .parquet (polars, from the extra cli); it appears when it is complete
    user_ids  external id of each row of fold_in and held_out, such as Dataset.users_test; written as text
    results   by the name of the model, what evaluate gave for these users, all of the same metrics. Users who were not
              evaluated have no row; coverage, which is of all users together, has no column

    Raises: ValueError for another suffix, a missing folder, too few ids, or without a metric of single users; ImportError without polars.
    """
    path = check_user_values_path(path)
    users = check_ids("write_user_values", "user_ids", user_ids, distinct=False)
    metrics = [*next(iter(results.values())).values] if results else []
    for name, result in results.items():
        if not result.values:
            raise ValueError(
                "write_user_values: results must have a metric with a value for each user, got "
                f"{', '.join(result.mean)} for {name}"
            )
        if [*result.values] != metrics:
            raise ValueError(
                f"write_user_values: results must be of the same metrics, got {', '.join(metrics)} and "
                f"{', '.join(result.values)} for {name}"
            )
    columns: dict[str, list[Any]] = {"model": [], "user": []}
    for name, result in results.items():
        rows = [] if result.users is None else result.users.tolist()
        if rows and rows[-1] >= len(users):
            raise ValueError(
                f"write_user_values: user_ids must have the ids of {rows[-1] + 1:,} users or more, got {len(users):,}"
            )
        columns["model"] += [name] * len(rows)
        columns["user"] += [str(users[row]) for row in rows]
        for metric, values in result.values.items():
            columns.setdefault(metric, []).extend(values.tolist())
    with replacing(path) as temporary:
        (_write_csv if path.suffix.lower() == ".csv" else _write_parquet)(temporary, columns)
    return len(columns["user"])


def check_user_values_path(path: str | os.PathLike[str]) -> Path:
    """The path, where a file of this suffix can be written. Raises: as write_user_values."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"write_user_values: path must end in .csv or .parquet, got {path.name!r}")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(
            f"write_user_values: path must be a file in an existing folder, got {str(path)!r}"
        )
    return path


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError(
            "write_user_values: Parquet needs polars; run pip install 'fastvae-cf[cli]'"
        ) from error
    pl.DataFrame(columns).write_parquet(path)
