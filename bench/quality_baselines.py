"""Popularity, item-kNN and EASE on the splits of the study of defaults, whose runs without options are Mult-VAE's.

Item-kNN's neighbours and EASE's reg are chosen on the validation users, by which Mult-VAE stops; the test users say the rest.
Two more numbers would show a leak: EASE by its formula in fp64, ranked and measured by numpy alone, and EASE where each
user's held-out clicks are another test user's, which must be worse than popularity. Both where fp64 is a matter of seconds.
Sets are written to the result file as they end, and a second call goes on with those that are missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from bench.machine import describe, write
from bench.quality_defaults import CASES, SAMPLED, load_case
from fastvae import Clicks, Dataset, evaluate
from fastvae.baselines import EASE, ItemKNN, Popularity
from fastvae.run_folder import METRIC

MODELS = ("popularity", "item-kNN", "EASE")
K = 100  # of METRIC
MOST_CHECKED = 5_500  # items
NEIGHBOURS = (20, 100, 400)
REGS = (50.0, 200.0, 500.0, 1000.0)


def baselines(load: Callable[[str], sp.csr_array], path: Path) -> None:
    """Measure the splits that the file does not hold yet."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for case in SAMPLED:
        for split in range(CASES[case].splits):
            name = f"{case}/{split}"
            if name in rows:
                continue
            machine = describe()
            row = measure(load_case(load, CASES[case], split))
            rows[name] = row | {"commit": machine["commit"]}
            print(name, {key: row[key]["test"] for key in MODELS}, row.get("check"), flush=True)
            write(path, {"study": "baselines", "machine": machine | {"shared": True}, "rows": rows})


def measure(data: Dataset) -> dict[str, Any]:
    """NDCG@100 of each of MODELS on the test users, with standard errors, and what is checked."""
    row = {
        "n_train": data.train.n_users, "n_items": data.n_items, "n_test": data.test[0].n_users,
        "popularity": test_of(data, Popularity(data.train)),
        "item-kNN": chosen(data, "n_neighbours", NEIGHBOURS, lambda n: ItemKNN(data.train, n)),
        "EASE": chosen(data, "reg", REGS, lambda reg: EASE(data.train, reg)),
    }  # fmt: skip
    if data.n_items <= MOST_CHECKED:
        row["check"] = checked(data, row["EASE"]["reg"])
    return row


def test_of(data: Dataset, model: torch.nn.Module) -> dict[str, float]:
    """The test's NDCG@100."""
    result = evaluate(model, *data.test, metrics=(METRIC,))
    return {"test": result[METRIC], "stderr": result.stderr[METRIC]}


def chosen(data: Dataset, name: str, values: Iterable[Any], make: Callable[[Any], Any]) -> dict:
    """The test of the value that is best on the validation users."""
    validation: dict[Any, float] = {}
    best: tuple[float, Any, Any] = (-math.inf, None, None)
    for value in values:
        model = make(value)
        validation[value] = evaluate(model, *data.validation, metrics=(METRIC,))[METRIC]
        if validation[value] > best[0]:
            best = validation[value], value, model
    return {name: best[1], "validation": validation, **test_of(data, best[2])}


def checked(data: Dataset, reg: float) -> dict[str, Any]:
    """What would show a leak or a wrong EASE."""
    train = rows_of(data.train)
    fold_in, held_out = (rows_of(part).toarray() for part in data.test)
    scores = fold_in @ ease_fp64(train, reg)
    popular = np.tile(np.bincount(train.indices, minlength=data.n_items), (len(fold_in), 1))
    others = np.roll(held_out, 1, axis=0) * (fold_in == 0)
    n_both = (fold_in * held_out).sum() + len(set(data.users_train) & set(data.users_test))
    return {
        "clicks in both parts and users in train too": int(n_both),
        "EASE in fp64": ndcg_fp64(scores, fold_in, held_out),
        "EASE, held-out clicks of another user": ndcg_fp64(scores, fold_in, others),
        "popularity, held-out clicks of another user": ndcg_fp64(popular, fold_in, others),
    }


def rows_of(clicks: Clicks) -> Any:
    """A scipy CSR matrix of fp64 ones."""
    return clicks.compact().binary().to_scipy().astype(np.float64)


def ease_fp64(train: Any, reg: float) -> np.ndarray:
    """EASE's weight [n_items, n_items], as Steck 2019 writes it in figure 1.

    train  scipy sparse [n_users, n_items], ones
    """
    gram = (train.T @ train).toarray()
    gram[np.diag_indices_from(gram)] += reg
    inverse = np.linalg.inv(gram)
    weight = inverse / -np.diag(inverse)
    weight[np.diag_indices_from(weight)] = 0
    return weight


def ndcg_fp64(scores: np.ndarray, fold_in: np.ndarray, held_out: np.ndarray) -> float:
    """Mean NDCG@100 of the users with both kinds of clicks; all arrays are [n_users, n_items], ties go to the lower item."""
    order = np.argsort(np.where(fold_in > 0, np.inf, -scores), axis=1, kind="stable")[:, :K]
    discount = 1 / np.log2(np.arange(order.shape[1]) + 2)
    gained = (np.take_along_axis(held_out, order, axis=1) * discount).sum(1)
    n_held_out = held_out.sum(1).astype(int)
    ideal = np.concatenate([[0], np.cumsum(discount)])[np.minimum(n_held_out, len(discount))]
    counts = (n_held_out > 0) & (fold_in.sum(1) > 0)
    return float((gained[counts] / ideal[counts]).mean())
