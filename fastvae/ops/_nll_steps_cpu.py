"""The loss in steps on a CPU: the same functions as in kernels/nll_steps.py, by the same names.

The logits and what becomes of them lie item by item in d, see _linear_multinomial_nll_cpu.py. fp32 and fp64 logits take
their bias at once; in bf16, where that would round them twice, each pass adds it anew.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..clicks import Csr
from . import _buffers
from ._checks import sum_dtype
from ._rows import Rows

# of fp32 logits, which several passes find in the cache
BLOCK_BYTES = 2**21


def largest_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, n_items: int, d: Tensor
) -> Tensor:
    """Write the logits into d [n_users, n_items], and return each row's largest with its bias, [n_users]."""
    total = sum_dtype(weight.dtype)
    # not -inf: a row of -inf alone then has exponentials of 0
    k = hidden.new_full((len(hidden),), torch.finfo(total).min, dtype=total)
    logits = d.t()
    torch.mm(weight, hidden.t(), out=logits)
    for _, z in _item_blocks(logits, bias, total):
        torch.maximum(k, torch.amax(z, 0), out=k)
    return k


def exponentials(d: Tensor, bias: Tensor | None, csr: Csr, n_items: int, k: Tensor) -> Tensor:
    """Turn d's logits into E, and return S and T [2, n_users] in k's dtype."""
    return exponentials_of(d, bias, Rows(csr, k.dtype), k)


def exponentials_of(d: Tensor, bias: Tensor | None, targets: Rows, k: Tensor) -> Tensor:
    """exponentials() of clicks that are looked up already."""
    logits, rounded = d.t(), d.dtype != k.dtype
    clicked = logits[targets.item, targets.user].to(k.dtype)
    if rounded and bias is not None:
        clicked += bias[targets.item]
    sums = k.new_zeros(2, len(d))
    sums[1] = targets.per_user(targets.times_value(k[targets.user] - clicked))
    for block, z in _item_blocks(logits, bias if rounded else None, k.dtype):
        z.sub_(k).exp_()
        if rounded:
            logits[block] = z
        sums[0] += z.sum(0)
    return sums


def results_of(sums: Tensor, n_clicks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll, v and 1 / v (inf without clicks) [n_users], from S and T [2, n_users] and N [n_users] of whole rows.

    All in the sums' dtype.
    """
    total, below = sums
    # a click costs inf where all logits are -inf, and a user without clicks 0
    dead, has_clicks = total == 0, n_clicks > 0
    total = total.masked_fill(dead, 1)
    nll = (n_clicks * total.log() + below).masked_fill(dead, torch.inf)
    return nll.masked_fill(~has_clicks, 0), n_clicks / total, total / n_clicks


def subtract_clicks(d: Tensor, csr: Csr, n_items: int, per_click: Tensor) -> None:
    """Turn d's E into D; per_click [n_users] is 1 / v."""
    subtract_clicks_of(d, Rows(csr, per_click.dtype), per_click)


def subtract_clicks_of(d: Tensor, targets: Rows, per_click: Tensor) -> None:
    """subtract_clicks() of clicks that are looked up already."""
    taken = targets.times_value(per_click[targets.user]).to(d.dtype)
    d.t()[targets.item, targets.user] -= taken


def _item_blocks(
    logits: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of items, and their logits [some items, n_users] plus bias: in place, or widened where of another dtype."""
    n_items, n_users = logits.shape
    step = min(n_items, max(1, BLOCK_BYTES // max(1, 4 * n_users)))
    rounded = logits.dtype != dtype
    widened = _buffers.empty((step, n_users), dtype) if rounded else logits
    for start in range(0, n_items, step or 1):
        block = slice(start, min(start + step, n_items))
        z = logits[block]
        if rounded:
            z = widened[: len(z)].copy_(z)
        yield block, z if bias is None else z.add_(bias[block, None])
