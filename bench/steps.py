"""One training step, by several ways of computing it: the providers that bench ratio and pytest bench time.

A provider is prepared once with a model's weights and one batch's clicks, and then run step by step; each is first
checked against the dense reference, without dropout and noise, and refused if it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rivals
from bench.provider import BETA, NotTimed, Provider
from fastvae import Adam, Clicks, MultiVAE, reference
from fastvae.step import GraphedStep
from fastvae.synthetic import synthetic_clicks


@dataclass(frozen=True)
class Shape:
    """A data set's size; only as many users are made as the benchmark needs."""

    n_items: int
    clicks_per_user: float
    batch_size: int = 500

    def clicks(self, n_batches: int) -> Clicks:
        """Synthetic clicks of n_batches * batch_size users."""
        n_users = n_batches * self.batch_size
        return synthetic_clicks(n_users, self.n_items, int(n_users * self.clicks_per_user))


SHAPES = {
    "ml20m": Shape(20_108, 73.1),
    "netflix": Shape(17_769, 122.7),
    "msd": Shape(41_140, 58.8),
    "50k": Shape(50_000, 80.0),
    # for a GPU's memory
    "ml20m-4096": Shape(20_108, 73.1, 4096),
    "ml20m-24576": Shape(20_108, 73.1, 24_576),
    "50k-4096": Shape(50_000, 80.0, 4096),
    "1m-1024": Shape(1_000_000, 80.0, 1024),
    # for a rehearsal
    "toy": Shape(300, 8.0, 24),
}


class Graphed(Provider):
    """The step as fit() takes it: on a GPU a CUDA graph after its first steps, on a CPU eager."""

    def __init__(self, module, loss, optimizer, to_batch, bf16: bool):
        super().__init__(module, loss, optimizer, to_batch, bf16)
        self.graphed = GraphedStep(module, optimizer, precision="bf16" if bf16 else "fp32")

    def step(self, batch: Clicks) -> None:
        """Forward, backward, optimiser, replayed."""
        self.graphed(batch, BETA)


def _fastvae(model: MultiVAE, bf16: bool) -> Provider:
    adam = Adam(model.parameters(), 1e-3, shadow=bf16)
    return Provider(model, model.loss, adam, lambda clicks: clicks, bf16)


def _graphed(model: MultiVAE, bf16: bool) -> Provider:
    adam = Adam(model.parameters(), 1e-3, shadow=bf16)
    return Graphed(model, model.loss, adam, lambda clicks: clicks, bf16)


def _fastvae_drop_in(model: MultiVAE, bf16: bool) -> Provider:
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return Provider(model, model.loss, adam, lambda clicks: clicks, bf16)


class Products:
    """The floor: the three products of the last layer alone, 6 * n_users * n_items * 600 floating-point operations."""

    def __init__(self, model: MultiVAE, bf16: bool):
        weight = model.decode.output.weight.detach().to(torch.bfloat16 if bf16 else torch.float32)
        self.weight = F.pad(weight, (0, 0, 0, -len(weight) % rivals.ALIGNED))
        self.to_batch = self._buffers

    def _buffers(self, clicks: Clicks) -> list[Tensor]:
        hidden = torch.randn(len(clicks), self.weight.shape[1]).to(self.weight)
        # as the op has them on each
        shape = (len(clicks), len(self.weight))
        logits = hidden.new_empty(shape) if hidden.is_cuda else hidden.new_empty(shape[::-1]).t()
        return [hidden, logits, torch.empty_like(hidden), torch.empty_like(self.weight)]

    def step(self, buffers: list[Tensor]) -> None:
        """logits, gradient for hidden, gradient for the weight."""
        hidden, logits, dhidden, dweight = buffers
        torch.mm(hidden, self.weight.t(), out=logits)
        torch.mm(logits, self.weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)


FLOORS: dict[str, Callable[[MultiVAE], Products]] = {
    "products": lambda model: Products(model, False),
    "products-bf16": lambda model: Products(model, True),
}
PROVIDERS: dict[str, Callable[[MultiVAE], Provider]] = {
    "fastvae": lambda model: _fastvae(model, False),
    "fastvae-bf16": lambda model: _fastvae(model, True),
    "fastvae-graph": lambda model: _graphed(model, False),
    "fastvae-graph-bf16": lambda model: _graphed(model, True),
    "fastvae-loss-only": lambda model: _fastvae_drop_in(model, False),
    "dense": lambda model: rivals.dense(model, False, False, False),
    "dense-fused-adam": lambda model: rivals.dense(model, False, True, False),
    "dense-bf16": lambda model: rivals.dense(model, True, True, False),
    "dense-compiled": lambda model: rivals.dense(model, False, True, True),
    "dense-compiled-bf16": lambda model: rivals.dense(model, True, True, True),
    "dense-padded-graph": lambda model: rivals.padded_dense(model, False),
    "dense-padded-compiled-graph": lambda model: rivals.padded_dense(model, True),
    "embedding_bag": lambda model: rivals.sparse(model, rivals.EmbeddingBagModel),
    "pyg-cross-entropy": lambda model: rivals.sparse(model, rivals.SparseCrossEntropyModel),
    "linear-cross-entropy": lambda model: rivals.sparse(model, rivals.LinearCrossEntropyModel),
}


def new_model(n_items: int, device: str | torch.device = "cpu") -> MultiVAE:
    """The paper's widths; the same weights each time, on one device."""
    torch.manual_seed(0)
    with torch.device(device):
        return MultiVAE([200, 600, n_items])


def check(name: str, provider: Provider, clicks: Clicks) -> float:
    """check_gradient and check_step."""
    error = check_gradient(name, provider, clicks)
    check_step(name, provider, clicks)
    return error


def check_gradient(name: str, provider: Provider, clicks: Clicks) -> float:
    """Relative error of the gradient for the last weight against the dense reference; NotTimed if it is wrong."""
    expected = _true_gradient(clicks)
    provider.module.eval()
    provider.forward(provider.to_batch(clicks)).backward()
    provider.module.train()
    # the last weight; of a padded one the padding's gradient must be 0
    actual = next(
        p.grad for p in reversed(list(provider.module.parameters()))
        if p.ndim == 2 and p.shape[1] == expected.shape[1] and len(p) >= len(expected)
    )  # fmt: skip
    expected = F.pad(expected, (0, 0, 0, len(actual) - len(expected)))
    error = float((actual - expected).norm() / expected.norm())
    provider.module.zero_grad(set_to_none=True)
    if not error < (3e-2 if provider.bf16 else 1e-4):
        raise NotTimed(f"{name} is wrong by {error:.1e}")
    return error


def check_step(name: str, provider: Provider, clicks: Clicks) -> None:
    """Make the first step; NotTimed unless it changes every weight: one without an optimiser would be fast."""
    before = _sums(provider.module)
    provider.step(provider.to_batch(clicks))
    if any(a == b for a, b in zip(before, _sums(provider.module), strict=True)):
        raise NotTimed(f"{name} leaves weights as they are")


def _true_gradient(clicks: Clicks) -> Tensor:
    with torch.device(clicks.device):
        truth = reference.MultiVAE([200, 600, clicks.n_items]).eval()
    truth.load_state_dict(new_model(clicks.n_items, clicks.device).state_dict())
    truth.loss(clicks.to_dense(), BETA).backward()
    return truth.decoder[-1].weight.grad


def _sums(module: nn.Module) -> list[float]:
    return [p.detach().sum(dtype=torch.float64).item() for p in module.parameters()]
