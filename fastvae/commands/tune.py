"""fastvae tune: from a dataset folder to the settings that it wants."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .. import tune as library
from ..options import DatasetArg, Device
from ..trials import Trial, Tuning
from ._common import device_named


def tune(
    dataset: DatasetArg,
    runs: Annotated[
        Path, typer.Argument(help="Folder of the search; one that is there already goes on.")
    ],
    trials: Annotated[int, typer.Option(help="Trials in all, those of before included.")] = 20,
    jobs: Annotated[int, typer.Option(help="Trials at once.")] = 1,
    model: Annotated[str, typer.Option(help="vae (Mult-VAE) or dae (Mult-DAE).")] = "vae",
    epochs: Annotated[int, typer.Option(help="Most epochs of a trial.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Users per update.")] = 100,
    patience: Annotated[
        int, typer.Option(help="End a trial after so many epochs without a better NDCG@100.")
    ] = 5,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or tf32 on a GPU.")] = "fp32",
    seed: Annotated[
        int, typer.Option(help="Of initial weights, order of users, dropout, noise and trials.")
    ] = 0,
    device: Device = None,
) -> None:
    """Search for the cap of beta, widths, dropout and learning rate by validation NDCG@100 (extra tune)."""
    result = library.tune(
        dataset, runs, trials=trials, jobs=jobs, model=model, epochs=epochs,
        batch_size=batch_size, patience=patience, precision=precision, seed=seed,
        device=device_named(device), progress=True, on_trial=_say_trial,
    )  # fmt: skip
    console.show_trials(result)
    reached = [ndcg for _, ndcg in result.annealing]
    if len(reached) >= epochs and max(reached) == reached[-1]:
        console.note(
            "the annealing run was best at its last epoch and might have gone on, so the cap of beta says little; raise "
            "--epochs, in a new folder"
        )
    best = result.best
    options = {
        "--model": model, "--hidden": best.hidden, "--latent": best.latent, "--dropout": best.dropout,
        "--lr": repr(best.lr), "--anneal-cap": result.anneal_cap, "--total-anneal-steps": result.total_anneal_steps,
        "--batch-size": batch_size, "--epochs": epochs, "--patience": patience,
        "--precision": precision, "--seed": seed,
    }  # fmt: skip
    words = " ".join(f"{name} {value}" for name, value in options.items())
    console.say(f"wrote {runs / library.TABLE} and {runs / library.PLOT}; the best again:")
    console.say(f"fastvae train {shlex.quote(str(dataset))} run {words}")


def _say_trial(trial: Trial, tuning: Tuning) -> None:
    said = f"NDCG@100 {trial.ndcg:.4f} at epoch {trial.best_epoch} of {trial.epochs}"
    console.say(
        f"trial {trial.number}, {len(tuning.trials)} ended: hidden {trial.hidden}, latent {trial.latent}, dropout {trial.dropout}, "
        f"lr {trial.lr:.2g}: {'failed' if trial.state == 'failed' else said}"
        + (", pruned" if trial.state == "pruned" else "")
    )
