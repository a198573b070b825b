"""Ranking: the k best items of each user, from scores of blocks of users in bounded memory.

    scores[u, i] = -inf where user u has clicked item i, or the rules leave it out, else logits[u, i] - penalty[i]
    items[u]     = the k items of highest score, the lower item index first where scores are equal

Every step is a plain torch op on the model's device. recommend.py and evaluate.py rank with these functions.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ._last_layer import has_last_layer, logits_of_items
from .clicks import Clicks
from .rules import Rules

# all buffers of a block of users together, where no block size is given
BLOCK_BYTES = 2**29
# items whose maximum stands for them in the first pass of top_k
GROUP = 32
# rows a model is called with at least, and items that are scored alone: CPU matrix products round otherwise below 8
MIN_ROWS = 16
_MAX_ITEM = 2**31 - 1


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row and their items, best first; of equal scores the lower item first.

    >>> values, items = top_k(torch.tensor([[0.5, 2.0, 0.5, -float("inf")]]), 4)
    >>> items.tolist()
    [[1, 0, 2, -1]]

    scores   [n_users, n_items] fp32; items of score -inf are left out; a NaN counts as highest
    k        int >= 1; cut to n_items
    returns  values [n_users, k] fp32, -inf where there is no item left; items [n_users, k] int64, -1 there

    The order is exact, whatever torch.topk does with equal scores: it sorts int64 keys of score and item, which
    are all different. To keep that cheap the keys are built for few items only: the k best groups of 32 items,
    by their best item, hold the k best items.
    """
    n_users, width = scores.shape
    k = min(k, width)
    if n_users == 0 or k == 0:
        return scores.new_empty(n_users, k), torch.empty_like(scores[:, :k], dtype=torch.int64)
    items = torch.arange(width, device=scores.device)
    if _n_keys(width, k) < width:
        scores, items = _candidates(scores, k)
    keys = torch.topk(keys_of(scores, items), k, dim=1).values
    values, items = scores_of(keys), items_of(keys)
    return values, items.masked_fill_(values == -torch.inf, -1)


def is_not_finite(best: Tensor) -> Tensor:
    """Which users have a score of nan or inf, bool [n_users]; best [n_users, k] is top_k's, which ranks them first."""
    return ~(best[:, :1] < torch.inf).all(1)


def _n_keys(width: int, k: int) -> int:
    """How many keys top_k builds for a row: groups and candidates, or all items where that saves too little."""
    grouped = width // GROUP + k * GROUP
    return grouped if grouped <= width // 2 else width


def _candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and items [n_users, k * GROUP] of the k groups with the best items."""
    if scores.shape[1] % GROUP:
        scores = nn.functional.pad(scores, (0, -scores.shape[1] % GROUP), value=-torch.inf)
    n_users, n_groups = len(scores), scores.shape[1] // GROUP
    groups = scores.reshape(-1, GROUP)
    number = torch.arange(max(n_users, n_groups), device=scores.device)
    best = groups.amax(1).view(n_users, n_groups)
    chosen = items_of(torch.topk(keys_of(best, number[:n_groups]), k, dim=1).values)
    rows = (chosen + number[:n_users, None] * n_groups).view(-1)
    items = chosen[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)
    return groups.index_select(0, rows).view(n_users, -1), items.view(n_users, -1)


def keys_of(scores: Tensor, items: Tensor) -> Tensor:
    """int64 keys in the order of top_k: the sortable bits of the score above, the item, reversed, below."""
    # + 0.0 makes -0.0 equal to 0.0
    bits = (scores + 0.0).view(torch.int32)
    # negative floats sort backwards
    bits ^= (bits >> 31).bitwise_and_(_MAX_ITEM)
    # these bits are a NaN, above inf
    keys = bits.masked_fill_(scores.isnan(), _MAX_ITEM).long()
    keys <<= 32
    keys |= _MAX_ITEM - items
    return keys


def items_of(keys: Tensor) -> Tensor:
    """The items of keys."""
    return _MAX_ITEM - (keys & 0xFFFFFFFF)


def scores_of(keys: Tensor) -> Tensor:
    """The scores of keys, fp32."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _MAX_ITEM)).view(torch.float32)


# scores of blocks of users


class _Evaluated:
    """The models that are in eval mode for a call, with the modes of before: several threads may share a model."""

    lock = threading.Lock()
    modes: ClassVar[dict[nn.Module, list[tuple[nn.Module, bool]]]] = {}
    calls: ClassVar[Counter[nn.Module]] = Counter()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; after the last thread's block each module has its own training flag back."""
    with _Evaluated.lock:
        if not _Evaluated.calls[model]:
            _Evaluated.modes[model] = [(module, module.training) for module in model.modules()]
        _Evaluated.calls[model] += 1
        model.eval()
    try:
        # not inference_mode: what a model keeps from a call (a cast, a transpose) must serve training later
        with torch.no_grad():
            yield
    finally:
        with _Evaluated.lock:
            _Evaluated.calls[model] -= 1
            if not _Evaluated.calls[model]:
                del _Evaluated.calls[model]
                for module, training in _Evaluated.modes.pop(model):
                    module.training = training


def check_model(where: str, model: Any) -> int:
    """The model's n_items; TypeError unless model is a torch module that says them, ValueError where it is empty."""
    n_items = getattr(model, "n_items", None)
    if not isinstance(model, nn.Module) or not isinstance(n_items, int):
        got = type(model).__name__
        raise TypeError(
            f"{where}: model must be a MultiVAE, a MultiDAE, or another torch module with n_items, got {got}"
        )
    if any(t.is_meta for t in chain(model.parameters(), model.buffers())):
        raise ValueError(
            f"{where}: model must have weights in memory, got the device meta; load weights into it"
        )
    # of a model whose other items are with other processes, those of all
    part = getattr(model, "part", None)
    return n_items if part is None else part.n_items


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Device of the model's first parameter or buffer; default for a model without any."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), default)


def default_block_size(n_items: int, k: int, more: int = 0) -> int:
    """Users whose scores and k best items are found in BLOCK_BYTES, with so many bytes more of each."""
    width = -(-n_items // GROUP) * GROUP
    # logits and scores; keys with their temporaries; what evaluation holds for each rank
    row_bytes = 8 * width + 24 * _n_keys(width, k) + 64 * k + more
    return max(MIN_ROWS, BLOCK_BYTES // max(1, row_bytes))


class BlockScorer:
    """Masked scores of consecutive users, in one buffer that every block reuses.

    model      called with block_size rows of clicks, the last time with fewer, but at least MIN_ROWS; gives
               logits, or a tuple that starts with them
    clicks     [n_users, n_items], on the model's device
    k          how many items will be ranked, for the default block size
    block_size rows a block, or None for as many as fit in BLOCK_BYTES
    keep_seen  leave the clicked items in
    rules      which items are scored, and what is taken from their logits; by default all, and nothing

    scores(start) gives rows start .. start + block_size as [n, width] fp32, valid until the next call; width is
    n_items rounded up to a multiple of GROUP, and the columns beyond n_items are -inf. Under rules that leave at most
    half of the items, a column stands for each item left: items(columns) says for which.
    """

    def __init__(
        self,
        model: nn.Module,
        clicks: Clicks,
        k: int,
        block_size: int | None,
        keep_seen: bool = False,
        rules: Rules | None = None,
    ):
        rules = (rules or Rules()).to(clicks.device)
        self.model, self.clicks, self.keep_seen = model, clicks.compact(), keep_seen
        self.chosen, self.left_out = _columns(rules.columns, clicks.n_items)
        self.penalty = rules.penalty
        self.n_scored = clicks.n_items if self.chosen is None else len(self.chosen)
        # a column more than items left: clicks on the others are masked there
        width = -(-(self.n_scored + (self.chosen is not None)) // GROUP) * GROUP
        self._choose(clicks.n_items, width)
        if block_size is None:
            more = 4 * clicks.n_items if self.chosen is not None and self.alone is None else 0
            block_size = default_block_size(width, k, more)
        self.block_size = min(block_size, max(1, clicks.n_users))
        # read once, so that no block has to ask the device
        self.offsets = self.clicks.indptr.cpu().numpy()
        self.buffer = torch.full(
            (self.block_size, width), -torch.inf, dtype=torch.float32, device=clicks.device
        )

    def _choose(self, n_items: int, width: int) -> None:
        """What items and columns are of each other, where not all items are scored."""
        # the items that are scored without the others, or None where the model is called as a whole
        self.alone: Tensor | None = None
        if self.chosen is None:
            return
        if self.penalty is not None:
            self.penalty = self.penalty[self.chosen]
        self.column = torch.full((n_items,), width - 1, device=self.chosen.device)
        self.column[self.chosen] = torch.arange(self.n_scored, device=self.chosen.device)
        # -1, for no item, finds the last one
        self.item = nn.functional.pad(self.chosen, (0, 1), value=-1)
        if has_last_layer(self.model):
            missing = max(0, MIN_ROWS - self.n_scored)
            self.alone = nn.functional.pad(self.chosen, (0, missing))

    @property
    def starts(self) -> range:
        """First row of each block."""
        return range(0, self.clicks.n_users, self.block_size)

    def scores(self, start: int, stop: int | None = None) -> Tensor:
        """Masked scores of rows start .. stop, by default of the block that begins at start."""
        if stop is None:
            stop = min(start + self.block_size, self.clicks.n_users)
        scores = self.buffer[: stop - start]
        # copied, not masked in place: the logits may be the model's own tensor
        scores[:, : self.n_scored] = self._logits(start, stop)
        if self.penalty is not None:
            scores[:, : self.n_scored] -= self.penalty
        if self.left_out is not None:
            scores.index_fill_(1, self.left_out, -torch.inf)
        if not self.keep_seen:
            users, items = entries(self.clicks, self.offsets, start, stop)
            columns = items if self.chosen is None else self.column[items]
            # a Python number would be copied to a GPU, and waited for
            scores.index_put_((users, columns), scores.new_full((), -torch.inf))
        return scores

    def items(self, columns: Tensor) -> Tensor:
        """Items of columns of scores, both int64; -1 stays -1."""
        return columns if self.chosen is None else self.item[columns]

    def best(self, start: int, k: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """The k highest scores of the rows of scores, and their items, as top_k gives them."""
        values, columns = top_k(self.scores(start, stop), k)
        return values, self.items(columns)

    def _logits(self, start: int, stop: int) -> Tensor:
        batch = block_of(self.clicks, start, stop)
        with evaluating(self.model):
            if self.alone is not None:
                logits = logits_of_items(self.model, batch, self.alone)  # type: ignore[arg-type]
                return logits[: stop - start, : self.n_scored]
            output = self.model(batch)
        logits = output[0] if isinstance(output, tuple) else output
        if logits.shape != batch.shape:
            raise ValueError(
                f"model: logits must have shape {list(batch.shape)}, got {list(logits.shape)}"
            )
        logits = logits[: stop - start]
        return logits if self.chosen is None else logits.index_select(1, self.chosen)


def _columns(left: Tensor | None, n_items: int) -> tuple[Tensor | None, Tensor | None]:
    """Of the items left: those to score, where they are at most half, or those to mask."""
    # to copy more scores, or weight rows, than half takes longer than to mask the others
    if left is None or len(left) <= n_items // 2:
        return left, None
    mask = torch.ones(n_items, dtype=torch.bool, device=left.device)
    mask[left] = False
    return None, mask.nonzero()[:, 0]


def block_of(clicks: Clicks, start: int, stop: int) -> Clicks:
    """Rows start .. stop, the last of them repeated up to MIN_ROWS: what a model is called with."""
    rows = torch.arange(start, max(stop, start + MIN_ROWS), device=clicks.device)
    return clicks.rows(rows.clamp_(max=stop - 1))


def entries(clicks: Clicks, offsets: np.ndarray, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Row (counted from start) and item of each click in rows start .. stop; int64, in order.

    clicks   with arrays of its own (compact)
    offsets  clicks.indptr on the host, so that nothing here waits for a GPU
    """
    first, last = int(offsets[start]), int(offsets[stop])
    lengths = clicks.indptr[start + 1 : stop + 1] - clicks.indptr[start:stop]
    rows = torch.repeat_interleave(lengths, output_size=last - first)
    return rows, clicks.indices[first:last].long()
