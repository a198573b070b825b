"""The study that fit()'s defaults come from: batch size and KL schedule, each trained until validation stops it.

Runs are written to the result file as they end, and a second call goes on with those that are missing. Large data sets
are represented by a sample of their users, with the items that ten of them clicked: a run on the whole takes an hour of
one core. Products are in bf16, which is faster on a CPU and equal in quality (quality_ml10m.json).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from bench.machine import describe, write
from fastvae import Dataset, MultiVAE, evaluate, fit
from fastvae.defaults import make_plan
from fastvae.run_folder import METRIC

CAP = 0.2
PAPER_ANNEAL = 200_000


@dataclass(frozen=True)
class Case:
    """A data set: its matrix, how many of its users (None: all), splits, epochs at batch 100, and patience."""

    matrix: str
    n_users: int | None
    splits: int
    epochs: int
    patience: int


CASES = {
    "ml100k": Case("ml100k_ge4", None, 3, 100, 20),
    "anime": Case("anime_caserec", None, 1, 60, 8),
    "gowalla-10k": Case("gowalla", 10_000, 1, 30, 4),
    "ml10m-10k": Case("ml10m_fastvae", 10_000, 1, 40, 5),
    "amazon-20k": Case("amazon_book_kgat", 20_000, 1, 30, 4),
    "ml10m": Case("ml10m_fastvae", None, 1, 30, 3),
    "gowalla": Case("gowalla", None, 1, 20, 3),
    "amazon": Case("amazon_book_kgat", None, 1, 20, 3),
}
SAMPLED = ("ml100k", "anime", "gowalla-10k", "ml10m-10k", "amazon-20k")
WHOLE = ("amazon", "gowalla", "ml10m")
# batch size, and the share of the planned updates after which beta is at the cap; None: the paper's schedule
Point = tuple[int, float | None]
# None: fit without options
GRID: tuple[Point | None, ...] = (
    (100, 0.2), (500, 0.2), (200, 0.2), (500, None), None, (500, 0.0), (100, 0.0), (50, 0.2),
)  # fmt: skip
ON_WHOLE_SETS: tuple[Point, ...] = ((200, 0.2), (100, 0.2))  # where a run takes long


def load_case(load: Callable[[str], sp.csr_array], case: Case, split: int) -> Dataset:
    """The split of a case: a tenth of its users to validate on, a tenth to test on."""
    x = load(case.matrix)
    if case.n_users is not None:
        users = np.random.default_rng(0).permutation(x.shape[0])[: case.n_users]
        x = sp.csr_array(x[np.sort(users)])
    return Dataset.from_matrix(x, 0.1, split, min_item_clicks=5 if case.n_users is None else 10)


def run(data: Dataset, case: Case, point: Point | None, split: int) -> dict:
    """Train once; the row has every epoch's validation NDCG@100, and the test's wherever that was the best so far."""
    torch.manual_seed(split)
    model = MultiVAE([200, 600, data.n_items])
    history: list[float] = []
    tests: dict[int, float] = {}

    def test_a_new_best(row: dict) -> None:
        history.append(row[METRIC])
        if row[METRIC] == max(history):
            tests[row["epoch"]] = evaluate(model, *data.test, metrics=(METRIC,))[METRIC]

    n_train, started = data.train.n_users, time.process_time()
    options = {} if point is None else options_of(case, point, n_train)
    result = fit(
        model, data.train, data.validation, **options, precision="bf16", seed=split, on_epoch=test_a_new_best
    )  # fmt: skip
    plan = make_plan(n_train, validated=True, anneal_cap=CAP, given=options)
    return {
        "n_train": n_train, "n_items": data.n_items, "split": split, "batch_size": plan.batch_size,
        "warm_up": "defaults" if point is None else "paper" if point[1] is None else point[1],
        "epochs_planned": plan.epochs, "total_anneal_steps": plan.total_anneal_steps,
        "epochs_run": len(history), "best_epoch": result.best_epoch,
        "best_update": math.ceil(n_train / plan.batch_size) * result.best_epoch,
        "validation": round(result.best_metric, 5), "test": round(tests[result.best_epoch], 5),
        "cpu_seconds": round(time.process_time() - started),
        "validation_by_epoch": [round(v, 5) for v in history],
        "test_by_best_epoch": {epoch: round(v, 5) for epoch, v in tests.items()},
    }  # fmt: skip


def options_of(case: Case, point: Point, n_train: int) -> dict[str, int | None]:
    """A point of the grid as arguments of fit. A larger batch gets more epochs, for it makes fewer updates in one."""
    batch_size, warm_up = point
    epochs = round(case.epochs * max(1.0, math.sqrt(batch_size / 100)))
    planned = epochs * math.ceil(n_train / batch_size)
    steps = PAPER_ANNEAL if warm_up is None else math.ceil(warm_up * planned / CAP)
    return {
        "epochs": epochs, "batch_size": batch_size, "total_anneal_steps": steps, "patience": case.patience,
    }  # fmt: skip


def planned_runs() -> list[tuple[str, int, Point | None]]:
    """Case, split and point of every run, the most telling first."""
    small = [
        (case, split, point)
        for point in GRID
        for case in SAMPLED
        for split in range(CASES[case].splits)
    ]
    whole = [(case, 0, point) for case in WHOLE for point in (None, *ON_WHOLE_SETS)]
    return small + whole


def name_of(case: str, split: int, point: Point | None) -> str:
    """Of a run, in the result file."""
    if point is None:
        return f"{case}/{split}/defaults"
    batch_size, warm_up = point
    return f"{case}/{split}/batch {batch_size}/warm-up {'paper' if warm_up is None else warm_up}"


def defaults(load: Callable[[str], sp.csr_array], path: Path) -> None:
    """Make the runs that the file does not hold yet."""
    before = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rows = before["rows"]
    for case, split, point in planned_runs():
        name = name_of(case, split, point)
        if name in rows:
            continue
        machine = describe()
        data = load_case(load, CASES[case], split)
        rows[name] = run(data, CASES[case], point, split) | {"commit": machine["commit"]}
        shown = {k: rows[name][k] for k in ("best_epoch", "epochs_run", "test", "cpu_seconds")}
        print(name, shown, flush=True)
        result = {
            **before,
            "study": "defaults",
            "machine": machine | {"shared": True},
            "cases": {name: asdict(case) for name, case in CASES.items()},
            "rows": rows,
        }
        write(path, result)
