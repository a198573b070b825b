"""fastvae train: from a dataset folder to a run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import console
from ..data import Dataset
from ..options import DatasetArg, Device, FitOptions, ModelOptions, with_options
from ..train import fit
from ._common import device_named, new_model


@with_options
def train(
    dataset: DatasetArg,
    run: Annotated[Path, typer.Argument(help="Run folder to write.")],
    model_options: ModelOptions,
    fit_options: FitOptions,
    device: Device = None,
) -> None:
    """Train a model; the run folder gets config, metrics, best and last checkpoint and the learning curve."""
    data = Dataset.load(dataset)
    seed = fit_options.seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"train: seed must lie in [0, 2**63), got {seed}")
    if len(data.users_vad) and not data.info["n_evaluated"]["vad"]:
        raise ValueError(
            f"train: dataset must have a validation user with held-out clicks, got none of {len(data.users_vad):,}; "
            "prepare it with a larger --heldout, or with --heldout 0 to train without validation"
        )
    torch.manual_seed(seed)
    net = new_model("train", **asdict(model_options), n_items=data.n_items).to(device_named(device))
    result = fit(
        net,
        data.train,
        data.validation if len(data.users_vad) else None,
        **asdict(fit_options),
        run_dir=run,
        items=list(data.items),
        progress=True,
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
