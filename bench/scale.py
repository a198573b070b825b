"""fit() by 1, 2 and 4 gloo processes of one thread each: step time, bytes sent, peak memory, by users and by items.

python -m bench scale             writes bench/results/scale_cpu.json, row by row, each with its commit; rows that are there stay
python -m bench scale --rehearse  two processes at toy size, printed

A case is a fit() of STEPS batches in fresh processes of its own. Memory is what each adds to itself after its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import one_process
from bench.machine import RESULTS, describe, write
from bench.memory import peak_mib
from bench.traffic import Model
from fastvae import Clicks, MultiVAE, fit
from fastvae.synthetic import synthetic_clicks
from fastvae.trainer import Trainer

STEPS, CLICKS_PER_USER, BATCH_SIZE = 5, 60, 256
HIDDEN = 64  # four whole models of a million items must fit this machine
ITEMS = (20_000, 200_000, 1_000_000)
AGREED = 8  # bytes of fit's word on interrupts, in each step on a CPU
SECONDS = 1800  # for a case
NOTE = (
    "A machine of two cores that others used meanwhile. Step times of four processes on its two cores are no speed-up, "
    "and those of two only where both cores were free: take bytes and memory from here, no speeds."
)
COUNTED = (
    "peak_mib: the largest resident memory (VmHWM, reset before) of a process less that after its imports "
    "(torch, torch.distributed, fastvae), in MiB, the largest of the processes: clicks, process group, the whole "
    "model that each process makes and cuts, weights, gradients, moments, buffers, and the model made whole again at "
    "the end. No validation, no run folder. start: before the first step; steps; end: after the last. "
    "sent: bytes of the tensors given to all_reduce in the last step, of DistributedDataParallel by its hook; "
    "formula: bench/traffic.py and 8 bytes of fit's word on interrupts. ms: median wall time of the steps after the "
    "first, cpu_ms: processor time of one process in them."
)


@dataclass(frozen=True)
class Case:
    """One fit: processes 1 without a group, as every user of one process has it."""

    cut: str | None
    processes: int
    n_items: int
    hidden: int = HIDDEN
    batch_size: int = BATCH_SIZE

    def name(self) -> str:
        """The row's name."""
        cut = self.cut or "one"
        return f"{cut}/{self.processes}/{self.n_items}/{self.hidden}"

    def model(self) -> Model:
        """Its sizes, for the formulas."""
        return Model(self.n_items, self.batch_size, self.hidden, self.hidden // 2)


def cases() -> list[Case]:
    """All of them, the target first: a million items, 128 hidden units, four processes by items."""
    target = [Case(None, 1, 1_000_000, 128), Case("items", 4, 1_000_000, 128)]
    several = [("users", 2), ("users", 4), ("items", 2), ("items", 4)]
    sweep = [Case(*way, n_items) for n_items in ITEMS for way in ((None, 1), *several)]
    return target + sweep


class Watch:
    """What a process sees of its own fit: times, bytes and memory of each step."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()  # bytes by step
        self.ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.peaks: dict[str, float] = {}
        self.base = self._reset()

    @staticmethod
    def _reset() -> float:
        Path("/proc/self/clear_refs").write_text("5")
        return peak_mib()

    def note(self, phase: str) -> None:
        """A phase ends here, or goes on: its peak so far."""
        self.peaks[phase] = round(max(peak_mib() - self.base, self.peaks.get(phase, 0)), 1)
        self._reset()

    def step(self, step: Callable[..., None]) -> Callable[..., None]:
        """Trainer._step, watched."""

        def watched(trainer: Trainer, ids: torch.Tensor) -> None:
            self.note("steps" if self.ms else "start")
            wall, cpu = time.perf_counter(), time.process_time()
            step(trainer, ids)
            self.ms.append((time.perf_counter() - wall) * 1e3)
            self.cpu_ms.append((time.process_time() - cpu) * 1e3)
            self.note("steps")

        return watched

    def all_reduce(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        """dist.all_reduce, counted."""

        def counted(t: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.sent[len(self.ms)] += t.nbytes
            return reduce(t, *args, **options)

        return counted

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """For the block, see the steps of fit and what they send."""
        import torch.distributed as dist

        before = Trainer._step, dist.all_reduce, nn.parallel.DistributedDataParallel
        Trainer._step = self.step(before[0])  # type: ignore[method-assign]
        dist.all_reduce = self.all_reduce(before[1])
        nn.parallel.DistributedDataParallel = hooked(before[2])  # type: ignore[misc]
        try:
            yield
        finally:
            Trainer._step, dist.all_reduce, nn.parallel.DistributedDataParallel = before

    def result(self) -> dict[str, Any]:
        """Of the whole fit; the first step, which touches memory for the first time, is not timed."""
        return {
            "peak_mib": self.peaks,
            "sent": self.sent[len(self.ms) - 1],
            "ms": round(statistics.median(self.ms[1:]), 1),
            "cpu_ms": round(statistics.median(self.cpu_ms[1:]), 1),
        }


def hooked(wrapper: Any) -> Any:
    """DistributedDataParallel with its own all_reduce, which no function of Python's is called for, as a hook by one."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    class Hooked(wrapper):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.register_comm_hook(options["process_group"], allreduce_hook)

    return Hooked


def measure(cases: list[Case], clicks_file: str) -> list[dict[str, Any]]:
    """The cases in this process, which its parent has told who it is; memory is that of the first."""
    import torch.distributed as dist

    from fastvae import parallel_trainer  # noqa: F401  an import, before memory counts

    # before there is a group, which it would keep for ever: its threads may abort a process that ends
    importlib.import_module("torch.distributed.nn.functional")

    watches: list[Watch] = []
    if cases[0].processes > 1:
        dist.init_process_group("gloo")
    for case in cases:
        watch = Watch()
        with watch.watching():
            _train(case, clicks_file)
        watch.note("end")
        watches.append(watch)
    if cases[0].processes > 1:
        dist.destroy_process_group()
    return [watch.result() for watch in watches]


def _train(case: Case, clicks_file: str) -> None:
    with np.load(clicks_file) as arrays:
        clicks = Clicks(arrays["indptr"], arrays["indices"], None, case.n_items)
    torch.manual_seed(0)
    model = MultiVAE([case.hidden // 2, case.hidden, case.n_items])
    options: dict[str, Any] = {"batch_size": case.batch_size, "total_anneal_steps": 0}
    fit(model, clicks, epochs=1, parallel=case.cut, **options)


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """The rows of cases of one size, from processes of their own."""
    first = cases[0]
    with tempfile.TemporaryDirectory() as folder:
        n_users = STEPS * first.batch_size
        clicks = synthetic_clicks(
            n_users, first.n_items, n_users * min(CLICKS_PER_USER, first.n_items // 8)
        )
        file = Path(folder) / "clicks.npz"
        np.savez(file, indptr=clicks.indptr.numpy(), indices=clicks.indices.numpy())
        by_process = _in_processes(cases, str(file))
    return [_row(*both) for both in zip(cases, zip(*by_process, strict=True), strict=True)]


def _row(case: Case, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    phases = found[0]["peak_mib"]
    peaks = {phase: max(one["peak_mib"][phase] for one in found) for phase in phases}
    row = {
        **asdict(case),
        "peak_mib": max(peaks.values()),
        "peak_mib_by_phase": peaks,
        "ms": found[0]["ms"],
        "cpu_ms": found[0]["cpu_ms"],
    }
    if case.cut is not None:
        row |= {"sent": found[0]["sent"], "formula": case.model().sent(case.cut) + AGREED}
    return row


def _in_processes(cases: list[Case], file: str) -> list[list[dict[str, Any]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size, described = cases[0].processes, json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", "bench", "scale", "--measure", described, file]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise SystemExit(f"scale: {cases[0].name()} failed")
    return [json.loads(text.splitlines()[-1]) for text in texts]


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each case's peak against one process', and bytes that an item adds to the peak beside 1 / P of those of one."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        one = rows.get(Case(None, 1, row["n_items"], row["hidden"]).name())
        if row["cut"] is None or one is None:
            continue
        found[name] = {"peak_of_one": round(row["peak_mib"] / one["peak_mib"], 3)}
        per_item, of_one = _per_item(row, rows), _per_item(one, rows)
        if per_item and of_one:
            found[name] |= {
                "bytes_per_item": round(per_item),
                "bytes_per_item_of_one": round(per_item / of_one, 3),
                "one_over_processes": 1 / row["processes"],
            }
    return found


def _per_item(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> float | None:
    """Bytes of the peak for each item more than in the smallest case of the same kind."""
    same = [
        other
        for other in rows.values()
        if all(other[key] == row[key] for key in ("cut", "processes", "hidden"))
    ]
    small = min(same, key=lambda other: other["n_items"])
    more = row["n_items"] - small["n_items"]
    return (row["peak_mib"] - small["peak_mib"]) * 2**20 / more if more else None


def rehearse() -> dict[str, Any]:
    """Both cuts by the same two processes at toy size."""
    toys = [Case(cut, 2, 300, 8, 24) for cut in ("users", "items")]
    return {row["cut"]: row for row in run(toys)}


def main(arguments: list[str]) -> None:
    """Run all cases, or the one that the parent asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("CASES", "CLICKS"), help="in this process")
    parser.add_argument("--rehearse", action="store_true", help="two processes at toy size")
    options = parser.parse_args(arguments)
    if options.measure:
        torch.set_num_threads(1)
        described, clicks_file = options.measure
        print(json.dumps(measure([Case(**case) for case in json.loads(described)], clicks_file)))
        return
    if options.rehearse:
        print(json.dumps(rehearse()))
        return
    path = RESULTS / "scale_cpu.json"
    result = _begun(path)
    rows = result["rows"]
    for case in cases():
        if case.name() not in rows:
            rows[case.name()] = run([case])[0] | {"commit": describe()["commit"]}
            print(case.name(), rows[case.name()])
        result["compared"] = compared(rows)
        write(path, result)
    if "one_process" not in result:
        result["one_process"] = one_process.measure() | {"commit": describe()["commit"]}
        write(path, result)


def _begun(path: Path) -> dict[str, Any]:
    """What the file has: a run that was cut short goes on, and a row that is taken out is measured anew."""
    if path.exists():
        return json.loads(path.read_text())
    return {"machine": describe(), "note": NOTE, "counted": COUNTED, "rows": {}}
