"""fastvae recommend: top-k lists for the users of a click log or of a dataset folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from .._checks import first_of
from ..data import Dataset, map_items
from ..events import Events, read_events
from ..export import recommend_to_file
from ..options import Device, LogOptions, Parallel, Quirk, RuleOptions, RunArg, with_options
from ._common import check_items, load_run, read_ids
from ._processes import own_device, several, shared_scores, together


@with_options
def recommend(
    run: RunArg,
    histories: Annotated[
        Path, typer.Argument(help="Click log of the users to recommend to, or a dataset folder.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write: .csv, .jsonl or .parquet.")],
    log_options: LogOptions,
    rule_options: RuleOptions,
    k: Annotated[int, typer.Option("-k", help="Items per user.")] = 10,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Also recommend items of the history.")
    ] = False,
    users: Annotated[
        str | None,
        typer.Option(
            help="Of a dataset folder: train, vad, test (their fold-in clicks) or all.",
            show_default="all",
        ),
    ] = None,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
    parallel: Parallel = None,
) -> None:
    """Write the top k items of each user, best first, with external ids; items of the history are left out."""
    with several("recommend", parallel, device) as processes:
        with together(processes):
            _check_output(output, histories, rule_options)
            net, vocabulary = load_run(run, tanh_after_dropout)
            rules, counted = _rules(rule_options, histories)
            log = _histories(histories, log_options, users)
            if vocabulary is None:
                _check_log(run, net.n_items, histories, log)
            if counted is not None:
                names = vocabulary or log.items
                rules["popularity"] = map_items(counted.train, counted.items, names)[0]
            net = net.to(own_device(device))
        rules |= shared_scores(processes, parallel, log.x.n_users)
        done = recommend_to_file(
            output, net, log, k, items=vocabulary, keep_seen=keep_seen, **rules
        )
    if done.n_unknown:
        unknown = first_of(sorted({*log.items} - {*(vocabulary or ())}))
        console.note(
            f"{done.n_unknown:,} of {done.n_clicks:,} clicks are on items that the model does not know, such as {unknown}, "
            f"and are ignored; {done.n_new:,} users have no other"
        )
    console.say(f"wrote the top {done.k} of {done.n_users:,} users to {output}")
    if done.n_empty:
        given = [f"--{name}" for name in ("allowed", "exclude") if rules[name] is not None]
        causes = " and ".join([*given, "their history"])
        console.note(f"{done.n_empty:,} users have no recommendation: no item is left by {causes}")


def _check_output(output: Path, histories: Path, rules: RuleOptions) -> None:
    """ValueError where the output would take the place of an input."""
    inputs = {"histories": histories, "allowed": rules.allowed, "exclude": rules.exclude}
    for name, path in inputs.items():
        if path is not None and output.resolve() == path.resolve():
            raise ValueError(
                f"recommend: output must be another file than {name}, got {output} for both"
            )


def _check_log(run: Path, n_items: int, histories: Path, log: Events) -> None:
    """ValueError unless histories have the items of a run that does not hold their ids."""
    if not histories.is_dir():
        raise ValueError(
            f"recommend: histories must be the dataset folder where {run} does not hold the item ids, "
            f"got {histories}; fastvae convert --items gives it them"
        )
    check_items(run, n_items, None, log.items)


def _rules(options: RuleOptions, histories: Path) -> tuple[dict[str, Any], Dataset | None]:
    """Arguments of recommend_to_file, and the dataset whose train users are counted for a penalty."""
    rules = {
        "allowed": read_ids("recommend", "allowed", options.allowed),
        "exclude": read_ids("recommend", "exclude", options.exclude),
        "popularity_penalty": options.popularity_penalty,
    }
    if rules["allowed"] == []:
        # nobody wants a file of empty lists; an empty file of what is excluded may be today's
        raise ValueError(
            f"recommend: allowed must be a file of ids, one a line, got none in {options.allowed}"
        )
    if options.popularity_penalty == 0:
        if options.popularity is not None:
            console.note("--popularity counts for nothing where --popularity-penalty is 0")
        return rules, None
    folder = options.popularity or histories
    if not folder.is_dir():
        raise ValueError(
            "recommend: popularity must be a dataset folder where popularity_penalty is given, "
            f"got {folder}; name the one that the run was trained on"
        )
    return rules, Dataset.load(folder)


def _histories(path: Path, log_options: LogOptions, users: str | None) -> Events:
    """The clicks of a log's or of a dataset folder's users."""
    if path.is_dir():
        for name, value in asdict(log_options).items():
            if value is not None:
                raise ValueError(
                    f"recommend: histories must be a click log where --{name.replace('_', '-')} is given, "
                    "got a dataset folder"
                )
        return Dataset.load(path).histories("all" if users is None else users)
    if users is not None:
        raise ValueError(
            f"recommend: users must not be given with a click log, got {users}; it is for dataset folders"
        )
    log = read_events(path, **asdict(log_options))
    console.note_doubts(log)
    console.note_dropped(log)
    return log
