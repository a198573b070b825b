"""fastvae prepare: from a click log to a dataset folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..data import split_dataset
from ..dataset_folder import check_writable
from ..events import read_events
from ..options import LogOptions, with_options


@with_options
def prepare(
    events: Annotated[
        Path, typer.Argument(help="Click log: CSV, TSV, .inter or Parquet; text may be gzipped.")
    ],
    folder: Annotated[Path, typer.Argument(help="Dataset folder to write.")],
    log_options: LogOptions,
    min_user_clicks: Annotated[int, typer.Option(help="Drop users with fewer items.")] = 5,
    min_item_clicks: Annotated[
        int, typer.Option(help="Drop items with fewer users, before the users are counted.")
    ] = 0,
    heldout: Annotated[
        str,
        typer.Option(
            help="Users for validation, and as many for test: a count, or a fraction such as 0.1."
        ),
    ] = "0.1",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    counts: Annotated[
        bool, typer.Option("--counts", help="Keep how often a user clicked an item.")
    ] = False,
) -> None:
    """Turn a click log into a dataset folder: train, validation and test users, with what was dropped and why."""
    # before minutes of work
    check_writable(folder)
    log = read_events(events, **asdict(log_options), counts=counts)
    console.note_doubts(log)
    dataset = split_dataset(
        log,
        _heldout(heldout),
        seed,
        min_user_clicks=min_user_clicks,
        min_item_clicks=min_item_clicks,
    )
    dataset.save(folder)
    console.show_dataset(dataset)
    console.say(f"wrote {folder}; next: fastvae train {folder} RUN")


def _heldout(text: str) -> float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"prepare: heldout must be a count or a fraction, got {text}") from None
