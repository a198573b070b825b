"""Warm start: begin a training with the weights and Adam's moments of another run, matched by the items' external ids.

    an item of both runs    its column of the first layer, its row and bias of the last one, and their moments
    a new item              zeros, and the bias that makes a constant logit most likely:
                            log n_clicks - log sum_u N_u / sum_i exp(logits[u, i])
    an item that is gone    dropped
    all other layers        as they were

A new item thus changes no known item's logit until the training does. best.pt holds no moments: they are those of last.pt
in the same folder, which are a few epochs older or younger and forget the past within a thousand updates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adam import Adam, from_file
from .checkpoint import load_model, read_checkpoint
from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .ranking import BlockScorer
from .run_folder import BEST, LAST

MAX_USERS = 10_000  # whose logits say how high a new item's bias must be
ROUNDS = 100  # of the fixed point that their biases are


@dataclass(frozen=True)
class WarmStart:
    """What a run takes over from a checkpoint.

    path      the checkpoint
    weights   its state_dict
    moments   Adam's state by the weights' names, or None where no file has it
    moments_from  that file, or None
    known     [n_known] int64: columns of the new run whose items the checkpoint has
    source    [n_known] int64: their columns there
    n_new, n_gone  items that only the new run has, and only the checkpoint
    """

    path: Path
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] | None
    moments_from: Path | None
    known: Tensor
    source: Tensor
    n_new: int
    n_gone: int

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], model: MultiVAE | MultiDAE, items: list[Any] | None
    ) -> WarmStart:
        """Match a checkpoint, or the best one of a run folder, with a model and the external ids of its items.

        Raises: ValueError for a checkpoint without item ids, of another model, or without a common item.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"fit: warm_start must be the path of a run folder or a checkpoint, got {type(path).__name__}"
            )
        if items is None:
            raise ValueError("fit: items must be given with warm_start, got None")
        path = _checkpoint_at(Path(path))
        old, then = load_model(path)
        if then is None:
            raise ValueError(
                f"fit: warm_start must be a checkpoint with item ids, got {path} without; fastvae convert --items gives it them"
            )
        _check_same_model(path, old, model)
        place = {item: column for column, item in enumerate(then)}
        source = np.array([place.get(str(item), -1) for item in items], dtype=np.int64)
        known = np.flatnonzero(source >= 0)
        if not len(known):
            raise ValueError(
                f"fit: warm_start must have items of this data, got none of {len(items)} in {path}"
            )
        moments, moments_from = _read_moments(path, old, then)
        return cls(
            path,
            old.state_dict(),
            moments,
            moments_from,
            torch.from_numpy(known),
            torch.from_numpy(source[known]),
            len(items) - len(known),
            len(then) - len(known),
        )

    def summary(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "checkpoint": str(self.path),
            "moments": None if self.moments_from is None else str(self.moments_from),
            "items_taken_over": len(self.known),
            "items_new": self.n_new,
            "items_gone": self.n_gone,
        }

    def __str__(self) -> str:
        moments = (
            f"Adam's moments from {self.moments_from}"
            if self.moments_from is not None
            else f"Adam's moments start at zero, no {LAST} beside it has them"
        )
        return (
            f"warm start from {self.path}: {len(self.known):,} items taken over, {self.n_new:,} new, "
            f"{self.n_gone:,} gone; {moments}"
        )

    @torch.no_grad()
    def load_into(self, model: MultiVAE | MultiDAE, optimizer: Adam, train: Clicks) -> None:
        """Set the weights of a model and the state of its optimiser, which has made no step.

        model  one that ItemPart.cut has cut takes over what it has of the items; collective then
        train  [n_users, n_items] on the model's device, of all items; its counts give the new items' biases
        """
        for name, weight in model.named_parameters():
            weight.copy_(self._taken_over(model, name, self.weights[name], weight))
        if self.n_new:
            is_new = torch.ones(train.n_items, dtype=torch.bool, device="cpu")
            is_new[self.known] = False
            _set_biases(model, train, is_new.to(train.device))
        if self.moments is not None:
            names = {weight: name for name, weight in model.named_parameters()}
            packed = optimizer.state_dict()
            packed["state"] = {
                n: {
                    key: t if t.ndim == 0 else self._taken_over(model, names[weight], t, weight)
                    for key, t in self.moments[names[weight]].items()
                }
                for n, weight in enumerate(
                    weight for group in optimizer.param_groups for weight in group["params"]
                )
            }
            optimizer.load_state_dict(packed)

    def _taken_over(
        self, model: MultiVAE | MultiDAE, name: str, old: Tensor, weight: Tensor
    ) -> Tensor:
        """A weight of the checkpoint, or a moment of it, in the columns of the new run; zero for new items."""
        axis = _item_axis(model, name)
        if axis is None:
            return old.to(weight.device)
        new = torch.zeros_like(weight)
        # as views whose first axis is the items': one copy of rows
        rows, old_rows = (new.t(), old.t()) if axis else (new, old)
        own = _own_items(model)
        here = (self.known >= own.start) & (self.known < own.stop)
        known = (self.known[here] - own.start).to(weight.device)
        rows[known] = old_rows[self.source[here]].to(weight.device)
        return new


def _own_items(model: MultiVAE | MultiDAE) -> slice:
    """The items that a model has, of all of the run."""
    first = 0 if model.part is None else model.part.first
    return slice(first, first + model.n_items)


def _item_axis(model: MultiVAE | MultiDAE, name: str) -> int | None:
    """The axis of a weight that is the items, or None."""
    last = f"decode.p_layers.linear_{len(model.p_dims) - 2}."
    if name.startswith(last):
        return 0
    return 1 if name == "encode.q_layers.linear_0.weight" else None


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint, or a run folder's best one."""
    checkpoint = path / BEST if path.is_dir() else path
    if not checkpoint.exists():
        got = f"a folder without {BEST}" if path.is_dir() else "nothing"
        raise ValueError(
            f"fit: warm_start must be a run folder or a checkpoint, got {got} at {path}"
        )
    return checkpoint


def _check_same_model(path: Path, old: MultiVAE | MultiDAE, model: MultiVAE | MultiDAE) -> None:
    """ValueError unless the models differ in their items and dropout alone."""
    then, now = (
        {"class": type(m).__name__, **m.config(), "p_dims": m.p_dims[:-1], "q_dims": m.q_dims[1:]}
        for m in (old, model)
    )
    for name, value in now.items():
        if then[name] != value and not name.startswith("dropout"):
            raise ValueError(
                f"fit: warm_start must have the model's {name} {value}, got {then[name]} in {path}"
            )


def _read_moments(
    path: Path, old: MultiVAE | MultiDAE, items: list[str]
) -> tuple[dict[str, dict[str, Tensor]] | None, Path | None]:
    """Adam's state by the weights' names and the file that has it; None twice where there is none of this model."""
    for file in (path, path.parent / LAST):
        parts = read_checkpoint(file) if file.is_file() else {}
        meta = parts.get("meta", {})
        same = meta.get("config") == old.config() and meta.get("items") == items
        if same and "optimizer" in parts:
            weights = dict(old.named_parameters())
            try:
                state = from_file(parts["optimizer"], list(weights.values()))["state"]
                # a run with frozen layers does not say which they were
                is_whole = len(state) == len(weights)
                moments = {name: state[n] for n, name in enumerate(weights)} if is_whole else None
                fits = not moments or all(_fits(moments[name], weights[name]) for name in weights)
            except (KeyError, TypeError, AttributeError):
                fits = False
            if not fits:
                raise ValueError(
                    f"fit: {file} must hold Adam's state of its weights, got something else"
                )
            return moments, file if moments else None
    return None, None


def _fits(state: dict[str, Tensor], weight: Tensor) -> bool:
    return all(t.ndim == 0 or t.shape == weight.shape for t in state.values())


def _set_biases(model: MultiVAE | MultiDAE, train: Clicks, is_new: Tensor) -> None:
    """The biases b of new items: as likely as their share of the clicks, beside the known items' logits.

    sum_u N_u exp(b_i) / (sum_known exp(logits[u]) + sum_new exp(b)) = clicks of i; an item without counts half a one.
    """
    bias, own = model.decode.output.bias, _own_items(model)
    bias[is_new[own]] = -torch.inf  # out of the sum over known items
    sample = train.rows(range(0, train.n_users, -(-train.n_users // MAX_USERS)))
    lse = _logsumexp(model, sample)
    part = train.compact()
    values = None if part.values is None else part.values.double()
    counts = torch.bincount(part.indices, values, train.n_items).double().clamp_min(0.5)
    shares = counts / counts.sum()
    share = shares[is_new]
    n_clicks = sample.row_sums().double()
    known, weight = (lse - lse.max()).exp(), n_clicks / n_clicks.sum()
    new = torch.zeros_like(weight[0])
    # the new items take from the known ones what makes room for them; each round brings the sums nearer by their share
    for _ in range(ROUNDS):
        new = share.sum() / (weight / (known + new)).sum()
    ours = shares[own][is_new[own]]
    bias[is_new[own]] = (ours.log() - (weight / (known + new)).sum().log() + lse.max()).float()


def _logsumexp(model: MultiVAE | MultiDAE, clicks: Clicks) -> Tensor:
    """Of the logits of each user, over the items of all processes, float64 [n_users]."""
    if model.part is None:
        scorer = BlockScorer(model, clicks, 1, None, keep_seen=True)
    else:
        from ._parallel_scores import RangeScorer

        scorer = RangeScorer(model.part.processes, model, clicks, 1, None, True)
    lse = torch.cat([scorer.scores(start).double().logsumexp(1) for start in scorer.starts])
    if model.part is None:
        return lse
    return torch.stack(model.part.processes.gather(lse)).logsumexp(0)
