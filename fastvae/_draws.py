"""The model's random draws: from torch's own generator, or from one that a training owns.

Two trainings in two threads would take draws from each other where both used torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Drawing(nn.Module):
    """A module that draws; generator None is torch's own of the device."""

    generator: torch.Generator | None = None
    # where the module sees some rows of a batch of which other processes see the others: these, and the batch's length
    share: tuple[slice, int] | None = None

    def draw_seed(self, device: torch.device) -> Tensor:
        """Seed of the dropout of clicks, int64 [1], on the device: a replayed graph draws a new one, nothing waits."""
        return torch.randint(2**63 - 1, (1,), device=device, generator=self.generator)

    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape and dtype of like."""
        if self.share is not None:
            own, n_users = self.share
            whole = like.new_empty((n_users, *like.shape[1:]))
            return whole.normal_(generator=self.generator)[own]
        if self.generator is None:
            return torch.randn_like(like)
        return torch.empty_like(like).normal_(generator=self.generator)

    def drop(self, h: Tensor, p: float) -> Tensor:
        """F.dropout of a module in training, which knows torch's own generator only; the same numbers from another."""
        if self.share is not None:
            own, n_users = self.share
            whole = self._drop(h.new_ones((n_users, *h.shape[1:])), p)
            return h * whole[own]
        return self._drop(h, p)

    def _drop(self, h: Tensor, p: float) -> Tensor:
        if self.generator is None or p == 1:
            return F.dropout(h, p)
        keep = torch.empty_like(h).bernoulli_(1 - p, generator=self.generator)
        return h * keep.div_(1 - p)


@contextlib.contextmanager
def drawing_from(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """For the block, let a model draw from a CPU generator; seeded alike, torch's own would give the same numbers."""
    parts = [part for part in model.modules() if isinstance(part, Drawing)]
    before = [part.generator for part in parts]
    for part in parts:
        part.generator = generator
    try:
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.generator = old


@contextlib.contextmanager
def seeded(
    model: Drawing, seed: int, state: Tensor | None = None, plain: bool = True
) -> Iterator[Callable[[], Tensor]]:
    """Draw dropout and noise from a seed, or from where an earlier block stopped; yields what says where it stands.

    plain  whether the model draws nothing by other means: a subclass may

    On a CPU the model draws from a generator of the block's own: trainings in threads do not meet. On a GPU it draws
    from the device's, as a CUDA graph does. The caller's state of torch's own generators comes back after the block.
    """
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        generator = torch.Generator("cpu") if device.type == "cpu" else own_generator(device)
        if device.type == "cpu":
            stack.enter_context(drawing_from(model, generator))
        if device.type != "cpu" or not plain:
            stack.enter_context(torch.random.fork_rng([] if device.type == "cpu" else [device]))
            torch.manual_seed(seed)
        generator.manual_seed(seed)
        if state is not None:
            generator.set_state(state.cpu())
        yield generator.get_state


def own_generator(device: torch.device) -> torch.Generator:
    """torch's own of a device."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
