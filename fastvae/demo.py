"""The demo: prepare, train, evaluate and recommend, on MovieLens-100K or on the user's own click log."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from . import console
from .data import Dataset, split_dataset
from .defaults import MAX_EPOCHS
from .evaluate import Popularity, evaluate
from .events import Events, read_events
from .models import MultiVAE
from .movielens import movielens_100k, read_titles
from .recommend import recommend
from .synthetic import synthetic_clicks
from .train import fit

# aimed at for larger logs, at 1e11 multiply-adds a second on two cores
TRAIN_SECONDS = 40


def run_demo(events: Path | None, folder: Path) -> None:
    """Everything that fastvae does, in one go; the dataset and the run go to folder."""
    started = time.perf_counter()
    log, titles, name = _log(events)
    console.note_doubts(log)
    n_heldout = max(1, min(150, log.x.n_users // 6))
    dataset = split_dataset(log, n_heldout, seed=1)
    dataset.save(folder / "dataset")
    console.heading(f"prepared {name}")
    console.show_dataset(dataset)
    console.heading("train a Mult-VAE")
    model, run = _train(dataset, folder)
    console.heading(f"{n_heldout} test users, whose other clicks the model has not seen")
    console.show_results(
        {
            "Mult-VAE": evaluate(model, *dataset.test),
            "popularity": evaluate(Popularity(dataset.train), *dataset.test),
        }
    )
    console.heading("recommend")
    _show_recommendations(model, dataset, titles)
    took = time.perf_counter() - started
    console.say(f"run folder {run}\nlearning curve {run / 'curve.png'}\ndone in {took:.0f} s")


def _log(events: Path | None) -> tuple[Events, dict[str, str], str]:
    """The click log, titles by item id, and a name."""
    if events is not None:
        return read_events(events), {}, events.name
    try:
        interactions, films = movielens_100k()
    except RuntimeError as error:
        console.say(f"{error}\nusing synthetic data instead")
        x = synthetic_clicks(1000, 1500, 55_000, kind="latent")
        users, items = (
            np.array([f"{kind} {n}" for n in range(size)], dtype=object)
            for kind, size in zip(("user", "item"), x.shape, strict=True)
        )
        info = {"n_events": x.nnz, "dropped": {}, "source": {"synthetic": "latent"}}
        return Events(x, users, items, info), {}, "synthetic data"
    log = read_events(interactions, min_rating=4)
    return log, read_titles(films), "MovieLens-100K, ratings of 4 and 5"


def _train(dataset: Dataset, folder: Path) -> tuple[MultiVAE, Path]:
    torch.manual_seed(0)
    model = MultiVAE([200, 600, dataset.n_items])
    n_users, n_items = dataset.train.shape
    seconds_per_epoch = 3 * 600 * n_users * n_items / 1e11
    run = _unused(folder)
    affordable = max(1, int(TRAIN_SECONDS / seconds_per_epoch))
    fit(
        model,
        dataset.train,
        dataset.validation,
        epochs=affordable if affordable < MAX_EPOCHS else None,
        run_dir=run,
        items=list(dataset.items),
        progress=True,
    )
    return model, run


def _unused(folder: Path) -> Path:
    """run-1, run-2, ...: an earlier demo's run is kept."""
    n = 1
    while (folder / f"run-{n}").exists():
        n += 1
    return folder / f"run-{n}"


def _show_recommendations(model, dataset: Dataset, titles: dict[str, str]) -> None:
    """Two test users: some of what they clicked, and the model's top five."""
    fold_in, _ = dataset.test
    users = torch.argsort((fold_in.row_lengths() - 20).abs(), stable=True)[:2]
    histories = fold_in.rows(users).compact()
    found = recommend(model, histories, k=5, items=list(dataset.items))
    verb = "watched" if titles else "clicked"
    for n, recommended in enumerate(found.external()):
        row = histories.indices[histories.indptr[n] : histories.indptr[n + 1]].tolist()
        shown = [dataset.items[i] for i in row[:5]]
        watched, wanted = ("; ".join(titles.get(i, i) for i in ids) for ids in (shown, recommended))
        user = dataset.users_test[int(users[n])]
        console.say(f"user {user} {verb} {watched} ... -> recommended {wanted}\n")
