"""The trials of tune(): what each was and reached, their table and their plot."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ._files import write_text

# what is searched: lowest and highest value, and the step or None for any value on a log scale
SPACE: dict[str, tuple[float, float, float | None]] = {
    "hidden": (100, 1000, 100),
    "latent": (50, 400, 50),
    "dropout": (0.0, 0.8, 0.1),
    "lr": (3e-4, 3e-3, None),
}


@dataclass(frozen=True)
class Trial:
    """A trial that has ended; ndcg is the best validation NDCG@100 until then, nan where it failed."""

    number: int
    state: str
    ndcg: float
    best_epoch: int
    epochs: int
    hidden: int
    latent: int
    dropout: float
    lr: float


@dataclass(frozen=True)
class Tuning:
    """A search, as tune() returns it.

    anneal_cap  beta of the annealing run's best epoch; 0 for a MultiDAE, which has no KL term
    total_anneal_steps  updates after which beta would be 1, as in the annealing run
    annealing   (beta, validation NDCG@100) of its epochs
    trials      those that have ended, the best first
    """

    anneal_cap: float
    total_anneal_steps: int
    annealing: list[tuple[float, float]]
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The complete trial of highest NDCG@100. Raises: ValueError where there is none."""
        for trial in self.trials:
            if trial.state == "complete":
                return trial
        raise ValueError("tune: trials must hold one that is complete, got none; add trials")

    def write(self, path: Path) -> None:
        """A CSV with a line per trial, the best first."""
        text = io.StringIO()
        rows = csv.DictWriter(text, [field.name for field in fields(Trial)], lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(trial) for trial in self.trials)
        write_text(path, text.getvalue())

    def draw(self, path: Path) -> None:
        """NDCG@100 by beta, by trial and by each setting, where matplotlib (extra cli) is there."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots(2, 3, sharey=True).flat
        axes[0].plot(*zip(*self.annealing, strict=True) if self.annealing else ([], []), marker=".")
        axes[0].axvline(self.anneal_cap, color="tab:orange")
        axes[0].set(xlabel=f"beta of the annealing run; cap {self.anneal_cap:.3g}")
        for axis, name in zip(axes[1:], ("number", *SPACE), strict=True):
            for state, color in (("complete", "tab:blue"), ("pruned", "lightgray")):
                chosen = [t for t in self.trials if t.state == state]
                x = [getattr(t, name) for t in chosen]
                axis.scatter(x, [t.ndcg for t in chosen], color=color, label=state)
            axis.set(xlabel={"number": "trial", "lr": "learning rate"}.get(name, name))
            if SPACE.get(name, (0, 0, 0))[2] is None:
                axis.set_xscale("log")
        axes[1].legend()
        for axis in (axes[0], axes[3]):
            axis.set_ylabel("validation NDCG@100")
        figure.savefig(path, dpi=120)
