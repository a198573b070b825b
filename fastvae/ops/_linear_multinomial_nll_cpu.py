"""linear_multinomial_nll on a CPU: the same functions as in kernels/linear_multinomial_nll.py, by the same names.

D [n_users, n_items] lies item by item. The products of a forward and a backward at 500 x 600 x 7,055 in bf16 take 18 ms
so, 25 ms user by user (2 cores with AMX), and fp32 products lose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clicks import Csr
from . import _buffers, _nll_steps_cpu
from ._checks import sum_dtype
from ._rows import Rows

# a bf16 weight gradient is widened to fp32 by pieces: 500 x 600 x 7,055 take 2.8 ms so, 4.9 by 1,024 (2 cores, AMX)
ITEMS_PER_GRADIENT = 4096


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this type are multiplied in."""
    # D reaches past fp16's 65504, and CPUs have no fast fp16 product
    return torch.float32 if dtype == torch.float16 else dtype


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the buffer: that of the products."""
    return compute_dtype(dtype)


def stored_width(n_items: int) -> int:
    """Columns of the buffer."""
    return n_items


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the products' dtype; itself where it is that."""
    return (
        weight
        if weight.dtype == dtype
        else _buffers.empty(tuple(weight.shape), dtype).copy_(weight)
    )


def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The buffer, item by item, from recycled memory."""
    return _buffers.empty(shape[::-1], dtype).t()


def exp_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, n_items: int, d: Tensor | None
) -> tuple[Tensor, Tensor]:
    """nll and v of some users [n_users], and D in d [n_users, n_items]; a buffer of its own where d is None."""
    d = empty((len(hidden), n_items), weight.dtype, hidden.device) if d is None else d
    targets = Rows(csr, sum_dtype(weight.dtype))
    k = _nll_steps_cpu.largest_logits(hidden, weight, bias, n_items, d)
    sums = _nll_steps_cpu.exponentials_of(d, bias, targets, k)
    nll, v, per_click = _nll_steps_cpu.results_of(sums, targets.n_clicks())
    _nll_steps_cpu.subtract_clicks_of(d, targets, per_click)
    return nll, v


class Gradients:
    """The products of the backward, some users after the other; nothing given is written to.

    hidden [n_users, n_hidden] any float, weight from cast_weight
    needs         whether the gradients of hidden, weight and bias are asked for
    weight_dtype  of the weight's gradient
    apart         whether the rows of the weight's gradient may lie apart, which they do not here
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, n_items: int, needs: tuple[bool, bool, bool], weight_dtype: torch.dtype,
        apart: bool = False,
    ):  # fmt: skip
        self.hidden, self.weight = hidden, weight
        total = sum_dtype(weight.dtype)
        self.dhidden = hidden.new_empty(hidden.shape) if needs[0] else None
        self.dweight = _buffers.empty(tuple(weight.shape), weight_dtype) if needs[1] else None
        self.dbias = hidden.new_zeros(n_items, dtype=total) if needs[2] else None

    def add(self, part: slice, d: Tensor, v: Tensor, dnll: Tensor) -> None:
        """Take a range of the users along; d and v from exp_rows, dnll of the range."""
        # 0 for a user without clicks, whose D is not the gradient
        factor = dnll * v
        if self.dhidden is not None:
            self.dhidden[part] = torch.mm(d, self.weight) * factor[:, None]
        if self.dweight is not None:
            scaled = (self.hidden[part] * factor[:, None]).to(d.dtype)
            _add_gradient(self.dweight, d, scaled, first=part.start == 0)
        if self.dbias is not None:
            self.dbias += _row_times(factor, d)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden in hidden's dtype, dweight in weight_dtype, dbias in fp32 or fp64."""
        return self.dhidden, self.dweight, self.dbias

    @staticmethod
    def new_dweight(
        hidden: Tensor, weight: Tensor, n_items: int, need_bias: bool, dtype: torch.dtype, apart: bool
    ) -> Tensor:  # fmt: skip
        """An empty dweight."""
        return weight.new_empty(weight.shape, dtype=dtype)


def _add_gradient(dweight: Tensor, d: Tensor, scaled: Tensor, first: bool) -> None:
    """dweight = D^T scaled, or dweight += where not first."""
    if dweight.dtype == d.dtype:
        dweight.addmm_(d.t(), scaled, beta=0 if first else 1)
        return
    for start in range(0, len(dweight), ITEMS_PER_GRADIENT):
        piece = slice(start, start + ITEMS_PER_GRADIENT)
        product = torch.mm(d[:, piece].t(), scaled)
        dweight[piece] = product if first else product + dweight[piece]


def _row_times(factor: Tensor, d: Tensor) -> Tensor:
    """factor @ d with the factor's precision."""
    high = factor.to(d.dtype)
    if high.dtype == factor.dtype:
        return torch.mv(d.t(), factor)
    # high and low half: the factor rounded to bf16 alone would tilt a whole row
    low = (factor - high).to(d.dtype)
    return torch.mm(torch.stack((high, low)), d).to(factor.dtype).sum(0)
