"""Learning rates by schedule, weight decay and clipping in fit(): against torch's own, and resumed bit for bit."""

import copy

import pytest
import torch
from test_step import Graphs
from training import assert_equal_weights, forced_metrics, learnable, model, weights

from fastvae import Adam, MultiDAE, fit
from fastvae.checkpoint import read_checkpoint
from fastvae.schedules import cosine_lr, plateau_lr


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def test_the_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.003)
    for update in range(11):
        assert cosine_lr(update, 0.3, 10) == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()
    assert cosine_lr(99, 0.3, 10) == pytest.approx(0.003)


def test_the_plateau_is_torchs():
    metrics = [0.1, 0.3, 0.2, 0.3, 0.3, 0.1, 0.4, 0.4, 0.4, 0.4, *[0.2] * 30]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=2, threshold=0, min_lr=0.003
    )
    for n, metric in enumerate(metrics, 1):
        torchs.step(metric)
        assert plateau_lr(metrics[:n], 0.3) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr_schedule": "cosine"},
        {"lr_schedule": "plateau"},
        {"weight_decay": 0.1},
        {"clip_grad_norm": 0.5},
        {"lr_schedule": "cosine", "weight_decay": 0.1, "clip_grad_norm": 0.5},
    ],
    ids=["cosine", "plateau", "decay", "clip", "all"],
)
def test_each_is_resumed_bit_for_bit(monkeypatch, tmp_path, options, precision):
    if options.get("lr_schedule") == "plateau":
        # eight epochs of each training
        forced_metrics(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1] * 3)
    train, validation = learnable()
    options = options | {"lr": 1e-2, "batch_size": 30, "patience": 0, "precision": precision}
    plain, straight, halves = model(), model(), model()
    none = {"lr_schedule": "constant", "weight_decay": 0, "clip_grad_norm": None}
    fit(plain, train, validation, epochs=8, run_dir=tmp_path / "plain", **options | none)
    one = fit(straight, train, validation, epochs=8, run_dir=tmp_path / "a", **options)
    stopped = options | {"epochs": 8, "run_dir": tmp_path / "b"}
    fit(halves, train, validation, on_epoch=lambda row: row["epoch"] == 3, **stopped)
    two = fit(halves, train, validation, run_dir=tmp_path / "b", resume=True, **options)
    a, b = (read_checkpoint(tmp_path / run / "last.pt") for run in "ab")
    assert_equal_weights(a["model"], b["model"])
    assert [row["lr"] for row in one.history] == [row["lr"] for row in two.history]
    without = read_checkpoint(tmp_path / "plain" / "last.pt")["model"]
    assert not all(torch.equal(without[key], a["model"][key]) for key in without)
    for name in options.keys() & {"lr_schedule", "weight_decay", "clip_grad_norm"}:
        with pytest.raises(ValueError, match=f"fit: {name} must be .* as in the run to resume"):
            other = options | {name: "constant" if name == "lr_schedule" else 0.7}
            fit(halves, train, validation, run_dir=tmp_path / "b", resume=True, **other)


def test_a_cosine_ends_with_the_planned_epochs_and_stays_there_in_a_resume(tmp_path):
    train, _ = learnable()
    options = {"batch_size": 50, "lr_schedule": "cosine", "run_dir": tmp_path}
    first = fit(model(), train, epochs=10, **options)
    assert first.history[0]["lr"] == cosine_lr(1, 1e-3, 20)
    assert first.history[-1]["lr"] == cosine_lr(19, 1e-3, 20) < 2e-5
    more = fit(model(), train, epochs=12, resume=True, **options)
    assert [row["lr"] for row in more.history[10:]] == [pytest.approx(1e-5)] * 2


def test_a_plateau_halves_after_three_epochs_without_a_better_one(monkeypatch):
    forced_metrics(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.1])
    train, validation = learnable()
    options = {"lr_schedule": "plateau", "patience": 0, "epochs": 8}
    history = fit(model(), train, validation, **options).history
    assert [row["lr"] for row in history] == [1e-3] * 5 + [5e-4] * 3


def test_the_rate_that_is_told_is_the_rate_that_is_used(monkeypatch):
    used, step = [], Adam.step

    def record(self):
        used.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(Adam, "step", record)
    train, _ = learnable()
    history = fit(model(), train, epochs=3, batch_size=100, lr_schedule="cosine").history
    assert used == [row["lr"] for row in history] == [cosine_lr(n, 1e-3, 3) for n in range(3)]


def test_a_graph_follows_a_schedule_without_being_captured_anew(graphs, tmp_path):
    train, validation = learnable()
    options = {
        "lr_schedule": "cosine",
        "weight_decay": 0.1,
        "clip_grad_norm": 0.5,
        "batch_size": 25,
    }
    finals = []
    for run, cuda_graph in (("eager", False), ("graph", None)):
        net = model(make=MultiDAE)
        graphs.events.clear()
        more = options | {"cuda_graph": cuda_graph, "run_dir": tmp_path / run}
        stop = {"on_epoch": lambda row: row["epoch"] == 2}
        fit(net, train, validation, epochs=4, **more, **stop)
        fit(net, train, validation, resume=True, **more)
        finals.append(weights(net))
    once = ["eager"] * 3 + ["capture"] + ["replay"] * 5
    assert graphs.events == once * 2
    for name, eager in finals[0].items():  # the rate is fp32 on the device
        torch.testing.assert_close(finals[1][name], eager, rtol=1e-5, atol=1e-7)
    groups = read_checkpoint(tmp_path / "graph" / "last.pt")["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) for group in groups)


def test_decay_shrinks_the_matrices_and_leaves_the_biases(monkeypatch):
    # without gradients only the decay is left
    monkeypatch.setattr(torch.autograd, "grad", lambda outs, weights, *_, **__: [torch.zeros_like(w) for w in weights])  # fmt: skip
    train, _ = learnable()
    net = model()
    before = copy.deepcopy(weights(net))
    fit(net, train, epochs=1, batch_size=50, lr=0.1, weight_decay=0.5)
    for name, after in weights(net).items():
        factor = 0.95**2 if name.endswith("weight") else 1.0
        torch.testing.assert_close(after, factor * before[name])


def test_the_gradients_are_clipped_to_the_norm(monkeypatch):
    norms, step = [], Adam.step

    def record(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())
        step(self)

    monkeypatch.setattr(Adam, "step", record)
    for clip in (None, 0.5):
        fit(model(), learnable()[0], epochs=1, batch_size=100, clip_grad_norm=clip)
    assert norms[0] > 0.6 and norms[1] == pytest.approx(0.5, rel=1e-4)
