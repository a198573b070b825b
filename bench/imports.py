"""What `import fastvae` costs beside `import torch`, each in a process of its own, one after the other in every round.

python -m bench imports         writes bench/results/imports_cpu.json
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from statistics import median

from bench.machine import RESULTS, describe, write

# each imports what the one before it does, and more
PROGRAMS = {
    "python": "pass",
    "torch": "import torch",
    "torch and scipy.sparse": "import torch, scipy.sparse",
    "fastvae": "import fastvae",
}
ROUNDS = 21


def milliseconds(program: str) -> tuple[float, float]:
    """Wall and CPU time of a child process that runs this and ends."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * wall, 1000 * cpu


def measure(rounds: int) -> list[dict[str, tuple[float, float]]]:
    """Times of each program by round; the round before the first, which reads the files from the disk, is not counted."""
    return [
        {name: milliseconds(program) for name, program in PROGRAMS.items()}
        for _ in range(rounds + 1)
    ][1:]


def summarize(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and what each program takes beyond the one before it: the median of the differences within a round."""
    rows, names = {}, list(PROGRAMS)
    for before, name in zip([None, *names], names, strict=False):
        wall, cpu = zip(*(times[name] for times in rounds), strict=True)
        more = [times[name][1] - (times[before][1] if before else 0.0) for times in rounds]
        found = {"ms": median(wall), "cpu_ms": median(cpu), "more_cpu_ms": median(more)}
        rows[name] = {key: round(value, 1) for key, value in found.items()}
    return rows


def main(arguments: list[str]) -> None:
    """Take turns, and write the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--note", default="", help="what else the machine was doing, for the file")
    options = parser.parse_args(arguments)
    rows = summarize(measure(options.rounds))
    for name, row in rows.items():
        print(
            f"{name:24}{row['ms']:8.0f} ms, {row['more_cpu_ms']:.0f} ms of a core more than the one before"
        )
    result = {
        "machine": describe(),
        "rounds": options.rounds,
        "note": options.note,
        "imports": rows,
    }
    write(RESULTS / "imports_cpu.json", result)
