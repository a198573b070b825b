"""Scaled exponentials in the epilogue of a GEMM of our own: for rows that leave the cache, and where no buffer is kept.

    E[u, i] = exp(logits[u, i] - k[u])      S[u] = sum_i E[u, i]      D[u, i] = E[u, i] - x[u, i] S[u] / N[u]

k is the largest of some probed logits; a row with a logit far above it is done again with its maximum. See
kernels/linear_multinomial_nll.py for the formulas, and for the other way to D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, click_values, row_clicks, row_sum
from .exp_row import LOWEST
from .launch import launch
from .products import mm, stored_width

N_PROBE = 1024  # items whose largest logit is taken for k
# that look after raised rows: about two on each multiprocessor of a large chip
RAISED_PROGRAMS = 256
# a row with a logit this far above k is computed again with its true maximum: exp(40) leaves fp32 and bf16 room for
# the sum over 2**31 items and, in the backward, for its reciprocal times dnll and hidden
RAISE_ABOVE = tl.constexpr(40.0)
# log of a smaller E, a logit 69 below k, may not be the logit any more: E may have been rounded to zero
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def store_results(results_ptr, u, n_clicks, total, nll):
    """Store nll[u], and v[u] behind all nll; without clicks both are 0; a click costs inf where all logits are -inf."""
    has_clicks = n_clicks > 0.0
    nll = tl.where(total == 0.0, float("inf"), nll)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(results_ptr + u, tl.where(has_clicks, nll, 0.0))
    tl.store(results_ptr + tl.num_programs(0) + u, tl.where(has_clicks, n_clicks / total, 0.0))


@triton.jit
def _prepare_kernel(
    probe_ptr, bias_ptr,  # inputs
    k_ptr, wide_bias_ptr,  # outputs
    n_users, n_items, n_probe, step, width,  # sizes
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    if tl.program_id(0) < n_users:
        # k, the largest probed logit; and no rise above it yet, for this user or for any
        u = tl.program_id(0).to(tl.int64)
        logits = tl.load(probe_ptr + u * n_probe + lane, mask=lane < n_probe, other=-float("inf"))
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + lane * step, mask=lane < n_probe, other=0.0).to(tl.float32)
        tl.store(k_ptr + u, tl.maximum(tl.max(logits, axis=0), LOWEST))
        tl.store(k_ptr + n_users + u, 0.0)
        tl.store(k_ptr + 2 * n_users, 0.0, mask=u == 0)
    else:
        # bias as fp32, -inf in the padding: there E is zero without a mask, and tiles load it unmasked
        i = (tl.program_id(0) - n_users).to(tl.int64) * BLOCK + lane
        bias = tl.where(i < n_items, 0.0, -float("inf"))
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + i, mask=i < n_items, other=0.0).to(tl.float32)
        tl.store(wide_bias_ptr + i, bias, mask=i < width)


@triton.jit
def _place(tile, n_users, n_tiles_i, BLOCK_U: tl.constexpr, GROUP_U: tl.constexpr):
    """Tile of users and tile of items: inside groups of GROUP_U tiles of users, which read the weights once."""
    n_tiles_u = tl.cdiv(n_users, BLOCK_U)
    group = tile // (GROUP_U * n_tiles_i)
    in_group = tile % (GROUP_U * n_tiles_i)
    group_size = tl.minimum(n_tiles_u - group * GROUP_U, GROUP_U)
    return group * GROUP_U + in_group % group_size, in_group // group_size


@triton.jit
def _tile_logits(
    hidden_ptr, weight_ptr,
    n_users, n_items, tile_u, tile_i,
    N_HIDDEN: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a tile without bias, fp32."""
    # rows outside the matrices repeat the last one: no mask inside the loop but that of the last features
    u = tl.minimum(tl.arange(0, BLOCK_U), n_users - 1 - tile_u * BLOCK_U)
    i = tl.minimum(tl.arange(0, BLOCK_I), n_items - 1 - tile_i * BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    hidden_offsets = u[:, None] * N_HIDDEN + d[None, :]
    weight_offsets = i[:, None] * N_HIDDEN + d[None, :]
    # int64 for a tile's place in a matrix, int32 inside the tile: half the registers for its pointers
    hidden_ptr += tile_u.to(tl.int64) * BLOCK_U * N_HIDDEN
    weight_ptr += tile_i.to(tl.int64) * BLOCK_I * N_HIDDEN
    logits = tl.zeros([BLOCK_U, BLOCK_I], tl.float32)
    for start in range(0, N_HIDDEN, BLOCK_D):
        mask = (start + d < N_HIDDEN)[None, :]
        hidden = tl.load(hidden_ptr + (hidden_offsets + start), mask=mask, other=0.0)
        weight = tl.load(weight_ptr + (weight_offsets + start), mask=mask, other=0.0)
        logits = tl.dot(hidden, weight.T, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _store_tile(
    logits,  # relative to k
    e_ptr, sums_ptr,  # outputs
    n_users, n_tiles_i, tile_u, tile_i,
    N_PADDED: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """E of a tile, where it is kept, and its sums over the tile's items: of E as rounded, kept or not."""
    u, i = tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_I)
    u_all = tile_u.to(tl.int64) * BLOCK_U + u
    mask_u = u < n_users - tile_u * BLOCK_U
    e = tl.exp(logits)
    if BF16:
        e = e.to(tl.bfloat16)
    tl.store(sums_ptr + u_all * n_tiles_i + tile_i, tl.sum(e.to(tl.float32), axis=1), mask=mask_u)
    if e_ptr is not None:
        mask = mask_u[:, None] & (i < N_PADDED - tile_i * BLOCK_I)[None, :]
        columns = tile_i.to(tl.int64) * BLOCK_I + i[None, :]
        tl.store(e_ptr + u_all[:, None] * N_PADDED + columns, e, mask=mask)


@triton.jit
def _exp_gemm_kernel(
    hidden_ptr, weight_ptr, bias_ptr,  # inputs
    k_ptr,  # k is read; how far each user's logits rise above it, and whether any do, is written
    e_ptr, sums_ptr,  # outputs
    n_users, n_items, n_tiles_i,  # sizes
    N_HIDDEN: tl.constexpr, N_PADDED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile_u, tile_i = _place(tl.program_id(0), n_users, n_tiles_i, BLOCK_U, GROUP_U)
    logits = _tile_logits(
        hidden_ptr, weight_ptr, n_users, n_items, tile_u, tile_i,
        N_HIDDEN, BLOCK_U, BLOCK_I, BLOCK_D, PRECISION,
    )  # fmt: skip
    # the bias is -inf in the padding, which makes E zero there
    u = tile_u.to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    i = tile_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_u = u < n_users
    logits += tl.load(bias_ptr + i)[None, :] - tl.load(k_ptr + u, mask=mask_u, other=0.0)[:, None]
    peak = tl.max(logits, axis=1)
    raised = mask_u & (peak > RAISE_ABOVE)
    tl.atomic_max(k_ptr + n_users + u, peak, mask=raised, sem="relaxed")
    # every raised row says so in one word, without a reduction that nearly no tile needs
    tl.atomic_max(k_ptr + 2 * n_users + 0 * u, peak, mask=raised, sem="relaxed")
    _store_tile(
        logits, e_ptr, sums_ptr, n_users, n_tiles_i, tile_u, tile_i,
        N_PADDED, BLOCK_U, BLOCK_I, hidden_ptr.dtype.element_ty == tl.bfloat16,
    )  # fmt: skip


@triton.jit
def _exp_gemm_raised_kernel(
    hidden_ptr, weight_ptr, bias_ptr, k_ptr,  # inputs
    e_ptr, sums_ptr,  # outputs
    n_users, n_items, n_tiles_i,  # sizes
    N_HIDDEN: tl.constexpr, N_PADDED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_U: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # a few programs for all tiles: they leave at once where no row is raised, which is nearly always
    if tl.load(k_ptr + 2 * n_users) > 0.0:
        n_tiles = tl.cdiv(n_users, BLOCK_U) * n_tiles_i
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            tile_u, tile_i = _place(tile, n_users, n_tiles_i, BLOCK_U, GROUP_U)
            u = tile_u.to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
            rise = tl.load(k_ptr + n_users + u, mask=u < n_users, other=0.0)
            # a tile with a raised row is done again as a whole: its other rows give what they gave before
            if tl.max(rise, axis=0) > 0.0:
                logits = _tile_logits(
                    hidden_ptr, weight_ptr, n_users, n_items, tile_u, tile_i,
                    N_HIDDEN, BLOCK_U, BLOCK_I, BLOCK_D, PRECISION,
                )  # fmt: skip
                i = tile_i.to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
                k = tl.load(k_ptr + u, mask=u < n_users, other=0.0) + rise
                logits += tl.load(bias_ptr + i)[None, :] - k[:, None]
                _store_tile(
                    logits, e_ptr, sums_ptr, n_users, n_tiles_i, tile_u, tile_i,
                    N_PADDED, BLOCK_U, BLOCK_I, hidden_ptr.dtype.element_ty == tl.bfloat16,
                )  # fmt: skip


@triton.jit
def _clicked_logits(
    hidden_ptr, weight_ptr, bias_ptr,  # hidden_ptr: this user's row
    i, mask_i,
    N_HIDDEN: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of items i of one user as dot products with gathered weight rows."""
    products = tl.zeros([BLOCK_NNZ, BLOCK_D], tl.float32)
    weight_ptrs = weight_ptr + i.to(tl.int64)[:, None] * N_HIDDEN
    for start in range(0, N_HIDDEN, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + d, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
        mask = mask_i[:, None] & (d < N_HIDDEN)[None, :]
        weight = tl.load(weight_ptrs + d[None, :], mask=mask, other=0.0).to(tl.float32)
        products += weight * hidden[None, :]
    logits = tl.sum(products, axis=1)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + i, mask=mask_i, other=0.0).to(tl.float32)
    return logits


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _clicks_kernel(
    hidden_ptr, weight_ptr, bias_ptr, k_ptr, sums_ptr,  # inputs
    indptr_ptr, indices_ptr, values_ptr, rows_ptr,
    e_ptr,  # in place: E becomes D
    results_ptr,  # outputs: nll, and behind all of it v
    n_tiles_i,  # sizes
    N_HIDDEN: tl.constexpr, N_PADDED: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    n_users = tl.num_programs(0)
    k = tl.load(k_ptr + u) + tl.load(k_ptr + n_users + u)
    hidden_ptr += u * N_HIDDEN

    # S
    sums = tl.zeros([BLOCK_NNZ], tl.float32)
    for start in range(0, n_tiles_i, BLOCK_NNZ):
        t = start + tl.arange(0, BLOCK_NNZ)
        sums += tl.load(sums_ptr + u * n_tiles_i + t, mask=t < n_tiles_i, other=0.0)
    total = tl.sum(sums, axis=0)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    n_clicks = row_sum(values_ptr, begin, end, BLOCK_NNZ)
    per_click = total / tl.maximum(n_clicks, 1e-30)
    log_total = tl.log(total)

    nll = tl.zeros([BLOCK_NNZ], tl.float32)
    for start in range(begin, end, BLOCK_NNZ):
        n = start + tl.arange(0, BLOCK_NNZ)
        mask_n = n < end
        i = tl.load(indices_ptr + n, mask=mask_n, other=0)
        x = click_values(values_ptr, n, mask_n)
        if e_ptr is not None:
            # log E is the logit relative to k, at a fraction of a weight row's traffic
            e_ptrs = e_ptr + u * N_PADDED + i
            e = tl.load(e_ptrs, mask=mask_n, other=1.0).to(tl.float32)
            logits = tl.log(e)
            lost = e < SMALLEST
            if tl.max(lost.to(tl.int32), axis=0) > 0:
                exact = _clicked_logits(
                    hidden_ptr, weight_ptr, bias_ptr, i, lost, N_HIDDEN, BLOCK_NNZ, BLOCK_D
                )
                logits = tl.where(lost, exact - k, logits)
            tl.store(e_ptrs, e - x * per_click, mask=mask_n)
        else:
            exact = _clicked_logits(
                hidden_ptr, weight_ptr, bias_ptr, i, mask_n, N_HIDDEN, BLOCK_NNZ, BLOCK_D
            )
            logits = exact - k
        nll += x * (log_total - logits)
    store_results(results_ptr, u, n_clicks, total, tl.sum(nll, axis=0))


def exp_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, n_items: int, e: Tensor | None, results: Tensor,
    kind: str, tile: tiles.GemmTile | None = None,
) -> None:  # fmt: skip
    """Launch the kernels that write nll and v, and D into e unless that is None.

    hidden .. n_items  as in fastvae.kernels.linear_multinomial_nll.exp_rows
    e     [n_users, stored_width] of stored_dtype, or None: then nothing of its size is made
    results  [2, n_users] fp32: nll and v
    kind  of product, see tiles.product_kind
    tile  launch configuration, from the table by default
    """
    (n_users, n_hidden), table = hidden.shape, tiles.of(hidden.device)
    tile = tile or table.gemm_tile(kind, n_users)
    click_tile = table.gathered_clicks if e is None else table.stored_clicks
    n_tiles_u = tiles.cdiv(n_users, tile.block_u)
    n_tiles_i = tiles.cdiv(stored_width(n_items), tile.block_i)
    n_padded, width = 0 if e is None else e.stride(0), n_tiles_i * tile.block_i
    step = tiles.cdiv(n_items, N_PROBE)
    # logits of up to N_PROBE items, spread over all
    probe = mm(hidden, weight[:n_items:step].t())
    wide_bias, k, sums = (
        torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for shape in ((width,), (2 * n_users + 1,), (n_users, n_tiles_i))
    )
    launch(
        _prepare_kernel, (n_users + tiles.cdiv(width, N_PROBE),),
        probe, bias,
        k, wide_bias,
        n_users, n_items, probe.shape[1], step, width,
        BLOCK=N_PROBE, num_warps=4,
    )  # fmt: skip
    n_tiles = n_tiles_u * n_tiles_i
    # rows whose k was found too low are done again
    for kernel, n_programs in (
        (_exp_gemm_kernel, n_tiles),
        (_exp_gemm_raised_kernel, min(n_tiles, RAISED_PROGRAMS)),
    ):
        launch(
            kernel, (n_programs,),
            hidden, weight, wide_bias, k,
            e, sums,
            n_users, n_items, n_tiles_i,
            N_HIDDEN=n_hidden, N_PADDED=n_padded,
            BLOCK_U=tile.block_u, BLOCK_I=tile.block_i, BLOCK_D=tile.block_d, GROUP_U=tile.group_u,
            PRECISION="tf32" if kind == "tf32" else "ieee",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    launch(
        _clicks_kernel, (n_users,),
        hidden, weight, bias, k, sums,
        *csr,
        e,
        results,
        n_tiles_i,
        N_HIDDEN=n_hidden, N_PADDED=n_padded,
        BLOCK_NNZ=click_tile.block_nnz, BLOCK_D=click_tile.block_d, num_warps=click_tile.num_warps,
    )  # fmt: skip
