"""What fit() chooses where it is told nothing: epochs, batch size, KL schedule and patience, by the number of users.

    epochs              200 up to 3,000 users, then falling with their root to 50; half of that without validation
    batch_size          at most 500, so small that 1,000 updates are planned, and so that all of an epoch are alike: the
                        update of a last batch of two users counts as much as another's (-.02 on MovieLens-100K). In a
                        warm start as from scratch, however few the epochs
    total_anneal_steps  beta reaches its cap after a fifth of the planned updates; from the start in a warm start, whose
                        weights were there already
    patience            a tenth of the epochs

Measured: docs/training.md, bench/quality_defaults.py. What is given wins, and the rest is chosen to fit it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRESETS = ("auto", "paper")
MAX_EPOCHS, MIN_EPOCHS, USERS_OF_MAX_EPOCHS = 200, 50, 3_000
MIN_UPDATES = 1_000
LARGEST_BATCH, SMALLEST_BATCH = 500, 20
WARM_UP = 0.2  # of the planned updates
MIN_PATIENCE = 5
# of the paper, for 117,000 users of ML-20M; 0: never out of patience
PAPER = {"epochs": 200, "batch_size": 500, "total_anneal_steps": 200_000, "patience": 0}


@dataclass(frozen=True)
class Plan:
    """The settings of a training that depend on the size of the data.

    patience  0: never
    reasons   why, by the name of each that was not given
    """

    epochs: int
    batch_size: int
    total_anneal_steps: int
    patience: int
    reasons: dict[str, str]

    def updates(self, n_users: int) -> int:
        """Updates of all epochs."""
        return self.epochs * math.ceil(n_users / self.batch_size)

    def limits(self) -> dict[str, int]:
        """What a resume may change, for config.json."""
        return {"epochs": self.epochs, "patience": self.patience}

    def lines(self) -> list[str]:
        """What was chosen and why, a line each."""
        return [
            f"{name.replace('_', ' ')} {getattr(self, name):,}: {why}"
            for name, why in self.reasons.items()
        ]


def make_plan(
    n_users: int, *, validated: bool, anneal_cap: float, preset: str = "auto", warm: bool = False,
    given: dict[str, int | None] | None = None,
) -> Plan:  # fmt: skip
    """Fill in what is not given.

    >>> make_plan(800, validated=True, anneal_cap=0.2).batch_size
    160

    n_users    to train on
    validated  whether there are users to validate on
    preset     "auto": by the size of the data; "paper": PAPER
    warm       whether the training begins with the weights of an older run: its batches are those of one from scratch
    given      epochs, batch_size, total_anneal_steps and patience; None where they are to be chosen
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    reasons: dict[str, str] = {}

    def choose(name: str, value: int, why: str) -> int:
        if name not in values:
            values[name], reasons[name] = value, why
        return values[name]

    if preset == "paper":
        for name, value in PAPER.items():
            choose(name, value, "the paper's")
        return Plan(**values, reasons=reasons)
    at_most = "at most" if validated else "without validation, about where it stops others"
    epochs = choose("epochs", _epochs(n_users, validated), f"{at_most}, for {n_users:,} users")
    # few epochs from older weights need no 1,000 updates, and small batches lead away from them: docs/new-data.md
    batch_size, why = _batch_size(n_users, _epochs(n_users, validated) if warm else epochs)
    batch_size = choose("batch_size", batch_size, why)
    updates = epochs * math.ceil(n_users / batch_size)
    steps = math.ceil(WARM_UP * updates / anneal_cap) if anneal_cap > 0 else 0
    why = f"beta reaches {anneal_cap:g} after {WARM_UP:.0%} of the {updates:,} updates"
    if warm:
        steps, why = 0, f"beta is {anneal_cap:g} from the start, as at the end of the older run"
    choose("total_anneal_steps", steps, why)
    if validated:
        why = "epochs without a better validation NDCG@100 end the training"
        choose("patience", max(MIN_PATIENCE, epochs // 10), why)
    else:
        values.setdefault("patience", 0)
    return Plan(**values, reasons=reasons)


def _epochs(n_users: int, validated: bool) -> int:
    epochs = MAX_EPOCHS * math.sqrt(USERS_OF_MAX_EPOCHS / max(n_users, 1))
    epochs = round(min(max(epochs, MIN_EPOCHS), MAX_EPOCHS))
    return epochs if validated else epochs // 2


def _batch_size(n_users: int, epochs: int) -> tuple[int, str]:
    """And why."""
    wanted = epochs * n_users // MIN_UPDATES
    if wanted >= LARGEST_BATCH:
        why = f"at most {LARGEST_BATCH}"
    elif wanted >= SMALLEST_BATCH:
        why = f"for {MIN_UPDATES:,} updates"
    else:
        why = f"the smallest, for {MIN_UPDATES:,} updates or what comes near"
    batches = math.ceil(n_users / min(max(wanted, SMALLEST_BATCH), LARGEST_BATCH))
    return math.ceil(n_users / batches), f"{why}, all alike"
