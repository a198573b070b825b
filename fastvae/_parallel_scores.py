"""Ranking by several processes: each scores its share of the users, or of the items, and all have the result.

users   the processes' values of their users behind one another
items   of the k best of each range, as keys of score and item, the k best of all: exact, ties included
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .parallel import ItemPart, Processes, check_cuttable
from .ranking import BlockScorer, default_block_size, items_of, keys_of, scores_of, top_k


class ScoredUsers:
    """Each process scores its share of the users with a whole model."""

    def __init__(self, processes: Processes):
        self.processes = processes

    def rows(self, n_users: int) -> slice:
        """The users that this process scores."""
        return self.processes.share(n_users)

    def scorer(self, model: nn.Module, clicks: Clicks, *options: Any) -> BlockScorer:
        """Of the users that this process scores."""
        return BlockScorer(model, clicks, *options)

    def joined(self, t: Tensor, n_users: int) -> Tensor:
        """t [n, own users] of all processes, [n, n_users]."""
        return self.processes.joined(t.t(), n_users).t()

    def any(self, seen: Tensor) -> Tensor:
        """Where a process has true."""
        return self.processes.max(seen.to(torch.uint8)).bool()


class ScoredItems(ScoredUsers):
    """Each process scores its range of the items for all users."""

    def __init__(self, processes: Processes, part: ItemPart):
        super().__init__(processes)
        self.part = part

    def rows(self, n_users: int) -> slice:
        """All users."""
        return slice(0, n_users)

    def scorer(self, model: nn.Module, clicks: Clicks, *options: Any) -> BlockScorer:
        """Of all users."""
        return RangeScorer(self.part, model, clicks, *options)

    def joined(self, t: Tensor, n_users: int) -> Tensor:
        """t, which all processes have."""
        return t

    def any(self, seen: Tensor) -> Tensor:
        """seen, which all processes have."""
        return seen


class RangeScorer(BlockScorer):
    """As BlockScorer, whose model and scores are of a range of the items; best() is of all items."""

    def __init__(self, part: ItemPart, model, clicks: Clicks, k: int, block_size=None, *options):
        if block_size is None:
            # by the longest range: all processes must have the same blocks
            widest = -(-part.n_items // part.processes.size)
            block_size = default_block_size(widest, k)
        self.part = part
        super().__init__(model, part.clicks(clicks.compact()), k, block_size, *options)

    def best(self, start: int, k: int) -> tuple[Tensor, Tensor]:
        """As top_k of the scores of all items; collective."""
        values, items = top_k(self.scores(start), k)
        n_users, n_found = values.shape
        keys = keys_of(values.new_full((1, 1), -torch.inf), items.new_zeros(1, 1)).repeat(
            n_users, k
        )
        keys[:, :n_found] = keys_of(values, items.clamp_min(0) + self.part.first)
        keys = torch.cat(self.part.processes.gather(keys), 1)
        best = torch.topk(keys, min(k, self.part.n_items), dim=1).values
        values = scores_of(best)
        return values, items_of(best).masked_fill_(values == -torch.inf, -1)


@contextlib.contextmanager
def shared_scores(where: str, model: nn.Module, parallel: str, group: Any) -> Iterator[ScoredUsers]:
    """How the processes of a group share the ranking of a model, which is whole or, after ItemPart.cut, a part.

    Raises: ValueError where there is no group, or the model cannot be cut.
    """
    processes = Processes(where, parallel, group)
    if parallel == "users":
        yield ScoredUsers(processes)
        return
    if not isinstance(model, MultiVAE | MultiDAE):
        raise ValueError(
            f"{where}: parallel must be 'users' for a model that is no MultiVAE or MultiDAE, got 'items'"
        )
    if model.part is not None:
        yield ScoredItems(processes, model.part)
        return
    check_cuttable(where, model)
    part = ItemPart(processes, model)
    with part.lent(model):
        yield ScoredItems(processes, part)
