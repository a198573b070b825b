"""The training step's parts: Adam over views, one CUDA graph of the whole step, and the precision of products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .clicks import Clicks

GRAPH_WARM_UP = 3  # eager steps before a CUDA graph is captured


def backward_of_mean(nll: Tensor, kld: Tensor, beta: float | Tensor) -> None:
    """mean(nll + beta * kld).backward(): the two gradients are numbers, so the mean needs neither a graph nor launches.

    nll   [n_users]
    kld   [n_users], of a graph or plain zeros
    beta  a float or a scalar tensor
    """
    share = nll.new_full((), 1 / len(nll))
    gradients = {nll: share, kld: beta * share} if kld.requires_grad else {nll: share}
    torch.autograd.backward(
        list(gradients), [gradient.expand_as(t) for t, gradient in gradients.items()]
    )


class GraphedStep:
    """step(clicks, beta) as one CUDA graph; only the row ids and beta change between replays.

    clicks     a full batch, on which the step has run before: a capture cannot compile
    optimizer  the one that step calls
    """

    def __init__(
        self, step: Callable[[Clicks, Tensor], None], clicks: Clicks, optimizer: ItemMajorAdam
    ):
        device = clicks.device
        # row ids in memory of its own
        self.clicks = clicks.rows(torch.arange(len(clicks), device=device))
        self.beta = torch.zeros((), device=device)
        self.graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        try:
            # a stream of this device: torch's own choice stays on the GPU of the process's first capture
            with (
                optimizer.capturing(),
                torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device)),
            ):
                step(self.clicks, self.beta)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind

    def replay(self, clicks: Clicks, beta: float) -> None:
        """Run the step on another batch of the same matrix and size."""
        self.clicks.row_ids.copy_(clicks.row_ids)  # type: ignore[union-attr, arg-type]
        self.beta.fill_(beta)
        self.graph.replay()


class ItemMajorAdam:
    """torch's fused Adam over contiguous views: it copies a weight stored item-major to and fro otherwise (35 ms)."""

    def __init__(self, model: nn.Module, lr: float):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.views = [nn.Parameter(_row_major(p.detach())) for p in self.parameters]
        self.adam = torch.optim.Adam(self.views, lr=lr, fused=True)

    def step(self) -> None:
        """Update the model's weights from its gradients, and drop the gradients."""
        for p, view in zip(self.parameters, self.views, strict=True):
            view.grad = None if p.grad is None else _row_major(p.grad)
            p.grad = None
        self.adam.step()
        self.adam.zero_grad()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """While a CUDA graph is captured; eager steps with capturable=True would warn, and a checkpoint would keep it."""
        for group in self.adam.param_groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in self.adam.param_groups:
                group["capturable"] = False


def _row_major(t: Tensor) -> Tensor:
    return t.t() if t.ndim == 2 and not t.is_contiguous() and t.t().is_contiguous() else t


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products on a GPU by TF32 where precision is "tf32", and in full otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def get_rng(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())
