"""What the command prints: results on stdout, notes and errors on stderr, tables. Names in a text are never markup, nor :emoji:."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from .compare import Comparison
from .data import Dataset
from .evaluate import Evaluation
from .events import REASONS, Events
from .trials import Tuning

out, err = Console(), Console(stderr=True)


def say(text: str) -> None:
    """A line of results on stdout."""
    out.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def heading(text: str) -> None:
    """A line across stdout with the text in it."""
    out.rule(Text(text))


def note(text: str) -> None:
    """A line on stderr, of what a user should know and need not mend."""
    err.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def complain(text: str) -> None:
    """A line on stderr, of what went wrong."""
    err.print(
        f"fastvae: {text}", style="red", highlight=False, markup=False, emoji=False, soft_wrap=True
    )


def note_dropped(log: Events) -> None:
    """Say which events of a log are not used."""
    dropped = [f"{n:,} with {REASONS[why]}" for why, n in log.info["dropped"].items() if n]
    if dropped:
        note(f"of {log.info['n_events']:,} events, dropped {'; '.join(dropped)}")


def note_doubts(log: Events) -> None:
    """Say what was read in one way and may have been meant in another."""
    source = log.info["source"]
    columns = source.get("columns", {})
    if columns and not source["header"]:
        users, items = (
            f"the {role}s are column {columns[role]} ({len(ids):,} ids, such as {_shown(ids)})"
            for role, ids in (("user", log.users), ("item", log.items))
        )
        rating = f", the ratings are column {columns['rating']}" if "rating" in columns else ""
        note(
            f"{source['file']} has no header: {users}, {items}{rating}; --user and --item name other columns"
        )
    for label in source.get("labels_of_0", ()):
        note(
            f"column {label['column']!r} says no for {label['events']:,} of {log.info['n_events']:,} events, which "
            f"were read as clicks all the same; --rating {label['column']} --min-rating 1 leaves them out"
        )
    for kind in source.get("kinds_of_events", ()):
        kinds = ", ".join(f"{name[:40]!r} ({n:,})" for name, n in list(kind["events"].items())[:5])
        note(
            f"column {kind['column']} says that events are of {len(kind['events'])} kinds, {kinds}, which were all read "
            "as clicks; where some are none, leave out their lines"
        )
    for doubt in source.get("perhaps_no_ids", ()):
        share = doubt["events"] / log.info["n_events"]
        note(
            f"{doubt['role']} {doubt['id'][:40]!r} has {doubt['events']:,} events, {share:.1%} of all; "
            "where this stands for no id, remove those lines"
        )
    if source.get("quoted_ids"):
        note(
            f"{source['quoted_ids']:,} ids keep the quotes around them, which are part of an id where the columns "
            "are separated by tabs or ::, and single quotes everywhere"
        )
    if source.get("ids_with_spaces"):
        note(
            f"{source['ids_with_spaces']:,} ids have spaces around them, which are part of an id; "
            "another log must have them too"
        )
    if source.get("rounded_ids"):
        note(
            f"{source['rounded_ids']:,} ids are numbers such as 1.23E+11, as spreadsheets shorten them; different ids may "
            "have become the same, so export the log anew with its ids as text"
        )
    _note_line_ends(source)
    _note_times(source)
    if source.get("kept_without_a_number"):
        note(
            f"{source['kept_without_a_number']:,} events have a rating that is not a number and were kept as clicks; "
            "with --min-rating they would be dropped"
        )


def _note_times(source: dict[str, Any]) -> None:
    if "time_of_all" in source:
        note(
            f"all events have the same time, {source['time_of_all']}; clicks of one time are put in order at random by --seed"
        )
    if source.get("times_for_none"):
        note(
            f"{source['times_for_none']:,} events have the time 0 or -1 where the others are since 1970; they count as "
            "events without a time"
        )
    if source.get("times_far_off"):
        note(
            f"{source['times_far_off']:,} events have a time far from the others, such as {source['first_time_far_off']}, "
            "and are put in order all the same; the others lie between 1982 and 2039"
        )


def _note_line_ends(source: dict[str, Any]) -> None:
    joined, in_ids = (
        source.get(name, 0) for name in ("lines_joined_by_quotes", "line_ends_in_ids")
    )
    if in_ids:
        note(
            f"{in_ids:,} line ends lie inside double quotes and were read as part of an id; look for a stray quote"
        )
    if joined > in_ids:
        note(
            f"{joined - in_ids:,} line ends lie inside double quotes of other columns than user and item; where "
            "those hold no texts of several lines, look for a stray quote"
        )


def _shown(ids: Any) -> str:
    return repr(ids[0][:40]) if len(ids) else "none"


def show_dataset(dataset: Dataset) -> None:
    """Print which columns were read, and what became of every event."""
    columns = dataset.info["source"].get("columns")
    if columns:
        say("columns: " + ", ".join(f"{role} {name!r}" for role, name in columns.items()))
    table = Table("events", "number", box=None)
    table.columns[1].justify = "right"
    for text, n in dataset.report():
        table.add_row(Text(text), f"{n:,}")
    out.print(table)
    sizes = [len(ids) for ids in (dataset.users_train, dataset.users_vad, dataset.users_test)]
    users = "{:,} train, {:,} validation, {:,} test".format(*sizes)
    shared = ", the same in all three" if dataset.shares_users else ""
    say(f"users: {users}{shared}; {len(dataset.items):,} items")
    for name, n_users in (("validation", sizes[1]), ("test", sizes[2])):
        held_out = dataset.info["n_evaluated"]["vad" if name == "validation" else name]
        if n_users and not held_out:
            note(
                f"no {name} user has a click held out, so that nothing can be measured on them; a larger "
                "--held-out-fraction holds out more"
            )


def show_results(results: dict[str, Evaluation]) -> None:
    """Print a table of metrics, a row for each model."""
    first = next(iter(results.values()))
    table = Table("", *first.mean)
    for name, result in results.items():
        table.add_row(Text(name), *map(result.text, result.mean))
    out.print(table)
    say(f"{first.n_evaluated:,} users evaluated, {first.n_skipped:,} skipped")


def show_comparison(
    found: dict[str, Comparison], first: str, second: str, confidence: float
) -> None:
    """Print a table of two runs, a row for each metric."""

    def text(mean: float, interval: tuple[float, float], sign: str = "") -> str:
        return f"{mean:{sign}.4f} ({interval[0]:{sign}.4f} to {interval[1]:{sign}.4f})"

    table = Table("", Column(Text(first)), Column(Text(second)), "difference", "p")
    for name, result in found.items():
        table.add_row(
            name,
            text(result.a, result.a_interval),
            text(result.b, result.b_interval),
            text(result.difference, result.difference_interval, "+"),
            f"{result.p_value:.2g}",
        )
    out.print(table)
    n_users = next(iter(found.values())).n_users
    say(
        f"{n_users:,} users in both; {confidence:.0%} bootstrap intervals over users, p of a paired t-test; "
        "another split or seed of the training varies more than that"
    )


def show_trials(tuning: Tuning, most: int = 10) -> None:
    """Print the best trials of a search, a row each."""
    names = ("number", "state", "ndcg", "best_epoch", "hidden", "latent", "dropout", "lr")
    table = Table("trial", "", "NDCG@100", "best epoch", *names[4:], box=None)
    for trial in tuning.trials[:most]:
        values = {**vars(trial), "ndcg": f"{trial.ndcg:.4f}", "lr": f"{trial.lr:.2g}"}
        table.add_row(*(str(values[name]) for name in names))
    out.print(table)
    say(
        f"cap of beta {tuning.anneal_cap:.3g}, read off {len(tuning.annealing)} epochs of annealing"
    )
