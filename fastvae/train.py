"""fit(): train a model, with KL annealing, validation, early stopping, checkpoints and exact resume.

    beta(update) = min(anneal_cap, update / total_anneal_steps)     update counted from 0

The loop is in trainer.py, its step in step.py, the files are in run_folder.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ._agreement import checked_by_all
from ._checks import (
    check_catalogue,
    check_choice,
    check_flag,
    check_ids,
    check_integer,
    check_number,
    check_pair,
    check_per_click,
    digest,
    shown,
)
from ._interrupt import held_interrupt
from .clicks import Clicks
from .defaults import PRESETS, Plan, make_plan
from .evaluate import unseen
from .models import MultiDAE, MultiVAE
from .progress import ProgressBar
from .run_folder import RunFolder, planned_in
from .schedules import LR_SCHEDULES, PLATEAU_EPOCHS, beta_at
from .step import check_gradients, check_trainable, precisions, wants_graph
from .trainer import FitResult, OnEpoch, Settings, Trainer, epoch_order
from .warm_start import WarmStart

__all__ = ["FitResult", "beta_at", "epoch_order", "fit"]


def fit(
    model: MultiVAE | MultiDAE,
    train: Clicks,
    validation: tuple[Clicks, Clicks] | None = None,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    anneal_cap: float = 0.2,
    total_anneal_steps: int | None = None,
    patience: int | None = None,
    preset: str = "auto",
    lr_schedule: str = "constant",
    weight_decay: float = 0.0,
    clip_grad_norm: float | None = None,
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
    checkpoint_bytes: int = 8 * 10**9,
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
    patience    stop after so many epochs without a better validation NDCG@100; 0: never
    preset      what epochs, batch_size, total_anneal_steps and patience are where they are None: "auto": by the number of
                users, see defaults.py; "paper": 200, 500, 200,000 and never. Those of a run to resume are its own
    lr_schedule "constant"; "cosine": from lr down to lr / 100 over the planned epochs; "plateau": lr halved after every
                three epochs without a better validation, down to lr / 100. See schedules.py
    weight_decay  of the matrices, not the biases, decoupled: see Adam
    clip_grad_norm  clip the gradients to this norm of all of them together; None: leave them
    per_click   divide a user's loss by the user's clicks, see model.loss
    precision   "fp32"; "bf16": products in bf16, weights and sums in fp32; "tf32": on a GPU
    seed        of the order of users, dropout and noise (not of the model's initial weights)
    run_dir     run folder to write, or None; one training at a time
    resume      go on from run_dir's last.pt; the settings above must be those of then, but epochs and
                patience
    items       external item ids [n_items], distinct, to keep with the checkpoints; a resumed run has those of then
    warm_start  begin with the weights and moments of this checkpoint, or the best of this run folder, matched by items
                (see warm_start.py), and with beta at its cap; a resumed run has them already
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
    checkpoint_bytes  by items, a checkpoint with more bytes of what is cut is not gathered into one file: each process
                writes its part of a folder beside it, by torch.distributed.checkpoint

    Raises: ValueError and TypeError for arguments that do not fit, RuntimeError where the loss is not finite; the last
    good checkpoint is named. KeyboardInterrupt: last.pt holds the update reached.
    Source: Liang et al. 2018 (arXiv:1802.05814), sections 2.2 and 4.4.
    """
    with checked_by_all("fit", parallel, group) as processes:
        _check_call(model, train, validation, resume, progress, cuda_graph, on_epoch)
        device = next(model.parameters()).device
        per_click = check_per_click("fit", per_click, normalize)
        items = None if items is None else check_ids("fit", "items", items, model.n_items)
        folder = _folder(run_dir, resume)
        given = {
            "epochs": epochs, "batch_size": batch_size, "total_anneal_steps": total_anneal_steps, "patience": patience,
        }  # fmt: skip
        plan, settings = _settled(
            train.n_users, validation, folder if resume else None, preset, given, anneal_cap, lr_schedule,
            warm=warm_start is not None, lr=lr, per_click=per_click, precision=check_choice("fit", "precision", precision, precisions(device)), seed=seed,
            weight_decay=weight_decay, clip_grad_norm=clip_grad_norm,
        )  # fmt: skip
        make_run, make_trainer, speaks = _makers(model, processes, cuda_graph, checkpoint_bytes)
        train, run = train.to(device), None
        if folder is not None:
            run = make_run(
                folder, model, settings.config(), train, validation, items, plan.limits()
            )
        validation = _evaluable(validation, device)
        start = _warm_start(None if resume else warm_start, model, items, run)
    _agree(
        processes, model, train, validation, settings, plan, items, run_dir, resume, warm_start, on_epoch, checkpoint_bytes,
    )  # fmt: skip
    with run.claimed(resume) if run else contextlib.nullcontext():
        trainer = make_trainer(model, train, validation, settings, run, cuda_graph)
        held = held_interrupt(terminated=parallel is not None)
        _train(trainer, train, plan, start, resume, held, progress and speaks, on_epoch)
    return trainer.result


def _train(trainer: Trainer, train: Clicks, plan: Plan, start, resume, held, progress, on_epoch):
    with ProgressBar(progress, plan.epochs, train.n_users) as bar, held as interrupted:
        _begin(trainer, train, plan, start, resume, bar)
        trainer.run_epochs(plan.epochs, plan.patience, bar, interrupted, on_epoch)
    trainer.finish()


def _agree(
    processes, model, train, validation, settings, plan, items, run_dir, resume, warm_start, on_epoch, checkpoint_bytes,
) -> None:  # fmt: skip
    """ValueError in all processes where one of them was given something else; causes come before what follows."""
    if processes is None:
        return
    first = {
        "parallel": processes.parallel,
        "model": {"class": type(model).__name__} | model.config(),
        "train": train.fingerprint(),
        "validation": validation and [clicks.fingerprint() for clicks in validation],
        "resume": resume,
        "run_dir": run_dir and str(run_dir),
        "warm_start": warm_start and str(warm_start),
        "items": items and digest(repr(items).encode()),
        # process 0 alone calls it, and the others wait for its answer
        "on_epoch": on_epoch and "a callback",
    }
    last = {"checkpoint_bytes": checkpoint_bytes}
    processes.check_alike("fit", **first | plan.limits() | asdict(settings) | last)


def _warm_start(path, model, items, run: RunFolder | None) -> WarmStart | None:
    """What a new run begins with; one that is resumed has its weights and moments."""
    if path is None:
        return None
    start = WarmStart.read(path, model, items)
    if run is not None:
        run.config["warm_start"] = start.summary()
    return start


def _begin(
    trainer: Trainer,
    train: Clicks,
    plan: Plan,
    start: WarmStart | None,
    resume: bool,
    bar: ProgressBar,
) -> None:
    if resume:
        trainer.restore()
        return
    for line in plan.lines():
        bar.say(line)
    if start is not None:
        start.load_into(trainer.model, trainer.optimizer, train)
        bar.say(str(start))


def _check_call(model, train, validation, resume, progress, cuda_graph, on_epoch) -> None:
    check_gradients("fit")
    check_trainable("fit", model)
    check_flag("fit", "resume", resume)
    check_flag("fit", "progress", progress)
    wants_graph("fit", cuda_graph, next(model.parameters()).device)
    check_catalogue("fit", "train", train, model.n_items)
    if train.n_users == 0:
        raise ValueError("fit: train must have at least one user, got 0")
    if validation is not None:
        check_pair("fit", "validation", validation, model.n_items)
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"fit: on_epoch must be callable, got {shown(on_epoch)}")


def _makers(model, processes, cuda_graph, checkpoint_bytes) -> tuple[Any, Any, bool]:
    """What makes the run folder and the trainer, and whether this process shows a progress bar."""
    checkpoint_bytes = check_integer("fit", "checkpoint_bytes", checkpoint_bytes, high=None)
    if processes is None:
        return RunFolder, Trainer, True
    from .parallel_trainer import Several

    several = Several(processes, model, cuda_graph, checkpoint_bytes)
    return several.run_folder, several.trainer, several.speaks()


def _folder(run_dir, resume: bool) -> Path | None:
    if resume and run_dir is None:
        raise ValueError("fit: run_dir must be given to resume, got None")
    return None if run_dir is None else Path(run_dir)


def _planned(
    n_users: int, validation: Any, anneal_cap: float, preset: Any, given: dict[str, Any], resumed: Path | None, warm: bool,
) -> Plan:  # fmt: skip
    """The settings that depend on the size of the data: as given, else of the run to resume, else chosen."""
    preset = check_choice("fit", "preset", preset, PRESETS)
    if given["patience"] and validation is None:
        got = shown(given["patience"])
        raise ValueError(f"fit: patience must be None or 0 without validation, got {got}")
    if resumed is not None and (then := planned_in(resumed, given)):
        given = {name: then.get(name) if value is None else value for name, value in given.items()}
        # a folder of before there was a choice has no epochs in it: what fit did then
        preset = preset if "epochs" in then else "paper"
    for name, value in given.items():
        if value is not None:
            high = None if name == "total_anneal_steps" else 2**31
            given[name] = check_integer("fit", name, value, int(name == "batch_size"), high)
    return make_plan(
        n_users, validated=validation is not None, anneal_cap=anneal_cap, preset=preset, warm=warm, given=given,
    )  # fmt: skip


def _settled(
    n_users: int, validation: Any, resumed: Path | None, preset: Any, given: dict[str, Any],
    anneal_cap: Any, lr_schedule: Any, *, warm: bool, lr, per_click, precision, seed, weight_decay, clip_grad_norm,
) -> tuple[Plan, Settings]:  # fmt: skip
    """What depends on the size of the data, and all settings, checked."""
    anneal_cap = check_number("fit", "anneal_cap", anneal_cap, 0)
    plan = _planned(n_users, validation, anneal_cap, preset, given, resumed, warm)
    if lr_schedule == "plateau" and 0 < plan.patience <= PLATEAU_EPOCHS:
        raise ValueError(
            f"fit: patience must be 0 or above {PLATEAU_EPOCHS} where lr_schedule is plateau, which waits as long before it "
            f"lowers lr, got {plan.patience}"
        )
    lr_steps = _lr_steps(lr_schedule, validation, plan.updates(n_users), resumed)
    if clip_grad_norm is not None:
        clip_grad_norm = check_number("fit", "clip_grad_norm", clip_grad_norm, 0, above=True)
    return plan, Settings(
        plan.batch_size,
        check_number("fit", "lr", lr, 0, above=True),
        anneal_cap,
        plan.total_anneal_steps,
        per_click,
        precision,
        check_integer("fit", "seed", seed, high=2**63),
        lr_schedule,
        check_number("fit", "weight_decay", weight_decay, 0),
        clip_grad_norm,
        lr_steps,
    )


def _lr_steps(lr_schedule: Any, validation: Any, planned: int, resumed: Path | None) -> int | None:
    """Updates of a cosine: a run that is resumed keeps its own, whatever its epochs are now."""
    check_choice("fit", "lr_schedule", lr_schedule, LR_SCHEDULES)
    if lr_schedule == "plateau" and validation is None:
        raise ValueError(
            "fit: lr_schedule must be constant or cosine without validation, got plateau"
        )
    if lr_schedule != "cosine":
        return None
    then = {} if resumed is None else planned_in(resumed, ["total_lr_steps"])
    return check_integer("fit", "total_lr_steps", then.get("total_lr_steps", planned), high=None)


def _evaluable(validation, device: torch.device) -> tuple[Clicks, Clicks] | None:
    """validation on the device, without held-out clicks that are in fold_in too; ValueError where nothing is left."""
    if validation is None:
        return None
    fold_in, held_out = (clicks.to(device).compact() for clicks in validation)
    held_out = unseen("fit", fold_in, held_out, stacklevel=4)
    if not ((fold_in.row_lengths() > 0) & (held_out.row_lengths() > 0)).any():
        raise ValueError(
            "fit: validation must have a user with fold-in and held-out clicks, got none; pass None to train without"
        )
    return fold_in, held_out
