"""Warm start beside a training from scratch, both without options, where a data set has grown, with new and gone items.

    python -m bench warm_start [ml10m | anime | gowalla | ml100k] [--users N] [--widths 300,100] [--seeds 3]

needs FASTVAE_DATA, see quality.py. The data set as it stands in the end is split by user. The run before it had four in
five of its train users, without one item in ten, drawn at random (the sets have no times), but with one in twenty that is
gone since. fit chooses all settings of that run and of the training from scratch; the warm start gets a fifth of the
epochs after which the training from scratch was best, and fit chooses the rest. One more run has the small batches that a
training of so few epochs from scratch would get. A seed is of the draws, the split and the training.
Writes bench/results/warm_start_<set>.json after each seed; a second call goes on with the seeds that it lacks. In bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import RESULTS, describe, write
from bench.quality import load
from fastvae import Clicks, Dataset, MultiVAE, evaluate, fit
from fastvae.data import map_items
from fastvae.defaults import make_plan
from fastvae.run_folder import METRIC
from fastvae.synthetic import synthetic_clicks

SHARE = 5  # the warm start gets one epoch in so many
NEW, GONE, USERS_BEFORE = 0.1, 0.05, 0.8
# held-out users of each kind
SETS = {
    "ml10m": ("ml10m_fastvae", 1000),
    "anime": ("anime_caserec", 450),
    "gowalla": ("gowalla", 2000),
    "ml100k": ("ml100k_ge4", 150),
    "toy": (None, 30),
}


class Growth:
    """A data set now and before, and what runs on it reached.

    x  click matrix with the items of both times
    """

    def __init__(self, x: Clicks, n_heldout: int, widths: list[int], seed: int):
        rng = np.random.default_rng(seed)
        ids = np.array([f"i{n}" for n in range(x.n_items)], dtype=object)
        kind = rng.random(x.n_items)
        is_gone, is_new = kind < GONE, kind >= 1 - NEW
        kept = x.to_scipy()[:, np.flatnonzero(~is_gone)]
        self.now = Dataset.from_matrix(
            kept, n_heldout, seed, items=ids[~is_gone], min_user_clicks=5
        )
        self.new = set(ids[is_new]) & set(self.now.items)
        rows = np.flatnonzero(rng.random(self.now.train.n_users) < USERS_BEFORE)
        # the rows of x that are these users: split_dataset keeps their numbers as ids
        users = self.now.users_train[rows].astype(np.int64)
        keep = np.flatnonzero(~is_new)
        before = x.to_scipy()[users][:, keep]
        seen = np.flatnonzero(np.bincount(before.indices, minlength=before.shape[1]))
        self.items_before = list(ids[keep][seen])
        self.train_before = Clicks.from_matrix(before[:, seen])
        self.widths, self.seed = widths, seed
        self.runs: dict[str, Any] = {}
        self.values: dict[str, np.ndarray] = {}

    def sizes(self) -> dict[str, int]:
        """Users, items and clicks at both times."""
        before, now = self.items_before, list(self.now.items)
        return {
            "users_before": self.train_before.n_users, "users_now": self.now.train.n_users,
            "clicks_before": self.train_before.nnz, "clicks_now": self.now.train.nnz,
            "items_before": len(before), "items_now": len(now),
            "items_new": len(set(now) - set(before)), "items_gone": len(set(before) - set(now)),
            "users_test": len(self.now.users_test),
        }  # fmt: skip

    def run(self, name: str, **options: Any) -> dict[str, Any]:
        """Train on the data of now and measure on its test users; on those of their clicks too that are on new items."""
        data = self.now
        model = self._model(data.n_items, self.seed)
        history = self._fit(model, data.train, data.validation, list(data.items), **options)
        fold_in, held_out = data.test
        is_new = torch.tensor([item in self.new for item in data.items])
        on_new = held_out.where(is_new[held_out.compact().indices.long()])
        test = evaluate(model, fold_in, held_out)
        self.values[name] = test.values[METRIC]
        gain = self.values[name] - self.values["from_scratch"]
        self.runs[name] = {
            **history,
            "test": test.to_dict(),
            "more_than_from_scratch": {
                "mean": float(gain.mean()), "stderr": float(gain.std() / math.sqrt(len(gain)))
            },
            "test_new_items": evaluate(model, fold_in, on_new, metrics=(METRIC,)).to_dict(),
        }  # fmt: skip
        return self.runs[name]

    def run_before(self, folder: Path) -> None:
        """Train on the data of before; validation users are those of now, with the items of then."""
        validation = tuple(
            map_items(part, self.now.items, self.items_before)[0] for part in self.now.validation
        )
        model = self._model(len(self.items_before), self.seed + 1000)
        self.runs["before"] = self._fit(
            model, self.train_before, validation, self.items_before, run_dir=folder
        )

    def _model(self, n_items: int, seed: int) -> MultiVAE:
        torch.manual_seed(seed)
        return MultiVAE([*self.widths[::-1], n_items])

    def _fit(
        self, model: MultiVAE, train: Clicks, validation: Any, items: list[str], **options: Any
    ) -> dict[str, Any]:
        result = fit(
            model, train, validation, items=items, precision="bf16", seed=self.seed, **options
        )
        return {
            "best_epoch": result.best_epoch,
            "updates_an_epoch": result.history[0]["update"],
            "validation_ndcg@100": [round(row[METRIC], 4) for row in result.history],
        }


def study(growth: Growth) -> dict[str, Any]:
    """The five runs, and the sizes of the data."""
    with tempfile.TemporaryDirectory() as name:
        before, alone = Path(name, "before"), Path(name, "best_alone.pt")
        growth.run_before(before)
        shutil.copy(before / "best.pt", alone)
        scratch = growth.run("from_scratch")
        epochs = max(1, scratch["best_epoch"] // SHARE)
        few = make_plan(
            growth.now.train.n_users, validated=True, anneal_cap=0.2, given={"epochs": epochs}
        )
        growth.run("warm", epochs=epochs, warm_start=before)
        growth.run("warm_without_moments", epochs=epochs, warm_start=alone)
        growth.run(
            "warm_in_small_batches", epochs=epochs, batch_size=few.batch_size, warm_start=before
        )
    return {**growth.sizes(), "runs": growth.runs}


def main(arguments: list[str]) -> None:
    """Run the study on one data set."""
    parser = argparse.ArgumentParser(prog="python -m bench warm_start", description=__doc__)
    parser.add_argument("data", choices=SETS, nargs="?", default="ml10m")
    parser.add_argument("--users", type=int, help="take the first N users of the data set")
    parser.add_argument("--widths", default="600,200", help="hidden and latent; the paper's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the file")
    options = parser.parse_args(arguments)
    name, n_heldout = SETS[options.data]
    x = synthetic_clicks(300, 80, 4000) if name is None else Clicks.from_matrix(load(name))
    if options.users:
        x = x.rows(np.arange(min(options.users, x.n_users))).compact()
    file = options.into / f"warm_start_{options.data}.json"
    widths = [int(width) for width in options.widths.split(",")]
    asked = {"users": options.users, "widths": widths}
    before = json.loads(file.read_text()) if file.exists() else {}
    seeds = before["seeds"] if before.get("asked") == asked else {}
    for seed in range(options.seeds):
        if str(seed) in seeds:
            continue
        machine = describe()
        found = study(Growth(x, n_heldout, widths, seed)) | {"commit": machine["commit"]}
        seeds[str(seed)] = found
        write(file, {"machine": machine | {"shared": True}, "asked": asked, "seeds": seeds})
        tests = {key: run["test"][METRIC] for key, run in found["runs"].items() if "test" in run}
        print(options.data, seed, tests, flush=True)
