"""Ranking by several processes: each scores its share of the users, or of the items, and all have the result.

users   the processes' values of their users behind one another
items   of the k best of each range, as keys of score and item, the k best of all: exact, ties included

A model that is whole in every process gives a user the scores of one process to the bit, however it is shared, where
the model's matrix products do: on a CPU in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._item_range import item_range
from ._last_layer import has_last_layer, logits_of_items
from .clicks import Clicks
from .parallel import Processes, digest_of
from .ranking import (
    MIN_ROWS,
    BlockScorer,
    block_of,
    default_block_size,
    evaluating,
    items_of,
    keys_of,
    scores_of,
)
from .rules import Rules

T = TypeVar("T")


class ScoredUsers:
    """Each process scores its share of the users with a whole model."""

    def __init__(self, processes: Processes):
        self.processes = processes

    def rows(self, n_users: int) -> slice:
        """The users that this process scores."""
        return self.processes.share(n_users)

    def scorer(self, model: nn.Module, clicks: Clicks, *options: Any) -> BlockScorer:
        """Of the users that this process scores, whose clicks are given."""
        return BlockScorer(model, clicks, *options)

    def scorer_of_all(self, model: nn.Module, clicks: Clicks, *options: Any) -> BlockScorer:
        """Of all users, for all processes."""
        return ShareScorer(self.processes, model, clicks, *options)

    def joined(self, t: Tensor, n_users: int) -> Tensor:
        """t [n, own users] of all processes, [n, n_users]."""
        return self.processes.joined(t.t(), n_users).t()

    def check_alike(self, where: str, model: nn.Module, **given: Any) -> None:
        """ValueError in all processes where one of them has another model or other arguments; collective."""
        # what has been cut differs, and is compared where it is trained
        if getattr(model, "part", None) is None:
            given["model"] = digest_of(model)
        self.processes.check_alike(where, parallel=self.processes.parallel, **given)

    def any(self, seen: Tensor) -> Tensor:
        """Where a process has true."""
        return self.processes.max(seen.to(torch.uint8)).bool()


class ScoredItems(ScoredUsers):
    """Each process scores its range of the items for all users."""

    def rows(self, n_users: int) -> slice:
        """All users."""
        return slice(0, n_users)

    def scorer(self, model: nn.Module, clicks: Clicks, *options: Any) -> BlockScorer:
        """Of all users."""
        return RangeScorer(self.processes, model, clicks, *options)

    scorer_of_all = scorer

    def joined(self, t: Tensor, n_users: int) -> Tensor:
        """t, which all processes have."""
        return t

    def any(self, seen: Tensor) -> Tensor:
        """seen, which all processes have."""
        return seen


class ShareScorer(BlockScorer):
    """As BlockScorer, whose blocks are scored by all processes, each a share of their users; best() is of all."""

    def __init__(self, processes: Processes, *args: Any):
        self.processes = processes
        super().__init__(*args)

    @property
    def starts(self) -> range:
        """First row of each block; a block is as many users as all processes score at once."""
        return range(0, self.clicks.n_users, self.block_size * self.processes.size)

    def best(self, start: int, k: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """As BlockScorer.best; collective."""
        if stop is None:
            stop = min(start + self.block_size * self.processes.size, self.clicks.n_users)
        own = self.processes.share(stop - start)
        k = min(k, self.buffer.shape[1])
        if own.start < own.stop:
            values, items = super().best(start + own.start, k, start + own.stop)
            keys = keys_of(values, items.clamp_min(0))
        else:
            keys = torch.empty(0, k, dtype=torch.int64, device=self.buffer.device)
        return _best_of(self.processes.joined(keys, stop - start))


class RangeScorer(BlockScorer):
    """As BlockScorer, whose scores are of this process' range of the items; best() is of all items.

    A whole model computes its first layers for all items, and its last one for the range: a first layer whose sums
    came from several processes would round otherwise. Of a model that ItemPart.cut has left the range, so it is.
    """

    def __init__(
        self,
        processes: Processes,
        model: nn.Module,
        clicks: Clicks,
        k: int,
        block_size: int | None = None,
        keep_seen: bool = False,
        rules: Rules | None = None,
    ):
        self.processes, self.n_items = processes, clicks.n_items
        # of the longest range: all processes must have the same blocks, and give as many items
        self.widest = -(-self.n_items // processes.size)
        if block_size is None:
            block_size = default_block_size(self.widest, k)
        own = processes.share(self.n_items)
        self.first, self.whole = own.start, clicks.compact()
        part, rules = (
            item_range(self.whole, own.start, own.stop),
            (rules or Rules()).within(own),
        )
        super().__init__(model, part, k, block_size, keep_seen, rules)
        if self.alone is not None:
            self.places, self.lead = self.alone + self.first, 0
        else:
            # with as many others as it takes
            start = max(0, min(self.first, self.n_items - MIN_ROWS))
            self.places = slice(start, max(own.stop, min(start + MIN_ROWS, self.n_items)))
            self.lead = self.first - start

    def best(self, start: int, k: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """As top_k of the scores of all items; collective."""
        values, items = super().best(start, k, stop)
        # as many of each process, also where its range has fewer, or none
        missing = min(k, self.widest) - values.shape[1]
        values = nn.functional.pad(values, (0, missing), value=-torch.inf)
        items = nn.functional.pad(items.clamp_min(0) + self.first, (0, missing))
        keys = torch.cat(self.processes.gather(keys_of(values, items)), 1)
        return _best_of(torch.topk(keys, min(k, keys.shape[1]), dim=1).values)

    def _logits(self, start: int, stop: int) -> Tensor:
        if self.model.part is not None:
            return super()._logits(start, stop)
        batch = block_of(self.whole, start, stop)
        with evaluating(self.model):
            logits = logits_of_items(self.model, batch, self.places)  # type: ignore[arg-type]
        return logits[: stop - start, self.lead : self.lead + self.n_scored]


def _best_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and items of sorted keys, as top_k gives them."""
    values = scores_of(keys)
    return values, items_of(keys).masked_fill_(values == -torch.inf, -1)


def shared_scores(where: str, model: nn.Module, processes: Processes) -> ScoredUsers:
    """How the processes of a group share the ranking of a model, which is whole or, after ItemPart.cut, a part.

    Raises: ValueError where the model's last layer has no rows of the items.
    """
    if processes.parallel == "users":
        return ScoredUsers(processes)
    if getattr(model, "part", None) is None and not has_last_layer(model):
        raise ValueError(
            f"{where}: parallel must be 'users' for a model that is not a MultiVAE or MultiDAE with a plain last "
            f"layer, got 'items' for {type(model).__name__}"
        )
    return ScoredItems(processes)


def made_by_first(
    processes: Processes, blocks: Iterator[T], make: Callable[[Iterable[T]], object]
) -> None:
    """Let process 0 make something of blocks that all processes compute; where it fails, all raise its error.

    Process 0 tells before each block that it goes on, so that no process waits for others that have left.
    """
    is_awaited = True

    def agreed() -> Iterator[T]:
        nonlocal is_awaited
        while True:
            processes.tell(None)
            is_awaited = False
            block = next(blocks, None)
            is_awaited = True
            if block is None:
                return
            yield block

    try:
        if processes.rank == 0:
            make(agreed())
        else:
            for _ in agreed():
                pass
    except Exception as error:
        # what goes wrong in a block itself does so in all of them
        if processes.rank == 0 and is_awaited:
            processes.tell(error)
        raise
    processes.tell(None)
