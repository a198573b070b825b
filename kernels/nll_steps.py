"""linear_multinomial_nll on a range of the items, in steps between which its caller sums over all ranges.

    k[u]    = max_i logits[u, i]                            largest_logits
    E[u, i] = exp(logits[u, i] - k[u])                      exponentials, with the largest k of all ranges:
    S[u]    = sum_i E[u, i]                                     sums[0]
    T[u]    = sum_i x[u, i] (k[u] - logits[u, i])               sums[1]
    D[u, i] = E[u, i] - x[u, i] / v[u]                      subtract_clicks, with v = N / S of all ranges

nll = N log S + T of all ranges. Formulas and gradients: kernels/linear_multinomial_nll.py, whose second way to E this is,
cut where a sum or a maximum crosses the ranges. fastvae.ops has the same functions for the CPU, by the same names.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import exp_row, tiles
from .csr import Csr, check_rows, row_clicks
from .launch import launch
from .products import logits


@triton.jit
def _largest_logits_kernel(
    e_ptr, bias_ptr,  # inputs: logits without bias
    k_ptr,  # outputs
    n_items,  # sizes
    N_PADDED: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    k = exp_row.largest_logit(e_ptr + u * N_PADDED, bias_ptr, n_items, N_PADDED, BLOCK_I)
    tl.store(k_ptr + u, k)


@triton.jit
def _exponentials_kernel(
    e_ptr,  # in place: logits without bias become E
    bias_ptr, k_ptr, indptr_ptr, indices_ptr, values_ptr, rows_ptr,  # inputs
    sums_ptr,  # outputs: S, and behind all of it T
    n_items,  # sizes
    N_PADDED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    row_ptr = e_ptr + u * N_PADDED
    k = tl.load(k_ptr + u)

    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    # the clicked logits, while they are there
    below = exp_row.clicked_below(
        row_ptr, bias_ptr, indices_ptr, values_ptr, begin, end, k, BLOCK_NNZ
    )
    tl.store(sums_ptr + tl.num_programs(0) + u, below)
    total = exp_row.exponentials(row_ptr, bias_ptr, k, n_items, N_PADDED, BLOCK_I)
    tl.store(sums_ptr + u, total)


@triton.jit
def _subtract_clicks_kernel(
    e_ptr,  # in place: E becomes D
    per_click_ptr, indptr_ptr, indices_ptr, values_ptr, rows_ptr,  # inputs
    N_PADDED: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    per_click = tl.load(per_click_ptr + u)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    row_ptr = e_ptr + u * N_PADDED
    exp_row.subtract_clicks(row_ptr, indices_ptr, values_ptr, begin, end, per_click, BLOCK_NNZ)


def largest_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, n_items: int, d: Tensor
) -> Tensor:
    """Write the logits without bias into d, and return each row's largest with it.

    hidden   [n_users, n_hidden]  fp32, bf16 or fp16; contiguous
    weight   [>= n_items, n_hidden]  dtype of hidden, from cast_weight
    bias     [n_items]            any float; contiguous, or None
    d        [n_users, stored_width] of stored_dtype
    returns  k [n_users] fp32; the lowest number of all without items
    """
    k = torch.full((len(hidden),), exp_row.LOWEST.value, dtype=torch.float32, device=hidden.device)
    if len(hidden) == 0 or n_items == 0:
        return k
    with tiles.device_guard(hidden):
        logits(hidden, weight, n_items, d)
        tile = tiles.of(hidden.device).exp_row
        launch(
            _largest_logits_kernel, (len(hidden),),
            d, bias,
            k,
            n_items,
            N_PADDED=d.stride(0), BLOCK_I=tile.block_i, num_warps=tile.num_warps,
        )  # fmt: skip
    return k


def exponentials(d: Tensor, bias: Tensor | None, csr: Csr, n_items: int, k: Tensor) -> Tensor:
    """Turn d's logits into E.

    d, bias, n_items  as largest_logits left and took them
    csr      the users' clicks on these items, see kernels/csr.py
    k        [n_users] fp32, contiguous: at least largest_logits
    returns  sums [2, n_users] fp32: S and T
    """
    check_rows(csr)
    sums = torch.zeros(2, len(d), dtype=torch.float32, device=d.device)
    if len(d) == 0 or n_items == 0:
        return sums
    tile = tiles.of(d.device).exp_row
    with tiles.device_guard(d):
        launch(
            _exponentials_kernel, (len(d),),
            d,
            bias, k, *csr,
            sums,
            n_items,
            N_PADDED=d.stride(0), BLOCK_I=tile.block_i, BLOCK_NNZ=tile.block_nnz, num_warps=tile.num_warps,
        )  # fmt: skip
    return sums


def subtract_clicks(d: Tensor, csr: Csr, n_items: int, per_click: Tensor) -> None:
    """Turn d's E into D; per_click [n_users] fp32, contiguous: 1 / v."""
    check_rows(csr)
    if len(d) == 0 or n_items == 0:
        return
    with tiles.device_guard(d):
        launch(
            _subtract_clicks_kernel, (len(d),),
            d,
            per_click, *csr,
            N_PADDED=d.stride(0), BLOCK_NNZ=tiles.CLICKS_PER_BLOCK, num_warps=4,
        )  # fmt: skip
