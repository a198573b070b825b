"""The training step's parts: the gradient of the mean, one CUDA graph of the whole step, and the precision of products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ._shadows import captured
from .adam import Adam
from .clicks import Clicks

GRAPH_WARM_UP = 3  # eager steps before a CUDA graph is captured


def backward_of_mean(
    nll: Tensor, kld: Tensor, beta: float | Tensor, weights: Sequence[Tensor]
) -> None:
    """mean(nll + beta * kld).backward(), with less to do.

    The mean's two gradients are numbers, so it needs neither a graph nor launches. The weights' gradients are set, not
    added: torch's own backward copies one whose rows lie apart, as the last weight's, which Adam takes as it is.

    nll      [n_users]
    kld      [n_users], of a graph or plain zeros
    beta     a float or a scalar tensor
    weights  whose .grad is set; None where the loss does not depend on one
    """
    share = nll.new_full((), 1 / len(nll))
    gradients = {nll: share, kld: beta * share} if kld.requires_grad else {nll: share}
    upstream = [gradient.expand_as(t) for t, gradient in gradients.items()]
    results = torch.autograd.grad(list(gradients), weights, upstream, allow_unused=True)
    for weight, gradient in zip(weights, results, strict=True):
        weight.grad = gradient


class GraphedStep:
    """step(clicks, beta) as one CUDA graph; only the row ids and beta change between replays.

    clicks     a full batch, on which the step has run before: a capture cannot compile
    optimizer  the one that step calls
    """

    def __init__(self, step: Callable[[Clicks, Tensor], None], clicks: Clicks, optimizer: Adam):
        device = clicks.device
        # row ids in memory of its own
        self.clicks = clicks.rows(torch.arange(len(clicks), device=device))
        self.beta = torch.zeros((), device=device)
        self.optimizer = optimizer
        self.graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        try:
            # a stream of this device: torch's own choice stays on the GPU of the process's first capture
            with captured(), torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device)):
                step(self.clicks, self.beta)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind

    def replay(self, clicks: Clicks, beta: float) -> None:
        """Run the step on another batch of the same matrix and size."""
        self.clicks.row_ids.copy_(clicks.row_ids)  # type: ignore[union-attr, arg-type]
        self.beta.fill_(beta)
        self.optimizer.refresh_shadows()  # the graph reads them
        self.graph.replay()


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
