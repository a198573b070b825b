"""warm_up and fastvae warmup: a step after it compiles nothing."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvae import Clicks, MultiDAE, MultiVAE
from fastvae.progress import ProgressBar
from fastvae.trainer import Settings, Trainer
from fastvae.warmup import warm_up

ROOT = Path(__file__).parents[1]
CHILD = ROOT / "tests" / "children" / "warmed_up.py"


@pytest.fixture
def compiler(tmp_path):
    """The environment of a process that compiles, with a cache of its own; here the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}


@pytest.mark.parametrize("options", [("bf16",), ("fp32", "--counts")], ids=" ".join)
def test_the_steps_after_it_compile_nothing(compiler, options):
    run = subprocess.run(
        [sys.executable, CHILD, *options], env=compiler, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["late"] == []
    # two ways in bf16: the first step has no copies of the weights yet
    assert found["warm"] >= (10 if options[0] == "bf16" else 8)


def test_the_command_fills_the_cache(compiler, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastvae",
        "warmup",
        "70",
        "--model",
        "dae",
        "--hidden",
        "none",
    ]
    command += ["--latent", "8", "--capability", "8.0"]
    run = subprocess.run(command, env=compiler, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled = {path.name for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"_exp_row_kernel.cubin", "_adam_kernel.cubin"} <= compiled
    # two of them differ in dropout alone
    assert run.stdout.startswith(f"{len(compiled) + 1} kernels")


@pytest.fixture
def trainer():
    clicks = Clicks.from_pairs([0, 1, 1, 2, 3], [0, 1, 2, 1, 0], n_items=3)
    settings = Settings(3, 1e-3, 0.2, 0, False, "fp32", 0)
    return Trainer(MultiDAE([2, 3]), clicks, None, settings, None, False)


def test_training_on_a_gpu_compiles_first(trainer, monkeypatch):
    class Reached(Exception):
        pass

    def compile_ahead(_):
        raise Reached

    monkeypatch.setattr(Trainer, "_compile_ahead", compile_ahead)
    monkeypatch.setattr(Clicks, "device", torch.device("cuda", 0))
    with pytest.raises(Reached):
        trainer.run_epochs(1, 0, ProgressBar(False, 1, 4), lambda: False)


def test_training_goes_on_where_that_fails(trainer, monkeypatch):
    calls = []

    def failing(*arguments, **options):
        calls.append((arguments, options))
        raise RuntimeError("no compiler")

    monkeypatch.setattr("fastvae.trainer.warm_up", failing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with pytest.warns(UserWarning, match="kernels must compile beforehand, got no compiler"):
        trainer._compile_ahead()
    expected = {"precision": "fp32", "counts": False, "lr": 1e-3}
    assert calls == [((trainer.model, [3, 1]), expected)]


def test_arguments(monkeypatch):
    model = MultiVAE([2, 3])
    with pytest.raises(
        ValueError, match="warm_up: capability must be given where torch finds no GPU"
    ):
        warm_up(model, [2])
    with pytest.raises(ValueError, match="warm_up: capability must be at least 75, got 70"):
        warm_up(model, [2], capability=70)
    with pytest.raises(ValueError, match="warm_up: precision must be one of fp32, tf32, bf16"):
        warm_up(model, [2], precision="half", capability=80)
    with pytest.raises(ValueError, match="warm_up: batch_sizes must be at least 1, got 0"):
        warm_up(model, [0], capability=80)
    with pytest.raises(
        TypeError, match="warm_up: model must be a MultiVAE or MultiDAE, got Linear"
    ):
        warm_up(torch.nn.Linear(1, 1), [1], capability=80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="capability must be None where there is a GPU, got 80"):
        warm_up(model, [2], capability=80)
