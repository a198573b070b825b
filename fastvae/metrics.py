"""Ranking metrics of each user, all from one exact list: the k best items that are not in the fold-in.

    hit[u, r]  = whether the item at rank r of user u is held out      n[u] = number of held-out items of u
    ndcg       = sum over r <= k of hit / log2(r + 1)  /  sum over r <= min(k, n) of 1 / log2(r + 1)
    recall     = sum over r <= k of hit / min(k, n)
    precision  = sum over r <= k of hit / k
    map        = sum over r <= k of hit * (hits up to r) / r  /  min(k, n)
    mrr        = 1 / rank of the first hit, 0 where that is beyond k
    hit        = 1 where there is a hit at a rank <= k, else 0
    novelty    = mean over the k items of -log2(share of the training users who clicked the item)     bits
    coverage   = share of all items that are among the k items of at least one user

Ties go to the lower item index (ranking.top_k). A k above n_items means n_items. Sums are taken over integers or over one
user's row, so a user's values are the same in any block. novelty and coverage do not ask what is held out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_catalogue, check_integer
from .clicks import Clicks
from .ranking import entries, is_not_finite, top_k

# of users, by what is held out; by the training clicks; of all users together
HELD_OUT = ("ndcg", "recall", "precision", "map", "mrr", "hit")
KINDS = (*HELD_OUT, "novelty", "coverage")
# gains are summed as integers of these units: exact, so in any order the same
_UNIT, _BITS_UNIT = 2**40, 2**32


def ndcg_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """NDCG@k of each user with binary relevance.

        ndcg[u] = sum over r <= k, item at rank r held out, of 1/log2(r + 1)
                  / sum over r <= min(k, n_held_out[u]) of 1/log2(r + 1)

    >>> scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> ndcg_at_k(scores, Clicks([0, 1, 1], [1], n_items=3), k=3)
    tensor([0.6309,    nan], dtype=torch.float64)

    scores    [n_users, n_items] any float type, compared in fp32; -inf for fold-in items, which never count
    held_out  Clicks [n_users, n_items], or any matrix that Clicks takes; values do not matter
    k         int >= 1; above n_items it means n_items
    returns   [n_users] float64 in 0..1, nan for a user without held-out items; not differentiable

    Raises: ValueError for shapes that differ, a k below 1, or scores of nan or inf; TypeError for scores that are
    not floats.
    Source: NDCG_binary_at_k_batch of vae_cf; ties here go to the lower item index.
    """
    return _metric_at_k("ndcg", scores, held_out, k)


def recall_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """Recall@k of each user, divided by what k items can reach.

        recall[u] = (held-out items among the k best) / min(k, n_held_out[u])

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> recall_at_k(scores, Clicks([0, 2], [1, 2], n_items=3), k=2)
    tensor([0.5000], dtype=torch.float64)

    Arguments, returns and Raises as ndcg_at_k. Source: Recall_at_k_batch of vae_cf.
    """
    return _metric_at_k("recall", scores, held_out, k)


def precision_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """Precision@k of each user: the share of the k places that hold a held-out item.

        precision[u] = (held-out items among the k best) / k

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> precision_at_k(scores, Clicks([0, 2], [1, 2], n_items=3), k=2)
    tensor([0.5000], dtype=torch.float64)

    A place without an item is a miss. Arguments, returns and Raises as ndcg_at_k. Source: P_k of trec_eval; Herlocker
    et al. 2004, Evaluating collaborative filtering recommender systems, section 4.2.
    """
    return _metric_at_k("precision", scores, held_out, k)


def map_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """Average precision at k of each user; the mean over users is MAP@k.

        ap[u] = sum over r <= k, item at rank r held out, of (held-out items up to rank r) / r  /  min(k, n_held_out[u])

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> map_at_k(scores, Clicks([0, 2], [0, 2], n_items=3), k=3)
    tensor([0.8333], dtype=torch.float64)

    Arguments, returns and Raises as ndcg_at_k. Source: McFee et al. 2012, The Million Song Dataset Challenge,
    section 4.1, which divides by min(k, n_held_out) likewise.
    """
    return _metric_at_k("map", scores, held_out, k)


def mrr_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """Reciprocal rank of each user's first hit, 0 where that is beyond k; the mean over users is MRR@k.

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> mrr_at_k(scores, Clicks([0, 1], [1], n_items=3), k=3)
    tensor([0.5000], dtype=torch.float64)

    Arguments, returns and Raises as ndcg_at_k. Source: Voorhees 1999, The TREC-8 question answering track report.
    """
    return _metric_at_k("mrr", scores, held_out, k)


def hit_at_k(scores: Tensor, held_out: Any, k: int) -> Tensor:
    """1 for a user with a held-out item among the k best, else 0; the mean over users is the hit rate.

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> hit_at_k(scores, Clicks([0, 1], [1], n_items=3), k=1)
    tensor([0.], dtype=torch.float64)

    Arguments, returns and Raises as ndcg_at_k. Source: Deshpande and Karypis 2004, Item-based top-n recommendation
    algorithms, section 6.2.
    """
    return _metric_at_k("hit", scores, held_out, k)


def novelty_at_k(scores: Tensor, train: Clicks, k: int) -> Tensor:
    """Mean self-information of each user's k best items, in bits: high where few training users clicked them.

        novelty[u] = mean over the k best items of log2(n_train_users / max(1, users of train who clicked the item))

    >>> scores = torch.tensor([[3.0, 2.0, 1.0]])
    >>> novelty_at_k(scores, Clicks.from_pairs([0, 0, 1, 2, 3], [0, 1, 0, 0, 0], n_items=3), k=2)
    tensor([1.], dtype=torch.float64)

    scores   as ndcg_at_k
    train    Clicks [n_train_users, n_items] that the items' shares are counted in; values do not matter
    returns  [n_users] float64 in 0..log2(n_train_users); 0 for a user to whom no item is left

    Raises: as ndcg_at_k. Source: Zhou et al. 2010, Solving the apparent diversity-accuracy dilemma of recommender
    systems, PNAS 107 (surprisal); Vargas and Castells 2011, section 3.
    """
    items, k = _ranked("novelty_at_k", scores, k)
    check_catalogue("novelty_at_k", "train", train, scores.shape[1])
    to_values = UserValues([("novelty", k)], scores.shape[1], scores.device, train)
    return to_values(items, items < 0, items.new_ones(len(items)))[0]


def coverage_at_k(scores: Tensor, k: int) -> float:
    """The share of all items that are among the k best of at least one user: catalogue coverage, 0..1.

    >>> coverage_at_k(torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0]]), k=2)
    0.75

    scores, k and Raises as ndcg_at_k. Source: Ge et al. 2010, Beyond accuracy: evaluating recommender systems by
    coverage and serendipity, section 3.
    """
    items, k = _ranked("coverage_at_k", scores, k)
    covered = Coverage([k], scores.shape[1], scores.device)
    covered.add(items)
    return covered.shares()[0]


def _metric_at_k(kind: str, scores: Tensor, held_out: Any, k: int) -> Tensor:
    name = f"{kind}_at_k"
    _check_floats(name, scores)
    held_out = Clicks.from_matrix(held_out).compact().to(scores.device)
    if scores.shape != held_out.shape:
        raise ValueError(
            f"{name}: scores must have shape {list(held_out.shape)} like held_out, got {list(scores.shape)}"
        )
    items, k = _ranked(name, scores, k)
    offsets = held_out.indptr.cpu().numpy()
    hits = find_hits(items, *entries(held_out, offsets, 0, held_out.n_users), held_out.n_items)
    to_values = UserValues([(kind, k)], held_out.n_items, scores.device)
    return to_values(items, hits, held_out.row_lengths())[0]


def _check_floats(name: str, scores: Any) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(
            f"{name}: scores must be a float tensor, got {str(got).removeprefix('torch.')}"
        )


def _ranked(name: str, scores: Any, k: int) -> tuple[Tensor, int]:
    """The k best items of each user [n_users, k], -1 for none, and k cut to the number of items."""
    _check_floats(name, scores)
    if scores.ndim != 2:
        raise ValueError(
            f"{name}: scores must have shape [n_users, n_items], got {list(scores.shape)}"
        )
    k = min(check_integer(name, "k", k, 1, None), max(scores.shape[1], 1))
    best, items = top_k(scores.detach().float(), k)
    bad = is_not_finite(best)
    if bad.any():
        raise ValueError(
            f"{name}: scores must be finite, or -inf for items to leave out, got nan or inf for {int(bad.sum())} "
            f"of {len(scores)} users, first for user {int(bad.int().argmax())}"
        )
    return items, k


def find_hits(items: Tensor, users: Tensor, held_items: Tensor, n_items: int) -> Tensor:
    """Whether each ranked item is held out, bool [n_users, k].

    items              [n_users, k]  ranked items, -1 for none
    users, held_items  [nnz]         the held-out clicks in order
    """
    # item -1 maps to 0 within a user, where no held-out item is
    stride = n_items + 1
    # beyond every search
    last = torch.full((1,), len(items) * stride, device=items.device)
    keys = torch.cat([users * stride + held_items + 1, last])
    wanted = torch.arange(len(items), device=items.device)[:, None] * stride + items + 1
    return keys[torch.searchsorted(keys, wanted)] == wanted


class UserValues:
    """Metric values of users from their ranked items; tables are built once.

    wanted  (kind, k) of each metric; kinds are those of KINDS but coverage
    train   Clicks for novelty, None where that is not wanted
    """

    def __init__(
        self,
        wanted: list[tuple[str, int]],
        n_items: int,
        device: torch.device,
        train: Clicks | None = None,
    ):
        self.wanted, self.n_items = wanted, n_items
        ranks = np.arange(1, min(max((k for _, k in wanted), default=0), n_items) + 1)
        gains = np.rint(_UNIT / np.log2(ranks + 1)).astype(np.int64)
        self.ranks = torch.from_numpy(ranks.astype(np.float64)).to(device)
        self.gains = torch.from_numpy(gains).to(device)
        self.ideal = torch.from_numpy(np.concatenate(([0], np.cumsum(gains)))).to(device)
        if train is not None:
            self.information = _information(train).to(device)

    def __call__(self, items: Tensor, hits: Tensor, n_held_out: Tensor) -> Tensor:
        """Values [n_metrics, n_users] float64; nan where n_held_out is 0, novelty apart.

        items, hits  [n_users, k]  ranked items, -1 for none, and whether they are held out
        n_held_out   [n_users]
        """
        rows = [
            self._value(kind, items[:, :k], hits[:, :k], n_held_out, k) for kind, k in self.wanted
        ]
        if not rows:
            return torch.empty(0, len(items), dtype=torch.float64, device=items.device)
        return torch.stack(rows)

    def _value(self, kind: str, items: Tensor, hits: Tensor, n_held_out: Tensor, k: int) -> Tensor:
        best = n_held_out.clamp(max=k)
        if kind == "ndcg":
            return (hits * self.gains[:k]).sum(1).double() / self.ideal[best]
        if kind == "recall":
            return hits.sum(1).double() / best
        if kind == "map":
            precision = hits.cumsum(1).double() / self.ranks[:k]
            gains = (precision * _UNIT).round_().long()
            return (hits * gains).sum(1).double() / _UNIT / best
        if kind == "novelty":
            # -1, no item, is the last row: no information
            bits = self.information[items].sum(1).double() / _BITS_UNIT
            return bits / (items >= 0).sum(1).clamp(min=1)
        if kind == "precision":
            value = hits.sum(1).double() / min(k, max(self.n_items, 1))
        elif kind == "hit":
            value = hits.any(1).double()
        else:
            is_first = hits & (hits.cumsum(1) == 1)
            value = (is_first / self.ranks[:k]).sum(1)
        return value.masked_fill_(n_held_out == 0, torch.nan)


def _information(train: Clicks) -> Tensor:
    """-log2(share of the users who clicked it) of each item [n_items + 1] int64 in units of 2**-32 bits; last a 0."""
    counts = np.bincount(train.to("cpu").compact().indices.numpy(), minlength=train.n_items)
    bits = np.log2(max(train.n_users, 1)) - np.log2(np.maximum(counts, 1))
    return torch.from_numpy(np.append(np.rint(bits * _BITS_UNIT), 0).astype(np.int64))


class Coverage:
    """Which items have been among the k best of any user so far, for each k of ks."""

    def __init__(self, ks: list[int], n_items: int, device: torch.device):
        self.ks, self.n_items = ks, n_items
        # -1, no item, goes to the last place
        self.seen = torch.zeros(len(ks), n_items + 1, dtype=torch.bool, device=device)

    def add(self, items: Tensor) -> None:
        """Count the ranked items [n_users, k] of more users; -1 for none."""
        for seen, k in zip(self.seen, self.ks, strict=True):
            seen.index_fill_(0, items[:, :k].flatten() % (self.n_items + 1), True)

    def shares(self) -> list[float]:
        """For each k the share of all items, 0..1."""
        n_seen = self.seen[:, : self.n_items].sum(1).double()
        return (n_seen / max(self.n_items, 1)).tolist()
