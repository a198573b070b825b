"""Training steps of several providers, timed interleaved in one process after a check against the reference.

python -m bench ratio [--shape ml20m] [--provider NAME ...] [--rounds 15]     writes bench/results/<machine>_<shape>.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from bench.machine import describe
from bench.memory import measure_alone
from bench.steps import FLOORS, ON_GPU_ONLY, PROVIDERS, SHAPES, Shape, check, new_model
from fastvae import Clicks

RESULTS = Path(__file__).parent / "results"
N_BATCHES = 4  # inputs rotate, up to a batch of 4,096
DENSE_LIMIT = 500_000  # items


def measure(shape_name: str, names: list[str], rounds: int, device: str) -> dict:
    """Medians and 20/80% quantiles of milliseconds per step, providers taking turns; and the peak memory of each.

    peak_mib counts weights, gradients, moments and steps: on a GPU what torch allocates (its inputs with it), on a
    CPU what a process of its own needs beyond its imports (with torch.compile's own memory).
    """
    shape = SHAPES[shape_name]
    if device == "cpu":
        names = [name for name in names if name not in ON_GPU_ONLY]
    if shape.n_items >= DENSE_LIMIT:  # two dense batches and their log-probabilities would not fit
        names = [name for name in names if name.startswith("fastvae")]
    clicks = shape.clicks(N_BATCHES if shape.batch_size <= 4096 else 1).to(device)
    batches = [clicks.rows(ids) for ids in torch.arange(clicks.n_users).split(shape.batch_size)]
    cases, rows = {}, {}
    for name in names:
        try:
            cases[name], rows[name] = _prepare(name, shape, batches, device)
        except torch.OutOfMemoryError:
            print(f"{name}: left out, it does not fit the GPU's memory")
    for name, make in FLOORS.items():
        floor = make(new_model(shape.n_items).to(device))
        cases[name], rows[name] = (floor, [floor.to_batch(batches[0])]), {}
    times = take_turns(cases, rounds, device)
    for name, row in rows.items():
        low, median, high = np.quantile(times[name], (0.2, 0.5, 0.8)).tolist()
        row |= {"ms": round(median, 2), "ms_20": round(low, 2), "ms_80": round(high, 2)}
    for name in rows.keys() - FLOORS.keys():
        floor = rows["products-bf16" if cases[name][0].bf16 else "products"]
        rows[name]["share_of_floor"] = round(floor["ms"] / rows[name]["ms"], 3)
    return {
        "shape": shape_name,
        "clicks_per_user": round(clicks.nnz / clicks.n_users, 1),
        "n_items": shape.n_items,
        "batch_size": shape.batch_size,
        "rounds": rounds,
        "providers": rows,
    }


def _prepare(name: str, shape: Shape, batches: list[Clicks], device: str) -> tuple[tuple, dict]:
    """A provider that was checked and warmed up, with its inputs; its error and peak memory."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    provider = PROVIDERS[name](new_model(shape.n_items).to(device))
    row = {"gradient_error": check(name, provider, batches[0])}
    inputs = [provider.to_batch(batch) for batch in batches]
    for batch in inputs[:2]:
        provider.step(batch)  # warm-up: compilation, buffers, moments
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        provider.step(inputs[-1])
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    else:
        row["peak_mib"] = measure_alone(name, shape)
    return (provider, inputs), row


def take_turns(cases: dict[str, tuple], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each step: one of every case, and again, the inputs rotating."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1, rounds):
        for name, (provider, inputs) in cases.items():
            started = time.perf_counter()
            provider.step(inputs[turn % len(inputs)])
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:  # the round before the first only warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


def main(arguments: list[str]) -> None:
    """Measure, print ratios to the dense model, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench ratio", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="ml20m")
    parser.add_argument("--provider", choices=PROVIDERS, nargs="*", default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--name", default=None, help="of the result file; default cpu or the card's name"
    )
    options = parser.parse_args(arguments)
    result = {
        "machine": describe(),
        **measure(options.shape, options.provider, options.rounds, options.device),
    }
    rows = result["providers"]
    for name, row in rows.items():
        ratio = f"{rows['dense']['ms'] / row['ms']:6.2f} x dense" if "dense" in rows else ""
        print(f"{name:22}{row['ms']:9.1f} ms  ({row['ms_20']:.1f} .. {row['ms_80']:.1f})  {ratio}")
    gpu = result["machine"].get("gpu", "").replace(" ", "-").lower()
    card = options.name or (gpu if options.device == "cuda" else "cpu")
    (RESULTS / f"{card}_{options.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
