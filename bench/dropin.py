"""Epochs of public training loops with their model's class swapped for ours, and with each further line changed.

python -m bench dropin [--threads N] [--repeats N] [--users N]     writes bench/results/dropin_cpu.json

Both loops densify each batch from scipy, as in vae-cf-pytorch (Adam) and RecoTour (AdamW, dropouts of its own). Every
variant trains an epoch on the same made-up clicks before the first is timed; then they take turns, each in an order
of its own, and the table holds medians and the median of the ratios within a turn: a machine that is shared slows them
alike.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import other_nets
from bench.machine import RESULTS, describe, write
from fastvae import Adam, Clicks, MultiVAE, fit, vae_loss_fn
from fastvae.synthetic import synthetic_clicks

N_ITEMS, WIDTH, LATENT, BATCH, ANNEAL = 7_055, 600, 200, 500, 0.1
CLICKS_PER_USER = 72  # as MovieLens-10M has


def their_loss(x: Tensor, logits: Tensor, mu: Tensor, logvar: Tensor, anneal: float) -> Tensor:
    """The loss that both loops have: log-softmax times x, and the KL term."""
    nll = -torch.mean(torch.sum(F.log_softmax(logits, 1) * x, -1))
    return nll - anneal * 0.5 * torch.mean(torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1))


def their_model(kind: str) -> torch.nn.Module:
    """The class of the code base, rebuilt."""
    net = other_nets.VaeCf if kind == "vae-cf-pytorch" else other_nets.RecoTour
    return net([N_ITEMS, WIDTH, LATENT])


def our_model(kind: str) -> MultiVAE:
    """What takes its place."""
    return MultiVAE([LATENT, WIDTH, N_ITEMS], tanh_after_dropout=kind == "RecoTour")


def batches(n_users: int) -> list[np.ndarray]:
    """Users in an epoch's order."""
    ids = np.random.default_rng(0).permutation(n_users)
    return [ids[start : start + BATCH] for start in range(0, n_users, BATCH)]


def their_loop(kind: str, model, loss_fn) -> Callable[[sp.csr_matrix, Clicks], None]:
    """The loop as it is: dense rows from scipy, their optimiser."""
    make = torch.optim.Adam if kind == "vae-cf-pytorch" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.0)

    def epoch(csr: sp.csr_matrix, clicks: Clicks) -> None:
        model.train()
        for ids in batches(csr.shape[0]):
            x = torch.FloatTensor(csr[ids].toarray())
            optimizer.zero_grad()
            logits, mu, logvar = model(x)
            loss = loss_fn(x, logits, mu, logvar, ANNEAL)
            loss.backward()
            loss.item()
            optimizer.step()

    return epoch


def clicks_loop(model, step: Callable[[Clicks], Tensor], optimizer) -> Callable:
    """Clicks in place of dense rows."""

    def epoch(csr: sp.csr_matrix, clicks: Clicks) -> None:
        model.train()
        for ids in batches(csr.shape[0]):
            optimizer.zero_grad()
            loss = step(clicks.rows(ids))
            loss.backward()
            loss.item()
            optimizer.step()

    return epoch


def with_forward(kind: str) -> Callable:
    model = our_model(kind)
    return clicks_loop(
        model, lambda x: vae_loss_fn(x, *model(x), ANNEAL), Adam(model.parameters(), lr=1e-3)
    )


def with_loss(kind: str, bf16: bool = False) -> Callable:
    model = our_model(kind)

    def step(x: Clicks) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.loss(x, ANNEAL)

    return clicks_loop(model, step, Adam(model.parameters(), lr=1e-3))


def with_fit(kind: str, precision: str) -> Callable:
    model = our_model(kind)

    def epoch(csr: sp.csr_matrix, clicks: Clicks) -> None:
        fit(model, clicks, epochs=1, batch_size=BATCH, anneal_cap=ANNEAL, total_anneal_steps=0, precision=precision)  # fmt: skip

    return epoch


VARIANTS: dict[str, Callable[[str], Callable]] = {
    "their code": lambda kind: their_loop(kind, their_model(kind), their_loss),
    "class swapped": lambda kind: their_loop(kind, our_model(kind), their_loss),
    "class and vae_loss_fn": lambda kind: their_loop(kind, our_model(kind), vae_loss_fn),
    "Clicks into forward": with_forward,
    "model.loss": with_loss,
    "model.loss, bf16": lambda kind: with_loss(kind, bf16=True),
    "fit": lambda kind: with_fit(kind, "fp32"),
    "fit, bf16": lambda kind: with_fit(kind, "bf16"),
}


def measure(kind: str, n_users: int, repeats: int) -> dict[str, dict]:
    """Seconds of each variant's epochs, and how many times faster than their code it is."""
    clicks = synthetic_clicks(n_users, N_ITEMS, CLICKS_PER_USER * n_users)
    csr = sp.csr_matrix(clicks.to_scipy())
    torch.manual_seed(0)
    epochs = {name: make(kind) for name, make in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    order = list(epochs)
    for turn in range(repeats + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            start = time.perf_counter()
            epochs[name](csr, clicks)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
        print(f"{kind}: turn {turn} of {repeats}", flush=True)
    theirs = seconds["their code"]
    return {
        name: {
            "s_per_epoch": round(median(own), 3),
            "fastest_s": round(min(own), 3),
            "times_faster": round(median(a / b for a, b in zip(theirs, own, strict=True)), 2),
            "times_faster_fastest": round(min(theirs) / min(own), 2),
        }
        for name, own in seconds.items()
    }


def main(arguments: list[str]) -> None:
    """Measure both loops, print a table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench dropin", description=__doc__)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--repeats", type=int, default=5, help="timed epochs of each variant")
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--name", default="dropin_cpu", help="of the result file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    load = round(os.getloadavg()[0], 2)
    kinds = ("vae-cf-pytorch", "RecoTour")
    rows = {kind: measure(kind, options.users, options.repeats) for kind in kinds}
    clicks = synthetic_clicks(options.users, N_ITEMS, CLICKS_PER_USER * options.users)
    write(
        RESULTS / f"{options.name}.json",
        {
            "machine": describe(),
            "load": {"before": load, "after": round(os.getloadavg()[0], 2),
                     "note": "load average; above the threads' number the machine was shared"},
            "data": {"name": "made-up clicks", "n_users": options.users, "n_items": N_ITEMS, "nnz": clicks.nnz},
            "settings": {"batch_size": BATCH, "widths": [N_ITEMS, WIDTH, LATENT], "threads": torch.get_num_threads(),
                         "repeats": options.repeats, "order": "in turns, shuffled"},
            "loops": rows,
        },
    )  # fmt: skip
    for kind, variants in rows.items():
        print(kind)
        for name, row in variants.items():
            print(f"  {name:24}{row['s_per_epoch']:8.2f} s {row['times_faster']:6.2f} x")
