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


def torchrun(*args, restarts=0):
    """Two processes of what follows."""
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        f"--max-restarts={restarts}", "--nproc-per-node=2",
    ]  # fmt: skip
    return [sys.executable, *launcher, *map(str, args)]


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


class Ended(NamedTuple):
    """What both processes of a command have left, their words one after the other."""

    returncode: tuple[int, ...]
    stdout: str
    stderr: str


COMMANDS = {
    "train": ["train", "{data}", "{run}/run", "--epochs", "2", *OPTIONS],
    "error": ["train", "{run}/nothing", "{run}/other"],
    "evaluate": [
        "evaluate", "{checkpoint}", "{data}", "--json", "--metric", "ndcg@10", "--metric", "coverage@3",
        "--per-user", "{run}/users.csv",
    ],
    "recommend": ["recommend", "{checkpoint}", "{data}", "{run}/top.jsonl", "-k", "25"],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(data):
    """A model of the dataset's items that nobody has trained."""
    torch.manual_seed(0)
    net, path = MultiVAE([4, 8, 40]), data.parent / "model.pt"
    write_checkpoint(path, net, list(Dataset.load(data).items), net.state_dict())
    return path


@pytest.fixture(scope="module")
def arguments(data, checkpoint):
    """Those of a command whose files are in a folder."""

    def of(name, run):
        names = {"data": data, "run": run, "checkpoint": checkpoint}
        return [argument.format(**names) for argument in COMMANDS[name]]

    return of


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """The folder of two processes that torchrun has started once, and how each command ended."""
    folder = tmp_path_factory.mktemp("two")
    commands = folder / "commands.json"
    commands.write_text(json.dumps([arguments(name, folder) for name in COMMANDS]))
    child = Path(__file__).parent / "children" / "commands.py"
    done = subprocess.run(
        torchrun(child, commands, folder), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    ended = [
        Ended(codes, "".join(out), "".join(err))
        for codes, out, err in (zip(*both, strict=True) for both in zip(*ranks, strict=True))
    ]
    return folder, dict(zip(COMMANDS, ended, strict=True))


def test_two_processes_train_as_one_and_one_goes_on(two, data, tmp_path):
    folder, ended = two
    done = ended["train"]
    assert done.returncode == (0, 0), done.stderr
    words = done.stdout + done.stderr
    assert "2 processes, by items: the batch of 20 users is smaller than the 40 items" in words
    assert words.count("best epoch ") == 1
    assert (folder / "run" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for run, more in ((folder / "run", ["--resume"]), (tmp_path / "one", [])):
        alone("train", data, run, "--epochs", 3, *OPTIONS, *more)
    assert_same_metrics(metrics(folder / "run"), metrics(tmp_path / "one"))


def test_an_error_of_all_is_told_once(two):
    done = two[1]["error"]
    assert done.returncode == (2, 2)
    assert done.stderr.count("train: dataset must be a dataset folder, got nothing at") == 1


@pytest.mark.parametrize(
    ("name", "file", "ways"),
    [
        ("evaluate", "users.csv", "by items: 12 users, fewer than 16 for each process"),
        ("recommend", "top.jsonl", "by users: 120 users, at least 16 for each process"),
    ],
)
def test_two_processes_do_as_one(two, arguments, tmp_path, name, file, ways):
    folder, done = two[0], two[1][name]
    assert done.returncode == (0, 0), done.stderr
    assert f"2 processes, {ways}\n" in done.stderr
    words = alone(*arguments(name, tmp_path))
    assert done.stdout.replace(str(folder), "") == words.replace(str(tmp_path), "") > ""
    assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("size", ["2", "many"])
def test_what_torchrun_sets_is_there_as_a_whole(size, data, tmp_path, monkeypatch, capsys):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(SystemExit, match=r"^2$"):
        alone("train", data, tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert said == (
        "fastvae: train: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT must be as torchrun sets them, got "
        f"RANK=0 WORLD_SIZE={size} MASTER_ADDR=None MASTER_PORT=None; unset RANK to run one process"
    )


def test_one_process_of_torchrun_takes_the_words_of_many(data, tmp_path, monkeypatch):
    options = ["--epochs", "1", "--hidden", "2", "--latent", "2", "--parallel", "items"]
    with pytest.raises(SystemExit, match=r"^2$"):
        alone("train", data, tmp_path / "run", *options)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone("train", data, tmp_path / "run", *options)
    assert (tmp_path / "run" / "best.pt").exists()


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
        torchrun("-m", "fastvae", *args, restarts=restarts),
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
    process, workers = started(data, tmp_path / "run", 20, restarts=1, more=["--resume"])
    os.kill(workers[0], signal.SIGKILL)
    words, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, words
    alone("train", data, tmp_path / "one", "--epochs", 20, *OPTIONS)
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
