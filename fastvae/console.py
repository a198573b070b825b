"""What the command prints: results on stdout, notes and errors on stderr, tables. Names in a text are never markup."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import Dataset
from .evaluate import Evaluation
from .events import DROPPED, Events

out, err = Console(), Console(stderr=True)


def say(text: str) -> None:
    """A line of results on stdout."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def heading(text: str) -> None:
    """A line across stdout with the text in it."""
    out.rule(Text(text))


def note(text: str) -> None:
    """A line on stderr, of what a user should know and need not mend."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """A line on stderr, of what went wrong."""
    err.print(f"fastvae: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


def note_dropped(log: Events) -> None:
    """Say which events of a log are not used."""
    dropped = [f"{n:,} with {DROPPED[why]}" for why, n in log.info["dropped"].items() if n]
    if dropped:
        note(f"of {log.info['n_events']:,} events, dropped {'; '.join(dropped)}")


def show_dataset(dataset: Dataset) -> None:
    """Print what became of every event."""
    joined = dataset.info["source"].get("lines_joined_by_quotes", 0)
    if joined:
        note(
            f"{joined:,} line ends lie inside double quotes and were read as part of an id; look for a stray quote"
        )
    table = Table("events", "number", box=None)
    table.columns[1].justify = "right"
    for text, n in dataset.report():
        table.add_row(Text(text), f"{n:,}")
    odd = dataset.info["source"].get("kept_without_a_number", 0)
    if odd:
        note(
            f"{odd:,} events have a rating that is not a number and were kept as clicks; "
            "with --min-rating they would be dropped"
        )
    out.print(table)
    sizes = (len(ids) for ids in (dataset.users_train, dataset.users_vad, dataset.users_test))
    users = "{:,} train, {:,} validation, {:,} test".format(*sizes)
    say(f"users: {users}; {len(dataset.items):,} items")


def show_results(results: dict[str, Evaluation]) -> None:
    """Print a table of metrics, a row for each model."""
    first = next(iter(results.values()))
    table = Table("", *first.mean)
    for name, result in results.items():
        values = (f"{result.mean[m]:.4f} ± {result.stderr[m]:.4f}" for m in result.mean)
        table.add_row(Text(name), *values)
    out.print(table)
    say(f"{first.n_evaluated:,} users evaluated, {first.n_skipped:,} skipped")
