"""Adam over all weights at once, and their bf16 copies for the next step's products.

    t += 1             m += (1 - beta1) (g - m)             v += (1 - beta2) (g^2 - v)
    weight -= lr m^ / (sqrt(v^) + eps)                      m^ = m / (1 - beta1^t),  v^ = v / (1 - beta2^t)
    shadow = weight rounded to bf16

One launch for tensors of any sizes: a program takes one block of one of them. Everything is read and written once, 28
bytes a number and 2 more for its shadow. The count t lies on the device, so that a replayed CUDA graph counts on; each
program has a copy of its own, as none may change what another has yet to read.
Math: Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980). Reference: torch.optim.Adam.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import launch

MAX_TENSORS = 16  # of one launch: a program picks its tensor's pointers one comparison at a time


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step, to the last digits also where beta^step is close to one."""
    x = log_beta * step
    # -expm1(x) by its series; at x = -1/2 the first term left out is 1e-8 of the sum
    series = x / 8 + 1
    for k in tl.static_range(7, 1, -1):
        series = series * x / k + 1
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _lerp(old, new, decay):
    """beta old + (1 - beta) new, whose weights sum to one also where decay, 1 - beta, has been rounded."""
    rise = new - old
    return tl.where(decay < 0.5, old + decay * rise, new - (1 - decay) * rise)


@triton.jit
def _count_step(step_ptr):
    """One more than the count so far, stored too."""
    step = tl.load(step_ptr) + 1
    tl.debug_barrier()  # every thread has read the count before one raises it
    tl.store(step_ptr, step)
    return step


@triton.jit
def _update_block(
    weight_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr,
    start, grad_i, i, mask,
    step_size, root_scale, decays, eps,
):  # fmt: skip
    """Update numbers start + i, with gradients at start + grad_i; mask is None for a whole block, read in 16 bytes."""
    # int64 for a block's place, int32 inside it: fewer registers
    weight_ptr += start
    grad_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    grad = tl.load(grad_ptr + grad_i, mask=mask)
    exp_avg = tl.load(exp_avg_ptr + i, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + i, mask=mask)
    weight = tl.load(weight_ptr + i, mask=mask)
    exp_avg = _lerp(exp_avg, grad, decays[0])
    exp_avg_sq = _lerp(exp_avg_sq, grad * grad, decays[1])
    weight -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * root_scale + eps)
    tl.store(exp_avg_ptr + i, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + i, exp_avg_sq, mask=mask)
    tl.store(weight_ptr + i, weight, mask=mask)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + start + i, weight.to(tl.bfloat16), mask=mask)


@triton.jit
def _adam_kernel(
    grad_ptrs, lr_ptr,  # inputs; what ends in _ptrs is a tuple with an entry for each tensor
    weight_ptrs, exp_avg_ptrs, exp_avg_sq_ptrs, step_ptrs,  # in place
    shadow_ptrs,  # outputs
    numels, row_quads, gap_quads,  # sizes, tuples too; fours of numbers in a gradient's row, and between two rows
    lr, decays, log_betas, eps,  # two decays, two logs
    BLOCK: tl.constexpr,
):  # fmt: skip
    # this program's tensor, and its block in it
    block = tl.program_id(0)
    n = tl.cast(numels[0], tl.int64)
    row_quad = tl.cast(row_quads[0], tl.int32)
    gap_quad = tl.cast(gap_quads[0], tl.int32)
    grad_ptr = grad_ptrs[0]
    weight_ptr = weight_ptrs[0]
    exp_avg_ptr = exp_avg_ptrs[0]
    exp_avg_sq_ptr = exp_avg_sq_ptrs[0]
    step_ptr = step_ptrs[0]
    shadow_ptr = None
    if shadow_ptrs is not None:
        shadow_ptr = shadow_ptrs[0]
    first = tl.cdiv(numels[0], BLOCK)
    for t in tl.static_range(1, len(weight_ptrs)):
        later = tl.program_id(0) >= first
        block = tl.where(later, tl.program_id(0) - first, block)
        n = tl.where(later, tl.cast(numels[t], tl.int64), n)
        row_quad = tl.where(later, row_quads[t], row_quad)
        gap_quad = tl.where(later, gap_quads[t], gap_quad)
        grad_ptr = tl.where(later, grad_ptrs[t], grad_ptr)
        weight_ptr = tl.where(later, weight_ptrs[t], weight_ptr)
        exp_avg_ptr = tl.where(later, exp_avg_ptrs[t], exp_avg_ptr)
        exp_avg_sq_ptr = tl.where(later, exp_avg_sq_ptrs[t], exp_avg_sq_ptr)
        step_ptr = tl.where(later, step_ptrs[t], step_ptr)
        if shadow_ptrs is not None:
            shadow_ptr = tl.where(later, shadow_ptrs[t], shadow_ptr)
        first += tl.cdiv(numels[t], BLOCK)

    step = _count_step(step_ptr + block)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    step_size = lr / _one_minus_power(log_betas[0], step)
    root_scale = 1 / tl.sqrt(_one_minus_power(log_betas[1], step))

    start = block.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    # four numbers side by side have their gradients side by side
    grad_i = i + (block * (BLOCK // 4) + i // 4) // row_quad * gap_quad * 4
    if n - start >= BLOCK:
        _update_block(
            weight_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr,
            start, grad_i, i, None,
            step_size, root_scale, decays, eps,
        )  # fmt: skip
    else:
        _update_block(
            weight_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, shadow_ptr,
            start, grad_i, i, i < n - start,
            step_size, root_scale, decays, eps,
        )  # fmt: skip


def count_shape(weight: Tensor) -> tuple[int]:
    """Shape of a weight's counts of steps: one for each program that shares it."""
    return (-(-weight.numel() // tiles.of(weight.device).adam.block),)


def has_gaps(weight: Tensor, grad: Tensor) -> bool:
    """Whether a gradient has a matrix' rows in the same order, but with gaps between: the left part of a wider product.

    The kernel takes them by fours: rows and gaps must be of whole ones, and their number fit the arithmetic.
    """
    if weight.ndim != 2 or grad.shape != weight.shape or grad.dtype != weight.dtype:
        return False
    slow, fast = (0, 1) if weight.stride(1) == 1 else (1, 0)
    row, stride = weight.shape[fast], grad.stride(slow)
    return (
        grad.stride(fast) == weight.stride(fast) == 1
        and weight.stride(slow) == row < stride
        and row % 4 == stride % 4 == 0
        and weight.shape[slow] * stride < 2**31
    )


def _quads_of(weight: Tensor, grad: Tensor) -> tuple[int, int]:
    """Fours of numbers in a gradient's row, and between two rows."""
    if grad.stride() == weight.stride():
        return 2, 0
    row, stride = max(weight.stride()), max(grad.stride())
    return row // 4, (stride - row) // 4


def adam(
    weights: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor],
    shadows: Sequence[Tensor] | None,
    *, lr: float | Tensor, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Launch the kernel on weights of one device, in place. Arguments are already checked by fastvae.adam.

    weights, exp_avgs, exp_avg_sqs  fp32, not empty; the three of a weight alike in shape and strides, without gaps
    grads    fp32, as the weights, or with has_gaps
    steps    [count_shape] each  fp32, the steps so far in every entry
    shadows  bf16, or None; a weight's numbers come first, in the order of its memory, and what follows is left alone
    lr       float, or a scalar tensor on the device
    """
    block, num_warps = tiles.of(weights[0].device).adam
    lr, lr_ptr = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    decays = tuple(1 - beta for beta in betas)
    log_betas = tuple(math.log(beta) if beta > 0 else -math.inf for beta in betas)
    with tiles.device_guard(weights[0]):
        for begin in range(0, len(weights), MAX_TENSORS):
            part = slice(begin, begin + MAX_TENSORS)
            numels = tuple(weight.numel() for weight in weights[part])
            rows = [_quads_of(w, g) for w, g in zip(weights[part], grads[part], strict=True)]
            # triton.cdiv takes 4 us a call on the host
            grid = (sum(-(-n // block) for n in numels),)
            launch(
                _adam_kernel, grid,
                tuple(grads[part]), lr_ptr,
                tuple(weights[part]), tuple(exp_avgs[part]), tuple(exp_avg_sqs[part]), tuple(steps[part]),
                None if shadows is None else tuple(shadows[part]),
                numels, *zip(*rows, strict=True),
                lr, decays, log_betas, eps,
                BLOCK=block, num_warps=num_warps,
            )  # fmt: skip
