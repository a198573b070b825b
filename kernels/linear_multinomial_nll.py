"""The last dense layer and the multinomial nll of its logits, which are never returned.

    logits[u, i] = hidden[u] . weight[i] + bias[i]
    nll[u]       = sum_i x[u, i] * (log sum_j exp(logits[u, j]) - logits[u, i])

Scaled exponentials: with any row constant k[u] near the row's largest logit

    E[u, i] = exp(logits[u, i] - k[u])          S[u] = sum_i E[u, i]        v[u] = N[u] / S[u],  N[u] = sum_i x[u, i]
    D[u, i] = E[u, i] - x[u, i] / v[u]          dlogits = dnll * v * D
    dhidden = (dnll v) * (D weight)             dweight = D^T ((dnll v) * hidden)             dbias = D^T (dnll v)

so one [n_users, n_items] buffer, written once by the GEMM's epilogue and touched again at the clicks only, serves
both products of the backward; dnll is a row factor that need not be known. k cancels exactly. S sums E as rounded
for storage, so D sums to zero over a row and stays exact where one item takes nearly all of the softmax.
Math: Liang et al. 2018, eq. 2 (arXiv:1802.05814). Reference: fastvae.reference.linear_multinomial_nll.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, click_values, row_clicks, row_sum
from .multinomial_nll import multinomial_nll_bwd, multinomial_nll_fwd

MAX_BYTES = 4 * 2**30  # budget of the [n_users, n_items] buffer; above it users come in chunks
N_PROBE = 1024  # items whose largest logit is taken for k
PAD = 128  # the buffer's width is a multiple of this, which aligns every row and tile
# a row with a logit this far above k is computed again with its true maximum: exp(40) leaves fp32 and bf16 room for
# the sum over 2**31 items and, in the backward, for its reciprocal times dnll and hidden
RAISE_ABOVE = tl.constexpr(40.0)
# log of a smaller E, a logit 69 below k, may not be the logit any more: E may have been rounded to zero
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _prepare_kernel(
    probe_ptr, bias_ptr,  # inputs
    k_ptr, wide_bias_ptr,  # outputs
    n_users, n_items, n_probe, step, width,  # sizes
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    if tl.program_id(0) < n_users:
        # k, the largest probed logit; and no rise above it yet
        u = tl.program_id(0).to(tl.int64)
        logits = tl.load(probe_ptr + u * n_probe + lane, mask=lane < n_probe, other=-float("inf"))
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + lane * step, mask=lane < n_probe, other=0.0).to(tl.float32)
        tl.store(k_ptr + u, tl.max(logits, axis=0))
        tl.store(k_ptr + n_users + u, 0.0)
    else:
        # bias as fp32, -inf in the padding: there E is zero without a mask, and tiles load it unmasked
        i = (tl.program_id(0) - n_users).to(tl.int64) * BLOCK + lane
        bias = tl.where(i < n_items, 0.0, -float("inf"))
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + i, mask=i < n_items, other=0.0).to(tl.float32)
        tl.store(wide_bias_ptr + i, bias, mask=i < width)


@triton.jit
def _exp_gemm_kernel(
    hidden_ptr, weight_ptr, bias_ptr,  # inputs
    k_ptr,  # inputs; its second row, how far logits rise above k, is an output unless RAISED
    e_ptr, sums_ptr,  # outputs
    n_users, n_items,  # sizes
    N_HIDDEN: tl.constexpr, N_PADDED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_U: tl.constexpr,
    E_DTYPE: tl.constexpr, PRECISION: tl.constexpr, RAISED: tl.constexpr,
):  # fmt: skip
    # tiles of items inside groups of GROUP_U tiles of users, so that a group reads the weights once
    n_tiles_u = tl.cdiv(n_users, BLOCK_U)
    n_tiles_i = tl.num_programs(0) // n_tiles_u
    group = tl.program_id(0) // (GROUP_U * n_tiles_i)
    in_group = tl.program_id(0) % (GROUP_U * n_tiles_i)
    group_size = tl.minimum(n_tiles_u - group * GROUP_U, GROUP_U)
    tile_u = group * GROUP_U + in_group % group_size
    tile_i = in_group // group_size
    # int64 for a tile's place in a matrix, int32 inside the tile: half the registers for its pointers
    u0 = tile_u.to(tl.int64) * BLOCK_U
    i0 = tile_i.to(tl.int64) * BLOCK_I
    u = tl.arange(0, BLOCK_U)
    i = tl.arange(0, BLOCK_I)
    mask_u = u < n_users - tile_u * BLOCK_U
    k_ptr += u0
    if RAISED:
        # a tile with a raised row is done again as a whole: its other rows give what they gave before
        rise = tl.load(k_ptr + n_users + u, mask=mask_u, other=0.0)
        if tl.max(rise, axis=0) == 0:
            return

    # rows outside the matrices repeat the last one: no mask inside the loop but that of the last features
    d = tl.arange(0, BLOCK_D)
    hidden_offsets = tl.minimum(u, n_users - 1 - tile_u * BLOCK_U)[:, None] * N_HIDDEN + d[None, :]
    weight_offsets = tl.minimum(i, n_items - 1 - tile_i * BLOCK_I)[:, None] * N_HIDDEN + d[None, :]
    hidden_ptr += u0 * N_HIDDEN
    weight_ptr += i0 * N_HIDDEN
    logits = tl.zeros([BLOCK_U, BLOCK_I], tl.float32)
    for start in range(0, N_HIDDEN, BLOCK_D):
        mask = (start + d < N_HIDDEN)[None, :]
        hidden = tl.load(hidden_ptr + (hidden_offsets + start), mask=mask, other=0.0)
        weight = tl.load(weight_ptr + (weight_offsets + start), mask=mask, other=0.0)
        logits = tl.dot(hidden, weight.T, logits, input_precision=PRECISION)

    # relative to k; the bias is -inf in the padding, which makes E zero there
    k = tl.load(k_ptr + u, mask=mask_u, other=0.0)
    if RAISED:
        k += tl.load(k_ptr + n_users + u, mask=mask_u, other=0.0)
    logits += tl.load(bias_ptr + i0 + i)[None, :] - k[:, None]
    if not RAISED:
        peak = tl.max(logits, axis=1)
        tl.atomic_max(k_ptr + n_users + u, peak, mask=mask_u & (peak > RAISE_ABOVE), sem="relaxed")
    e = tl.exp(logits).to(E_DTYPE)
    sums = tl.sum(e.to(tl.float32), axis=1)
    tl.store(sums_ptr + (u0 + u) * n_tiles_i + tile_i, sums, mask=mask_u)
    if e_ptr is not None:
        mask = mask_u[:, None] & (i < N_PADDED - tile_i * BLOCK_I)[None, :]
        tl.store(e_ptr + (u0 + u)[:, None] * N_PADDED + i0 + i[None, :], e, mask=mask)


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


@triton.jit
def _clicks_kernel(
    hidden_ptr, weight_ptr, bias_ptr, k_ptr, sums_ptr,  # inputs
    indptr_ptr, indices_ptr, values_ptr, rows_ptr,
    e_ptr,  # in place: E becomes D
    nll_ptr, v_ptr,  # outputs
    n_tiles_i,  # sizes
    N_HIDDEN: tl.constexpr, N_PADDED: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + u) + tl.load(k_ptr + tl.num_programs(0) + u)
    hidden_ptr += u * N_HIDDEN

    # S and v
    sums = tl.zeros([BLOCK_NNZ], tl.float32)
    for start in range(0, n_tiles_i, BLOCK_NNZ):
        t = start + tl.arange(0, BLOCK_NNZ)
        sums += tl.load(sums_ptr + u * n_tiles_i + t, mask=t < n_tiles_i, other=0.0)
    total = tl.sum(sums, axis=0)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    n_clicks = row_sum(values_ptr, begin, end, BLOCK_NNZ)
    tl.store(v_ptr + u, n_clicks / total)
    per_click = total / tl.maximum(n_clicks, 1e-30)  # no 0 / 0 where all values are zero

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
    tl.store(nll_ptr + u, tl.sum(nll, axis=0))


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the buffer for inputs of this type.

    bf16 keeps bf16. fp16 keeps fp32: fp16 itself ends at exp(11) and loses softmax values below 6e-5, the average at
    16,000 items; bf16 has the range, but not the eleven bits that plain torch works with at fp16.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _width(n_items: int) -> int:
    return triton.cdiv(n_items, PAD) * PAD


def _chunks(n_users: int, n_items: int, dtype: torch.dtype, max_bytes: int) -> list[slice]:
    """The fewest, evenly long row ranges whose buffer fits max_bytes; a single row always does."""
    row_bytes = max(1, _width(n_items) * stored_dtype(dtype).itemsize)
    n_chunks = max(1, triton.cdiv(n_users, max(1, max_bytes // row_bytes)))
    bounds = [n_users * c // n_chunks for c in range(n_chunks + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def stored_shape(
    n_users: int, n_items: int, dtype: torch.dtype, needs_grad: bool = True, max_bytes: int = MAX_BYTES
) -> tuple[int, int]:  # fmt: skip
    """Shape of the buffer that linear_multinomial_nll_fwd returns for inputs of this type.

    No rows without needs_grad, or where it would be over max_bytes: then the backward makes it again, chunk by chunk.
    The forward can't take the gradients along instead: dweight is a sum over users weighted by a dnll still unknown.
    """
    one_chunk = len(_chunks(n_users, n_items, dtype, max_bytes)) == 1
    return n_users if needs_grad and one_chunk else 0, _width(n_items)


def _clicks_of(part: slice, csr: Csr) -> Csr:
    """CSR arguments of a range of the batch's users."""
    indptr, indices, values, rows = csr
    if rows is None:
        return indptr[part.start : part.stop + 1], indices, values, None
    return indptr, indices, values, rows[part]


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 sums and an fp32 result."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    """Total so far and one more term; the first is taken as it is, not added to zeros."""
    return term if total is None else total.add_(term)


def _exp_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr,
    e: Tensor | None, allow_tf32: bool, tile: tiles.GemmTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll and v, and D in e unless it is None; one GEMM, with the exponential in its epilogue."""
    (n_users, n_hidden), n_items = hidden.shape, weight.shape[0]
    table, kind = tiles.of(hidden.device), tiles.product_kind(hidden.dtype, allow_tf32)
    tile = tile or table.gemm_tile(kind, n_users)
    click_tile = table.gathered_clicks if e is None else table.stored_clicks
    n_tiles_i = triton.cdiv(_width(n_items), tile.block_i)
    n_padded, width = 0 if e is None else e.stride(0), n_tiles_i * tile.block_i
    step = triton.cdiv(n_items, N_PROBE)
    probe = _mm(hidden, weight[::step].t())  # logits of up to N_PROBE items, spread over all
    wide_bias, k, sums, nll, v = (
        torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for shape in ((width,), (2, n_users), (n_users, n_tiles_i), (n_users,), (n_users,))
    )
    with tiles.device_guard(hidden):
        _prepare_kernel[(n_users + triton.cdiv(width, N_PROBE),)](
            probe, bias,
            k, wide_bias,
            n_users, n_items, probe.shape[1], step, width,
            BLOCK=N_PROBE, num_warps=4,
        )  # fmt: skip
        # the second launch only works on rows whose k the first one found too low
        for raised in (False, True):
            _exp_gemm_kernel[(triton.cdiv(n_users, tile.block_u) * n_tiles_i,)](
                hidden, weight, wide_bias,
                k,
                e, sums,
                n_users, n_items,
                N_HIDDEN=n_hidden, N_PADDED=n_padded,
                BLOCK_U=tile.block_u, BLOCK_I=tile.block_i, BLOCK_D=tile.block_d, GROUP_U=tile.group_u,
                E_DTYPE=tl.bfloat16 if hidden.dtype == torch.bfloat16 else tl.float32,
                PRECISION="tf32" if allow_tf32 else "ieee", RAISED=raised,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        _clicks_kernel[(n_users,)](
            hidden, weight, bias, k, sums,
            *csr,
            e,
            nll, v,
            n_tiles_i,
            N_HIDDEN=n_hidden, N_PADDED=n_padded,
            BLOCK_NNZ=click_tile.block_nnz, BLOCK_D=click_tile.block_d, num_warps=click_tile.num_warps,
        )  # fmt: skip
    return nll, v


def _logit_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr, e: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll and v = 1, and D = dnll/dlogits in e; torch's GEMM into e, then multinomial_nll on it in place."""
    logits = e[:, : weight.shape[0]]
    hidden, weight = hidden.to(e.dtype), weight.to(e.dtype)
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias.to(e.dtype), hidden, weight.t(), out=logits)
    nll, lse = multinomial_nll_fwd(logits, csr)
    ones = torch.ones_like(nll)
    multinomial_nll_bwd(logits, lse, ones, csr, inplace=True)
    return nll, ones


def _rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, csr: Csr,
    d: Tensor, allow_tf32: bool, fused: bool | None, tile: tiles.GemmTile | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """nll and v of some users, and D in d, unless d has no rows: then nothing of its size is made."""
    if len(hidden) == 0 or len(weight) == 0:
        nll = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        return nll, nll.clone()
    if fused is None:
        kind = tiles.product_kind(hidden.dtype, allow_tf32)
        fused = kind in tiles.of(hidden.device).fused
    if fused or len(d) == 0:
        return _exp_rows(hidden, weight, bias, csr, d if len(d) else None, allow_tf32, tile)
    return _logit_rows(hidden, weight, bias, csr, d)


def linear_multinomial_nll_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    csr: Csr,
    needs_grad: bool = True, allow_tf32: bool = False, max_bytes: int = MAX_BYTES,
    fused: bool | None = None, tile: tiles.GemmTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernels. Arguments are already checked by fastvae.ops.

    hidden   [n_users, n_hidden]  fp32, bf16 or fp16; contiguous
    weight   [n_items, n_hidden]  dtype of hidden; contiguous
    bias     [n_items]            dtype of hidden; contiguous, or None
    csr      the clicks of these users, see kernels/csr.py
    needs_grad  keep D for the backward; without it nothing of size n_users x n_items is made
    allow_tf32  fp32 inputs may be multiplied as tf32; torch's own products follow torch's setting
    max_bytes   budget of D; above it the backward makes D again, in chunks of users
    fused    exponentials in the GEMM's epilogue, or torch's GEMM and a pass over its result; by the table if None
    tile     launch configuration of the GEMM, from the table by default
    returns  nll [n_users] fp32 (nats), v [n_users] fp32, d of stored_shape and stored_dtype (D, or no rows)
    """
    shape = stored_shape(len(hidden), len(weight), hidden.dtype, needs_grad, max_bytes)
    d = torch.empty(shape, dtype=stored_dtype(hidden.dtype), device=hidden.device)
    nll, v = _rows(hidden, weight, bias, csr, d, allow_tf32, fused, tile)
    return nll, v, d


def linear_multinomial_nll_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    csr: Csr, v: Tensor, d: Tensor, dnll: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    allow_tf32: bool = False, max_bytes: int = MAX_BYTES,
    fused: bool | None = None, tile: tiles.GemmTile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The backward products, by torch. Nothing given is written to: a second call gives the same.

    hidden .. csr, allow_tf32, max_bytes, fused, tile  as in linear_multinomial_nll_fwd
    v, d     from linear_multinomial_nll_fwd
    dnll     [n_users]  any float, any stride, 0 included
    needs    which of the gradients of hidden, weight and bias to compute; the others are None
    returns  dhidden [n_users, n_hidden] dtype of hidden, dweight [n_items, n_hidden] fp32, dbias [n_items] fp32
    """
    parts, stored = [slice(0, len(hidden))], len(d) > 0
    if not stored:
        parts = _chunks(len(hidden), len(weight), hidden.dtype, max_bytes)
        d = d.new_empty(max(part.stop - part.start for part in parts), d.shape[1])
    dhidden = torch.empty_like(hidden) if needs[0] else None
    dweight = dbias = None
    same_weight = weight.to(d.dtype)
    for part in parts:
        h, d_part, v_part = hidden[part], d[: part.stop - part.start], v[part]
        if not stored:
            these = _clicks_of(part, csr)
            _, v_part = _rows(h, weight, bias, these, d_part, allow_tf32, fused, tile)
        d_part = d_part[:, : len(weight)]
        factor = (dnll[part].float() * v_part)[:, None]
        if dhidden is not None:
            dhidden[part] = factor * _mm(d_part, same_weight)
        if needs[1]:
            dweight = _sum(dweight, _mm(d_part.t(), (factor * h).to(d.dtype)))
        if needs[2]:
            dbias = _sum(dbias, _mm(d_part.t(), factor.to(d.dtype))[:, 0])
    return dhidden, dweight, dbias
