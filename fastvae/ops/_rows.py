"""A batch of users' clicks as coordinate lists, for the CPU functions of the ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clicks import Csr, gather_rows
from ._dropout import dropout_keep


class Rows:
    """Item, user, value and position of each click of the batch; user u's are [offsets[u], offsets[u + 1]).

    csr    the clicks, see Clicks.csr
    dtype  of value, and of what is computed from it
    """

    def __init__(self, csr: Csr, dtype: torch.dtype):
        indptr, indices, values, rows = csr
        self.dtype = dtype
        self.offsets, self.position = gather_rows(indptr, rows)
        self.item = indices[self.position].long()
        self.user = torch.repeat_interleave(self.offsets.diff())
        self.value = None if values is None else values[self.position].to(dtype)

    # the loss

    def times_value(self, t: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """t[n] * x of click n."""
        return t if self.value is None else t * self.value[first:last]

    def n_clicks(self) -> Tensor:
        """N_u = sum_i x[u, i]."""
        if self.value is None:
            return self.offsets.diff().to(self.dtype)
        return self.per_user(self.value)

    def per_user(self, t: Tensor) -> Tensor:
        """Sums of t [nnz] over each user's clicks."""
        # one after the other: in fp32 a user of 1,000 clicks would lose a digit
        total = t.new_zeros(len(self.offsets) - 1, dtype=torch.float64)
        return total.index_add_(0, self.user, t.double()).to(t.dtype)

    def nll(self, clicked: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
        """sum_i x[u, i] (lse[u] - logit[u, i]) from the clicked logits [nnz]."""
        # maximum and log-sum stay apart: at logits of 1e8 their sum would lose the loss
        return self.per_user(self.times_value((peak[self.user] - clicked) + log_sum[self.user]))

    # the first layer

    def scale(self, dropout: float, normalize: bool, row_scale: Tensor | None = None) -> Tensor:
        """s[u] = 1 / (||x[u]|| (1 - dropout)), row_scale for 1 / ||x[u]|| where given; 0 without clicks, at dropout 1."""
        lengths = self.offsets.diff()
        if row_scale is not None:
            scale = row_scale.clone()
        elif not normalize:
            scale = lengths.new_ones(len(lengths), dtype=self.dtype)
        elif self.value is None:
            scale = lengths.to(self.dtype).rsqrt()
        else:
            squares = lengths.new_zeros(len(lengths), dtype=self.dtype)
            scale = squares.index_add_(0, self.user, self.value.square()).rsqrt()
        scale[lengths == 0] = 0
        return scale / (1 - dropout) if dropout < 1 else torch.zeros_like(scale)

    def shifted(self, shift: Tensor | None) -> Tensor:
        """Position of each click in the matrix that the dropout is of; shift [n_users], or None for this one."""
        return self.position if shift is None else self.position + shift[self.user]

    def kept(
        self, scale: Tensor, seed: Tensor | None, shift: Tensor | None, dropout: float, tanh_input: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Clicks that dropout keeps: item, coefficient, offsets [n_users + 1], user."""
        item, user, offsets = self.item, self.user, self.offsets
        coefficient = scale[user] if self.value is None else scale[user] * self.value
        if seed is not None:
            keep = dropout_keep(seed, self.shifted(shift), dropout)
            before = F.pad(torch.cumsum(keep, 0), (1, 0))
            kept = keep.nonzero().squeeze(1)
            item, user, coefficient = item[kept], user[kept], coefficient[kept]
            offsets = before[offsets]
        return item, coefficient.tanh_() if tanh_input else coefficient, offsets, user
