"""Ranking metrics under strong generalisation: NDCG@k and Recall@k of held-out clicks.

    dcg[u]    = sum over ranks r <= k that hold a held-out item of 1 / log2(r + 1)
    ndcg[u]   = dcg[u] / sum over r <= min(k, n_held_out[u]) of 1 / log2(r + 1)
    recall[u] = hits[u] / min(k, n_held_out[u])

The model sees the fold-in clicks of a user and ranks all other items. Ties go to the lower item index, so a model
that gives every item the same score is not rewarded. Neither scores nor held-out clicks are ever sorted or
densified in full: the k best items come from ranking.top_k and are looked up in the held-out CSR.
Source: Liang et al. 2018, section 4.2; NDCG_binary_at_k_batch and Recall_at_k_batch of its code (vae_cf).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import check_catalogue, check_clicks, check_integer
from .clicks import Clicks
from .ranking import BlockScorer, check_model, device_of, entries, is_not_finite, top_k

# what the paper's tables report
METRICS = ("ndcg@100", "recall@20", "recall@50")
# discounts are summed as integers of this unit: exact, so in any order the same
_UNIT = 2**40


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


def _metric_at_k(kind: str, scores: Tensor, held_out: Any, k: int) -> Tensor:
    name = f"{kind}_at_k"
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(
            f"{name}: scores must be a float tensor, got {str(got).removeprefix('torch.')}"
        )
    held_out = Clicks.from_matrix(held_out).compact().to(scores.device)
    if scores.shape != held_out.shape:
        raise ValueError(
            f"{name}: scores must have shape {list(held_out.shape)} like held_out, got {list(scores.shape)}"
        )
    k = min(check_integer(name, "k", k, 1, None), max(held_out.n_items, 1))
    best, items = top_k(scores.detach().float(), k)
    bad = is_not_finite(best)
    if bad.any():
        raise ValueError(
            f"{name}: scores must be finite, or -inf for items to leave out, got nan or inf for {int(bad.sum())} "
            f"of {len(scores)} users, first for user {int(bad.int().argmax())}"
        )
    offsets = held_out.indptr.cpu().numpy()
    hits = _hits(items, *entries(held_out, offsets, 0, held_out.n_users), held_out.n_items)
    to_values = _Values([(kind, k)], held_out.n_items, scores.device)
    return to_values(hits, held_out.row_lengths())[0]


def _hits(items: Tensor, users: Tensor, held_items: Tensor, n_items: int) -> Tensor:
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


class _Values:
    """Metric values of users from their hits; tables are built once."""

    def __init__(self, wanted: list[tuple[str, int]], n_items: int, device: torch.device):
        self.wanted = wanted
        ranks = np.arange(1, min(max(k for _, k in wanted), n_items) + 1)
        gains = np.rint(_UNIT / np.log2(ranks + 1)).astype(np.int64)
        self.gains = torch.from_numpy(gains).to(device)
        self.ideal = torch.from_numpy(np.concatenate(([0], np.cumsum(gains)))).to(device)

    def __call__(self, hits: Tensor, n_held_out: Tensor) -> Tensor:
        """Values [n_metrics, n_users] float64 of hits [n_users, k]; nan where n_held_out [n_users] is 0."""
        rows = []
        for kind, k in self.wanted:
            best = n_held_out.clamp(max=k)
            if kind == "ndcg":
                rows.append((hits[:, :k] * self.gains[:k]).sum(1).double() / self.ideal[best])
            else:
                rows.append(hits[:, :k].sum(1).double() / best)
        return torch.stack(rows)


@dataclass(frozen=True)
class Evaluation:
    """What evaluate returns; result["ndcg@100"] is the mean.

    mean         by metric name: mean over the evaluated users, 0..1
    stderr       by metric name: standard error of that mean, std / sqrt(n_evaluated) as vae_cf prints it
    n_evaluated  users the means are over
    n_skipped    users with nothing to predict or nothing to fold in
    """

    mean: dict[str, float]
    stderr: dict[str, float]
    n_evaluated: int
    n_skipped: int

    def __getitem__(self, name: str) -> float:
        return self.mean[name]

    def __str__(self) -> str:
        metrics = ", ".join(f"{m} {self.mean[m]:.4f} ± {self.stderr[m]:.4f}" for m in self.mean)
        return f"{metrics} ({self.n_evaluated:,} users evaluated, {self.n_skipped:,} skipped)"

    def to_dict(self) -> dict[str, float | int]:
        """One flat dictionary for JSON: each metric, each metric with _stderr, and the two counts."""
        values: dict[str, float | int] = dict(self.mean)
        values.update({f"{name}_stderr": value for name, value in self.stderr.items()})
        return values | {"n_evaluated": self.n_evaluated, "n_skipped": self.n_skipped}


def evaluate(
    model: nn.Module,
    fold_in: Clicks,
    held_out: Clicks,
    metrics: Iterable[str] = METRICS,
    block_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Mean NDCG@k and Recall@k with standard errors: fold_in goes in, held_out is to be found.

        mean[m]   = sum over evaluated users of m[u] / n_evaluated
        stderr[m] = std over evaluated users of m[u] / sqrt(n_evaluated)

    >>> train = Clicks.from_pairs([0, 0, 1, 1, 2], [0, 1, 1, 2, 1])
    >>> fold_in, held_out = Clicks([0, 1, 2], [1, 0], n_items=3), Clicks([0, 1, 1], [2], n_items=3)
    >>> print(evaluate(Popularity(train), fold_in, held_out, metrics=["ndcg@2", "recall@1"]))
    ndcg@2 0.6309 ± 0.0000, recall@1 0.0000 ± 0.0000 (1 users evaluated, 1 skipped)

    model       a MultiVAE, a MultiDAE, or a module with n_items that maps Clicks to logits; called in eval mode
                without gradients, and given back as it was
    fold_in     Clicks [n_users, n_items] that the model sees; these items are not ranked
    held_out    Clicks [n_users, n_items] of the same users, to be predicted
    metrics     "ndcg@K" and "recall@K" with any K from 1 to 999999999
    block_size  users scored at once, default by memory (BLOCK_BYTES in all); the values of a user follow from
                that user's scores alone, exactly, so equal scores give an equal result for any block size
    progress    called after each block with the number of users done
    returns     Evaluation; users with an empty row in fold_in or held_out are skipped and counted

    A GPU is waited for before the first block and after the last, not between. A held-out click that is in fold_in too
    cannot be found: such clicks are left out, with a warning that counts them. Raises: ValueError for a metric's name,
    for sizes that do not fit, without evaluable users, or for scores that are not finite; TypeError for other kinds of
    argument.
    Source: Liang et al. 2018, section 4.2 and 4.3.
    """
    fold_in, held_out = Clicks.from_matrix(fold_in), Clicks.from_matrix(held_out)
    if not isinstance(metrics, Iterable):
        raise TypeError(f"evaluate: metrics must be names such as 'ndcg@100', got {metrics!r}")
    names = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    wanted = [_parse(name) for name in names]
    _check(model, fold_in, held_out, names, block_size)
    device, n_users = device_of(model, fold_in.device), fold_in.n_users
    fold_in, held_out = (clicks.compact().to(device) for clicks in (fold_in, held_out))
    held_out = unseen("evaluate", fold_in, held_out)
    users = _evaluable(fold_in, held_out)
    fold_in, held_out = (clicks.rows(users).compact() for clicks in (fold_in, held_out))
    values = _user_values(model, fold_in, held_out, wanted, block_size, progress).cpu().numpy()
    bad = values[-1] > 0
    if bad.any():
        raise ValueError(
            f"evaluate: model must give finite scores, got nan or inf for {bad.sum()} of {len(users)} users, "
            f"first for user {users[bad.argmax()]}; load a checkpoint from before the loss diverged"
        )
    means, errors = values[:-1].mean(1), values[:-1].std(1) / np.sqrt(len(users))
    return Evaluation(
        dict(zip(names, means.tolist(), strict=True)),
        dict(zip(names, errors.tolist(), strict=True)),
        len(users),
        n_skipped=n_users - len(users),
    )


def _user_values(model, fold_in, held_out, wanted, block_size, progress) -> Tensor:
    """Values [n_metrics + 1, n_users] float64 on the device; the last row marks users without finite scores."""
    n_users, n_items = fold_in.shape
    k = min(max(k for _, k in wanted), n_items)
    scorer = BlockScorer(model, fold_in, k, block_size)
    to_values, offsets = _Values(wanted, n_items, fold_in.device), held_out.indptr.cpu().numpy()
    n_held_out = held_out.row_lengths()
    out = torch.empty(len(wanted) + 1, n_users, dtype=torch.float64, device=fold_in.device)
    for start in scorer.starts:
        best, items = top_k(scorer.scores(start), k)
        stop = start + len(items)
        hits = _hits(items, *entries(held_out, offsets, start, stop), n_items)
        out[:-1, start:stop] = to_values(hits, n_held_out[start:stop])
        out[-1, start:stop] = is_not_finite(best)
        if progress is not None:
            progress(stop)
    return out


def _parse(name: str) -> tuple[str, int]:
    if not isinstance(name, str):
        raise TypeError(f"evaluate: metrics must be names such as 'ndcg@100', got {name!r}")
    match = re.fullmatch(r"(ndcg|recall)@([1-9][0-9]{0,8})", name)
    if match is None:
        raise ValueError(
            f"evaluate: metrics must be names like 'ndcg@100' or 'recall@20', got {name!r}"
        )
    return match[1], int(match[2])


def _check(model, fold_in, held_out, names, block_size) -> None:
    n_items = check_model("evaluate", model)
    if not names:
        raise ValueError("evaluate: metrics must name at least one metric, got none")
    if fold_in.shape != held_out.shape:
        raise ValueError(
            f"evaluate: held_out must have shape {list(fold_in.shape)} like fold_in, "
            f"got {list(held_out.shape)}"
        )
    check_catalogue("evaluate", "fold_in", fold_in, n_items)
    if block_size is not None:
        check_integer("evaluate", "block_size", block_size, 1)


def unseen(where: str, fold_in: Clicks, held_out: Clicks, stacklevel: int = 3) -> Clicks:
    """held_out without the clicks that fold_in holds too, which are not ranked; a warning says how many there were.

    Both [n_users, n_items] with arrays of their own (compact), on one device.
    """
    n_items = fold_in.n_items
    folded, held = (
        torch.repeat_interleave(x.row_lengths(), output_size=len(x.indices)) * n_items + x.indices
        for x in (fold_in, held_out)
    )
    # beyond every search
    last = torch.full((1,), len(fold_in) * n_items, device=folded.device)
    folded = torch.cat([folded, last])
    keep = folded[torch.searchsorted(folded, held)] != held
    n_seen = len(keep) - int(keep.sum())
    if not n_seen:
        return held_out
    warnings.warn(
        f"{where}: held_out must hold no clicks of fold_in, got {n_seen:,} of {len(keep):,} that it holds; "
        "they are left out, for the items of fold_in are not ranked",
        stacklevel=stacklevel,
    )
    return held_out.where(keep)


def _evaluable(fold_in: Clicks, held_out: Clicks) -> np.ndarray:
    """Ids of the users with clicks on both sides."""
    n_fold_in, n_held_out = (clicks.row_lengths().cpu().numpy() for clicks in (fold_in, held_out))
    users = np.flatnonzero((n_fold_in > 0) & (n_held_out > 0))
    if len(users) == 0:
        raise ValueError(
            f"evaluate: no evaluable users among {len(n_fold_in)}: each has an empty row in fold_in or in "
            "held_out; hold out more clicks per user or more users"
        )
    return users


class Popularity(nn.Module):
    """The baseline that gives every user the same scores: how many users of train clicked each item.

    >>> Popularity(Clicks.from_pairs([0, 0, 1], [0, 1, 1]))(Clicks([0, 0], [], n_items=2))
    tensor([[1., 2.]])

    train  Clicks [n_users, n_items]; how often a user clicked an item does not matter
    """

    counts: Tensor

    def __init__(self, train: Clicks):
        super().__init__()
        check_clicks("Popularity", "train", train)
        self.n_items = train.n_items
        counts = torch.bincount(train.compact().indices, minlength=train.n_items)
        self.register_buffer("counts", counts.float())

    def forward(self, clicks: Clicks) -> Tensor:
        """Logits [n_users, n_items]; one row, repeated without a copy."""
        return self.counts.expand(clicks.n_users, -1)
