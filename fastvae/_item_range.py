"""A range of a click matrix's items, with what the whole rows give to the ops that see these columns only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clicks import Clicks


class ItemRange(Clicks):
    """Columns first .. last of a click matrix, numbered from 0. Made by item_range.

    shifts      [n_rows] int64  what a click's position here lacks to its position in the whole matrix
    row_scales  [n_rows] fp32   1 / ||x[u]|| of the whole row; 0 for an empty one
    totals      [n_rows] fp32   N_u of the whole row

    rows() of it are ranges too.
    """

    shifts: Tensor
    row_scales: Tensor
    totals: Tensor

    def _like(self, indptr, indices, values, n_items, row_ids=None) -> Clicks:
        other = super()._like(indptr, indices, values, n_items, row_ids)
        if indptr is not self.indptr:
            return other  # other rows, to which the numbers do not belong
        return _as_range(other, self.shifts, self.row_scales, self.totals)

    def row_sums(self) -> Tensor:
        """Clicks N_u of each user in all items, float32 [n_users]."""
        return self._of_rows(self.totals)

    @property
    def shift(self) -> Tensor:
        """[n_users], as sparse_linear takes it."""
        return self._of_rows(self.shifts)

    @property
    def row_scale(self) -> Tensor:
        """[n_users], as sparse_linear takes it."""
        return self._of_rows(self.row_scales)

    def _of_rows(self, t: Tensor) -> Tensor:
        return t if self.row_ids is None else t[self.row_ids]


def item_range(clicks: Clicks, first: int, last: int) -> ItemRange:
    """Items first .. last of a click matrix; of a choice of rows the same choice, with the positions of its matrix."""
    whole = clicks._like(clicks.indptr, clicks.indices, clicks.values, clicks.n_items)
    indptr, indices, values = whole.indptr, whole.indices, whole.values
    keep = (indices >= first) & (indices < last)
    bounds = _before(keep)[indptr]
    # a row is sorted: its items of the range lie side by side, behind those below it
    begin = indptr[:-1] + _before(indices < first)[indptr].diff()
    part = whole._like(
        bounds, indices[keep] - first, None if values is None else values[keep], last - first
    )
    lengths = whole.row_lengths()
    squares = lengths.float() if values is None else _square_sums(whole, values)
    row_scales = squares.rsqrt().masked_fill_(lengths == 0, 0)
    found = _as_range(part, begin - bounds[:-1], row_scales, whole.row_sums())
    return found if clicks.row_ids is None else found.rows(clicks.row_ids)  # type: ignore[return-value]


def _as_range(part: Clicks, shifts: Tensor, row_scales: Tensor, totals: Tensor) -> ItemRange:
    found = object.__new__(ItemRange)
    found._set(part.indptr, part.indices, part.values, part.n_items, part.row_ids)
    found.shifts, found.row_scales, found.totals = shifts, row_scales, totals
    return found


def _before(t: Tensor) -> Tensor:
    """How many are true before each position, and in all."""
    return F.pad(torch.cumsum(t, 0), (1, 0))


def _square_sums(whole: Clicks, values: Any) -> Tensor:
    squares = values.detach().double().square()
    return torch.segment_reduce(squares, "sum", offsets=whole.indptr, unsafe=True).float()
