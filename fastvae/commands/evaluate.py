"""fastvae evaluate: metrics of a run on held-out users, beside the baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from ..baselines import choose_baselines
from ..data import Dataset
from ..evaluate import METRICS, Evaluation, evaluate
from ..options import DatasetArg, Device, Parallel, Quirk, RunArg
from ..user_values import check_user_values_path, write_user_values
from ._common import check_users, load_run, measured_clicks
from ._processes import is_first, own_device, several, shared_scores, together

DEFAULT_METRICS = list(METRICS)


def evaluate_command(
    run: RunArg,
    dataset: DatasetArg,
    users: Annotated[str, typer.Option(help="test or vad (validation).")] = "test",
    metric: Annotated[
        list[str],
        typer.Option(
            help="Such as ndcg@100: ndcg, recall, precision, map, mrr, hit, novelty or coverage; may be given "
            "several times.",
            metavar="<str>",
        ),
    ] = DEFAULT_METRICS,
    baselines: Annotated[
        bool | None,
        typer.Option(
            "--baselines/--no-baselines",
            help="Item-kNN and EASE beside popularity.",
            show_default="where they take seconds",
        ),
    ] = None,
    per_user: Annotated[
        Path | None,
        typer.Option(
            help="File for the metrics of each user: .csv or .parquet.", show_default="none"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
    parallel: Parallel = None,
) -> None:
    """Measure a model on held-out users, beside baselines that it should beat."""
    with several("evaluate", parallel, device) as processes:
        with together(processes):
            check_users("evaluate", users)
            if per_user is not None:
                # before minutes of work
                check_user_values_path(per_user)
            net, vocabulary = load_run(run, tanh_after_dropout)
            data = Dataset.load(dataset)
            train, fold_in, held_out = measured_clicks(run, data, users, net.n_items, vocabulary)
            net = net.to(own_device(device))
        shared = shared_scores(processes, parallel, fold_in.n_users)
        options: dict[str, Any] = {"metrics": metric, "train": train}
        results = {type(net).__name__: evaluate(net, fold_in, held_out, **options, **shared)}
        makers, left_out = choose_baselines(train, baselines)
        if shared:
            # baselines have no last layer whose items could be shared
            options["parallel"] = "users"
        for name, make in makers.items():
            with together(processes):
                baseline = make(train)
            results[name] = evaluate(baseline, fold_in, held_out, **options)
        with together(processes):
            if per_user is not None and is_first(processes):
                ids = data.users_test if users == "test" else data.users_vad
                write_user_values(per_user, ids, results)
        if is_first(processes):
            _show(results, left_out, as_json)


def _show(results: dict[str, Evaluation], left_out: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: result.to_dict() for name, result in results.items()}))
    else:
        console.show_results(results)
    for why in left_out:
        console.note(why)
