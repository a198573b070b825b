"""multinomial_nll: log-softmax x clicks from logits that already exist; the targets stay sparse.

CUDA tensors take the Triton kernels of fastvae.kernels.multinomial_nll. CPU tensors take the functions below, which go
over the logits in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clicks import Clicks, gather_rows
from . import _buffers
from ._checks import (
    check_clicks,
    check_devices,
    check_kernel_dtypes,
    check_tensor,
    kernels_of,
    reduce_users,
    sum_dtype,
)

BLOCK_BYTES = 2**21  # fp32 logits worked on at once: in the cache, and few enough calls


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

    Differentiable in logits and user_weights: d nll / d logits = N_u softmax(logits) - x.
    Raises: TypeError (clicks, dtype), ValueError (shapes, reduction), RuntimeError (mixed devices).
    Source: Liang et al. 2018 (arXiv:1802.05814), eq. 2; reference: fastvae.reference.multinomial_nll.
    """
    op = "multinomial_nll"
    check_clicks(op, clicks)
    check_tensor(op, "logits", logits, clicks.shape)
    check_kernel_dtypes(op, logits=logits)
    check_devices(op, clicks, logits=logits, user_weights=user_weights)
    nll, _ = _multinomial_nll(logits, clicks.indptr, clicks.indices, clicks.values, clicks.row_ids)
    return reduce_users(op, nll, reduction, user_weights)


@torch.library.custom_op("fastvae::multinomial_nll", mutates_args=(), device_types="cpu")
def _multinomial_nll(
    logits: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """nll [n_users], and lse in two parts [2, n_users]: row maximum, log of the sum of exp(logits - maximum)."""
    targets = Targets(indptr, indices, values, rows, logits.shape[1])
    lse = _row_statistics(logits)
    clicked = logits[targets.user, targets.item].to(lse.dtype)
    return targets.nll(clicked, *lse), lse


@_multinomial_nll.register_fake
def _(logits, indptr, indices, values, rows):
    nll = logits.new_empty((logits.shape[0],), dtype=sum_dtype(logits.dtype))
    return nll, nll.new_empty((2, logits.shape[0]))


@torch.library.custom_op("fastvae::multinomial_nll_dlogits", mutates_args=(), device_types="cpu")
def _dlogits(
    dnll: Tensor,
    logits: Tensor,
    lse: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """dlogits[u, i] = dnll[u] (N_u softmax(logits[u])_i - x[u, i]) in logits' dtype."""
    targets = Targets(indptr, indices, values, rows, logits.shape[1])
    peak, log_sum = lse
    factor = dnll * targets.n_clicks(peak.dtype)
    grad = _buffers.empty(tuple(logits.shape), logits.dtype)
    for block in row_blocks(logits):
        z = logits[block].to(peak.dtype) - peak[block, None]
        z = z.sub_(log_sum[block, None]).exp_().mul_(factor[block, None])
        first, last = int(targets.offsets[block.start]), int(targets.offsets[block.stop])
        user, item = targets.user[first:last], targets.item[first:last]
        z[user - block.start, item] -= targets.times_value(dnll[user], first, last)
        grad[block] = z
    return grad


@_dlogits.register_fake
def _(dnll, logits, lse, indptr, indices, values, rows):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class Targets:
    """The clicks of a choice of rows as coordinate lists on the CPU; user u's are [offsets[u], offsets[u + 1])."""

    def __init__(self, indptr, indices, values, rows, n_items: int):
        self.offsets, position = gather_rows(indptr, rows)
        self.item = indices[position].long()
        self.user = torch.repeat_interleave(self.offsets.diff())
        self.value = None if values is None else values[position]
        self.flat = self.user * n_items + self.item

    def times_value(self, t: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """t[n] * x of click n."""
        return t if self.value is None else t * self.value[first:last]

    def n_clicks(self, dtype: torch.dtype) -> Tensor:
        """N_u = sum_i x[u, i]."""
        if self.value is None:
            return self.offsets.diff().to(dtype)
        return self.per_user(self.value.to(dtype))

    def per_user(self, t: Tensor) -> Tensor:
        """Sums of t [nnz] over each user's clicks."""
        # one after the other: in fp32 a user of 1,000 clicks would lose a digit
        total = t.new_zeros(len(self.offsets) - 1, dtype=torch.float64)
        return total.index_add_(0, self.user, t.double()).to(t.dtype)

    def nll(self, clicked: Tensor, peak: Tensor, log_sum: Tensor) -> Tensor:
        """sum_i x[u, i] (lse[u] - logit[u, i]) from the clicked logits [nnz]."""
        # maximum and log-sum stay apart: at logits of 1e8 their sum would lose the loss
        return self.per_user(self.times_value((peak[self.user] - clicked) + log_sum[self.user]))


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
        log_sum[block] = (z - peak[block, None]).exp_().sum(1).log_()
    return lse


@_multinomial_nll.register_kernel("cuda")
def _(logits, indptr, indices, values, rows):
    kernels = kernels_of("multinomial_nll")
    return kernels.multinomial_nll_fwd(_row_major(logits), indptr, indices, values, rows)


@_dlogits.register_kernel("cuda")
def _(dnll, logits, lse, indptr, indices, values, rows):
    kernels = kernels_of("multinomial_nll")
    logits = _row_major(logits)
    return kernels.multinomial_nll_bwd(logits, lse, dnll, indptr, indices, values, rows)


def _row_major(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], *inputs[1:])


def _backward(ctx, dnll, _):
    dlogits = None
    if dnll is not None and ctx.needs_input_grad[0]:
        logits, lse, *csr = ctx.saved_tensors
        dlogits = _dlogits(dnll.contiguous(), logits, lse, *csr)
    return dlogits, None, None, None, None


_multinomial_nll.register_autograd(_backward, setup_context=_setup_context)
