"""Everything that only a GPU can answer, in one go: tests, step times at every shape, tile search.

    python -m bench gpu [--seconds 480]      writes bench/results/<card>.json

Each part is a process of its own, so that one that fails or runs out of time leaves the others' results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.machine import describe
from bench.steps import PROVIDERS, SHAPES

RESULTS = Path(__file__).parent / "results"


def run_part(command: list[str], seconds: float) -> dict:
    """Exit code, seconds and the last lines of a command; code None where the time ran out."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-u", "-m", *command],  # -u: what was printed outlives a timeout
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        code, text = None, (expired.stdout or b"").decode(errors="replace")
    return {
        "command": " ".join(command),
        "code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "tail": text.splitlines()[-40:],
    }


def parts(card: str) -> list[tuple[float, list[str]]]:
    """Seconds at most and the command of each part, the most wanted first."""
    kernel_tests = [
        f"tests/test_{op}_kernel.py"
        for op in ("sparse_linear", "multinomial_nll", "linear_multinomial_nll")
    ]
    tests = ["pytest", "-q", "--maxfail=20", "tests/test_gpu.py", *kernel_tests]

    def ratio(shape: str, providers: Iterable[str]) -> tuple[float, list[str]]:
        command = ["bench", "ratio", "--shape", shape, "--name", card, "--provider", *providers]
        return 90, command

    eager = [name for name in PROVIDERS if "compiled" not in name]  # compilation takes a minute
    first = {
        "ml20m": PROVIDERS,
        "ml20m-24576": eager,
        "1m-1024": ("fastvae-bf16", "fastvae-graph-bf16"),  # 19 GB each
    }
    return [
        (150, tests),
        *(ratio(shape, providers) for shape, providers in first.items()),
        (120, ["bench", "tune", "--users", "500"]),
        *(ratio(shape, eager) for shape in SHAPES if shape not in first),
    ]


def main(arguments: list[str]) -> None:
    """Run the parts within the time given, and write after each what is there so far."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480)
    deadline = time.perf_counter() + parser.parse_args(arguments).seconds
    if not torch.cuda.is_available():
        raise SystemExit("gpu: a GPU is needed, and torch finds none")
    card = torch.cuda.get_device_name().replace(" ", "-").lower()
    result: dict = {"machine": describe(), "parts": []}
    for limit, command in parts(card):
        result["parts"].append(run_part(command, min(limit, deadline - time.perf_counter())))
        last = result["parts"][-1]
        print(
            f"{last['command']}: code {last['code']}, {last['seconds']} s",
            *last["tail"][-8:],
            sep="\n  ",
        )
        (RESULTS / f"{card}.json").write_text(json.dumps(result, indent=2) + "\n")
