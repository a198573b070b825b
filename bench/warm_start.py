"""Warm start beside a training from scratch: NDCG@100 by epoch where a data set has grown, with new and gone items.

    python -m bench warm_start [ml10m | anime | gowalla | ml100k] [--users N] [--widths 300,100]     needs FASTVAE_DATA, see quality.py

The data set as it stands in the end is split by user. The run before it had four in five of its train users, without
one item in ten, drawn at random (the sets have no times), but with one in twenty that is gone since. Each run stops
after PATIENCE epochs without a better validation NDCG@100. The warm start gets a fifth of the epochs after which the training
from scratch was best, with Adam's moments and without; the same number from scratch is that training's own history.
Writes bench/results/warm_start_<set>.json after each run.
"""

from __future__ import annotations

import argparse
import json
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
from fastvae.synthetic import synthetic_clicks

SHARE = 5  # the warm start gets one epoch in so many
NEW, GONE, USERS_BEFORE = 0.1, 0.05, 0.8
PATIENCE = 5
# most epochs; users per update; held-out users of each kind
SETS = {
    "ml10m": ("ml10m_fastvae", 60, 100, 1000),
    "anime": ("anime_caserec", 60, 100, 450),
    "gowalla": ("gowalla", 60, 100, 2000),
    "ml100k": ("ml100k_ge4", 200, 100, 150),
    "toy": (None, 5, 40, 30),
}


class Growth:
    """A data set now and before, and what runs on it reached, which goes to a file as it comes.

    x  click matrix with the items of both times
    """

    def __init__(
        self, x: Clicks, epochs: int, batch_size: int, n_heldout: int, widths: list[int], file: Path
    ):
        rng = np.random.default_rng(0)
        ids = np.array([f"i{n}" for n in range(x.n_items)], dtype=object)
        kind = rng.random(x.n_items)
        self.is_gone, is_new = kind < GONE, kind >= 1 - NEW
        self.now = self._without(x, ids, self.is_gone, n_heldout)
        self.new = set(ids[is_new]) & set(self.now.items)
        rows = np.flatnonzero(rng.random(self.now.train.n_users) < USERS_BEFORE)
        # the rows of x that are these users: split_dataset keeps their numbers as ids
        users = self.now.users_train[rows].astype(np.int64)
        keep = np.flatnonzero(~is_new)
        before = x.to_scipy()[users][:, keep]
        seen = np.flatnonzero(np.bincount(before.indices, minlength=before.shape[1]))
        self.items_before = list(ids[keep][seen])
        self.train_before = Clicks.from_matrix(before[:, seen])
        self.epochs, self.batch_size, self.file, self.widths = epochs, batch_size, file, widths
        self.runs: dict[str, Any] = {}

    @staticmethod
    def _without(x: Clicks, ids: np.ndarray, gone: np.ndarray, n_heldout: int) -> Dataset:
        kept = x.to_scipy()[:, np.flatnonzero(~gone)]
        return Dataset.from_matrix(kept, n_heldout, 0, items=ids[~gone], min_user_clicks=5)

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

    def run(self, name: str, epochs: int, **options: Any) -> dict[str, Any]:
        """Train on the data of now and measure on its test users; on those of their clicks too that are on new items."""
        data = self.now
        model = self._model(data.n_items, 0)
        history = self._fit(model, data.train, data.validation, epochs, list(data.items), **options)
        fold_in, held_out = data.test
        is_new = torch.tensor([item in self.new for item in data.items])
        on_new = held_out.where(is_new[held_out.compact().indices.long()])
        self.runs[name] = {
            **history,
            "test": evaluate(model, fold_in, held_out).to_dict(),
            "test_new_items": evaluate(model, fold_in, on_new, metrics=("ndcg@100",)).to_dict(),
        }
        self.save()
        return self.runs[name]

    def run_before(self, folder: Path) -> None:
        """Train on the data of before; validation users are those of now, with the items of then."""
        validation = tuple(
            map_items(part, self.now.items, self.items_before)[0] for part in self.now.validation
        )
        model = self._model(len(self.items_before), 1)
        self.runs["before"] = self._fit(
            model, self.train_before, validation, self.epochs, self.items_before, run_dir=folder
        )
        self.save()

    def _model(self, n_items: int, seed: int) -> MultiVAE:
        torch.manual_seed(seed)
        return MultiVAE([*self.widths[::-1], n_items])

    def _fit(
        self, model: MultiVAE, train: Clicks, validation: Any, epochs: int, items: list[str], **options: Any
    ) -> dict[str, Any]:  # fmt: skip
        result = fit(
            model, train, validation, epochs=epochs, batch_size=self.batch_size, total_anneal_steps=0,
            patience=PATIENCE, items=items, **options,
        )  # fmt: skip
        return {
            "best_epoch": result.best_epoch,
            "validation_ndcg@100": [round(row["ndcg@100"], 4) for row in result.history],
        }

    def save(self) -> None:
        """Write what there is."""
        result = {
            "machine": describe(), "shared_machine": True, "batch_size": self.batch_size,
            "widths": self.widths, "patience": PATIENCE, "most_epochs": self.epochs, **self.sizes(),
            "runs": self.runs,
        }  # fmt: skip
        write(self.file, result)


def study(growth: Growth) -> dict[str, Any]:
    """The four runs, and whether the warm start reached the training from scratch in a fifth of its epochs."""
    with tempfile.TemporaryDirectory() as name:
        before, alone = Path(name, "before"), Path(name, "best_alone.pt")
        growth.run_before(before)
        shutil.copy(before / "best.pt", alone)
        scratch = growth.run("from_scratch", growth.epochs)
        epochs = max(1, scratch["best_epoch"] // SHARE)
        growth.run("warm", epochs, warm_start=before)
        growth.run("warm_without_moments", epochs, warm_start=alone)
    return growth.runs


def main(arguments: list[str]) -> None:
    """Run the study on one data set."""
    parser = argparse.ArgumentParser(prog="python -m bench warm_start", description=__doc__)
    parser.add_argument("data", choices=SETS, nargs="?", default="ml10m")
    parser.add_argument("--users", type=int, help="take the first N users of the data set")
    parser.add_argument("--widths", default="600,200", help="hidden and latent; the paper's")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the file")
    options = parser.parse_args(arguments)
    name, epochs, batch_size, n_heldout = SETS[options.data]
    x = synthetic_clicks(300, 80, 4000) if name is None else Clicks.from_matrix(load(name))
    if options.users:
        x = x.rows(np.arange(min(options.users, x.n_users))).compact()
    file = options.into / f"warm_start_{options.data}.json"
    widths = [int(width) for width in options.widths.split(",")]
    runs = study(Growth(x, epochs, batch_size, n_heldout, widths, file))
    print(json.dumps(runs, indent=2))
