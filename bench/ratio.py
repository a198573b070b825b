"""Training steps of several providers, timed interleaved in one process after a check against the reference.

python -m bench ratio [--shape ml20m] [--provider NAME ...] [--rounds 15]

It writes bench/results/<machine>_<shape>.json.

A GPU does ten steps in a turn before it is waited for, as in training, where the host runs ahead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from bench.machine import RESULTS, add, card, describe, write
from bench.memory import measure_alone
from bench.provider import NotTimed
from bench.steps import FLOORS, PROVIDERS, SHAPES, Shape, check_gradient, check_step, new_model
from fastvae import Clicks

N_BATCHES = 4  # inputs rotate, up to a batch of 4,096
STEPS_PER_TURN = {"cpu": 1, "cuda": 10}


def measure(shape_name: str, names: list[str], rounds: int, device: str) -> dict:
    """Medians and 20/80% quantiles of milliseconds per step, providers taking turns; and the peak memory of each.

    peak_mib counts weights, gradients, moments and steps: on a GPU what torch allocates (its inputs with it), on a
    CPU what a process of its own needs beyond its imports (with torch.compile's own memory).
    """
    shape = SHAPES[shape_name]
    few = shape.batch_size > 4096 or shape.n_items > 100_000  # dense batches take gigabytes
    clicks = shape.clicks(1 if few else N_BATCHES).to(device)
    batches = [clicks.rows(ids) for ids in torch.arange(clicks.n_users).split(shape.batch_size)]
    cases, rows, not_timed = {}, {}, {}
    for name in names:
        try:
            cases[name], rows[name] = _prepare(name, shape, batches, device)
        except (NotTimed, RuntimeError) as error:  # memory that is too small is a RuntimeError too
            not_timed[name] = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{name}: not timed, {not_timed[name]}", flush=True)
    kinds = {"products-bf16" if provider.bf16 else "products" for provider, _ in cases.values()}
    for name in sorted(kinds):
        floor = FLOORS[name](new_model(shape.n_items, device))
        cases[name], rows[name] = (floor, [floor.to_batch(batches[0])]), {}
    times = take_turns(cases, rounds, device)
    for name, row in rows.items():
        low, median, high = np.quantile(times[name], (0.2, 0.5, 0.8)).tolist()
        row |= {"ms": round(median, 3), "ms_20": round(low, 3), "ms_80": round(high, 3)}
    for name in rows.keys() - kinds:
        floor = rows["products-bf16" if cases[name][0].bf16 else "products"]
        rows[name]["share_of_floor"] = round(floor["ms"] / rows[name]["ms"], 3)
    return {
        "shape": shape_name,
        "clicks_per_user": round(clicks.nnz / clicks.n_users, 1),
        "n_items": shape.n_items,
        "batch_size": shape.batch_size,
        "rounds": rounds,
        "providers": rows,
        "not_timed": not_timed,
    }


def _prepare(name: str, shape: Shape, batches: list[Clicks], device: str) -> tuple[tuple, dict]:
    """A provider that was checked and warmed up, with its inputs; its error and peak memory."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    provider = PROVIDERS[name](new_model(shape.n_items, device))
    row = {"gradient_error": check_gradient(name, provider, batches[0])}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a captured step allocates while it is captured only
    check_step(name, provider, batches[0])
    inputs = [provider.to_batch(batch) for batch in batches]
    for batch in inputs[:2]:
        provider.step(batch)  # warm-up: compilation, buffers, moments
    if device == "cuda":
        row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    elif shape != SHAPES["toy"]:
        row["peak_mib"] = measure_alone(name, shape)
    return (provider, inputs), row


def take_turns(cases: dict[str, tuple], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of a step in each turn: a turn of every case, and again, the inputs rotating."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    n_steps = STEPS_PER_TURN[device]
    for turn in range(-1, rounds):
        for name, (provider, inputs) in cases.items():
            started = time.perf_counter()
            for n in range(n_steps):
                provider.step(inputs[(turn + n) % len(inputs)])
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:  # the round before the first only warms up
                times[name].append(1e3 * (time.perf_counter() - started) / n_steps)
    return times


def main(arguments: list[str]) -> None:
    """Measure, print ratios to the dense model, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench ratio", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="ml20m")
    parser.add_argument("--provider", choices=PROVIDERS, nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="of the result file; default cpu or the card's name")
    parser.add_argument("--into", type=Path, help="a file of several shapes, in place of one each")
    options = parser.parse_args(arguments)
    # on a CPU graphs are eager steps
    default = [name for name in PROVIDERS if options.device == "cuda" or "graph" not in name]
    result = measure(options.shape, options.provider or default, options.rounds, options.device)
    rows = result["providers"]
    for name, row in rows.items():
        ratio = f"{rows['dense']['ms'] / row['ms']:6.2f} x dense" if "dense" in rows else ""
        print(f"{name:28}{row['ms']:9.2f} ms  ({row['ms_20']:.2f} .. {row['ms_80']:.2f})  {ratio}")
    if options.into:
        add(options.into, options.shape, result)
    else:
        name = options.name or (card() if options.device == "cuda" else "cpu")
        write(RESULTS / f"{name}_{options.shape}.json", {"machine": describe(), **result})
