"""What every result file says about where it was measured, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict:
    """Processor or card, versions, date and commit."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def card() -> str:
    """The GPU's name as a part of a file's name, or cpu."""
    gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu"


def write(path: Path, result: dict) -> None:
    """A result file, whole or not at all: whoever is killed leaves no half of one."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def add(path: Path, name: str, row: dict) -> None:
    """Put a row beside those that the file has from the same machine and commit; others it drops."""
    before, machine = json.loads(path.read_text()) if path.exists() else {}, describe()
    same = all(before.get("machine", {}).get(k) == machine.get(k) for k in ("gpu", "cpu", "commit"))
    write(path, {"machine": machine, "rows": {**(before["rows"] if same else {}), name: row}})


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return platform.processor()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({', '.join(known)})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, -dirty where tracked files differ from it (results of the run before do not count); a copy
    without git is told by FASTVAE_COMMIT."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTVAE_COMMIT")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    top = Path(__file__).parent.parent
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=top, capture_output=True, text=True, check=True
    ).stdout.strip()
