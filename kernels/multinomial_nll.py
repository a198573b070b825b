"""Multinomial negative log-likelihood from stored logits, with the clicks read from CSR.

    lse[u]        = log sum_i exp(logits[u, i])
    nll[u]        = sum_i x[u, i] * (lse[u] - logits[u, i])
    dlogits[u, i] = dnll[u] * (N[u] * exp(logits[u, i] - lse[u]) - x[u, i]),   N[u] = sum_i x[u, i]

x is the click matrix; user u of the batch is its row rows[u]. The dense [n_users, n_items] target is never built, nor
are log-probabilities. A long row is split over programs, whose partial sums are combined in order.
lse is kept as two numbers, the row's largest logit (peak) and the log of the sum of exponentials relative to it: at
logits near 1e8 their sum in fp32 would round the second, which is the loss, away.
Math: Liang et al. 2018, eq. 2 (arXiv:1802.05814). Reference: fastvae.reference.multinomial_nll.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, check_rows, click_values, row_clicks, row_sum
from .launch import launch

# start of a running maximum: unlike -inf it gives no NaN in differences
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _merge(peak, total):
    """One (peak, total) from a vector of them; total is a sum of exp(logits - peak)."""
    top = tl.max(peak, axis=0)
    return top, tl.sum(total * tl.exp(peak - top), axis=0)


@triton.jit
def _sum_exp(row_ptr, begin, end, n_items, BLOCK_I: tl.constexpr):
    """(peak, total) of columns begin to end of a row; a split ends at a block, or at the row's end."""
    # each lane runs its own online sum: one exponential a logit, no reduction inside the loop
    peak = tl.full([BLOCK_I], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    for start in range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        logits = tl.load(row_ptr + i, mask=i < n_items, other=-float("inf")).to(tl.float32)
        rise = logits - peak
        scale = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * scale + 1.0, total + scale)
        peak = tl.maximum(peak, logits)
    return _merge(peak, total)


@triton.jit
def _multinomial_nll_split_kernel(
    logits_ptr,  # inputs
    parts_ptr,  # outputs
    n_items,  # sizes
    stride_logits_u,  # strides, in elements
    ALIGN: tl.constexpr, SPLIT_I: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    n_items = n_items // ALIGN * ALIGN
    row_ptr = logits_ptr + tl.multiple_of(u * stride_logits_u, ALIGN)
    begin = split * SPLIT_I
    peak, total = _sum_exp(row_ptr, begin, tl.minimum(begin + SPLIT_I, n_items), n_items, BLOCK_I)
    part_ptr = parts_ptr + (u * tl.num_programs(1) + split) * 2
    tl.store(part_ptr, peak)
    tl.store(part_ptr + 1, total)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _multinomial_nll_fwd_kernel(
    logits_ptr, parts_ptr, indptr_ptr, indices_ptr, values_ptr, rows_ptr,  # inputs
    nll_ptr, lse_ptr,  # outputs
    n_items, n_splits,  # sizes
    stride_logits_u,  # strides, in elements
    ALIGN: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)  # u * stride passes 2**31 at 1024 users x 2,100,000 items
    n_items = n_items // ALIGN * ALIGN
    row_ptr = logits_ptr + tl.multiple_of(u * stride_logits_u, ALIGN)

    # log-sum-exp over all items, from the split kernel's parts where there are any
    if parts_ptr is not None:
        s = tl.arange(0, BLOCK_SPLITS)
        part_ptr = parts_ptr + (u * n_splits + s) * 2
        peak, total = _merge(
            tl.load(part_ptr, mask=s < n_splits, other=LOWEST),
            tl.load(part_ptr + 1, mask=s < n_splits, other=0.0),
        )
    else:
        peak, total = _sum_exp(row_ptr, 0, n_items, n_items, BLOCK_I)
    # of a row of -inf alone every exponential is 0, and a click costs inf
    log_total = tl.where(total == 0.0, 0.0, tl.log(total))

    # gather the clicked logits; the difference comes first, it is exact where both are large
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    nll = tl.zeros([BLOCK_NNZ], tl.float32)
    for start in range(begin, end, BLOCK_NNZ):
        n = start + tl.arange(0, BLOCK_NNZ)
        i = tl.load(indices_ptr + n, mask=n < end, other=0)
        logits = tl.load(row_ptr + i, mask=n < end, other=0.0).to(tl.float32)
        nll += click_values(values_ptr, n, n < end) * ((peak - logits) + log_total)

    tl.store(nll_ptr + u, tl.sum(nll, axis=0))
    tl.store(lse_ptr + u, peak)
    tl.store(lse_ptr + tl.num_programs(0) + u, log_total)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _multinomial_nll_bwd_kernel(
    logits_ptr, lse_ptr, dnll_ptr, indptr_ptr, indices_ptr, values_ptr, rows_ptr,  # inputs
    dlogits_ptr,  # outputs; may be logits_ptr
    n_items,  # sizes
    stride_logits_u, stride_dnll_u, stride_dlogits_u,  # strides, in elements
    ALIGN: tl.constexpr, SPLIT_I: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    # one axis of the grid: the others end at 65,535
    n_splits = tl.cdiv(n_items, SPLIT_I)
    n_users = tl.num_programs(0) // n_splits
    u = (tl.program_id(0) // n_splits).to(tl.int64)
    left = (tl.program_id(0) % n_splits).to(tl.int64) * SPLIT_I
    n_items = n_items // ALIGN * ALIGN
    row_ptr = logits_ptr + tl.multiple_of(u * stride_logits_u, ALIGN)
    drow_ptr = dlogits_ptr + tl.multiple_of(u * stride_dlogits_u, ALIGN)
    peak = tl.load(lse_ptr + u)
    log_total = tl.load(lse_ptr + n_users + u)
    dnll = tl.load(dnll_ptr + u * stride_dnll_u).to(tl.float32)

    # the row's click sum, and its first click at or right of this split
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    weight = dnll * row_sum(values_ptr, begin, end, BLOCK_NNZ)
    passed = tl.zeros([BLOCK_NNZ], tl.int32)
    for start in range(begin, end, BLOCK_NNZ):
        n = start + tl.arange(0, BLOCK_NNZ)
        i = tl.load(indices_ptr + n, mask=n < end, other=0)
        passed += ((n < end) & (i < left)).to(tl.int32)
    first = begin + tl.sum(passed, axis=0)

    for start in range(left, tl.minimum(left + SPLIT_I, n_items), BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        logits = tl.load(row_ptr + i, mask=i < n_items, other=-float("inf")).to(tl.float32)
        dlogits = weight * tl.exp((logits - peak) - log_total)

        # this block's clicks are the next ones, and no more than BLOCK_I: a row's items are sorted and distinct
        n = first + tl.arange(0, BLOCK_I)
        i_n = tl.load(indices_ptr + n, mask=n < end, other=0)
        mask_n = (n < end) & (i_n < start + BLOCK_I)
        logits_n = tl.load(row_ptr + i_n, mask=mask_n, other=0.0).to(tl.float32)
        x = click_values(values_ptr, n, mask_n)
        dlogits_n = weight * tl.exp((logits_n - peak) - log_total) - dnll * x
        first += tl.sum(mask_n.to(tl.int32), axis=0)

        # in place: no thread may write before all have read, and the clicked entries are written last
        tl.debug_barrier()
        tl.store(drow_ptr + i, dlogits, mask=i < n_items)
        tl.debug_barrier()
        tl.store(drow_ptr + i_n, dlogits_n, mask=mask_n)


def _alignment(*sizes: int) -> int:
    """Largest power of two, at most 16, that divides all sizes: what lets a row be read 16 bytes at a time."""
    return math.gcd(16, *sizes)


def multinomial_nll_fwd(
    logits: Tensor, csr: Csr, tile: tiles.RowTile | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels. Arguments are already checked by fastvae.ops.

    logits   [n_users, n_items]  fp32, bf16 or fp16; last stride 1
    csr      the clicks of these users, see kernels/csr.py
    tile     launch configuration, from the table by default
    returns  nll [n_users] fp32 (nats), lse [2, n_users] fp32 (nats): peak and log-sum, which add up to the lse
    """
    check_rows(csr)
    n_users, n_items = logits.shape
    tile = tile or tiles.of(logits.device).forward_row
    nll = torch.empty(n_users, dtype=torch.float32, device=logits.device)
    lse = torch.empty(2, n_users, dtype=torch.float32, device=logits.device)
    if n_users == 0:
        return nll, lse
    align = _alignment(n_items, logits.stride(0))
    n_splits = tiles.cdiv(n_items, tile.split_i)
    parts = None
    with tiles.device_guard(logits):
        if n_splits > 1:
            parts = torch.empty(n_users, n_splits, 2, dtype=torch.float32, device=logits.device)
            launch(
                _multinomial_nll_split_kernel, (n_users, n_splits),
                logits, parts, n_items, logits.stride(0),
                ALIGN=align, SPLIT_I=tile.split_i, BLOCK_I=tile.block_i, num_warps=tile.num_warps,
            )  # fmt: skip
        launch(
            _multinomial_nll_fwd_kernel, (n_users,),
            logits, parts, *csr,
            nll, lse,
            n_items, n_splits,
            logits.stride(0),
            ALIGN=align, BLOCK_I=tile.block_i, BLOCK_NNZ=tile.block_nnz,
            BLOCK_SPLITS=tiles.next_power_of_2(n_splits), num_warps=tile.num_warps,
        )  # fmt: skip
    return nll, lse


def multinomial_nll_bwd(
    logits: Tensor, lse: Tensor, dnll: Tensor, csr: Csr,
    inplace: bool = False, tile: tiles.RowTile | None = None,
) -> Tensor:  # fmt: skip
    """Launch the backward kernel. Arguments are already checked by fastvae.ops.

    logits, csr  as in multinomial_nll_fwd
    lse      [2, n_users]        fp32, from multinomial_nll_fwd
    dnll     [n_users]           any float, any stride, 0 included
    inplace  overwrite logits with the gradient; otherwise they are left alone
    tile     launch configuration, from the table by default
    returns  dlogits [n_users, n_items], dtype of logits
    """
    check_rows(csr)
    n_users, n_items = logits.shape
    tile = tile or tiles.of(logits.device).backward_row
    dlogits = (
        logits
        if inplace
        else torch.empty((n_users, n_items), dtype=logits.dtype, device=logits.device)
    )
    if dlogits.numel() == 0:
        return dlogits
    with tiles.device_guard(logits):
        launch(
            _multinomial_nll_bwd_kernel, (n_users * tiles.cdiv(n_items, tile.split_i),),
            logits, lse, dnll, *csr,
            dlogits,
            n_items,
            logits.stride(0), dnll.stride(0), dlogits.stride(0),
            ALIGN=_alignment(n_items, logits.stride(0), dlogits.stride(0)), SPLIT_I=tile.split_i,
            BLOCK_I=tile.block_i, BLOCK_NNZ=tile.block_nnz, num_warps=tile.num_warps,
        )  # fmt: skip
    return dlogits
