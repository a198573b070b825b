"""The progress of a training on stderr: a live bar with its ETA, and a line per epoch."""

from __future__ import annotations

import time
from typing import Any

from .run_folder import METRIC

SECONDS_BETWEEN = 0.1  # two movements of the bar


class ProgressBar:
    """A bar over epochs * n_users, a context manager; it shows nothing where shown is False.

    Raises: ValueError where rich (extra cli) is missing.
    """

    def __init__(self, shown: bool, epochs: int, n_users: int):
        self.progress = None
        self.epochs, self.n_users = epochs, n_users
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

    def due(self, n_users: int) -> bool:
        """Count a batch of n_users; whether to move the bar now: reading the losses waits for a GPU."""
        if self.progress is None:
            return False
        self.seen += n_users
        now = time.perf_counter()
        if now - self.drawn < SECONDS_BETWEEN:
            return False
        self.drawn = now
        return True

    def move(self, epoch: int, users: int, nll: float, kld: float, beta: float) -> None:
        """Show where the run stands.

        epoch     of now, counted from 0
        users     seen in it
        nll, kld  mean over these users, nats
        """
        if self.progress is None:
            return
        rate = self.seen / (time.perf_counter() - self.started)
        state = (
            f"loss {nll + beta * kld:.2f}  nll {nll:.2f}  kld {kld:.2f}  beta {beta:.3f}  "
            f"{self.metric}{rate:,.0f} users/s"
        )
        self.progress.update(
            self.task,
            completed=epoch * self.n_users + users,
            epoch=f"{epoch + 1}/{self.epochs}",
            state=state,
        )

    def say(self, text: str) -> None:
        """Print a line above the bar; names in it are never markup."""
        if self.progress is not None:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def idle(self, why: str) -> None:
        """Say that a resumed run has nothing left to train."""
        self.say(f"nothing left to train: {why}")

    def epoch_done(self, row: dict[str, Any], best: bool) -> None:
        """Print an epoch's line of metrics.jsonl; best marks it where it was validated."""
        if self.progress is None:
            return
        mark = ""
        if METRIC in row:
            mark = "  best" if best else ""
            self.metric = f"NDCG@100 {row[METRIC]:.4f}  "
        self.progress.console.print(
            f"epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.2f}  nll {row['nll']:.2f}  "
            f"kld {row['kld']:.2f}  beta {row['beta']:.3f}  {self.metric}"
            f"{row['users_per_second']:,.0f} users/s{mark}",
            highlight=False,
            soft_wrap=True,
        )
