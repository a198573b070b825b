"""One training step, by several ways of computing it: the providers that bench ratio and pytest bench time.

A provider is prepared once with a model's weights and one batch's clicks, and then run step by step; each is first checked
against the dense reference, without dropout and noise, and refused if it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import Clicks, MultiVAE, reference
from fastvae.ops.linear_multinomial_nll import ITEMS_PER_GEMM
from fastvae.step import GRAPH_WARM_UP, GraphedStep, ItemMajorAdam
from fastvae.synthetic import synthetic_clicks

BETA = 0.1


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
}


class EmbeddingBagModel(nn.Module):
    """The usual way out: embedding_bag for the first layer, dense log_softmax and a gather for the loss."""

    def __init__(self, model: MultiVAE):
        super().__init__()
        dense = reference.MultiVAE(model.p_dims)
        dense.load_state_dict(model.state_dict())
        self.table = nn.Parameter(dense.encoder[0].weight.detach().t().contiguous())
        self.bias = nn.Parameter(dense.encoder[0].bias.detach())
        self.second, (self.third, self.last) = dense.encoder[1], dense.decoder

    def loss(self, clicks: Clicks, beta: float) -> Tensor:
        """Mean over users of nll + beta * kld."""
        batch = clicks.compact()
        item, lengths = batch.indices.long(), batch.row_lengths()
        user = torch.repeat_interleave(lengths)
        weights = lengths.float().rsqrt()[user]
        weights = F.dropout(weights, 0.5, self.training)
        h = F.embedding_bag(
            item, self.table, batch.indptr[:-1], mode="sum", per_sample_weights=weights
        )
        mu, logvar = self.second(torch.tanh(h + self.bias)).chunk(2, 1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu) if self.training else mu
        log_p = torch.log_softmax(self.last(torch.tanh(self.third(z))), 1)
        nll = -log_p[user, item].sum() / len(batch)
        return nll + beta * reference.kld(mu, logvar).mean()


class Provider:
    """A model, its optimiser and the form of batch that it takes; step(batch) is what is timed."""

    def __init__(self, module: nn.Module, loss, optimizer, to_batch, bf16: bool):
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self.to_batch, self.bf16 = to_batch, bf16

    def forward(self, batch) -> Tensor:
        """The loss of a batch."""
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.loss(batch, BETA)

    def step(self, batch) -> None:
        """Forward, backward, optimiser."""
        self.forward(batch).backward()
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)


class Graphed(Provider):
    """The step as one CUDA graph, captured at the first call, as in fit(cuda_graph=True)."""

    graph: GraphedStep | None = None

    def step(self, batch: Clicks) -> None:
        """Forward, backward, optimiser, replayed."""
        if self.graph is None:
            for _ in range(GRAPH_WARM_UP):
                super().step(batch)
            eager = super().step
            self.graph = GraphedStep(lambda clicks, _: eager(clicks), batch, self.optimizer)
        self.graph.replay(batch, BETA)


def _fastvae(model: MultiVAE, bf16: bool) -> Provider:
    return Provider(model, model.loss, ItemMajorAdam(model, 1e-3), lambda clicks: clicks, bf16)


def _graphed(model: MultiVAE, bf16: bool) -> Provider:
    return Graphed(model, model.loss, ItemMajorAdam(model, 1e-3), lambda clicks: clicks, bf16)


def _fastvae_drop_in(model: MultiVAE, bf16: bool) -> Provider:
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return Provider(model, model.loss, adam, lambda clicks: clicks, bf16)


def _dense(model: MultiVAE, bf16: bool, tuned: bool, compiled: bool) -> Provider:
    dense = reference.MultiVAE(model.p_dims).to(next(model.parameters()).device)
    dense.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(dense.parameters(), lr=1e-3, **({"fused": True} if tuned else {}))
    loss = torch.compile(dense.loss) if compiled else dense.loss
    # the dense batch is made outside the timed step: in its favour
    return Provider(dense, loss, adam, lambda clicks: clicks.to_dense(), bf16)


def _embedding_bag(model: MultiVAE, bf16: bool) -> Provider:
    module = EmbeddingBagModel(model).to(next(model.parameters()).device)
    adam = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    return Provider(module, module.loss, adam, lambda clicks: clicks, bf16)


class Products:
    """The floor: the three products of the last layer alone, 6 * n_users * n_items * 600 floating-point operations."""

    def __init__(self, model: MultiVAE, bf16: bool):
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.weight = model.decode.output.weight.detach().to(dtype)
        self.to_batch = self._buffers

    def _buffers(self, clicks: Clicks) -> list[Tensor]:
        new, (n_users, n_items) = self.weight.new_empty, clicks.shape
        hidden = torch.randn(n_users, self.weight.shape[1]).to(self.weight)
        return [
            hidden,
            new((n_users, n_items)),
            torch.empty_like(hidden),
            torch.empty_like(self.weight),
        ]

    def step(self, buffers: list[Tensor]) -> None:
        """logits, gradient for hidden, gradient for the weight."""
        hidden, logits, dhidden, dweight = buffers
        step = (
            ITEMS_PER_GEMM
            if hidden.dtype == torch.float32 and not hidden.is_cuda
            else len(self.weight)
        )
        for start in range(0, len(self.weight), step):
            part = slice(start, start + step)
            torch.mm(hidden, self.weight[part].t(), out=logits[:, part])
        torch.mm(logits, self.weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)


ON_GPU_ONLY = ("fastvae-graph", "fastvae-graph-bf16")
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
    "dense": lambda model: _dense(model, False, False, False),
    "dense-fused-adam": lambda model: _dense(model, False, True, False),
    "dense-bf16": lambda model: _dense(model, True, True, False),
    "dense-compiled": lambda model: _dense(model, False, True, True),
    "dense-compiled-bf16": lambda model: _dense(model, True, True, True),
    "embedding_bag": lambda model: _embedding_bag(model, False),
}


def new_model(n_items: int) -> MultiVAE:
    """The paper's widths; the same weights each time."""
    torch.manual_seed(0)
    return MultiVAE([200, 600, n_items])


def check(name: str, provider: Provider, clicks: Clicks) -> float:
    """Relative error of the loss's gradient for the last hidden weights against the dense reference; raises if wrong.

    Then a step is made, which must change every weight: one without an optimiser would be fast.
    """
    truth = reference.MultiVAE([200, 600, clicks.n_items]).to(clicks.device).eval()
    truth.load_state_dict(new_model(clicks.n_items).state_dict())
    truth.loss(clicks.to_dense(), BETA).backward()
    expected = truth.decoder[-1].weight.grad
    provider.module.eval()
    provider.forward(provider.to_batch(clicks)).backward()
    provider.module.train()
    actual = next(
        p.grad for p in reversed(list(provider.module.parameters())) if p.grad is not None and p.grad.shape == expected.shape
    )  # fmt: skip
    error = float((actual - expected).norm() / expected.norm())
    provider.module.zero_grad(set_to_none=True)
    if not error < (3e-2 if provider.bf16 else 1e-4):
        raise SystemExit(f"bench: {name} is wrong by {error:.1e}, so it is not timed")
    before = _sums(provider.module)
    provider.step(provider.to_batch(clicks))
    if any(a == b for a, b in zip(before, _sums(provider.module), strict=True)):
        raise SystemExit(f"bench: {name} leaves weights as they are, so it is not timed")
    return error


def _sums(module: nn.Module) -> list[float]:
    return [p.detach().sum(dtype=torch.float64).item() for p in module.parameters()]
