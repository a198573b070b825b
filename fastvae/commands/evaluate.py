"""fastvae evaluate: metrics of a run on held-out users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..data import Dataset, map_items
from ..evaluate import METRICS, Popularity, evaluate
from ..options import DatasetArg, Device, Quirk, RunArg
from ..run_folder import read_config
from ._common import check_items, device_named, load_run

DEFAULT_METRICS = list(METRICS)


def evaluate_command(
    run: RunArg,
    dataset: DatasetArg,
    users: Annotated[str, typer.Option(help="test or vad (validation).")] = "test",
    metric: Annotated[
        list[str],
        typer.Option(help="Such as ndcg@100 or recall@20; may be given several times."),
    ] = DEFAULT_METRICS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tanh_after_dropout: Quirk = False,
    device: Device = None,
) -> None:
    """Measure a model on held-out users, beside the popularity baseline."""
    if users not in ("test", "vad"):
        raise ValueError(f"evaluate: users must be test or vad, got {users}")
    net, vocabulary = load_run(run, tanh_after_dropout)
    data = Dataset.load(dataset)
    check_items(run, net.n_items, vocabulary, data.items)
    _warn_of_other_split(run, data)
    parts = data.test if users == "test" else data.validation
    # the checkpoint's order of the items counts, not the dataset's
    train_clicks, fold_in, held_out = (
        map_items(x, data.items, vocabulary or data.items)[0] for x in (data.train, *parts)
    )
    net = net.to(device_named(device))
    results = {
        type(net).__name__: evaluate(net, fold_in, held_out, metrics=metric),
        "popularity": evaluate(Popularity(train_clicks), fold_in, held_out, metrics=metric),
    }
    if as_json:
        print(json.dumps({name: result.to_dict() for name, result in results.items()}))
    else:
        console.show_results(results)


def _warn_of_other_split(run: Path, data: Dataset) -> None:
    """A line on stderr where the run was trained on other users than the dataset's: test users may be among them."""
    folder = run.parent if run.name in ("best.pt", "last.pt") else run
    if not (folder / "config.json").is_file():
        return
    if read_config(folder).get("train") != data.train.fingerprint():
        console.note(
            f"{run} was trained on other clicks than this dataset's train users; users that it knows may be among "
            "those measured here"
        )
