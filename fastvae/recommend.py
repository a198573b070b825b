"""Top-k recommendation: score users in blocks, leave out what they have seen, keep the k best items.

    scores[u, i] = -inf where user u has clicked item i, else logits[u, i]
    items[u]     = the k items of highest score, the lower item index first where scores are equal

Memory is a few [block x items] buffers whatever the number of users: recommend_blocks hands out one block after
the other, write_recommendations writes them as they come. Every step is a plain torch op on the model's device;
evaluate.py ranks with the same functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .clicks import Clicks

BLOCK_BYTES = 2**29  # all buffers of a block of users together, where no block size is given
GROUP = 32  # items whose maximum stands for them in the first pass of top_k
MIN_ROWS = 16  # rows a model is called with at least: below 8, CPU matrix products round otherwise
_MAX_ITEM = 2**31 - 1


# ranking


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
    keys = torch.topk(_keys(scores, items), k, dim=1).values
    values, items = _scores_of(keys), _items_of(keys)
    return values, items.masked_fill_(values == -torch.inf, -1)


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
    chosen = _items_of(torch.topk(_keys(best, number[:n_groups]), k, dim=1).values)
    rows = (chosen + number[:n_users, None] * n_groups).view(-1)
    items = chosen[:, :, None] * GROUP + torch.arange(GROUP, device=scores.device)
    return groups.index_select(0, rows).view(n_users, -1), items.view(n_users, -1)


def _keys(scores: Tensor, items: Tensor) -> Tensor:
    """int64 keys in the order of top_k: the sortable bits of the score above, the item, reversed, below."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    bits ^= (bits >> 31).bitwise_and_(_MAX_ITEM)  # negative floats sort backwards
    keys = bits.masked_fill_(scores.isnan(), _MAX_ITEM).long()  # these bits are a NaN, above inf
    keys <<= 32
    keys |= _MAX_ITEM - items
    return keys


def _items_of(keys: Tensor) -> Tensor:
    return _MAX_ITEM - (keys & 0xFFFFFFFF)


def _scores_of(keys: Tensor) -> Tensor:
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _MAX_ITEM)).view(torch.float32)


# scores of blocks of users


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own training flag back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # not inference_mode: what a model keeps from a call (a cast, a transpose) must serve training later
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def check_model(name: str, model: Any) -> None:
    """TypeError unless model is a torch module that says its n_items."""
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "n_items", None), int):
        got = type(model).__name__
        raise TypeError(
            f"{name}: model must be a MultiVAE, a MultiDAE, or another torch module with n_items, got {got}"
        )


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Device of the model's first parameter or buffer; default for a model without any."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), default)


class BlockScorer:
    """Masked scores of consecutive users, in one buffer that every block reuses.

    model      called with block_size rows of clicks, the last time with fewer, but at least MIN_ROWS; gives
               logits, or a tuple that starts with them
    clicks     [n_users, n_items], on the model's device
    k          how many items will be ranked, for the default block size
    block_size rows a block, or None for as many as fit in BLOCK_BYTES
    keep_seen  leave the clicked items in

    scores(start) gives rows start .. start + block_size as [n, width] fp32, valid until the next call; width is
    n_items rounded up to a multiple of GROUP, and the columns beyond n_items are -inf.
    """

    def __init__(
        self,
        model: nn.Module,
        clicks: Clicks,
        k: int,
        block_size: int | None,
        keep_seen: bool = False,
    ):
        width = -(-clicks.n_items // GROUP) * GROUP
        if block_size is None:
            # logits and scores; keys with their temporaries; what evaluation holds for each rank
            row_bytes = 8 * width + 24 * _n_keys(width, k) + 64 * k
            block_size = max(MIN_ROWS, BLOCK_BYTES // max(1, row_bytes))
        self.model, self.clicks, self.keep_seen = model, clicks.compact(), keep_seen
        self.block_size = min(block_size, max(1, clicks.n_users))
        # read once, so that no block has to ask the device
        self.offsets = self.clicks.indptr.cpu().numpy()
        self.buffer = torch.full((self.block_size, width), -torch.inf, device=clicks.device)

    @property
    def starts(self) -> range:
        """First row of each block."""
        return range(0, self.clicks.n_users, self.block_size)

    def scores(self, start: int) -> Tensor:
        """Masked scores of the block that begins at row start."""
        stop = min(start + self.block_size, self.clicks.n_users)
        scores = self.buffer[: stop - start]
        # copied, not masked in place: the logits may be the model's own tensor
        scores[:, : self.clicks.n_items] = self._logits(start, stop)
        if not self.keep_seen:
            users, items = entries(self.clicks, self.offsets, start, stop)
            # a Python number would be copied to a GPU, and waited for
            scores.index_put_((users, items), scores.new_full((), -torch.inf))
        return scores

    def _logits(self, start: int, stop: int) -> Tensor:
        rows = torch.arange(start, max(stop, start + MIN_ROWS), device=self.clicks.device)
        batch = self.clicks.rows(rows.clamp_(max=stop - 1))
        with _evaluating(self.model):
            output = self.model(batch)
        logits = output[0] if isinstance(output, tuple) else output
        if logits.shape != batch.shape:
            raise ValueError(
                f"model: logits must have shape {list(batch.shape)}, got {list(logits.shape)}"
            )
        return logits[: stop - start]


def entries(clicks: Clicks, offsets: np.ndarray, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Row (counted from start) and item of each click in rows start .. stop; int64, in order.

    clicks   with arrays of its own (compact)
    offsets  clicks.indptr on the host, so that nothing here waits for a GPU
    """
    first, last = int(offsets[start]), int(offsets[stop])
    lengths = clicks.indptr[start + 1 : stop + 1] - clicks.indptr[start:stop]
    rows = torch.repeat_interleave(lengths, output_size=last - first)
    return rows, clicks.indices[first:last].long()


# recommendations


@dataclass(frozen=True, eq=False)
class Recommendations:
    """The k best items of each user, best first.

    items       [n_users, k] int64 item indices; -1 where fewer than k items were left
    scores      [n_users, k] fp32 logits; -inf there
    vocabulary  external item ids by item index, or None
    n_unknown   clicks of the histories on items outside the vocabulary, which were ignored

    len() is the number of users; iterating gives one list of (item, score) pairs per user, with external ids
    where the vocabulary is known.
    """

    items: Tensor
    scores: Tensor
    vocabulary: Sequence[str] | None = None
    n_unknown: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[list[tuple[Any, float]]]:
        names: list[list[Any]] = self._indices() if self.vocabulary is None else self.external()
        for user, scores in zip(names, self.scores.tolist(), strict=True):
            yield list(zip(user, scores, strict=False))  # scores are padded, user is not

    def _split(self, size: int) -> Iterator[Recommendations]:
        for items, scores in zip(self.items.split(size), self.scores.split(size), strict=True):
            yield Recommendations(items, scores, self.vocabulary)

    def _indices(self) -> list[list[int]]:
        return [[item for item in user if item >= 0] for user in self.items.tolist()]

    def external(self) -> list[list[str]]:
        """External ids of each user's items, best first; shorter than k where fewer items were left.

        Raises: ValueError where the recommendations have no vocabulary.
        """
        if self.vocabulary is None:
            raise ValueError(
                "external: vocabulary must be the external item ids, got None; "
                "pass items=... to recommend"
            )
        vocabulary = self.vocabulary
        return [[vocabulary[item] for item in user] for user in self._indices()]


def recommend(
    model: nn.Module,
    histories: Clicks | Sequence[Iterable[Any]],
    k: int = 10,
    *,
    items: Sequence[str] | None = None,
    keep_seen: bool = False,
    block_size: int | None = None,
) -> Recommendations:
    """The k items of highest score for each history, without the items in it.

        items[u] = argtop_k over i not in history u of logits[u, i]; ties: lower item index first

    >>> from fastvae.evaluate import Popularity
    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 1, 2, 1])
    >>> found = recommend(Popularity(train), [["b"], []], k=2, items=["a", "b", "c"])
    >>> found.external()
    [['a', 'c'], ['b', 'a']]
    >>> found.scores.tolist()
    [[1.0, 1.0], [3.0, 1.0]]

    model       a MultiVAE, a MultiDAE, or a module with n_items that maps Clicks to logits; called in eval mode
    histories   Clicks [n_users, n_items] (clicks.rows(ids) for some users; any matrix that Clicks takes), or a
                list of lists of external ids, which needs items. A user may come twice; a history may be empty
    k           int >= 1; the result has k columns also where the model has fewer items
    items       external ids, position = item index. Ids are compared as text, so 10 finds "10"
    keep_seen   rank the history's own items too; by default they are never recommended
    block_size  users scored at once, default by memory (BLOCK_BYTES in all). Items and scores of a user do not
                depend on it, nor on who else is asked for, as long as the model's own matrix products do not:
                on a CPU they do not, on a GPU they may round otherwise at another batch size
    returns     Recommendations, on the CPU

    Ids of a history that items does not have are ignored, counted (n_unknown) and warned about. Scores are
    compared in fp32. Raises: ValueError for sizes that do not fit, a k below 1, or scores that are not finite;
    TypeError for other kinds of argument. Source: Liang et al. 2018, section 2.4.
    """
    blocks = list(
        recommend_blocks(
            model, histories, k, items=items, keep_seen=keep_seen, block_size=block_size
        )
    )
    return Recommendations(
        torch.cat([torch.empty(0, k, dtype=torch.int64), *(block.items for block in blocks)]),
        torch.cat([torch.empty(0, k), *(block.scores for block in blocks)]),
        items,
        sum(block.n_unknown for block in blocks),
    )


def recommend_blocks(
    model: nn.Module,
    histories: Clicks | Sequence[Iterable[Any]],
    k: int = 10,
    *,
    items: Sequence[str] | None = None,
    keep_seen: bool = False,
    block_size: int | None = None,
) -> Iterator[Recommendations]:
    """As recommend, one block of users after the other: memory does not grow with their number.

    >>> from fastvae.evaluate import Popularity
    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 1, 2, 1])
    >>> [block.items.tolist() for block in recommend_blocks(Popularity(train), train, 1, block_size=2)]
    [[[2], [0]], [[0]]]

    Arguments are checked at the call, before the first block. Between blocks the model is as it was before.
    Raises and Source: as recommend.
    """
    _check_int("k", k)
    if block_size is not None:
        _check_int("block_size", block_size)
    check_model("recommend", model)
    if items is not None and len(items) != model.n_items:
        raise ValueError(
            f"recommend: items must have {model.n_items} ids like the model, got {len(items)}"
        )
    clicks, unknown = _histories(histories, items)
    if clicks.n_items != model.n_items:
        raise ValueError(
            f"recommend: histories must have {model.n_items} items like the model, got {clicks.n_items}"
        )
    clicks = clicks.to(device_of(model, clicks.device))
    return _blocks(BlockScorer(model, clicks, k, block_size, keep_seen), k, items, unknown)


def _blocks(
    scorer: BlockScorer, k: int, items: Sequence[str] | None, unknown: np.ndarray
) -> Iterator[Recommendations]:
    for start in scorer.starts:
        values, found = (tensor.cpu() for tensor in top_k(scorer.scores(start), k))
        bad = int((~(values[:, 0] < torch.inf)).sum()) if values.shape[1] else 0
        if bad:
            raise ValueError(
                f"recommend: model must give finite scores, got nan or inf for {bad} of users "
                f"{start}..{start + len(values) - 1}; load a checkpoint from before the loss diverged"
            )
        missing = k - values.shape[1]
        values = nn.functional.pad(values, (0, missing), value=-torch.inf)
        found = nn.functional.pad(found, (0, missing), value=-1)
        n_unknown = int(unknown[start : start + len(values)].sum())
        yield Recommendations(found, values, items, n_unknown)


def _histories(histories: Any, items: Sequence[str] | None) -> tuple[Clicks, np.ndarray]:
    """Histories as Clicks, and the number of unknown ids in each."""
    if not isinstance(histories, list | tuple):
        clicks = Clicks.from_matrix(histories)
        return clicks, np.zeros(clicks.n_users, np.int64)
    if items is None:
        raise ValueError(
            "recommend: items must be the external item ids where histories are lists, got None"
        )
    for history in histories:
        if isinstance(history, str) or not isinstance(history, Iterable):
            got = type(history).__name__
            raise TypeError(
                f"recommend: histories must be lists of item ids, got one that is {got}; wrap it in a list"
            )
    index = _index_of(items)
    rows = [[index.get(str(item), -1) for item in history] for history in histories]
    flat = np.fromiter(chain.from_iterable(rows), np.int64)
    users = np.repeat(np.arange(len(rows)), np.fromiter(map(len, rows), np.int64))
    known = flat >= 0
    unknown = np.bincount(users[~known], minlength=len(rows))
    if unknown.any():
        warnings.warn(
            f"recommend: {unknown.sum():,} of {len(flat):,} clicks in histories are on items that the "
            "model does not know; they are ignored",
            stacklevel=4,
        )
    return Clicks.from_pairs(users[known], flat[known], len(rows), len(items)), unknown


def _index_of(items: Sequence[str]) -> dict[str, int]:
    index = {str(item): position for position, item in enumerate(items)}
    if len(index) != len(items):
        again = next(item for position, item in enumerate(items) if index[str(item)] != position)
        raise ValueError(f"recommend: items must be distinct, got {str(again)!r} twice")
    return index


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"recommend: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"recommend: {name} must be at least 1, got {value}")
    if value >= 2**31:
        raise ValueError(f"recommend: {name} must be below 2**31, got {value}")
