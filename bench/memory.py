"""Peak memory of training steps by number of items, each provider and size in a process of its own.

python -m bench memory          writes bench/results/memory_cpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.machine import RESULTS, describe, write
from bench.steps import PROVIDERS as WAYS
from bench.steps import Shape, new_model

PROVIDERS = ("fastvae", "fastvae-bf16", "embedding_bag", "dense")
ITEMS = (10_000, 20_000, 40_000, 80_000)
BATCH_SIZE, CLICKS_PER_USER, STEPS = 500, 60.0, 3


def peak_mib() -> float:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str, shape: Shape) -> float:
    """What STEPS training steps add to this process's peak after the imports, weights and moments included; in MiB."""
    batch = shape.clicks(1)
    before = peak_mib()
    provider = WAYS[name](new_model(shape.n_items))
    inputs = provider.to_batch(batch)
    for _ in range(STEPS):
        provider.step(inputs)
    return peak_mib() - before


def measure_alone(name: str, shape: Shape) -> float:
    """measure() in a process of its own."""
    command = [sys.executable, "-m", "bench", "memory", "--measure", name]
    command += [str(n) for n in (shape.n_items, shape.clicks_per_user, shape.batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(json.loads(done.stdout.splitlines()[-1]), 1)


def main(arguments: list[str]) -> None:
    """Measure every provider at every size, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument(
        "--measure",
        nargs=4,
        metavar=("PROVIDER", "ITEMS", "CLICKS_PER_USER", "BATCH_SIZE"),
        help="one case, in this process",
    )
    one = parser.parse_args(arguments).measure
    if one is not None:
        name, n_items, clicks_per_user, batch_size = one
        print(measure(name, Shape(int(n_items), float(clicks_per_user), int(batch_size))))
        return
    rows: dict[str, dict[str, float]] = {}
    for name in PROVIDERS:
        rows[name] = {}
        for n_items in ITEMS:
            shape = Shape(n_items, CLICKS_PER_USER, BATCH_SIZE)
            rows[name][str(n_items)] = measure_alone(name, shape)
            print(name, n_items, rows[name][str(n_items)], "MiB")
    result = {"machine": describe(), "batch_size": BATCH_SIZE, "peak_mib": rows}
    write(RESULTS / "memory_cpu.json", result)
