"""Matrix products by torch that never have n_items as a dimension.

The vendor's libraries take an old kernel, three times slower, where a dimension is no multiple of 8. So a buffer over
the items is padded with zeros to stored_width columns, and a weight that has to be cast anyway with rows of zeros. One
that need not be copied is multiplied in two pieces: a copy for the padding alone would cost n_items * n_hidden * 8
bytes of traffic and half of that in memory each step (97 MB and 48 MB at 20,108 x 600 in fp32), a second product over
fewer than 64 items one more pass over [n_users, n_hidden] (2.4 MB at 500 users).
"""

import torch
from torch import Tensor

from . import tiles

PAD = 128  # the buffer's width is a multiple of this, which aligns every row and tile
WHOLE = 64  # items: the first piece of a product with an unpadded weight holds a multiple of this


def stored_width(n_items: int) -> int:
    """Columns of the buffer; those beyond n_items hold zeros."""
    return tiles.cdiv(n_items, PAD) * PAD


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the products' dtype: padded with rows of zeros where that needs a copy, itself where not."""
    if weight.dtype == dtype:
        return weight.contiguous()
    n_items, n_hidden = weight.shape
    wide = torch.empty(stored_width(n_items), n_hidden, dtype=dtype, device=weight.device)
    wide[:n_items] = weight
    wide[n_items:].zero_()
    return wide


def pieces(n_items: int, n_rows: int) -> list[slice]:
    """Ranges of items for one product each, with a weight of n_rows rows."""
    whole = n_items // WHOLE * WHOLE
    if n_rows > n_items or whole in (0, n_items):
        return [slice(0, n_rows)]
    return [slice(0, whole), slice(whole, n_items)]


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with fp32 sums, and an fp32 result where out says nothing else."""
    if out is None or out.dtype != a.dtype:
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def logits(hidden: Tensor, weight: Tensor, n_items: int, d: Tensor) -> None:
    """Write hidden weight^T into the buffer d [n_users, stored_width], and zeros into its padding."""
    for piece in pieces(n_items, weight.shape[0]):
        mm(hidden, weight[piece].t(), out=d[:, piece])
    if weight.shape[0] < d.shape[1]:
        d[:, n_items:].zero_()
