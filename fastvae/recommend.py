"""Top-k recommendation: score users in blocks, leave out what they have seen and what the rules say, keep the best k.

Memory is a few [block x items] buffers whatever the number of users: recommend_blocks hands out one block after
the other, write_recommendations writes them as they come. ranking.py says which items are the best.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._agreement import checked_by_all
from ._checks import check_catalogue, check_ids, check_integer, first_of
from .clicks import Clicks
from .data import map_items
from .event_table import NoSuchColumn
from .events import REASONS
from .frames import events_from_frame, kind_of
from .ranking import BlockScorer, check_model, device_of, is_not_finite
from .rules import rules_of


@dataclass(frozen=True, eq=False)
class Recommendations:
    """The k best items of each user, best first.

    items       [n_users, k] int64 item indices; -1 where fewer than k items were left
    scores      [n_users, k] fp32 logits, less the penalty where one was given; -inf there
    vocabulary  external item ids by item index, str or int, or None
    n_unknown   clicks of the histories on items outside the vocabulary, which were ignored

    len() is the number of users; iterating gives one list of (item, score) pairs per user, with external ids
    where the vocabulary is known.
    """

    items: Tensor
    scores: Tensor
    vocabulary: Sequence[Any] | None = None
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

    def external(self) -> list[list[Any]]:
        """External ids of each user's items, best first; shorter than k where fewer items were left.

        Raises: ValueError where the recommendations have no vocabulary.
        """
        if self.vocabulary is None:
            raise ValueError(
                "external: vocabulary must be the external item ids, got None; "
                "pass items=... to recommend"
            )
        vocabulary = self.vocabulary
        if not isinstance(vocabulary, list):
            vocabulary = check_ids("external", "vocabulary", vocabulary)
        return [[vocabulary[item] for item in user] for user in self._indices()]


def recommend(
    model: nn.Module,
    histories: Any,
    k: int = 10,
    *,
    items: Iterable[Any] | None = None,
    keep_seen: bool = False,
    block_size: int | None = None,
    allowed: Iterable[Any] | None = None,
    exclude: Iterable[Any] | None = None,
    popularity_penalty: float = 0.0,
    popularity: Any = None,
    parallel: str | None = None,
    group: Any = None,
) -> Recommendations | Any:
    """The k items of highest score for each history, without the items in it.

        items[u]     = argtop_k over i in allowed, not in exclude nor in history u, of scores[u, i]
        scores[u, i] = logits[u, i] - popularity_penalty * log(max(popularity[i], 1))

    Ties: the lower item index first.

    >>> from fastvae.evaluate import Popularity
    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 1, 2, 1])
    >>> found = recommend(Popularity(train), [["b"], []], k=2, items=["a", "b", "c"])
    >>> found.external()
    [['a', 'c'], ['b', 'a']]
    >>> found.scores.tolist()
    [[1.0, 1.0], [3.0, 1.0]]
    >>> recommend(Popularity(train), [["b"]], k=2, items=["a", "b", "c"], exclude=["a"]).external()
    [['c']]

    model       a MultiVAE, a MultiDAE, or a module with n_items that maps Clicks to logits; called in eval mode
    histories   Clicks [n_users, n_items] (clicks.rows(ids) for some users; any matrix that Clicks takes), or a
                list of lists of external ids, which needs items. A user may come twice; a history may be empty.
                Or a pandas or polars DataFrame of clicks, which needs items: see recommend_to_frame
    k           int >= 1; the result has k columns also where the model has fewer items
    items       external ids, str or int, position = item index. Ids are compared as text, so 10 finds "10"
    keep_seen   rank the history's own items too; by default they are never recommended
    block_size  users scored at once, default by memory (BLOCK_BYTES in all). Items and scores of a user do not
                depend on it, nor on who else is asked for, as long as the model's own matrix products do not:
                on a CPU they do not, on a GPU they may round otherwise at another batch size
    allowed     the only items to choose from, by default all; ids where items is given, else positions. Of at most
                half of the items a MultiVAE or MultiDAE computes no other logits
    exclude     items that are never recommended, ids or positions likewise
    popularity_penalty  tau >= 0 in the formula above: less of what is popular; 0, the default, changes nothing
    popularity  for it: the training clicks, whose users per item are counted, or such counts [n_items]
    parallel    "users" or "items": each process of the group scores its share of them, and all have the whole result,
                that of one process; called by all of them with the same arguments. None: this process alone
    group       of torch.distributed; None: the default one
    returns     Recommendations, on the CPU; for a DataFrame one of the same library: user, rank, item and score

    Ids that items does not have are ignored and warned about, those of histories counted in n_unknown. Where fewer
    than k items are left, the list is shorter. Scores are compared in fp32. Raises: ValueError for sizes that do not
    fit, a k below 1, positions out of range, or scores that are not finite; TypeError for other kinds of argument.
    Source: Liang et al. 2018, section 2.4; the penalty: Menon et al. 2021 (arXiv:2007.07314), post-hoc adjustment.
    """
    if kind_of(histories) is not None:
        try:
            return recommended_frame(
                model, histories, k, items, keep_seen=keep_seen, block_size=block_size, allowed=allowed, exclude=exclude,
                popularity_penalty=popularity_penalty, popularity=popularity, parallel=parallel, group=group,
            )  # fmt: skip
        except NoSuchColumn as error:
            raise NoSuchColumn(
                f"recommend: histories must have a column of {error.role}s with a usual name, got none; "
                "recommend_to_frame takes the names of others",
                error.role,
            ) from error
    scorer, k, vocabulary, unknown = _checked(
        model, histories, k, items, keep_seen, block_size, parallel, group, allowed=allowed,
        exclude=exclude, popularity_penalty=popularity_penalty, popularity=popularity,
    )  # fmt: skip
    blocks = list(_blocks(scorer, k, vocabulary, unknown))
    # torch's default dtype and device are not asked: the result is fp32 on the CPU
    nothing = torch.empty(0, k, dtype=torch.float32, device="cpu")
    return Recommendations(
        torch.cat([nothing.long(), *(block.items for block in blocks)]),
        torch.cat([nothing, *(block.scores for block in blocks)]),
        vocabulary,
        int(unknown.sum()),
    )


def recommended_frame(
    model: nn.Module,
    frame: Any,
    k: int,
    items: Iterable[Any] | None,
    user: str | None = None,
    item: str | None = None,
    **options: Any,
) -> Any:
    """recommend_to_frame for a caller that is itself called by the user: warnings stand where that call does."""
    if items is None:
        raise ValueError(
            "recommend: items must be the external item ids where histories are a DataFrame, got None"
        )
    log = events_from_frame(frame, user, item)
    vocabulary = check_ids("recommend", "items", items)
    known, n_unknown = map_items(log.x, log.items, vocabulary)
    lost = {why: n for why, n in log.info["dropped"].items() if n and why != "duplicates"}
    if lost:
        reasons = "; ".join(f"{n:,} with {REASONS[why]}" for why, n in lost.items())
        warnings.warn(
            f"recommend: {sum(lost.values()):,} of {log.info['n_events']:,} rows of frame are no clicks, {reasons}",
            stacklevel=3,
        )
    if n_unknown:
        known_ids = set(map(str, vocabulary))
        unknown = first_of(item for item in log.items if item not in known_ids)
        warnings.warn(
            f"recommend: {n_unknown:,} of {log.x.nnz:,} clicks in frame are on items that the model does not know, such "
            f"as {unknown}; they are ignored",
            stacklevel=3,
        )
    found = recommend(model, known, k, items=vocabulary, **options)
    row, place = (index.numpy() for index in torch.nonzero(found.items >= 0, as_tuple=True))
    names = np.array([*map(str, vocabulary), ""], dtype=object)
    columns = {
        "user": log.users[row].tolist(),
        "rank": place + 1,
        "item": names[found.items[row, place].numpy()].tolist(),
        "score": found.scores[row, place].numpy(),
    }
    # the library is there: a frame of it was given
    return importlib.import_module(kind_of(frame) or "").DataFrame(columns)


def recommend_blocks(
    model: nn.Module,
    histories: Clicks | Sequence[Iterable[Any]],
    k: int = 10,
    *,
    items: Iterable[Any] | None = None,
    keep_seen: bool = False,
    block_size: int | None = None,
    allowed: Iterable[Any] | None = None,
    exclude: Iterable[Any] | None = None,
    popularity_penalty: float = 0.0,
    popularity: Any = None,
    parallel: str | None = None,
    group: Any = None,
) -> Iterator[Recommendations]:
    """As recommend, one block of users after the other: memory does not grow with their number.

    >>> from fastvae.evaluate import Popularity
    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 1, 2, 1])
    >>> [block.items.tolist() for block in recommend_blocks(Popularity(train), train, 1, block_size=2)]
    [[[2], [0]], [[0]]]

    Arguments are checked at the call, before the first block. Between blocks the model is as it was before. With
    parallel all processes have the same blocks, which each of them must take.
    Raises and Source: as recommend.
    """
    checked = _checked(
        model, histories, k, items, keep_seen, block_size, parallel, group, allowed=allowed,
        exclude=exclude, popularity_penalty=popularity_penalty, popularity=popularity,
    )  # fmt: skip
    return _blocks(*checked)


def _checked(
    model, histories, k, items, keep_seen, block_size, parallel, group, **rules: Any
) -> tuple[BlockScorer, int, list[Any] | None, np.ndarray]:
    """What _blocks takes, from the arguments of recommend."""
    with checked_by_all("recommend", parallel, group) as processes:
        k = check_integer("recommend", "k", k, 1)
        if block_size is not None:
            block_size = check_integer("recommend", "block_size", block_size, 1)
        n_items = check_model("recommend", model)
        vocabulary = None if items is None else check_ids("recommend", "items", items, n_items)
        left = rules_of(n_items, vocabulary, **rules)
        clicks, unknown = read_histories("recommend", model, histories, vocabulary, stacklevel=5)
        share = None
        if processes is not None:
            from ._parallel_scores import shared_scores

            share = shared_scores("recommend", model, processes)
    make_scorer: Callable[..., BlockScorer] = BlockScorer
    if share is not None:
        share.check_alike(
            "recommend", model, k=k, histories=clicks.fingerprint(), block_size=block_size, keep_seen=keep_seen,
            **left.told(),
        )  # fmt: skip
        make_scorer = share.scorer_of_all
    scorer = make_scorer(model, clicks, k, block_size, keep_seen, left)
    return scorer, k, vocabulary, unknown


def _blocks(
    scorer: BlockScorer, k: int, vocabulary: list[Any] | None, unknown: np.ndarray
) -> Iterator[Recommendations]:
    for start in scorer.starts:
        values, found = (t.cpu() for t in scorer.best(start, k))
        bad = is_not_finite(values)
        if bad.any():
            raise ValueError(
                f"recommend: model must give finite scores, got nan or inf for {int(bad.sum())} of users "
                f"{start}..{start + len(values) - 1}, first for user {start + int(bad.int().argmax())}; "
                "load a checkpoint from before the loss diverged"
            )
        missing = k - values.shape[1]
        values = nn.functional.pad(values, (0, missing), value=-torch.inf)
        found = nn.functional.pad(found, (0, missing), value=-1)
        n_unknown = int(unknown[start : start + len(values)].sum())
        yield Recommendations(found, values, vocabulary, n_unknown)


def read_histories(
    where: str, model: nn.Module, histories: Any, items: list[Any] | None, stacklevel: int
) -> tuple[Clicks, np.ndarray]:
    """Histories as Clicks of the model's items on its device, and the number of unknown ids in each.

    items       the model's external ids by position, or None
    stacklevel  of the warning about unknown ids, counted from _clicks_of
    """
    clicks, unknown = _clicks_of(where, histories, items, stacklevel)
    check_catalogue(where, "histories", clicks, check_model(where, model))
    return clicks.to(device_of(model, clicks.device)), unknown


def _plain(history: Any) -> Any:
    """torch's own list holds plain numbers; a tensor's parts have no ids for text."""
    return history.tolist() if isinstance(history, Tensor) else history


def _clicks_of(
    where: str, histories: Any, items: list[Any] | None, stacklevel: int
) -> tuple[Clicks, np.ndarray]:
    if not isinstance(histories, list | tuple):
        clicks = Clicks.from_matrix(histories)
        return clicks, np.zeros(clicks.n_users, np.int64)
    if items is None:
        raise ValueError(
            f"{where}: items must be the external item ids where histories are lists, got None"
        )
    for history in histories:
        if isinstance(history, str | bytes | Mapping) or not isinstance(history, Iterable):
            got = type(history).__name__
            raise TypeError(
                f"{where}: histories must be lists of item ids, got one that is {got}; wrap it in a list"
            )
    index = {str(item): position for position, item in enumerate(items)}
    rows = [[index.get(str(item), -1) for item in _plain(history)] for history in histories]
    flat = np.fromiter(chain.from_iterable(rows), np.int64)
    users = np.repeat(np.arange(len(rows)), np.fromiter(map(len, rows), np.int64))
    known = flat >= 0
    unknown = np.bincount(users[~known], minlength=len(rows))
    if unknown.any():
        # iterators are at their end by now and show none
        names = first_of(i for h in histories for i in _plain(h) if str(i) not in index)
        warnings.warn(
            f"{where}: {unknown.sum():,} of {len(flat):,} clicks in histories are on items that the "
            f"model does not know{names and f', such as {names}'}; they are ignored",
            stacklevel=stacklevel,
        )
    return Clicks.from_pairs(users[known], flat[known], len(rows), len(items)), unknown
