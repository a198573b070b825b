"""The loss in steps on a CPU: the same functions as in kernels/nll_steps.py, by the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from ..clicks import Csr
from ._checks import sum_dtype
from ._linear_multinomial_nll_cpu import product
from ._rows import Rows
from .multinomial_nll import row_blocks


def largest_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, n_items: int, d: Tensor
) -> Tensor:
    """Write the logits without bias into d [n_users, n_items], and return each row's largest with it, [n_users]."""
    total = sum_dtype(weight.dtype)
    lowest = torch.finfo(total).min
    k = hidden.new_full((len(hidden),), lowest, dtype=total)
    if n_items == 0:
        return k
    product(hidden, weight, d)
    for block in row_blocks(d):
        k[block] = torch.amax(_with_bias(d[block], bias), 1).clamp_min(lowest)
    return k


def exponentials(d: Tensor, bias: Tensor | None, csr: Csr, n_items: int, k: Tensor) -> Tensor:
    """Turn d's logits into E, and return S and T [2, n_users] in k's dtype."""
    targets = Rows(csr, k.dtype)
    sums = k.new_zeros(2, len(d))
    clicked = k.new_empty(len(targets.item))
    flat = targets.user * n_items + targets.item
    for block in row_blocks(d):
        first, last = int(targets.offsets[block.start]), int(targets.offsets[block.stop])
        z = _with_bias(d[block], bias)
        torch.take(z, flat[first:last] - block.start * n_items, out=clicked[first:last])
        d[block] = z.sub_(k[block, None]).exp_()
        # of E as rounded for the buffer: D then sums to zero over a row
        sums[0, block] = d[block].sum(1, dtype=k.dtype)
    sums[1] = targets.per_user(targets.times_value(k[targets.user] - clicked))
    return sums


def subtract_clicks(d: Tensor, csr: Csr, n_items: int, per_click: Tensor) -> None:
    """Turn d's E into D; per_click [n_users] is 1 / v."""
    targets = Rows(csr, per_click.dtype)
    flat = targets.user * n_items + targets.item
    d.view(-1)[flat] -= targets.times_value(per_click[targets.user]).to(d.dtype)


def _with_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    # a copy, which may be written to
    z = logits.to(sum_dtype(logits.dtype), copy=True)
    return z if bias is None else z.add_(bias)
