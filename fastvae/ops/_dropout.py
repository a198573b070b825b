"""The keep mask of the input dropout, computed fast on a CPU; reference.dropout_keep says the same plainly."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def dropout_keep(seed: Tensor, position: Tensor, dropout: float) -> Tensor:
    """Keep mask of the clicks at these positions; see fastvae.reference.dropout_keep.

    seed      [1]  int64
    position  [n]  int64: position of each click in the whole matrix's indices
    dropout   probability to drop, 0..1
    returns   [n]  bool
    """
    c0, c1 = position & _MASK_32, position >> 32
    c2, c3 = torch.zeros_like(position), torch.zeros_like(position)
    a, b = torch.empty_like(position), torch.empty_like(position)
    key = int(seed)
    k0, k1 = key & _MASK_32, (key >> 32) & _MASK_32
    for _ in range(10):
        # a product of two 32-bit numbers wraps into the sign bit of int64, but its bits are right
        torch.mul(c0, 0xD2511F53, out=a)
        torch.mul(c2, 0xCD9E8D57, out=b)
        # c1 and c3 keep bits above 32, which the mask drops
        torch.bitwise_right_shift(b, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK_32)
        torch.bitwise_right_shift(a, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK_32)
        # c1 and c3 are free for the next products
        c1, c3, a, b = b, a, c3, c1
        k0, k1 = (k0 + 0x9E3779B9) & _MASK_32, (k1 + 0xBB67AE85) & _MASK_32
    return (c0 >> 8) >= round(dropout * 2**24)
