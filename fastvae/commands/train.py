"""fastvae train: from a dataset folder to a run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import console
from ..data import Dataset
from ..defaults import make_plan
from ..options import DatasetArg, Device, FitOptions, ModelOptions, with_options
from ..train import fit
from ._common import new_model
from ._processes import own_device, resumes, several, shared_training, together


@with_options
def train(
    dataset: DatasetArg,
    run: Annotated[Path, typer.Argument(help="Run folder to write.")],
    model_options: ModelOptions,
    fit_options: FitOptions,
    device: Device = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun: users or items, which the processes share.",
            show_default="items where the batch is smaller than their number",
        ),
    ] = None,
) -> None:
    """Train a model; the run folder gets config, metrics, best and last checkpoint and the learning curve."""
    with several("train", parallel, device) as processes:
        with together(processes):
            data = _loaded(dataset, fit_options.seed)
            torch.manual_seed(fit_options.seed)
            net = new_model("train", **asdict(model_options), n_items=data.n_items)
            net = net.to(own_device(device))
        shared = {}
        if processes is not None:
            batch_size = fit_options.batch_size or _batch_size(data, fit_options)
            shared = shared_training(processes, parallel, batch_size, data.n_items)
        shared_resume = resumes(processes, fit_options.resume, run)
        result = fit(
            net,
            data.train,
            data.validation if len(data.users_vad) else None,
            **asdict(fit_options) | {"resume": shared_resume},
            run_dir=run,
            items=list(data.items),
            progress=True,
            **shared,
        )
    if not result.history:
        console.say("no epoch trained")
        return
    best = f"best epoch {result.best_epoch}"
    if len(data.users_vad):
        best += f", validation NDCG@100 {result.best_metric:.4f}"
    console.say(
        f"{best}; wrote {run / 'best.pt'} and {run / 'curve.png'}; next: fastvae evaluate {run} {dataset}"
    )


def _batch_size(data: Dataset, options: FitOptions) -> int:
    """What fit will choose."""
    return make_plan(
        data.train.n_users,
        validated=len(data.users_vad) > 0,
        anneal_cap=options.anneal_cap,
        preset=options.preset,
        given={"epochs": options.epochs},
    ).batch_size


def _loaded(dataset: Path, seed: int) -> Dataset:
    data = Dataset.load(dataset)
    if not 0 <= seed < 2**63:
        raise ValueError(f"train: seed must lie in [0, 2**63), got {seed}")
    if len(data.users_vad) and not data.info["n_evaluated"]["vad"]:
        raise ValueError(
            f"train: dataset must have a validation user with held-out clicks, got none of {len(data.users_vad):,}; "
            f"{data.more_held_out()}"
            + ("" if data.shares_users else ", or with --heldout 0 to train without validation")
        )
    return data
