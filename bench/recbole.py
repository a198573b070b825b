"""RecBole 1.2.1's MultiVAE and the one that fastvae.recbole puts in its place, both in RecBole's own trainer.

    python -m bench recbole quality    test metrics on ml-100k, three seeds, and with noise_std 1 beside them
    python -m bench recbole time       seconds an epoch on ml-100k, and on ml10m's users where FASTVAE_DATA is set

Needs the extra recbole; both write into bench/results/recbole_cpu.json. Parts of an epoch come in turns in one process,
on one loader: of RecBole's model, of ours with RecBole's own optimiser, and of ours as it comes, with fastvae.Adam.
Seconds of processor are given beside those of the clock, since they do not count what else runs on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch

from bench.machine import RESULTS, add
from bench.quality import load

QUALITY = {"metrics": ["NDCG", "Recall"], "topk": [20, 100], "valid_metric": "NDCG@100"}
SEEDS = (0, 1, 2)
ITS_OPTIMISER = "fastvae, RecBole's optimiser"
# data set, batch (RecBole's default is 2,048), epochs
TIMED = (("ml-100k", 100, 15), ("ml10m", 2048, 1), ("ml10m", 500, 1))
PARTS = 10  # of an epoch; the models take turns after each, so that all have the same noise


@contextlib.contextmanager
def recbole_in(folder: str) -> Iterator[None]:
    """RecBole writes logs and checkpoints where it runs, and reads settings from the command line."""
    before, arguments = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = arguments


def models() -> dict[str, type]:
    """RecBole's class, from its file under another name, and ours, which has taken its place."""
    from recbole.model.general_recommender import multivae

    import fastvae.recbole  # noqa: F401  takes the place of multivae.MultiVAE

    spec = importlib.util.spec_from_file_location("multivae_of_recbole", multivae.__file__)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    return {"recbole": theirs.MultiVAE, "fastvae": multivae.MultiVAE}


def prepared(name: str, seed: int, batch_size: int, **settings: Any) -> tuple[Any, tuple]:
    """Config, and the loaders of training, validation and test."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    settings |= {"seed": seed, "train_batch_size": batch_size, "use_gpu": False}
    settings |= {"show_progress": False, "eval_batch_size": 2**21}
    if name == "ml10m":
        _write_inter(Path(name))
        settings |= {"data_path": ".", "load_col": {"inter": ["user_id", "item_id"]}}
    config = Config(model="MultiVAE", dataset=name, config_dict=settings)
    init_seed(seed, True)
    return config, data_preparation(config, create_dataset(config))


def _write_inter(folder: Path) -> None:
    if folder.exists():
        return
    folder.mkdir()
    users, items = load("ml10m_fastvae").nonzero()
    lines = np.char.add(np.char.add(users.astype(str), "\t"), items.astype(str))
    text = "\n".join(["user_id:token\titem_id:token", *lines])
    (folder / f"{folder.name}.inter").write_text(text + "\n", encoding="utf-8")


def new_trainer(model: type, config: Any, train: Any, seed: int) -> Any:
    """RecBole's trainer around a model of this seed's weights."""
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    init_seed(seed, True)
    return Trainer(config, model(config, train._dataset))


def quality(epochs: int) -> dict:
    """Test metrics after RecBole's own early stopping, of three seeds of split and weights."""
    import fastvae.recbole

    classes = models()
    runs: dict[str, list] = {"recbole": [], "fastvae": [], "fastvae, noise_std 1": []}
    for seed in SEEDS:
        for name, found in runs.items():
            more = {"noise_std": 1.0} if "noise_std" in name else {}
            config, (train, valid, test) = prepared(
                "ml-100k", seed, 100, epochs=epochs, **QUALITY, **more
            )
            trainer = new_trainer(classes[name.split(",")[0]], config, train, seed)
            # RecBole's own checkpoints are not read by this torch
            trainer._save_checkpoint = fastvae.recbole._save_checkpoint.__get__(trainer)
            started = time.process_time()
            trainer.fit(train, valid, verbose=False)
            result = trainer.evaluate(test, load_best_model=True)
            epochs_run = len(trainer.train_loss_dict)
            found.append({"seed": seed, "epochs": epochs_run, **result})
            print(name, found[-1], f"{time.process_time() - started:.0f} s", flush=True)
    return {name: {"runs": found, **_summary(found)} for name, found in runs.items()}


def _summary(found: list[dict]) -> dict:
    keys = [key for key in found[0] if "@" in key]
    values = {key: [run[key] for run in found] for key in keys}
    return {
        key: {"mean": round(mean(v), 4), "std": round(stdev(v), 4)} for key, v in values.items()
    }


def timed(name: str, batch_size: int, epochs: int) -> dict:
    """Seconds an epoch of the three, in turns; a first part of each, of 1,000 users, is left out."""
    config, (train, *_) = prepared(name, 0, batch_size)
    theirs, mine = models().values()
    trainers = {key: new_trainer(mine, config, train, 0) for key in (ITS_OPTIMISER, "fastvae")}
    trainers = {"recbole": new_trainer(theirs, config, train, 0), **trainers}
    weights = trainers[ITS_OPTIMISER].model.parameters()
    trainers[ITS_OPTIMISER].optimizer = torch.optim.Adam(weights, lr=config["learning_rate"])
    few = list(itertools.islice(train, max(1, 1000 // batch_size)))
    clock: dict[str, list[float]] = {key: [] for key in trainers}
    processor: dict[str, list[float]] = {key: [] for key in trainers}
    for trainer in trainers.values():
        trainer._train_epoch(few, 0)
    for epoch in range(epochs):
        batches = list(train)
        size = -(-len(batches) // PARTS)
        for first in range(0, len(batches), size):
            for key, trainer in trainers.items():
                start, cpu = time.perf_counter(), time.process_time()
                trainer._train_epoch(batches[first : first + size], epoch)
                clock[key].append(round(time.perf_counter() - start, 4))
                processor[key].append(round(time.process_time() - cpu, 4))
        print(name, batch_size, _compared(clock, epoch + 1), flush=True)
    times = {"s": clock, "cpu_s": processor}
    compared = {kind: _compared(found, epochs) for kind, found in times.items()}
    return {"batch_size": batch_size, "epochs": epochs, **compared, "parts": times}


def _compared(times: dict[str, list[float]], epochs: int) -> dict:
    """Seconds an epoch, and how many times faster than RecBole's model each is, part by part."""
    faster = {}
    for key, found in times.items():
        pairs = zip(times["recbole"], found, strict=True)
        faster[key] = round(median(theirs / own for theirs, own in pairs), 2)
    whole = {key: round(sum(found) / epochs, 4) for key, found in times.items()}
    return {"epoch": whole, "times_faster": faster}


def main(arguments: list[str]) -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench recbole", description=__doc__)
    parser.add_argument("what", choices=["quality", "time"])
    parser.add_argument(
        "--epochs", type=int, help="at most, default 300; or to time, default 15 and 1"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = RESULTS / "recbole_cpu.json"
    with tempfile.TemporaryDirectory() as folder, recbole_in(folder):
        if options.what == "quality":
            add(path, "quality ml-100k", quality(options.epochs or 300))
            return
        for name, batch_size, epochs in TIMED:
            if name == "ml10m" and "FASTVAE_DATA" not in os.environ:
                continue
            row = timed(name, batch_size, options.epochs or epochs)
            add(path, f"time {name}, batch {batch_size}", {**row, "load": os.getloadavg()[0]})
