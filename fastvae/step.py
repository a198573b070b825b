"""The training step: loss, gradients and optimiser on one batch, on a GPU replayed as one CUDA graph.

    loss = mean over users of nll + beta * kld

A captured step costs the host one launch. What a graph freezes (memory, sizes, settings of the optimiser, modes of the
model) is compared before each replay, so a step that changed runs eagerly until it is captured anew. fit() trains by it,
and so can a loop of one's own: see GraphedStep.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_catalogue, check_choice, check_flag, check_number
from ._draws import own_generator
from ._shadows import captured
from .adam import Adam
from .clicks import Clicks, dtype_name
from .cuda_graph import Graph, address_of, capturable, check_capturable, wants_graph
from .models import MultiDAE, MultiVAE
from .ops.linear_multinomial_nll import gradients_as_they_come

PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP = 3  # equal steps that run eagerly before the next is captured: a capture cannot compile


class NotFiniteLoss(RuntimeError):
    """The loss of a batch is nan or inf; value says which. The weights are as they were before the step."""

    def __init__(self, message: str, value: float):
        super().__init__(message)
        self.value = value


def backward_of_mean(
    nll: Tensor, kld: Tensor, beta: float | Tensor, weights: Sequence[Tensor]
) -> None:
    """mean(nll + beta * kld).backward(), with less to do.

    The mean's two gradients are numbers, so it needs neither a graph nor launches. The weights' gradients are set, not
    added: torch's own backward copies one whose rows lie apart, as the last weight's, which Adam takes as it is.

    nll      [n_users]
    kld      [n_users], of a graph or plain zeros
    beta     a float or a scalar tensor
    weights  whose .grad is set; None where the loss does not depend on one
    """
    share = nll.new_full((), 1 / len(nll))
    gradients = {nll: share, kld: beta * share} if kld.requires_grad else {nll: share}
    upstream = [gradient.expand_as(t) for t, gradient in gradients.items()]
    results = torch.autograd.grad(list(gradients), weights, upstream, allow_unused=True)
    for weight, gradient in zip(weights, results, strict=True):
        weight.grad = gradient


def lay_out_gradients(weights: Sequence[Tensor]) -> None:
    """Bring each gradient into the order of its weight's memory, as torch's own backward does.

    torch's fused optimisers read both one number after the other, whatever their strides say.
    """
    for weight in weights:
        gradient = weight.grad
        if gradient is not None and gradient.stride() != weight.stride():
            weight.grad = torch.empty_like(weight).copy_(gradient)


class GraphedStep:
    """One training step on a batch of clicks, for loops of one's own; on a GPU it becomes a CUDA graph by itself.

    >>> model, train = MultiVAE([2, 4, 3]), Clicks.from_pairs([0, 0, 1, 1], [0, 1, 1, 2])
    >>> step = GraphedStep(model, Adam(model.parameters(), lr=1e-3), max_norm=1.0)
    >>> for ids in torch.randperm(2).split(1):
    ...     nll, kld = step(train.rows(ids), beta=0.2)

    model       a MultiVAE or MultiDAE, on its device
    optimizer   of the model's weights: fastvae.Adam, or one of torch's, made with fused=True or capturable=True
    per_click   divide a user's loss by the user's clicks, see model.loss
    precision   "fp32"; "bf16": products in bf16, weights and sums in fp32; "tf32": on a GPU
    max_norm    clip the gradients to this norm of all of them together; None: leave them
    cuda_graph  None: on a GPU replay one captured graph; False: eager steps; True: as None, but refuse a CPU

    sums        [2] float64 on the device: nll and kld summed over the users of all steps; zero_() it at any time

    The first three steps of a size run eagerly, as does every step of another size (an epoch's last batch). Batches must be
    rows of one matrix. Whatever is frozen in a graph and changes (the learning rate as a float, model.eval(), a weight
    that is no longer trained, another matrix) leads to three eager steps and a new graph; a learning rate that changes
    with every step must be a tensor, which schedulers of torch fill in place: Adam(lr=torch.tensor(1e-3), ...).
    Where a capture fails, eager steps go on, with a warning.

    Raises: TypeError and ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        model: MultiVAE | MultiDAE,
        optimizer: torch.optim.Optimizer,
        *,
        per_click: bool = False,
        precision: str = "fp32",
        max_norm: float | None = None,
        cuda_graph: bool | None = None,
    ):
        where = "GraphedStep"
        check_trainable(where, model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            got = type(optimizer).__name__
            raise TypeError(f"{where}: optimizer must be a torch optimizer, got {got}")
        device = next(model.parameters()).device
        self.model, self.optimizer, self.device = model, optimizer, device
        self._weights, self._parts = list(model.parameters()), list(model.modules())
        self.per_click = check_flag(where, "per_click", per_click)
        self.precision = check_choice(where, "precision", precision, precisions(device))
        if max_norm is not None:
            max_norm = check_number(where, "max_norm", max_norm, 0, above=True)
        self.max_norm = max_norm
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        # in memory of its own, which a replay reads
        self.beta = torch.zeros((), dtype=torch.float32, device=device)
        self.wants_graph = wants_graph(where, cuda_graph, device)
        if self.wants_graph:
            check_capturable(where, optimizer)
        self._graph: Graph | None = None
        self._seen: Counter[int] = Counter()  # eager steps of each size since something changed
        self._frozen: Hashable = None
        self._matrix: Any = None  # keeps the arrays alive whose addresses are in _frozen

    def __call__(self, clicks: Clicks, beta: float | Tensor = 0.0) -> Tensor:
        """Train on one batch: gradients, update, and the gradients dropped.

        clicks   [n_users, n_items] on the model's device, rows of one matrix: train.rows(ids)
        beta     weight of the kld, a float or a scalar tensor
        returns  [2] float64: nll and kld summed over these users; the next call may overwrite the memory.
                 The loss is (nll + beta * kld) / len(clicks)

        Raises: RuntimeError where the loss is not finite, before the weights are touched; on a GPU, where asking
        would wait, the sums are for the caller to look at.
        """
        check_gradients("GraphedStep")
        check_catalogue("GraphedStep", "clicks", clicks, self.model.n_items)
        self.beta.copy_(beta) if isinstance(beta, Tensor) else self.beta.fill_(beta)
        if not self.wants_graph:
            return self._eager(clicks)
        now = self._what_is_frozen(clicks)
        if now != self._frozen:
            self._graph = None
            self._seen.clear()
        if self._graph is None and self._seen[len(clicks)] >= WARM_UP:
            self._capture(clicks)
        if self._graph is not None and len(clicks) == len(self._graph.clicks):
            if isinstance(self.optimizer, Adam):
                self.optimizer.refresh_shadows()  # the graph reads them
            return self._graph.replay(clicks)
        self._seen[len(clicks)] += 1
        terms = self._eager(clicks)
        # after the step: the first one makes the optimiser's state
        self._frozen = self._what_is_frozen(clicks)
        return terms

    def _compute(self, clicks: Clicks) -> Tensor:
        """The step itself; what a graph captures."""
        # those of before would count for a weight that the loss does not reach
        self._drop_gradients()
        weights = [p for p in self._weights if p.requires_grad]
        bf16 = self.precision == "bf16"
        with matmul_precision(self.precision):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False
            ):
                nll, kld = self._losses(clicks)
            terms = self._totals(nll.detach(), kld.detach())
            if not nll.is_cuda:
                self._check(terms, len(clicks))
            self._differentiate(nll, kld, weights, len(clicks))
            if not isinstance(self.optimizer, Adam):
                lay_out_gradients(weights)
            if self.max_norm is not None:
                self._clip(weights, self.max_norm)
            self.optimizer.step()
        # not kept through the next forward: they are as large as the weights
        self._drop_gradients()
        self.sums += terms
        return terms

    # what is done otherwise where several processes share a batch

    def _losses(self, clicks: Clicks) -> tuple[Tensor, Tensor]:
        # Adam takes gradients as they come; for torch's optimisers, and by DistributedDataParallel, they are copied
        ours = isinstance(self.optimizer, Adam)
        with gradients_as_they_come() if ours else contextlib.nullcontext():
            return self.model.loss_terms(clicks, self.per_click)

    def _totals(self, nll: Tensor, kld: Tensor) -> Tensor:
        return torch.stack((nll, kld)).sum(1, dtype=torch.float64)

    def _differentiate(
        self, nll: Tensor, kld: Tensor, weights: list[nn.Parameter], n_users: int
    ) -> None:
        backward_of_mean(nll, kld, self.beta, weights)

    def _clip(self, weights: list[nn.Parameter], max_norm: float) -> None:
        nn.utils.clip_grad_norm_(weights, max_norm)

    def _check(self, terms: Tensor, n_users: int) -> None:
        loss = (terms[0] + self.beta * terms[1]).item() / n_users
        if not math.isfinite(loss):
            raise NotFiniteLoss(
                f"GraphedStep: loss must be finite, got {loss}; lower the learning rate", loss
            )

    def _drop_gradients(self) -> None:
        for p in self._weights:
            p.grad = None

    def _eager(self, clicks: Clicks) -> Tensor:
        if self._graph is None:
            return self._compute(clicks)
        generator = self.model.generator or own_generator(self.device)
        before = generator.get_state()
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._compute(clicks)
        # a graph keeps the memory of a whole step; without it there was enough
        self._give_up("its memory is needed")
        generator.set_state(before)
        return self._compute(clicks)

    def _capture(self, clicks: Clicks) -> None:
        try:
            with capturable(self.optimizer), captured():
                self._graph = Graph(self._compute, clicks)
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0])

    def _give_up(self, reason: str) -> None:
        self._graph, self.wants_graph = None, False
        warnings.warn(
            f"fastvae: the training step could not be captured as a CUDA graph, eager steps go on ({reason})",
            stacklevel=4,
        )

    def _what_is_frozen(self, clicks: Clicks) -> Hashable:
        """Everything that a graph holds as an address or a number, beside the size of the batch."""
        arrays = (clicks.indptr, clicks.indices, clicks.values)
        self._matrix = arrays
        state = self.optimizer.state.values()
        stacks = (self.model.encode.q_layers, self.model.decode.p_layers)
        return (
            tuple(address_of(array) for array in arrays),
            tuple((p.data_ptr(), p.requires_grad) for p in self._weights),
            tuple(address_of(value) for parts in state for value in parts.values()),
            tuple(
                (name, address_of(value))
                for group in self.optimizer.param_groups
                for name, value in group.items()
                if name != "params"
            ),
            tuple(module.training for module in self._parts),
            tuple(tuple(stack.dropout) for stack in stacks),
            torch.are_deterministic_algorithms_enabled(),
        )


def precisions(device: torch.device) -> tuple[str, ...]:
    """What a device computes in."""
    return PRECISIONS if device.type != "cpu" else tuple(p for p in PRECISIONS if p != "tf32")


def check_trainable(where: str, model: Any) -> None:
    """TypeError or ValueError unless model is one of ours, whole on one device, with fp32 weights to train."""
    if not isinstance(model, MultiVAE | MultiDAE):
        raise TypeError(
            f"{where}: model must be a MultiVAE or MultiDAE, got {type(model).__name__}; "
            "pass the model itself where that wraps one"
        )
    weights = list(model.parameters())
    for p in weights:
        if p.dtype != torch.float32:
            raise ValueError(
                f"{where}: model must be float32, got {dtype_name(p.dtype)}; call model.float(): "
                "precision='bf16' computes in bf16 all the same"
            )
        if p.is_meta:
            raise ValueError(
                f"{where}: model must have weights in memory, got the device meta; make it outside of torch.device('meta')"
            )
        if p.device != weights[0].device:
            raise ValueError(
                f"{where}: model must be on one device, got {weights[0].device} and {p.device}"
            )
        if p.is_inference():
            raise ValueError(
                f"{where}: model must be made outside of torch.inference_mode, got weights that cannot be trained"
            )
    if not any(p.requires_grad for p in weights):
        raise ValueError(f"{where}: model must have a weight that requires grad, got none")


def check_gradients(where: str) -> None:
    """ValueError where torch keeps no gradients."""
    if not torch.is_grad_enabled():
        raise ValueError(
            f"{where}: gradients must be enabled, got a call under torch.no_grad or torch.inference_mode"
        )


class _Process:
    """float32_matmul_precision belongs to the process: the first block in keeps what was, the last one out restores it."""

    lock = threading.Lock()
    holders = 0
    before = ""


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products on a GPU by TF32 where precision is "tf32", and in full otherwise.

    Raises: ValueError where another thread is in such a block with the other kind.
    """
    wanted = "high" if precision == "tf32" else "highest"
    with _Process.lock:
        now = torch.get_float32_matmul_precision()
        if _Process.holders and now != wanted:
            raise ValueError(
                f"fit: precision must be the same kind of fp32 product in all threads, got {wanted} beside {now}"
            )
        if not _Process.holders:
            _Process.before = now
            torch.set_float32_matmul_precision(wanted)
        _Process.holders += 1
    try:
        yield
    finally:
        with _Process.lock:
            _Process.holders -= 1
            if not _Process.holders:
                torch.set_float32_matmul_precision(_Process.before)
