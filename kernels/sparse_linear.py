"""First dense layer on a batch of CSR rows: no dense input, forward or backward.

    s[u]  = 1 / (||x[u]|| (1 - p))
    a[n]  = f(keep[n] * s[u] * values[n])      f = identity, or tanh with tanh_input
    y[u]  = act(sum_n a[n] * W[i(n), :] + b)   over the clicks n of user u; act = tanh or identity
    dW[i] = sum_n a[n] * dpre[u(n), :]         over the clicks n of item i; dpre = gradient of the sum above

W is read item-major: an item's n_hidden numbers lie side by side. keep[n] is a function of the seed and of the click's
position n in the matrix, so backward draws it again and none of it is stored. The bias gradient is dpre.sum(0).
Math: Liang et al. 2018, section 2.2 (arXiv:1802.05814). Reference: fastvae.reference.sparse_linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .csr import Csr, click_values, n_users_of, row_clicks

SMALLEST = tl.constexpr(1.2e-38)  # normal fp32 number that stands for an empty row's squared norm


@triton.jit
def _tanh(x):
    # a polynomial near zero (Cephes tanhf), where the other formula would lose the last digits
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = x + x * z * (p * z - 3.33332819422e-1)
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _coefficient(scale, value, TANH_INPUT: tl.constexpr):
    a = scale * value
    if TANH_INPUT:
        a = _tanh(a)
    return a


@triton.jit
def _dropout_keep(seed_ptr, n, drop_below):
    low = (n & 0xFFFFFFFF).to(tl.uint32)
    high = (n >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
    return (word >> 8).to(tl.int32) >= drop_below


@triton.jit
def _program(N_HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's user or item, and its features; those of one user or item start side by side."""
    n_blocks: tl.constexpr = (N_HIDDEN + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % n_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return (tl.program_id(0) // n_blocks).to(tl.int64), d


@triton.jit
def _positions(start, BLOCK_NNZ: tl.constexpr):
    return start + tl.arange(0, BLOCK_NNZ).to(tl.int64)  # a position passes 2**31 in a large matrix


@triton.jit
def _load_clicks(indices_ptr, seed_ptr, start, end, drop_below, BLOCK_NNZ: tl.constexpr):
    """Position and item of a block of clicks; live where a click lies before end and isn't dropped."""
    n = _positions(start, BLOCK_NNZ)
    live = n < end
    # not predicated on keep: the index is on its way while Philox runs
    item = tl.load(indices_ptr + n, mask=live, other=0)
    if seed_ptr is not None:
        # by way of one word: else each of the 32 threads that share a weight row draws its number again
        tl.static_assert(BLOCK_NNZ <= 64)
        bit = _positions(0, BLOCK_NNZ)
        word = tl.sum((live & _dropout_keep(seed_ptr, n, drop_below)).to(tl.int64) << bit, axis=0)
        live = ((word >> bit) & 1) == 1
    return n, item, live


@triton.jit
def _offsets(r, live, d, STRIDE_R: tl.constexpr, STRIDE_D: tl.constexpr, N_HIDDEN: tl.constexpr):
    """Offsets of features d of rows r, and the mask of the live ones."""
    # int64: row 2,100,000 of 1,024 features lies beyond 2**31
    offset = r.to(tl.int64)[:, None] * STRIDE_R + (d.to(tl.int64) * STRIDE_D)[None, :]
    return offset, live[:, None] & (d < N_HIDDEN)[None, :]


@triton.jit
def _sparse_linear_fwd_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, weight_ptr, bias_ptr, seed_ptr,  # inputs
    y_ptr, scale_ptr,  # outputs
    drop_below, keep_scale,  # dropout
    NORMALIZE: tl.constexpr, TANH: tl.constexpr, TANH_INPUT: tl.constexpr,
    N_HIDDEN: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    u, d = _program(N_HIDDEN, BLOCK_D)
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)

    # scale by the norm of the whole row, dropped clicks included; 0 for an empty row
    squares = (end - begin).to(tl.float32)
    if NORMALIZE and values_ptr is not None:
        squares = 0.0
        for start in range(begin, end, BLOCK_NNZ):
            n = _positions(start, BLOCK_NNZ)
            value = click_values(values_ptr, n, n < end)
            squares += tl.sum(value * value, axis=0)
    scale = tl.where(squares > 0.0, keep_scale, 0.0)
    if NORMALIZE:
        scale /= tl.sqrt_rn(tl.maximum(squares, SMALLEST))

    # gather-sum; the weights of a dropped click are not read
    acc = tl.zeros([BLOCK_D], tl.float32)
    n, item, live = _load_clicks(indices_ptr, seed_ptr, begin, end, drop_below, BLOCK_NNZ)
    for start in range(begin, end, BLOCK_NNZ):
        offset, mask = _offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
        weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        a = _coefficient(scale, click_values(values_ptr, n, live), TANH_INPUT)
        # the next items travel along with these weights: one latency a block instead of two
        n, item, live = _load_clicks(
            indices_ptr, seed_ptr, start + BLOCK_NNZ, end, drop_below, BLOCK_NNZ
        )
        acc += tl.sum(a[:, None] * weight, axis=0)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
    if TANH:
        acc = _tanh(acc)
    tl.store(y_ptr + u * N_HIDDEN + d, acc, mask=d < N_HIDDEN)
    tl.store(scale_ptr + u, scale)  # by each of the row's programs: the same number


@triton.jit
def _sparse_linear_bwd_weight_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, dpre_ptr, seed_ptr, scale_ptr,  # inputs
    dweight_ptr,  # outputs; starts as zeros
    drop_below,  # dropout
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    TANH_INPUT: tl.constexpr,
    N_HIDDEN: tl.constexpr, N_PARTS: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a user's programs share the blocks of clicks, not the features: no click is drawn or read twice
    u, part = tl.program_id(0).to(tl.int64) // N_PARTS, tl.program_id(0) % N_PARTS
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    scale = tl.load(scale_ptr + u)
    for start in range(begin + part * BLOCK_NNZ, end, N_PARTS * BLOCK_NNZ):
        n, item, live = _load_clicks(indices_ptr, seed_ptr, start, end, drop_below, BLOCK_NNZ)
        a = _coefficient(scale, click_values(values_ptr, n, live), TANH_INPUT)
        for left in range(0, N_HIDDEN, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            row_ptr = dpre_ptr + u * STRIDE_DPRE_U + d.to(tl.int64) * STRIDE_DPRE_D
            dpre = tl.load(row_ptr, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
            offset, mask = _offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
            # relaxed: nobody reads a sum before the kernel has ended
            tl.atomic_add(
                dweight_ptr + offset, a[:, None] * dpre[None, :], mask=mask, sem="relaxed"
            )


@triton.jit
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
        n = _positions(start, BLOCK_NNZ)
        live = n < end
        item = tl.load(indices_ptr + n, mask=live, other=0).to(tl.int64)
        if seed_ptr is not None:
            live = live & _dropout_keep(seed_ptr, n, drop_below)
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


@triton.jit
def _sparse_linear_bwd_weight_ordered_kernel(
    indptr_ptr, indices_ptr, values_ptr, rows_ptr, dpre_ptr, scale_ptr, marks_ptr,  # inputs
    dweight_ptr,  # outputs
    n_words,  # sizes
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    TANH_INPUT: tl.constexpr, N_HIDDEN: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i, d = _program(N_HIDDEN, BLOCK_D)
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
                    a = _coefficient(scale, click_values(values_ptr, n, marked), TANH_INPUT)
                    offset, mask = _offsets(u, marked, d, STRIDE_DPRE_U, STRIDE_DPRE_D, N_HIDDEN)
                    dpre = tl.load(dpre_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                    acc += tl.sum(a[:, None] * dpre, axis=0)
            first = tl.min(tl.where(marked_w > first, marked_w, end), axis=0)
    # an item without clicks gets its zeros here
    tl.store(dweight_ptr + i * N_HIDDEN + d, acc, mask=d < N_HIDDEN)


@triton.jit
def _first_range(indptr_ptr, rows_ptr, u):
    """row_clicks of user u, where rows are sorted: empty if the user before has the same row."""
    begin, end = row_clicks(u, indptr_ptr, rows_ptr)
    if rows_ptr is not None:
        before = tl.load(rows_ptr + u - 1, mask=u > 0, other=-1)
        end = tl.where(before == tl.load(rows_ptr + u), begin, end)
    return begin, end


@triton.jit
def _click_products_kernel(
    indptr_ptr, indices_ptr, rows_ptr, weight_ptr, dpre_ptr, seed_ptr,  # inputs; rows are sorted
    dvalues_ptr,  # outputs
    drop_below,  # dropout
    STRIDE_DPRE_U: tl.constexpr, STRIDE_DPRE_D: tl.constexpr,  # strides, in elements
    N_HIDDEN: tl.constexpr, BLOCK_NNZ: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # keep[n] * (weight row of click n . dpre); users of one row have their mask in common, so that their dpre add up
    u = tl.program_id(0).to(tl.int64)
    begin, end = _first_range(indptr_ptr, rows_ptr, u)
    last = u
    if rows_ptr is not None:
        row = tl.load(rows_ptr + u)
        while tl.load(rows_ptr + last + 1, mask=last + 1 < tl.num_programs(0), other=-1) == row:
            last += 1
    for start in range(begin, end, BLOCK_NNZ):
        n, item, live = _load_clicks(indices_ptr, seed_ptr, start, end, drop_below, BLOCK_NNZ)
        product = tl.zeros([BLOCK_NNZ], tl.float32)
        for left in range(0, N_HIDDEN, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            dpre = tl.zeros([BLOCK_D], tl.float32)
            for same in range(u, last + 1):
                row_ptr = dpre_ptr + same * STRIDE_DPRE_U + d.to(tl.int64) * STRIDE_DPRE_D
                dpre += tl.load(row_ptr, mask=d < N_HIDDEN, other=0.0).to(tl.float32)
            offset, mask = _offsets(item, live, d, N_HIDDEN, 1, N_HIDDEN)
            weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(weight * dpre[None, :], axis=1)
        tl.store(dvalues_ptr + n, product, mask=n < end)


@triton.jit
def _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT: tl.constexpr):
    """Values of clicks n, and their gradients if the norm were a constant."""
    value = tl.load(values_ptr + n, mask=n < end, other=0.0)
    slope = scale * tl.load(dvalues_ptr + n, mask=n < end, other=0.0)
    if TANH_INPUT:
        a = _tanh(scale * value)
        slope *= 1.0 - a * a
    return value, slope


@triton.jit
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
            n = _positions(start, BLOCK_NNZ)
            value, slope = _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT)
            products += value * slope
            squares += value * value
        along = tl.sum(products, axis=0) / tl.maximum(tl.sum(squares, axis=0), SMALLEST)

    for start in range(begin, end, BLOCK_NNZ):
        n = _positions(start, BLOCK_NNZ)
        value, slope = _value_and_slope(values_ptr, dvalues_ptr, scale, n, end, TANH_INPUT)
        tl.store(dvalues_ptr + n, slope - along * value, mask=n < end)


def _dropout_arguments(seed: Tensor | None, dropout: float) -> tuple[Tensor | None, int, float]:
    """The kernels' seed, the 24-bit number below which a click is dropped, and the factor of those kept."""
    if seed is None or dropout == 0:
        return None, 0, 1.0
    return seed, round(dropout * 2**24), 1 / (1 - dropout) if dropout < 1 else 0.0


def _cut(tile: tiles.ClickTile | tiles.ItemTile, n_hidden: int) -> tuple[int, int, int]:
    """Features of a block, blocks of a row, warps of a program: a narrow layer takes a part of the tile."""
    block_d = min(tile.block_d, tiles.next_power_of_2(n_hidden))
    return block_d, tiles.cdiv(n_hidden, block_d), max(1, tile.num_warps * block_d // tile.block_d)


def sparse_linear_fwd(
    csr: Csr, weight: Tensor, bias: Tensor | None, seed: Tensor | None,
    *, dropout: float, normalize: bool, tanh: bool, tanh_input: bool, tile: tiles.ClickTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel. Arguments are already checked by fastvae.ops.

    csr      the clicks of these users, see kernels/csr.py
    weight   [n_items, n_hidden]  fp32, bf16 or fp16; contiguous
    bias     [n_hidden]           any float, contiguous; or None
    seed     [1]                  int64, or None for no dropout
    dropout  probability to drop a click, 0..1
    normalize, tanh, tanh_input   as in fastvae.reference.sparse_linear
    tile     launch configuration, from the table by default
    returns  y [n_users, n_hidden] dtype of weight; scale [n_users] fp32: s of the formulas, 0 for an empty row
    """
    n_users, n_hidden = n_users_of(csr), weight.shape[1]
    tile = tile or tiles.of(weight.device).sparse_forward[weight.dtype.itemsize]
    block_d, n_blocks, num_warps = _cut(tile, n_hidden)
    y = torch.empty(n_users, n_hidden, dtype=weight.dtype, device=weight.device)
    scale = torch.empty(n_users, dtype=torch.float32, device=weight.device)
    if n_users == 0:
        return y, scale
    seed, drop_below, keep_scale = _dropout_arguments(seed, dropout)
    with tiles.device_guard(weight):
        _sparse_linear_fwd_kernel[(n_users * n_blocks,)](
            *csr, weight, bias, seed,
            y, scale,
            drop_below, keep_scale,
            NORMALIZE=normalize, TANH=tanh, TANH_INPUT=tanh_input,
            N_HIDDEN=n_hidden, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return y, scale


def sparse_linear_bwd_weight(
    dpre: Tensor, csr: Csr, seed: Tensor | None, scale: Tensor, n_items: int,
    *, dropout: float, tanh_input: bool, deterministic: bool,
    tile: tiles.ClickTile | None = None, item_tile: tiles.ItemTile | None = None,
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
    n_users, n_hidden = dpre.shape
    ordered = deterministic and n_users > 0
    allocate = torch.empty if ordered else torch.zeros
    dweight = allocate(n_items, n_hidden, dtype=torch.float32, device=dpre.device)
    if n_users == 0 or n_items == 0:
        return dweight
    table = tiles.of(dpre.device)
    seed, drop_below, _ = _dropout_arguments(seed, dropout)
    flags = dict(STRIDE_DPRE_U=dpre.stride(0), STRIDE_DPRE_D=dpre.stride(1))
    flags |= dict(TANH_INPUT=tanh_input, N_HIDDEN=n_hidden)
    with tiles.device_guard(dpre):
        if not ordered:
            tile = tile or table.sparse_backward
            block_d, n_blocks, num_warps = _cut(tile, n_hidden)
            _sparse_linear_bwd_weight_kernel[(n_users * n_blocks,)](
                *csr, dpre, seed, scale,
                dweight,
                drop_below,
                **flags, N_PARTS=n_blocks, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
            )  # fmt: skip
            return dweight
        item_tile = item_tile or table.sparse_item
        block_d, n_blocks, num_warps = _cut(item_tile, n_hidden)
        n_words = tiles.cdiv(n_users, 32)
        marks = torch.zeros(n_items, n_words, dtype=torch.int32, device=dpre.device)
        indptr, indices, _, rows = csr
        _mark_clicks_kernel[(n_users,)](
            indptr, indices, rows, seed,
            marks,
            drop_below, n_words,
            BLOCK_NNZ=tiles.CLICKS_PER_BLOCK, num_warps=4,
        )  # fmt: skip
        _sparse_linear_bwd_weight_ordered_kernel[(n_items * n_blocks,)](
            *csr, dpre, scale, marks,
            dweight,
            n_words,
            **flags, BLOCK_WORDS=item_tile.block_words, BLOCK_U=item_tile.block_u, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return dweight


def sparse_linear_bwd_values(
    dpre: Tensor, weight: Tensor, csr: Csr, seed: Tensor | None, scale: Tensor,
    *, dropout: float, normalize: bool, tanh_input: bool, tile: tiles.ClickTile | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernel of the values' gradient. Arguments are already checked by fastvae.ops.

    dpre     [n_users, n_hidden]  any float, any strides: the gradient before the activation
    scale    [n_users]            fp32, from sparse_linear_fwd
    the rest as in sparse_linear_fwd; values is not None
    returns  dvalues [nnz] fp32, of the whole matrix: 0 outside the batch, the sum over users of the same row
    """
    n_users, n_hidden = dpre.shape
    indptr, indices, values, rows = csr
    tile = tile or tiles.of(dpre.device).sparse_backward
    block_d, _, num_warps = _cut(tile, n_hidden)
    dvalues = torch.zeros(len(indices), dtype=torch.float32, device=dpre.device)
    if n_users == 0:
        return dvalues
    if rows is not None:
        # users of one row side by side: one program adds them up, in order and without atomics
        rows, order = torch.sort(rows, stable=True)
        dpre, scale = dpre[order], scale[order]
    seed, drop_below, _ = _dropout_arguments(seed, dropout)
    with tiles.device_guard(dpre):
        _click_products_kernel[(n_users,)](
            indptr, indices, rows, weight, dpre, seed,
            dvalues,
            drop_below,
            STRIDE_DPRE_U=dpre.stride(0), STRIDE_DPRE_D=dpre.stride(1),
            N_HIDDEN=n_hidden, BLOCK_NNZ=tile.block_nnz, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
        _sparse_linear_bwd_values_kernel[(n_users,)](
            indptr, values, rows, scale,
            dvalues,
            NORMALIZE=normalize, TANH_INPUT=tanh_input, BLOCK_NNZ=tiles.CLICKS_PER_BLOCK, num_warps=4,
        )  # fmt: skip
    return dvalues
