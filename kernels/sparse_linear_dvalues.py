"""Gradient of sparse_linear for the clicks' values, which few models ask for.

    dc[n] = keep[n] * f'(s[u] * values[n]) * (W[i(n), :] . dpre[u, :])
    dv[n] = s[u] * dc[n] - values[n] * sum_m(values[m] * s[u] * dc[m]) / ||x[u]||^2

The second term is there where rows are normalised: what lies along the row, the norm takes away.
Formulas of the layer: kernels/sparse_linear.py. Reference: fastvae.reference.sparse_linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, check_rows, row_clicks
from .kept_clicks import (
    cut_features,
    dropout_arguments,
    load_kept,
    offsets,
    positions,
    programs_of,
    tanh_of,
)
from .launch import launch
from .sparse_linear import SMALLEST


@triton.jit
def _first_range(indptr_ptr, rows_ptr, u):
    """row_clicks of user u, where rows are sorted: empty if the user before has the same row."""
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    if rows_ptr is not None:
        before = tl.load(rows_ptr + u - 1, mask=u > 0, other=-1)
        end = tl.where(before == tl.load(rows_ptr + u), begin, end)
    return begin, end


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _click_products_kernel(
    indptr_ptr, indices_ptr, rows_ptr, weight_ptr, dpre_ptr, seed_ptr,  # inputs; rows are sorted
    dvalues_ptr,  # outputs
    drop_below,  # dropout
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    N_HIDDEN: tl.constexpr, SPLIT_NNZ: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # keep[n] * (weight row of click n . dpre); users of one row have their mask in common, so that their dpre add up
    u = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin, end = _first_range(indptr_ptr, rows_ptr, u)
    n_programs = programs_of(begin, end, tl.num_programs(1), SPLIT_NNZ)
    if split >= n_programs:
        return
    last = u
    if rows_ptr is not None:
        row = tl.load(rows_ptr + u)
        while tl.load(rows_ptr + last + 1, mask=last + 1 < tl.num_programs(0), other=-1) == row:
            last += 1
    for start in range(begin + split * BLOCK_NNZ, end, n_programs * BLOCK_NNZ):
        n, item, live = load_kept(indices_ptr, seed_ptr, u, start, end, drop_below, BLOCK_NNZ)
        product = tl.zeros([BLOCK_NNZ], tl.float32)
        for left in range(0, N_HIDDEN, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            dpre = tl.zeros([BLOCK_D], tl.float32)
            for same in range(u, last + 1):
                row_ptr = dpre_ptr + same * STRIDE_DPRE_U + d.to(tl.int64) * STRIDE_DPRE_D
                dpre += tl.load(row_ptr, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
            offset, mask = offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
            weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(weight * dpre[None, :], axis=1)
        tl.store(dvalues_ptr + n, product, mask=n < end)


@triton.jit
def _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT: tl.constexpr):
    """Values of clicks n, and their gradients if the norm were a constant."""
    value = tl.load(values_ptr + n, mask=n < end, other=0.0)
    slope = scale * tl.load(dvalues_ptr + n, mask=n < end, other=0.0)
    if TANH_INPUT:
        a = tanh_of(scale * value)
        slope *= 1.0 - a * a
    return value, slope


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _sparse_linear_bwd_values_kernel(
    indptr_ptr, values_ptr, rows_ptr, scale_ptr,  # inputs; rows are sorted
    dvalues_ptr,  # in: click products; out: gradients
    NORMALIZE: tl.constexpr, TANH_INPUT: tl.constexpr, BLOCK_NNZ: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    begin, end = _first_range(indptr_ptr, rows_ptr, u)
    scale = tl.load(scale_ptr + u)

    # the part of the gradient that lies along the row, which the norm takes away
    along = 0.0
    if NORMALIZE:
        products, squares = tl.zeros([BLOCK_NNZ], tl.float32), tl.zeros([BLOCK_NNZ], tl.float32)
        for start in range(begin, end, BLOCK_NNZ):
            n = positions(start, BLOCK_NNZ)
            value, slope = _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT)
            products += value * slope
            squares += value * value
        along = tl.sum(products, axis=0) / tl.maximum(tl.sum(squares, axis=0), SMALLEST)

    for start in range(begin, end, BLOCK_NNZ):
        n = positions(start, BLOCK_NNZ)
        value, slope = _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT)
        tl.store(dvalues_ptr + n, slope - along * value, mask=n < end)


def sparse_linear_bwd_values(
    dpre: Tensor, weight: Tensor, csr: Csr, seed: Tensor | None, scale: Tensor,
    *, dropout: float, normalize: bool, tanh_input: bool, shift: Tensor | None = None,
    tile: tiles.SplitTile | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernel of the values' gradient. Arguments are already checked by fastvae.ops.

    dpre     [n_users, n_hidden]  any float, any strides: the gradient before the activation
    scale    [n_users]            fp32, from sparse_linear_fwd
    the rest as in sparse_linear_fwd; values is not None
    returns  dvalues [nnz] fp32, of the whole matrix: 0 outside the batch, the sum over users of the same row
    """
    check_rows(csr)
    n_users, n_hidden = dpre.shape
    indptr, indices, values, rows = csr
    tile = tile or tiles.of(dpre.device).sparse_values
    block_d, _, num_warps = cut_features(tile, n_hidden)
    dvalues = torch.zeros(len(indices), dtype=torch.float32, device=dpre.device)
    if n_users == 0:
        return dvalues
    if rows is not None:
        # users of one row side by side: one program adds them up, in order and without atomics
        rows, order = torch.sort(rows, stable=True)
        dpre, scale = dpre[order], scale[order]
        shift = None if shift is None else shift[order]
    drawn_by, drop_below, _ = dropout_arguments(seed, shift, dropout)
    with tiles.device_guard(dpre):
        launch(
            _click_products_kernel, (n_users, tile.n_splits),
            indptr, indices, rows, weight, dpre, drawn_by,
            dvalues,
            drop_below,
            STRIDE_DPRE_U=dpre.stride(0), STRIDE_DPRE_D=dpre.stride(1),
            N_HIDDEN=n_hidden,
            SPLIT_NNZ=tile.split_nnz, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
        launch(
            _sparse_linear_bwd_values_kernel, (n_users,),
            indptr, values, rows, scale,
            dvalues,
            NORMALIZE=normalize, TANH_INPUT=tanh_input, BLOCK_NNZ=tiles.CLICKS_PER_BLOCK, num_warps=4,
        )  # fmt: skip
    return dvalues
