"""Evaluation under strong generalisation: mean metrics of held-out clicks over users, with standard errors.

The model sees the fold-in clicks of a user and ranks all other items. Ties go to the lower item index, so a model
that gives every item the same score is not rewarded. Neither scores nor held-out clicks are ever sorted or
densified in full: the k best items come from ranking.top_k and are looked up in the held-out CSR. metrics.py says
what each metric is.
Source: Liang et al. 2018, section 4.2; NDCG_binary_at_k_batch and Recall_at_k_batch of its code (vae_cf).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._agreement import checked_by_all
from ._checks import check_catalogue, check_integer
from .baselines import Popularity
from .clicks import Clicks
from .metrics import KINDS, Coverage, UserValues, find_hits, ndcg_at_k, recall_at_k
from .ranking import BlockScorer, check_model, device_of, entries, is_not_finite

__all__ = ["METRICS", "Evaluation", "Popularity", "evaluate", "ndcg_at_k", "recall_at_k", "unseen"]

# what the paper's tables report
METRICS = ("ndcg@100", "recall@20", "recall@50")


@dataclass(frozen=True)
class Evaluation:
    """What evaluate returns; result["ndcg@100"] is the mean.

    mean         by metric name: mean over the evaluated users; coverage is one share of all of them
    stderr       by metric name: standard error of that mean, std / sqrt(n_evaluated) as vae_cf prints it; coverage,
                 which is no mean, has none
    n_evaluated  users the means are over
    n_skipped    users with nothing to predict or nothing to fold in
    users        [n_evaluated] int64: the rows of fold_in and held_out that were evaluated
    values       by metric name: [n_evaluated] float64, the value of each of these users; not for coverage
    clicks       a digest of fold_in and held_out, by which compare knows whether two are of the same

    Two are equal where the first four are.
    """

    mean: dict[str, float]
    stderr: dict[str, float]
    n_evaluated: int
    n_skipped: int
    users: np.ndarray | None = field(default=None, compare=False, repr=False)
    values: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    clicks: int | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, name: str) -> float:
        return self.mean[name]

    def text(self, name: str) -> str:
        """A metric's mean with its standard error, where it has one."""
        error = f" ± {self.stderr[name]:.4f}" if name in self.stderr else ""
        return f"{self.mean[name]:.4f}{error}"

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {self.text(name)}" for name in self.mean)
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
    *,
    train: Clicks | None = None,
    parallel: str | None = None,
    group: Any = None,
) -> Evaluation:
    """Means of metrics with standard errors: fold_in goes in, held_out is to be found.

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
    metrics     "ndcg@K", "recall@K", "precision@K", "map@K", "mrr@K", "hit@K", "novelty@K" and "coverage@K" with any
                K from 1 to 999999999; metrics.py defines them
    block_size  users scored at once, default by memory (BLOCK_BYTES in all); the values of a user follow from
                that user's scores alone, exactly, so equal scores give an equal result for any block size
    progress    called after each block with the number of users done
    train       Clicks [n_train_users, n_items]: the training clicks, in which novelty@K counts the items' users; no other
                metric asks for them
    parallel    "users" or "items": each process of the group scores its share of them, and all have the result;
                called by all of them with the same arguments. None: this process alone
    group       of torch.distributed; None: the default one
    returns     Evaluation; users with an empty row in fold_in or held_out are skipped and counted

    A GPU is waited for before the first block and after the last, not between. A held-out click that is in fold_in too
    cannot be found: such clicks are left out, with a warning that counts them. Raises: ValueError for a metric's name,
    novelty without train, sizes that do not fit, no evaluable users, or scores that are not finite; TypeError for other
    kinds of argument.
    Source: Liang et al. 2018, section 4.2 and 4.3.
    """
    with checked_by_all("evaluate", parallel, group) as processes:
        fold_in, held_out = Clicks.from_matrix(fold_in), Clicks.from_matrix(held_out)
        if not isinstance(metrics, Iterable):
            raise TypeError(f"evaluate: metrics must be names such as 'ndcg@100', got {metrics!r}")
        names = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
        wanted = {name: _parse(name) for name in names}
        _check(model, fold_in, held_out, wanted, block_size, train)
        share = None
        if processes is not None:
            from ._parallel_scores import shared_scores

            share = shared_scores("evaluate", model, processes)
    return _evaluated(model, fold_in, held_out, wanted, block_size, progress, train, share)


def _evaluated(
    model, fold_in, held_out, wanted, block_size, progress, train, share: Any
) -> Evaluation:
    """share says how several processes share the work, see _parallel_scores.py; None: they do not."""
    device, n_users = device_of(model, fold_in.device), fold_in.n_users
    fold_in, held_out = (clicks.compact().to(device) for clicks in (fold_in, held_out))
    held_out = unseen("evaluate", fold_in, held_out, stacklevel=4)
    clicks = _digest(fold_in, held_out)
    if share is not None:
        share.check_alike(
            "evaluate", model, metrics=list(wanted), block_size=block_size,
            **{"fold_in and held_out": (*fold_in.shape, clicks)},
        )  # fmt: skip
    users = _evaluable(fold_in, held_out)
    own = users if share is None else users[share.rows(len(users))]
    fold_in, held_out = (clicks.rows(own).compact() for clicks in (fold_in, held_out))
    by_user = {name: kind for name, kind in wanted.items() if kind[0] != "coverage"}
    covered = Coverage(
        [k for kind, k in wanted.values() if kind == "coverage"], fold_in.n_items, device
    )
    to_values = UserValues([*by_user.values()], fold_in.n_items, device, train)
    k = min(max(k for _, k in wanted.values()), fold_in.n_items)
    make_scorer = BlockScorer if share is None else share.scorer
    scorer = make_scorer(model, fold_in, k, block_size)
    of_users = _user_values(scorer, k, held_out, to_values, covered, progress)
    if share is not None:
        of_users, covered.seen = share.joined(of_users, len(users)), share.any(covered.seen)
    values = of_users.cpu().numpy()
    bad = values[-1] > 0
    if bad.any():
        raise ValueError(
            f"evaluate: model must give finite scores, got nan or inf for {bad.sum()} of {len(users)} users, "
            f"first for user {users[bad.argmax()]}; load a checkpoint from before the loss diverged"
        )
    found = dict(zip(by_user, values[:-1], strict=True))
    return _summary(wanted, found, covered, users, n_users, clicks)


def _user_values(scorer, k, held_out, to_values, covered, progress) -> Tensor:
    """Values [n_metrics + 1, n_users] float64 on the device; the last row marks users without finite scores."""
    offsets, n_held_out = held_out.indptr.cpu().numpy(), held_out.row_lengths()
    out = torch.empty(
        len(to_values.wanted) + 1, len(n_held_out), dtype=torch.float64, device=n_held_out.device
    )
    for start in scorer.starts:
        best, items = scorer.best(start, k)
        stop = start + len(items)
        hits = find_hits(items, *entries(held_out, offsets, start, stop), held_out.n_items)
        out[:-1, start:stop] = to_values(items, hits, n_held_out[start:stop])
        out[-1, start:stop] = is_not_finite(best)
        covered.add(items)
        if progress is not None:
            progress(stop)
    return out


def _summary(
    wanted: dict[str, tuple[str, int]],
    values: dict[str, np.ndarray],
    covered: Coverage,
    users: np.ndarray,
    n_users: int,
    clicks: int,
) -> Evaluation:
    shares = iter(covered.shares())
    mean = {name: float(values[name].mean()) if name in values else next(shares) for name in wanted}
    stderr = {
        name: float(of_users.std() / np.sqrt(len(users))) for name, of_users in values.items()
    }
    return Evaluation(mean, stderr, len(users), n_users - len(users), users, values, clicks)


def _parse(name: str) -> tuple[str, int]:
    if not isinstance(name, str):
        raise TypeError(f"evaluate: metrics must be names such as 'ndcg@100', got {name!r}")
    match = re.fullmatch(rf"({'|'.join(KINDS)})@([1-9][0-9]{{0,8}})", name)
    if match is None:
        raise ValueError(
            f"evaluate: metrics must be names like 'ndcg@100' or 'recall@20', got {name!r}; "
            f"the kinds are {', '.join(KINDS)}"
        )
    return match[1], int(match[2])


def _check(model, fold_in, held_out, wanted, block_size, train) -> None:
    n_items = check_model("evaluate", model)
    if not wanted:
        raise ValueError("evaluate: metrics must name at least one metric, got none")
    if fold_in.shape != held_out.shape:
        raise ValueError(
            f"evaluate: held_out must have shape {list(fold_in.shape)} like fold_in, "
            f"got {list(held_out.shape)}"
        )
    check_catalogue("evaluate", "fold_in", fold_in, n_items)
    if block_size is not None:
        check_integer("evaluate", "block_size", block_size, 1)
    novel = next((name for name, (kind, _) in wanted.items() if kind == "novelty"), None)
    if train is not None:
        check_catalogue("evaluate", "train", train, n_items)
    elif novel is not None:
        raise ValueError(f"evaluate: train must be the training clicks for {novel}, got None")


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


def _digest(fold_in: Clicks, held_out: Clicks) -> int:
    """A number that another matrix in either's place would hardly give; both compact and on one device."""
    total = torch.zeros((), dtype=torch.int64, device=fold_in.device)
    for odd, x in ((0x9E3779B1, fold_in), (0x85EBCA77, held_out)):
        users = torch.repeat_interleave(x.row_lengths(), output_size=len(x.indices))
        # modulo 2**64, as torch's integers go
        mixed = (users * x.n_items + x.indices + 1) * odd
        total += (mixed ^ (mixed >> 29)).mul_(mixed).sum()
    return int(total)


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
