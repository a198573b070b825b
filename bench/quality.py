"""Quality on real data: NDCG@100 of fit() beside the dense reference model, and memory of an epoch.

    python -m bench quality ml100k | ml10m | gowalla | scale | seconds [--into FILE]     all but scale need FASTVAE_DATA
    python -m bench quality defaults    hours; stopped, it goes on where it was. See quality_defaults.py
    python -m bench quality baselines   minutes, likewise: popularity, item-kNN, EASE. See quality_baselines.py
    python -m bench quality similar     which items are alike. See quality_similar.py

seconds is for a GPU: the time that fit() takes to a validation NDCG@100 of .355 on ml10m, kernels compiled before.
Each writes bench/results/quality_<name>.json, or FILE. FASTVAE_DATA is a folder with the click matrices as
<name>.npz, each the CSR arrays indptr, indices, shape: ml100k_ge4 (MovieLens-100K, ratings of 4 and 5, users with 5
items), ml10m_fastvae (MovieLens-10M likewise, 60,655 x 8,641 with 2,105,971 clicks), gowalla (29,858 x 40,988 check-
ins), anime_caserec (4,567 x 7,390), amazon_book_kgat (70,595 x 24,915). None of them may be redistributed, so none is
part of the project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from bench.machine import RESULTS, add, describe, write
from bench.memory import peak_mib
from bench.quality_baselines import baselines
from bench.quality_defaults import defaults
from bench.quality_similar import similar
from fastvae import Clicks, Dataset, MultiVAE, evaluate, fit, recommend, reference
from fastvae.synthetic import synthetic_clicks
from fastvae.train import beta_at, epoch_order

TARGET = 0.355  # validation NDCG@100 on ml10m


def load(name: str) -> sp.csr_array:
    """A data set of the folder FASTVAE_DATA."""
    if "FASTVAE_DATA" not in os.environ:
        raise SystemExit("quality: FASTVAE_DATA must name the folder of the real data sets")
    arrays = np.load(Path(os.environ["FASTVAE_DATA"], f"{name}.npz"))
    values = np.ones(len(arrays["indices"]), np.float32)
    return sp.csr_array((values, arrays["indices"], arrays["indptr"]), shape=arrays["shape"])


class DenseModel(torch.nn.Module):
    """The dense reference model behind the interface of fastvae's models: Clicks in, logits out."""

    def __init__(self, model: MultiVAE):
        super().__init__()
        self.n_items = model.n_items
        self.dense = reference.MultiVAE(model.p_dims)
        self.dense.load_state_dict(model.state_dict())

    def forward(self, clicks: Clicks):
        """Logits [n_users, n_items]."""
        return self.dense(clicks.to_dense())[0]


def fit_dense(model: DenseModel, train: Clicks, epochs: int, batch_size: int, seed: int) -> float:
    """Train the dense model on the batches, dropout masks and noise that fit() would draw; seconds per epoch."""
    optimizer, update = torch.optim.Adam(model.parameters(), lr=1e-3), 0
    model.train()
    started = time.perf_counter()
    for epoch in range(epochs):
        order, draw_seed = epoch_order(train.n_users, seed, epoch)
        torch.manual_seed(draw_seed)
        for ids in order.split(batch_size):
            clicks, dropout_seed = train.rows(ids), torch.randint(2**63 - 1, (1,))
            keep = reference.dense_keep(clicks, dropout_seed, 0.5)
            beta = beta_at(update, 0.2, 200_000)
            optimizer.zero_grad()
            model.dense.loss(clicks.to_dense(), beta, keep).backward()
            optimizer.step()
            update += 1
    return (time.perf_counter() - started) / max(epochs, 1)


def new_model(n_items: int, seed: int) -> MultiVAE:
    """A model with the paper's widths."""
    torch.manual_seed(seed)
    return MultiVAE([200, 600, n_items])


def ml100k() -> dict:
    """Three seeds of split and model, 150 held-out users: test metrics of the best validation epoch."""
    runs = []
    for seed in range(3):
        data = Dataset.from_matrix(load("ml100k_ge4"), 150, seed)
        model = new_model(data.n_items, seed)
        result = fit(
            model,
            data.train,
            data.validation,
            epochs=100,
            batch_size=100,
            total_anneal_steps=0,
            patience=20,
            seed=seed,
        )
        test = evaluate(model, *data.test).to_dict()
        runs.append({"seed": seed, "best_epoch": result.best_epoch, **test})
        print(runs[-1])
    return {"runs": runs, "mean_ndcg@100": float(np.mean([run["ndcg@100"] for run in runs]))}


def ml10m(epochs: int = 6, batch_size: int = 500, seed: int = 0) -> dict:
    """fp32 and bf16 beside the dense reference: same initial weights, batches, dropout masks and noise."""
    data = Dataset.from_matrix(load("ml10m_fastvae"), 4000, seed)
    runs = {}
    for name in ("fp32", "bf16", "dense"):
        model = new_model(data.n_items, seed)
        if name == "dense":
            model = DenseModel(model)
            seconds = fit_dense(model, data.train, epochs, batch_size, seed)
        else:
            started = time.perf_counter()
            fit(model, data.train, epochs=epochs, batch_size=batch_size, seed=seed, precision=name)
            seconds = (time.perf_counter() - started) / epochs
        test = evaluate(model, *data.test).to_dict()
        runs[name] = {**test, "seconds_per_epoch": round(seconds, 1)}
        print(name, runs[name])
    return {"epochs": epochs, "batch_size": batch_size, "n_train": data.train.n_users, "runs": runs}


def gowalla() -> dict:
    """Peak memory of the process over a training epoch with 41,000 items, data and validation included."""
    data = Dataset.from_matrix(load("gowalla"), 3000, 0)
    model = new_model(data.n_items, 0)
    started = time.perf_counter()
    result = fit(model, data.train, data.validation, epochs=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = round(time.perf_counter() - started, 1)
    return {
        "n_items": data.n_items,
        "peak_rss_gib": round(peak, 3),
        "seconds": seconds,
        "epoch": result.history[0],
    }


def scale() -> dict:
    """Memory that evaluating and recommending add, 20,000 users x 200,000 items (made-up clicks, an untrained model)."""
    n_users, n_items = 20_000, 200_000
    x = synthetic_clicks(n_users, n_items, 20 * n_users)
    held_out = synthetic_clicks(n_users, n_items, 5 * n_users, seed=1)
    model = new_model(n_items, 0)
    row: dict = {"n_users": n_users, "n_items": n_items}
    for name, call in (
        ("evaluate", lambda: evaluate(model, x, held_out)),
        ("recommend", lambda: recommend(model, x, 20)),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, started = peak_mib(), time.perf_counter()
        call()
        row |= {
            f"{name}_seconds": round(time.perf_counter() - started, 1),
            f"{name}_extra_mib": round(peak_mib() - before),
        }
    return row


class Stopwatch(MultiVAE):
    """Notes when fit() begins an epoch, which is when it has done with the one before and its validation."""

    def __init__(self, p_dims: list[int]):
        super().__init__(p_dims)
        self.begun: list[float] = []

    def train(self, mode: bool = True) -> Stopwatch:
        """nn.Module.train; fit calls it once an epoch."""
        if mode:
            self.begun.append(time.perf_counter())
        return super().train(mode)


def seconds() -> dict:
    """60 epochs on ml10m in bf16 by CUDA graphs, as fast as fit() goes."""
    return seconds_to(Dataset.from_matrix(load("ml10m_fastvae"), 4000, 0), TARGET, 60, 500)


def toy() -> dict:
    """seconds() on made-up clicks: a rehearsal."""
    return seconds_to(Dataset.from_matrix(synthetic_clicks(200, 60, 2000), 40, 0), 0.1, 2, 40)


def seconds_to(data: Dataset, target: float, epochs: int, batch_size: int) -> dict:
    """Seconds of fit() to the first epoch with a validation NDCG@100 of target, and of all epochs."""
    on_gpu = torch.cuda.is_available()
    options = {"batch_size": batch_size, "precision": "bf16", "cuda_graph": on_gpu}
    validation = (data.vad_tr, data.vad_te)
    rows: dict = {}
    for name, n_epochs in (("first", 1), ("compiled", epochs)):
        torch.manual_seed(0)
        model = Stopwatch([200, 600, data.n_items]).to("cuda" if on_gpu else "cpu")
        started = time.perf_counter()
        history = fit(model, data.train, validation, epochs=n_epochs, **options).history
        rows[f"seconds_{name}"] = round(time.perf_counter() - started, 2)
    ends = [*model.begun[1:], time.perf_counter()]
    reached = [n for n, row in enumerate(history) if row["ndcg@100"] >= target]
    test = evaluate(model, data.test_tr, data.test_te).to_dict()
    return {
        **rows, "n_train": data.train.n_users, "n_items": data.n_items, "epochs": epochs, "target": target,
        "epochs_to_target": reached[0] + 1 if reached else None,
        "seconds_to_target": round(ends[reached[0]] - started, 2) if reached else None,
        "best_validation_ndcg@100": max((row["ndcg@100"] for row in history), default=math.nan),
        "users_per_second": max(row["users_per_second"] for row in history),
        "test": test,
    }  # fmt: skip


STUDIES = {
    "scale": scale,
    "ml100k": ml100k,
    "ml10m": ml10m,
    "gowalla": gowalla,
    "seconds": seconds,
    "similar": lambda: similar(load),
    "toy": toy,
}
# that write their file as they go
LONG_STUDIES = {"defaults": defaults, "baselines": baselines}


def main(arguments: list[str]) -> None:
    """Run one study and write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("study", choices=[*STUDIES, *LONG_STUDIES])
    parser.add_argument("--into", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    if options.study in LONG_STUDIES:
        LONG_STUDIES[options.study](load, options.into or RESULTS / f"quality_{options.study}.json")
        return
    result = STUDIES[options.study]()
    if options.into:
        add(options.into, options.study, result)
    else:
        result = {"study": options.study, "machine": describe(), **result}
        write(RESULTS / f"quality_{options.study}.json", result)
    print(json.dumps(result, indent=2))
