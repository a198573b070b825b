"""Several processes: what they send one another, and the two ways to cut a model for them.

    users   every process holds the whole model and computes a share of each batch
    items   every process holds a range of the items: its rows of both item-sized layers, its columns of the clicks

Only all_reduce and all_gather are used, which gloo has for CPUs. torch.distributed is imported by what needs it, never
by import fastvae. The numbers do not depend on how many processes there are, but for rounding.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, shown
from ._draws import Drawing
from ._item_range import ItemRange, item_range
from ._shadows import row_major
from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .ops import sparse_linear
from .ops._checks import without_autocast
from .ops._dispatch import autocast_dtype
from .ops._linear import is_only
from .ops._nll_steps import NllSteps

PARALLEL = ("users", "items")
BLOCK_BYTES = 2**23  # of a weight that is made whole, or summed up, at once


class Processes:
    """The processes of a group.

    where     whose argument parallel is, for messages
    parallel  "users" or "items"
    group     of torch.distributed; None: the default one
    """

    def __init__(self, where: str, parallel: str, group: Any = None):
        self.parallel = check_choice(where, "parallel", parallel, PARALLEL)
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{where}: parallel must be None without a process group, got {parallel}; "
                "call torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"{where}: group must contain this process, got one without process {dist.get_rank()}; "
                "call it in the processes of the group alone"
            )
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather
        self._gather_objects, self._op = dist.all_gather_object, dist.ReduceOp

    def sum(self, t: Tensor, wait: bool = True) -> Any:
        """Add t up over all processes, in place; without wait what to wait() for."""
        work = self._all_reduce(t, self._op.SUM, self.group, async_op=not wait)
        return t if wait else work

    def max(self, t: Tensor) -> Tensor:
        """The largest t of all processes, in place."""
        self._all_reduce(t, self._op.MAX, self.group)
        return t

    def gather(self, t: Tensor) -> list[Tensor]:
        """t of each process; the shapes must be one."""
        found = [torch.empty_like(t) for _ in range(self.size)]
        self._all_gather(found, t.contiguous(), self.group)
        return found

    def joined(self, t: Tensor, n: int) -> Tensor:
        """The processes' t, each the share of n rows, behind one another."""
        whole = self.placed(t, n)
        self.fill(whole)
        return whole

    def placed(self, t: Tensor, n: int) -> Tensor:
        """Memory for n rows of which this process' share is t."""
        whole = t.new_empty((n, *t.shape[1:]))
        whole[self.share(n)] = t
        return whole

    def fill(self, whole: Tensor) -> None:
        """Give each process the others' shares of the rows."""
        lengths = [b - a for a, b in itertools.pairwise(self.bounds(len(whole)))]
        places = whole.split(lengths)
        # some rows at a time: all_gather makes a copy of what it gives
        row_bytes = whole.itemsize * math.prod(whole.shape[1:]) * self.size
        step = max(1, min(max(lengths), BLOCK_BYTES // max(1, row_bytes)))
        # and always in the same memory: malloc would keep much of what it gets back
        own, *found = (whole.new_zeros((step, *whole.shape[1:])) for _ in range(1 + self.size))
        for start in range(0, max(lengths), step):
            rows = places[self.rank][start : start + step]
            own[: len(rows)] = rows
            self._all_gather(found, own, self.group)
            for place, part in zip(places, found, strict=True):
                place[start : start + step] = part[: max(0, len(place) - start)]

    def objects(self, value: Any) -> list[Any]:
        """A small value of each process."""
        found: list[Any] = [None] * self.size
        self._gather_objects(found, value, self.group)
        return found

    def share(self, n: int) -> slice:
        """This process' part of n things in a row."""
        bounds = self.bounds(n)
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def bounds(self, n: int) -> list[int]:
        """Where the processes' parts of n things begin, and n: sizes as torch.tensor_split gives them."""
        size, more = divmod(n, self.size)
        return [rank * size + min(rank, more) for rank in range(self.size + 1)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """For a block without collectives: where it fails in one process, all of them raise the first one's error."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.tell(error)

    def tell(self, error: Exception | None) -> None:
        """Raise the first error that a process tells in all of them, where one does; collective."""
        told = self.objects(None if error is None else (type(error).__name__, str(error)))
        first = next((rank for rank, failed in enumerate(told) if failed), None)
        if first is None:
            return
        if error is not None and first == self.rank:
            raise error
        name, text = told[first]
        kind = getattr(builtins, name, RuntimeError)
        raise (kind if issubclass(kind, Exception) else RuntimeError)(text) from error

    def check_alike(self, where: str, **given: Any) -> None:
        """ValueError in all processes where one of them was given something else than process 0; collective."""
        first, *others = self.objects(given)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"{where}: {name} must be the same in all processes, got {shown(other[name])} in process {rank} "
                        f"and {shown(value)} in process 0; call it with the same arguments in all of them"
                    )

    def check_same(self, what: str, weights: list[Tensor], advice: str) -> None:
        """RuntimeError where weights that all processes hold differ between them, with what to do."""
        found = self.gather(torch.stack([_sum_of_bits(w.detach()) for w in weights]))
        other = next((r for r, sums in enumerate(found) if not sums.equal(found[0])), None)
        if other is not None:
            raise RuntimeError(
                f"fit: {what} must be the same in all processes, got another in process {other} than in process 0; "
                f"{advice}"
            )


def digest_of(model: nn.Module) -> int:
    """A number that other weights would hardly give: sums of the bits of what is fp32."""
    sums = [int(_sum_of_bits(w.detach())) for w in model.parameters() if w.dtype == torch.float32]
    return hash(tuple(sums))


def _sum_of_bits(weight: Tensor) -> Tensor:
    bits = row_major(weight).view(torch.int32).reshape(-1)
    # on a CPU sum makes a copy in int64: some numbers at a time, and always in the same memory, or malloc keeps it
    block = bits.new_empty(min(len(bits), BLOCK_BYTES // bits.itemsize), dtype=torch.int64)
    total = block.new_zeros(())
    for part in bits.split(max(1, len(block))):
        total += block[: len(part)].copy_(part).sum()
    return total


class _Summed(torch.autograd.Function):
    """The sum over all processes, whose gradient every process has already: what follows it is done by all alike."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, processes: Processes) -> Tensor:
        return processes.sum(t.clone())

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        return dt, None


class _NllOfRanges(torch.autograd.Function):
    """linear_multinomial_nll over the items of all processes; the gradients of weight and bias stay local."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, clicks, compute, processes: Processes) -> Tensor:
        steps = NllSteps(hidden, weight, bias, clicks.csr, compute)
        with without_autocast(hidden.device):
            k = processes.max(steps.largest_logits())
            sums = processes.sum(steps.exponentials(k))
            nll, v = steps.subtract_clicks(sums, clicks.row_sums())
        ctx.steps, ctx.v, ctx.processes, ctx.dtype = steps, v, processes, hidden.dtype
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnll: Tensor):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        steps, dnll = ctx.steps, dnll.contiguous()
        dhidden = work = None
        with without_autocast(dnll.device):
            if need_hidden:
                dhidden, _, _ = steps.gradients(dnll, ctx.v, True, False, False)
                # on its way while the products of the weight run
                work = ctx.processes.sum(dhidden, wait=False)
            _, dweight, dbias = steps.gradients(dnll, ctx.v, False, need_weight, need_bias)
            if work is not None:
                work.wait()
        ctx.steps = None
        return None if dhidden is None else dhidden.to(ctx.dtype), dweight, dbias, None, None, None


class ItemPart:
    """This process' range of a model's items, and what its part of the model does with the other processes'.

    A model that has been cut holds the range's weights only; its n_items are those of the range.
    """

    def __init__(self, processes: Processes, model: MultiVAE | MultiDAE):
        self.processes, self.n_items = processes, model.n_items
        own = processes.share(self.n_items)
        self.first, self.last = own.start, own.stop
        first, last = model.encode.q_layers.layer(0), model.decode.output
        # layer, name, and dimension of the items of each weight with a row or a column for an item
        self._cut = [(first, "weight", 1), (last, "weight", 0), (last, "bias", 0)]
        of = {(layer, name): axis for layer, name, axis in self._cut}
        self.axes = {
            f"{path}.{name}": of[layer, name]
            for path, layer in model.named_modules()
            for name, _ in layer.named_parameters(recurse=False)
            if (layer, name) in of
        }

    def clicks(self, clicks: Clicks) -> ItemRange:
        """The range's columns of a matrix."""
        return item_range(clicks, self.first, self.last)

    # what the models' layers call in place of the ops

    def first_layer(self, layer: nn.Linear, x: Clicks, tanh: bool, **options: Any) -> Tensor:
        """As sparse_linear, over the items of all processes."""
        x = x if isinstance(x, ItemRange) else self.clicks(x)
        dtype = autocast_dtype(x.device)
        with without_autocast(x.device):
            scale = x.row_scale if options["normalize"] else None
            y = sparse_linear(
                x, layer.weight, None, tanh=False, shift=x.shift, row_scale=scale, **options
            )
            y = _Summed.apply(y, self.processes)
            y = y if layer.bias is None else y + layer.bias
            y = torch.tanh(y) if tanh else y
        return y if dtype is None else y.to(dtype)

    def nll(self, hidden: Tensor, layer: nn.Linear, clicks: Clicks) -> Tensor:
        """As linear_multinomial_nll, over the items of all processes."""
        compute = autocast_dtype(hidden.device) or hidden.dtype
        weight, bias = layer.weight, layer.bias
        return _NllOfRanges.apply(hidden, weight, bias, clicks, compute, self.processes)

    # cutting a model

    def cut(self, model: MultiVAE | MultiDAE) -> None:
        """Leave the range's weights in a whole model, which goes."""
        for layer, name, axis in self._cut:
            whole = getattr(layer, name)
            self._set(layer, name, axis, self.own(whole.detach(), axis), whole.requires_grad)
        self._mark(model, self, self.last - self.first)

    def join(self, model: MultiVAE | MultiDAE) -> None:
        """Make a model that has been cut whole again, in every process; collective."""
        for layer, name, axis in self._cut:
            own = getattr(layer, name)
            rows = own.detach().t() if axis else own.detach()
            whole = self.processes.placed(rows, self.n_items)
            self._set(layer, name, axis, whole.t() if axis else whole, own.requires_grad)
            # the share goes before the memory of the others' is touched
            del own, rows
            self.processes.fill(whole)
        self._mark(model, None, self.n_items)

    @staticmethod
    def _set(layer: nn.Linear, name: str, axis: int, t: Tensor, requires_grad: bool) -> None:
        # item by item in memory
        t = t.t().contiguous().t() if axis else t.contiguous()
        setattr(layer, name, nn.Parameter(t, requires_grad))

    @staticmethod
    def _mark(model: MultiVAE | MultiDAE, part: ItemPart | None, n_items: int) -> None:
        model.part = model.encode.part = part
        model.n_items = n_items

    def own(self, t: Tensor, axis: int = 0) -> Tensor:
        """A copy of the range's part of t, which has the items in this dimension."""
        return t.narrow(axis, self.first, self.last - self.first).clone()

    def n_bytes(self, t: Tensor, axis: int = 0) -> int:
        """Bytes of t with the items of all processes."""
        others = [size for n, size in enumerate(t.shape) if n != axis]
        return t.itemsize * math.prod(others) * self.n_items

    def whole(self, t: Tensor, axis: int = 0) -> Tensor:
        """t with the items of all processes; collective."""
        rows = self.processes.joined(t.t() if axis else t, self.n_items)
        return rows.t() if axis else rows


def check_cuttable(where: str, model: MultiVAE | MultiDAE) -> None:
    """ValueError unless both item-sized layers of a model are an nn.Linear alone, which alone can be cut."""
    for layer in (model.encode.q_layers.layer(0), model.decode.output):
        if not is_only(layer, nn.Linear):
            raise ValueError(
                f"{where}: model must have plain first and last layers for parallel='items', got "
                f"{type(layer).__name__}; parallel='users' takes any"
            )


@contextlib.contextmanager
def sharing(model: nn.Module, own: slice, n_users: int) -> Iterator[None]:
    """For the block, let a model that sees rows own of a batch of n_users draw for the whole batch and take its own."""
    parts = [part for part in model.modules() if isinstance(part, Drawing)]
    for part in parts:
        part.share = own, n_users
    try:
        yield
    finally:
        for part in parts:
            part.share = None
