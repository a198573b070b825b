"""tune(): search for the settings that a data set wants: the cap of beta, then widths, dropout and learning rate.

    1. one training with beta rising from 0 to 1; beta of its best epoch is the cap of all others, which rise to it as fast
       (Liang et al. 2018, 2.2.2)
    2. trials by optuna (extra tune), best validation NDCG@100 first; the first has the paper's widths and dropout, and so
       goes as the run of step 1 up to the cap; a trial that falls behind is pruned

All that is known lies in the folder runs: the same call again goes on, also after a kill.

    anneal/       run folder of step 1       trials.csv  a line per trial, the best first
    journal.log   optuna's own storage       tune.png    NDCG@100 by beta, trial and setting
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ._checks import check_choice, check_flag, check_integer
from ._files import locked
from .data import Dataset
from .models import MultiDAE, MultiVAE
from .run_folder import LAST, METRIC
from .step import precisions
from .train import fit
from .trials import SPACE, Trial, Tuning

JOURNAL, TABLE, PLOT, ANNEAL = "journal.log", "trials.csv", "tune.png", "anneal"
STUDY = "fastvae"
PAPER: dict[str, Any] = {"hidden": 600, "latent": 200, "dropout": 0.5, "lr": 1e-3}
STARTUP = 5  # trials before optuna prunes any, and draws other than at random
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True)
class _Settings:
    """What all trials of a folder have in common."""

    model: str
    epochs: int
    batch_size: int
    patience: int
    precision: str
    seed: int
    train: str  # digest of the clicks


@dataclass(frozen=True)
class _Job:
    """A search as its processes know it."""

    dataset: str
    folder: str
    settings: _Settings
    device: str

    @property
    def study(self) -> Any:
        """optuna's, from the journal; sampler and pruner are added for a trial."""
        optuna = _optuna()
        backend = optuna.storages.journal.JournalFileBackend(str(Path(self.folder, JOURNAL)))
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
        )


def tune(
    dataset: str | os.PathLike[str],
    runs: str | os.PathLike[str],
    *,
    trials: int = 20,
    jobs: int = 1,
    model: str = "vae",
    epochs: int = 50,
    batch_size: int = 100,
    patience: int = 5,
    precision: str = "fp32",
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    on_trial: Callable[[Trial, Tuning], object] | None = None,
) -> Tuning:
    """Search for the settings of a data set, by validation NDCG@100.

    dataset     dataset folder with validation users
    runs        folder of the search; one that is there already goes on
    trials      ended trials in all, those of before included
    jobs        trials at once, each in a process of its own where there are more than one; they share the threads. A
                program that asks for more keeps its own start behind `if __name__ == "__main__":`
    model       "vae" or "dae"
    epochs, batch_size, patience, precision, seed  of every trial, see fit
    device      of all trials
    progress    show the progress of the annealing run (extra cli)
    on_trial    called after each trial with it and all so far

    The trial that would win may be pruned: settings that learn slowly look worse than they are. With one job, the same
    call in a new folder gives the same trials on a CPU.

    Raises: ValueError and TypeError for arguments that do not fit, and where optuna is missing. KeyboardInterrupt: trials
    that have ended are kept.
    Source: Akiba et al. 2019 (arXiv:1907.10902) for optuna's sampler and pruner.
    """
    _optuna()
    check_integer("tune", "trials", trials, 1)
    check_integer("tune", "jobs", jobs, 1)
    check_flag("tune", "progress", progress)
    data = _load(os.fspath(dataset))
    settings = _Settings(
        check_choice("tune", "model", model, ("vae", "dae")),
        check_integer("tune", "epochs", epochs, 1),
        check_integer("tune", "batch_size", batch_size, 1),
        check_integer("tune", "patience", patience, 1),
        check_choice("tune", "precision", precision, precisions(torch.device(device))),
        check_integer("tune", "seed", seed, high=2**63 - 2**31),
        data.train.fingerprint(),
    )
    path = Path(runs)
    _check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    job = _Job(os.fspath(dataset), str(path), settings, str(device))
    with _held(path):
        _take_up(job)
        try:
            _anneal(job, progress)
            for number in _run(job, trials, jobs):
                tuning = _read(job)
                tuning.write(path / TABLE)
                if on_trial is not None:
                    on_trial(next(t for t in tuning.trials if t.number == number), tuning)
        except KeyboardInterrupt:
            n = len(_read(job).trials)
            raise KeyboardInterrupt(
                f"stopped after {n} trials; saved in {path}, the same command goes on"
            ) from None
        tuning = _read(job)
        tuning.draw(path / PLOT)
        return tuning


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "tune: optuna must be there, got none; pip install 'fastvae-cf[tune]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@functools.lru_cache(maxsize=1)
def _load(dataset: str) -> Dataset:
    """A dataset folder, read once by each process."""
    data = Dataset.load(dataset)
    if not data.info["n_evaluated"]["vad"]:
        raise ValueError(
            f"tune: dataset must have a validation user with held-out clicks, got none; {data.more_held_out()}"
        )
    return data


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"tune: runs must be a folder, got a file at {path}")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if names and JOURNAL not in names:
        raise ValueError(
            f"tune: runs must be new, empty or a search to go on with, got {path} with {min(names)} in it"
        )


def _held(path: Path) -> Any:
    try:
        return locked(path)
    except BlockingIOError:
        raise ValueError(
            f"tune: runs must be one that no other search writes to, got {path}; wait for that one to end"
        ) from None


def _take_up(job: _Job) -> None:
    """Compare the settings with those of before; trials of processes that were killed are no trials."""
    optuna, study = _optuna(), job.study
    now, then = asdict(job.settings), study.user_attrs.get("settings")
    if then is None:
        study.set_user_attr("settings", now)
    for name, value in (then or {}).items():
        if now[name] != value and name == "train":
            raise ValueError(
                f"tune: dataset must be that of the search in {job.folder}, got other clicks"
            )
        if now[name] != value:
            raise ValueError(
                f"tune: {name} must be {value} as in the search in {job.folder}, got {now[name]}"
            )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    waiting = study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    ended = [{name: getattr(trial, name) for name in SPACE} for trial in _read(job).trials]
    if not waiting and PAPER not in ended:
        study.enqueue_trial(PAPER)


def _new_model(job: _Job, hidden: int, latent: int, dropout: float) -> MultiVAE | MultiDAE:
    """As fastvae train makes it with these options."""
    torch.manual_seed(job.settings.seed)
    make = MultiVAE if job.settings.model == "vae" else MultiDAE
    return make([latent, hidden, _load(job.dataset).n_items], [dropout, 0.0]).to(job.device)


def _fit(job: _Job, model: MultiVAE | MultiDAE, **arguments: Any) -> Any:
    data, s = _load(job.dataset), job.settings
    common: dict[str, Any] = {
        "epochs": s.epochs,
        "batch_size": s.batch_size,
        "precision": s.precision,
    }
    return fit(model, data.train, data.validation, **common, seed=s.seed, **arguments)


def _anneal(job: _Job, progress: bool) -> None:
    """Step 1, once: beta rises to 1 over all epochs, and the best epoch's is the cap."""
    study, s = job.study, job.settings
    if "anneal_cap" in study.user_attrs:
        return
    cap, curve = 0.0, []
    steps = s.epochs * -(-_load(job.dataset).train.n_users // s.batch_size)
    if s.model == "vae":
        folder = Path(job.folder, ANNEAL)
        result = _fit(
            job,
            _new_model(job, PAPER["hidden"], PAPER["latent"], PAPER["dropout"]),
            lr=PAPER["lr"],
            anneal_cap=1.0,
            total_anneal_steps=steps,
            run_dir=folder,
            resume=(folder / LAST).exists(),
            progress=progress,
        )
        curve = [(row["beta"], row[METRIC]) for row in result.history]
        cap = curve[result.best_epoch - 1][0]
    study.set_user_attr("annealing", curve)
    study.set_user_attr("total_anneal_steps", steps)
    study.set_user_attr("anneal_cap", cap)


def _run(job: _Job, trials: int, jobs: int) -> Iterator[int]:
    """The trials that are missing, one after the other as they end, by their numbers."""
    missing = trials - len(_read(job).trials)
    if jobs == 1:
        for _ in range(missing):
            yield _one_trial(job)
        return
    # not forked: the threads of torch do not survive that
    others, context = set(multiprocessing.active_children()), multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin_process, initargs=(threads,))
    try:
        for done in as_completed([pool.submit(_one_trial, job) for _ in range(missing)]):
            yield done.result()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    # Ctrl-C reaches all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _one_trial(job: _Job) -> int:
    """Ask for settings, train, tell; the number of the trial."""
    optuna, study = _optuna(), job.study
    # a seed of its own for each, so that a search that was stopped draws what it would have drawn
    n_ended = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=STARTUP, seed=(job.settings.seed + n_ended) % 2**32
    )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=2)
    trial = study.ask()
    values = {name: _suggest(trial, name) for name in SPACE}

    pruned = False

    def report(row: dict[str, Any]) -> bool:
        nonlocal pruned
        trial.report(row[METRIC], row["epoch"])
        pruned = trial.should_prune()
        return pruned

    states = optuna.trial.TrialState
    try:
        result = _fit(
            job,
            _new_model(job, values["hidden"], values["latent"], values["dropout"]),
            lr=values["lr"],
            anneal_cap=study.user_attrs["anneal_cap"],
            total_anneal_steps=study.user_attrs["total_anneal_steps"],
            patience=job.settings.patience,
            on_epoch=report,
        )
    except RuntimeError as error:
        # a loss that is not finite, or no memory for these widths: the search goes on without them
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=states.FAIL)
        return trial.number
    except KeyboardInterrupt:
        study.tell(trial, state=states.FAIL)
        raise
    trial.set_user_attr("best", [result.best_epoch, result.best_metric])
    if pruned:
        study.tell(trial, state=states.PRUNED)
    else:
        study.tell(trial, result.best_metric)
    return trial.number


def _suggest(trial: Any, name: str) -> Any:
    low, high, step = SPACE[name]
    if step is None:
        return trial.suggest_float(name, low, high, log=True)
    if isinstance(step, int):
        return trial.suggest_int(name, low, high, step=step)
    return round(trial.suggest_float(name, low, high, step=step), 3)


def _read(job: _Job) -> Tuning:
    """What the journal holds."""
    study = job.study
    trials = []
    for trial in study.get_trials(deepcopy=False):
        best_epoch, ndcg = trial.user_attrs.get("best", (0, math.nan))
        # those of killed processes and of Ctrl-C have neither
        if trial.state.name in STATES and (best_epoch or "error" in trial.user_attrs):
            params = {**trial.params, "dropout": round(trial.params["dropout"], 3)}
            n_epochs = len(trial.intermediate_values)
            state = STATES[trial.state.name]
            trials.append(Trial(trial.number, state, ndcg, best_epoch, n_epochs, **params))
    trials.sort(key=lambda t: (t.state != "complete", t.state == "failed", -t.ndcg, t.number))
    attributes = study.user_attrs
    annealing = [(beta, ndcg) for beta, ndcg in attributes.get("annealing", [])]
    cap, steps = attributes.get("anneal_cap", math.nan), attributes.get("total_anneal_steps", 0)
    return Tuning(cap, steps, annealing, trials)
