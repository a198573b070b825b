"""What changes while a model is trained: the weight of the KL term and the learning rate, by the update.

    beta(update) = min(anneal_cap, update / total_anneal_steps)
    lr(update)   = lr, or by a cosine from lr down to lr / 100, or lr halved where validation no longer improves

Both follow from the update and the history alone, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

LR_SCHEDULES = ("constant", "cosine", "plateau")
LOWEST = 0.01  # of lr, which no schedule goes below
PLATEAU_EPOCHS, PLATEAU_FACTOR = (
    3,
    0.5,
)  # epochs without a better validation, and what lr is multiplied by then


def beta_at(update: int, anneal_cap: float, total_anneal_steps: int) -> float:
    """Weight of the kld at an update counted from 0: linear up to the cap; constant where total_anneal_steps is 0.

    >>> beta_at(0, 0.2, 200_000), beta_at(20_000, 0.2, 200_000), beta_at(40_000, 0.2, 200_000), beta_at(0, 0.2, 0)
    (0.0, 0.1, 0.2, 0.2)
    """
    return min(anneal_cap, update / total_anneal_steps) if total_anneal_steps > 0 else anneal_cap


def cosine_lr(update: int, lr: float, total_lr_steps: int) -> float:
    """Half a cosine from lr at update 0 to lr / 100 at total_lr_steps, where it stays.

    >>> [round(cosine_lr(update, 1.0, 100), 3) for update in (0, 50, 100, 200)]
    [1.0, 0.505, 0.01, 0.01]

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.
    """
    done = min(1.0, update / total_lr_steps) if total_lr_steps else 1.0
    lowest = LOWEST * lr
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * done)) / 2


def plateau_lr(metrics: Iterable[float], lr: float) -> float:
    """lr halved after every three epochs in a row without a better metric, down to lr / 100.

    >>> plateau_lr([0.1, 0.2, 0.2, 0.1, 0.2], 1.0), plateau_lr([0.1, 0.2, 0.2, 0.1], 1.0)
    (0.5, 1.0)
    """
    best, waited, factor = -math.inf, 0, 1.0
    for metric in metrics:
        best, waited = (metric, 0) if metric > best else (best, waited + 1)
        if waited == PLATEAU_EPOCHS:
            waited, factor = 0, factor * PLATEAU_FACTOR
    return lr * max(LOWEST, factor)
