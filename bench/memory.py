"""Peak memory of training steps by number of items, each provider and size in a process of its own.

python -m bench memory          writes bench/results/memory_cpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.machine import describe

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("fastvae", "fastvae-bf16", "embedding_bag", "dense")
ITEMS = (10_000, 20_000, 40_000, 80_000)
BATCH_SIZE, CLICKS_PER_USER, STEPS = 500, 60.0, 3


def peak_mib() -> float:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str, n_items: int) -> None:
    """Print the peak that STEPS training steps add to what the imports took; a process of its own calls this."""
    from bench.steps import PROVIDERS as WAYS
    from bench.steps import Shape, new_model

    batch = Shape(n_items, CLICKS_PER_USER, BATCH_SIZE).clicks(1)
    before = peak_mib()
    provider = WAYS[name](new_model(n_items))
    inputs = provider.to_batch(batch)
    for _ in range(STEPS):
        provider.step(inputs)
    print(json.dumps(peak_mib() - before))


def main(arguments: list[str]) -> None:
    """Measure every provider at every size, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument(
        "--measure", nargs=2, metavar=("PROVIDER", "ITEMS"), help="one case, in this process"
    )
    one = parser.parse_args(arguments).measure
    if one is not None:
        measure(one[0], int(one[1]))
        return
    rows: dict[str, dict[str, float]] = {}
    for name in PROVIDERS:
        rows[name] = {}
        for n_items in ITEMS:
            command = [sys.executable, "-m", "bench", "memory", "--measure", name, str(n_items)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[name][str(n_items)] = round(json.loads(done.stdout), 1)
            print(name, n_items, rows[name][str(n_items)], "MiB")
    result = {"machine": describe(), "batch_size": BATCH_SIZE, "peak_mib": rows}
    (RESULTS / "memory_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
