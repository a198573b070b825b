"""warm_up: compile the kernels of a training side by side, before its first step or on a machine without a GPU.

A step is made on torch's meta device, which takes neither memory nor time: each launch only says what is to be compiled.
What has been compiled lies in Triton's cache (TRITON_CACHE_DIR), where a later process finds it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._checks import check_choice, check_flag, check_integer
from .adam import Adam
from .clicks import Clicks
from .models import MultiDAE, MultiVAE
from .ops._dispatch import needing_triton, traced
from .ops.linear_multinomial_nll import gradients_as_they_come
from .step import PRECISIONS, backward_of_mean, matmul_precision

META = torch.device("meta")


def warm_up(
    model: MultiVAE | MultiDAE,
    batch_sizes: Iterable[int],
    *,
    precision: str = "fp32",
    counts: bool = False,
    lr: float | Tensor = 1e-3,
    capability: int | None = None,
) -> int:
    """Compile what fit() launches for this model, as many kernels at once as there are cores.

    model        a MultiVAE or MultiDAE as it will be trained, on any device, meta too; it is only looked at
    batch_sizes  users per update, an epoch's last batch included
    precision    as in fit
    counts       whether the clicks have values; fit's do not where every click counts one
    lr           as the optimiser will have it: a float, or a tensor on the device
    capability   compute capability of the card, 90 for an H100; None: the current GPU. Only for a machine without a GPU

    returns      kernels that this process had not compiled or read before

    Raises: ValueError and TypeError for arguments that do not fit, RuntimeError where triton is missing.
    """
    where = "warm_up"
    if type(model) not in (MultiVAE, MultiDAE):
        raise TypeError(
            f"{where}: model must be a MultiVAE or MultiDAE, got {type(model).__name__}"
        )
    sizes = [check_integer(where, "batch_sizes", size, 1) for size in batch_sizes]
    check_choice(where, "precision", precision, PRECISIONS)
    check_flag(where, "counts", counts)
    has_gpu = torch.cuda.is_available()
    if capability is None and not has_gpu:
        raise ValueError(f"{where}: capability must be given where torch finds no GPU, got None")
    if capability is not None and has_gpu:
        raise ValueError(f"{where}: capability must be None where there is a GPU, got {capability}")
    with needing_triton(where):
        from .kernels import launch, tiles
    if capability is None:
        chip = tiles.chip_of(torch.device("cuda", torch.cuda.current_device()))
    else:
        check_integer(where, "capability", capability, 75, 129)
        chip = tiles.row_of(capability // 10)
        launch.without_gpu(capability)
    with launch.compiling(chip) as n_kernels:
        _step_on_meta(model, sizes, precision, counts, lr)
    return n_kernels()


def _step_on_meta(model, sizes: list[int], precision: str, counts: bool, lr: float | Tensor):
    with META:
        twin = type(model)(**model.config())
    for own, given in zip(twin.parameters(), model.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    weights = [p for p in twin.parameters() if p.requires_grad]
    bf16 = precision == "bf16"
    lr = torch.empty_like(lr, device=META) if isinstance(lr, Tensor) and lr.is_cuda else lr
    optimizer = Adam(weights, lr, shadow=bf16)
    with matmul_precision(precision), traced(torch.bfloat16 if bf16 else None):
        # twice, since the first step finds no copies by the optimiser yet
        for size in [size for size in sizes for _ in range(2)]:
            with gradients_as_they_come():
                nll, kld = twin.loss_terms(_clicks(size, twin.n_items, counts))
            beta = torch.empty((), dtype=torch.float32, device=META)
            backward_of_mean(nll, kld, beta, weights)
            optimizer.step()
    twin.eval()
    # validation
    with torch.no_grad(), traced(None):
        twin(_clicks(sizes[0], twin.n_items, counts))


def _clicks(n_users: int, n_items: int, counts: bool) -> Clicks:
    """A batch on the meta device."""
    indptr, rows = (torch.empty(n, dtype=torch.int64, device=META) for n in (n_users + 1, n_users))
    indices = torch.empty(1, dtype=torch.int32, device=META)
    values = torch.empty(1, dtype=torch.float32, device=META) if counts else None
    empty = Clicks([0], [], n_items=n_items)
    return empty._like(indptr, indices, values, n_items, rows)
