"""fit(): who is seen when, annealing, early stopping, run folder, exact resume, interruption."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import random_clicks

from fastvae import Clicks, MultiDAE, MultiVAE, evaluate, fit, reference
from fastvae.checkpoint import load_model, read_checkpoint
from fastvae.step import ItemMajorAdam
from fastvae.train import beta_at, epoch_order

N_ITEMS = 40


def learnable(n_users=120, seed=0):
    """Users of one of two tastes, split into train and (fold_in, held_out)."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(20, 8, replace=False)) + 20 * (u % 2) for u in range(n_users)]

    def clicks(rows):
        indptr = np.concatenate(([0], np.cumsum([len(r) for r in rows])))
        return Clicks(indptr, np.concatenate(rows), n_items=N_ITEMS)

    held = rows[100:]
    return clicks(rows[:100]), (clicks([r[::2] for r in held]), clicks([r[1::2] for r in held]))


def model(seed=0, make=MultiVAE):
    torch.manual_seed(seed)
    return make([8, 16, N_ITEMS])


def weights(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("update", "cap", "total", "beta"),
    [
        pytest.param(0, 0.2, 200_000, 0.0, id="starts-at-zero"),
        pytest.param(20_000, 0.2, 200_000, 0.1, id="half-way"),
        pytest.param(40_000, 0.2, 200_000, 0.2, id="the-papers-code"),
        pytest.param(10**9, 0.2, 200_000, 0.2, id="capped"),
        pytest.param(0, 0.2, 0, 0.2, id="no-annealing-is-constant"),
        pytest.param(0, 0.0, 0, 0.0, id="constant-zero"),
    ],
)
def test_beta(update, cap, total, beta):
    assert beta_at(update, cap, total) == beta


@pytest.mark.parametrize(
    ("n_users", "batch_size", "sizes"),
    [
        pytest.param(99, 100, [99], id="fewer-users-than-a-batch"),
        pytest.param(101, 50, [50, 50, 1], id="last-batch-of-one"),
        pytest.param(100, 50, [50, 50], id="exact"),
    ],
)
def test_every_user_once_an_epoch_in_another_order(n_users, batch_size, sizes, monkeypatch):
    seen = []
    rows = Clicks.rows
    monkeypatch.setattr(
        Clicks, "rows", lambda self, ids: seen.append(ids.tolist()) or rows(self, ids)
    )
    result = fit(model(), random_clicks([3] * n_users, N_ITEMS), epochs=2, batch_size=batch_size)
    assert [len(ids) for ids in seen] == sizes * 2
    one, two = (list(itertools.chain(*half)) for half in (seen[: len(sizes)], seen[len(sizes) :]))
    assert sorted(one) == sorted(two) == list(range(n_users)) and one != two
    assert result.history[-1]["update"] == 2 * len(sizes)
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(make, precision):
    train, validation = learnable()
    net = model(make=make)
    before = evaluate(net, *validation)["ndcg@100"]
    result = fit(net, train, validation, epochs=30, batch_size=20, lr=1e-2, precision=precision)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert result.best_metric > before + 0.1
    assert evaluate(net, *validation)["ndcg@100"] == result.best_metric
    assert (result.history[-1]["kld"] > 0) == (make is MultiVAE)
    assert next(net.parameters()).dtype == torch.float32


def test_same_seed_same_weights_whatever_was_drawn_before():
    train, validation = learnable()
    nets = [model(), model(), model()]
    for net, seed, draws in zip(nets, (3, 3, 4), (0, 7, 0), strict=True):
        torch.rand(draws)
        state = torch.get_rng_state()
        fit(net, train, validation, epochs=2, batch_size=30, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "fit leaves the caller's generator alone"
    assert_equal_weights(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(*(net.decode.output.weight for net in nets[1:]))


def forced_metrics(monkeypatch, values):
    """Let validation return these values, and record the weights at each."""
    import fastvae.train

    seen, values = [], iter(values)

    def fake(net, *_, **__):
        seen.append(weights(net))
        return {"ndcg@100": next(values)}

    monkeypatch.setattr(fastvae.train, "evaluate", fake)
    return seen


@pytest.mark.parametrize("in_folder", [False, True])
def test_early_stopping_returns_the_best_weights(monkeypatch, tmp_path, in_folder):
    seen = forced_metrics(monkeypatch, [0.1, 0.5, 0.4, 0.3])
    train, validation = learnable()
    net = model()
    run_dir = tmp_path / "run" if in_folder else None
    result = fit(net, train, validation, epochs=50, patience=2, run_dir=run_dir)
    assert (result.best_epoch, result.best_metric, len(result.history)) == (2, 0.5, 4)
    assert_equal_weights(weights(net), seen[1])


def test_a_metric_of_zero_still_saves_the_first_epoch(monkeypatch, tmp_path):
    seen = forced_metrics(monkeypatch, [0.0, 0.0])
    train, validation = learnable()
    result = fit(model(), train, validation, epochs=2, run_dir=tmp_path / "run")
    assert result.best_epoch == 1
    best, _ = load_model(tmp_path / "run" / "best.pt")
    assert_equal_weights(weights(best), seen[0])


def test_run_folder(tmp_path):
    train, validation = learnable()
    items = [f"item {i}" for i in range(N_ITEMS)]
    net, run = model(), tmp_path / "run"
    result = fit(net, train, validation, epochs=3, run_dir=run, items=items)
    names = {"config.json", "metrics.jsonl", "best.pt", "last.pt", "curve.png"}
    assert {path.name for path in run.iterdir()} == names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["epoch"] for line in lines] == [1, 2, 3]
    fields = {"epoch", "update", "loss", "nll", "kld", "beta", "users_per_second", "ndcg@100"}
    assert set(lines[0]) == fields
    config = json.loads((run / "config.json").read_text())
    assert config["p_dims"] == [8, 16, N_ITEMS] and config["batch_size"] == 500
    assert (run / "curve.png").read_bytes()[:4] == b"\x89PNG"
    best, ids = load_model(run / "best.pt")
    assert ids == items and not best.training
    assert_equal_weights(weights(best), weights(net))
    # tensors and JSON only: torch itself refuses anything else with weights_only
    assert set(torch.load(run / "best.pt", weights_only=True)) == {"meta", "model"}
    with pytest.raises(ValueError, match="run_dir must be a new folder"):
        fit(net, train, validation, epochs=3, run_dir=run)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, make):
    train, validation = learnable()
    options = {"batch_size": 30, "lr": 1e-2, "total_anneal_steps": 50, "seed": 5}
    straight, halves = model(make=make), model(make=make)
    one = fit(straight, train, validation, epochs=4, run_dir=tmp_path / "a", **options)
    fit(halves, train, validation, epochs=2, run_dir=tmp_path / "b", **options)
    fresh = model(seed=99, make=make)
    two = fit(fresh, train, validation, epochs=4, run_dir=tmp_path / "b", resume=True, **options)
    assert_equal_weights(weights(straight), weights(fresh))
    for name in ("beta", "loss", "ndcg@100", "update"):
        assert [row[name] for row in one.history] == [row[name] for row in two.history]
    assert (one.best_epoch, one.best_metric) == (two.best_epoch, two.best_metric)
    last = [read_checkpoint(tmp_path / run / "last.pt") for run in "ab"]
    assert_equal_weights(last[0]["model"], last[1]["model"])
    for a, b in zip(*(part["optimizer"]["state"].values() for part in last), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    # a finished run has nothing left to do
    again = fit(fresh, train, validation, epochs=4, run_dir=tmp_path / "b", resume=True, **options)
    assert again.history == two.history
    assert_equal_weights(weights(straight), weights(fresh))


def test_an_interrupted_epoch_goes_on_where_it_stopped(tmp_path, monkeypatch):
    train, validation = learnable()
    options = {"batch_size": 10, "epochs": 3, "total_anneal_steps": 50}
    straight, stopped = model(), model()
    one = fit(straight, train, validation, run_dir=tmp_path / "a", **options)
    terms, calls = MultiVAE.loss_terms, []

    def interrupting(self, *arguments):
        calls.append(1)
        if len(calls) == 14:  # the fourth batch of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(stopped, train, validation, run_dir=tmp_path / "b", **options)
    assert str(caught.value) == (
        f"stopped after 1 epochs and 4 batches; saved in {tmp_path / 'b' / 'last.pt'}, resume to go on"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fresh = model(seed=9)
    two = fit(fresh, train, validation, run_dir=tmp_path / "b", resume=True, **options)
    assert [row["loss"] for row in one.history] == [row["loss"] for row in two.history]
    assert_equal_weights(weights(straight), weights(fresh))


KILLED = """
import os, random, signal, sys, time
import numpy, torch
sys.modules["matplotlib"] = None  # the curve is not what is tested, and takes a second
sys.path.insert(0, {tests!r})
from test_train import fit, learnable, model

torch.set_num_threads(1)  # a child must not wait for threads that a fork leaves behind
EPOCHS, N_KILLS = 110, 20

def train(folder, resume=False, epochs=EPOCHS):
    train, validation = learnable()
    fit(model(), train, validation, epochs=epochs, batch_size=25, run_dir=folder, resume=resume)

def start(folder):
    child = os.fork()
    if child:
        return child
    try:
        train(folder, os.path.exists(os.path.join(folder, "last.pt")))
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)

def n_epochs(folder):
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return len(file.readlines())
    except FileNotFoundError:
        return 0

def kill_somewhere(folder):
    # some epochs further, and then at any moment of an epoch
    target, child = n_epochs(folder) + random.randrange(5), start(folder)
    while n_epochs(folder) < target and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run neither failed nor came to its end"

straight, killed = sys.argv[1:]
train(None, epochs=1)  # what torch imports at the first step, a child need not import again
assert os.waitpid(start(straight), 0)[1] == 0
random.seed(0)
seen = []
for _ in range(N_KILLS):
    kill_somewhere(killed)
    seen.append(n_epochs(killed))
assert 3 < seen[-1] < EPOCHS and len(set(seen)) > 3, seen
assert os.waitpid(start(killed), 0)[1] == 0
print("killed", len(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_twenty_times_ends_bit_equal_to_one_that_was_not(tmp_path):
    one, two = tmp_path / "straight", tmp_path / "killed"
    script = KILLED.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-W", "ignore", "-c", script, str(one), str(two)]
    cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # a process that has seen a GPU cannot fork
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=cpu)
    assert done.stdout == "killed 20\n", done.stderr
    for name in ("best.pt", "last.pt"):
        a, b = (read_checkpoint(folder / name) for folder in (one, two))
        assert_equal_weights(a["model"], b["model"])
    for x, y in zip(*(part["optimizer"]["state"].values() for part in (a, b)), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)
    assert (a["position"], a["best"]) == (b["position"], b["best"])
    one_lines, two_lines = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    )
    for row in (*one_lines, *two_lines):
        del row["users_per_second"]
    assert one_lines == two_lines
    assert sorted(os.listdir(one)) == sorted(os.listdir(two)), "no temporary file is left behind"


def finite(path):
    return all(torch.isfinite(t).all() for t in read_checkpoint(path)["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    train, _ = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, epochs=1, run_dir=run)
    config = json.loads((run / "config.json").read_text())
    # one update of this size overflows; the loss was finite before it
    (run / "config.json").write_text(json.dumps(config | {"lr": 1e39}))
    state = torch.load(run / "last.pt", weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = 1e39
    torch.save(state, run / "last.pt")
    with pytest.raises(RuntimeError) as caught:
        fit(net, train, epochs=2, run_dir=run, lr=1e39, resume=True)
    assert str(caught.value) == (
        "fit: weights must be finite, got nan or inf after update 2 (epoch 2); lower lr; "
        f"the last good checkpoint is {run / 'last.pt'}"
    )
    assert finite(run / "last.pt") and finite(run / "best.pt")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_is_reported_and_what_was_saved_is_resumed(tmp_path, monkeypatch):
    import fastvae.run_folder

    train, validation = learnable()
    options = {"batch_size": 30, "run_dir": tmp_path / "run"}
    fit(model(), train, validation, epochs=2, **options)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    fsync, opened = os.fsync, open

    def full(*arguments, **_):
        raise OSError(28, "No space left on device")

    def full_for_metrics(path, mode="r", **others):
        return full() if str(path).endswith("metrics.jsonl") else opened(path, mode, **others)

    for owner, call, fake, name in (
        (fastvae.run_folder, "open", full_for_metrics, "metrics.jsonl"),
        (torch, "save", full, r"(best|last)\.pt"),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(owner, call, fake, raising=False)
            fit(model(), train, validation, epochs=4, resume=True, **options)
        assert re.fullmatch(
            rf"\[Errno 28\] No space left on device: '.*/run/{name}'", str(caught.value)
        )
        assert (tmp_path / "run" / "last.pt").read_bytes() == saved["last.pt"]
        assert (tmp_path / "run" / "best.pt").read_bytes() == saved["best.pt"]
    assert os.fsync is fsync
    resumed, straight = model(), model()
    fit(resumed, train, validation, epochs=4, resume=True, **options)
    fit(straight, train, validation, epochs=4, batch_size=30)
    assert_equal_weights(weights(resumed), weights(straight))


LARGE = """
import resource
import numpy as np
import scipy.sparse as sp
from fastvae import Dataset, MultiVAE, evaluate, fit

rng = np.random.default_rng(0)
n_users, n_items, nnz = 63_577, 319_205, 1_000_000
pairs = rng.integers(0, n_users, nnz), rng.integers(0, n_items, nnz)
data = Dataset.from_matrix(sp.coo_array((np.ones(nnz, np.float32), pairs), (n_users, n_items)), 200)
assert data.n_items > 250_000
model = MultiVAE([8, data.n_items])
fit(model, data.train.rows(range(500)), epochs=1, batch_size=500)
assert evaluate(model, data.test_tr, data.test_te).n_evaluated > 150
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_a_step_and_an_evaluation_on_319205_items_take_less_than_2_gib():
    # dense, the matrix alone would take 75.6 GiB
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2, "GiB"


def test_the_reported_kld_is_not_annealed():
    train, _ = learnable()
    row = fit(model(), train, epochs=1, anneal_cap=0.0).history[0]
    assert row["kld"] > 0 and row["beta"] == 0 and row["loss"] == row["nll"]


def test_str_and_path_name_the_same_run_folder(tmp_path):
    train, _ = learnable()
    fit(model(), train, epochs=1, run_dir=str(tmp_path / "run"))
    net = model()
    result = fit(net, train, epochs=2, run_dir=tmp_path / "run", resume=True)
    assert [row["epoch"] for row in result.history] == [1, 2]


def test_a_loss_that_is_not_finite_stops_with_its_place(tmp_path):
    train, validation = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, validation, epochs=1, batch_size=40, run_dir=run)
    state = torch.load(run / "last.pt", weights_only=True)
    state["model"]["encode.q_layers.linear_1.bias"][8:] = 200.0  # exp(logvar) overflows
    torch.save(state, run / "last.pt")
    with pytest.raises(RuntimeError) as caught:
        fit(net, train, validation, epochs=2, batch_size=40, run_dir=run, resume=True)
    assert str(caught.value) == (
        "fit: loss must be finite, got nan at update 3 (epoch 2, batch 1); lower lr; "
        f"the last good checkpoint is {run / 'last.pt'}"
    )
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": np.ones((3, 3))}, TypeError, "fit: train must be Clicks, got ndarray; pass Clicks.from_matrix(x)"),
        ({"train": random_clicks([2], 5)}, ValueError, "fit: train must have the model's 40 items, got 5"),
        ({"train": random_clicks([], N_ITEMS)}, ValueError, "fit: train must have at least one user, got 0"),
        ({"validation": (random_clicks([2], 5), random_clicks([2], 5))}, ValueError, "fit: fold_in must have the model's 40 items, got 5"),
        ({"validation": (random_clicks([2], N_ITEMS), random_clicks([0], N_ITEMS))}, ValueError, "fit: validation must have a user with fold-in and held-out clicks, got none; pass None to train without"),
        ({"epochs": -1}, ValueError, "fit: epochs must be at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "fit: batch_size must be at least 1, got 0"),
        ({"lr": 0}, ValueError, "fit: lr must be a finite number above 0, got 0"),
        ({"lr": "fast"}, TypeError, "fit: lr must be a number, got 'fast'"),
        ({"total_anneal_steps": 0.5}, TypeError, "fit: total_anneal_steps must be a whole number, got 0.5"),
        ({"items": ["a", "a", *"bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"]}, ValueError, "fit: items must be distinct, got one twice"),
        ({"validation": (random_clicks([2], N_ITEMS), random_clicks([2, 2], N_ITEMS))}, ValueError, "fit: held_out must have the 1 users of fold_in, got 2"),
        ({"items": iter("ab")}, TypeError, "fit: items must be a list of ids, got str_ascii_iterator"),
        ({"model": model().requires_grad_(False)}, ValueError, "fit: model must have a weight that requires grad, got none"),
        ({"lr": float("nan")}, ValueError, "fit: lr must be a finite number above 0, got nan"),
        ({"anneal_cap": float("inf")}, ValueError, "fit: anneal_cap must be a finite number of at least 0, got inf"),
        ({"patience": 3}, ValueError, "fit: patience must be None without validation, got 3"),
        ({"cuda_graph": True}, ValueError, "fit: cuda_graph must be False where the model is not on a GPU, got True"),
        ({"model": torch.nn.Linear(N_ITEMS, 2)}, TypeError, "fit: model must be a MultiVAE or MultiDAE, got Linear; pass the model itself where that wraps one"),
        ({"model": torch.compile(model())}, TypeError, "fit: model must be a MultiVAE or MultiDAE, got OptimizedModule; pass the model itself where that wraps one"),
        ({"validation": torch.ones(2, N_ITEMS)}, TypeError, "fit: validation must be two Clicks (fold_in, held_out), got Tensor"),
        ({"validation": (random_clicks([2], N_ITEMS),)}, TypeError, "fit: validation must be two Clicks (fold_in, held_out), got tuple of 1"),
        ({"validation": (torch.ones(1, N_ITEMS), torch.ones(1, N_ITEMS))}, TypeError, "fit: fold_in must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        ({"patience": 0}, ValueError, "fit: patience must be at least 1, got 0"),
        ({"precision": "fp16"}, ValueError, "fit: precision must be one of fp32, bf16, got 'fp16'"),
        ({"normalize": "user"}, ValueError, "fit: normalize must be one of none, clicks, got 'user'"),
        ({"per_click": 1}, TypeError, "fit: per_click must be True or False, got 1"),
        ({"resume": "no"}, TypeError, "fit: resume must be True or False, got 'no'"),
        ({"precision": torch.bfloat16}, TypeError, "fit: precision must be one of fp32, bf16, got torch.bfloat16"),
        ({"batch_size": 2**31}, ValueError, "fit: batch_size must lie below 2**31, got 2147483648"),
        ({"epochs": 10**5000}, ValueError, "fit: epochs must lie below 2**31, got a whole number of more than 40 digits"),
        ({"lr": 10**400}, ValueError, "fit: lr must be a finite number above 0, got a whole number of more than 40 digits"),
        ({"seed": True}, TypeError, "fit: seed must be a whole number, got True"),
        ({"items": ["a"]}, ValueError, "fit: items must hold 40 ids, got 1"),
        ({"resume": True}, ValueError, "fit: run_dir must be given to resume, got None"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error) as caught:
        fit(**({"model": model(), "train": learnable()[0]} | change))
    assert str(caught.value) == message


def test_resume_with_other_settings_or_nothing_to_resume_is_refused(tmp_path):
    train, _ = learnable()
    with pytest.raises(ValueError, match="run_dir must hold a run to resume, got nothing at"):
        fit(model(), train, epochs=1, run_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    fit(model(), train, epochs=1, run_dir=tmp_path / "run", lr=1e-3)
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "run", lr=1e-2, resume=True)
    assert str(caught.value) == "fit: lr must be 0.001 as in the run to resume, got 0.01"
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "run", per_click=True, resume=True)
    assert str(caught.value) == "fit: per_click must be False as in the run to resume, got True"


def test_a_run_of_the_older_words_for_per_click_is_resumed_by_it(tmp_path):
    train, _ = learnable()
    with pytest.warns(DeprecationWarning, match="fit: normalize must become per_click=True"):
        fit(model(), train, epochs=1, run_dir=tmp_path / "run", normalize="clicks")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["normalize"] == "clicks"
    result = fit(model(), train, epochs=2, run_dir=tmp_path / "run", per_click=True, resume=True)
    assert len(result.history) == 2


@pytest.mark.parametrize("name", ["config.json", "last.pt"])
def test_a_run_folder_that_lost_a_file_is_not_resumed(tmp_path, name):
    train, _ = learnable()
    run = tmp_path / "run"
    fit(model(), train, epochs=1, run_dir=run)
    (run / name).unlink()
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=run, resume=True)
    assert str(caught.value) == (
        f"fit: run_dir must hold a run to resume, got {run} without {name}; train without resume, in a new folder"
    )


def dense_fit(model, train, epochs, batch_size, seed, per_click, total_anneal_steps):
    """fit's batches, dropout masks, noise and beta with the dense reference model, divided by clicks or not."""
    dense = reference.MultiVAE(model.p_dims)
    dense.load_state_dict(model.state_dict())
    optimizer, update = torch.optim.Adam(dense.parameters(), lr=1e-3), 0
    for epoch in range(epochs):
        order, draw_seed = epoch_order(train.n_users, seed, epoch)
        torch.manual_seed(draw_seed)
        for ids in order.split(batch_size):
            clicks = train.rows(ids)
            keep = reference.dense_keep(clicks, torch.randint(2**63 - 1, (1,)), 0.5)
            noise = torch.randn(len(ids), model.p_dims[0])
            x = clicks.to_dense()
            logits, mu, logvar = dense(x, keep, noise)
            nll = -(torch.log_softmax(logits, 1) * x).sum(1)
            loss = nll + min(0.2, update / total_anneal_steps) * reference.kld(mu, logvar)
            if per_click:
                loss = loss / x.sum(1)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            update += 1
    return dense


@pytest.mark.parametrize("per_click", [False, True])
def test_fit_is_the_dense_loop_on_the_same_draws_from_a_model_in_eval_mode(per_click):
    train = random_clicks([3, 9, 5, 7, 4, 6, 8] * 6, N_ITEMS, counts=True)
    net = model().eval()  # as load_model gives it
    options = {"epochs": 2, "batch_size": 10, "seed": 3, "total_anneal_steps": 100}
    dense = dense_fit(net, train, per_click=per_click, **options)
    result = fit(net, train, per_click=per_click, **options)
    for (name, actual), expected in zip(
        net.named_parameters(), dense.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert [row["beta"] for row in result.history] == [4 / 100, 9 / 100]


def test_gradients_are_those_of_the_mean_over_users(monkeypatch):
    train, seen = random_clicks([3, 5] * 5, N_ITEMS), []
    step = ItemMajorAdam.step

    def record(self):
        seen.append(self.parameters[-1].grad.clone())
        step(self)

    monkeypatch.setattr(ItemMajorAdam, "step", record)
    net = MultiDAE([4, N_ITEMS], dropout_enc=[0.0])
    loss = net.loss(train)
    loss.backward()
    expected = net.decode.output.bias.grad.clone()
    net.zero_grad()
    fit(net, train, epochs=1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_runs_in_the_precision_asked_for(monkeypatch, precision):
    terms, seen = MultiVAE.loss_terms, []

    def record(self, *arguments):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", record)
    torch.set_float32_matmul_precision("high")
    try:
        fit(model(), random_clicks([3] * 5, N_ITEMS), epochs=1, precision=precision)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [(precision == "bf16", "highest")]


def test_an_interrupt_never_saves_weights_that_are_not_finite(tmp_path, monkeypatch):
    train, _ = learnable()
    run, step = tmp_path / "run", ItemMajorAdam.step
    fit(model(), train, epochs=1, batch_size=20, run_dir=run)
    before = (run / "last.pt").read_bytes()

    def spoil(self):
        step(self)
        self.views[-1].data[0] = math.inf
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ItemMajorAdam, "step", spoil)
    with pytest.raises(RuntimeError, match="weights must be finite"):
        fit(model(), train, epochs=2, batch_size=20, run_dir=run, resume=True)
    assert (run / "last.pt").read_bytes() == before


def test_a_second_interrupt_reaches_the_handler_of_before(monkeypatch):
    terms, before = MultiVAE.loss_terms, signal.getsignal(signal.SIGINT)
    handlers = []

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), random_clicks([5] * 30, N_ITEMS), epochs=1, batch_size=10)
    assert handlers == [before]


def test_the_users_per_second_of_a_resumed_epoch_count_its_rest(tmp_path, monkeypatch):
    import fastvae.train

    train, _ = learnable()
    options = {"epochs": 1, "batch_size": 25, "run_dir": tmp_path / "run"}
    terms = MultiVAE.loss_terms

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiVAE, "loss_terms", interrupting)
        fit(model(), train, **options)
    clock = itertools.count(0, 3)  # three seconds between two questions
    monkeypatch.setattr(fastvae.train.time, "perf_counter", lambda: next(clock))
    result = fit(model(), train, resume=True, **options)
    assert result.history[0]["users_per_second"] == 25.0


def test_a_run_resumed_without_items_keeps_those_it_had(tmp_path):
    train, validation = learnable()
    ids, run = list(range(100, 100 + N_ITEMS)), tmp_path / "run"
    fit(model(), train, validation, epochs=1, run_dir=run, items=ids)
    fit(model(), train, validation, epochs=3, run_dir=run, resume=True)
    fit(model(), train, validation, epochs=4, run_dir=run, resume=True, items=ids)
    for name in ("best.pt", "last.pt"):
        assert load_model(run / name)[1] == [str(item) for item in ids]
    fit(model(), train, epochs=1, run_dir=tmp_path / "none")
    with pytest.raises(ValueError) as caught:
        fit(model(), train, epochs=2, run_dir=tmp_path / "none", resume=True, items=ids)
    assert str(caught.value) == "fit: items must be None as in the run to resume, got ids"


def test_a_run_is_resumed_with_its_own_validation_only(tmp_path):
    train, validation = learnable()
    fit(model(), train, validation, epochs=1, run_dir=tmp_path / "run")
    before = (tmp_path / "run" / "best.pt").read_bytes()
    for other, got in ((None, "none"), (validation[::-1], "others")):
        with pytest.raises(ValueError) as caught:
            fit(model(), train, other, epochs=2, run_dir=tmp_path / "run", resume=True)
        assert (
            str(caught.value)
            == f"fit: validation must be the clicks of the run to resume, got {got}"
        )
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_a_run_without_its_best_checkpoint_is_refused_before_it_trains(tmp_path, monkeypatch):
    train, validation = learnable()
    fit(model(), train, validation, epochs=1, run_dir=tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    monkeypatch.setattr(MultiVAE, "loss_terms", None)  # not to be reached
    with pytest.raises(ValueError, match=r"best\.pt"):
        fit(model(), train, validation, epochs=2, run_dir=tmp_path / "run", resume=True)


def test_the_model_has_its_best_weights_even_where_the_curve_cannot_be_drawn(tmp_path):
    train, validation = learnable()
    net, run = model(), tmp_path / "run"
    fit(net, train, validation, epochs=1, run_dir=run)
    best = load_model(run / "best.pt")[0]
    (run / "curve.png").unlink()
    (run / "curve.png").mkdir()
    again = model(seed=1)
    with pytest.raises(OSError):
        fit(again, train, validation, epochs=1, run_dir=run, resume=True)
    assert_equal_weights(weights(again), weights(best))


def fit_that_died_before_a_checkpoint(train, run):
    fit(model(), train, epochs=1, run_dir=run)
    for name in ("last.pt", "curve.png"):
        (run / name).unlink()


def test_a_run_that_died_before_its_first_checkpoint_is_started_anew(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    fit_that_died_before_a_checkpoint(train, run)
    (run / ".last.pt.12.tmp").write_text("half")
    fit(model(), train, epochs=2, run_dir=run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert not list(run.glob(".*"))
    (run / ".best.pt.12.tmp").write_text("half")
    fit(model(), train, epochs=3, run_dir=run, resume=True)
    assert not list(run.glob(".*"))


def test_a_foreign_file_beside_our_config_is_left_alone(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    fit_that_died_before_a_checkpoint(train, run)
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"must be a new or empty folder, got .* with thesis\.txt in it"
    ):
        fit(model(), train, epochs=1, run_dir=run)


def test_a_loss_of_nan_in_the_first_epoch_names_no_checkpoint(tmp_path):
    net = model()
    net.decode.output.bias.data[0] = math.nan
    with pytest.raises(RuntimeError) as caught:
        fit(net, learnable()[0], epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value).endswith("(epoch 1, batch 1); lower lr")


def test_progress_marks_the_best_epochs_and_counts_a_resumed_run_on(tmp_path, monkeypatch, capsys):
    from rich.progress import Progress

    forced_metrics(monkeypatch, [0.1, 0.3, 0.2])
    train, validation = learnable()
    done, update = [], Progress.update
    monkeypatch.setattr(
        Progress,
        "update",
        lambda self, *a, **k: done.append(k.get("completed")) or update(self, *a, **k),
    )
    monkeypatch.setattr("fastvae.progress.SECONDS_BETWEEN", 0)
    options = {"batch_size": 40, "run_dir": tmp_path / "run", "progress": True}
    fit(model(), train, validation, epochs=2, **options)
    fit(model(), train, validation, epochs=3, resume=True, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [line.endswith("best") for line in lines] == [True, True, False]
    assert done == [40, 80, 100, 140, 180, 200, 240, 280, 300]


def test_only_leftovers_of_our_own_files_are_removed(tmp_path):
    train, _ = learnable()
    run = tmp_path / "run"
    run.mkdir()
    for name in (".notes.tmp", ".best.pt.old.tmp", ".best.pt.12.tmp"):
        (run / name).write_text("x")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        fit(model(), train, epochs=1, run_dir=run)
    assert sorted(path.name for path in run.iterdir()) == [".best.pt.old.tmp", ".notes.tmp"]


class MyVAE(MultiVAE):
    pass


def test_a_subclass_trains_but_not_into_checkpoints_that_nothing_could_load(tmp_path):
    train, validation = learnable()
    torch.manual_seed(0)
    net = MyVAE([4, N_ITEMS])
    assert fit(net, train, validation, epochs=1).best_epoch == 1
    with pytest.raises(TypeError) as caught:
        fit(net, train, validation, epochs=1, run_dir=tmp_path / "run")
    assert str(caught.value) == (
        "fit: model must be a MultiVAE or MultiDAE itself where run_dir is given, got MyVAE; "
        "load_model could not make it again"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resume"])
def test_a_second_training_in_the_same_folder_is_refused_and_harms_nothing(
    tmp_path, monkeypatch, resume
):
    train, _ = learnable()
    run = tmp_path / "run"
    terms, refused = MultiVAE.loss_terms, []

    def meanwhile(self, *arguments):
        if not refused:
            refused.append(None)
            with pytest.raises(ValueError) as caught:
                fit(model(), train, epochs=1, run_dir=run, resume=resume)
            refused[0] = str(caught.value)
        return terms(self, *arguments)

    if resume:
        fit(model(), train, epochs=1, run_dir=run)
    monkeypatch.setattr(MultiVAE, "loss_terms", meanwhile)
    result = fit(model(), train, epochs=2, run_dir=run, resume=resume)
    assert refused == [
        f"fit: run_dir must be a folder that no other training writes to, got {run}; wait for that one to end, "
        "or name another folder"
    ]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2] and len(result.history) == 2
    # and the folder is free again
    assert len(fit(model(), train, epochs=3, run_dir=run, resume=True).history) == 3


def test_scores_that_overflow_after_the_first_epoch_are_blamed_on_the_learning_rate(tmp_path):
    train, validation = learnable()
    options = {"epochs": 2, "batch_size": len(train), "run_dir": tmp_path / "run"}
    with pytest.raises(RuntimeError) as caught:
        fit(MultiVAE([8, 1000, N_ITEMS]), train, validation, lr=3e37, **options)
    assert str(caught.value) == "fit: scores must be finite, got nan or inf after epoch 1; lower lr"


def test_a_resumed_run_with_nothing_left_says_so(tmp_path, capsys):
    train, validation = learnable()
    options = {"run_dir": tmp_path / "run", "progress": True}
    fit(model(), train, validation, epochs=3, **options)
    assert "nothing left" not in capsys.readouterr().err
    fit(model(), train, validation, epochs=2, resume=True, **options)
    assert "nothing left to train: the run has 3 epochs, asked for are 2" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["best"] = [1, 0.5]
    torch.save(state, tmp_path / "run" / "last.pt")
    fit(model(), train, validation, epochs=9, patience=2, resume=True, **options)
    assert "nothing left to train: no better NDCG@100 since epoch 1 of 3" in capsys.readouterr().err


def test_all_defaults_on_twenty_users():
    net = model()
    result = fit(net, random_clicks([5] * 20, N_ITEMS))
    assert result.best_epoch == 200 and len(result.history) == 200


def test_a_background_job_goes_on_ignoring_ctrl_c(monkeypatch):
    terms = MultiVAE.loss_terms

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return terms(self, *arguments)

    monkeypatch.setattr(MultiVAE, "loss_terms", interrupting)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = fit(model(), random_clicks([5] * 30, N_ITEMS), epochs=1, batch_size=10)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(result.history) == 1


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """fit asks for a graph on a CPU too; the module whose GraphedStep a test replaces."""
    module = sys.modules["fastvae.train"]
    init = module._Trainer.__init__

    def wanting(self, *arguments):
        init(self, *arguments)
        self.wants_graph = True

    monkeypatch.setattr(module._Trainer, "__init__", wanting)
    return module


def test_a_graph_is_replayed_for_full_batches_only(graphs_on_a_cpu, monkeypatch):
    train, replayed = random_clicks([5] * 95, N_ITEMS), []

    class Replay:
        """What the graph does, without a GPU: the step on the row ids and beta it is given."""

        def __init__(self, step, clicks, optimizer):
            assert len(clicks) == 10
            self.step = step

        def replay(self, clicks, beta):
            replayed.append(len(clicks))
            self.step(clicks, beta)

    eager, graphed = model(), model()
    monkeypatch.setattr(graphs_on_a_cpu, "GraphedStep", Replay)
    fit(graphed, train, epochs=2, batch_size=10, total_anneal_steps=10)
    monkeypatch.undo()
    fit(eager, train, epochs=2, batch_size=10, total_anneal_steps=10)
    assert_equal_weights(weights(eager), weights(graphed))
    # nine full batches and a tenth of 5 an epoch, the first three of the run eager
    assert replayed == [10] * (9 - 3 + 9)


def test_a_capture_that_fails_warns_once_and_leaves_no_gradient(graphs_on_a_cpu, monkeypatch):
    train = random_clicks([5] * 95, N_ITEMS)

    def fail(step, clicks, optimizer):
        for p in optimizer.parameters:
            p.grad = torch.full_like(p, math.nan)  # memory that no kernel has filled
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    failed, eager = model(), model()
    monkeypatch.setattr(graphs_on_a_cpu, "GraphedStep", fail)
    with pytest.warns(
        UserWarning, match=r"eager steps go on \(operation .* capturing\)$"
    ) as warned:
        fit(failed, train, epochs=2, batch_size=10)
    assert len(warned) == 1
    monkeypatch.undo()
    fit(eager, train, epochs=2, batch_size=10)
    assert_equal_weights(weights(eager), weights(failed))
