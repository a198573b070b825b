"""Weights that other packages' own networks write, loaded by load_model: do the logits stay? See bench peers --convert."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.machine import RESULTS, describe, write
from bench.peer_nets import PACKAGES
from fastvae import load_model

RUNNER = Path(__file__).with_name("peer_nets.py")


def error_of(path: Path, package: str) -> float:
    """Relative difference of our logits from theirs, which are a softmax in Cornac."""
    arrays = np.load(path.with_suffix(".npz"))
    x, theirs = (torch.from_numpy(arrays[name]) for name in ("x", "logits"))
    model, _ = load_model(path, activation="relu" if "relu" in path.name else None)
    if package == "recbole":
        x, theirs = x[:, 1:], theirs[:, 1:]
    with torch.no_grad():
        ours = model(x)
    ours = ours[0] if isinstance(ours, tuple) else ours
    ours = ours.softmax(1) if package == "cornac" else ours
    return ((ours - theirs).norm() / theirs.norm()).item()


def compare(install: Callable[[str], Path], names: list[str]) -> None:
    """Every package's cases; a package that does not install or run is listed with its error. Writes the JSON."""
    rows: dict[str, dict] = {}
    for name in filter(PACKAGES.__contains__, names):
        with tempfile.TemporaryDirectory() as folder:
            try:
                command = [str(install(name)), "-I", str(RUNNER), name, folder]
                subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            except (RuntimeError, subprocess.SubprocessError) as error:
                text = getattr(error, "stderr", None) or str(error)
                rows[name] = {"not_run": text.strip().splitlines()[-1]}
                print(f"{name}: {rows[name]['not_run']}")
                continue
            rows[name] = {p.stem: error_of(p, name) for p in sorted(Path(folder).glob("*.pt"))}
        for case, error in rows[name].items():
            print(f"{name:10}{case:24}{error:.1e}")
    write(
        RESULTS / "peer_weights.json",
        {"machine": describe(), "unit": "relative difference of logits, in evaluation mode", "packages": rows},
    )  # fmt: skip
