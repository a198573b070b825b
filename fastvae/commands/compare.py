"""fastvae compare: two runs on the same held-out users, with intervals and a paired test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..compare import check_settings, compare
from ..data import Dataset
from ..evaluate import Evaluation, evaluate
from ..options import DatasetArg, Device, Quirk
from ._common import check_users, device_named, load_run, measured_clicks
from .evaluate import DEFAULT_METRICS


def compare_command(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint file.")],
    other: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    dataset: DatasetArg,
    users: Annotated[str, typer.Option(help="test or vad (validation).")] = "test",
    metric: Annotated[
        list[str],
        typer.Option(
            help="As for evaluate, without coverage, which no single user has; may be given several times."
        ),
    ] = DEFAULT_METRICS,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    samples: Annotated[int, typer.Option(help="Bootstrap samples of the users.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of these samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:
    """Compare two runs on the same users: bootstrap intervals, and a paired t-test of the difference."""
    check_users("compare", users)
    for name in metric:
        if name.startswith("coverage@"):
            raise ValueError(
                f"compare: metric must have a value for each user, got {name}, which is of all users together"
            )
    # before minutes of work
    check_settings(confidence, samples, seed)
    data = Dataset.load(dataset)
    results: list[Evaluation] = []
    for path in (run, other):
        net, vocabulary = load_run(path, tanh_after_dropout)
        train, fold_in, held_out = measured_clicks(path, data, users, net.n_items, vocabulary)
        net = net.to(device_named(device))
        results.append(evaluate(net, fold_in, held_out, metrics=metric, train=train))
    found = compare(*results, confidence=confidence, n_samples=samples, seed=seed)
    if as_json:
        print(json.dumps({name: result.to_dict() for name, result in found.items()}))
    else:
        console.show_comparison(found, str(run), str(other), confidence)
