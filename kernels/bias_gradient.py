"""The gradient before a layer's tanh, and with it that of the layer's bias, in one pass.

    dpre[u, d] = dy[u, d] (1 - y[u, d]^2)       y = tanh(pre); a layer without tanh has dpre = dy
    dbias[d]   = sum_u dpre[u, d]

A program takes a few columns, 32 bytes of each row, and up to USERS of its users; where there are more, the programs
leave partial sums, which the same kernel adds up: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import launch

BLOCK_U, BLOCK_D, NUM_WARPS = 256, 16, 8
USERS = 1024  # of a program: a multiple of BLOCK_U


@triton.jit
def _bias_gradient_kernel(
    dy_ptr, y_ptr,  # inputs
    dpre_ptr, sums_ptr,  # outputs; dpre where there is y
    n_users,  # sizes
    N_COLUMNS: tl.constexpr, USERS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    acc = tl.zeros([BLOCK_U, BLOCK_D], tl.float32)
    for start in range(part * USERS, tl.minimum((part + 1) * USERS, n_users), BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        mask = (u < n_users)[:, None] & (d < N_COLUMNS)[None, :]
        # int64: 2,100,000 users of 1,024 numbers lie beyond 2**31
        offset = u.to(tl.int64)[:, None] * N_COLUMNS + d[None, :]
        dpre = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            dpre *= 1.0 - y * y
            tl.store(dpre_ptr + offset, dpre, mask=mask)
        acc += dpre
    tl.store(sums_ptr + part * N_COLUMNS + d, tl.sum(acc, axis=0), mask=d < N_COLUMNS)


def bias_gradient(dy: Tensor, y: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Launch the kernel. Arguments are already checked by fastvae.ops.

    dy       [n_users, n_columns]  fp32, bf16 or fp16; contiguous
    y        [n_users, n_columns]  fp32, bf16 or fp16; contiguous, or None for a layer without tanh
    returns  dpre [n_users, n_columns] dtype of y, or None without it; dbias [n_columns] fp32
    """
    n_users, n_columns = dy.shape
    dpre = None if y is None else torch.empty_like(y)
    if n_users == 0 or n_columns == 0:
        return dpre, torch.zeros(n_columns, dtype=torch.float32, device=dy.device)
    with tiles.device_guard(dy):
        sums = _launch(dy, y, dpre)
        while len(sums) > 1:
            sums = _launch(sums, None, None)
    return dpre, sums[0]


def _launch(dy: Tensor, y: Tensor | None, dpre: Tensor | None) -> Tensor:
    """Sums of each part of the users [n_parts, n_columns], and dpre where there is y."""
    n_users, n_columns = dy.shape
    n_parts = tiles.cdiv(n_users, USERS)
    sums = torch.empty(n_parts, n_columns, dtype=torch.float32, device=dy.device)
    launch(
        _bias_gradient_kernel, (tiles.cdiv(n_columns, BLOCK_D), n_parts),
        dy, y,
        dpre, sums,
        n_users,
        N_COLUMNS=n_columns, USERS=USERS, BLOCK_U=BLOCK_U, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums
