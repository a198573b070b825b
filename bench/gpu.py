"""Everything that only a GPU can answer, in one call of five minutes.

    python -m bench gpu --out DIR [--parts a,c] [--seconds 290] [--rehearse]

    a  tests      the GPU and kernel tests, in as many processes as there are cores
    b  profile    microseconds by kernel at ML-20M's shape, batch 500 and 24,576
    c  ratio      step times beside the strongest rivals, each shape in a process of its own
    d  quality    seconds to the NDCG of ml10m, where FASTVAE_DATA is
    e  tiles      the search for launch configurations

Each command is a process with a time limit of its own, so that one that fails or hangs leaves the others' results.
What is measured lies in DIR as soon as it is, in a file for each part named by the card, beside the log of all
output. A second call with the same DIR adds to it. --rehearse runs all of it on a CPU at toy size, where a graph or a
compiled loss is eager and a kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from bench.machine import add, card

ROOT = Path(__file__).parent.parent
# ours first: where a rival does not fit the memory beside it, it is the rival that is left out
PROVIDERS = (
    "fastvae-graph-bf16",
    "dense-padded-compiled-graph",
    "dense-padded-graph",
    "fastvae-bf16",
    "dense-bf16",
)
LARGEST = PROVIDERS[:2]  # of a million items: 19 GB and more each
SHAPES = ("ml20m", "ml20m-24576", "50k-4096", "1m-1024", "ml20m-4096", "50k")
ONE_CORE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
SHORTEST = 10  # seconds: less is gone before a command has imported torch
PARTS = ("a", "b", "c", "d", "e")


class Command(NamedTuple):
    """A command of a part: seconds that it may take, arguments of python -m, and what it needs in the environment."""

    part: str
    seconds: float
    arguments: list[str]
    environment: Mapping[str, str] = {}


def commands(file: str) -> list[Command]:
    """What a GPU is asked; file is the start of the result files' names."""
    processes = ["-n", str(os.cpu_count())] if importlib.util.find_spec("xdist") else []
    ratio = ["bench", "ratio", "--into", f"{file}_ratio.json", "--shape"]
    tune = ["bench", "tune", "--into", f"{file}_tiles.json", "--users", "500", "24576"]
    return [
        Command("a", 100, [*pytest(file), *processes, *test_files()], ONE_CORE),
        Command("b", 60, ["bench", "profile", "--into", f"{file}_profile.json", "--shape", "ml20m", "ml20m-24576"]),
        *(
            Command("c", 90, [*ratio, shape, "--provider", *(LARGEST if shape == "1m-1024" else PROVIDERS)])
            for shape in SHAPES
        ),
        Command("d", 60, ["bench", "quality", "seconds", "--into", f"{file}_quality.json"]),
        Command("e", 90, [*tune, "--limit", "12", "--rounds", "7"]),
    ]  # fmt: skip


def rehearsal(file: str) -> list[Command]:
    """The same on a CPU at toy size, a few of the tests among them."""
    tests = [
        "tests/test_gpu.py",
        "tests/test_multinomial_nll_kernel.py",
        "-k",
        "opcheck or (binary and float32 and one-click)",
    ]
    profile = ["bench", "profile", "--by", "kernel", "--steps", "2"]
    ratio, steps = ["bench", "ratio", "--rounds", "2"], ["--shape", "toy", "--into"]
    toy = "--users 3 --items 20 --clicks 5 --hidden 8 --rounds 1 --limit 1 --processes 1".split()
    return [
        Command("a", 60, [*pytest(file), *tests], REHEARSAL),
        Command("b", 60, [*profile, *steps, f"{file}_profile.json"], REHEARSAL),
        Command("c", 60, [*ratio, *steps, f"{file}_ratio.json", "--provider", *PROVIDERS], REHEARSAL),
        Command("d", 60, ["bench", "quality", "toy", "--into", f"{file}_quality.json"], REHEARSAL),
        Command("e", 90, ["bench", "tune", "--into", f"{file}_tiles.json", *toy], REHEARSAL),
    ]  # fmt: skip


def pytest(file: str) -> list[str]:
    """pytest with the results kept as they come."""
    plugins = ["-p", "no:cacheprovider", "-p", "bench.pytest_results"]
    return ["pytest", "-q", *plugins, "--results", f"{file}_tests.json"]


def test_files() -> list[str]:
    """The tests that need a GPU, or take the one that there is."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        f"tests/{file.name}"
        for file in files
        if re.search(r"\bDEVICE\b|mark\.gpu", file.read_text())
    ]


def run(command: Command, seconds: float, log: Path) -> tuple[int | None, list[str]]:
    """Exit code, None where the time ran out, and the last lines of a command; all it printed goes to the log."""
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, **command.environment}
    with log.open("a") as output:
        print("$", *command.arguments, file=output, flush=True)
        begin = output.tell()
        # a session of its own, so that the processes that it has started end with it
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command.arguments],
            cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            code = None
    with log.open("rb") as whole:
        whole.seek(begin)
        return code, whole.read().decode(errors="replace").splitlines()[-12:]


def main(arguments: list[str]) -> None:
    """Run the commands of the parts asked for, while there is time."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="such as a,c; default all")
    parser.add_argument("--seconds", type=float, default=290, help="in all")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU at toy size")
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if not set(wanted) <= set(PARTS):
        parser.error(f"--parts must be some of {','.join(PARTS)}, got {options.parts}")
    if not (options.rehearse or torch.cuda.is_available()):
        raise SystemExit("gpu: a GPU is needed, and torch finds none; --rehearse does without")
    options.out.mkdir(parents=True, exist_ok=True)
    file = str(options.out.resolve() / ("rehearsal" if options.rehearse else card()))
    deadline, failed = time.monotonic() + options.seconds, []
    for command in (rehearsal if options.rehearse else commands)(file):
        if command.part not in wanted:
            continue
        started, text = time.monotonic(), " ".join(command.arguments)
        left = deadline - started
        code, tail = None, ["not begun: no time left"]
        if left > SHORTEST:
            code, tail = run(command, min(command.seconds, left), Path(f"{file}_log.txt"))
        took = round(time.monotonic() - started, 1)
        add(
            Path(f"{file}_commands.json"),
            text,
            {"part": command.part, "code": code, "seconds": took},
        )
        print(f"{command.part}: code {code}, {took} s: {text}", *tail, sep="\n  ", flush=True)
        failed += [command.part] if code else []
        failed += [f"{command.part} (no time)"] if code is None else []
    if failed:
        raise SystemExit(f"gpu: failed: {', '.join(failed)}")
