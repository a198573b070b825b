"""fastvae prepare: from a click log to a dataset folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from ..data import split_dataset
from ..dataset_folder import check_writable
from ..event_table import NoSuchColumn
from ..events import Events, read_events
from ..options import LogOptions, with_options

Split = Annotated[
    str,
    typer.Option(
        help="users: held-out users are in no other part. time: the last clicks of every user are held out. "
        "leave-one-out: the last click of every user; a random one where the log has no times."
    ),
]
HeldOutUsers = Annotated[
    str | None,
    typer.Option(
        help="For --split users: users for validation, and as many for test; a count, or a fraction such as 0.1.",
        show_default="0.1",
    ),
]
HeldOutFraction = Annotated[
    float | None,
    typer.Option(
        help="For --split users, and time without --date: share of a user's clicks that is held out.",
        show_default="0.2",
    ),
]
TimeColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the times, for --split time and leave-one-out.", show_default="guessed"
    ),
]
FirstDate = Annotated[
    str | None,
    typer.Option(help="For --split time: hold out all clicks from here on.", show_default="none"),
]


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
    split: Split = "users",
    heldout: HeldOutUsers = None,
    held_out_fraction: HeldOutFraction = None,
    time: TimeColumn = None,
    date: FirstDate = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    counts: Annotated[
        bool, typer.Option("--counts", help="Keep how often a user clicked an item.")
    ] = False,
) -> None:
    """Turn a click log into a dataset folder: train, validation and test users, with what was dropped and why."""
    # before minutes of work
    check_writable(folder)
    log = _read(events, time, split, {**asdict(log_options), "counts": counts})
    console.note_doubts(log)
    dataset = split_dataset(
        log,
        _heldout(heldout),
        seed,
        min_user_clicks=min_user_clicks,
        min_item_clicks=min_item_clicks,
        held_out_fraction=held_out_fraction,
        by=split,
        date=date,
    )
    dataset.save(folder)
    console.show_dataset(dataset)
    console.say(f"wrote {folder}; next: fastvae train {folder} RUN")


def _read(path: Path, time: str | None, split: str, options: dict[str, Any]) -> Events:
    """The log, with times where the split goes by them."""
    if split == "users":
        if time is None:
            return read_events(path, **options)
        console.note(
            "--time only drops events without a time where --split is users; --split time and leave-one-out go by the times"
        )
    try:
        return read_events(path, **options, time=time or True)
    except NoSuchColumn as error:
        if split != "leave-one-out" or time is not None or error.role != "time":
            raise
    console.note(
        "no column has a usual name for times, so the click that is held out of each user is drawn at random by --seed; "
        "--time names a column for the last one"
    )
    return read_events(path, **options)


def _heldout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"prepare: heldout must be a count or a fraction, got {text}") from None
