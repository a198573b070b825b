"""What fit() shows and leaves behind: the run folder with its files, and the progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two trainings in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

from ._files import naming, remove_leftovers, write_text
from .clicks import Clicks

METRIC = "ndcg@100"  # decides which epoch is best
SECONDS_BETWEEN = 0.1  # two movements of the bar
_BEFORE_A_CHECKPOINT = {"config.json", "metrics.jsonl", "best.pt"}
_FILES = _BEFORE_A_CHECKPOINT | {"last.pt"}
_MAX_JSON = 2**20  # bytes of config.json; ours have five hundred


class RunFolder:
    """The run folder: config.json, metrics.jsonl, curve.png, and the advice of messages; folder may be None."""

    def __init__(self, folder, model, settings: dict[str, Any], train: Clicks, validation, items):
        self.folder = None if folder is None else Path(folder)
        self.items = items
        self.config = {
            "model": type(model).__name__,
            **model.config(),
            "n_users": train.n_users,
            **settings,
            "train": None if folder is None else train.fingerprint(),
            "validation": None
            if folder is None or validation is None
            else [clicks.fingerprint() for clicks in validation],
        }

    @contextlib.contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """Make the folder, or check that it can be resumed, and keep a second training out of it for the block."""
        if self.folder is None:
            if resume:
                raise ValueError("fit: run_dir must be given to resume, got None")
            yield
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"fit: run_dir must be a folder, got a file at {self.folder}")
        if resume and not self.folder.exists():
            raise ValueError(
                f"fit: run_dir must hold a run to resume, got nothing at {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            self._check_resume() if resume else self._start()
            yield

    def _start(self) -> None:
        """The folder must be new, empty, or left by a run that died before its first checkpoint."""
        assert self.folder is not None
        if (self.folder / "last.pt").exists():
            raise ValueError(
                f"fit: run_dir must be a new folder, got {self.folder} with a run in it; "
                "resume that run or name another folder"
            )
        remove_leftovers(self.folder, _FILES)
        names = {path.name for path in self.folder.iterdir()}
        if names and not (names <= _BEFORE_A_CHECKPOINT and self._is_ours()):
            foreign = sorted(names - _BEFORE_A_CHECKPOINT or names)[:3]
            raise ValueError(
                f"fit: run_dir must be a new or empty folder, got {self.folder} with "
                f"{', '.join(foreign)} in it; name another folder"
            )
        write_text(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        self.rewrite_metrics([])

    def _is_ours(self) -> bool:
        assert self.folder is not None
        path = self.folder / "config.json"
        return path.exists() and set(self.config) <= set(read_config(self.folder))

    def _check_resume(self) -> None:
        """ValueError unless the folder holds a run of the same settings."""
        assert self.folder is not None
        for name in ("last.pt", "config.json"):
            if not (self.folder / name).exists():
                raise ValueError(
                    f"fit: run_dir must hold a run to resume, got {self.folder} without {name}; "
                    "train without resume, in a new folder"
                )
        then = read_config(self.folder)
        for name, value in self.config.items():
            if then.get(name) != value and name in ("train", "validation"):
                got = "none" if value is None else "others"
                raise ValueError(f"fit: {name} must be the clicks of the run to resume, got {got}")
            if then.get(name) != value:
                raise ValueError(
                    f"fit: {name} must be {then.get(name)} as in the run to resume, got {value}"
                )
        remove_leftovers(self.folder, _FILES)

    def check_items(self, then: list[str] | None) -> None:
        """ValueError where the run to resume had other items, or had them in another order; its items, where none are given."""
        if then is None and self.items is not None:
            raise ValueError("fit: items must be None as in the run to resume, got ids")
        if then is None or self.items is None:
            self.items = then
            return
        for n, (old, new) in enumerate(zip(then, self.items, strict=False)):
            if old != str(new):
                raise ValueError(
                    f"fit: items must be those of the run to resume, in its order, got {str(new)!r} "
                    f"for {old!r} at position {n}; pass the data of that run"
                )

    def advice(self) -> str:
        """What to do about a loss that is not finite."""
        if self.folder is None or not (self.folder / "last.pt").exists():
            return "lower lr"
        return f"lower lr; the last good checkpoint is {self.folder / 'last.pt'}"

    def interrupt_message(self, epoch: int, batch: int) -> str:
        """Where an interrupted run stands."""
        where = f"after {epoch} epochs" + (f" and {batch} batches" if batch else "")
        if self.folder is None:
            return f"stopped {where}"
        return f"stopped {where}; saved in {self.folder / 'last.pt'}, resume to go on"

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's line."""
        if self.folder is not None:
            path = self.folder / "metrics.jsonl"
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """All lines anew: a kill between a line and its checkpoint leaves one too many."""
        if self.folder is not None:
            text = "".join(json.dumps(row) + "\n" for row in history)
            write_text(self.folder / "metrics.jsonl", text)

    def draw_curve(self, history: list[dict[str, Any]]) -> None:
        """Write curve.png, where matplotlib (extra cli) is there."""
        if self.folder is None or not history:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        epoch = [row["epoch"] for row in history]
        axis.plot(epoch, [row["loss"] for row in history], color="tab:blue", marker=".")
        axis.set(xlabel="epoch", title=f"{self.config['model']}, {self.folder.name}")
        axis.set_ylabel("training loss (nats per user)", color="tab:blue")
        if METRIC in history[0]:
            right = axis.twinx()
            right.plot(epoch, [row[METRIC] for row in history], color="tab:orange", marker=".")
            right.set_ylabel("validation NDCG@100", color="tab:orange")
        figure.savefig(self.folder / "curve.png", dpi=120)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    descriptor = None
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"fit: run_dir must be a folder that no other training writes to, got {folder}; "
                "wait for that one to end, or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises: ValueError where it is not there or no such thing."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_JSON else None
    except (ValueError, RecursionError, OSError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            f"run: {path} must be a run's settings in JSON, got something else; "
            "put the file back, or train anew in another folder"
        )
    return config


class ProgressBar:
    """Progress on stderr: a live bar with ETA, and a line per epoch; nothing where progress is off."""

    def __init__(self, shown: bool, epochs: int, n_users: int):
        self.progress = None
        if not shown:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            raise ValueError(
                "fit: progress must be False without rich; pip install 'fastvae-cf[cli]'"
            ) from None
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("", total=epochs * n_users, epoch="", state="")
        self.metric, self.started, self.seen, self.drawn = "", time.perf_counter(), 0, 0.0

    def __enter__(self) -> ProgressBar:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.progress is not None:
            self.progress.stop()

    def batch_done(self, trainer: Any, epochs: int, n_users: int) -> None:
        """Move the bar on by a batch."""
        if self.progress is None:
            return
        self.seen += n_users
        if time.perf_counter() - self.drawn < SECONDS_BETWEEN:
            return  # reading the sums waits for a GPU
        self.drawn = time.perf_counter()
        users = min(trainer.batch * trainer.settings.batch_size, trainer.train.n_users)
        nll, kld = (trainer.sums / users).tolist()
        rate = self.seen / (time.perf_counter() - self.started)
        state = f"loss {nll + trainer.beta * kld:.2f}  nll {nll:.2f}  kld {kld:.2f}  beta {trainer.beta:.3f}  {self.metric}{rate:,.0f} users/s"
        done = trainer.epoch * trainer.train.n_users + users
        self.progress.update(
            self.task, completed=done, epoch=f"{trainer.epoch + 1}/{epochs}", state=state
        )

    def idle(self, why: str) -> None:
        """Say that a resumed run has nothing left to train."""
        if self.progress is not None:
            self.progress.console.print(f"nothing left to train: {why}", highlight=False)

    def epoch_done(self, result: Any, epochs: int) -> None:
        """Print the epoch's line."""
        if self.progress is None:
            return
        row = result.history[-1]
        if METRIC in row:
            best = "  best" if result.best_epoch == row["epoch"] else ""
            self.metric = f"NDCG@100 {row[METRIC]:.4f}  "
        else:
            best = ""
        self.progress.console.print(
            f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.2f}  nll {row['nll']:.2f}  "
            f"kld {row['kld']:.2f}  beta {row['beta']:.3f}  {self.metric}"
            f"{row['users_per_second']:,.0f} users/s{best}",
            highlight=False,
            soft_wrap=True,
        )
