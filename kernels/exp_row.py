"""The parts of a pass over the logits of a user: largest, clicked ones, exponentials in place, clicks subtracted.

kernels/linear_multinomial_nll.py runs them in one kernel; kernels/nll_steps.py, where other ranges of the items have a
say in k and S, in three.
"""

import triton
import triton.language as tl

from .csr import click_values

# start of a running maximum: unlike -inf it gives no NaN in differences
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _row_logits(row_ptr, bias_ptr, i, n_items, N_PADDED: tl.constexpr, INSIDE: tl.constexpr):
    """Logits of items i, -inf in the padding; inside the row nothing is masked, so that a thread reads 16 bytes."""
    if INSIDE:
        logits = tl.load(row_ptr + i).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + i).to(tl.float32)
    else:
        logits = tl.load(row_ptr + i, mask=i < N_PADDED, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + i, mask=i < n_items, other=0.0).to(tl.float32)
        logits = tl.where(i < n_items, logits, -float("inf"))
    return logits


@triton.jit
def largest_logit(row_ptr, bias_ptr, n_items, N_PADDED: tl.constexpr, BLOCK_I: tl.constexpr):
    """The largest logit of a row; bias_ptr None where it is added already."""
    lane = tl.arange(0, BLOCK_I)
    inside = n_items // BLOCK_I * BLOCK_I  # items of whole blocks
    peak = tl.full([BLOCK_I], LOWEST, tl.float32)
    for start in range(0, inside, BLOCK_I):
        logits = _row_logits(row_ptr, bias_ptr, start + lane, n_items, N_PADDED, True)
        peak = tl.maximum(peak, logits)
    peak = tl.maximum(peak, _row_logits(row_ptr, bias_ptr, inside + lane, n_items, N_PADDED, False))
    return tl.max(peak, axis=0)


@triton.jit
def clicked_below(
    row_ptr, bias_ptr, indices_ptr, values_ptr, begin, end, k, BLOCK_NNZ: tl.constexpr
):
    """sum_i x[i] (k - logits[i]) over the clicks of a row."""
    below = tl.zeros([BLOCK_NNZ], tl.float32)
    for start in range(begin, end, BLOCK_NNZ):
        n = start + tl.arange(0, BLOCK_NNZ)
        i = tl.load(indices_ptr + n, mask=n < end, other=0)
        logits = tl.load(row_ptr + i, mask=n < end, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + i, mask=n < end, other=0.0).to(tl.float32)
        below += click_values(values_ptr, n, n < end) * (k - logits)
    return tl.sum(below, axis=0)


@triton.jit
def exponentials(row_ptr, bias_ptr, k, n_items, N_PADDED: tl.constexpr, BLOCK_I: tl.constexpr):
    """The row's logits become E, zero in the padding; returns S, the sum of E as rounded."""
    tl.debug_barrier()  # no thread may write before all have read
    lane = tl.arange(0, BLOCK_I)
    inside = n_items // BLOCK_I * BLOCK_I
    sums = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, inside, BLOCK_I):
        i = start + lane
        e = tl.exp(_row_logits(row_ptr, bias_ptr, i, n_items, N_PADDED, True) - k)
        e = e.to(row_ptr.dtype.element_ty)
        sums += e.to(tl.float32)
        tl.store(row_ptr + i, e)
    i = inside + lane
    e = tl.exp(_row_logits(row_ptr, bias_ptr, i, n_items, N_PADDED, False) - k)
    e = e.to(row_ptr.dtype.element_ty)
    tl.store(row_ptr + i, e, mask=i < N_PADDED)
    return tl.sum(sums + e.to(tl.float32), axis=0)


@triton.jit
def subtract_clicks(
    row_ptr, indices_ptr, values_ptr, begin, end, per_click, BLOCK_NNZ: tl.constexpr
):
    """The row's E becomes D."""
    for start in range(begin, end, BLOCK_NNZ):
        n = start + tl.arange(0, BLOCK_NNZ)
        e_ptrs = row_ptr + tl.load(indices_ptr + n, mask=n < end, other=0)
        clicked = tl.load(e_ptrs, mask=n < end, other=0.0).to(tl.float32)
        clicked -= click_values(values_ptr, n, n < end) * per_click
        tl.store(e_ptrs, clicked, mask=n < end)
