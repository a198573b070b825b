"""The training step: its gradients, its precision, and its replay as a CUDA graph."""

import contextlib
import math
import sys

import pytest
import torch
from helpers import random_clicks
from training import N_ITEMS, assert_equal_weights, model, weights

import fastvae.adam
from fastvae import Adam, MultiDAE, MultiVAE, fit
from fastvae._shadows import shadow_of
from fastvae.step import GraphedStep, backward_of_mean


def test_gradients_are_those_of_the_mean_over_users(monkeypatch):
    train, seen = random_clicks([3, 5] * 5, N_ITEMS), []
    step = Adam.step

    def record(self):
        seen.append(self.param_groups[0]["params"][-1].grad.clone())
        step(self)

    monkeypatch.setattr(Adam, "step", record)
    net = MultiDAE([4, N_ITEMS], dropout_enc=[0.0])
    loss = net.loss(train)
    loss.backward()
    expected = net.decode.output.bias.grad.clone()
    net.zero_grad()
    fit(net, train, epochs=1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [MultiVAE, MultiDAE])
@pytest.mark.parametrize("beta", [0.3, torch.tensor(0.3)], ids=["float", "tensor"])
def test_backward_of_the_mean_without_the_mean(make, beta):
    net, train, gradients = make([4, N_ITEMS]), random_clicks([3, 5, 0] * 5, N_ITEMS), []
    for backward in (
        lambda nll, kld: (nll + beta * kld).mean().backward(),
        lambda nll, kld: backward_of_mean(nll, kld, beta, list(net.parameters())),
    ):
        net.zero_grad()
        torch.manual_seed(0)
        backward(*net.loss_terms(train))
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_backward_leaves_gradients_as_they_come():
    wide = torch.ones(5, 8)

    class Apart(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum(1)

        @staticmethod
        def backward(ctx, dy):
            return wide[:, :4]

    weight, frozen = (torch.nn.Parameter(torch.zeros(5, 4)) for _ in range(2))
    frozen.grad = torch.ones(5, 4)
    backward_of_mean(Apart.apply(weight), torch.zeros(5), 0.1, [weight, frozen])
    assert weight.grad.data_ptr() == wide.data_ptr() and frozen.grad is None


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
        for p in optimizer.param_groups[0]["params"]:
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


def test_a_replay_reads_no_shadow_of_weights_that_were_loaded_since(monkeypatch):
    net, seen = MultiDAE([4, N_ITEMS]), []
    clicks = random_clicks([5] * 3, N_ITEMS).rows([2, 0, 1])
    optimizer = Adam(net.parameters(), shadow=True)
    monkeypatch.setattr(fastvae.adam, "uses_kernels", lambda t: True)
    weight = net.decode.output.weight

    class Graph:
        def replay(self):
            seen.append(shadow_of(weight)[:N_ITEMS].float())

    fakes = {"CUDAGraph": Graph, "graph": lambda _, stream: contextlib.nullcontext()}
    fakes |= dict.fromkeys(("Stream", "current_stream", "set_stream"), lambda _: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(clicks, beta):
        net.loss(clicks, beta).backward()
        optimizer.step()

    graphed = GraphedStep(step, clicks, optimizer)
    net.load_state_dict({k: torch.full_like(v, 3.0) for k, v in net.state_dict().items()})
    assert shadow_of(weight) is None
    graphed.replay(clicks, 0.1)
    assert torch.equal(seen[0], torch.full_like(weight, 3.0))
