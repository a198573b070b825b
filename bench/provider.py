"""What a benchmark times: a model with its optimiser and the batch that it takes, eager or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BETA = 0.1
# eager steps before a capture, which can neither compile nor allocate an optimiser's state
WARM_UP = 3


class NotTimed(Exception):
    """Why a provider is left out."""


class Provider:
    """A model, its optimiser and the form of batch that it takes; step(batch) is what is timed."""

    def __init__(self, module: nn.Module, loss, optimizer, to_batch: Callable, bf16: bool):
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self.to_batch, self.bf16 = to_batch, bf16

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.loss(batch, BETA)

    def step(self, batch: Any) -> None:
        """Forward, backward, optimiser."""
        self.forward(batch).backward()
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)


class Captured(Provider):
    """The whole step on a dense batch as one CUDA graph, captured at the first call; on a CPU its steps stay eager."""

    static: Tensor | None = None  # the batch that the graph reads

    def step(self, batch: Tensor) -> None:
        """Copy the batch to where the graph reads it, and replay."""
        if self.static is None:
            self.static = batch.clone()
            self.replay = self._capture() if batch.is_cuda else self._eager
        self.static.copy_(batch)
        self.replay()

    def _eager(self) -> None:
        super().step(self.static)

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._eager()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager()
        return graph.replay
