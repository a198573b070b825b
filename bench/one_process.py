"""What several processes cost the one: fit() without a group beside fit() in a group of one, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.steps import SHAPES, new_model
from fastvae import fit
from fastvae.trainer import Trainer

# name: whether there is a process group, and fit's parallel. The first twice: what the machine makes of one and the same
WAYS = {
    "alone": (False, None),
    "alone-again": (False, None),
    "group": (True, None),
    "users": (True, "users"),
    "items": (True, "items"),
}
# of one and the same fit, the median of 7 ratios strays by 4 %
ROUNDS, STEPS = 31, 4


def measure(shape: str = "ml20m", rounds: int = ROUNDS) -> dict[str, Any]:
    """Processor seconds of a fit by each way, and their ratios to "alone": medians of rounds, the ways in turn."""
    clicks = SHAPES[shape].clicks(STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        names = list(WAYS)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = _fit(clicks, SHAPES[shape].batch_size, *WAYS[name])
            # the round before the first is not counted
            if turn:
                seconds[name].append(taken)
    ratios = {
        name: [a / b for a, b in zip(times, seconds["alone"], strict=True)]
        for name, times in seconds.items()
    }
    return {
        "shape": shape,
        "steps": STEPS,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "counted": "processor seconds of the steps of a fit, whole process; ratio: median of the rounds' ratios to alone",
        "cpu_s": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "ratio": {name: round(statistics.median(of), 4) for name, of in ratios.items()},
        "ratio_20_80": {
            name: [round(statistics.quantiles(of, n=5)[n], 4) for n in (0, -1)]
            for name, of in ratios.items()
        },
    }


def _fit(clicks, batch_size: int, grouped: bool, parallel: str | None) -> float:
    model = new_model(clicks.n_items)
    if not grouped:
        return _seconds(lambda: _train(model, clicks, batch_size, None))
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _seconds(lambda: _train(model, clicks, batch_size, parallel))
    finally:
        dist.destroy_process_group()


def _train(model, clicks, batch_size: int, parallel: str | None) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": batch_size, "total_anneal_steps": 0}
    fit(model, clicks, parallel=parallel, **options)


def _seconds(train: Callable[[], None]) -> float:
    """Processor seconds of the epoch in it."""
    taken = []
    whole = Trainer._run_epoch

    def timed(*args: Any) -> Any:
        started = time.process_time()
        done = whole(*args)
        taken.append(time.process_time() - started)
        return done

    Trainer._run_epoch = timed  # type: ignore[method-assign]
    try:
        train()
    finally:
        Trainer._run_epoch = whole  # type: ignore[method-assign]
    return sum(taken)
