"""multinomial_nll: log-softmax x clicks from logits that already exist; the targets stay sparse.

CUDA tensors take the Triton kernels of fastvae.kernels.multinomial_nll. CPU tensors take the functions below, which go
over the logits in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._checks import check_clicks
from ..clicks import Clicks
from . import _buffers
from ._checks import (
    check_devices,
    check_kernel_dtypes,
    check_tensor,
    reduce_users,
    sum_dtype,
)
from ._dispatch import Op, needing_triton
from ._rows import Rows

# fp32 logits worked on at once: in the cache, and few enough calls
BLOCK_BYTES = 2**21


def multinomial_nll(
    logits: Tensor,
    clicks: Clicks,
    *,
    reduction: str = "none",
    user_weights: Tensor | None = None,
) -> Tensor:
    """Multinomial negative log-likelihood of each user's clicks under softmax(logits).

        nll[u] = sum_i x[u, i] * (logsumexp(logits[u]) - logits[u, i])

    >>> multinomial_nll(torch.zeros(1, 3), Clicks([0, 2], [0, 1], [2.0, 1.0], n_items=3))
    tensor([3.2958])

    logits        [n_users, n_items]  any float; never written to
    clicks        [n_users, n_items]  a user without clicks gives 0
    reduction     "none", "sum" or "mean" over users
    user_weights  [n_users]           factor of each user's nll, or None
    returns       [n_users] or a scalar; fp32 (fp64 for fp64 logits), nats

    Differentiable, in reverse mode and once, in logits and user_weights: d nll / d logits = N_u softmax(logits) - x.
    Raises: TypeError (clicks, dtype), ValueError (shapes, reduction), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), eq. 2; reference: fastvae.reference.multinomial_nll.
    """
    op = "multinomial_nll"
    check_clicks(op, "clicks", clicks)
    check_tensor(op, "logits", logits, clicks.shape)
    check_kernel_dtypes(op, logits=logits)
    check_devices(op, clicks, logits=logits, user_weights=user_weights)
    nll = _MULTINOMIAL_NLL(logits, *clicks.csr)
    return reduce_users(op, nll, reduction, user_weights)


def _multinomial_nll_cpu(
    logits: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """nll [n_users], and lse in two parts [2, n_users]: row maximum, log of the sum of exp(logits - maximum)."""
    targets = Rows((indptr, indices, values, rows), sum_dtype(logits.dtype))
    lse = _row_statistics(logits)
    clicked = logits[targets.user, targets.item].to(lse.dtype)
    return targets.nll(clicked, *lse), lse


def _multinomial_nll_fake(logits, indptr, indices, values, rows):
    nll = logits.new_empty((logits.shape[0],), dtype=sum_dtype(logits.dtype))
    return nll, nll.new_empty((2, logits.shape[0]))


def _dlogits_cpu(
    dnll: Tensor,
    logits: Tensor,
    lse: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """dlogits[u, i] = dnll[u] (N_u softmax(logits[u])_i - x[u, i]) in logits' dtype."""
    targets = Rows((indptr, indices, values, rows), lse.dtype)
    peak, log_sum = lse
    factor = dnll * targets.n_clicks()
    grad = _buffers.empty(tuple(logits.shape), logits.dtype)
    for block in row_blocks(logits):
        z = logits[block].to(peak.dtype) - peak[block, None]
        z = z.sub_(log_sum[block, None]).exp_().mul_(factor[block, None])
        first, last = int(targets.offsets[block.start]), int(targets.offsets[block.stop])
        user, item = targets.user[first:last], targets.item[first:last]
        z[user - block.start, item] -= targets.times_value(dnll[user], first, last)
        grad[block] = z
    return grad


def _dlogits_fake(dnll, logits, lse, indptr, indices, values, rows):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def row_blocks(logits: Tensor) -> list[slice]:
    """Blocks of rows whose fp32 logits take BLOCK_BYTES."""
    n_users, n_items = logits.shape
    step = max(1, BLOCK_BYTES // max(1, 4 * n_items))
    return [slice(start, min(start + step, n_users)) for start in range(0, n_users, step)]


def _row_statistics(logits: Tensor) -> Tensor:
    lse = logits.new_empty((2, len(logits)), dtype=sum_dtype(logits.dtype))
    peak, log_sum = lse
    for block in row_blocks(logits):
        z = logits[block].to(peak.dtype)
        torch.amax(z, 1, out=peak[block])
        # a row of -inf alone has no largest logit: its exponentials are 0, and a click costs inf
        peak[block].clamp_(min=torch.finfo(peak.dtype).min)
        total = (z - peak[block, None]).exp_().sum(1)
        log_sum[block] = torch.where(total == 0, 0, total.log())
    return lse


@functools.cache
def _kernels():
    with needing_triton("multinomial_nll"):
        from ..kernels import multinomial_nll as kernels
    return kernels


def _multinomial_nll_cuda(logits, indptr, indices, values, rows):
    return _kernels().multinomial_nll_fwd(_row_major(logits), (indptr, indices, values, rows))


def _dlogits_cuda(dnll, logits, lse, indptr, indices, values, rows):
    return _kernels().multinomial_nll_bwd(
        _row_major(logits), lse, dnll, (indptr, indices, values, rows)
    )


def _row_major(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


_DLOGITS = Op("multinomial_nll_dlogits", _dlogits_cpu, _dlogits_cuda, _dlogits_fake)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], *inputs[1:])


def _backward(ctx, dnll, *_):
    dlogits = None
    if dnll is not None and ctx.needs_input_grad[0]:
        logits, lse, *csr = ctx.saved_tensors
        dlogits = _DLOGITS(dnll.contiguous(), logits, lse, *csr)
    return dlogits, None, None, None, None


_MULTINOMIAL_NLL = Op(
    "multinomial_nll",
    _multinomial_nll_cpu,
    _multinomial_nll_cuda,
    _multinomial_nll_fake,
    _setup_context,
    _backward,
)
