"""Quality on real data: NDCG@100 of fit() beside the dense reference model, and memory of an epoch.

    python -m bench quality ml100k | ml10m | gowalla | scale      all but scale need FASTVAE_DATA

Each writes bench/results/quality_<name>.json. FASTVAE_DATA is a folder with the click matrices as <name>.npz, each the CSR
arrays indptr, indices, shape: ml100k_ge4 (MovieLens-100K, ratings of 4 and 5, users with 5 items), ml10m_fastvae
(MovieLens-10M likewise, 60,655 x 8,641 with 2,105,971 clicks), gowalla (29,858 x 40,988 check-ins). None of them may be
redistributed, so none is part of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from bench.machine import describe
from bench.memory import peak_mib
from fastvae import Clicks, Dataset, MultiVAE, evaluate, fit, recommend, reference
from fastvae.synthetic import synthetic_clicks
from fastvae.train import beta_at, epoch_order

RESULTS = Path(__file__).parent / "results"


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


STUDIES = {"scale": scale, "ml100k": ml100k, "ml10m": ml10m, "gowalla": gowalla}


def main(arguments: list[str]) -> None:
    """Run one study and write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args(arguments).study
    result = {"study": study, "machine": describe(), **STUDIES[study]()}
    path = RESULTS / f"quality_{study}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
