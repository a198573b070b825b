"""fit() by several processes: the trainer, the step and the run folder where they differ from those of one.

All processes run the same loop over the same batches. Process 0 alone writes and speaks; what could set them apart (an
interrupt, a loss or weights that are not finite, the answer of a callback) is agreed on at the same updates by all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import write_checkpoint
from .clicks import Clicks
from .evaluate import evaluate
from .models import MultiDAE, MultiVAE
from .parallel import ItemPart, Processes, check_cuttable, sharing
from .run_folder import METRIC, RunFolder
from .step import GraphedStep
from .trainer import OnEpoch, Trainer, is_true

AGREE_EVERY = (
    10  # updates between two looks of all processes at an interrupt on a GPU, which wait for it
)


class _LossTerms(nn.Module):
    """A model's loss_terms as a forward, which is all that DistributedDataParallel sees."""

    def __init__(self, model: MultiVAE | MultiDAE):
        super().__init__()
        self.model = model

    def forward(self, clicks: Clicks, per_click: bool) -> tuple[Tensor, Tensor]:
        return self.model.loss_terms(clicks, per_click)


class UsersStep(GraphedStep):
    """GraphedStep on this process' share of a batch that all processes are given; eager."""

    def __init__(self, model, optimizer, processes: Processes, **options: Any):
        super().__init__(model, optimizer, cuda_graph=False, **options)
        self.processes = processes
        self._net = nn.parallel.DistributedDataParallel(
            _LossTerms(model),
            process_group=processes.group,
            # else another copy of the gradients
            gradient_as_bucket_view=True,
        )

    def _losses(self, clicks: Clicks) -> tuple[Tensor, Tensor]:
        n_users = len(clicks)
        own = self.processes.share(n_users)
        rows = torch.arange(own.start, own.stop, device=clicks.device)
        with sharing(self.model, own, n_users):
            return self._net(clicks.rows(rows), self.per_click)

    def _totals(self, nll: Tensor, kld: Tensor) -> Tensor:
        return self.processes.sum(super()._totals(nll, kld))

    def _differentiate(self, nll, kld, weights, n_users: int) -> None:
        # the mean over processes of this is the mean over users; an empty share takes part with zeros
        share = nll.new_full((), self.processes.size / n_users)
        gradients = {nll: share, kld: self.beta * share} if kld.requires_grad else {nll: share}
        upstream = [gradient.expand_as(t) for t, gradient in gradients.items()]
        torch.autograd.backward(list(gradients), upstream)


class _OfCallback(Exception):
    """What on_epoch raised in process 0, which every process raises."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error


class ParallelTrainer(Trainer):
    """Trainer in each process of a group; by items the model is cut until the training is over."""

    def __init__(self, processes: Processes, model, train, validation, settings, run, cuda_graph):
        self.processes, self.part = processes, None
        weights = dict(model.named_parameters())
        processes.check_same("model", list(weights.values()), "seed alike before it is made")
        if processes.parallel == "items":
            self.part = ItemPart(processes, model)
            train = self.part.clicks(train)
            self.part.cut(model)
            weights = {name: p for name, p in weights.items() if name not in self.part.axes}
        self._common = list(weights.values())
        if run is not None:
            run.part = self.part
            run.names = [name for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, train, validation, settings, run, cuda_graph)

    def _make_step(self, cuda_graph: Any, **options: Any) -> GraphedStep:
        if self.part is None:
            return UsersStep(self.model, self.optimizer, self.processes, **options)
        return GraphedStep(self.model, self.optimizer, cuda_graph=False, **options)

    def run_epochs(self, epochs, patience, bar, interrupted, on_epoch: OnEpoch | None = None):
        """As Trainer.run_epochs; an interrupt of one process interrupts all, and process 0 alone calls on_epoch."""
        answered = None if on_epoch is None else self._answer_of_first(on_epoch)
        try:
            super().run_epochs(epochs, patience, bar, self._agreed(interrupted), answered)
        except KeyboardInterrupt:
            self._join()  # all processes are here
            raise
        except _OfCallback as end:
            self._join()
            raise end.error from None

    def finish(self) -> None:
        """Give the model, whole again, the best epoch's weights, and draw the curve."""
        super().finish()
        self._join()

    def _join(self) -> None:
        if self.part is not None:
            # what is as large as the weights goes before they come
            self.optimizer.state.clear()
            self.best_weights = None
            self.part.join(self.model)

    def _agreed(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        def any_interrupted() -> bool:
            # at an epoch's end, and at the same updates of all: else one would leave while others wait for it
            if self.sums.is_cuda and self.batch and self.update % AGREE_EVERY:
                return False
            return self._is_any(interrupted())

        return any_interrupted

    def _is_any(self, flag: bool) -> bool:
        any_flag = self.processes.max(self.sums.new_tensor([float(flag)]))
        return bool(any_flag)

    def _answer_of_first(self, on_epoch: OnEpoch) -> OnEpoch:
        def ask(row: dict[str, Any]) -> bool:
            stop = False
            try:
                with self.processes.together():
                    if self.processes.rank == 0:
                        stop = is_true(on_epoch(row))
            except Exception as error:
                raise _OfCallback(error) from error
            return self._is_any(stop)

        return ask

    def _has_finite_weights(self) -> bool:
        return not self._is_any(not super()._has_finite_weights())

    def _end_epoch(self, users_per_second: float) -> None:
        self.processes.check_same("weights", self._common, "run one version on one kind of device")
        super()._end_epoch(users_per_second)

    def _validate(self) -> float:
        fold_in, held_out = self.validation
        shared = {"parallel": self.processes.parallel, "group": self.processes.group}
        return evaluate(self.model, fold_in, held_out, metrics=(METRIC,), **shared)[METRIC]


class SharedRunFolder(RunFolder):
    """A run folder that process 0 writes and all read; its files are those of one process."""

    def __init__(self, processes: Processes, *args: Any):
        super().__init__(*args)
        self.processes = processes
        self.part: ItemPart | None = None  # once the model is cut
        self.names: list[str] = []  # of the weights that are trained, in the optimiser's order

    @contextlib.contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """As RunFolder.claimed, by process 0."""
        with contextlib.ExitStack() as held:
            with self.processes.together():
                if self.processes.rank == 0:
                    held.enter_context(super().claimed(resume))
            yield

    def write_best(self) -> None:
        """The weights as they are, as those of the best epoch."""
        weights = self._whole(self.model.state_dict())
        self._write(write_checkpoint, self.best, self.model, self.items, weights)

    def write_last(self, **state: Any) -> None:
        """The weights as they are, and the state that a resume needs besides."""
        weights = self._whole(self.model.state_dict())
        state["optimizer"] = self._of_moments(state["optimizer"], self._whole_rows)
        self._write(write_checkpoint, self.last, self.model, self.items, weights, **state)

    def read_best(self) -> dict[str, Any]:
        """This process' part of the weights of the best epoch."""
        with self.processes.together():
            weights = super().read_best()
        return self._own(weights)

    def read_last(self) -> dict[str, Any]:
        """What write_last wrote, this process' part of it."""
        with self.processes.together():
            state = super().read_last()
        own_rows = self.part.own if self.part else lambda t: t
        optimizer = self._of_moments(state["optimizer"], own_rows)
        return state | {"model": self._own(state["model"]), "optimizer": optimizer}

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's line."""
        self._write(super().append_metrics, row)

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """All lines anew."""
        # without a word to the others: within claimed(), where process 0 is alone, too
        if self.processes.rank == 0:
            super().rewrite_metrics(history)

    def draw_curve(self, history: list[dict[str, Any]]) -> None:
        """Write the learning curve."""
        self._write(super().draw_curve, history)

    def _write(self, write: Callable[..., None], *args: Any, **state: Any) -> None:
        with self.processes.together():
            if self.processes.rank == 0:
                write(*args, **state)

    def _whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """All items' weights, in process 0; collective."""
        part = self.part
        if part is None:
            return weights
        first = self.processes.rank == 0
        found = {}
        for key, t in weights.items():
            whole = part.whole(t, part.axes[key]) if key in part.axes else t
            if first:
                found[key] = whole
        return found

    def _own(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        part = self.part
        if part is None:
            return weights
        axes = part.axes
        return {key: part.own(t, axes[key]) if key in axes else t for key, t in weights.items()}

    def _whole_rows(self, t: Tensor) -> Tensor:
        if self.part is None:
            return t
        whole = self.part.whole(t)
        return whole if self.processes.rank == 0 else t

    def _of_moments(self, optimizer: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict:
        """The optimiser's state in a file's form, whose moments have the items in front, with those changed."""
        axes = self.part.axes if self.part else {}
        state = {}
        for n, parts in optimizer["state"].items():
            is_cut = self.names[n] in axes
            state[n] = {k: change(t) if is_cut and t.ndim else t for k, t in parts.items()}
        return optimizer | {"state": state}


class Several:
    """What fit makes otherwise for several processes.

    Raises: ValueError where there is no process group, the model cannot be cut, or CUDA graphs are asked for.
    """

    def __init__(self, model: MultiVAE | MultiDAE, parallel: str, group: Any, cuda_graph: Any):
        self.processes = Processes("fit", parallel, group)
        if cuda_graph:
            raise ValueError(
                "fit: cuda_graph must be None or False where parallel is given, got True"
            )
        if parallel == "items":
            check_cuttable("fit", model)

    def speaks(self) -> bool:
        """Whether this process shows what it does."""
        return self.processes.rank == 0

    def run_folder(self, *args: Any) -> SharedRunFolder:
        """As RunFolder."""
        return SharedRunFolder(self.processes, *args)

    def trainer(self, *args: Any) -> ParallelTrainer:
        """As Trainer."""
        return ParallelTrainer(self.processes, *args)
