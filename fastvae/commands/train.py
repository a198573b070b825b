"""fastvae train: from a dataset folder to a run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import console
from ..data import Dataset
from ..models import MultiDAE, MultiVAE
from ..options import DatasetArg, Device, FitOptions, ModelOptions, with_options
from ..train import fit
from ._common import device_named


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
    net = _model(**asdict(model_options), n_items=data.n_items).to(device_named(device))
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


def _model(
    model: str, hidden: str, latent: int, dropout: float, n_items: int
) -> MultiVAE | MultiDAE:
    if model not in ("vae", "dae"):
        raise ValueError(f"train: model must be vae or dae, got {model}")
    try:
        widths = [] if hidden == "none" else [int(width) for width in hidden.split(",")]
    except ValueError:
        raise ValueError(
            f"train: hidden must be widths such as 600 or 1000,600, or none, got {hidden}"
        ) from None
    p_dims = [latent, *widths[::-1], n_items]
    dropout_enc = [dropout] + [0.0] * len(widths)
    try:
        return (MultiVAE if model == "vae" else MultiDAE)(p_dims, dropout_enc)
    except (RuntimeError, OverflowError, TypeError) as error:
        # torch's words for too many bytes
        raise ValueError(
            f"train: hidden and latent must be widths whose weights fit in memory, got {p_dims}"
        ) from error
