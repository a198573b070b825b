"""CUDA graphs of training steps: capture and replay, and what a graph asks of an optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._checks import check_flag
from .clicks import Clicks


class Graph:
    """step(clicks) as a CUDA graph; only the row ids change between replays."""

    def __init__(self, step: Callable[[Clicks], Tensor], clicks: Clicks):
        device = clicks.device
        # row ids in memory of its own
        self.clicks = clicks.rows(torch.arange(len(clicks), device=device))
        self._run = capture(lambda: self._keep(step(self.clicks)), device)

    def _keep(self, terms: Tensor) -> None:
        self.terms = terms

    def replay(self, clicks: Clicks) -> Tensor:
        """Run the step on another batch of the same matrix and size."""
        ids = clicks.row_ids
        if ids is None:
            ids = torch.arange(len(clicks), device=clicks.device)
        self.clicks.row_ids.copy_(ids)  # type: ignore[union-attr]
        self._run()
        return self.terms


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The launches of run() as one CUDA graph, and what replays them; run itself has no effect yet."""
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(device)
    try:
        # a stream of this device: torch's own choice stays on the GPU of the process's first capture
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            run()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
    return graph.replay


def can_capture(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda"


def wants_graph(where: str, cuda_graph: bool | None, device: torch.device) -> bool:
    """Whether to replay graphs on a device. Raises: ValueError where they are demanded and there are none."""
    wanted = cuda_graph is None or check_flag(where, "cuda_graph", cuda_graph)
    if cuda_graph and not can_capture(device):
        raise ValueError(
            f"{where}: cuda_graph must be None or False where the model is not on a GPU, got True"
        )
    return wanted and can_capture(device)


def address_of(value: Any) -> Hashable:
    """Where a tensor lies, or a number itself: what a graph holds of it."""
    return value.data_ptr() if isinstance(value, Tensor) else value


def check_capturable(where: str, optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless the optimiser counts its steps on the device."""
    for group in optimizer.param_groups:
        if "capturable" in group and not (group["capturable"] or group.get("fused")):
            raise ValueError(
                f"{where}: optimizer must be made with fused=True or capturable=True for a CUDA graph, got neither; "
                "or pass cuda_graph=False"
            )


@contextlib.contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """For a capture only: eager steps with capturable=True would warn, and a checkpoint would keep it."""
    groups = [g for g in optimizer.param_groups if g.get("fused") and not g.get("capturable", True)]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
