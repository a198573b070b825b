"""First dense layer on a batch of CSR rows: no dense input, forward or backward.

    s[u]  = 1 / (||x[u]|| (1 - p))
    a[n]  = f(keep[n] * s[u] * values[n])      f = identity, or tanh with tanh_input
    y[u]  = act(sum_n a[n] * W[i(n), :] + b)   over the clicks n of user u; act = tanh or identity
    dW[i] = sum_n a[n] * dpre[u(n), :]         over the clicks n of item i; dpre = gradient of the sum above

W is read item-major: an item's n_hidden numbers lie side by side. The bias gradient is dpre.sum(0).
A row has 5 to 5,000 clicks: a long one is split over programs, or it alone would be the time of its batch. The
forward's programs leave partial sums, which a second kernel adds up in order: the same bits in every run, and nothing
to zero.
Math: Liang et al. 2018, section 2.2 (arXiv:1802.05814). Reference: fastvae.reference.sparse_linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, check_rows, click_values, n_users_of, row_clicks
from .kept_clicks import (
    coefficient,
    cut_features,
    dropout_arguments,
    dropout_keep,
    load_kept,
    offsets,
    positions,
    programs_of,
    row_and_features,
    tanh_of,
)
from .launch import launch

SMALLEST = tl.constexpr(1.2e-38)  # normal fp32 number that stands for an empty row's squared norm


@triton.jit
def _row_scale(
    values_ptr, begin, end, keep_scale,
    NORMALIZE: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    """s of a row, by all its clicks, those dropped and those of other programs too; 0 for an empty row."""
    squares = (end - begin).to(tl.float32)
    if NORMALIZE and values_ptr is not None:
        sums = tl.zeros([BLOCK_NNZ], tl.float32)
        for start in range(begin, end, BLOCK_NNZ):
            n = positions(start, BLOCK_NNZ)
            value = click_values(values_ptr, n, n < end)
            sums += value * value
        squares = tl.sum(sums, axis=0)
    scale = tl.where(squares > 0.0, keep_scale, 0.0)
    if NORMALIZE:
        scale /= tl.sqrt_rn(tl.maximum(squares, SMALLEST))
    return scale


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _sparse_linear_fwd_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, weight_ptr, seed_ptr,  # inputs
    parts_ptr, scale_ptr,  # outputs; scale_ptr is read where NORMALIZE is None
    drop_below, keep_scale,  # dropout
    NORMALIZE: tl.constexpr, TANH_INPUT: tl.constexpr,
    N_HIDDEN: tl.constexpr, SPLIT_NNZ: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u, d = row_and_features(N_HIDDEN, BLOCK_D)
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    n_programs = programs_of(begin, end, n_splits, SPLIT_NNZ)
    if split >= n_programs:
        return
    if NORMALIZE is None:
        scale = tl.load(scale_ptr + u)
    else:
        # each program reads all values of its row, which are 4 bytes beside a weight row's thousand, many at once
        scale = _row_scale(values_ptr, begin, end, keep_scale, NORMALIZE, 16 * BLOCK_NNZ)
        if split == 0:
            tl.store(scale_ptr + u, scale)  # by the programs of all features: the same number

    # gather-sum; the weights of a dropped click are not read
    acc = tl.zeros([BLOCK_D], tl.float32)
    first, step = begin + split * BLOCK_NNZ, n_programs * BLOCK_NNZ
    n, item, live = load_kept(indices_ptr, seed_ptr, u, first, end, drop_below, BLOCK_NNZ)
    for start in range(first, end, step):
        offset, mask = offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
        weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        a = coefficient(scale, click_values(values_ptr, n, live), TANH_INPUT)
        # the next items travel along with these weights: one latency a block instead of two
        n, item, live = load_kept(
            indices_ptr, seed_ptr, u, start + step, end, drop_below, BLOCK_NNZ
        )
        acc += tl.sum(a[:, None] * weight, axis=0)
    tl.store(parts_ptr + (u * n_splits + split) * N_HIDDEN + d, acc, mask=d < N_HIDDEN)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _sparse_linear_finish_kernel(
    indptr_ptr, rows_ptr, parts_ptr, bias_ptr,  # inputs
    y_ptr,  # outputs
    TANH: tl.constexpr,
    N_HIDDEN: tl.constexpr, N_SPLITS: tl.constexpr, SPLIT_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u, d = row_and_features(N_HIDDEN, BLOCK_D)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    # only what was written is read
    split = tl.arange(0, N_SPLITS)
    written = split < programs_of(begin, end, N_SPLITS, SPLIT_NNZ)
    offset, mask = offsets(u * N_SPLITS + split, written, d, N_HIDDEN, 1, N_HIDDEN)
    acc = tl.sum(tl.load(parts_ptr + offset, mask=mask, other=0.0), axis=0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
    if TANH:
        acc = tanh_of(acc)
    tl.store(y_ptr + u * N_HIDDEN + d, acc, mask=d < N_HIDDEN)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _sparse_linear_bwd_weight_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, dpre_ptr, seed_ptr, scale_ptr,  # inputs
    dweight_ptr,  # outputs; starts as zeros
    drop_below,  # dropout
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    TANH_INPUT: tl.constexpr,
    N_HIDDEN: tl.constexpr, SPLIT_NNZ: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a user's programs share the blocks of clicks, not the features: no click is drawn or read twice
    u, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    n_programs = programs_of(begin, end, tl.num_programs(1), SPLIT_NNZ)
    if split >= n_programs:
        return
    scale = tl.load(scale_ptr + u)
    for start in range(begin + split * BLOCK_NNZ, end, n_programs * BLOCK_NNZ):
        n, item, live = load_kept(indices_ptr, seed_ptr, u, start, end, drop_below, BLOCK_NNZ)
        a = coefficient(scale, click_values(values_ptr, n, live), TANH_INPUT)
        for left in range(0, N_HIDDEN, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            row_ptr = dpre_ptr + u * STRIDE_DPRE_U + d.to(tl.int64) * STRIDE_DPRE_D
            dpre = tl.load(row_ptr, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
            offset, mask = offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
            # relaxed: nobody reads a sum before the kernel has ended
            tl.atomic_add(
                dweight_ptr + offset, a[:, None] * dpre[None, :], mask=mask, sem="relaxed"
            )


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _mark_clicks_kernel(
    indptr_ptr, indices_ptr, rows_ptr, seed_ptr,  # inputs
    marks_ptr,  # outputs; starts as zeros
    drop_below,  # dropout
    n_words,  # sizes
    BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    # bit u of item i's words: user u of the batch has clicked item i, and that click isn't dropped
    u = tl.program_id(0).to(tl.int64)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    bit = tl.full([BLOCK_NNZ], 1, tl.int32) << (u % 32).to(tl.int32)
    for start in range(begin, end, BLOCK_NNZ):
        n = positions(start, BLOCK_NNZ)
        live = n < end
        item = tl.load(indices_ptr + n, mask=live, other=0).to(tl.int64)
        if seed_ptr is not None:
            live = live & dropout_keep(seed_ptr, u, n, drop_below)
        tl.atomic_or(marks_ptr + item * n_words + u // 32, bit, mask=live, sem="relaxed")


@triton.jit
def _find_click(indptr_ptr, indices_ptr, rows_ptr, u, item, exists):
    """Position of an item in the rows of users u, by bisection (a row is sorted); 0 where it doesn't exist."""
    row = u
    if rows_ptr is not None:
        row = tl.load(rows_ptr + u, mask=exists, other=0)
    low = tl.load(indptr_ptr + row, mask=exists, other=0)
    high = tl.load(indptr_ptr + row + 1, mask=exists, other=0)
    # the item lies in [low, high); a search that has ended stays where it is while the others go on
    while tl.max(high - low, axis=0) > 1:
        middle = (low + high) // 2
        right = tl.load(indices_ptr + middle, mask=exists, other=0) <= item
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _sparse_linear_bwd_weight_ordered_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, dpre_ptr, scale_ptr, marks_ptr,  # inputs
    dweight_ptr,  # outputs
    n_words,  # sizes
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    TANH_INPUT: tl.constexpr, N_HIDDEN: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i, d = row_and_features(N_HIDDEN, BLOCK_D)
    marks_ptr += i * n_words
    lane = tl.arange(0, BLOCK_U)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, n_words, BLOCK_WORDS):
        # from one word with marks to the next, in order: the sum depends on nothing but the batch
        w = start + tl.arange(0, BLOCK_WORDS)
        end = start + BLOCK_WORDS
        marked_w = tl.where(tl.load(marks_ptr + w, mask=w < n_words, other=0) != 0, w, end)
        first = tl.min(marked_w, axis=0)
        while first < end:
            word = tl.load(marks_ptr + first)
            for bit in range(0, 32, BLOCK_U):
                marked = ((word >> (bit + lane)) & 1) == 1
                if tl.max(marked.to(tl.int32), axis=0) > 0:
                    u = first.to(tl.int64) * 32 + bit + lane
                    n = u
                    if values_ptr is not None:
                        n = _find_click(indptr_ptr, indices_ptr, rows_ptr, u, i, marked)
                    scale = tl.load(scale_ptr + u, mask=marked, other=0.0)
                    a = coefficient(scale, click_values(values_ptr, n, marked), TANH_INPUT)
                    offset, mask = offsets(u, marked, d, STRIDE_DPRE_U, STRIDE_DPRE_D, N_HIDDEN)
                    dpre = tl.load(dpre_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                    acc += tl.sum(a[:, None] * dpre, axis=0)
            first = tl.min(tl.where(marked_w > first, marked_w, end), axis=0)
    # an item without clicks gets its zeros here
    tl.store(dweight_ptr + i * N_HIDDEN + d, acc, mask=d < N_HIDDEN)


def finish_cut(n_hidden: int) -> tuple[int, int]:
    """Features and warps of a program that adds up partial sums: mostly all features; 32 bytes a thread and split."""
    block_d = min(1024, tiles.next_power_of_2(n_hidden))
    return block_d, max(1, block_d // 256)


def sparse_linear_fwd(
    csr: Csr, weight: Tensor, bias: Tensor | None, seed: Tensor | None,
    *, dropout: float, normalize: bool, tanh: bool, tanh_input: bool,
    shift: Tensor | None = None, row_scale: Tensor | None = None, tile: tiles.SplitTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernels. Arguments are already checked by fastvae.ops.

    csr      the clicks of these users, see kernels/csr.py
    weight   [n_items, n_hidden]  fp32, bf16 or fp16; contiguous
    bias     [n_hidden]           any float, contiguous; or None
    seed     [1]                  int64, or None for no dropout
    dropout  probability to drop a click, 0..1
    normalize, tanh, tanh_input   as in fastvae.reference.sparse_linear
    shift    [n_users]            int64: added to a user's positions for dropout; or None
    row_scale  [n_users]          fp32: in place of 1 / ||x[u]||; or None
    tile     launch configuration, from the table by default
    returns  y [n_users, n_hidden] dtype of weight; scale [n_users] fp32: s of the formulas, 0 for an empty row
    """
    check_rows(csr)
    n_users, n_hidden = n_users_of(csr), weight.shape[1]
    tile = tile or tiles.of(weight.device).sparse_forward_tile(weight.dtype, n_users)
    block_d, n_blocks, num_warps = cut_features(tile, n_hidden)
    y = torch.empty(n_users, n_hidden, dtype=weight.dtype, device=weight.device)
    drawn_by, drop_below, keep_scale = dropout_arguments(seed, shift, dropout)
    if row_scale is None:
        scale, norm = torch.empty(n_users, dtype=torch.float32, device=weight.device), normalize
    else:
        scale, norm = row_scale * keep_scale, None
    if n_users == 0:
        return y, scale
    shape = n_users, tile.n_splits, n_hidden
    parts = torch.empty(shape, dtype=torch.float32, device=weight.device)
    indptr, _, _, rows = csr
    with tiles.device_guard(weight):
        launch(
            _sparse_linear_fwd_kernel, (n_users * n_blocks, tile.n_splits),
            *csr, weight, drawn_by,
            parts, scale,
            drop_below, keep_scale,
            NORMALIZE=norm, TANH_INPUT=tanh_input, N_HIDDEN=n_hidden,
            SPLIT_NNZ=tile.split_nnz, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
        block_d, num_warps = finish_cut(n_hidden)
        launch(
            _sparse_linear_finish_kernel, (n_users * tiles.cdiv(n_hidden, block_d),),
            indptr, rows, parts, bias,
            y,
            TANH=tanh, N_HIDDEN=n_hidden, N_SPLITS=tile.n_splits, SPLIT_NNZ=tile.split_nnz,
            BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return y, scale


def sparse_linear_bwd_weight(
    dpre: Tensor, csr: Csr, seed: Tensor | None, scale: Tensor, n_items: int,
    *, dropout: float, tanh_input: bool, deterministic: bool, shift: Tensor | None = None,
    tile: tiles.SplitTile | None = None, item_tile: tiles.ItemTile | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernels of the weight gradient. Arguments are already checked by fastvae.ops.

    dpre     [n_users, n_hidden]  any float, any strides: the gradient before the activation
    scale    [n_users]            fp32, from sparse_linear_fwd
    n_items  columns of the matrix
    deterministic   bitwise equal from run to run, with item_tile; otherwise fp32 atomics, with tile
    the rest as in sparse_linear_fwd
    returns  dweight [n_items, n_hidden] fp32

    The deterministic way takes n_items * n_users / 8 bytes, 1/16 of the logits in bf16: the batch transposed, as bits.
    Their number, unlike that of the clicks, is known without waiting for the device, and they need no sort.
    """
    check_rows(csr)
    n_users, n_hidden = dpre.shape
    ordered = deterministic and n_users > 0
    allocate = torch.empty if ordered else torch.zeros
    dweight = allocate(n_items, n_hidden, dtype=torch.float32, device=dpre.device)
    if n_users == 0 or n_items == 0:
        return dweight
    table = tiles.of(dpre.device)
    drawn_by, drop_below, _ = dropout_arguments(seed, shift, dropout)
    flags = dict(STRIDE_DPRE_U=dpre.stride(0), STRIDE_DPRE_D=dpre.stride(1))
    flags |= dict(TANH_INPUT=tanh_input, N_HIDDEN=n_hidden)
    with tiles.device_guard(dpre):
        if not ordered:
            tile = tile or table.sparse_backward_tile(n_users)
            block_d, _, num_warps = cut_features(tile, n_hidden)
            launch(
                _sparse_linear_bwd_weight_kernel, (n_users, tile.n_splits),
                *csr, dpre, drawn_by, scale,
                dweight,
                drop_below,
                **flags, SPLIT_NNZ=tile.split_nnz, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
            )  # fmt: skip
            return dweight
        item_tile = item_tile or table.sparse_item
        block_d, n_blocks, num_warps = cut_features(item_tile, n_hidden)
        n_words = tiles.cdiv(n_users, 32)
        marks = torch.zeros(n_items, n_words, dtype=torch.int32, device=dpre.device)
        indptr, indices, _, rows = csr
        launch(
            _mark_clicks_kernel, (n_users,),
            indptr, indices, rows, drawn_by,
            marks,
            drop_below, n_words,
            BLOCK_NNZ=tiles.CLICKS_PER_BLOCK, num_warps=4,
        )  # fmt: skip
        launch(
            _sparse_linear_bwd_weight_ordered_kernel, (n_items * n_blocks,),
            *csr, dpre, scale, marks,
            dweight,
            n_words,
            **flags, BLOCK_WORDS=item_tile.block_words, BLOCK_U=item_tile.block_u, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return dweight
