"""The command under torchrun: two processes that speak with one voice, fail together, and go on where they stopped."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from fastvae import Dataset, MultiVAE
from fastvae.checkpoint import load_model, read_checkpoint, write_checkpoint
from fastvae.cli import main

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed on Linux"
)
OPTIONS = ["--hidden", "8", "--latent", "4", "--batch-size", "20", "--total-anneal-steps", "0"]
# torchrun's own limit for a group of processes to come together is minutes
SECONDS = 120


def command(*args, restarts=0):
    """fastvae by torchrun, as two processes."""
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        f"--max-restarts={restarts}", "--nproc-per-node=2",
    ]  # fmt: skip
    return [sys.executable, *launcher, "-m", "fastvae", *map(str, args)]


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=SECONDS)


def alone(*args):
    """What fastvae prints to stdout in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["fastvae", *map(str, args)])
        main()
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset folder of two tastes."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["user,item"]
    for user in range(120):
        lines += [f"u{user},i{(user * 7 + n * 3) % 20 + 20 * (user % 2)}" for n in range(8)]
    (folder / "log.csv").write_text("\n".join(lines))
    alone("prepare", folder / "log.csv", folder / "data")
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
    done = run("train", data, tmp_path / "two", "--epochs", 2, *OPTIONS)
    assert done.returncode == 0, done.stderr
    words = done.stdout + done.stderr
    assert "2 processes, by items: the batch of 20 users is smaller than the 40 items" in words
    assert words.count("best epoch ") == 1
    for name, more in (("two", ["--resume"]), ("one", [])):
        alone("train", data, tmp_path / name, "--epochs", 3, *OPTIONS, *more)
    assert_same_metrics(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


def test_an_error_of_all_is_told_once(data, tmp_path):
    done = run("train", tmp_path / "nothing", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("train: dataset must be a dataset folder, got nothing at") == 1


@pytest.fixture(scope="module")
def checkpoint(data):
    """A model of the dataset's items that nobody has trained."""
    torch.manual_seed(0)
    net, path = MultiVAE([4, 8, 40]), data.parent / "model.pt"
    write_checkpoint(path, net, list(Dataset.load(data).items), net.state_dict())
    return path


class File(NamedTuple):
    """An argument: a file of this name in the folder of a run."""

    name: str


def assert_two_do_as_one(tmp_path, ways, *args):
    """The command writes the same file and stdout by two processes; a line of stderr says how they share the work."""
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder in folders:
        folder.mkdir()
    two, one = ([f / a.name if isinstance(a, File) else a for a in args] for f in folders)
    done = run(*two)
    assert done.returncode == 0 and ways in done.stderr, done.stderr
    assert done.stdout.replace(str(folders[0]), "") == alone(*one).replace(str(folders[1]), "") > ""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert len(files[0]) == 1 and files[0] == files[1]


def test_two_processes_evaluate_as_one(data, checkpoint, tmp_path):
    metrics = [part for name in ("ndcg@10", "coverage@3") for part in ("--metric", name)]
    args = ["evaluate", checkpoint, data, "--json", *metrics, "--per-user", File("users.csv")]
    ways = "2 processes, by items: 12 users, fewer than 16 for each process\n"
    assert_two_do_as_one(tmp_path, ways, *args)


def test_two_processes_recommend_as_one(data, checkpoint, tmp_path):
    args = ["recommend", checkpoint, data, File("top.jsonl"), "-k", 25]
    ways = "2 processes, by users: 120 users, at least 16 for each process\n"
    assert_two_do_as_one(tmp_path, ways, *args)


def test_the_group_ends_with_its_threads():
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from fastvae.commands import _processes\n"
        "_processes.are_several = lambda: True\n"
        "with _processes.several('evaluate', 'users', 'cpu') as processes:\n"
        "    processes.objects(1)\n"
        "    import torch.distributed.nn.functional\n"
        "print([path.read_text() for path in Path('/proc/self/task').glob('*/comm')])"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = os.environ | where | {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "gloo" not in done.stdout, done.stdout + done.stderr


def started(data, folder, epochs, restarts=0, more=()):
    """torchrun in the background, once its first checkpoint is there, and the ids of its processes."""
    args = ["train", data, folder, "--epochs", epochs, *OPTIONS, *more]
    process = subprocess.Popen(
        command(*args, restarts=restarts),
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
    alone("train", data, tmp_path / "one", "--epochs", 40, *OPTIONS)
    assert_same_metrics(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(data, tmp_path):
    process, workers = started(data, tmp_path / "run", 100_000)
    os.kill(workers[1], signal.SIGTERM)
    words, _ = process.communicate(timeout=SECONDS)
    assert words.count("--resume goes on") == 1
    done = len(metrics(tmp_path / "run"))
    # both have left at the same update: the run goes on
    alone("train", data, tmp_path / "run", "--epochs", done + 1, "--resume", *OPTIONS)
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
