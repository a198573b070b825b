"""fit(): train a model, with KL annealing, validation, early stopping, checkpoints and exact resume.

    beta(update) = min(anneal_cap, update / total_anneal_steps)     update counted from 0

The loop is in trainer.py, its step in step.py, the files are in run_folder.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ._checks import (
    check_catalogue,
    check_choice,
    check_flag,
    check_ids,
    check_integer,
    check_number,
    check_pair,
    check_per_click,
    shown,
)
from ._interrupt import held_interrupt
from .clicks import Clicks
from .evaluate import unseen
from .models import MultiDAE, MultiVAE
from .progress import ProgressBar
from .run_folder import RunFolder
from .step import check_gradients, check_trainable, precisions, wants_graph
from .trainer import FitResult, OnEpoch, Settings, Trainer, beta_at, epoch_order
from .warm_start import WarmStart

__all__ = ["FitResult", "beta_at", "epoch_order", "fit"]


def fit(
    model: MultiVAE | MultiDAE,
    train: Clicks,
    validation: tuple[Clicks, Clicks] | None = None,
    *,
    epochs: int = 200,
    batch_size: int = 500,
    lr: float = 1e-3,
    anneal_cap: float = 0.2,
    total_anneal_steps: int = 200_000,
    patience: int | None = None,
    per_click: bool = False,
    precision: str = "fp32",
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    items: Sequence[str] | None = None,
    warm_start: str | os.PathLike[str] | None = None,
    progress: bool = False,
    cuda_graph: bool | None = None,
    on_epoch: OnEpoch | None = None,
    parallel: str | None = None,
    group: Any = None,
    normalize: str | None = None,
) -> FitResult:
    """Train a model in place; afterwards it holds the weights of the best validation epoch.

    >>> train = Clicks.from_pairs([0, 0, 1, 1], [0, 1, 1, 2])
    >>> fit(MultiVAE([2, 4, 3]), train, epochs=3).best_epoch
    3

    train       [n_users, n_items]; every user is seen exactly once an epoch, a last partial batch included
    validation  (fold_in, held_out), NDCG@100 after each epoch; None: no validation, the last epoch is the best
    epochs      passes over the users in all, those before a resume included
    batch_size  users per update
    lr          learning rate of Adam
    anneal_cap, total_anneal_steps  see beta_at; total_anneal_steps 0 keeps beta at anneal_cap
    patience    stop after so many epochs without a better validation NDCG@100; None: never
    per_click   divide a user's loss by the user's clicks, see model.loss
    precision   "fp32"; "bf16": products in bf16, weights and sums in fp32; "tf32": on a GPU
    seed        of the order of users, dropout and noise (not of the model's initial weights)
    run_dir     run folder to write, or None; one training at a time
    resume      go on from run_dir's last.pt; the settings above must be those of then, but epochs and patience
    items       external item ids [n_items], distinct, to keep with the checkpoints; a resumed run has those of then
    warm_start  begin with the weights and moments of this checkpoint, or the best of this run folder, matched by items
                (see warm_start.py); a resumed run has them already
    progress    show a progress bar (extra cli)
    normalize   older words for per_click, see model.loss
    cuda_graph  None: on a GPU replay one captured graph per full batch, after three eager steps; False: eager steps;
                True: as None, but refuse a CPU. Where a capture fails, eager steps go on, with a warning
    on_epoch    called with a copy of each epoch's row of metrics.jsonl, once last.pt is written; True ends the training as
                if patience were out. What it raises leaves fit, the model as after this epoch; resume goes on from
                there. A resumed run calls it for the epochs that it trains itself
    parallel    "users" or "items": this is one of several processes, which share each batch's users or the items. All
                call fit with the same arguments; process 0 alone writes, shows and calls back. The numbers are those of
                one process, to rounding. None: one process. See docs/distributed.md
    group       of torch.distributed, where parallel is given; None: the default one

    Raises: ValueError and TypeError for arguments that do not fit, RuntimeError where the loss is not finite; the last
    good checkpoint is named. KeyboardInterrupt: last.pt holds the update reached.
    Source: Liang et al. 2018 (arXiv:1802.05814), sections 2.2 and 4.4.
    """
    check_gradients("fit")
    check_trainable("fit", model)
    device = next(model.parameters()).device
    settings = Settings(
        check_integer("fit", "batch_size", batch_size, 1),
        check_number("fit", "lr", lr, 0, above=True),
        check_number("fit", "anneal_cap", anneal_cap, 0),
        check_integer("fit", "total_anneal_steps", total_anneal_steps, high=None),
        check_per_click("fit", per_click, normalize),
        check_choice("fit", "precision", precision, precisions(device)),
        check_integer("fit", "seed", seed, high=2**63),
    )
    for name, flag in (("resume", resume), ("progress", progress)):
        check_flag("fit", name, flag)
    wants_graph("fit", cuda_graph, device)
    _check_data(model, train, validation)
    items = None if items is None else check_ids("fit", "items", items, model.n_items)
    _check_course(epochs, patience, validation, on_epoch, resume, run_dir)
    train = train.to(device)
    make_run, make_trainer, speaks = _makers(model, parallel, group, cuda_graph, warm_start)
    run = None
    if run_dir is not None:
        run = make_run(Path(run_dir), model, settings.config(), train, validation, items)
    if validation is not None:
        validation = _evaluable(validation, device)
    # a resumed run has its weights and moments
    start = None if warm_start is None or resume else _warm_start(warm_start, model, items, run)
    with run.claimed(resume) if run else contextlib.nullcontext():
        trainer = make_trainer(model, train, validation, settings, run, cuda_graph)
        held, shown = held_interrupt(terminated=parallel is not None), progress and speaks
        with ProgressBar(shown, epochs, train.n_users) as bar, held as interrupted:
            _begin(trainer, start, resume, bar)
            trainer.run_epochs(epochs, patience, bar, interrupted, on_epoch)
        trainer.finish()
    return trainer.result


def _warm_start(path, model, items, run: RunFolder | None) -> WarmStart:
    start = WarmStart.read(path, model, items)
    if run is not None:
        run.config["warm_start"] = start.summary()
    return start


def _begin(trainer: Trainer, start: WarmStart | None, resume: bool, bar: ProgressBar) -> None:
    if resume:
        trainer.restore()
    if start is not None:
        start.load_into(trainer.model, trainer.optimizer, trainer.train)
        bar.say(str(start))


def _check_data(model, train, validation) -> None:
    check_catalogue("fit", "train", train, model.n_items)
    if train.n_users == 0:
        raise ValueError("fit: train must have at least one user, got 0")
    if validation is not None:
        check_pair("fit", "validation", validation, model.n_items)


def _makers(model, parallel, group, cuda_graph, warm_start) -> tuple[Any, Any, bool]:
    """What makes the run folder and the trainer, and whether this process shows a progress bar."""
    if parallel is None:
        return RunFolder, Trainer, True
    if parallel == "items" and warm_start is not None:
        raise ValueError(f"fit: warm_start must be None where parallel is items, got {warm_start}")
    from .parallel_trainer import Several

    several = Several(model, parallel, group, cuda_graph)
    return several.run_folder, several.trainer, several.speaks()


def _check_course(epochs, patience, validation, on_epoch, resume, run_dir) -> None:
    """How far the training goes, what may end it before, and what it goes on with."""
    check_integer("fit", "epochs", epochs)
    if resume and run_dir is None:
        raise ValueError("fit: run_dir must be given to resume, got None")
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"fit: on_epoch must be callable, got {shown(on_epoch)}")
    if patience is not None:
        check_integer("fit", "patience", patience, 1)
        if validation is None:
            raise ValueError(f"fit: patience must be None without validation, got {patience}")


def _evaluable(validation, device: torch.device) -> tuple[Clicks, Clicks]:
    """validation on the device, without held-out clicks that are in fold_in too; ValueError where nothing is left."""
    fold_in, held_out = (clicks.to(device).compact() for clicks in validation)
    held_out = unseen("fit", fold_in, held_out, stacklevel=4)
    if not ((fold_in.row_lengths() > 0) & (held_out.row_lengths() > 0)).any():
        raise ValueError(
            "fit: validation must have a user with fold-in and held-out clicks, got none; pass None to train without"
        )
    return fold_in, held_out
