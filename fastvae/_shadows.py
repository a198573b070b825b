"""Shadows: bf16 copies of weights that fastvae.Adam writes as it updates them; the ops take them in place of a cast.

A shadow counts only as long as its weight is as it was when the shadow was written: in the same memory, at the same
version, which torch raises with each change in place (load_state_dict, another optimiser, nn.init, copy_ in no_grad).
Writes through .data, a pointer or a collective escape the version, and with it torch's own checks: who makes one
raises it, torch.autograd.graph.increment_version(weights).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128  # a shadow has a multiple of so many rows: products with a dimension that is none take slow kernels


class Shadow:
    """The copy of one weight.

    rows  [n_rows, ...] bf16: the weight in the order of its memory, an item-major one as [n_items, n_hidden], and
          rows of zeros up to a multiple of ROWS
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.layout = _layout(weight)
        self.is_transposed = row_major(weight) is not weight
        first, *others = row_major(weight).shape or (1,)
        n_rows = -(-first // ROWS) * ROWS
        self.rows = torch.zeros((n_rows, *others), dtype=torch.bfloat16, device=weight.device)
        self._written: tuple | None = None

    def has_written(self) -> None:
        """Say that rows hold the weight as it is now."""
        self._written = _state(self.weight)
        if _KEPT.get(id(self.weight)) is not self:
            _KEPT[id(self.weight)] = self

    def is_fresh(self) -> bool:
        """Whether nothing has changed the weight since."""
        return self._written == _state(self.weight)

    def fits(self) -> bool:
        """Whether the weight still lies as it did when the shadow was made."""
        return self.layout == _layout(self.weight)

    def refresh(self) -> None:
        """Copy the weight anew where something has changed it, into the same memory."""
        if not self.is_fresh():
            weight = row_major(self.weight.detach())
            self.rows[: len(weight)].copy_(weight)
            self.has_written()


# by the weight's identity: a shadow holds its weight, so no other tensor can have it meanwhile
_KEPT: weakref.WeakValueDictionary[int, Shadow] = weakref.WeakValueDictionary()
_refreshing = False


def shadow_of(weight: Tensor, transposed: bool = False) -> Tensor | None:
    """The rows of a weight's shadow, see Shadow, or None where there is none or the weight has changed since.

    transposed  asks for the rows of weight.t(); None where the weight does not lie in memory as asked for
    None too under torch.compile, and in a CUDA graph whose replays do not see to fresh shadows: see captured.
    """
    if torch.compiler.is_compiling():
        return None
    shadow = _KEPT.get(id(weight))
    if shadow is None or shadow.is_transposed != transposed or not shadow.is_fresh():
        return None
    if not _refreshing and is_being_captured(weight):
        return None
    return shadow.rows


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """While a CUDA graph is captured that may read shadows: each replay must come after Adam.refresh_shadows."""
    global _refreshing
    before, _refreshing = _refreshing, True
    try:
        yield
    finally:
        _refreshing = before


def is_being_captured(t: Tensor) -> bool:
    """Whether work on t now becomes part of a CUDA graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def row_major(t: Tensor) -> Tensor:
    """t, or its transpose where that is the contiguous one, as of a weight stored item by item."""
    if t.ndim != 2 or t.is_contiguous():
        return t
    transposed = t.t()
    return transposed if transposed.is_contiguous() else t


def _layout(weight: Tensor) -> tuple:
    return weight.shape, weight.stride(), weight.device


def _state(weight: Tensor) -> tuple:
    return weight._version, weight.data_ptr(), weight.shape, weight.stride()
