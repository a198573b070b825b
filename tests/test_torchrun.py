"""fastvae train under torchrun: two processes that speak with one voice, fail together, and go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvae.checkpoint import load_model, read_checkpoint

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed on Linux"
)
OPTIONS = ["--hidden", "8", "--latent", "4", "--batch-size", "20", "--total-anneal-steps", "0"]
# torchrun's own limit for a group of processes to come together is minutes
SECONDS = 120


def command(processes, *args, restarts=0):
    """fastvae by torchrun, or for one process without."""
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        f"--max-restarts={restarts}", f"--nproc-per-node={processes}",
    ]  # fmt: skip
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "fastvae", *map(str, args)]


def run(processes, *args, **options):
    return subprocess.run(
        command(processes, *args, **options), capture_output=True, text=True, timeout=SECONDS
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset folder of two tastes."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["user,item"]
    for user in range(120):
        lines += [f"u{user},i{(user * 7 + n * 3) % 20 + 20 * (user % 2)}" for n in range(8)]
    (folder / "log.csv").write_text("\n".join(lines))
    done = run(1, "prepare", folder / "log.csv", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


def metrics(folder):
    """The lines of metrics.jsonl, without the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "users_per_second"} for row in rows]


def assert_same_metrics(a, b):
    assert len(a) == len(b)
    for row, other in zip(a, b, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_two_processes_train_as_one_and_one_goes_on(data, tmp_path):
    done = run(2, "train", data, tmp_path / "two", "--epochs", 2, *OPTIONS)
    assert done.returncode == 0, done.stderr
    words = done.stdout + done.stderr
    assert "2 processes, by items: the batch of 20 users is smaller than the 40 items" in words
    assert words.count("best epoch ") == 1
    for name, more in (("two", ["--resume"]), ("one", [])):
        alone = run(1, "train", data, tmp_path / name, "--epochs", 3, *OPTIONS, *more)
        assert alone.returncode == 0, alone.stderr
    assert_same_metrics(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


def test_an_error_of_all_is_told_once(data, tmp_path):
    done = run(2, "train", tmp_path / "nothing", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("train: dataset must be a dataset folder, got nothing at") == 1


def started(data, folder, epochs, restarts=0, more=()):
    """torchrun in the background, once its first checkpoint is there, and the ids of its processes."""
    args = ["train", data, folder, "--epochs", epochs, *OPTIONS, *more]
    process = subprocess.Popen(
        command(2, *args, restarts=restarts),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + SECONDS
    while not (folder / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        int(child)
        for child in children
        if b"fastvae\0train" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    return process, workers


def test_a_killed_process_ends_the_run_within_a_minute(data, tmp_path):
    process, workers = started(data, tmp_path / "run", 100_000)
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    words, _ = process.communicate(timeout=SECONDS)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert f"-9 (pid: {workers[1]})" in words
    assert all(
        torch.isfinite(w).all() for w in load_model(tmp_path / "run" / "best.pt")[0].parameters()
    )


def test_a_restart_goes_on_from_the_last_checkpoint(data, tmp_path):
    process, workers = started(data, tmp_path / "run", 40, restarts=1, more=["--resume"])
    os.kill(workers[0], signal.SIGKILL)
    words, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, words
    alone = run(1, "train", data, tmp_path / "one", "--epochs", 40, *OPTIONS)
    assert alone.returncode == 0, alone.stderr
    assert_same_metrics(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(data, tmp_path):
    process, workers = started(data, tmp_path / "run", 100_000)
    os.kill(workers[1], signal.SIGTERM)
    words, _ = process.communicate(timeout=SECONDS)
    assert words.count("--resume goes on") == 1
    done = len(metrics(tmp_path / "run"))
    # both have left at the same update: the run goes on
    more = run(1, "train", data, tmp_path / "run", "--epochs", done + 1, "--resume", *OPTIONS)
    assert more.returncode == 0, more.stderr
    assert len(metrics(tmp_path / "run")) == done + 1


def test_ctrl_c_stops_all_with_a_checkpoint(data, tmp_path):
    process, _ = started(data, tmp_path / "run", 100_000)
    # a terminal sends it to torchrun, which hands it on
    process.send_signal(signal.SIGINT)
    words, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert words.count("--resume goes on") == 1
    position = read_checkpoint(tmp_path / "run" / "last.pt")["position"]
    assert position[0] == len(metrics(tmp_path / "run"))
