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
    "anime": Case("anime_caserec", None, 1, 40, 6),
    "gowalla-5k": Case("gowalla", 5_000, 1, 30, 4),
    "ml10m-5k": Case("ml10m_fastvae", 5_000, 1, 40, 5),
    "amazon-10k": Case("amazon_book_kgat", 10_000, 1, 30, 4),
    "ml10m": Case("ml10m_fastvae", None, 1, 30, 3),
    "gowalla": Case("gowalla", None, 1, 20, 3),
    "amazon": Case("amazon_book_kgat", None, 1, 20, 3),
}
SAMPLED = ("ml100k", "anime", "gowalla-5k", "ml10m-5k", "amazon-10k")
# batch size, and the share of the planned updates after which beta is at the cap; None: the paper's schedule
GRID: tuple[tuple[int, float | None], ...] = (
    (100, 0.2), (500, 0.2), (200, 0.2), (500, None), (100, 0.0), (50, 0.2),
)  # fmt: skip
ON_WHOLE_SETS = GRID[1:3]  # where a run is long


def load_case(load: Callable[[str], sp.csr_array], case: Case, split: int) -> Dataset:
    """The split of a case: a tenth of its users to validate on, a tenth to test on."""
    x = load(case.matrix)
    if case.n_users is not None:
        users = np.random.default_rng(0).permutation(x.shape[0])[: case.n_users]
        x = sp.csr_array(x[np.sort(users)])
    return Dataset.from_matrix(x, 0.1, split, min_item_clicks=5 if case.n_users is None else 10)


def planned_updates(n_users: int, batch_size: int, epochs: int) -> int:
    """Updates of so many epochs."""
    return epochs * math.ceil(n_users / batch_size)


def run(data: Dataset, case: Case, batch_size: int, warm_up: float | None, split: int) -> dict:
    """Train once; the row has every epoch's validation NDCG@100, and the test's wherever that was the best so far."""
    # a larger batch makes fewer updates: it gets more epochs, half as many again as its updates would ask for
    epochs = round(case.epochs * max(1.0, math.sqrt(batch_size / 100)))
    planned = planned_updates(data.train.n_users, batch_size, epochs)
    steps = PAPER_ANNEAL if warm_up is None else math.ceil(warm_up * planned / CAP)
    torch.manual_seed(split)
    model = MultiVAE([200, 600, data.n_items])
    history: list[float] = []
    tests: dict[int, float] = {}

    def test_a_new_best(row: dict) -> None:
        history.append(row[METRIC])
        if row[METRIC] == max(history):
            tests[row["epoch"]] = evaluate(model, *data.test, metrics=(METRIC,))[METRIC]

    started = time.process_time()
    result = fit(
        model, data.train, data.validation, epochs=epochs, batch_size=batch_size, anneal_cap=CAP,
        total_anneal_steps=steps, patience=case.patience, precision="bf16", seed=split, on_epoch=test_a_new_best,
    )  # fmt: skip
    return {
        "n_train": data.train.n_users, "n_items": data.n_items, "split": split, "batch_size": batch_size,
        "warm_up": "paper" if warm_up is None else warm_up, "epochs_planned": epochs,
        "total_anneal_steps": steps, "epochs_run": len(history), "best_epoch": result.best_epoch,
        "best_update": planned_updates(data.train.n_users, batch_size, result.best_epoch),
        "validation": round(result.best_metric, 5), "test": round(tests[result.best_epoch], 5),
        "cpu_seconds": round(time.process_time() - started),
        "validation_by_epoch": [round(v, 5) for v in history],
        "test_by_best_epoch": {epoch: round(v, 5) for epoch, v in tests.items()},
    }  # fmt: skip


def planned_runs() -> list[tuple[str, int, int, float | None]]:
    """Case, split, batch size and warm-up of every run, the most telling first."""
    small = [
        (case, split, *point)
        for point in GRID
        for case in SAMPLED
        for split in range(CASES[case].splits)
    ]
    whole = [(case, 0, *point) for case in CASES if case not in SAMPLED for point in ON_WHOLE_SETS]
    return small + whole


def defaults(load: Callable[[str], sp.csr_array], path: Path) -> None:
    """Make the runs that the file does not hold yet."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for case, split, batch_size, warm_up in planned_runs():
        name = (
            f"{case}/{split}/batch {batch_size}/warm-up {'paper' if warm_up is None else warm_up}"
        )
        if name in rows:
            continue
        data = load_case(load, CASES[case], split)
        rows[name] = run(data, CASES[case], batch_size, warm_up, split)
        shown = {k: rows[name][k] for k in ("best_epoch", "epochs_run", "test", "cpu_seconds")}
        print(name, shown, flush=True)
        result = {
            "study": "defaults",
            "machine": describe() | {"shared": True},
            "cases": {name: asdict(case) for name, case in CASES.items()},
            "rows": rows,
        }
        write(path, result)
