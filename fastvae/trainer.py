"""The trainer of fit(): the loop over epochs and batches, with validation, the best epoch, checkpoints and exact resume.

Every random draw of an epoch (order of users, dropout, noise) follows from the seed and the epoch's number, so a resumed
run repeats an uninterrupted one bit for bit on a CPU. The step is in step.py, the files are in run_folder.py.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import NORMALIZE
from ._draws import seeded
from .adam import Adam, from_file, to_file
from .evaluate import evaluate
from .models import MultiDAE, MultiVAE
from .progress import ProgressBar
from .run_folder import METRIC, RunFolder, advice, interrupt_message
from .schedules import beta_at, cosine_lr, plateau_lr
from .step import GraphedStep, NotFiniteLoss
from .warmup import warm_up

OnEpoch = Callable[[dict[str, Any]], Any]
CHECK_EVERY = 100  # updates between two looks at the loss on a GPU, which wait for it


def epoch_order(n_users: int, seed: int, epoch: int) -> tuple[Tensor, int]:
    """Row ids of an epoch (counted from 0) in its order, and the seed of its dropout and noise."""
    order_seed, draw_seed = np.random.SeedSequence([seed, epoch]).generate_state(2).tolist()
    generator = torch.Generator("cpu").manual_seed(order_seed)
    return torch.randperm(n_users, generator=generator, device="cpu"), draw_seed


@dataclass
class FitResult:
    """What fit() returns: the epochs' metrics, and the best epoch (counted from 1) with its NDCG@100.

    best_epoch is the last epoch and best_metric is nan where there was no validation.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_metric: float = math.nan


@dataclass(frozen=True)
class Settings:
    """What a resumed run must have in common with the run it goes on with."""

    batch_size: int
    lr: float
    anneal_cap: float
    total_anneal_steps: int
    per_click: bool
    precision: str
    seed: int
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    clip_grad_norm: float | None = None
    total_lr_steps: int | None = None  # of the cosine

    def config(self) -> dict[str, Any]:
        """As in config.json, which keeps an older name for per_click."""
        settings = asdict(self)
        older = NORMALIZE[settings.pop("per_click")]
        return settings | {"normalize": older}


def is_true(answer: Any) -> bool:
    """Whether a callback asks to stop; one that returns a list, a number or nothing does not."""
    return isinstance(answer, bool | np.bool_) and bool(answer)


def _decayed(weights: list[Tensor], weight_decay: float) -> list[Any]:
    """For Adam: the weights, or where they decay a group for each, so that they are counted in one order; biases do not."""
    if not weight_decay:
        return weights
    return [{"params": [p], "weight_decay": weight_decay if p.ndim > 1 else 0.0} for p in weights]


class Trainer:
    """The state of a run: model, optimiser, position, best epoch."""

    def __init__(
        self, model, train, validation, settings: Settings, run: RunFolder | None, cuda_graph
    ):
        self.model, self.train, self.validation = model, train, validation
        self.settings, self.run = settings, run
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = Adam(
            _decayed(self.weights, settings.weight_decay),
            settings.lr,
            shadow=settings.precision == "bf16",
        )
        self.step = self._make_step(
            cuda_graph,
            per_click=settings.per_click,
            precision=settings.precision,
            max_norm=settings.clip_grad_norm,
        )
        # a graph reads it from the device at each replay, where a number would be frozen
        self.lr_on_device: Tensor | None = None
        if settings.lr_schedule != "constant" and self.step.wants_graph:
            self.lr_on_device = torch.full(
                (), settings.lr, dtype=torch.float32, device=self.step.device
            )
            self._use_lr(settings.lr)
        self.result = FitResult()
        self.epoch = self.batch = self.update = 0  # epochs finished, batches of the next, updates
        self.beta, self.lr = 0.0, settings.lr  # of the latest update
        self.sums = self.step.sums  # nll and kld, summed over the users of this epoch
        self.rng: Tensor | None = None  # where an interrupted epoch stopped drawing
        self.best_weights: dict[str, Tensor] | None = None

    def _make_step(self, cuda_graph: bool | None, **options: Any) -> GraphedStep:
        return GraphedStep(self.model, self.optimizer, cuda_graph=cuda_graph, **options)

    def run_epochs(
        self,
        epochs: int,
        patience: int,
        bar: ProgressBar,
        interrupted: Callable[[], bool],
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Train until epochs are done, patience is out or on_epoch says so; KeyboardInterrupt, with last.pt written, once
        interrupted() is true."""
        if self.epoch >= epochs > 0:
            bar.idle(f"the run has {self.epoch} epochs, asked for are {epochs}")
        elif self._out_of_patience(patience):
            bar.idle(f"no better NDCG@100 since epoch {self.result.best_epoch} of {self.epoch}")
        elif self.train.device.type == "cuda":
            self._compile_ahead()
        while self.epoch < epochs and not self._out_of_patience(patience):
            whole = self._run_epoch(bar, interrupted)
            self.save_last()
            if not whole or interrupted():
                raise KeyboardInterrupt(interrupt_message(self.run, self.epoch, self.batch))
            row = self.result.history[-1]
            bar.epoch_done(row, self.result.best_epoch == self.epoch)
            # after last.pt: whatever the callback raises, the run can be resumed
            if on_epoch is not None and is_true(on_epoch(dict(row))):
                return

    def _compile_ahead(self) -> None:
        """Compile the kernels side by side; the steps would do it one after the other."""
        if type(self.model) not in (MultiVAE, MultiDAE):
            return
        s, n_users = self.settings, self.train.n_users
        sizes = {min(s.batch_size, n_users), n_users % s.batch_size} - {0}
        try:
            with torch.cuda.device(self.train.device):
                warm_up(
                    self.model,
                    sorted(sizes, reverse=True),
                    precision=s.precision,
                    counts=self.train.values is not None,
                    lr=self.optimizer.param_groups[0]["lr"],
                )
        except Exception as error:  # the steps compile what they lack, and say what is wrong
            warnings.warn(
                f"fastvae: kernels must compile beforehand, got {error}; the steps compile them one by one",
                stacklevel=4,
            )

    def _out_of_patience(self, patience: int) -> bool:
        return 0 < patience <= self.epoch - self.result.best_epoch

    def _run_epoch(self, bar: ProgressBar, interrupted) -> bool:
        """Train an epoch from where it stands; False where it was interrupted before its end."""
        begin, started = self.batch, time.perf_counter()
        s = self.settings
        order, draw_seed = epoch_order(self.train.n_users, s.seed, self.epoch)
        batches = order.to(self.train.device).split(s.batch_size)
        self.model.train()
        plain = type(self.model) in (MultiVAE, MultiDAE)
        with seeded(self.model, draw_seed, self.rng, plain) as where_it_stands:
            for ids in batches[begin:]:
                self._step(ids)
                if bar.due(len(ids)):
                    self._show(bar)
                if interrupted() and self.batch < len(batches):
                    self._check_finite()
                    self.rng = where_it_stands()
                    return False
        n_users = sum(len(ids) for ids in batches[begin:])
        self._end_epoch(n_users / max(time.perf_counter() - started, 1e-9))
        return True

    def _show(self, bar: ProgressBar) -> None:
        users = min(self.batch * self.settings.batch_size, self.train.n_users)
        nll, kld = (self.sums / users).tolist()
        bar.move(self.epoch, users, nll, kld, self.beta)

    def _step(self, ids: Tensor) -> None:
        s = self.settings
        self.beta = beta_at(self.update, s.anneal_cap, s.total_anneal_steps)
        if s.lr_schedule != "constant":
            self._set_lr()
        try:
            self.step(self.train.rows(ids), self.beta)
        except NotFiniteLoss as error:
            raise self._not_finite(error.value) from None
        self.update += 1
        self.batch += 1
        # a GPU is asked now and then: each question waits for it
        if self.update % CHECK_EVERY == 0:
            self._check_finite()

    def _set_lr(self) -> None:
        s = self.settings
        if s.lr_schedule == "cosine":
            self.lr = cosine_lr(self.update, s.lr, s.total_lr_steps or 0)
        else:
            self.lr = plateau_lr((row[METRIC] for row in self.result.history), s.lr)
        self._use_lr(self.lr)

    def _use_lr(self, lr: float) -> None:
        if self.lr_on_device is not None:
            self.lr_on_device.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr if self.lr_on_device is None else self.lr_on_device

    def _check_finite(self) -> None:
        total = self.sums.sum().item()
        if not math.isfinite(total):
            raise self._not_finite(total)
        # a finite loss may have had a gradient that is not: such weights are never saved
        if not self._has_finite_weights():
            raise RuntimeError(
                f"fit: weights must be finite, got nan or inf after update {self.update} "
                f"(epoch {self.epoch + 1}); {advice(self.run)}"
            )

    def _has_finite_weights(self) -> bool:
        weights = self.model.parameters()
        return all(torch.linalg.vector_norm(p, math.inf).isfinite() for p in weights if p.numel())

    def _not_finite(self, value: float) -> RuntimeError:
        return RuntimeError(
            f"fit: loss must be finite, got {value} at update {self.update} "
            f"(epoch {self.epoch + 1}, batch {self.batch + 1}); {advice(self.run)}"
        )

    def _end_epoch(self, users_per_second: float) -> None:
        self._check_finite()
        self.epoch += 1
        self.batch, self.rng = 0, None
        nll, kld = (self.sums / self.train.n_users).tolist()
        self.sums.zero_()
        row = {
            "epoch": self.epoch, "update": self.update, "loss": nll + self.beta * kld, "nll": nll,
            "kld": kld, "beta": self.beta, "lr": self.lr, "users_per_second": round(users_per_second, 1),
        }  # fmt: skip
        if self.validation is not None:
            try:
                row[METRIC] = self._validate()
            except ValueError as error:  # fit has checked everything else that evaluate refuses
                raise RuntimeError(
                    f"fit: scores must be finite, got nan or inf after epoch {self.epoch}; {advice(self.run)}"
                ) from error
        self.result.history.append(row)
        if self.run is not None:
            self.run.append_metrics(row)
        metric = row.get(METRIC, math.nan)
        if self.result.best_epoch == 0 or not metric <= self.result.best_metric:
            self.result.best_epoch, self.result.best_metric = self.epoch, metric
            self._keep_best()

    def _validate(self) -> float:
        fold_in, held_out = self.validation
        return evaluate(self.model, fold_in, held_out, metrics=(METRIC,))[METRIC]

    def _keep_best(self) -> None:
        if self.run is not None:
            self.run.write_best()
        elif self.validation is not None:
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def finish(self) -> None:
        """Give the model the best epoch's weights, and draw the curve."""
        if self.run is not None and self.result.best_epoch:
            self.best_weights = self.run.read_best()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        if self.run is not None:
            self.run.draw_curve(self.result.history)

    def save_last(self) -> None:
        """Write last.pt: all that a resume needs."""
        if self.run is None:
            return
        self.run.write_last(
            optimizer=to_file(self.optimizer.state_dict()),
            position=[self.epoch, self.batch, self.update],
            sums=self.sums,
            history=json.dumps(self.result.history),
            best=[self.result.best_epoch, float(self.result.best_metric)],
            rng=self.rng,
        )

    def restore(self) -> None:
        """Take up the state of last.pt."""
        assert self.run is not None
        state = self.run.read_last()
        try:
            self._take_up(state)
            if self.result.best_epoch:
                self.run.read_best()  # better now than after the last epoch
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"fit: {self.run.last} must hold the state of this run, got another file ({reason[:200]})"
            ) from error
        self.run.rewrite_metrics(self.result.history)

    def _take_up(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(from_file(state["optimizer"], self.weights))
        self.epoch, self.batch, self.update = map(int, state["position"])
        self.sums.copy_(state["sums"])
        self.rng = state["rng"]
        self.result.history = json.loads(state["history"])
        self.result.best_epoch, self.result.best_metric = state["best"]
