"""linear_multinomial_nll on a range of the items, in steps between which its caller sums over all ranges.

    steps   = NllSteps(hidden, weight, bias, csr, compute)       of a range's weight, bias and clicks
    k       = steps.largest_logits()                             of the range; wanted: the largest of all ranges
    sums    = steps.exponentials(k)                              S and T of the range; wanted: their totals
    nll, v  = steps.subtract_clicks(sums, n_clicks)              the same on all ranges
    dhidden, dweight, dbias = steps.gradients(dnll, v, ...)      wanted: dhidden's total

Nothing here knows of processes. Formulas: kernels/nll_steps.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clicks import Csr
from . import _nll_steps_cpu
from ._dispatch import needing_triton, uses_kernels
from ._nll_steps_cpu import results_of
from .linear_multinomial_nll import _way


class NllSteps:
    """The steps on one range of items; afterwards gradients() gives the products of the backward.

    hidden   [n_users, n_hidden]  any float
    weight   [n_items, n_hidden]  of the range; likewise
    bias     [n_items], or None
    csr      the users' clicks on the range's items
    compute  dtype of the products
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, compute: torch.dtype
    ):
        self.way = _way(hidden)
        compute = self.way.compute_dtype(compute)
        self.hidden, self.csr, self.n_items = hidden, csr, len(weight)
        self.weight_dtype = weight.dtype
        self.weight = self.way.cast_weight(weight.detach(), compute)
        self.bias = None if bias is None else bias.detach().contiguous()
        shape = (len(hidden), self.way.stored_width(self.n_items))
        self.d = self.way.empty(shape, self.way.stored_dtype(compute), hidden.device)
        self.steps: Any = _steps(hidden)

    def largest_logits(self) -> Tensor:
        """k [n_users] fp32 (fp64 for fp64 input): the largest logit of the range, far below all without items."""
        same = self.hidden.detach().to(self.weight.dtype).contiguous()
        return self.steps.largest_logits(same, self.weight, self.bias, self.n_items, self.d)

    def exponentials(self, k: Tensor) -> Tensor:
        """S and T [2, n_users] of the range, from the largest k of all ranges."""
        return self.steps.exponentials(self.d, self.bias, self.csr, self.n_items, k)

    def subtract_clicks(self, sums: Tensor, n_clicks: Tensor) -> tuple[Tensor, Tensor]:
        """nll and v [n_users], from S and T summed over all ranges and N [n_users] of whole rows."""
        # whose total is over all ranges, as N is
        nll, v, per_click = results_of(sums, n_clicks.to(sums.dtype))
        self.steps.subtract_clicks(self.d, self.csr, self.n_items, per_click)
        return nll, v

    def gradients(
        self, dnll: Tensor, v: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden of the range, to be summed over all, dweight and dbias; None where not needed.

        dhidden and dbias are fp32 (fp64 for fp64 input), dweight has weight's dtype.
        """
        needs, hidden = (need_hidden, need_weight, need_bias), self.hidden.detach().to(v.dtype)
        products = self.way.Gradients(hidden, self.weight, self.n_items, needs, self.weight_dtype)
        products.add(slice(0, len(hidden)), self.d, v, dnll)
        return products.results()


def _steps(hidden: Tensor) -> Any:
    if not uses_kernels(hidden):
        return _nll_steps_cpu
    with needing_triton("linear_multinomial_nll"):
        from ..kernels import nll_steps
    return nll_steps
