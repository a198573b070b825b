"""fit() by several processes: the trainer, the step and the run folder where they differ from those of one.

All processes run the same loop over the same batches. Process 0 alone writes and speaks; what could set them apart (an
interrupt, a loss or weights that are not finite, the answer of a callback) is agreed on at the same updates by all.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checkpoint_parts
from .checkpoint import read_checkpoint, write_checkpoint
from .clicks import Clicks
from .evaluate import evaluate
from .models import MultiDAE, MultiVAE
from .ops._buffers import release
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


class ItemsStep(GraphedStep):
    """GraphedStep of a model that ItemPart.cut has cut; eager."""

    def __init__(self, model, optimizer, part: ItemPart, **options: Any):
        super().__init__(model, optimizer, cuda_graph=False, **options)
        self.part = part
        self._cut = {p for name, p in model.named_parameters() if name in part.axes}

    def _clip(self, weights: list[nn.Parameter], max_norm: float) -> None:
        # the gradients of ranges are added up over the processes, those that all have are counted once
        squares = self.sums.new_zeros(2)
        for p in weights:
            if p.grad is not None:
                squares[int(p in self._cut)] += torch.linalg.vector_norm(p.grad).double().square()
        self.part.processes.sum(squares[1])
        nn.utils.clip_grads_with_norm_(weights, max_norm, squares.sum().sqrt().float())


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
        return ItemsStep(self.model, self.optimizer, self.part, **options)

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

    def _take_up(self, state: dict[str, Any]) -> None:
        assert isinstance(self.run, SharedRunFolder)
        super()._take_up(self.run.own(state))

    def finish(self) -> None:
        """Give the model, whole again, the best epoch's weights, and draw the curve."""
        super().finish()
        self._join()

    def _join(self) -> None:
        if self.part is not None:
            # what is as large as the weights goes before they come
            self.best_weights = None
            del self.optimizer, self.step, self.weights
            # a torch optimiser is part of circles, through frames that it was made in
            gc.collect()
            release()
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
    """A run folder that process 0 writes and all read.

    Its files are those of one process. A checkpoint with more than n_bytes of weights and moments that are cut by items is not
    gathered in process 0: all write their own, see _checkpoint_parts.py.
    """

    def __init__(self, processes: Processes, n_bytes: int, *args: Any):
        super().__init__(*args)
        self.processes, self.n_bytes = processes, n_bytes
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

    def read_best(self) -> dict[str, Any]:
        """This process' part of the weights of the best epoch."""
        with self.processes.together():
            state = self._read_checkpoint(self.best)
        return self.own(state)["model"]

    def read_last(self) -> dict[str, Any]:
        """What write_last wrote; own() is this process' part of it."""
        with self.processes.together():
            return super().read_last()

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process' part of what a checkpoint holds."""
        if self.part is None:
            return state
        if state["meta"]["config"] != self.model.config():
            raise ValueError("another model")
        state = _copied(state)
        # those of a folder of parts have been read alone
        if "parts" not in state["meta"]:
            for _, place, key, axis in self._cut(state, self.part.n_items):
                place[key] = self.part.own(place[key], axis)
        return state

    def _read_checkpoint(self, path: Path) -> dict[str, Any]:
        part = self.part
        return read_checkpoint(path, None if part is None else slice(part.first, part.last))

    def _write_checkpoint(self, path: Path, **state: Any) -> None:
        state = _copied({"model": self.model.state_dict()} | state)
        cut, part = list(self._cut(state, self.model.n_items)), self.part
        if (
            part is None
            or sum(part.n_bytes(p[key], axis) for _, p, key, axis in cut) <= self.n_bytes
        ):
            for _, place, key, axis in cut:
                assert part is not None
                whole = part.whole(place.pop(key), axis)
                if self.processes.rank == 0:
                    place[key] = whole
            self._write_whole(path, state, None)
            return
        tensors = {name: (place.pop(key), axis) for name, place, key, axis in cut}
        with _checkpoint_parts.written(self.processes, path, tensors, part.n_items) as parts:
            self._write_whole(path, state, parts)

    def _write_whole(self, path: Path, state: dict[str, Any], parts: Any) -> None:
        weights = state.pop("model")
        self._write(write_checkpoint, path, self.model, self.items, weights, parts, **state)

    def _cut(
        self, state: dict[str, Any], n_items: int
    ) -> Iterator[tuple[str, dict[Any, Tensor], Any, int]]:
        """Of each tensor that the processes hold in ranges: name, where it is, and the dimension of the items."""
        axes = self.part.axes if self.part else {}
        for key in [key for key in state["model"] if key in axes]:
            yield f"model/{key}", state["model"], key, axes[key]
        names = dict(enumerate(self.names))
        for n, moments in state.get("optimizer", {"state": {}})["state"].items():
            if names[n] not in axes:
                continue
            # the number of steps has no items
            for name in [name for name, t in moments.items() if t.ndim]:
                t = moments[name]
                # in a file the items are in front; to_file does not turn what is one row or column, or empty
                if axes[names[n]] == 1 and t.shape[1] == n_items != len(t):
                    moments[name] = t.t()
                yield f"optimizer/state/{n}/{name}", moments, name, 0

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


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content with dictionaries of its own, and the same tensors."""
    found = state | {"model": dict(state["model"])}
    if "optimizer" in state:
        moments = {n: dict(parts) for n, parts in state["optimizer"]["state"].items()}
        found["optimizer"] = state["optimizer"] | {"state": moments}
    return found


class Several:
    """What fit makes otherwise for several processes.

    Raises: ValueError where the model cannot be cut, or CUDA graphs are asked for.
    """

    def __init__(
        self,
        processes: Processes,
        model: MultiVAE | MultiDAE,
        cuda_graph: Any,
        checkpoint_bytes: int,
    ):
        self.processes = processes
        self.checkpoint_bytes = checkpoint_bytes
        # a group of one has nothing to share, and the loss in steps takes more passes
        self._is_one = self.processes.size == 1
        if cuda_graph:
            raise ValueError(
                "fit: cuda_graph must be None or False where parallel is given, got True"
            )
        if processes.parallel == "items":
            check_cuttable("fit", model)

    def speaks(self) -> bool:
        """Whether this process shows what it does."""
        return self.processes.rank == 0

    def run_folder(self, *args: Any) -> RunFolder:
        """As RunFolder."""
        if self._is_one:
            return RunFolder(*args)
        return SharedRunFolder(self.processes, self.checkpoint_bytes, *args)

    def trainer(self, *args: Any) -> Trainer:
        """As Trainer."""
        return Trainer(*args) if self._is_one else ParallelTrainer(self.processes, *args)
